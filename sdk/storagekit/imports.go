package storagekit

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/fetch"
	"github.com/mvirt/mvirt/sdk/storagekit/image"
	"github.com/mvirt/mvirt/sdk/storagekit/importer"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
)

// Ended imports are kept this long, but no more than that many.
const (
	keepImports     = 24 * time.Hour
	keepMostImports = 1000
)

// maxScratch bounds a compressed qcow2 image once it is decompressed: half of what ext4 takes in a file.
const maxScratch = 8 << 40

// watchInterval is the shortest time between two reports of progress to one watcher.
const watchInterval = 100 * time.Millisecond

// job is an import that is queued or running.
type job struct {
	id     string
	file   *os.File // our own, or nil
	cancel context.CancelCauseFunc
	ctx    context.Context
	done   chan struct{} // closed when the job has ended and all of it is settled

	// Guarded by Service.mu.
	now     storage.Import
	changed chan struct{} // closed and replaced at each change
}

var errCanceled = errs.New(errs.Canceled, "the import was cancelled")

// StartImport begins an import.
func (s *Service) StartImport(ctx context.Context, req storage.ImportRequest) (storage.Import, error) {
	st, err := s.db(ctx)
	if err != nil {
		return storage.Import{}, err
	}
	if err := checkImport(req); err != nil {
		return storage.Import{}, err
	}
	file := req.File
	req.File = nil
	rec := store.Import{Request: req, Import: storage.Import{ID: req.ID, Name: req.Name, Source: source(req), State: storage.ImportQueued,
		StartedAt: s.opts.Clock().UTC()}}
	j, old, err := s.admit(st, rec)
	if err != nil || j == nil {
		return old, err
	}
	// The job has its name and id now; nothing is held while the disk writes.
	if file != nil {
		if j.file, err = duplicate(file); err != nil {
			err = errs.Wrap(errs.Exhausted, err, "cannot keep the file open")
		}
	}
	if err == nil {
		err = st.Apply(store.Change{PutImport: &rec})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if j.file != nil {
			j.file.Close()
		}
		s.dismissLocked(j)
		return storage.Import{}, err
	}
	s.queue = append(s.queue, j)
	s.startLocked()
	return j.now, nil
}

// admit makes a job that is not queued yet, or answers a repeated request with the import that there is.
func (s *Service) admit(st *store.Store, rec store.Import) (*job, storage.Import, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, storage.Import{}, errs.New(errs.Unavailable, "the storage plugin stops").Do("try again in a moment")
	}
	if old, ok := st.Import(rec.ID); ok {
		if request("import", old.Request) != request("import", rec.Request) {
			return nil, storage.Import{}, errs.New(errs.Exists, "the id belongs to another import").Because("ID_TAKEN").Do("choose a new id")
		}
		return nil, s.importLocked(old), nil
	}
	if s.jobs[rec.ID] != nil {
		return nil, storage.Import{}, errs.New(errs.Conflict, "the same import is being started by another request").Do("wait for it")
	}
	if o, ok := st.Any(rec.ID); ok {
		return nil, storage.Import{}, errs.New(errs.Exists, "the id belongs to another %s", o.Kind).With(resource(o)).Because("ID_TAKEN").Do("choose a new id")
	}
	if err := s.nameFreeLocked(st, rec.Name); err != nil {
		return nil, storage.Import{}, err
	}
	return s.jobLocked(rec), storage.Import{}, nil
}

func checkImport(req storage.ImportRequest) error {
	if err := ident.CheckID("id", req.ID); err != nil {
		return err
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return err
	}
	if err := checkLabels(req.Labels); err != nil {
		return err
	}
	if err := importer.CheckChecksum("checksum", req.Checksum); err != nil {
		return err
	}
	switch {
	case req.File == nil && req.URL == "":
		return errs.Field("url", "give a file or a URL", "the import has no source")
	case req.File != nil && req.URL != "":
		return errs.Field("url", "give either a file or a URL", "the import has two sources")
	case len(req.FileName) > 4096:
		return errs.Field("file_name", "shorten it", "file_name has %d bytes", len(req.FileName))
	case req.URL != "":
		_, err := fetch.ParseURL("url", req.URL)
		return err
	}
	return nil
}

func source(req storage.ImportRequest) string {
	if req.URL != "" {
		return fetch.Show(req.URL)
	}
	return req.FileName
}

func duplicate(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	var derr error
	err = raw.Control(func(old uintptr) { fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) })
	if err := errors.Join(err, derr); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// nameFreeLocked refuses a name that a template, an import under way or a change has.
