package worker

import "golang.org/x/sys/unix"

// auditArch is AUDIT_ARCH_X86_64 (linux/audit.h).
const auditArch = 0xc000003e

// legacyCalls are those that only this machine has.
func legacyCalls() []int {
	return []int{unix.SYS_OPEN, unix.SYS_CREAT, unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_MKDIR, unix.SYS_RMDIR,
		unix.SYS_MKNOD, unix.SYS_UNLINK, unix.SYS_RENAME, unix.SYS_RENAMEAT, unix.SYS_LINK, unix.SYS_SYMLINK,
		unix.SYS_CHMOD, unix.SYS_CHOWN, unix.SYS_LCHOWN, unix.SYS_INOTIFY_INIT, unix.SYS_MODIFY_LDT, unix.SYS_IOPERM, unix.SYS_IOPL}
}
