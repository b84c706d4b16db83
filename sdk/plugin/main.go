package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/internal/launch"
	"github.com/mvirt/mvirt/sdk/internal/wire"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/service"
)

// shutdownLimit is how long a plugin may take to end when nobody gives it a deadline: the host has gone, or
// it got SIGTERM. A store needs a second to flush; a supervisor waits no longer.
const shutdownLimit = 5 * time.Second

// Exit codes of a plugin program.
const (
	exitFailed = 1 // Open failed; the reason is on stderr
	exitUsage  = 2
)

// Main runs p and does not return.
func Main(p Program) { os.Exit(run(p, os.Args)) }

func run(p Program, args []string) int {
	if len(args) > 1 {
		if w, ok := p.Workers[args[1]]; ok {
			return w(args[2:])
		}
	}
	survivePipes()
	name := filepath.Base(args[0])
	fs := pflag.NewFlagSet(name, pflag.ContinueOnError)
	fs.SortFlags = false
	fs.SetOutput(io.Discard)
	if p.Flags != nil {
		p.Flags(fs)
	}
	listen := fs.String("listen", "", "serve stand-alone on this socket (unix:///path), for a service manager to start")
	level := fs.String("log-level", "", "trace, debug, info, warn or error (default: what the host says, else info)")
	version := fs.Bool("version", false, "print the version and exit")
	help := fs.BoolP("help", "h", false, "print this and exit")
	if err := fs.Parse(args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\nTry %s --help.\n", name, err, name)
		return exitUsage
	}
	switch {
	case *help:
		fmt.Printf("%s: %s\n\nA plugin of mvirt (kind %s, product %s %s). mvirtd starts it as its configuration says.\n\nUsage: %s [flags]\n\n%s",
			name, p.Short, p.Kind, p.Name, p.Version, name, fs.FlagUsages())
		return 0
	case *version:
		fmt.Printf("%s %s (contract %s %d.%d)\n", p.Name, p.Version, p.Kind, service.ContractMajor, service.ContractMinor)
		return 0
	case len(fs.Args()) > 0:
		fmt.Fprintf(os.Stderr, "%s: unexpected argument %q\nTry %s --help.\n", name, fs.Arg(0), name)
		return exitUsage
	}
	launched := os.Getenv(launch.Handshake.MagicCookieKey) == launch.Handshake.MagicCookieValue
	if !launched && *listen == "" {
		fmt.Fprintf(os.Stderr, "%s is a plugin of mvirt: mvirtd starts it, as the [plugin.%s] section of its configuration says.\n"+
			"To run it by itself, give it a socket: --listen unix:///run/mvirt/%s.sock. All flags: %s --help.\n", name, p.Kind, p.Kind, name)
		return exitUsage
	}
	setName(name)
	if launched {
		unix.CloseOnExec(launch.LifelineFD) // before anything is started that could inherit it
	}
	if *level == "" {
		*level = os.Getenv(launch.EnvLogLevel)
	}
	logger := newLogger(p.Name, *level)
	s := &server{program: p, log: logger, ended: make(chan struct{})}
	if err := s.open(*listen); err != nil {
		report(name, err)
		logger.Error("cannot start", "error", err.Error(), "remedy", errs.RemedyOf(err))
		return exitFailed
	}
	return s.serve(*listen)
}

// survivePipes makes writes to a broken stdout or stderr fail instead of ending the process: the reader is
// the host, and it may be gone. SIGPIPE is caught, not ignored, so that children start with the default.
func survivePipes() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGPIPE)
	go func() {
		for range c {
		}
	}()
}

func report(name string, err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	if r := errs.RemedyOf(err); r != "" {
		fmt.Fprintf(os.Stderr, "  → %s\n", r)
	}
}

// newLogger writes JSON lines to stderr, which the host reads.
func newLogger(name, level string) hclog.Logger {
	l := hclog.LevelFromString(level)
	if l == hclog.NoLevel {
		l = hclog.Info
	}
	return hclog.New(&hclog.LoggerOptions{Name: name, Level: l, JSONFormat: true, Output: tolerant{os.Stderr}})
}

// tolerant drops what cannot be written.
type tolerant struct{ w io.Writer }

func (t tolerant) Write(b []byte) (int, error) {
	t.w.Write(b)
	return len(b), nil
}

