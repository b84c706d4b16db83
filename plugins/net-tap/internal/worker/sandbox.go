package worker

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// confine gives up, for good and for all threads, what the worker does not need: new privileges, the file
// system, and the system calls above. It says what it did.
func confine() (string, error) {
	if err := dropCaps(); err != nil {
		return "", fmt.Errorf("capabilities: %w", err)
	}
	var did []string
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return "", fmt.Errorf("no_new_privs: %w", err)
	}
	did = append(did, "no_new_privs")
	if err := seccomp(); err != nil {
		return "", fmt.Errorf("seccomp: %w", err)
	}
	did = append(did, "seccomp")
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // guests' packets stay out of core dumps
	return strings.Join(did, " "), nil
}

// dropCaps gives up all capabilities: a control plane that is not root may have passed ambient ones on.
// Capabilities are a thread's, so the one that gives them up begins the program anew.
func dropCaps() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		return err
	}
	if caps[0].Permitted|caps[1].Permitted == 0 {
		return nil
	}
	const again = "MVIRT_WORKER_DROPPED"
	if os.Getenv(again) != "" {
		return errors.New("they come back at exec: the worker must not run as root")
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	caps = [2]unix.CapUserData{}
	if err := unix.Capset(&hdr, &caps[0]); err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), again+"=1"))
}

// BPF return values (linux/seccomp.h) and offsets in struct seccomp_data.
const (
	retAllow = 0x7fff0000
	retErrno = 0x00050000
	retKill  = 0x80000000

	seccompSetFilter = 1
	seccompTSync     = 1

	offNr, offArch = 0, 4
)

// seccomp installs a filter on all threads at once.
func seccomp() error {
	stmt := func(code uint16, k uint32) unix.SockFilter { return unix.SockFilter{Code: code, K: k} }
	jump := func(k uint32, jt, jf uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jt: jt, Jf: jf}
	}
	prog := []unix.SockFilter{
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offArch),
		jump(auditArch, 1, 0),
		stmt(unix.BPF_RET|unix.BPF_K, retKill),
		stmt(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offNr),
	}
	for _, nr := range denied {
		prog = append(prog, jump(nr, 0, 1), stmt(unix.BPF_RET|unix.BPF_K, retErrno|uint32(unix.EPERM)))
	}
	// The x32 calls have this bit set and are another way to all of the above.
	prog = append(prog,
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: 0x40000000, Jt: 0, Jf: 1},
		stmt(unix.BPF_RET|unix.BPF_K, retErrno|uint32(unix.EPERM)),
		stmt(unix.BPF_RET|unix.BPF_K, retAllow))
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, seccompSetFilter, seccompTSync, uintptr(unsafe.Pointer(&fprog)))
	switch {
	case errno != 0:
		return errno
	case r != 0:
		return errors.New("a thread could not be confined")
	}
	return nil
}
