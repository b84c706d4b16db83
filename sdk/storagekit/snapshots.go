package storagekit

import (
	"context"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/locks"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// CreateSnapshot takes one. The volume may be attached.
func (s *Service) CreateSnapshot(ctx context.Context, req storage.CreateSnapshotRequest) (storage.Snapshot, error) {
	st, err := s.db(ctx)
	if err != nil {
		return storage.Snapshot{}, err
	}
	if err := ident.CheckID("id", req.ID); err != nil {
		return storage.Snapshot{}, err
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return storage.Snapshot{}, err
	}
	if err := checkLabels(req.Labels); err != nil {
		return storage.Snapshot{}, err
	}
	key := request("snapshot", req)
	if o, ok, err := existing(st, KindSnapshot, req.ID, key); err != nil || ok {
		return s.snapshotOr(ctx, st, o, err)
	}
	vol, err := find(st, KindVolume, req.VolumeID)
	if err != nil {
		return storage.Snapshot{}, err
	}
	unlock, err := s.locks.Lock(ctx, locks.Write(req.ID), locks.Write(vol.ID))
	if err != nil {
		return storage.Snapshot{}, err
	}
	defer unlock()
	if o, ok, err := existing(st, KindSnapshot, req.ID, key); err != nil || ok {
		return s.snapshotOr(ctx, st, o, err)
	}
	if vol, err = find(st, KindVolume, vol.ID); err != nil {
		return storage.Snapshot{}, err
	}
	if err := s.ready(ctx, vol); err != nil {
		return storage.Snapshot{}, err
	}
	release, err := s.reserve(st, KindSnapshot, vol.ID, req.Name, req.ID)
	if err != nil {
		return storage.Snapshot{}, err
	}
	defer release()
	o := Object{Kind: KindSnapshot, ID: req.ID, Name: req.Name, VolumeID: vol.ID, Size: vol.Size, BlockSize: vol.BlockSize,
		OriginType: KindVolume, OriginID: vol.ID, CreatedAt: s.after(st, vol.ID), Labels: req.Labels, Request: key}
	made, err := s.create(ctx, st, o, &vol)
	return s.snapshotOr(ctx, st, made, err)
}

func (s *Service) snapshotOr(ctx context.Context, st *store.Store, o Object, err error) (storage.Snapshot, error) {
	if err != nil {
		return storage.Snapshot{}, err
	}
	l, err := s.snapshots(ctx, st, []Object{o})
	if err != nil {
		return storage.Snapshot{}, err
	}
	return l[0], nil
}

func (s *Service) snapshots(ctx context.Context, st *store.Store, objects []Object) ([]storage.Snapshot, error) {
	facts, err := s.backend.Inspect(ctx, objects)
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err() // other trouble shows in the volumes' state
	}
	out := make([]storage.Snapshot, 0, len(objects))
	for _, o := range objects {
		vol, _ := st.Get(KindVolume, o.VolumeID)
		out = append(out, storage.Snapshot{ID: o.ID, Name: o.Name, VolumeID: o.VolumeID, VolumeName: vol.Name, SizeBytes: o.Size,
			UsedBytes: facts[o.ID].Allocated, CreatedAt: o.CreatedAt, Labels: o.Labels})
	}
	return out, nil
}

// ListSnapshots lists those of one volume, or all.
func (s *Service) ListSnapshots(ctx context.Context, req storage.ListSnapshotsRequest) ([]storage.Snapshot, error) {
	st, err := s.reader(ctx)
	if err != nil {
		return nil, err
	}
	if req.VolumeID == "" {
		return s.snapshots(ctx, st, st.List(KindSnapshot))
	}
	vol, err := find(st, KindVolume, req.VolumeID)
	if err != nil {
		return nil, err
	}
	return s.snapshots(ctx, st, snapshotsOf(st, vol.ID))
}

// findSnapshot takes an id, or VOLUME@SNAPSHOT in names or ids.
func findSnapshot(st *store.Store, ref string) (Object, error) {
	if vol, name, ok := strings.Cut(ref, "@"); ok {
		v, err := find(st, KindVolume, vol)
		if err != nil {
			return Object{}, err
		}
		if o, ok := st.ByName(KindSnapshot, v.ID, name); ok {
			return o, nil
		}
	}
	return find(st, KindSnapshot, ref)
}

