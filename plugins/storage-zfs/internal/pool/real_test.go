package pool

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
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
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
)

// These tests need OpenZFS and root; they make pools of their own on files. The lab has both.

const mib = 1 << 20

func TestMain(m *testing.M) {
	if base := filepath.Base(os.Args[0]); base == "zfs" || base == "zpool" {
		os.Exit(fakeMain(base, os.Args[1:]))
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case worker.Name:
			os.Exit(worker.Main(nil))
		case "crash-child":
			os.Exit(crashChild(os.Args[2:]))
		}
	}
	os.Exit(m.Run())
}

func command(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// needZFS skips where there is none.
func needZFS(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root and OpenZFS")
	}
	if out, err := exec.Command("zpool", "list").CombinedOutput(); err != nil {
		t.Skipf("OpenZFS is not usable here (the lab has it): %v %s", err, out)
	}
}

// realPool makes a pool on a sparse file.
func realPool(t testing.TB, size int64, options ...string) string {
	t.Helper()
	needZFS(t)
	return poolIn(t, t.TempDir(), size, []string{"disk"}, options...)
}

// poolIn makes a pool on sparse files in dir; words like "mirror" may stand between their names.
func poolIn(t testing.TB, dir string, size int64, layout []string, options ...string) string {
	t.Helper()
	name := fmt.Sprintf("mvt%d", rand.N(1000000))
	args := append([]string{"zpool", "create", "-m", filepath.Join(dir, "mnt")}, options...)
	args = append(args, name)
	for _, l := range layout {
		if l == "mirror" {
			args = append(args, l)
			continue
		}
		disk := filepath.Join(dir, l)
		must(0, os.WriteFile(disk, nil, 0o600))(t)
		must(0, os.Truncate(disk, size))(t)
		args = append(args, disk)
	}
	command(t, args...)
	t.Cleanup(func() {
		for range 50 {
			if exec.Command("zpool", "destroy", "-f", name).Run() == nil {
				return
			}
			time.Sleep(100 * time.Millisecond) // udev may have a device open
		}
		t.Errorf("cannot destroy the pool %s", name)
	})
	return name
}

// slow is for the lab on a host that is busy.
const slow = 10

func kitOptions() storagekit.Options {
	return storagekit.Options{WorkerUser: "nobody", Patience: slow * 30 * time.Second}
}

func open(t testing.TB, pool string, o storagekit.Options) *storagekit.Service {
	t.Helper()
	b, err := New(Options{Pool: pool, Step: o.FailPoint, Slow: slow})
	if err != nil {
		t.Fatal(err)
	}
	s, err := storagekit.Open(t.Context(), b, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, s) })
	return s
}

func shut(t testing.TB, s *storagekit.Service) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), slow*60*time.Second)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func want(t testing.TB, err error, kind errs.Kind, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got %v (%v), want %v", err, errs.KindOf(err), kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error()+" "+errs.ReasonOf(err), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if errs.RemedyOf(err) == "" {
		t.Errorf("%q has no remedy", err)
	}
}

func volume(t testing.TB, s storage.Service, req storage.CreateVolumeRequest) storage.Volume {
	t.Helper()
	req.ID = ident.New()
	return must(s.CreateVolume(t.Context(), req))(t)
}

func snapshot(t testing.TB, s storage.Service, vol, name string) storage.Snapshot {
	t.Helper()
	return must(s.CreateSnapshot(t.Context(), storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: vol, Name: name}))(t)
}

// datasets lists what the pool has beside the fixed ones.
func datasets(t testing.TB, pool string) []string {
	t.Helper()
	var out []string
	for _, name := range strings.Fields(command(t, "zfs", "list", "-H", "-r", "-t", "all", "-o", "name", pool)) {
		switch strings.TrimPrefix(name, pool) {
		case "", "/.tmp", "/.templates", "/.mvirt-zfs":
		default:
			out = append(out, strings.TrimPrefix(name, pool+"/"))
		}
	}
	return out
}

func same(t testing.TB, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the pool holds %q, not %q", got, want)
	}
}

