package operation

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

// coreWait is how long an operation waits for one of the core itself (releasing what a guest that powered
// off had attached takes some milliseconds); preemptWait, how long kill waits for what it cancelled.
const (
	coreWait    = 10 * time.Second
	preemptWait = 30 * time.Second
)

// locks knows which operation holds which object. Engine.mu guards it.
type locks map[string][]*handle

// holdersLocked are the operations that stand in the way of want.
func (l locks) holdersLocked(want []Lock) (out []*handle) {
	for _, w := range want {
		for _, h := range l[w.Object] {
			if (!w.Shared || !h.sharesObject(w.Object)) && !slices.Contains(out, h) {
				out = append(out, h)
			}
		}
	}
	return out
}

func (l locks) takeLocked(h *handle) {
	for _, w := range h.op.Locks {
		l[w.Object] = append(l[w.Object], h)
	}
}

func (l locks) releaseLocked(h *handle) {
	for _, w := range h.op.Locks {
		rest := slices.DeleteFunc(l[w.Object], func(o *handle) bool { return o == h })
		if len(rest) == 0 {
			delete(l, w.Object)
		} else {
			l[w.Object] = rest
		}
	}
}

// sharesObject tells whether the operation holds the object only in shared locks. Locks never change.
func (h *handle) sharesObject(object string) bool {
	for _, w := range h.op.Locks {
		if w.Object == object && !w.Shared {
			return false
		}
	}
	return true
}

// lock takes all locks of h or none. It waits for operations of the core itself, and with preempt cancels
// those of others and waits for them.
func (e *Engine) lock(ctx context.Context, h *handle, preempt bool) error {
	limit := coreWait
	if preempt {
		limit = preemptWait
	}
	var timer <-chan time.Time
	for {
		e.mu.Lock()
		if e.closing {
			e.mu.Unlock()
			return errs.New(errs.Unavailable, "mvirtd is stopping").Because("STOPPING").Do("try again when it is back")
		}
		held := e.locks.holdersLocked(h.op.Locks)
		if len(held) == 0 {
			e.locks.takeLocked(h)
			e.live[h.op.ID] = h
			e.mu.Unlock()
			return nil
		}
		e.mu.Unlock()
		other := held[0]
		switch {
		case other.op.Who.Core && !h.op.Who.Core, preempt:
			if preempt {
				for _, o := range held {
					o.cancel(errs.New(errs.Canceled, "operation %s (%s) took over", h.op.ID, h.op.Title))
				}
			}
		default:
			return busy(other)
		}
		if timer == nil {
			t := time.NewTimer(limit)
			defer t.Stop()
			timer = t.C
		}
		select {
		case <-other.ended:
		case <-timer:
			return busy(other)
		case <-ctx.Done():
			return errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "while waiting for operation %s (%s)", other.op.ID, other.op.Title)
		}
	}
}

func busy(other *handle) error {
	o := other.snapshot()
	return errs.New(errs.Conflict, "operation %s (%s, asked for by %s) works on it%s", o.ID, o.Title, o.Who, phaseWords(o)).
		Because("OPERATION_RUNNING").Do(fmt.Sprintf("wait for it (mvirt operation watch %s) or cancel it (mvirt operation cancel %s), then try again", o.ID, o.ID))
}

func phaseWords(o Operation) string {
	if p := strings.TrimSpace(o.Phase); p != "" {
		return ": " + p
	}
	return ""
}
