package sdktest

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
)

// Storage is a storage.Service whose volumes are plain files in a directory.
type Storage struct {
	dir string

	mu      sync.Mutex
	st      storageState
	imports map[string]*fakeImport
	wg      sync.WaitGroup
}

type storageState struct {
	Volumes   table[storage.CreateVolumeRequest, storage.Volume]
	Snapshots table[storage.CreateSnapshotRequest, storage.Snapshot]
	Templates table[storage.CreateTemplateRequest, storage.Template]
	Seq       int // orders snapshots that were made within one tick of the clock
}

type fakeImport struct {
	req     storage.ImportRequest
	now     storage.Import
	changed chan struct{} // closed and replaced at each change
	cancel  context.CancelFunc
}

var (
	_ storage.Service  = (*Storage)(nil)
	_ storage.Backuper = (*Storage)(nil)
)

// NewStorage opens the fake in dir.
func NewStorage(dir string) (*Storage, error) {
	s := &Storage{dir: dir, imports: map[string]*fakeImport{}}
	s.st.Volumes = newTable[storage.CreateVolumeRequest]("volume", func(v *storage.Volume) string { return v.Name })
	s.st.Snapshots = newTable[storage.CreateSnapshotRequest]("snapshot", func(v *storage.Snapshot) string { return v.Name })
	s.st.Templates = newTable[storage.CreateTemplateRequest]("template", func(v *storage.Template) string { return v.Name })
	return s, load(dir, &s.st)
}

// Health implements service.Base.
func (s *Storage) Health(context.Context) (service.Health, error) { return service.Health{}, nil }

