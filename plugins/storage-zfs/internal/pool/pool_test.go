package pool

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/zfscmd"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/kittest"
)

func openFake(t testing.TB, dir string, o storagekit.Options) *storagekit.Service {
	t.Helper()
	s, err := fakeService(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, s) })
	return s
}

func fakeService(ctx context.Context, dir string, o storagekit.Options) (*storagekit.Service, error) {
	b, err := New(Options{Pool: "tank", Step: o.FailPoint, Run: &zfscmd.Runner{Dir: dir}, Devices: fakeDevices{dir}})
	if err != nil {
		return nil, err
	}
	return storagekit.Open(ctx, b, o)
}

func fakeDatasets(dir string) (out []string) {
	for _, name := range slices.Sorted(maps.Keys(loadFake(dir).Sets)) {
		switch name {
		case "tank", "tank/.tmp", "tank/.templates", "tank/.mvirt-zfs":
		default:
			out = append(out, strings.TrimPrefix(name, "tank/"))
		}
	}
	return out
}

var crashEvery = flag.Int("crash-every", 11, "of the places between two steps, every how many-th to crash at (1: all)")

// TestKillAtEveryStep plays the story on the stand-in and kills the plugin between two steps, at every place
// with -crash-every 1. A prime by default, so that no kind of step is always left out.
func TestKillAtEveryStep(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	must(0, os.WriteFile(image, noise(2*mib), 0o600))(t)
	for n := 1; ; n += *crashEvery {
		dir := fakeTools(t, "tank")
		out, err := exec.Command("/proc/self/exe", "crash-child", "fake:"+dir, image, strconv.Itoa(n), "0").CombinedOutput()
		if err == nil {
			t.Logf("every %dth of about %d places", *crashEvery, n-1)
			same(t, fakeDatasets(dir))
			if n < 100 {
				t.Error("the fail points are gone")
			}
			return
		}
		if ws, ok := err.(*exec.ExitError).Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
			t.Fatalf("place %d: %v: %s", n, err, out)
		}
		s := openFake(t, dir, kitOptions())
		if h := must(s.Health(t.Context()))(t); len(h.Conditions) > 0 {
			t.Errorf("killed at %s: %+v", out, h)
		}
		for _, v := range must(s.ListVolumes(t.Context()))(t) {
			if v.State != storage.StateReady {
				t.Errorf("killed at %s: %s: %s", out, v.Name, v.StateReason)
			}
		}
		for _, i := range must(s.ListImports(t.Context()))(t) { // one that was decided goes on
			must(0, s.WatchImport(t.Context(), storage.Ref{Ref: i.ID}, func(storage.Import) error { return nil }))(t)
		}
		// What the pool knows is what the metadata knows.
		before := listing(t, s)
		shut(t, s)
		must(0, os.Remove(filepath.Join(dir, "mnt", ".mvirt-zfs", "metadata.db")))(t)
		s = openFake(t, dir, kitOptions())
		if after := listing(t, s); after != before {
			t.Errorf("killed at %s: before the metadata's loss\n%s\nafter\n%s", out, before, after)
		}
		story := kittest.Story{Service: s, Image: image}
		if err := story.Play(t.Context()); err != nil {
			t.Errorf("killed at %s: the story cannot go on: %v", out, err)
		}
		if left := fakeDatasets(dir); len(left) > 0 {
			t.Errorf("killed at %s: %q is left", out, left)
		}
		shut(t, s)
		if t.Failed() {
			return
		}
	}
}

// TestRepeatIDs is TestRealKillRepeat on the stand-in.
func TestRepeatIDs(t *testing.T) {
	dir := fakeTools(t, "tank")
	repeatIDs(t, openFake(t, dir, kitOptions()))
	same(t, fakeDatasets(dir))
}

