package qemu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func TestStartedTwiceAtOnce(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	var wg sync.WaitGroup
	results := make([]error, 8)
	for i := range results {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, results[i] = r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
		}()
	}
	wg.Wait()
	ok := 0
	for _, err := range results {
		switch {
		case err == nil:
			ok++
		case !errors.Is(err, errs.Conflict):
			t.Errorf("a second start: %v, want Conflict", err)
		}
	}
	if n := len(r.processes(vm.ID)); ok < 1 || n != 1 {
		t.Errorf("%d starts succeeded, %d processes", ok, n)
	}
	err := r.m.Delete(t.Context(), vmm.Ref{Ref: vm.ID})
	if !errors.Is(err, errs.Precondition) || errs.ReasonOf(err) != "VM_RUNNING" || errs.RemedyOf(err) == "" {
		t.Errorf("delete while running: %v", err)
	}
	if got, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || got.State != vmm.StateStopped || got.Reason != "killed on request" {
		t.Errorf("kill: %+v, %v", got, err)
	}
	if got, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || got.State != vmm.StateStopped {
		t.Errorf("kill again: %+v, %v", got, err)
	}
	if got, err := r.m.Stop(t.Context(), vmm.StopRequest{Ref: vm.ID}); err != nil || got.State != vmm.StateStopped {
		t.Errorf("stop after kill: %+v, %v", got, err)
	}
}

// Kill reaches a VM at every moment of its start.
func TestKillWhileStarting(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	for delay := time.Duration(0); delay < 100*time.Millisecond; delay += 7 * time.Millisecond {
		started := make(chan error, 1)
		go func() {
			_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
			started <- err
		}()
		time.Sleep(delay) // not to find anything out: to begin at different moments
		got, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID})
		if err != nil {
			t.Fatalf("kill after %v: %v", delay, err)
		}
		serr := <-started
		if delay == 0 { // the kill may have come before the start
			got, err = r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID})
		}
		if err != nil || got.State.Live() || len(r.processes(vm.ID)) > 0 {
			t.Fatalf("kill after %v: %+v, %v, start said %v", delay, got, err, serr)
		}
		if serr != nil && !errors.Is(serr, errs.Canceled) {
			t.Errorf("killed after %v, the start says: %v", delay, serr)
		}
	}
}

func TestCallerGoesAwayWhileStarting(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := r.m.Start(ctx, vmm.StartRequest{ID: vm.ID})
	if err == nil {
		t.Skip("the start was faster than 20 ms")
	}
	if got := r.get(vm.ID); got.State.Live() || len(r.processes(vm.ID)) > 0 {
		t.Errorf("after %v: %+v", err, got)
	}
}

// What a guest does by itself, and what happens to its hypervisor, is told apart.
func TestGuestsOwnDoing(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	vm = r.start(vm.ID, vmm.StartRequest{})
	pid := vm.PID
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})

	c.login()
	rebooted := make(chan struct{})
	go func() {
		defer close(rebooted)
		r.await(vm.ID, "a reboot", func(e vmm.Event) bool { return e.Type == vmm.EventRebooted })
	}()
	c.send("reboot -f\n")
	<-rebooted
	c.login()
	if got := r.get(vm.ID); got.State != vmm.StateRunning || got.PID != pid {
		t.Errorf("after the guest's reboot: %+v", got)
	}

	panicked := make(chan struct{})
	go func() {
		defer close(panicked)
		r.await(vm.ID, "a panic", func(e vmm.Event) bool { return e.Type == vmm.EventPanicked })
	}()
	c.send("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger\n")
	<-panicked
	c.until("mvirt-guest: init") // panic=-1: it reboots at once
	if got := r.get(vm.ID); got.State != vmm.StateRunning || got.Reason != "" || got.PID != pid {
		t.Errorf("after the panic and its reboot: %+v", got)
	}
	c.login()
	c.send("poweroff -f\n")
	if got := r.awaitState(vm.ID, vmm.StateStopped); got.Reason != reasonOff || got.Desired != vmm.StateStopped {
		t.Errorf("after the guest's power-off: %+v", got)
	}

	vm = r.start(vm.ID, vmm.StartRequest{})
	kill(t, vm.PID)
	if got := r.awaitState(vm.ID, vmm.StateFailed); !strings.Contains(got.Reason, "signal 9") || got.Desired != vmm.StateRunning {
		t.Errorf("after the hypervisor's crash: %+v", got)
	}
}

