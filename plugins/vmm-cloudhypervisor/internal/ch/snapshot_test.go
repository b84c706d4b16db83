package ch

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/chapi"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
)

func (r *rig) snaps() vmmkit.Snapshotting {
	return vmmkit.Snapshotting{Resizable: vmmkit.Resizable{Manager: r.m}}
}

// config is what the hypervisor of a VM has been told.
func (r *rig) config(id string) map[string]any {
	r.t.Helper()
	var info struct {
		Config map[string]any `json:"config"`
	}
	if err := chapi.New(filepath.Join(r.dir, "vm", id), apiSocket).Get(r.t.Context(), "vm.info", &info); err != nil {
		r.t.Fatal(err)
	}
	return info.Config
}

// at walks through maps and lists by "a.0.b".
func at(v any, path string) any {
	for _, k := range strings.Split(path, ".") {
		switch x := v.(type) {
		case map[string]any:
			v = x[k]
		case []any:
			if len(k) != 1 || int(k[0]-'0') >= len(x) {
				return nil
			}
			v = x[k[0]-'0']
		default:
			return nil
		}
	}
	return v
}

func volume(t *testing.T, name string) vmm.DiskAttachment {
	t.Helper()
	d := vmm.DiskAttachment{Name: name, VolumeID: ident.New(), Path: filepath.Join(t.TempDir(), "v,1"), Format: "raw"}
	if err := os.WriteFile(d.Path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

// What a definition asks for beyond the usual reaches the hypervisor, in words that its document knows.
func TestDevices(t *testing.T) {
	r := newRig(t)
	disk := volume(t, "root")
	limit := vmm.RateLimit{BytesPerSecond: 5 << 20, OpsPerSecond: 300}
	vm := r.create(func(q *vmm.CreateRequest) {
		q.Spec.CPUs, q.Spec.MaxCPUs, q.Spec.Topology = 2, 4, vmm.Topology{Sockets: 1, Cores: 2, Threads: 2}
		q.Spec.Vsock, q.Spec.Watchdog, q.Spec.Nested, q.Spec.HugePages = 7, true, true, true
		q.Spec.Disks = []vmm.Disk{{Name: "root", VolumeID: disk.VolumeID, Limit: limit}}
	})
	vm, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{disk}})
	if err != nil {
		t.Fatal(err)
	}
	if vm.VsockSocket != r.file(vm.ID, vsockSocket) {
		t.Errorf("vsock at %q", vm.VsockSocket)
	}
	extra := volume(t, "extra")
	extra.Limit.OpsPerSecond = 50
	if err := r.m.PlugDisk(t.Context(), vmm.PlugDiskRequest{ID: vm.ID, Disk: extra}); err != nil {
		t.Fatal(err)
	}
	got := r.config(vm.ID)
	for path, want := range map[string]any{
		"cpus.topology.cores_per_die": 2.0, "cpus.topology.threads_per_core": 2.0, "cpus.topology.packages": 1.0, "cpus.topology.dies_per_package": 1.0,
		"cpus.nested": true, "cpus.max_vcpus": 4.0, "memory.hugepages": true, "memory.hugepage_size": 2.0 * (1 << 20), "memory.shared": nil, "watchdog": true,
		"vsock.cid": 7.0, "vsock.socket": vsockSocket, "disks.0.rate_limiter_config.bandwidth.size": 5.0 * (1 << 20),
		"disks.0.rate_limiter_config.bandwidth.refill_time": 1000.0, "disks.0.rate_limiter_config.ops.size": 300.0,
		"disks.1.rate_limiter_config.ops.size": 50.0, "disks.1.rate_limiter_config.bandwidth": nil, "landlock_enable": nil,
	} {
		if is := at(got, path); is != want {
			t.Errorf("%s is %v, want %v", path, is, want)
		}
	}
	// Without all this it is said, where leaving it out would not mean no.
	plain := r.create(func(q *vmm.CreateRequest) { q.Spec.Name = "plain" })
	r.start(plain.ID)
	got = r.config(plain.ID)
	for path, want := range map[string]any{"cpus.nested": false, "cpus.topology": nil, "vsock": nil, "watchdog": nil} {
		if is := at(got, path); is != want {
			t.Errorf("plain: %s is %v, want %v", path, is, want)
		}
	}
}

