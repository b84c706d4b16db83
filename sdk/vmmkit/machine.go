package vmmkit

import (
	"context"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/console"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// machine is one VM.
type machine struct {
	m    *Manager
	id   string
	con  *console.Console
	as   vmm.RunAs     // who its next hypervisor runs as
	turn chan struct{} // holds one token while somebody changes the VM
	view atomic.Pointer[vmm.VM]

	mu       sync.Mutex // guards what follows; never held while waiting
	def      store.Definition
	desired  vmm.State
	state    vmm.State
	reason   string
	since    time.Time
	run      *run
	opCancel context.CancelCauseFunc // of who holds the turn
	deleted  bool
}

// run is one hypervisor process from launch to its end.
type run struct {
	rec   store.Runtime
	proc  *proc.Process
	inst  Instance
	cause string        // why it is being ended, "" if nobody knows of a reason
	fault bool          // the cause is a failure
	soft  chan struct{} // set during a soft reboot; gets a value when the guest has powered off
	ended chan struct{} // closed when its end is entered everywhere
}

// link is one connection to a run's process. Its events may come before it is held.
type link struct{ off, lost bool }

func (m *Manager) newMachine(def store.Definition, st store.Status, as vmm.RunAs) *machine {
	v := &machine{m: m, id: def.ID, as: as, turn: make(chan struct{}, 1), def: def, desired: st.Desired, state: st.State, reason: st.Reason, since: st.Since}
	v.con = console.New(console.NewLog(m.cw, filepath.Join(m.vmDir(def.ID), "console.log")))
	v.mu.Lock()
	defer v.mu.Unlock()
	v.viewLocked()
	return v
}

// now is the VM as last published, the caller's own copy.
func (v *machine) now() vmm.VM {
	vm := *v.view.Load()
	vm.Spec = cloneSpec(vm.Spec)
	return vm
}

func cloneSpec(s vmm.Spec) vmm.Spec {
	s.Disks = slices.Clone(s.Disks)
	s.NICs = slices.Clone(s.NICs)
	s.Labels = maps.Clone(s.Labels)
	return s
}

// viewLocked makes the published view anew.
func (v *machine) viewLocked() vmm.VM {
	vm := vmm.VM{ID: v.id, Spec: cloneSpec(v.def.Spec), Generation: v.def.Generation, CreatedAt: v.def.CreatedAt, State: v.state,
		Reason: v.reason, Since: v.since, Desired: v.desired, RunAs: v.runAsLocked()}
	if r := v.run; r != nil {
		vm.PID = uint32(r.rec.Process.PID)
		vm.StartedAt = r.rec.StartedAt
		vm.Hypervisor = r.rec.Hypervisor
		if p, ok := v.m.o.Driver.(VsockSocketer); ok && r.rec.Spec.Vsock != 0 {
			vm.VsockSocket = filepath.Join(v.m.vmDir(v.id), p.VsockSocket())
		}
		vm.Pending = !sameHardware(v.def.Spec, r.rec.Spec) || v.def.Initramfs != r.rec.Initramfs
	}
	v.view.Store(&vm)
	return vm
}

// publishLocked makes the view anew and tells it as an event.
func (v *machine) publishLocked(t vmm.EventType) {
	v.m.hub.mu.Lock()
	defer v.m.hub.mu.Unlock()
	vm := v.viewLocked()
	vm.Spec = cloneSpec(vm.Spec)
	v.m.hub.sendLocked(vmm.Event{Type: t, Time: v.m.o.Now(), VM: vm})
}

// setLocked moves to a state.
func (v *machine) setLocked(s vmm.State, reason string) {
	if v.state == s && v.reason == reason {
		return
	}
	if v.state != s {
		v.since = v.m.o.Now()
	}
	v.state, v.reason = s, reason
	v.publishLocked(vmm.EventChanged)
}

// sameHardware tells whether a process started with b is what a asks for.
func sameHardware(a, b vmm.Spec) bool {
	strip := func(s vmm.Spec) vmm.Spec {
		s = cloneSpec(s)
		s.Name, s.Labels, s.Autostart, s.CloudInit = "", nil, false, vmm.CloudInit{}
		s.Boot.KernelName = ""
		s.MaxCPUs, s.MaxMemory = max(s.MaxCPUs, s.CPUs), max(s.MaxMemory, s.MemoryBytes)
		for i := range s.Disks {
			s.Disks[i].Delete = false
		}
		for i := range s.NICs {
			s.NICs[i].Delete = false
		}
		slices.SortFunc(s.Disks, func(x, y vmm.Disk) int { return compare(x.Name, y.Name) })
		slices.SortFunc(s.NICs, func(x, y vmm.NIC) int { return compare(x.NICID, y.NICID) })
		return s
	}
	x, y := strip(a), strip(b)
	return x.CPUs == y.CPUs && x.MaxCPUs == y.MaxCPUs && x.MemoryBytes == y.MemoryBytes && x.MaxMemory == y.MaxMemory && x.Boot == y.Boot &&
		x.Nested == y.Nested && x.HugePages == y.HugePages && x.Topology == y.Topology && x.Watchdog == y.Watchdog && x.Vsock == y.Vsock && slices.Equal(x.Disks, y.Disks) && slices.Equal(x.NICs, y.NICs)
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (v *machine) resource() errs.Resource {
	return errs.Resource{Type: "vm", ID: v.id, Name: v.view.Load().Spec.Name}
}

// take waits for the turn.
func (v *machine) take(ctx context.Context) error {
	select {
	case v.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case v.turn <- struct{}{}:
		return nil
	case <-v.m.closing.Done():
		return errClosing()
	case <-ctx.Done():
		return &errs.Error{Kind: errs.KindOf(ctx.Err()), Resource: v.resource(), Message: "another change of this VM is still under way",
			Err: ctx.Err(), Remedy: "wait for it, or end it with: mvirt vm kill"}
	}
}

func errClosing() *errs.Error {
	return errs.New(errs.Unavailable, "the plugin is shutting down").Do("try again in a moment")
}

func (v *machine) give() { <-v.turn }

// begin takes the turn and gives a context that Kill and Shutdown cancel. The returned function ends it.
func (v *machine) begin(ctx context.Context) (context.Context, func(), error) {
	if err := v.take(ctx); err != nil {
		return nil, nil, err
	}
	opCtx, cancel := context.WithCancelCause(ctx)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.deleted {
		cancel(nil)
		v.give()
		return nil, nil, errs.New(errs.NotFound, "the VM has been deleted meanwhile").With(errs.Resource{Type: "vm", ID: v.id})
	}
	if err := v.m.closing.Err(); err != nil {
		cancel(nil)
		v.give()
		return nil, nil, errClosing()
	}
	v.opCancel = cancel
	return opCtx, func() {
		v.mu.Lock()
		v.opCancel = nil
		v.mu.Unlock()
		cancel(nil)
		v.give()
	}, nil
}

// cancelOperation ends what holds the turn, which will give it back soon.
func (v *machine) cancelOperation(cause error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.opCancel != nil {
		v.opCancel(cause)
	}
}

// letGo closes what the machine holds; its hypervisor goes on.
func (v *machine) letGo() {
	v.mu.Lock()
	r := v.run
	var inst Instance
	if r != nil {
		inst = r.inst
	}
	v.mu.Unlock()
	if inst != nil {
		_ = inst.Close()
	}
	_ = v.con.Log().Close()
}

// why is the cause that a cancelled context carries, or err.
func why(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && ctx.Err() != nil {
		return c
	}
	return err
}

// follow enters the end of a run's process, whenever that comes.
func (v *machine) follow(r *run) {
	v.m.wg.Add(1)
	go func() {
		defer v.m.wg.Done()
		exit, err := r.proc.Wait(v.m.ctx)
		if v.m.ctx.Err() != nil && err != nil {
			return // shutting down: it goes on
		}
		if err != nil {
			v.m.o.Log.Error("waiting for a hypervisor", "vm", v.id, "error", err)
		}
		v.endRun(r, exit)
	}()
}

// endRun enters that a run's process has ended.
func (v *machine) endRun(r *run, exit proc.Exit) {
	v.mu.Lock()
	inst := r.inst
	r.inst = nil
	asked := r.cause != ""
	reason, fault := r.cause, r.fault
	if !asked {
		reason, fault = "the hypervisor ended by itself with "+exit.String(), true
	}
	if fault {
		if t := v.m.logTail(v.id); t != "" {
			reason += ": " + t
		}
	}
	st := store.Status{State: vmm.StateStopped, Reason: reason, Since: v.m.o.Now(), Desired: v.desired}
	if fault {
		st.State = vmm.StateFailed
	}
	v.mu.Unlock()

	if inst != nil {
		_ = inst.Close()
	}
	if err := v.m.db.Apply(v.id, store.Change{DeleteRuntime: true, Status: &st}); err != nil {
		// The record stays; the next plugin sees that its process is gone and comes to the same end.
		v.m.o.Log.Error("the end of a hypervisor cannot be stored", "vm", v.id, "error", err)
	}
	v.m.removeSockets(v.id)
	v.con.Detach()

	watched := v.m.hub.watched() // whoever watches the events audits what they say
	v.mu.Lock()
	v.run = nil
	v.state = 0 // so that the reason counts from now, whatever the state was
	v.setLocked(st.State, st.Reason)
	close(r.ended)
	v.mu.Unlock()
	v.m.clearCondition(condNoAnswer, v.id)
	v.m.o.Log.Info("hypervisor ended", "vm", v.id, "pid", r.rec.Process.PID, "exit", exit.String(), "reason", reason)
	if (!asked || reason == reasonGuestOff) && !watched {
		v.m.audit(v.id, "VM "+st.State.String()+": "+reason, map[string]string{"state": st.State.String()})
	}
}

// endCause marks why a run is ended, unless a reason is known already.
func (v *machine) endCause(r *run, cause string, fault bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if r.cause == "" {
		r.cause, r.fault = cause, fault
	}
}

// force ends a run's process: by Quit if the hypervisor is held and gentle is set, then by SIGKILL. It returns
// when the end is entered, or ctx ends.
func (v *machine) force(ctx context.Context, r *run, gentle bool) error {
	v.mu.Lock()
	inst := r.inst
	v.mu.Unlock()
	if gentle && inst != nil {
		qctx, cancel := context.WithTimeout(ctx, quitTimeout)
		if inst.Quit(qctx) == nil {
			select {
			case <-r.ended:
			case <-qctx.Done():
			}
		}
		cancel()
	}
	select {
	case <-r.ended:
		return nil
	default:
	}
	if err := r.proc.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, proc.ErrGone) {
		return errs.Wrap(errs.Unknown, err, "the hypervisor, process %d, cannot be killed", r.rec.Process.PID)
	}
	select {
	case <-r.ended:
		return nil
	case <-ctx.Done():
		return &errs.Error{Kind: errs.Deadline, Resource: v.resource(), Message: "the hypervisor was sent SIGKILL and has not ended yet",
			Err: why(ctx, ctx.Err()), Remedy: "it ends when the kernel lets it; a hung disk keeps it"}
	}
}
