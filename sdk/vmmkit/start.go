package vmmkit

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/cloudinit"
	"github.com/mvirt/mvirt/sdk/vmmkit/console"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// endingGrace is how long a process may take to end after its connection broke.
const endingGrace = 200 * time.Millisecond

// maxLog is how long the hypervisor's own log may have become before it is put aside at a start.
const maxLog = 1 << 20

// markerFor begins the marker of every hypervisor of a VM; a random part follows.
func markerFor(id string) string { return "mvirt-" + id + "-" }

func newMarker(id string) (string, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	return markerFor(id) + hex.EncodeToString(b[:]), nil
}

// Start launches the hypervisor.
func (m *Manager) Start(ctx context.Context, req vmm.StartRequest) (vmm.VM, error) {
	return m.start(ctx, req, nil)
}

// start launches the hypervisor, to boot or to go on from a snapshot.
func (m *Manager) start(ctx context.Context, req vmm.StartRequest, from *snapshot) (vmm.VM, error) {
	v, err := m.find(req.ID)
	if err != nil {
		return vmm.VM{}, err
	}
	if vm, ok, err := v.startable(false, from); ok || err != nil {
		return vm, err
	}
	ctx, done, err := v.begin(ctx)
	if err != nil {
		return vmm.VM{}, err
	}
	defer done()
	if vm, ok, err := v.startable(true, from); ok || err != nil {
		return vm, err
	}
	v.mu.Lock()
	def := v.def
	v.mu.Unlock()
	if err := checkStart(def.Spec, req.Disks, req.NICs); err != nil {
		return vmm.VM{}, err
	}
	if from != nil {
		if err := from.fits(def); err != nil {
			return vmm.VM{}, err
		}
	}
	for i := range req.Disks {
		req.Disks[i].Limit = def.Spec.Disks[i].Limit
	}
	v.mu.Lock()
	before, beforeReason, beforeDesired := v.state, v.reason, v.desired
	v.desired = vmm.StateRunning
	v.setLocked(vmm.StateStarting, "")
	v.mu.Unlock()

	defer func() { _ = os.RemoveAll(filepath.Join(m.vmDir(v.id), restoreDir)) }()
	r, err := v.launch(ctx, def, req, from)
	if err != nil {
		err = why(ctx, err)
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.run == nil && v.state == vmm.StateStarting { // nothing was spawned: it is as it was
			v.desired = beforeDesired
			v.setLocked(before, beforeReason)
		}
		return vmm.VM{}, v.startError(err)
	}
	if err := v.connect(ctx, r, def, req, from); err != nil {
		err = why(ctx, err)
		reason := "start failed: " + err.Error()
		if errors.Is(err, errs.Canceled) {
			reason = "the start was cancelled"
		}
		v.endCause(r, reason, true)
		// What has begun is undone even though the caller may be gone.
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectTimeout)
		defer cancel()
		tail := m.logTail(v.id)
		if ferr := v.force(uctx, r, false); ferr != nil {
			err = errors.Join(err, ferr)
		}
		if tail != "" {
			err = &errs.Error{Kind: errs.KindOf(err), Message: tail, Err: err}
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		return vmm.VM{}, v.startError(err)
	}
	return v.now(), nil
}

func (v *machine) startError(err error) error {
	k := errs.KindOf(err)
	if k == errs.Unknown {
		k = errs.Precondition
	}
	return &errs.Error{Op: "vmm.Start", Kind: k, Resource: v.resource(), Message: "the VM did not start", Err: err, Reason: errs.ReasonOf(err),
		Remedy: firstOf(errs.RemedyOf(err), "see the hypervisor's log: "+filepath.Join(v.m.vmDir(v.id), "hypervisor.log"))}
}

func firstOf(s ...string) string {
	for _, x := range s {
		if x != "" {
			return x
		}
	}
	return ""
}

