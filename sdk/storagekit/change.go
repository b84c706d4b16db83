package storagekit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// request is what a create is remembered by: the digest of its fields. It is short, because it is kept with
// the object, and it is not secret, so that a URL with a password does not stand in it.
func request(op string, fields any) string {
	b, err := json.Marshal(fields)
	if err != nil {
		return op // not reached: requests are plain values
	}
	sum := sha256.Sum256(b)
	return op + " " + hex.EncodeToString(sum[:16])
}

// existing answers a repeated create: the object itself when the request is the same, errs.Exists otherwise.
func existing(st *store.Store, kind, id, req string) (Object, bool, error) {
	o, ok := st.Any(id)
	if !ok {
		if i, ok := st.Import(id); ok {
			return Object{}, false, errs.New(errs.Exists, "the id belongs to an import").
				With(errs.Resource{Type: "import", ID: id, Name: i.Name}).Because("ID_TAKEN").Do("choose a new id")
		}
		return Object{}, false, nil
	}
	if o.Kind != kind || o.Request != req {
		return Object{}, false, errs.New(errs.Exists, "the id belongs to another %s, or to one made with other fields", o.Kind).
			With(resource(o)).Because("ID_TAKEN").Do("choose a new id")
	}
	return o, true, nil
}

func resource(o Object) errs.Resource { return errs.Resource{Type: o.Kind, ID: o.ID, Name: o.Name} }

// reserve takes a name for the change of id until release is called. A name that an object, an import or
// another change has is errs.Exists.
func (s *Service) reserve(st *store.Store, kind, volumeID, name, id string) (release func(), err error) {
	taken := func(by string) error {
		return errs.New(errs.Exists, "a %s named %q exists", kind, name).
			With(errs.Resource{Type: kind, ID: by, Name: name}).Because("NAME_TAKEN").Do("choose another name")
	}
	key := kind + "/" + volumeID + "/" + name
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, ok := st.ByName(kind, volumeID, name); ok && o.ID != id {
		return nil, taken(o.ID)
	}
	if by, ok := s.reserved[key]; ok && by != id {
		return nil, taken(by)
	}
	if _, ok := s.reserved[key]; ok {
		return nil, errs.New(errs.Conflict, "the same %s is being made by another request", kind).Do("wait for it")
	}
	s.reserved[key] = id
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.reserved, key)
	}, nil
}

// create makes o from from: intent, backend, commit. The caller holds the locks and the name.
func (s *Service) create(ctx context.Context, st *store.Store, o Object, from *Object) (Object, error) {
	s.step("create:begin")
	if err := st.Apply(store.Change{Intend: &store.Intent{ID: o.ID, Op: store.OpCreate, Object: o}}); err != nil {
		return Object{}, err
	}
	s.step("create:intended")
	made, err := s.backend.Create(ctx, o, from)
	if err == nil {
		s.step("create:made")
		err = st.Apply(store.Change{Put: []Object{made}, Settle: o.ID})
	}
	if err != nil {
		s.giveUp(ctx, st, store.Intent{ID: o.ID, Op: store.OpCreate, Object: o})
		return Object{}, err
	}
	s.step("create:done")
	return made, nil
}

// giveUp undoes an intent whose caller may be gone. What cannot be undone now stays an intent.
func (s *Service) giveUp(ctx context.Context, st *store.Store, i store.Intent) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	_, err := s.settle(ctx, st, i)
	if err == nil {
		s.step("undo:undone")
		err = st.Apply(store.Change{Settle: i.ID})
	}
	if err != nil {
		s.unfinished(i, err)
	}
}