func TestRefusedDevices(t *testing.T) {
	r := newRig(t)
	for field, change := range map[string]func(*vmm.Spec){
		"spec.topology":         func(s *vmm.Spec) { s.Topology = vmm.Topology{Sockets: 2, Cores: 2, Threads: 1} },
		"spec.topology.threads": func(s *vmm.Spec) { s.Topology = vmm.Topology{Sockets: 1, Cores: 1, Threads: 3} },
		"spec.vsock":            func(s *vmm.Spec) { s.Vsock = 2 },
		"spec.disks[0].limit.bytes_per_second": func(s *vmm.Spec) {
			s.Disks = []vmm.Disk{{Name: "a", VolumeID: ident.New(), Limit: vmm.RateLimit{BytesPerSecond: 1}}}
		},
		"spec.disks[0].limit.ops_per_second": func(s *vmm.Spec) {
			s.Disks = []vmm.Disk{{Name: "a", VolumeID: ident.New(), Limit: vmm.RateLimit{OpsPerSecond: 1 << 63}}}
		},
	} {
		spec := vmm.Spec{Name: "x", CPUs: 2, MemoryBytes: 64 << 20}
		change(&spec)
		_, err := r.m.Create(t.Context(), vmm.CreateRequest{ID: ident.New(), Spec: spec})
		var e *errs.Error
		if !errors.As(err, &e) || e.Kind != errs.Invalid || e.Field != field || e.Remedy == "" {
			t.Errorf("%s: %v", field, err)
		}
	}
}

