package sdktest

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// VMM is a vmm.Service whose VMs are states. A console echoes what is written to it.
type VMM struct {
	dir string

	mu       sync.Mutex
	st       vmmState
	watchers map[chan vmm.Event]bool
	consoles map[string]*fakeConsole
}

type vmmState struct {
	VMs table[vmm.CreateRequest, vmm.VM]
}

type fakeConsole struct {
	history []byte
	viewers map[chan []byte]bool
	writer  int // session that writes, 0: none
	session int
	ended   chan struct{}
}

var _ vmm.Service = (*VMM)(nil)

// NewVMM opens the fake in dir.
func NewVMM(dir string) (*VMM, error) {
	m := &VMM{dir: dir, watchers: map[chan vmm.Event]bool{}, consoles: map[string]*fakeConsole{}}
	m.st.VMs = newTable[vmm.CreateRequest]("vm", func(v *vmm.VM) string { return v.Spec.Name })
	if err := load(dir, &m.st); err != nil {
		return nil, err
	}
	for id, r := range m.st.VMs.Objects {
		if r.V.State.Live() {
			m.consoles[id] = newConsole()
		}
	}
	return m, nil
}

func newConsole() *fakeConsole {
	return &fakeConsole{history: []byte("boot\r\nlogin: "), viewers: map[chan []byte]bool{}, ended: make(chan struct{})}
}

// Health implements service.Base.
func (m *VMM) Health(context.Context) (service.Health, error) { return service.Health{}, nil }

// Shutdown implements service.Base.
func (m *VMM) Shutdown(context.Context) error { return nil }

func checkSpec(s vmm.Spec) error {
	switch {
	case s.CPUs < 1 || s.CPUs > 256:
		return errs.Field("spec.cpus", "give 1 to 256", "spec.cpus is %d", s.CPUs)
	case s.MemoryBytes < 16<<20 || s.MemoryBytes%(1<<20) != 0 || s.MemoryBytes > 16<<40:
		return errs.Field("spec.memory_bytes", "give a multiple of 1 MiB, at least 16 MiB", "spec.memory_bytes is %d", s.MemoryBytes)
	}
	return nil
}

func (m *VMM) changedLocked(t vmm.EventType, v vmm.VM) error {
	for w := range m.watchers {
		select {
		case w <- vmm.Event{Type: t, Time: time.Now().UTC(), VM: v}:
		default: // it lags; a real plugin says Lagged and begins anew
		}
	}
	return save(m.dir, &m.st)
}

// Create implements vmm.Service.
func (m *VMM) Create(_ context.Context, req vmm.CreateRequest) (vmm.VM, error) {
	kernel := req.Kernel != nil
	initramfs := req.Initramfs != nil
	req.Kernel, req.Initramfs = nil, nil
	m.mu.Lock()
	defer m.mu.Unlock()
	old, err := m.st.VMs.create(req.ID, req.Spec.Name, req)
	if err != nil {
		return vmm.VM{}, err
	}
	if old != nil {
		return old.V, nil
	}
	if err := checkSpec(req.Spec); err != nil {
		return vmm.VM{}, err
	}
	now := time.Now().UTC()
	v := vmm.VM{ID: req.ID, Spec: req.Spec, Generation: 1, CreatedAt: now, State: vmm.StateStopped, Since: now, Desired: vmm.StateStopped,
		RunAs: vmm.RunAs{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}, Hypervisor: "fake 1.0"}
	v.Spec.Boot.HasKernel, v.Spec.Boot.HasInitramfs = kernel, initramfs
	m.st.VMs.Objects[v.ID] = &record[vmm.CreateRequest, vmm.VM]{req, v}
	return v, m.changedLocked(vmm.EventChanged, v)
}

// Get implements vmm.Service.
func (m *VMM) Get(_ context.Context, req vmm.Ref) (vmm.VM, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.st.VMs.find(req.Ref)
	if err != nil {
		return vmm.VM{}, err
	}
	return r.V, nil
}

// List implements vmm.Service.
func (m *VMM) List(context.Context) ([]vmm.VM, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.st.VMs.list(), nil
}

