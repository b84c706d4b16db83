package launcher

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// CoreArg is the first argument of mvirtd as the core; descriptors 3, 4 and 5 are then the socket to the
// launcher, a memfd with the configuration, and the lock of the state directory.
const CoreArg = "mvirt-core"

// CoreFD are the core's inherited descriptors.
const (
	CoreSocketFD = 3
	CoreConfigFD = 4
	CoreLockFD   = 5
)

// RootOptions are what RunRoot needs besides the configuration.
type RootOptions struct {
	Config   *config.Config
	Text     []byte // the configuration as read; the core gets exactly this
	Env      Environment
	Log      *slog.Logger
	Ready    func()                 // the API is served; called once for each core
	Stopping func()                 // an orderly stop has begun
	Args     []string               // what the core is started with behind CoreArg
	Signal   func(chan<- os.Signal) // replaces signal.Notify in tests; nil: SIGTERM and SIGINT
}

// Restart of the core: like a plugin's, at once the first time, then with back-off; it is never given up, for
// without the core nothing answers.
const (
	coreFirstDelay   = 250 * time.Millisecond
	coreLongestDelay = 30 * time.Second // unless configured
	coreHealthyAfter = 60 * time.Second
	pluginGrace      = 2 * time.Second // between the end of the core and SIGKILL for its plugins
	stopMargin       = 5 * time.Second // on top of twice core.stop_timeout (API, then plugins), before the core is killed
)