// startable decides by the state: done says that the answer is vm. held tells that we hold the turn, so that
// "starting" can only be ours to be.
func (v *machine) startable(held bool, from *snapshot) (vm vmm.VM, done bool, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch v.state {
	case vmm.StateRunning, vmm.StatePaused:
		if from != nil && (v.run == nil || v.run.rec.From != from.Snapshot.ID) {
			return vmm.VM{}, false, errs.New(errs.Precondition, "the VM is %s, it cannot go back to a snapshot", v.state).With(v.resource()).
				Because("VM_RUNNING").Do("stop it first with: mvirt vm stop " + v.def.Spec.Name)
		}
		return v.now(), true, nil
	case vmm.StateStarting:
		if !held {
			return vmm.VM{}, false, errs.New(errs.Conflict, "somebody else starts the VM right now").With(v.resource()).Because("VM_STARTING").
				Do("wait for it, or end it with: mvirt vm kill")
		}
	case vmm.StateStopping:
		return vmm.VM{}, false, errs.New(errs.Precondition, "the VM is stopping").With(v.resource()).Because("VM_STOPPING").
			Do("wait until it has stopped, or end it with: mvirt vm kill")
	case vmm.StateUnknown:
		return vmm.VM{}, false, errs.New(errs.Precondition, "a hypervisor of this VM is there but does not answer").With(v.resource()).
			Because("VM_UNKNOWN").Do("wait, or end it with: mvirt vm kill")
	}
	return vmm.VM{}, false, nil
}

// launch does all up to the process being there and durably known. After an error nothing runs, and v.run is
// nil unless an end is being entered.
func (v *machine) launch(ctx context.Context, def store.Definition, req vmm.StartRequest, from *snapshot) (*run, error) {
	m := v.m
	if err := m.makeVMDir(v.id); err != nil {
		return nil, err
	}
	mach, err := v.machineFor(def)
	if err != nil {
		return nil, err
	}
	mach.Paused, mach.Fresh = req.Paused, true
	mach.Disks, mach.NICs = inside(m.o.Jail != nil, req.Disks, req.NICs)
	if from != nil {
		if mach.Restore, err = m.restore(v.id, from); err != nil {
			return nil, err
		}
	}
	if mach.Marker, err = newMarker(v.id); err != nil {
		return nil, err
	}
	out, err := m.openLog(v.id)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	l, err := m.o.Driver.Prepare(ctx, mach)
	if err != nil {
		return nil, err
	}
	if l.Close != nil {
		defer l.Close()
	}
	if from != nil && l.Hypervisor != from.Snapshot.Hypervisor {
		return nil, errs.New(errs.Precondition, "the snapshot was written by %s, and this is %s", from.Snapshot.Hypervisor, l.Hypervisor).
			Because("OTHER_HYPERVISOR").Do("install the version that wrote it beside the new one, and name it to the plugin")
	}
	l.Command.Output = out
	if m.o.Jail != nil {
		// the jail has its own
	} else if cg, err := m.cgroup(v.id); err != nil {
		m.o.Log.Warn("the hypervisor runs in our cgroup", "vm", v.id, "error", err)
	} else if cg != nil {
		defer cg.Close()
		l.Command.Cgroup = cg
	}

	snapshotID := ""
	if from != nil {
		snapshotID = from.Snapshot.ID
	}
	rec := store.Runtime{VMID: v.id, From: snapshotID, Phase: store.Intent, Marker: mach.Marker, StartedAt: m.o.Now(), Hypervisor: l.Hypervisor,
		Spec: def.Spec, Initramfs: def.Initramfs, Driver: l.State, Jailed: m.o.Jail != nil, RunAs: v.as}
	v.mu.Lock()
	st := store.Status{State: vmm.StateStopped, Reason: v.reason, Since: v.since, Desired: vmm.StateRunning}
	v.mu.Unlock()
	if err := errors.Join(ctx.Err(), m.db.Apply(v.id, store.Change{Runtime: &rec, Status: &st})); err != nil {
		return nil, err
	}
	p, err := v.spawn(ctx, mach, l, req.Disks, req.NICs)
	if err != nil {
		err = errs.Wrap(errs.Unavailable, err, "the hypervisor %s cannot be run", l.Command.Path)
		return nil, errors.Join(err, m.db.Apply(v.id, store.Change{DeleteRuntime: true}))
	}
	rec.Phase, rec.Process = store.Running, p.Identity()
	r := &run{rec: rec, proc: p, ended: make(chan struct{})}
	v.mu.Lock()
	v.run = r
	v.viewLocked()
	v.mu.Unlock()
	v.follow(r)
	if err := m.db.Apply(v.id, store.Change{Runtime: &rec}); err != nil {
		v.endCause(r, "start failed: "+err.Error(), true)
		return nil, errors.Join(err, v.force(context.WithoutCancel(ctx), r, false))
	}
	return r, nil
}

