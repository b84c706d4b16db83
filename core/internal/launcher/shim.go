package launcher

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The exec shim: mvirtd started with shimArg turns itself into another program. Descriptors:
//
//	0       /dev/null
//	1, 2    what the program gets as stdout and stderr
//	3 …     keep descriptors for the program
//	then    the program, opened
//	then    a memfd with a shimSpec
//	then    a pipe for an error; it closes by itself when the program runs
//	then    detached mounts, if the program gets a jail
//
// What it sets is set on the one thread that calls execve; the others end there.
const shimArg = "mvirt-exec-shim"

type shimSpec struct {
	Argv   []string
	Env    []string
	Keep   int
	Script bool
	Switch bool // set identity and capabilities; otherwise they stay as they are
	UID    uint32
	GID    uint32
	Groups []uint32
	Caps   uint64
	NoFile uint64
	Umask  int
	Jail   *jailSpec // nil: none
}

// Shim runs the exec shim if the arguments ask for it; then it does not return. Every main that starts
// plugins calls it first.
func Shim() {
	if len(os.Args) != 3 || os.Args[1] != shimArg {
		return
	}
	keep := 0
	if _, err := fmt.Sscanf(os.Args[2], "%d", &keep); err != nil || keep < 0 || keep > maxKeep {
		os.Exit(125)
	}
	report := os.NewFile(uintptr(3+keep+2), "report")
	err := shim(keep)
	_, _ = io.WriteString(report, err.Error()) // shim returns only with an error
	os.Exit(125)
}

// maxKeep bounds the descriptors that a program is given.
const maxKeep = 256

// execError is an error of execve itself, told apart from the preparations' by its prefix on the pipe.
const execErrorPrefix = "exec: "

func shim(keep int) error {
	runtime.LockOSThread()
	binary, specFD := 3+keep, 3+keep+1
	data, err := io.ReadAll(os.NewFile(uintptr(specFD), "spec"))
	if err != nil {
		return fmt.Errorf("reading the spec: %w", err)
	}
	var s shimSpec
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("reading the spec: %w", err)
	}
	// Nothing but what is meant to be kept gets through, also if the launcher were started with descriptors.
	if err := unix.CloseRange(uint(3+keep), ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return os.NewSyscallError("close_range", err)
	}
	if s.Script {
		if _, err := unix.FcntlInt(uintptr(binary), unix.F_SETFD, 0); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	if err := limits(s.NoFile); err != nil {
		return err
	}
	last, err := lastCapability()
	if err != nil {
		return err
	}
	if s.Jail != nil { // from here on nothing of the host is seen, not even /proc
		unix.Umask(0o022)
		if err := s.Jail.build(specFD + 2); err != nil {
			return err
		}
	}
	unix.Umask(s.Umask)
	if s.Switch {
		if err := become(&s, last); err != nil {
			return err
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl(PR_SET_NO_NEW_PRIVS)", err)
	}
	if s.Jail != nil {
		if err := landlock(append(s.Jail.Rules, llRule{FD: binary, Access: llProgram})); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s%w", execErrorPrefix, execveat(binary, s.Argv, s.Env))
}

// limits sets resource limits: open files as configured, no core dumps (they would hold guests' secrets).
func limits(nofile uint64) error {
	lim := unix.Rlimit{Cur: nofile, Max: nofile}
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err == nil && now.Max < nofile {
		// Without CAP_SYS_RESOURCE (an ordinary user, a container) the hard limit is the end of it.
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &lim, nil); err != nil {
			lim.Cur, lim.Max = now.Max, now.Max
		}
	}
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &lim, nil); err != nil {
		return os.NewSyscallError("prlimit(RLIMIT_NOFILE)", err)
	}
	if err := unix.Prlimit(0, unix.RLIMIT_CORE, &unix.Rlimit{}, nil); err != nil {
		return os.NewSyscallError("prlimit(RLIMIT_CORE)", err)
	}
	return nil
}

// become takes on identity and capabilities. Raw system calls: those of package syscall would change all
// threads, which is slower and here pointless.
func become(s *shimSpec, last int) error {
	for c := range last + 1 {
		if s.Caps&(1<<c) == 0 {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
				return fmt.Errorf("prctl(PR_CAPBSET_DROP, %d): %w", c, err)
			}
		}
	}
	// Without this, the change of user would clear the permitted set.
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl(PR_SET_KEEPCAPS)", err)
	}
	var groups *uint32
	if len(s.Groups) > 0 {
		groups = &s.Groups[0]
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(s.Groups)), uintptr(unsafe.Pointer(groups)), 0); e != 0 {
		return os.NewSyscallError("setgroups", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(s.GID), uintptr(s.GID), uintptr(s.GID)); e != 0 {
		return os.NewSyscallError("setresgid", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(s.UID), uintptr(s.UID), uintptr(s.UID)); e != 0 {
		return os.NewSyscallError("setresuid", e)
	}
	// Root gets its capabilities at execve from the bounding set; another user only through the ambient
	// set, which needs them to be inheritable. Root's children get none that way.
	inheritable := s.Caps
	if s.UID == 0 {
		inheritable = 0
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	half := func(shift int) unix.CapUserData {
		return unix.CapUserData{Effective: uint32(s.Caps >> shift), Permitted: uint32(s.Caps >> shift), Inheritable: uint32(inheritable >> shift)}
	}
	sets := [2]unix.CapUserData{half(0), half(32)}
	if err := unix.Capset(&hdr, &sets[0]); err != nil {
		return os.NewSyscallError("capset", err)
	}
	if s.UID != 0 {
		for c := range last + 1 {
			if s.Caps&(1<<c) != 0 {
				if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
					return fmt.Errorf("prctl(PR_CAP_AMBIENT_RAISE, %d): %w", c, err)
				}
			}
		}
	}
	return nil
}

// lastCapability is the highest number that this kernel knows.
func lastCapability() (int, error) {
	data, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return 0, err
	}
	var n int
	_, err = fmt.Sscanf(strings.TrimSpace(string(data)), "%d", &n)
	if err == nil && (n < 0 || n > 63) {
		err = fmt.Errorf("cap_last_cap is %d", n)
	}
	return n, err
}

// execveat replaces this process by the opened program; it returns only with an error.
func execveat(fd int, argv, env []string) error {
	a, err := syscall.SlicePtrFromStrings(argv)
	if err != nil {
		return err
	}
	e, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	empty, _ := unix.BytePtrFromString("")
	_, _, errno := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(empty)),
		uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&e[0])), unix.AT_EMPTY_PATH, 0)
	runtime.KeepAlive(slices.Concat(a, e))
	return errno
}
