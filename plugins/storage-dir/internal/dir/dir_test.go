package dir

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
)

const mib = 1 << 20

func TestVolumes(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	ctx := t.Context()
	req := storage.CreateVolumeRequest{ID: ident.New(), Name: "web-root", SizeBytes: 10 * mib, Labels: map[string]string{"a": "b"}}
	v := must(s.CreateVolume(ctx, req))(t)
	if v.SizeBytes != 10*mib || v.State != storage.StateReady || v.AllocatedBytes != 0 || v.Labels["a"] != "b" {
		t.Errorf("%+v", v)
	}
	if again := must(s.CreateVolume(ctx, req))(t); again.ID != v.ID {
		t.Error("a repeated create made another volume")
	}
	other := req
	other.SizeBytes = 20 * mib
	_, err := s.CreateVolume(ctx, other)
	want(t, err, errs.Exists, "ID_TAKEN")
	other.ID = ident.New()
	_, err = s.CreateVolume(ctx, other)
	want(t, err, errs.Exists, "NAME_TAKEN")
	for _, name := range []string{"", "a/b", "..", "a..b", "x\x00y", strings.Repeat("n", 300), "-x", ident.New(), "Ä"} {
		_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: name, SizeBytes: mib})
		want(t, err, errs.Invalid)
	}
	for _, size := range []uint64{0, 513, 1 << 63, 1<<60 + 512} {
		_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "x", SizeBytes: size})
		want(t, err, errs.Invalid)
	}
	_, err = s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: "../../etc", Name: "x", SizeBytes: mib})
	want(t, err, errs.Invalid)
	_, err = s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "x", FromTemplate: "none"})
	want(t, err, errs.NotFound)

	write(t, file(root, v.ID), 4096, "hello")
	if v = must(s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: "web-root", SizeBytes: 12 * mib}))(t); v.SizeBytes != 12*mib {
		t.Errorf("%+v", v)
	}
	_, err = s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: "web-root", SizeBytes: mib})
	want(t, err, errs.Invalid)
	if v = must(s.RenameVolume(ctx, storage.RenameRequest{Ref: v.ID, Name: "www"}))(t); v.Name != "www" {
		t.Errorf("%+v", v)
	}
	_, err = s.GetVolume(ctx, storage.Ref{Ref: "web-root"})
	want(t, err, errs.NotFound)
	volume(t, s, "web-root", mib) // the old name is free

	clone := must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "clone", FromVolume: "www", SizeBytes: 30 * mib}))(t)
	if clone.SizeBytes != 30*mib || clone.OriginType != "volume" || clone.OriginID != v.ID || read(t, file(root, clone.ID), 4096, 5) != "hello" {
		t.Errorf("%+v", clone)
	}
	_, err = s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "small", FromVolume: "www", SizeBytes: mib})
	want(t, err, errs.Invalid)

	snap := snapshot(t, s, "www", "s1")
	_, err = s.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: "www", Name: "s1"})
	want(t, err, errs.Exists)
	write(t, file(root, v.ID), 4096, "HELLO")
	must(s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: "www", SizeBytes: 40 * mib}))(t)
	snapshot(t, s, "www", "s2")
	want(t, s.Rollback(ctx, storage.RollbackRequest{SnapshotID: snap.ID}), errs.Precondition, "NEWER_SNAPSHOTS", "s2")
	want(t, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "www"}), errs.Precondition, "HAS_SNAPSHOTS", "s1", "s2")
	if err := s.Rollback(ctx, storage.RollbackRequest{SnapshotID: snap.ID, DestroyNewer: true}); err != nil {
		t.Fatal(err)
	}
	v = must(s.GetVolume(ctx, storage.Ref{Ref: "www"}))(t)
	if v.SizeBytes != 12*mib || v.SnapshotCount != 1 || read(t, file(root, v.ID), 4096, 5) != "hello" {
		t.Errorf("after rollback: %+v", v)
	}
	tm := must(s.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: ident.New(), Name: "golden", SnapshotID: snap.ID}))(t)
	fromT := must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "from-t", FromTemplate: "golden"}))(t)
	fromS := must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "from-s", FromSnapshot: snap.ID}))(t)
	if err := s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "www", WithSnapshots: true}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a repeated delete is no error
		if err := s.DeleteTemplate(ctx, storage.Ref{Ref: tm.ID}); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{fromT.ID, fromS.ID} {
		if read(t, file(root, id), 4096, 5) != "hello" {
			t.Error("a clone lost its data with its origin")
		}
	}
	if l := must(s.ListVolumes(ctx))(t); len(l) != 4 || l[0].Name != "clone" || l[3].Name != "web-root" {
		t.Errorf("%+v", l)
	}
	clean(t, root, s)

	// All of it is there after a restart.
	before := fmt.Sprintf("%+v", must(s.ListVolumes(ctx))(t))
	shut(t, s)
	s = open(t, root, options())
	if after := fmt.Sprintf("%+v", must(s.ListVolumes(ctx))(t)); after != before {
		t.Errorf("before %s\nafter %s", before, after)
	}
	st := must(s.Stats(ctx))(t)
	if st.Volumes != 4 || st.TotalBytes == 0 || st.Place != root || st.ProvisionedBytes != 12*2*mib+30*mib+mib {
		t.Errorf("%+v", st)
	}
}

