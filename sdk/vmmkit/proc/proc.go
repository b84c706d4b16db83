// Package proc cares for processes that outlive the program which started them: it names them so that no
// other process can be mistaken for them, starts them apart from us, waits for their end and finds them
// again.
//
// A pid alone names nobody: it is given to the next process after its owner's end. An [Identity] is pid,
// start time and boot, and every signal goes through a pidfd that was opened before the start time was
// compared, so a stranger is never hit.
package proc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrGone says that the process named by an Identity has ended (or never was): whatever has its pid now is
// somebody else.
var ErrGone = errors.New("the process is gone")

// Identity names one process for ever.
type Identity struct {
	PID       int
	StartTime uint64 // clock ticks after boot: field 22 of /proc/<pid>/stat, proc_pid_stat(5)
	BootID    string // /proc/sys/kernel/random/boot_id
}

// BootID names the running boot of this host.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Identify gives the identity of the process that has pid now, or ErrGone.
func Identify(pid int) (Identity, error) {
	boot, err := BootID()
	if err != nil {
		return Identity{}, err
	}
	start, _, err := stat(pid)
	return Identity{PID: pid, StartTime: start, BootID: boot}, err
}

// stat reads start time and state of a process.
func stat(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, 0, ErrGone
	}
	if err != nil {
		return 0, 0, err
	}
	return parseStat(b)
}

// zombieStatus reads the wait status of a process that has ended and is not reaped: field 52 of its stat,
// which the kernel shows to the process's own user.
func zombieStatus(id Identity) (syscall.WaitStatus, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", id.PID))
	if err != nil {
		return 0, false
	}
	start, state, err := parseStat(b)
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const exitField = 52 - 3
	if err != nil || start != id.StartTime || state != 'Z' || len(f) <= exitField {
		return 0, false
	}
	code, err := strconv.ParseUint(f[exitField], 10, 32)
	return syscall.WaitStatus(code), err == nil
}

// parseStat parses /proc/<pid>/stat. The second field is the program's name in parentheses and may itself
// hold spaces and parentheses; the fields after the last ')' are counted.
func parseStat(b []byte) (start uint64, state byte, err error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0, errors.New("no name in stat")
	}
	f := strings.Fields(string(b[i+1:]))
	const startField = 22 - 3 // f[0] is field 3
	if len(f) <= startField || len(f[0]) != 1 {
		return 0, 0, errors.New("stat is too short")
	}
	start, err = strconv.ParseUint(f[startField], 10, 64)
	return start, f[0][0], err
}

// Exit is how a process ended.
type Exit struct {
	Known  bool // false: it ended, but the kernel does not tell us how
	Code   int  // exit status, if Signal is 0
	Signal syscall.Signal
}

// String is "exit status 1", "signal 9 (SIGKILL)", "an unknown exit status".
func (e Exit) String() string {
	switch {
	case !e.Known:
		return "an unknown exit status"
	case e.Signal != 0:
		return fmt.Sprintf("signal %d (%s)", int(e.Signal), unix.SignalName(e.Signal))
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// Keeper does to a process of another user what only somebody else may: mvirtd's root half, for hypervisors in
// jails.
type Keeper interface {
	// Signal sends a signal, or returns ErrGone.
	Signal(id Identity, sig syscall.Signal) error
	// Exit is how a process ended that has, if that is known.
	Exit(id Identity) (ws syscall.WaitStatus, known bool)
}

// Process is a handle on a process. Its methods may be called concurrently.
type Process struct {
	id    Identity
	child bool
	keep  Keeper   // nil: it is our own user's
	fd    *os.File // pidfd, non-blocking

	done chan struct{} // closed when the process has ended
	exit Exit          // valid after done
	err  error
}

// Open gets a handle on a process that may not be our child. It returns ErrGone when the process has ended,
// when its pid belongs to another process by now, and when the host has booted since.
func Open(id Identity) (*Process, error) { return OpenKept(id, nil) }

// OpenKept is Open for a process that k keeps.
func OpenKept(id Identity, k Keeper) (*Process, error) {
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	if id.PID <= 0 || id.BootID != boot {
		return nil, ErrGone
	}
	fd, err := unix.PidfdOpen(id.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", id.PID, err)
	}
	// The pidfd holds whoever has the pid now; only then is it asked who that is.
	start, state, err := stat(id.PID)
	if err == nil && (start != id.StartTime || state == 'Z' || state == 'X') {
		err = ErrGone
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return newProcess(id, fd, false, k), nil
}

// Kept makes a handle of a pidfd whose process is known, has perhaps ended, and is kept by k. It takes fd over.
func Kept(id Identity, fd int, k Keeper) (*Process, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return newProcess(id, fd, false, k), nil
}

// FromPidfd makes a handle of a pidfd that somebody else opened. It takes fd over.
func FromPidfd(fd int) (*Process, error) {
	pid, err := pidOf(fd)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	var id Identity
	if err == nil {
		id, err = Identify(pid)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return newProcess(id, fd, false, nil), nil
}

// pidOf reads the "Pid:" line of a pidfd's fdinfo, pidfd_open(2).
func pidOf(fd int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, err
	}
	for _, l := range strings.Split(string(b), "\n") {
		if v, ok := strings.CutPrefix(l, "Pid:"); ok {
			pid, err := strconv.Atoi(strings.TrimSpace(v))
			if err == nil && pid <= 0 {
				err = ErrGone
			}
			return pid, err
		}
	}
	return 0, errors.New("the descriptor is no pidfd")
}

func newProcess(id Identity, fd int, child bool, k Keeper) *Process {
	p := &Process{id: id, child: child, keep: k, fd: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}
	go p.watch()
	return p
}

// Identity names the process.
func (p *Process) Identity() Identity { return p.id }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit tells how the process ended; it is the zero Exit before Done is closed.
func (p *Process) Exit() Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return Exit{}
	}
}

// Wait returns when the process has ended or ctx has.
func (p *Process) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.done:
		return p.exit, p.err
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

// Signal sends a signal, or returns ErrGone.
func (p *Process) Signal(sig syscall.Signal) error {
	if p.keep != nil {
		return p.keep.Signal(p.id, sig)
	}
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return ErrGone
	}
	var serr error
	if err := conn.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return ErrGone
	}
	if errors.Is(serr, unix.ESRCH) {
		return ErrGone
	}
	return serr
}