func TestRealLifecycle(t *testing.T) {
	pool := realPool(t, 2<<30)
	s := open(t, pool, kitOptions())
	ctx := t.Context()
	vm := ident.New()
	v := volume(t, s, storage.CreateVolumeRequest{Name: "v", SizeBytes: 10*mib + 512})
	if v.SizeBytes != 10*mib+16384 || v.BlockSize != 16384 || v.State != storage.StateReady {
		t.Errorf("%+v", v)
	}
	if small := volume(t, s, storage.CreateVolumeRequest{Name: "b4k", SizeBytes: mib, BlockSize: 4096}); small.BlockSize != 4096 {
		t.Errorf("%+v", small)
	}
	_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "b3", SizeBytes: mib, BlockSize: 256 << 10})
	want(t, err, errs.Invalid)

	// Attached: the owner's uid can open exactly this device.
	a := must(s.Attach(ctx, storage.AttachRequest{VolumeID: "v", Owner: kittest.Owner(vm)}))(t)
	if !a.Block || !strings.HasPrefix(a.Path, "/dev/zd") || a.BlockSize != 16384 || a.SizeBytes != v.SizeBytes {
		t.Errorf("%+v", a)
	}
	opens := func(uid uint32, path string) bool {
		cmd := exec.Command("/bin/sh", "-c", `exec 3<>"$1"`, "sh", path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		return cmd.Run() == nil
	}
	other := must(s.Attach(ctx, storage.AttachRequest{VolumeID: "b4k", Owner: service.Owner{VMID: ident.New(), UID: 60002}}))(t)
	if !opens(60001, a.Path) || opens(60002, a.Path) || opens(60001, other.Path) || !opens(60002, other.Path) {
		t.Error("access is not what was attached")
	}
	must(s.RenameVolume(ctx, storage.RenameRequest{Ref: "v", Name: "web"}))(t)
	must(s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: "web", SizeBytes: 20 * mib}))(t)
	// What udev does at a change event, and a restart of the plugin, leave the access.
	exec.Command("udevadm", "trigger", "--action=change", a.Path).Run()
	exec.Command("udevadm", "settle").Run()
	shut(t, s)
	s = open(t, pool, kitOptions())
	if !opens(60001, a.Path) {
		t.Error("access is lost")
	}
	if err := s.Detach(ctx, storage.DetachRequest{VolumeID: "web", VMID: vm}); err != nil {
		t.Fatal(err)
	}
	if opens(60001, a.Path) {
		t.Error("access survived the detach")
	}

	if err := kittest.Put(ctx, s, "web", vm, "old"); err != nil {
		t.Fatal(err)
	}
	s1 := snapshot(t, s, "web", "s1")
	if err := kittest.Put(ctx, s, "web", vm, "new"); err != nil {
		t.Fatal(err)
	}
	snapshot(t, s, "web", "s2")
	c1 := volume(t, s, storage.CreateVolumeRequest{Name: "c1", FromSnapshot: s1.ID, SizeBytes: 40 * mib})
	if got := must(kittest.Get(ctx, s, "c1", vm, 3))(t); got != "old" || c1.SizeBytes != 40*mib {
		t.Errorf("%q %+v", got, c1)
	}
	volume(t, s, storage.CreateVolumeRequest{Name: "c2", FromSnapshot: must(s.ListSnapshots(ctx, storage.ListSnapshotsRequest{VolumeID: "web"}))(t)[1].ID})
	want(t, s.Rollback(ctx, storage.RollbackRequest{SnapshotID: s1.ID}), errs.Precondition, "NEWER_SNAPSHOTS", "s2")
	want(t, s.Rollback(ctx, storage.RollbackRequest{SnapshotID: s1.ID, DestroyNewer: true}), errs.Precondition, "HAS_CLONES", "c2")
	must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "c2"}))(t)
	command(t, "zfs", "snapshot", pool+"/web@by-hand")
	want(t, s.Rollback(ctx, storage.RollbackRequest{SnapshotID: s1.ID, DestroyNewer: true}), errs.Precondition, "by-hand")
	want(t, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "web"}), errs.Precondition, "HAS_SNAPSHOTS")
	command(t, "zfs", "destroy", pool+"/web@by-hand")
	must(0, s.Rollback(ctx, storage.RollbackRequest{SnapshotID: s1.ID, DestroyNewer: true}))(t)
	if got := must(kittest.Get(ctx, s, "web", vm, 3))(t); got != "old" {
		t.Errorf("after the rollback: %q", got)
	}

	// Everything that has clones can be deleted, and is gone when they are.
	tm := must(s.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: ident.New(), Name: "golden", SnapshotID: s1.ID}))(t)
	for i := range 3 {
		volume(t, s, storage.CreateVolumeRequest{Name: fmt.Sprintf("t%d", i), FromTemplate: "golden"})
	}
	if tm = must(s.GetTemplate(ctx, storage.Ref{Ref: "golden"}))(t); tm.CloneCount != 3 {
		t.Errorf("%+v", tm)
	}
	volume(t, s, storage.CreateVolumeRequest{Name: "deep", FromVolume: "t0"})
	must(0, s.DeleteTemplate(ctx, storage.Ref{Ref: "golden"}))(t)
	must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "t0"}))(t)
	must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "web", WithSnapshots: true}))(t)
	for _, n := range []string{"t1", "t2", "deep", "c1"} {
		if got := must(kittest.Get(ctx, s, n, vm, 3))(t); got != "old" {
			t.Errorf("%s holds %q", n, got)
		}
	}
	volume(t, s, storage.CreateVolumeRequest{Name: "web", SizeBytes: mib}) // its name is free
	volume(t, s, storage.CreateVolumeRequest{Name: "t0", SizeBytes: mib})
	shut(t, s)
	s = open(t, pool, kitOptions())
	for _, n := range []string{"t1", "deep", "t2", "c1", "web", "t0"} {
		must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: n}))(t)
	}
	same(t, datasets(t, pool), "b4k")
	st := must(s.Stats(ctx))(t)
	if st.Place != pool || st.Volumes != 1 || st.TotalBytes < 1<<30 || st.CompressionRatio < 1 || !st.Reflink {
		t.Errorf("%+v", st)
	}
}

