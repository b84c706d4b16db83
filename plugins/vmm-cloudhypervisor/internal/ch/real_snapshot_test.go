package ch

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/test/guest"
)

// A guest's memory and disk at one point: it goes on from there under its own id and under a new one, with what
// its shell knew, its network and its disk, and reboots from the new places.
func TestRealSnapshot(t *testing.T) {
	r, g := realRig(t)
	ctx := t.Context()
	tap := func() guest.TAP {
		tp, err := guest.NewTAP(1)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(tp.Close)
		return tp
	}
	disk := func(from string) vmm.DiskAttachment {
		d := vmm.DiskAttachment{Name: "root", VolumeID: ident.New(), Path: filepath.Join(t.TempDir(), "root.raw"), Format: "raw"}
		copyFile(t, from, d.Path)
		return d
	}
	const mac = "52:54:00:00:00:21"
	first, root := tap(), disk(g.RootRaw)
	spec := vmm.Spec{Name: "snap", CPUs: 1, MemoryBytes: 128 << 20, Boot: vmm.Boot{Cmdline: "console=ttyS0 quiet root=LABEL=" + guest.Label},
		Disks: []vmm.Disk{{Name: "root", VolumeID: root.VolumeID}}, Vsock: 9, CloudInit: vmm.CloudInit{UserData: "#!/bin/sh\n:\n"}}
	nic := vmm.NICAttachment{NICID: ident.New(), MAC: mac, TAP: first.Queues, Queues: 1}
	spec.NICs = []vmm.NIC{{NICID: nic.NICID, MAC: mac}}
	vm, err := r.m.Create(ctx, vmm.CreateRequest{ID: ident.New(), Kernel: open(t, g.Kernel), Initramfs: open(t, g.Initramfs), Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	if vm, err = r.m.Start(ctx, vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{root}, NICs: []vmm.NICAttachment{nic}}); err != nil {
		t.Fatal(err)
	}
	c := r.console(vm.ID)
	c.login()
	c.ask("X=remembered; echo before >/root/file; sync; uptime")

	if _, err := r.m.Pause(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	snap, err := r.snaps().Snapshot(ctx, vmm.SnapshotRequest{ID: vm.ID, SnapshotID: ident.New(), Name: "warm"})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d MiB written in %v", snap.Hypervisor, snap.SizeBytes>>20, time.Since(begin))
	then := disk(root.Path) // what the storage plugin does meanwhile
	if _, err := r.m.Resume(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	if got := c.ask("X=changed; echo after >/root/file; sync; echo $X"); got != "changed" {
		t.Errorf("after the snapshot the guest says %q", got)
	}
	if _, err := r.m.Kill(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}

	// Its own id: the volume rolled back, another TAP.
	copyFile(t, then.Path, root.Path)
	second := tap()
	nic.TAP = second.Queues
	begin = time.Now()
	if vm, err = r.snaps().StartFromSnapshot(ctx, vmm.StartFromSnapshotRequest{SnapshotID: snap.ID,
		Start: vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{root}, NICs: []vmm.NICAttachment{nic}}}); err != nil {
		t.Fatal(err)
	}
	t.Logf("restored in %v", time.Since(begin))
	c = r.console(vm.ID)
	c.send("\n")
	if got := c.ask("echo $X $(cat /root/file)"); got != "remembered before" {
		t.Errorf("restored, the guest says %q", got)
	}
	c.send("ifconfig eth0 up; arping -c 3 -I eth0 10.9.9.9 >/dev/null 2>&1 &\n")
	seesFrame(t, second, mac)

	// A new id beside it: a volume of its own, a NIC of its own with the same address.
	third := tap()
	twinNIC := vmm.NICAttachment{NICID: ident.New(), MAC: mac, TAP: third.Queues, Queues: 1}
	spec.Name = "twin"
	spec.Disks = []vmm.Disk{{Name: "root", VolumeID: then.VolumeID}}
	spec.NICs = []vmm.NIC{{NICID: twinNIC.NICID, MAC: mac}}
	twin, err := r.m.Create(ctx, vmm.CreateRequest{ID: ident.New(), BootFrom: snap.ID, Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	if twin, err = r.snaps().StartFromSnapshot(ctx, vmm.StartFromSnapshotRequest{SnapshotID: snap.ID,
		Start: vmm.StartRequest{ID: twin.ID, Disks: []vmm.DiskAttachment{then}, NICs: []vmm.NICAttachment{twinNIC}, Paused: true}}); err != nil {
		t.Fatal(err)
	}
	if twin, err = r.m.Resume(ctx, vmm.Ref{Ref: twin.ID}); err != nil || twin.State != vmm.StateRunning {
		t.Fatalf("resume: %+v, %v", twin, err)
	}
	c2 := r.console(twin.ID)
	c2.send("\n")
	if got := c2.ask("echo $X $(cat /root/file); echo twin >/root/file; sync"); got != "remembered before" {
		t.Errorf("the twin says %q", got)
	}
	c2.send("arping -c 3 -I eth0 10.9.9.9 >/dev/null 2>&1 &\n")
	seesFrame(t, third, mac)
	if got := c.ask("echo $(cat /root/file)"); got != "before" {
		t.Errorf("the twin's write is seen by the other: %q", got)
	}
	if err := r.snaps().DeleteSnapshot(ctx, vmm.Ref{Ref: snap.ID}); err != nil {
		t.Error(err)
	}

	// The plugin comes back to both, and the twin reboots from where it is.
	c.stop()
	c2.stop()
	r.close()
	r.openReal("")
	c2 = r.console(twin.ID)
	if twin, err = r.m.Reboot(ctx, vmm.RebootRequest{Ref: twin.ID, Timeout: realLimit}); err != nil {
		t.Fatal(err)
	}
	c2.until("mvirt-guest: power button")
	c2.until("mvirt-guest: init")
	c2.login()
	if got := c2.ask("cat /root/file"); got != "twin" {
		t.Errorf("rebooted, the twin has %q", got)
	}
	for _, id := range []string{vm.ID, twin.ID} {
		if got, err := r.m.Stop(ctx, vmm.StopRequest{Ref: id, Timeout: realLimit}); err != nil || got.Reason != reasonOff {
			t.Errorf("stop: %+v, %v", got, err)
		}
	}
}