func TestReboots(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	vm = r.start(vm.ID, vmm.StartRequest{})
	pid := vm.PID
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.until("mvirt-guest: ready")
	vm, err := r.m.Reboot(t.Context(), vmm.RebootRequest{Ref: vm.ID, Timeout: limit})
	if err != nil || vm.State != vmm.StateRunning || vm.PID != pid {
		t.Fatalf("soft: %+v, %v", vm, err)
	}
	c.until("mvirt-guest: power button")
	c.until("mvirt-guest: init")
	if vm, err = r.m.Reboot(t.Context(), vmm.RebootRequest{Ref: vm.ID, Hard: true}); err != nil || vm.PID != pid {
		t.Fatalf("hard: %+v, %v", vm, err)
	}
	c.until("mvirt-guest: init")

	// A guest that ignores the button: NoForce gives up, and later force does not.
	c.login()
	c.send("touch /run/ignore-power-button; echo ign''ored\n")
	c.until("ignored")
	_, err = r.m.Stop(t.Context(), vmm.StopRequest{Ref: vm.ID, Timeout: time.Second, NoForce: true})
	if !errors.Is(err, errs.Deadline) {
		t.Errorf("stop of a stubborn guest: %v, want Deadline", err)
	}
	c.until("mvirt-guest: power button")
	if got := r.get(vm.ID); got.State != vmm.StateRunning || got.Desired != vmm.StateStopped {
		t.Errorf("after giving up: %+v", got)
	}
	vm, err = r.m.Stop(t.Context(), vmm.StopRequest{Ref: vm.ID, Timeout: time.Second})
	if err != nil || vm.State != vmm.StateStopped || !strings.Contains(vm.Reason, "by force") {
		t.Errorf("forced: %+v, %v", vm, err)
	}
}

// A start that fails says why, in QEMU's words, keeps the log and leaves nothing.
func TestFailedStarts(t *testing.T) {
	r := newRig(t)
	bad := filepath.Join(t.TempDir(), "vmlinuz")
	junk := make([]byte, 64<<10)
	copy(junk[0x202:], "HdrS")
	if err := os.WriteFile(bad, junk, 0o600); err != nil {
		t.Fatal(err)
	}
	vol := ident.New()
	vm := r.create(func(req *vmm.CreateRequest) { req.Spec.Disks = []vmm.Disk{{Name: "root", VolumeID: vol}} })
	gone := vmm.DiskAttachment{Name: "root", VolumeID: vol, Path: "/does/not/exist", Format: "raw"}
	_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{gone}})
	if err == nil || !strings.Contains(err.Error(), "No such file") || errs.RemedyOf(err) == "" {
		t.Errorf("a disk that is not there: %v", err)
	}
	if got := r.get(vm.ID); got.State != vmm.StateFailed || !strings.Contains(got.Reason, "No such file") || got.PID != 0 {
		t.Errorf("afterwards: %+v", got)
	}
	if len(r.processes(vm.ID)) > 0 {
		t.Error("a process is left")
	}
	log, err := os.ReadFile(filepath.Join(r.dir, "vm", vm.ID, "hypervisor.log"))
	if err != nil || !strings.Contains(string(log), "No such file") {
		t.Errorf("the log: %q, %v", log, err)
	}
	for _, s := range []string{apiSocket, serialSocket} {
		if _, err := os.Stat(filepath.Join(r.dir, "vm", vm.ID, s)); err == nil {
			t.Errorf("%s is left", s)
		}
	}

	// Attachments that are not the definition's.
	for name, d := range map[string][]vmm.DiskAttachment{
		"none": nil, "format": {{Name: "root", VolumeID: vol, Path: "/x", Format: "qcow2"}},
		"relative": {{Name: "root", VolumeID: vol, Path: "x", Format: "raw"}},
		"dots":     {{Name: "root", VolumeID: vol, Path: "/x/../y", Format: "raw"}},
		"other":    {{Name: "data", VolumeID: vol, Path: "/x", Format: "raw"}},
	} {
		if _, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Disks: d}); !errors.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, want Invalid", name, err)
		}
	}

	// A kernel that is none, as far as QEMU can tell.
	junkVM := r.create(func(req *vmm.CreateRequest) { req.Spec.Name, req.Kernel = "junk", r.open1(bad) })
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if _, err := r.m.Start(ctx, vmm.StartRequest{ID: junkVM.ID}); err == nil {
		t.Log("QEMU runs a kernel of zeros; the guest never prints")
	} else if got := r.get(junkVM.ID); got.State != vmm.StateFailed {
		t.Errorf("a junk kernel: %+v after %v", got, err)
	}
}

func TestHypervisorMissing(t *testing.T) {
	d, err := New(Config{Binary: "/does/not/exist"})
	if err != nil {
		t.Fatal(err)
	}
	<-d.probed
	cs := d.Conditions()
	found := false
	for _, c := range cs {
		found = found || c.Code == "HYPERVISOR_UNAVAILABLE"
	}
	if !found {
		t.Errorf("conditions: %+v", cs)
	}
	if _, err := New(Config{Accel: "magic"}); !errors.Is(err, errs.Invalid) {
		t.Errorf("got %v", err)
	}
}
