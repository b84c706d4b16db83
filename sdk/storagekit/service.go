// Package storagekit is a whole storage service but for the place where volumes live.
//
// A storage plugin is a [Backend] (files in a directory, zvols in a pool) under the [Service] of this
// package, which keeps the contract of package storage: ids and names, repeated requests, who may do what to
// an attached volume, imports with their progress, cancellation and restart, and the journal that leaves
// nothing half-done.
//
// # How a change is made
//
// Under a lock on the objects concerned: a note of the change (an intent) is made durable, the backend makes
// the change, and one transaction writes the result and removes the note. At start every note that is left
// is undone (creates) or finished (deletes, rollbacks, renames). What the database says is therefore always
// what is there.
//
// # Imports
//
// See package importer for how bytes go; this package keeps the jobs: at most two run at a time, all are in
// the database, and a job that a restart interrupts goes on where it was (a URL) or fails and says so (a file
// whose descriptor is gone).
package storagekit

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/fetch"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/locks"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// Options of a service. The zero value of each field is the default.
type Options struct {
	Log        hclog.Logger
	WorkerUser string        // under whom images are converted when we are root; "": mvirt-worker
	Starter    *jail.Client  // starts the workers; nil: we do, and change to that user ourselves
	Fetch      fetch.Options // of downloads
	// MaxImageSize is the largest disk that an image may have, in bytes; 0: 16 TiB, what ext4 takes in one file.
	MaxImageSize int64
	// Running is how many imports run at a time; 0: 2.
	Running int
	Clock   Clock
	// Retry is the time between attempts to make a missing place ready, and between looks for trouble; 0: 30 s.
	Retry time.Duration
	// Patience is how long a call waits while the place is looked at for the first time; 0: 30 s.
	Patience time.Duration
	// FailPoint, in tests, is called between the steps of each change; it may kill the process.
	FailPoint func(step string)
}

// DefaultWorkerUser is the user of conversions.
const DefaultWorkerUser = "mvirt-worker"

// Service is a storage.Service over a Backend.
type Service struct {
	backend Backend
	opts    Options
	log     hclog.Logger
	fetcher *fetch.Client
	locks   locks.Set

	ctx    context.Context // ends at Shutdown
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	store   atomic.Pointer[store.Store] // nil until the place is ready
	view    atomic.Pointer[store.Store] // what can be seen of a place that is not ready, or nil
	started chan struct{}               // closed when the place was looked at for the first time

	mu         sync.Mutex
	unready    error                        // why store is nil
	conditions map[string]service.Condition // by code and object
	reserved   map[string]string            // names in use by changes under way, to the object's id
	jobs       map[string]*job
	queue      []*job
	running    int
	closed     bool
	shutdown   sync.Once
}

var _ storage.Service = (*Service)(nil)

