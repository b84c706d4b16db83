package dir

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/storage-dir/internal/filecopy"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

// Below this part of the file system free there is a warning; below the second, new data will soon fail.
const (
	lowSpace    = 0.10
	almostFull  = 0.02
	lowAbsolute = 50 << 30 // and never a warning with that many bytes free
)

// Inspect looks at each file.
func (b *Backend) Inspect(ctx context.Context, objects []storagekit.Object) (map[string]storagekit.Facts, error) {
	b.mu.Lock()
	reflink := b.reflink
	b.mu.Unlock()
	out := make(map[string]storagekit.Facts, len(objects))
	for _, o := range objects {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var st unix.Stat_t
		if err := unix.Lstat(b.path(o), &st); err != nil {
			if err != unix.ENOENT { //nolint:errorlint // a system call gives the bare number
				out[o.ID] = storagekit.Facts{Damage: fmt.Sprintf("its file cannot be looked at: %v", err)}
			}
			continue
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			out[o.ID] = storagekit.Facts{Damage: "something that is no file is in its place"}
			continue
		}
		f := storagekit.Facts{Size: uint64(st.Size), Allocated: uint64(st.Blocks) * 512, BlockSize: blockSize}
		if reflink && st.Blocks > 0 {
			if own, err := b.unshared(o); err == nil {
				f.Allocated = min(own, f.Allocated)
			}
		}
		out[o.ID] = f
	}
	return out, nil
}

func (b *Backend) unshared(o storagekit.Object) (uint64, error) {
	f, err := openRegular(b.path(o))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return filecopy.Unshared(f)
}

// Space asks the file system.
func (b *Backend) Space(context.Context) (storagekit.Space, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(b.root, &st); err != nil {
		return storagekit.Space{}, errs.Wrap(errs.Unavailable, err, "cannot look at the data directory")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	bs := uint64(st.Bsize)
	return storagekit.Space{Place: b.root, Total: st.Blocks * bs, Available: st.Bavail * bs, Used: (st.Blocks - st.Bfree) * bs,
		Compression: 1, Reflink: b.reflink}, nil
}

// Conditions looks for a directory that is gone and a file system that is nearly full.
func (b *Backend) Conditions(ctx context.Context) []service.Condition {
	b.mu.Lock()
	meta := b.meta
	b.mu.Unlock()
	info, err := os.Stat(filepath.Join(b.root, "metadata.db"))
	if meta != nil && (err != nil || !os.SameFile(meta, info)) {
		return []service.Condition{{Code: "DATA_DIR_MISSING", Severity: service.SeverityCritical,
			Text:   fmt.Sprintf("the data directory %s is gone, or another one is in its place", b.root),
			Remedy: "mount the file system that holds it, then restart the storage plugin"}}
	}
	sp, err := b.Space(ctx)
	if err != nil || sp.Total == 0 {
		return nil
	}
	free := float64(sp.Available) / float64(sp.Total)
	c := service.Condition{Code: "LOW_SPACE", Severity: service.SeverityWarning,
		Text:   fmt.Sprintf("%s has %.1f GiB (%.0f %%) left", b.root, float64(sp.Available)/(1<<30), free*100),
		Remedy: "delete what is not needed or enlarge the file system: a guest whose volume cannot grow sees write errors"}
	switch {
	case free < almostFull && sp.Available < lowAbsolute:
		c.Severity = service.SeverityCritical
	case free < lowSpace && sp.Available < lowAbsolute:
	default:
		return nil
	}
	return []service.Condition{c}
}
