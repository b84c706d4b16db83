package launcher

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Names of capabilities by number: include/uapi/linux/capability.h, as capabilities(7) spells them.
var capNames = [...]string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST",
	"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
	"CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
	"CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ",
	"CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"}

// CapabilityNames lists the names of a set of capabilities, ascending by number.
func CapabilityNames(set uint64) []string {
	var out []string
	for i := range 64 {
		if set&(1<<i) != 0 {
			if i < len(capNames) {
				out = append(out, capNames[i])
			} else {
				out = append(out, "CAP_"+strconv.Itoa(i))
			}
		}
	}
	return out
}

// capabilitySet is the set that names make up.
func capabilitySet(names []string) (set uint64, err error) {
next:
	for _, n := range names {
		for i, known := range capNames {
			if n == known {
				set |= 1 << i
				continue next
			}
		}
		return 0, fmt.Errorf("there is no capability %s", n)
	}
	return set, nil
}

// launcherCaps is what the launcher itself needs: to give directories and sockets to others (the first five), to
// become others and limit them, to end them, and to build jails and reach into them (the last but one three).
var launcherCaps = [...]string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_KILL", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_RESOURCE"}

// ownCaps is what the launcher may hold under a table: what it needs, and what plugins are granted.
func (t *table) ownCaps() uint64 {
	set, err := capabilitySet(launcherCaps[:])
	if err != nil {
		panic(err) // the names above
	}
	for _, s := range t.specs {
		set |= s.caps
	}
	return set
}

// shrink takes from this process, all its threads and all that it will start, every capability that is not in
// keep. It says false where a program cannot do that to all its threads (one linked with C).
func shrink(keep uint64) (bool, error) {
	last, err := lastCapability()
	if err != nil {
		return false, err
	}
	have, err := ownBounding()
	if err != nil {
		return false, err
	}
	for c := range last + 1 {
		if keep&(1<<c) != 0 || have&(1<<c) == 0 {
			continue
		}
		_, _, e := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0)
		if e == syscall.ENOTSUP {
			return false, nil
		}
		if e != 0 {
			return false, fmt.Errorf("prctl(PR_CAPBSET_DROP, %d): %w", c, e)
		}
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&hdr, &sets[0]); err != nil {
		return false, os.NewSyscallError("capget", err)
	}
	for i := range sets {
		part := uint32(keep >> (32 * i))
		sets[i].Effective &= part
		sets[i].Permitted &= part
		sets[i].Inheritable = 0
	}
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&sets[0])), 0); e != 0 {
		return false, os.NewSyscallError("capset", e)
	}
	return true, nil
}

// ownBounding is the bounding set of this process: the most that any process started from here can hold.
func ownBounding() (uint64, error) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "CapBnd:"); ok {
			return strconv.ParseUint(strings.TrimSpace(rest), 16, 64)
		}
	}
	return 0, fmt.Errorf("/proc/self/status has no line CapBnd")
}
