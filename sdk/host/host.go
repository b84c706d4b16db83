package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/fdpass"
	"github.com/mvirt/mvirt/sdk/internal/launch"
	"github.com/mvirt/mvirt/sdk/internal/pb/hostpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
	"github.com/mvirt/mvirt/sdk/internal/peercred"
	"github.com/mvirt/mvirt/sdk/internal/wire"
	"github.com/mvirt/mvirt/sdk/service"
)

// Reasons of a failed launch, as errs.ReasonOf tells them.
const (
	ReasonNotAPlugin = "NOT_A_PLUGIN"      // it said something else than a handshake
	ReasonContract   = "CONTRACT_VERSION"  // no common major version
	ReasonWrongKind  = "WRONG_KIND"        // it serves another kind
	ReasonExited     = "EXITED"            // it ended before its handshake
	ReasonHandshake  = "HANDSHAKE_TIMEOUT" // it said nothing in time
	ReasonPeer       = "PEER_MISMATCH"     // somebody else answers on its socket
	ReasonMissing    = "BINARY_MISSING"
	ReasonNotExec    = "BINARY_NOT_EXECUTABLE"
)

// DefaultStartTimeout is how long a plugin may take to its first answer; 5 ms is usual.
const DefaultStartTimeout = 10 * time.Second

// Config says what to launch.
type Config struct {
	Kind         service.Kind // expected; "" takes any
	Spawner      Spawner
	Log          func(LogLine) // each line that the plugin writes; nil: none
	Host         service.Host  // what the plugin may call; nil: refuses
	StartTimeout time.Duration // 0: DefaultStartTimeout
}

// Plugin is a plugin that runs, or ran.
type Plugin struct {
	wire.Clients
	info    service.Info
	proc    *Process // nil: attached
	client  *goplugin.Client
	conn    *grpc.ClientConn
	out     *output
	hostSrv *grpc.Server

	exited chan struct{}
	leave  chan struct{} // attached: closed when the host lets go; nil otherwise
	mu     sync.Mutex
	exit   Exit
	once   sync.Once
}

// Launch starts a plugin and returns when it has said who it is. Whatever fails, nothing is left running.
func Launch(ctx context.Context, cfg Config) (*Plugin, error) {
	limit := cfg.StartTimeout
	if limit == 0 {
		limit = DefaultStartTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	proc, err := cfg.Spawner.Spawn(ctx)
	if err != nil {
		return nil, err
	}
	p := &Plugin{proc: proc, exited: make(chan struct{}), out: readOutput(proc.Stdout, proc.Stderr, cfg.Log)}
	err = p.serveHost(cfg.Host)
	go p.reap()
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // the launch directory goes with the process: it has ended already, and the handshake tells how
	}
	if err == nil {
		err = p.start(ctx, cfg, limit)
	}
	if err != nil {
		p.Kill()
		return nil, err
	}
	return p, nil
}

// reap waits for the process itself and then ends what hangs on it: a grandchild may hold the pipes for ever.
func (p *Plugin) reap() {
	exit, err := p.proc.Wait(context.Background())
	if err != nil {
		exit = Exit{Code: -1, At: time.Now()}
	}
	soon := time.Now().Add(100 * time.Millisecond) // what the process itself wrote is in the pipe already
	p.proc.Stdout.SetReadDeadline(soon)
	p.proc.Stderr.SetReadDeadline(soon)
	p.out.wg.Wait()
	p.proc.Stdout.Close()
	p.proc.Stderr.Close()
	p.proc.Lifeline.Close()
	p.mu.Lock()
	p.exit = exit
	p.mu.Unlock()
	close(p.exited)
	if p.hostSrv != nil {
		p.hostSrv.Stop()
	}
}

