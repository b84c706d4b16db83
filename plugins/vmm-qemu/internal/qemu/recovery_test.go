package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// editRecord changes the stored runtime record of a VM while no plugin runs; fn's nil result deletes it.
func (r *rig) editRecord(id string, fn func([]byte) []byte) {
	r.t.Helper()
	db, err := bbolt.Open(filepath.Join(r.dir, "mvirt.db"), 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		r.t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("runtime"))
		old := b.Get([]byte(id))
		if old == nil {
			r.t.Errorf("VM %s has no runtime record", id)
		}
		if now := fn(append([]byte(nil), old...)); now != nil {
			return b.Put([]byte(id), now)
		}
		return b.Delete([]byte(id))
	}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) editRuntime(id string, fn func(*store.Runtime)) {
	r.t.Helper()
	r.editRecord(id, func(b []byte) []byte {
		var rec store.Runtime
		if err := json.Unmarshal(b, &rec); err != nil {
			r.t.Fatal(err)
		}
		fn(&rec)
		b, err := json.Marshal(rec)
		if err != nil {
			r.t.Fatal(err)
		}
		return b
	})
}

// One guest lives through all the ways in which a plugin may find its record.
func TestRecovery(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)
	vm = r.start(vm.ID, vmm.StartRequest{})
	pid, started := vm.PID, vm.StartedAt
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.login()
	c.send("echo mark-ne''ver-lost\n")
	c.until("mark-never-lost")
	c.stop()

	for _, step := range []struct {
		name string
		edit func()
	}{
		{"as it was left", func() {}},
		{"died between spawn and record", func() {
			r.editRuntime(vm.ID, func(rec *store.Runtime) { rec.Phase, rec.Process.PID = store.Intent, 0 })
		}},
		{"half-written", func() { r.editRecord(vm.ID, func(b []byte) []byte { return b[:len(b)/2] }) }},
		{"no record", func() { r.editRecord(vm.ID, func([]byte) []byte { return nil }) }},
		{"another VM's record", func() { r.editRuntime(vm.ID, func(rec *store.Runtime) { rec.VMID = "x" }) }},
	} {
		r.close()
		step.edit()
		r.open()
		got := r.get(vm.ID)
		if got.State != vmm.StateRunning || got.PID != pid {
			t.Fatalf("%s: %+v, want running with process %d", step.name, got, pid)
		}
		if got := r.start(vm.ID, vmm.StartRequest{}); got.PID != pid {
			t.Errorf("%s: started again, process %d", step.name, got.PID)
		}
		if n := len(r.processes(vm.ID)); n != 1 {
			t.Errorf("%s: %d processes", step.name, n)
		}
		if step.name == "as it was left" && (!got.StartedAt.Equal(started) || !got.Since.Equal(started)) {
			t.Errorf("started at %v, running since %v, was %v", got.StartedAt, got.Since, started)
		}
	}

	// History is there and the serial port takes keys.
	c = r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.until("mark-never-lost")
	c.send("echo aft''er\n")
	c.until("after")
	c.stop()

	// A hypervisor that does not answer: nothing is started beside it, the list goes on, Kill ends it.
	r.close()
	stopProcess(t, pid)
	begin := time.Now()
	r.open()
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("a hung hypervisor delayed the plugin's start by %v", d)
	}
	if got := r.get(vm.ID); got.State != vmm.StateUnknown {
		t.Errorf("hung: %+v", got)
	}
	if _, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID}); err == nil {
		t.Error("started beside a hung hypervisor")
	}
	if err := syscall.Kill(int(pid), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	r.awaitState(vm.ID, vmm.StateRunning)

	// Its pid belongs to somebody else by now: the record says another start time.
	r.close()
	r.editRuntime(vm.ID, func(rec *store.Runtime) { rec.Process.StartTime++ })
	r.open()
	if got := r.get(vm.ID); got.State != vmm.StateFailed || !strings.Contains(got.Reason, "while the plugin was away") {
		t.Errorf("recycled pid: %+v", got)
	}
	if !alive(pid) {
		t.Fatal("the stranger was killed")
	}
	kill(t, pid) // it was our guest after all
}

func stopProcess(t *testing.T, pid uint32) {
	t.Helper()
	if err := syscall.Kill(int(pid), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
}

func alive(pid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(b), ") Z ")
}

// What happened while the plugin was away is told apart.
func TestEndsWhileAway(t *testing.T) {
	r := newRig(t)
	vm := r.create(nil)

	vm = r.start(vm.ID, vmm.StartRequest{})
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.login()
	c.send("sleep 3; poweroff -f\n")
	c.until("poweroff")
	r.close()
	awaitLine(t, filepath.Join(r.dir, "vm", vm.ID, "console.log"), "Power down")
	if !alive(vm.PID) {
		t.Error("the hypervisor did not wait for us")
	}
	r.open()
	got := r.awaitState(vm.ID, vmm.StateStopped)
	if got.Reason != reasonOff || got.Desired != vmm.StateStopped {
		t.Errorf("powered off while away: %+v", got)
	}

	vm = r.start(vm.ID, vmm.StartRequest{})
	r.close()
	kill(t, vm.PID)
	awaitDead(t, vm.PID)
	r.open()
	if got := r.get(vm.ID); got.State != vmm.StateFailed || got.Desired != vmm.StateRunning {
		t.Errorf("crashed while away: %+v", got)
	}
	poll(t, "an audit record", func() bool { return r.host.said("while the plugin was away") })

	vm = r.start(vm.ID, vmm.StartRequest{})
	r.close()
	kill(t, vm.PID)
	awaitDead(t, vm.PID)
	r.editRuntime(vm.ID, func(rec *store.Runtime) { rec.Process.BootID = "another" })
	r.open()
	if got := r.get(vm.ID); got.State != vmm.StateStopped || got.Reason != "the host went down" || got.Desired != vmm.StateRunning {
		t.Errorf("host rebooted: %+v", got)
	}
}

func awaitDead(t *testing.T, pid uint32) {
	t.Helper()
	poll(t, "the process's end", func() bool { return !alive(pid) })
}

func awaitLine(t *testing.T, path, s string) {
	t.Helper()
	poll(t, s, func() bool {
		b, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(b), s)
	})
}

// poll is for what nothing announces.
func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}