// TestRealForeign: what is not ours is neither listed nor touched, whatever it is called.
func TestRealForeign(t *testing.T) {
	pool := realPool(t, 1<<30)
	s := open(t, pool, kitOptions())
	ctx := t.Context()
	v := volume(t, s, storage.CreateVolumeRequest{Name: "v", SizeBytes: mib})
	command(t, "zfs", "create", "-s", "-V", "1M", pool+"/theirs")
	command(t, "zfs", "create", pool+"/dir")
	command(t, "zfs", "create", "-s", "-V", "1M", "-o", "mvirt:kind=volume", "-o", "mvirt:id="+v.ID, pool+"/dir/copy")
	command(t, "zfs", "create", "-s", "-V", "1M", pool+"/.tmp/notes")
	_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "theirs", SizeBytes: mib})
	want(t, err, errs.Exists, "NAME_TAKEN")
	_, err = s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "theirs", FromVolume: "v"})
	want(t, err, errs.Exists, "NAME_TAKEN")
	_, err = s.RenameVolume(ctx, storage.RenameRequest{Ref: "v", Name: "dir"})
	want(t, err, errs.Exists)
	want(t, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: ""}), errs.Invalid)
	shut(t, s)
	s = open(t, pool, kitOptions())
	must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "v"}))(t)
	same(t, datasets(t, pool), ".tmp/notes", "dir", "dir/copy", "theirs")
}

func listing(t testing.TB, s storage.Service) string {
	t.Helper()
	ctx := context.Background()
	j, err := json.MarshalIndent([]any{must(s.ListVolumes(ctx))(t), must(s.ListTemplates(ctx))(t),
		must(s.ListSnapshots(ctx, storage.ListSnapshotsRequest{}))(t)}, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(j)
}

// TestRealRebuild: metadata.db is made again from the pool, to the byte.
func TestRealRebuild(t *testing.T) {
	pool := realPool(t, 2<<30)
	s := open(t, pool, kitOptions())
	ctx := t.Context()
	image := filepath.Join(t.TempDir(), "image")
	os.WriteFile(image, noise(3*mib), 0o600)
	must(kittest.Import(ctx, s, ident.New(), "img", image, ""))(t)
	volume(t, s, storage.CreateVolumeRequest{Name: "a", FromTemplate: "img", Labels: map[string]string{"ä\t\n\"": strings.Repeat("l", 1000)}})
	v := volume(t, s, storage.CreateVolumeRequest{Name: "b", SizeBytes: mib})
	sn := snapshot(t, s, "b", "one")
	snapshot(t, s, "b", "two")
	must(s.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: ident.New(), Name: "tpl", SnapshotID: sn.ID}))(t)
	must(s.RenameVolume(ctx, storage.RenameRequest{Ref: "b", Name: "c"}))(t)
	must(s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: "c", SizeBytes: 2 * mib}))(t)
	must(s.Attach(ctx, storage.AttachRequest{VolumeID: "c", Owner: kittest.Owner(ident.New())}))(t)
	volume(t, s, storage.CreateVolumeRequest{Name: "d", FromVolume: "c"})
	before := listing(t, s)
	shut(t, s)
	db := filepath.Join(command(t, "zfs", "get", "-H", "-o", "value", "mountpoint", pool+"/.mvirt-zfs"), "metadata.db")
	for _, how := range []string{"deleted", "damaged"} {
		if how == "deleted" {
			must(0, os.Remove(db))(t)
		} else {
			must(0, os.WriteFile(db, bytes.Repeat([]byte("rubbish "), 4096), 0o600))(t)
		}
		s = open(t, pool, kitOptions())
		if after := listing(t, s); after != before {
			t.Errorf("%s:\nbefore %s\nafter %s", how, before, after)
		}
		if err := s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: v.ID}); errs.ReasonOf(err) != "VOLUME_IN_USE" {
			t.Errorf("%s: the attachment is lost: %v", how, err)
		}
		shut(t, s)
	}
}

