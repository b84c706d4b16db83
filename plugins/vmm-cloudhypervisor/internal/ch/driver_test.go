package ch

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
)

const reasonOff = "guest powered off"

// A VM with all kinds of devices, through all of its life; each request is held against the OpenAPI document.
func TestLife(t *testing.T) {
	r := newRig(t)
	disk := vmm.DiskAttachment{Name: "root", VolumeID: ident.New(), Path: filepath.Join(t.TempDir(), "a,b=c"), Format: "raw"}
	extra := vmm.DiskAttachment{Name: "extra", VolumeID: ident.New(), Path: disk.Path + "2", Format: "raw"}
	for _, p := range []string{disk.Path, extra.Path} {
		if err := os.WriteFile(p, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	null := func() *os.File { // a descriptor; the double counts them
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	nics := []vmm.NICAttachment{
		{NICID: ident.New(), MAC: "52:54:00:00:00:01", TAP: []*os.File{null(), null()}, Queues: 2},
		{NICID: ident.New(), MAC: "52:54:00:00:00:02", SocketPath: "/run/x.sock"},
		{NICID: ident.New(), MAC: "52:54:00:00:00:03", TAPName: "tap7"},
	}
	vm := r.create(func(q *vmm.CreateRequest) {
		q.Spec.Disks = []vmm.Disk{{Name: disk.Name, VolumeID: disk.VolumeID}}
		for _, n := range nics {
			q.Spec.NICs = append(q.Spec.NICs, vmm.NIC{NICID: n.NICID, MAC: n.MAC})
		}
		q.Spec.MaxCPUs, q.Spec.MaxMemory = 4, 128<<20
		q.Spec.CloudInit.UserData = "#cloud-config"
	})
	vm, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{disk}, NICs: nics})
	if err != nil || vm.State != vmm.StateRunning || vm.Hypervisor != "cloud-hypervisor 53.0 (kvm)" {
		t.Fatalf("start: %+v, %v", vm, err)
	}
	pid := vm.PID
	c := r.console(vm.ID)
	c.until("fake guest runs")
	c.send("hello\n")
	c.until("you typed hello")

	for range 2 {
		if vm, err = r.m.Pause(t.Context(), vmm.Ref{Ref: "vm1"}); err != nil || vm.State != vmm.StatePaused {
			t.Errorf("pause: %+v, %v", vm, err)
		}
	}
	for range 2 {
		if vm, err = r.m.Resume(t.Context(), vmm.Ref{Ref: "vm1"}); err != nil || vm.State != vmm.StateRunning {
			t.Errorf("resume: %+v, %v", vm, err)
		}
	}
	if err := errors.Join(r.m.PlugDisk(t.Context(), vmm.PlugDiskRequest{ID: vm.ID, Disk: extra}),
		os.Truncate(extra.Path, 8192),
		r.m.DiskResized(t.Context(), vmm.DiskResizedRequest{ID: vm.ID, Name: "extra", SizeBytes: 8192})); err != nil {
		t.Error(err)
	}
	if err := r.m.DiskResized(t.Context(), vmm.DiskResizedRequest{ID: vm.ID, Name: "extra", SizeBytes: 4096}); !errors.Is(err, errs.Invalid) {
		t.Errorf("shrunk: %v", err)
	}
	vm, err = vmmkit.Resizable{Manager: r.m}.Resize(t.Context(), vmm.ResizeRequest{Ref: "vm1", CPUs: 4, MemoryBytes: 96 << 20})
	if err != nil || vm.Spec.CPUs != 4 || vm.Spec.MemoryBytes != 96<<20 || vm.Generation != 2 {
		t.Errorf("resize: %+v, %v", vm, err)
	}
	if _, err := (vmmkit.Resizable{Manager: r.m}).Resize(t.Context(), vmm.ResizeRequest{Ref: "vm1", MemoryBytes: 256 << 20}); !errors.Is(err, errs.Invalid) {
		t.Errorf("resize beyond the maximum: %v", err)
	}
	cnt, err := r.m.Counters(t.Context(), vmm.Ref{Ref: vm.ID})
	if err != nil || len(cnt.Devices) != 2 || cnt.Devices[0].WriteOps != 4 || cnt.ResidentBytes == 0 {
		t.Errorf("counters: %+v, %v", cnt, err)
	}
	plugged := vmm.NICAttachment{NICID: ident.New(), MAC: "52:54:00:00:00:04", TAP: []*os.File{null()}}
	if err := errors.Join(r.m.UnplugDisk(t.Context(), vmm.UnplugRequest{ID: vm.ID, Name: "extra"}),
		r.m.PlugNIC(t.Context(), vmm.PlugNICRequest{ID: vm.ID, NIC: plugged}),
		r.m.UnplugNIC(t.Context(), vmm.UnplugRequest{ID: vm.ID, Name: plugged.NICID})); err != nil {
		t.Error(err)
	}

	if vm, err = r.m.Reboot(t.Context(), vmm.RebootRequest{Ref: vm.ID, Hard: true}); err != nil || vm.State != vmm.StateRunning {
		t.Errorf("hard reboot: %+v, %v", vm, err)
	}
	c.until("fake guest runs")
	if vm, err = r.m.Reboot(t.Context(), vmm.RebootRequest{Ref: vm.ID}); err != nil || vm.State != vmm.StateRunning || vm.PID != pid {
		t.Errorf("soft reboot: %+v, %v", vm, err)
	}
	c.until("fake guest off")
	c.until("fake guest runs")
	panicked := make(chan struct{})
	go func() {
		defer close(panicked)
		r.await(vm.ID, "a panic", func(e vmm.Event) bool { return e.VM.Reason == "guest panicked" })
	}()
	c.send("panic\n")
	<-panicked
	c.send("reset\n")
	c.until("fake guest runs")
	if vm, err = r.m.Stop(t.Context(), vmm.StopRequest{Ref: vm.ID}); err != nil || vm.State != vmm.StateStopped || vm.Reason != reasonOff {
		t.Errorf("stop: %+v, %v", vm, err)
	}
	if left, _ := filepath.Glob(r.file(vm.ID, "*.sock")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	// Started paused, it has not booted; a deaf guest is forced.
	if vm, err = r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{disk}, NICs: nics, Paused: true}); err != nil || vm.State != vmm.StatePaused {
		t.Fatalf("start paused: %+v, %v", vm, err)
	}
	if vm, err = r.m.Resume(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || vm.State != vmm.StateRunning {
		t.Errorf("first run: %+v, %v", vm, err)
	}
	c = r.console(vm.ID)
	c.until("fake guest runs\nfake guest runs")
	c.send("deaf\n")
	c.until("you typed deaf")
	if vm, err = r.m.Stop(t.Context(), vmm.StopRequest{Ref: vm.ID, Timeout: 50 * time.Millisecond}); err != nil || !strings.Contains(vm.Reason, "by force") {
		t.Errorf("forced: %+v, %v", vm, err)
	}
}

func TestRecovery(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	vm = r.start(vm.ID)
	pid := vm.PID
	c := r.console(vm.ID)
	c.until("fake guest runs")
	c.stop()
	r.close()
	r.open()
	got, err := r.m.Get(t.Context(), vmm.Ref{Ref: vm.ID})
	if err != nil || got.State != vmm.StateRunning || got.PID != pid {
		t.Fatalf("found again: %+v, %v", got, err)
	}
	c = r.console(vm.ID)
	c.send("back\n")
	c.until("you typed back")
	if got, err := r.m.Pause(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || got.State != vmm.StatePaused {
		t.Errorf("pause: %+v, %v", got, err)
	}
	c.stop()
	r.close()
	r.open()
	if got, err := r.m.Get(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || got.State != vmm.StatePaused {
		t.Errorf("paused, found again: %+v, %v", got, err)
	}
	if _, err := r.m.Resume(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Error(err)
	}

	// The guest powers off while we are away: typed into its socket by hand.
	r.close()
	typeAt(t, filepath.Dir(r.file(vm.ID, "x")), "off\n")
	awaitEvent(t, r.file(vm.ID, eventsFile), `"shutdown"`)
	r.open()
	if got := r.awaitState(vm.ID, vmm.StateStopped); got.Reason != reasonOff || got.Desired != vmm.StateStopped {
		t.Errorf("off while away: %+v", got)
	}

	// It crashes while we are away.
	vm = r.start(vm.ID)
	r.close()
	if err := syscall.Kill(int(vm.PID), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.open()
	if got := r.awaitState(vm.ID, vmm.StateFailed); got.Desired != vmm.StateRunning {
		t.Errorf("crashed while away: %+v", got)
	}

	// One of a version that ends with its guest: its last events say so.
	vm = r.start(vm.ID)
	r.close()
	if err := syscall.Kill(int(vm.PID), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, vm.PID)
	f, err := os.OpenFile(r.file(vm.ID, eventsFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("{\n  \"source\": \"vm\",\n  \"event\": \"shutdown\"\n}\n\n{\"source\": \"vmm\", \"event\": \"shutdown\"}\n\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	r.open()
	if got := r.awaitState(vm.ID, vmm.StateStopped); got.Reason != reasonOff {
		t.Errorf("ended with its guest while away: %+v", got)
	}
}

func TestFaults(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	for _, what := range []string{"vmm.ping", "vm.create", "vm.boot", "vm.info"} {
		r.fault(vm.ID, what, "500")
		_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
		if err == nil || !strings.Contains(err.Error(), "the fault that was asked for") || errs.RemedyOf(err) == "" {
			t.Errorf("%s: %v", what, err)
		}
		if got, _ := r.m.Get(t.Context(), vmm.Ref{Ref: vm.ID}); got.State != vmm.StateFailed || got.PID != 0 || !strings.Contains(got.Reason, "asked for") {
			t.Errorf("after %s: %+v", what, got)
		}
	}
	r.fault(vm.ID, "vm.boot", "crash")
	_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
	if err == nil || !strings.Contains(err.Error(), "SIGKILL") || !strings.Contains(err.Error(), "panicked at fault") {
		t.Errorf("a crash in boot: %v", err)
	}
	r.fault(vm.ID, "vm.create", "hang")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.m.Start(ctx, vmm.StartRequest{ID: vm.ID}); !errors.Is(err, errs.Deadline) {
		t.Errorf("a hang in create: %v", err)
	}
	r.fault(vm.ID, "vm.boot", "slow")
	vm = r.start(vm.ID)
	r.fault(vm.ID, "vm.pause", "crash")
	if _, err := r.m.Pause(t.Context(), vmm.Ref{Ref: vm.ID}); err == nil {
		t.Error("paused a crashing hypervisor")
	}
	if got := r.awaitState(vm.ID, vmm.StateFailed); !strings.Contains(got.Reason, "SIGKILL") || !strings.Contains(got.Reason, "panicked at fault") {
		t.Errorf("after the crash: %+v", got)
	}
	vm = r.start(vm.ID)
	c := r.console(vm.ID)
	c.send("exit\n")
	if got := r.awaitState(vm.ID, vmm.StateFailed); !strings.Contains(got.Reason, "exit status 7") {
		t.Errorf("after an exit: %+v", got)
	}
	vm = r.start(vm.ID)
	c = r.console(vm.ID)
	c.send("off\n")
	if got := r.awaitState(vm.ID, vmm.StateStopped); got.Reason != reasonOff || got.Desired != vmm.StateStopped {
		t.Errorf("guest off: %+v", got)
	}
}

func TestVersionGate(t *testing.T) {
	for version, ok := range map[string]bool{"51.1.0": false, "9.0": false, "51.2.0": true, "53.0.0": true, "100.0": true} {
		r := newRig(t)
		r.close()
		if err := os.WriteFile(filepath.Join(r.dir, "bin", "version"), []byte(version), 0o600); err != nil {
			t.Fatal(err)
		}
		r.open()
		vm := r.create(nil)
		_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
		if ok && err != nil || !ok && (errs.ReasonOf(err) != "PROGRAM_TOO_OLD" || !strings.Contains(err.Error(), "CVE-2026-27211")) {
			t.Errorf("%s: %v", version, err)
		}
		h, _ := r.m.Health(t.Context())
		if bad := len(h.Conditions) > 0; bad == ok {
			t.Errorf("%s: %+v", version, h)
		}
	}
}

func TestFirmwareMissing(t *testing.T) {
	r := newRig(t)
	_, err := r.m.Create(t.Context(), vmm.CreateRequest{ID: ident.New(), Spec: vmm.Spec{Name: "x", CPUs: 1, MemoryBytes: 64 << 20, Boot: vmm.Boot{Firmware: "uefi"}}})
	if !errors.Is(err, errs.Invalid) || errs.RemedyOf(err) == "" {
		t.Errorf("got %v", err)
	}
}
