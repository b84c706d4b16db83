package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/worker"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

// workerCred is who workers run as; nil: as the control plane itself.
type workerCred struct{ uid, gid uint32 }

// findCred looks the worker's user up, if this process may become another user at all.
func findCred(name string) (*workerCred, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, errs.New(errs.Precondition, "there is no user %q to run packet workers as", name).
			Do("create it: useradd --system --no-create-home --shell /usr/sbin/nologin " + name + "; or name another with --worker-user")
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if uid == 0 {
		return nil, errs.New(errs.Precondition, "packet workers must not run as root").Do("name another user with --worker-user")
	}
	return &workerCred{uint32(uid), uint32(gid)}, nil
}

func (rt *runtime) socketPath() string {
	return filepath.Join(rt.s.workerDir(), rt.id[24:]+".sock")
}

// ensureWorker returns the worker that runs, adopts one of an earlier control plane, or starts one.
func (rt *runtime) ensureWorker() (*wctl.Hello, error) {
	if c := rt.client.Load(); c != nil {
		if rep, fds, err := c.Call(wctl.Request{Op: wctl.OpHello}); err == nil {
			wctl.CloseAll(fds)
			return rep.Hello, nil
		}
		rt.killWorker()
		rt.client.Store(nil)
		c.Close()
	}
	if h, err := rt.connectWorker(); err == nil {
		rt.s.log.Info("adopted a packet worker", "network", rt.id, "pid", h.PID)
		return h, nil
	}
	if err := rt.spawn(); err != nil {
		return nil, err
	}
	h, err := rt.connectWorker()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, lastLine(rt.logPath()))
	}
	rt.s.log.Info("started a packet worker", "network", rt.id, "pid", h.PID, "confined", h.Sandbox)
	return h, nil
}

// connectWorker connects to a worker that listens. One that is not ours to use is killed.
func (rt *runtime) connectWorker() (*wctl.Hello, error) {
	fd, err := wctl.Dial(rt.socketPath())
	if err != nil {
		return nil, err
	}
	cred, err := wctl.PeerCred(fd)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	want := uint32(os.Geteuid())
	if rt.s.cred != nil {
		want = rt.s.cred.uid
	}
	if cred.Uid != want {
		unix.Close(fd)
		return nil, fmt.Errorf("the process %d at %s runs as user %d, not %d", cred.Pid, rt.socketPath(), cred.Uid, want)
	}
	c := wctl.NewClient(fd, callWait, rt.event)
	rep, fds, err := c.Call(wctl.Request{Op: wctl.OpHello})
	wctl.CloseAll(fds)
	if err != nil || rep.Hello == nil || rep.Hello.Version != wctl.Version || rep.Hello.NetworkID != rt.id {
		rt.s.killPeer(fd, int(cred.Pid))
		c.Close()
		return nil, errors.Join(err, fmt.Errorf("worker %d cannot be used, replaced", cred.Pid))
	}
	rt.pid.Store(uint32(cred.Pid))
	rt.client.Store(c)
	rt.s.wg.Add(1)
	go func() {
		defer rt.s.wg.Done()
		<-c.Done()
		rt.kick()
	}()
	return rep.Hello, nil
}

// killPeer kills the process at the other end of a connected socket and waits until it is dead. The pidfd
// is taken while the connection stands, so it is that process and not a later one of the same number.
func (s *Service) killPeer(fd, pid int) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(pidfd)
	p := []unix.PollFd{{Fd: int32(fd)}}
	if _, err := unix.Poll(p, 0); err != nil || p[0].Revents&unix.POLLHUP != 0 {
		return
	}
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); errors.Is(err, unix.EPERM) && s.cfg.Starter != nil {
		// Another user's, and we hold no right to signal those.
		if id, err := proc.Identify(pid); err == nil {
			ctx, cancel := context.WithTimeout(context.Background(), callWait)
			defer cancel()
			if err := s.cfg.Starter.EndWorker(ctx, id); err != nil {
				s.log.Warn("a packet worker cannot be ended", "pid", pid, "error", err)
			}
		}
	}
	for end := time.Now().Add(callWait); time.Now().Before(end); {
		p = []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, int(callWait/time.Millisecond)); n > 0 || err != nil && err != unix.EINTR {
			return
		}
	}
}

