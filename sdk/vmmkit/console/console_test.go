package console

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func open(t *testing.T) (*Log, string) {
	t.Helper()
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "console.log")
	l := NewLog(w, path)
	if err := l.SetLive(true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(l.Close(), w.Close()); err != nil {
			t.Error(err)
		}
	})
	return l, path
}

// viewer collects what a session shows.
type viewer struct {
	mu   sync.Mutex
	got  bytes.Buffer
	news chan struct{}
}

func newViewer() *viewer { return &viewer{news: make(chan struct{}, 1)} }

func (v *viewer) out(b []byte) error {
	v.mu.Lock()
	v.got.Write(b)
	v.mu.Unlock()
	select {
	case v.news <- struct{}{}:
	default:
	}
	return nil
}

func (v *viewer) until(t *testing.T, s string) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		v.mu.Lock()
		ok := strings.Contains(v.got.String(), s)
		v.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-v.news:
		case <-deadline:
			t.Fatalf("never saw %q", s)
		}
	}
}

// The hypervisor writes the file, we only learn of it.
func TestFollowWhatAnotherWrites(t *testing.T) {
	l, path := open(t)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("before "); err != nil {
		t.Fatal(err)
	}
	v := newViewer()
	done := make(chan error, 1)
	go func() { done <- l.Read(nil, 1000, true, v.out) }()
	v.until(t, "before ")
	if _, err := f.WriteString("after"); err != nil {
		t.Fatal(err)
	}
	v.until(t, "before after")
	if _, err := f.WriteString(" last"); err != nil {
		t.Fatal(err)
	}
	if err := l.SetLive(false); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, io.EOF) {
		t.Errorf("end: %v, want EOF", err)
	}
	v.until(t, "before after last")
}

func TestReplay(t *testing.T) {
	l, _ := open(t)
	if err := l.Append([]byte("0123456789")); err != nil {
		t.Fatal(err)
	}
	for replay, want := range map[int64]string{0: "", 3: "789", 10: "0123456789", 1 << 40: "0123456789", -1: ""} {
		v := newViewer()
		if err := l.Read(nil, replay, false, v.out); !errors.Is(err, io.EOF) || v.got.String() != want {
			t.Errorf("replay %d: %q, %v", replay, v.got.String(), err)
		}
	}
}

// The file stays small on disk whatever the guest prints, also over a restart, and the latest is readable.
func TestBounded(t *testing.T) {
	w, err := NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	path := filepath.Join(t.TempDir(), "console.log")
	l := NewLog(w, path)
	if err := l.SetLive(true); err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 10 << 10 { // 10 MiB
		if err := l.Append(line); err != nil {
			t.Fatal(err)
		}
	}
	disk := func() int64 {
		out, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return blocks(out) * 512
	}
	if d := disk(); d > 3*Keep {
		t.Errorf("%d bytes on disk, want at most %d", d, 3*Keep)
	}
	start, size := l.bounds()
	if size-start < Keep {
		t.Errorf("only %d bytes are readable", size-start)
	}
	l.Close()
	l = NewLog(w, path)
	if err := l.SetLive(true); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if s, e := l.bounds(); s < start || e != size {
		t.Errorf("reopened: %d to %d, before %d to %d", s, e, start, size)
	}
	v := newViewer()
	if err := l.Read(nil, 1<<40, false, v.out); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if bytes.ContainsRune(v.got.Bytes(), 0) {
		t.Error("the hole shows")
	}
}

// recorder is a serial port.
type recorder struct {
	mu   sync.Mutex
	got  bytes.Buffer
	news chan string
}

func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got.Write(b)
	r.news <- r.got.String()
	return len(b), nil
}
func (*recorder) Close() error { return nil }

