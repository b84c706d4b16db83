package plugin

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"
	"unsafe"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
	"github.com/mvirt/mvirt/sdk/fdpass"
	"github.com/mvirt/mvirt/sdk/internal/launch"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
	"github.com/mvirt/mvirt/sdk/internal/peercred"
	"github.com/mvirt/mvirt/sdk/internal/wire"
)

// maxMessage is the largest request: go-plugin leaves gRPC's 4 MiB, which a batch of log entries can exceed.
const maxMessage = 64 << 20

// window is gRPC's flow-control window; 4 MiB gave 10 to 25 % more than the default on a unix socket.
const window = 4 << 20

// serve answers calls until the plugin ends and returns the exit code.
func (s *server) serve(listen string) int {
	if listen != "" {
		return s.serveAlone(listen)
	}
	check := hostOnly()
	table := fdpass.NewTable()
	fds, err := fdpass.Serve(launch.FDSocket(s.env.LaunchDir), table, check)
	if err != nil {
		report(s.program.Name, fmt.Errorf("descriptor socket: %w", err))
		return exitFailed
	}
	defer fds.Close()
	defer table.Close()
	s.watch(func() { os.Exit(0) })
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig:  launch.Handshake,
		VersionedPlugins: map[int]goplugin.PluginSet{int(launch.Handshake.ProtocolVersion): {launch.Name: &grpcPlugin{s: s, x: exchange(table)}}},
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, s.options(check)...)...)
		},
		Logger: quiet(s.log),
	})
	// The host has said goodbye, or go-plugin could not begin (it only logs that).
	ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	if s.shutdown(ctx) != nil {
		return exitFailed
	}
	return 0
}

// serveAlone serves on a socket of its own; its mode and group say who may connect.
func (s *server) serveAlone(listen string) int {
	path, err := socketPath(listen)
	if err != nil {
		report(s.program.Name, err)
		return exitUsage
	}
	ln, err := listenFresh(path)
	if err != nil {
		report(s.program.Name, err)
		return exitFailed
	}
	os.Remove(path + ".fd")
	table := fdpass.NewTable()
	fds, err := fdpass.Serve(path+".fd", table, nil)
	if err != nil {
		report(s.program.Name, err)
		return exitFailed
	}
	defer fds.Close()
	defer table.Close()
	os.Chmod(path, 0o660)
	os.Chmod(path+".fd", 0o660)
	srv := grpc.NewServer(s.options(nil)...)
	s.register(srv, exchange(table))
	s.watch(srv.Stop)
	s.log.Info("serving", "socket", path)
	if err := srv.Serve(ln); err != nil {
		report(s.program.Name, err)
		return exitFailed
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	if s.shutdown(ctx) != nil {
		return exitFailed
	}
	return 0
}

// listenFresh listens on path, in the place of a socket that nobody serves any more.
func listenFresh(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, errs.New(errs.Exists, "another process serves on %s", path).Do("stop it, or give another --listen")
	}
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket != 0 {
		os.Remove(path)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, errs.Wrap(errs.Precondition, err, "cannot listen on %s", path)
	}
	return ln, nil
}

func (s *server) register(srv grpc.ServiceRegistrar, x *wire.Exchange) {
	pluginpb.RegisterPluginServer(srv, &wire.PluginServer{Info: s.info, Base: s.impl, Stop: s.stop})
	wire.Register(srv, s.impl, x)
}

// stop answers the host's Shutdown call; the program then ends, also if the host says nothing more.
func (s *server) stop(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, shutdownLimit)
		defer cancel()
	}
	err := s.shutdown(ctx)
	time.AfterFunc(time.Second, func() { os.Exit(0) }) // long enough for the answer to leave
	return err
}

// exchange moves descriptors through the plugin's own table; the host is the only peer, whatever its uid.
func exchange(t *fdpass.Table) *wire.Exchange {
	return &wire.Exchange{
		Send: func(ctx context.Context, files []*os.File) (string, error) {
			cred, _ := peercred.FromContext(ctx)
			return t.Put(cred.UID, files...)
		},
		Receive: func(ctx context.Context, token string) ([]*os.File, error) {
			cred, _ := peercred.FromContext(ctx)
			return t.Take(cred.UID, token)
		},
	}
}

// hostOnly lets in the process that launched this one and nobody else. The environment says which it is;
// the kernel says who connects.
func hostOnly() func(peercred.Cred) error {
	uid, uerr := strconv.ParseUint(os.Getenv(launch.EnvHostUID), 10, 32)
	pid, perr := strconv.ParseInt(os.Getenv(launch.EnvHostPID), 10, 32)
	return func(c peercred.Cred) error {
		if uerr != nil || perr != nil {
			return fmt.Errorf("%s and %s do not say who the host is", launch.EnvHostUID, launch.EnvHostPID)
		}
		if c.UID != uint32(uid) || c.PID != int32(pid) {
			return fmt.Errorf("only the host (pid %d, uid %d) may connect, not pid %d, uid %d", pid, uid, c.PID, c.UID)
		}
		return nil
	}
}

func (s *server) options(check func(peercred.Cred) error) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(peercred.Credentials(check)),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.InitialWindowSize(window), grpc.InitialConnWindowSize(window),
		grpc.ReadBufferSize(256 << 10), grpc.WriteBufferSize(256 << 10),
		grpc.ChainUnaryInterceptor(s.unary), grpc.ChainStreamInterceptor(s.stream),
	}
}

// counted are the services whose calls Shutdown waits for: ours, but not Shutdown itself nor go-plugin's own.
func counted(method string) bool {
	const ours = "/mvirt."
	return len(method) > len(ours) && method[:len(ours)] == ours && method != pluginpb.Plugin_Shutdown_FullMethodName
}

func (s *server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	if counted(info.FullMethod) {
		if err := s.calls.begin(); err != nil {
			return nil, grpcerr.ToStatus(err)
		}
		defer s.calls.end()
	}
	defer s.recover(info.FullMethod, &err)
	return next(ctx, req)
}

// Streams are not waited for: a watch has no end of its own.
func (s *server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer s.recover(info.FullMethod, &err)
	return next(srv, ss)
}

// recover turns a handler's panic into an error: one bad request must not end a plugin.
func (s *server) recover(method string, err *error) {
	if r := recover(); r != nil {
		s.log.Error("panic in a handler", "method", method, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		*err = grpcerr.ToStatus(errs.New(errs.Internal, "the plugin panicked in %s: %v", method, r).
			Do("report this as a bug; the plugin's log has the stack"))
	}
}

// grpcPlugin is go-plugin's view of the one service.
type grpcPlugin struct {
	goplugin.NetRPCUnsupportedPlugin
	s *server
	x *wire.Exchange
}

func (p *grpcPlugin) GRPCServer(_ *goplugin.GRPCBroker, srv *grpc.Server) error {
	p.s.register(srv, p.x)
	return nil
}

func (p *grpcPlugin) GRPCClient(context.Context, *goplugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errs.New(errs.Unsupported, "this is the plugin's side")
}

// quiet is a logger for go-plugin's own chatter, of which only warnings matter.
func quiet(l hclog.Logger) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: l.Name() + ".go-plugin", Level: hclog.Warn, JSONFormat: true, Output: tolerant{os.Stderr}})
}

// setName names the process as ps shows it; it may have been executed by descriptor. At most 15 bytes and a
// NUL (prctl(2), PR_SET_NAME).
func setName(name string) {
	b := make([]byte, 16)
	copy(b[:15], name)
	unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&b[0])), 0, 0, 0)
	runtime.KeepAlive(b)
}