func noise(n int) []byte {
	r := rand.New(rand.NewPCG(5, 6))
	b := make([]byte, n)
	for off := 0; off < n; off += 2 << 20 {
		for i := off; i < min(off+1<<20, n); i++ {
			b[i] = byte(r.Uint32())
		}
	}
	return b
}

func TestRealImport(t *testing.T) {
	pool := realPool(t, 4<<30, "-O", "compression=off")
	s := open(t, pool, kitOptions())
	ctx := t.Context()
	raw := noise(24*mib + 512)
	dir := t.TempDir()
	path := func(n string) string { return filepath.Join(dir, n) }
	os.WriteFile(path("raw"), raw, 0o600)
	images := map[string]string{"raw": "raw"}
	if _, err := exec.LookPath("qemu-img"); err == nil {
		command(t, "qemu-img", "convert", "-O", "qcow2", path("raw"), path("qcow2"))
		command(t, "qemu-img", "convert", "-O", "qcow2", "-c", path("raw"), path("zlib"))
		command(t, "qemu-img", "convert", "-O", "qcow2", "-c", "-o", "compression_type=zstd", path("raw"), path("zstd"))
		images["qcow2"], images["zlib"], images["zstd"] = "qcow2", "qcow2", "qcow2"
	} else {
		t.Log("qemu-img is absent: only raw images are tried")
	}
	if _, err := exec.LookPath("gzip"); err == nil {
		command(t, "gzip", "-1", "-k", path("raw"))
		os.Rename(path("raw.gz"), path("gz"))
		images["gz"] = "raw+gzip"
	}
	for name, format := range images {
		i, err := kittest.Import(ctx, s, ident.New(), name, path(name), "")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		tm := must(s.GetTemplate(ctx, storage.Ref{Ref: name}))(t)
		if i.SourceFormat != format || tm.SizeBytes != uint64(24*mib+16384) || tm.State != storage.StateReady {
			t.Errorf("%s: %+v %+v", name, i, tm)
		}
		if data := uint64(12*mib + 16384); tm.AllocatedBytes > data*105/100 {
			t.Errorf("%s: %d bytes are allocated for %d of data", name, tm.AllocatedBytes, data)
		}
		volume(t, s, storage.CreateVolumeRequest{Name: "of-" + name, FromTemplate: name})
		err = kittest.Use(ctx, s, "of-"+name, ident.New(), func(f *os.File) error {
			got := make([]byte, len(raw))
			if _, err := f.ReadAt(got, 0); err != nil {
				return err
			}
			if !bytes.Equal(got, raw) {
				return errors.New("the disk differs")
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	os.WriteFile(path("cut"), []byte("QFI\xfb"), 0o600)
	before := datasets(t, pool)
	if _, err := kittest.Import(ctx, s, ident.New(), "cut", path("cut"), ""); err == nil || !strings.Contains(err.Error(), "truncated") {
		t.Errorf("got %v", err)
	}
	if _, err := kittest.Import(ctx, s, ident.New(), "sum", path("raw"), "sha256:"+strings.Repeat("0", 64)); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("got %v", err)
	}
	same(t, datasets(t, pool), before...)
}