// Shutdown cancels imports and waits for them.
func (s *Storage) Shutdown(context.Context) error {
	s.mu.Lock()
	for _, i := range s.imports {
		i.cancel()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

func (s *Storage) path(id string) string { return filepath.Join(s.dir, id+".raw") }

func (s *Storage) saveLocked() error { return save(s.dir, &s.st) }

// volumeLocked is a volume as it is now.
func (s *Storage) volumeLocked(v storage.Volume) storage.Volume {
	v.SnapshotCount = 0
	for _, sn := range s.st.Snapshots.Objects {
		if sn.V.VolumeID == v.ID {
			v.SnapshotCount++
		}
	}
	v.Attachments = slices.Clone(v.Attachments)
	v.Labels = clone(v.Labels)
	return v
}

// CreateVolume implements storage.Service.
func (s *Storage) CreateVolume(_ context.Context, req storage.CreateVolumeRequest) (storage.Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, err := s.st.Volumes.create(req.ID, req.Name, req)
	if err != nil {
		return storage.Volume{}, err
	}
	if old != nil {
		return s.volumeLocked(old.V), nil
	}
	if req.SizeBytes%512 != 0 || req.SizeBytes > maxVolume {
		return storage.Volume{}, errs.Field("size_bytes", "give a multiple of 512, at most 1 PiB", "size_bytes %d cannot be used", req.SizeBytes)
	}
	v := storage.Volume{ID: req.ID, Name: req.Name, SizeBytes: req.SizeBytes, BlockSize: 4096, CreatedAt: time.Now().UTC(), State: storage.StateReady, Labels: req.Labels}
	if req.BlockSize != 0 {
		v.BlockSize = req.BlockSize
	}
	var size uint64
	switch {
	case count(req.FromTemplate, req.FromSnapshot, req.FromVolume) > 1:
		return storage.Volume{}, errs.Field("from_template", "give one source", "more than one source")
	case req.FromTemplate != "":
		t, err := s.st.Templates.find(req.FromTemplate)
		if err != nil {
			return storage.Volume{}, err
		}
		v.OriginType, v.OriginID, size = "template", t.V.ID, t.V.SizeBytes
	case req.FromSnapshot != "":
		t, err := s.st.Snapshots.find(req.FromSnapshot)
		if err != nil {
			return storage.Volume{}, err
		}
		v.OriginType, v.OriginID, size = "snapshot", t.V.ID, t.V.SizeBytes
	case req.FromVolume != "":
		t, err := s.st.Volumes.find(req.FromVolume)
		if err != nil {
			return storage.Volume{}, err
		}
		v.OriginType, v.OriginID, size = "volume", t.V.ID, t.V.SizeBytes
	case req.SizeBytes == 0:
		return storage.Volume{}, errs.Field("size_bytes", "give a size", "an empty volume needs a size")
	}
	if v.SizeBytes == 0 {
		v.SizeBytes = size
	}
	if v.SizeBytes < size {
		return storage.Volume{}, errs.Field("size_bytes", fmt.Sprintf("give at least %d", size), "size_bytes is less than the source's %d", size)
	}
	if err := copyFile(s.path(v.ID), v.OriginID, s.path, v.SizeBytes); err != nil {
		return storage.Volume{}, err
	}
	s.st.Volumes.Objects[v.ID] = &record[storage.CreateVolumeRequest, storage.Volume]{req, v}
	return s.volumeLocked(v), s.saveLocked()
}

func count(list ...string) (n int) {
	for _, s := range list {
		if s != "" {
			n++
		}
	}
	return n
}

// copyFile makes path of the object from (or empty), with this size.
func copyFile(path, from string, where func(string) string, size uint64) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	if from != "" {
		in, err := os.Open(where(from))
		if err != nil {
			return err
		}
		defer in.Close()
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
	return out.Truncate(int64(size))
}

// GetVolume implements storage.Service.
func (s *Storage) GetVolume(_ context.Context, req storage.Ref) (storage.Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Volumes.find(req.Ref)
	if err != nil {
		return storage.Volume{}, err
	}
	return s.volumeLocked(r.V), nil
}

// ListVolumes implements storage.Service.
func (s *Storage) ListVolumes(context.Context) ([]storage.Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.st.Volumes.list()
	for i := range out {
		out[i] = s.volumeLocked(out[i])
	}
	return out, nil
}

// ResizeVolume implements storage.Service.
func (s *Storage) ResizeVolume(_ context.Context, req storage.ResizeVolumeRequest) (storage.Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Volumes.find(req.Ref)
	if err != nil {
		return storage.Volume{}, err
	}
	if req.SizeBytes < r.V.SizeBytes || req.SizeBytes%512 != 0 {
		return storage.Volume{}, errs.Field("size_bytes", "volumes only grow, by multiples of 512", "size_bytes %d, the volume has %d", req.SizeBytes, r.V.SizeBytes)
	}
	if err := os.Truncate(s.path(r.V.ID), int64(req.SizeBytes)); err != nil {
		return storage.Volume{}, err
	}
	r.V.SizeBytes = req.SizeBytes
	return s.volumeLocked(r.V), s.saveLocked()
}

// RenameVolume implements storage.Service.
func (s *Storage) RenameVolume(_ context.Context, req storage.RenameRequest) (storage.Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Volumes.find(req.Ref)
	if err == nil {
		err = ident.CheckName("name", req.Name)
	}
	if err == nil {
		err = s.st.Volumes.free(req.Name, r.V.ID)
	}
	if err != nil {
		return storage.Volume{}, err
	}
	r.V.Name = req.Name
	for _, sn := range s.st.Snapshots.Objects {
		if sn.V.VolumeID == r.V.ID {
			sn.V.VolumeName = req.Name
		}
	}
	return s.volumeLocked(r.V), s.saveLocked()
}

func inUse(v storage.Volume) error {
	if len(v.Attachments) == 0 {
		return nil
	}
	return errs.New(errs.Precondition, "VM %s uses the volume", v.Attachments[0].VMID).Because("VOLUME_IN_USE").
		With(errs.Resource{Type: "volume", ID: v.ID, Name: v.Name}).Do("stop the VM first")
}

// DeleteVolume implements storage.Service.
func (s *Storage) DeleteVolume(_ context.Context, req storage.DeleteVolumeRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Volumes.find(req.Ref)
	if err != nil {
		return nil // already gone
	}
	if err := inUse(r.V); err != nil {
		return err
	}
	snaps := s.snapshotsLocked(r.V.ID)
	if len(snaps) > 0 && !req.WithSnapshots {
		return errs.New(errs.Precondition, "it has the snapshots %s", snapNames(snaps)).Because("HAS_SNAPSHOTS").
			With(errs.Resource{Type: "volume", ID: r.V.ID, Name: r.V.Name}).Do("delete them first, or with the volume")
	}
	for _, sn := range snaps {
		os.Remove(s.path(sn.ID))
		delete(s.st.Snapshots.Objects, sn.ID)
	}
	os.Remove(s.path(r.V.ID))
	delete(s.st.Volumes.Objects, r.V.ID)
	return s.saveLocked()
}

func snapNames(list []storage.Snapshot) string {
	var n []string
	for _, s := range list {
		n = append(n, s.Name)
	}
	return strings.Join(n, ", ")
}

// Attach implements storage.Service.
func (s *Storage) Attach(_ context.Context, req storage.AttachRequest) (storage.Attachment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Volumes.find(req.VolumeID)
	if err != nil {
		return storage.Attachment{}, err
	}
	if req.Owner.VMID == "" {
		return storage.Attachment{}, errs.Field("owner.vm_id", "say which VM attaches", "owner.vm_id is empty")
	}
	have := slices.IndexFunc(r.V.Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == req.Owner.VMID })
	for i, a := range r.V.Attachments {
		if i != have && !(a.ReadOnly && req.ReadOnly) {
			return storage.Attachment{}, inUse(r.V)
		}
	}
	info := storage.AttachmentInfo{VMID: req.Owner.VMID, UID: req.Owner.UID, ReadOnly: req.ReadOnly, Path: s.path(r.V.ID)}
	if have >= 0 {
		r.V.Attachments[have] = info
	} else {
		r.V.Attachments = append(r.V.Attachments, info)
	}
	return storage.Attachment{Path: info.Path, Format: storage.FormatRaw, ReadOnly: req.ReadOnly, SizeBytes: r.V.SizeBytes, BlockSize: r.V.BlockSize}, s.saveLocked()
}

// Detach implements storage.Service.
func (s *Storage) Detach(_ context.Context, req storage.DetachRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.st.Volumes.find(req.VolumeID)
	if err != nil {
		return nil
	}
	r.V.Attachments = slices.DeleteFunc(r.V.Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == req.VMID })
	return s.saveLocked()
}

