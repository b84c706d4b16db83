package sdktest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/lima-vm/go-qcow2reader"
	"github.com/lima-vm/go-qcow2reader/image"
	"github.com/lima-vm/go-qcow2reader/image/qcow2"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/fdpass"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
)

// CreateSnapshot implements storage.Service.
func (s *Storage) CreateSnapshot(_ context.Context, req storage.CreateSnapshotRequest) (storage.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.st.Volumes.find(req.VolumeID)
	if err != nil {
		return storage.Snapshot{}, err
	}
	if old, ok := s.st.Snapshots.Objects[req.ID]; ok {
		if old.V.VolumeID == v.V.ID && old.V.Name == req.Name {
			return old.V, nil
		}
		return storage.Snapshot{}, errs.New(errs.Exists, "the id belongs to another snapshot")
	}
	if err := ident.CheckID("id", req.ID); err != nil {
		return storage.Snapshot{}, err
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return storage.Snapshot{}, err
	}
	for _, sn := range s.snapshotsLocked(v.V.ID) {
		if sn.Name == req.Name {
			return storage.Snapshot{}, errs.New(errs.Exists, "the volume has a snapshot of this name").With(errs.Resource{Type: "snapshot", Name: req.Name})
		}
	}
	if err := copyFile(s.path(req.ID), v.V.ID, s.path, v.V.SizeBytes); err != nil {
		return storage.Snapshot{}, err
	}
	at := time.Now().UTC()
	for _, sn := range s.st.Snapshots.Objects {
		if !sn.V.CreatedAt.Before(at) {
			at = sn.V.CreatedAt.Add(time.Nanosecond)
		}
	}
	sn := storage.Snapshot{ID: req.ID, Name: req.Name, VolumeID: v.V.ID, VolumeName: v.V.Name, SizeBytes: v.V.SizeBytes, CreatedAt: at, Labels: req.Labels}
	s.st.Snapshots.Objects[req.ID] = &record[storage.CreateSnapshotRequest, storage.Snapshot]{req, sn}
	return sn, s.saveLocked()
}

// snapshotsLocked lists a volume's, or all with "", oldest first.
func (s *Storage) snapshotsLocked(volume string) []storage.Snapshot {
	out := []storage.Snapshot{}
	for _, r := range s.st.Snapshots.Objects {
		if volume == "" || r.V.VolumeID == volume {
			out = append(out, r.V)
		}
	}
	slices.SortFunc(out, func(a, b storage.Snapshot) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return out
}

// ListSnapshots implements storage.Service.
func (s *Storage) ListSnapshots(_ context.Context, req storage.ListSnapshotsRequest) ([]storage.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if req.VolumeID == "" {
		return s.snapshotsLocked(""), nil
	}
	v, err := s.st.Volumes.find(req.VolumeID)
	if err != nil {
		return nil, err
	}
	return s.snapshotsLocked(v.V.ID), nil
}

// DeleteSnapshot implements storage.Service.
func (s *Storage) DeleteSnapshot(_ context.Context, req storage.Ref) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, err := s.st.Snapshots.find(req.Ref); err == nil {
		os.Remove(s.path(r.V.ID))
		delete(s.st.Snapshots.Objects, r.V.ID)
	}
	return s.saveLocked()
}

// Rollback implements storage.Service.
func (s *Storage) Rollback(_ context.Context, req storage.RollbackRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	sn, err := s.st.Snapshots.find(req.SnapshotID)
	if err != nil {
		return err
	}
	v, err := s.st.Volumes.find(sn.V.VolumeID)
	if err != nil {
		return err
	}
	if err := inUse(v.V); err != nil {
		return err
	}
	var newer []storage.Snapshot
	for _, other := range s.snapshotsLocked(v.V.ID) {
		if other.CreatedAt.After(sn.V.CreatedAt) {
			newer = append(newer, other)
		}
	}
	if len(newer) > 0 && !req.DestroyNewer {
		return errs.New(errs.Precondition, "the newer snapshots %s would be lost", snapNames(newer)).Because("NEWER_SNAPSHOTS").Do("allow it, or delete them first")
	}
	for _, other := range newer {
		os.Remove(s.path(other.ID))
		delete(s.st.Snapshots.Objects, other.ID)
	}
	if err := copyFile(s.path(v.V.ID), sn.V.ID, s.path, sn.V.SizeBytes); err != nil {
		return err
	}
	v.V.SizeBytes = sn.V.SizeBytes
	return s.saveLocked()
}

