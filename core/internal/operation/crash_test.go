package operation_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/core/internal/fake"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// lab is a core without API: a world, a journal, an engine, and somebody who pulls the plug.
type lab struct {
	t       *testing.T
	w       *fake.World
	path    string
	engine  *operation.Engine
	changes *plan.Changes

	mu      sync.Mutex
	armed   bool
	n       int            // points passed
	at      int            // the point at which the power goes, -1: never
	dead    bool           //
	fail    map[int]error  // errors of single calls, by number
	calls   int            // changing calls passed
	after   bool           // fail after the effect
	names   []string       // of the points passed
	audited map[string]int // operations told to Ended, by id
}

var errDead = errs.New(errs.Unavailable, "the core is dead")

func newLab(t *testing.T) *lab {
	l := &lab{t: t, w: fake.New(), path: filepath.Join(t.TempDir(), "operations.db"), at: -1, audited: map[string]int{}}
	l.w.Gate = l.gate
	l.open()
	return l
}

func (l *lab) open() {
	svc := plan.Services{Storage: l.w.Storage(), Net: l.w.Net(), VMM: l.w.VMM(), Has: l.w.Has}
	e, err := operation.OpenWith(operation.Options{Path: l.path, Actions: plan.Actions(svc), Ended: l.ended,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Backoff: func(int) time.Duration { return time.Millisecond }},
		func(write string, after bool) error { return l.point(write, after) })
	if err != nil {
		l.t.Fatal(err)
	}
	l.engine, l.changes = e, plan.New(svc, e)
}

// point is a place where the power may go.
func (l *lab) point(name string, after bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return errDead
	}
	if !l.armed {
		return nil
	}
	l.names = append(l.names, fmt.Sprintf("%s after=%t", name, after))
	if l.n == l.at {
		l.dead = true
		return errDead
	}
	l.n++
	return nil
}

func reads(call string) bool {
	return strings.Contains(call, ".Get") || strings.Contains(call, ".List")
}

func (l *lab) gate(_ context.Context, call string, after bool) error {
	if reads(call) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.dead {
			return errDead
		}
		return nil
	}
	l.mu.Lock()
	if l.armed && !l.dead && after == l.after {
		l.calls++
		if err := l.fail[l.calls]; err != nil {
			l.mu.Unlock()
			return err
		}
	}
	l.mu.Unlock()
	return l.point(call, after)
}

func (l *lab) ended(_ context.Context, op operation.Operation) error {
	if err := l.point("audit "+string(op.State), false); err != nil {
		return err
	}
	l.mu.Lock()
	l.audited[op.ID]++
	l.mu.Unlock()
	return l.point("audit "+string(op.State), true)
}

// restart gives the power back.
func (l *lab) restart() {
	l.t.Helper()
	l.engine.Close(expired())
	l.mu.Lock()
	l.dead, l.armed = false, false
	l.mu.Unlock()
	l.open()
	if _, err := l.engine.Recover(context.Background()); err != nil {
		l.t.Fatal(err)
	}
	l.settle()
}

// settle waits until no operation runs.
func (l *lab) settle() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, op := range l.engine.List(false) {
		if err := l.engine.Watch(ctx, op.ID, func(operation.Operation) error { return nil }); err != nil {
			l.t.Fatalf("operation %s does not end: %v", op.Title, err)
		}
		l.engine.Kick()
	}
	for len(l.engine.List(false)) > 0 && ctx.Err() == nil { // the last locks go just after the end is told
		time.Sleep(time.Millisecond)
	}
}

func (l *lab) close() {
	if err := l.engine.Close(expired()); err != nil && !l.dead {
		l.t.Error(err)
	}
}

func expired() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

