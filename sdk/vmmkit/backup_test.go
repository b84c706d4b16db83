package vmmkit

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func TestBackup(t *testing.T) {
	r := newRig(t)
	a, err := r.m.Create(t.Context(), vmm.CreateRequest{ID: ident.New(), Spec: spec("a"), Kernel: kernelFile(t, 1)})
	if err != nil {
		t.Fatal(err)
	}
	r.create("b")
	var b bytes.Buffer
	if err := r.m.Backup(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	good := b.Bytes()
	if err := r.m.Restore(t.Context(), bytes.NewReader(good)); errs.ReasonOf(err) != "NOT_EMPTY" {
		t.Errorf("restored over VMs: %v", err)
	}

	// Every damage is noticed, and leaves an empty plugin empty.
	o := newRig(t)
	for name, bad := range map[string][]byte{
		"empty": nil, "cut": good[:len(good)/2], "without its sum": good[:len(good)-65],
		"a bit": append(append(append([]byte(nil), good[:3000]...), good[3000]^1), good[3001:]...),
	} {
		if err := o.m.Restore(t.Context(), bytes.NewReader(bad)); !errors.Is(err, errs.Corrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if vms, _ := o.m.List(t.Context()); len(vms) > 0 {
			t.Errorf("%s left %d VMs", name, len(vms))
		}
	}
	if err := o.m.Restore(t.Context(), bytes.NewReader(good)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got, err := o.m.Get(t.Context(), vmm.Ref{Ref: "a"})
		if err != nil || got.ID != a.ID || got.Spec.Boot.KernelSHA256 != a.Spec.Boot.KernelSHA256 || got.State != vmm.StateStopped {
			t.Errorf("restored: %+v, %v", got, err)
		}
		if vm := o.start(a.ID); vm.State != vmm.StateRunning {
			t.Errorf("started: %+v", vm)
		}
		if _, err := o.m.Kill(t.Context(), vmm.Ref{Ref: "a"}); err != nil {
			t.Error(err)
		}
		o.close()
		o.open()
	}
	if left, _ := filepath.Glob(filepath.Join(o.dir, ".restore-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if ents, _ := os.ReadDir(filepath.Join(o.dir, "kernels")); len(ents) != 1 {
		t.Errorf("kernels: %v", ents)
	}
}