func (s *Service) nameFreeLocked(st *store.Store, name string) error {
	by := ""
	if o, ok := st.ByName(KindTemplate, "", name); ok {
		by = o.ID
	} else if id, ok := s.reserved[KindTemplate+"//"+name]; ok {
		by = id
	}
	if by == "" {
		return nil
	}
	return errs.New(errs.Exists, "a template or an import named %q exists", name).
		With(errs.Resource{Type: KindTemplate, ID: by, Name: name}).Because("NAME_TAKEN").Do("choose another name")
}

// jobLocked makes a job and takes the name of its template.
func (s *Service) jobLocked(rec store.Import) *job {
	j := &job{id: rec.ID, now: rec.Import, done: make(chan struct{}), changed: make(chan struct{})}
	j.ctx, j.cancel = context.WithCancelCause(s.ctx)
	s.jobs[j.id] = j
	s.reserved[KindTemplate+"//"+rec.Name] = rec.ID
	return j
}

// dismissLocked is the end of a job: watchers look into the database from now on.
func (s *Service) dismissLocked(j *job) {
	delete(s.reserved, KindTemplate+"//"+j.now.Name)
	delete(s.jobs, j.id)
	close(j.changed)
	close(j.done)
	j.cancel(nil)
}

// startLocked starts what may run.
func (s *Service) startLocked() {
	for s.running < s.opts.Running && len(s.queue) > 0 && !s.closed {
		j := s.queue[0]
		s.queue = s.queue[1:]
		s.running++
		s.work.Go(func() { s.run(j) })
	}
}

// setLocked changes what watchers see.
func (j *job) setLocked(fn func(*storage.Import)) {
	fn(&j.now)
	close(j.changed)
	j.changed = make(chan struct{})
}