const (
	template = "01900000-0000-7000-8000-000000000001"
	lan      = "01900000-0000-7000-8000-000000000002"
	web      = "01900000-0000-7000-8000-000000000003"
	spare    = "01900000-0000-7000-8000-000000000004"
	snapOld  = "01900000-0000-7000-8000-000000000005"
	snapNew  = "01900000-0000-7000-8000-000000000006"
	other    = "01900000-0000-7000-8000-000000000007"
	loose    = "01900000-0000-7000-8000-000000000008"
)

var call = plan.Call{Who: operation.Who{Name: "tester", UID: 1000, PID: 1}}

func kernel(t *testing.T) *os.File {
	path := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(path, []byte("bzImage"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (l *lab) createWeb(start bool) (operation.Operation, error) {
	return l.changes.CreateVM(context.Background(), call, plan.CreateVM{ID: web, Spec: vmm.Spec{Name: "web", CPUs: 1, MemoryBytes: 64 << 20}, Start: start,
		Kernel: kernel(l.t), Disks: []plan.NewDisk{{TemplateID: template}, {SizeBytes: 1 << 20}, {VolumeID: spare, Name: "data"}}, NICs: []plan.NewNIC{{NetworkID: lan}, {NetworkID: lan}}})
}

// must makes what a scenario begins with.
func (l *lab) must(op operation.Operation, err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// furnish makes a template, a network, two volumes with snapshots and a NIC.
func (l *lab) furnish() {
	ctx := context.Background()
	l.w.AddTemplate(template, "debian", 1<<20)
	l.must(l.changes.CreateNetwork(ctx, call, net.CreateNetworkRequest{ID: lan, Name: "lan", Mode: net.ModeNAT}))
	l.must(l.changes.CreateVolume(ctx, call, storage.CreateVolumeRequest{ID: spare, Name: "spare", SizeBytes: 1 << 20}))
	l.must(l.changes.CreateVolume(ctx, call, storage.CreateVolumeRequest{ID: other, Name: "other", SizeBytes: 1 << 20}))
	l.must(l.changes.CreateNIC(ctx, call, net.CreateNICRequest{ID: loose, Name: "loose", NetworkID: lan}))
	v := storage.Volume{ID: spare, Name: "spare"}
	l.must(l.changes.CreateSnapshot(ctx, call, v, storage.CreateSnapshotRequest{ID: snapOld, VolumeID: spare, Name: "old"}))
	l.must(l.changes.CreateSnapshot(ctx, call, v, storage.CreateSnapshotRequest{ID: snapNew, VolumeID: spare, Name: "new"}))
}

// scenario is a change and what must be there before it.
type scenario struct {
	name   string
	setup  func(l *lab)
	change func(l *lab) (operation.Operation, error)
	same   bool // what there is afterwards is what was there before: a reboot, an exchange
}

func getVM(l *lab) vmm.VM {
	vm, err := l.w.VMM().Get(context.Background(), vmm.Ref{Ref: web})
	if err != nil {
		l.t.Fatal(err)
	}
	return vm
}

func stopped(l *lab) { l.must(l.createWeb(false)) }
func running(l *lab) { l.must(l.createWeb(true)) }

func scenarios() []scenario {
	ctx := context.Background()
	return append(moreScenarios(), []scenario{
		{name: "vm.create", change: func(l *lab) (operation.Operation, error) { return l.createWeb(false) }},
		{name: "vm.create and start", change: func(l *lab) (operation.Operation, error) { return l.createWeb(true) }},
		{name: "vm.start", setup: stopped, change: func(l *lab) (operation.Operation, error) { return l.changes.StartVM(ctx, call, web, false) }},
		{name: "vm.stop", setup: running, change: func(l *lab) (operation.Operation, error) { return l.changes.StopVM(ctx, call, web, 0, false) }},
		{name: "vm.kill", setup: running, change: func(l *lab) (operation.Operation, error) { return l.changes.KillVM(ctx, call, web) }},
		{name: "vm.release", setup: func(l *lab) { running(l); l.w.PowerOff("web") }, change: func(l *lab) (operation.Operation, error) {
			return l.changes.ReleaseVM(ctx, call, getVM(l), "guest powered off")
		}},
		{name: "vm.delete stopped", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVM(ctx, call, plan.DeleteVM{ID: web})
			return op, err
		}},
		{name: "vm.delete running", setup: running, change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVM(ctx, call, plan.DeleteVM{ID: web, Force: true})
			return op, err
		}},
		{name: "vm.delete recursive", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVM(ctx, call, plan.DeleteVM{ID: web, Recursive: true})
			return op, err
		}},
		{name: "attach new disk hot", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.AttachDisk(ctx, call, web, plan.NewDisk{SizeBytes: 1 << 20})
		}},
		{name: "attach volume hot", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.AttachDisk(ctx, call, web, plan.NewDisk{VolumeID: other})
		}},
		{name: "attach volume cold", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			return l.changes.AttachDisk(ctx, call, web, plan.NewDisk{VolumeID: other})
		}},
		{name: "detach volume hot", setup: running, change: func(l *lab) (operation.Operation, error) { return l.changes.DetachDisk(ctx, call, web, "data") }},
		{name: "detach volume cold", setup: stopped, change: func(l *lab) (operation.Operation, error) { return l.changes.DetachDisk(ctx, call, web, spare) }},
		{name: "attach new NIC hot", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.AttachNIC(ctx, call, web, plan.NewNIC{NetworkID: lan})
		}},
		{name: "attach NIC cold", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			return l.changes.AttachNIC(ctx, call, web, plan.NewNIC{NICID: loose})
		}},
		{name: "detach NIC hot", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.DetachNIC(ctx, call, web, getVM(l).Spec.NICs[0].NICID)
		}},
		{name: "volume.create", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateVolume(ctx, call, storage.CreateVolumeRequest{ID: ident.New(), Name: "fresh", SizeBytes: 512})
		}},
		{name: "volume.delete", change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVolume(ctx, call, spare, true, false)
			return op, err
		}},
		{name: "volume.rename", change: func(l *lab) (operation.Operation, error) {
			return l.changes.RenameVolume(ctx, call, storage.Volume{ID: spare, Name: "spare"}, "renamed")
		}},
		{name: "snapshot.create", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateSnapshot(ctx, call, storage.Volume{ID: spare, Name: "spare"}, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: spare, Name: "third"})
		}},
		{name: "snapshot.rollback", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.Rollback(ctx, call, storage.Snapshot{ID: snapOld, VolumeID: spare, VolumeName: "spare", Name: "old"}, true, false)
			return op, err
		}},
		{name: "snapshot.delete", change: func(l *lab) (operation.Operation, error) {
			return l.changes.DeleteSnapshot(ctx, call, storage.Snapshot{ID: snapOld, VolumeID: spare, VolumeName: "spare", Name: "old"})
		}},
		{name: "network.create", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateNetwork(ctx, call, net.CreateNetworkRequest{ID: ident.New(), Name: "dmz", Mode: net.ModePrivate})
		}},
		{name: "nic.create", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateNIC(ctx, call, net.CreateNICRequest{ID: ident.New(), Name: "extra", NetworkID: lan})
		}},
		{name: "template.create", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateTemplate(ctx, call, storage.Snapshot{ID: snapOld, VolumeID: spare}, storage.CreateTemplateRequest{ID: ident.New(), Name: "golden", SnapshotID: snapOld})
		}},
	}...)
}

