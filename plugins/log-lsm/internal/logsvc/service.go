// Package logsvc is the log contract on the engine: what the plugin serves.
package logsvc

import (
	"context"
	"fmt"
	"io"
	"os"
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

// Check is the worker "check": it compares all indexes with the entries, of a store that nobody has open.
func Check(args []string) int {
	dir := ""
	switch {
	case len(args) == 2 && args[0] == "--data-dir":
		dir = args[1]
	case len(args) == 1 && len(args[0]) > 11 && args[0][:11] == "--data-dir=":
		dir = args[0][11:]
	default:
		fmt.Fprintln(os.Stderr, "usage: mvirt-log check --data-dir DIR\nReads a log store that no plugin has open and compares all indexes with the entries.\nExit code 0: sound; 1: damaged; 2: could not be read.")
		return 2
	}
	return check(os.Stdout, os.Stderr, engine.Options{Dir: dir, ReadOnly: true})
}

func check(out, errOut io.Writer, opt engine.Options) int {
	st, err := engine.Open(opt)
	if err != nil {
		fmt.Fprintf(errOut, "error: %v\n", err)
		if r := errs.RemedyOf(err); r != "" {
			fmt.Fprintf(errOut, "remedy: %s\n", r)
		}
		return 2
	}
	ctx := context.Background()
	defer st.Close(ctx)
	rep, err := st.Check(ctx)
	if err != nil {
		fmt.Fprintf(errOut, "error: %v\n", err)
		return 2
	}
	chain, err := st.Verify(ctx, log.VerifyRequest{})
	if err != nil {
		rep.Problems = append(rep.Problems, fmt.Sprintf("audit chain: %v", err))
	}
	for _, b := range chain.Breaks {
		rep.Problems = append(rep.Problems, fmt.Sprintf("audit chain: %s %s %s: %s", b.What, b.Time.Format("2006-01-02T15:04:05.000Z07:00"), b.EntryID, b.Detail))
	}
	for _, c := range st.Conditions() {
		rep.Problems = append(rep.Problems, c.Code+": "+c.Text)
	}
	for _, p := range rep.Problems {
		fmt.Fprintln(out, p)
	}
	fmt.Fprintf(out, "%d entries, %d segments, %d audit entries in the chain, %d problems\n", rep.Entries, rep.Segments, chain.Checked, len(rep.Problems))
	if len(rep.Problems) > 0 {
		return 1
	}
	return 0
}