// RunRoot is the launcher: it prepares directories, starts the core, and serves it until SIGTERM or SIGINT.
func RunRoot(o RootOptions) error {
	t, err := newTable(o.Config, true, systemAccounts())
	if err != nil {
		return err
	}
	r := &root{o: o, table: t}
	unix.Umask(0o022) // directories that others have to pass through are made here
	if err := r.prepare(); err != nil {
		return err
	}
	defer r.lock.Close()
	defer r.st.jails.close()
	if done, err := shrink(t.ownCaps()); err != nil {
		return errs.Wrap(errs.Precondition, err, "mvirtd cannot give up the capabilities that it does not need")
	} else if !done {
		o.Log.Warn("mvirtd keeps capabilities that it does not need: it is linked with C")
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := r.st.family.adopt(ctx); err != nil {
		o.Log.Warn("hypervisors that outlive their plugin may stay behind as zombies", "error", err)
	}
	sigs := make(chan os.Signal, 4)
	if o.Signal != nil {
		o.Signal(sigs)
	} else {
		signal.Notify(sigs, syscall.SIGTERM, syscall.SIGINT)
		defer signal.Stop(sigs)
	}
	return r.loop(sigs)
}

type root struct {
	o     RootOptions
	table *table
	st    *starter
	lock  *os.File

	starting sync.WaitGroup // starts that the core asked for and that have not been answered
	pending  atomic.Int32   // how many these are
}

// maxPending bounds the starts that a core may have under way; an honest one has one of each kind.
const maxPending = 16

func (r *root) prepare() error {
	c := &r.o.Config.Core
	// Sticky and group-writable: the core makes its sockets here, and cannot touch p.
	run, err := ensureDir(c.RunDir, identity{UID: 0, GID: r.table.core.GID}, 0o1775, r.table.trust)
	if err != nil {
		return errs.Wrap(errs.Unknown, err, "core.run_dir")
	}
	err = giveTo(int(run.Fd()), identity{UID: 0, GID: r.table.core.GID}, 0o1775)
	run.Close()
	if err != nil {
		return errs.Wrap(errs.Unknown, err, "core.run_dir")
	}
	state, err := ensureDir(c.StateDir, r.table.core, 0o700, r.table.trust)
	if err != nil {
		return errs.Wrap(errs.Unknown, err, "core.state_dir")
	}
	r.lock = state
	if err := lockState(state, c.StateDir, c.RunDir); err != nil {
		state.Close()
		return err
	}
	cg, why, err := newCgroups(c.Cgroup)
	if err != nil {
		state.Close()
		return err
	}
	if cg == nil {
		r.o.Log.Info("plugins get no control groups of their own", "reason", why)
	}
	if r.st, err = newStarter(r.table, c.RunDir, cg, r.o.Env); err != nil {
		state.Close()
		return err
	}
	if err := r.prepareJails(cg); err != nil {
		state.Close()
		return err
	}
	r.st.log = r.o.Log
	killed, err := r.st.sweep()
	if killed > 0 {
		r.o.Log.Warn("killed plugins that an earlier launcher left behind", "count", killed)
	}
	if err != nil {
		r.o.Log.Warn("launch directories of an earlier launcher remain", "error", err)
	}
	return nil
}

// prepareJails makes ready for jails, unless the configuration has none or hypervisors are somebody else's.
func (r *root) prepareJails(cg *cgroups) (err error) {
	sp := r.table.specs[service.KindVMM]
	if sp == nil {
		return nil
	}
	if !r.o.Config.Jail.Enabled {
		r.o.Log.Warn("hypervisors are not kept apart: they all run as the vmm plugin's user", "remedy", "set enabled = true in [jail]")
		return nil
	}
	r.st.jails, err = newJails(r.o.Config.Jail, r.o.Config.Core.RunDir, sp.id, r.table.trust, cg, r.st.family, r.o.Log)
	return err
}

// loop keeps a core running until a signal asks for the end.
func (r *root) loop(sigs <-chan os.Signal) error {
	delay, most := time.Duration(0), r.o.Config.Core.RestartDelayMax
	if most == 0 {
		most = coreLongestDelay
	}
	for {
		begun := time.Now()
		exit, stopped, err := r.serveCore(sigs)
		r.st.end(pluginGrace)
		if stopped {
			if err == nil && (exit.Signal != 0 || exit.Code != 0) {
				err = fmt.Errorf("the core ended with %s", exit)
			}
			return err
		}
		if errs.KindOf(err) == errs.Precondition {
			return err // the host must be changed first: mvirtd's own binary is not executable for the core's user
		}
		if err != nil {
			r.o.Log.Error("the core cannot be started", "error", err)
		} else if exit.Signal == 0 && exit.Code == exitConfig {
			// Started again it would say the same; it has said what is wrong.
			return errs.New(errs.Precondition, "the core cannot run with this configuration")
		} else {
			r.o.Log.Error("the core ended; starting it again", "how", exit.String(), "after", time.Since(begun).Round(time.Millisecond).String())
		}
		if time.Since(begun) >= coreHealthyAfter {
			delay = 0
		}
		if delay > 0 {
			r.o.Log.Info("next attempt to start the core", "in", delay.String())
		}
		select {
		case <-sigs:
			return nil
		case <-time.After(delay):
		}
		delay = min(max(2*delay, coreFirstDelay), most)
	}
}

// exitConfig is the core's exit code for trouble that a restart does not cure (EX_CONFIG of sysexits.h).
const exitConfig = 78

// ExitConfig is what the core's main exits with when starting it again would be pointless.
const ExitConfig = exitConfig

// serveCore runs one core to its end.
func (r *root) serveCore(sigs <-chan os.Signal) (exit Exit, stopped bool, err error) {
	ours, theirs, err := newConnPair()
	if err != nil {
		return exit, false, err
	}
	defer ours.Close()
	core, err := r.startCore(theirs)
	theirs.Close()
	if err != nil {
		return exit, false, err
	}
	defer core.close()
	r.o.Log.Debug("the core is started", "pid", core.pid, "uid", r.table.core.UID)

	r.st.serveHost(core.pid)
	c := conn{ours}
	ended := make(chan error, 1)
	go func() { ended <- r.serve(c) }()
	var deadline <-chan time.Time
	for {
		select {
		case err := <-ended:
			// The core closed its end or broke the protocol; either way it is to go.
			ended = nil
			if err != nil {
				r.o.Log.Error("talking to the core", "error", err)
				core.signal(unix.SIGKILL)
			} else if deadline == nil {
				deadline = time.After(stopMargin)
			}
		case <-core.gone:
			ours.Close()
			if ended != nil {
				<-ended
			}
			r.starting.Wait()
			return core.exit, stopped, nil
		case s := <-sigs:
			if stopped {
				continue
			}
			stopped = true
			r.o.Log.Info("stopping; VMs keep running", "signal", s.String())
			if r.o.Stopping != nil {
				r.o.Stopping()
			}
			if c.send(&message{Type: msgStop}) != nil {
				core.signal(unix.SIGTERM)
			}
			deadline = time.After(2*r.o.Config.Core.StopTimeout + stopMargin)
		case <-deadline:
			r.o.Log.Warn("the core does not end; killing it")
			core.signal(unix.SIGKILL)
			deadline = nil
		}
	}
}

// startCore starts this same program as the core.
func (r *root) startCore(sock *os.File) (*child, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	defer self.Close()
	text, err := memFile("mvirt.toml", r.o.Text)
	if err != nil {
		return nil, err
	}
	defer text.Close()
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=" + r.o.Config.Core.StateDir}
	return start(program{
		binary: self, stdout: os.Stdout, stderr: os.Stderr, keep: []*os.File{sock, text, r.lock}, family: r.st.family,
		shim: shimSpec{Argv: append([]string{"mvirtd", CoreArg}, r.o.Args...), Env: env, Switch: true, UID: r.table.core.UID,
			GID: r.table.core.GID, Groups: r.table.core.Groups, NoFile: 65536, Umask: 0o027},
	})
}

// serve answers the core until its end of the socket is closed.
func (r *root) serve(c conn) error {
	for {
		m, files, err := c.recv()
		if err != nil || m == nil {
			if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
				err = nil // it is gone; what it had not read yet does not matter
			}
			return err
		}
		if len(files) > 0 {
			closeAll(files)
			return errNotFromCore
		}
		switch m.Type {
		case msgStart:
			kind := kindOf(m.Kind)
			if r.pending.Add(1) > maxPending {
				r.pending.Add(-1)
				return errNotFromCore
			}
			r.starting.Add(1)
			go r.startPlugin(c, m.Seq, kind)
		case msgSignal:
			if s := unix.Signal(m.Signal); s == unix.SIGTERM || s == unix.SIGKILL {
				r.st.signal(m.Launch, s)
			}
		case msgReady:
			if r.o.Ready != nil {
				r.o.Ready()
			}
		default:
			return errNotFromCore
		}
	}
}

