package operation_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// TestRefusals are changes that are refused before anything is touched.
func TestRefusals(t *testing.T) {
	ctx := context.Background()
	cases := []struct {
		name   string
		setup  func(l *lab)
		change func(l *lab) (operation.Operation, error)
		kind   errs.Kind
		reason string
		says   string
	}{
		{"delete a running VM", running, func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVM(ctx, call, plan.DeleteVM{ID: web})
			return op, err
		}, errs.Precondition, "VM_RUNNING", "running"},
		{"delete a volume in use", stopped, func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVolume(ctx, call, spare, true, false)
			return op, err
		}, errs.Precondition, "VOLUME_IN_USE", "web"},
		{"delete a volume with snapshots", nil, func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVolume(ctx, call, spare, false, false)
			return op, err
		}, errs.Precondition, "HAS_SNAPSHOTS", "old, new"},
		{"delete a NIC in use", stopped, func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteNIC(ctx, call, getVM(l).Spec.NICs[0].NICID, false)
			return op, err
		}, errs.Precondition, "NIC_IN_USE", "web"},
		{"roll back under a running VM", running, func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.Rollback(ctx, call, storage.Snapshot{ID: snapOld, VolumeID: spare, VolumeName: "spare", Name: "old"}, true, false)
			return op, err
		}, errs.Precondition, "VM_RUNNING", "rollback"},
		{"roll back over newer snapshots", stopped, func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.Rollback(ctx, call, storage.Snapshot{ID: snapOld, VolumeID: spare, VolumeName: "spare", Name: "old"}, false, false)
			return op, err
		}, errs.Precondition, "NEWER_SNAPSHOTS", "spare@new"},
		{"shrink", nil, func(l *lab) (operation.Operation, error) {
			return l.changes.ResizeVolume(ctx, call, storage.Volume{ID: spare, Name: "spare", SizeBytes: 1 << 20}, 512)
		}, errs.Invalid, "", "shrink"},
		{"a volume of another VM", stopped, func(l *lab) (operation.Operation, error) {
			return l.changes.CreateVM(ctx, call, plan.CreateVM{ID: other, Spec: vmm.Spec{Name: "thief"}, Disks: []plan.NewDisk{{VolumeID: spare}}})
		}, errs.Precondition, "VOLUME_IN_USE", "web"},
		{"a volume twice", nil, func(l *lab) (operation.Operation, error) {
			return l.changes.CreateVM(ctx, call, plan.CreateVM{ID: web, Spec: vmm.Spec{Name: "web"}, Disks: []plan.NewDisk{{VolumeID: spare}, {VolumeID: spare}}})
		}, errs.Invalid, "", "twice"},
		{"hot-plug without the feature", func(l *lab) { running(l); l.w.Without(service.FeatureVMMHotplugDisk) }, func(l *lab) (operation.Operation, error) {
			return l.changes.AttachDisk(ctx, call, web, plan.NewDisk{SizeBytes: 512})
		}, errs.Unsupported, "FEATURE_MISSING", "cannot"},
		{"start of a paused VM", func(l *lab) { running(l); l.must(l.changes.PauseVM(ctx, call, getVM(l))) }, func(l *lab) (operation.Operation, error) {
			return l.changes.StartVM(ctx, call, web, false)
		}, errs.Precondition, "VM_PAUSED", "paused"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			l, before := scenario{setup: tc.setup}.prepare(t)
			defer l.close()
			op, err := tc.change(l)
			if !errors.Is(err, tc.kind) || errs.ReasonOf(err) != tc.reason || !strings.Contains(err.Error(), tc.says) || errs.RemedyOf(err) == "" {
				t.Errorf("%v, reason %q, remedy %q", err, errs.ReasonOf(err), errs.RemedyOf(err))
			}
			if op.ID != "" || l.w.String() != before {
				t.Errorf("something happened: %+v\n%s", op, l.w)
			}
		})
	}
}

// TestImportOutlivesItsPlugin lets the storage plugin go away and come back during an import.
func TestImportOutlivesItsPlugin(t *testing.T) {
	l := newLab(t)
	defer l.close()
	lost := make(chan error, 1)
	lost <- errs.New(errs.Unavailable, "died")
	gate := l.w.Gate
	l.w.Gate = func(ctx context.Context, c string, after bool) error {
		if c == "storage.WatchImport" {
			select {
			case err := <-lost:
				return err
			default:
			}
		}
		return gate(ctx, c, after)
	}
	c := call
	c.Async = true
	begin := func(id, name string, nth int) operation.Operation {
		op, err := l.changes.Import(context.Background(), c, storage.ImportRequest{ID: id, Name: name, URL: "http://example.org/"})
		if err != nil {
			t.Fatal(err)
		}
		for {
			all, err := l.w.Storage().ListImports(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(all) == nth {
				return op
			}
		}
	}
	op := begin(template, "debian", 1)
	l.w.EndImport(template, storage.ImportDone, "")
	var last operation.Operation
	if err := l.engine.Watch(t.Context(), op.ID, func(o operation.Operation) error { last = o; return nil }); err != nil || last.State != operation.Done {
		t.Fatalf("%v %s: %v", err, last.State, last.Err())
	}
	op = begin(web, "broken", 2)
	// The core dies, and finds the import failed when it is back.
	l.mu.Lock()
	l.dead = true
	l.mu.Unlock()
	l.engine.Close(expired())
	l.w.EndImport(web, storage.ImportFailed, "not an image")
	l.mu.Lock()
	l.dead = false
	l.mu.Unlock()
	l.open()
	if _, err := l.engine.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.settle()
	o, err := l.engine.Get(op.ID)
	if err != nil || o.State != operation.Failed || !strings.Contains(o.Err().Error(), "not an image") || errs.RemedyOf(o.Err()) == "" {
		t.Errorf("%v %s: %v", err, o.State, o.Err())
	}
}

// TestStartLosesARace starts a VM that somebody else starts in between: what it uses is not taken from it.
func TestStartLosesARace(t *testing.T) {
	l, _ := scenario{setup: stopped}.prepare(t)
	defer l.close()
	gate := l.w.Gate
	l.w.Gate = func(ctx context.Context, c string, after bool) error {
		if c == "vmm.Start" && after {
			return errs.New(errs.Conflict, "somebody else started it")
		}
		return gate(ctx, c, after)
	}
	if _, err := l.changes.StartVM(t.Context(), call, web, false); !errors.Is(err, errs.Conflict) {
		t.Fatalf("%v", err)
	}
	if got := l.w.String(); !strings.Contains(got, "volume web-root attached to web") || !strings.Contains(got, "vm web running") {
		t.Errorf("%s", got)
	}
}
