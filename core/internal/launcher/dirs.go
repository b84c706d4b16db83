package launcher

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// ensureDir makes a directory for an owner, or checks that it is theirs. Parents that are missing are made
// with mode 0755 and are ours; all of them are checked as openTrusted does, so that the owner of one
// directory cannot lead root into another. An existing directory keeps its mode (a plugin may have given
// others a way through), as long as nobody else can write to it. The returned descriptor is the caller's.
func ensureDir(path string, id identity, mode uint32, t trust) (*os.File, error) {
	parent, name, err := walkTrusted(path, t, func(dir int, name, full string) error {
		if err := unix.Mkdirat(dir, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return mkErr(full, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(parent)
	made := true
	if err := unix.Mkdirat(parent, name, 0o700); errors.Is(err, unix.EEXIST) {
		made = false
	} else if err != nil {
		return nil, mkErr(path, err)
	}
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathErr(path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if made {
		err = giveTo(fd, id, mode)
		if err != nil {
			f.Close()
			return nil, mkErr(path, err)
		}
		return f, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, pathErr(path, err)
	}
	switch {
	case st.Uid == 0 && id.UID != 0 && t.uid == 0 && emptyDir(f):
		// Made by hand or by a package, or by a launch of ours that was cut off between mkdir and chown.
		if err := giveTo(fd, id, mode); err != nil {
			f.Close()
			return nil, mkErr(path, err)
		}
	case st.Uid != id.UID:
		f.Close()
		return nil, errs.New(errs.Precondition, "the directory %s belongs to user %d, not to user %d", path, st.Uid, id.UID).
			Because("DIRECTORY_OWNER").Do(fmt.Sprintf("chown -R %d:%d %s", id.UID, id.GID, path))
	case st.Mode&0o002 != 0 || st.Mode&0o020 != 0 && mode&0o020 == 0 && st.Gid != id.GID:
		f.Close()
		return nil, errs.New(errs.Precondition, "the directory %s can be written to by others (mode %04o)", path, st.Mode&0o7777).
			Because("DIRECTORY_WRITABLE").Do("chmod go-w " + path)
	}
	return f, nil
}

// giveTo sets owner and mode; in this order, as chown clears the set-group-id bit.
func giveTo(fd int, id identity, mode uint32) error {
	if err := unix.Fchown(fd, int(id.UID), int(id.GID)); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return err
	}
	// Without CAP_FSETID the kernel drops the set-group-id bit and says nothing.
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&0o7777 != mode {
		return errs.New(errs.Precondition, "mode %04o was asked for and %04o came of it", mode, st.Mode&0o7777).
			Do("start mvirtd with CAP_FSETID in its bounding set (systemd: CapabilityBoundingSet=)")
	}
	return nil
}

func emptyDir(f *os.File) bool {
	d, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return false
	}
	defer d.Close()
	names, _ := d.Readdirnames(1)
	return len(names) == 0
}

func mkErr(path string, err error) error {
	return &errs.Error{Kind: errs.Precondition, Reason: "DIRECTORY_UNUSABLE", Message: "the directory " + path + " cannot be made", Err: err,
		Remedy: "make its parent writable for mvirtd, or choose another place"}
}

// launchDirs hands out fresh directories for launches, below RunDir/p, which is the launcher's own.
type launchDirs struct {
	path string
	dir  *os.File // p itself
}

func openLaunchDirs(runDir string, t trust, self identity) (*launchDirs, error) {
	path := filepath.Join(runDir, "p")
	f, err := ensureDir(path, self, 0o755, t)
	if err != nil {
		return nil, err
	}
	return &launchDirs{path: path, dir: f}, nil
}

// make makes the directory of one launch: the plugin owns it, the core's group comes in by the set-group-id
// bit, nobody else does.
func (l *launchDirs) make(name string, plugin identity, coreGID uint32) (string, error) {
	path := filepath.Join(l.path, name)
	dir := int(l.dir.Fd())
	if err := removeTree(dir, name); err != nil {
		return "", mkErr(path, err)
	}
	if err := unix.Mkdirat(dir, name, 0o700); err != nil {
		return "", mkErr(path, err)
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", mkErr(path, err)
	}
	defer unix.Close(fd)
	if err := giveTo(fd, identity{UID: plugin.UID, GID: coreGID}, 0o2770); err != nil {
		return "", mkErr(path, err)
	}
	return path, nil
}

// remove removes the directory of a launch that has ended.
func (l *launchDirs) remove(name string) error { return removeTree(int(l.dir.Fd()), name) }

// removeTree removes name below dir without ever following a symbolic link, whatever its owner put there.
func removeTree(dir int, name string) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil && !errors.Is(err, unix.ENOENT) { // somebody else removed it meanwhile
		return err
	}
	for _, n := range names {
		if err := removeTree(fd, n); err != nil {
			return err
		}
	}
	err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
