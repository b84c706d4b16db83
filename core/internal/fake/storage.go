package fake

import (
	"context"
	"slices"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storage"
)

// Storage is a storage service in memory.
type Storage struct {
	base
	w *World
}

// Storage is the storage service.
func (w *World) Storage() *Storage { return &Storage{w: w} }

// AddTemplate makes a template.
func (w *World) AddTemplate(id, name string, size uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.templates[id] = storage.Template{ID: id, Name: name, SizeBytes: size, State: storage.StateReady, CreatedAt: now()}
}

// DropAttachments forgets who uses volumes, as a reboot or a lost access list would.
func (w *World) DropAttachments() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, v := range w.volumes {
		v.Attachments = nil
	}
}

func (w *World) volume(ref string) (*storage.Volume, error) {
	if v := w.volumes[ref]; v != nil {
		return v, nil
	}
	for _, v := range w.volumes {
		if v.Name == ref {
			return v, nil
		}
	}
	return nil, notFound("volume", ref)
}

func copyVolume(v *storage.Volume) storage.Volume {
	c := *v
	c.Attachments = slices.Clone(v.Attachments)
	return c
}

func (s *Storage) CreateVolume(ctx context.Context, req storage.CreateVolumeRequest) (storage.Volume, error) {
	return do(ctx, s.w, "storage.CreateVolume", func() (storage.Volume, error) {
		if v := s.w.volumes[req.ID]; v != nil {
			if v.Name == req.Name && (req.SizeBytes == 0 || req.SizeBytes == v.SizeBytes) {
				return copyVolume(v), nil
			}
			return storage.Volume{}, errs.New(errs.Exists, "volume id")
		}
		if _, err := s.w.volume(req.Name); err == nil {
			return storage.Volume{}, errs.New(errs.Exists, "volume %s exists", req.Name)
		}
		v := &storage.Volume{ID: req.ID, Name: req.Name, SizeBytes: req.SizeBytes, State: storage.StateReady, Labels: req.Labels, CreatedAt: now(), BlockSize: 4096}
		switch {
		case req.FromTemplate != "":
			t, ok := s.w.templates[req.FromTemplate]
			if !ok {
				return storage.Volume{}, notFound("template", req.FromTemplate)
			}
			v.OriginType, v.OriginID = "template", t.ID
			v.SizeBytes = max(v.SizeBytes, t.SizeBytes)
		case req.FromSnapshot != "":
			v.OriginType, v.OriginID = "snapshot", req.FromSnapshot
		case req.FromVolume != "":
			v.OriginType, v.OriginID = "volume", req.FromVolume
		}
		s.w.volumes[req.ID] = v
		return copyVolume(v), nil
	})
}

func (s *Storage) GetVolume(ctx context.Context, req storage.Ref) (storage.Volume, error) {
	return do(ctx, s.w, "storage.GetVolume", func() (storage.Volume, error) {
		v, err := s.w.volume(req.Ref)
		if err != nil {
			return storage.Volume{}, err
		}
		return s.w.counted(v), nil
	})
}

func (w *World) counted(v *storage.Volume) storage.Volume {
	c := copyVolume(v)
	for _, s := range w.snapshots {
		if s.VolumeID == v.ID {
			c.SnapshotCount++
		}
	}
	return c
}

func (s *Storage) ListVolumes(ctx context.Context) ([]storage.Volume, error) {
	return do(ctx, s.w, "storage.ListVolumes", func() ([]storage.Volume, error) {
		var out []storage.Volume
		for _, v := range byName(s.w.volumes, func(v *storage.Volume) string { return v.Name }) {
			out = append(out, s.w.counted(v))
		}
		return out, nil
	})
}

func (s *Storage) ResizeVolume(ctx context.Context, req storage.ResizeVolumeRequest) (storage.Volume, error) {
	return do(ctx, s.w, "storage.ResizeVolume", func() (storage.Volume, error) {
		v, err := s.w.volume(req.Ref)
		if err != nil {
			return storage.Volume{}, err
		}
		v.SizeBytes = req.SizeBytes
		return copyVolume(v), nil
	})
}

func (s *Storage) RenameVolume(ctx context.Context, req storage.RenameRequest) (storage.Volume, error) {
	return do(ctx, s.w, "storage.RenameVolume", func() (storage.Volume, error) {
		v, err := s.w.volume(req.Ref)
		if err != nil {
			return storage.Volume{}, err
		}
		v.Name = req.Name
		return copyVolume(v), nil
	})
}

