package api

import (
	"context"
	"fmt"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// maxVolume is beyond what file systems and pools hold (8 EiB): sizes above are mistakes.
const maxVolume = 1 << 62

type volumesAPI struct {
	apiv1.UnimplementedVolumesServer
	*Server
}

func checkVolumeSize(field string, size uint64) error {
	if size%512 != 0 || size > maxVolume {
		return errs.Field(field, "give a multiple of 512", "%d bytes are not a size for a volume", size)
	}
	return nil
}

func checkSource(field, source string, have, want uint64) error {
	if want != 0 && want < have {
		return errs.Field(field, fmt.Sprintf("give at least %d, or nothing for the same size", have), "%d bytes are less than the %d of %s", want, have, source)
	}
	return nil
}

func usersOf(vms []vmm.VM, volumeID string) (out []vmm.VM) {
	for _, vm := range vms {
		for _, d := range vm.Spec.Disks {
			if d.VolumeID == volumeID {
				out = append(out, vm)
			}
		}
	}
	return out
}

func (a *volumesAPI) after(ctx context.Context, id string, op operation.Operation, err error) (*apiv1.Volume, error) {
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	v, err := a.storage.GetVolume(ctx, storage.Ref{Ref: id})
	if err != nil {
		return nil, err
	}
	return convert.Volume(v, usersOf(a.lookup.vms(ctx), id)), nil
}

func (a *volumesAPI) List(ctx context.Context, _ *apiv1.ListVolumesRequest) (*apiv1.ListVolumesResponse, error) {
	found := make(chan map[string][]vmm.VM, 1)
	go func() {
		users := map[string][]vmm.VM{}
		for _, vm := range a.lookup.vms(ctx) {
			for _, d := range vm.Spec.Disks {
				users[d.VolumeID] = append(users[d.VolumeID], vm)
			}
		}
		found <- users
	}()
	vols, err := a.storage.ListVolumes(ctx)
	if err != nil {
		return nil, err
	}
	users := <-found
	out := &apiv1.ListVolumesResponse{}
	for _, v := range vols {
		out.Volumes = append(out.Volumes, convert.Volume(v, users[v.ID]))
	}
	return out, nil
}

func (a *volumesAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.Volume, error) {
	v, err := a.findVolume(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	return convert.Volume(v, usersOf(a.lookup.vms(ctx), v.ID)), nil
}

func (a *volumesAPI) Create(ctx context.Context, req *apiv1.CreateVolumeRequest) (*apiv1.Volume, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := checkVolumeSize("size_bytes", req.GetSizeBytes()); err != nil {
		return nil, err
	}
	if err := checkLabels(req.GetLabels()); err != nil {
		return nil, err
	}
	create := storage.CreateVolumeRequest{ID: id, Name: req.GetName(), SizeBytes: req.GetSizeBytes(), BlockSize: req.GetBlockSize(), Labels: req.GetLabels()}
	given := 0
	if req.GetTemplate() != "" {
		given++
		t, err := a.findTemplate(ctx, "template", req.GetTemplate())
		if err != nil {
			return nil, err
		}
		if err := checkSource("size_bytes", "template "+t.Name, t.SizeBytes, create.SizeBytes); err != nil {
			return nil, err
		}
		create.FromTemplate = t.ID
	}
	if req.GetSnapshot() != "" {
		given++
		s, err := a.findSnapshot(ctx, "snapshot", req.GetSnapshot())
		if err != nil {
			return nil, err
		}
		if err := checkSource("size_bytes", "snapshot "+s.VolumeName+"@"+s.Name, s.SizeBytes, create.SizeBytes); err != nil {
			return nil, err
		}
		create.FromSnapshot = s.ID
	}
	if req.GetVolume() != "" {
		given++
		v, err := a.findVolume(ctx, "volume", req.GetVolume())
		if err != nil {
			return nil, err
		}
		if err := checkSource("size_bytes", "volume "+v.Name, v.SizeBytes, create.SizeBytes); err != nil {
			return nil, err
		}
		create.FromVolume = v.ID
	}
	switch {
	case given > 1:
		return nil, errs.Field("template", "give one of template, snapshot and volume", "a volume has more than one source")
	case given == 0 && create.SizeBytes == 0:
		return nil, errs.Field("size_bytes", "give a size, or what to clone", "an empty volume needs a size")
	}
	call, err := a.again(ctx, "volume", req.GetId(), func(ctx context.Context) error { _, err := a.storage.GetVolume(ctx, storage.Ref{Ref: id}); return err })
	if err != nil {
		return nil, err
	}
	op, err := a.changes.CreateVolume(ctx, call, create)
	return a.after(ctx, id, op, err)
}

func (a *volumesAPI) Resize(ctx context.Context, req *apiv1.ResizeVolumeRequest) (*apiv1.Volume, error) {
	v, err := a.findVolume(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	if err := checkVolumeSize("size_bytes", req.GetSizeBytes()); err != nil {
		return nil, err
	}
	op, err := a.changes.ResizeVolume(ctx, a.call(ctx), v, req.GetSizeBytes())
	return a.after(ctx, v.ID, op, err)
}

func (a *volumesAPI) Rename(ctx context.Context, req *apiv1.RenameRequest) (*apiv1.Volume, error) {
	v, err := a.findVolume(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	op, err := a.changes.RenameVolume(ctx, a.call(ctx), v, req.GetName())
	return a.after(ctx, v.ID, op, err)
}

func (a *volumesAPI) Delete(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	v, err := a.findVolume(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	op, removed, err := a.changes.DeleteVolume(ctx, a.call(ctx), v.ID, req.GetRecursive(), req.GetDryRun())
	return deleted(ctx, op, removed, err)
}

func deleted(ctx context.Context, op operation.Operation, removed []string, err error) (*apiv1.DeleteResponse, error) {
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return &apiv1.DeleteResponse{Removed: removed}, nil
}

type snapshotsAPI struct {
	apiv1.UnimplementedSnapshotsServer
	*Server
}

func (a *snapshotsAPI) List(ctx context.Context, req *apiv1.ListSnapshotsRequest) (*apiv1.ListSnapshotsResponse, error) {
	id := ""
	if req.GetVolume() != "" {
		v, err := a.findVolume(ctx, "volume", req.GetVolume())
		if err != nil {
			return nil, err
		}
		id = v.ID
	}
	all, err := a.storage.ListSnapshots(ctx, storage.ListSnapshotsRequest{VolumeID: id})
	if err != nil {
		return nil, err
	}
	out := &apiv1.ListSnapshotsResponse{}
	for _, s := range all {
		out.Snapshots = append(out.Snapshots, convert.Snapshot(s))
	}
	return out, nil
}

func (a *snapshotsAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.Snapshot, error) {
	s, err := a.findSnapshot(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	return convert.Snapshot(s), nil
}

func (a *snapshotsAPI) Create(ctx context.Context, req *apiv1.CreateSnapshotRequest) (*apiv1.Snapshot, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := checkLabels(req.GetLabels()); err != nil {
		return nil, err
	}
	v, err := a.findVolume(ctx, "volume", req.GetVolume())
	if err != nil {
		return nil, err
	}
	create := storage.CreateSnapshotRequest{ID: id, VolumeID: v.ID, Name: req.GetName(), Labels: req.GetLabels()}
	call, err := a.again(ctx, "snapshot", req.GetId(), func(ctx context.Context) error { _, err := a.findSnapshot(ctx, "id", id); return err })
	if err != nil {
		return nil, err
	}
	op, err := a.changes.CreateSnapshot(ctx, call, v, create)
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return a.Get(ctx, &apiv1.RefRequest{Ref: id})
}

func (a *snapshotsAPI) Rollback(ctx context.Context, req *apiv1.RollbackRequest) (*apiv1.Volume, error) {
	s, err := a.findSnapshot(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	op, _, err := a.changes.Rollback(ctx, a.call(ctx), s, req.GetDestroyNewer(), req.GetDryRun())
	return (&volumesAPI{Server: a.Server}).after(ctx, s.VolumeID, op, err)
}

func (a *snapshotsAPI) Delete(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	s, err := a.findSnapshot(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	removed := []string{"snapshot " + s.VolumeName + "@" + s.Name}
	if req.GetDryRun() {
		return &apiv1.DeleteResponse{Removed: removed}, nil
	}
	op, err := a.changes.DeleteSnapshot(ctx, a.call(ctx), s)
	return deleted(ctx, op, removed, err)
}
