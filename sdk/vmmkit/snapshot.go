package vmmkit

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// A memory snapshot is the directory snapshots/<its id>: "state" holds what the hypervisor wrote, snapshot.json
// the record below. The hypervisor writes into the VM's own directory; only when all is on disk is it moved to
// its place, by one rename. So a snapshot is there wholly or not at all, and what a crash leaves in a VM's
// directory is removed at the next start.
const (
	snapshotRecord = "snapshot.json"
	snapshotState  = "state"
	snapshotFormat = 1
	snapshotPrefix = "snapshot-" // of a directory in the VM's, while it is written
	restoreDir     = "restore"   // in the VM's directory, while it is started from one

	// copyRate is the slowest that memory is thought to be written or read, in bytes a second.
	copyRate = 50 << 20
)

// snapshot is the record of one.
type snapshot struct {
	Format    int
	Snapshot  vmm.MemorySnapshot
	Initramfs string
	Driver    json.RawMessage `json:",omitempty"`

	dir string // its state directory
}

// Snapshotting is a Manager whose driver's instances are Resizers and Snapshotters: it has the features
// FeatureVMMResize and FeatureVMMSnapshot.
type Snapshotting struct{ Resizable }

var _ vmm.Snapshotter = Snapshotting{}

func (m *Manager) snapshotsDir() string { return filepath.Join(m.o.DataDir, "snapshots") }

// copyTime is how long memory of that size may take.
func copyTime(bytes uint64) time.Duration {
	return connectTimeout + time.Duration(bytes/copyRate)*time.Second
}

// loadSnapshots reads the records of all; one that is damaged is told and left alone.
func (m *Manager) loadSnapshots() error {
	ents, err := os.ReadDir(m.snapshotsDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errs.Wrap(errs.Unknown, err, "the snapshots cannot be read")
	}
	m.snaps = map[string]*snapshot{}
	for _, e := range ents {
		id := e.Name()
		if strings.HasPrefix(id, ".") { // being deleted when we ended
			if err := os.RemoveAll(filepath.Join(m.snapshotsDir(), id)); err != nil {
				m.o.Log.Warn("what is left of a deleted snapshot cannot be removed", "name", id, "error", err)
			}
			continue
		}
		s, err := readSnapshot(filepath.Join(m.snapshotsDir(), id))
		if err == nil && s.Snapshot.ID != id {
			err = errs.New(errs.Corrupt, "the record is snapshot %s's", ident.Quote(s.Snapshot.ID))
		}
		if err != nil {
			m.setCondition(service.Condition{Code: "SNAPSHOT_DAMAGED", Severity: service.SeverityWarning, Object: id,
				Text: "memory snapshot " + id + ": " + err.Error(), Remedy: "remove its directory below " + m.snapshotsDir()})
			continue
		}
		m.snaps[id] = s
		m.kn.Hold(s.Snapshot.Spec.Boot.KernelSHA256)
		m.kn.Hold(s.Initramfs)
	}
	return nil
}

func readSnapshot(dir string) (*snapshot, error) {
	b, err := os.ReadFile(filepath.Join(dir, snapshotRecord))
	if err != nil {
		return nil, err
	}
	s := &snapshot{dir: filepath.Join(dir, snapshotState)}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, errs.Wrap(errs.Corrupt, err, "its record is damaged")
	}
	if s.Format != snapshotFormat {
		return nil, errs.New(errs.Precondition, "it has format %d, this program knows %d", s.Format, snapshotFormat)
	}
	return s, nil
}

func (m *Manager) snapshotOf(id string) (*snapshot, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.snaps[id]
	if s == nil {
		return nil, errs.New(errs.NotFound, "there is no such memory snapshot").With(errs.Resource{Type: "vm_snapshot", ID: id}).
			Do("list them with: mvirt vm snapshot ls")
	}
	return s, nil
}

