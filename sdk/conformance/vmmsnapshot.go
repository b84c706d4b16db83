package conformance

import (
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// checkMemorySnapshots takes a guest's memory, and lets it and another VM go on from there.
func checkMemorySnapshots(c *C) {
	if !c.has(service.FeatureVMMSnapshot) {
		c.Skipf("the plugin does not declare memory snapshots")
	}
	p := c.p.VMM
	_, err := p.Snapshot(c, vmm.SnapshotRequest{ID: ident.New(), SnapshotID: ident.New()})
	c.fails(err, errs.NotFound, "Snapshot of nothing")
	_, err = p.StartFromSnapshot(c, vmm.StartFromSnapshotRequest{SnapshotID: ident.New(), Start: vmm.StartRequest{ID: ident.New()}})
	c.fails(err, errs.NotFound, "StartFromSnapshot of nothing")
	c.ok(p.DeleteSnapshot(c, vmm.Ref{Ref: ident.New()}), "DeleteSnapshot of nothing")
	v := c.started("v")
	if int(v.PID) == c.p.PID() {
		return // a fake has no memory
	}
	seen := c.cfg.BootMarker
	if seen != "" {
		c.shows(c.console(vmm.ConsoleRequest{Ref: v.ID, ReadOnly: true, Replay: 1 << 20}), seen)
	}
	req := vmm.SnapshotRequest{ID: v.ID, SnapshotID: ident.New(), Name: "warm", Disks: []vmm.SnapshotDisk{{Name: "x", SnapshotID: ident.New()}}}
	_, err = p.Snapshot(c, req)
	c.fails(err, errs.Precondition, "Snapshot of a running VM")
	_, err = p.Pause(c, vmm.Ref{Ref: v.ID})
	c.ok(err, "Pause")
	snap, err := p.Snapshot(c, req)
	c.ok(err, "Snapshot")
	c.later(func() { c.ok(p.DeleteSnapshot(c, vmm.Ref{Ref: req.SnapshotID}), "DeleteSnapshot") })
	if snap.ID != req.SnapshotID || snap.Name != "warm" || snap.VMID != v.ID || snap.SizeBytes == 0 || snap.CreatedAt.IsZero() || snap.Hypervisor != v.Hypervisor ||
		snap.Spec.Name != v.Spec.Name || len(snap.Disks) != 1 || snap.Disks[0] != req.Disks[0] {
		c.Errorf("snapshot %+v", snap)
	}
	again, err := p.Snapshot(c, req)
	c.ok(err, "the same Snapshot again")
	if !again.CreatedAt.Equal(snap.CreatedAt) {
		c.Errorf("the same Snapshot again made another: %v, was %v", again.CreatedAt, snap.CreatedAt)
	}
	c.state(c.get(v.ID), vmm.StatePaused, "after the snapshot")
	_, err = p.Resume(c, vmm.Ref{Ref: v.ID})
	c.ok(err, "Resume after a snapshot")
	from := vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: vmm.StartRequest{ID: v.ID}}
	_, err = p.StartFromSnapshot(c, from)
	c.because(err, errs.Precondition, "VM_RUNNING", "StartFromSnapshot of a running VM")
	_, err = p.Kill(c, vmm.Ref{Ref: v.ID})
	c.ok(err, "Kill")
	c.restart(true)
	p = c.p.VMM
	list, err := p.ListSnapshots(c, vmm.Ref{Ref: v.Spec.Name})
	c.ok(err, "ListSnapshots")
	if len(list) != 1 || list[0].ID != snap.ID || !list[0].CreatedAt.Equal(snap.CreatedAt) {
		c.Errorf("listed after a restart: %+v", list)
	}
	back, err := p.StartFromSnapshot(c, from)
	c.ok(err, "StartFromSnapshot")
	c.state(back, vmm.StateRunning, "StartFromSnapshot")
	_, err = p.Kill(c, vmm.Ref{Ref: v.ID})
	c.ok(err, "Kill")

	// Another VM of the same shape goes on from there, one of another shape does not.
	create := vmm.CreateRequest{ID: ident.New(), Spec: c.spec("twin"), BootFrom: snap.ID}
	twin, err := p.Create(c, create)
	c.ok(err, "Create with the kernel of a snapshot")
	c.removeVM(create.ID)
	if !twin.Spec.Boot.HasKernel || twin.Spec.Boot.KernelSHA256 != snap.Spec.Boot.KernelSHA256 {
		c.Errorf("created with the kernel of a snapshot: %+v", twin.Spec.Boot)
	}
	from.Start = vmm.StartRequest{ID: twin.ID, Paused: true}
	twin, err = p.StartFromSnapshot(c, from)
	c.ok(err, "StartFromSnapshot of another VM, paused")
	c.state(twin, vmm.StatePaused, "StartFromSnapshot, paused")
	twin, err = p.Resume(c, vmm.Ref{Ref: twin.ID})
	c.ok(err, "Resume")
	c.state(twin, vmm.StateRunning, "Resume")
	_, err = p.Stop(c, vmm.StopRequest{Ref: twin.ID, Timeout: time.Second})
	c.ok(err, "Stop")
	spec := twin.Spec
	spec.CPUs++
	_, err = p.Update(c, vmm.UpdateRequest{ID: twin.ID, Generation: twin.Generation, Spec: spec})
	c.ok(err, "Update")
	_, err = p.StartFromSnapshot(c, from)
	c.because(err, errs.Precondition, "OTHER_SHAPE", "StartFromSnapshot with another number of vCPUs")
}
