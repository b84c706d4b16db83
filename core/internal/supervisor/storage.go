package supervisor

import (
	"context"

	"github.com/mvirt/mvirt/sdk/storage"
)

type storageProxy struct{ proxy }

func (p storageProxy) CreateVolume(ctx context.Context, req storage.CreateVolumeRequest) (storage.Volume, error) {
	return unary(ctx, p.proxy, method{op: "storage.CreateVolume"}, storage.Service.CreateVolume, req)
}

func (p storageProxy) GetVolume(ctx context.Context, req storage.Ref) (storage.Volume, error) {
	return unary(ctx, p.proxy, method{op: "storage.GetVolume"}, storage.Service.GetVolume, req)
}

func (p storageProxy) ListVolumes(ctx context.Context) ([]storage.Volume, error) {
	return unary0(ctx, p.proxy, method{op: "storage.ListVolumes"}, storage.Service.ListVolumes)
}

func (p storageProxy) ResizeVolume(ctx context.Context, req storage.ResizeVolumeRequest) (storage.Volume, error) {
	return unary(ctx, p.proxy, method{op: "storage.ResizeVolume"}, storage.Service.ResizeVolume, req)
}

func (p storageProxy) RenameVolume(ctx context.Context, req storage.RenameRequest) (storage.Volume, error) {
	return unary(ctx, p.proxy, method{op: "storage.RenameVolume"}, storage.Service.RenameVolume, req)
}

func (p storageProxy) DeleteVolume(ctx context.Context, req storage.DeleteVolumeRequest) error {
	return command(ctx, p.proxy, method{op: "storage.DeleteVolume"}, storage.Service.DeleteVolume, req)
}

func (p storageProxy) Attach(ctx context.Context, req storage.AttachRequest) (storage.Attachment, error) {
	return unary(ctx, p.proxy, method{op: "storage.Attach"}, storage.Service.Attach, req)
}

func (p storageProxy) Detach(ctx context.Context, req storage.DetachRequest) error {
	return command(ctx, p.proxy, method{op: "storage.Detach"}, storage.Service.Detach, req)
}

func (p storageProxy) CreateSnapshot(ctx context.Context, req storage.CreateSnapshotRequest) (storage.Snapshot, error) {
	return unary(ctx, p.proxy, method{op: "storage.CreateSnapshot"}, storage.Service.CreateSnapshot, req)
}

func (p storageProxy) ListSnapshots(ctx context.Context, req storage.ListSnapshotsRequest) ([]storage.Snapshot, error) {
	return unary(ctx, p.proxy, method{op: "storage.ListSnapshots"}, storage.Service.ListSnapshots, req)
}

func (p storageProxy) DeleteSnapshot(ctx context.Context, req storage.Ref) error {
	return command(ctx, p.proxy, method{op: "storage.DeleteSnapshot"}, storage.Service.DeleteSnapshot, req)
}

func (p storageProxy) Rollback(ctx context.Context, req storage.RollbackRequest) error {
	return command(ctx, p.proxy, method{op: "storage.Rollback"}, storage.Service.Rollback, req)
}

func (p storageProxy) StartImport(ctx context.Context, req storage.ImportRequest) (storage.Import, error) {
	return unary(ctx, p.proxy, method{op: "storage.StartImport", once: req.File != nil}, storage.Service.StartImport, req)
}

func (p storageProxy) WatchImport(ctx context.Context, req storage.Ref, fn func(storage.Import) error) error {
	return server(ctx, p.proxy, method{op: "storage.WatchImport"}, fn, func(ctx context.Context, s storage.Service, fn func(storage.Import) error) error {
		return s.WatchImport(ctx, req, fn)
	})
}

func (p storageProxy) ListImports(ctx context.Context) ([]storage.Import, error) {
	return unary0(ctx, p.proxy, method{op: "storage.ListImports"}, storage.Service.ListImports)
}

func (p storageProxy) CancelImport(ctx context.Context, req storage.Ref) error {
	return command(ctx, p.proxy, method{op: "storage.CancelImport"}, storage.Service.CancelImport, req)
}

func (p storageProxy) CreateTemplate(ctx context.Context, req storage.CreateTemplateRequest) (storage.Template, error) {
	return unary(ctx, p.proxy, method{op: "storage.CreateTemplate"}, storage.Service.CreateTemplate, req)
}

func (p storageProxy) GetTemplate(ctx context.Context, req storage.Ref) (storage.Template, error) {
	return unary(ctx, p.proxy, method{op: "storage.GetTemplate"}, storage.Service.GetTemplate, req)
}

func (p storageProxy) ListTemplates(ctx context.Context) ([]storage.Template, error) {
	return unary0(ctx, p.proxy, method{op: "storage.ListTemplates"}, storage.Service.ListTemplates)
}

func (p storageProxy) RenameTemplate(ctx context.Context, req storage.RenameRequest) (storage.Template, error) {
	return unary(ctx, p.proxy, method{op: "storage.RenameTemplate"}, storage.Service.RenameTemplate, req)
}

func (p storageProxy) DeleteTemplate(ctx context.Context, req storage.Ref) error {
	return command(ctx, p.proxy, method{op: "storage.DeleteTemplate"}, storage.Service.DeleteTemplate, req)
}

func (p storageProxy) Stats(ctx context.Context) (storage.Stats, error) {
	return unary0(ctx, p.proxy, method{op: "storage.Stats"}, storage.Service.Stats)
}
