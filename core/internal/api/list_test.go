package api

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func (c *core) list() map[string]*apiv1.VM {
	c.t.Helper()
	l, err := c.vms.List(c.ctx(), &apiv1.ListVMsRequest{})
	c.ok(err)
	out := map[string]*apiv1.VM{}
	last := ""
	for _, vm := range l.GetVms() {
		if vm.GetName() <= last {
			c.t.Errorf("%s stands behind %s", vm.GetName(), last)
		}
		last = vm.GetName()
		out[vm.GetName()] = vm
	}
	return out
}

// TestListShowsOwnChanges lists right after each change, while the watch may lag behind.
func TestListShowsOwnChanges(t *testing.T) {
	c := newCore(t)
	c.furnish()
	for i := range 20 {
		name := fmt.Sprintf("vm%02d", i)
		c.createVM(name, true)
		vm := c.list()[name]
		if vm.GetState() != "running" || vm.GetDisks()[0].GetVolumeName() != name+"-root" || vm.GetNics()[0].GetIpv4() == "" {
			t.Fatalf("after create: %v", vm)
		}
		_, err := c.vms.Pause(c.ctx(), &apiv1.RefRequest{Ref: name})
		c.ok(err)
		if s := c.list()[name].GetState(); s != "paused" {
			t.Fatalf("after pause: %s", s)
		}
		_, err = c.volumes.Rename(c.ctx(), &apiv1.RenameRequest{Ref: name + "-root", Name: name + "-new"})
		c.ok(err)
		if n := c.list()[name].GetDisks()[0].GetVolumeName(); n != name+"-new" {
			t.Fatalf("after rename: %s", n)
		}
		if i%2 == 0 {
			_, err = c.vms.Delete(c.ctx(), &apiv1.DeleteRequest{Ref: name, Force: true})
			c.ok(err)
			if vm := c.list()[name]; vm != nil {
				t.Fatalf("after delete: %v", vm)
			}
		}
	}
}

// TestListNeedsNoCall sees that a list whose VMs have not changed asks no plugin, and one after a restart of
// the vmm plugin asks it.
func TestListNeedsNoCall(t *testing.T) {
	c := newCore(t)
	c.furnish()
	c.createVM("web", false)
	for c.list(); ; {
		c.sup.w.Calls()
		c.list()
		if calls := c.sup.w.Calls(); len(calls) == 0 {
			break // the first ones may come before the watch has begun
		}
		if t.Context().Err() != nil {
			t.Fatal("each list asks")
		}
	}
	c.srv.mirror.reset()
	c.sup.w.Calls()
	if c.list()["web"] == nil || !strings.Contains(strings.Join(c.sup.w.Calls(), " "), "vmm.List") {
		t.Error("an invalid mirror is used")
	}
}

// answers is a vmm plugin that gives these VMs, or this error.
type answers struct {
	vms         []vmm.VM
	err         error
	gets, lists int
}

func (a *answers) Get(_ context.Context, r vmm.Ref) (vmm.VM, error) {
	a.gets++
	for _, vm := range a.vms {
		if vm.ID == r.Ref {
			return vm, a.err
		}
	}
	return vmm.VM{}, cmp.Or(a.err, error(errs.New(errs.NotFound, "no")))
}

func (a *answers) List(context.Context) ([]vmm.VM, error) {
	a.lists++
	return a.vms, a.err
}