// startPlugin starts a plugin, tells the core, and later tells it of the end.
func (r *root) startPlugin(c conn, seq uint32, kind service.Kind) {
	answered := func() {
		r.pending.Add(-1)
		r.starting.Done()
	}
	l, err := r.st.start(kind)
	if err != nil {
		if c.send(failure(seq, err)) != nil {
			c.hangUp()
		}
		answered()
		return
	}
	err = c.send(&message{Type: msgStarted, Seq: seq, Launch: l.id, PID: uint32(l.child.pid), UID: l.uid, Dir: l.dir},
		l.stdout, l.stderr, l.lifeline, l.child.share)
	// The core's are duplicates. With ours closed, the lifeline is the core's alone.
	closeAll([]*os.File{l.stdout, l.stderr, l.lifeline})
	if err != nil {
		l.child.signal(unix.SIGKILL)
		c.hangUp()
	}
	answered()
	<-l.ended
	e := l.child.exit
	if c.send(&message{Type: msgExited, Launch: l.id, Code: uint32(e.Code), Signal: uint8(e.Signal), At: e.At.UnixNano()}) != nil {
		c.hangUp() // a core that has not heard of this would wait for ever
	}
	l.child.close()
}

// CoreSocket is the core's end of the socket to the launcher, as inherited.
func CoreSocket() (*os.File, error) {
	unix.CloseOnExec(CoreSocketFD)
	unix.CloseOnExec(CoreLockFD)
	if err := unix.SetNonblock(CoreSocketFD, true); err != nil {
		return nil, fmt.Errorf("descriptor %d is not the socket to the launcher: %w", CoreSocketFD, err)
	}
	return os.NewFile(CoreSocketFD, "launcher"), nil
}

// lockWait is how long a start waits for an mvirtd that is just ending.
// (A core whose launcher was killed takes a third of a second, one that was frozen until it is woken.)
const lockWait = 5 * time.Second

// lockState takes the lock that only one mvirtd at a time can hold on a state directory. The lock belongs to
// the open directory, is shared with the core, and ends when both are gone.
func lockState(dir *os.File, path, runDir string) error {
	pidFile := filepath.Join(runDir, "mvirtd.pid")
	for end := time.Now().Add(lockWait); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("locking %s: %w", path, err)
		}
		if time.Now().After(end) {
			who := ""
			if b, err := os.ReadFile(pidFile); err == nil && len(b) < 16 {
				who = fmt.Sprintf(" (process %s)", string(b[:max(0, len(b)-1)]))
			}
			return errs.New(errs.Conflict, "another mvirtd%s uses the state directory %s", who, path).Because("ALREADY_RUNNING").
				Do("stop it first, or give this one its own state_dir and run_dir")
		}
	}
	// For people and service managers; the lock is what counts. A link planted by the core's user is replaced,
	// not followed.
	_ = os.Remove(pidFile)
	if f, err := os.OpenFile(pidFile, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o644); err == nil {
		fmt.Fprintln(f, os.Getpid())
		f.Close()
	}
	return nil
}
