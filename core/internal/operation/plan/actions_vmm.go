package plan

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// Keys of the files that a definition is made with.
const (
	kernelFile    = "kernel"
	initramfsFile = "initramfs"
)

// casTries is how often a change of a definition is tried again when somebody else changed it meanwhile.
const casTries = 5

type defineVM struct {
	ID       string
	Spec     vmm.Spec
	BootFrom string `json:",omitempty"` // memory snapshot whose kernel it gets
}

type startVM struct {
	VMID   string
	Paused bool
	Disks  []vmm.Disk
	NICs   []string
	From   string `json:",omitempty"` // memory snapshot to go on from
}

// specPatch replaces what is not nil.
type specPatch struct {
	VMID      string
	Name      *string
	CPUs      *uint32
	Memory    *uint64
	Autostart *bool
	Cmdline   *string
	Kernel    *string // its name; the file is in the run
	CloudInit *vmm.CloudInit
	Resize    bool       // tell a running VM
	Files     bool       `json:",omitempty"` // a kernel or an initramfs comes with it
	Old       *specPatch `json:",omitempty"` // what the fields that change were
}

func (a actions) vmm() map[string]operation.Action {
	v := a.svc.VMM
	return map[string]operation.Action{
		"vmm.create": operation.Typed(a.define,
			func(ctx context.Context, _ *operation.Run, d defineVM) error {
				return gone(v.Delete(ctx, vmm.Ref{Ref: d.ID}))
			},
			func(ctx context.Context, _ *operation.Run, d defineVM) (bool, error) {
				return found(second(v.Get(ctx, vmm.Ref{Ref: d.ID})))
			}),
		"vmm.delete": doneGone(v.Delete),
		"vmm.update": operation.Typed(a.patch, a.unpatch, a.patched),
		"vmm.start": operation.Typed(a.start,
			func(ctx context.Context, _ *operation.Run, s startVM) error {
				return gone(second(v.Kill(ctx, vmm.Ref{Ref: s.VMID})))
			},
			func(ctx context.Context, _ *operation.Run, s startVM) (bool, error) {
				vm, err := v.Get(ctx, vmm.Ref{Ref: s.VMID})
				return vm.State == vmm.StateRunning || vm.State == vmm.StatePaused, gone(err)
			}),
		"vmm.stop": operation.Typed(func(ctx context.Context, _ *operation.Run, req vmm.StopRequest) error {
			_, err := v.Stop(ctx, req)
			return err
		}, nil, nil),
		"vmm.kill":          operation.Typed(func(ctx context.Context, _ *operation.Run, req vmm.Ref) error { return gone(second(v.Kill(ctx, req))) }, nil, nil),
		"vmm.check_stopped": operation.Typed(a.checkStopped, nil, nil),
		"vmm.pause":         a.switching(v.Pause, v.Resume, vmm.StatePaused),
		"vmm.resume":        a.switching(v.Resume, v.Pause, vmm.StateRunning),
		"vmm.reboot":        done(v.Reboot),
	}
}

// define stores a definition. NICs made before in the same operation tell their MACs.
func (a actions) define(ctx context.Context, r *operation.Run, d defineVM) error {
	spec := d.Spec
	spec.NICs = slices.Clone(spec.NICs)
	for i := range spec.NICs {
		if mac, ok := operation.Value[string](r, "mac:"+spec.NICs[i].NICID); ok {
			spec.NICs[i].MAC = mac
		}
	}
	kernel, _ := operation.Value[*os.File](r, kernelFile)
	initramfs, _ := operation.Value[*os.File](r, initramfsFile)
	_, err := a.svc.VMM.Create(ctx, vmm.CreateRequest{ID: d.ID, Spec: spec, Kernel: kernel, Initramfs: initramfs, BootFrom: d.BootFrom})
	return err
}

// start launches a VM with what was attached before in the same operation.
func (a actions) start(ctx context.Context, r *operation.Run, s startVM) error {
	req := vmm.StartRequest{ID: s.VMID, Paused: s.Paused}
	for _, d := range s.Disks {
		at, ok := operation.Value[storage.Attachment](r, "volume:"+d.VolumeID)
		if !ok {
			return errs.New(errs.Internal, "volume %s is not attached", d.VolumeID)
		}
		req.Disks = append(req.Disks, diskAttachment(d, at))
	}
	for _, id := range s.NICs {
		path, ok := operation.Value[net.Attachment](r, "nic:"+id)
		if !ok {
			return errs.New(errs.Internal, "NIC %s is not attached", id)
		}
		req.NICs = append(req.NICs, nicAttachment(id, path))
	}
	if s.From != "" {
		return second(a.svc.VMM.StartFromSnapshot(ctx, vmm.StartFromSnapshotRequest{SnapshotID: s.From, Start: req}))
	}
	return second(a.svc.VMM.Start(ctx, req))
}

func diskAttachment(d vmm.Disk, at storage.Attachment) vmm.DiskAttachment {
	format := ""
	if at.Format == storage.FormatRaw {
		format = "raw"
	}
	return vmm.DiskAttachment{Name: d.Name, VolumeID: d.VolumeID, Path: at.Path, Format: format, Block: at.Block,
		ReadOnly: d.ReadOnly || at.ReadOnly, SizeBytes: at.SizeBytes, Limit: d.Limit}
}

func nicAttachment(id string, p net.Attachment) vmm.NICAttachment {
	return vmm.NICAttachment{NICID: id, MAC: p.MAC, MTU: p.MTU, Queues: p.Queues, TAP: p.TAP, SocketPath: p.SocketPath, TAPName: p.TAPName}
}