func (s scenario) prepare(t *testing.T) (l *lab, before string) {
	l = newLab(t)
	l.furnish()
	if s.setup != nil {
		s.setup(l)
	}
	l.w.Calls()
	before = l.w.String()
	l.mu.Lock()
	l.armed, l.n, l.calls, l.names = true, 0, 0, nil
	l.mu.Unlock()
	return l, before
}

// TestCrash lets the power go at every point of every change: before and after each write of the journal,
// each effect on a plugin, and the audit. After the next start the change is done or undone, and audited.
func TestCrash(t *testing.T) {
	for _, s := range scenarios() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel() // most of the time is the disk's
			l, before := s.prepare(t)
			if _, err := s.change(l); err != nil {
				t.Fatalf("undisturbed: %v", err)
			}
			l.settle()
			after, points := l.w.String(), l.n
			l.close()
			if after == before && !s.same {
				t.Fatal("the change changes nothing")
			}
			if points < 5 {
				t.Fatalf("only %d points", points)
			}
			for k := range points {
				l, _ := s.prepare(t)
				l.at = k
				ctxDone := make(chan operation.Operation, 1)
				go func() { op, _ := s.change(l); ctxDone <- op }()
				op := <-ctxDone
				where := l.names[len(l.names)-1]
				l.restart()
				got := l.w.String()
				switch {
				case s.same && got == before: // done or not: nothing to be seen
				case got == before:
					if op.ID != "" {
						if o, err := l.engine.Get(op.ID); err != nil || o.State != operation.Failed {
							t.Errorf("point %d (%s): undone, but operation: %v %v", k, where, o.State, err)
						}
					}
				case got == after:
					o := l.newest()
					if o.State != operation.Done {
						t.Errorf("point %d (%s): done, but operation %s is %s: %v", k, where, o.Title, o.State, o.Err())
					}
				default:
					t.Errorf("point %d (%s): left between\n%s\n-- before:\n%s\n-- after:\n%s", k, where, got, before, after)
				}
				for _, o := range l.engine.List(true) {
					if l.audited[o.ID] == 0 {
						t.Errorf("point %d (%s): %s is not audited", k, where, o.Title)
					}
				}
				l.close()
			}
		})
	}
}

