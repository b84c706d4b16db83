// Package kittest is what the tests of storage plugins share: a story with every kind of change in it, to be
// interrupted anywhere and played again.
package kittest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
)

// Story makes every kind of change once, and leaves nothing. Run again after it was interrupted anywhere, it
// comes to the same end: every request in it may be repeated.
type Story struct {
	Service storage.Service
	Image   string // path of an image to import
	Seed    int    // tells the objects of one story from those of another
	// From is the step to go on at, for who repeats only the request that was interrupted; Began is told of each.
	From  int
	Began func(step int)
}

// KillAt is a fail point that kills the process with SIGKILL at the n-th place, once it has printed that place's name,
// and how many places it has passed.
func KillAt(n int64) (fail func(name string), passed *atomic.Int64) {
	passed = new(atomic.Int64)
	return func(name string) {
		if passed.Add(1) == n {
			fmt.Println(name)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}, passed
}

const size = 10 << 20

func (s *Story) id(n int) string { return fmt.Sprintf("01a20e00-0000-7000-8000-%06d%06d", s.Seed, n) }

// Owner is who attaches in the story: a user that is not us, where we may hand out access to one.
func Owner(vm string) service.Owner {
	if os.Geteuid() != 0 {
		return service.Owner{VMID: vm, UID: uint32(os.Geteuid())}
	}
	return service.Owner{VMID: vm, UID: 60001, GID: 60001}
}

// Use attaches a volume, lets fn open it, and detaches it.
func Use(ctx context.Context, s storage.Service, volume, vm string, fn func(f *os.File) error) error {
	a, err := s.Attach(ctx, storage.AttachRequest{VolumeID: volume, Owner: Owner(vm)})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(a.Path, os.O_RDWR, 0)
	if err == nil {
		err = errors.Join(fn(f), f.Sync(), f.Close())
	}
	return errors.Join(err, s.Detach(ctx, storage.DetachRequest{VolumeID: volume, VMID: vm}))
}

// Put writes text into a volume.
func Put(ctx context.Context, s storage.Service, volume, vm, text string) error {
	return Use(ctx, s, volume, vm, func(f *os.File) error {
		_, err := f.WriteAt([]byte(text), 4096)
		return err
	})
}

// Get reads n bytes of what Put wrote.
func Get(ctx context.Context, s storage.Service, volume, vm string, n int) (string, error) {
	b := make([]byte, n)
	err := Use(ctx, s, volume, vm, func(f *os.File) error {
		_, err := f.ReadAt(b, 4096)
		return err
	})
	return string(b), err
}

// Import imports a file and waits for its end.
func Import(ctx context.Context, s storage.Service, id, name, path, checksum string) (storage.Import, error) {
	f, err := os.Open(path)
	if err != nil {
		return storage.Import{}, err
	}
	defer f.Close()
	if _, err := s.StartImport(ctx, storage.ImportRequest{ID: id, Name: name, File: f, FileName: path, Checksum: checksum}); err != nil {
		return storage.Import{}, err
	}
	var last storage.Import
	err = s.WatchImport(ctx, storage.Ref{Ref: id}, func(i storage.Import) error { last = i; return nil })
	if err == nil && last.State != storage.ImportDone {
		err = fmt.Errorf("the import ended in state %d: %s", last.State, last.Failure)
	}
	return last, err
}

// Play plays the story.
func (s *Story) Play(ctx context.Context) error {
	vol, snap1, snap2, clone, template, copied, vm := s.id(1), s.id(2), s.id(3), s.id(4), s.id(5), s.id(6), s.id(7)
	name := func(n string) string { return fmt.Sprintf("%s-%d", n, s.Seed) }
	sv := s.Service
	is := func(id, want string) error {
		got, err := Get(ctx, sv, id, vm, 3)
		if err == nil && got != want {
			err = fmt.Errorf("volume %s holds %q, not %q", id, got, want)
		}
		return err
	}
	// What a run before this one left of the end of the story.
	if t, err := sv.GetTemplate(ctx, storage.Ref{Ref: name("i")}); err == nil {
		if err := sv.DeleteTemplate(ctx, storage.Ref{Ref: t.ID}); err != nil {
			return err
		}
	}
	steps := []func() error{
		func() error {
			_, err := sv.CreateVolume(ctx, storage.CreateVolumeRequest{ID: vol, Name: name("v"), SizeBytes: size})
			return err
		},
		func() error { return sv.Detach(ctx, storage.DetachRequest{VolumeID: vol, VMID: vm}) },
		func() error {
			if got, err := Get(ctx, sv, vol, vm, 3); err != nil || got == "new" {
				return err // a run before this one came further
			}
			return Put(ctx, sv, vol, vm, "old")
		},
		func() error {
			_, err := sv.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: snap1, VolumeID: vol, Name: "s1"})
			return err
		},
		func() error { return Put(ctx, sv, vol, vm, "new") },
		func() error {
			_, err := sv.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: snap2, VolumeID: vol, Name: "s2"})
			return err
		},
		func() error {
			_, err := sv.CreateVolume(ctx, storage.CreateVolumeRequest{ID: clone, Name: name("c"), FromSnapshot: snap1, SizeBytes: 2 * size})
			return errors.Join(err, is(clone, "old"))
		},
		func() error {
			_, err := sv.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: template, Name: name("t"), SnapshotID: snap1})
			return err
		},
		func() error {
			_, err := sv.CreateVolume(ctx, storage.CreateVolumeRequest{ID: copied, Name: name("d"), FromVolume: clone})
			return errors.Join(err, is(copied, "old"))
		},
		func() error {
			_, err := sv.ResizeVolume(ctx, storage.ResizeVolumeRequest{Ref: vol, SizeBytes: 2 * size})
			return err
		},
		func() error {
			_, err := sv.RenameVolume(ctx, storage.RenameRequest{Ref: vol, Name: name("w")})
			return err
		},
		func() error {
			err := sv.Rollback(ctx, storage.RollbackRequest{SnapshotID: snap1, DestroyNewer: true})
			return errors.Join(err, is(vol, "old"))
		},
		func() error { return sv.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: clone}) },
		func() error { return is(copied, "old") },
		func() error { return sv.DeleteSnapshot(ctx, storage.Ref{Ref: snap1}) },
		func() error { return sv.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: copied}) },
		func() error { return sv.DeleteTemplate(ctx, storage.Ref{Ref: template}) },
		func() error {
			id := ident.New()
			if _, err := Import(ctx, sv, id, name("i"), s.Image, ""); err != nil {
				return err
			}
			return sv.DeleteTemplate(ctx, storage.Ref{Ref: id})
		},
		func() error { return sv.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: vol, WithSnapshots: true}) },
	}
	for i, f := range steps {
		if i < s.From {
			continue
		}
		if s.Began != nil {
			s.Began(i)
		}
		if err := f(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}
