package storagekit

import (
	"context"
	"fmt"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
)

// findImport resolves an id or a name, where the newest of that name counts.
func findImport(st *store.Store, ref string) (store.Import, error) {
	if ident.CheckID("ref", ref) == nil {
		if i, ok := st.Import(ref); ok {
			return i, nil
		}
	} else {
		all := st.Imports()
		for k := len(all) - 1; k >= 0; k-- {
			if all[k].Name == ref {
				return all[k], nil
			}
		}
	}
	return store.Import{}, errs.New(errs.NotFound, "no import %s", ident.Quote(ref)).With(errs.Resource{Type: "import", Name: ref}).
		Do("list the imports; those that ended long ago are forgotten")
}

// WatchImport calls fn at each change until the import has ended.
func (s *Service) WatchImport(ctx context.Context, req storage.Ref, fn func(storage.Import) error) error {
	st, err := s.reader(ctx)
	if err != nil {
		return err
	}
	rec, err := findImport(st, req.Ref)
	if err != nil {
		return err
	}
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		s.mu.Lock()
		j := s.jobs[rec.ID]
		var now storage.Import
		var changed chan struct{}
		if j != nil {
			now, changed = j.now, j.changed
		} else if r, ok := st.Import(rec.ID); ok {
			now = r.Import
		}
		closed := s.closed && j == nil
		s.mu.Unlock()
		// A final state is told only once everything of the job is settled.
		if !now.State.Final() || j == nil {
			if err := fn(now); err != nil {
				return err
			}
		}
		switch {
		case j == nil && now.State.Final():
			return nil
		case closed:
			return errs.New(errs.Unavailable, "the storage plugin stops; the import goes on when it is back").Do("watch the import again")
		case j == nil:
			return errs.New(errs.Internal, "the import is neither running nor ended")
		}
		pause.Reset(watchInterval)
		select {
		case <-pause.C:
		case <-j.done:
			continue
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-j.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ListImports lists running and ended ones, oldest first.
func (s *Service) ListImports(ctx context.Context) ([]storage.Import, error) {
	st, err := s.reader(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []storage.Import
	for _, rec := range st.Imports() {
		out = append(out, s.importLocked(rec))
	}
	return out, nil
}

// CancelImport stops an import and waits until nothing of it is left.
func (s *Service) CancelImport(ctx context.Context, req storage.Ref) error {
	st, err := s.db(ctx)
	if err != nil {
		return err
	}
	rec, err := findImport(st, req.Ref)
	if err != nil {
		return err
	}
	s.mu.Lock()
	j := s.jobs[rec.ID]
	if j != nil && !s.closed {
		j.cancel(errCanceled)
		// One that waits for its turn has it now: it ends at once.
		for i, q := range s.queue {
			if q == j {
				s.queue = append(s.queue[:i:i], s.queue[i+1:]...)
				s.running++
				s.work.Go(func() { s.run(j) })
				break
			}
		}
	}
	s.mu.Unlock()
	if j == nil {
		return nil
	}
	select {
	case <-j.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// recoverImports fails those that cannot go on; it runs before anything else may look at them.
func (s *Service) recoverImports(ctx context.Context, st *store.Store) error {
	for _, rec := range st.Imports() {
		if rec.State.Final() || rec.Request.URL != "" || rec.Commit != nil {
			continue
		}
		if err := s.backend.Undo(ctx, templateOf(rec)); err != nil {
			return fmt.Errorf("remove what an interrupted import left: %w", err)
		}
		s.endImport(&rec.Import, errRestarted())
		if err := st.Apply(store.Change{PutImport: &rec}); err != nil {
			return err
		}
	}
	return nil
}

// resumeImports puts the others back to work.
func (s *Service) resumeImports() {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.store.Load()
	for _, rec := range st.Imports() {
		if !rec.State.Final() && s.jobs[rec.ID] == nil {
			s.log.Info("an interrupted import goes on", "import", rec.ID, "name", rec.Name)
			s.queue = append(s.queue, s.jobLocked(rec))
			s.startLocked()
		}
	}
}

// pruneImports forgets ended imports.
func (s *Service) pruneImports() {
	st, err := s.db(s.ctx)
	if err != nil {
		return
	}
	var old []string
	all := st.Imports()
	now := s.opts.Clock()
	for i, rec := range all {
		if rec.State.Final() && (now.Sub(rec.EndedAt) > keepImports || len(all)-i > keepMostImports && now.Sub(rec.EndedAt) > time.Hour) {
			old = append(old, rec.ID)
		}
	}
	if len(old) > 0 {
		if err := st.Apply(store.Change{DeleteImport: old}); err != nil {
			s.log.Warn("cannot forget ended imports", "error", err)
		}
	}
}

// workerCondition tells when images cannot be converted here.
func (s *Service) workerCondition() (service.Condition, bool) {
	_, err := worker.LookupIdentity(s.opts.WorkerUser)
	if err == nil {
		return service.Condition{}, false
	}
	return service.Condition{Code: "WORKER_USER_MISSING", Severity: service.SeverityWarning, Text: err.Error(), Remedy: errs.RemedyOf(err)}, true
}
