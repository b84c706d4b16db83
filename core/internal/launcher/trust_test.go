package launcher

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it changes owners and switches users")
	}
}

// Each thing that may be wrong with a binary gives one error with its reason and a remedy that cures it.
func TestBinary(t *testing.T) {
	self := identity{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	other := identity{UID: 4001, GID: 4001}
	content := []byte("#!/bin/true\n")
	good := sha256.Sum256(content)
	for _, c := range []struct {
		name   string
		root   bool
		id     identity
		sum    string
		change func(t *testing.T, dir, bin string)
		reason string
		remedy string
	}{
		{name: "good", id: self},
		{name: "good pinned", id: self, sum: hex.EncodeToString(good[:])},
		{name: "good for another user", id: other},
		{name: "missing", id: self, change: func(t *testing.T, _, bin string) { must(t, os.Remove(bin)) }, reason: ReasonBinaryMissing, remedy: "install the plugin, or correct command in [plugin.vmm]"},
		{name: "missing directory", id: self, change: func(t *testing.T, dir, _ string) { must(t, os.RemoveAll(dir)) }, reason: ReasonBinaryMissing, remedy: "install"},
		{name: "a directory", id: self, change: func(t *testing.T, _, bin string) { must(t, os.Remove(bin)); must(t, os.Mkdir(bin, 0o755)) }, reason: ReasonBinaryType, remedy: "correct command"},
		{name: "a fifo", id: self, change: func(t *testing.T, _, bin string) { must(t, os.Remove(bin)); must(t, syscall.Mkfifo(bin, 0o755)) }, reason: ReasonBinaryType, remedy: "correct command"},
		{name: "not executable", id: self, change: func(t *testing.T, _, bin string) { must(t, os.Chmod(bin, 0o644)) }, reason: ReasonBinaryNotExecutable, remedy: "chmod 755 "},
		{name: "executable for the owner only", id: other, change: func(t *testing.T, _, bin string) { must(t, os.Chmod(bin, 0o700)) }, reason: ReasonBinaryNotExecutable, remedy: "chmod 755 "},
		{name: "writable by all", id: self, change: func(t *testing.T, _, bin string) { must(t, os.Chmod(bin, 0o757)) }, reason: ReasonBinaryWritable, remedy: "chmod go-w "},
		{name: "writable by group", root: true, id: self, change: func(t *testing.T, _, bin string) { must(t, os.Chmod(bin, 0o775)) }, reason: ReasonBinaryWritable, remedy: "chmod go-w "},
		{name: "directory writable by all", id: self, change: func(t *testing.T, dir, _ string) { must(t, os.Chmod(dir, 0o777)) }, reason: ReasonBinaryWritable, remedy: "chmod go-w "},
		{name: "sticky directory", id: self, change: func(t *testing.T, dir, _ string) { must(t, os.Chmod(dir, 0o777|os.ModeSticky)) }},
		{name: "another's", root: true, id: self, change: func(t *testing.T, _, bin string) { must(t, os.Chown(bin, 4001, 4001)) }, reason: ReasonBinaryOwner, remedy: "chown root:root "},
		{name: "another's directory", root: true, id: self, change: func(t *testing.T, dir, _ string) { must(t, os.Chown(dir, 4001, 4001)) }, reason: ReasonBinaryOwner, remedy: "chown root:root "},
		{name: "link", id: self, change: func(t *testing.T, _, bin string) {
			must(t, os.Rename(bin, bin+".real"))
			must(t, os.Symlink(filepath.Base(bin)+".real", bin))
		}},
		{name: "absolute link through dotdot", id: self, change: func(t *testing.T, dir, bin string) {
			must(t, os.Rename(bin, bin+".real"))
			must(t, os.Symlink(dir+"/../"+filepath.Base(dir)+"/plugin.real", bin))
		}},
		{name: "link into another's directory", root: true, id: self, change: func(t *testing.T, dir, bin string) {
			evil := filepath.Join(dir, "evil")
			must(t, os.Mkdir(evil, 0o755))
			must(t, os.Rename(bin, filepath.Join(evil, "x")))
			must(t, os.Chown(evil, 4001, 4001))
			must(t, os.Symlink("evil/x", bin))
		}, reason: ReasonBinaryOwner, remedy: "chown"},
		{name: "link of another", root: true, id: self, change: func(t *testing.T, _, bin string) {
			must(t, os.Rename(bin, bin+".real"))
			must(t, os.Symlink(filepath.Base(bin)+".real", bin))
			must(t, os.Lchown(bin, 4001, 4001))
		}, reason: ReasonBinaryOwner},
		{name: "link loop", id: self, change: func(t *testing.T, _, bin string) { must(t, os.Remove(bin)); must(t, os.Symlink("plugin", bin)) }, reason: "-"},
		{name: "wrong sum", id: self, sum: strings.Repeat("00", 32), reason: ReasonBinarySHA256, remedy: "set sha256 to the new sum"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.root {
				needRoot(t)
			}
			dir := filepath.Join(t.TempDir(), "dir")
			must(t, os.Mkdir(dir, 0o755))
			bin := filepath.Join(dir, "plugin")
			must(t, os.WriteFile(bin, content, 0o755))
			must(t, os.Chmod(bin, 0o755))
			if c.change != nil {
				c.change(t, dir, bin)
			}
			f, err := openBinary(service.KindVMM, bin, c.sum, c.id, ownTrust())
			if f != nil {
				if !isScript(f) {
					t.Error("the descriptor is not at its start, or a script is not seen as one")
				}
				f.Close()
			}
			switch {
			case c.reason == "":
				if err != nil {
					t.Errorf("refused: %v", err)
				}
			case c.reason == "-":
				if err == nil {
					t.Error("accepted")
				}
			case errs.ReasonOf(err) != c.reason || errs.KindOf(err) != errs.Precondition || !strings.Contains(errs.RemedyOf(err), c.remedy):
				t.Errorf("got  %s %q (%s)\nwant %s … (%s)", errs.ReasonOf(err), err, errs.RemedyOf(err), c.reason, c.remedy)
			}
		})
	}
}

