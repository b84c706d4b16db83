package filecopy

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

func files(t *testing.T) (src, dst *os.File) {
	t.Helper()
	dir := t.TempDir()
	for _, p := range []**os.File{&src, &dst} {
		f, err := os.CreateTemp(dir, "f")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		*p = f
	}
	return src, dst
}

// guest is a context under which src is written to at each look at it, a given number of times.
type guest struct {
	context.Context
	src    *os.File
	writes int
	at     int64
}

func (g *guest) Err() error {
	if g.writes != 0 {
		g.writes--
		g.at += 4096
		g.src.WriteAt([]byte("guest"), g.at)
	}
	return g.Context.Err()
}

func TestCopyIsSparse(t *testing.T) {
	src, dst := files(t)
	src.WriteAt([]byte("begin"), 0)
	src.WriteAt([]byte("end"), 80<<20)
	src.Truncate(100 << 20)
	if err := New().Copy(t.Context(), dst, src, false); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(src.Name())
	b, _ := os.ReadFile(dst.Name())
	if !bytes.Equal(a, b) || len(b) != 100<<20 {
		t.Error("the copy differs")
	}
}

// TestCopyUnderWrites: on a file system without reflinks a copy is of one moment, or there is none.
func TestCopyUnderWrites(t *testing.T) {
	src, dst := files(t)
	src.WriteAt(bytes.Repeat([]byte("x"), 1<<20), 0)
	if shared, _ := Reflink(dst, src); shared {
		t.Skip("the file system here has reflinks")
	}
	dst.Truncate(0)
	c := New()
	if err := c.Copy(&guest{Context: t.Context(), src: src, writes: -1}, dst, src, true); !errors.Is(err, errs.Precondition) || errs.RemedyOf(err) == "" {
		t.Fatalf("a guest that writes all the time: %v", err)
	}
	// One that pauses is caught in its pause.
	dst.Truncate(0)
	if err := c.Copy(&guest{Context: t.Context(), src: src, writes: 1, at: 1 << 19}, dst, src, true); err != nil {
		t.Fatal(err)
	}
	a, _ := os.ReadFile(src.Name())
	b, _ := os.ReadFile(dst.Name())
	if !bytes.Equal(a, b) {
		t.Error("the copy is torn")
	}
}

func TestWaitsForTheClock(t *testing.T) {
	src, dst := files(t)
	src.WriteAt([]byte("x"), 0)
	if shared, _ := Reflink(dst, src); shared {
		t.Skip("the file system here has reflinks")
	}
	var slept time.Duration
	st, _ := src.Stat()
	now := st.ModTime().Add(time.Millisecond)
	c := &Copier{Now: func() time.Time { return now }, Sleep: func(_ context.Context, d time.Duration) error {
		slept += d
		now = now.Add(d)
		return nil
	}}
	if err := c.Copy(t.Context(), dst, src, true); err != nil || slept != settled-time.Millisecond {
		t.Errorf("%v, slept %v", err, slept)
	}
}

func TestCancel(t *testing.T) {
	src, dst := files(t)
	src.WriteAt([]byte("x"), 0)
	if shared, _ := Reflink(dst, src); shared {
		t.Skip("the file system here has reflinks")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := New().Copy(ctx, dst, src, false); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