// unfinished raises a condition for a change that is neither undone nor finished.
func (s *Service) unfinished(i store.Intent, err error) {
	s.log.Error("a change could not be finished", "op", i.Op, "kind", i.Object.Kind, "id", i.ID, "error", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.raiseLocked(service.Condition{Code: "CHANGE_UNFINISHED", Severity: service.SeverityWarning, Object: i.ID,
		Text:   fmt.Sprintf("the %s of %s %s is unfinished: %v", i.Op, i.Object.Kind, i.Object.Name, err),
		Remedy: "repair the place, then restart the storage plugin, which finishes it"})
}

// remove deletes o: intent, backend, commit.
func (s *Service) remove(ctx context.Context, st *store.Store, o Object) error {
	s.step("delete:begin")
	if err := st.Apply(store.Change{Intend: &store.Intent{ID: o.ID, Op: store.OpDelete, Object: o}}); err != nil {
		return err
	}
	s.step("delete:intended")
	if err := s.backend.Delete(ctx, o); err != nil {
		// The object is as it was, or damaged; it stays in the list, and deleting it again is the way out.
		return errors.Join(err, st.Apply(store.Change{Settle: o.ID}))
	}
	s.step("delete:deleted")
	if err := st.Apply(store.Change{Delete: []string{o.ID}, Settle: o.ID}); err != nil {
		return err
	}
	s.step("delete:done")
	return nil
}

// recover brings place and metadata together after a start.
func (s *Service) recover(ctx context.Context, st *store.Store) error {
	for _, i := range st.Intents() {
		change, err := s.settle(ctx, st, i)
		if err == nil {
			change.Settle = i.ID
			err = st.Apply(change)
		}
		if err != nil {
			s.unfinished(i, err)
			continue
		}
		s.log.Info("settled a change that was interrupted", "op", i.Op, "kind", i.Object.Kind, "id", i.ID)
	}
	if err := s.recoverImports(ctx, st); err != nil {
		return err
	}
	keep := func(id string) bool {
		if i, ok := st.Import(id); ok && !i.State.Final() {
			return true
		}
		for _, i := range st.Intents() {
			if i.ID == id {
				return true
			}
		}
		return false
	}
	if err := s.backend.Sweep(ctx, keep); err != nil {
		return err
	}
	// After a reboot the access rights of device nodes are gone; those of files are set again for nothing.
	for _, v := range st.List(KindVolume) {
		for _, a := range v.Attachments {
			if _, err := s.backend.Grant(ctx, v, a.UID, a.ReadOnly); err != nil {
				s.log.Warn("cannot restore access to an attached volume", "volume", v.ID, "vm", a.VMID, "error", err)
			}
		}
	}
	return nil
}

// settle undoes or finishes one intent and returns what the metadata must learn.
func (s *Service) settle(ctx context.Context, st *store.Store, i store.Intent) (store.Change, error) {
	switch i.Op {
	case store.OpCreate:
		return store.Change{}, s.backend.Undo(ctx, i.Object)
	case store.OpPrepare:
		return store.Change{}, s.backend.UndoRollback(ctx, i.Object)
	case store.OpDelete:
		return store.Change{Delete: []string{i.ID}}, s.backend.Delete(ctx, i.Object)
	case store.OpRename:
		o, ok := st.Any(i.ID)
		if !ok {
			return store.Change{}, nil
		}
		err := s.backend.Rename(ctx, i.Object, i.Name)
		o.Name = i.Name
		return store.Change{Put: []Object{o}}, err
	case store.OpRollback:
		if i.Snapshot == nil {
			return store.Change{}, errs.New(errs.Corrupt, "the intent of a rollback names no snapshot")
		}
		return rolledBack(i), s.backend.CommitRollback(ctx, i.Object, *i.Snapshot, i.Newer)
	}
	return store.Change{}, errs.New(errs.Internal, "unknown intent %q", i.Op)
}

// checkLabels bounds what callers attach to objects: they are kept in the metadata and in ZFS properties.
func checkLabels(l map[string]string) error {
	const most = 4096
	n := 0
	for k, v := range l {
		n += len(k) + len(v)
		if k == "" || len(k) > 128 {
			return errs.Field("labels", "use keys of 1 to 128 bytes", "the label key %s is empty or too long", ident.Quote(k))
		}
	}
	if n > most {
		return errs.Field("labels", "keep labels short", "the labels have %d bytes, the limit is %d", n, most)
	}
	return nil
}