func (p *Plugin) start(ctx context.Context, cfg Config, limit time.Duration) error {
	line, err := p.handshake(ctx, limit)
	if err != nil {
		return err
	}
	r := &procRunner{p: p, line: line + "\n"}
	p.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  launch.Handshake,
		VersionedPlugins: map[int]goplugin.PluginSet{int(launch.Handshake.ProtocolVersion): {}},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		Logger:           hclog.NewNullLogger(),
		StartTimeout:     limit,
		SkipHostEnv:      true,
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: p.proc.LaunchDir},
		RunnerFunc:       func(hclog.Logger, *exec.Cmd, string) (runner.Runner, error) { return r, nil },
		SyncStdout:       lineWriter{p.out},
		SyncStderr:       lineWriter{p.out},
		GRPCDialOptions:  dialOptions(p.check),
	})
	if _, err := p.client.Start(); err != nil {
		return p.launchError(ReasonNotAPlugin, err, "the handshake failed", "rebuild the plugin against this version of the SDK")
	}
	if err := p.connect(ctx, limit); err != nil {
		return err
	}
	return p.describe(ctx, cfg.Kind, p.conn, p.exchange(launch.FDSocket(p.proc.LaunchDir), p.check))
}

// connect makes go-plugin's connection. Its Client() waits without a deadline for a peer that accepts and then
// says nothing (it opens a stream at once), so it gets one here: the process's death ends it.
func (p *Plugin) connect(ctx context.Context, limit time.Duration) error {
	type result struct {
		proto goplugin.ClientProtocol
		err   error
	}
	done := make(chan result, 1)
	go func() {
		proto, err := p.client.Client()
		done <- result{proto, err}
	}()
	var r result
	select {
	case r = <-done:
	case <-ctx.Done():
		p.proc.Signal(syscall.SIGKILL)
		return p.launchError(ReasonHandshake, nil, fmt.Sprintf("the plugin's socket does not answer within %v", limit),
			"see its last lines; if it is only slow, raise start_timeout in the configuration")
	}
	if r.err != nil {
		return p.launchError(ReasonPeer, r.err, "cannot connect to the plugin's socket", "look at the plugin's last lines: `mvirt plugin show`")
	}
	p.conn = r.proto.(*goplugin.GRPCClient).Conn
	return nil
}

// handshake waits for the plugin's one line and judges it before go-plugin does, whose errors are only text.
func (p *Plugin) handshake(ctx context.Context, limit time.Duration) (string, error) {
	var line string
	var ok bool
	select {
	case line, ok = <-p.out.first:
	case <-ctx.Done():
		return "", p.launchError(ReasonHandshake, nil, fmt.Sprintf("the program said nothing within %v", limit),
			"see what it waits for; if it is only slow, raise start_timeout in the configuration")
	}
	if !ok {
		select {
		case <-p.exited:
		case <-ctx.Done():
		}
		exit, _ := p.Exit()
		return "", p.launchError(ReasonExited, nil, "the program ended before its handshake: "+exit.String(),
			"run it by hand with --help, and see its last lines above")
	}
	parts := strings.Split(strings.TrimSpace(line), "|")
	if len(parts) < 5 || parts[0] != "1" || parts[2] != "unix" {
		return "", p.launchError(ReasonNotAPlugin, nil, "the program is no mvirt plugin: it began with "+fmt.Sprintf("%.60q", line),
			"give the path of a plugin as command in the configuration")
	}
	if want := fmt.Sprint(launch.Handshake.ProtocolVersion); parts[1] != want {
		return "", p.launchError(ReasonContract, nil, fmt.Sprintf("the plugin speaks contract version %s, this host %s", parts[1], want),
			"install a plugin that was built for contract version "+want)
	}
	if parts[4] != "grpc" {
		return "", p.launchError(ReasonNotAPlugin, nil, fmt.Sprintf("the plugin speaks %.20q, not grpc", parts[4]), "serve by gRPC")
	}
	return line, nil
}

