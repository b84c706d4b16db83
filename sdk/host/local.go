package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Local spawns plugins as children of this process, as its own user.
type Local struct {
	Command []string // program and arguments; the program's path is absolute
	Env     []string // beside what the handshake needs; the plugin gets nothing of this process's environment
	Dir     string   // where launch directories are made; "": the system's temporary directory. Keep it short: 108 bytes bound a socket's path
}

// Spawn implements Spawner.
func (l *Local) Spawn(context.Context) (*Process, error) {
	dir, err := os.MkdirTemp(l.Dir, "mvirt-plugin-")
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err, "launch directory")
	}
	p, err := l.spawn(dir)
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return p, nil
}

func (l *Local) spawn(dir string) (_ *Process, err error) {
	var ours, theirs []*os.File
	defer func() {
		closeAll(theirs)
		if err != nil {
			closeAll(ours)
		}
	}()
	pipe := func() (r, w *os.File) {
		if err != nil {
			return nil, nil
		}
		r, w, err = os.Pipe()
		return r, w
	}
	outR, outW := pipe()
	errR, errW := pipe()
	lifeR, lifeW := pipe()
	ours, theirs = []*os.File{outR, errR, lifeW}, []*os.File{outW, errW, lifeR}
	if err != nil {
		return nil, errs.Wrap(errs.Exhausted, err, "pipes")
	}
	pidfd := -1
	cmd := exec.Command(l.Command[0], l.Command[1:]...)
	cmd.Env = append(Env(dir, uint32(os.Getuid()), os.Getpid()), l.Env...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = outW, errW
	cmd.ExtraFiles = []*os.File{lifeR}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if err = cmd.Start(); err != nil {
		return nil, startError(l.Command[0], err)
	}
	if pidfd >= 0 {
		syscall.CloseOnExec(pidfd)
		syscall.Close(pidfd) // os.Process holds its own, and signals by it
	}
	w := &waiter{done: make(chan struct{})}
	go func() {
		cmd.Wait()
		w.exit = exitOf(cmd.ProcessState)
		os.RemoveAll(dir)
		close(w.done)
	}()
	return &Process{PID: cmd.Process.Pid, UID: uint32(os.Getuid()), LaunchDir: dir, Stdout: outR, Stderr: errR, Lifeline: lifeW,
		Signal: func(s syscall.Signal) error { return cmd.Process.Signal(s) }, Wait: w.wait}, nil
}

type waiter struct {
	done chan struct{}
	exit Exit
}

func (w *waiter) wait(ctx context.Context) (Exit, error) {
	select {
	case <-w.done:
		return w.exit, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

func exitOf(st *os.ProcessState) Exit {
	e := Exit{At: time.Now()}
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		e.Signal = ws.Signal()
		return e
	}
	e.Code = st.ExitCode()
	return e
}

func startError(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &errs.Error{Op: "plugin.Launch", Kind: errs.NotFound, Reason: ReasonMissing, Message: "there is no program " + path,
			Remedy: "install the plugin, or correct command in the configuration", Err: err}
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.EISDIR):
		return &errs.Error{Op: "plugin.Launch", Kind: errs.Precondition, Reason: ReasonNotExec, Message: path + " cannot be executed",
			Remedy: "give the path of a program and set its execute bits (chmod 755)", Err: err}
	}
	return errs.Wrap(errs.Internal, err, "starting %s", path)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
