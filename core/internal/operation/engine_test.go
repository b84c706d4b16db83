package operation_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
)

// bench is an engine with one action that waits to be told what to do.
type bench struct {
	t *testing.T
	e *operation.Engine

	mu     sync.Mutex
	begun  []string
	undone []string
	gates  map[string]chan error // by argument: what Do returns
	start  chan string
}

func newBench(t *testing.T, path string) *bench {
	b := &bench{t: t, gates: map[string]chan error{}, start: make(chan string, 100)}
	wait := operation.Typed(
		func(ctx context.Context, _ *operation.Run, name string) error {
			b.mu.Lock()
			b.begun = append(b.begun, name)
			gate := b.gates[name]
			b.mu.Unlock()
			b.start <- name
			if gate == nil {
				return nil
			}
			select {
			case err := <-gate:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		},
		func(_ context.Context, _ *operation.Run, name string) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.undone = append(b.undone, name)
			return nil
		}, nil)
	panics := operation.Action{Do: func(context.Context, *operation.Run, json.RawMessage) error { panic("boom") }}
	e, err := operation.Open(operation.Options{Path: path, Actions: map[string]operation.Action{"wait": wait, "panic": panics},
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Backoff: func(int) time.Duration { return time.Millisecond }})
	if err != nil {
		t.Fatal(err)
	}
	b.e = e
	return b
}

func (b *bench) gate(name string) chan error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gates[name] = make(chan error, 1)
	return b.gates[name]
}

func thePlan(title string, mode operation.Mode, lock string, shared bool, steps ...string) operation.Plan {
	p := operation.Plan{Type: "test", Title: title, Mode: mode, Locks: []operation.Lock{{Object: lock, Shared: shared}}, Who: operation.Who{Name: "anna", UID: 7}}
	for _, s := range steps {
		p.Steps = append(p.Steps, operation.NewStep("wait", "step "+s, "undid "+s, s))
	}
	return p
}

