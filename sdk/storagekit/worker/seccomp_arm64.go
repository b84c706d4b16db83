package worker

import "golang.org/x/sys/unix"

// auditArch is AUDIT_ARCH_AARCH64 (linux/audit.h).
const auditArch = 0xc00000b7

// legacyCalls are those that only this machine has.
func legacyCalls() []int { return []int{unix.SYS_RENAMEAT} }
