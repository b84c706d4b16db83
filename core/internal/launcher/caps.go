package launcher

import (
	"fmt"
	"os"
	"strconv"
	"strings"
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
