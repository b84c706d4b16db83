package plan

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// vmSnapshots are the actions on memory snapshots.
func (a actions) vmSnapshots() map[string]operation.Action {
	v := a.svc.VMM
	return map[string]operation.Action{
		"vmm.snapshot": operation.Typed(
			func(ctx context.Context, _ *operation.Run, req vmm.SnapshotRequest) error {
				_, err := v.Snapshot(ctx, req)
				return err
			},
			func(ctx context.Context, _ *operation.Run, req vmm.SnapshotRequest) error {
				return gone(v.DeleteSnapshot(ctx, vmm.Ref{Ref: req.SnapshotID}))
			},
			func(ctx context.Context, _ *operation.Run, req vmm.SnapshotRequest) (bool, error) {
				all, err := v.ListSnapshots(ctx, vmm.Ref{Ref: req.ID})
				return slices.ContainsFunc(all, func(s vmm.MemorySnapshot) bool { return s.ID == req.SnapshotID }), gone(err)
			}),
		"vmm.delete_snapshot": doneGone(v.DeleteSnapshot),
	}
}

// SnapshotVM is what a snapshot of a VM is called.
type SnapshotVM struct {
	ID          string
	Name        string
	LeavePaused bool
}

// SnapshotVM pauses the VM, writes its memory, takes snapshots of its volumes at the same point, and lets it go
// on. What fails undoes all, and the VM goes on.
func (c *Changes) SnapshotVM(ctx context.Context, call Call, vm vmm.VM, req SnapshotVM) (operation.Operation, error) {
	none := operation.Operation{}
	if vm.State != vmm.StateRunning && vm.State != vmm.StatePaused {
		return none, errs.New(errs.Precondition, "it is %s, and has no memory to be kept", vm.State).With(vmRes(vm)).Because("VM_STATE").
			Do("mvirt vm start " + vm.Spec.Name + "; or take snapshots of its volumes: mvirt snapshot create")
	}
	if vm.Pending {
		return none, errs.New(errs.Precondition, "its definition has changes that wait for the next start, so nothing could be restored into it").With(vmRes(vm)).
			Because("VM_PENDING").Do("stop and start it first")
	}
	all, err := c.svc.VMM.ListSnapshots(ctx, vmm.Ref{Ref: vm.ID})
	if err != nil {
		return none, err
	}
	for _, s := range all {
		if s.Name == req.Name {
			return none, errs.New(errs.Exists, "the VM has a snapshot of this name").With(errs.Resource{Type: "vm snapshot", ID: s.ID, Name: vm.Spec.Name + "@" + s.Name}).
				Do("choose another name, or remove that one: mvirt vm snapshot rm " + vm.Spec.Name + "@" + s.Name)
		}
	}
	ref, name := vmm.Ref{Ref: vm.ID}, vm.Spec.Name
	p := operation.Plan{Type: "vm.snapshot", Title: "take snapshot " + name + "@" + req.Name, Mode: operation.Undo, Objects: []string{vm.ID, req.ID},
		Locks: locks(lock("vm", vm.ID), lock("vmsnapshot", req.ID))}
	take := vmm.SnapshotRequest{ID: vm.ID, SnapshotID: req.ID, Name: req.Name}
	var volumes []operation.Step
	for _, d := range vm.Spec.Disks {
		p.Objects, p.Locks = append(p.Objects, d.VolumeID), append(p.Locks, shared("volume", d.VolumeID))
		if d.ReadOnly {
			continue // what nobody writes is what it was
		}
		id := ident.New()
		take.Disks = append(take.Disks, vmm.SnapshotDisk{Name: d.Name, SnapshotID: id})
		p.Objects, p.Locks = append(p.Objects, id), append(p.Locks, lock("snapshot", id))
		volumes = append(volumes, operation.NewStep("storage.create_snapshot", "take a snapshot of disk "+d.Name, "deleted the snapshot of disk "+d.Name,
			storage.CreateSnapshotRequest{ID: id, VolumeID: d.VolumeID, Name: trimName("vm-" + req.Name), Labels: map[string]string{OwnerLabel: vm.ID}}))
	}
	if vm.State == vmm.StateRunning {
		p.Steps = append(p.Steps, operation.NewStep("vmm.pause", "pause VM "+name, "let VM "+name+" go on", ref))
	}
	p.Steps = append(p.Steps, operation.NewStep("vmm.snapshot", "write the memory of VM "+name, "deleted the memory snapshot", take))
	p.Steps = append(p.Steps, volumes...)
	if vm.State == vmm.StateRunning && !req.LeavePaused {
		// Nothing after it can fail, so it is never undone into a pause.
		p.Steps = append(p.Steps, operation.NewStep("vmm.resume", "let VM "+name+" go on", "", ref))
	}
	return c.run(ctx, call, p)
}

