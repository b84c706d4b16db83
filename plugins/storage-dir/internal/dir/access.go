package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/posixacl"
)

// Grant lets uid open the volume's file: an ACL entry on it, and on each directory above that uid could not
// pass otherwise. The attachment's path is then usable by that uid alone.
func (b *Backend) Grant(_ context.Context, o storagekit.Object, uid uint32, readOnly bool) (storagekit.Device, error) {
	path := b.path(o)
	dev := storagekit.Device{Path: path}
	if uid == uint32(os.Geteuid()) || uid == 0 {
		return dev, nil // the owner
	}
	perm := uint16(posixacl.Read | posixacl.Write)
	if readOnly {
		perm = posixacl.Read
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := posixacl.Grant(path, uid, perm); err != nil {
		return dev, b.accessError(err, path)
	}
	b.step("dir:grant:file")
	for _, d := range b.above() {
		ok, err := passable(d, uid)
		if err != nil {
			return dev, b.accessError(err, d)
		}
		if ok {
			continue
		}
		if err := posixacl.Grant(d, uid, posixacl.Execute); err != nil {
			return dev, b.accessError(err, d)
		}
	}
	return dev, nil
}

// above lists the directories that lead to volumes, the innermost first.
func (b *Backend) above() []string {
	var l []string
	for d := filepath.Join(b.root, place(storagekit.KindVolume)); d != "/"; d = filepath.Dir(d) {
		l = append(l, d)
	}
	return l
}

// passable tells whether uid can pass through a directory by its mode or an entry. Group membership is not
// known here; an entry is right then as well.
func passable(dir string, uid uint32) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return false, fmt.Errorf("look at %s: %w", dir, err)
	}
	if st.Uid == uid {
		return st.Mode&0o100 != 0, nil
	}
	perm, found, err := posixacl.Of(dir, uid)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return false, err
	}
	if found {
		return perm&posixacl.Execute != 0, nil
	}
	return st.Mode&0o001 != 0, nil
}

func (b *Backend) accessError(err error, path string) error {
	e := &errs.Error{Kind: errs.Precondition, Reason: "ACCESS_IMPOSSIBLE", Err: err,
		Message: "cannot give the VM's user access to the volume",
		Remedy:  fmt.Sprintf("put the data directory where %s can be passed by others (chmod o+x)", filepath.Dir(path))}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Kind, e.Reason, e.Remedy = errs.Corrupt, "DAMAGED", "restore the volume's file from a backup"
	case errors.Is(err, unix.EOPNOTSUPP):
		e.Remedy = "mount the file system with POSIX ACLs (option acl), or use one that has them"
	}
	return e
}

// Revoke takes uid's entry from the file, and from the directories when no other volume needs them.
func (b *Backend) Revoke(_ context.Context, o storagekit.Object, uid uint32) error {
	if uid == uint32(os.Geteuid()) || uid == 0 {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := posixacl.Revoke(b.path(o), uid); err != nil {
		return b.wrap(err, "cannot take the VM's access away")
	}
	b.step("dir:revoke:file")
	dir := filepath.Join(b.root, place(storagekit.KindVolume))
	entries, err := os.ReadDir(dir)
	if err != nil {
		return b.wrap(err, "cannot take the VM's access away")
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".raw") {
			continue
		}
		if _, found, err := posixacl.Of(filepath.Join(dir, e.Name()), uid); err == nil && found {
			return nil
		}
	}
	for _, d := range b.above() {
		perm, found, err := posixacl.Of(d, uid)
		if err != nil || !found || perm != posixacl.Execute {
			continue // not of our making
		}
		if err := posixacl.Revoke(d, uid); err != nil && !errors.Is(err, fs.ErrPermission) {
			return b.wrap(err, "cannot take the VM's access away")
		}
	}
	return nil
}
