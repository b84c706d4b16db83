package launcher

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// A VM's directory belongs to the vmm plugin; its hypervisor shares it by access control lists, which name both
// and nobody else, also on what either makes there later (default lists). acl(5); the form of the attribute is
// linux/posix_acl_xattr.h: version 2, then tag, permissions and id of each entry, in little endian.
const (
	aclVersion = 2
	aclUserObj = 0x01
	aclUser    = 0x02
	aclGroup   = 0x04
	aclMask    = 0x10
	aclOther   = 0x20
	aclNoID    = ^uint32(0)
)

// acl is a list that gives both users perm and everybody else nothing.
func acl(a, b uint32, perm uint16) []byte {
	out := binary.LittleEndian.AppendUint32(nil, aclVersion)
	add := func(tag, perm uint16, id uint32) {
		out = binary.LittleEndian.AppendUint16(out, tag)
		out = binary.LittleEndian.AppendUint16(out, perm)
		out = binary.LittleEndian.AppendUint32(out, id)
	}
	add(aclUserObj, perm, aclNoID)
	add(aclUser, perm, min(a, b))
	add(aclUser, perm, max(a, b))
	add(aclGroup, 0, aclNoID)
	add(aclMask, perm, aclNoID)
	add(aclOther, 0, aclNoID)
	return out
}

// maxShared bounds what is looked at in a VM's directory.
const maxShared = 10000

// share gives the plugin and a VM's uid what is in the VM's directory. Only regular files, sockets and directories are
// touched that belong to the plugin or to a VM, and that have one name: no link leads to anything else.
func share(dir *os.File, plugin, vm uint32, ours func(uint32) bool) error {
	left := maxShared
	return shareDir(dir, plugin, vm, ours, &left, 0)
}

func shareDir(dir *os.File, plugin, vm uint32, ours func(uint32) bool, left *int, depth int) error {
	self := fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	for _, attr := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
		if err := unix.Setxattr(self, attr, acl(plugin, vm, 7), 0); err != nil {
			if errors.Is(err, unix.EOPNOTSUPP) {
				return errs.New(errs.Precondition, "the file system of %s has no access control lists", dir.Name()).Because("JAIL_NO_ACL").
					Do("put the vmm plugin's data directory on a file system with POSIX ACLs (ext4, xfs, btrfs)")
			}
			return fmt.Errorf("giving the VM access to its directory: %w", err)
		}
	}
	list, err := os.Open(self)
	if err != nil {
		return err
	}
	names, err := list.Readdirnames(-1)
	list.Close()
	if err != nil {
		return err
	}
	for _, n := range names {
		if *left--; *left < 0 {
			return errs.New(errs.Exhausted, "the VM's directory holds more than %d files", maxShared)
		}
		fd, err := unix.Openat(int(dir.Fd()), n, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: n, Err: err}
		}
		err = shareEntry(os.NewFile(uintptr(fd), n), plugin, vm, ours, left, depth)
		if err != nil {
			return err
		}
	}
	return nil
}

func shareEntry(f *os.File, plugin, vm uint32, ours func(uint32) bool, left *int, depth int) error {
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Uid != plugin && !ours(st.Uid) {
		return nil
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFDIR && depth < 3:
		return shareDir(f, plugin, vm, ours, left, depth+1)
	case (st.Mode&unix.S_IFMT == unix.S_IFREG || st.Mode&unix.S_IFMT == unix.S_IFSOCK) && st.Nlink == 1:
		err := unix.Setxattr(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), "system.posix_acl_access", acl(plugin, vm, 6), 0)
		if err != nil {
			return fmt.Errorf("giving the VM access to %s: %w", f.Name(), err)
		}
	}
	return nil
}
