package fake

import (
	"context"
	"io"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// VMM is a vmm service in memory.
type VMM struct {
	base
	w *World
}

// VMM is the vmm service.
func (w *World) VMM() *VMM { return &VMM{w: w} }

func (w *World) vm(ref string) (*vmm.VM, error) {
	if v := w.vms[ref]; v != nil {
		return v, nil
	}
	for _, v := range w.vms {
		if v.Spec.Name == ref {
			return v, nil
		}
	}
	return nil, notFound("vm", ref)
}

func copyVM(v *vmm.VM) vmm.VM {
	c := *v
	c.Spec.Disks, c.Spec.NICs = slices.Clone(v.Spec.Disks), slices.Clone(v.Spec.NICs)
	return c
}

// open are the volumes that a live VM's hypervisor has open.
func (w *World) open(v *vmm.VM) []string { return strings.Fields(v.Hypervisor) }

func (w *World) tellLocked(typ vmm.EventType, v *vmm.VM) {
	for ch := range w.watchers {
		select {
		case ch <- vmm.Event{Type: typ, Time: now(), VM: copyVM(v)}:
		default:
		}
	}
}

func (w *World) stateLocked(v *vmm.VM, s vmm.State, reason string) {
	v.State, v.Reason, v.Since = s, reason, now()
	if !s.Live() {
		v.Hypervisor, v.PID = "", 0
	}
	w.tellLocked(vmm.EventChanged, v)
}

// PowerOff ends a VM as its own guest would.
func (w *World) PowerOff(ref string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, err := w.vm(ref)
	if err != nil {
		panic(err)
	}
	w.stateLocked(v, vmm.StateStopped, "guest powered off")
}

func (m *VMM) Create(ctx context.Context, req vmm.CreateRequest) (vmm.VM, error) {
	return do(ctx, m.w, "vmm.Create", func() (vmm.VM, error) {
		if _, err := m.w.vm(req.Spec.Name); err == nil {
			return vmm.VM{}, errs.New(errs.Exists, "VM %s", req.Spec.Name)
		}
		v := &vmm.VM{ID: req.ID, Spec: req.Spec, State: vmm.StateStopped, Desired: vmm.StateStopped, CreatedAt: now(), RunAs: vmm.RunAs{UID: 60001, GID: 60001}, Generation: 1}
		v.Spec.Boot.HasKernel = req.Kernel != nil
		if req.Kernel != nil {
			if _, err := io.ReadAll(req.Kernel); err != nil {
				return vmm.VM{}, err
			}
		}
		m.w.vms[req.ID] = v
		m.w.tellLocked(vmm.EventChanged, v)
		return copyVM(v), nil
	})
}

func (m *VMM) Get(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return do(ctx, m.w, "vmm.Get", func() (vmm.VM, error) {
		v, err := m.w.vm(req.Ref)
		if err != nil {
			return vmm.VM{}, err
		}
		return copyVM(v), nil
	})
}

func (m *VMM) List(ctx context.Context) ([]vmm.VM, error) {
	return do(ctx, m.w, "vmm.List", func() ([]vmm.VM, error) {
		out := make([]vmm.VM, 0, len(m.w.vms))
		for _, v := range byName(m.w.vms, func(v *vmm.VM) string { return v.Spec.Name }) {
			out = append(out, copyVM(v))
		}
		return out, nil
	})
}

func (m *VMM) Update(ctx context.Context, req vmm.UpdateRequest) (vmm.VM, error) {
	return do(ctx, m.w, "vmm.Update", func() (vmm.VM, error) {
		v, err := m.w.vm(req.ID)
		if err != nil {
			return vmm.VM{}, err
		}
		if v.Generation != req.Generation {
			return vmm.VM{}, errs.New(errs.Conflict, "generation")
		}
		v.Spec = req.Spec
		v.Generation++
		m.w.tellLocked(vmm.EventChanged, v)
		return copyVM(v), nil
	})
}

func (m *VMM) Delete(ctx context.Context, req vmm.Ref) error {
	return run(ctx, m.w, "vmm.Delete", func() error {
		v, err := m.w.vm(req.Ref)
		if err != nil {
			return nil
		}
		if v.State.Live() {
			return errs.New(errs.Precondition, "running").Because("VM_RUNNING")
		}
		delete(m.w.vms, v.ID)
		m.w.tellLocked(vmm.EventDeleted, v)
		return nil
	})
}

// change makes a call that changes a VM.
func (m *VMM) change(ctx context.Context, call, ref string, fn func(v *vmm.VM) error) (vmm.VM, error) {
	return do(ctx, m.w, call, func() (vmm.VM, error) {
		v, err := m.w.vm(ref)
		if err != nil {
			return vmm.VM{}, err
		}
		if err := fn(v); err != nil {
			return vmm.VM{}, err
		}
		return copyVM(v), nil
	})
}

func (m *VMM) Start(ctx context.Context, req vmm.StartRequest) (vmm.VM, error) {
	return m.start(ctx, "vmm.Start", req)
}

func (m *VMM) start(ctx context.Context, call string, req vmm.StartRequest) (vmm.VM, error) {
	return m.change(ctx, call, req.ID, func(v *vmm.VM) error {
		if v.State.Live() {
			return nil
		}
		if len(req.Disks) != len(v.Spec.Disks) || len(req.NICs) != len(v.Spec.NICs) {
			return errs.New(errs.Invalid, "%d disks and %d NICs for %d and %d", len(req.Disks), len(req.NICs), len(v.Spec.Disks), len(v.Spec.NICs))
		}
		var open []string
		for i, d := range req.Disks {
			if d.VolumeID != v.Spec.Disks[i].VolumeID || d.Path == "" || d.Format != "raw" {
				return errs.New(errs.Invalid, "disk %d", i)
			}
			open = append(open, d.VolumeID)
		}
		for i, n := range req.NICs {
			if n.NICID != v.Spec.NICs[i].NICID || len(n.TAP) != 1 || n.MAC != v.Spec.NICs[i].MAC {
				return errs.New(errs.Invalid, "nic %d: %+v, defined %+v", i, n, v.Spec.NICs[i])
			}
			if _, err := n.TAP[0].Stat(); err != nil {
				return errs.Wrap(errs.Invalid, err, "nic %d", i)
			}
		}
		m.w.stateLocked(v, vmm.StateRunning, "")
		v.Hypervisor, v.PID, v.Desired = strings.Join(open, " "), 4711, vmm.StateRunning
		return nil
	})
}

func (m *VMM) Stop(ctx context.Context, req vmm.StopRequest) (vmm.VM, error) {
	return m.change(ctx, "vmm.Stop", req.Ref, func(v *vmm.VM) error {
		v.Desired = vmm.StateStopped
		if v.State.Live() {
			m.w.stateLocked(v, vmm.StateStopped, "stopped")
		}
		return nil
	})
}

func (m *VMM) Kill(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.change(ctx, "vmm.Kill", req.Ref, func(v *vmm.VM) error {
		v.Desired = vmm.StateStopped
		if v.State.Live() {
			m.w.stateLocked(v, vmm.StateStopped, "killed")
		}
		return nil
	})
}

func (m *VMM) Pause(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.change(ctx, "vmm.Pause", req.Ref, func(v *vmm.VM) error {
		if !v.State.Live() {
			return errs.New(errs.Precondition, "not running")
		}
		m.w.stateLocked(v, vmm.StatePaused, "")
		return nil
	})
}

func (m *VMM) Resume(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.change(ctx, "vmm.Resume", req.Ref, func(v *vmm.VM) error {
		if !v.State.Live() {
			return errs.New(errs.Precondition, "not running")
		}
		m.w.stateLocked(v, vmm.StateRunning, "")
		return nil
	})
}

func (m *VMM) Reboot(ctx context.Context, req vmm.RebootRequest) (vmm.VM, error) {
	return m.change(ctx, "vmm.Reboot", req.Ref, func(v *vmm.VM) error {
		if !v.State.Live() {
			return errs.New(errs.Precondition, "not running")
		}
		m.w.tellLocked(vmm.EventRebooted, v)
		return nil
	})
}

// Console echoes what is typed, after a greeting, until the input ends or "quit" is typed.
func (m *VMM) Console(ctx context.Context, req vmm.ConsoleRequest, cio vmm.ConsoleIO) error {
	ch := make(chan vmm.Event, 1000)
	m.w.mu.Lock()
	m.w.watchers[ch] = true
	m.w.mu.Unlock()
	defer func() {
		m.w.mu.Lock()
		delete(m.w.watchers, ch)
		m.w.mu.Unlock()
	}()
	vm, err := m.Get(ctx, vmm.Ref{Ref: req.Ref})
	if err != nil {
		return err
	}
	if err := cio.Out([]byte("hello\n")); err != nil || req.NoFollow {
		return err
	}
	for {
		select {
		case b, ok := <-cio.In:
			if !ok || string(b) == "quit" {
				return io.EOF
			}
			if err := cio.Out(b); err != nil {
				return err
			}
		case e := <-ch:
			if e.VM.ID == vm.ID && !e.VM.State.Live() {
				return nil // it ends with its VM
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *VMM) Watch(ctx context.Context, fn func(vmm.Event) error) error {
	ch := make(chan vmm.Event, 1000)
	m.w.mu.Lock()
	m.w.watchers[ch] = true
	all := byName(m.w.vms, func(v *vmm.VM) string { return v.Spec.Name })
	first := make([]vmm.VM, 0, len(all))
	for _, v := range all {
		first = append(first, copyVM(v))
	}
	m.w.mu.Unlock()
	defer func() {
		m.w.mu.Lock()
		delete(m.w.watchers, ch)
		m.w.mu.Unlock()
	}()
	for _, v := range first {
		if err := fn(vmm.Event{Type: vmm.EventSnapshot, Time: now(), VM: v}); err != nil {
			return err
		}
	}
	if err := fn(vmm.Event{Type: vmm.EventSnapshotEnd, Time: now()}); err != nil {
		return err
	}
	for {
		select {
		case e := <-ch:
			if err := fn(e); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *VMM) plug(ctx context.Context, call, id string, f service.Feature, fn func(v *vmm.VM) error) error {
	_, err := m.change(ctx, call, id, func(v *vmm.VM) error {
		if err := m.w.lacks(f); err != nil {
			return err
		}
		if !v.State.Live() {
			return errs.New(errs.Precondition, "not running")
		}
		return fn(v)
	})
	return err
}

func (m *VMM) PlugDisk(ctx context.Context, req vmm.PlugDiskRequest) error {
	return m.plug(ctx, "vmm.PlugDisk", req.ID, service.FeatureVMMHotplugDisk, func(v *vmm.VM) error {
		v.Hypervisor += " " + req.Disk.VolumeID
		return nil
	})
}

func (m *VMM) UnplugDisk(ctx context.Context, req vmm.UnplugRequest) error {
	return m.plug(ctx, "vmm.UnplugDisk", req.ID, service.FeatureVMMHotplugDisk, func(v *vmm.VM) error {
		for _, d := range v.Spec.Disks {
			if d.Name == req.Name {
				v.Hypervisor = strings.ReplaceAll(v.Hypervisor, d.VolumeID, "")
			}
		}
		return nil
	})
}

func (m *VMM) PlugNIC(ctx context.Context, req vmm.PlugNICRequest) error {
	return m.plug(ctx, "vmm.PlugNIC", req.ID, service.FeatureVMMHotplugNIC, func(*vmm.VM) error { return nil })
}

func (m *VMM) UnplugNIC(ctx context.Context, req vmm.UnplugRequest) error {
	return m.plug(ctx, "vmm.UnplugNIC", req.ID, service.FeatureVMMHotplugNIC, func(*vmm.VM) error { return nil })
}

func (m *VMM) DiskResized(ctx context.Context, req vmm.DiskResizedRequest) error {
	return m.plug(ctx, "vmm.DiskResized", req.ID, service.FeatureVMMDiskResize, func(*vmm.VM) error { return nil })
}

func (m *VMM) Resize(ctx context.Context, req vmm.ResizeRequest) (vmm.VM, error) {
	return m.change(ctx, "vmm.Resize", req.Ref, func(*vmm.VM) error { return m.w.lacks(service.FeatureVMMResize) })
}

func (m *VMM) Snapshot(ctx context.Context, req vmm.SnapshotRequest) (vmm.MemorySnapshot, error) {
	return do(ctx, m.w, "vmm.Snapshot", func() (vmm.MemorySnapshot, error) {
		v, err := m.w.vm(req.ID)
		if err == nil {
			err = m.w.lacks(service.FeatureVMMSnapshot)
		}
		if err == nil && v.State != vmm.StatePaused {
			err = errs.New(errs.Precondition, "not paused")
		}
		if err != nil {
			return vmm.MemorySnapshot{}, err
		}
		for _, s := range m.w.memory {
			if s.ID == req.SnapshotID {
				return s, nil
			}
		}
		s := vmm.MemorySnapshot{ID: req.SnapshotID, Name: req.Name, VMID: v.ID, SizeBytes: 1 << 20, CreatedAt: now(), Hypervisor: "fake", Spec: copyVM(v).Spec, Disks: req.Disks}
		m.w.memory = append(m.w.memory, s)
		return s, nil
	})
}

func (m *VMM) StartFromSnapshot(ctx context.Context, req vmm.StartFromSnapshotRequest) (vmm.VM, error) {
	list, err := m.ListSnapshots(ctx, vmm.Ref{})
	if err != nil {
		return vmm.VM{}, err
	}
	if !slices.ContainsFunc(list, func(s vmm.MemorySnapshot) bool { return s.ID == req.SnapshotID }) {
		return vmm.VM{}, notFound("vm snapshot", req.SnapshotID)
	}
	return m.start(ctx, "vmm.StartFromSnapshot", req.Start)
}

func (m *VMM) ListSnapshots(ctx context.Context, req vmm.Ref) ([]vmm.MemorySnapshot, error) {
	return do(ctx, m.w, "vmm.ListSnapshots", func() ([]vmm.MemorySnapshot, error) {
		if err := m.w.lacks(service.FeatureVMMSnapshot); err != nil {
			return nil, err
		}
		out := []vmm.MemorySnapshot{}
		for _, s := range m.w.memory {
			if req.Ref == "" || s.VMID == req.Ref || s.Spec.Name == req.Ref {
				out = append(out, s)
			}
		}
		return out, nil
	})
}

func (m *VMM) DeleteSnapshot(ctx context.Context, req vmm.Ref) error {
	return run(ctx, m.w, "vmm.DeleteSnapshot", func() error {
		m.w.memory = slices.DeleteFunc(m.w.memory, func(s vmm.MemorySnapshot) bool { return s.ID == req.Ref })
		return nil
	})
}

func (m *VMM) Counters(ctx context.Context, req vmm.Ref) (vmm.Counters, error) {
	if _, err := m.Get(ctx, req); err != nil {
		return vmm.Counters{}, err
	}
	return vmm.Counters{ResidentBytes: 1 << 20}, nil
}
