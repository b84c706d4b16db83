// Package kernels keeps the kernels and initramfs images that VMs boot directly, each content once, under its
// SHA-256. A VM therefore boots what it was made with, whatever becomes of the file it came from.
package kernels

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Largest files taken, in bytes.
const (
	MaxKernel    = 512 << 20
	MaxInitramfs = 2 << 30
)

// Kind is what a file is.
type Kind string

// Kinds, by the request field that brings them.
const (
	Kernel    Kind = "kernel"
	Initramfs Kind = "initramfs"
)

// Store is a directory of such files. Its methods may be called concurrently.
type Store struct {
	dir string

	mu   sync.Mutex     // guards what follows, and file names below dir
	refs map[string]int // by hash
}

// Open opens the store, and makes its directory.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &Store{dir: dir, refs: map[string]int{}}, nil
}

// Path is where the content with this hash is. It is there as long as somebody holds it.
func (s *Store) Path(hash string) string { return filepath.Join(s.dir, hash) }

// Add copies what f holds, from its beginning, into the store and holds it for the caller.
func (s *Store) Add(kind Kind, f *os.File) (hash string, err error) {
	st, err := f.Stat()
	if err != nil {
		return "", errs.Wrap(errs.Unknown, err, "the %s cannot be read", kind)
	}
	limit := int64(MaxKernel)
	if kind == Initramfs {
		limit = MaxInitramfs
	}
	switch {
	case !st.Mode().IsRegular():
		return "", errs.Field(string(kind), "give a file", "the %s is not a regular file", kind)
	case st.Size() == 0 || st.Size() > limit:
		return "", errs.Field(string(kind), "give the right file", "the %s is %d bytes long; 1 to %d are taken", kind, st.Size(), limit)
	}
	if err := check(kind, f); err != nil {
		return "", err
	}
	tmp, err := os.CreateTemp(s.dir, ".new-")
	if err != nil {
		return "", err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	h := sha256.New()
	// One more than allowed, to notice a file that grows while it is read.
	n, err := io.Copy(io.MultiWriter(tmp, h), io.NewSectionReader(f, 0, limit+1))
	if err != nil {
		return "", errs.Wrap(errs.Unknown, err, "the %s cannot be copied", kind)
	}
	if n > limit {
		return "", errs.Field(string(kind), "give the right file", "the %s grew while it was read", kind)
	}
	if err := errors.Join(tmp.Chmod(0o444), tmp.Sync(), tmp.Close()); err != nil {
		return "", err
	}
	hash = hex.EncodeToString(h.Sum(nil))
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := os.Stat(s.Path(hash)); err != nil {
		if err := os.Rename(tmp.Name(), s.Path(hash)); err != nil {
			return "", err
		}
	}
	s.refs[hash]++
	return hash, nil
}

// Put takes a content whose hash is known already, without holding it.
func (s *Store) Put(hash string, r io.Reader) error {
	tmp, err := os.CreateTemp(s.dir, ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(tmp, h), r); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != hash {
		return errs.New(errs.Corrupt, "a kernel has not the hash that it is called by")
	}
	if err := errors.Join(tmp.Chmod(0o444), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return os.Rename(tmp.Name(), s.Path(hash))
}

// Hold holds a content that is there, "" excepted.
func (s *Store) Hold(hash string) {
	if hash == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refs[hash]++
}

// Release lets go of a content; the last one removes it.
func (s *Store) Release(hash string) {
	if hash == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refs[hash]--; s.refs[hash] > 0 {
		return
	}
	delete(s.refs, hash)
	_ = os.Remove(s.Path(hash)) // what stays is found by the next Sweep
}

// Sweep removes what nobody holds: what a crash left. It is called once, when all holders are known.
func (s *Store) Sweep() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	ents, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range ents {
		if s.refs[e.Name()] == 0 && (len(e.Name()) == 2*sha256.Size || strings.HasPrefix(e.Name(), ".new-")) {
			err = errors.Join(err, os.Remove(filepath.Join(s.dir, e.Name())))
		}
	}
	return err
}

// check looks whether the file can be what it is said to be, so that the mistake is told now and not by a VM
// that never prints. A kernel is a bzImage ("HdrS" at 0x202, Documentation/arch/x86/boot.rst) or an ELF file
// (vmlinux); an initramfs is a cpio, perhaps compressed, and is left to the kernel.
func check(kind Kind, f *os.File) error {
	if kind != Kernel {
		return nil
	}
	head := make([]byte, 0x206)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return errs.Wrap(errs.Unknown, err, "the kernel cannot be read")
	}
	head = head[:n]
	if bytes.HasPrefix(head, []byte("\x7fELF")) || len(head) == 0x206 && string(head[0x202:]) == "HdrS" {
		return nil
	}
	what := "the file"
	if bytes.HasPrefix(head, []byte{0x1f, 0x8b}) {
		what = "a gzip file"
	}
	return errs.Field(string(Kernel), "give a Linux bzImage (vmlinuz) or an uncompressed vmlinux",
		"%s is no kernel that can be booted directly", what)
}
