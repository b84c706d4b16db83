package vmmkit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// hang blocks until ctx ends, after telling that it was reached.
func hang(reached chan<- struct{}) func(context.Context) error {
	return func(ctx context.Context) error {
		reached <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
}

// A hung hypervisor holds up nobody else, and Kill ends it.
func TestHungHypervisor(t *testing.T) {
	r := newRig(t)
	a, b := r.create("a"), r.create("b")
	r.start(a.ID)
	reached := make(chan struct{}, 1)
	r.d.set(func() { r.d.pause = hang(reached) })
	paused := make(chan error, 1)
	go func() {
		_, err := r.m.Pause(t.Context(), vmm.Ref{Ref: a.ID})
		paused <- err
	}()
	<-reached
	begin := time.Now()
	if vms, err := r.m.List(t.Context()); err != nil || len(vms) != 2 {
		t.Errorf("list: %v, %v", vms, err)
	}
	if vm := r.start(b.ID); vm.State != vmm.StateRunning {
		t.Errorf("the other VM: %+v", vm)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := r.m.Stop(ctx, vmm.StopRequest{Ref: a.ID})
	wantErr(t, "a second change with a deadline", err, errs.Deadline, "")
	if vm, err := r.m.Kill(t.Context(), vmm.Ref{Ref: a.ID}); err != nil || vm.State != vmm.StateStopped || vm.PID != 0 {
		t.Errorf("kill: %+v, %v", vm, err)
	}
	if err := <-paused; errs.ReasonOf(err) != "VM_KILLED" {
		t.Errorf("what was under way says: %v", err)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("all that took %v", d)
	}
}

// A start that hangs can be killed, and fails with its caller's deadline.
func TestHungStart(t *testing.T) {
	r := newRig(t)
	vm := r.create("a")
	reached := make(chan struct{}, 1)
	r.d.set(func() { r.d.connect = hang(reached) })
	started := make(chan error, 1)
	go func() {
		_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
		started <- err
	}()
	<-reached
	now, _ := r.m.Get(t.Context(), vmm.Ref{Ref: vm.ID})
	if now.State != vmm.StateStarting || now.PID == 0 {
		t.Errorf("while starting: %+v", now)
	}
	_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
	wantErr(t, "a second start", err, errs.Conflict, "")
	wantErr(t, "delete", r.m.Delete(t.Context(), vmm.Ref{Ref: vm.ID}), errs.Precondition, "")
	if got, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || got.State != vmm.StateStopped || got.Reason != reasonKilled {
		t.Errorf("kill: %+v, %v", got, err)
	}
	if err := <-started; !errors.Is(err, errs.Canceled) {
		t.Errorf("the start says: %v", err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = r.m.Start(ctx, vmm.StartRequest{ID: vm.ID})
	wantErr(t, "a start with a deadline", err, errs.Deadline, "")
	got, _ := r.m.Get(t.Context(), vmm.Ref{Ref: vm.ID})
	if got.State != vmm.StateFailed || got.PID != 0 {
		t.Errorf("afterwards: %+v", got)
	}
	if syscall.Kill(int(now.PID), 0) == nil {
		t.Error("a process is left")
	}

	r.d.set(func() { r.d.connect = nil; r.d.binary = "/does/not/exist" })
	_, err = r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
	wantErr(t, "no hypervisor", err, errs.Unavailable, "")
}

func TestShutdownWhileStarting(t *testing.T) {
	r := newRig(t)
	vm := r.create("a")
	reached := make(chan struct{}, 1)
	r.d.set(func() { r.d.connect = hang(reached) })
	started := make(chan error, 1)
	go func() {
		_, err := r.m.Start(context.Background(), vmm.StartRequest{ID: vm.ID})
		started <- err
	}()
	<-reached
	r.close()
	if err := <-started; err == nil {
		t.Error("the start succeeded")
	}
	r.d.set(func() { r.d.connect = nil })
	r.open()
	if got, err := r.m.Get(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil || got.State == vmm.StateUnknown {
		t.Errorf("afterwards: %+v, %v", got, err)
	}
}

// A lost connection is unknown until it is there again; nothing is started meanwhile.
func TestLostConnection(t *testing.T) {
	r := newRig(t)
	vm := r.create("a")
	vm = r.start(vm.ID)
	reached := make(chan struct{}, 100)
	r.d.set(func() {
		r.d.connect = func(context.Context) error { reached <- struct{}{}; return errors.New("deaf") }
	})
	r.d.of(vm.ID).fn(Event{Kind: EventLost})
	got := r.await(vm.ID, vmm.StateUnknown)
	if got.PID != vm.PID {
		t.Errorf("unknown: %+v", got)
	}
	<-reached
	_, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
	wantErr(t, "start", err, errs.Precondition, "")
	<-reached
	if h, _ := r.m.Health(t.Context()); len(h.Conditions) != 1 || h.Conditions[0].Code != condNoAnswer {
		t.Errorf("health: %+v", h)
	}
	r.d.set(func() { r.d.connect = nil })
	if got := r.await(vm.ID, vmm.StateRunning); got.PID != vm.PID {
		t.Errorf("again: %+v", got)
	}
}

func TestStopWays(t *testing.T) {
	r := newRig(t)
	vm := r.create("a")
	r.start(vm.ID)
	if got, err := r.m.Stop(t.Context(), vmm.StopRequest{Ref: "a"}); err != nil || got.State != vmm.StateStopped || got.Reason != reasonGuestOff {
		t.Errorf("graceful: %+v, %v", got, err)
	}
	// Paused guests are let go so that they can notice.
	if got, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Paused: true}); err != nil || got.State != vmm.StatePaused {
		t.Errorf("start paused: %+v, %v", got, err)
	}
	if got, err := r.m.Stop(t.Context(), vmm.StopRequest{Ref: "a", Timeout: 10 * time.Second}); err != nil || got.Reason != reasonGuestOff {
		t.Errorf("from paused: %+v, %v", got, err)
	}
	r.start(vm.ID)
	i := r.d.of(vm.ID)
	i.mu.Lock()
	i.deaf = true
	i.mu.Unlock()
	_, err := r.m.Stop(t.Context(), vmm.StopRequest{Ref: "a", Timeout: 10 * time.Millisecond, NoForce: true})
	wantErr(t, "stubborn", err, errs.Deadline, "")
	stopping := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := r.m.Stop(ctx, vmm.StopRequest{Ref: "a"})
		stopping <- err
	}()
	r.await(vm.ID, vmm.StateStopping)
	_, err = r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID})
	wantErr(t, "start while stopping", err, errs.Precondition, "")
	cancel()
	if err := <-stopping; !errors.Is(err, context.Canceled) {
		t.Errorf("a stop whose caller left: %v", err)
	}
	if got, _ := r.m.Get(t.Context(), vmm.Ref{Ref: "a"}); got.State != vmm.StateRunning || got.Desired != vmm.StateStopped {
		t.Errorf("afterwards: %+v", got)
	}
	if got, err := r.m.Stop(t.Context(), vmm.StopRequest{Ref: "a", Timeout: 10 * time.Millisecond}); err != nil || got.Reason != reasonForced {
		t.Errorf("forced: %+v, %v", got, err)
	}
	_, err = r.m.Pause(t.Context(), vmm.Ref{Ref: "a"})
	wantErr(t, "pause of a stopped VM", err, errs.Precondition, "")
}

