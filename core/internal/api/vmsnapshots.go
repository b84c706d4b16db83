package api

import (
	"context"
	"fmt"
	"strings"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// vmSnapshotName is what a VM's snapshot is called for people: the VM's name then, and its own.
func vmSnapshotName(s vmm.MemorySnapshot) string { return s.Spec.Name + "@" + s.Name }

// findVMSnapshot resolves an id, the beginning of one, or "vm@name". Who may use the VM may use it.
func (a *vmsAPI) findVMSnapshot(ctx context.Context, field, ref string) (vmm.MemorySnapshot, error) {
	list := func(ctx context.Context) ([]vmm.MemorySnapshot, error) { return a.vmm.ListSnapshots(ctx, vmm.Ref{}) }
	if name, snapshot, ok := strings.Cut(ref, "@"); ok {
		vm, err := a.findVM(ctx, field, name)
		if err != nil {
			return vmm.MemorySnapshot{}, err
		}
		all, err := a.vmm.ListSnapshots(ctx, vmm.Ref{Ref: vm.ID})
		if err != nil {
			return vmm.MemorySnapshot{}, err
		}
		for _, s := range all {
			if s.Name == snapshot || s.ID == snapshot {
				touch(ctx, s.ID)
				return s, nil
			}
		}
		return vmm.MemorySnapshot{}, errs.New(errs.NotFound, "VM %s has no such snapshot", vm.Spec.Name).With(errs.Resource{Type: "vm snapshot", Name: shown(snapshot)}).
			Do("mvirt vm snapshot ls " + vm.Spec.Name + " lists them")
	}
	return find(ctx, kindOf[vmm.MemorySnapshot]{"vm snapshot", "mvirt vm snapshot ls",
		func(ctx context.Context, ref string) (vmm.MemorySnapshot, error) {
			all, err := list(ctx)
			for _, s := range all {
				if s.ID == ref {
					return s, nil
				}
			}
			if err == nil {
				err = errs.New(errs.NotFound, "no such snapshot")
			}
			return vmm.MemorySnapshot{}, err
		}, list, func(s vmm.MemorySnapshot) (string, string) { return s.ID, vmSnapshotName(s) },
		func(s vmm.MemorySnapshot) (string, string, string) { return "vm", s.VMID, s.Spec.Name }}, field, ref)
}

func (a *vmsAPI) vmSnapshot(ctx context.Context, s vmm.MemorySnapshot) *apiv1.VMSnapshot {
	out := &apiv1.VMSnapshot{Id: s.ID, Name: s.Name, VmId: s.VMID, VmName: s.Spec.Name, SizeBytes: s.SizeBytes, CreatedAt: convert.Time(s.CreatedAt),
		Hypervisor: s.Hypervisor, Cpus: s.Spec.CPUs, MemoryBytes: s.Spec.MemoryBytes}
	if vm, err := a.vmm.Get(ctx, vmm.Ref{Ref: s.VMID}); err == nil {
		out.VmName = vm.Spec.Name
	}
	for _, d := range s.Disks {
		out.Disks = append(out.Disks, &apiv1.VMSnapshotDisk{Name: d.Name, SnapshotId: d.SnapshotID})
	}
	return out
}

func (a *vmsAPI) Snapshot(ctx context.Context, req *apiv1.SnapshotVMRequest) (*apiv1.VMSnapshot, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	op, err := a.changes.SnapshotVM(ctx, a.call(ctx), vm, plan.SnapshotVM{ID: id, Name: req.GetName(), LeavePaused: req.GetLeavePaused()})
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	all, err := a.vmm.ListSnapshots(ctx, vmm.Ref{Ref: vm.ID})
	if err != nil {
		return nil, err
	}
	for _, s := range all {
		if s.ID == id {
			out := a.vmSnapshot(ctx, s)
			out.Operation = op.ID
			return out, nil
		}
	}
	return nil, errs.New(errs.Conflict, "the snapshot was taken and is gone already")
}

func (a *vmsAPI) ListSnapshots(ctx context.Context, req *apiv1.ListVMSnapshotsRequest) (*apiv1.ListVMSnapshotsResponse, error) {
	ref := vmm.Ref{}
	if req.GetVm() != "" {
		vm, err := a.findVM(ctx, "vm", req.GetVm())
		if err != nil {
			return nil, err
		}
		ref.Ref = vm.ID
	}
	all, err := a.vmm.ListSnapshots(ctx, ref)
	if err != nil {
		return nil, err
	}
	out := &apiv1.ListVMSnapshotsResponse{}
	for _, s := range all {
		if permitted(ctx, "vm", s.VMID, s.Spec.Name) == nil {
			out.Snapshots = append(out.Snapshots, a.vmSnapshot(ctx, s))
		}
	}
	return out, nil
}

func (a *vmsAPI) DeleteSnapshot(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	s, err := a.findVMSnapshot(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	op, removed, err := a.changes.DeleteVMSnapshot(ctx, a.call(ctx), s, req.GetDryRun())
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return &apiv1.DeleteResponse{Removed: removed}, nil
}

func (a *vmsAPI) Restore(ctx context.Context, req *apiv1.RestoreVMRequest) (*apiv1.VM, error) {
	s, err := a.findVMSnapshot(ctx, "snapshot", req.GetSnapshot())
	if err != nil {
		return nil, err
	}
	if req.GetName() == "" {
		if len(req.GetNics()) > 0 || req.GetId() != "" {
			return nil, errs.Field("name", "give the new VM's name, or leave id and NICs out", "id and NICs are those of a new VM, and it has no name")
		}
		op, err := a.changes.RollbackVM(ctx, a.call(ctx), s, req.GetPaused(), req.GetDestroyNewer())
		return a.after(ctx, s.VMID, op, err)
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	clone := plan.CloneVM{ID: id, Name: req.GetName(), Paused: req.GetPaused()}
	for i, n := range req.GetNics() {
		nic, err := a.newNIC(ctx, fmt.Sprintf("nics[%d].", i), n)
		if err != nil {
			return nil, err
		}
		clone.NICs = append(clone.NICs, nic)
	}
	var op operation.Operation
	op, err = a.changes.CloneVM(ctx, a.call(ctx), s, clone)
	return a.after(ctx, id, op, err)
}