// Snapshot writes a paused VM's memory and devices.
func (r Snapshotting) Snapshot(ctx context.Context, req vmm.SnapshotRequest) (vmm.MemorySnapshot, error) {
	m := r.Manager
	if err := ident.CheckID("snapshot_id", req.SnapshotID); err != nil {
		return vmm.MemorySnapshot{}, err
	}
	if req.Name != "" {
		if err := ident.CheckName("name", req.Name); err != nil {
			return vmm.MemorySnapshot{}, err
		}
	}
	v, err := m.find(req.ID)
	if err != nil {
		return vmm.MemorySnapshot{}, err
	}
	if old, err := m.snapshotOf(req.SnapshotID); err == nil {
		if old.Snapshot.VMID == v.id {
			return old.public(), nil
		}
		return vmm.MemorySnapshot{}, errs.New(errs.Exists, "another VM's snapshot has this id").Do("choose another id")
	}
	if err := m.snapshotNameFree(v.id, req.Name); err != nil {
		return vmm.MemorySnapshot{}, err
	}
	if s := v.now().State; s == vmm.StateRunning {
		return vmm.MemorySnapshot{}, errs.New(errs.Precondition, "the VM is running, and its memory changes").With(v.resource()).
			Because("VM_STATE").Do("pause it first with: mvirt vm pause " + v.now().Spec.Name)
	}
	var snap *snapshot
	_, err = m.ask(ctx, v.id, "snapshotted", func(ctx context.Context, v *machine, run *run, inst Instance) error {
		snap, err = v.snapshot(ctx, run, inst, req)
		return err
	}, vmm.StatePaused)
	if err != nil {
		return vmm.MemorySnapshot{}, err
	}
	return snap.public(), nil
}

func (m *Manager) snapshotNameFree(vmID, name string) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, s := range m.snaps {
		if name != "" && s.Snapshot.VMID == vmID && s.Snapshot.Name == name {
			return errs.New(errs.Exists, "the VM has a memory snapshot %s", name).With(errs.Resource{Type: "vm_snapshot", ID: s.Snapshot.ID, Name: name}).
				Do("choose another name, or delete that one")
		}
	}
	return nil
}

func (v *machine) snapshot(ctx context.Context, run *run, inst Instance, req vmm.SnapshotRequest) (*snapshot, error) {
	m := v.m
	sn, ok := inst.(Snapshotter)
	if !ok {
		return nil, errs.New(errs.Unsupported, "this hypervisor cannot write its memory")
	}
	spec := v.running(run)
	if err := m.roomFor(run); err != nil {
		return nil, err
	}
	tmp, err := m.stateDir(v.id, snapshotPrefix+req.SnapshotID)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	state := filepath.Join(tmp, snapshotState)
	if err := lend(state); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, copyTime(spec.MemoryBytes))
	defer cancel()
	driver, err := sn.Snapshot(ctx, state)
	if err != nil {
		return nil, err
	}
	size, err := settle(state)
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "the snapshot cannot be made durable")
	}
	v.mu.Lock()
	initramfs, hypervisor := run.rec.Initramfs, run.rec.Hypervisor
	v.mu.Unlock()
	s := &snapshot{Format: snapshotFormat, Initramfs: initramfs, Driver: driver, Snapshot: vmm.MemorySnapshot{ID: req.SnapshotID, Name: req.Name,
		VMID: v.id, SizeBytes: size, CreatedAt: m.o.Now(), Hypervisor: hypervisor, Spec: spec, Disks: req.Disks}}
	b, err := json.Marshal(s)
	if err == nil {
		err = writeDurably(filepath.Join(tmp, snapshotRecord), b)
	}
	if err == nil {
		err = os.MkdirAll(m.snapshotsDir(), 0o700)
	}
	final := filepath.Join(m.snapshotsDir(), req.SnapshotID)
	if err == nil {
		err = os.Rename(tmp, final)
	}
	if err == nil {
		err = syncPath(m.snapshotsDir())
	}
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "the snapshot cannot be put in its place")
	}
	s.dir = filepath.Join(final, snapshotState)
	m.kn.Hold(s.Snapshot.Spec.Boot.KernelSHA256)
	m.kn.Hold(s.Initramfs)
	m.mu.Lock()
	m.snaps[req.SnapshotID] = s
	m.mu.Unlock()
	return s, nil
}