func (s *Storage) DeleteVolume(ctx context.Context, req storage.DeleteVolumeRequest) error {
	return run(ctx, s.w, "storage.DeleteVolume", func() error {
		v, err := s.w.volume(req.Ref)
		if err != nil {
			return nil
		}
		if len(v.Attachments) > 0 {
			return errs.New(errs.Precondition, "volume %s is attached", v.Name).Because("VOLUME_IN_USE")
		}
		if s.w.counted(v).SnapshotCount > 0 && !req.WithSnapshots {
			return errs.New(errs.Precondition, "snapshots").Because("HAS_SNAPSHOTS")
		}
		s.w.snapshots = slices.DeleteFunc(s.w.snapshots, func(o storage.Snapshot) bool { return o.VolumeID == v.ID })
		delete(s.w.volumes, v.ID)
		return nil
	})
}

func (s *Storage) Attach(ctx context.Context, req storage.AttachRequest) (storage.Attachment, error) {
	return do(ctx, s.w, "storage.Attach", func() (storage.Attachment, error) {
		v, err := s.w.volume(req.VolumeID)
		if err != nil {
			return storage.Attachment{}, err
		}
		at := storage.Attachment{Path: "/fake/" + v.ID, Format: storage.FormatRaw, ReadOnly: req.ReadOnly, SizeBytes: v.SizeBytes}
		for _, a := range v.Attachments {
			if a.VMID == req.Owner.VMID {
				return at, nil
			}
			if !a.ReadOnly || !req.ReadOnly {
				return at, errs.New(errs.Precondition, "volume %s is attached to %s", v.Name, a.VMID).Because("VOLUME_IN_USE")
			}
		}
		v.Attachments = append(v.Attachments, storage.AttachmentInfo{VMID: req.Owner.VMID, UID: req.Owner.UID, ReadOnly: req.ReadOnly, Path: at.Path})
		return at, nil
	})
}

func (s *Storage) Detach(ctx context.Context, req storage.DetachRequest) error {
	return run(ctx, s.w, "storage.Detach", func() error {
		if v := s.w.volumes[req.VolumeID]; v != nil {
			for _, a := range v.Attachments {
				if vm := s.w.vms[a.VMID]; a.VMID == req.VMID && vm != nil && vm.State.Live() && slices.Contains(s.w.open(vm), v.ID) {
					return errs.New(errs.Internal, "volume %s is detached while VM %s has it open", v.Name, vm.Spec.Name)
				}
			}
			v.Attachments = slices.DeleteFunc(v.Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == req.VMID })
		}
		return nil
	})
}

func (s *Storage) CreateSnapshot(ctx context.Context, req storage.CreateSnapshotRequest) (storage.Snapshot, error) {
	return do(ctx, s.w, "storage.CreateSnapshot", func() (storage.Snapshot, error) {
		v, err := s.w.volume(req.VolumeID)
		if err != nil {
			return storage.Snapshot{}, err
		}
		for _, o := range s.w.snapshots {
			if o.VolumeID == v.ID && o.Name == req.Name {
				if o.ID == req.ID {
					return o, nil
				}
				return o, errs.New(errs.Exists, "snapshot %s", req.Name)
			}
		}
		sn := storage.Snapshot{ID: req.ID, Name: req.Name, VolumeID: v.ID, VolumeName: v.Name, SizeBytes: v.SizeBytes, CreatedAt: now(), Labels: req.Labels}
		s.w.snapshots = append(s.w.snapshots, sn)
		return sn, nil
	})
}

func (s *Storage) ListSnapshots(ctx context.Context, req storage.ListSnapshotsRequest) ([]storage.Snapshot, error) {
	return do(ctx, s.w, "storage.ListSnapshots", func() ([]storage.Snapshot, error) {
		var out []storage.Snapshot
		for _, o := range s.w.snapshots {
			if req.VolumeID == "" || o.VolumeID == req.VolumeID || o.VolumeName == req.VolumeID {
				out = append(out, o)
			}
		}
		return out, nil
	})
}

func (s *Storage) DeleteSnapshot(ctx context.Context, req storage.Ref) error {
	return run(ctx, s.w, "storage.DeleteSnapshot", func() error {
		s.w.snapshots = slices.DeleteFunc(s.w.snapshots, func(o storage.Snapshot) bool { return o.ID == req.Ref })
		return nil
	})
}

func (s *Storage) Rollback(ctx context.Context, req storage.RollbackRequest) error {
	return run(ctx, s.w, "storage.Rollback", func() error {
		i := slices.IndexFunc(s.w.snapshots, func(o storage.Snapshot) bool { return o.ID == req.SnapshotID })
		if i < 0 {
			return notFound("snapshot", req.SnapshotID)
		}
		v := s.w.volumes[s.w.snapshots[i].VolumeID]
		if len(v.Attachments) > 0 {
			return errs.New(errs.Precondition, "attached").Because("VOLUME_IN_USE")
		}
		at := s.w.snapshots[i]
		newer := func(j int, o storage.Snapshot) bool { return o.VolumeID == at.VolumeID && j > i }
		var keep []storage.Snapshot
		for j, o := range s.w.snapshots {
			if newer(j, o) {
				if !req.DestroyNewer {
					return errs.New(errs.Precondition, "newer: %s", o.Name).Because("NEWER_SNAPSHOTS")
				}
				continue
			}
			keep = append(keep, o)
		}
		s.w.snapshots = keep
		return nil
	})
}

