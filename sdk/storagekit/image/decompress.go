package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sync/errgroup"

	"github.com/mvirt/mvirt/sdk/errs"
)

// maxWindow bounds what a .zst file may make us keep in memory: 128 MiB is what zstd itself accepts without
// --long (RFC 8878, section 3.1.1.1.2, recommends at least 8 MiB).
const maxWindow = 128 << 20

// stream reads a compressed source from its beginning. Progress is told in compressed bytes.
type stream struct {
	ctx context.Context
	src Source
	off int64
	rep Reporter
}

func (s *stream) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.src.ReadAt(p, s.off)
	s.off += int64(n)
	s.rep.Progress(s.off, max(s.src.Hint(), 0), 0)
	if n > 0 && errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// open makes the decompressor; the returned function frees it.
func (s *stream) open(kind Kind) (io.Reader, func(), error) {
	in := &bufferedSource{stream: s, buf: make([]byte, 256<<10)}
	switch kind {
	case Gzip:
		r, err := gzip.NewReader(in)
		return r, func() {}, err
	case Xz:
		r, err := xz.NewReader(in)
		return r, func() {}, err
	case Zstd:
		r, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		return r, r.Close, nil
	}
	return nil, nil, errs.New(errs.Internal, "no decompressor for %s", kind)
}

// bufferedSource is a bufio.Reader that keeps the error of the source itself apart from what a decompressor
// makes of it. It is an io.ByteReader, so that decompressors do not buffer again.
type bufferedSource struct {
	*stream
	buf  []byte
	r, w int
	err  error
}

func (b *bufferedSource) fill() error {
	if b.r < b.w {
		return nil
	}
	if b.err == nil {
		b.r = 0
		b.w, b.err = b.stream.Read(b.buf)
		if b.w > 0 {
			return nil
		}
	}
	return b.err
}

func (b *bufferedSource) Read(p []byte) (int, error) {
	if err := b.fill(); err != nil {
		return 0, err
	}
	n := copy(p, b.buf[b.r:b.w])
	b.r += n
	return n, nil
}

func (b *bufferedSource) ReadByte() (byte, error) {
	if err := b.fill(); err != nil {
		return 0, err
	}
	c := b.buf[b.r]
	b.r++
	return c, nil
}

// compressed unpacks a compressed raw image straight into the target, and a compressed qcow2 image, whose
// tables must be looked up, into a scratch file first.
func (c *converter) compressed(ctx context.Context, kind Kind) (int64, error) {
	in := &stream{ctx: ctx, src: c.src, rep: c.rep}
	r, free, err := in.open(kind)
	if err != nil {
		return 0, c.unpackError(kind, err)
	}
	defer free()
	r = &sticky{r: r}
	head := make([]byte, 64<<10)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, c.unpackError(kind, err)
	}
	if err != nil && in.off == 0 {
		return 0, c.unpackError(kind, err)
	}
	head = head[:n]
	// io.ReadFull's ErrUnexpectedEOF may be its own (a short image) or the decompressor's (cut off): reading
	// on tells.
	r = io.MultiReader(bytes.NewReader(head), r)
	inner, err := Detect(bytes.NewReader(head))
	if err != nil {
		return 0, err
	}
	switch {
	case inner == Qcow2:
		return c.compressedQcow2(ctx, r, kind)
	case inner.compressed():
		return 0, refuse("decompress it once and import the result", "the image is compressed twice (%s in %s)", inner, kind)
	}
	c.rep.Format(fmt.Sprintf("raw+%s", kind), -1)
	size, err := c.drain(ctx, r, c.dst, kind, c.lim.MaxVirtualSize, tooLarge)
	if err != nil {
		return 0, err
	}
	return c.finish(size)
}

