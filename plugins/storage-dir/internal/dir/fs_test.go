package dir

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

func openErr(root string) (*storagekit.Service, error) {
	b, err := New(root, nil)
	if err != nil {
		return nil, err
	}
	return storagekit.Open(context.Background(), b, options())
}

func setVersion(t *testing.T, path, v string) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("version"), []byte(v)) }); err != nil {
		t.Fatal(err)
	}
}

// mounted makes a file system of its own for a test.
func mounted(t *testing.T, kind string, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	if kind == "tmpfs" {
		if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", dir).CombinedOutput(); err != nil {
			t.Skipf("cannot mount a tmpfs: %s", out)
		}
	} else {
		mkfs, err := exec.LookPath("mkfs." + kind)
		if err != nil {
			t.Skipf("mkfs.%s is not installed", kind)
		}
		img := filepath.Join(t.TempDir(), "img")
		if err := os.WriteFile(img, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(img, size); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(mkfs, "-q", img).CombinedOutput(); err != nil {
			t.Skipf("mkfs.%s: %s", kind, out)
		}
		if out, err := exec.Command("mount", "-o", "loop", img, dir).CombinedOutput(); err != nil {
			t.Skipf("cannot mount %s here: %s", kind, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("umount: %v", err)
		}
	})
	return dir
}

func TestReflink(t *testing.T) {
	for _, kind := range []string{"xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			root := filepath.Join(mounted(t, kind, 400*mib), "data")
			s := open(t, root, options())
			defer shut(t, s)
			ctx := t.Context()
			if !must(s.Stats(ctx))(t).Reflink {
				t.Fatal("no reflinks")
			}
			v := volume(t, s, "v", 64*mib)
			must(s.Attach(ctx, storage.AttachRequest{VolumeID: v.ID, Owner: service.Owner{VMID: ident.New(), UID: 60001}}))(t)
			write(t, file(root, v.ID), 0, string(noise(32*mib)))
			before := must(s.Stats(ctx))(t).UsedBytes
			for _, n := range []string{"a", "b", "c", "d"} {
				must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: n, FromVolume: "v"}))(t)
				snapshot(t, s, "v", n)
			}
			if grown := int64(must(s.Stats(ctx))(t).UsedBytes) - int64(before); grown > 24*mib {
				t.Errorf("8 clones of 16 MiB take %d bytes", grown)
			}
			if a := must(s.GetVolume(ctx, storage.Ref{Ref: "a"}))(t); a.AllocatedBytes > mib {
				t.Errorf("a clone owns %d bytes", a.AllocatedBytes)
			}
			write(t, file(root, v.ID), 0, "changed!")
			if sn := must(s.ListSnapshots(ctx, storage.ListSnapshotsRequest{}))(t)[0]; read(t, filepath.Join(root, "snapshots", sn.ID+".raw"), 0, 8) == "changed!" {
				t.Error("a snapshot changed with its volume")
			}
		})
	}
}

func TestFullDisk(t *testing.T) {
	root := filepath.Join(mounted(t, "tmpfs", 0), "data")
	s := open(t, root, options())
	defer shut(t, s)
	ctx := t.Context()
	v := volume(t, s, "v", 64*mib)
	write(t, file(root, v.ID), 0, strings.Repeat("x", 14*mib))
	_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "clone", FromVolume: "v"})
	want(t, err, errs.Exhausted, "NO_SPACE")
	_, err = s.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: "v", Name: "s"})
	want(t, err, errs.Exhausted, "NO_SPACE")
	clean(t, root, s)
	img := qcow2(t, noise(40*mib))
	f := must(os.Open(img))(t)
	defer f.Close()
	i := must(s.StartImport(ctx, storage.ImportRequest{ID: ident.New(), Name: "big", File: f, FileName: "big.qcow2"}))(t)
	i = await(t, s, i.ID)
	if i.State != storage.ImportFailed || errs.Kind(i.FailureKind) != errs.Exhausted || i.Remedy == "" {
		t.Errorf("%+v", i)
	}
	clean(t, root, s)
	// Nothing is spoilt: a small one still fits.
	must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "small", SizeBytes: mib}))(t)
}