// watch waits for the end by the run time's poller, so that a thousand processes need no thousand threads.
func (p *Process) watch() {
	defer close(p.done)
	defer p.fd.Close()
	conn, err := p.fd.SyscallConn()
	if err != nil {
		p.err = err
		return
	}
	err = conn.Read(func(fd uintptr) bool {
		pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(pfd, 0)
		return err == nil && n > 0
	})
	if err != nil {
		p.err = fmt.Errorf("waiting for process %d: %w", p.id.PID, err)
		return
	}
	if p.child {
		var ws syscall.WaitStatus
		for {
			_, err := syscall.Wait4(p.id.PID, &ws, 0, nil)
			if !errors.Is(err, syscall.EINTR) {
				p.err = err
				break
			}
		}
		if p.err == nil {
			p.exit = exitOf(ws)
		}
		return
	}
	if p.keep != nil {
		// The kernel shows another user's exit status as 0 while it is not reaped: nothing to go by.
		if ws, ok := p.keep.Exit(p.id); ok {
			p.exit = exitOf(ws)
		} else if ws, ok, _ := exitInfo(conn); ok {
			p.exit = exitOf(ws)
		}
		return
	}
	// While nobody has reaped it, its stat tells the status; afterwards newer kernels tell it by the pidfd.
	for range 100 {
		if code, ok := zombieStatus(p.id); ok {
			p.exit = exitOf(code)
			return
		}
		ws, ok, err := exitInfo(conn)
		if ok {
			p.exit = exitOf(ws)
		}
		if ok || err != nil {
			return
		}
		time.Sleep(2 * time.Millisecond) // bounded: nothing announces the reaping
	}
}

func exitOf(ws syscall.WaitStatus) Exit {
	if ws.Signaled() {
		return Exit{Known: true, Signal: ws.Signal()}
	}
	return Exit{Known: true, Code: ws.ExitStatus()}
}

// pidfdInfo is struct pidfd_info of include/uapi/linux/pidfd.h, with what Linux 6.15 added.
type pidfdInfo struct {
	mask                                             uint64
	cgroupID                                         uint64
	pid, tgid, ppid                                  uint32
	ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid uint32
	exitCode                                         int32
}

const (
	pidfdGetInfo  = 0xC040FF0B // _IOWR(PIDFS_IOCTL_MAGIC 0xFF, 11, 64 bytes)
	pidfdInfoExit = 1 << 3     // PIDFD_INFO_EXIT
)

// exitInfo asks the kernel for the exit status of a process that has ended, whoever's child it was. ok is
// false while it is not reaped; err is set where the kernel has no such thing (before Linux 6.15).
func exitInfo(conn syscall.RawConn) (ws syscall.WaitStatus, ok bool, err error) {
	info := pidfdInfo{mask: pidfdInfoExit}
	var e unix.Errno
	if cerr := conn.Control(func(fd uintptr) {
		_, _, e = unix.Syscall(unix.SYS_IOCTL, fd, pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	}); cerr != nil {
		return 0, false, cerr
	}
	switch {
	case e == unix.ESRCH:
		return 0, false, nil
	case e != 0:
		return 0, false, e
	}
	return syscall.WaitStatus(uint32(info.exitCode)), info.mask&pidfdInfoExit != 0, nil
}

// Find lists the processes of uid that have an argument beginning with marker, oldest first, with that
// argument. Processes that end meanwhile are left out.
func Find(uid uint32, marker string) ([]Found, error) {
	if marker == "" {
		return nil, errors.New("no marker")
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var found []Found
	for _, d := range dirs {
		var st unix.Stat_t
		if unix.Stat(d, &st) != nil || st.Uid != uid {
			continue
		}
		b, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || len(b) == 0 {
			continue
		}
		for _, arg := range strings.Split(string(b), "\x00") {
			if !strings.HasPrefix(arg, marker) {
				continue
			}
			pid, err := strconv.Atoi(filepath.Base(d))
			if err != nil {
				break
			}
			if id, err := Identify(pid); err == nil {
				found = append(found, Found{Identity: id, Arg: arg})
			}
			break
		}
	}
	return found, nil
}

// Found is a process that Find found.
type Found struct {
	Identity
	Arg string // the argument that begins with the marker
}