func (c *converter) compressedQcow2(ctx context.Context, r io.Reader, kind Kind) (int64, error) {
	file, err := c.scratch()
	if err != nil {
		return 0, err
	}
	defer file.Close()
	tooMuch := func(size uint64, limit int64) error {
		return errs.New(errs.Invalid, "the image has more than %d bytes once it is decompressed", limit).
			Because("IMAGE_TOO_LARGE").Do("decompress it first and import the qcow2 file")
	}
	size, err := c.drain(ctx, r, fileTarget{file}, kind, c.lim.MaxScratch, tooMuch)
	if err != nil {
		return 0, err
	}
	if err := file.Truncate(size); err != nil {
		return 0, err
	}
	return c.qcow2(ctx, &FileSource{File: file, Length: size}, fmt.Sprintf("qcow2+%s", kind))
}

// drain reads r to its end and writes what is not zero into dst; decompressing and writing overlap.
func (c *converter) drain(ctx context.Context, r io.Reader, dst Target, kind Kind, limit int64, over func(uint64, int64) error) (int64, error) {
	type piece struct {
		b   *[]byte
		n   int
		off int64
	}
	pool := sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}
	work := make(chan piece, c.lim.Writers)
	var size int64
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		for {
			buf, _ := pool.Get().(*[]byte)
			n, err := io.ReadFull(r, *buf)
			// Here ErrUnexpectedEOF means a short last piece only when the decompressor says EOF next.
			if errors.Is(err, io.ErrUnexpectedEOF) {
				var one [1]byte
				if _, again := r.Read(one[:]); !errors.Is(again, io.EOF) {
					return c.unpackError(kind, io.ErrUnexpectedEOF)
				}
			} else if err != nil && !errors.Is(err, io.EOF) {
				return c.unpackError(kind, err)
			}
			if size+int64(n) > limit {
				return over(uint64(size)+uint64(n), limit)
			}
			select {
			case work <- piece{buf, n, size}:
			case <-ctx.Done():
				return ctx.Err()
			}
			size += int64(n)
			if err != nil {
				return c.wholeXz(kind)
			}
		}
	})
	for range c.lim.Writers {
		g.Go(func() error {
			for p := range work {
				n, err := writeSparse(dst, (*p.b)[:p.n], p.off)
				if err != nil {
					return err
				}
				pool.Put(p.b)
				c.rep.Progress(-1, 0, n)
			}
			return nil
		})
	}
	return size, g.Wait()
}

// wholeXz is asked at the end of a stream: see xzEnds.
func (c *converter) wholeXz(kind Kind) error {
	if kind != Xz {
		return nil
	}
	size, err := c.src.Size()
	if err != nil {
		return err
	}
	whole, err := xzEnds(c.src, size)
	if err == nil && !whole {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return c.unpackError(kind, err)
	}
	return nil
}

// unpackError says what a decompressor's error means to who asked. Errors of the source itself pass.
func (c *converter) unpackError(kind Kind, err error) error {
	var e *errs.Error
	switch {
	case errors.As(err, &e), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrClosed):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return errs.New(errs.Invalid, "the image is truncated: its %s stream has no end", kind).
			Because("IMAGE_TRUNCATED").Do("fetch the image again and give its checksum")
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return refuse("compress it again without --long", "the image's zstd window is larger than %d bytes", maxWindow)
	}
	return &errs.Error{Kind: errs.Invalid, Reason: "BAD_IMAGE", Message: fmt.Sprintf("the image's %s data is damaged", kind),
		Remedy: "fetch the image again and give its checksum", Err: err}
}

// fileTarget is a regular file as a target: it grows by itself.
type fileTarget struct{ *os.File }

func (fileTarget) Grow(int64) error { return nil }

// FileSource is a complete regular file or block device of Length bytes.
type FileSource struct {
	File   *os.File
	Length int64
	Dense  bool // not a regular file: there are no holes to look for
}

var _ Source = (*FileSource)(nil)

// ReadAt reads the file.
func (f *FileSource) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= f.Length {
		return 0, io.EOF
	}
	short := int64(len(p)) > f.Length-off
	if short {
		p = p[:f.Length-off]
	}
	n, err := f.File.ReadAt(p, off)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

// Size is the length.
func (f *FileSource) Size() (int64, error) { return f.Length, nil }

// Hint is the length.
func (f *FileSource) Hint() int64 { return f.Length }

// Sparse is the file, unless it is a device.
func (f *FileSource) Sparse() *os.File {
	if f.Dense {
		return nil
	}
	return f.File
}
