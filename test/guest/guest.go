// Package guest makes the guest that tests and the demo boot: Debian's cloud kernel, an initramfs, and an
// ext4 root file system with busybox, all from Debian packages and the scripts in files/.
//
// The one initramfs serves two ways of booting. Without root= on the kernel's command line it is the whole
// system; with root=LABEL=mvirt-root it enters that disk. Either way the guest prints on ttyS0, in order:
//
//	mvirt-guest: init                       first line of the first process
//	mvirt-guest: cidata on /dev/vdb         a NoCloud volume was found
//	mvirt-guest: boot NAME                  the host name is set
//	mvirt-guest: nic eth0 52:54:…           for each NIC
//	mvirt-guest: address eth0 10.0.0.2/32   a lease was taken
//	mvirt-guest: no lease on eth0           or not yet
//	mvirt-guest: user-data exit 0           user data that is a script has run
//	mvirt-guest: ready
//	NAME login:                             root, without a password
//
// Later: "disk add|change vdb SERIAL BYTES", "disk gone vdb", "nic gone eth1", "power button" (it powers off,
// unless /run/ignore-power-button exists), "shutdown". Port 8080 answers HTTP with the host name.
package guest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Label is the label of the root file system.
const Label = "mvirt-root"

// RootBytes is the size of the root disk.
const RootBytes = 64 << 20

// format is part of the cache key; it grows when the code that assembles changes what it makes.
const format = 2

// Guest is where the parts of the guest are. They are shared by all who use the cache: read only.
type Guest struct {
	Dir       string
	Kernel    string // bzImage
	Initramfs string // cpio, uncompressed
	RootRaw   string // raw disk with an ext4 file system labelled mvirt-root, no partitions
	RootQcow2 string // the same as qcow2
}

func at(dir string) Guest {
	j := func(n string) string { return filepath.Join(dir, n) }
	return Guest{Dir: dir, Kernel: j("vmlinuz"), Initramfs: j("initramfs.cpio"), RootRaw: j("root.raw"), RootQcow2: j("root.qcow2")}
}

// CacheDir is where guests and downloaded packages are kept: $XDG_CACHE_HOME/mvirt, else /var/cache/mvirt
// when it can be made, else the user's own cache directory.
func CacheDir() (string, error) {
	if d := os.Getenv("XDG_CACHE_HOME"); d != "" {
		return filepath.Join(d, "mvirt"), nil
	}
	const system = "/var/cache/mvirt"
	if os.MkdirAll(system, 0o755) == nil {
		if f, err := os.CreateTemp(system, "try-"); err == nil {
			f.Close()
			os.Remove(f.Name())
			return system, nil
		}
	}
	d, err := os.UserCacheDir()
	return filepath.Join(d, "mvirt"), err
}

// DirEnv names the variable by which a guest that was made elsewhere is used, where packages cannot be had.
const DirEnv = "MVIRT_TEST_GUEST"

// Build gives the guest: the one in the directory that DirEnv names, else from the cache if nothing that it is
// made of has changed, else a new one. Several may build at once; one wins. logf gets a line for each thing that
// takes long.
func Build(ctx context.Context, logf func(string, ...any)) (Guest, error) {
	if dir := os.Getenv(DirEnv); dir != "" {
		g := at(dir)
		_, err := os.Stat(g.Kernel)
		return g, err
	}
	cache, err := CacheDir()
	if err != nil {
		return Guest{}, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Guest{}, err
	}
	kc, err := kernelCandidate(ctx)
	if err != nil {
		return Guest{}, err
	}
	bc, err := lookup(ctx, "busybox-static")
	if err != nil {
		return Guest{}, err
	}
	key, err := cacheKey(kc, bc)
	if err != nil {
		return Guest{}, err
	}
	dir := filepath.Join(cache, "guest", key)
	if _, err := os.Stat(dir); err == nil {
		return at(dir), nil
	}
	image, t, err := contents(ctx, cache, kc, bc, logf)
	if err != nil {
		return Guest{}, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return Guest{}, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "new-")
	if err != nil {
		return Guest{}, err
	}
	defer os.RemoveAll(tmp)
	logf("making the guest in %s", dir)
	if err := assemble(ctx, at(tmp), image, t); err != nil {
		return Guest{}, err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return Guest{}, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, e := os.Stat(dir); e != nil { // nobody else was faster
			return Guest{}, err
		}
	}
	return at(dir), nil
}

// cacheKey is the same as long as packages, scripts and this program's ways are.
func cacheKey(packages ...candidate) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, format, RootBytes, Label, modules)
	for _, p := range packages {
		fmt.Fprintln(h, p.sha256)
	}
	err := fs.WalkDir(files, "files", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := files.ReadFile(p)
		fmt.Fprintf(h, "%s %d\n%s", p, len(b), b)
		return err
	})
	return hex.EncodeToString(h.Sum(nil))[:32], err
}

// contents takes kernel and tree out of the packages.
func contents(ctx context.Context, cache string, kc, bc candidate, logf func(string, ...any)) ([]byte, tree, error) {
	deb, err := debFile(ctx, cache, kc, logf)
	if err != nil {
		return nil, nil, err
	}
	image, all, err := kernel(ctx, deb)
	if err != nil {
		return nil, nil, err
	}
	if deb, err = debFile(ctx, cache, bc, logf); err != nil {
		return nil, nil, err
	}
	box, applets, err := busybox(ctx, cache, deb)
	if err != nil {
		return nil, nil, err
	}
	mods, err := closure(all, modules)
	if err != nil {
		return nil, nil, err
	}
	t, err := base(box, applets, mods)
	return image, t, err
}

func assemble(ctx context.Context, g Guest, image []byte, t tree) error {
	if err := os.WriteFile(g.Kernel, image, 0o644); err != nil {
		return err
	}
	f, err := os.Create(g.Initramfs)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	if err := t.writeCPIO(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	root := filepath.Join(g.Dir, "tree")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(root)
	if err := t.writeDir(root); err != nil {
		return err
	}
	if _, err := run(ctx, mke2fs(), "-q", "-F", "-t", "ext4", "-L", Label, "-m", "0", "-E", "root_owner=0:0",
		"-d", root, g.RootRaw, fmt.Sprintf("%dk", RootBytes>>10)); err != nil {
		return err
	}
	_, err = run(ctx, "qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", g.RootRaw, g.RootQcow2)
	return err
}

// mke2fs is often not in the path of an ordinary user.
func mke2fs() string {
	for _, p := range []string{"/usr/sbin/mke2fs", "/sbin/mke2fs"} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return "mke2fs"
}
