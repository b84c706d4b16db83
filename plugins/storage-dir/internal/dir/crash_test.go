package dir

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

// The objects of the story that is interrupted.
const (
	storyVolume   = "01a20e00-0000-7000-8000-000000000001"
	storySnap1    = "01a20e00-0000-7000-8000-000000000002"
	storySnap2    = "01a20e00-0000-7000-8000-000000000003"
	storyClone    = "01a20e00-0000-7000-8000-000000000004"
	storyTemplate = "01a20e00-0000-7000-8000-000000000005"
	storyVM       = "01a20e00-0000-7000-8000-000000000006"
)

// story makes every kind of change once. Run again after it was interrupted anywhere, it comes to the same
// end: every request in it may be repeated.
func story(ctx context.Context, root, image string, s *storagekit.Service) error {
	put := func(text string) error {
		f, err := os.OpenFile(file(root, storyVolume), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte(text), 4096)
		return err
	}
	get := func(id string) string {
		b := make([]byte, 3)
		f, err := os.Open(file(root, id))
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		f.ReadAt(b, 4096)
		return string(b)
	}
	attach := storage.AttachRequest{VolumeID: storyVolume, Owner: service.Owner{VMID: storyVM, UID: 60001}}
	if os.Geteuid() != 0 {
		attach.Owner.UID = uint32(os.Geteuid())
	}
	steps := []func() error{
		func() error {
			_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: storyVolume, Name: "v", SizeBytes: 10 * mib})
			return err
		},
		func() error { return s.Detach(ctx, storage.DetachRequest{VolumeID: storyVolume, VMID: storyVM}) },
		func() error {
			if _, err := s.GetVolume(ctx, storage.Ref{Ref: storyVolume}); err != nil || get(storyVolume) == "new" {
				return err // a run before this one came further
			}
			return put("old")
		},
		func() error {
			_, err := s.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: storySnap1, VolumeID: storyVolume, Name: "s1"})
			return err
		},
		func() error { return put("new") },
		func() error {
			_, err := s.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: storySnap2, VolumeID: storyVolume, Name: "s2"})
			return err
		},
		func() error {
			_, err := s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: storyClone, Name: "c", FromSnapshot: storySnap1})
			if err == nil && get(storyClone) != "old" {
				err = fmt.Errorf("the clone holds %q", get(storyClone))
			}
			return err
		},
		func() error {
			_, err := s.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: storyTemplate, Name: "t", SnapshotID: storySnap1})
			return err
		},
		func() error {
			_, err := s.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: storyVolume, SizeBytes: 20 * mib})
			return err
		},
		func() error {
			_, err := s.RenameVolume(ctx, storage.RenameRequest{Ref: storyVolume, Name: "w"})
			return err
		},
		func() error { _, err := s.Attach(ctx, attach); return err },
		func() error { return s.Detach(ctx, storage.DetachRequest{VolumeID: storyVolume, VMID: storyVM}) },
		func() error {
			err := s.Rollback(ctx, storage.RollbackRequest{SnapshotID: storySnap1, DestroyNewer: true})
			if err == nil && get(storyVolume) != "old" {
				err = fmt.Errorf("after the rollback the volume holds %q", get(storyVolume))
			}
			return err
		},
		func() error { return s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: storyClone}) },
		func() error { return s.DeleteTemplate(ctx, storage.Ref{Ref: storyTemplate}) },
		func() error {
			f, err := os.Open(image)
			if err != nil {
				return err
			}
			defer f.Close()
			id := ident.New()
			if _, err := s.StartImport(ctx, storage.ImportRequest{ID: id, Name: "i", File: f, FileName: "i"}); err != nil {
				return err
			}
			var last storage.Import
			if err := s.WatchImport(ctx, storage.Ref{Ref: id}, func(i storage.Import) error { last = i; return nil }); err != nil {
				return err
			}
			if last.State != storage.ImportDone {
				return errors.New(last.Failure)
			}
			return s.DeleteTemplate(ctx, storage.Ref{Ref: id})
		},
		func() error {
			return s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: storyVolume, WithSnapshots: true})
		},
	}
	// What a run before this one left of the end of the story.
	if t, err := s.GetTemplate(ctx, storage.Ref{Ref: "i"}); err == nil {
		if err := s.DeleteTemplate(ctx, storage.Ref{Ref: t.ID}); err != nil {
			return err
		}
	}
	for i, f := range steps {
		if err := f(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// crashChild plays the story and kills itself at the n-th fail point.
func crashChild(args []string) int {
	n, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return 3
	}
	var passed atomic.Int64
	o := options()
	o.FailPoint = func(name string) {
		if passed.Add(1) == n {
			fmt.Println(name)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	b, err := New(args[0], o.FailPoint)
	if err != nil {
		return 3
	}
	s, err := storagekit.Open(ctx, b, o)
	if err != nil {
		fmt.Println(err)
		return 3
	}
	if err := story(ctx, args[0], args[1], s); err != nil {
		fmt.Println(err)
		return 2
	}
	if err := s.Shutdown(ctx); err != nil {
		return 3
	}
	return 0
}

// TestKillAtEveryStep kills the process with SIGKILL between any two steps of any change, and looks: after a
// restart nothing is left over, nothing is missing, nothing is damaged, and the story can be played to its end.
func TestKillAtEveryStep(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, noise(3*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	for n := 1; ; n++ {
		root := filepath.Join(t.TempDir(), "data")
		cmd := exec.Command("/proc/self/exe", "crash-child", root, image, strconv.Itoa(n))
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Logf("%d places", n-1)
			if n < 60 {
				t.Errorf("only %d places: the fail points are gone", n-1)
			}
			return
		}
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
			t.Fatalf("place %d: %v: %s", n, err, out)
		}
		s := open(t, root, options())
		if c := conditions(t, s); len(c) > 0 {
			t.Errorf("killed at %s: %+v", out, c)
		}
		for _, v := range must(s.ListVolumes(t.Context()))(t) {
			if v.State != storage.StateReady {
				t.Errorf("killed at %s: %s is damaged: %s", out, v.Name, v.StateReason)
			}
		}
		for _, i := range must(s.ListImports(t.Context()))(t) {
			await(t, s, i.ID)
		}
		clean(t, root, s)
		if err := story(t.Context(), root, image, s); err != nil {
			t.Errorf("killed at %s: the story cannot go on: %v", out, err)
		}
		clean(t, root, s)
		if l := must(s.ListVolumes(t.Context()))(t); len(l) != 0 {
			t.Errorf("killed at %s: %+v is left", out, l)
		}
		shut(t, s)
		if t.Failed() {
			return
		}
	}
}