// TestMirrorSettlesMany marks more VMs than are asked for one by one: one question settles them for good.
func TestMirrorSettlesMany(t *testing.T) {
	m := &mirror{}
	m.reset()
	m.event(vmm.Event{Type: vmm.EventSnapshot, VM: vmm.VM{ID: "gone", Spec: vmm.Spec{Name: "gone"}}})
	m.event(vmm.Event{Type: vmm.EventSnapshotEnd})
	a := &answers{}
	marked := []string{"gone", "not a VM"}
	for i := range 3 * maxAsk {
		vm := vmm.VM{ID: fmt.Sprint(i), Spec: vmm.Spec{Name: fmt.Sprintf("vm%03d", i)}}
		a.vms = append(a.vms, vm)
		marked = append(marked, vm.ID)
	}
	m.mark(marked)
	a.err = errs.New(errs.Unavailable, "away")
	if m.settle(t.Context(), a) {
		t.Fatal("settled without an answer")
	}
	a.err = nil
	for range 3 {
		if !m.settle(t.Context(), a) {
			t.Fatal("not settled")
		}
	}
	if l, ok := m.list(names{}); !ok || len(l) != 3*maxAsk || l[0].GetName() != "vm000" {
		t.Errorf("%d VMs, known %v", len(l), ok)
	}
	if a.gets != 0 || a.lists != 2 {
		t.Errorf("%d gets and %d lists, want none and 2", a.gets, a.lists)
	}
}

func TestMirrorPrefersTheNewer(t *testing.T) {
	m := &mirror{}
	m.reset()
	at := time.Now()
	vm := func(gen uint64, since time.Duration, s vmm.State) vmm.VM {
		return vmm.VM{ID: "1", Generation: gen, Since: at.Add(since), State: s, Spec: vmm.Spec{Name: "web"}}
	}
	m.event(vmm.Event{Type: vmm.EventSnapshot, VM: vm(1, 0, vmm.StateStopped)})
	m.event(vmm.Event{Type: vmm.EventSnapshotEnd})
	m.mark([]string{"1", "not a VM"})
	get := &answers{vms: []vmm.VM{vm(1, 2*time.Second, vmm.StateRunning)}}
	if !m.settle(t.Context(), get) {
		t.Fatal("not settled")
	}
	m.event(vmm.Event{Type: vmm.EventChanged, VM: vm(1, time.Second, vmm.StateStarting)}) // overtaken
	state := func() string { l, _ := m.list(names{}); return l[0].GetState() }
	if s := state(); s != "running" {
		t.Errorf("an overtaken event counts: %s", s)
	}
	m.event(vmm.Event{Type: vmm.EventChanged, VM: vm(1, 3*time.Second, vmm.StatePaused)})
	if s := state(); s != "paused" {
		t.Errorf("a newer event does not count: %s", s)
	}
	m.mark([]string{"1"})
	if m.settle(t.Context(), &answers{err: errs.New(errs.Unavailable, "away")}) {
		t.Error("settled without an answer")
	}
	if m.event(vmm.Event{Type: vmm.EventLagged}); m.settle(t.Context(), get) {
		t.Error("valid after a gap")
	}
}

// BenchmarkMirror1000 is the core's own share of a list of 1,000 VMs.
func BenchmarkMirror1000(b *testing.B) {
	m := &mirror{}
	m.reset()
	look := names{version: 1}
	for i := range 1000 {
		m.event(vmm.Event{Type: vmm.EventSnapshot, VM: vmm.VM{ID: fmt.Sprintf("01900000-0000-7000-8000-%012d", i), Spec: vmm.Spec{Name: fmt.Sprintf("vm%d", i), CPUs: 1,
			Disks: []vmm.Disk{{Name: "root", VolumeID: "v"}}, NICs: []vmm.NIC{{NICID: "n"}}}}})
	}
	m.event(vmm.Event{Type: vmm.EventSnapshotEnd})
	for b.Loop() {
		if l, ok := m.list(look); !ok || len(l) != 1000 {
			b.Fatal(len(l))
		}
	}
}