// Stats implements storage.Service.
func (s *Storage) Stats(context.Context) (storage.Stats, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := storage.Stats{Place: s.dir, TotalBytes: 1 << 40, AvailableBytes: 1 << 40, CompressionRatio: 1,
		Volumes: uint32(len(s.st.Volumes.Objects)), Templates: uint32(len(s.st.Templates.Objects)), Snapshots: uint32(len(s.st.Snapshots.Objects))}
	for _, v := range s.st.Volumes.Objects {
		st.ProvisionedBytes += v.V.SizeBytes
	}
	return st, nil
}

// Backup implements storage.Backuper.
func (s *Storage) Backup(_ context.Context, w io.Writer) error {
	s.mu.Lock()
	b, err := os.ReadFile(filepath.Join(s.dir, "state.json"))
	s.mu.Unlock()
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if len(b) == 0 {
		b = []byte("{}")
	}
	_, err = w.Write(b)
	return err
}

// Restore implements storage.Backuper.
func (s *Storage) Restore(_ context.Context, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.st.Volumes.Objects)+len(s.st.Templates.Objects) > 0 {
		return errs.New(errs.Precondition, "the plugin is not empty").Do("restore onto an empty one")
	}
	if err := os.WriteFile(filepath.Join(s.dir, "state.json"), b, 0o600); err != nil {
		return err
	}
	return load(s.dir, &s.st)
}

const maxVolume = 1 << 50

var httpClient = &http.Client{Timeout: time.Minute}
