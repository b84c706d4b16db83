package qemu

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/vmm"
)

func TestBootPauseStop(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	begin := time.Now()
	vm = r.start(vm.ID, vmm.StartRequest{})
	t.Logf("start took %v", time.Since(begin))
	if vm.State != vmm.StateRunning || vm.PID == 0 || vm.Desired != vmm.StateRunning || vm.Hypervisor == "" {
		t.Errorf("started: %+v", vm)
	}
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.until("mvirt-guest: init")
	t.Logf("init after %v", time.Since(begin))
	c.login()
	// Much is typed at once, faster than the guest takes it, and then the writer is gone. It begins once cat reads:
	// what comes while the shell edits its line is neither echoed nor kept to lines, and its ^D ends the shell.
	c.send("echo read''ing; cat >/run/typed\n")
	c.until("reading")
	w := r.console(vm.ID, vmm.ConsoleRequest{Steal: true})
	w.send(strings.Repeat(strings.Repeat("x", 63)+"\n", 64) + "\x04")
	w.stop()
	<-w.end
	c = r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.until(strings.Repeat("x", 63))
	c.until("/root # ")
	c.send("wc -c /run/typed\n")
	c.until("4096 /run/typed")

	vm, err := r.m.Pause(t.Context(), vmm.Ref{Ref: "vm1"})
	if err != nil || vm.State != vmm.StatePaused {
		t.Errorf("pause: %+v, %v", vm, err)
	}
	if vm, err = r.m.Resume(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || vm.State != vmm.StateRunning {
		t.Errorf("resume: %+v, %v", vm, err)
	}
	c.send("echo res''umed\n")
	c.until("resumed")
	vm, err = r.m.Stop(t.Context(), vmm.StopRequest{Ref: vm.ID, Timeout: limit})
	if err != nil || vm.State != vmm.StateStopped || vm.Reason != reasonOff || vm.PID != 0 || vm.Desired != vmm.StateStopped {
		t.Errorf("stop: %+v, %v", vm, err)
	}
	c.until("mvirt-guest: power button")
	if err := <-c.end; !errors.Is(err, io.EOF) {
		t.Errorf("the console ended with %v, want EOF", err)
	}
}

const reasonOff = "guest powered off"