// StartImport implements storage.Service.
func (s *Storage) StartImport(_ context.Context, req storage.ImportRequest) (storage.Import, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ident.CheckID("id", req.ID); err != nil {
		return storage.Import{}, err
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return storage.Import{}, err
	}
	if old, ok := s.imports[req.ID]; ok {
		if old.req.Name == req.Name && old.req.URL == req.URL && old.req.Checksum == req.Checksum {
			return old.now, nil
		}
		return storage.Import{}, errs.New(errs.Exists, "the id belongs to another import")
	}
	if t, ok := s.st.Templates.Objects[req.ID]; ok { // from before a restart
		if t.V.Name == req.Name {
			return storage.Import{ID: req.ID, Name: req.Name, State: storage.ImportDone, StartedAt: t.V.CreatedAt, EndedAt: t.V.CreatedAt}, nil
		}
		return storage.Import{}, errs.New(errs.Exists, "the id belongs to another template")
	}
	if err := s.st.Templates.free(req.Name, ""); err != nil {
		return storage.Import{}, err
	}
	for _, i := range s.imports {
		if i.now.Name == req.Name && !i.now.State.Final() {
			return storage.Import{}, errs.New(errs.Exists, "an import of this name is running").Because("NAME_IN_USE")
		}
	}
	if _, _, err := digest(req.Checksum); err != nil {
		return storage.Import{}, err
	}
	source := req.FileName
	switch {
	case (req.File == nil) == (req.URL == ""):
		return storage.Import{}, errs.Field("url", "give a file or a URL", "exactly one source is needed")
	case req.URL != "":
		u, err := url.Parse(req.URL)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			return storage.Import{}, errs.Field("url", "give an http or https URL", "url %s cannot be used", ident.Quote(req.URL))
		}
		u.User = nil
		source = u.String()
	default:
		own, err := fdpass.Dup(req.File) // ours to keep after the call
		if err != nil {
			return storage.Import{}, err
		}
		req.File = own
	}
	ctx, cancel := context.WithCancel(context.Background())
	i := &fakeImport{req: req, changed: make(chan struct{}), cancel: cancel,
		now: storage.Import{ID: req.ID, Name: req.Name, Source: source, State: storage.ImportRunning, StartedAt: time.Now().UTC()}}
	s.imports[req.ID] = i
	s.wg.Go(func() { s.runImport(ctx, i) })
	return i.now, nil
}

func digest(sum string) (hash.Hash, string, error) {
	algorithm, text, _ := strings.Cut(sum, ":")
	var h hash.Hash
	switch algorithm {
	case "":
		return nil, "", nil
	case "sha256":
		h = sha256.New()
	case "sha512":
		h = sha512.New()
	}
	if b, err := hex.DecodeString(text); h == nil || err != nil || len(b) != h.Size() {
		return nil, "", errs.Field("checksum", "give sha256:<hex> or sha512:<hex>", "checksum %s cannot be used", ident.Quote(sum))
	}
	return h, text, nil
}

func (s *Storage) runImport(ctx context.Context, i *fakeImport) {
	size, format, err := s.fetch(ctx, i)
	s.mu.Lock()
	defer s.mu.Unlock()
	defer i.cancel()
	i.now.EndedAt = time.Now().UTC()
	switch {
	case ctx.Err() != nil:
		i.now.State = storage.ImportCanceled
	case err != nil:
		i.now.State, i.now.Failure, i.now.FailureKind, i.now.Remedy = storage.ImportFailed, err.Error(), uint32(errs.KindOf(err)), errs.RemedyOf(err)
	default:
		i.now.State, i.now.SourceFormat, i.now.BytesWritten = storage.ImportDone, format, size
		t := storage.Template{ID: i.req.ID, Name: i.req.Name, SizeBytes: size, Source: i.now.Source, SourceFormat: format, Checksum: i.req.Checksum,
			CreatedAt: time.Now().UTC(), State: storage.StateReady, Labels: i.req.Labels}
		s.st.Templates.Objects[t.ID] = &record[storage.CreateTemplateRequest, storage.Template]{storage.CreateTemplateRequest{ID: t.ID, Name: t.Name}, t}
		if err := s.saveLocked(); err != nil {
			i.now.State, i.now.Failure, i.now.FailureKind = storage.ImportFailed, err.Error(), uint32(errs.KindOf(err))
		}
	}
	if i.now.State != storage.ImportDone {
		os.Remove(s.path(i.req.ID))
	}
	close(i.changed)
	i.changed = make(chan struct{})
}