func TestEnsureDir(t *testing.T) {
	self := identity{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	tr := ownTrust()
	base := t.TempDir()
	stat := func(p string) *syscall.Stat_t {
		fi, err := os.Lstat(p)
		must(t, err)
		return fi.Sys().(*syscall.Stat_t)
	}
	ensure := func(p string, id identity, mode uint32) error {
		f, err := ensureDir(p, id, mode, tr)
		if err == nil {
			f.Close()
		}
		return err
	}
	p := filepath.Join(base, "a/b/c")
	must(t, ensure(p, self, 0o700))
	if st := stat(p); st.Mode&0o7777 != 0o700 {
		t.Errorf("mode %o", st.Mode)
	}
	if st := stat(filepath.Dir(p)); st.Mode&0o7777 != 0o755 {
		t.Errorf("parent's mode %o", st.Mode)
	}
	// An existing directory keeps the way through that its owner made.
	must(t, os.Chmod(p, 0o711))
	must(t, ensure(p, self, 0o700))
	if st := stat(p); st.Mode&0o7777 != 0o711 {
		t.Errorf("mode was changed to %o", st.Mode)
	}
	must(t, os.Chmod(p, 0o707))
	if err := ensure(p, self, 0o700); errs.ReasonOf(err) != "DIRECTORY_WRITABLE" || errs.RemedyOf(err) == "" {
		t.Errorf("writable by others: %v", err)
	}
	// Our own links are fine: an operator may keep /var/lib/mvirt elsewhere.
	must(t, os.Symlink("a", filepath.Join(base, "link")))
	must(t, ensure(filepath.Join(base, "link"), self, 0o700))
	must(t, os.WriteFile(filepath.Join(base, "file"), nil, 0o600))
	if err := ensure(filepath.Join(base, "file"), self, 0o700); err == nil {
		t.Error("took a file")
	}

	if os.Geteuid() != 0 {
		t.Log("not root: the rest, about other owners, is left out")
		return
	}
	other := identity{UID: 4001, GID: 4002}
	q := filepath.Join(base, "other")
	must(t, ensure(q, other, 0o700))
	if st := stat(q); st.Uid != 4001 || st.Gid != 4002 {
		t.Errorf("owner %d:%d", st.Uid, st.Gid)
	}
	if err := ensure(q, self, 0o700); errs.ReasonOf(err) != "DIRECTORY_OWNER" || !strings.Contains(errs.RemedyOf(err), "chown -R 0:0 "+q) {
		t.Errorf("another's directory: %v (%s)", err, errs.RemedyOf(err))
	}
	// Below another's directory root makes nothing: its owner could lead it anywhere.
	if err := ensure(filepath.Join(q, "sub"), self, 0o700); errs.ReasonOf(err) != reasonOwner {
		t.Errorf("below another's directory: %v", err)
	}
	must(t, os.Symlink("a", filepath.Join(base, "planted")))
	must(t, os.Lchown(filepath.Join(base, "planted"), 4001, 4001))
	if err := ensure(filepath.Join(base, "planted"), self, 0o700); errs.ReasonOf(err) != reasonOwner {
		t.Errorf("another's link: %v", err)
	}
	// Empty and root's: what a package made, or a launch that was cut off.
	e := filepath.Join(base, "empty")
	must(t, os.Mkdir(e, 0o755))
	must(t, ensure(e, other, 0o700))
	if st := stat(e); st.Uid != 4001 || st.Mode&0o7777 != 0o700 {
		t.Errorf("owner %d mode %o", st.Uid, st.Mode)
	}
}

func TestRemoveTreeDoesNotFollowLinks(t *testing.T) {
	base := t.TempDir()
	must(t, os.MkdirAll(base+"/victim", 0o755))
	must(t, os.WriteFile(base+"/victim/precious", nil, 0o600))
	must(t, os.MkdirAll(base+"/p/vmm-1/deep/er", 0o755))
	must(t, os.Symlink(base+"/victim", base+"/p/vmm-1/deep/link"))
	must(t, syscall.Mkfifo(base+"/p/vmm-1/fifo", 0o600))
	d, err := os.Open(base + "/p")
	must(t, err)
	defer d.Close()
	must(t, removeTree(int(d.Fd()), "vmm-1"))
	must(t, removeTree(int(d.Fd()), "vmm-1"))
	if _, err := os.Stat(base + "/victim/precious"); err != nil {
		t.Error("removed what a link pointed to")
	}
	if _, err := os.Stat(base + "/p/vmm-1"); !os.IsNotExist(err) {
		t.Error("still there")
	}
}
