package plan

import (
	"context"
	"fmt"
	"slices"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// plugging looks a VM up and tells whether its devices change while it runs.
func (c *Changes) plugging(ctx context.Context, id string, f service.Feature, what string) (vm vmm.VM, live bool, err error) {
	vm, err = c.svc.VMM.Get(ctx, vmm.Ref{Ref: id})
	if err != nil || !vm.State.Live() {
		return vm, false, err
	}
	if vm.State != vmm.StateRunning && vm.State != vmm.StatePaused {
		return vm, true, errs.New(errs.Precondition, "it is %s", vm.State).With(vmRes(vm)).Because("VM_BUSY").Do("wait until it runs or is stopped, then try again")
	}
	if !c.svc.Has(service.KindVMM, f) {
		return vm, true, errs.New(errs.Unsupported, "the vmm plugin cannot %s while the VM runs", what).With(vmRes(vm)).Because("FEATURE_MISSING").
			Do("mvirt vm stop " + vm.Spec.Name + ", then try again")
	}
	return vm, true, nil
}

// AttachDisk gives a VM a disk, also while it runs.
func (c *Changes) AttachDisk(ctx context.Context, call Call, vmID string, n NewDisk) (operation.Operation, error) {
	vm, live, err := c.plugging(ctx, vmID, service.FeatureVMMHotplugDisk, "add disks")
	if err != nil {
		return operation.Operation{}, err
	}
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return operation.Operation{}, err
	}
	d := &draft{c: c, vmID: vm.ID, name: vm.Spec.Name, disks: vm.Spec.Disks, plan: operation.Plan{Type: "vm.attach_volume",
		Title: "attach a disk to VM " + vm.Spec.Name, Mode: operation.Undo, Objects: []string{vm.ID}, Locks: locks(lock("vm", vm.ID))}}
	number, err := c.freeDisk(ctx, vm)
	if err != nil {
		return operation.Operation{}, err
	}
	if err := d.disk(ctx, vms, number, n); err != nil {
		return operation.Operation{}, err
	}
	disk := d.disks[len(d.disks)-1]
	d.step("vmm.add_disk", "add disk "+disk.Name+" to the definition", "took disk "+disk.Name+" out of the definition", vmDisk{vm.ID, disk})
	if live {
		d.step("storage.attach", "attach disk "+disk.Name, "detached disk "+disk.Name, attachVolume{VMID: vm.ID, VolumeID: disk.VolumeID, ReadOnly: disk.ReadOnly})
		d.step("vmm.plug_disk", "plug disk "+disk.Name, "unplugged disk "+disk.Name, vmDisk{vm.ID, disk})
	}
	return c.run(ctx, call, d.plan)
}

// DetachDisk takes a disk from a VM, also while it runs. ref is the disk's name in the VM or its volume's id.
// The volume stays.
func (c *Changes) DetachDisk(ctx context.Context, call Call, vmID, ref string) (operation.Operation, error) {
	vm, live, err := c.plugging(ctx, vmID, service.FeatureVMMHotplugDisk, "remove disks")
	if err != nil {
		return operation.Operation{}, err
	}
	for _, d := range vm.Spec.Disks {
		if d.Name != ref && d.VolumeID != ref {
			continue
		}
		p := operation.Plan{Type: "vm.detach_volume", Title: "detach disk " + d.Name + " from VM " + vm.Spec.Name, Mode: operation.Finish,
			Objects: []string{vm.ID, d.VolumeID}, Locks: locks(lock("vm", vm.ID), lock("volume", d.VolumeID))}
		if live {
			p.Steps = append(p.Steps, operation.NewStep("vmm.unplug_disk", "unplug disk "+d.Name, "", unplug{vm.ID, d.Name}))
		} else {
			p.Steps = append(p.Steps, checkStopped(vm))
		}
		p.Steps = append(p.Steps,
			operation.NewStep("vmm.remove_disk", "take disk "+d.Name+" out of the definition", "", vmDisk{vm.ID, d}),
			operation.NewStep("storage.detach", "detach disk "+d.Name, "", storage.DetachRequest{VolumeID: d.VolumeID, VMID: vm.ID}))
		return c.run(ctx, call, p)
	}
	return operation.Operation{}, errs.New(errs.NotFound, "it has no such disk").With(vmRes(vm)).Do("mvirt vm show " + vm.Spec.Name + " lists its disks")
}

// AttachNIC gives a VM a NIC, also while it runs.
func (c *Changes) AttachNIC(ctx context.Context, call Call, vmID string, n NewNIC) (operation.Operation, error) {
	vm, live, err := c.plugging(ctx, vmID, service.FeatureVMMHotplugNIC, "add NICs")
	if err != nil {
		return operation.Operation{}, err
	}
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return operation.Operation{}, err
	}
	d := &draft{c: c, vmID: vm.ID, name: vm.Spec.Name, nics: vm.Spec.NICs, plan: operation.Plan{Type: "vm.attach_nic",
		Title: "attach a NIC to VM " + vm.Spec.Name, Mode: operation.Undo, Objects: []string{vm.ID}, Locks: locks(lock("vm", vm.ID))}}
	number, err := c.freeNIC(ctx, vm)
	if err != nil {
		return operation.Operation{}, err
	}
	if err := d.nic(ctx, vms, number, n); err != nil {
		return operation.Operation{}, err
	}
	nic := d.nics[len(d.nics)-1]
	d.step("vmm.add_nic", "add the NIC to the definition", "took the NIC out of the definition", vmNIC{vm.ID, nic})
	if live {
		d.step("net.attach", "attach the NIC", "detached the NIC", attachNIC{VMID: vm.ID, NICID: nic.NICID})
		d.step("vmm.plug_nic", "plug the NIC", "unplugged the NIC", vmNIC{vm.ID, nic})
	}
	return c.run(ctx, call, d.plan)
}