// roomFor says whether the file system has room for all that a process has in memory.
func (m *Manager) roomFor(r *run) error {
	var st unix.Statfs_t
	if err := unix.Statfs(m.o.DataDir, &st); err != nil {
		return nil // the write will tell
	}
	_, resident, err := usage(r.proc.Identity().PID)
	if free := st.Bavail * uint64(st.Bsize); err == nil && free < resident {
		return errs.New(errs.Exhausted, "the snapshot needs up to %d MiB and %s has %d MiB left", resident>>20, m.o.DataDir, free>>20).
			Do("make room there, or delete snapshots")
	}
	return nil
}

// stateDir makes a new, empty directory in a VM's own that its hypervisor can use.
func (m *Manager) stateDir(id, name string) (string, error) {
	dir := filepath.Join(m.vmDir(id), name)
	if err := os.RemoveAll(dir); err != nil {
		return "", errs.Wrap(errs.Unknown, err, "what an earlier attempt left cannot be removed")
	}
	return dir, errs.Wrap(errs.Unknown, lend(dir), "the directory of the state cannot be made")
}

// settle brings all files of a directory to the disk and gives the room that they take.
func settle(dir string) (size uint64, err error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, e := range ents {
		p := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return 0, err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return 0, errs.New(errs.Internal, "%s is not a regular file", e.Name())
		}
		if err := syncPath(p); err != nil {
			return 0, err
		}
		const block = 512 // of st_blocks, stat(2)
		size += uint64(st.Blocks) * block
	}
	return size, syncPath(dir)
}

func syncPath(p string) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func writeDurably(p string, b []byte) error {
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close(), syncPath(filepath.Dir(p)))
}

// public is the snapshot as callers see it.
func (s *snapshot) public() vmm.MemorySnapshot {
	p := s.Snapshot
	p.Spec, p.Disks = cloneSpec(p.Spec), slices.Clone(p.Disks)
	return p
}

