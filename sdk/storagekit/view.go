package storagekit

import (
	"context"
	"slices"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// A place may be there and yet be of no use for changes: a pool imported read-only or suspended, or one whose
// metadata cannot be mounted. What a Rebuilder finds in it can be shown all the same, and volumes can be read.
// That is the view: a store in memory, looked at again with each attempt to make the place ready.

// see makes the view of a place that is not ready, or takes it away where nothing can be seen.
func (s *Service) see(ctx context.Context, cause error) {
	r, ok := s.backend.(Rebuilder)
	if !ok {
		return
	}
	objects, err := r.Objects(ctx)
	if err != nil {
		s.view.Store(nil)
		return
	}
	if view := s.view.Load(); view != nil {
		view.Refresh(objects, s.notReady(cause)) // who attaches now does so in this one
		return
	}
	s.view.Store(store.Memory(objects, s.notReady(cause)))
}

// reader is the store for calls that change nothing: the view where there is no other.
func (s *Service) reader(ctx context.Context) (*store.Store, error) {
	st, err := s.store.Load(), error(nil)
	if st == nil {
		st, err = s.db(ctx)
	}
	if err != nil && errs.ReasonOf(err) == "STORAGE_NOT_READY" {
		if view := s.view.Load(); view != nil {
			return view, nil
		}
	}
	return st, err
}

// attacher is the store for an attachment: the view serves one that only reads, and remembers it.
func (s *Service) attacher(ctx context.Context, readOnly bool) (*store.Store, error) {
	if readOnly {
		return s.reader(ctx)
	}
	return s.db(ctx)
}

// detacher is the store for the end of an attachment: the view ends only what was attached through it, for
// the place itself remembers the others.
func (s *Service) detacher(ctx context.Context, req storage.DetachRequest) (*store.Store, error) {
	st, err := s.reader(ctx)
	if err != nil || !st.InMemory() {
		return st, err
	}
	o, err := find(st, KindVolume, req.VolumeID)
	if err != nil {
		return st, nil // to be told as usual
	}
	at := slices.IndexFunc(o.Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == req.VMID })
	if at < 0 || o.Attachments[at].ReadOnly {
		return st, nil
	}
	return s.db(ctx)
}

func (s *Service) notReady(cause error) error {
	return &errs.Error{Kind: errs.Unavailable, Reason: "STORAGE_NOT_READY", Message: "the place for volumes is not ready",
		Err: cause, Remedy: errs.RemedyOf(cause)}
}

// hanging are conditions under which a change would wait for a disk that does not answer, for as long as that
// takes, and every other behind it.
var hanging = [...]string{"POOL_SUSPENDED", "POOL_FAILED", "POOL_MISSING"}

// lookLimit is how long a call waits for a second look at a place that hung the last time.
const lookLimit = 10 * time.Second

// answers refuses a change at once while the place does not answer, and looks again first.
func (s *Service) answers(ctx context.Context) error {
	if _, bad := s.hangs(); !bad {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	s.look(ctx)
	if c, bad := s.hangs(); bad {
		return errs.New(errs.Unavailable, "%s", c.Text).Because(c.Code).Do(c.Remedy)
	}
	return nil
}

func (s *Service) hangs() (service.Condition, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conditions {
		if slices.Contains(hanging[:], c.Code) {
			return c, true
		}
	}
	return service.Condition{}, false
}
