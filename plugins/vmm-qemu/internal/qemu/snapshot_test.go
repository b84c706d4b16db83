package qemu

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/test/guest"
)

func (r *rig) snaps() vmmkit.Snapshotting {
	return vmmkit.Snapshotting{Resizable: vmmkit.Resizable{Manager: r.m}}
}

// emulated tells whether guests here run without KVM.
func (r *rig) emulated() bool { return kvmUsable() != nil }

var questions int

// ask runs a command in the guest's shell and gives its output.
func (c *consoleRig) ask(command string) string {
	c.t.Helper()
	questions++
	mark := "done-" + strconv.Itoa(questions)
	c.mu.Lock()
	from := c.seen
	c.mu.Unlock()
	c.send("echo beg''in-" + mark[5:] + "; " + command + "; echo " + mark[:5] + "''" + mark[5:] + "\n")
	c.until(mark)
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.got.String()[from : c.seen-len(mark)]
	_, out, _ = strings.Cut(out, "begin-"+mark[5:]) // before it is what was typed
	return strings.TrimSpace(strings.ReplaceAll(out, "\r", ""))
}

func copyTo(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
}

func emptyDisk(t *testing.T, name string, size int64) vmm.DiskAttachment {
	t.Helper()
	d := vmm.DiskAttachment{Name: name, VolumeID: ident.New(), Path: filepath.Join(t.TempDir(), name), Format: "raw"}
	if err := os.WriteFile(d.Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.Path, size); err != nil {
		t.Fatal(err)
	}
	return d
}