// Open makes a service over b. A place that is not ready is no error: the service says so and tries again. A
// metadata.db that cannot be read, and cannot be rebuilt, is.
func Open(ctx context.Context, b Backend, o Options) (*Service, error) {
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	if o.WorkerUser == "" {
		o.WorkerUser = DefaultWorkerUser
	}
	if o.MaxImageSize == 0 {
		o.MaxImageSize = 16 << 40
	}
	if o.Running == 0 {
		o.Running = 2
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Patience == 0 {
		o.Patience = callPatience
	}
	if o.Retry == 0 {
		o.Retry = 30 * time.Second
	}
	s := &Service{
		backend: b, opts: o, log: o.Log, fetcher: fetch.NewClient(o.Fetch),
		conditions: map[string]service.Condition{}, reserved: map[string]string{}, jobs: map[string]*job{},
		started: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	type outcome struct {
		fatal bool
		err   error
	}
	first := make(chan outcome, 1)
	s.work.Go(func() {
		fatal, err := s.becomeReady(s.ctx)
		first <- outcome{fatal, err}
		close(s.started)
		if !fatal {
			s.watch()
		}
	})
	patience := time.NewTimer(startPatience)
	defer patience.Stop()
	select {
	case o := <-first:
		if o.fatal { // not the place, but what is in it
			s.cancel(o.err)
			s.work.Wait()
			return nil, o.err
		}
		if o.err != nil {
			s.log.Warn("the place for volumes is not ready", "error", o.err)
		}
	case <-patience.C:
		// A host waits for no plugin longer than a few seconds; calls wait for the place instead.
		s.log.Info("the place for volumes is slow; it is looked at in the background")
	case <-ctx.Done():
		s.cancel(ctx.Err())
		return nil, ctx.Err()
	}
	return s, nil
}

// startPatience is how long Open waits for the place, callPatience how long a call does while it is looked at
// for the first time.
const (
	startPatience = 3 * time.Second
	callPatience  = 30 * time.Second
)

// becomeReady opens the metadata and brings place and metadata together. fatal tells that trying again is of
// no use.
func (s *Service) becomeReady(ctx context.Context) (fatal bool, err error) {
	defer func() { s.setUnready(err) }()
	path, err := s.backend.Ready(ctx)
	if err != nil {
		s.see(ctx, err)
		return false, err
	}
	st, err := s.openStore(ctx, path)
	if err != nil {
		return true, err
	}
	if err := s.recover(ctx, st); err != nil {
		st.Close()
		return false, err
	}
	s.store.Store(st)
	s.view.Store(nil)
	s.look(ctx)
	s.resumeImports()
	return false, nil
}

func (s *Service) setUnready(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unready = err
	if err == nil {
		delete(s.conditions, "STORAGE_NOT_READY")
		return
	}
	text := err.Error()
	if s.view.Load() != nil {
		text += "; what it holds can be listed and attached read-only, and nothing can be changed"
	}
	s.raiseLocked(service.Condition{Code: "STORAGE_NOT_READY", Severity: service.SeverityCritical, Text: text, Remedy: errs.RemedyOf(err)})
}

// raiseLocked adds a condition, or keeps the time since when it holds.
func (s *Service) raiseLocked(c service.Condition) {
	key := c.Code
	if c.Object != "" {
		key += " " + c.Object
	}
	c.Since = s.opts.Clock()
	if old, ok := s.conditions[key]; ok {
		c.Since = old.Since
	}
	s.conditions[key] = c
}

func (s *Service) openStore(ctx context.Context, path string) (*store.Store, error) {
	_, statErr := os.Stat(path)
	st, err := store.Open(path)
	r, canRebuild := s.backend.(Rebuilder)
	switch {
	case err == nil && (statErr == nil || !canRebuild):
		return st, nil
	case err != nil && (errs.KindOf(err) != errs.Corrupt || !canRebuild):
		return nil, err
	case err != nil:
		s.log.Warn("metadata.db is damaged and is rebuilt from the place itself", "error", err)
		if err := os.Rename(path, path+".damaged"); err != nil {
			return nil, err
		}
		if st, err = store.Open(path); err != nil {
			return nil, err
		}
	}
	objects, err := r.Objects(ctx)
	if err == nil {
		err = st.Apply(store.Change{Put: objects})
	}
	if err != nil {
		st.Close()
		_ = os.Remove(path) // half a rebuild must not be taken for the whole
		return nil, err
	}
	return st, nil
}

// db is the store for a change, or why there can be none. While the place is looked at for the first time it
// waits.
func (s *Service) db(ctx context.Context) (*store.Store, error) {
	if st := s.store.Load(); st != nil {
		return st, s.answers(ctx)
	}
	patience := time.NewTimer(s.opts.Patience)
	defer patience.Stop()
	select {
	case <-s.started:
	case <-patience.C:
		return nil, errs.New(errs.Unavailable, "the place for volumes is still being looked at").Because("STORAGE_NOT_READY").
			Do("try again in a moment; if it stays so, look whether its disks answer")
	case <-s.ctx.Done():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if st := s.store.Load(); st != nil {
		return st, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unready != nil {
		return nil, s.notReady(s.unready)
	}
	return nil, errs.New(errs.Unavailable, "the storage service has ended").Do("try again in a moment")
}

// watch tries to make the place ready and looks for trouble until the service ends.
func (s *Service) watch() {
	t := time.NewTicker(s.opts.Retry)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		if s.store.Load() == nil {
			if _, err := s.becomeReady(s.ctx); err != nil {
				s.log.Debug("the place for volumes is still not ready", "error", err)
			}
			continue
		}
		s.look(s.ctx)
		s.pruneImports()
	}
}

// look asks the backend for trouble.
func (s *Service) look(ctx context.Context) {
	found := s.backend.Conditions(ctx)
	if c, bad := s.workerCondition(); bad {
		found = append(found, c)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.conditions
	s.conditions = map[string]service.Condition{}
	for key, c := range old {
		if c.Code == "CHANGE_UNFINISHED" {
			s.conditions[key] = c
		}
	}
	for _, c := range found {
		key := c.Code
		if c.Object != "" {
			key += " " + c.Object
		}
		if o, ok := old[key]; ok {
			s.conditions[key] = o
		}
		s.raiseLocked(c)
	}
}

// Health reports what the last look found.
func (s *Service) Health(context.Context) (service.Health, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var h service.Health
	for _, c := range s.conditions {
		h.Conditions = append(h.Conditions, c)
	}
	return h, nil
}

// errShutdown is why imports end at a shutdown.
var errShutdown = errors.New("the storage plugin stops")

// Shutdown stops imports, which go on at the next start, and closes the metadata.
func (s *Service) Shutdown(ctx context.Context) error {
	var err error
	s.shutdown.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		s.cancel(errShutdown)
		done := make(chan struct{})
		go func() { s.work.Wait(); close(done) }()
		select {
		case <-done:
		case <-ctx.Done():
			err = ctx.Err() // what is unfinished is found at the next start
			return
		}
		s.fetcher.Close()
		if st := s.store.Swap(nil); st != nil {
			closed := make(chan error, 1)
			go func() { closed <- st.Close() }()
			select {
			case err = <-closed:
			case <-ctx.Done(): // the disk does not answer
				err = ctx.Err()
			}
		}
	})
	return err
}

// step is a place between two steps of a change, where tests crash.
func (s *Service) step(name string) {
	if s.opts.FailPoint != nil {
		s.opts.FailPoint(name)
	}
}

// writers is how many goroutines a conversion uses: beyond four the disk is the limit.
func writers() int { return min(max(runtime.NumCPU(), 2), 4) }
