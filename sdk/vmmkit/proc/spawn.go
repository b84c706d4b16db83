package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command is a process to start.
type Command struct {
	Path   string   // absolute
	Name   string   // argument 0; "": Path
	Args   []string // without the program's name
	Dir    string
	Env    []string   // all of it; nothing of ours is inherited
	Files  []*os.File // descriptors 3 and up, in order
	Output *os.File   // its standard output and error; a file, never a pipe to us
	Cgroup *os.File   // directory of a cgroup v2 to be born in, or nil
}

// Spawner starts hypervisor processes that run as our own user; in jails, package jail starts them.
type Spawner interface {
	// Spawn starts a process in a session of its own, that does not end with us. The caller keeps c.Files.
	Spawn(ctx context.Context, c Command) (*Process, error)
}

// Local starts processes as children of this program and as its user.
type Local struct{}

// Spawn starts c.
func (Local) Spawn(_ context.Context, c Command) (*Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	out := c.Output
	if out == nil {
		out = null
	}
	pidfd := -1
	attr := &os.ProcAttr{
		Dir:   c.Dir,
		Env:   c.Env,
		Files: append([]*os.File{null, out, out}, c.Files...),
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	}
	if c.Env == nil {
		attr.Env = []string{}
	}
	if c.Cgroup != nil {
		attr.Sys.UseCgroupFD = true
		attr.Sys.CgroupFD = int(c.Cgroup.Fd())
	}
	name := c.Name
	if name == "" {
		name = c.Path
	}
	child, err := os.StartProcess(c.Path, append([]string{name}, c.Args...), attr)
	if err != nil {
		return nil, err
	}
	// The child cannot be reaped by anybody else, so its pid is its own until our watch is told.
	pid := child.Pid
	if err := child.Release(); err != nil {
		return nil, err
	}
	if pidfd < 0 {
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			return nil, errors.Join(fmt.Errorf("pidfd of child %d: %w", pid, err), syscall.Kill(pid, syscall.SIGKILL))
		}
	}
	id, err := Identify(pid)
	if err == nil {
		err = unix.SetNonblock(pidfd, true)
	}
	if err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(pid, nil, 0, nil)
		unix.Close(pidfd)
		return nil, err
	}
	return newProcess(id, pidfd, true, nil), nil
}