func TestConflictNamesTheOther(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	g := b.gate("a")
	first, err := b.e.Start(t.Context(), thePlan("first", operation.Undo, "vm:1", false, "a"))
	if err != nil {
		t.Fatal(err)
	}
	<-b.start
	_, err = b.e.Do(t.Context(), thePlan("second", operation.Undo, "vm:1", false, "b"))
	if !errors.Is(err, errs.Conflict) || !strings.Contains(err.Error(), first.ID) || !strings.Contains(err.Error(), "first") || !strings.Contains(errs.RemedyOf(err), first.ID) {
		t.Errorf("%v (%s)", err, errs.RemedyOf(err))
	}
	if b.e.On("vm:1") != first.ID {
		t.Error("On does not know it")
	}
	if _, err := b.e.Do(t.Context(), thePlan("other object", operation.Undo, "vm:2", false, "c")); err != nil {
		t.Error(err)
	}
	g <- nil
	if err := b.e.Watch(t.Context(), first.ID, func(operation.Operation) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

func TestSharedLocks(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	g := b.gate("a")
	if _, err := b.e.Start(t.Context(), thePlan("reader", operation.Undo, "template:1", true, "a")); err != nil {
		t.Fatal(err)
	}
	if _, err := b.e.Do(t.Context(), thePlan("another reader", operation.Undo, "template:1", true, "b")); err != nil {
		t.Errorf("shared locks exclude each other: %v", err)
	}
	if _, err := b.e.Do(t.Context(), thePlan("writer", operation.Undo, "template:1", false, "c")); !errors.Is(err, errs.Conflict) {
		t.Errorf("a writer gets in: %v", err)
	}
	g <- nil
}

func TestWaitsForTheCore(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	g := b.gate("release")
	p := thePlan("release", operation.Finish, "vm:1", false, "release")
	p.Who = operation.Who{Name: "core", Core: true}
	if _, err := b.e.Start(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	<-b.start
	done := make(chan error, 1)
	go func() {
		_, err := b.e.Do(t.Context(), thePlan("start", operation.Undo, "vm:1", false, "s"))
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("it does not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	g <- nil
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestPreempt(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	b.gate("hangs")
	started := make(chan error, 1)
	go func() {
		_, err := b.e.Do(t.Context(), thePlan("start", operation.Undo, "vm:1", false, "attach", "hangs"))
		started <- err
	}()
	<-b.start
	<-b.start
	kill := thePlan("kill", operation.Finish, "vm:1", false, "kill")
	kill.Preempt = true
	if _, err := b.e.Do(t.Context(), kill); err != nil {
		t.Fatal(err)
	}
	if err := <-started; !errors.Is(err, errs.Canceled) || !strings.Contains(err.Error(), "kill") {
		t.Errorf("the operation that was taken over: %v", err)
	}
	if got := strings.Join(b.undone, " "); got != "hangs attach" {
		t.Errorf("undone: %s", got)
	}
}

func TestCancel(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	who := operation.Who{Name: "bob", UID: 8, PID: 9}

	b.gate("u2")
	op, err := b.e.Start(t.Context(), thePlan("undoable", operation.Undo, "a", false, "u1", "u2", "u3"))
	if err != nil {
		t.Fatal(err)
	}
	<-b.start
	<-b.start
	if _, err := b.e.Cancel(op.ID, who); err != nil {
		t.Fatal(err)
	}
	var last operation.Operation
	b.e.Watch(t.Context(), op.ID, func(o operation.Operation) error { last = o; return nil })
	if last.State != operation.Canceled || !strings.Contains(last.Err().Error(), "cancelled by bob (uid 8, pid 9)") || strings.Join(last.Undone, ",") != "undid u2,undid u1" {
		t.Errorf("%s: %v, undone %q", last.State, last.Err(), last.Undone)
	}

	g := b.gate("f2")
	op, err = b.e.Start(t.Context(), thePlan("past return", operation.Finish, "b", false, "f1", "f2"))
	if err != nil {
		t.Fatal(err)
	}
	<-b.start
	<-b.start
	if _, err := b.e.Cancel(op.ID, who); !errors.Is(err, errs.Precondition) {
		t.Errorf("cancelled past the point of return: %v", err)
	}
	g <- nil
	b.e.Watch(t.Context(), op.ID, func(o operation.Operation) error { last = o; return nil })
	if last.State != operation.Done {
		t.Errorf("%s", last.State)
	}
	if _, err := b.e.Cancel(op.ID, who); err != nil {
		t.Errorf("cancel of what has ended: %v", err)
	}
	if _, err := b.e.Cancel("none", who); !errors.Is(err, errs.NotFound) {
		t.Errorf("cancel of nothing: %v", err)
	}
}

func TestCallerGoesAway(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	b.gate("slow")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan operation.Operation, 1)
	go func() {
		op, _ := b.e.Do(ctx, thePlan("undoable", operation.Undo, "a", false, "slow"))
		done <- op
	}()
	<-b.start
	cancel()
	op := <-done
	var last operation.Operation
	b.e.Watch(t.Context(), op.ID, func(o operation.Operation) error { last = o; return nil })
	if last.State != operation.Canceled {
		t.Errorf("%s", last.State)
	}
}

func TestPanicInAStep(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	p := thePlan("panics", operation.Undo, "a", false, "one")
	p.Steps = append(p.Steps, operation.NewStep("panic", "panic", "", ""))
	_, err := b.e.Do(t.Context(), p)
	if !errors.Is(err, errs.Internal) || !strings.Contains(err.Error(), "boom") || len(b.undone) != 1 {
		t.Errorf("%v, undone %v", err, b.undone)
	}
}

func TestAdmitAndFiles(t *testing.T) {
	dir := t.TempDir()
	e, err := operation.Open(operation.Options{Path: filepath.Join(dir, "j"), Actions: map[string]operation.Action{"wait": {}},
		Admit: func() error { return errs.New(errs.Unavailable, "full") }})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close(context.Background())
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	p := thePlan("refused", operation.Undo, "a", false, "x")
	p.Files = []*os.File{f}
	if _, err := e.Do(t.Context(), p); !errors.Is(err, errs.Unavailable) {
		t.Errorf("%v", err)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Error("the file of a refused operation stays open")
	}
}

func TestJournalFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	b := newBench(t, path)
	if _, err := operation.Open(operation.Options{Path: path}); !errors.Is(err, errs.Precondition) {
		t.Errorf("opened twice: %v", err)
	}
	if _, err := b.e.Do(t.Context(), thePlan("one", operation.Undo, "a", false, "x")); err != nil {
		t.Fatal(err)
	}
	if err := b.e.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := b.e.Do(t.Context(), thePlan("late", operation.Undo, "a", false, "x")); !errors.Is(err, errs.Unavailable) {
		t.Errorf("after close: %v", err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", st.Mode(), err)
	}
	b = newBench(t, path)
	found, err := b.e.Recover(t.Context())
	if err != nil || len(found) != 0 {
		t.Errorf("%v %v", found, err)
	}
	if all := b.e.List(true); len(all) != 1 || all[0].State != operation.Done || all[0].Title != "one" {
		t.Errorf("%+v", all)
	}
	b.e.Close(context.Background())
	if err := os.WriteFile(path, []byte("not a database at all, but long enough to look like one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := operation.Open(operation.Options{Path: path}); !errors.Is(err, errs.Corrupt) || errs.RemedyOf(err) == "" {
		t.Errorf("a damaged journal: %v", err)
	}
}

// TestManyEnd sees that ended operations are kept, but not for ever.
func TestManyEnd(t *testing.T) {
	b := newBench(t, filepath.Join(t.TempDir(), "j"))
	defer b.e.Close(context.Background())
	b.start = make(chan string, 5000)
	e, err := operation.OpenWith(operation.Options{Path: filepath.Join(t.TempDir(), "j2"), Actions: map[string]operation.Action{
		"wait": {Do: func(context.Context, *operation.Run, json.RawMessage) error { return nil }}}}, func(string, bool) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	for range 1500 {
		if _, err := e.Do(t.Context(), thePlan("x", operation.Undo, "a", false, "x")); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(e.List(true)); n < 1000 || n > 1100 {
		t.Errorf("%d are kept", n)
	}
	e.Close(context.Background())
}

func BenchmarkOperation(b *testing.B) {
	e, err := operation.Open(operation.Options{Path: filepath.Join(b.TempDir(), "j"), Actions: map[string]operation.Action{
		"wait": {Do: func(context.Context, *operation.Run, json.RawMessage) error { return nil }}}})
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close(context.Background())
	for b.Loop() {
		if _, err := e.Do(b.Context(), thePlan("x", operation.Undo, "a", false, "x", "y", "z")); err != nil {
			b.Fatal(err)
		}
	}
}