// A watcher sees everything in order, and one that lags gets a new snapshot.
func TestWatch(t *testing.T) {
	r := newRig(t)
	vm := r.create("a")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	snapshot, goOn := make(chan struct{}), make(chan struct{})
	var types []vmm.EventType
	var states []vmm.State
	done := make(chan error, 1)
	go func() {
		done <- r.m.Watch(ctx, func(e vmm.Event) error {
			types = append(types, e.Type)
			if e.Type == vmm.EventChanged {
				states = append(states, e.VM.State)
			}
			if e.Type == vmm.EventSnapshotEnd && len(types) == 2 {
				close(snapshot)
			}
			if e.Type == vmm.EventDeleted && e.VM.ID == vm.ID {
				<-goOn
			}
			if e.Type == vmm.EventLagged {
				cancel()
			}
			return nil
		})
	}()
	<-snapshot
	r.start(vm.ID)
	if _, err := r.m.Stop(t.Context(), vmm.StopRequest{Ref: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := r.m.Delete(t.Context(), vmm.Ref{Ref: "a"}); err != nil {
		t.Fatal(err)
	}
	b := r.create("b")
	v, err := r.m.find(b.ID)
	if err != nil {
		t.Fatal(err)
	}
	for i := range queueLength + 10 {
		v.mu.Lock()
		v.setLocked(vmm.StateStopped, fmt.Sprint(i))
		v.mu.Unlock()
	}
	close(goOn)
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if !slices.Contains(types, vmm.EventLagged) {
		t.Error("the lag was not told")
	}
	order := []vmm.State{vmm.StateStarting, vmm.StateRunning, vmm.StateStopping, vmm.StateStopped}
	at := 0
	for _, s := range states {
		if at < len(order) && s == order[at] {
			at++
		}
	}
	if at != len(order) {
		t.Errorf("states %v, want %v in order", states, order)
	}
}

// A directory that a crash left is swept; a VM that is known keeps its own.
func TestSweep(t *testing.T) {
	r := newRig(t)
	vm := r.create("a")
	r.close()
	stale := filepath.Join(r.dir, "vm", "0190f000-0000-7000-8000-000000000000")
	keep := filepath.Join(r.dir, "vm", "not-an-id")
	for _, d := range []string{stale, keep} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	r.open()
	if _, err := os.Stat(stale); err == nil {
		t.Error("the stale directory is there")
	}
	for _, d := range []string{keep, filepath.Join(r.dir, "vm", vm.ID)} {
		if _, err := os.Stat(d); err != nil {
			t.Error(err)
		}
	}
}

// A thousand definitions: a list is a walk through memory.
func TestListOfThousand(t *testing.T) {
	r := newRig(t)
	for i := range 1000 {
		r.create(fmt.Sprintf("vm-%04d", i))
	}
	var best time.Duration = time.Hour
	for range 20 {
		begin := time.Now()
		vms, err := r.m.List(t.Context())
		if err != nil || len(vms) != 1000 || vms[7].Spec.Name != "vm-0007" {
			t.Fatalf("%d VMs, %v", len(vms), err)
		}
		best = min(best, time.Since(begin))
	}
	t.Logf("a list of 1000 takes %v", best)
	if best > 20*time.Millisecond {
		t.Errorf("a list of 1000 takes %v", best)
	}
	begin := time.Now()
	r.close()
	r.open()
	t.Logf("closed and opened with 1000 definitions in %v", time.Since(begin))
}
