package api

import (
	"errors"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
)

// listen opens the API socket with the configured mode and group.
func listen(c config.Core) (net.Listener, error) { return listenUnix(c.Socket, c) }

// listenUnix binds a unix socket under a name of its own and renames it into place, so that nobody can
// connect before mode and group are right and no moment passes without a socket at a restart. A socket that
// somebody still listens on is left alone.
func listenUnix(path string, c config.Core) (net.Listener, error) {
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return nil, errs.New(errs.Exists, "another process listens on %s", path).Do("stop the other mvirtd, or set [core] socket to another path")
	} else if st, serr := os.Lstat(path); serr == nil && st.Mode()&os.ModeSocket == 0 {
		return nil, errs.New(errs.Exists, "%s is there and is not a socket", path).Do("remove it, or set [core] socket to another path")
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+strconv.Itoa(os.Getpid()))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, errs.Wrap(errs.Unknown, err, "old socket")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, &errs.Error{Message: "listen on " + path, Remedy: "see that the directory exists, that the core may write there, and that the path has at most 100 bytes", Err: err}
	}
	l.SetUnlinkOnClose(false)
	if err := place(tmp, path, c); err != nil {
		l.Close()
		return nil, err
	}
	return &unlinking{Listener: l, path: path, id: fileID(path)}, nil
}

// place gives a new socket its group and mode and renames it. After an error it is gone.
func place(tmp, path string, c config.Core) (err error) {
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	if c.SocketGroup != "" {
		gid, err := groupID(c.SocketGroup)
		if err != nil {
			return err
		}
		if err := os.Chown(tmp, -1, gid); err != nil {
			return &errs.Error{Kind: errs.Denied, Message: "give the socket to group " + c.SocketGroup, Remedy: "make the core's user a member of that group", Err: err}
		}
	}
	if err := os.Chmod(tmp, c.SocketMode); err != nil {
		return errs.Wrap(errs.Unknown, err, "mode of the socket")
	}
	return errs.Wrap(errs.Unknown, os.Rename(tmp, path), "put the socket in place")
}

func groupID(name string) (int, error) {
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, errs.New(errs.Invalid, "there is no group %s", name).Do("create it (groupadd --system " + name + "), or change [core] socket_group")
	}
	return strconv.Atoi(g.Gid)
}

// unlinking removes its socket when it is closed, unless another has taken its place.
type unlinking struct {
	net.Listener
	path string
	id   [2]uint64
}

func (u *unlinking) Close() error {
	err := u.Listener.Close()
	if u.id != [2]uint64{} && fileID(u.path) == u.id {
		os.Remove(u.path)
	}
	return err
}

func fileID(path string) (id [2]uint64) {
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err == nil {
		id = [2]uint64{uint64(st.Dev), st.Ino}
	}
	return id
}
