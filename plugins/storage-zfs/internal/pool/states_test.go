package pool

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/kittest"
)

// Real pools in each state that they can be in. Each test has a pool of its own.

// patience bounds the wait for what a pool or udev does; the lab is emulated, and its host may be busy.
const patience = 10 * time.Minute

func quick() storagekit.Options {
	o := kitOptions()
	o.Retry = 200 * time.Millisecond
	return o
}

// eventually waits until cond says nothing any more.
func eventually(t testing.TB, what string, cond func() string) {
	t.Helper()
	last := ""
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if last = cond(); last == "" {
			return
		}
	}
	t.Fatalf("%s: %s", what, last)
}

func codes(t testing.TB, s storage.Service) []string {
	t.Helper()
	var l []string
	for _, c := range must(s.Health(context.Background()))(t).Conditions {
		l = append(l, c.Code)
		if c.Remedy == "" {
			t.Errorf("%s has no remedy", c.Code)
		}
	}
	return l
}

func condition(t testing.TB, s storage.Service, code string) {
	t.Helper()
	eventually(t, "condition "+code, func() string {
		if l := codes(t, s); !slices.Contains(l, code) {
			return fmt.Sprint("there are only ", l)
		}
		return ""
	})
}

func healthy(t testing.TB, s storage.Service) {
	t.Helper()
	eventually(t, "no condition", func() string { return strings.Join(codes(t, s), " ") })
}

// within fails when fn takes longer than d: a call must answer whatever the pool does.
func within[T any](t testing.TB, d time.Duration, fn func() (T, error)) (T, error) {
	t.Helper()
	type answer struct {
		v   T
		err error
	}
	c := make(chan answer, 1)
	go func() {
		v, err := fn()
		c <- answer{v, err}
	}()
	select {
	case a := <-c:
		return a.v, a.err
	case <-time.After(d):
		t.Fatalf("no answer after %v", d)
		panic("unreachable")
	}
}

// export exports a pool; udev may have a device of it open for a moment.
func export(t testing.TB, pool string) {
	t.Helper()
	eventually(t, "export of "+pool, func() string {
		out, err := exec.Command("zpool", "export", pool).CombinedOutput()
		if err != nil {
			return string(out)
		}
		return ""
	})
}

func TestRealFull(t *testing.T) {
	pool := realPool(t, 4<<30, "-O", "compression=off")
	s := open(t, pool, quick())
	ctx := t.Context()
	volume(t, s, storage.CreateVolumeRequest{Name: "v", SizeBytes: 2 << 30})
	// A reservation makes it nearly full at once: 150 MiB are left. Filling it to the last block would take
	// minutes, in which OpenZFS makes each write wait for a transaction group.
	avail := must(strconv.ParseUint(command(t, "zfs", "get", "-H", "-p", "-o", "value", "available", pool), 10, 64))(t)
	command(t, "zfs", "create", "-o", "canmount=off", "-o", fmt.Sprintf("reservation=%d", avail-150*mib), pool+"/zz-reserved")
	fill := must(os.Create(filepath.Join(t.TempDir(), "big")))(t)
	defer fill.Close()
	b := noise(mib)
	for range 200 {
		must(fill.Write(b))(t)
	}
	_, err := kittest.Import(ctx, s, ident.New(), "big", fill.Name(), "")
	if err == nil || !strings.Contains(err.Error(), "fit") && !strings.Contains(err.Error(), "space") {
		t.Errorf("got %v", err)
	}
	same(t, datasets(t, pool), "v", "zz-reserved")
	volume(t, s, storage.CreateVolumeRequest{Name: "w", SizeBytes: mib})
	if l := must(s.ListVolumes(ctx))(t); len(l) != 2 {
		t.Errorf("%+v", l)
	}
	command(t, "zfs", "destroy", pool+"/zz-reserved")
	must(kittest.Import(ctx, s, ident.New(), "big", fill.Name(), ""))(t)
}