// DeleteVMSnapshot removes memory and the volumes' snapshots that were taken with it.
func (c *Changes) DeleteVMSnapshot(ctx context.Context, call Call, s vmm.MemorySnapshot, dryRun bool) (operation.Operation, []string, error) {
	p := operation.Plan{Type: "vm.snapshot_delete", Title: "delete snapshot " + s.Spec.Name + "@" + s.Name, Mode: operation.Finish,
		Objects: []string{s.ID, s.VMID}, Locks: locks(lock("vmsnapshot", s.ID))}
	p.Steps, p.Objects = deleteVMSnapshot(s, p.Objects)
	words := []string{"vm snapshot " + s.Spec.Name + "@" + s.Name}
	for _, d := range s.Disks {
		p.Locks = append(p.Locks, lock("snapshot", d.SnapshotID))
		words = append(words, "snapshot of disk "+d.Name)
	}
	if dryRun {
		return operation.Operation{}, words, nil
	}
	op, err := c.run(ctx, call, p)
	return op, words, err
}

func deleteVMSnapshot(s vmm.MemorySnapshot, objects []string) ([]operation.Step, []string) {
	steps := []operation.Step{operation.NewStep("vmm.delete_snapshot", "delete the memory of snapshot "+s.Name, "", vmm.Ref{Ref: s.ID})}
	for _, d := range s.Disks {
		objects = append(objects, d.SnapshotID)
		steps = append(steps, operation.NewStep("storage.delete_snapshot", "delete the snapshot of disk "+d.Name, "", storage.Ref{Ref: d.SnapshotID}))
	}
	return steps, objects
}

// snapshotsOf finds the storage plugin's snapshots of a VM's snapshot, by disk.
func (c *Changes) snapshotsOf(ctx context.Context, s vmm.MemorySnapshot) (map[string]storage.Snapshot, []storage.Snapshot, error) {
	all, err := c.svc.Storage.ListSnapshots(ctx, storage.ListSnapshotsRequest{})
	if err != nil {
		return nil, nil, err
	}
	of := map[string]storage.Snapshot{}
	for _, d := range s.Disks {
		i := slices.IndexFunc(all, func(o storage.Snapshot) bool { return o.ID == d.SnapshotID })
		if i < 0 {
			return nil, nil, errs.New(errs.Precondition, "the snapshot of disk %s is gone", d.Name).With(errs.Resource{Type: "vm snapshot", ID: s.ID, Name: s.Name}).
				Do("it cannot be restored any more; remove it with: mvirt vm snapshot rm " + s.ID)
		}
		of[d.Name] = all[i]
	}
	return of, all, nil
}

// RollbackVM lets the VM that a snapshot was made of go on from there: it must be stopped, and its volumes are
// rolled back.
func (c *Changes) RollbackVM(ctx context.Context, call Call, s vmm.MemorySnapshot, paused, destroyNewer bool) (operation.Operation, error) {
	none := operation.Operation{}
	vm, err := c.svc.VMM.Get(ctx, vmm.Ref{Ref: s.VMID})
	if errors.Is(err, errs.NotFound) {
		return none, errs.New(errs.Precondition, "the VM that the snapshot was made of is gone").Do("restore it as a new one: give a name")
	}
	if err != nil {
		return none, err
	}
	if vm.State.Live() {
		return none, mustStop(vm, "going back to a snapshot")
	}
	of, all, err := c.snapshotsOf(ctx, s)
	if err != nil {
		return none, err
	}
	objects, ls := partsOf(vm)
	p := operation.Plan{Type: "vm.restore", Title: "restore VM " + vm.Spec.Name + " from snapshot " + s.Name, Mode: operation.Undo,
		Objects: append(objects, s.ID), Locks: append(locks(lock("vm", vm.ID), shared("vmsnapshot", s.ID)), ls[1:]...), Steps: []operation.Step{checkStopped(vm)}}
	var newer []string
	for _, d := range vm.Spec.Disks {
		snap, ok := of[d.Name]
		if !ok {
			continue
		}
		if snap.VolumeID != d.VolumeID {
			return none, errs.New(errs.Precondition, "disk %s is another volume than it was", d.Name).With(vmRes(vm)).Because("OTHER_SHAPE").Do("restore it as a new VM: give a name")
		}
		for i := range p.Locks { // a rollback changes it
			if p.Locks[i].Object == "volume:"+d.VolumeID {
				p.Locks[i].Shared = false
			}
		}
		found := false
		for _, o := range all { // the contract lists a volume's oldest first
			if found && o.VolumeID == snap.VolumeID {
				newer = append(newer, "snapshot "+o.VolumeName+"@"+o.Name)
			}
			found = found || o.ID == snap.ID
		}
		p.Steps = append(p.Steps, operation.NewStep("storage.rollback", "roll disk "+d.Name+" back", "", storage.RollbackRequest{SnapshotID: snap.ID, DestroyNewer: destroyNewer}))
	}
	if len(newer) > 0 && !destroyNewer {
		return none, errs.New(errs.Precondition, "%s would be lost: %s", plural(len(newer), "newer snapshot"), strings.Join(newer, ", ")).With(vmRes(vm)).
			Because("NEWER_SNAPSHOTS").Do("give --destroy-newer, or restore it as a new VM")
	}
	p.Steps = append(p.Steps, startFrom(vm, paused, s.ID)...)
	return c.run(ctx, call, p)
}