// killWorker kills the connected worker, if there is one. It is safe without rt.mu.
func (rt *runtime) killWorker() {
	if fd, err := wctl.Dial(rt.socketPath()); err == nil {
		if cred, err := wctl.PeerCred(fd); err == nil {
			rt.s.killPeer(fd, int(cred.Pid))
		}
		unix.Close(fd)
	}
}

// stopWorker ends the worker for good. rt.mu is held, rt.gone set.
func (rt *runtime) stopWorker() {
	if rt.client.Load() == nil {
		_, _ = rt.connectWorker()
	}
	if c := rt.client.Load(); c != nil {
		_, fds, _ := c.Call(wctl.Request{Op: wctl.OpStop})
		wctl.CloseAll(fds)
		select {
		case <-c.Done():
		case <-time.After(time.Second):
		}
	}
	rt.killWorker()
	rt.pid.Store(0)
	os.Remove(rt.socketPath())
	os.Remove(rt.logPath())
}

func (rt *runtime) logPath() string { return filepath.Join(rt.s.logDir(), rt.id+".log") }

// logMax is how long a worker's log may be before a new worker begins it anew.
const logMax = 1 << 20

// spawn starts a worker and waits until it listens. It has its own session, nothing of ours but the bound
// socket, and a log file of its own, so that nothing of it ends when the control plane does.
func (rt *runtime) spawn() error {
	path := rt.socketPath()
	sock, err := wctl.Bind(path)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	listener := os.NewFile(uintptr(sock), path)
	defer listener.Close()
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if st, err := os.Stat(rt.logPath()); err == nil && st.Size() > logMax {
		flags |= os.O_TRUNC
	}
	logFile, err := os.OpenFile(rt.logPath(), flags, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	// The worker closes its end when it listens, or when it dies.
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	end, err := rt.s.startWorker(logFile, []*os.File{listener, theirs}, "--network", rt.id, "--control-uid", strconv.Itoa(os.Geteuid()))
	theirs.Close()
	if err != nil {
		return err
	}
	_ = ready.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := ready.Read(make([]byte, 1)); err != io.EOF {
		end()
		return fmt.Errorf("the worker does not begin: %w", err)
	}
	return nil
}

// workerEnv is what a worker's environment has besides what every process gets.
var workerEnv = [...]string{"GOMAXPROCS=2", "GOTRACEBACK=all"}

// startWorker starts a worker: the launcher does, where there is one, else we do. end kills it.
func (s *Service) startWorker(output *os.File, files []*os.File, args ...string) (end func(), err error) {
	if c := s.cfg.Starter; c != nil && s.cfg.WorkerArgs == nil {
		ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
		defer cancel()
		p, err := c.StartWorker(ctx, jail.Worker{Name: worker.Name, Args: args, Env: workerEnv[:]}, output, files...)
		if err != nil {
			return nil, err
		}
		return func() { _ = p.Signal(syscall.SIGKILL) }, nil
	}
	first := s.cfg.WorkerArgs
	if first == nil {
		first = []string{worker.Name}
	}
	cmd := exec.Cmd{
		// This very program, also when its file was replaced meanwhile.
		Path:        "/proc/self/exe",
		Args:        append(append([]string{"mvirt-net"}, first...), args...),
		Env:         workerEnv[:],
		Dir:         "/",
		Stdout:      output,
		Stderr:      output,
		ExtraFiles:  files,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if c := s.cred; c != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.uid, Gid: c.gid, Groups: []uint32{}}
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() { _ = cmd.Wait() }() // reaps it whenever it ends
	return func() { _ = cmd.Process.Kill() }, nil
}

// lastLine is the end of a log, for an error message.
func lastLine(path string) string {
	b, _ := os.ReadFile(path)
	if len(b) > 300 {
		b = b[len(b)-300:]
	}
	end := len(b)
	for end > 0 && b[end-1] == '\n' {
		end--
	}
	start := end
	for start > 0 && b[start-1] != '\n' {
		start--
	}
	return string(b[start:end])
}
