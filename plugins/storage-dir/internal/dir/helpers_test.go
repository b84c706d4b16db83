package dir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/fetch"
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
)

// TestMain is the worker and the crashing child as well: both are this binary, started again.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case worker.Name:
			os.Exit(worker.Main(nil))
		case "crash-child":
			os.Exit(crashChild(os.Args[2:]))
		}
	}
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func options() storagekit.Options {
	return storagekit.Options{
		WorkerUser: "nobody",
		Fetch: fetch.Options{
			Policy: fetch.Policy{Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}},
			Sleep:  func(ctx context.Context, _ time.Duration) error { return ctx.Err() },
		},
	}
}

func open(t testing.TB, root string, o storagekit.Options) *storagekit.Service {
	t.Helper()
	b, err := New(root, o.FailPoint)
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
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

func want(t testing.TB, err error, kind errs.Kind, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got %v (%v), want %v", err, errs.KindOf(err), kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error()+errs.ReasonOf(err), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	if errs.RemedyOf(err) == "" {
		t.Errorf("%q has no remedy", err)
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

func volume(t testing.TB, s *storagekit.Service, name string, size uint64) storage.Volume {
	t.Helper()
	return must(s.CreateVolume(t.Context(), storage.CreateVolumeRequest{ID: ident.New(), Name: name, SizeBytes: size}))(t)
}

func snapshot(t testing.TB, s *storagekit.Service, vol, name string) storage.Snapshot {
	t.Helper()
	return must(s.CreateSnapshot(t.Context(), storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: vol, Name: name}))(t)
}

func file(root string, id string) string { return filepath.Join(root, "volumes", id+".raw") }

func write(t testing.TB, path string, off int64, s string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(s), off); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string, off int64, n int) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// noise is a disk image of n bytes, half of its megabytes zero.
func noise(n int) []byte {
	r := rand.New(rand.NewPCG(5, 6))
	b := make([]byte, n)
	for off := 0; off < n; off += 2 << 20 {
		for i := off; i < min(off+1<<20, n); i += 8 {
			v := r.Uint64()
			for k := range min(8, n-i) {
				b[i+k] = byte(v >> (8 * k))
			}
		}
	}
	return b
}

func qcow2(t testing.TB, raw []byte, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("qemu-img is not installed (package qemu-utils)")
	}
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out.qcow2")
	if err := os.WriteFile(in, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command(path, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), in, out)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return out
}

// await watches an import to its end.
func await(t testing.TB, s *storagekit.Service, id string) storage.Import {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var last storage.Import
	if err := s.WatchImport(ctx, storage.Ref{Ref: id}, func(i storage.Import) error { last = i; return nil }); err != nil {
		t.Fatal(err)
	}
	if !last.State.Final() {
		t.Fatalf("the last state is %v", last.State)
	}
	return last
}

// clean asserts that nothing is in the directory but the files of what the service lists.
func clean(t testing.TB, root string, s *storagekit.Service) {
	t.Helper()
	ctx := context.Background()
	expect := map[string]bool{}
	for _, v := range must(s.ListVolumes(ctx))(t) {
		expect["volumes/"+v.ID+".raw"] = true
	}
	for _, v := range must(s.ListTemplates(ctx))(t) {
		expect["templates/"+v.ID+".raw"] = true
	}
	for _, v := range must(s.ListSnapshots(ctx, storage.ListSnapshotsRequest{}))(t) {
		expect["snapshots/"+v.ID+".raw"] = true
	}
	for _, d := range []string{"volumes", "templates", "snapshots", ".tmp"} {
		entries, err := os.ReadDir(filepath.Join(root, d))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			name := d + "/" + e.Name()
			if !expect[name] {
				t.Errorf("%s is left", name)
			}
			delete(expect, name)
		}
	}
	for name := range expect {
		t.Errorf("%s is missing", name)
	}
}

func templateEquals(t testing.TB, root, id string, raw []byte) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(root, "templates", id+".raw"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, raw) {
		t.Error("the template differs from the image")
	}
}

func conditions(t testing.TB, s *storagekit.Service) map[string]service.Condition {
	t.Helper()
	m := map[string]service.Condition{}
	for _, c := range must(s.Health(t.Context()))(t).Conditions {
		m[c.Code] = c
	}
	return m
}