func (p *Plugin) describe(ctx context.Context, kind service.Kind, conn *grpc.ClientConn, x *wire.Exchange) error {
	info, err := wire.Describe(ctx, conn)
	if err != nil {
		reason, what := ReasonHandshake, "the plugin does not say who it is"
		if errs.KindOf(err) == errs.Unavailable {
			reason, what = ReasonPeer, "the plugin's socket does not answer as it should"
		}
		return p.launchError(reason, err, what, "see its last lines; it may be of another version")
	}
	if kind != "" && info.Kind != kind {
		return p.launchError(ReasonWrongKind, nil, fmt.Sprintf("%s is a plugin of kind %s, not %s", info.Name, info.Kind, kind),
			fmt.Sprintf("put it under [plugin.%s] in the configuration", info.Kind))
	}
	if info.ContractMajor != service.ContractMajor {
		return p.launchError(ReasonContract, nil, fmt.Sprintf("%s speaks contract version %d, this host %d", info.Name, info.ContractMajor, service.ContractMajor),
			fmt.Sprintf("install a plugin that was built for contract version %d", service.ContractMajor))
	}
	p.info = info
	p.Clients = wire.NewClients(conn, info, x)
	if p.Clients.Base == nil {
		return p.launchError(ReasonWrongKind, nil, fmt.Sprintf("%s says it is of kind %q", info.Name, info.Kind), "a plugin is of kind storage, net, vmm or log")
	}
	return nil
}

// launchError puts the plugin's last lines behind what went wrong: they are mostly the answer.
func (p *Plugin) launchError(reason string, err error, what, remedy string) error {
	select {
	case <-p.exited: // its last lines are complete
	case <-time.After(50 * time.Millisecond):
	}
	if t := p.StderrTail(); len(t) > 0 {
		what += "; its last lines: " + strings.Join(t[max(0, len(t)-5):], " / ")
	}
	return &errs.Error{Op: "plugin.Launch", Kind: errs.Unavailable, Reason: reason, Message: what, Remedy: remedy, Err: err}
}

// check says whether a peer is the process that was spawned.
func (p *Plugin) check(c peercred.Cred) error {
	if int(c.PID) != p.proc.PID || c.UID != p.proc.UID {
		return fmt.Errorf("pid %d of uid %d serves the plugin's socket, not pid %d of uid %d", c.PID, c.UID, p.proc.PID, p.proc.UID)
	}
	return nil
}

// serveHost serves mvirt.host.v1 to this one process. Everybody who gets into the launch directory can open
// the socket; the kernel tells who they are.
func (p *Plugin) serveHost(h service.Host) error {
	if h == nil {
		return nil
	}
	path := launch.HostSocket(p.proc.LaunchDir)
	ln, err := net.Listen("unix", path)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "host socket")
	}
	if err := os.Chmod(path, 0o666); err != nil {
		ln.Close()
		return errs.Wrap(errs.Internal, err, "host socket")
	}
	p.hostSrv = grpc.NewServer(grpc.Creds(peercred.Credentials(p.check)), grpc.MaxConcurrentStreams(64))
	hostpb.RegisterHostServer(p.hostSrv, &wire.HostServer{Host: h})
	go p.hostSrv.Serve(ln)
	return nil
}

func (p *Plugin) exchange(path string, check func(peercred.Cred) error) *wire.Exchange {
	return &wire.Exchange{
		Send: func(ctx context.Context, files []*os.File) (string, error) {
			return fdpass.Deposit(ctx, path, check, files...)
		},
		Receive: func(ctx context.Context, token string) ([]*os.File, error) {
			return fdpass.Fetch(ctx, path, check, token)
		},
	}
}

func dialOptions(check func(peercred.Cred) error) []grpc.DialOption {
	const window = 4 << 20 // as in sdk/plugin
	return []grpc.DialOption{grpc.WithTransportCredentials(peercred.Credentials(check)),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
		grpc.WithReadBufferSize(256 << 10), grpc.WithWriteBufferSize(256 << 10)}
}

// Info is what the plugin said of itself.
func (p *Plugin) Info() service.Info { return p.info }

// Ungated are clients that call also what the plugin has not declared, for conformance tests.
func (p *Plugin) Ungated() wire.Clients {
	info := p.info
	info.Features = nil
	for f := range pluginpb.Feature_name {
		info.Features = append(info.Features, service.Feature(f))
	}
	return wire.NewClients(p.conn, info, nil)
}

// PID is the process's id; of an attached plugin, what it says.
func (p *Plugin) PID() int {
	if p.proc == nil {
		return int(p.info.PID)
	}
	return p.proc.PID
}

// Exited is closed when the process has ended; of an attached plugin, also when it has been left.
func (p *Plugin) Exited() <-chan struct{} { return p.exited }