// RepairNIC gives a running VM's NIC a data path again that it lost. A hypervisor that speaks vhost-user connects
// to the path by itself; any other holds descriptors of the old path, so the device is taken out of the guest and
// plugged again, with the same MAC and address.
func (c *Changes) RepairNIC(ctx context.Context, call Call, vm vmm.VM, n vmm.NIC) (operation.Operation, error) {
	p := operation.Plan{Type: "vm.repair_nic", Title: "give a NIC of VM " + vm.Spec.Name + " its data path again", Mode: operation.Finish,
		Objects: []string{vm.ID, n.NICID}, Locks: locks(lock("vm", vm.ID), lock("nic", n.NICID))}
	switch {
	case c.svc.Has(service.KindVMM, service.FeatureVMMVhostUser):
		p.Steps = append(p.Steps, operation.NewStep("net.attach", "attach the NIC", "", attachNIC{VMID: vm.ID, NICID: n.NICID}))
	case c.svc.Has(service.KindVMM, service.FeatureVMMHotplugNIC):
		p.Steps = append(p.Steps, operation.NewStep("vmm.unplug_nic", "unplug the NIC", "", unplug{vm.ID, n.NICID}),
			operation.NewStep("vmm.replug_nic", "attach the NIC and plug it", "", vmNIC{vm.ID, n}))
	default:
		return operation.Operation{}, errs.New(errs.Unsupported, "the vmm plugin cannot exchange NICs while the VM runs").With(vmRes(vm)).Because("FEATURE_MISSING").
			Do("mvirt vm stop " + vm.Spec.Name + ", then mvirt vm start " + vm.Spec.Name)
	}
	return c.run(ctx, call, p)
}

// freeDisk is the lowest number from the count of the VM's disks on whose made names are not taken: a volume
// that was made for the VM and detached lives on under its name.
func (c *Changes) freeDisk(ctx context.Context, vm vmm.VM) (int, error) {
	all, err := c.svc.Storage.ListVolumes(ctx)
	if err != nil {
		return 0, err
	}
	taken := make(map[string]bool, len(all))
	for _, v := range all {
		taken[v.Name] = true
	}
	i := len(vm.Spec.Disks)
	for taken[trimName(vm.Spec.Name+"-"+diskName(i))] || slices.ContainsFunc(vm.Spec.Disks, func(d vmm.Disk) bool { return d.Name == diskName(i) }) {
		i++
	}
	return i, nil
}

// freeNIC is the lowest number from the count of the VM's NICs on whose made name is not taken: after a
// detach the names have gaps, and a detached NIC lives on under its name.
func (c *Changes) freeNIC(ctx context.Context, vm vmm.VM) (int, error) {
	all, err := c.svc.Net.ListNICs(ctx, net.ListNICsRequest{})
	if err != nil {
		return 0, err
	}
	taken := make(map[string]bool, len(all))
	for _, n := range all {
		taken[n.Name] = true
	}
	i := len(vm.Spec.NICs)
	for taken[trimName(fmt.Sprintf("%s-nic%d", vm.Spec.Name, i))] {
		i++
	}
	return i, nil
}

// DetachNIC takes a NIC from a VM, also while it runs. The NIC stays.
func (c *Changes) DetachNIC(ctx context.Context, call Call, vmID, nicID string) (operation.Operation, error) {
	vm, live, err := c.plugging(ctx, vmID, service.FeatureVMMHotplugNIC, "remove NICs")
	if err != nil {
		return operation.Operation{}, err
	}
	for i, n := range vm.Spec.NICs {
		if n.NICID != nicID {
			continue
		}
		p := operation.Plan{Type: "vm.detach_nic", Title: fmt.Sprintf("detach NIC %d from VM %s", i, vm.Spec.Name), Mode: operation.Finish,
			Objects: []string{vm.ID, nicID}, Locks: locks(lock("vm", vm.ID), lock("nic", nicID))}
		if live {
			p.Steps = append(p.Steps, operation.NewStep("vmm.unplug_nic", "unplug the NIC", "", unplug{vm.ID, nicID}))
		} else {
			p.Steps = append(p.Steps, checkStopped(vm))
		}
		p.Steps = append(p.Steps,
			operation.NewStep("vmm.remove_nic", "take the NIC out of the definition", "", vmNIC{vm.ID, n}),
			operation.NewStep("net.detach", "detach the NIC", "", net.DetachRequest{NICID: nicID, VMID: vm.ID}))
		return c.run(ctx, call, p)
	}
	return operation.Operation{}, errs.New(errs.NotFound, "it does not have this NIC").With(vmRes(vm)).Do("mvirt vm show " + vm.Spec.Name + " lists its NICs")
}