// ListSnapshots lists those of a VM, or all.
func (r Snapshotting) ListSnapshots(_ context.Context, req vmm.Ref) ([]vmm.MemorySnapshot, error) {
	id := req.Ref
	if v, err := r.find(req.Ref); err == nil {
		id = v.id
	} else if req.Ref != "" && ident.CheckID("ref", req.Ref) != nil {
		return nil, err // a VM that is gone is known by its id alone
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	all := []vmm.MemorySnapshot{}
	for _, s := range r.snaps {
		if id == "" || s.Snapshot.VMID == id {
			all = append(all, s.public())
		}
	}
	sort.Slice(all, func(i, j int) bool {
		a, b := all[i], all[j]
		return a.CreatedAt.Before(b.CreatedAt) || a.CreatedAt.Equal(b.CreatedAt) && a.ID < b.ID
	})
	return all, nil
}

// DeleteSnapshot removes one. A VM that was started from it goes on.
func (r Snapshotting) DeleteSnapshot(_ context.Context, req vmm.Ref) error {
	if err := ident.CheckID("ref", req.Ref); err != nil {
		return err
	}
	m := r.Manager
	m.change.Lock() // so that no Create takes its kernel at the same time
	defer m.change.Unlock()
	m.mu.Lock()
	s := m.snaps[req.Ref]
	delete(m.snaps, req.Ref)
	m.mu.Unlock()
	if s == nil {
		return nil
	}
	at := filepath.Join(m.snapshotsDir(), req.Ref)
	gone := filepath.Join(m.snapshotsDir(), "."+req.Ref)
	err := os.Rename(at, gone)
	if err == nil {
		err = syncPath(m.snapshotsDir())
	}
	if err != nil {
		m.mu.Lock()
		m.snaps[req.Ref] = s
		m.mu.Unlock()
		return errs.Wrap(errs.Unknown, err, "the snapshot cannot be removed")
	}
	m.kn.Release(s.Snapshot.Spec.Boot.KernelSHA256)
	m.kn.Release(s.Initramfs)
	if err := os.RemoveAll(gone); err != nil {
		m.o.Log.Warn("the files of a deleted snapshot stay until the next start", "snapshot", req.Ref, "error", err)
	}
	return nil
}

// StartFromSnapshot starts a VM as it was.
func (r Snapshotting) StartFromSnapshot(ctx context.Context, req vmm.StartFromSnapshotRequest) (vmm.VM, error) {
	s, err := r.snapshotOf(req.SnapshotID)
	if err != nil {
		return vmm.VM{}, err
	}
	return r.start(ctx, req.Start, s)
}

// fits says whether a definition has the shape that a snapshot was made of.
func (s *snapshot) fits(def store.Definition) error {
	was := s.Snapshot.Spec
	plain := func(spec vmm.Spec) vmm.Spec {
		spec = cloneSpec(spec)
		for i, d := range spec.Disks {
			spec.Disks[i] = vmm.Disk{Name: d.Name, ReadOnly: d.ReadOnly}
		}
		for i := range spec.NICs {
			spec.NICs[i] = vmm.NIC{}
		}
		return spec
	}
	differs := ""
	a, b := plain(def.Spec), plain(was)
	switch {
	case a.CPUs != b.CPUs || max(a.CPUs, a.MaxCPUs) != max(b.CPUs, b.MaxCPUs) || a.Topology != b.Topology:
		differs = "vCPUs"
	case a.MemoryBytes != b.MemoryBytes || max(a.MemoryBytes, a.MaxMemory) != max(b.MemoryBytes, b.MaxMemory) || a.HugePages != b.HugePages:
		differs = "memory"
	case !slices.Equal(a.Disks, b.Disks):
		differs = "disks"
	case len(a.NICs) != len(b.NICs):
		differs = "NICs"
	case (a.CloudInit == vmm.CloudInit{}) != (b.CloudInit == vmm.CloudInit{}):
		differs = "cloud-init"
	case a.Nested != b.Nested || a.Watchdog != b.Watchdog || a.Vsock != b.Vsock:
		differs = "devices"
	case a.Boot.Firmware != b.Boot.Firmware || a.Boot.HasKernel != b.Boot.HasKernel:
		differs = "boot"
	default:
		return nil
	}
	return errs.New(errs.Precondition, "the VM has not the %s that the snapshot was made with", differs).Because("OTHER_SHAPE").
		Do("restore it as a new VM, or give this one the same shape again")
}

// sweepStates removes from VMs' directories what an interrupted snapshot or restore left there.
func (m *Manager) sweepStates() {
	for _, pattern := range []string{snapshotPrefix + "*", restoreDir} {
		left, err := filepath.Glob(filepath.Join(m.o.DataDir, "vm", "*", pattern))
		if err != nil {
			continue
		}
		for _, p := range left {
			if err := os.RemoveAll(p); err != nil {
				m.o.Log.Warn("what an interrupted snapshot left cannot be removed", "path", p, "error", err)
			}
		}
	}
}

// restore makes what a driver is told of a snapshot that a VM is to be started from.
func (m *Manager) restore(id string, s *snapshot) (*Restore, error) {
	if _, err := m.stateDir(id, restoreDir); err != nil {
		return nil, err
	}
	return s.restore(m.vmDir(id)), nil
}

func (s *snapshot) restore(vmDir string) *Restore {
	return &Restore{Dir: s.dir, Work: filepath.Join(vmDir, restoreDir), State: s.Driver, Spec: cloneSpec(s.Snapshot.Spec)}
}
