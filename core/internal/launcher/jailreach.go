package launcher

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
)

// onThread runs fn on a thread of its own, which ends afterwards: fn may change what belongs to a thread alone.
func onThread(fn func() error) error {
	ch := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		ch <- fn()
	}()
	return <-ch
}

// openAs opens a path for its place only (O_PATH), with a VM's rights in the file system and no others: what that
// uid cannot get at, a plugin cannot have put into its jail. To be called on a thread of its own.
func openAs(id identity, p jail.Path) (fd int, err error) {
	groups := append([]uint32{}, id.Groups...)
	var gp *uint32
	if len(groups) > 0 {
		gp = &groups[0]
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(gp)), 0); e != 0 {
		return -1, os.NewSyscallError("setgroups", e)
	}
	unix.RawSyscall(unix.SYS_SETFSGID, uintptr(id.GID), 0, 0)
	unix.RawSyscall(unix.SYS_SETFSUID, uintptr(id.UID), 0, 0) // takes the file system's capabilities along
	defer func() {
		unix.RawSyscall(unix.SYS_SETFSUID, 0, 0, 0)
		unix.RawSyscall(unix.SYS_SETFSGID, 0, 0, 0)
	}()
	if now, _, _ := unix.RawSyscall(unix.SYS_SETFSUID, ^uintptr(0), 0, 0); uint32(now) != id.UID {
		return -1, errors.New("the file system's uid cannot be changed")
	}
	path, dir := p.Path, uint64(0)
	if p.Kind == jail.KindSocket {
		path, dir = filepath.Dir(path), unix.O_DIRECTORY
	}
	fd, err = unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | dir, Resolve: unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		kind := errs.Precondition
		if errors.Is(err, unix.EACCES) {
			kind = errs.Denied
		}
		return -1, &errs.Error{Kind: kind, Reason: "JAIL_PATH", Message: fmt.Sprintf("%s %s cannot be reached by uid %d, which the VM runs as", p.Kind, p.Path, id.UID),
			Err: err, Remedy: "the plugin that owns it must let that uid through all directories on the way"}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("fstat", err)
	}
	if f := st.Mode & unix.S_IFMT; p.Kind == jail.KindDisk && f != unix.S_IFREG && f != unix.S_IFBLK {
		unix.Close(fd)
		return -1, errs.New(errs.Precondition, "%s is neither a file nor a block device", p.Path).Because("JAIL_PATH")
	}
	return fd, nil
}

// attrsOf are the rights of a path's mount. A device's mount must let devices be used.
func attrsOf(p jail.Path) uint64 {
	a := uint64(mountDevice)
	if p.Kind == jail.KindSocket {
		a = mountData
	}
	if p.ReadOnly {
		a |= unix.MOUNT_ATTR_RDONLY
	}
	return a
}

// targetOf is where a path's mount is in the jail.
func targetOf(p jail.Path) string {
	if p.Kind == jail.KindSocket {
		return "/net/" + p.Name
	}
	return "/disk/" + p.Name
}

// inJail runs fn with the file system that a process sees.
func inJail(pidfd int, fn func() error) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // from the other threads, or setns is refused
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(pidfd, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("entering the jail (mvirtd needs CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE for that): %w", os.NewSyscallError("setns", err))
	}
	return fn()
}

// reach makes a path reachable in a running jail.
func reach(pidfd int, id identity, p jail.Path) error {
	return onThread(func() error {
		fd, err := openAs(id, p)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		tree, err := detach(fd, attrsOf(p), false)
		if err != nil {
			return err
		}
		defer unix.Close(tree)
		return inJail(pidfd, func() error {
			target := targetOf(p)
			if err := takeOff(target); err != nil { // of a device of that name which has gone
				return err
			}
			return placeMount(tree, target, p.Kind == jail.KindSocket)
		})
	})
}

// unreach takes a path away again.
func unreach(pidfd int, p jail.Path) error {
	return onThread(func() error { return inJail(pidfd, func() error { return takeOff(targetOf(p)) }) })
}

// diskSize is how many bytes a disk in a jail has.
func diskSize(pidfd int, p jail.Path) (size uint64, err error) {
	err = onThread(func() error {
		return inJail(pidfd, func() error {
			fd, err := unix.Open(targetOf(p), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if errors.Is(err, unix.ENOENT) {
				return errs.New(errs.NotFound, "the jail has no disk %s", p.Name)
			}
			if err != nil {
				return &os.PathError{Op: "open", Path: targetOf(p), Err: err}
			}
			defer unix.Close(fd)
			end, err := unix.Seek(fd, 0, unix.SEEK_END) // works for block devices as well
			size = uint64(max(0, end))
			return os.NewSyscallError("lseek", err)
		})
	})
	return size, err
}

func takeOff(target string) error {
	for {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // nothing is mounted there
			break
		}
		if err != nil {
			return fmt.Errorf("taking %s off: %w", target, err)
		}
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