// A snapshot is written paused, lists, survives the plugin, starts the same VM and one under a new id whose
// volumes and NICs are elsewhere, and takes its kernel along.
func TestSnapshot(t *testing.T) {
	r := newRig(t)
	disk, disk2 := volume(t, "root"), volume(t, "root")
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	nics := func(path string) []vmm.NICAttachment {
		return []vmm.NICAttachment{{NICID: ident.New(), MAC: "52:54:00:00:00:01", TAP: []*os.File{null, null}, Queues: 2},
			{NICID: ident.New(), MAC: "52:54:00:00:00:02", SocketPath: path}}
	}
	old := nics("/run/old.sock")
	define := func(q *vmm.CreateRequest, d vmm.DiskAttachment, ns []vmm.NICAttachment) {
		q.Spec.Disks = []vmm.Disk{{Name: d.Name, VolumeID: d.VolumeID}}
		for _, n := range ns {
			q.Spec.NICs = append(q.Spec.NICs, vmm.NIC{NICID: n.NICID, MAC: n.MAC})
		}
		q.Spec.CloudInit.UserData = "#cloud-config"
	}
	vm := r.create(func(q *vmm.CreateRequest) { define(q, disk, old) })
	req := vmm.SnapshotRequest{ID: vm.ID, SnapshotID: ident.New(), Name: "warm", Disks: []vmm.SnapshotDisk{{Name: "root", SnapshotID: ident.New()}}}
	if _, err := r.snaps().Snapshot(t.Context(), req); !errors.Is(err, errs.Precondition) {
		t.Errorf("of a stopped VM: %v", err)
	}
	if _, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{disk}, NICs: old}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.snaps().Snapshot(t.Context(), req); !errors.Is(err, errs.Precondition) || !strings.Contains(errs.RemedyOf(err), "pause") {
		t.Errorf("of a running VM: %v", err)
	}
	if _, err := r.m.Pause(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	r.fault(vm.ID, "vm.snapshot", "500")
	if _, err := r.snaps().Snapshot(t.Context(), req); err == nil || !strings.Contains(err.Error(), "asked for") {
		t.Errorf("a failure: %v", err)
	}
	if left, _ := filepath.Glob(r.file(vm.ID, "snapshot-*")); len(left) > 0 {
		t.Errorf("a failure left %v", left)
	}
	snap, err := r.snaps().Snapshot(t.Context(), req)
	if err != nil || snap.VMID != vm.ID || snap.Hypervisor != "cloud-hypervisor 53.0 (kvm)" || snap.SizeBytes == 0 || len(snap.Disks) != 1 ||
		snap.Spec.Name != "vm1" || snap.Disks[0] != req.Disks[0] {
		t.Fatalf("%+v, %v", snap, err)
	}
	if again, err := r.snaps().Snapshot(t.Context(), req); err != nil || !again.CreatedAt.Equal(snap.CreatedAt) {
		t.Errorf("again: %+v, %v", again, err)
	}
	if _, err := r.snaps().Snapshot(t.Context(), vmm.SnapshotRequest{ID: vm.ID, SnapshotID: ident.New(), Name: "warm"}); !errors.Is(err, errs.Exists) {
		t.Errorf("the name again: %v", err)
	}
	if _, err := r.m.Resume(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Error(err)
	}
	from := vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{disk}, NICs: old}}
	if _, err := r.snaps().StartFromSnapshot(t.Context(), from); errs.ReasonOf(err) != "VM_RUNNING" {
		t.Errorf("of a running VM: %v", err)
	}
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}

	// What a crash leaves half made is gone, what is whole is not.
	r.close()
	if err := errors.Join(os.Mkdir(r.file(vm.ID, "snapshot-x"), 0o700), os.Mkdir(filepath.Join(r.dir, "snapshots", "."+ident.New()), 0o700)); err != nil {
		t.Fatal(err)
	}
	r.open()
	for _, pattern := range []string{r.file(vm.ID, "snapshot-*"), filepath.Join(r.dir, "snapshots", ".*")} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	list, err := r.snaps().ListSnapshots(t.Context(), vmm.Ref{Ref: "vm1"})
	if err != nil || len(list) != 1 || list[0].ID != snap.ID || list[0].Name != "warm" {
		t.Fatalf("list: %+v, %v", list, err)
	}

	back, err := r.snaps().StartFromSnapshot(t.Context(), from)
	if err != nil || back.State != vmm.StateRunning {
		t.Fatalf("back: %+v, %v", back, err)
	}
	r.console(vm.ID).until("goes on, and knows what the guest knows")
	if again, err := r.snaps().StartFromSnapshot(t.Context(), from); err != nil || again.PID != back.PID {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	if left, _ := filepath.Glob(r.file(vm.ID, "restore")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	// Under a new id, after the first VM's definition is gone: other volumes, NICs in places that they change.
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	if err := r.m.Delete(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	fresh := nics("/run/new.sock")
	clone := vmm.CreateRequest{ID: ident.New(), BootFrom: snap.ID, Spec: vmm.Spec{Name: "twin", CPUs: 2, MemoryBytes: 64 << 20, Boot: vmm.Boot{Cmdline: "console=ttyS0"}}}
	define(&clone, disk2, fresh)
	twin, err := r.m.Create(t.Context(), clone)
	if err != nil || !twin.Spec.Boot.HasKernel || twin.Spec.Boot.KernelSHA256 != snap.Spec.Boot.KernelSHA256 {
		t.Fatalf("create: %+v, %v", twin, err)
	}
	start := vmm.StartRequest{ID: twin.ID, Disks: []vmm.DiskAttachment{disk2}, NICs: fresh, Paused: true}
	twin, err = r.snaps().StartFromSnapshot(t.Context(), vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: start})
	if err != nil || twin.State != vmm.StatePaused {
		t.Fatalf("twin: %+v, %v", twin, err)
	}
	got := r.config(twin.ID)
	for path, want := range map[string]any{"disks.0.path": disk2.Path, "disks.1.path": r.file(twin.ID, "cloudinit.iso"), "memory.shared": true,
		"net.0.vhost_socket": "/run/new.sock", "net.0.id": nicID(fresh[1].NICID), "net.1.id": nicID(fresh[0].NICID), "platform.system_uuid": twin.ID} {
		if is := at(got, path); is != want {
			t.Errorf("%s is %v, want %v", path, is, want)
		}
	}
	if twin, err = r.m.Resume(t.Context(), vmm.Ref{Ref: twin.ID}); err != nil || twin.State != vmm.StateRunning {
		t.Errorf("resumed: %+v, %v", twin, err)
	}
	r.console(twin.ID).until("goes on")

	// Another shape, another version, and no snapshot at all.
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: twin.ID}); err != nil {
		t.Fatal(err)
	}
	swapped := start
	swapped.NICs = append([]vmm.NICAttachment(nil), fresh...)
	swapped.NICs[0].TAP, swapped.NICs[0].SocketPath = nil, "/run/x.sock"
	if _, err := r.snaps().StartFromSnapshot(t.Context(), vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: swapped}); errs.ReasonOf(err) != "OTHER_SHAPE" {
		t.Errorf("another data path: %v", err)
	}
	bigger := clone.Spec
	bigger.CPUs = 3
	got2, err := r.m.Update(t.Context(), vmm.UpdateRequest{ID: twin.ID, Generation: twin.Generation, Spec: bigger})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.snaps().StartFromSnapshot(t.Context(), vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: start}); errs.ReasonOf(err) != "OTHER_SHAPE" {
		t.Errorf("more vCPUs: %v", err)
	}
	if _, err := r.m.Update(t.Context(), vmm.UpdateRequest{ID: twin.ID, Generation: got2.Generation, Spec: clone.Spec}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "bin", "version"), []byte("54.1.0"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.close()
	r.open()
	if _, err := r.snaps().StartFromSnapshot(t.Context(), vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: start}); errs.ReasonOf(err) != "OTHER_HYPERVISOR" {
		t.Errorf("another version: %v", err)
	}
	for range 2 {
		if err := r.snaps().DeleteSnapshot(t.Context(), vmm.Ref{Ref: snap.ID}); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.snaps().StartFromSnapshot(t.Context(), vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: start}); !errors.Is(err, errs.NotFound) {
		t.Errorf("a deleted one: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(r.dir, "snapshots")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestRename(t *testing.T) {
	got := string(rename([]byte(`x nic-a y nic-b nic-a nic-c`), [][2]string{{"nic-a", "nic-b"}, {"nic-b", "nic-a"}}))
	if want := `x nic-b y nic-a nic-b nic-c`; got != want {
		t.Errorf("got %s", got)
	}
}

// A snapshot's files are a hypervisor's work, and may be anything.
func FuzzRewrite(f *testing.F) {
	f.Add([]byte(`{"disks":[{"id":"disk-root","path":"/x"}],"net":[{"id":"nic-a","num_queues":2,"fds":[-1]}],"memory":{"shared":true}}`))
	f.Add([]byte(`{"disks":{},"net":[5],"memory":[],"payload":7,"platform":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var cfg map[string]any
		if json.Unmarshal(b, &cfg) != nil {
			return
		}
		m := vmmkit.Machine{Disks: []vmm.DiskAttachment{{Name: "root", Path: "/new"}}, NICs: []vmm.NICAttachment{{NICID: "b"}},
			Restore: &vmmkit.Restore{Spec: vmm.Spec{NICs: []vmm.NIC{{NICID: "a"}}}}}
		if _, err := rewrite(cfg, &Driver{}, m); err == nil && at(cfg, "disks.0.path") != "/new" && len(items(cfg["disks"])) == 1 {
			t.Errorf("a path of the snapshot is left: %v", cfg)
		}
	})
}

// Two binaries side by side: new VMs start with the first, a snapshot with the one that wrote it; one that is
// replaced under the plugin is asked again.
func TestSideBySide(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	vm = r.start(vm.ID)
	if _, err := r.m.Pause(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	snap, err := r.snaps().Snapshot(t.Context(), vmm.SnapshotRequest{ID: vm.ID, SnapshotID: ident.New()})
	if err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(r.dir, "bin", "cloud-hypervisor")
	newer := filepath.Join(r.dir, "bin", "new", "cloud-hypervisor")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(filepath.Dir(newer), 0o755), os.Symlink(self, newer),
		os.WriteFile(filepath.Join(filepath.Dir(newer), "version"), []byte("60.0.0"), 0o600)); err != nil {
		t.Fatal(err)
	}
	r.close()
	r.binaries = []string{newer, old}
	r.open()
	if got, err := r.m.Get(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || got.Hypervisor != "cloud-hypervisor 53.0 (kvm)" || got.PID != vm.PID {
		t.Errorf("the VM that runs: %+v, %v", got, err)
	}
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	if got := r.start(vm.ID); got.Hypervisor != "cloud-hypervisor 60.0 (kvm)" {
		t.Errorf("a new start: %+v", got)
	}
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	got, err := r.snaps().StartFromSnapshot(t.Context(), vmm.StartFromSnapshotRequest{SnapshotID: snap.ID, Start: vmm.StartRequest{ID: vm.ID}})
	if err != nil || got.Hypervisor != "cloud-hypervisor 53.0 (kvm)" {
		t.Errorf("the snapshot: %+v, %v", got, err)
	}
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	// An upgrade in place: the link is replaced by a newer file.
	if err := errors.Join(os.WriteFile(filepath.Join(filepath.Dir(newer), "version"), []byte("61.0.0"), 0o600), os.Remove(newer),
		os.WriteFile(newer, []byte("#!/bin/sh\necho cloud-hypervisor v61.0.0\n"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if p, err := r.driver.programs.get(t.Context(), ""); err != nil || p.version.String() != "61.0" {
		t.Errorf("after an upgrade in place: %+v, %v", p, err)
	}
}