// opens tells whether another user can open a file to read and write.
func opens(t *testing.T, uid uint32, path, how string) bool {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "exec 3"+how+`"$1"`, "sh", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd.Run() == nil
}

func TestAttach(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	root := filepath.Join(t.TempDir(), "data")
	s := open(t, root, options())
	ctx := t.Context()
	v, w := volume(t, s, "v", mib), volume(t, s, "w", mib)
	owner := service.Owner{VMID: ident.New(), UID: 60001, GID: 60001}
	req := storage.AttachRequest{VolumeID: "v", Owner: owner}
	a := must(s.Attach(ctx, req))(t)
	if a.Path != file(root, v.ID) || a.Format != storage.FormatRaw || a.Block || a.SizeBytes != mib {
		t.Errorf("%+v", a)
	}
	if b := must(s.Attach(ctx, req))(t); b != a {
		t.Errorf("attached again: %+v", b)
	}
	if !opens(t, 60001, a.Path, "<>") {
		t.Error("the owner cannot open its volume")
	}
	if opens(t, 60002, a.Path, "<") || opens(t, 60001, file(root, w.ID), "<") || opens(t, 60001, filepath.Join(root, "metadata.db"), "<") {
		t.Error("somebody can open what is not theirs")
	}
	stranger := storage.AttachRequest{VolumeID: v.ID, Owner: service.Owner{VMID: ident.New(), UID: 60002}, ReadOnly: true}
	_, err := s.Attach(ctx, stranger)
	want(t, err, errs.Precondition, "VOLUME_IN_USE", owner.VMID)
	want(t, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "v"}), errs.Precondition, "VOLUME_IN_USE")
	snap := snapshot(t, s, "v", "live")
	want(t, s.Rollback(ctx, storage.RollbackRequest{SnapshotID: snap.ID}), errs.Precondition, "VOLUME_IN_USE")
	must(s.RenameVolume(ctx, storage.RenameRequest{Ref: "v", Name: "vv"}))(t)
	must(s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: "vv", SizeBytes: 2 * mib}))(t)

	// A restart keeps it, even if somebody has taken the entry away.
	shut(t, s)
	if err := os.Chmod(a.Path, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, root, options())
	if !opens(t, 60001, a.Path, "<>") {
		t.Error("access did not survive a restart")
	}
	for range 2 {
		if err := s.Detach(ctx, storage.DetachRequest{VolumeID: v.ID, VMID: owner.VMID}); err != nil {
			t.Fatal(err)
		}
	}
	if opens(t, 60001, a.Path, "<") {
		t.Error("access survived the detach")
	}
	for p := a.Path; p != "/"; p = filepath.Dir(p) {
		if out, err := exec.Command("getfacl", "-n", "-p", p).Output(); err == nil && strings.Contains(string(out), "60001") {
			t.Errorf("an entry is left on %s", p)
		}
	}

	// Two may read, and nobody writes then.
	stranger.ReadOnly = true
	must(s.Attach(ctx, stranger))(t)
	ro := storage.AttachRequest{VolumeID: v.ID, Owner: owner, ReadOnly: true}
	must(s.Attach(ctx, ro))(t)
	if !opens(t, 60001, a.Path, "<") || opens(t, 60001, a.Path, "<>") || !opens(t, 60002, a.Path, "<") {
		t.Error("read-only attachments do not read, or write")
	}
	if err := s.Detach(ctx, storage.DetachRequest{VolumeID: v.ID, VMID: owner.VMID}); err != nil {
		t.Fatal(err)
	}
	if opens(t, 60001, a.Path, "<") || !opens(t, 60002, a.Path, "<") {
		t.Error("a detach took the wrong access away")
	}
}

