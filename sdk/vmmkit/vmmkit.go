// Package vmmkit is a vmm plugin but for the hypervisor: definitions and runtime records in mvirt.db, the
// state machine of each VM, recovery, process care, console, cloud-init volume, kernels, events. A [Driver]
// adds one hypervisor.
//
// # One VM, one turn
//
// Each VM has one turn; whoever changes it holds the turn from beginning to end, so changes of one VM are
// serial and other VMs are not touched by a hung one. State moves by compare-and-set under the VM's mutex,
// which is never held while something is waited for. Kill is the exception to the turn: it cancels whoever
// holds it. Lists and gets read a published view and wait for nobody.
//
// # What is durable, when
//
// Before a hypervisor is spawned an intent with a marker, an argument that only this process will have, is
// written; after it pid, start time and boot are added. Whatever moment we die at, the next plugin finds the
// process by identity, or by its marker, or knows that there is none:
//
//	no record                    nothing runs
//	record of another boot       the host went down; nothing runs
//	intent, marker not found     died before the spawn
//	intent, marker found         died between spawn and record: adopted
//	pid has another start time   ended while we were away; its pid is somebody else's, who is left alone
//	pid matches, socket answers  adopted
//	pid matches, socket dead     state unknown, asked again and again, never started twice; Kill ends it
//	record damaged               as intent, by the marker's beginning, which is the VM's id
package vmmkit

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/console"
	"github.com/mvirt/mvirt/sdk/vmmkit/kernels"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// Options make a Manager.
type Options struct {
	DataDir string // absolute; made if absent, mode 0700
	Driver  Driver
	Log     hclog.Logger
	Host    service.Host
	Spawner proc.Spawner                // nil: as children, as our user
	RunAs   func(vmID string) vmm.RunAs // without a jail; nil: our user
	Jail    Jail                        // starts hypervisors instead of Spawner; nil: there is none
	Now     func() time.Time            // nil: time.Now
	Memory  uint64                      // of the host, in bytes; 0: look
	Cgroup  string                      // a cgroup v2 directory that we may make children in, or ""
}

// Manager is a vmm.Service over a Driver.
type Manager struct {
	o   Options
	db  *store.DB
	kn  *kernels.Store
	cw  *console.Watcher
	hub *hub

	closing context.Context // ends when Shutdown begins: no new changes
	refuse  context.CancelFunc
	ctx     context.Context // ends when all changes are over: nothing is followed any more
	cancel  context.CancelFunc
	wg      sync.WaitGroup // watchers of processes and connections

	change sync.Mutex // held through a change of definitions: create, update, delete

	mu     sync.RWMutex // guards what follows
	byID   map[string]*machine
	byName map[string]*machine
	conds  map[string]service.Condition // by code and object
	snaps  map[string]*snapshot
}

var _ vmm.Service = (*Manager)(nil)

// Open opens the data directory, finds what runs, and serves.
func Open(ctx context.Context, o Options) (*Manager, error) {
	if !filepath.IsAbs(o.DataDir) {
		return nil, errs.Field("data_dir", "give an absolute path", "the data directory %s is not an absolute path", ident.Quote(o.DataDir))
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Spawner == nil {
		o.Spawner = proc.Local{}
	}
	if o.RunAs == nil {
		o.RunAs = func(string) vmm.RunAs { return vmm.RunAs{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())} }
	}
	if o.Memory == 0 {
		o.Memory = hostMemory()
	}
	if err := os.MkdirAll(filepath.Join(o.DataDir, "vm"), 0o700); err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "the data directory cannot be made")
	}
	m := &Manager{o: o, hub: newHub(), byID: map[string]*machine{}, byName: map[string]*machine{}, conds: map[string]service.Condition{}}
	m.ctx, m.cancel = context.WithCancel(context.WithoutCancel(ctx))
	m.closing, m.refuse = context.WithCancel(m.ctx)
	var err error
	if m.db, err = store.Open(o.DataDir); err != nil {
		return nil, err
	}
	if m.kn, err = kernels.Open(filepath.Join(o.DataDir, "kernels")); err != nil {
		return nil, errors.Join(err, m.db.Close())
	}
	if m.cw, err = console.NewWatcher(); err != nil {
		return nil, errors.Join(err, m.db.Close())
	}
	if err := m.recover(ctx); err != nil {
		return nil, errors.Join(err, m.Shutdown(ctx))
	}
	return m, nil
}

