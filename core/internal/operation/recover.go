package operation

import (
	"context"
	"slices"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Recover reads the journal, takes the locks of operations that had not ended, and finishes or undoes them
// in the background, newest first, as soon as the plugins that they need answer. It returns what it found.
// Call it once, before the first [Engine.Do].
func (e *Engine) Recover(ctx context.Context) ([]Operation, error) {
	ops, err := e.store.load()
	if err != nil {
		return nil, err
	}
	var unaudited []*Operation
	var open []*handle
	e.mu.Lock()
	for _, op := range ops {
		if op.State.Final() {
			if !op.Audited {
				unaudited = append(unaudited, op)
			}
			e.past = append(e.past, *op)
			continue
		}
		op.Recovered = true
		h := e.newHandle(*op, nil)
		e.locks.takeLocked(h)
		e.live[op.ID] = h
		open = append(open, h)
	}
	old := e.pruneLocked()
	e.mu.Unlock()

	for _, op := range unaudited {
		if e.opt.Ended == nil {
			break
		}
		if err := e.opt.Ended(ctx, *op); err != nil {
			return nil, err
		}
		op.Audited = true
		if err := e.store.put(op); err != nil {
			return nil, err
		}
		e.mu.Lock()
		for i := range e.past {
			if e.past[i].ID == op.ID {
				e.past[i].Audited = true
			}
		}
		e.mu.Unlock()
	}
	if len(old) > 0 {
		if err := e.store.remove(old...); err != nil {
			return nil, err
		}
	}
	var found []Operation
	slices.Reverse(open) // newest first: a later operation may build on what an earlier one made
	for _, h := range open {
		found = append(found, h.snapshot())
	}
	if len(open) > 0 {
		e.tasks.Go(func() {
			for _, h := range open {
				h.recover()
				if e.base.Err() != nil {
					return
				}
			}
		})
	}
	return found, nil
}

// recover settles one operation that the last run of the core left behind.
func (h *handle) recover() {
	e := h.e
	op := h.snapshot()
	e.opt.Log.Info("settling an operation that the core left behind", "operation", op.ID, "title", op.Title, "mode", op.Mode)
	for i, s := range op.Steps {
		if _, known := e.opt.Actions[s.Action]; !known {
			h.update(func(op *Operation) {
				op.Failure = newFailure(errs.New(errs.Internal, "step %q of the journal is of a kind that this mvirtd does not know (%s)", s.Title, s.Action))
				op.Steps[i].State = Stuck
				op.Left = append(op.Left, s.Title)
			})
			h.finish(Failed)
			return
		}
	}
	if op.State == Undoing {
		h.undo()
		return
	}
	next := 0
	for next < len(op.Steps) && (op.Steps[next].State == Did || op.Steps[next].State == Stuck) {
		next++
	}
	if op.Mode == Finish {
		h.forward(next)
		return
	}
	last := len(op.Steps) - 1
	if next == last && op.Steps[last].State == Doing {
		ok := h.settled(last)
		if e.base.Err() != nil {
			return
		}
		if ok {
			h.update(func(op *Operation) { op.Steps[last].State = Did })
			h.finish(Done)
			return
		}
	}
	err := errs.New(errs.Internal, "the core ended in the middle of it").Because("CORE_ENDED").Do("try again")
	h.update(func(op *Operation) { op.State, op.Failure = Undoing, newFailure(err) })
	if err := e.put(h); err != nil {
		e.opt.Log.Error("journal", "operation", op.ID, "error", err)
	}
	h.undo()
}

// settled asks whether the step had its whole effect; it waits for a plugin that is away.
func (h *handle) settled(i int) bool {
	step := h.op.Steps[i]
	fn := h.e.opt.Actions[step.Action].Settled
	if fn == nil {
		return false
	}
	for n := 0; ; n++ {
		var ok bool
		ctx, cancel := context.WithTimeout(h.e.base, stepTimeout)
		err := guard(step.Title, func() (err error) { ok, err = fn(ctx, h.run, step.Args); return err })
		cancel()
		if err == nil {
			return ok
		}
		if errs.KindOf(err) != errs.Unavailable {
			h.e.opt.Log.Warn("it cannot be told whether a step was done; it is undone", "operation", h.op.ID, "step", step.Title, "error", err)
			return false
		}
		h.goBehind(err)
		if !h.waitPlugin(n, err) {
			return false
		}
	}
}
