package reconcile

import (
	"context"
	"fmt"
	"time"

	"github.com/mvirt/mvirt/core/internal/bus"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// watch follows the events of one run of the vmm plugin.
func (r *Reconciler) watch(ctx context.Context) {
	last := map[string]vmm.VM{}
	for ctx.Err() == nil {
		r.opt.Watching()
		err := r.opt.Services.VMM.Watch(ctx, func(e vmm.Event) error {
			r.opt.Event(e)
			r.event(ctx, last, e)
			return nil
		})
		r.opt.Watching()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			r.opt.Log.Warn("the watch of VMs broke off", "error", err)
		}
		pause(ctx, time.Second)
	}
}

// event takes one event in. last is what is known of each VM.
func (r *Reconciler) event(ctx context.Context, last map[string]vmm.VM, e vmm.Event) {
	vm := e.VM
	switch e.Type {
	case vmm.EventSnapshot:
		last[vm.ID] = vm
		r.opt.Seen(ctx, vm)
		return
	case vmm.EventSnapshotEnd, vmm.EventLagged:
		r.Trigger()
		return
	case vmm.EventDeleted:
		delete(last, vm.ID)
		r.publish(e.Time, "vm.deleted", vm, "VM "+vm.Spec.Name+" deleted")
		r.Trigger()
		return
	case vmm.EventRebooted:
		r.publish(e.Time, "vm.rebooted", vm, "VM "+vm.Spec.Name+" rebooted")
		r.audit(ctx, fmt.Sprintf("rb:%s:%x", vm.ID, e.Time.UnixNano()), "VM "+vm.Spec.Name+" rebooted", map[string]string{"op": "vm.rebooted", "outcome": "ok"}, vm.ID)
		return
	case vmm.EventPanicked:
		r.publish(e.Time, "vm.panicked", vm, "the kernel of VM "+vm.Spec.Name+" panicked")
		r.audit(ctx, fmt.Sprintf("pa:%s:%x", vm.ID, e.Time.UnixNano()), "the kernel of VM "+vm.Spec.Name+" panicked", map[string]string{"op": "vm.panicked", "outcome": "failed"}, vm.ID)
		return
	}
	was, known := last[vm.ID]
	last[vm.ID] = vm
	r.opt.Seen(ctx, vm)
	if known && was.State == vm.State {
		r.publish(e.Time, "vm.changed", vm, "VM "+vm.Spec.Name+" changed")
		return
	}
	text := fmt.Sprintf("VM %s is %s", vm.Spec.Name, vm.State)
	if vm.Reason != "" {
		text += ": " + vm.Reason
	}
	r.publish(e.Time, "vm.state", vm, text)
	if !known || !was.State.Live() || vm.State.Live() {
		return
	}
	// It ended. If an operation did that, the operation is audited and releases what was attached.
	if r.opt.Engine.On("vm:"+vm.ID) == "" {
		out := "ok"
		if vm.State == vmm.StateFailed {
			out = "failed"
		}
		r.audit(ctx, fmt.Sprintf("st:%s:%x", vm.ID, vm.Since.UnixNano()), text, map[string]string{"op": "vm.ended", "outcome": out, "state": vm.State.String()}, vm.ID)
	}
	r.Trigger()
}

func (r *Reconciler) publish(t time.Time, typ string, vm vmm.VM, text string) {
	objects := []string{vm.ID}
	for _, d := range vm.Spec.Disks {
		objects = append(objects, d.VolumeID)
	}
	for _, n := range vm.Spec.NICs {
		objects = append(objects, n.NICID)
	}
	r.opt.Publish(bus.Event{Time: t, Type: typ, Objects: objects, Message: text,
		Labels: map[string]string{"vm": vm.Spec.Name, "state": vm.State.String(), "reason": vm.Reason}})
}
