package plan

import (
	"context"
	"errors"
	"slices"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

type vmDisk struct {
	VMID string
	Disk vmm.Disk
}

type vmNIC struct {
	VMID string
	NIC  vmm.NIC
}

type unplug struct {
	VMID string
	Name string
}

func (a actions) plug() map[string]operation.Action {
	v := a.svc.VMM
	return map[string]operation.Action{
		"vmm.add_disk":    operation.Typed(a.addDisk, a.removeDisk, nil),
		"vmm.remove_disk": operation.Typed(a.removeDisk, nil, nil),
		"vmm.add_nic":     operation.Typed(a.addNIC, a.removeNIC, nil),
		"vmm.remove_nic":  operation.Typed(a.removeNIC, nil, nil),
		"vmm.plug_disk": operation.Typed(
			func(ctx context.Context, r *operation.Run, d vmDisk) error {
				at, ok := operation.Value[storage.Attachment](r, "volume:"+d.Disk.VolumeID)
				if !ok {
					return errs.New(errs.Internal, "volume %s is not attached", d.Disk.VolumeID)
				}
				return v.PlugDisk(ctx, vmm.PlugDiskRequest{ID: d.VMID, Disk: diskAttachment(d.Disk, at)})
			},
			func(ctx context.Context, _ *operation.Run, d vmDisk) error {
				return a.unplugDisk(ctx, nil, unplug{d.VMID, d.Disk.Name})
			}, nil),
		"vmm.unplug_disk": operation.Typed(a.unplugDisk, nil, nil),
		"vmm.plug_nic": operation.Typed(
			func(ctx context.Context, r *operation.Run, n vmNIC) error {
				path, ok := operation.Value[net.Attachment](r, "nic:"+n.NIC.NICID)
				if !ok {
					return errs.New(errs.Internal, "NIC %s is not attached", n.NIC.NICID)
				}
				return v.PlugNIC(ctx, vmm.PlugNICRequest{ID: n.VMID, NIC: nicAttachment(n.NIC.NICID, path)})
			},
			func(ctx context.Context, _ *operation.Run, n vmNIC) error {
				return a.unplugNIC(ctx, nil, unplug{n.VMID, n.NIC.NICID})
			}, nil),
		// One step, for the path's descriptors do not outlive a crash of the core between two.
		"vmm.replug_nic": operation.Typed(
			func(ctx context.Context, r *operation.Run, n vmNIC) error {
				vm, err := v.Get(ctx, vmm.Ref{Ref: n.VMID})
				if err != nil || !vm.State.Live() {
					return gone(err)
				}
				if err := a.attachNIC(ctx, r, attachNIC{VMID: n.VMID, NICID: n.NIC.NICID}); err != nil {
					return err
				}
				path, _ := operation.Value[net.Attachment](r, "nic:"+n.NIC.NICID)
				return v.PlugNIC(ctx, vmm.PlugNICRequest{ID: n.VMID, NIC: nicAttachment(n.NIC.NICID, path)})
			}, nil, nil),
		"vmm.unplug_nic":   operation.Typed(a.unplugNIC, nil, nil),
		"vmm.disk_resized": operation.Typed(a.diskResized, nil, nil),
	}
}

func (a actions) addDisk(ctx context.Context, _ *operation.Run, d vmDisk) error {
	_, err := a.change(ctx, d.VMID, nil, nil, func(s *vmm.Spec) bool {
		if slices.ContainsFunc(s.Disks, func(o vmm.Disk) bool { return o.VolumeID == d.Disk.VolumeID }) {
			return false
		}
		s.Disks = append(s.Disks, d.Disk)
		return true
	})
	return err
}

func (a actions) removeDisk(ctx context.Context, _ *operation.Run, d vmDisk) error {
	_, err := a.change(ctx, d.VMID, nil, nil, func(s *vmm.Spec) bool {
		n := len(s.Disks)
		s.Disks = slices.DeleteFunc(s.Disks, func(o vmm.Disk) bool { return o.VolumeID == d.Disk.VolumeID })
		return len(s.Disks) != n
	})
	return gone(err)
}

func (a actions) addNIC(ctx context.Context, r *operation.Run, n vmNIC) error {
	if mac, ok := operation.Value[string](r, "mac:"+n.NIC.NICID); ok {
		n.NIC.MAC = mac
	}
	_, err := a.change(ctx, n.VMID, nil, nil, func(s *vmm.Spec) bool {
		if slices.ContainsFunc(s.NICs, func(o vmm.NIC) bool { return o.NICID == n.NIC.NICID }) {
			return false
		}
		s.NICs = append(s.NICs, n.NIC)
		return true
	})
	return err
}

func (a actions) removeNIC(ctx context.Context, _ *operation.Run, n vmNIC) error {
	_, err := a.change(ctx, n.VMID, nil, nil, func(s *vmm.Spec) bool {
		k := len(s.NICs)
		s.NICs = slices.DeleteFunc(s.NICs, func(o vmm.NIC) bool { return o.NICID == n.NIC.NICID })
		return len(s.NICs) != k
	})
	return gone(err)
}

func (a actions) unplugDisk(ctx context.Context, _ *operation.Run, u unplug) error {
	return a.unplugged(ctx, u, a.svc.VMM.UnplugDisk)
}

func (a actions) unplugNIC(ctx context.Context, _ *operation.Run, u unplug) error {
	return a.unplugged(ctx, u, a.svc.VMM.UnplugNIC)
}

// unplugged removes a device; a VM that does not run any more, or is gone, has none.
func (a actions) unplugged(ctx context.Context, u unplug, fn func(context.Context, vmm.UnplugRequest) error) error {
	vm, err := a.svc.VMM.Get(ctx, vmm.Ref{Ref: u.VMID})
	if err != nil || !vm.State.Live() {
		return gone(err)
	}
	return gone(fn(ctx, vmm.UnplugRequest{ID: u.VMID, Name: u.Name}))
}

// diskResized tells a running guest. A plugin that cannot leaves it to the guest's next start.
func (a actions) diskResized(ctx context.Context, _ *operation.Run, req vmm.DiskResizedRequest) error {
	vm, err := a.svc.VMM.Get(ctx, vmm.Ref{Ref: req.ID})
	if err != nil || !vm.State.Live() {
		return gone(err)
	}
	if err := a.svc.VMM.DiskResized(ctx, req); err != nil && !errors.Is(err, errs.Unsupported) {
		return err
	}
	return nil
}
