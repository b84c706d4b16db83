// Package dir keeps volumes, templates and snapshots as sparse raw files in a directory: the Backend of
// storage-dir.
//
//	<data-dir>/metadata.db         what package storagekit knows
//	<data-dir>/volumes/<id>.raw    one file a volume
//	<data-dir>/templates/<id>.raw
//	<data-dir>/snapshots/<id>.raw
//	<data-dir>/.tmp/<id>.create    what is being made, renamed into its place when it is whole
//	<data-dir>/.tmp/<id>.rollback
//	<data-dir>/.tmp/<id>.import
//	<data-dir>/.tmp/<id>.download  what is being fetched
//
// Files are named by ids; what users call them is in the metadata alone. A file that is not named like this
// is not ours and is never touched.
package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/storage-dir/internal/filecopy"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

// blockSize is what files are allocated in on all file systems we know.
const blockSize = 4096

// Backend is a directory. Use New.
type Backend struct {
	root string
	copy *filecopy.Copier
	step func(string) // fail point of tests

	mu      sync.Mutex // guards the directories' access rights, and what follows
	reflink bool
	meta    os.FileInfo // of metadata.db, to notice that another file system is in its place
}

var _ storagekit.Backend = (*Backend)(nil)

// New makes a backend for a directory, which need not be there yet. step may be nil.
func New(root string, step func(string)) (*Backend, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if step == nil {
		step = func(string) {}
	}
	return &Backend{root: abs, copy: filecopy.New(), step: step}, nil
}

const tmp = ".tmp"

// place is the directory of a kind of object.
func place(kind string) string { return kind + "s" }

func (b *Backend) path(o storagekit.Object) string {
	return filepath.Join(b.root, place(o.Kind), o.ID+".raw")
}

func (b *Backend) temp(id, what string) string { return filepath.Join(b.root, tmp, id+"."+what) }

// Ready makes the directories and finds out what the file system can do.
func (b *Backend) Ready(context.Context) (string, error) {
	if err := os.Mkdir(b.root, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", &errs.Error{Kind: errs.Precondition, Reason: "DATA_DIR_MISSING", Err: err,
			Message: fmt.Sprintf("the data directory %s is not there", b.root), Remedy: "make it, or mount the file system that holds it"}
	}
	info, err := os.Stat(b.root)
	if err != nil {
		return "", errs.Wrap(errs.Precondition, err, "cannot use the data directory")
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() != 0 && st.Uid != uint32(os.Geteuid()) {
		return "", errs.New(errs.Precondition, "the data directory %s belongs to uid %d", b.root, st.Uid).
			Because("DATA_DIR_OWNER").Do(fmt.Sprintf("chown it to uid %d", os.Geteuid()))
	}
	if info.Mode().Perm()&0o002 != 0 {
		return "", errs.New(errs.Precondition, "the data directory %s can be written by everybody", b.root).
			Because("DATA_DIR_MODE").Do("chmod o-w " + b.root)
	}
	for _, d := range []string{place(storagekit.KindVolume), place(storagekit.KindTemplate), place(storagekit.KindSnapshot), tmp} {
		if err := os.Mkdir(filepath.Join(b.root, d), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", b.wrap(err, "cannot make a directory")
		}
	}
	if err := b.probe(); err != nil {
		return "", err
	}
	return filepath.Join(b.root, "metadata.db"), nil
}

// probe finds out whether files can share blocks here.
func (b *Backend) probe() error {
	dir := filepath.Join(b.root, tmp)
	src, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return b.wrap(err, "cannot write to the data directory")
	}
	defer src.Close()
	dst, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return b.wrap(err, "cannot write to the data directory")
	}
	defer dst.Close()
	if _, err := src.Write(make([]byte, blockSize)); err != nil {
		return b.wrap(err, "cannot write to the data directory")
	}
	can, err := filecopy.Reflink(dst, src)
	if err != nil {
		can = false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reflink = can
	return nil
}

// wrap adds the remedy for a full disk, which may come out of any call.
func (b *Backend) wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	e := &errs.Error{Message: fmt.Sprintf(format, args...), Err: err}
	switch {
	case errors.Is(err, unix.EDQUOT), errors.Is(err, unix.ENOSPC):
		e.Kind, e.Reason, e.Message = errs.Exhausted, "NO_SPACE", fmt.Sprintf("no space is left in %s", b.root)
		e.Remedy = "delete volumes, snapshots or templates that are not needed, or enlarge the file system"
	case errors.Is(err, unix.EFBIG):
		e.Kind, e.Field, e.Message = errs.Invalid, "size_bytes", fmt.Sprintf("the file system of %s has no files that large", b.root)
		e.Remedy = "use a smaller size, or a file system with larger files"
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EIO):
		e.Kind, e.Reason, e.Remedy = errs.Unavailable, "STORAGE_FAILED", "check the disk and the kernel's log"
	case errs.KindOf(err) == errs.Unknown:
		e.Kind = errs.Internal
	}
	return e
}

// Sweep removes temporary files that nobody waits for.
func (b *Backend) Sweep(_ context.Context, keep func(string) bool) error {
	entries, err := os.ReadDir(filepath.Join(b.root, tmp))
	if err != nil {
		return b.wrap(err, "cannot list the temporary files")
	}
	for _, e := range entries {
		id, what, _ := strings.Cut(e.Name(), ".")
		known := what == "create" || what == "rollback" || what == "import" || what == "download"
		if !known || ident.CheckID("id", id) != nil || keep(id) {
			continue
		}
		if err := os.Remove(filepath.Join(b.root, tmp, e.Name())); err != nil {
			return b.wrap(err, "cannot sweep")
		}
	}
	if info, err := os.Stat(filepath.Join(b.root, "metadata.db")); err == nil {
		b.mu.Lock()
		b.meta = info
		b.mu.Unlock()
	}
	return nil
}

