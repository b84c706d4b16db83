package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// chunk is how many bytes of disk one goroutine deals with at a time: large enough that system calls do not
// count, small enough that two goroutines share an image evenly and buffers stay in the L2 cache's reach.
const chunk = 2 << 20

// converter is one conversion.
type converter struct {
	src     Source
	dst     Target
	lim     Limits
	rep     Reporter
	scratch func() (*os.File, error)
}

// Convert detects what src is and writes its disk to dst. It returns the size of the disk in bytes, a
// multiple of 512. scratch makes an unnamed file for a compressed image that needs random access; it is
// called at most once. Errors are errs.Invalid for bad images, and those of src and dst. What was written
// when ctx ends or an error comes stays in dst.
func Convert(ctx context.Context, src Source, dst Target, scratch func() (*os.File, error), lim Limits, rep Reporter) (int64, error) {
	lim.Writers = max(lim.Writers, 1)
	c := &converter{src: src, dst: dst, lim: lim, rep: rep, scratch: scratch}
	kind, err := Detect(src)
	if err != nil {
		return 0, err
	}
	switch {
	case kind == Qcow2:
		return c.qcow2(ctx, src, "qcow2")
	case kind.compressed():
		return c.compressed(ctx, kind)
	}
	return c.raw(ctx)
}