// Update implements vmm.Service.
func (m *VMM) Update(_ context.Context, req vmm.UpdateRequest) (vmm.VM, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.st.VMs.find(req.ID)
	if err != nil {
		return vmm.VM{}, err
	}
	if req.Generation != r.V.Generation {
		return vmm.VM{}, errs.New(errs.Conflict, "the definition is at generation %d, not %d", r.V.Generation, req.Generation).Do("read it again and repeat the change")
	}
	if err := checkSpec(req.Spec); err != nil {
		return vmm.VM{}, err
	}
	if err := m.st.VMs.free(req.Spec.Name, r.V.ID); err != nil {
		return vmm.VM{}, err
	}
	boot := r.V.Spec.Boot
	r.V.Spec = req.Spec
	r.V.Spec.Boot.HasKernel = boot.HasKernel || req.Kernel != nil
	r.V.Spec.Boot.HasInitramfs = boot.HasInitramfs || req.Initramfs != nil
	r.V.Generation++
	r.V.Pending = r.V.State.Live()
	return r.V, m.changedLocked(vmm.EventChanged, r.V)
}

// Delete implements vmm.Service.
func (m *VMM) Delete(_ context.Context, req vmm.Ref) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.st.VMs.find(req.Ref)
	if err != nil {
		return nil
	}
	if r.V.State.Live() {
		return errs.New(errs.Precondition, "the VM is %s", r.V.State).Because("VM_RUNNING").With(errs.Resource{Type: "vm", ID: r.V.ID, Name: r.V.Spec.Name}).Do("stop it first")
	}
	delete(m.st.VMs.Objects, r.V.ID)
	return m.changedLocked(vmm.EventDeleted, r.V)
}

func (m *VMM) setLocked(r *record[vmm.CreateRequest, vmm.VM], s vmm.State, reason string) (vmm.VM, error) {
	if r.V.State == s {
		return r.V, nil
	}
	was := r.V.State.Live()
	r.V.State, r.V.Reason, r.V.Since = s, reason, time.Now().UTC()
	r.V.Desired = vmm.StateStopped
	switch {
	case s.Live() && !was:
		r.V.PID, r.V.StartedAt, r.V.Pending = uint32(os.Getpid()), r.V.Since, false
		m.consoles[r.V.ID] = newConsole()
	case !s.Live() && was:
		r.V.PID, r.V.StartedAt = 0, time.Time{}
		close(m.consoles[r.V.ID].ended)
		delete(m.consoles, r.V.ID)
	}
	if s.Live() {
		r.V.Desired = vmm.StateRunning
	}
	return r.V, m.changedLocked(vmm.EventChanged, r.V)
}

// Start implements vmm.Service.
func (m *VMM) Start(_ context.Context, req vmm.StartRequest) (vmm.VM, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.st.VMs.find(req.ID)
	if err != nil {
		return vmm.VM{}, err
	}
	if r.V.State.Live() {
		return r.V, nil
	}
	if len(req.Disks) != len(r.V.Spec.Disks) || len(req.NICs) != len(r.V.Spec.NICs) {
		return vmm.VM{}, errs.Field("disks", "attach what the definition lists", "%d disks and %d NICs for a definition of %d and %d",
			len(req.Disks), len(req.NICs), len(r.V.Spec.Disks), len(r.V.Spec.NICs))
	}
	for _, n := range req.NICs {
		for _, f := range n.TAP {
			if _, err := f.Stat(); err != nil {
				return vmm.VM{}, errs.Wrap(errs.Invalid, err, "the TAP of NIC %s", n.NICID)
			}
		}
	}
	if req.Paused {
		return m.setLocked(r, vmm.StatePaused, "")
	}
	return m.setLocked(r, vmm.StateRunning, "")
}

func (m *VMM) to(ref string, s vmm.State, reason string, from ...vmm.State) (vmm.VM, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.st.VMs.find(ref)
	if err != nil {
		return vmm.VM{}, err
	}
	if r.V.State == s {
		return r.V, nil
	}
	for _, f := range from {
		if r.V.State == f {
			return m.setLocked(r, s, reason)
		}
	}
	return vmm.VM{}, errs.New(errs.Precondition, "the VM is %s", r.V.State).Because("VM_STATE").With(errs.Resource{Type: "vm", ID: r.V.ID, Name: r.V.Spec.Name})
}

// Stop implements vmm.Service.
func (m *VMM) Stop(_ context.Context, req vmm.StopRequest) (vmm.VM, error) {
	return m.to(req.Ref, vmm.StateStopped, "stopped on request", vmm.StateRunning, vmm.StatePaused)
}