// Create makes a file under a temporary name, whole and durable, then gives it its own.
func (b *Backend) Create(ctx context.Context, o storagekit.Object, from *storagekit.Object) (storagekit.Object, error) {
	o.BlockSize = blockSize
	name := b.temp(o.ID, "create")
	err := b.make(ctx, name, o, from)
	if err == nil {
		b.step("dir:create:made")
		err = b.move(name, b.path(o))
	}
	if err != nil {
		return o, b.explain(err, "cannot make the %s", o.Kind)
	}
	return o, nil
}

// explain leaves an error that says enough as it is.
func (b *Backend) explain(err error, format string, args ...any) error {
	var e *errs.Error
	if errors.As(err, &e) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return b.wrap(err, format, args...)
}

// make writes a new file: o's size, with from's bytes.
func (b *Backend) make(ctx context.Context, name string, o storagekit.Object, from *storagekit.Object) error {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if from != nil {
		src, err := openRegular(b.path(*from))
		if err != nil {
			return err
		}
		defer src.Close()
		if err := b.copy.Copy(ctx, f, src, written(*from)); err != nil {
			return err
		}
		b.step("dir:create:copied")
	}
	if err := f.Truncate(int64(o.Size)); err != nil {
		return err
	}
	return f.Sync()
}

// written tells whether somebody may be writing to o.
func written(o storagekit.Object) bool {
	for _, a := range o.Attachments {
		if !a.ReadOnly {
			return true
		}
	}
	return false
}

// openRegular opens a data file to read. A symbolic link in its place is not followed.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, errs.New(errs.Corrupt, "%s is no regular file", path).Because("DAMAGED").Do("restore it from a backup")
	}
	return f, nil
}

// move renames and makes that durable.
func (b *Backend) move(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	b.step("dir:moved")
	return syncDir(filepath.Dir(to))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// remove removes a file and makes that durable; one that is gone is well.
func (b *Backend) remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// Undo removes what a create or an import has made so far.
func (b *Backend) Undo(_ context.Context, o storagekit.Object) error {
	var all error
	for _, p := range []string{b.temp(o.ID, "create"), b.temp(o.ID, "import"), b.temp(o.ID, "download"), b.path(o)} {
		all = errors.Join(all, b.remove(p))
	}
	return b.wrap(all, "cannot remove what is left of a %s", o.Kind)
}

// Delete removes the file. Clones have their own blocks, or share them without knowing of it.
func (b *Backend) Delete(_ context.Context, o storagekit.Object) error {
	return b.wrap(b.remove(b.path(o)), "cannot remove the %s's file", o.Kind)
}

// Resize makes the file longer; what is added is a hole.
func (b *Backend) Resize(_ context.Context, o storagekit.Object, size uint64) error {
	f, err := os.OpenFile(b.path(o), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return b.wrap(err, "cannot resize the volume")
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return b.wrap(err, "cannot resize the volume")
	}
	if uint64(info.Size()) >= size {
		return nil
	}
	if err := f.Truncate(int64(size)); err != nil {
		return b.wrap(err, "cannot resize the volume")
	}
	return b.wrap(f.Sync(), "cannot resize the volume")
}

// Rename does nothing: files are named by ids.
func (b *Backend) Rename(context.Context, storagekit.Object, string) error { return nil }

// Save does nothing: metadata.db is the only place for it.
func (b *Backend) Save(context.Context, storagekit.Object) error { return nil }

// PrepareRollback copies the snapshot under a temporary name.
func (b *Backend) PrepareRollback(ctx context.Context, vol, snap storagekit.Object, _ []storagekit.Object) error {
	o := vol
	o.Size = snap.Size
	return b.explain(b.make(ctx, b.temp(vol.ID, "rollback"), o, &snap), "cannot roll back")
}

// UndoRollback removes that copy.
func (b *Backend) UndoRollback(_ context.Context, vol storagekit.Object) error {
	return b.wrap(b.remove(b.temp(vol.ID, "rollback")), "cannot remove what is left of a rollback")
}

// CommitRollback puts the copy in the volume's place, then removes the newer snapshots.
func (b *Backend) CommitRollback(_ context.Context, vol, _ storagekit.Object, newer []storagekit.Object) error {
	err := b.move(b.temp(vol.ID, "rollback"), b.path(vol))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // already done by a life before this one
		return b.wrap(err, "cannot roll back")
	}
	b.step("dir:rollback:moved")
	for _, o := range newer {
		if err := b.remove(b.path(o)); err != nil {
			return b.wrap(err, "cannot remove a newer snapshot")
		}
	}
	return nil
}

// Staging is where downloads go.
func (b *Backend) Staging() string { return filepath.Join(b.root, tmp) }

// OpenTarget makes the file of an import.
func (b *Backend) OpenTarget(_ context.Context, o storagekit.Object, _ int64) (storagekit.Target, error) {
	f, err := os.OpenFile(b.temp(o.ID, "import"), os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return storagekit.Target{}, b.wrap(err, "cannot make the template's file")
	}
	return storagekit.Target{File: f}, nil // the worker gives it its size
}

// Finish gives the imported file its place.
func (b *Backend) Finish(_ context.Context, o storagekit.Object) error {
	err := b.move(b.temp(o.ID, "import"), b.path(o))
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Lstat(b.path(o)); serr == nil { // a life before this one did it
			return nil
		}
	}
	return b.wrap(err, "cannot put the template in its place")
}