// fetch brings the image to its place and returns its virtual size.
func (s *Storage) fetch(ctx context.Context, i *fakeImport) (uint64, string, error) {
	var src io.ReadCloser = i.req.File
	if i.req.URL != "" {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, i.req.URL, nil)
		if err != nil {
			return 0, "", err
		}
		resp, err := httpClient.Do(req)
		if err != nil {
			return 0, "", errs.Wrap(errs.Unavailable, err, "download")
		}
		if resp.StatusCode != http.StatusOK {
			resp.Body.Close()
			return 0, "", errs.New(errs.Unavailable, "the server answered %s", resp.Status).Do("check the URL")
		}
		src = resp.Body
	} else if _, err := i.req.File.Seek(0, io.SeekStart); err != nil && !errors.Is(err, os.ErrInvalid) {
		_ = err // a pipe is read from where it is
	}
	defer src.Close()
	defer context.AfterFunc(ctx, func() { src.Close() })()
	tmp := s.path(i.req.ID) + ".part"
	out, err := os.Create(tmp)
	if err != nil {
		return 0, "", err
	}
	defer os.Remove(tmp)
	defer out.Close()
	h, want, _ := digest(i.req.Checksum)
	var w io.Writer = out
	if h != nil {
		w = io.MultiWriter(out, h)
	}
	if _, err := io.Copy(w, &watched{ctx, src, func(n int) { s.progress(i, n) }}); err != nil {
		return 0, "", errs.Wrap(errs.Unavailable, err, "reading the image")
	}
	if h != nil && hex.EncodeToString(h.Sum(nil)) != want {
		return 0, "", errs.New(errs.Corrupt, "the checksum is %x, not %s", h.Sum(nil), want).Because("CHECKSUM").Do("download the image again")
	}
	return s.convert(ctx, out, i.req.ID)
}

func (s *Storage) progress(i *fakeImport, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i.now.Progress = service.Progress{Phase: "copy", Done: i.now.Progress.Done + uint64(n)}
}

type watched struct {
	ctx context.Context
	r   io.Reader
	fn  func(int)
}

func (w *watched) Read(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.r.Read(b)
	w.fn(n)
	return n, err
}

func (s *Storage) convert(ctx context.Context, f *os.File, id string) (uint64, string, error) {
	magic := make([]byte, 4)
	n, _ := f.ReadAt(magic, 0)
	fi, err := f.Stat()
	if err != nil {
		return 0, "", err
	}
	if !bytes.Equal(magic[:n], []byte("QFI\xfb")) {
		if fi.Size() == 0 {
			return 0, "", errs.New(errs.Invalid, "the image is empty")
		}
		size := (fi.Size() + 511) &^ 511
		if err := f.Truncate(size); err != nil {
			return 0, "", err
		}
		return uint64(size), "raw", os.Rename(f.Name(), s.path(id))
	}
	img, err := qcow2reader.OpenWithType(f, qcow2.Type)
	if err != nil {
		return 0, "", errs.Wrap(errs.Corrupt, err, "the image is no whole qcow2")
	}
	defer img.Close()
	if q, ok := img.(*qcow2.Qcow2); ok && q.BackingFile != "" {
		return 0, "", errs.New(errs.Invalid, "the image refers to another file").Do("flatten it: qemu-img convert -O qcow2 in out")
	}
	if err := readable(img); err != nil {
		return 0, "", errs.Wrap(errs.Corrupt, err, "the image cannot be read")
	}
	out, err := os.Create(s.path(id))
	if err != nil {
		return 0, "", err
	}
	defer out.Close()
	if _, err := io.Copy(out, &watched{ctx, io.NewSectionReader(img, 0, img.Size()), func(int) {}}); err != nil {
		return 0, "", errs.Wrap(errs.Corrupt, err, "the image is damaged")
	}
	return uint64(img.Size()), "qcow2", nil
}