// raw copies a raw image, leaving out zeros and, where the source is a file with holes, not reading them.
func (c *converter) raw(ctx context.Context) (int64, error) {
	c.rep.Format("raw", c.src.Hint())
	var next atomic.Int64
	var end atomic.Int64
	end.Store(1<<63 - 1)
	file := c.src.Sparse()
	if file != nil {
		size, err := c.src.Size()
		if err != nil {
			return 0, err
		}
		if err := c.checkSize(size); err != nil {
			return 0, err
		}
		if err := c.dst.Grow((size + 511) &^ 511); err != nil {
			return 0, err
		}
		end.Store(size)
	}
	g, ctx := errgroup.WithContext(ctx)
	for range c.lim.Writers {
		g.Go(func() error {
			buf := make([]byte, chunk)
			for {
				off := next.Add(chunk) - chunk
				if off >= end.Load() {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				if file != nil {
					if err := c.rawSegments(file, buf, off, min(off+chunk, end.Load())); err != nil {
						return err
					}
					continue
				}
				if last, err := c.rawPiece(buf, off); err != nil || last {
					return err
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	size, err := c.src.Size()
	if err != nil {
		return 0, err
	}
	return c.finish(size)
}

func (c *converter) checkSize(size int64) error {
	if size > c.lim.MaxVirtualSize {
		return tooLarge(uint64(size), c.lim.MaxVirtualSize)
	}
	return nil
}

// finish gives the target its size: the image's, rounded up to sectors of 512 bytes.
func (c *converter) finish(size int64) (int64, error) {
	size = (size + 511) &^ 511
	return size, c.dst.Grow(size)
}

// rawPiece copies what the source has at off, at most a buffer; last tells that the source ends there.
func (c *converter) rawPiece(buf []byte, off int64) (last bool, err error) {
	n, err := c.src.ReadAt(buf, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	last = err != nil
	if n == 0 {
		return last, nil
	}
	if err := c.checkSize(off + int64(n)); err != nil {
		return false, err
	}
	wrote, err := writeSparse(c.dst, buf[:n], off)
	c.rep.Progress(off+int64(n), max(c.src.Hint(), 0), wrote)
	return last, err
}

// rawSegments copies the parts of [off, end) that are not holes.
func (c *converter) rawSegments(file *os.File, buf []byte, off, end int64) error {
	for off < end {
		from, to := dataSegment(file, off, end)
		if from >= end {
			break
		}
		if last, err := c.rawPiece(buf[:to-from], from); err != nil || last {
			return err
		}
		off = to
	}
	c.rep.Progress(end, c.src.Hint(), 0)
	return nil
}

// dataSegment finds the first part of [off, end) that may hold data, rounded outwards to whole blocks. Where
// the file system cannot tell, all is data.
func dataSegment(file *os.File, off, end int64) (from, to int64) {
	from, err := unix.Seek(int(file.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // a hole up to the end of the file
		return end, end
	case err != nil:
		return off, end
	case from >= end:
		return end, end
	}
	from = max(from&^(Block-1), off)
	to, err = unix.Seek(int(file.Fd()), from, unix.SEEK_HOLE)
	if err != nil || to >= end {
		return from, end
	}
	return from, min((to+Block-1)&^(Block-1), end)
}

// writeSparse writes what is not zero in b, in runs of whole blocks, and returns the number of bytes written.
// off is a multiple of Block.
func writeSparse(dst Target, b []byte, off int64) (int64, error) {
	var zero [Block]byte
	var wrote int64
	for pos := 0; pos < len(b); {
		n := min(Block, len(b)-pos)
		if bytes.Equal(b[pos:pos+n], zero[:n]) {
			pos += n
			continue
		}
		start := pos
		for pos += n; pos < len(b); pos += n {
			n = min(Block, len(b)-pos)
			if bytes.Equal(b[pos:pos+n], zero[:n]) {
				break
			}
		}
		if err := dst.Grow(off + int64(pos)); err != nil {
			return wrote, err
		}
		if _, err := dst.WriteAt(b[start:pos], off+int64(start)); err != nil {
			return wrote, err
		}
		wrote += int64(pos - start)
	}
	return wrote, nil
}

// batch is the work of one goroutine at a time: extents that follow each other on the disk.
type batch []extent

func (c *converter) qcow2(ctx context.Context, src Source, name string) (int64, error) {
	q, err := openQcow2(src, c.lim)
	if err != nil {
		return 0, err
	}
	c.rep.Format(name, q.size)
	size := (q.size + 511) &^ 511
	if err := c.dst.Grow(size); err != nil {
		return 0, err
	}
	work := make(chan batch, c.lim.Writers)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		return c.plan(gctx, q, work)
	})
	for range c.lim.Writers {
		g.Go(func() error { return c.qcow2Worker(q, work) })
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	// A lying end: QEMU reads an image whose tables are whole even when nothing is behind them; so do we.
	return c.finish(q.size)
}

// plan walks the tables in the order of the disk and hands out the extents that are not zero, neighbours
// joined. In a batch extents are disjoint and cover at most a chunk, or one cluster where that is larger.
func (c *converter) plan(ctx context.Context, q *qcow2, work chan<- batch) error {
	table := make([]byte, q.clusterSize)
	span := q.clustersPerL2() * q.clusterSize
	var cur batch
	var load int64
	send := func() error {
		if len(cur) == 0 {
			return nil
		}
		select {
		case work <- cur:
		case <-ctx.Done():
			return ctx.Err()
		}
		cur, load = nil, 0
		return nil
	}
	for i := range q.l1 {
		if err := ctx.Err(); err != nil {
			return err
		}
		there, err := q.readL2(i, table)
		if err != nil {
			return err
		}
		base := int64(i) * span
		if !there {
			c.rep.Progress(min(base+span, q.size), q.size, 0)
			continue
		}
		for j := int64(0); j < q.clustersPerL2(); j++ {
			guest := base + j*q.clusterSize
			if guest >= q.size {
				break
			}
			x, err := q.entry(be64(table[j*8:]), guest)
			if err != nil {
				return err
			}
			if x.kind == extentZero {
				continue
			}
			if load+x.length > chunk {
				if err := send(); err != nil {
					return err
				}
			}
			if n := len(cur); n > 0 && cur[n-1].follows(x) {
				cur[n-1].length += x.length
			} else {
				cur = append(cur, x)
			}
			load += x.length
		}
	}
	return send()
}

// follows tells whether y continues x both on the disk and in the image.
func (x extent) follows(y extent) bool {
	return x.kind == extentData && y.kind == extentData && x.guest+x.length == y.guest && x.host+x.length == y.host
}

func be64(b []byte) uint64 {
	_ = b[7]
	return uint64(b[0])<<56 | uint64(b[1])<<48 | uint64(b[2])<<40 | uint64(b[3])<<32 |
		uint64(b[4])<<24 | uint64(b[5])<<16 | uint64(b[6])<<8 | uint64(b[7])
}

func (c *converter) qcow2Worker(q *qcow2, work <-chan batch) error {
	buf := make([]byte, max(chunk, q.clusterSize))
	var packed []byte
	var un *unpacker
	for b := range work {
		for _, x := range b {
			data := buf[:x.length]
			switch x.kind {
			case extentData:
				if err := q.readFull(data, x.host, "a data cluster"); err != nil {
					return err
				}
			case extentPacked:
				if un == nil {
					var err error
					if un, err = newUnpacker(q.compression, q.clusterSize); err != nil {
						return err
					}
					defer un.close()
					packed = make([]byte, 2*q.clusterSize)
				}
				// The length is known to sectors only: the last cluster may end before it.
				in := packed[:x.packed]
				n, err := q.src.ReadAt(in, x.host)
				if err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				if n == 0 {
					return truncated("a compressed cluster", x.host, x.host)
				}
				if err := un.unpack(buf[:q.clusterSize], in[:n]); err != nil {
					if n < len(in)-512 {
						return truncated("a compressed cluster", x.host, x.host+int64(n))
					}
					return errs.New(errs.Invalid, "the compressed cluster of disk byte %d is damaged", x.guest).
						Because("BAD_IMAGE").Do("fetch the image again and give its checksum")
				}
			}
			n, err := writeSparse(c.dst, data, x.guest)
			if err != nil {
				return err
			}
			c.rep.Progress(x.guest+x.length, q.size, n)
		}
	}
	return nil
}
