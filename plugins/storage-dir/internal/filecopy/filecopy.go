// Package filecopy makes copies of raw disk files: sharing blocks where the file system can (reflink), leaving
// out holes where it cannot, and consistent even when a guest may be writing.
package filecopy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// piece is how much is copied between two looks at ctx.
const piece = 16 << 20

// settled is the age at which a file's modification time cannot be shared by a later write any more: the
// kernel's clock for it ticks at CONFIG_HZ, 100 at the slowest.
const settled = 50 * time.Millisecond

// tries is how often a copy of a file that is written to is begun again.
const tries = 3

// Copier copies. Now and Sleep are for tests.
type Copier struct {
	Now   func() time.Time
	Sleep func(ctx context.Context, d time.Duration) error
}

// New makes a Copier with the system's clock.
func New() *Copier {
	return &Copier{Now: time.Now, Sleep: func(ctx context.Context, d time.Duration) error {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
}

// Reflink makes dst, which is empty, share all blocks of src. It tells false when the file system cannot.
func Reflink(dst, src *os.File) (bool, error) {
	err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.ENOSYS):
		return false, nil
	}
	return false, fmt.Errorf("share blocks: %w", err)
}

// Copy makes dst, which is empty, equal to src. When live is set, somebody may write to src meanwhile: the
// copy is then of one moment, or errs.Precondition says that there was none.
func (c *Copier) Copy(ctx context.Context, dst, src *os.File, live bool) error {
	shared, err := Reflink(dst, src) // of one moment: the kernel locks out writers
	if err != nil || shared {
		return err
	}
	if !live {
		return sparse(ctx, dst, src)
	}
	// Without the file system's help a copy is of one moment exactly if nobody wrote between its beginning and
	// its end, which the modification time tells, if it is older than the clock's tick to begin with.
	for range tries {
		before, err := c.quiet(ctx, src)
		if err != nil {
			return err
		}
		if err := dst.Truncate(0); err != nil {
			return err
		}
		if err := sparse(ctx, dst, src); err != nil {
			return err
		}
		after, err := src.Stat()
		if err != nil {
			return err
		}
		if after.ModTime().Equal(before) {
			return nil
		}
	}
	return errs.New(errs.Precondition, "the guest writes to the volume all the time, and this file system cannot copy it in one moment").
		Because("VOLUME_BUSY").Do("pause or stop the VM, or keep volumes on a file system with reflinks (XFS, Btrfs)")
}

// quiet waits until the last write is old enough to be told from a next one, and returns its time.
func (c *Copier) quiet(ctx context.Context, src *os.File) (time.Time, error) {
	for range 20 {
		st, err := src.Stat()
		if err != nil {
			return time.Time{}, err
		}
		age := c.Now().Sub(st.ModTime())
		if age >= settled || age < 0 { // a time to come: no write of now can have it
			return st.ModTime(), nil
		}
		if err := c.Sleep(ctx, settled-age); err != nil {
			return time.Time{}, err
		}
	}
	return time.Time{}, errs.New(errs.Precondition, "the guest writes to the volume all the time, and this file system cannot copy it in one moment").
		Because("VOLUME_BUSY").Do("pause or stop the VM, or keep volumes on a file system with reflinks (XFS, Btrfs)")
}

// sparse copies what is not a hole.
func sparse(ctx context.Context, dst, src *os.File) error {
	st, err := src.Stat()
	if err != nil {
		return err
	}
	size := st.Size()
	if err := dst.Truncate(size); err != nil {
		return err
	}
	in, out := int(src.Fd()), int(dst.Fd())
	for off := int64(0); off < size; {
		from, err := unix.Seek(in, off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		to := size
		if err != nil {
			from = off // the file system cannot tell: all is data
		} else if to, err = unix.Seek(in, from, unix.SEEK_HOLE); err != nil {
			to = size
		}
		for from < to {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, err := copyRange(out, in, from, min(to-from, piece))
			if err != nil {
				return err
			}
			if n == 0 { // it became shorter
				return nil
			}
			from += n
		}
		off = to
	}
	return nil
}

// copyRange copies inside the kernel where it can.
func copyRange(out, in int, off, n int64) (int64, error) {
	a, b := off, off
	k, err := unix.CopyFileRange(in, &a, out, &b, int(n), 0)
	if err == nil {
		return int64(k), nil
	}
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
		return 0, fmt.Errorf("copy: %w", err)
	}
	buf := make([]byte, min(n, 1<<20))
	k, err = unix.Pread(in, buf, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("copy: %w", err)
	}
	for done := 0; done < k; {
		w, err := unix.Pwrite(out, buf[done:k], off+int64(done))
		if err != nil {
			return 0, fmt.Errorf("copy: %w", err)
		}
		done += w
	}
	return int64(k), nil
}