// TestRealAway: the pool is not there, comes, is there read-only, and under another name.
func TestRealAway(t *testing.T) {
	needZFS(t)
	dir := t.TempDir()
	pool := poolIn(t, dir, 1<<30, []string{"disk"})
	s := open(t, pool, quick())
	ctx := t.Context()
	vm := ident.New()
	v := volume(t, s, storage.CreateVolumeRequest{Name: "v", SizeBytes: 2 * mib, Labels: map[string]string{"a": "b"}})
	must(0, kittest.Put(ctx, s, "v", vm, "old"))(t)
	sn := snapshot(t, s, "v", "s")
	must(s.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: ident.New(), Name: "t", SnapshotID: sn.ID}))(t)
	command(t, "zpool", "sync", pool) // what is written takes its space
	before := listing(t, s)
	shut(t, s)
	export(t, pool)

	t.Log("missing at start")
	s = open(t, pool, quick())
	_, err := s.ListVolumes(ctx)
	want(t, err, errs.Unavailable, "STORAGE_NOT_READY")
	condition(t, s, "STORAGE_NOT_READY")

	t.Log("read-only: all can be read, nothing changed")
	command(t, "zpool", "import", "-d", dir, "-o", "readonly=on", pool)
	eventually(t, "lists of a read-only pool", func() string {
		if _, err := s.ListVolumes(ctx); err != nil {
			return err.Error()
		}
		return ""
	})
	if got := listing(t, s); got != before {
		t.Errorf("before %s\nread-only %s", before, got)
	}
	if st := must(s.Stats(ctx))(t); st.Volumes != 1 || st.Templates != 1 || st.Snapshots != 1 || st.TotalBytes == 0 {
		t.Errorf("%+v", st)
	}
	if got := must(s.GetVolume(ctx, storage.Ref{Ref: "v"}))(t); got.State != storage.StateReady || got.ID != v.ID {
		t.Errorf("%+v", got)
	}
	h := must(s.Health(ctx))(t)
	if len(h.Conditions) != 1 || !strings.Contains(h.Conditions[0].Text, "read-only") {
		t.Errorf("%+v", h)
	}
	want(t, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "v"}), errs.Unavailable, "read-only")
	_, err = s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "w", SizeBytes: mib})
	want(t, err, errs.Unavailable, "read-only")
	_, err = s.Attach(ctx, storage.AttachRequest{VolumeID: "v", Owner: kittest.Owner(vm)})
	want(t, err, errs.Unavailable, "read-only")
	for range 2 { // the second is after another look at the pool
		a := must(s.Attach(ctx, storage.AttachRequest{VolumeID: "v", Owner: kittest.Owner(vm), ReadOnly: true}))(t)
		f := must(os.Open(a.Path))(t)
		got := make([]byte, 3)
		must(f.ReadAt(got, 4096))(t)
		f.Close()
		if string(got) != "old" || !a.ReadOnly {
			t.Errorf("%q %+v", got, a)
		}
		time.Sleep(3 * quick().Retry)
	}
	if got := must(s.GetVolume(ctx, storage.Ref{Ref: "v"}))(t); len(got.Attachments) != 1 {
		t.Errorf("%+v", got)
	}
	must(0, s.Detach(ctx, storage.DetachRequest{VolumeID: "v", VMID: vm}))(t)
	if got := must(s.GetVolume(ctx, storage.Ref{Ref: "v"}))(t); len(got.Attachments) != 0 {
		t.Errorf("%+v", got)
	}

	t.Log("imported to be written while the plugin runs")
	export(t, pool)
	command(t, "zpool", "import", "-d", dir, pool)
	eventually(t, "the pool is back", func() string {
		if _, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: v.ID[:len(v.ID)-4] + "ffff", Name: "w", SizeBytes: mib}); err != nil {
			return err.Error()
		}
		return ""
	})
	must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "w"}))(t)
	if got := listing(t, s); got != before {
		t.Errorf("before %s\nback %s", before, got)
	}
	healthy(t, s)
	shut(t, s)

	t.Log("under another name")
	export(t, pool)
	command(t, "zpool", "import", "-d", dir, pool, pool+"x")
	s = open(t, pool, quick())
	_, err = s.ListVolumes(ctx)
	want(t, err, errs.Unavailable, pool+"x")
	shut(t, s)
	s = open(t, pool+"x", quick())
	if got := listing(t, s); got != before {
		t.Errorf("before %s\nrenamed %s", before, got)
	}
	shut(t, s)
	export(t, pool+"x")
	command(t, "zpool", "import", "-d", dir, pool+"x", pool)
}

