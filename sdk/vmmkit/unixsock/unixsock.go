// Package unixsock makes and reaches unix sockets in a directory whose path may be longer than the 107 bytes
// that a socket address holds (unix(7)): the directory is opened and named by its descriptor.
package unixsock

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// within calls fn with a short path of name in dir.
func within(dir, name string, fn func(path string) error) error {
	if name != filepath.Base(name) {
		return fmt.Errorf("%q is not the name of a socket", name)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	return fn(fmt.Sprintf("/proc/self/fd/%d/%s", fd, name))
}

// Listen makes a socket that listens, in place of one that may be there, and gives its descriptor, to be
// handed to a child. Clients may connect from now on; they wait until the child accepts.
func Listen(dir, name string, mode os.FileMode) (f *os.File, err error) {
	err = within(dir, name, func(path string) error {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return err
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		f = os.NewFile(uintptr(fd), name)
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			return os.NewSyscallError("bind", err)
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
		return os.NewSyscallError("listen", unix.Listen(fd, 8))
	})
	if err != nil && f != nil {
		f.Close()
		f = nil
	}
	return f, err
}

// Dial connects to a socket.
func Dial(ctx context.Context, dir, name string) (conn *net.UnixConn, err error) {
	err = within(dir, name, func(path string) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return err
		}
		conn = c.(*net.UnixConn)
		return nil
	})
	return conn, err
}
