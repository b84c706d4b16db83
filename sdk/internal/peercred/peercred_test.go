package peercred_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/mvirt/mvirt/sdk/internal/peercred"
)

func serve(t *testing.T, check func(peercred.Cred) error) (string, chan peercred.Cred) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan peercred.Cred, 10)
	srv := grpc.NewServer(grpc.Creds(peercred.Credentials(check)), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if c, ok := peercred.FromContext(ctx); ok {
				seen <- c
			}
			return next(ctx, req)
		}))
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	go srv.Serve(ln)
	t.Cleanup(srv.Stop)
	return path, seen
}

func call(t *testing.T, path string, check func(peercred.Cred) error) error {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(peercred.Credentials(check)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}

var errNo = errors.New("not you")

func no(peercred.Cred) error { return errNo }

func me(c peercred.Cred) error {
	if int(c.PID) != os.Getpid() || int(c.UID) != os.Getuid() || int(c.GID) != os.Getgid() {
		return errors.New("somebody else")
	}
	return nil
}

func TestBothSidesKnowEachOther(t *testing.T) {
	path, seen := serve(t, me)
	if err := call(t, path, me); err != nil {
		t.Fatal(err)
	}
	if c := <-seen; me(c) != nil {
		t.Errorf("%+v", c)
	}
}

func TestRefusals(t *testing.T) {
	path, seen := serve(t, no)
	if err := call(t, path, nil); status.Code(err) != codes.Unavailable {
		t.Errorf("refused by the server: %v", err)
	}
	path, seen2 := serve(t, nil)
	if err := call(t, path, no); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "not you") {
		t.Errorf("refused by the client: %v", err)
	}
	if len(seen)+len(seen2) != 0 {
		t.Error("a refused peer's call was carried out")
	}
}

func TestNotAUnixSocket(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := peercred.Of(a); err == nil {
		t.Error("a pipe has credentials")
	}
}
