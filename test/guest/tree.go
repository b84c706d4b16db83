package guest

import (
	"embed"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
)

//go:embed files
var files embed.FS

// node is one file of the guest's tree.
type node struct {
	mode  uint32 // as in stat: type and permissions
	data  []byte // content, or the target of a link
	major uint32 // of a device
	minor uint32
}

// File types of stat(2).
const (
	modeDir  = 0o040000
	modeChar = 0o020000
	modeFile = 0o100000
	modeLink = 0o120000
	modeType = 0o170000
)

// tree is the guest's files by path without a leading slash; parents are made as they are needed.
type tree map[string]node

func (t tree) dir(name string, perm uint32) {
	if name == "." || name == "" {
		return
	}
	if _, ok := t[name]; ok {
		return
	}
	t.dir(path.Dir(name), 0o755)
	t[name] = node{mode: modeDir | perm}
}

func (t tree) file(name string, perm uint32, data []byte) {
	t.dir(path.Dir(name), 0o755)
	t[name] = node{mode: modeFile | perm, data: data}
}

func (t tree) link(name, target string) {
	t.dir(path.Dir(name), 0o755)
	t[name] = node{mode: modeLink | 0o777, data: []byte(target)}
}

func (t tree) device(name string, perm, major, minor uint32) {
	t.dir(path.Dir(name), 0o755)
	t[name] = node{mode: modeChar | perm, major: major, minor: minor}
}

func (t tree) names() []string {
	names := make([]string, 0, len(t))
	for n := range t {
		names = append(names, n)
	}
	sort.Strings(names) // a parent sorts before its children
	return names
}

// base makes the tree that initramfs and root file system share.
func base(busybox []byte, applets []string, mods []module) (tree, error) {
	t := tree{}
	for _, d := range []string{"dev", "proc", "sys", "run", "root", "newroot", "www", "mnt"} {
		t.dir(d, 0o755)
	}
	t.dir("tmp", 0o1777)
	t.file("bin/busybox", 0o755, busybox)
	for _, a := range applets {
		if a != "busybox" && a == path.Base(a) && a != "." && a != ".." {
			t.link("bin/"+a, "busybox")
		}
	}
	t.link("sbin", "bin")
	t.link("usr/bin", "../bin")
	t.link("usr/sbin", "../bin")
	t.device("dev/console", 0o600, 5, 1)
	t.device("dev/null", 0o666, 1, 3)

	at := map[string]string{"init": "init", "inittab": "etc/inittab", "passwd": "etc/passwd", "group": "etc/group",
		"power-button": "etc/acpi/PWRF/00000080"}
	err := fs.WalkDir(files, "files", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := files.ReadFile(p)
		if err != nil {
			return err
		}
		dst := at[d.Name()]
		if dst == "" {
			dst = "etc/mvirt/" + d.Name()
		}
		perm := uint32(0o644)
		if strings.HasPrefix(string(data), "#!") {
			perm = 0o755
		}
		t.file(dst, perm, data)
		return nil
	})
	if err != nil {
		return nil, err
	}
	t.file("etc/hostname", 0o644, []byte("mvirt-guest\n"))
	var order strings.Builder
	for _, m := range mods {
		t.file("lib/mvirt-modules/"+m.file(), 0o644, m.data)
		order.WriteString(m.file() + "\n")
	}
	t.file("etc/mvirt/modules", 0o644, []byte(order.String()))
	return t, nil
}

// writeCPIO writes the tree in the "newc" format that the kernel unpacks (Documentation/driver-api/
// early-userspace/buffer-format.rst).
func (t tree) writeCPIO(w io.Writer) error {
	off := 0
	put := func(b []byte) error {
		n, err := w.Write(b)
		off += n
		return err
	}
	pad := func() error { return put(make([]byte, (4-off%4)%4)) }
	entry := func(name string, ino int, n node) error {
		links := 1
		if n.mode&modeType == modeDir {
			links = 2
		}
		head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00", ino, n.mode, 0, 0,
			links, 0, len(n.data), 0, 0, n.major, n.minor, len(name)+1, 0, name)
		if err := put([]byte(head)); err != nil {
			return err
		}
		if err := pad(); err != nil {
			return err
		}
		if err := put(n.data); err != nil {
			return err
		}
		return pad()
	}
	for i, name := range t.names() {
		if err := entry(name, i+1, t[name]); err != nil {
			return err
		}
	}
	return entry("TRAILER!!!", 0, node{})
}

// writeDir writes the tree below dir for mke2fs -d. Devices are left out: the guest mounts a devtmpfs.
func (t tree) writeDir(dir string) error {
	for _, name := range t.names() {
		n, p := t[name], filepath.Join(dir, name)
		var err error
		switch n.mode & modeType {
		case modeDir:
			if err = os.Mkdir(p, 0o755); err == nil {
				err = os.Chmod(p, fs.FileMode(n.mode&0o777)|fs.FileMode(n.mode&0o1000)<<11)
			}
		case modeLink:
			err = os.Symlink(string(n.data), p)
		case modeFile:
			if err = os.WriteFile(p, n.data, 0o600); err == nil {
				err = os.Chmod(p, fs.FileMode(n.mode&0o777))
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}