// Exit tells how the process ended; false while it runs.
func (p *Plugin) Exit() (Exit, bool) {
	select {
	case <-p.exited:
	default:
		return Exit{}, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit, true
}

// StderrTail is the last lines that tell of trouble: warnings, errors, and what is no log line at all.
func (p *Plugin) StderrTail() []string {
	if p.out == nil {
		return nil
	}
	return p.out.tail.get()
}

// DefaultStopTimeout bounds a Stop whose context has no deadline.
const DefaultStopTimeout = 10 * time.Second

// Stop ends the plugin in order: its Shutdown within ctx, then, if it is still there, SIGKILL. It returns
// when the process has ended, at the latest five seconds behind ctx. The error says what was not in order. A
// plugin that was attached is only left: whoever started it ends it.
func (p *Plugin) Stop(ctx context.Context) error {
	if p.proc == nil {
		p.release()
		return nil
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DefaultStopTimeout)
		defer cancel()
	}
	err := p.Clients.Base.Shutdown(ctx)
	p.proc.Lifeline.Close()
	grace := time.NewTimer(2 * time.Second) // the plugin exits by itself one second after its answer
	defer grace.Stop()
	select {
	case <-p.exited:
	case <-ctx.Done():
	case <-grace.C:
	}
	p.Kill()
	return err
}

// Abandon closes the lifeline, as this process's death would: the plugin must end by itself.
func (p *Plugin) Abandon() {
	if p.proc != nil {
		p.proc.Lifeline.Close()
	}
}

// Kill ends the process at once and returns when it has ended, within five seconds.
func (p *Plugin) Kill() {
	if p.proc != nil {
		p.proc.Signal(syscall.SIGKILL)
		select {
		case <-p.exited:
		case <-time.After(5 * time.Second): // in uninterruptible sleep: it is the spawner's to reap
		}
	}
	p.release()
}

// release tidies up the connection. go-plugin's Kill waits for calls without a deadline, so it must not be
// what the host waits for.
func (p *Plugin) release() {
	p.once.Do(func() {
		if p.client != nil {
			go p.client.Kill()
		}
		if p.conn != nil {
			p.conn.Close()
		}
		if p.hostSrv != nil {
			p.hostSrv.Stop()
		}
		if p.leave != nil {
			close(p.leave)
		}
	})
}

// procRunner shows a process that runs already to go-plugin.
type procRunner struct {
	p    *Plugin
	line string
}

var _ runner.Runner = (*procRunner)(nil)

func (r *procRunner) Start(context.Context) error { return nil }
func (r *procRunner) Name() string                { return "plugin" }
func (r *procRunner) ID() string                  { return fmt.Sprint(r.p.proc.PID) }

// Stdout gives the handshake line and then ends with the process.
func (r *procRunner) Stdout() io.ReadCloser {
	return io.NopCloser(io.MultiReader(strings.NewReader(r.line), untilClosed(r.p.exited)))
}

// Stderr gives nothing: it is read by output.
func (r *procRunner) Stderr() io.ReadCloser { return io.NopCloser(untilClosed(r.p.exited)) }

func (r *procRunner) Wait(ctx context.Context) error {
	select {
	case <-r.p.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *procRunner) Kill(context.Context) error                       { return r.p.proc.Signal(syscall.SIGKILL) }
func (r *procRunner) Diagnose(context.Context) string                  { return "" }
func (r *procRunner) PluginToHost(n, a string) (string, string, error) { return n, a, nil }
func (r *procRunner) HostToPlugin(n, a string) (string, string, error) { return n, a, nil }

// untilClosed is a reader that ends when the channel is closed.
type untilClosed <-chan struct{}

func (c untilClosed) Read([]byte) (int, error) {
	<-c
	return 0, io.EOF
}

// lineWriter takes what a plugin's code printed by fmt and friends.
type lineWriter struct{ o *output }

func (w lineWriter) Write(b []byte) (int, error) {
	for l := range strings.Lines(string(b)) {
		w.o.line(strings.TrimRight(l, "\r\n"))
	}
	return len(b), nil
}