// connect takes hold of a run that was launched just now.
func (v *machine) connect(ctx context.Context, r *run, def store.Definition, req vmm.StartRequest, from *snapshot) error {
	mach, err := v.machineFor(def)
	if err != nil {
		return err
	}
	mach.Marker, mach.State, mach.Process = r.rec.Marker, r.rec.Driver, r.proc
	mach.Paused, mach.Fresh = req.Paused, true
	mach.Disks, mach.NICs = inside(r.rec.Jailed, req.Disks, req.NICs)
	limit := connectTimeout
	if from != nil {
		mach.Restore, limit = from.restore(mach.Dir), copyTime(def.Spec.MemoryBytes)
	}
	cctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stop := endWith(cctx, cancel, r)
	l := &link{}
	inst, err := v.m.o.Driver.Connect(cctx, mach, func(e Event) { v.event(r, l, e) })
	stop()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if inst != nil {
			_ = inst.Close()
		}
		// A connection that broke is mostly a process that ends: then how it ended says more.
		select {
		case <-r.proc.Done():
			return errs.New(errs.Precondition, "the hypervisor ended with %s", r.proc.Exit()).Because("HYPERVISOR_ENDED")
		case <-ctx.Done():
		case <-time.After(endingGrace):
		}
		return err
	}
	return v.hold(ctx, r, inst, l)
}

// endWith cancels when the run's process ends. The returned function stops that.
func endWith(ctx context.Context, cancel func(), r *run) (stop func()) {
	stopped := make(chan struct{})
	go func() {
		select {
		case <-r.proc.Done():
			cancel()
		case <-ctx.Done():
		case <-stopped:
		}
	}()
	return func() { close(stopped) }
}

// hold enters an instance as what the run is held by, and the state that it is in.
func (v *machine) hold(ctx context.Context, r *run, inst Instance, l *link) error {
	sctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	st, err := inst.Status(sctx)
	if err != nil {
		_ = inst.Close()
		return err
	}
	v.mu.Lock()
	select {
	case <-r.proc.Done():
		v.mu.Unlock()
		_ = inst.Close()
		return errs.New(errs.Precondition, "the hypervisor ended with %s", r.proc.Exit()).Because("HYPERVISOR_ENDED")
	default:
	}
	if l.lost {
		v.mu.Unlock()
		_ = inst.Close()
		return errs.New(errs.Unavailable, "the hypervisor's control socket was lost")
	}
	if l.off {
		st.State = GuestOff
	}
	r.inst = inst
	if err := v.con.Attach(dialOf(inst)); err != nil {
		v.m.o.Log.Warn("the console log cannot be followed", "vm", v.id, "error", err)
	}
	switch st.State {
	case GuestRunning:
		found := v.state == vmm.StateUnknown
		v.setLocked(vmm.StateRunning, st.Reason)
		if found { // it has run all the time, we only did not know
			v.since = r.rec.StartedAt
		}
	case GuestPaused:
		v.setLocked(vmm.StatePaused, st.Reason)
	case GuestOff:
		v.setLocked(vmm.StateRunning, "")
	}
	v.publishLocked(vmm.EventChanged)
	if st.State == GuestOff {
		v.guestOffLocked(r)
	}
	v.mu.Unlock()
	if f, ok := inst.(Feeder); ok {
		v.m.wg.Add(1)
		go func() {
			defer v.m.wg.Done()
			f.Feed(v.con.Log())
		}()
	}
	return nil
}