// TestConflictAndKill starts a VM whose start hangs: a second change conflicts and names it, kill takes over.
func TestConflictAndKill(t *testing.T) {
	c := newCore(t)
	c.furnish()
	c.createVM("web", false)
	gate, hang := c.sup.w.Gate, make(chan struct{})
	var once sync.Once
	began := make(chan struct{})
	c.sup.w.Gate = func(ctx context.Context, call string, after bool) error {
		if call == "vmm.Start" && !after {
			select {
			case <-hang:
			default:
				once.Do(func() { close(began) })
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-hang:
				}
			}
		}
		return gate(ctx, call, after)
	}
	done := make(chan error, 1)
	go func() {
		_, err := c.vms.Start(context.WithoutCancel(c.ctx()), &apiv1.StartVMRequest{Ref: "web"})
		done <- err
	}()
	<-began
	_, err := c.vms.Update(c.ctx(), &apiv1.UpdateVMRequest{Ref: "web", Autostart: ptr(true)})
	ops, lerr := c.ops.List(c.ctx(), &apiv1.ListOperationsRequest{})
	c.ok(lerr)
	if len(ops.GetOperations()) != 1 || errs.KindOf(err) != errs.Conflict || !strings.Contains(err.Error(), ops.GetOperations()[0].GetId()) {
		t.Fatalf("update while starting: %v; operations %v", err, ops)
	}
	if vm, err := c.vms.Get(c.ctx(), &apiv1.RefRequest{Ref: "web"}); err != nil || vm.GetOperation() != ops.GetOperations()[0].GetId() {
		t.Errorf("show does not name the operation: %v %v", vm.GetOperation(), err)
	}
	_, err = c.vms.Kill(c.ctx(), &apiv1.RefRequest{Ref: "web"})
	c.ok(err)
	if err := <-done; errs.KindOf(err) != errs.Canceled || !strings.Contains(err.Error(), "kill VM web") {
		t.Errorf("the start that was taken over: %v", err)
	}
	if strings.Contains(c.sup.w.String(), "attached") {
		t.Errorf("left:\n%s", c.sup.w)
	}
	close(hang)
	_, err = c.vms.Start(c.ctx(), &apiv1.StartVMRequest{Ref: "web"})
	c.ok(err)
}

func ptr[T any](v T) *T { return &v }

// TestHost sees that what plugins say is stamped with who said it.
func TestHost(t *testing.T) {
	c := newCore(t)
	h := c.srv.HostFor(service.KindStorage)
	id := "01900000-0000-7000-8000-000000000099"
	for range 2 {
		c.ok(h.Audit(c.ctx(), service.AuditRecord{ID: id, Message: "template swept", Objects: []string{"x"}, Labels: map[string]string{"who": "root"}}))
	}
	if err := h.Audit(c.ctx(), service.AuditRecord{ID: "no id", Message: "m"}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("%v", err)
	}
	c.ok(c.srv.audit.Flush(c.ctx()))
	n := 0
	for _, e := range c.sup.w.Entries() {
		if e.Message == "template swept" {
			n++
			if e.Component != "fake-storage" || e.Labels["who"] != "plugin storage" {
				t.Errorf("%+v", e)
			}
		}
	}
	if n != 1 {
		t.Errorf("%d entries", n)
	}
}

func TestPanicInAHandler(t *testing.T) {
	c := newCore(t)
	gate := c.sup.w.Gate
	c.sup.w.Gate = func(ctx context.Context, call string, after bool) error {
		if call == "net.ListNetworks" {
			panic("boom")
		}
		return gate(ctx, call, after)
	}
	_, err := c.networks.List(c.ctx(), &apiv1.ListNetworksRequest{})
	if errs.KindOf(err) != errs.Internal || strings.Contains(err.Error(), "boom") {
		t.Errorf("%v", err)
	}
	c.list()
}

// TestImportedIsUsable uses a template at the moment when its import is told to be done: the import's own operation
// must not stand in the way.
func TestImportedIsUsable(t *testing.T) {
	c := newCore(t)
	for i := range 30 {
		name := fmt.Sprintf("img%d", i)
		s, err := c.templates.Import(c.ctx(), &apiv1.ImportTemplateRequest{Name: name, Url: "https://example.org/x.qcow2"})
		c.ok(err)
		first, err := s.Recv()
		c.ok(err)
		c.sup.w.EndImport(first.GetId(), storage.ImportDone, "")
		for m := first; m.GetState() != "done"; {
			m, err = s.Recv()
			c.ok(err)
		}
		_, err = c.volumes.Create(c.ctx(), &apiv1.CreateVolumeRequest{Name: "v-" + name, Template: name})
		c.ok(err)
	}
}
