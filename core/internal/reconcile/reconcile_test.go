package reconcile

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/core/internal/bus"
	"github.com/mvirt/mvirt/core/internal/fake"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	lan = "01900000-0000-7000-8000-000000000002"
	web = "01900000-0000-7000-8000-000000000003"
)

var user = plan.Call{Who: operation.Who{Name: "tester", UID: 1000}}

// lab is a reconciler in a fake world.
type lab struct {
	t       *testing.T
	w       *fake.World
	r       *Reconciler
	changes *plan.Changes
	engine  *operation.Engine
	health  *health.Tracker
	dir     string

	mu     sync.Mutex
	down   map[service.Kind]bool
	audits []log.Entry
	events []bus.Event
}

func newLab(t *testing.T) *lab {
	l := &lab{t: t, w: fake.New(), dir: t.TempDir(), health: &health.Tracker{}, down: map[service.Kind]bool{}}
	svc := plan.Services{Storage: l.w.Storage(), Net: l.w.Net(), VMM: l.w.VMM(), Has: l.w.Has}
	e, err := operation.Open(operation.Options{Path: filepath.Join(l.dir, "operations.db"), Actions: plan.Actions(svc), Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close(context.Background()) })
	l.engine, l.changes = e, plan.New(svc, e)
	l.reopen("boot-1")
	ctx := t.Context()
	l.must(l.changes.CreateNetwork(ctx, user, net.CreateNetworkRequest{ID: lan, Name: "lan", Mode: net.ModeNAT}))
	return l
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// reopen makes a new reconciler, as a start of the core in the given boot of the host does.
func (l *lab) reopen(boot string) {
	svc := plan.Services{Storage: l.w.Storage(), Net: l.w.Net(), VMM: l.w.VMM(), Has: l.w.Has}
	l.r = New(Options{Services: svc, Changes: l.changes, Engine: l.engine, Health: l.health, StateDir: l.dir, BootID: boot, Log: quiet,
		Audit: func(_ context.Context, e log.Entry) error {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.audits = append(l.audits, e)
			return nil
		},
		Publish: func(e bus.Event) { l.mu.Lock(); defer l.mu.Unlock(); l.events = append(l.events, e) },
		Up:      func(k service.Kind) bool { l.mu.Lock(); defer l.mu.Unlock(); return !l.down[k] }})
}

func (l *lab) must(op operation.Operation, err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) create(name, id string, autostart, start bool) {
	l.t.Helper()
	l.must(l.changes.CreateVM(l.t.Context(), user, plan.CreateVM{ID: id, Spec: vmm.Spec{Name: name, CPUs: 1, MemoryBytes: 64 << 20, Autostart: autostart}, Start: start,
		Disks: []plan.NewDisk{{SizeBytes: 1 << 20}}, NICs: []plan.NewNIC{{NetworkID: lan}}}))
}

func (l *lab) pass() bool {
	l.t.Helper()
	clean, err := l.r.Pass(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	return clean
}

func (l *lab) nic(id string) net.NIC {
	l.t.Helper()
	n, err := l.w.Net().GetNIC(l.t.Context(), net.Ref{Ref: id})
	if err != nil {
		l.t.Fatal(err)
	}
	return n
}

func (l *lab) codes() (out []string) {
	for _, c := range l.health.List("") {
		out = append(out, c.Code)
		if c.Remedy == "" || c.Text == "" || c.Object == "" {
			l.t.Errorf("condition without remedy, text or object: %+v", c)
		}
	}
	slices.Sort(out)
	return out
}

func TestReleasesWhatIsLeft(t *testing.T) {
	l := newLab(t)
	l.create("web", web, false, true)
	if !l.pass() || len(l.codes()) > 0 || !strings.Contains(l.w.String(), "volume web-root attached to web") {
		t.Fatalf("a healthy VM is disturbed:\n%s\n%v", l.w, l.codes())
	}
	l.w.PowerOff("web")
	if !l.pass() || strings.Contains(l.w.String(), "attached") {
		t.Fatalf("still attached:\n%s", l.w)
	}
	op := l.engine.List(true)
	if last := op[len(op)-1]; last.Type != "vm.release" || !last.Who.Core || !slices.Contains(last.Objects, web) {
		t.Errorf("%+v", last)
	}
	n := len(op)
	if l.pass(); len(l.engine.List(true)) != n {
		t.Error("released again")
	}
}

func TestAttachesAgain(t *testing.T) {
	l := newLab(t)
	l.create("web", web, false, true)
	l.w.DropAttachments()
	if !l.pass() || !strings.Contains(l.w.String(), "volume web-root attached to web") {
		t.Fatalf("not attached again:\n%s", l.w)
	}
	if len(l.audits) != 1 || !strings.Contains(l.audits[0].Message, "attached again") {
		t.Errorf("%+v", l.audits)
	}
}

func TestReports(t *testing.T) {
	ctx := context.Background()
	l := newLab(t)
	l.create("web", web, false, true)
	vm, _ := l.w.VMM().Get(ctx, vmm.Ref{Ref: web})
	nic := vm.Spec.NICs[0].NICID
	l.w.Net().Detach(ctx, net.DetachRequest{NICID: nic, VMID: web})
	l.pass()
	if got, n := l.codes(), l.nic(nic); len(got) > 0 || n.VMID != web {
		t.Errorf("a lost data path is not made again: %v, %+v", got, n)
	}
	// One that cannot be made again is reported, and not tried at each pass.
	l.w.Net().Detach(ctx, net.DetachRequest{NICID: nic, VMID: web})
	tries := 0
	l.w.Gate = func(_ context.Context, call string, after bool) error {
		if call == "net.Attach" && !after {
			tries++
			return errs.New(errs.Precondition, "the guest has no slot free")
		}
		return nil
	}
	for range 3 {
		l.w.Net().Detach(ctx, net.DetachRequest{NICID: nic, VMID: web})
		l.pass()
		if got := l.codes(); !slices.Equal(got, []string{"NIC_NOT_ATTACHED"}) {
			t.Errorf("%v", got)
		}
	}
	if tries != 1 {
		t.Errorf("tried %d times", tries)
	}
	l.w.Gate = nil
	l.w.PowerOff("web")
	l.pass()
	l.w.Net().DeleteNIC(ctx, net.Ref{Ref: nic})
	l.w.Storage().DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "web-root"})
	l.w.Storage().CreateVolume(ctx, storage.CreateVolumeRequest{ID: "01900000-0000-7000-8000-0000000000aa", Name: "lost", SizeBytes: 512,
		Labels: map[string]string{plan.OwnerLabel: "01900000-0000-7000-8000-0000000000bb"}})
	l.pass()
	if got := l.codes(); !slices.Equal(got, []string{"NIC_MISSING", "VOLUME_MISSING", "VOLUME_ORPHANED"}) {
		t.Errorf("%v", got)
	}
	l.w.Storage().DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "lost"})
	l.w.VMM().Delete(ctx, vmm.Ref{Ref: web})
	l.pass()
	if got := l.codes(); len(got) > 0 {
		t.Errorf("conditions stay: %v", got)
	}
}

