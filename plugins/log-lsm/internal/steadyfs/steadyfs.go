// Package steadyfs is a file system on which a full disk is a wait, not an error.
//
// Pebble cannot go on after a failed write to its log or manifest: it ends the process. On this file system a
// write that finds no space tells the store, which turns new entries away and goes on reading, and tries
// again until there is space or the store closes. What was begun is then finished as if nothing had been.
// A failed sync is not tried again: after one the kernel may have dropped the data (it is returned, and
// Pebble ends the process, which then recovers from its log).
package steadyfs

import (
	"errors"
	"sync"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// FS wraps a file system.
type FS struct {
	vfs.FS
	// Full is told when a write has found no space (true) and when one has succeeded after that (false).
	// It must not block.
	full func(bool)
	// wait sleeps between tries; it returns false to give up.
	wait func() bool

	mu      sync.Mutex
	waiting int
}

// New wraps fs. full must not block; done ends all waiting: writes then fail with the error of the disk.
func New(fs vfs.FS, every time.Duration, done <-chan struct{}, full func(bool)) *FS {
	return &FS{FS: fs, full: full, wait: func() bool {
		t := time.NewTimer(every)
		defer t.Stop()
		select {
		case <-t.C:
			return true
		case <-done:
			return false
		}
	}}
}

// Unwrap gives the wrapped file system.
func (f *FS) Unwrap() vfs.FS { return f.FS }

// NoSpace says whether err means that the disk or a quota is full.
func NoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// try runs op until it does not fail for lack of space.
func (f *FS) try(op func() error) error {
	err := op()
	if err == nil || !NoSpace(err) {
		return err
	}
	f.mu.Lock()
	f.waiting++
	f.full(true)
	f.mu.Unlock()
	for NoSpace(err) && f.wait() {
		err = op()
	}
	f.mu.Lock()
	if f.waiting--; f.waiting == 0 {
		f.full(false)
	}
	f.mu.Unlock()
	return err
}

// Create implements vfs.FS.
func (f *FS) Create(name string, c vfs.DiskWriteCategory) (file vfs.File, err error) {
	err = f.try(func() error { file, err = f.FS.Create(name, c); return err })
	return f.wrap(file, err)
}

// OpenReadWrite implements vfs.FS.
func (f *FS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (file vfs.File, err error) {
	err = f.try(func() error { file, err = f.FS.OpenReadWrite(name, c, opts...); return err })
	return f.wrap(file, err)
}

// ReuseForWrite implements vfs.FS.
func (f *FS) ReuseForWrite(old, name string, c vfs.DiskWriteCategory) (file vfs.File, err error) {
	err = f.try(func() error { file, err = f.FS.ReuseForWrite(old, name, c); return err })
	return f.wrap(file, err)
}

// Link implements vfs.FS.
func (f *FS) Link(old, name string) error { return f.try(func() error { return f.FS.Link(old, name) }) }

// Rename implements vfs.FS.
func (f *FS) Rename(old, name string) error {
	return f.try(func() error { return f.FS.Rename(old, name) })
}

func (f *FS) wrap(file vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &steadyFile{File: file, fs: f}, nil
}

type steadyFile struct {
	vfs.File
	fs *FS
}

// Write implements vfs.File; what a full disk has left of p is written later.
func (s *steadyFile) Write(p []byte) (int, error) {
	done := 0
	err := s.fs.try(func() error {
		n, err := s.File.Write(p[done:])
		done += n
		return err
	})
	return done, err
}

// WriteAt implements vfs.File.
func (s *steadyFile) WriteAt(p []byte, off int64) (int, error) {
	done := 0
	err := s.fs.try(func() error {
		n, err := s.File.WriteAt(p[done:], off+int64(done))
		done += n
		return err
	})
	return done, err
}

// Preallocate implements vfs.File. It is only a hint: with no space it does nothing.
func (s *steadyFile) Preallocate(off, length int64) error {
	if err := s.File.Preallocate(off, length); err != nil && !NoSpace(err) {
		return err
	}
	return nil
}
