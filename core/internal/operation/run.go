package operation

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

// forward does the steps from i on.
func (h *handle) forward(i int) {
	e := h.e
	for ; i < len(h.op.Steps); i++ {
		step := h.op.Steps[i]
		h.update(func(op *Operation) { op.Phase, op.Done, op.Total = step.Title, uint64(i), uint64(len(op.Steps)) })
		h.tell()
		err := h.do(i)
		if e.base.Err() != nil {
			return // abandoned: the journal says that this step was begun
		}
		if err != nil {
			if h.op.Mode == Undo {
				h.fail(i, err)
				return
			}
			if !h.passOver(i, err) {
				return
			}
		} else {
			h.update(func(op *Operation) { op.Steps[i].State = Did })
		}
		if i+1 == len(h.op.Steps) {
			break
		}
		h.update(func(op *Operation) { op.Steps[i+1].State = Doing })
		if err := e.put(h); err != nil {
			h.update(func(op *Operation) { op.Steps[i+1].State = Pending })
			h.journalFailed(err)
			return
		}
		if h.op.Mode == Undo && h.ctx.Err() != nil {
			h.update(func(op *Operation) { op.Steps[i+1].State = Pending })
			h.fail(i+1, context.Cause(h.ctx))
			return
		}
	}
	if h.op.Failure != nil {
		h.finish(Failed)
		return
	}
	h.finish(Done)
}

// do does one step. In Finish, after the first step, it waits for a plugin that is away.
func (h *handle) do(i int) error {
	step := h.op.Steps[i]
	ctx := h.ctx
	if h.op.Mode == Finish && (h.op.did() > 0 || h.op.Recovered) {
		ctx = h.e.base // past the point of return
	}
	for n := 0; ; n++ {
		err := guard(step.Title, func() error { return h.e.opt.Actions[step.Action].Do(ctx, h.run, step.Args) })
		if err != nil && h.ctx.Err() != nil && ctx == h.ctx && (errors.Is(err, errs.Canceled) || errors.Is(err, context.Canceled)) {
			return context.Cause(h.ctx)
		}
		if err == nil || ctx == h.ctx || errs.KindOf(err) != errs.Unavailable {
			return err
		}
		h.goBehind(err)
		if !h.waitPlugin(n, err) {
			return err
		}
	}
}

// passOver decides in Finish what follows a failed step; true: go on with the next.
func (h *handle) passOver(i int, err error) bool {
	step := h.op.Steps[i]
	if h.op.did() == 0 && !h.op.Recovered && !step.BestEffort {
		h.fail(i, err) // nothing has been done: a plain refusal, nothing to undo
		return false
	}
	h.e.opt.Log.Warn("a step failed", "operation", h.op.ID, "step", step.Title, "error", err)
	h.update(func(op *Operation) {
		op.Steps[i].State = Stuck
		op.Left = append(op.Left, fmt.Sprintf("%s (%v)", step.Title, err))
		if op.Failure == nil {
			op.Failure = newFailure(err)
		}
	})
	if step.BestEffort {
		return true
	}
	h.update(func(op *Operation) {
		for _, s := range op.Steps[i+1:] {
			op.Left = append(op.Left, s.Title)
		}
	})
	h.finish(Failed)
	return false
}

// fail begins to undo after step i failed with err.
func (h *handle) fail(i int, err error) {
	h.update(func(op *Operation) {
		op.State, op.Failure = Undoing, newFailure(err)
		if op.Steps[i].State == Doing && hadNoEffect(err) {
			op.Steps[i].State = Refused
		}
	})
	if perr := h.e.put(h); perr != nil { // the journal still says that it runs, and would be undone from there
		h.e.opt.Log.Error("the failure of an operation is not in the journal", "operation", h.op.ID, "error", perr)
	}
	h.tell()
	h.undo()
}

func (h *handle) journalFailed(err error) {
	if h.op.Mode == Undo {
		h.update(func(op *Operation) { op.State, op.Failure = Undoing, newFailure(err) })
		h.undo()
		return
	}
	h.update(func(op *Operation) {
		op.Failure = newFailure(err)
		for _, s := range op.Steps {
			if s.State == Pending {
				op.Left = append(op.Left, s.Title)
			}
		}
	})
	h.finish(Failed)
}

// hadNoEffect tells whether an error of this kind says that nothing was changed. The contracts promise it
// for these kinds; of the others the change may have been made before the answer was lost.
func hadNoEffect(err error) bool {
	switch errs.KindOf(err) {
	case errs.Invalid, errs.NotFound, errs.Exists, errs.Precondition, errs.Conflict, errs.Exhausted, errs.Unsupported, errs.Denied, errs.OutOfRange, errs.Unauthorized:
		return true
	}
	return false
}

// undo undoes all steps that were begun, newest first, and ends the operation.
func (h *handle) undo() {
	e := h.e
	for i := len(h.op.Steps) - 1; i >= 0; i-- {
		step := h.op.Steps[i]
		if step.State != Doing && step.State != Did {
			continue
		}
		action := e.opt.Actions[step.Action]
		if action.Undo == nil {
			continue
		}
		h.update(func(op *Operation) { op.Phase = "undo: " + step.Title })
		h.tell()
		err := h.undoStep(step, action)
		if e.base.Err() != nil {
			return
		}
		h.update(func(op *Operation) {
			if err != nil {
				op.Steps[i].State = Stuck
				op.Left = append(op.Left, fmt.Sprintf("%s (%v)", step.Title, err))
				return
			}
			op.Steps[i].State = Undone
			if step.UndoneBy != "" {
				op.Undone = append(op.Undone, step.UndoneBy)
			}
		})
		if err != nil {
			e.opt.Log.Error("a step could not be undone", "operation", h.op.ID, "step", step.Title, "error", err)
		}
		if err := e.put(h); err != nil {
			e.opt.Log.Error("an undone step is not in the journal", "operation", h.op.ID, "error", err)
		}
	}
	if h.op.Failure != nil && h.op.Failure.Kind == errs.Canceled {
		h.finish(Canceled)
		return
	}
	h.finish(Failed)
}

func (h *handle) undoStep(step Step, action Action) error {
	for n, tries := 0, 0; ; n++ {
		ctx, cancel := context.WithTimeout(h.e.base, stepTimeout)
		err := guard("undo: "+step.Title, func() error { return action.Undo(ctx, h.run, step.Args) })
		cancel()
		switch {
		case err == nil, errors.Is(err, errs.NotFound): // gone is gone
			return nil
		case errs.KindOf(err) == errs.Unavailable:
			h.goBehind(err)
		default:
			if tries++; tries >= undoTries {
				return err
			}
		}
		if !h.waitPlugin(n, err) {
			return err
		}
	}
}

// waitPlugin waits until a plugin came up or it is time to try again; false: the engine is abandoned.
func (h *handle) waitPlugin(n int, why error) bool {
	e := h.e
	e.mu.Lock()
	kicked := e.kicked
	e.mu.Unlock()
	h.e.opt.Log.Warn("an operation waits", "operation", h.op.ID, "title", h.op.Title, "error", why)
	t := time.NewTimer(e.opt.Backoff(n))
	defer t.Stop()
	select {
	case <-kicked:
	case <-t.C:
	case <-e.base.Done():
		return false
	}
	return e.base.Err() == nil
}
