package launcher

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// jailSpec is what the shim needs to build a jail. The mounts were made by the launcher, detached, in the
// host's mount namespace; the shim, in one of its own, puts them into place.
type jailSpec struct {
	Base   string // a directory of ours that is hidden by the new root while that is built
	Dir    string // the VM's directory, where the program starts
	Links  map[string]string
	Mounts []jailMount
	Rules  []llRule // Landlock, by paths inside
}

// jailMount is a detached mount, by its place among the descriptors that the shim gets for itself.
type jailMount struct {
	Target string
	IsDir  bool
	FD     int // from 0
}

// cloneFlags are the namespaces of a jail: of mounts, of the network (an empty one), of SysV IPC, of names.
const jailNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// build makes the new root and enters it. first is the descriptor of mount 0.
func (j *jailSpec) build(first int) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	tmpfs := func(at, opts string) error {
		if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, opts); err != nil {
			return fmt.Errorf("mounting a tmpfs at %s: %w", at, err)
		}
		return nil
	}
	if err := tmpfs(j.Base, "mode=0755,size=1m,nr_inodes=4096"); err != nil {
		return err
	}
	for _, d := range []string{"/dev", "/disk", "/net"} {
		if err := os.Mkdir(j.Base+d, 0o755); err != nil {
			return err
		}
	}
	// Apart from the root, which becomes read-only: here devices come and go.
	for _, d := range []string{"/disk", "/net"} {
		if err := tmpfs(j.Base+d, "mode=0755,size=64k,nr_inodes=1024"); err != nil {
			return err
		}
	}
	for path, to := range j.Links {
		if err := os.Symlink(to, j.Base+path); err != nil {
			return err
		}
	}
	for _, m := range j.Mounts {
		if err := placeMount(first+m.FD, j.Base+m.Target, m.IsDir); err != nil {
			return fmt.Errorf("%s in the jail: %w", m.Target, err)
		}
	}
	if err := unix.Chdir(j.Base); err != nil {
		return err
	}
	// Both at one place, as pivot_root(2) tells: the old root comes to lie on the new one, and is taken off.
	if err := unix.PivotRoot(".", "."); err != nil {
		return os.NewSyscallError("pivot_root", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leaving the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	ro := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", 0, &ro); err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	return unix.Chdir(j.Dir)
}

// placeMount makes the place for a mount and puts the mount there.
func placeMount(fd int, target string, isDir bool) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	var err error
	if isDir {
		err = os.Mkdir(target, 0o755)
	} else {
		var f int
		f, err = unix.Open(target, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(f)
		}
	}
	if err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return os.NewSyscallError("move_mount", err)
	}
	return nil
}

// systemPaths are what programs need of the host to run: libraries, firmware, data. Those that are links are
// made as links.
var systemPaths = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache"}

// devicePaths are what is in a jail's /dev.
var devicePaths = []string{"/dev/kvm", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}

// Rights of mounts.
const (
	mountReadOnly = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	mountData     = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	mountDevice   = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC
)

// detach makes a detached mount of what is open at fd: a bind mount that is nowhere yet.
func detach(fd int, attrs uint64, whole bool) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	rec := uint(0)
	if whole {
		rec = unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(fd, "", flags|rec)
	if err != nil {
		return -1, os.NewSyscallError("open_tree", err)
	}
	attr := unix.MountAttr{Attr_set: attrs, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|rec, &attr); err != nil {
		unix.Close(tree)
		return -1, os.NewSyscallError("mount_setattr", err)
	}
	return tree, nil
}

// planner collects the mounts of a jail.
type planner struct {
	spec  jailSpec
	trees []*os.File
}

func (p *planner) close() { closeAll(p.trees) }

func (p *planner) add(fd int, target string, attrs uint64, whole bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	tree, err := detach(fd, attrs, whole)
	if err != nil {
		return fmt.Errorf("%s for the jail: %w", target, err)
	}
	p.spec.Mounts = append(p.spec.Mounts, jailMount{Target: target, IsDir: st.Mode&unix.S_IFMT == unix.S_IFDIR, FD: len(p.trees)})
	p.trees = append(p.trees, os.NewFile(uintptr(tree), target))
	return nil
}

// system adds what every jail has. What the host lacks is left out.
func (p *planner) system() error {
	p.spec.Links = map[string]string{}
	for _, path := range systemPaths {
		if to, err := os.Readlink(path); err == nil {
			if strings.Count(path, "/") == 1 {
				p.spec.Links[path] = to
			}
			continue
		}
		if err := p.addPath(path, mountReadOnly, true); err != nil {
			return err
		}
		p.spec.Rules = append(p.spec.Rules, llRule{Path: path, Access: llRead})
	}
	for _, path := range devicePaths {
		if err := p.addPath(path, mountDevice, false); err != nil {
			return err
		}
	}
	p.spec.Rules = append(p.spec.Rules, llRule{Path: "/dev", Access: llDevice}, llRule{Path: "/disk", Access: llDevice}, llRule{Path: "/net", Access: llSocket})
	return nil
}

// program lets a binary's interpreter be executed, which its ELF header names; the binary itself the shim adds.
func (p *planner) program(binary *os.File) error {
	f, err := elf.NewFile(binary)
	if err != nil {
		return errs.Wrap(errs.Precondition, err, "%s is no program of this machine", binary.Name())
	}
	for _, h := range f.Progs {
		if h.Type != elf.PT_INTERP || h.Filesz > 4096 {
			continue
		}
		b, err := io.ReadAll(h.Open())
		if err != nil {
			return errs.Wrap(errs.Precondition, err, "reading %s", binary.Name())
		}
		p.spec.Rules = append(p.spec.Rules, llRule{Path: strings.TrimRight(string(b), "\x00"), Access: llProgram})
	}
	return nil
}

func (p *planner) addPath(path string, attrs uint64, whole bool) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return p.add(fd, path, attrs, whole)
}
