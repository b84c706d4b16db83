package steadyfs

import (
	"io"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// meagre is a file whose writes find space for a few bytes at a time.
type meagre struct {
	vfs.File
	room *atomic.Int64
}

func (m meagre) Write(p []byte) (int, error) {
	n := min(int64(len(p)), m.room.Swap(0))
	if n == 0 {
		return 0, syscall.ENOSPC
	}
	w, err := m.File.Write(p[:n])
	if err == nil && w < len(p) {
		err = syscall.ENOSPC
	}
	return w, err
}

type meagreFS struct {
	vfs.FS
	room *atomic.Int64
}

func (m meagreFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := m.FS.Create(name, c)
	return meagre{f, m.room}, err
}

func TestWaitsForSpace(t *testing.T) {
	var room atomic.Int64
	mem := vfs.NewMem()
	var told []bool
	done := make(chan struct{})
	fs := New(meagreFS{mem, &room}, time.Microsecond, done, func(full bool) { told = append(told, full) })
	// Each try finds three bytes more.
	fs.wait = func() bool { room.Store(3); return true }
	f, err := fs.Create("/x", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.Write([]byte("hello, world")); n != 12 || err != nil {
		t.Fatal(n, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := mem.Open("/x")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); string(b) != "hello, world" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	if len(told) != 2 || !told[0] || told[1] {
		t.Fatalf("told %v", told)
	}
}

func TestGivesUpWhenClosed(t *testing.T) {
	var room atomic.Int64
	done := make(chan struct{})
	close(done)
	fs := New(meagreFS{vfs.NewMem(), &room}, time.Hour, done, func(bool) {})
	f, err := fs.Create("/x", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write([]byte("x")); !NoSpace(err) {
		t.Fatal(err)
	}
}
