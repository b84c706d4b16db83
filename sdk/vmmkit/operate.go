package vmmkit

import (
	"context"
	"errors"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// Reasons of states, as users read them.
const (
	reasonStopped  = "stopped on request"
	reasonForced   = "stopped by force: the guest did not power off in time"
	reasonKilled   = "killed on request"
	reasonGuestOff = "guest powered off"
	reasonPanicked = "guest panicked"
)

// condNoAnswer is the condition of a hypervisor that does not answer.
const condNoAnswer = "HYPERVISOR_NO_ANSWER"

// condOrphan is the condition of a hypervisor of which nothing is known.
const condOrphan = "ORPHAN_HYPERVISOR"

// event takes what a hypervisor tells. It does not wait for anything.
func (v *machine) event(r *run, l *link, e Event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.run != r {
		return
	}
	switch e.Kind {
	case EventOff:
		l.off = true
		if r.inst != nil {
			v.guestOffLocked(r)
		}
	case EventReset:
		if v.reason == reasonPanicked {
			v.reason = ""
		}
		v.publishLocked(vmm.EventRebooted)
	case EventPanic:
		v.reason = reasonPanicked
		if !v.m.hub.watched() {
			v.m.audit(v.id, "the guest's kernel panicked", nil)
		}
		v.publishLocked(vmm.EventPanicked)
	case EventPaused:
		if v.state == vmm.StateRunning && r.soft == nil {
			v.setLocked(vmm.StatePaused, e.Reason)
		}
	case EventResumed:
		if v.state == vmm.StatePaused {
			v.setLocked(vmm.StateRunning, "")
		}
	case EventEnding:
		if r.cause == "" {
			r.cause, r.fault = e.Reason, true
		}
	case EventLost:
		l.lost = true
		v.lostLocked(r)
	}
}

// guestOffLocked ends a process whose guest has powered off, or hands that on to a soft reboot.
func (v *machine) guestOffLocked(r *run) {
	if r.soft != nil {
		select {
		case r.soft <- struct{}{}:
		default:
		}
		return
	}
	if r.cause == "" {
		r.cause = reasonGuestOff
	}
	if v.state != vmm.StateStopping { // nobody asked: the guest wants to be off
		v.desired = vmm.StateStopped
		v.setLocked(vmm.StateStopping, reasonGuestOff)
	}
	v.m.wg.Add(1)
	go func() {
		defer v.m.wg.Done()
		if err := v.force(v.m.ctx, r, true); err != nil && v.m.ctx.Err() == nil {
			v.m.o.Log.Error("a hypervisor whose guest is off does not end", "vm", v.id, "error", err)
		}
	}()
}

// held gives the run and the instance, if the VM is in one of the states.
func (v *machine) held(op string, states ...vmm.State) (*run, Instance, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range states {
		if v.state == s && v.run != nil && v.run.inst != nil {
			return v.run, v.run.inst, nil
		}
	}
	remedy := "start it with: mvirt vm start " + v.def.Spec.Name
	if v.state.Live() {
		remedy = "wait, or end it with: mvirt vm kill " + v.def.Spec.Name
	}
	return nil, nil, errs.New(errs.Precondition, "the VM is %s, it cannot be %s", v.state, op).With(v.resource()).Because("VM_STATE").Do(remedy)
}

// ask does one thing with a running hypervisor, in turn.
func (m *Manager) ask(ctx context.Context, ref, op string, fn func(context.Context, *machine, *run, Instance) error, states ...vmm.State) (vmm.VM, error) {
	v, err := m.find(ref)
	if err != nil {
		return vmm.VM{}, err
	}
	if _, _, err := v.held(op, append(states, vmm.StateStarting)...); err != nil {
		return vmm.VM{}, err // at once, and not when a long stop is over
	}
	ctx, done, err := v.begin(ctx)
	if err != nil {
		return vmm.VM{}, err
	}
	defer done()
	r, inst, err := v.held(op, states...)
	if err != nil {
		return vmm.VM{}, err
	}
	if err := fn(ctx, v, r, inst); err != nil {
		err = why(ctx, err)
		return vmm.VM{}, &errs.Error{Kind: errs.KindOf(err), Resource: v.resource(), Message: "the VM was not " + op, Err: err,
			Remedy: errs.RemedyOf(err), Reason: errs.ReasonOf(err)}
	}
	return v.now(), nil
}

// Pause stops the vCPUs.
func (m *Manager) Pause(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.ask(ctx, req.Ref, "paused", func(ctx context.Context, v *machine, _ *run, inst Instance) error {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		if err := inst.Pause(ctx); err != nil {
			return err
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.state == vmm.StateRunning {
			v.setLocked(vmm.StatePaused, "paused on request")
		}
		return nil
	}, vmm.StateRunning, vmm.StatePaused)
}

// Resume lets the vCPUs go on.
func (m *Manager) Resume(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.ask(ctx, req.Ref, "resumed", func(ctx context.Context, v *machine, _ *run, inst Instance) error {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		if err := inst.Resume(ctx); err != nil {
			return err
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.state == vmm.StatePaused {
			v.setLocked(vmm.StateRunning, "")
		}
		return nil
	}, vmm.StateRunning, vmm.StatePaused)
}

// Stop presses the power button, waits, and forces.
func (m *Manager) Stop(ctx context.Context, req vmm.StopRequest) (vmm.VM, error) {
	v, err := m.find(req.Ref)
	if err != nil {
		return vmm.VM{}, err
	}
	ctx, done, err := v.begin(ctx)
	if err != nil {
		return vmm.VM{}, err
	}
	defer done()
	v.mu.Lock()
	r := v.run
	before, beforeReason, beforeDesired := v.state, v.reason, v.desired
	v.desired = vmm.StateStopped
	st := store.Status{State: vmm.StateStopped, Reason: v.reason, Since: v.since, Desired: vmm.StateStopped}
	if r == nil {
		st.State = v.state
		v.publishLocked(vmm.EventChanged)
	} else {
		v.setLocked(vmm.StateStopping, reasonStopped)
	}
	v.mu.Unlock()
	if beforeDesired != vmm.StateStopped {
		if err := m.db.Apply(v.id, store.Change{Status: &st}); err != nil {
			m.o.Log.Warn("that the VM shall be stopped is not stored", "vm", v.id, "error", err)
		}
	}
	if r == nil {
		return v.now(), nil
	}
	err = v.stop(ctx, r, req)
	if err == nil {
		return v.now(), nil
	}
	err = why(ctx, err)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.run == r && v.state == vmm.StateStopping && r.cause == "" {
		v.setLocked(before, beforeReason) // it goes on, as if not asked; what is wanted stays wanted
	}
	return vmm.VM{}, err
}

func (v *machine) stop(ctx context.Context, r *run, req vmm.StopRequest) error {
	timeout := req.Timeout
	if timeout <= 0 {
		timeout = stopTimeout
	}
	forced, err := v.powerOff(ctx, r, timeout, r.ended)
	switch {
	case err != nil:
		return err
	case !forced:
		return nil
	case req.NoForce:
		return errs.New(errs.Deadline, "the guest has not powered off in %s", timeout).With(v.resource()).Because("GUEST_IGNORES").
			Do("wait longer, or force it with: mvirt vm kill")
	}
	v.endCause(r, reasonForced, false)
	return v.force(ctx, r, true)
}

// powerOff presses the power button until off is closed or has a value. late tells that time ran out first.
func (v *machine) powerOff(ctx context.Context, r *run, timeout time.Duration, off <-chan struct{}) (late bool, err error) {
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	press := time.NewTimer(0)
	defer press.Stop()
	for {
		select {
		case <-off:
			return false, nil
		case <-r.ended:
			return false, nil
		case <-deadline.C:
			return true, nil
		case <-ctx.Done():
			return false, ctx.Err()
		case <-press.C:
			press.Reset(pressAgain)
			v.mu.Lock()
			inst := r.inst
			v.mu.Unlock()
			if inst == nil {
				continue // not held now; perhaps at the next press
			}
			if err := v.press(ctx, inst); err != nil {
				v.m.o.Log.Warn("the power button does not work", "vm", v.id, "error", err)
			}
		}
	}
}

// press presses the power button of a guest that can notice.
func (v *machine) press(ctx context.Context, inst Instance) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := inst.Status(ctx)
	if err != nil {
		return err
	}
	if st.State == GuestPaused {
		if err := inst.Resume(ctx); err != nil {
			return err
		}
	}
	return inst.PowerButton(ctx)
}

// Kill ends the hypervisor at once.
func (m *Manager) Kill(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	v, err := m.find(req.Ref)
	if err != nil {
		return vmm.VM{}, err
	}
	cause := errs.New(errs.Canceled, "the VM was killed meanwhile").Because("VM_KILLED")
	for {
		v.mu.Lock()
		r := v.run
		v.desired = vmm.StateStopped
		if v.opCancel != nil {
			v.opCancel(cause)
		}
		v.mu.Unlock()
		if r != nil {
			v.endCause(r, reasonKilled, false)
			if err := v.force(ctx, r, false); err != nil {
				return vmm.VM{}, err
			}
		}
		// Who held the turn gives it back now. It may have been about to spawn: then there is one more round.
		if err := v.take(ctx); err != nil {
			return vmm.VM{}, err
		}
		v.mu.Lock()
		again := v.run != nil
		v.mu.Unlock()
		if !again {
			break
		}
		v.give()
	}
	defer v.give()
	v.mu.Lock()
	st := store.Status{State: v.state, Reason: v.reason, Since: v.since, Desired: vmm.StateStopped}
	v.desired = vmm.StateStopped
	v.publishLocked(vmm.EventChanged)
	v.mu.Unlock()
	if err := m.db.Apply(v.id, store.Change{Status: &st}); err != nil {
		return vmm.VM{}, err
	}
	return v.now(), nil
}

// Reboot resets, or presses the power button and starts again.
func (m *Manager) Reboot(ctx context.Context, req vmm.RebootRequest) (vmm.VM, error) {
	return m.ask(ctx, req.Ref, "rebooted", func(ctx context.Context, v *machine, r *run, inst Instance) error {
		if !req.Hard {
			if err := v.softOff(ctx, r, req.Timeout); err != nil {
				return err
			}
		}
		rctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		err := inst.Reset(rctx)
		v.mu.Lock()
		defer v.mu.Unlock()
		r.soft = nil
		if err == nil && v.run == r {
			v.setLocked(vmm.StateRunning, "")
		}
		return err
	}, vmm.StateRunning, vmm.StatePaused)
}

// softOff gets the guest to power off while its process stays, or gives up when time is over: then a reset
// follows all the same.
func (v *machine) softOff(ctx context.Context, r *run, timeout time.Duration) error {
	if timeout <= 0 {
		timeout = stopTimeout
	}
	off := make(chan struct{}, 1)
	v.mu.Lock()
	r.soft = off
	v.mu.Unlock()
	_, err := v.powerOff(ctx, r, timeout, off)
	if err == nil {
		select {
		case <-r.ended:
			err = errs.New(errs.Precondition, "the hypervisor ended meanwhile")
		default:
			return nil
		}
	}
	// The guest may have powered off just now, and nobody else will see to it.
	v.mu.Lock()
	defer v.mu.Unlock()
	r.soft = nil
	select {
	case <-off:
		v.guestOffLocked(r)
	default:
	}
	return err
}

// Console joins the serial console.
func (m *Manager) Console(ctx context.Context, req vmm.ConsoleRequest, cio vmm.ConsoleIO) error {
	v, err := m.find(req.Ref)
	if err != nil {
		return err
	}
	if cio.Out == nil {
		return errs.New(errs.Invalid, "a console session needs somewhere to show what the VM prints")
	}
	err = v.con.Session(ctx, req, cio)
	var e *errs.Error
	if errors.As(err, &e) && e.Resource == (errs.Resource{}) {
		e.Resource = v.resource()
	}
	return err
}
