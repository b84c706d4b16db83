package wctl

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// ListenStream makes a listening SOCK_STREAM socket at path that only one user may connect to. It gets its
// owner and mode, and listens, under another name, and then is renamed into place: whoever finds it may
// connect at once (cloud-hypervisor gives a device up for good at its first EACCES). uid and gid of the
// caller itself are not changed.
func ListenStream(path string, uid, gid int) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	tmp := path + ".new"
	err = func() error {
		if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := WithPath(tmp, func(p string) error { return unix.Bind(fd, &unix.SockaddrUnix{Name: p}) }); err != nil {
			return err
		}
		if err := os.Chmod(tmp, 0o600); err != nil {
			return err
		}
		if uid != os.Geteuid() || gid != os.Getegid() {
			if err := os.Chown(tmp, uid, gid); err != nil {
				return err
			}
		}
		if err := unix.Listen(fd, 8); err != nil {
			return err
		}
		return os.Rename(tmp, path)
	}()
	if err != nil {
		unix.Close(fd)
		os.Remove(tmp)
		return -1, err
	}
	return fd, nil
}