func (s *Storage) StartImport(ctx context.Context, req storage.ImportRequest) (storage.Import, error) {
	return do(ctx, s.w, "storage.StartImport", func() (storage.Import, error) {
		for _, t := range s.w.templates {
			if t.Name == req.Name {
				return storage.Import{}, errs.New(errs.Exists, "template %s", req.Name)
			}
		}
		i := &storage.Import{ID: req.ID, Name: req.Name, Source: req.URL + req.FileName, State: storage.ImportRunning, StartedAt: now()}
		s.w.imports[req.ID] = i
		return *i, nil
	})
}

// EndImport ends an import that was started; state done makes the template.
func (w *World) EndImport(id string, state storage.ImportState, failure string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := w.imports[id]
	i.State, i.Failure, i.EndedAt = state, failure, now()
	if state == storage.ImportFailed {
		i.FailureKind, i.Remedy = uint32(errs.Invalid), "give another image"
	}
	if state == storage.ImportDone {
		w.templates[id] = storage.Template{ID: id, Name: i.Name, SizeBytes: 1 << 20, State: storage.StateReady}
	}
	close(w.logMore)
	w.logMore = make(chan struct{})
}

func (s *Storage) WatchImport(ctx context.Context, req storage.Ref, fn func(storage.Import) error) error {
	if s.w.Gate != nil {
		if err := s.w.Gate(ctx, "storage.WatchImport", false); err != nil {
			return err
		}
	}
	for {
		s.w.mu.Lock()
		i := s.w.imports[req.Ref]
		more := s.w.logMore
		if i == nil {
			s.w.mu.Unlock()
			return notFound("import", req.Ref)
		}
		now := *i
		s.w.mu.Unlock()
		if err := fn(now); err != nil || now.State.Final() {
			return err
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Storage) ListImports(ctx context.Context) ([]storage.Import, error) {
	return do(ctx, s.w, "storage.ListImports", func() ([]storage.Import, error) {
		var out []storage.Import
		for _, i := range byName(s.w.imports, func(i *storage.Import) string { return i.ID }) {
			out = append(out, *i)
		}
		return out, nil
	})
}

func (s *Storage) CancelImport(ctx context.Context, req storage.Ref) error {
	s.w.mu.Lock()
	i := s.w.imports[req.Ref]
	running := i != nil && !i.State.Final()
	s.w.mu.Unlock()
	if running {
		s.w.EndImport(req.Ref, storage.ImportCanceled, "")
	}
	return nil
}

func (s *Storage) CreateTemplate(ctx context.Context, req storage.CreateTemplateRequest) (storage.Template, error) {
	return do(ctx, s.w, "storage.CreateTemplate", func() (storage.Template, error) {
		t := storage.Template{ID: req.ID, Name: req.Name, State: storage.StateReady, CreatedAt: now()}
		s.w.templates[req.ID] = t
		return t, nil
	})
}

func (s *Storage) GetTemplate(ctx context.Context, req storage.Ref) (storage.Template, error) {
	return do(ctx, s.w, "storage.GetTemplate", func() (storage.Template, error) {
		for _, t := range s.w.templates {
			if t.ID == req.Ref || t.Name == req.Ref {
				return t, nil
			}
		}
		return storage.Template{}, notFound("template", req.Ref)
	})
}

func (s *Storage) ListTemplates(ctx context.Context) ([]storage.Template, error) {
	return do(ctx, s.w, "storage.ListTemplates", func() ([]storage.Template, error) {
		return byName(s.w.templates, func(t storage.Template) string { return t.Name }), nil
	})
}

func (s *Storage) RenameTemplate(ctx context.Context, req storage.RenameRequest) (storage.Template, error) {
	return do(ctx, s.w, "storage.RenameTemplate", func() (storage.Template, error) {
		t := s.w.templates[req.Ref]
		t.Name = req.Name
		s.w.templates[req.Ref] = t
		return t, nil
	})
}

func (s *Storage) DeleteTemplate(ctx context.Context, req storage.Ref) error {
	return run(ctx, s.w, "storage.DeleteTemplate", func() error { delete(s.w.templates, req.Ref); return nil })
}

func (s *Storage) Stats(ctx context.Context) (storage.Stats, error) {
	return do(ctx, s.w, "storage.Stats", func() (storage.Stats, error) {
		return storage.Stats{Place: "memory", Volumes: uint32(len(s.w.volumes)), Templates: uint32(len(s.w.templates)), CompressionRatio: 1}, nil
	})
}