// Shutdown lets go of everything; hypervisors go on.
func (m *Manager) Shutdown(ctx context.Context) error {
	m.refuse()
	m.hub.close()
	held := m.all()
	for _, v := range held {
		v.cancelOperation(errClosing())
	}
	var err error
	for _, v := range held {
		// Whoever holds a turn finishes or undoes, so that what is on disk is true.
		select {
		case v.turn <- struct{}{}:
			v.letGo()
		case <-ctx.Done():
			err = errors.Join(err, errs.Wrap(errs.Deadline, ctx.Err(), "VM %s is still being changed", v.id))
		}
	}
	m.cancel()
	done := make(chan struct{})
	go func() { m.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		err = errors.Join(err, ctx.Err())
	}
	return errors.Join(err, m.cw.Close(), m.db.Close())
}

// Health gives the lasting troubles of kit and driver.
func (m *Manager) Health(context.Context) (service.Health, error) {
	h := service.Health{Conditions: m.o.Driver.Conditions()}
	m.mu.RLock()
	for _, c := range m.conds {
		h.Conditions = append(h.Conditions, c)
	}
	m.mu.RUnlock()
	sort.Slice(h.Conditions, func(i, j int) bool {
		a, b := h.Conditions[i], h.Conditions[j]
		return a.Code < b.Code || a.Code == b.Code && a.Object < b.Object
	})
	return h, nil
}

func (m *Manager) setCondition(c service.Condition) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := c.Code + "/" + c.Object
	if old, ok := m.conds[key]; ok {
		c.Since = old.Since
	} else if c.Since.IsZero() {
		c.Since = m.o.Now()
	}
	m.conds[key] = c
}

func (m *Manager) clearCondition(code, object string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.conds, code+"/"+object)
}

// find finds by id or name.
func (m *Manager) find(ref string) (*machine, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	v := m.byID[ref]
	if v == nil {
		v = m.byName[ref]
	}
	if v == nil {
		return nil, errs.New(errs.NotFound, "there is no such VM").With(errs.Resource{Type: "vm", Name: ref}).
			Do("list the VMs there are with: mvirt vm ls")
	}
	return v, nil
}

// all gives the machines there are.
func (m *Manager) all() []*machine {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Collect(maps.Values(m.byID))
}

// Get finds a VM.
func (m *Manager) Get(_ context.Context, req vmm.Ref) (vmm.VM, error) {
	v, err := m.find(req.Ref)
	if err != nil {
		return vmm.VM{}, err
	}
	return v.now(), nil
}

// List lists all by name.
func (m *Manager) List(context.Context) ([]vmm.VM, error) {
	all := m.all()
	vms := make([]vmm.VM, 0, len(all))
	for _, v := range all {
		vms = append(vms, v.now())
	}
	sort.Slice(vms, func(i, j int) bool { return vms[i].Spec.Name < vms[j].Spec.Name })
	return vms, nil
}

// vmDir is a VM's own directory.
func (m *Manager) vmDir(id string) string { return filepath.Join(m.o.DataDir, "vm", id) }

// audit records a change that nobody asked for and nobody saw: who watches the events audits them. It must not
// hold anybody up.
func (m *Manager) audit(id, message string, labels map[string]string) {
	rec := service.AuditRecord{ID: ident.New(), Time: m.o.Now(), Message: message, Objects: []string{id}, Labels: labels}
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		ctx, cancel := context.WithTimeout(m.ctx, askTimeout)
		defer cancel()
		if err := m.o.Host.Audit(ctx, rec); err != nil {
			m.o.Log.Warn("an audit record was not taken", "message", rec.Message, "vm", id, "error", err)
		}
	}()
}
