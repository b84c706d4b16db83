package plan

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

type attachVolume struct {
	VMID     string
	VolumeID string
	ReadOnly bool
	// ForStart: it is for a start of the VM. Undone, it stays if the VM lives all the same: then somebody else
	// started it, and what it uses must not be taken from it.
	ForStart bool `json:",omitempty"`
}

func (a actions) storage() map[string]operation.Action {
	s := a.svc.Storage
	return map[string]operation.Action{
		"storage.create_volume": operation.Typed(
			func(ctx context.Context, _ *operation.Run, req storage.CreateVolumeRequest) error {
				_, err := s.CreateVolume(ctx, req)
				return err
			},
			func(ctx context.Context, _ *operation.Run, req storage.CreateVolumeRequest) error {
				return gone(s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: req.ID, WithSnapshots: true}))
			},
			func(ctx context.Context, _ *operation.Run, req storage.CreateVolumeRequest) (bool, error) {
				_, err := s.GetVolume(ctx, storage.Ref{Ref: req.ID})
				return found(err)
			}),
		"storage.attach": operation.Typed(a.attachVolume,
			func(ctx context.Context, _ *operation.Run, at attachVolume) error {
				if lives, err := a.lives(ctx, at.ForStart, at.VMID); lives || err != nil {
					return err
				}
				return gone(s.Detach(ctx, storage.DetachRequest{VolumeID: at.VolumeID, VMID: at.VMID}))
			}, nil),
		"storage.detach":          doneGone(s.Detach),
		"storage.delete_volume":   doneGone(s.DeleteVolume),
		"storage.resize_volume":   done(s.ResizeVolume),
		"storage.rename_volume":   done(s.RenameVolume),
		"storage.rollback":        doneErr(s.Rollback),
		"storage.delete_snapshot": doneGone(s.DeleteSnapshot),
		"storage.create_snapshot": operation.Typed(
			func(ctx context.Context, _ *operation.Run, req storage.CreateSnapshotRequest) error {
				_, err := s.CreateSnapshot(ctx, req)
				return err
			},
			func(ctx context.Context, _ *operation.Run, req storage.CreateSnapshotRequest) error {
				return gone(s.DeleteSnapshot(ctx, storage.Ref{Ref: req.ID}))
			},
			func(ctx context.Context, _ *operation.Run, req storage.CreateSnapshotRequest) (bool, error) {
				all, err := s.ListSnapshots(ctx, storage.ListSnapshotsRequest{VolumeID: req.VolumeID})
				for _, snap := range all {
					if snap.ID == req.ID {
						return true, nil
					}
				}
				return false, gone(err)
			}),
		"storage.create_template": operation.Typed(
			func(ctx context.Context, _ *operation.Run, req storage.CreateTemplateRequest) error {
				_, err := s.CreateTemplate(ctx, req)
				return err
			},
			func(ctx context.Context, _ *operation.Run, req storage.CreateTemplateRequest) error {
				return gone(s.DeleteTemplate(ctx, storage.Ref{Ref: req.ID}))
			},
			func(ctx context.Context, _ *operation.Run, req storage.CreateTemplateRequest) (bool, error) {
				_, err := s.GetTemplate(ctx, storage.Ref{Ref: req.ID})
				return found(err)
			}),
		"storage.rename_template": done(s.RenameTemplate),
		"storage.delete_template": doneGone(s.DeleteTemplate),
		"storage.import":          operation.Typed(a.doImport, nil, nil),
	}
}

// attachVolume lets the VM's hypervisor open the volume and keeps where it is for vmm.start or a hot-plug.
func (a actions) attachVolume(ctx context.Context, r *operation.Run, at attachVolume) error {
	owner, err := a.owner(ctx, r, at.VMID)
	if err != nil {
		return err
	}
	where, err := a.svc.Storage.Attach(ctx, storage.AttachRequest{VolumeID: at.VolumeID, Owner: owner, ReadOnly: at.ReadOnly})
	if err != nil {
		return err
	}
	r.Set("volume:"+at.VolumeID, where)
	return nil
}

// lives tells, if asked, whether a VM has a process.
func (a actions) lives(ctx context.Context, ask bool, vmID string) (bool, error) {
	if !ask {
		return false, nil
	}
	vm, err := a.svc.VMM.Get(ctx, vmm.Ref{Ref: vmID})
	return vm.State.Live(), gone(err)
}

// owner is the identity of a VM's hypervisor.
func (a actions) owner(ctx context.Context, r *operation.Run, vmID string) (service.Owner, error) {
	if o, ok := operation.Value[service.Owner](r, "owner:"+vmID); ok {
		return o, nil
	}
	vm, err := a.svc.VMM.Get(ctx, vmm.Ref{Ref: vmID})
	if err != nil {
		return service.Owner{}, err
	}
	o := service.Owner{VMID: vm.ID, UID: vm.RunAs.UID, GID: vm.RunAs.GID}
	r.Set("owner:"+vmID, o)
	return o, nil
}

// importFile is the key of the *os.File to import from.
const importFile = "import-file"

// doImport starts an import and follows it to its end. It may be cancelled until then. After a crash of the
// core it follows what the storage plugin still knows.
func (a actions) doImport(ctx context.Context, r *operation.Run, req storage.ImportRequest) error {
	s := a.svc.Storage
	if r.Recovered {
		if ok, err := found(second(s.GetTemplate(ctx, storage.Ref{Ref: req.ID}))); ok || err != nil {
			return err
		}
	} else {
		f, _ := operation.Value[*os.File](r, importFile)
		req.File = f
		if _, err := s.StartImport(ctx, req); err != nil {
			return err
		}
	}
	var last storage.Import
	var err error
	for {
		err = s.WatchImport(ctx, storage.Ref{Ref: req.ID}, func(i storage.Import) error {
			last = i
			r.Progress("import: "+i.Progress.Phase, i.Progress.Done, i.Progress.Total)
			return nil
		})
		if ctx.Err() != nil || !errors.Is(err, errs.Unavailable) {
			break
		}
		r.Progress("import: waiting for the storage plugin", last.Progress.Done, last.Progress.Total) // which may take it up again
		sleep(ctx, importRetry)
	}
	switch {
	case ctx.Err() != nil:
		if cerr := s.CancelImport(context.WithoutCancel(ctx), storage.Ref{Ref: req.ID}); cerr != nil {
			return errors.Join(context.Cause(ctx), cerr)
		}
		return errs.Wrap(errs.Canceled, context.Cause(ctx), "import %s", req.Name)
	case errors.Is(err, errs.NotFound):
		if ok, gerr := found(second(s.GetTemplate(ctx, storage.Ref{Ref: req.ID}))); ok || gerr != nil {
			return gerr
		}
		return errs.New(errs.Internal, "the core or the storage plugin ended in the middle of the import, and it is not known any more").
			Because("CORE_ENDED").Do("import it again")
	case err != nil:
		return err
	}
	switch last.State {
	case storage.ImportDone:
		return nil
	case storage.ImportCanceled:
		return errs.New(errs.Canceled, "the import was cancelled")
	}
	kind := errs.Kind(last.FailureKind)
	if kind == errs.Unavailable || kind == errs.Unknown {
		kind = errs.Precondition // the server of the image is away, not the plugin: this try is over
	}
	return &errs.Error{Kind: kind, Message: last.Failure, Remedy: last.Remedy, Resource: errs.Resource{Type: "template", ID: req.ID, Name: req.Name}}
}

// importRetry is how long to wait for a storage plugin that went away during an import.
const importRetry = 500 * time.Millisecond

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func second[T any](_ T, err error) error { return err }
