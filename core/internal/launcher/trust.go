package launcher

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// trust says whose files are believed: root's, and our own when we are not root.
type trust struct {
	uid uint32 // besides 0
	gid uint32 // a group whose write permission does no harm: our own private one; 0 when root
}

// ownTrust is root's when we are root, else the current user's besides.
func ownTrust() trust {
	t := trust{uid: uint32(os.Geteuid())}
	if t.uid != 0 {
		t.gid = uint32(os.Getegid())
	}
	return t
}

func (t trust) owns(uid uint32) bool { return uid == 0 || uid == t.uid }

// who names the owner that is expected.
func (t trust) who() string {
	if t.uid == 0 {
		return "root"
	}
	return fmt.Sprintf("root or user %d", t.uid)
}

// writableByOthers tells whether somebody whom we do not trust may write.
func (t trust) writableByOthers(st *unix.Stat_t) bool {
	if st.Mode&0o002 != 0 {
		return true
	}
	return st.Mode&0o020 != 0 && (t.uid == 0 || st.Gid != t.gid)
}

// Reasons of errors about files.
const (
	reasonMissing  = "FILE_MISSING"
	reasonType     = "FILE_TYPE"
	reasonOwner    = "FILE_OWNER"
	reasonWritable = "FILE_WRITABLE"
)

// openTrusted opens a file to read after checking it and every directory on the way, symbolic links
// included: each belongs to somebody we trust, and nobody else can write to it. (In a directory with the
// sticky bit others may make files of their own, but not replace ours, so /tmp will do.) Each component is
// opened relative to the one before without following links, so what was checked is what is opened.
func openTrusted(path string, t trust) (*os.File, *unix.Stat_t, error) {
	dir, name, err := walkTrusted(path, t, nil)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(dir)
	// O_NONBLOCK: a FIFO must not block the launcher.
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, pathErr(path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, nil, pathErr(path, err)
	}
	if err := t.checkFile(path, &st); err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, &st, nil
}

func (t trust) checkFile(path string, st *unix.Stat_t) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return errs.New(errs.Precondition, "%s is not a regular file", path).Because(reasonType)
	case !t.owns(st.Uid):
		return errs.New(errs.Precondition, "%s belongs to user %d, not to %s", path, st.Uid, t.who()).Because(reasonOwner).
			Do("chown " + t.chown() + " " + path)
	case t.writableByOthers(st):
		return errs.New(errs.Precondition, "%s can be written to by others (mode %04o)", path, st.Mode&0o7777).Because(reasonWritable).
			Do("chmod go-w " + path)
	}
	return nil
}

func (t trust) chown() string {
	if t.uid == 0 {
		return "root:root"
	}
	return fmt.Sprint(t.uid)
}

func (t trust) checkDir(path string, st *unix.Stat_t) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return errs.New(errs.Precondition, "%s is not a directory", path).Because(reasonType)
	case !t.owns(st.Uid):
		return errs.New(errs.Precondition, "the directory %s belongs to user %d, not to %s, who could exchange what lies in it", path, st.Uid, t.who()).
			Because(reasonOwner).Do("chown " + t.chown() + " " + path)
	case t.writableByOthers(st) && st.Mode&unix.S_ISVTX == 0:
		return errs.New(errs.Precondition, "the directory %s can be written to by others (mode %04o)", path, st.Mode&0o7777).
			Because(reasonWritable).Do("chmod go-w " + path)
	}
	return nil
}

// maxLinks is how many symbolic links a path may go through; the kernel's own limit (path_resolution(7)).
const maxLinks = 40

// walkTrusted opens the directory that holds path's last component, which is not a symbolic link by then,
// and returns that component's name. missing, if not nil, is called for a directory that does not exist and
// may make it (then the walk tries again, once).
func walkTrusted(path string, t trust, missing func(dir int, name, full string) error) (dir int, name string, err error) {
	if !filepath.IsAbs(path) {
		return -1, "", errs.New(errs.Precondition, "%s is not an absolute path", path)
	}
	open := func() (int, error) {
		return unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if dir, err = open(); err != nil {
		return -1, "", pathErr("/", err)
	}
	defer func() {
		if err != nil {
			unix.Close(dir)
		}
	}()
	at, links := "/", 0
	rest := split(path)
	for {
		var st unix.Stat_t
		if err = unix.Fstat(dir, &st); err != nil {
			return dir, "", pathErr(at, err)
		}
		if err = t.checkDir(at, &st); err != nil {
			return dir, "", err
		}
		if len(rest) == 0 {
			return dir, "", errs.New(errs.Precondition, "%s is a directory", path).Because(reasonType)
		}
		name, rest = rest[0], rest[1:]
		if name == ".." { // only from links: our own paths are clean
			at = filepath.Dir(at)
			parent, perr := unix.Openat(dir, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if perr != nil {
				return dir, "", pathErr(at, perr)
			}
			unix.Close(dir)
			dir = parent
			continue
		}
		full := filepath.Join(at, name)
		err = unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) && len(rest) == 0 {
			return dir, name, nil // the caller's to open or make
		}
		if errors.Is(err, unix.ENOENT) && missing != nil {
			if err = missing(dir, name, full); err != nil {
				return dir, "", err
			}
			err = unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		}
		if err != nil {
			return dir, "", pathErr(full, err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			if !t.owns(st.Uid) {
				err = errs.New(errs.Precondition, "the symbolic link %s belongs to user %d, not to %s", full, st.Uid, t.who()).Because(reasonOwner)
				return dir, "", err
			}
			if links++; links > maxLinks {
				err = pathErr(path, unix.ELOOP)
				return dir, "", err
			}
			buf := make([]byte, unix.PathMax)
			n, lerr := unix.Readlinkat(dir, name, buf)
			if lerr != nil {
				err = pathErr(full, lerr)
				return dir, "", err
			}
			target := string(buf[:n])
			rest = append(split(target), rest...)
			if strings.HasPrefix(target, "/") {
				unix.Close(dir)
				at = "/"
				if dir, err = open(); err != nil {
					return -1, "", pathErr("/", err)
				}
			}
			continue
		}
		if len(rest) == 0 {
			return dir, name, nil
		}
		next, oerr := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if oerr != nil {
			err = pathErr(full, oerr)
			return dir, "", err
		}
		unix.Close(dir)
		dir, at = next, full
	}
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// pathErr turns a system error about a path into one of ours.
func pathErr(path string, err error) error {
	e := &errs.Error{Kind: errs.Precondition, Err: &fs.PathError{Op: "open", Path: path, Err: err}}
	if errors.Is(err, fs.ErrNotExist) {
		e.Err, e.Message, e.Reason = nil, path+" does not exist", reasonMissing
	}
	return e
}

// OpenConfig opens a configuration file after the checks of openTrusted, which for root are those that make
// it root's alone.
func OpenConfig(path string) (*os.File, error) {
	f, _, err := openTrusted(path, ownTrust())
	if errs.ReasonOf(err) == reasonMissing {
		return nil, errs.New(errs.NotFound, "there is no configuration file %s", path).Because(reasonMissing).
			Do("copy the commented example to " + path + ", or give another file with --config")
	}
	return f, err
}