func TestDamaged(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	ctx := t.Context()
	gone, short, link, good := volume(t, s, "gone", mib), volume(t, s, "short", mib), volume(t, s, "link", mib), volume(t, s, "good", mib)
	os.Remove(file(root, gone.ID))
	os.Truncate(file(root, short.ID), 512)
	os.Remove(file(root, link.ID))
	secret := filepath.Join(t.TempDir(), "secret")
	os.WriteFile(secret, make([]byte, mib), 0o600)
	os.Symlink(secret, file(root, link.ID))
	for _, v := range must(s.ListVolumes(ctx))(t) {
		if (v.State == storage.StateReady) != (v.ID == good.ID) || (v.StateReason == "") != (v.ID == good.ID) {
			t.Errorf("%s: %v %q", v.Name, v.State, v.StateReason)
		}
		if v.ID == good.ID {
			continue
		}
		_, err := s.Attach(ctx, storage.AttachRequest{VolumeID: v.ID, Owner: service.Owner{VMID: ident.New(), UID: 60001}})
		want(t, err, errs.Corrupt, "DAMAGED")
		_, err = s.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: v.ID, Name: "s"})
		want(t, err, errs.Corrupt)
		if err := s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: v.ID}); err != nil {
			t.Errorf("delete %s: %v", v.Name, err)
		}
	}
	if _, err := os.Stat(secret); err != nil {
		t.Error("a link's target was removed")
	}
	clean(t, root, s)
}

func TestForeignFilesStay(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	shut(t, s)
	mine := []string{ident.New() + ".create", ident.New() + ".import", ident.New() + ".download", ident.New() + ".rollback"}
	foreign := []string{".tmp/notes.txt", ".tmp/abc.create", ".tmp/" + ident.New() + ".bak", "volumes/" + ident.New() + ".raw", "volumes/keep", "README"}
	for _, f := range mine {
		os.WriteFile(filepath.Join(root, ".tmp", f), []byte("x"), 0o600)
	}
	for _, f := range foreign {
		os.WriteFile(filepath.Join(root, f), []byte("x"), 0o600)
	}
	open(t, root, options())
	for _, f := range mine {
		if _, err := os.Stat(filepath.Join(root, ".tmp", f)); err == nil {
			t.Errorf("%s was not swept", f)
		}
	}
	for _, f := range foreign {
		if _, err := os.Stat(filepath.Join(root, f)); err != nil {
			t.Errorf("%s: %v", f, err)
		}
	}
}

func TestConcurrentChanges(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	ctx := t.Context()
	req := storage.CreateVolumeRequest{ID: ident.New(), Name: "one", SizeBytes: mib}
	var wg sync.WaitGroup
	var mu sync.Mutex
	byName := 0
	for i := range 32 {
		wg.Go(func() {
			if _, err := s.CreateVolume(ctx, req); err != nil && errs.KindOf(err) != errs.Conflict {
				t.Errorf("the same create: %v", err)
			}
			if _, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "same-name", SizeBytes: mib}); err == nil {
				mu.Lock()
				byName++
				mu.Unlock()
			} else if errs.KindOf(err) != errs.Exists {
				t.Errorf("another create: %v", err)
			}
			name := fmt.Sprintf("v%d", i%4)
			s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: name, SizeBytes: mib})
			s.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: name, Name: fmt.Sprintf("s%d", i)})
			s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: fmt.Sprintf("c%d", i), FromVolume: name})
			s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: name, WithSnapshots: true})
			if _, err := s.ListVolumes(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if byName != 1 {
		t.Errorf("%d volumes of one name", byName)
	}
	clean(t, root, s)
}

func TestMetadata(t *testing.T) {
	t.Run("newer", func(t *testing.T) {
		root := t.TempDir()
		shut(t, open(t, root, options()))
		setVersion(t, filepath.Join(root, "metadata.db"), "2")
		_, err := openErr(root)
		want(t, err, errs.Precondition, "NEWER_FORMAT")
	})
	t.Run("rubbish", func(t *testing.T) {
		root := t.TempDir()
		rubbish := strings.Repeat("rubbish ", 4096)
		os.WriteFile(filepath.Join(root, "metadata.db"), []byte(rubbish), 0o600)
		_, err := openErr(root)
		want(t, err, errs.Corrupt)
		if b, _ := os.ReadFile(filepath.Join(root, "metadata.db")); string(b) != rubbish {
			t.Error("the damaged file was changed")
		}
	})
	t.Run("in use", func(t *testing.T) {
		root := t.TempDir()
		open(t, root, options())
		_, err := openErr(root)
		want(t, err, errs.Precondition, "in use")
	})
}

func TestMissingDirectoryComes(t *testing.T) {
	parent := filepath.Join(t.TempDir(), "not-mounted")
	o := options()
	o.Retry = 20e6
	s := open(t, filepath.Join(parent, "data"), o)
	_, err := s.ListVolumes(t.Context())
	want(t, err, errs.Unavailable, "STORAGE_NOT_READY")
	c := conditions(t, s)["STORAGE_NOT_READY"]
	if c.Severity != service.SeverityCritical || c.Remedy == "" {
		t.Errorf("%+v", c)
	}
	if err := os.Mkdir(parent, 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20e9)
	defer cancel()
	for ctx.Err() == nil {
		if _, err = s.ListVolumes(t.Context()); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	volume(t, s, "v", mib)
	if len(conditions(t, s)) != 0 {
		t.Errorf("%+v", conditions(t, s))
	}
}