// switching is a change between two states: done when the VM is in the state, undone by going back from it.
func (a actions) switching(to, back func(context.Context, vmm.Ref) (vmm.VM, error), state vmm.State) operation.Action {
	in := func(ctx context.Context, _ *operation.Run, ref vmm.Ref) (bool, error) {
		vm, err := a.svc.VMM.Get(ctx, ref)
		return vm.State == state, gone(err)
	}
	return operation.Typed(func(ctx context.Context, _ *operation.Run, ref vmm.Ref) error { return second(to(ctx, ref)) },
		func(ctx context.Context, r *operation.Run, ref vmm.Ref) error {
			if there, err := in(ctx, r, ref); err != nil || !there {
				return err
			}
			return gone(second(back(ctx, ref)))
		}, in)
}

// unpatch puts back what patch changed. A kernel that was replaced is gone; then what stands in its place is said.
func (a actions) unpatch(ctx context.Context, r *operation.Run, p specPatch) error {
	if p.Old == nil {
		return nil // journalled by an earlier version
	}
	old := *p.Old
	old.VMID, old.Resize = p.VMID, p.Resize
	if err := a.patch(ctx, r, old); err != nil {
		return gone(err)
	}
	if p.Files {
		return errs.New(errs.Internal, "the kernel may be the new one").Do("update the VM again with the kernel that it is to boot")
	}
	return nil
}

// patched tells whether a definition is as patch makes it. Whether a kernel was taken cannot be told.
func (a actions) patched(ctx context.Context, _ *operation.Run, p specPatch) (bool, error) {
	vm, err := a.svc.VMM.Get(ctx, vmm.Ref{Ref: p.VMID})
	if err != nil || p.Files {
		return false, gone(err)
	}
	s := vm.Spec
	return same(p.Name, s.Name) && same(p.CPUs, s.CPUs) && same(p.Memory, s.MemoryBytes) && same(p.Autostart, s.Autostart) &&
		same(p.Cmdline, s.Boot.Cmdline) && same(p.Kernel, s.Boot.KernelName) && same(p.CloudInit, s.CloudInit), nil
}

func same[T comparable](want *T, have T) bool { return want == nil || *want == have }

// patch changes a definition, and with Resize a running VM.
func (a actions) patch(ctx context.Context, r *operation.Run, p specPatch) error {
	kernel, _ := operation.Value[*os.File](r, kernelFile)
	initramfs, _ := operation.Value[*os.File](r, initramfsFile)
	vm, err := a.change(ctx, p.VMID, kernel, initramfs, func(s *vmm.Spec) bool {
		set(&s.Name, p.Name)
		set(&s.CPUs, p.CPUs)
		set(&s.MemoryBytes, p.Memory)
		set(&s.Autostart, p.Autostart)
		set(&s.Boot.Cmdline, p.Cmdline)
		set(&s.Boot.KernelName, p.Kernel)
		set(&s.CloudInit, p.CloudInit)
		if s.MaxCPUs != 0 {
			s.MaxCPUs = max(s.MaxCPUs, s.CPUs)
		}
		if s.MaxMemory != 0 {
			s.MaxMemory = max(s.MaxMemory, s.MemoryBytes)
		}
		return true
	})
	if err != nil || !p.Resize || vm.State != vmm.StateRunning {
		return err
	}
	_, err = a.svc.VMM.Resize(ctx, vmm.ResizeRequest{Ref: p.VMID, CPUs: vm.Spec.CPUs, MemoryBytes: vm.Spec.MemoryBytes})
	if errors.Is(err, errs.Unsupported) || errors.Is(err, errs.Invalid) || errors.Is(err, errs.Precondition) {
		return nil // it waits for the next start, as VM.Pending tells
	}
	if err != nil && p.Old != nil {
		// The refusal reads as if nothing had been changed, so nothing may be.
		old := *p.Old
		old.VMID = p.VMID
		if uerr := a.patch(ctx, r, old); uerr != nil {
			return errs.Wrap(errs.Internal, errors.Join(err, uerr), "the definition is changed, the running VM is not")
		}
	}
	return err
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// change changes a definition by fn, which returns false when there is nothing to change. It repeats when
// somebody else changed the definition in between.
func (a actions) change(ctx context.Context, id string, kernel, initramfs *os.File, fn func(*vmm.Spec) bool) (vmm.VM, error) {
	for try := 1; ; try++ {
		vm, err := a.svc.VMM.Get(ctx, vmm.Ref{Ref: id})
		if err != nil {
			return vm, err
		}
		spec := vm.Spec
		spec.Disks, spec.NICs = slices.Clone(spec.Disks), slices.Clone(spec.NICs)
		if !fn(&spec) {
			return vm, nil
		}
		out, err := a.svc.VMM.Update(ctx, vmm.UpdateRequest{ID: id, Generation: vm.Generation, Spec: spec, Kernel: kernel, Initramfs: initramfs})
		if err == nil || !errors.Is(err, errs.Conflict) || try == casTries {
			return out, err
		}
	}
}

// checkStopped refuses what needs a VM without a process. A VM that is gone has none.
func (a actions) checkStopped(ctx context.Context, _ *operation.Run, req vmm.Ref) error {
	vm, err := a.svc.VMM.Get(ctx, req)
	if err == nil && vm.State.Live() {
		return mustStop(vm, "this")
	}
	return gone(err)
}

func checkStopped(vm vmm.VM) operation.Step {
	return operation.NewStep("vmm.check_stopped", "see that VM "+vm.Spec.Name+" does not run", "", vmm.Ref{Ref: vm.ID})
}