// startFrom are the steps of a start that goes on from a snapshot.
func startFrom(vm vmm.VM, paused bool, snapshotID string) []operation.Step {
	steps := startSteps(vm, paused)
	s := startVM{VMID: vm.ID, Paused: paused, Disks: vm.Spec.Disks, From: snapshotID}
	for _, n := range vm.Spec.NICs {
		s.NICs = append(s.NICs, n.NICID)
	}
	steps[len(steps)-1] = operation.NewStep("vmm.start", "start VM "+vm.Spec.Name+" from the snapshot", "stopped VM "+vm.Spec.Name, s)
	return steps
}

// CloneVM is a new VM made of a snapshot.
type CloneVM struct {
	ID     string
	Name   string
	NICs   []NewNIC
	Paused bool
}

// CloneVM makes a VM of a snapshot: volumes cloned from those of the same point, NICs that the guest finds as it
// knew them, and memory.
func (c *Changes) CloneVM(ctx context.Context, call Call, s vmm.MemorySnapshot, req CloneVM) (operation.Operation, error) {
	none := operation.Operation{}
	of, _, err := c.snapshotsOf(ctx, s)
	if err != nil {
		return none, err
	}
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return none, err
	}
	for _, vm := range vms {
		if vm.Spec.Name == req.Name {
			return none, errs.New(errs.Exists, "a VM has this name").With(vmRes(vm)).Do("choose another name, or remove that VM: mvirt vm rm " + vm.Spec.Name)
		}
	}
	was := s.Spec
	if len(req.NICs) != len(was.NICs) {
		return none, errs.Field("nics", "give a network for each", "%s for a VM that had %s when the snapshot was made", plural(len(req.NICs), "NIC"), plural(len(was.NICs), "NIC"))
	}
	d := &draft{c: c, vmID: req.ID, name: req.Name, plan: operation.Plan{Type: "vm.clone", Title: "make VM " + req.Name + " of snapshot " + s.Name,
		Mode: operation.Undo, Objects: []string{req.ID, s.ID}, Locks: locks(lock("vm", req.ID), lock("name:vm", req.Name), shared("vmsnapshot", s.ID))}}
	for i, disk := range was.Disks {
		n := NewDisk{Name: disk.Name, ReadOnly: disk.ReadOnly, Limit: disk.Limit}
		if snap, ok := of[disk.Name]; ok {
			n.SnapshotID, n.SourceVol = snap.ID, snap.VolumeID
		} else {
			n.VolumeID = disk.VolumeID // read-only: both may have it
		}
		if err := d.disk(ctx, vms, i, n); err != nil {
			return none, err
		}
	}
	for i, nic := range req.NICs {
		if nic.NICID == "" && nic.MAC == "" {
			nic.MAC = was.NICs[i].MAC // the guest goes on sending from it
		}
		if nic.NICID != "" {
			have, err := c.svc.Net.GetNIC(ctx, net.Ref{Ref: nic.NICID})
			if err != nil {
				return none, err
			}
			if !strings.EqualFold(have.MAC, was.NICs[i].MAC) {
				return none, errs.Field(fmt.Sprintf("nics[%d].nic", i), "give a NIC with the address "+was.NICs[i].MAC, "the guest sends from %s, and NIC %s has %s", was.NICs[i].MAC, have.Name, have.MAC)
			}
		}
		if err := d.nic(ctx, vms, i, nic); err != nil {
			return none, err
		}
	}
	spec := was
	spec.Name, spec.Disks, spec.NICs = req.Name, d.disks, d.nics
	spec.Boot.HasKernel, spec.Boot.HasInitramfs, spec.Boot.KernelSHA256 = false, false, ""
	d.step("vmm.create", "define VM "+d.name, "removed VM "+d.name, defineVM{ID: req.ID, Spec: spec, BootFrom: s.ID})
	d.plan.Steps = append(d.plan.Steps, startFrom(vmm.VM{ID: req.ID, Spec: spec}, req.Paused, s.ID)...)
	return c.run(ctx, call, d.plan)
}
