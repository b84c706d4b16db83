package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// deathNotice is how long a call that failed with Unavailable waits to learn whether its plugin died: the
// error and the exit notice race, within about 2 ms on an idle host.
const deathNotice = 250 * time.Millisecond

// method is what the proxies know of a contract's method besides its signature.
type method struct {
	op      string          // for errors: "storage.CreateVolume"
	once    bool            // not repeated when the plugin dies under it: what it did cannot be told
	feature service.Feature // the optional feature it belongs to, or 0
	extra   time.Duration   // what the request itself allows for, on top of CallTimeout
}

// call makes one call of the unit's service with the waiting, deadline and retry that package supervisor
// promises. fn gets the client as S.
func call[S, T any](ctx context.Context, p proxy, m method, fn func(ctx context.Context, s S) (T, error)) (T, error) {
	var zero T
	u := p.u
	if u == nil {
		return zero, opErr(m.op, notConfigured(p.kind))
	}
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, u.opt.CallTimeout+m.extra)
		defer cancel()
	}
	inst, err := u.acquire(ctx, nil)
	if err != nil {
		return zero, opErr(m.op, err)
	}
	out, err := on(ctx, u, inst, m, fn)
	if !died(ctx, err, inst) {
		return out, err
	}
	if m.once {
		return zero, u.lost(m.op, err)
	}
	next, aerr := u.acquire(ctx, inst)
	if aerr != nil {
		return zero, opErr(m.op, aerr)
	}
	out, err = on(ctx, u, next, m, fn)
	if died(ctx, err, next) {
		return zero, u.lost(m.op, err)
	}
	return out, err
}

// stream makes a streaming call: no deadline of ours, and no repetition once the callee has delivered
// something, which *delivered tells.
func stream[S any](ctx context.Context, p proxy, m method, delivered *bool, fn func(ctx context.Context, s S) error) error {
	u := p.u
	if u == nil {
		return opErr(m.op, notConfigured(p.kind))
	}
	var lost Instance
	for try := 0; ; try++ {
		inst, err := u.acquire(ctx, lost)
		if err != nil {
			return opErr(m.op, err)
		}
		_, err = on(ctx, u, inst, m, func(ctx context.Context, s S) (struct{}, error) { return struct{}{}, fn(ctx, s) })
		if !died(ctx, err, inst) {
			return err
		}
		if *delivered || m.once || try > 0 {
			return u.lost(m.op, err)
		}
		lost = inst
	}
}

func on[S, T any](ctx context.Context, u *unit, inst Instance, m method, fn func(ctx context.Context, s S) (T, error)) (T, error) {
	if info := inst.Info(); m.feature != 0 && !slices.Contains(info.Features, m.feature) {
		var zero T
		return zero, (&errs.Error{Op: m.op, Kind: errs.Unsupported, Reason: "FEATURE_MISSING", Resource: errs.Resource{Type: "plugin", Name: string(u.Kind)},
			Message: fmt.Sprintf("%s %s does not have this feature", info.Name, info.Version)})
	}
	s, ok := inst.Service().(S)
	if !ok {
		var zero T
		return zero, errs.New(errs.Internal, "the client of the %s plugin is a %T", u.Kind, inst.Service())
	}
	return fn(ctx, s)
}

// died tells whether a call failed because its instance is gone, giving the news a moment to arrive. A call
// that was about to begin when the connection was closed fails with Canceled though nobody cancelled it.
func died(ctx context.Context, err error, inst Instance) bool {
	if k := errs.KindOf(err); err == nil || k != errs.Unavailable && (k != errs.Canceled || ctx.Err() != nil) {
		return false
	}
	t := time.NewTimer(deathNotice)
	defer t.Stop()
	select {
	case <-inst.Exited():
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	return false
}

// acquire returns the running instance, another than not, waiting for it at most CallWait.
func (u *unit) acquire(ctx context.Context, not Instance) (Instance, error) {
	var timer <-chan time.Time
	for {
		u.mu.Lock()
		inst, changed, state, ending := u.inst, u.changed, u.state, u.ending
		u.mu.Unlock()
		if inst != nil && inst != not {
			select {
			case <-inst.Exited(): // dead, and the unit has not seen it yet
			default:
				return inst, nil
			}
		}
		if ending || state == StateQuarantined || state == StateStopped {
			return nil, u.down()
		}
		if timer == nil {
			t := time.NewTimer(u.opt.CallWait)
			defer t.Stop()
			timer = t.C
		}
		select {
		case <-changed:
		case <-timer:
			return nil, u.down()
		case <-ctx.Done():
			return nil, u.down()
		}
	}
}

// down is the error of a call that finds no plugin: what is wrong with it, and when trying again makes sense.
func (u *unit) down() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	e := &errs.Error{Kind: errs.Unavailable, Reason: "PLUGIN_DOWN", Resource: errs.Resource{Type: "plugin", Name: string(u.Kind)}}
	why := ""
	if u.failure != nil {
		why = ": " + u.failure.Error()
	}
	switch {
	case u.ending:
		e.Reason, e.Message, e.Remedy = "STOPPING", "mvirtd is stopping", "try again when mvirtd is back"
	case u.state == StateQuarantined:
		e.Reason = "PLUGIN_QUARANTINED"
		e.Message = fmt.Sprintf("it died %d times within %s and is only tried again in %s%s", u.QuarantineDeaths, quarantineWindow,
			max(0, time.Until(u.nextTry)).Round(time.Second), why)
		e.Remedy = joinRemedies(errs.RemedyOf(u.failure), u.restartRemedy())
	case u.state == StateWaiting && !u.nextTry.IsZero():
		e.Message = fmt.Sprintf("it is down, the next attempt to start it is in %s%s", max(0, time.Until(u.nextTry)).Round(10*time.Millisecond), why)
		e.Remedy = joinRemedies(errs.RemedyOf(u.failure), "try again; mvirt plugin show "+string(u.Kind)+" tells more")
	default:
		e.Message = fmt.Sprintf("it is %s and was not ready within %s%s", u.state, u.opt.CallWait, why)
		e.Remedy = "try again; mvirt plugin show " + string(u.Kind) + " tells more"
	}
	return e
}

// lost is the error of a call whose plugin died under it and that is not repeated.
func (u *unit) lost(op string, err error) error {
	return &errs.Error{Op: op, Kind: errs.Unavailable, Reason: "PLUGIN_DIED", Resource: errs.Resource{Type: "plugin", Name: string(u.Kind)},
		Message: "it died during the call; the object's state tells whether the change was made", Remedy: "look, then try again", Err: err}
}

// ready waits until the unit is up, quarantined, or ctx ends.
func (u *unit) ready(ctx context.Context) error {
	for {
		u.mu.Lock()
		state, changed := u.state, u.changed
		u.mu.Unlock()
		switch state {
		case StateUp:
			return nil
		case StateQuarantined, StateStopped:
			return u.down()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return u.down()
		}
	}
}

// opErr says which call an error of the supervisor itself belongs to.
func opErr(op string, err error) error {
	var e *errs.Error
	if errors.As(err, &e) && e.Op == "" {
		e.Op = op
	}
	return err
}
