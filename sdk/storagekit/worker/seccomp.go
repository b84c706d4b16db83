package worker

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// seccomp takes no_new_privs and a filter that answers EPERM to every system call by which a process could
// reach anything that it does not hold already: files, sockets, other processes, kernel modules, io_uring.
// It is a list of what is denied, since Go's runtime adds calls of its own with each release. The filter
// goes to all threads at once (SECCOMP_FILTER_FLAG_TSYNC), and no_new_privs with it (kernel/seccomp.c,
// seccomp_sync_threads).
func seccomp() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("not dumpable: %w", err)
	}
	if auditArch == 0 {
		return fmt.Errorf("no seccomp filter for %s", runtime.GOARCH)
	}
	filter := program()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, no := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if no != 0 {
		return fmt.Errorf("seccomp: %w", no)
	}
	return nil
}

// Offsets in struct seccomp_data (linux/seccomp.h); the low half of the first argument of a little-endian
// machine.
const (
	dataNr   = 0
	dataArch = 4
	dataArg0 = 16
)

// cloneNamespaces are the CLONE_NEW* flags of clone(2): Go starts threads with clone and needs none of them.
const cloneNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

func program() []unix.SockFilter {
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	const (
		load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jge  = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		jset = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K
	)
	const eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	const enosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	f := []unix.SockFilter{
		stmt(load, dataArch),
		{Code: jeq, Jt: 1, Jf: 0, K: auditArch},
		stmt(ret, unix.SECCOMP_RET_KILL_PROCESS),
		stmt(load, dataNr),
		// x32 calls on amd64 have bit 30 set; no machine has that many calls otherwise.
		{Code: jge, Jt: 0, Jf: 1, K: 1 << 30},
		stmt(ret, eperm),
	}
	for _, nr := range denied() {
		f = append(f, unix.SockFilter{Code: jeq, Jt: 0, Jf: 1, K: uint32(nr)}, stmt(ret, eperm))
	}
	// clone3 hides its flags behind a pointer; told that there is none, glibc uses clone.
	f = append(f, unix.SockFilter{Code: jeq, Jt: 0, Jf: 1, K: unix.SYS_CLONE3}, stmt(ret, enosys))
	return append(f,
		unix.SockFilter{Code: jeq, Jt: 0, Jf: 3, K: unix.SYS_CLONE},
		stmt(load, dataArg0),
		unix.SockFilter{Code: jset, Jt: 0, Jf: 1, K: cloneNamespaces},
		stmt(ret, eperm),
		stmt(ret, unix.SECCOMP_RET_ALLOW))
}

// denied lists the calls that both machines have; those of one machine are in legacy.
func denied() []int {
	return append(legacyCalls(),
		unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
		unix.SYS_EXECVE, unix.SYS_EXECVEAT,
		unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT, unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_ACCEPT, unix.SYS_ACCEPT4,
		unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_SYMLINKAT,
		unix.SYS_TRUNCATE, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT,
		unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR,
		unix.SYS_IOCTL, unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_CHDIR, unix.SYS_FCHDIR,
		unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
		unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID,
		unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_SETGROUPS, unix.SYS_CAPSET,
		unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_KILL, unix.SYS_TKILL, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
		unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
		unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, unix.SYS_IO_SETUP,
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_ADD_KEY, unix.SYS_KEYCTL, unix.SYS_REQUEST_KEY,
		unix.SYS_MEMFD_CREATE, unix.SYS_FANOTIFY_INIT, unix.SYS_INOTIFY_INIT1, unix.SYS_QUOTACTL, unix.SYS_SWAPON, unix.SYS_SWAPOFF,
		unix.SYS_REBOOT, unix.SYS_KEXEC_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
		unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
		unix.SYS_SHMGET, unix.SYS_MSGGET, unix.SYS_SEMGET, unix.SYS_MQ_OPEN,
		unix.SYS_SYSLOG, unix.SYS_ACCT, unix.SYS_PERSONALITY, unix.SYS_VHANGUP,
	)
}