// lockedSnapshot takes the lock of the volume, under which its snapshots change, and the snapshot's own, which
// those hold that clone from it.
func (s *Service) lockedSnapshot(ctx context.Context, st *store.Store, ref string) (Object, func(), error) {
	o, err := findSnapshot(st, ref)
	if err != nil {
		return Object{}, nil, err
	}
	unlock, err := s.locks.Lock(ctx, locks.Write(o.VolumeID), locks.Write(o.ID))
	if err != nil {
		return Object{}, nil, err
	}
	now, ok := st.Get(KindSnapshot, o.ID)
	if !ok {
		unlock()
		_, err := find(st, KindSnapshot, o.ID)
		return Object{}, nil, err
	}
	return now, unlock, nil
}

// DeleteSnapshot destroys one.
func (s *Service) DeleteSnapshot(ctx context.Context, req storage.Ref) error {
	st, err := s.db(ctx)
	if err != nil {
		return err
	}
	o, unlock, err := s.lockedSnapshot(ctx, st, req.Ref)
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	return s.remove(ctx, st, o)
}

// removeSnapshot is DeleteSnapshot for who holds the volume's lock.
func (s *Service) removeSnapshot(ctx context.Context, st *store.Store, o Object) error {
	unlock, err := s.locks.Lock(ctx, locks.Write(o.ID))
	if err != nil {
		return err
	}
	defer unlock()
	return s.remove(ctx, st, o)
}

// Rollback makes the volume what it was at the snapshot.
func (s *Service) Rollback(ctx context.Context, req storage.RollbackRequest) error {
	st, err := s.db(ctx)
	if err != nil {
		return err
	}
	snap, unlock, err := s.lockedSnapshot(ctx, st, req.SnapshotID)
	if err != nil {
		return err
	}
	defer unlock()
	vol, ok := st.Get(KindVolume, snap.VolumeID)
	if !ok {
		return errs.New(errs.NotFound, "the snapshot's volume is gone").With(resource(snap))
	}
	if err := detached(vol); err != nil {
		return err
	}
	var newer []Object
	for _, o := range snapshotsOf(st, vol.ID) {
		if o.CreatedAt.After(snap.CreatedAt) {
			newer = append(newer, o)
		}
	}
	if len(newer) > 0 && !req.DestroyNewer {
		return errs.New(errs.Precondition, "newer snapshots would be lost: %s", names(newer)).With(resource(vol)).
			Because("NEWER_SNAPSHOTS").Do("delete them first, or roll back with the destruction of newer snapshots")
	}
	if err := s.ready(ctx, snap); err != nil {
		return err
	}
	i := store.Intent{ID: vol.ID, Op: store.OpPrepare, Object: vol, Snapshot: &snap, Newer: newer}
	s.step("rollback:begin")
	if err := st.Apply(store.Change{Intend: &i}); err != nil {
		return err
	}
	s.step("rollback:intended")
	if err := s.backend.PrepareRollback(ctx, vol, snap, newer); err != nil {
		s.giveUp(ctx, st, i)
		return err
	}
	s.step("rollback:prepared")
	decided := i
	decided.Op = store.OpRollback
	if err := st.Apply(store.Change{Intend: &decided}); err != nil {
		s.giveUp(ctx, st, i)
		return err
	}
	s.step("rollback:decided")
	// From here on it is finished, whatever becomes of the caller.
	ctx = context.WithoutCancel(ctx)
	if err := s.backend.CommitRollback(ctx, vol, snap, newer); err != nil {
		s.unfinished(decided, err)
		return err
	}
	s.step("rollback:committed")
	c := rolledBack(i)
	c.Settle = vol.ID
	if err := st.Apply(c); err != nil {
		return err
	}
	s.step("rollback:done")
	return nil
}

// rolledBack is what the metadata learns of a rollback.
func rolledBack(i store.Intent) store.Change {
	vol := i.Object
	vol.Size = i.Snapshot.Size
	c := store.Change{Put: []Object{vol}}
	for _, o := range i.Newer {
		c.Delete = append(c.Delete, o.ID)
	}
	return c
}
