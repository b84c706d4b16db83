package vmmkit

import (
	"context"
	"errors"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// Resizable is a Manager whose driver's instances are Resizers: it has the feature FeatureVMMResize.
type Resizable struct{ *Manager }

var _ vmm.Resizer = Resizable{}

// Resize changes vCPUs and memory of a VM, and of its definition: at once where it runs, within the maxima that
// it was started with.
func (r Resizable) Resize(ctx context.Context, req vmm.ResizeRequest) (vmm.VM, error) {
	m := r.Manager
	v, err := m.find(req.Ref)
	if err != nil {
		return vmm.VM{}, err
	}
	ctx, done, err := v.begin(ctx)
	if err != nil {
		return vmm.VM{}, err
	}
	defer done()
	v.mu.Lock() // the definition stays as it is while we hold the turn
	def, state, run := v.def, v.state, v.run
	var inst Instance
	if run != nil {
		inst = run.inst
	}
	v.mu.Unlock()
	def.Spec = cloneSpec(def.Spec)
	if req.CPUs != 0 {
		def.Spec.CPUs = req.CPUs
	}
	if req.MemoryBytes != 0 {
		def.Spec.MemoryBytes = req.MemoryBytes
	}
	if err := checkSize(def.Spec, m.o.Memory); err != nil {
		return vmm.VM{}, err
	}
	if err := m.o.Driver.Check(def.Spec); err != nil {
		return vmm.VM{}, err
	}
	def.Generation++
	change := store.Change{Definition: &def}
	var rec store.Runtime
	if run != nil {
		if state != vmm.StateRunning || inst == nil {
			return vmm.VM{}, errs.New(errs.Precondition, "the VM is %s, it cannot be resized", state).With(v.resource()).Because("VM_STATE").
				Do("resize it while it runs, or stopped")
		}
		rec = run.rec
		rec.Spec = cloneSpec(rec.Spec)
		if err := checkWithin(def.Spec, rec.Spec); err != nil {
			return vmm.VM{}, err
		}
		res, ok := inst.(Resizer)
		if !ok {
			return vmm.VM{}, errs.New(errs.Unsupported, "this hypervisor cannot resize a running VM").Do("stop the VM first")
		}
		rctx, cancel := context.WithTimeout(ctx, resizeTimeout)
		defer cancel()
		if err := res.Resize(rctx, def.Spec.CPUs, def.Spec.MemoryBytes); err != nil {
			err = why(ctx, err)
			return vmm.VM{}, &errs.Error{Kind: errs.KindOf(err), Resource: v.resource(), Message: "the VM was not resized", Err: err,
				Remedy: errs.RemedyOf(err), Field: fieldOf(err)}
		}
		rec.Spec.CPUs, rec.Spec.MemoryBytes = def.Spec.CPUs, def.Spec.MemoryBytes
		change.Runtime = &rec
	}
	if err := m.db.Apply(v.id, change); err != nil {
		return vmm.VM{}, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.def = def
	if change.Runtime != nil && v.run == run {
		run.rec = rec
	}
	v.publishLocked(vmm.EventChanged)
	return v.now(), nil
}

// checkWithin says whether a running VM can become what is wanted.
func checkWithin(want, running vmm.Spec) error {
	most, mem := max(running.CPUs, running.MaxCPUs), max(running.MemoryBytes, running.MaxMemory)
	const remedy = "stop the VM, or start it with a larger maximum"
	switch {
	case want.CPUs > most:
		return errs.Field("cpus", remedy, "%d vCPUs for a VM that was started with at most %d", want.CPUs, most)
	case want.MemoryBytes > mem:
		return errs.Field("memory_bytes", remedy, "%d MiB of memory for a VM that was started with at most %d", want.MemoryBytes>>20, mem>>20)
	}
	return nil
}

func fieldOf(err error) string {
	var e *errs.Error
	if errors.As(err, &e) {
		return e.Field
	}
	return ""
}