// Kill implements vmm.Service.
func (m *VMM) Kill(_ context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.to(req.Ref, vmm.StateStopped, "killed on request", vmm.StateRunning, vmm.StatePaused, vmm.StateFailed)
}

// Pause implements vmm.Service.
func (m *VMM) Pause(_ context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.to(req.Ref, vmm.StatePaused, "", vmm.StateRunning)
}

// Resume implements vmm.Service.
func (m *VMM) Resume(_ context.Context, req vmm.Ref) (vmm.VM, error) {
	return m.to(req.Ref, vmm.StateRunning, "", vmm.StatePaused)
}

// Reboot implements vmm.Service.
func (m *VMM) Reboot(_ context.Context, req vmm.RebootRequest) (vmm.VM, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, err := m.st.VMs.find(req.Ref)
	if err != nil {
		return vmm.VM{}, err
	}
	if r.V.State != vmm.StateRunning {
		return vmm.VM{}, errs.New(errs.Precondition, "the VM is %s", r.V.State).Because("VM_STATE")
	}
	return r.V, m.changedLocked(vmm.EventRebooted, r.V)
}

// PowerOff makes the guest of a VM power itself off, for tests of who notices.
func (m *VMM) PowerOff(ref string) error {
	_, err := m.to(ref, vmm.StateStopped, "guest powered off", vmm.StateRunning)
	return err
}

// Console implements vmm.Service.
func (m *VMM) Console(ctx context.Context, req vmm.ConsoleRequest, cio vmm.ConsoleIO) error {
	m.mu.Lock()
	r, err := m.st.VMs.find(req.Ref)
	if err != nil {
		m.mu.Unlock()
		return err
	}
	c := m.consoles[r.V.ID]
	if c == nil {
		m.mu.Unlock()
		if req.NoFollow {
			return io.EOF
		}
		return errs.New(errs.Precondition, "the VM is %s", r.V.State).Because("VM_STATE").Do("start it first")
	}
	c.session++
	me := c.session
	if !req.ReadOnly && !req.NoFollow {
		if c.writer != 0 && !req.Steal {
			m.mu.Unlock()
			return errs.New(errs.Conflict, "another session writes to this console").Because("CONSOLE_IN_USE").Do("watch only, or take its place")
		}
		c.writer = me
	}
	out := make(chan []byte, 64)
	replay := c.history[len(c.history)-min(len(c.history), int(req.Replay)):]
	replay = append([]byte(nil), replay...)
	c.viewers[out] = true
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(c.viewers, out)
		if c.writer == me {
			c.writer = 0
		}
	}()
	if len(replay) > 0 {
		if err := cio.Out(replay); err != nil {
			return err
		}
	}
	if req.NoFollow {
		return io.EOF
	}
	in := cio.In
	if req.ReadOnly {
		in = nil
	}
	for {
		select {
		case b, ok := <-in:
			if !ok {
				in = nil
				continue
			}
			m.typed(c, me, b)
		case b := <-out:
			if err := cio.Out(b); err != nil {
				return err
			}
		case <-c.ended:
			return io.EOF
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// typed echoes what a session wrote, if it is the writer.
func (m *VMM) typed(c *fakeConsole, session int, b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.writer != session {
		return
	}
	echo := append([]byte(nil), b...)
	c.history = append(c.history, echo...)
	for v := range c.viewers {
		select {
		case v <- echo:
		default: // a viewer that does not read loses output, never the guest
		}
	}
}

// Watch implements vmm.Service.
func (m *VMM) Watch(ctx context.Context, fn func(vmm.Event) error) error {
	ch := make(chan vmm.Event, 1024)
	m.mu.Lock()
	now := m.st.VMs.list()
	m.watchers[ch] = true
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.watchers, ch)
	}()
	at := time.Now().UTC()
	for _, v := range now {
		if err := fn(vmm.Event{Type: vmm.EventSnapshot, Time: at, VM: v}); err != nil {
			return err
		}
	}
	if err := fn(vmm.Event{Type: vmm.EventSnapshotEnd, Time: at}); err != nil {
		return err
	}
	for {
		select {
		case ev := <-ch:
			if err := fn(ev); err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("watch: %w", ctx.Err())
		}
	}
}
