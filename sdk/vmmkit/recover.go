package vmmkit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// recoverWait is how long Open waits for hypervisors to answer; those that take longer are unknown until then.
const recoverWait = time.Second

// recover reads the store and finds what runs.
func (m *Manager) recover(ctx context.Context) error {
	c, err := m.db.Load()
	if err != nil {
		return err
	}
	status := map[string]store.Status{}
	for _, it := range c.Status {
		if it.Err == nil {
			status[it.ID] = it.Value
		}
	}
	for _, it := range c.Definitions {
		if it.Err == nil && it.Value.ID != it.ID {
			it.Err = errs.New(errs.Corrupt, "the stored definition of VM %s is another VM's", it.ID)
		}
		if it.Err != nil {
			m.setCondition(service.Condition{Code: "DEFINITION_DAMAGED", Severity: service.SeverityCritical, Text: it.Err.Error(), Object: it.ID,
				Remedy: "restore the plugin's state from a backup"})
			continue
		}
		st, ok := status[it.ID]
		if !ok || st.State != vmm.StateFailed {
			st.State = vmm.StateStopped
		}
		if st.Desired == 0 {
			st.Desired = vmm.StateStopped
		}
		as, err := m.identify(ctx, it.ID)
		if err != nil {
			return err
		}
		v := m.newMachine(it.Value, st, as)
		b := bootFilesOf(it.Value)
		m.kn.Hold(b.kernel)
		m.kn.Hold(b.initramfs)
		m.byID[it.ID], m.byName[it.Value.Spec.Name] = v, v
	}
	if err := m.loadSnapshots(); err != nil {
		return err
	}
	m.sweepStates()
	if err := m.kn.Sweep(); err != nil {
		m.o.Log.Warn("kernels that no VM has cannot be removed", "error", err)
	}
	var connecting sync.WaitGroup
	for _, it := range c.Runtime {
		v := m.byID[it.ID]
		if v == nil {
			continue // its definition is damaged: its process is left alone, and told below
		}
		r, err := v.findRun(it)
		if err != nil {
			return err
		}
		if r != nil {
			connecting.Add(1)
			m.wg.Add(1)
			go func() {
				defer m.wg.Done()
				v.reconnect(r, connecting.Done)
			}()
		}
	}
	m.sweepDirs(c)
	m.forgetGone(ctx, c)
	for _, v := range m.findStrays() {
		m.o.Log.Warn("a hypervisor runs without a record", "vm", v.id)
		r, err := v.findRun(store.Item[store.Runtime]{ID: v.id, Err: errs.New(errs.Corrupt, "no record")})
		if err != nil {
			return err
		}
		if r != nil {
			connecting.Add(1)
			m.wg.Add(1)
			go func() {
				defer m.wg.Done()
				v.reconnect(r, connecting.Done)
			}()
		}
	}
	answered := make(chan struct{})
	go func() { connecting.Wait(); close(answered) }()
	select {
	case <-answered:
	case <-time.After(recoverWait):
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// findRun finds the process of a runtime record. nil: there is none, and that is entered. After an error it is not
// known, and nothing is entered: a VM that is thought not to run would be started a second time.
func (v *machine) findRun(it store.Item[store.Runtime]) (*run, error) {
	m := v.m
	rec := it.Value
	damaged := it.Err != nil || rec.VMID != v.id
	if damaged {
		rec = store.Runtime{VMID: v.id, Marker: markerFor(v.id), Spec: v.def.Spec, Initramfs: v.def.Initramfs}
	}
	var p *proc.Process
	err := proc.ErrGone
	if !damaged && rec.Phase == store.Running {
		p, err = m.openRun(rec)
	} else if found, jailed, ferr := m.findMarked(m.ctx, v.id, rec.Marker); ferr != nil {
		err = ferr
	} else if len(found) > 0 {
		// The oldest: what it may have forked carries the same arguments.
		rec.Process, rec.Marker = found[0].Identity, found[0].Arg
		for _, f := range found {
			if f.StartTime < rec.Process.StartTime {
				rec.Process, rec.Marker = f.Identity, f.Arg
			}
		}
		rec.Jailed = jailed
		p, err = m.openRun(rec)
		m.o.Log.Info("found a hypervisor by its marker", "vm", v.id, "pid", rec.Process.PID)
	}
	if errors.Is(err, proc.ErrGone) {
		v.nothingRuns(rec, damaged)
		return nil, nil
	}
	if err != nil {
		return nil, errs.Wrap(errs.Unavailable, err, "whether a hypervisor of VM %s runs cannot be found out", v.id)
	}
	rec.Phase = store.Running
	if rec.StartedAt.IsZero() {
		rec.StartedAt = m.o.Now()
	}
	if err := m.db.Apply(v.id, store.Change{Runtime: &rec}); err != nil {
		m.o.Log.Error("a found hypervisor cannot be stored", "vm", v.id, "error", err)
	}
	r := &run{rec: rec, proc: p, ended: make(chan struct{})}
	v.mu.Lock()
	v.run = r
	v.state = vmm.StateUnknown
	v.reason, v.since = "found again, not asked yet", m.o.Now()
	v.viewLocked()
	v.mu.Unlock()
	v.follow(r)
	return r, nil
}

// nothingRuns enters that a record's process is gone, and what is known of why.
func (v *machine) nothingRuns(rec store.Runtime, damaged bool) {
	boot, err := proc.BootID()
	st := store.Status{State: vmm.StateFailed, Since: v.m.o.Now(), Desired: v.desired}
	switch {
	case damaged:
		st.Reason = "its runtime record was damaged, and no hypervisor of it runs"
	case rec.Phase == store.Intent:
		st.Reason = "its start was interrupted before the hypervisor ran"
	case err == nil && rec.Process.BootID != boot:
		st.State, st.Reason = vmm.StateStopped, "the host went down"
	default:
		v.autopsy(rec, &st)
	}
	if err := v.m.db.Apply(v.id, store.Change{DeleteRuntime: true, Status: &st}); err != nil {
		v.m.o.Log.Error("that nothing runs cannot be stored", "vm", v.id, "error", err)
	}
	v.m.removeSockets(v.id)
	v.mu.Lock()
	v.state, v.reason, v.since = st.State, st.Reason, st.Since
	v.viewLocked()
	v.mu.Unlock()
	v.m.audit(v.id, "VM "+st.State.String()+": "+st.Reason, map[string]string{"state": st.State.String()})
}

// autopsy finds out why a hypervisor ended while nobody watched.
func (v *machine) autopsy(rec store.Runtime, st *store.Status) {
	if c, ok := v.m.o.Driver.(Coroner); ok {
		mach := Machine{ID: v.id, Dir: v.m.vmDir(v.id), Spec: rec.Spec, Marker: rec.Marker, RunAs: v.as, State: rec.Driver}
		if reason, fault := c.Autopsy(mach); reason != "" {
			st.Reason = reason
			if !fault {
				st.State, st.Desired = vmm.StateStopped, vmm.StateStopped
				v.mu.Lock()
				v.desired = vmm.StateStopped
				v.mu.Unlock()
				return
			}
		}
	}
	if st.Reason == "" {
		st.Reason = "the hypervisor ended while the plugin was away"
	}
	if t := v.m.logTail(v.id); t != "" {
		st.Reason += ": " + t
	}
}

// lostLocked tells that a run is no longer held, and begins to take hold of it again.
func (v *machine) lostLocked(r *run) {
	if r.inst == nil {
		return // not held yet, or already known
	}
	inst := r.inst
	r.inst = nil
	v.m.wg.Add(1)
	go func() {
		defer v.m.wg.Done()
		_ = inst.Close()
		// Mostly the connection is gone because the process is: its end is entered elsewhere.
		select {
		case <-r.ended:
			return
		case <-v.m.ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
		v.mu.Lock()
		if v.run == r && v.state != vmm.StateStopping {
			v.setLocked(vmm.StateUnknown, "the hypervisor's control socket was lost")
		}
		v.mu.Unlock()
		v.reconnect(r, nil)
	}()
}

// reconnect takes hold of a process that runs already, however long that takes. first is called when the first
// attempt is over.
func (v *machine) reconnect(r *run, first func()) {
	m := v.m
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 10*time.Second) {
		err := v.reconnectOnce(r)
		if err != nil {
			v.mu.Lock()
			if v.run == r && v.state == vmm.StateUnknown {
				v.setLocked(vmm.StateUnknown, "the hypervisor runs but does not answer: "+err.Error())
			}
			v.mu.Unlock()
		}
		if first != nil {
			first()
			first = nil
		}
		if err == nil {
			m.clearCondition(condNoAnswer, v.id)
			return
		}
		select {
		case <-r.ended:
			return
		case <-m.ctx.Done():
			return
		default:
		}
		m.setCondition(service.Condition{Code: condNoAnswer, Severity: service.SeverityWarning, Object: v.id,
			Text:   "the hypervisor of VM " + v.view.Load().Spec.Name + " runs but does not answer: " + err.Error(),
			Remedy: "wait, or end it with: mvirt vm kill"})
		select {
		case <-r.ended:
			m.clearCondition(condNoAnswer, v.id)
			return
		case <-m.ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (v *machine) reconnectOnce(r *run) error {
	ctx, cancel := context.WithTimeout(v.m.ctx, askTimeout)
	defer cancel()
	stop := endWith(ctx, cancel, r)
	defer stop()
	mach := Machine{ID: v.id, Dir: v.m.vmDir(v.id), Spec: v.running(r), Marker: r.rec.Marker, RunAs: v.now().RunAs, State: r.rec.Driver, Process: r.proc,
		Share: v.m.sharing(v.id)}
	l := &link{}
	inst, err := v.m.o.Driver.Connect(ctx, mach, func(e Event) { v.event(r, l, e) })
	if err != nil {
		return err
	}
	return v.hold(ctx, r, inst, l)
}

// sweepDirs removes directories of VMs that were deleted, or never quite created.
func (m *Manager) sweepDirs(c store.Contents) {
	known := knownOf(c)
	if half, err := filepath.Glob(filepath.Join(m.o.DataDir, ".restore-*")); err == nil {
		for _, d := range half {
			_ = os.RemoveAll(d)
		}
	}
	ents, err := os.ReadDir(filepath.Join(m.o.DataDir, "vm"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.o.Log.Warn("directories cannot be swept", "error", err)
	}
	for _, e := range ents {
		if known[e.Name()] || ident.CheckID("id", e.Name()) != nil {
			continue
		}
		if found, _, err := m.findMarked(m.ctx, e.Name(), markerFor(e.Name())); err != nil || len(found) > 0 {
			continue // told by findStrays
		}
		if err := os.RemoveAll(m.vmDir(e.Name())); err != nil {
			m.o.Log.Warn("the directory of a VM that is gone cannot be removed", "vm", e.Name(), "error", err)
		}
	}
}

// findStrays looks for hypervisors in our directory that no record tells of: after a restore of the store, say.
// VMs that have one are given back; one of no VM that we know is told, and left alone. Only directories that
// hold a socket are looked at: a hypervisor has one, and of one that has ended they are removed.
func (m *Manager) findStrays() []*machine {
	socks, err := filepath.Glob(filepath.Join(m.o.DataDir, "vm", "*", "*.sock"))
	if err != nil {
		return nil
	}
	var strays []*machine
	seen := map[string]bool{}
	for _, s := range socks {
		id := filepath.Base(filepath.Dir(s))
		v := m.byID[id]
		if seen[id] || ident.CheckID("id", id) != nil || v != nil && v.now().PID != 0 {
			continue
		}
		seen[id] = true
		found, _, err := m.findMarked(m.ctx, id, markerFor(id))
		if err != nil || len(found) == 0 {
			continue
		}
		if v != nil {
			strays = append(strays, v)
			continue
		}
		m.setCondition(service.Condition{Code: condOrphan, Severity: service.SeverityWarning, Object: id,
			Text:   fmt.Sprintf("process %d is a hypervisor of VM %s, of which nothing is known", found[0].PID, id),
			Remedy: "restore the plugin's state from a backup, or end the process"})
	}
	return strays
}
