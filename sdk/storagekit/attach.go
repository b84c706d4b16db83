package storagekit

import (
	"context"
	"slices"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// Attach lets the owner's uid open the volume.
func (s *Service) Attach(ctx context.Context, req storage.AttachRequest) (storage.Attachment, error) {
	st, err := s.attacher(ctx, req.ReadOnly)
	if err != nil {
		return storage.Attachment{}, err
	}
	if err := ident.CheckID("owner.vm_id", req.Owner.VMID); err != nil {
		return storage.Attachment{}, err
	}
	o, unlock, err := s.locked(ctx, st, KindVolume, req.VolumeID)
	if err != nil {
		return storage.Attachment{}, err
	}
	defer unlock()
	for _, a := range o.Attachments {
		if a.VMID == req.Owner.VMID {
			if a.UID == req.Owner.UID && a.ReadOnly == req.ReadOnly {
				continue
			}
			return storage.Attachment{}, errs.New(errs.Precondition, "the volume is attached to the same VM in another way").
				With(resource(o)).Because("VOLUME_IN_USE").Do("detach it first")
		}
		if !a.ReadOnly || !req.ReadOnly {
			return storage.Attachment{}, detached(o)
		}
	}
	if err := s.ready(ctx, o); err != nil {
		return storage.Attachment{}, err
	}
	mine := storage.AttachmentInfo{VMID: req.Owner.VMID, UID: req.Owner.UID, ReadOnly: req.ReadOnly}
	at := slices.IndexFunc(o.Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == mine.VMID })
	before := o.Clone()
	if at < 0 {
		// On record before access is given: a crash between leaves a record to detach, never access without one.
		o.Attachments = append(o.Attachments, mine)
		at = len(o.Attachments) - 1
		s.step("attach:begin")
		if err := s.save(ctx, st, o); err != nil {
			return storage.Attachment{}, err
		}
		s.step("attach:recorded")
	}
	dev, err := s.backend.Grant(ctx, o, mine.UID, mine.ReadOnly)
	if err != nil {
		if len(before.Attachments) < len(o.Attachments) {
			undo := context.WithoutCancel(ctx)
			s.revoke(undo, before, mine.UID)
			if serr := s.save(undo, st, before); serr != nil {
				s.log.Error("cannot take back an attachment", "volume", o.ID, "error", serr)
			}
		}
		return storage.Attachment{}, err
	}
	s.step("attach:granted")
	if o.Attachments[at].Path != dev.Path {
		o.Attachments[at].Path = dev.Path
		if err := s.save(ctx, st, o); err != nil {
			return storage.Attachment{}, err
		}
	}
	facts, err := s.backend.Inspect(ctx, []Object{o})
	if err != nil {
		return storage.Attachment{}, err
	}
	f := facts[o.ID]
	return storage.Attachment{Path: dev.Path, Format: storage.FormatRaw, Block: dev.Block, ReadOnly: mine.ReadOnly,
		SizeBytes: max(o.Size, f.Size), BlockSize: max(f.BlockSize, o.BlockSize, sector)}, nil
}

// save keeps a volume's record, and what the place itself remembers of it.
func (s *Service) save(ctx context.Context, st *store.Store, o Object) error {
	if st.InMemory() {
		st.Note(o)
		return nil
	}
	if err := st.Apply(store.Change{Put: []Object{o}}); err != nil {
		return err
	}
	return s.backend.Save(ctx, o)
}

// revoke takes access from a uid unless an attachment that stays in o needs it.
func (s *Service) revoke(ctx context.Context, o Object, uid uint32) error {
	if slices.ContainsFunc(o.Attachments, func(a storage.AttachmentInfo) bool { return a.UID == uid }) {
		return nil
	}
	return s.backend.Revoke(ctx, o, uid)
}

// Detach takes the access away.
func (s *Service) Detach(ctx context.Context, req storage.DetachRequest) error {
	st, err := s.detacher(ctx, req)
	if err != nil {
		return err
	}
	o, unlock, err := s.locked(ctx, st, KindVolume, req.VolumeID)
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	at := slices.IndexFunc(o.Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == req.VMID })
	if at < 0 {
		return nil
	}
	uid := o.Attachments[at].UID
	o.Attachments = slices.Delete(o.Attachments, at, at+1)
	s.step("detach:begin")
	if err := s.revoke(ctx, o, uid); err != nil {
		return err
	}
	s.step("detach:revoked")
	return s.save(ctx, st, o)
}
