package launcher

import (
	"context"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Spawner starts plugins; [Client] and [Local] are the two.
type Spawner interface {
	// Spawn starts the plugin of a kind as the configuration says. ctx bounds the start only. Kinds:
	// Precondition (binary, directory or account not as it must be; Reason says which), Conflict (it runs).
	Spawn(ctx context.Context, kind service.Kind) (*Process, error)
}

// Process is a plugin's process, as its starter sees it.
type Process struct {
	PID int
	UID uint32 // that it runs as
	// Dir is the launch directory, for sockets; it is removed when the process has ended.
	Dir string
	// Our ends of its pipes; the caller's to close. Closing Lifeline asks the plugin to end.
	Stdout, Stderr, Lifeline *os.File
	Signal                   func(syscall.Signal) error
	// Gone is closed when the process has ended and another of its kind may be started; Exit is valid from then on.
	Gone <-chan struct{}
	Exit func() Exit
}

// Local starts plugins as the current user, without a launcher: mvirtd not run as root.
type Local struct {
	st   *starter
	lock *os.File
}

// NewLocal makes the directories that root would make, takes the state directory's lock and returns a
// spawner. env is what the handshake adds to a plugin's environment.
func NewLocal(cfg *config.Config, env Environment) (*Local, error) {
	t, err := newTable(cfg, false, systemAccounts())
	if err != nil {
		return nil, err
	}
	run, err := ensureDir(cfg.Core.RunDir, t.core, 0o755, t.trust)
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "core.run_dir")
	}
	run.Close()
	state, err := ensureDir(cfg.Core.StateDir, t.core, 0o700, t.trust)
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "core.state_dir")
	}
	l := &Local{lock: state}
	if err := lockState(state, cfg.Core.StateDir, cfg.Core.RunDir); err != nil {
		state.Close()
		return nil, err
	}
	if l.st, err = newStarter(t, cfg.Core.RunDir, nil, env); err == nil {
		_, err = l.st.sweep()
	}
	if err != nil {
		state.Close()
		return nil, err
	}
	return l, nil
}

// Spawn starts a plugin.
func (l *Local) Spawn(_ context.Context, kind service.Kind) (*Process, error) {
	la, err := l.st.start(kind)
	if err != nil {
		return nil, err
	}
	go func() {
		<-la.ended
		la.child.close()
	}()
	return &Process{PID: la.child.pid, UID: la.uid, Dir: la.dir, Stdout: la.stdout, Stderr: la.stderr, Lifeline: la.lifeline,
		Signal: func(s unix.Signal) error { la.child.signal(s); return nil },
		Gone:   la.ended, Exit: func() Exit { return la.child.exit }}, nil
}

// Close kills what still runs, removes the launch directories and gives the lock back.
func (l *Local) Close() {
	l.st.end(pluginGrace)
	l.st.dirs.dir.Close()
	l.lock.Close()
}
