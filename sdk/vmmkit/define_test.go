package vmmkit

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func TestCreateRefuses(t *testing.T) {
	r := newRig(t)
	id := ident.New()
	disk := vmm.Disk{Name: "root", VolumeID: ident.New()}
	nic := vmm.NIC{NICID: ident.New(), MAC: "52:54:00:00:00:01"}
	for field, change := range map[string]func(*vmm.CreateRequest){
		"id":                        func(q *vmm.CreateRequest) { q.ID = "../../etc" },
		"spec.name":                 func(q *vmm.CreateRequest) { q.Spec.Name = "a/b" },
		"spec.cpus":                 func(q *vmm.CreateRequest) { q.Spec.CPUs = 0 },
		"spec.max_cpus":             func(q *vmm.CreateRequest) { q.Spec.CPUs, q.Spec.MaxCPUs = 4, 2 },
		"spec.memory_bytes":         func(q *vmm.CreateRequest) { q.Spec.MemoryBytes = 0 },
		"spec.max_memory":           func(q *vmm.CreateRequest) { q.Spec.MaxMemory = 1 << 50 },
		"spec.boot.cmdline":         func(q *vmm.CreateRequest) { q.Spec.Boot.Cmdline = "console=ttyS0" },
		"spec.boot.firmware":        func(q *vmm.CreateRequest) { q.Spec.Boot.Firmware = "coreboot" },
		"initramfs":                 func(q *vmm.CreateRequest) { q.Initramfs = kernelFile(t, 1) },
		"spec.disks[0].name":        func(q *vmm.CreateRequest) { q.Spec.Disks = []vmm.Disk{{Name: "a,b", VolumeID: disk.VolumeID}} },
		"spec.disks[1].name":        func(q *vmm.CreateRequest) { q.Spec.Disks = []vmm.Disk{disk, {Name: "root", VolumeID: ident.New()}} },
		"spec.disks[1].volume_id":   func(q *vmm.CreateRequest) { q.Spec.Disks = []vmm.Disk{disk, {Name: "b", VolumeID: disk.VolumeID}} },
		"spec.nics[0].nic_id":       func(q *vmm.CreateRequest) { q.Spec.NICs = []vmm.NIC{{NICID: "eth0", MAC: nic.MAC}} },
		"spec.nics[0].mac":          func(q *vmm.CreateRequest) { q.Spec.NICs = []vmm.NIC{{NICID: nic.NICID, MAC: "01:00:5e:00:00:01"}} },
		"spec.nics[1]":              func(q *vmm.CreateRequest) { q.Spec.NICs = []vmm.NIC{nic, nic} },
		"spec.labels":               func(q *vmm.CreateRequest) { q.Spec.Labels = map[string]string{"": "x"} },
		"spec.cloud_init.meta_data": func(q *vmm.CreateRequest) { q.Spec.CloudInit.MetaData = "- no mapping" },
	} {
		q := vmm.CreateRequest{ID: id, Spec: spec("x")}
		change(&q)
		_, err := r.m.Create(t.Context(), q)
		wantErr(t, field, err, errs.Invalid, field)
	}
	for what, change := range map[string]func(*vmm.CreateRequest){
		"absurd memory": func(q *vmm.CreateRequest) { q.Spec.MemoryBytes = 1 << 46 },
		"odd memory":    func(q *vmm.CreateRequest) { q.Spec.MemoryBytes = 64<<20 + 1 },
		"little memory": func(q *vmm.CreateRequest) { q.Spec.MemoryBytes = 1 << 20 },
	} {
		q := vmm.CreateRequest{ID: id, Spec: spec("x")}
		change(&q)
		_, err := r.m.Create(t.Context(), q)
		wantErr(t, what, err, errs.Invalid, "spec.memory_bytes")
	}
	for what, cmdline := range map[string]string{"long": strings.Repeat("x", 2048), "NUL": "a\x00b", "newline": "a\nb"} {
		_, err := r.m.Create(t.Context(), vmm.CreateRequest{ID: id, Kernel: kernelFile(t, 1), Spec: func() vmm.Spec {
			s := spec("x")
			s.Boot.Cmdline = cmdline
			return s
		}()})
		wantErr(t, what, err, errs.Invalid, "spec.boot.cmdline")
	}
	for _, sub := range []string{"vm", "kernels"} {
		if ents, err := os.ReadDir(filepath.Join(r.dir, sub)); err != nil || len(ents) > 0 {
			t.Errorf("left in %s: %v, %v", sub, ents, err)
		}
	}
}

func TestDefinitions(t *testing.T) {
	r := newRig(t)
	q := vmm.CreateRequest{ID: ident.New(), Spec: spec("web"), Kernel: kernelFile(t, 1)}
	a, err := r.m.Create(t.Context(), q)
	if err != nil || a.State != vmm.StateStopped || a.Generation != 1 || !a.Spec.Boot.HasKernel {
		t.Fatalf("%+v, %v", a, err)
	}
	if b, err := r.m.Create(t.Context(), q); err != nil || b.CreatedAt != a.CreatedAt {
		t.Errorf("again: %+v, %v", b, err)
	}
	other := q
	other.Spec.CPUs = 2
	if _, err := r.m.Create(t.Context(), other); !errors.Is(err, errs.Exists) {
		t.Errorf("same id, another VM: %v", err)
	}
	taken := q
	taken.ID = ident.New()
	_, err = r.m.Create(t.Context(), taken)
	wantErr(t, "a name taken", err, errs.Exists, "")

	// What the caller does with its answer is its own business.
	a.Spec.Labels = map[string]string{"x": "y"}
	next := a.Spec
	next.Name, next.CPUs = "web2", 2
	u, err := r.m.Update(t.Context(), vmm.UpdateRequest{ID: a.ID, Generation: 1, Spec: next, Kernel: kernelFile(t, 2)})
	if err != nil || u.Generation != 2 || u.Spec.CPUs != 2 || u.Spec.Boot.KernelSHA256 == a.Spec.Boot.KernelSHA256 {
		t.Fatalf("update: %+v, %v", u, err)
	}
	if ents, _ := os.ReadDir(filepath.Join(r.dir, "kernels")); len(ents) != 1 || ents[0].Name() != u.Spec.Boot.KernelSHA256 {
		t.Errorf("kernels: %v", ents)
	}
	_, err = r.m.Update(t.Context(), vmm.UpdateRequest{ID: a.ID, Generation: 1, Spec: next})
	wantErr(t, "an old generation", err, errs.Conflict, "")
	if _, err := r.m.Get(t.Context(), vmm.Ref{Ref: "web"}); !errors.Is(err, errs.NotFound) {
		t.Errorf("the old name: %v", err)
	}

	r.close()
	r.open()
	got, err := r.m.Get(t.Context(), vmm.Ref{Ref: "web2"})
	if err != nil || got.ID != a.ID || got.Generation != 2 || got.Spec.Labels["x"] != "y" {
		t.Errorf("after a restart: %+v, %v", got, err)
	}
	if b, err := r.m.Create(t.Context(), q); err != nil || b.ID != a.ID {
		t.Errorf("the create once more, after update and restart: %+v, %v", b, err)
	}
	for range 2 {
		if err := r.m.Delete(t.Context(), vmm.Ref{Ref: a.ID}); err != nil {
			t.Fatal(err)
		}
	}
	for _, sub := range []string{"vm", "kernels"} {
		if ents, err := os.ReadDir(filepath.Join(r.dir, sub)); err != nil || len(ents) > 0 {
			t.Errorf("left in %s: %v, %v", sub, ents, err)
		}
	}
}