// run does one job from begin to end.
func (s *Service) run(j *job) {
	st := s.store.Load()
	rec, _ := st.Import(j.id)
	err := s.runImport(st, j, &rec)
	// A job that ended because the plugin stops stays as it is in the database, and goes on at the next start.
	stopped := err != nil && errors.Is(err, errShutdown) && rec.Request.URL != ""
	if err != nil && !stopped {
		// Nothing of a failed import may be left; what cannot be removed now is swept at the next start.
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if uerr := s.backend.Undo(ctx, templateOf(rec)); uerr != nil {
			s.log.Error("cannot remove what a failed import left", "import", j.id, "error", uerr)
		}
		cancel()
	}
	if j.file != nil {
		j.file.Close()
	}
	if err != nil && !stopped {
		s.mu.Lock()
		j.setLocked(func(i *storage.Import) { s.endImport(i, err) })
		rec.Import, rec.Commit, rec.Fetch = j.now, nil, nil
		s.mu.Unlock()
		if aerr := st.Apply(store.Change{PutImport: &rec}); aerr != nil {
			s.log.Error("cannot record the end of an import", "import", j.id, "error", aerr)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dismissLocked(j)
	s.running--
	s.startLocked()
}

// endImport writes how it ended.
func (s *Service) endImport(i *storage.Import, err error) {
	i.EndedAt = s.opts.Clock().UTC()
	switch {
	case err == nil:
		i.State = storage.ImportDone
	case errors.Is(err, errs.Canceled):
		i.State = storage.ImportCanceled
	default:
		if errors.Is(err, errShutdown) {
			err = errRestarted()
		}
		i.State = storage.ImportFailed
		i.FailureKind, i.Failure, i.Remedy = uint32(errs.KindOf(err)), err.Error(), errs.RemedyOf(err)
		s.log.Warn("an import failed", "import", i.ID, "name", i.Name, "source", i.Source, "error", err)
	}
}

func errRestarted() error {
	return errs.New(errs.Unavailable, "the storage plugin was restarted while it imported a file that only its caller can open").
		Because("IMPORT_INTERRUPTED").Do("import the file again")
}

// templateOf is the template that an import makes.
func templateOf(rec store.Import) Object {
	return Object{Kind: KindTemplate, ID: rec.ID, Name: rec.Name, CreatedAt: rec.StartedAt, Labels: rec.Request.Labels,
		Source: rec.Source, Checksum: rec.Request.Checksum, Request: request("import", rec.Request)}
}

// runImport brings the bytes in and puts the template in its place.
func (s *Service) runImport(st *store.Store, j *job, rec *store.Import) error {
	if err := context.Cause(j.ctx); err != nil {
		return err
	}
	s.step("import:begin")
	if rec.Commit == nil {
		if err := s.bring(st, j, rec); err != nil {
			return s.noSpace(err)
		}
	}
	s.step("import:committing")
	if err := s.backend.Finish(context.WithoutCancel(j.ctx), *rec.Commit); err != nil {
		return s.noSpace(err)
	}
	s.step("import:finished")
	done := *rec
	done.Commit, done.Fetch = nil, nil
	s.mu.Lock()
	j.setLocked(func(i *storage.Import) { s.endImport(i, nil) })
	done.Import = j.now
	s.mu.Unlock()
	err := st.Apply(store.Change{Put: []Object{*rec.Commit}, PutImport: &done})
	s.step("import:done")
	return err
}

// bring does the import up to the decision to commit it, which is rec.Commit.
func (s *Service) bring(st *store.Store, j *job, rec *store.Import) error {
	as, err := worker.LookupIdentity(s.opts.WorkerUser)
	if err != nil {
		return err
	}
	as.Starter = s.opts.Starter
	o := templateOf(*rec)
	var target Target
	defer func() {
		if target.File != nil {
			target.File.Close()
		}
	}()
	ij := importer.Job{
		ID: j.id, URL: rec.Request.URL, File: j.file, Checksum: rec.Request.Checksum, As: as, Fetcher: s.fetcher, Staging: s.backend.Staging(),
		Limits: image.Limits{MaxVirtualSize: s.opts.MaxImageSize, MaxScratch: maxScratch, Writers: writers()},
		SaveResume: func(r importer.Resume) {
			rec.Fetch, _ = json.Marshal(r) // plain values
			if err := st.Apply(store.Change{PutImport: rec}); err != nil {
				s.log.Warn("cannot record how far a download is", "import", j.id, "error", err)
			}
			s.step("import:fetching")
		},
		Open: func(format string, size int64) (*os.File, int64, bool, error) {
			if target.File != nil {
				target.File.Close()
				target.File = nil
			}
			o.Format = format
			s.mu.Lock()
			j.setLocked(func(i *storage.Import) { i.SourceFormat = format })
			s.mu.Unlock()
			var err error
			target, err = s.backend.OpenTarget(j.ctx, o, size)
			s.step("import:target")
			return target.File, target.Size, target.Block, err
		},
		Grow: func(size int64) (int64, error) { return target.Grow(size) },
		Progress: func(phase string, done, total, wrote int64) {
			s.mu.Lock()
			defer s.mu.Unlock()
			j.setLocked(func(i *storage.Import) {
				i.Progress = service.Progress{Phase: phase, Done: uint64(done), Total: uint64(total)}
				i.BytesWritten = uint64(wrote)
			})
		},
	}
	if len(rec.Fetch) > 0 {
		var r importer.Resume
		if json.Unmarshal(rec.Fetch, &r) == nil {
			ij.Resume = &r
		}
	}
	s.mu.Lock()
	j.setLocked(func(i *storage.Import) { i.State = storage.ImportRunning })
	rec.Import = j.now
	s.mu.Unlock()
	if err := st.Apply(store.Change{PutImport: rec}); err != nil {
		return err
	}
	stop := s.guardSpace(j)
	res, err := importer.Run(j.ctx, ij)
	stop()
	if err != nil {
		return err
	}
	s.step("import:converted")
	if target.Settle != nil {
		if err := target.Settle(res.Size); err != nil {
			return err
		}
	}
	o.Size = uint64(res.Size)
	s.mu.Lock()
	j.setLocked(func(i *storage.Import) {
		i.BytesWritten = uint64(res.Wrote)
		i.Progress = service.Progress{Phase: importer.PhaseConvert, Done: o.Size, Total: o.Size}
	})
	rec.Import = j.now
	s.mu.Unlock()
	// The last moment for a cancellation. From the next line on the template will be there.
	if err := context.Cause(j.ctx); err != nil {
		return err
	}
	rec.Commit = &o
	if err := st.Apply(store.Change{PutImport: rec}); err != nil {
		rec.Commit = nil
		return err
	}
	return nil
}

// spaceLook is the time between two looks at the space while an import runs.
const spaceLook = time.Second

// guardSpace ends an import before it takes the last space from guests that run: at 64 MiB, or a fiftieth of a
// small place. Where it fills faster than we look, writing fails by itself.
func (s *Service) guardSpace(j *job) (stop func()) {
	ctx, cancel := context.WithCancel(j.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(spaceLook)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			sp, err := s.backend.Space(ctx)
			if err == nil && sp.Available < min(64<<20, sp.Total/50) {
				j.cancel(errs.New(errs.Exhausted, "the image does not fit: %s has no more than %d MiB left", sp.Place, sp.Available>>20).
					Because("NO_SPACE").Do("free space where volumes are kept, then import again"))
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// noSpace says where there is no space, and what to do.
func (s *Service) noSpace(err error) error {
	if errs.KindOf(err) != errs.Exhausted || errs.RemedyOf(err) != "" {
		return err
	}
	return &errs.Error{Kind: errs.Exhausted, Reason: "NO_SPACE", Message: "there is no space left for the image", Err: err,
		Remedy: "free space where volumes are kept, then import again"}
}

// importLocked is how an import is now.
func (s *Service) importLocked(rec store.Import) storage.Import {
	if j, ok := s.jobs[rec.ID]; ok {
		return j.now
	}
	return rec.Import
}
