package vmmkit

import (
	"context"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

// fakeJail starts hypervisors as our own user, and keeps account of what it was asked for.
type fakeJail struct {
	mu     sync.Mutex
	gone   bool // every answer is that the launcher is not there
	vms    []string
	starts []jail.Start
	paths  []string // what is reachable beyond the start, as inside=outside
}

func (j *fakeJail) there() error {
	if j.gone {
		return errs.New(errs.Unavailable, "the launcher is gone")
	}
	return nil
}

func (j *fakeJail) Identity(_ context.Context, id string) (vmm.RunAs, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !slices.Contains(j.vms, id) && !j.gone {
		j.vms = append(j.vms, id)
	}
	return vmm.RunAs{UID: 77, GID: 77}, j.there()
}

func (j *fakeJail) Forget(_ context.Context, id string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.vms = slices.DeleteFunc(j.vms, func(v string) bool { return v == id })
	return j.there()
}

func (j *fakeJail) Share(context.Context, string, *os.File) error { return j.there() }

func (j *fakeJail) List(context.Context) (out []jail.VM, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, v := range j.vms {
		out = append(out, jail.VM{ID: v, UID: 77})
	}
	return out, j.there()
}

func (j *fakeJail) Start(ctx context.Context, _ string, s jail.Start, dir, output *os.File, _, pass []*os.File) (*proc.Process, []string, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.starts = append(j.starts, s)
	p, err := proc.Local{}.Spawn(ctx, proc.Command{Path: s.Program, Name: s.Name, Args: s.Args, Dir: dir.Name(), Output: output, Files: pass})
	return p, nil, err
}

func (j *fakeJail) Open(_ string, id proc.Identity) (*proc.Process, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.there(); err != nil {
		return nil, err
	}
	return proc.Open(id)
}

func (j *fakeJail) Reach(_ context.Context, _ string, _ proc.Identity, p jail.Path) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.paths = append(j.paths, p.Inside()+"="+p.Path)
	return nil
}

func (j *fakeJail) Unreach(_ context.Context, _ string, _ proc.Identity, p jail.Path) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.paths = slices.DeleteFunc(j.paths, func(s string) bool { return len(s) > len(p.Inside()) && s[:len(p.Inside())] == p.Inside() })
	return nil
}

func (j *fakeJail) Size(context.Context, string, proc.Identity, string) (uint64, error) {
	return 1 << 20, nil
}

func (j *fakeJail) reachable() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.paths)
}

// reopen ends the plugin and begins another, with a jail or without.
func (r *rig) reopen(j Jail) error {
	r.t.Helper()
	if r.m != nil {
		r.close()
	}
	m, err := Open(r.t.Context(), Options{DataDir: r.dir, Driver: r.d, Log: hclog.NewNullLogger(), Host: quietHost{}, Memory: 64 << 30, Jail: j})
	if err == nil {
		r.m = m
	}
	return err
}

func TestInJail(t *testing.T) {
	r := newRig(t)
	j := &fakeJail{}
	if err := r.reopen(j); err != nil {
		t.Fatal(err)
	}
	s := spec("a")
	disk := vmm.Disk{Name: "root", VolumeID: ident.New()}
	s.Disks = []vmm.Disk{disk}
	vm, err := r.m.Create(t.Context(), vmm.CreateRequest{ID: ident.New(), Spec: s})
	if err != nil {
		t.Fatal(err)
	}
	if vm.RunAs.UID != 77 {
		t.Errorf("it will run as %+v", vm.RunAs)
	}
	at := vmm.DiskAttachment{Name: "root", VolumeID: disk.VolumeID, Path: "/dev/outside", Format: "raw"}
	if _, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{at}}); err != nil {
		t.Fatal(err)
	}
	if len(j.starts) != 1 || len(j.starts[0].Paths) != 1 || j.starts[0].Paths[0].Path != "/dev/outside" || j.starts[0].Paths[0].Inside() != "/disk/root" {
		t.Errorf("%+v", j.starts)
	}
	more := vmm.DiskAttachment{Name: "more", VolumeID: ident.New(), Path: "/dev/more", Format: "raw"}
	if err := r.m.PlugDisk(t.Context(), vmm.PlugDiskRequest{ID: vm.ID, Disk: more}); err != nil {
		t.Fatal(err)
	}
	if got := j.reachable(); !slices.Equal(got, []string{"/disk/more=/dev/more"}) {
		t.Errorf("%q", got)
	}
	if err := r.m.DiskResized(t.Context(), vmm.DiskResizedRequest{ID: vm.ID, Name: "more", SizeBytes: 5}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a size that the disk has not: %v", err)
	}
	if err := r.m.UnplugDisk(t.Context(), vmm.UnplugRequest{ID: vm.ID, Name: "more"}); err != nil {
		t.Fatal(err)
	}
	if got := j.reachable(); len(got) != 0 {
		t.Errorf("still %q", got)
	}

	// The launcher cannot be asked: nothing is known, so nothing is entered, and nothing served.
	r.close()
	r.m = nil
	j.gone = true
	if err := r.reopen(j); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("without a launcher: %v", err)
	}
	// Jails were switched off: it goes on, as itself, and is not killed by who has no right to.
	if err := r.reopen(nil); err != nil {
		t.Fatal(err)
	}
	now := r.await(vm.ID, vmm.StateRunning)
	if now.RunAs.UID != 77 || now.PID == 0 {
		t.Errorf("%+v", now)
	}
	if err := r.m.PlugDisk(t.Context(), vmm.PlugDiskRequest{ID: vm.ID, Disk: more}); errs.ReasonOf(err) != "JAIL_OFF" {
		t.Errorf("a disk for a jail that is out of reach: %v", err)
	}
	// And on again. A uid whose VM is gone is given back.
	j.gone = false
	j.vms = append(j.vms, ident.New())
	if err := r.reopen(j); err != nil {
		t.Fatal(err)
	}
	r.await(vm.ID, vmm.StateRunning)
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	if err := r.m.Delete(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	if len(j.vms) != 0 {
		t.Errorf("uids are still taken by %q", j.vms)
	}
}
