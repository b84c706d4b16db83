package vmmkit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/kernels"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// bootFiles are the kernel and initramfs of a request, in the store and held.
type bootFiles struct{ kernel, initramfs string }

func (m *Manager) addBootFiles(kernel, initramfs *os.File) (bootFiles, error) {
	var b bootFiles
	var err error
	if kernel != nil {
		if b.kernel, err = m.kn.Add(kernels.Kernel, kernel); err != nil {
			return b, err
		}
	}
	if initramfs != nil {
		if b.initramfs, err = m.kn.Add(kernels.Initramfs, initramfs); err != nil {
			m.kn.Release(b.kernel)
			return bootFiles{}, err
		}
	}
	return b, nil
}

// bootFiles holds what a create asks for: files that come with it, or those of a snapshot.
func (m *Manager) bootFiles(req vmm.CreateRequest) (bootFiles, error) {
	if req.BootFrom == "" {
		return m.addBootFiles(req.Kernel, req.Initramfs)
	}
	m.change.Lock() // DeleteSnapshot lets go of them under it
	defer m.change.Unlock()
	s, err := m.snapshotOf(req.BootFrom)
	if err != nil {
		return bootFiles{}, err
	}
	b := bootFiles{kernel: s.Snapshot.Spec.Boot.KernelSHA256, initramfs: s.Initramfs}
	m.kn.Hold(b.kernel)
	m.kn.Hold(b.initramfs)
	return b, nil
}

func (m *Manager) release(b bootFiles) {
	m.kn.Release(b.kernel)
	m.kn.Release(b.initramfs)
}

func bootFilesOf(d store.Definition) bootFiles {
	return bootFiles{kernel: d.Spec.Boot.KernelSHA256, initramfs: d.Initramfs}
}

// setBoot enters in a definition what its boot files are.
func setBoot(d *store.Definition, b bootFiles) {
	d.Spec.Boot.HasKernel, d.Spec.Boot.KernelSHA256 = b.kernel != "", b.kernel
	d.Spec.Boot.HasInitramfs, d.Initramfs = b.initramfs != "", b.initramfs
}

// fingerprint is the same for equal creates.
func fingerprint(spec vmm.Spec, b bootFiles) (string, error) {
	spec.Boot.HasKernel, spec.Boot.HasInitramfs, spec.Boot.KernelSHA256 = false, false, ""
	if len(spec.Disks) == 0 {
		spec.Disks = nil
	}
	if len(spec.NICs) == 0 {
		spec.NICs = nil
	}
	if len(spec.Labels) == 0 {
		spec.Labels = nil
	}
	j, err := json.Marshal(spec)
	if err != nil {
		return "", err
	}
	h := sha256.Sum256([]byte(string(j) + "\x00" + b.kernel + "\x00" + b.initramfs))
	return hex.EncodeToString(h[:]), nil
}

// Create stores a definition.
func (m *Manager) Create(ctx context.Context, req vmm.CreateRequest) (vmm.VM, error) {
	if err := ident.CheckID("id", req.ID); err != nil {
		return vmm.VM{}, err
	}
	if req.Kernel == nil && req.Initramfs != nil {
		return vmm.VM{}, errs.Field("initramfs", "give a kernel too", "an initramfs without a kernel")
	}
	kernel := req.Kernel != nil
	if req.BootFrom != "" {
		s, err := m.snapshotOf(req.BootFrom)
		if err != nil {
			return vmm.VM{}, err
		}
		if kernel {
			return vmm.VM{}, errs.Field("boot_from", "give files or a snapshot, not both", "a kernel and a snapshot to take one from")
		}
		kernel = s.Snapshot.Spec.Boot.HasKernel
	}
	if err := checkSpec(req.Spec, kernel, m.o.Memory); err != nil {
		return vmm.VM{}, err
	}
	if err := m.o.Driver.Check(req.Spec); err != nil {
		return vmm.VM{}, err
	}
	b, err := m.bootFiles(req)
	if err != nil {
		return vmm.VM{}, err
	}
	keep := false
	defer func() {
		if !keep {
			m.release(b)
		}
	}()
	fp, err := fingerprint(req.Spec, b)
	if err != nil {
		return vmm.VM{}, err
	}

	m.change.Lock()
	defer m.change.Unlock()
	if err := errors.Join(ctx.Err(), m.closing.Err()); err != nil {
		return vmm.VM{}, errs.Wrap(errs.KindOf(err), err, "the VM was not created")
	}
	if old, err := m.find(req.ID); err == nil {
		old.mu.Lock()
		defer old.mu.Unlock()
		if old.def.Request == fp {
			return old.now(), nil
		}
		return vmm.VM{}, errs.New(errs.Exists, "another VM has this id").With(errs.Resource{Type: "vm", ID: req.ID}).
			Do("choose another id")
	}
	if err := m.nameFree(req.Spec.Name, ""); err != nil {
		return vmm.VM{}, err
	}
	now := m.o.Now()
	def := store.Definition{ID: req.ID, Spec: cloneSpec(req.Spec), Generation: 1, CreatedAt: now, Request: fp}
	setBoot(&def, b)
	st := store.Status{State: vmm.StateStopped, Reason: "never started", Since: now, Desired: vmm.StateStopped}
	as, err := m.identify(ctx, req.ID)
	if err != nil {
		return vmm.VM{}, err
	}
	err = m.makeVMDir(req.ID)
	if err == nil {
		err = m.db.Apply(req.ID, store.Change{Definition: &def, Status: &st})
	}
	if err != nil {
		err = errors.Join(err, os.RemoveAll(m.vmDir(req.ID)))
		m.forget(ctx, req.ID)
		return vmm.VM{}, err
	}
	keep = true
	v := m.newMachine(def, st, as)
	v.mu.Lock()
	defer v.mu.Unlock()
	m.enter(v, vmm.EventChanged)
	return v.now(), nil
}