// server is a plugin that runs.
type server struct {
	program Program
	log     hclog.Logger
	impl    service.Base
	info    service.Info
	env     Env

	calls calls
	once  sync.Once
	serr  error
	ended chan struct{} // closed when Shutdown of the implementation has returned
}

// open makes the service.
func (s *server) open(listen string) error {
	s.env = Env{Log: s.log, Host: logHost{s.log}, LaunchDir: os.Getenv(launch.EnvLaunchDir)}
	if listen != "" {
		path, err := socketPath(listen)
		if err != nil {
			return err
		}
		s.env.LaunchDir = filepath.Dir(path)
	} else if sock := os.Getenv(launch.EnvHostSock); sock != "" {
		h, err := dialHost(sock, s.log)
		if err != nil {
			return err
		}
		s.env.Host = h
	}
	var err error
	if s.env.Jail, err = jail.FromEnv(); err != nil {
		return err
	}
	impl, err := s.program.Open(context.Background(), s.env)
	if err != nil {
		return err
	}
	kind, ok := wire.KindOf(impl)
	if !ok || kind != s.program.Kind {
		return errs.New(errs.Internal, "Open returned a %T, which is no %s service", impl, s.program.Kind)
	}
	s.impl = impl
	s.info = service.Info{Kind: kind, Name: s.program.Name, Version: s.program.Version, ContractMajor: service.ContractMajor,
		ContractMinor: service.ContractMinor, Features: wire.Features(impl), Needs: s.program.Needs, PID: uint32(os.Getpid()), StartedAt: time.Now()}
	return nil
}

// shutdown runs the implementation's Shutdown once; whoever comes later gets the same answer.
func (s *server) shutdown(ctx context.Context) error {
	s.once.Do(func() {
		defer close(s.ended)
		s.drain(ctx)
		s.serr = s.impl.Shutdown(ctx)
		if s.serr != nil {
			s.log.Error("shutdown", "error", s.serr.Error())
		}
	})
	<-s.ended
	return s.serr
}

// drain lets calls finish, for at most half of the time there is: the other half is the implementation's.
func (s *server) drain(ctx context.Context) {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/2)
		defer cancel()
	}
	s.calls.drain(ctx)
}

// watch ends the plugin when the host has gone or a service manager says so. stop makes serving return.
func (s *server) watch(stop func()) {
	end := func(why string) {
		s.log.Info("ending", "why", why)
		ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
		defer cancel()
		done := make(chan struct{})
		go func() {
			s.shutdown(ctx)
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(shutdownLimit + time.Second):
			s.log.Error("shutdown did not return in time")
		}
		stop()
	}
	sig := make(chan os.Signal, 2)
	signal.Notify(sig, syscall.SIGTERM)
	go func() {
		<-sig
		end("SIGTERM")
	}()
	if fd := os.Getenv(launch.EnvLifeline); fd != "" && s.launched() {
		go func() {
			var b [1]byte
			f := os.NewFile(launch.LifelineFD, "lifeline")
			for {
				if _, err := f.Read(b[:]); err != nil {
					break
				}
			}
			end("the host has gone")
		}()
	}
}

func (s *server) launched() bool {
	return os.Getenv(launch.Handshake.MagicCookieKey) == launch.Handshake.MagicCookieValue
}

func socketPath(listen string) (string, error) {
	path, ok := strings.CutPrefix(listen, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return "", errs.Field("listen", "give unix:///absolute/path", "--listen %q is no unix socket", listen)
	}
	return path, nil
}

var errDraining = errors.New("the plugin is shutting down")

// calls counts what is under way, so that Shutdown can let it finish.
type calls struct {
	mu       sync.Mutex
	n        int
	draining bool
	idle     chan struct{}
}

func (c *calls) begin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining {
		return errs.Wrap(errs.Unavailable, errDraining, "")
	}
	c.n++
	return nil
}

func (c *calls) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n--
	if c.n == 0 && c.idle != nil {
		close(c.idle)
		c.idle = nil
	}
}

// drain refuses new calls and waits for the others, until ctx ends.
func (c *calls) drain(ctx context.Context) {
	c.mu.Lock()
	c.draining = true
	if c.n == 0 {
		c.mu.Unlock()
		return
	}
	idle := make(chan struct{})
	c.idle = idle
	c.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}
