package vmmkit

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

// The test's own binary is the fake hypervisor.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "fake-hypervisor" {
		select {}
	}
	os.Exit(m.Run())
}

// fakeDriver is a hypervisor of which each answer can be made to fail or to hang.
type fakeDriver struct {
	mu        sync.Mutex
	binary    string
	connect   func(ctx context.Context) error // before an instance is given
	pause     func(ctx context.Context) error
	instances map[string]*fakeInstance // the newest, by VM
}

func (d *fakeDriver) Check(vmm.Spec) error            { return nil }
func (d *fakeDriver) Conditions() []service.Condition { return nil }

func (d *fakeDriver) set(fn func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fn()
}

func (d *fakeDriver) of(id string) *fakeInstance {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.instances[id]
}

func (d *fakeDriver) Prepare(_ context.Context, m Machine) (Launch, error) {
	return Launch{Command: proc.Command{Path: d.binary, Args: []string{"fake-hypervisor", m.Marker}}, Hypervisor: "fake 1"}, nil
}

func (d *fakeDriver) Connect(ctx context.Context, m Machine, fn func(Event)) (Instance, error) {
	d.mu.Lock()
	connect := d.connect
	d.mu.Unlock()
	if connect != nil {
		if err := connect(ctx); err != nil {
			return nil, err
		}
	}
	i := &fakeInstance{d: d, fn: fn, p: m.Process, paused: m.Paused}
	d.set(func() { d.instances[m.ID] = i })
	return i, nil
}

type fakeInstance struct {
	d  *fakeDriver
	fn func(Event)
	p  *proc.Process

	mu     sync.Mutex
	paused bool
	off    bool
	deaf   bool // to the power button
}

func (i *fakeInstance) Status(context.Context) (Status, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.off:
		return Status{State: GuestOff}, nil
	case i.paused:
		return Status{State: GuestPaused}, nil
	}
	return Status{State: GuestRunning}, nil
}

func (i *fakeInstance) Pause(ctx context.Context) error {
	i.d.mu.Lock()
	fn := i.d.pause
	i.d.mu.Unlock()
	if fn != nil {
		return fn(ctx)
	}
	i.mu.Lock()
	i.paused = true
	i.mu.Unlock()
	return nil
}

func (i *fakeInstance) Resume(context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.paused = false
	return nil
}

func (i *fakeInstance) PowerButton(context.Context) error {
	i.mu.Lock()
	deaf := i.deaf
	i.off = !deaf
	i.mu.Unlock()
	if !deaf {
		i.fn(Event{Kind: EventOff})
	}
	return nil
}

func (i *fakeInstance) Reset(context.Context) error {
	i.mu.Lock()
	i.off, i.paused = false, false
	i.mu.Unlock()
	i.fn(Event{Kind: EventReset})
	return nil
}

func (i *fakeInstance) Quit(context.Context) error { return i.p.Signal(9) }

func (i *fakeInstance) Dial(context.Context) (Port, error)                     { return nil, errors.New("no port") }
func (i *fakeInstance) Close() error                                           { return nil }
func (i *fakeInstance) PlugDisk(context.Context, vmm.DiskAttachment) error     { return nil }
func (i *fakeInstance) UnplugDisk(context.Context, string) error               { return nil }
func (i *fakeInstance) PlugNIC(context.Context, vmm.NICAttachment) error       { return nil }
func (i *fakeInstance) UnplugNIC(context.Context, string) error                { return nil }
func (i *fakeInstance) DiskResized(context.Context, string, uint64) error      { return nil }
func (i *fakeInstance) Counters(context.Context) ([]vmm.DeviceCounters, error) { return nil, nil }

type quietHost struct{}

func (quietHost) Audit(context.Context, service.AuditRecord) error { return nil }
func (quietHost) Publish(context.Context, service.Event) error     { return nil }

type rig struct {
	t   *testing.T
	dir string
	d   *fakeDriver
	m   *Manager
}

func newRig(t *testing.T) *rig {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: t.TempDir(), d: &fakeDriver{binary: self, instances: map[string]*fakeInstance{}}}
	r.open()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		vms, _ := r.m.List(ctx)
		for _, vm := range vms {
			if !vm.State.Live() {
				continue
			}
			if _, err := r.m.Kill(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
				t.Error(err)
			}
		}
		r.close()
	})
	return r
}

func (r *rig) open() {
	r.t.Helper()
	m, err := Open(r.t.Context(), Options{DataDir: r.dir, Driver: r.d, Log: hclog.NewNullLogger(), Host: quietHost{}, Memory: 64 << 30})
	if err != nil {
		r.t.Fatal(err)
	}
	r.m = m
}

func (r *rig) close() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := r.m.Shutdown(ctx); err != nil {
		r.t.Errorf("shutdown: %v", err)
	}
}

func spec(name string) vmm.Spec { return vmm.Spec{Name: name, CPUs: 1, MemoryBytes: 64 << 20} }

func (r *rig) create(name string) vmm.VM {
	r.t.Helper()
	vm, err := r.m.Create(r.t.Context(), vmm.CreateRequest{ID: ident.New(), Spec: spec(name)})
	if err != nil {
		r.t.Fatal(err)
	}
	return vm
}

func (r *rig) start(id string) vmm.VM {
	r.t.Helper()
	vm, err := r.m.Start(r.t.Context(), vmm.StartRequest{ID: id})
	if err != nil {
		r.t.Fatal(err)
	}
	return vm
}

func (r *rig) await(id string, s vmm.State) vmm.VM {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	var got vmm.VM
	found := errors.New("found")
	if err := r.m.Watch(ctx, func(e vmm.Event) error {
		if e.VM.ID == id && e.VM.State == s {
			got = e.VM
			return found
		}
		return nil
	}); !errors.Is(err, found) {
		now, _ := r.m.Get(ctx, vmm.Ref{Ref: id})
		r.t.Fatalf("never %s: %v; it is %+v", s, err, now)
	}
	return got
}

func kernelFile(t *testing.T, seed byte) *os.File {
	t.Helper()
	b := make([]byte, 4096)
	copy(b[0x202:], "HdrS")
	b[4000] = seed
	p := filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func wantErr(t *testing.T, what string, err error, kind errs.Kind, field string) {
	t.Helper()
	var e *errs.Error
	if !errors.As(err, &e) || !errors.Is(err, kind) || e.Field != field || errs.RemedyOf(err) == "" {
		t.Errorf("%s: %v (kind %v, remedy %q), want %v of field %q with a remedy", what, err, errs.KindOf(err), errs.RemedyOf(err), kind, field)
	}
}