func TestStartsAfterBoot(t *testing.T) {
	l := newLab(t)
	l.create("auto", web, true, false)
	l.create("manual", "01900000-0000-7000-8000-000000000004", false, false)
	state := func() string {
		var out []string
		for _, line := range strings.Split(l.w.String(), "\n") {
			if strings.HasPrefix(line, "vm ") {
				out = append(out, strings.Join(strings.Fields(line)[1:3], "="))
			}
		}
		return strings.Join(out, " ")
	}
	l.mu.Lock()
	l.down[service.KindNet] = true // not all plugins are up yet
	l.mu.Unlock()
	l.pass()
	if got := state(); got != "auto=stopped manual=stopped" {
		t.Fatalf("without net: %s", got)
	}
	l.mu.Lock()
	l.down[service.KindNet] = false
	l.mu.Unlock()
	l.pass()
	if got := state(); got != "auto=running manual=stopped" {
		t.Fatalf("after the boot: %s", got)
	}
	l.must(l.changes.StopVM(t.Context(), user, web, 0, false))
	l.pass()
	l.reopen("boot-1") // the core starts anew, the host does not
	l.pass()
	if got := state(); got != "auto=stopped manual=stopped" {
		t.Fatalf("the same boot: %s", got)
	}
	l.reopen("boot-2")
	l.w.Gate = func(_ context.Context, call string, after bool) error {
		if call == "vmm.Start" && !after {
			return errs.New(errs.Exhausted, "no memory").Do("buy some")
		}
		return nil
	}
	l.pass()
	if got := l.codes(); !slices.Equal(got, []string{"AUTOSTART_FAILED"}) {
		t.Errorf("%v", got)
	}
	if raw, _ := os.ReadFile(filepath.Join(l.dir, "boot-id")); strings.TrimSpace(string(raw)) != "boot-2" {
		t.Errorf("boot id %q", raw)
	}
}

func TestWatch(t *testing.T) {
	l := newLab(t)
	l.create("web", web, false, true)
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan bool, 100)
	l.r.opt.Seen = func(context.Context, vmm.VM) { seen <- true }
	var wg sync.WaitGroup
	wg.Go(func() { l.r.PluginUp(ctx, service.KindVMM) })
	wg.Go(func() { l.r.Run(ctx) })
	<-seen
	l.w.VMM().Reboot(ctx, vmm.RebootRequest{Ref: web})
	until(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.audits) == 1 })
	l.w.PowerOff("web")
	until(t, func() bool { return !strings.Contains(l.w.String(), "attached") })
	cancel()
	wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.audits) != 2 || l.audits[0].Message != "VM web rebooted" || l.audits[1].Message != "VM web is stopped: guest powered off" {
		t.Errorf("%+v", l.audits)
	}
	types := map[string]bool{}
	for _, e := range l.events {
		types[e.Type] = true
	}
	if !types["vm.rebooted"] || !types["vm.state"] {
		t.Errorf("%v", types)
	}
}

// until waits for what other goroutines do; the deadline is only for a test that fails.
func until(t *testing.T, fn func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	end := time.After(10 * time.Second)
	for !fn() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("it does not happen")
		}
	}
}
