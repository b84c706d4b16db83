package storagekit

import (
	"context"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/locks"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// CreateTemplate makes a template of a snapshot.
func (s *Service) CreateTemplate(ctx context.Context, req storage.CreateTemplateRequest) (storage.Template, error) {
	st, err := s.db(ctx)
	if err != nil {
		return storage.Template{}, err
	}
	if err := ident.CheckID("id", req.ID); err != nil {
		return storage.Template{}, err
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return storage.Template{}, err
	}
	if err := checkLabels(req.Labels); err != nil {
		return storage.Template{}, err
	}
	key := request("template", req)
	if o, ok, err := existing(st, KindTemplate, req.ID, key); err != nil || ok {
		return s.templateOr(ctx, o, err)
	}
	snap, err := findSnapshot(st, req.SnapshotID)
	if err != nil {
		return storage.Template{}, err
	}
	unlock, err := s.locks.Lock(ctx, locks.Write(req.ID), locks.Read(snap.ID), locks.Read(snap.VolumeID))
	if err != nil {
		return storage.Template{}, err
	}
	defer unlock()
	if o, ok, err := existing(st, KindTemplate, req.ID, key); err != nil || ok {
		return s.templateOr(ctx, o, err)
	}
	if snap, err = find(st, KindSnapshot, snap.ID); err != nil {
		return storage.Template{}, err
	}
	if err := s.ready(ctx, snap); err != nil {
		return storage.Template{}, err
	}
	release, err := s.reserve(st, KindTemplate, "", req.Name, req.ID)
	if err != nil {
		return storage.Template{}, err
	}
	defer release()
	o := Object{Kind: KindTemplate, ID: req.ID, Name: req.Name, Size: snap.Size, BlockSize: snap.BlockSize, OriginType: KindSnapshot,
		OriginID: snap.ID, CreatedAt: s.opts.Clock().UTC(), Labels: req.Labels, Request: key, Source: "snapshot " + snap.Name, Format: "raw"}
	made, err := s.create(ctx, st, o, &snap)
	return s.templateOr(ctx, made, err)
}

func (s *Service) templateOr(ctx context.Context, o Object, err error) (storage.Template, error) {
	if err != nil {
		return storage.Template{}, err
	}
	l, err := s.templates(ctx, []Object{o})
	if err != nil {
		return storage.Template{}, err
	}
	return l[0], nil
}

func (s *Service) templates(ctx context.Context, objects []Object) ([]storage.Template, error) {
	facts, ferr := s.backend.Inspect(ctx, objects)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	out := make([]storage.Template, 0, len(objects))
	for _, o := range objects {
		size, state, reason := judge(o, facts, ferr)
		f := facts[o.ID]
		out = append(out, storage.Template{ID: o.ID, Name: o.Name, SizeBytes: size, AllocatedBytes: f.Allocated, Source: o.Source,
			SourceFormat: o.Format, Checksum: o.Checksum, CreatedAt: o.CreatedAt, State: state, StateReason: reason, Labels: o.Labels,
			CloneCount: f.Clones})
	}
	return out, nil
}

// GetTemplate finds one.
func (s *Service) GetTemplate(ctx context.Context, req storage.Ref) (storage.Template, error) {
	st, err := s.reader(ctx)
	if err != nil {
		return storage.Template{}, err
	}
	o, err := find(st, KindTemplate, req.Ref)
	return s.templateOr(ctx, o, err)
}

// ListTemplates lists all by name.
func (s *Service) ListTemplates(ctx context.Context) ([]storage.Template, error) {
	st, err := s.reader(ctx)
	if err != nil {
		return nil, err
	}
	return s.templates(ctx, st.List(KindTemplate))
}

// RenameTemplate changes the name.
func (s *Service) RenameTemplate(ctx context.Context, req storage.RenameRequest) (storage.Template, error) {
	st, err := s.db(ctx)
	if err != nil {
		return storage.Template{}, err
	}
	o, err := s.rename(ctx, st, KindTemplate, req)
	return s.templateOr(ctx, o, err)
}

// DeleteTemplate destroys one; its clones live on.
func (s *Service) DeleteTemplate(ctx context.Context, req storage.Ref) error {
	st, err := s.db(ctx)
	if err != nil {
		return err
	}
	o, unlock, err := s.locked(ctx, st, KindTemplate, req.Ref)
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	return s.remove(ctx, st, o)
}

// after is the time now, but later than all snapshots of the volume: their order is that of their times.
func (s *Service) after(st *store.Store, volumeID string) time.Time {
	now := s.opts.Clock().UTC()
	for _, o := range snapshotsOf(st, volumeID) {
		if !now.After(o.CreatedAt) {
			now = o.CreatedAt.Add(time.Nanosecond)
		}
	}
	return now
}

// Stats says how full the place is.
func (s *Service) Stats(ctx context.Context) (storage.Stats, error) {
	st, err := s.reader(ctx)
	if err != nil {
		return storage.Stats{}, err
	}
	sp, err := s.backend.Space(ctx)
	if err != nil {
		return storage.Stats{}, err
	}
	out := storage.Stats{Place: sp.Place, TotalBytes: sp.Total, AvailableBytes: sp.Available, UsedBytes: sp.Used,
		CompressionRatio: sp.Compression, Reflink: sp.Reflink}
	for _, v := range st.List(KindVolume) {
		out.Volumes++
		out.ProvisionedBytes += v.Size
	}
	out.Templates, out.Snapshots = uint32(len(st.List(KindTemplate))), uint32(len(st.List(KindSnapshot)))
	return out, nil
}
