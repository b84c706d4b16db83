package plan

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// DeleteVM says how a VM is deleted.
type DeleteVM struct {
	ID        string
	Force     bool // kill it if it runs
	Keep      bool // keep volumes and NICs that were made for it
	Recursive bool // also volumes and NICs that were there before it, and snapshots
	DryRun    bool
}

// DeleteVM removes a VM and what belongs to it. It returns in words what went, or would go.
func (c *Changes) DeleteVM(ctx context.Context, call Call, req DeleteVM) (operation.Operation, []string, error) {
	none := operation.Operation{}
	if req.Keep && req.Recursive {
		return none, nil, errs.Field("keep", "give one of the two", "keep and recursive contradict each other")
	}
	vm, err := c.svc.VMM.Get(ctx, vmm.Ref{Ref: req.ID})
	if err != nil {
		return none, nil, err
	}
	live := vm.State.Live()
	if live && !req.Force {
		return none, nil, errs.New(errs.Precondition, "it is %s", vm.State).With(vmRes(vm)).Because("VM_RUNNING").
			Do(fmt.Sprintf("mvirt vm stop %s first, or give --force", vm.Spec.Name))
	}
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return none, nil, err
	}
	vms = slices.DeleteFunc(vms, func(o vmm.VM) bool { return o.ID == vm.ID })

	p := operation.Plan{Type: "vm.delete", Title: "delete VM " + vm.Spec.Name, Mode: operation.Finish, Preempt: req.Force,
		Objects: []string{vm.ID}, Locks: locks(lock("vm", vm.ID), lock("name:vm", vm.Spec.Name))}
	removed := []string{"vm " + vm.Spec.Name}
	if live {
		p.Steps = append(p.Steps, operation.NewStep("vmm.kill", "kill VM "+vm.Spec.Name, "", vmm.Ref{Ref: vm.ID}))
	} else {
		p.Steps = append(p.Steps, checkStopped(vm))
	}
	for _, s := range releaseSteps(vm) {
		s.BestEffort = false // what is still attached must not lose its definition
		p.Steps = append(p.Steps, s)
	}
	p.Steps = append(p.Steps, operation.NewStep("vmm.delete", "remove the definition of VM "+vm.Spec.Name, "", vmm.Ref{Ref: vm.ID}))
	for _, n := range vm.Spec.NICs {
		p.Objects = append(p.Objects, n.NICID)
		if !(n.Delete || req.Recursive) || req.Keep {
			p.Locks = append(p.Locks, shared("nic", n.NICID))
			continue
		}
		nic, err := c.svc.Net.GetNIC(ctx, net.Ref{Ref: n.NICID})
		if err != nil {
			if gone(err) == nil {
				continue
			}
			return none, nil, err
		}
		if users := nicUsersOf(vms, nic.ID); len(users) > 0 {
			return none, nil, errs.New(errs.Precondition, "VM %s uses it, too", users[0].Spec.Name).With(nicRes(nic)).Because("NIC_IN_USE").Do("detach it there, or give --keep")
		}
		p.Locks = append(p.Locks, lock("nic", nic.ID))
		removed = append(removed, "nic "+nic.Name)
		p.Steps = append(p.Steps, operation.NewStep("net.delete_nic", "delete NIC "+nic.Name, "", net.Ref{Ref: nic.ID}))
	}
	for _, d := range vm.Spec.Disks {
		p.Objects = append(p.Objects, d.VolumeID)
		if !(d.Delete || req.Recursive) || req.Keep {
			p.Locks = append(p.Locks, shared("volume", d.VolumeID))
			continue
		}
		step, words, err := c.deleteVolumeStep(ctx, vms, d.VolumeID, req.Recursive || req.Force)
		if err != nil {
			if gone(err) == nil {
				continue
			}
			return none, nil, err
		}
		p.Locks = append(p.Locks, lock("volume", d.VolumeID))
		removed = append(removed, words...)
		p.Steps = append(p.Steps, step)
	}
	if req.DryRun {
		return none, removed, nil
	}
	op, err := c.run(ctx, call, p)
	return op, removed, err
}

// deleteVolumeStep plans the end of a volume that none of vms may use.
func (c *Changes) deleteVolumeStep(ctx context.Context, vms []vmm.VM, id string, withSnapshots bool) (step operation.Step, words []string, err error) {
	vol, err := c.svc.Storage.GetVolume(ctx, storage.Ref{Ref: id})
	if err != nil {
		return step, nil, err
	}
	if users := usersOf(vms, vol.ID); len(users) > 0 {
		return step, nil, errs.New(errs.Precondition, "VM %s uses it", users[0].Spec.Name).With(volRes(vol)).Because("VOLUME_IN_USE").
			Do(fmt.Sprintf("detach it first: mvirt vm detach-volume %s %s", users[0].Spec.Name, vol.Name))
	}
	words = []string{volumeWords(vol.Name)}
	if vol.SnapshotCount > 0 {
		snaps, err := c.svc.Storage.ListSnapshots(ctx, storage.ListSnapshotsRequest{VolumeID: vol.ID})
		if err != nil {
			return step, nil, err
		}
		var names []string
		for _, s := range snaps {
			names = append(names, s.Name)
			words = append(words, "snapshot "+vol.Name+"@"+s.Name)
		}
		if len(snaps) > 0 && !withSnapshots {
			return step, nil, errs.New(errs.Precondition, "it has %s: %s", plural(len(snaps), "snapshot"), strings.Join(names, ", ")).With(volRes(vol)).
				Because("HAS_SNAPSHOTS").Do("give --recursive to delete them, too")
		}
	}
	return operation.NewStep("storage.delete_volume", "delete "+volumeWords(vol.Name), "", storage.DeleteVolumeRequest{Ref: vol.ID, WithSnapshots: withSnapshots}), words, nil
}

// DeleteVolume deletes a volume that no VM has.
func (c *Changes) DeleteVolume(ctx context.Context, call Call, id string, recursive, dryRun bool) (operation.Operation, []string, error) {
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return operation.Operation{}, nil, err
	}
	step, words, err := c.deleteVolumeStep(ctx, vms, id, recursive)
	if err != nil || dryRun {
		return operation.Operation{}, words, err
	}
	op, err := c.run(ctx, call, one("volume.delete", operation.Finish, step, locks(lock("volume", id)), id))
	return op, words, err
}

// DeleteNIC deletes a NIC that no VM has.
func (c *Changes) DeleteNIC(ctx context.Context, call Call, id string, dryRun bool) (operation.Operation, []string, error) {
	nic, err := c.svc.Net.GetNIC(ctx, net.Ref{Ref: id})
	if err != nil {
		return operation.Operation{}, nil, err
	}
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return operation.Operation{}, nil, err
	}
	if users := nicUsersOf(vms, id); len(users) > 0 {
		return operation.Operation{}, nil, errs.New(errs.Precondition, "VM %s uses it", users[0].Spec.Name).With(nicRes(nic)).Because("NIC_IN_USE").
			Do(fmt.Sprintf("detach it first: mvirt vm detach-nic %s %s", users[0].Spec.Name, nic.Name))
	}
	words := []string{"nic " + nic.Name}
	if dryRun {
		return operation.Operation{}, words, nil
	}
	op, err := c.run(ctx, call, one("nic.delete", operation.Finish, operation.NewStep("net.delete_nic", "delete NIC "+nic.Name, "", net.Ref{Ref: id}),
		locks(lock("nic", id)), id, nic.NetworkID))
	return op, words, err
}