// TestRealDegraded: half a mirror is gone; all works, and it is told.
func TestRealDegraded(t *testing.T) {
	needZFS(t)
	dir := t.TempDir()
	pool := poolIn(t, dir, 512<<20, []string{"mirror", "one", "two"})
	s := open(t, pool, quick())
	volume(t, s, storage.CreateVolumeRequest{Name: "v", SizeBytes: mib})
	healthy(t, s)
	command(t, "zpool", "offline", pool, filepath.Join(dir, "two"))
	condition(t, s, "POOL_DEGRADED")
	volume(t, s, storage.CreateVolumeRequest{Name: "w", SizeBytes: mib})
	shut(t, s)
	s = open(t, pool, quick())
	condition(t, s, "POOL_DEGRADED")
	if l := must(s.ListVolumes(t.Context()))(t); len(l) != 2 || l[0].State != storage.StateReady {
		t.Errorf("%+v", l)
	}
	command(t, "zpool", "online", pool, filepath.Join(dir, "two"))
	healthy(t, s)
}

// TestRealSuspended: the pool's disk takes no more writes. Lists and health answer, changes are refused at once,
// and all goes on when the disk is back.
func TestRealSuspended(t *testing.T) {
	needZFS(t)
	ctx := t.Context()
	dir := t.TempDir()
	// The disk is a sparse file on a file system that is too small for it: it is full long before the pool is.
	must(0, syscall.Mount("mvirt-test", dir, "tmpfs", 0, "size=160m"))(t)
	grow := func() {
		if err := syscall.Mount("mvirt-test", dir, "tmpfs", syscall.MS_REMOUNT, "size=1g"); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() {
		for range 50 {
			if syscall.Unmount(dir, 0) == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Error("the test's file system stays mounted")
	})
	mnt := t.TempDir()
	pool := poolIn(t, dir, 2<<30, []string{"disk"}, "-O", "compression=off")
	t.Cleanup(func() { // before the pool is destroyed, however the test ends
		grow()
		exec.Command("zpool", "clear", pool).Run()
	})
	command(t, "zfs", "set", "mountpoint="+mnt, pool)
	s := open(t, pool, quick())
	volume(t, s, storage.CreateVolumeRequest{Name: "v", SizeBytes: 600 * mib})
	a := must(s.Attach(ctx, storage.AttachRequest{VolumeID: "v", Owner: service.Owner{VMID: ident.New(), UID: 60001}}))(t)
	fill := exec.Command("dd", "if=/dev/urandom", "of="+a.Path, "bs=1M", "count=250", "conv=fsync", "status=none")
	must(0, fill.Start())(t)
	t.Cleanup(func() {
		fill.Process.Kill()
		fill.Wait()
	})
	eventually(t, "the pool is suspended", func() string {
		if h := command(t, "zpool", "list", "-H", "-o", "health", pool); h != "SUSPENDED" {
			return h
		}
		return ""
	})
	condition(t, s, "POOL_SUSPENDED")
	vols, err := within(t, patience, func() ([]storage.Volume, error) { return s.ListVolumes(ctx) })
	if err != nil || len(vols) != 1 {
		t.Errorf("%+v %v", vols, err)
	}
	_, err = within(t, patience, func() (storage.Volume, error) {
		return s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "w", SizeBytes: mib})
	})
	want(t, err, errs.Unavailable, "POOL_SUSPENDED")
	if _, err := within(t, 30*time.Second, func() (service.Health, error) { return s.Health(ctx) }); err != nil {
		t.Error(err)
	}
	// A plugin that starts now says what is wrong, and shows what it can.
	shut(t, s)
	s = open(t, pool, quick())
	condition(t, s, "STORAGE_NOT_READY")
	_, err = within(t, patience, func() (storage.Volume, error) {
		return s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "w", SizeBytes: mib})
	})
	want(t, err, errs.Unavailable, "suspended")
	_, err = within(t, patience, func() ([]storage.Volume, error) { return s.ListVolumes(ctx) })
	t.Logf("a list after a start on a suspended pool: %v", err)

	grow()
	command(t, "zpool", "clear", pool)
	eventually(t, "the pool is back", func() string {
		_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: vols[0].ID[:len(vols[0].ID)-4] + "ffff", Name: "w", SizeBytes: mib})
		if err != nil {
			return err.Error()
		}
		return ""
	})
	healthy(t, s)
	must(0, fill.Wait())(t)
}
