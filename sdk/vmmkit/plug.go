package vmmkit

import (
	"context"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// PlugDisk adds a disk to a running VM.
func (m *Manager) PlugDisk(ctx context.Context, req vmm.PlugDiskRequest) error {
	if err := checkDiskAttachment("disk", req.Disk); err != nil {
		return err
	}
	_, err := m.ask(ctx, req.ID, "given a disk", func(ctx context.Context, v *machine, r *run, inst Instance) error {
		for _, d := range v.running(r).Disks {
			switch {
			case d.Name == req.Disk.Name && d.VolumeID == req.Disk.VolumeID:
				return nil // again
			case d.Name == req.Disk.Name:
				return errs.New(errs.Exists, "it has a disk of the name %s", d.Name).Do("choose another name, or unplug that disk first")
			}
		}
		if len(v.running(r).Disks) >= MaxDisks {
			return errs.New(errs.Exhausted, "it has %d disks, the limit", MaxDisks)
		}
		undo, err := v.reachable(ctx, r, diskPath(req.Disk))
		if err != nil {
			return err
		}
		disks, _ := inside(r.rec.Jailed, []vmm.DiskAttachment{req.Disk}, nil)
		if err := inst.PlugDisk(ctx, disks[0]); err != nil {
			undo()
			return err
		}
		return v.nowHas(r, func(s *vmm.Spec) {
			s.Disks = append(s.Disks, vmm.Disk{Name: req.Disk.Name, VolumeID: req.Disk.VolumeID, ReadOnly: req.Disk.ReadOnly,
				Limit: req.Disk.Limit})
		})
	}, vmm.StateRunning, vmm.StatePaused)
	return err
}

// UnplugDisk takes a disk away.
func (m *Manager) UnplugDisk(ctx context.Context, req vmm.UnplugRequest) error {
	_, err := m.ask(ctx, req.ID, "relieved of a disk", func(ctx context.Context, v *machine, r *run, inst Instance) error {
		kept := []vmm.Disk{}
		for _, d := range v.running(r).Disks {
			if d.Name != req.Name {
				kept = append(kept, d)
			}
		}
		if len(kept) == len(v.running(r).Disks) {
			return nil // it is gone already
		}
		if err := inst.UnplugDisk(ctx, req.Name); err != nil {
			return err
		}
		v.unreachable(ctx, r, jail.Path{Kind: jail.KindDisk, Name: req.Name})
		return v.nowHas(r, func(s *vmm.Spec) { s.Disks = kept })
	}, vmm.StateRunning, vmm.StatePaused)
	return err
}

// PlugNIC adds a NIC to a running VM.
func (m *Manager) PlugNIC(ctx context.Context, req vmm.PlugNICRequest) error {
	if err := checkNICAttachment("nic", req.NIC); err != nil {
		return err
	}
	_, err := m.ask(ctx, req.ID, "given a NIC", func(ctx context.Context, v *machine, r *run, inst Instance) error {
		have := v.running(r).NICs
		for _, n := range have {
			if n.NICID == req.NIC.NICID {
				return nil
			}
		}
		if len(have) >= MaxNICs {
			return errs.New(errs.Exhausted, "it has %d NICs, the limit", MaxNICs)
		}
		var paths []jail.Path
		if req.NIC.SocketPath != "" {
			paths = append(paths, socketPath(req.NIC))
		}
		undo, err := v.reachable(ctx, r, paths...)
		if err != nil {
			return err
		}
		_, nics := inside(r.rec.Jailed, nil, []vmm.NICAttachment{req.NIC})
		if err := inst.PlugNIC(ctx, nics[0]); err != nil {
			undo()
			return err
		}
		return v.nowHas(r, func(s *vmm.Spec) { s.NICs = append(s.NICs, vmm.NIC{NICID: req.NIC.NICID, MAC: req.NIC.MAC}) })
	}, vmm.StateRunning, vmm.StatePaused)
	return err
}

// UnplugNIC takes a NIC away.
func (m *Manager) UnplugNIC(ctx context.Context, req vmm.UnplugRequest) error {
	_, err := m.ask(ctx, req.ID, "relieved of a NIC", func(ctx context.Context, v *machine, r *run, inst Instance) error {
		kept := []vmm.NIC{}
		for _, n := range v.running(r).NICs {
			if n.NICID != req.Name {
				kept = append(kept, n)
			}
		}
		if len(kept) == len(v.running(r).NICs) {
			return nil
		}
		if err := inst.UnplugNIC(ctx, req.Name); err != nil {
			return err
		}
		v.unreachable(ctx, r, jail.Path{Kind: jail.KindSocket, Name: req.Name})
		return v.nowHas(r, func(s *vmm.Spec) { s.NICs = kept })
	}, vmm.StateRunning, vmm.StatePaused)
	return err
}

// DiskResized tells the guest that a volume has grown.
func (m *Manager) DiskResized(ctx context.Context, req vmm.DiskResizedRequest) error {
	_, err := m.ask(ctx, req.ID, "told of a disk's new size", func(ctx context.Context, v *machine, r *run, inst Instance) error {
		for _, d := range v.running(r).Disks {
			if d.Name == req.Name {
				if err := v.hasSize(ctx, r, req); err != nil {
					return err
				}
				return inst.DiskResized(ctx, req.Name, req.SizeBytes)
			}
		}
		return errs.New(errs.NotFound, "it has no disk %s", req.Name)
	}, vmm.StateRunning, vmm.StatePaused)
	return err
}

// hasSize says whether a disk in a jail, which drivers cannot look at, has the size that is told.
func (v *machine) hasSize(ctx context.Context, r *run, req vmm.DiskResizedRequest) error {
	if !r.rec.Jailed {
		return nil
	}
	if v.m.o.Jail == nil {
		return errJailOff()
	}
	size, err := v.m.o.Jail.Size(ctx, v.id, r.proc.Identity(), req.Name)
	if err == nil && size != req.SizeBytes {
		err = errs.Field("size_bytes", "give the volume's size", "disk %s has %d bytes, not %d", req.Name, size, req.SizeBytes)
	}
	return err
}

// running is what the process has: the definition at its start, and what was plugged since.
func (v *machine) running(r *run) vmm.Spec {
	v.mu.Lock()
	defer v.mu.Unlock()
	return cloneSpec(r.rec.Spec)
}

// nowHas changes what the process is known to have, durably.
func (v *machine) nowHas(r *run, change func(*vmm.Spec)) error {
	v.mu.Lock()
	rec := r.rec
	rec.Spec = cloneSpec(rec.Spec)
	change(&rec.Spec)
	r.rec = rec
	v.publishLocked(vmm.EventChanged)
	v.mu.Unlock()
	select {
	case <-r.ended:
		return nil // and its record with it
	default:
	}
	return v.m.db.Apply(v.id, store.Change{Runtime: &rec})
}
