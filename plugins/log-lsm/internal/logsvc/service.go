// Package logsvc is the log contract on the engine: what the plugin serves.
package logsvc

import (
	"context"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/engine"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// Service implements log.Service, log.Verifier and log.Backuper.
type Service struct {
	opt engine.Options

	restoring sync.Mutex

	mu    sync.RWMutex
	store *engine.Store // nil while a restore takes its place
}

var (
	_ log.Service  = (*Service)(nil)
	_ log.Verifier = (*Service)(nil)
	_ log.Backuper = (*Service)(nil)
)

// Open opens the store.
func Open(opt engine.Options) (*Service, error) {
	st, err := engine.Open(opt)
	if err != nil {
		return nil, err
	}
	return &Service{opt: opt, store: st}, nil
}

func (s *Service) get() (*engine.Store, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.store == nil {
		return nil, errs.New(errs.Unavailable, "the log is being restored").Do("try again in a moment")
	}
	return s.store, nil
}

// Health implements service.Base.
func (s *Service) Health(context.Context) (service.Health, error) {
	st, err := s.get()
	if err != nil {
		return service.Health{Conditions: []service.Condition{{Code: "LOG_RESTORING", Severity: service.SeverityWarning, Text: err.Error(), Since: s.opt.Now()}}}, nil
	}
	return service.Health{Conditions: st.Conditions()}, nil
}

// Shutdown implements service.Base.
func (s *Service) Shutdown(ctx context.Context) error {
	s.restoring.Lock()
	defer s.restoring.Unlock()
	st, err := s.get()
	if err != nil {
		return nil // there is none
	}
	return st.Close(ctx)
}

// Append implements log.Service.
func (s *Service) Append(ctx context.Context, entries []log.Entry) error {
	st, err := s.get()
	if err != nil {
		return err
	}
	return st.Append(ctx, entries)
}

// Query implements log.Service.
func (s *Service) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	st, err := s.get()
	if err != nil {
		return err
	}
	return st.Query(ctx, q, fn)
}

// Stats implements log.Service.
func (s *Service) Stats(ctx context.Context) (log.Stats, error) {
	st, err := s.get()
	if err != nil {
		return log.Stats{}, err
	}
	return st.Stats(ctx)
}

// Verify implements log.Verifier.
func (s *Service) Verify(ctx context.Context, req log.VerifyRequest) (log.VerifyReport, error) {
	st, err := s.get()
	if err != nil {
		return log.VerifyReport{}, err
	}
	return st.Verify(ctx, req)
}

// Backup implements service.Backuper.
func (s *Service) Backup(ctx context.Context, w io.Writer) error {
	st, err := s.get()
	if err != nil {
		return err
	}
	return st.Backup(ctx, w)
}

// Restore implements service.Backuper: onto a store that holds at most what this host's own start has
// written, which is lost.
func (s *Service) Restore(ctx context.Context, r io.Reader) error {
	if !s.restoring.TryLock() {
		return errs.New(errs.Conflict, "the log is being restored already").Do("wait for it")
	}
	defer s.restoring.Unlock()
	st, err := s.get()
	if err != nil {
		return err
	}
	stats, err := st.Stats(ctx)
	if err != nil {
		return err
	}
	if stats.Entries > 0 {
		return errs.New(errs.Precondition, "the log holds %d entries, a restore needs an empty one", stats.Entries).Because("NOT_EMPTY").
			Do("stop the log plugin, move its data directory away, start it, and restore before anything else is done")
	}
	fs := s.opt.FS
	if fs == nil {
		fs = vfs.Default
	}
	if err := engine.Unpack(ctx, fs, s.opt.Dir, r); err != nil {
		return err
	}
	s.mu.Lock()
	s.store = nil
	s.mu.Unlock()
	// From here on it is finished whatever happens: Open installs what has been unpacked.
	cerr := st.Close(context.WithoutCancel(ctx))
	st, err = engine.Open(s.opt)
	if err != nil {
		return errs.Wrap(errs.KindOf(err), err, "open the restored log (after closing: %v)", cerr)
	}
	s.mu.Lock()
	s.store = st
	s.mu.Unlock()
	return nil
}
