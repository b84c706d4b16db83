package host_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
	"github.com/mvirt/mvirt/sdk/internal/wire"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/sdktest"
	"github.com/mvirt/mvirt/sdk/sdktest/fakeplugin"
	"github.com/mvirt/mvirt/sdk/service"
)

// behave is the variable that makes this test binary a program of some behaviour.
const behave = "MVIRT_TEST_BEHAVIOUR"

func TestMain(m *testing.M) {
	if b := os.Getenv(behave); b != "" {
		os.Exit(program(b))
	}
	fakeplugin.Hook()
	goleak.VerifyTestMain(m)
}

// program is everything that can be configured as a plugin by mistake or by malice.
func program(b string) int {
	dir := os.Getenv("MVIRT_LAUNCH_DIR")
	switch b {
	case "exits":
		fmt.Fprintln(os.Stderr, "cannot open the pool tank")
		return 3
	case "hangs":
		fmt.Fprintln(os.Stderr, "waiting for a disk")
		select {}
	case "garbage":
		fmt.Println("usage: frobnicate [options]")
		select {}
	case "version":
		fmt.Println("1|7|unix|" + dir + "/x|grpc|")
		select {}
	case "netrpc":
		fmt.Println("1|1|unix|" + dir + "/x|netrpc|")
		select {}
	case "nobody": // the handshake names a socket where nobody listens
		fmt.Println("1|1|unix|" + dir + "/x|grpc|")
		select {}
	case "stranger": // another process serves the socket
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), behave+"=listens")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, _ := cmd.StdoutPipe()
		cmd.Start()
		out.Read(make([]byte, 1))
		fmt.Println("1|1|unix|" + dir + "/x|grpc|")
		select {}
	case "listens":
		net.Listen("unix", dir+"/x")
		fmt.Println(".")
		select {}
	case "mute": // accepts, and never speaks HTTP/2
		ln, err := net.Listen("unix", dir+"/x")
		if err != nil {
			return 1
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go io.Copy(io.Discard, c)
			}
		}()
		fmt.Println("1|1|unix|" + dir + "/x|grpc|")
		select {}
	case "raw": // as an author without the SDK and without go-plugin would
		ln, err := net.Listen("unix", dir+"/x")
		if err != nil {
			return 1
		}
		l, err := sdktest.NewLog(os.Getenv("TEST_DIR"))
		if err != nil {
			return 1
		}
		srv := grpc.NewServer()
		wire.Register(srv, l, nil)
		pluginpb.RegisterPluginServer(srv, &wire.PluginServer{Base: l, Info: service.Info{Kind: service.KindLog, Name: "raw", Version: "1", ContractMajor: 1, PID: uint32(os.Getpid())},
			Stop: func(context.Context) error { go srv.GracefulStop(); return nil }})
		fmt.Println("1|1|unix|" + dir + "/x|grpc|")
		srv.Serve(ln)
		return 0
	case "open fails":
		plugin.Main(plugin.Program{Kind: service.KindLog, Name: "x", Flags: func(fs *pflag.FlagSet) { fs.String("data-dir", "", "") }, Open: func(context.Context, plugin.Env) (service.Base, error) {
			return nil, errs.New(errs.Corrupt, "the store is damaged").Do("restore a backup")
		}})
	}
	var mode string
	if _, after, ok := strings.Cut(b, "log:"); ok {
		mode = after
	}
	plugin.Main(fakeplugin.Program(service.KindLog, func(env plugin.Env, base service.Base) service.Base {
		l := &odd{Log: base.(*sdktest.Log), env: env, mode: mode}
		switch mode {
		case "grandchild": // holds the pipes for ever
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), behave+"=hangs")
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			cmd.Start()
			env.Log.Warn("grandchild", "pid", cmd.Process.Pid)
		case "noise":
			os.Stderr.WriteString(strings.Repeat("x", 1<<20) + "\n")
			for i := range 2000 {
				env.Log.Info("noise", "n", i)
			}
		case "environment":
			for _, e := range os.Environ() {
				env.Log.Info("env", "entry", e)
			}
			fds, _ := os.ReadDir("/proc/self/fd")
			for _, f := range fds {
				to, _ := os.Readlink("/proc/self/fd/" + f.Name())
				env.Log.Info("fd", "n", f.Name(), "to", to)
			}
		}
		return l
	}))
	return 0
}

// odd is a log service that misbehaves as its mode says.
type odd struct {
	*sdktest.Log
	env  plugin.Env
	mode string
}

func (o *odd) Stats(ctx context.Context) (log.Stats, error) {
	switch o.mode {
	case "panics":
		panic("nil map or some such")
	case "dies":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case "slow call":
		<-ctx.Done()
		return log.Stats{}, ctx.Err()
	case "host calls":
		err := o.env.Host.Audit(ctx, service.AuditRecord{ID: "1", Message: "hello", Objects: []string{"vm"}})
		if err == nil {
			err = o.env.Host.Publish(ctx, service.Event{Type: "x"})
		}
		return log.Stats{}, err
	case "prints":
		fmt.Println("printed to stdout")
		fmt.Fprintln(os.Stderr, "printed to stderr")
	}
	return o.Log.Stats(ctx)
}

func (o *odd) Shutdown(ctx context.Context) error {
	if o.mode == "slow shutdown" {
		os.WriteFile(filepath.Join(os.Getenv("TEST_DIR"), "begun"), nil, 0o600)
		select {
		case <-ctx.Done():
		case <-time.After(time.Hour):
		}
		select {} // and does not even obey
	}
	return o.Log.Shutdown(ctx)
}

// launch starts this binary with a behaviour.
func launch(t *testing.T, b string, more func(*host.Config)) (*host.Plugin, error) {
	t.Helper()
	dir := t.TempDir()
	cfg := host.Config{Kind: service.KindLog, StartTimeout: 10 * time.Second,
		Spawner: &host.Local{Command: []string{"/proc/self/exe", "--data-dir", dir}, Env: []string{behave + "=" + b, "TEST_DIR=" + dir}, Dir: short(t)}}
	if more != nil {
		more(&cfg)
	}
	return host.Launch(t.Context(), cfg)
}

// short is a directory whose path leaves room for a socket's name.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mvirt-host-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after the plugin's end nothing of it is left
		left, _ := os.ReadDir(dir)
		for _, l := range left {
			t.Errorf("left behind: %s", l.Name())
		}
		os.RemoveAll(dir)
	})
	return dir
}

func mustLaunch(t *testing.T, b string, more func(*host.Config)) *host.Plugin {
	t.Helper()
	p, err := launch(t, b, more)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}