// Memory at one point: the same VM, and another beside it, go on from there, with a disk that was plugged and a
// vCPU that was plugged, after the plugin has been away.
func TestSnapshot(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*limit)
	defer cancel()
	tap := func() guest.TAP {
		tp, err := guest.NewTAP(1)
		if err != nil {
			t.Skipf("no TAP can be made here: %v", err)
		}
		t.Cleanup(tp.Close)
		return tp
	}
	nic := vmm.NICAttachment{NICID: ident.New(), MAC: "52:54:00:00:00:41", TAP: tap().Queues, Queues: 1}
	vm := r.create(func(q *vmm.CreateRequest) {
		q.Spec.MaxCPUs, q.Spec.MaxMemory = 2, 256<<20
		q.Spec.NICs = []vmm.NIC{{NICID: nic.NICID, MAC: nic.MAC}}
		q.Spec.CloudInit.UserData = "#!/bin/sh\n:\n"
	})
	r.start(vm.ID, vmm.StartRequest{NICs: []vmm.NICAttachment{nic}})
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.login()
	extra := emptyDisk(t, "extra", 4<<20)
	if err := r.m.PlugDisk(ctx, vmm.PlugDiskRequest{ID: vm.ID, Disk: extra}); err != nil {
		t.Fatal(err)
	}
	c.until("mvirt-guest: disk add")
	spec := r.get(vm.ID).Spec
	spec.Disks = []vmm.Disk{{Name: "extra", VolumeID: extra.VolumeID}}
	if _, err := r.m.Update(ctx, vmm.UpdateRequest{ID: vm.ID, Generation: r.get(vm.ID).Generation, Spec: spec}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.snaps().Resize(ctx, vmm.ResizeRequest{Ref: vm.ID, CPUs: 2}); err != nil {
		t.Fatal(err)
	}
	c.ask("X=remembered; D=$(basename $(dirname $(grep -l extra /sys/block/vd*/serial)))")
	req := vmm.SnapshotRequest{ID: vm.ID, SnapshotID: ident.New(), Name: "warm"}
	if _, err := r.snaps().Snapshot(ctx, req); !errors.Is(err, errs.Precondition) {
		t.Errorf("of a running VM: %v", err)
	}
	if _, err := r.m.Pause(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	snap, err := r.snaps().Snapshot(ctx, req)
	if err != nil || snap.SizeBytes == 0 || snap.Spec.CPUs != 2 || len(snap.Spec.Disks) != 1 {
		t.Fatalf("%+v, %v", snap, err)
	}
	t.Logf("%d MiB of %d", snap.SizeBytes>>20, snap.Spec.MemoryBytes>>20)
	if got := r.get(vm.ID); got.State != vmm.StatePaused {
		t.Errorf("after the snapshot: %+v", got)
	}
	then := emptyDisk(t, "extra", 4<<20)
	if _, err := r.m.Resume(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	if got := c.ask("X=changed; echo written >/dev/$D; sync; echo $X"); got != "changed" {
		t.Errorf("after the snapshot the guest says %q", got)
	}
	if _, err := r.m.Kill(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	r.close()
	r.open()

	copyTo(t, then.Path, extra.Path)
	nic.TAP = tap().Queues
	back, err := r.snaps().StartFromSnapshot(ctx, vmm.StartFromSnapshotRequest{SnapshotID: snap.ID,
		Start: vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{extra}, NICs: []vmm.NICAttachment{nic}}})
	if err != nil || back.State != vmm.StateRunning {
		t.Fatalf("back: %+v, %v", back, err)
	}
	c = r.console(vm.ID, vmm.ConsoleRequest{})
	if got := c.ask("\necho; echo $X $(dd if=/dev/$D bs=1 count=1 2>/dev/null | wc -c) $(grep -c written /dev/$D)"); !strings.HasSuffix(got, "remembered 1 0") {
		t.Errorf("restored, the guest says %q", got)
	}
	if err := r.m.UnplugDisk(ctx, vmm.UnplugRequest{ID: vm.ID, Name: "extra"}); err != nil {
		t.Errorf("a disk of the snapshot is not let go: %v", err)
	}

	other := vmm.NICAttachment{NICID: ident.New(), MAC: "52:54:00:00:00:41", TAP: tap().Queues, Queues: 1}
	spec.Name, spec.CPUs = "twin", 2
	spec.Disks = []vmm.Disk{{Name: "extra", VolumeID: then.VolumeID}}
	spec.NICs = []vmm.NIC{{NICID: other.NICID, MAC: other.MAC}}
	twin, err := r.m.Create(ctx, vmm.CreateRequest{ID: ident.New(), BootFrom: snap.ID, Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	start := vmm.StartRequest{ID: twin.ID, Disks: []vmm.DiskAttachment{then}, NICs: []vmm.NICAttachment{other}, Paused: true}
	twin, err = r.snaps().StartFromSnapshot(ctx, vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: start})
	if err != nil || twin.State != vmm.StatePaused {
		t.Fatalf("twin: %+v, %v", twin, err)
	}
	if twin, err = r.m.Resume(ctx, vmm.Ref{Ref: twin.ID}); err != nil {
		t.Fatal(err)
	}
	c2 := r.console(twin.ID, vmm.ConsoleRequest{})
	if got := c2.ask("\necho; echo $X"); !strings.HasSuffix(got, "remembered") {
		t.Errorf("the twin says %q", got)
	}
	if err := r.snaps().DeleteSnapshot(ctx, vmm.Ref{Ref: snap.ID}); err != nil {
		t.Error(err)
	}
}

// A damaged memory file starts nothing, and says so.
func TestDamagedSnapshot(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	r.start(vm.ID, vmm.StartRequest{Paused: true})
	snap, err := r.snaps().Snapshot(t.Context(), vmm.SnapshotRequest{ID: vm.ID, SnapshotID: ident.New()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(r.dir, "snapshots", snap.ID, "state", snapMemory)
	if err := os.Truncate(file, 100); err != nil {
		t.Fatal(err)
	}
	from := vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: vmm.StartRequest{ID: vm.ID}}
	if _, err := r.snaps().StartFromSnapshot(t.Context(), from); err == nil || errs.RemedyOf(err) == "" {
		t.Errorf("got %v", err)
	}
	if got := r.get(vm.ID); got.State != vmm.StateFailed || got.PID != 0 {
		t.Errorf("afterwards: %+v", got)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := r.snaps().StartFromSnapshot(t.Context(), from); !errors.Is(err, errs.Corrupt) {
		t.Errorf("without memory: %v", err)
	}
	if err := r.snaps().DeleteSnapshot(t.Context(), vmm.Ref{Ref: snap.ID}); err != nil {
		t.Error(err)
	}
}

// What a definition asks for beyond the usual, as the guest sees it; vCPUs and memory come and go.
func TestDevicesAndResize(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*limit)
	defer cancel()
	slow := emptyDisk(t, "slow", 8<<20)
	vsock := uint32(0)
	if f, err := os.OpenFile(vhostVsock, os.O_RDWR, 0); err != nil {
		t.Logf("NOT TESTED: virtio sockets: %v", err)
	} else {
		f.Close()
		vsock = 4711
	}
	vm := r.create(func(q *vmm.CreateRequest) {
		q.Spec.CPUs, q.Spec.MaxCPUs, q.Spec.Topology = 2, 4, vmm.Topology{Sockets: 1, Cores: 2, Threads: 2}
		q.Spec.MaxMemory, q.Spec.Watchdog, q.Spec.Vsock = 512<<20, true, vsock
		q.Spec.Disks = []vmm.Disk{{Name: "slow", VolumeID: slow.VolumeID, Limit: vmm.RateLimit{BytesPerSecond: 2 << 20, OpsPerSecond: 1000}}}
	})
	r.start(vm.ID, vmm.StartRequest{Disks: []vmm.DiskAttachment{slow}})
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.login()
	if got := c.ask("cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list"); got != "0-1" {
		t.Errorf("thread siblings %q", got)
	}
	if got := c.ask("grep -l 0x25ab /sys/bus/pci/devices/*/device | wc -l"); got != "1" {
		t.Errorf("%s watchdogs (i6300esb, 8086:25ab)", got)
	}
	if got := c.ask("ls /sys/bus/virtio/devices/*/device | xargs cat | grep -c 0x0013"); vsock != 0 && got != "1" {
		t.Errorf("%s virtio sockets", got)
	}
	took := func(device string) int {
		got := c.ask("a=$(cut -d. -f1 /proc/uptime); cat " + device + " >/dev/null; b=$(cut -d. -f1 /proc/uptime); echo $((b-a))")
		n, err := strconv.Atoi(got)
		if err != nil {
			t.Errorf("got %q", got)
		}
		return n
	}
	if n := took("/dev/vda"); n < 3 {
		t.Errorf("8 MiB at 2 MiB a second took %d s", n)
	}
	mem := func() int {
		n, err := strconv.Atoi(c.ask("awk '/MemTotal/{print $2}' /proc/meminfo"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := mem()
	if got, err := r.snaps().Resize(ctx, vmm.ResizeRequest{Ref: vm.ID, CPUs: 4, MemoryBytes: 416 << 20}); err != nil || got.Spec.CPUs != 4 || got.Pending {
		t.Fatalf("resize: %+v, %v", got, err)
	}
	c.ask("for i in 2 3; do n=0; while [ ! -e /sys/devices/system/cpu/cpu$i/online ] && [ $n -lt 300 ]; do n=$((n+1)); usleep 100000; done; echo 1 >/sys/devices/system/cpu/cpu$i/online; done")
	if got := c.ask("grep -c ^processor /proc/cpuinfo"); got != "4" {
		t.Errorf("%s vCPUs after the resize", got)
	}
	wait := func(op string, kb int) {
		c.ask("n=0; while [ $(awk '/MemTotal/{print $2}' /proc/meminfo) " + op + " " + strconv.Itoa(kb) +
			" ] && [ $n -lt 300 ]; do n=$((n+1)); for b in /sys/devices/system/memory/memory*/state; do echo online_movable >$b; done 2>/dev/null; usleep 100000; done")
	}
	wait("-lt", before+200<<10)
	if after := mem(); after < before+200<<10 {
		t.Errorf("memory %d kB, and after the resize %d", before, after)
	}
	for _, bad := range []vmm.ResizeRequest{{CPUs: 1}, {MemoryBytes: 64 << 20}, {CPUs: 5}, {MemoryBytes: 1 << 30}, {MemoryBytes: 161 << 20}} {
		bad.Ref = vm.ID
		var e *errs.Error
		if _, err := r.snaps().Resize(ctx, bad); !errors.As(err, &e) || !errors.Is(err, errs.Invalid) || errs.RemedyOf(err) == "" {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	fewer := uint32(2)
	if r.emulated() {
		var e *errs.Error
		if _, err := r.snaps().Resize(ctx, vmm.ResizeRequest{Ref: vm.ID, CPUs: 2}); !errors.As(err, &e) || e.Field != "cpus" || e.Remedy == "" {
			t.Errorf("emulated vCPUs taken out: %v", err)
		}
		fewer = 4
	}
	if _, err := r.snaps().Resize(ctx, vmm.ResizeRequest{Ref: vm.ID, CPUs: fewer, MemoryBytes: 160 << 20}); err != nil {
		t.Errorf("back: %v", err)
	}
	wait("-gt", before+8<<10)
	if got := c.ask("grep -c ^processor /proc/cpuinfo"); got != strconv.Itoa(int(fewer)) {
		t.Errorf("%s vCPUs after the resize back", got)
	}
	if after := mem(); after > before+8<<10 {
		t.Errorf("memory %d kB at first, and after the resize back %d", before, after)
	}
	plugged := emptyDisk(t, "plugged", 8<<20)
	plugged.Limit = vmm.RateLimit{BytesPerSecond: 2 << 20}
	for range 2 { // and again under the same name: nothing of it is left
		if err := r.m.PlugDisk(ctx, vmm.PlugDiskRequest{ID: vm.ID, Disk: plugged}); err != nil {
			t.Fatal(err)
		}
		c.until("mvirt-guest: disk add vdb plugged")
		if err := os.Truncate(plugged.Path, 9<<20); err != nil {
			t.Fatal(err)
		}
		if n := took("/dev/vdb"); n < 3 {
			t.Errorf("8 MiB at 2 MiB a second, plugged, took %d s", n)
		}
		if err := r.m.DiskResized(ctx, vmm.DiskResizedRequest{ID: vm.ID, Name: "plugged", SizeBytes: 9 << 20}); err != nil {
			t.Errorf("resize of a disk with a limit: %v", err)
		}
		if err := r.m.UnplugDisk(ctx, vmm.UnplugRequest{ID: vm.ID, Name: "plugged"}); err != nil {
			t.Fatal(err)
		}
		c.until("mvirt-guest: disk gone vdb")
	}
}
