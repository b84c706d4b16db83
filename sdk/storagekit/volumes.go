package storagekit

import (
	"context"
	"fmt"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/locks"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// sector is the smallest unit of a disk.
const sector = 512

// find resolves a reference to an object of a kind.
func find(st *store.Store, kind, ref string) (Object, error) {
	if ident.CheckID("ref", ref) == nil {
		if o, ok := st.Get(kind, ref); ok {
			return o, nil
		}
	} else if o, ok := st.ByName(kind, "", ref); ok {
		return o, nil
	}
	if ref == "" {
		return Object{}, errs.Field("ref", "give a name or an id", "no %s is named", kind)
	}
	return Object{}, errs.New(errs.NotFound, "no %s %s", kind, ident.Quote(ref)).
		With(errs.Resource{Type: kind, Name: ref}).Because("NOT_FOUND").Do("list what there is")
}

// locked finds an object and takes its lock; the object is as it is under the lock.
func (s *Service) locked(ctx context.Context, st *store.Store, kind, ref string) (Object, func(), error) {
	o, err := find(st, kind, ref)
	if err != nil {
		return Object{}, nil, err
	}
	unlock, err := s.locks.Lock(ctx, locks.Write(o.ID))
	if err != nil {
		return Object{}, nil, err
	}
	now, ok := st.Get(kind, o.ID)
	if !ok {
		unlock()
		_, err := find(st, kind, o.ID)
		return Object{}, nil, err
	}
	return now, unlock, nil
}

// CreateVolume makes a volume.
func (s *Service) CreateVolume(ctx context.Context, req storage.CreateVolumeRequest) (storage.Volume, error) {
	st, err := s.db(ctx)
	if err != nil {
		return storage.Volume{}, err
	}
	kind, ref, err := checkCreateVolume(req)
	if err != nil {
		return storage.Volume{}, err
	}
	key := request("volume", req)
	if o, ok, err := existing(st, KindVolume, req.ID, key); err != nil || ok {
		return s.volumeOr(ctx, st, o, err)
	}
	var from *Object
	if kind != "" {
		src, err := find(st, kind, ref)
		if err != nil {
			return storage.Volume{}, err
		}
		from = &src
	}
	wants := []locks.Want{locks.Write(req.ID)}
	if from != nil {
		wants = append(wants, locks.Read(from.ID), locks.Read(from.VolumeID))
	}
	unlock, err := s.locks.Lock(ctx, wants...)
	if err != nil {
		return storage.Volume{}, err
	}
	defer unlock()
	if o, ok, err := existing(st, KindVolume, req.ID, key); err != nil || ok {
		return s.volumeOr(ctx, st, o, err)
	}
	o := Object{Kind: KindVolume, ID: req.ID, Name: req.Name, Size: req.SizeBytes, BlockSize: req.BlockSize,
		CreatedAt: s.opts.Clock().UTC(), Labels: req.Labels, Request: key}
	if from != nil {
		src, ok := st.Get(from.Kind, from.ID)
		if !ok {
			_, err := find(st, from.Kind, from.ID)
			return storage.Volume{}, err
		}
		if err := fit(&o, src); err != nil {
			return storage.Volume{}, err
		}
		from, o.OriginType, o.OriginID = &src, src.Kind, src.ID
	}
	release, err := s.reserve(st, KindVolume, "", req.Name, req.ID)
	if err != nil {
		return storage.Volume{}, err
	}
	defer release()
	made, err := s.create(ctx, st, o, from)
	return s.volumeOr(ctx, st, made, err)
}

// checkCreateVolume judges the request and says what the source is, if there is one.
func checkCreateVolume(req storage.CreateVolumeRequest) (kind, ref string, err error) {
	if err := ident.CheckID("id", req.ID); err != nil {
		return "", "", err
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return "", "", err
	}
	if err := checkLabels(req.Labels); err != nil {
		return "", "", err
	}
	if err := checkSize(req.SizeBytes); err != nil {
		return "", "", err
	}
	if b := req.BlockSize; b != 0 && (b < sector || b > 1<<20 || b&(b-1) != 0) {
		return "", "", errs.Field("block_size", "use a power of two from 512 to 1048576, or 0", "block_size is %d", b)
	}
	var field string
	n := 0
	for _, src := range []struct{ kind, ref, field string }{
		{KindTemplate, req.FromTemplate, "from_template"},
		{KindSnapshot, req.FromSnapshot, "from_snapshot"},
		{KindVolume, req.FromVolume, "from_volume"},
	} {
		if src.ref != "" {
			n++
			kind, ref, field = src.kind, src.ref, src.field
		}
	}
	switch {
	case n > 1:
		return "", "", errs.Field(field, "name one source", "more than one source is named")
	case n == 0 && req.SizeBytes == 0:
		return "", "", errs.Field("size_bytes", "give a size such as 10 GiB, or a source", "the volume has neither size nor source")
	}
	return kind, ref, nil
}

// maxSize keeps sizes within what ZFS and ext4 count in signed 64-bit numbers, with room to round up.
const maxSize = 1 << 60

func checkSize(size uint64) error {
	switch {
	case size%sector != 0:
		return errs.Field("size_bytes", "use a multiple of 512", "size_bytes is %d", size)
	case size > maxSize:
		return errs.Field("size_bytes", "use at most 1 EiB", "size_bytes is %d", size)
	}
	return nil
}

// fit gives o the size of its source, or checks that it is not smaller.
func fit(o *Object, from Object) error {
	if o.Size == 0 {
		o.Size = from.Size
	}
	if o.Size < from.Size {
		return errs.Field("size_bytes", fmt.Sprintf("use at least %d, or 0 for the same size", from.Size),
			"size_bytes is %d, but the %s has %d", o.Size, from.Kind, from.Size)
	}
	return nil
}

func (s *Service) volumeOr(ctx context.Context, st *store.Store, o Object, err error) (storage.Volume, error) {
	if err != nil {
		return storage.Volume{}, err
	}
	v, err := s.volumes(ctx, st, []Object{o})
	if err != nil {
		return storage.Volume{}, err
	}
	return v[0], nil
}

// volumes puts records and facts together. When the place cannot be looked at, records are shown as damaged
// with the reason, so that a list never fails for it.
func (s *Service) volumes(ctx context.Context, st *store.Store, objects []Object) ([]storage.Volume, error) {
	facts, ferr := s.backend.Inspect(ctx, objects)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	count := map[string]uint32{}
	for _, sn := range st.List(KindSnapshot) {
		count[sn.VolumeID]++
	}
	out := make([]storage.Volume, 0, len(objects))
	for _, o := range objects {
		size, state, reason := judge(o, facts, ferr)
		f := facts[o.ID]
		v := storage.Volume{ID: o.ID, Name: o.Name, SizeBytes: size, AllocatedBytes: f.Allocated, BlockSize: max(o.BlockSize, f.BlockSize),
			OriginType: o.OriginType, OriginID: o.OriginID, CreatedAt: o.CreatedAt, State: state, StateReason: reason,
			Labels: o.Labels, SnapshotCount: count[o.ID]}
		if len(o.Attachments) > 0 { // none is nil, wherever the record comes from
			v.Attachments = o.Attachments
		}
		out = append(out, v)
	}
	return out, nil
}

// judge tells size and state of an object.
func judge(o Object, facts map[string]Facts, ferr error) (size uint64, state storage.State, reason string) {
	f, ok := facts[o.ID]
	switch {
	case ferr != nil:
		return o.Size, storage.StateDamaged, ferr.Error()
	case !ok:
		return o.Size, storage.StateDamaged, "its data is missing"
	case f.Damage != "":
		return o.Size, storage.StateDamaged, f.Damage
	case f.Size != 0 && f.Size < o.Size:
		return o.Size, storage.StateDamaged, fmt.Sprintf("its data has %d bytes instead of %d", f.Size, o.Size)
	}
	return max(o.Size, f.Size), storage.StateReady, ""
}

// GetVolume finds one.
func (s *Service) GetVolume(ctx context.Context, req storage.Ref) (storage.Volume, error) {
	st, err := s.reader(ctx)
	if err != nil {
		return storage.Volume{}, err
	}
	o, err := find(st, KindVolume, req.Ref)
	return s.volumeOr(ctx, st, o, err)
}

// ListVolumes lists all by name.
func (s *Service) ListVolumes(ctx context.Context) ([]storage.Volume, error) {
	st, err := s.reader(ctx)
	if err != nil {
		return nil, err
	}
	return s.volumes(ctx, st, st.List(KindVolume))
}

// ResizeVolume makes one larger.
func (s *Service) ResizeVolume(ctx context.Context, req storage.ResizeVolumeRequest) (storage.Volume, error) {
	st, err := s.db(ctx)
	if err != nil {
		return storage.Volume{}, err
	}
	if err := checkSize(req.SizeBytes); err != nil {
		return storage.Volume{}, err
	}
	o, unlock, err := s.locked(ctx, st, KindVolume, req.Ref)
	if err != nil {
		return storage.Volume{}, err
	}
	defer unlock()
	if err := s.ready(ctx, o); err != nil {
		return storage.Volume{}, err
	}
	if req.SizeBytes < o.Size {
		return storage.Volume{}, errs.Field("size_bytes", "volumes only grow; make a smaller one and copy inside the guest",
			"size_bytes is %d, but the volume has %d", req.SizeBytes, o.Size).With(resource(o))
	}
	if req.SizeBytes > o.Size {
		s.step("resize:begin")
		if err := s.backend.Resize(ctx, o, req.SizeBytes); err != nil {
			return storage.Volume{}, err
		}
		// A crash here leaves data that is longer than its record, which is what judge reports.
		s.step("resize:resized")
		o.Size = req.SizeBytes
		if err := st.Apply(store.Change{Put: []Object{o}}); err != nil {
			return storage.Volume{}, err
		}
	}
	return s.volumeOr(ctx, st, o, nil)
}

// ready refuses to work on an object whose data is damaged, and brings its record's size up to its data's.
func (s *Service) ready(ctx context.Context, o Object) error {
	facts, err := s.backend.Inspect(ctx, []Object{o})
	if err != nil {
		return err
	}
	if _, state, reason := judge(o, facts, nil); state != storage.StateReady {
		return errs.New(errs.Corrupt, "the %s is damaged: %s", o.Kind, reason).With(resource(o)).Because("DAMAGED").
			Do("restore its data, or delete it")
	}
	return nil
}

// RenameVolume changes the name.
func (s *Service) RenameVolume(ctx context.Context, req storage.RenameRequest) (storage.Volume, error) {
	st, err := s.db(ctx)
	if err != nil {
		return storage.Volume{}, err
	}
	o, err := s.rename(ctx, st, KindVolume, req)
	return s.volumeOr(ctx, st, o, err)
}

func (s *Service) rename(ctx context.Context, st *store.Store, kind string, req storage.RenameRequest) (Object, error) {
	if err := ident.CheckName("name", req.Name); err != nil {
		return Object{}, err
	}
	o, unlock, err := s.locked(ctx, st, kind, req.Ref)
	if err != nil {
		return Object{}, err
	}
	defer unlock()
	if o.Name == req.Name {
		return o, nil
	}
	release, err := s.reserve(st, kind, "", req.Name, o.ID)
	if err != nil {
		return Object{}, err
	}
	defer release()
	s.step("rename:begin")
	intent := store.Intent{ID: o.ID, Op: store.OpRename, Object: o, Name: req.Name}
	if err := st.Apply(store.Change{Intend: &intent}); err != nil {
		return Object{}, err
	}
	s.step("rename:intended")
	if err := s.backend.Rename(ctx, o, req.Name); err != nil {
		_ = st.Apply(store.Change{Settle: o.ID}) // the backend has not renamed
		return Object{}, err
	}
	s.step("rename:renamed")
	o.Name = req.Name
	return o, st.Apply(store.Change{Put: []Object{o}, Settle: o.ID})
}

// DeleteVolume destroys one, with its snapshots where the request says so.
func (s *Service) DeleteVolume(ctx context.Context, req storage.DeleteVolumeRequest) error {
	st, err := s.db(ctx)
	if err != nil {
		return err
	}
	o, unlock, err := s.locked(ctx, st, KindVolume, req.Ref)
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	if err := detached(o); err != nil {
		return err
	}
	snaps := snapshotsOf(st, o.ID)
	if len(snaps) > 0 && !req.WithSnapshots {
		return errs.New(errs.Precondition, "the volume has snapshots: %s", names(snaps)).With(resource(o)).Because("HAS_SNAPSHOTS").
			Do("delete the snapshots first, or the volume with its snapshots")
	}
	for _, sn := range snaps {
		if err := s.removeSnapshot(ctx, st, sn); err != nil {
			return err
		}
	}
	return s.remove(ctx, st, o)
}

// detached refuses while a VM uses the volume.
func detached(o Object) error {
	if len(o.Attachments) == 0 {
		return nil
	}
	var vms []string
	for _, a := range o.Attachments {
		vms = append(vms, a.VMID)
	}
	return errs.New(errs.Precondition, "the volume is attached to VM %s", strings.Join(vms, ", ")).With(resource(o)).
		Because("VOLUME_IN_USE").Do("stop the VM, or detach the volume from it")
}

func names(l []Object) string {
	var n []string
	for i, o := range l {
		if i == 20 {
			n = append(n, fmt.Sprintf("and %d more", len(l)-i))
			break
		}
		n = append(n, o.Name)
	}
	return strings.Join(n, ", ")
}

func snapshotsOf(st *store.Store, volumeID string) []Object {
	var l []Object
	for _, sn := range st.List(KindSnapshot) {
		if sn.VolumeID == volumeID {
			l = append(l, sn)
		}
	}
	return l
}
