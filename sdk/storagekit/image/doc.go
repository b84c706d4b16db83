// Package image turns disk images into raw disks: it detects what an image is, reads it, and writes what is
// not zero into a target.
//
// Everything here works on bytes that an attacker may have made. It is meant to run in the worker process
// (package storagekit/worker), which holds nothing but the descriptors of source and target.
//
// Formats are described by their own documents: qcow2 by docs/interop/qcow2.txt of QEMU, DEFLATE by RFC 1951,
// gzip by RFC 1952, zstd by RFC 8878, xz by the .xz File Format 1.1.0. A format is detected once, at import;
// what is written is raw and is never guessed again.
package image

import (
	"io"
	"os"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Block is the granularity in bytes of zero detection: the page and file system block size of all hosts we
// know, and what a sparse zvol or file can leave out.
const Block = 4096

// Source is the image as delivered; its bytes may still be arriving.
type Source interface {
	// ReadAt waits until the bytes are there, and returns io.EOF only behind the true end.
	io.ReaderAt
	// Size waits until all bytes are there and returns their number.
	Size() (int64, error)
	// Hint is the size as announced, or -1: it may lie.
	Hint() int64
	// Sparse is the file behind a source that is complete and may have holes, or nil.
	Sparse() *os.File
}

// Target is where the raw disk goes. It reads as zeros where nothing is written. WriteAt may be called
// concurrently.
type Target interface {
	io.WriterAt
	// Grow makes the target hold at least size bytes. A smaller size than before is ignored.
	Grow(size int64) error
}

// Limits bound what an image may ask for.
type Limits struct {
	MaxVirtualSize int64 // bytes of the raw disk
	MaxScratch     int64 // bytes of a compressed image once decompressed, where it must be kept
	Writers        int   // concurrent readers and writers; at least 1
}

// Reporter is told how far the conversion is. Calls are concurrent and frequent; it must be cheap.
type Reporter interface {
	// Format says what the image is ("qcow2", "raw+gzip") and how large the disk is, or -1 if not known yet.
	Format(name string, virtualSize int64)
	// Progress says how much of the source or of the disk is dealt with, and bytes written since last time.
	Progress(done, total int64, wrote int64)
}

func refuse(remedy, format string, args ...any) error {
	return errs.New(errs.Invalid, format, args...).Because("BAD_IMAGE").Do(remedy)
}

func truncated(what string, off, end int64) error {
	return errs.New(errs.Invalid, "the image is truncated: %s at byte %d lies beyond its end at %d", what, off, end).
		Because("IMAGE_TRUNCATED").Do("fetch the image again and give its checksum")
}