func readable(img image.Image) error { return img.Readable() }

// WatchImport implements storage.Service.
func (s *Storage) WatchImport(ctx context.Context, req storage.Ref, fn func(storage.Import) error) error {
	for {
		s.mu.Lock()
		i, err := s.importLocked(req.Ref)
		if err != nil {
			s.mu.Unlock()
			return err
		}
		now, changed := i.now, i.changed
		s.mu.Unlock()
		if err := fn(now); err != nil || now.State.Final() {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *Storage) importLocked(ref string) (*fakeImport, error) {
	if i, ok := s.imports[ref]; ok {
		return i, nil
	}
	for _, i := range s.imports {
		if i.now.Name == ref {
			return i, nil
		}
	}
	return nil, errs.New(errs.NotFound, "no import %s", ident.Quote(ref)).With(errs.Resource{Type: "import", Name: ref})
}

// ListImports implements storage.Service.
func (s *Storage) ListImports(context.Context) ([]storage.Import, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []storage.Import{}
	for _, i := range s.imports {
		out = append(out, i.now)
	}
	slices.SortFunc(out, func(a, b storage.Import) int { return a.StartedAt.Compare(b.StartedAt) })
	return out, nil
}

// CancelImport implements storage.Service.
func (s *Storage) CancelImport(_ context.Context, req storage.Ref) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, err := s.importLocked(req.Ref); err == nil {
		i.cancel()
	}
	return nil
}

// CreateTemplate implements storage.Service.
func (s *Storage) CreateTemplate(_ context.Context, req storage.CreateTemplateRequest) (storage.Template, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, err := s.st.Templates.create(req.ID, req.Name, req)
	if err != nil {
		return storage.Template{}, err
	}
	if old != nil {
		return old.V, nil
	}
	sn, err := s.st.Snapshots.find(req.SnapshotID)
	if err != nil {
		return storage.Template{}, err
	}
	if err := copyFile(s.path(req.ID), sn.V.ID, s.path, sn.V.SizeBytes); err != nil {
		return storage.Template{}, err
	}
	t := storage.Template{ID: req.ID, Name: req.Name, SizeBytes: sn.V.SizeBytes, Source: sn.V.VolumeName + "@" + sn.V.Name, SourceFormat: "raw",
		CreatedAt: time.Now().UTC(), State: storage.StateReady, Labels: req.Labels}
	s.st.Templates.Objects[t.ID] = &record[storage.CreateTemplateRequest, storage.Template]{req, t}
	return t, s.saveLocked()
}

// GetTemplate implements storage.Service.
func (s *Storage) GetTemplate(_ context.Context, req storage.Ref) (storage.Template, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Templates.find(req.Ref)
	if err != nil {
		return storage.Template{}, err
	}
	return r.V, nil
}

// ListTemplates implements storage.Service.
func (s *Storage) ListTemplates(context.Context) ([]storage.Template, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.st.Templates.list(), nil
}

// RenameTemplate implements storage.Service.
func (s *Storage) RenameTemplate(_ context.Context, req storage.RenameRequest) (storage.Template, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Templates.find(req.Ref)
	if err == nil {
		err = ident.CheckName("name", req.Name)
	}
	if err == nil {
		err = s.st.Templates.free(req.Name, r.V.ID)
	}
	if err != nil {
		return storage.Template{}, err
	}
	r.V.Name = req.Name
	return r.V, s.saveLocked()
}

// DeleteTemplate implements storage.Service.
func (s *Storage) DeleteTemplate(_ context.Context, req storage.Ref) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, err := s.st.Templates.find(req.Ref); err == nil {
		os.Remove(s.path(r.V.ID))
		delete(s.st.Templates.Objects, r.V.ID)
	}
	return s.saveLocked()
}