// TestStates: what the pool's state means to who asks.
func TestStates(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*fakePool)
		reason string
	}{
		"missing":   {func(p *fakePool) { p.Name = "other" }, "POOL_MISSING"},
		"suspended": {func(p *fakePool) { p.Health = "SUSPENDED" }, "POOL_SUSPENDED"},
		"faulted":   {func(p *fakePool) { p.Health = "FAULTED" }, "POOL_FAILED"},
		"read-only": {func(p *fakePool) { p.ReadOnly = true }, "POOL_READONLY"},
		"taken":     {func(p *fakePool) { p.Sets["tank/.tmp"] = &fakeDataset{Props: map[string]string{}} }, "DATASET_TAKEN"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := fakeTools(t, "tank")
			p := loadFake(dir)
			c.change(p)
			p.save()
			s := openFake(t, dir, kitOptions())
			_, err := s.CreateVolume(t.Context(), storage.CreateVolumeRequest{ID: ident.New(), Name: "v", SizeBytes: mib})
			want(t, err, errs.Unavailable)
			// What is there can be looked at.
			if _, err := s.ListVolumes(t.Context()); (err == nil) != (name != "missing") {
				t.Errorf("list: %v", err)
			}
			h := must(s.Health(t.Context()))(t)
			if len(h.Conditions) != 1 || h.Conditions[0].Remedy == "" || !strings.Contains(h.Conditions[0].Text, "tank") {
				t.Errorf("%+v", h)
			}
		})
	}
	t.Run("degraded", func(t *testing.T) {
		dir := fakeTools(t, "tank")
		p := loadFake(dir)
		p.Health = "DEGRADED"
		p.save()
		s := openFake(t, dir, kitOptions())
		must(s.ListVolumes(t.Context()))(t)
		if h := must(s.Health(t.Context()))(t); len(h.Conditions) != 1 || h.Conditions[0].Code != "POOL_DEGRADED" {
			t.Errorf("%+v", h)
		}
	})
}

func TestPoolNames(t *testing.T) {
	for _, n := range []string{"", "-o", "a/b", "a b", "9x", "a@b", "a;b", strings.Repeat("a", 200)} {
		if _, err := New(Options{Pool: n}); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%q: %v", n, err)
		}
	}
}

// TestRenamedByHand: an administrator renames a volume and puts another in its place. The other is not touched.
func TestRenamedByHand(t *testing.T) {
	dir := fakeTools(t, "tank")
	s := openFake(t, dir, kitOptions())
	ctx := t.Context()
	v := must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "v", SizeBytes: mib}))(t)
	p := loadFake(dir)
	must(0, p.rename("tank/v", "tank/elsewhere"))(t)
	must(0, p.create("tank/v", map[string][]string{"V": {"1048576"}, "b": {"16384"}}))(t)
	p.save()
	if got := must(s.GetVolume(ctx, storage.Ref{Ref: "v"}))(t); got.State != storage.StateReady {
		t.Errorf("%+v", got)
	}
	a := must(s.Attach(ctx, storage.AttachRequest{VolumeID: v.ID, Owner: kittest.Owner(ident.New())}))(t)
	if a.Path != loadFake(dir).Sets["tank/elsewhere"].File {
		t.Errorf("%+v", a)
	}
	must(0, s.Detach(ctx, storage.DetachRequest{VolumeID: v.ID, VMID: must(s.GetVolume(ctx, storage.Ref{Ref: "v"}))(t).Attachments[0].VMID}))(t)
	must(s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: "v", SizeBytes: 2 * mib}))(t)
	must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "v"}))(t)
	same(t, fakeDatasets(dir), "v")
}

// TestLabelsTooLong: what ZFS cannot keep is refused before anything is made.
func TestLabelsTooLong(t *testing.T) {
	dir := fakeTools(t, "tank")
	s := openFake(t, dir, kitOptions())
	_, err := s.CreateVolume(t.Context(), storage.CreateVolumeRequest{ID: ident.New(), Name: "v", SizeBytes: mib,
		Labels: map[string]string{"k": strings.Repeat("\x01", 4000)}})
	want(t, err, errs.Invalid)
	same(t, fakeDatasets(dir))
}

// TestGrowingTarget: an image whose size is known only at its end.
func TestGrowingTarget(t *testing.T) {
	dir := fakeTools(t, "tank")
	s := openFake(t, dir, kitOptions())
	raw := noise(3*mib + 1000)
	path := filepath.Join(t.TempDir(), "raw")
	must(0, os.WriteFile(path, raw, 0o600))(t)
	if out, err := exec.Command("gzip", path).CombinedOutput(); err != nil {
		t.Skipf("gzip: %v %s", err, out)
	}
	id := ident.New()
	must(kittest.Import(t.Context(), s, id, "t", path+".gz", ""))(t)
	tm := must(s.GetTemplate(t.Context(), storage.Ref{Ref: "t"}))(t)
	if tm.SizeBytes != 3*mib+16384 {
		t.Errorf("%+v", tm)
	}
	got := must(os.ReadFile(loadFake(dir).Sets["tank/.templates/t"].File))(t)
	if !bytes.Equal(got[:len(raw)], raw) {
		t.Error("the template differs")
	}
	same(t, fakeDatasets(dir), ".templates/t", ".templates/t@img")
}

func ExampleBackend_names() {
	b, _ := New(Options{Pool: "tank"})
	fmt.Println(b.home(storagekit.KindVolume, "web"), b.home(storagekit.KindTemplate, "debian"))
	// Output: tank/web tank/.templates/debian
}