// machineFor makes what a driver is told of a VM, and the files that go with it.
func (v *machine) machineFor(def store.Definition) (Machine, error) {
	m := v.m
	mach := Machine{ID: v.id, Dir: m.vmDir(v.id), Spec: cloneSpec(def.Spec), RunAs: v.as, Share: m.sharing(v.id)}
	if k := def.Spec.Boot.KernelSHA256; k != "" {
		mach.Kernel = m.kn.Path(k)
		if _, err := os.Stat(mach.Kernel); err != nil {
			return mach, errs.Wrap(errs.Corrupt, err, "the VM's kernel is gone from the plugin's directory")
		}
	}
	if def.Initramfs != "" {
		mach.Initramfs = m.kn.Path(def.Initramfs)
	}
	if cloudinit.Wanted(def.Spec.CloudInit) {
		mach.CloudInit = filepath.Join(mach.Dir, "cloudinit.iso")
		if err := cloudinit.Write(mach.CloudInit, v.id, def.Spec); err != nil {
			return mach, errs.Wrap(errs.Unknown, err, "the cloud-init volume cannot be made")
		}
	}
	return mach, nil
}

func (m *Manager) makeVMDir(id string) error {
	return errs.Wrap(errs.Unknown, os.MkdirAll(m.vmDir(id), 0o700), "the VM's directory cannot be made")
}

// openLog opens the log of a hypervisor's own output. It outlives failed starts; a long one is put aside.
func (m *Manager) openLog(id string) (*os.File, error) {
	path := filepath.Join(m.vmDir(id), "hypervisor.log")
	if st, err := os.Stat(path); err == nil && st.Size() > maxLog {
		_ = os.Rename(path, path+".1")
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = fmt.Fprintf(f, "%s started %s\n", logMark, m.o.Now().UTC().Format("2006-01-02T15:04:05.000Z"))
	return f, err
}

// logMark begins the line that each start writes into the hypervisor's log.
const logMark = "--- mvirt:"

// logTail is the last lines that the hypervisor printed since its start, fit to stand in a message.
func (m *Manager) logTail(id string) string {
	f, err := os.Open(filepath.Join(m.vmDir(id), "hypervisor.log"))
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 2048
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	b := make([]byte, min(most, st.Size()))
	if _, err := f.ReadAt(b, st.Size()-int64(len(b))); err != nil {
		return ""
	}
	s := string(b)
	if i := strings.LastIndex(s, logMark); i >= 0 {
		_, s, _ = strings.Cut(s[i:], "\n")
	}
	s = strings.Map(func(r rune) rune {
		if r != '\n' && (r < 0x20 || r == 0x7f || r == 0xfffd) {
			return '?'
		}
		return r
	}, strings.TrimSpace(s))
	lines := strings.Split(s, "\n")
	return strings.Join(lines[max(0, len(lines)-4):], "; ")
}

// removeSockets removes the sockets of a hypervisor that has ended.
func (m *Manager) removeSockets(id string) {
	ents, err := os.ReadDir(m.vmDir(id))
	if err != nil {
		return
	}
	for _, e := range ents {
		if e.Type()&fs.ModeSocket != 0 {
			_ = os.Remove(filepath.Join(m.vmDir(id), e.Name()))
		}
	}
	if m.o.Cgroup != "" {
		_ = unix.Rmdir(filepath.Join(m.o.Cgroup, id))
	}
}

// cgroup makes the VM's own cgroup where that is asked for.
func (m *Manager) cgroup(id string) (*os.File, error) {
	if m.o.Cgroup == "" {
		return nil, nil
	}
	dir := filepath.Join(m.o.Cgroup, id)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return os.Open(dir)
}

// dialOf types to an instance.
func dialOf(inst Instance) console.Dial {
	return func(ctx context.Context) (io.WriteCloser, error) {
		p, err := inst.Dial(ctx)
		if err != nil {
			return nil, err
		}
		return p, nil
	}
}
