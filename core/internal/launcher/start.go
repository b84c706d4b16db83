package launcher

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Exit is how a process ended.
type Exit struct {
	Code   int            // if Signal is 0
	Signal syscall.Signal // that killed it
	At     time.Time
}

// String is "exit status 1" or "killed by SIGKILL".
func (e Exit) String() string {
	if e.Signal == 0 && e.Code == -1 {
		return "ended, how is not known"
	}
	if e.Signal == 0 {
		return fmt.Sprintf("exit status %d", e.Code)
	}
	if n := unix.SignalName(e.Signal); n != "" {
		return "killed by " + n
	}
	return fmt.Sprintf("killed by signal %d", int(e.Signal))
}

// program is what start starts.
type program struct {
	shim   shimSpec
	binary *os.File // closed by the caller
	stdout *os.File // the process's ends; nil: /dev/null
	stderr *os.File
	keep   []*os.File
	setup  []*os.File // for the shim alone
	clone  uintptr    // namespaces to be made
	cgroup *os.File   // directory, or nil
	family *family    // that the process is counted among
}

// child is a process that start made.
type child struct {
	pid   int
	start uint64   // start time in clock ticks since boot, tells a recycled pid apart
	pidfd *os.File // ours alone: O_NONBLOCK set on a shared one would make our wait fail with EAGAIN
	share *os.File // another, to give away
	gone  chan struct{}
	exit  Exit // once gone is closed
}

// shimTime bounds the shim, which takes a few milliseconds.
const shimTime = 20 * time.Second

// start runs a program through the exec shim and returns when it executes.
func start(p program) (*child, error) {
	p.shim.Keep = len(p.keep)
	specFile, err := memfd(p.shim)
	if err != nil {
		return nil, err
	}
	defer specFile.Close()
	reportR, reportW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer reportR.Close()
	pidfd := -1
	cmd := exec.Command("/proc/self/exe", shimArg, fmt.Sprint(len(p.keep)))
	cmd.Args[0] = p.shim.Argv[0]
	cmd.Env = []string{"PATH=/nonexistent"} // the shim needs none, and Go's own variables must not reach it
	cmd.Dir = "/"
	cmd.ExtraFiles = append(append([]*os.File(nil), p.keep...), p.binary, specFile, reportW)
	cmd.ExtraFiles = append(cmd.ExtraFiles, p.setup...)
	if p.stdout != nil {
		cmd.Stdout = p.stdout
	}
	if p.stderr != nil {
		cmd.Stderr = p.stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd, Cloneflags: p.clone}
	if p.cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(p.cgroup.Fd())
	}
	err = p.family.start(cmd)
	reportW.Close()
	if err != nil {
		return nil, fmt.Errorf("starting a process: %w", err)
	}
	c := &child{pid: cmd.Process.Pid, gone: make(chan struct{})}
	c.start, _ = startTime(c.pid)
	share, serr := unix.PidfdOpen(c.pid, 0) // nobody has waited for it yet, so the pid is still its own
	go c.wait(cmd, p.family)
	if pidfd < 0 || serr != nil {
		_ = cmd.Process.Kill()
		<-c.gone
		return nil, errs.New(errs.Unsupported, "this kernel has no pidfds").Do("use Linux 5.11 or newer")
	}
	c.pidfd, c.share = os.NewFile(uintptr(pidfd), "pidfd"), os.NewFile(uintptr(share), "pidfd")

	_ = reportR.SetReadDeadline(time.Now().Add(shimTime))
	report, err := io.ReadAll(io.LimitReader(reportR, 4096))
	if err == nil && len(report) == 0 {
		return c, nil
	}
	c.signal(unix.SIGKILL)
	<-c.gone
	c.close()
	if err != nil {
		return nil, fmt.Errorf("the exec shim did not finish: %w", err)
	}
	return nil, shimError(string(report), p.binary.Name())
}

// shimError makes an error of what the shim wrote.
func shimError(report, path string) error {
	text, isExec := strings.CutPrefix(report, execErrorPrefix)
	e := errs.New(errs.Precondition, "%s cannot be started: %s", path, text)
	switch {
	case !isExec:
		e.Kind, e.Reason = errs.Internal, "SHIM_FAILED"
	case text == unix.ENOEXEC.Error():
		e.Reason, e.Remedy = ReasonBinaryFormat, "give a program for this machine in command"
	case text == unix.EACCES.Error():
		e.Reason = ReasonBinaryNotExecutable
		e.Remedy = "chmod 755 " + path + ", and see that its file system is not mounted noexec"
	case text == unix.ENOENT.Error():
		e.Reason, e.Remedy = ReasonBinaryFormat, "install the interpreter (first line of a script, or ELF loader) that it asks for"
	default:
		e.Reason = ReasonBinaryFormat
	}
	return e
}

func (c *child) wait(cmd *exec.Cmd, f *family) {
	_ = cmd.Wait() // what it returns is in ProcessState
	f.ended(c.pid)
	c.exit = Exit{Code: -1, At: time.Now()}
	if cmd.ProcessState == nil {
		close(c.gone)
		return
	}
	c.exit.Code = cmd.ProcessState.ExitCode()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		c.exit.Code, c.exit.Signal = 0, ws.Signal()
	}
	close(c.gone)
}

// signal sends a signal unless the process is gone.
func (c *child) signal(sig syscall.Signal) {
	if raw, err := c.pidfd.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	}
}

func (c *child) close() { closeAll([]*os.File{c.pidfd, c.share}) }

func memfd(s shimSpec) (*os.File, error) {
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return memFile("spec", data)
}

// memFile is an unnamed file with data, read from its start.
func memFile(name string, data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err = f.Write(data); err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// startTime reads when a process started, in clock ticks since boot: proc_pid_stat(5), field 22.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(data, ')') // the name may hold anything
	f := strings.Fields(string(data[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is malformed", pid)
	}
	var n uint64
	_, err = fmt.Sscan(f[19], &n)
	return n, err
}
