package operation

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sync"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Action is how a step is done and undone. All functions must be harmless when repeated.
type Action struct {
	Do func(ctx context.Context, r *Run, args json.RawMessage) error
	// Undo takes back what Do did, or may have done in part. nil: there is nothing to take back.
	Undo func(ctx context.Context, r *Run, args json.RawMessage) error
	// Settled tells after a crash whether Do had its whole effect. nil: that cannot be told.
	Settled func(ctx context.Context, r *Run, args json.RawMessage) (bool, error)
}

// Typed makes an Action of functions that take their arguments as A. undo and settled may be nil.
func Typed[A any](do, undo func(ctx context.Context, r *Run, args A) error, settled func(ctx context.Context, r *Run, args A) (bool, error)) Action {
	wrap := func(fn func(context.Context, *Run, A) error) func(context.Context, *Run, json.RawMessage) error {
		if fn == nil {
			return nil
		}
		return func(ctx context.Context, r *Run, raw json.RawMessage) error {
			args, err := decode[A](raw)
			if err != nil {
				return err
			}
			return fn(ctx, r, args)
		}
	}
	a := Action{Do: wrap(do), Undo: wrap(undo)}
	if settled != nil {
		a.Settled = func(ctx context.Context, r *Run, raw json.RawMessage) (bool, error) {
			args, err := decode[A](raw)
			if err != nil {
				return false, err
			}
			return settled(ctx, r, args)
		}
	}
	return a
}

func decode[A any](raw json.RawMessage) (A, error) {
	var args A
	if err := json.Unmarshal(raw, &args); err != nil {
		return args, errs.Wrap(errs.Corrupt, err, "arguments of a journalled step")
	}
	return args, nil
}

// Run is what the steps of one run of an operation share. It is not journalled: after a crash it is empty,
// and Recovered is true.
type Run struct {
	ID        string // of the operation
	Recovered bool
	progress  func(phase string, done, total uint64)

	mu     sync.Mutex
	values map[string]any
	files  []*os.File
}

// Set keeps a value for later steps.
func (r *Run) Set(key string, v any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.values == nil {
		r.values = map[string]any{}
	}
	r.values[key] = v
}

// Value is a value that an earlier step, or the plan, has set; the zero T otherwise.
func Value[T any](r *Run, key string) (T, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.values[key].(T)
	return v, ok
}

// Close hands files over to be closed when the run ends.
func (r *Run) Close(files ...*os.File) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.files = append(r.files, files...)
}

// Progress says how far the step is.
func (r *Run) Progress(phase string, done, total uint64) {
	if r.progress != nil {
		r.progress(phase, done, total)
	}
}

func (r *Run) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	closeAll(r.files)
	r.files = nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// guard turns a panic of an action into an error: one bad step must not take the core down.
func guard(what string, fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errs.New(errs.Internal, "%s: panic: %s", what, fmt.Sprint(p))
		}
	}()
	return fn()
}