func (l *lab) newest() operation.Operation {
	all := l.engine.List(true)
	return all[len(all)-1]
}

// TestFailure lets each call of each change fail in turn, before its effect with a refusal and after it
// with a lost answer.
func TestFailure(t *testing.T) {
	kinds := []struct {
		name  string
		err   error
		after bool
	}{
		{"refused", errs.New(errs.Exhausted, "full"), false},
		{"broken", errs.New(errs.Internal, "bug"), true},
		{"lost", errs.New(errs.Unavailable, "gone"), true},
	}
	for _, s := range scenarios() {
		l, before := s.prepare(t)
		op, err := s.change(l)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		l.settle()
		after := l.w.String()
		l.mu.Lock()
		calls := 0
		for _, n := range l.names {
			if !strings.HasPrefix(n, "journal") && !strings.HasPrefix(n, "audit") && strings.HasSuffix(n, "after=false") {
				calls++
			}
		}
		l.mu.Unlock()
		l.close()
		for _, kind := range kinds {
			for k := 1; k <= calls; k++ {
				t.Run(fmt.Sprintf("%s/%s/%d", s.name, kind.name, k), func(t *testing.T) {
					l, _ := s.prepare(t)
					defer l.close()
					l.after, l.fail = kind.after, map[int]error{k: kind.err}
					_, err := s.change(l)
					l.settle()
					got, o := l.w.String(), l.newest()
					if op.Mode == operation.Undo {
						if err == nil || got != before {
							t.Fatalf("error %v, and left:\n%s\n-- before:\n%s", err, got, before)
						}
						if o.State != operation.Failed || len(o.Left) > 0 || !errors.Is(err, errs.KindOf(kind.err)) {
							t.Fatalf("operation %s, left %v, error %v", o.State, o.Left, err)
						}
						return
					}
					switch {
					case o.State == operation.Done:
						if got != after {
							t.Fatalf("done, but:\n%s\n-- after:\n%s", got, after)
						}
					case len(o.Left) == 0 && !kind.after && got != before:
						t.Fatalf("failed with nothing left to do, but:\n%s\n-- before:\n%s", got, before)
					case err == nil:
						t.Fatalf("operation %s, but no error", o.State)
					}
				})
			}
		}
	}
}
