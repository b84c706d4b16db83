package dir

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

func everything(t *testing.T, s *storagekit.Service) string {
	t.Helper()
	ctx := t.Context()
	j, err := json.MarshalIndent([]any{must(s.ListVolumes(ctx))(t), must(s.ListTemplates(ctx))(t),
		must(s.ListSnapshots(ctx, storage.ListSnapshotsRequest{}))(t)}, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(j)
}

// TestBackup: the records go by Backup and the files by a copy, to another host that then has the same.
func TestBackup(t *testing.T) {
	ctx := t.Context()
	old := filepath.Join(t.TempDir(), "old")
	must(0, os.Mkdir(old, 0o700))(t)
	s := open(t, old, options())
	v := must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "v", SizeBytes: 1 << 20, Labels: map[string]string{"ä\n": "b"}}))(t)
	sn := snapshot(t, s, "v", "s")
	must(s.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: ident.New(), Name: "t", SnapshotID: sn.ID}))(t)
	must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "c", FromTemplate: "t"}))(t)
	before := everything(t, s)
	must(s.Attach(ctx, storage.AttachRequest{VolumeID: "v", Owner: service.Owner{VMID: ident.New(), UID: uint32(os.Geteuid())}}))(t)
	var backup bytes.Buffer
	must(0, s.Backup(ctx, &backup))(t)

	host := filepath.Join(t.TempDir(), "new")
	must(0, os.Mkdir(host, 0o700))(t)
	n := open(t, host, options())
	for _, d := range []string{"volumes", "templates", "snapshots"} {
		if out, err := exec.Command("cp", "-a", "--sparse=always", filepath.Join(old, d), host).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	lines := strings.SplitAfter(backup.String(), "\n")
	for name, bad := range map[string]string{
		"empty": "", "another file": "hello\n", "cut": backup.String()[:backup.Len()-1], "a line less": strings.Join(append(lines[:2:2], lines[3:]...), ""),
		"changed": strings.Replace(backup.String(), `"name":"v"`, `"name":"w"`, 1), "no end": strings.Join(lines[:len(lines)-2], ""),
	} {
		if bad == backup.String() {
			t.Fatalf("%s is no damage", name)
		}
		if err := n.Restore(ctx, strings.NewReader(bad)); errs.KindOf(err) != errs.Corrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
	want(t, n.Restore(ctx, strings.NewReader("mvirt-storage-backup 9\n")), errs.Precondition, "BACKUP_NEWER")
	if got := must(n.ListVolumes(ctx))(t); len(got) != 0 {
		t.Errorf("damaged backups left %+v", got)
	}
	must(0, n.Restore(ctx, bytes.NewReader(backup.Bytes())))(t)
	if got := everything(t, n); got != before {
		t.Errorf("before %s\nrestored %s", before, got)
	}
	want(t, n.Restore(ctx, bytes.NewReader(backup.Bytes())), errs.Precondition, "NOT_EMPTY")
	shut(t, n)
	n = open(t, host, options())
	if got := must(n.GetVolume(ctx, storage.Ref{Ref: "v"}))(t); got.ID != v.ID || got.State != storage.StateReady {
		t.Errorf("%+v", got)
	}
	must(0, n.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "v", WithSnapshots: true}))(t)
}