func TestWriterAndSteal(t *testing.T) {
	l, _ := open(t)
	c := New(l)
	port := &recorder{news: make(chan string, 10)}
	if err := c.Attach(func(context.Context) (io.WriteCloser, error) { return port, nil }); err != nil {
		t.Fatal(err)
	}

	in1, in2 := make(chan []byte), make(chan []byte)
	end1, end2 := make(chan error, 1), make(chan error, 1)
	v := newViewer()
	go func() { end1 <- c.Session(t.Context(), vmm.ConsoleRequest{}, vmm.ConsoleIO{In: in1, Out: v.out}) }()
	in1 <- []byte("one")
	if got := <-port.news; got != "one" {
		t.Errorf("port got %q", got)
	}
	err := c.Session(t.Context(), vmm.ConsoleRequest{}, vmm.ConsoleIO{In: in2, Out: v.out})
	if !errors.Is(err, errs.Conflict) || errs.ReasonOf(err) != "CONSOLE_IN_USE" {
		t.Errorf("second writer: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { end2 <- c.Session(ctx, vmm.ConsoleRequest{Steal: true}, vmm.ConsoleIO{In: in2, Out: v.out}) }()
	if err := <-end1; errs.ReasonOf(err) != "CONSOLE_STOLEN" {
		t.Errorf("first writer's end: %v", err)
	}
	in2 <- []byte(" two")
	if got := <-port.news; got != "one two" {
		t.Errorf("port got %q", got)
	}

	// In closed: a watcher from now on, until the VM stops.
	cancel()
	if err := <-end2; !errors.Is(err, context.Canceled) {
		t.Errorf("second writer's end: %v", err)
	}
	in3 := make(chan []byte)
	end3 := make(chan error, 1)
	go func() {
		end3 <- c.Session(t.Context(), vmm.ConsoleRequest{Replay: 100}, vmm.ConsoleIO{In: in3, Out: v.out})
	}()
	close(in3)
	if err := l.Append([]byte("still here")); err != nil {
		t.Fatal(err)
	}
	v.until(t, "still here")
	c.Detach()
	if err := <-end3; !errors.Is(err, io.EOF) {
		t.Errorf("end with the VM: %v", err)
	}
}

func TestSlowViewerIsTold(t *testing.T) {
	l, _ := open(t)
	first := make(chan struct{})
	goOn := make(chan struct{})
	var got bytes.Buffer
	done := make(chan error, 1)
	go func() {
		done <- l.Read(nil, 10, true, func(b []byte) error {
			if got.Len() == 0 {
				close(first)
				<-goOn
			}
			got.Write(b)
			return nil
		})
	}()
	if err := l.Append([]byte("a")); err != nil {
		t.Fatal(err)
	}
	<-first
	for range 80 {
		if err := l.Append(bytes.Repeat([]byte("b"), 64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.SetLive(false); err != nil {
		t.Fatal(err)
	}
	close(goOn)
	if err := <-done; !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if !strings.Contains(got.String(), "too fast for this viewer") {
		t.Error("the gap is not told")
	}
}

// TestTypedThenGone: the user's session ends at once after the last key, while the way to the VM is still being
// opened; what was typed arrives nevertheless.
func TestTypedThenGone(t *testing.T) {
	l, _ := open(t)
	c := New(l)
	port := &recorder{news: make(chan string, 10)}
	gone := make(chan struct{})
	err := c.Attach(func(ctx context.Context) (io.WriteCloser, error) {
		<-gone
		return port, ctx.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 50 { // the order in which the end and the rest of the input are seen is a matter of chance
		gone = make(chan struct{})
		port.got.Reset()
		in := make(chan []byte, 2)
		ctx, cancel := context.WithCancel(t.Context())
		end := make(chan error, 1)
		go func() {
			end <- c.Session(ctx, vmm.ConsoleRequest{}, vmm.ConsoleIO{In: in, Out: newViewer().out})
		}()
		in <- []byte("one")
		in <- []byte(" two")
		cancel()
		close(gone)
		if err := <-end; !errors.Is(err, context.Canceled) {
			t.Fatalf("the session ended with %v", err)
		}
		<-port.news
		if got := <-port.news; got != "one two" {
			t.Fatalf("port got %q", got)
		}
	}
}