// enter makes a machine known, and tells of it in the same moment.
func (m *Manager) enter(v *machine, t vmm.EventType) {
	m.hub.mu.Lock()
	defer m.hub.mu.Unlock()
	m.mu.Lock()
	m.byID[v.id] = v
	m.byName[v.def.Spec.Name] = v
	m.mu.Unlock()
	m.hub.sendLocked(vmm.Event{Type: t, Time: m.o.Now(), VM: v.now()})
}

// nameFree says whether a name may be given to the VM with that id.
func (m *Manager) nameFree(name, id string) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if o := m.byName[name]; o != nil && o.id != id {
		return errs.New(errs.Exists, "another VM has this name").With(errs.Resource{Type: "vm", ID: o.id, Name: name}).
			Do("choose another name, or remove the other VM with: mvirt vm rm " + name)
	}
	return nil
}

// Update replaces a definition.
func (m *Manager) Update(ctx context.Context, req vmm.UpdateRequest) (vmm.VM, error) {
	v, err := m.find(req.ID)
	if err != nil {
		return vmm.VM{}, err
	}
	_, done, err := v.begin(ctx)
	if err != nil {
		return vmm.VM{}, err
	}
	defer done()
	b, err := m.addBootFiles(req.Kernel, req.Initramfs)
	if err != nil {
		return vmm.VM{}, err
	}
	keep := false
	defer func() {
		if !keep {
			m.release(b)
		}
	}()

	m.change.Lock()
	defer m.change.Unlock()
	v.mu.Lock()
	def := v.def
	v.mu.Unlock()
	old := bootFilesOf(def)
	kernel := req.Kernel != nil || old.kernel != "" && req.Spec.Boot.Firmware == ""
	if !kernel && req.Initramfs != nil {
		return vmm.VM{}, errs.Field("initramfs", "give a kernel too", "an initramfs without a kernel")
	}
	if err := checkSpec(req.Spec, kernel, m.o.Memory); err != nil {
		return vmm.VM{}, err
	}
	if err := m.o.Driver.Check(req.Spec); err != nil {
		return vmm.VM{}, err
	}
	if req.Generation != def.Generation {
		return vmm.VM{}, errs.New(errs.Conflict, "the definition is at generation %d, not %d: somebody changed it meanwhile",
			def.Generation, req.Generation).With(v.resource()).Because("GENERATION").Do("read it again and repeat the change")
	}
	if err := m.nameFree(req.Spec.Name, v.id); err != nil {
		return vmm.VM{}, err
	}
	oldName := def.Spec.Name
	def.Spec = cloneSpec(req.Spec)
	def.Generation++
	if kernel {
		if req.Kernel == nil {
			b.kernel = old.kernel
			m.kn.Hold(b.kernel)
		}
		if req.Initramfs == nil && req.Kernel == nil {
			b.initramfs = old.initramfs
			m.kn.Hold(b.initramfs)
		}
	}
	setBoot(&def, b)
	if err := m.db.Apply(v.id, store.Change{Definition: &def}); err != nil {
		return vmm.VM{}, err
	}
	keep = true
	m.release(old)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.def = def
	m.mu.Lock()
	delete(m.byName, oldName)
	m.byName[def.Spec.Name] = v
	m.mu.Unlock()
	v.publishLocked(vmm.EventChanged)
	return v.now(), nil
}

// Delete removes a VM that does not run. One that is gone already is no error.
func (m *Manager) Delete(ctx context.Context, req vmm.Ref) error {
	v, err := m.find(req.Ref)
	if errors.Is(err, errs.NotFound) {
		return nil
	}
	if err := v.deletable(); err != nil { // at once, and not only when a long stop is over
		return err
	}
	_, done, err := v.begin(ctx)
	if errors.Is(err, errs.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer done()
	if err := v.deletable(); err != nil {
		return err
	}
	m.change.Lock()
	defer m.change.Unlock()
	if err := m.db.Apply(v.id, store.Change{DeleteAll: true}); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.deleted = true
	m.hub.mu.Lock()
	m.mu.Lock()
	delete(m.byID, v.id)
	delete(m.byName, v.def.Spec.Name)
	m.mu.Unlock()
	m.hub.sendLocked(vmm.Event{Type: vmm.EventDeleted, Time: m.o.Now(), VM: v.now()})
	m.hub.mu.Unlock()
	_ = v.con.Log().Close()
	m.release(bootFilesOf(v.def))
	if err := os.RemoveAll(m.vmDir(v.id)); err != nil {
		m.o.Log.Warn("the directory of a deleted VM stays until the next start", "vm", v.id, "error", err)
	}
	m.forget(ctx, v.id)
	return nil
}

func (v *machine) deletable() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.state.Live() {
		return errs.New(errs.Precondition, "the VM is %s", v.state).With(v.resource()).Because("VM_RUNNING").
			Do("stop it first with: mvirt vm stop " + v.def.Spec.Name)
	}
	return nil
}
