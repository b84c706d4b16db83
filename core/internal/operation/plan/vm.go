package plan

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// NewDisk is a disk for a VM: an existing volume, or a new one, cloned or empty. All refs are ids.
type NewDisk struct {
	Name       string // in the VM; "" : "root" for the first, then "disk1", …
	VolumeID   string // use this one, or
	TemplateID string // clone this, or
	SnapshotID string // clone this, or, with none of the three, make an empty one
	SourceVol  string // the volume of SnapshotID
	SizeBytes  uint64
	ReadOnly   bool
	Limit      vmm.RateLimit
}

// NewNIC is a NIC for a VM: an existing one, or a new one on a network. All refs are ids.
type NewNIC struct {
	NICID          string
	NetworkID      string
	MAC            string
	IPv4           netip.Addr
	IPv6           netip.Addr
	SecurityGroups []string
}

// CreateVM is what a VM is made of. Spec.Disks and Spec.NICs are empty; Disks and NICs make them.
type CreateVM struct {
	ID        string
	Spec      vmm.Spec
	Disks     []NewDisk
	NICs      []NewNIC
	Kernel    *os.File // closed when the operation ends or is refused
	Initramfs *os.File
	Start     bool
}

// draft collects the steps that make disks and NICs for a VM.
type draft struct {
	c     *Changes
	vmID  string
	name  string
	plan  operation.Plan
	disks []vmm.Disk
	nics  []vmm.NIC
}

// CreateVM makes the volumes and NICs asked for, defines the VM and, with Start, starts it.
func (c *Changes) CreateVM(ctx context.Context, call Call, req CreateVM) (operation.Operation, error) {
	fs := files(req.Kernel, req.Initramfs)
	d := &draft{c: c, vmID: req.ID, name: req.Spec.Name, plan: operation.Plan{Type: "vm.create", Title: "create VM " + req.Spec.Name,
		Mode: operation.Undo, Objects: []string{req.ID}, Locks: locks(lock("vm", req.ID), lock("name:vm", req.Spec.Name)),
		Files: fs, Values: map[string]any{kernelFile: req.Kernel, initramfsFile: req.Initramfs}}}
	err := func() error {
		vms, err := c.svc.VMM.List(ctx)
		if err != nil {
			return err
		}
		for _, vm := range vms {
			if vm.Spec.Name == req.Spec.Name {
				return errs.New(errs.Exists, "a VM has this name").With(vmRes(vm)).Do("choose another name, or remove that VM: mvirt vm rm " + vm.Spec.Name)
			}
			if vm.ID == req.ID {
				return errs.New(errs.Exists, "a VM has this id").With(vmRes(vm)).Do("choose another id, or none")
			}
		}
		for i, disk := range req.Disks {
			if err := d.disk(ctx, vms, i, disk); err != nil {
				return err
			}
		}
		for i, nic := range req.NICs {
			if err := d.nic(ctx, vms, i, nic); err != nil {
				return err
			}
		}
		return nil
	}()
	if err != nil {
		for _, f := range fs {
			f.Close()
		}
		return operation.Operation{}, err
	}
	spec := req.Spec
	spec.Disks, spec.NICs = d.disks, d.nics
	d.step("vmm.create", "define VM "+d.name, "removed VM "+d.name, defineVM{ID: req.ID, Spec: spec})
	if req.Start {
		d.plan.Steps = append(d.plan.Steps, startSteps(vmm.VM{ID: req.ID, Spec: spec}, false)...)
	}
	return c.run(ctx, call, d.plan)
}

func (d *draft) step(action, title, undone string, args any) {
	d.plan.Steps = append(d.plan.Steps, operation.NewStep(action, title, undone, args))
}

// disk plans one disk.
func (d *draft) disk(ctx context.Context, vms []vmm.VM, i int, n NewDisk) error {
	field := fmt.Sprintf("disks[%d]", i)
	if n.Name == "" {
		n.Name = d.freeName(i)
	}
	if len(n.Name) > 20 {
		return errs.Field(field+".name", "use at most 20 characters", "disk name %s is longer than the serial number that the guest sees", ident.Quote(n.Name))
	}
	if err := ident.CheckName(field+".name", n.Name); err != nil {
		return err
	}
	if slices.ContainsFunc(d.disks, func(o vmm.Disk) bool { return o.Name == n.Name }) {
		return errs.Field(field+".name", "give each disk of the VM another name", "two disks are named %s", n.Name)
	}
	if n.VolumeID != "" {
		return d.existing(ctx, vms, field, n)
	}
	if n.TemplateID == "" && n.SnapshotID == "" && n.SizeBytes == 0 {
		return errs.Field(field+".size_bytes", "give a size, a template, a snapshot or a volume", "an empty disk needs a size")
	}
	id, name := ident.New(), trimName(d.name+"-"+n.Name)
	req := storage.CreateVolumeRequest{ID: id, Name: name, SizeBytes: n.SizeBytes, FromTemplate: n.TemplateID, FromSnapshot: n.SnapshotID,
		Labels: map[string]string{OwnerLabel: d.vmID}}
	from := ""
	if n.TemplateID != "" {
		from = " from its template"
		d.plan.Locks = append(d.plan.Locks, shared("template", n.TemplateID))
	}
	if n.SnapshotID != "" {
		from = " from a snapshot"
		d.plan.Locks = append(d.plan.Locks, shared("volume", n.SourceVol), shared("snapshot", n.SnapshotID))
	}
	d.plan.Locks = append(d.plan.Locks, lock("volume", id))
	d.plan.Objects = append(d.plan.Objects, id, n.TemplateID, n.SnapshotID)
	d.step("storage.create_volume", "create "+volumeWords(name)+from, "deleted "+volumeWords(name), req)
	d.disks = append(d.disks, vmm.Disk{Name: n.Name, VolumeID: id, ReadOnly: n.ReadOnly, Delete: true, Limit: n.Limit})
	return nil
}

// diskName is "root" for disk 0 and "diskN" for others.
func diskName(i int) string {
	if i == 0 {
		return "root"
	}
	return fmt.Sprintf("disk%d", i)
}

// freeName is the made name of disk i, or of the next that is not taken by a name that was given.
func (d *draft) freeName(i int) string {
	for slices.ContainsFunc(d.disks, func(o vmm.Disk) bool { return o.Name == diskName(i) }) {
		i++
	}
	return diskName(i)
}

// existing plans a disk on a volume that is there.
func (d *draft) existing(ctx context.Context, vms []vmm.VM, field string, n NewDisk) error {
	if n.SizeBytes != 0 || n.TemplateID != "" || n.SnapshotID != "" {
		return errs.Field(field, "give either a volume, or what to make one from", "a volume is given together with a size or a source")
	}
	vol, err := d.c.svc.Storage.GetVolume(ctx, storage.Ref{Ref: n.VolumeID})
	if err != nil {
		return err
	}
	if vol.State == storage.StateDamaged {
		return errs.New(errs.Precondition, "it is damaged: %s", vol.StateReason).With(volRes(vol)).Do("restore it from a snapshot or a backup")
	}
	for _, vm := range usersOf(vms, vol.ID) {
		both := n.ReadOnly && !slices.ContainsFunc(vm.Spec.Disks, func(o vmm.Disk) bool { return o.VolumeID == vol.ID && !o.ReadOnly })
		if !both || vm.ID == d.vmID {
			return errs.New(errs.Precondition, "VM %s uses it", vm.Spec.Name).With(volRes(vol)).Because("VOLUME_IN_USE").
				Do(fmt.Sprintf("detach it there (mvirt vm detach-volume %s %s), or clone it", vm.Spec.Name, vol.Name))
		}
	}
	if slices.ContainsFunc(d.disks, func(o vmm.Disk) bool { return o.VolumeID == vol.ID }) {
		return errs.Field(field+".volume", "give each volume once", "volume %s is given twice", vol.Name)
	}
	d.plan.Locks = append(d.plan.Locks, lock("volume", vol.ID))
	d.plan.Objects = append(d.plan.Objects, vol.ID)
	d.disks = append(d.disks, vmm.Disk{Name: n.Name, VolumeID: vol.ID, ReadOnly: n.ReadOnly, Limit: n.Limit})
	return nil
}

// nic plans one NIC.
func (d *draft) nic(ctx context.Context, vms []vmm.VM, i int, n NewNIC) error {
	field := fmt.Sprintf("nics[%d]", i)
	if n.NICID != "" {
		if n.MAC != "" || n.IPv4.IsValid() || n.IPv6.IsValid() || n.NetworkID != "" || len(n.SecurityGroups) > 0 {
			return errs.Field(field, "give either a NIC, or a network and what the new NIC should have", "a NIC is given together with properties of a new one")
		}
		nic, err := d.c.svc.Net.GetNIC(ctx, net.Ref{Ref: n.NICID})
		if err != nil {
			return err
		}
		if users := nicUsersOf(vms, nic.ID); len(users) > 0 {
			return errs.New(errs.Precondition, "VM %s uses it", users[0].Spec.Name).With(nicRes(nic)).Because("NIC_IN_USE").
				Do(fmt.Sprintf("detach it there (mvirt vm detach-nic %s %s), or create another", users[0].Spec.Name, nic.Name))
		}
		if slices.ContainsFunc(d.nics, func(o vmm.NIC) bool { return o.NICID == nic.ID }) {
			return errs.Field(field+".nic", "give each NIC once", "NIC %s is given twice", nic.Name)
		}
		d.plan.Locks = append(d.plan.Locks, lock("nic", nic.ID))
		d.plan.Objects = append(d.plan.Objects, nic.ID, nic.NetworkID)
		d.nics = append(d.nics, vmm.NIC{NICID: nic.ID, MAC: nic.MAC})
		return nil
	}
	if n.NetworkID == "" {
		return errs.Field(field+".network", "name a network (mvirt network ls) or a NIC", "a NIC needs a network")
	}
	id := ident.New()
	name := trimName(fmt.Sprintf("%s-nic%d", d.name, i))
	d.plan.Locks = append(d.plan.Locks, shared("network", n.NetworkID), lock("nic", id))
	d.plan.Objects = append(d.plan.Objects, id, n.NetworkID)
	d.step("net.create_nic", "create NIC "+name, "deleted NIC "+name, net.CreateNICRequest{ID: id, Name: name, NetworkID: n.NetworkID, MAC: n.MAC,
		IPv4: n.IPv4, IPv6: n.IPv6, SecurityGroups: n.SecurityGroups, HostName: hostName(d.name), Labels: map[string]string{OwnerLabel: d.vmID}})
	d.nics = append(d.nics, vmm.NIC{NICID: id, MAC: n.MAC, Delete: true})
	return nil
}

// startSteps attach what a VM has and start it.
func startSteps(vm vmm.VM, paused bool) (steps []operation.Step) {
	s := startVM{VMID: vm.ID, Paused: paused, Disks: vm.Spec.Disks}
	for _, d := range vm.Spec.Disks {
		steps = append(steps, operation.NewStep("storage.attach", "attach disk "+d.Name, "detached disk "+d.Name, attachVolume{VMID: vm.ID, VolumeID: d.VolumeID, ReadOnly: d.ReadOnly, ForStart: true}))
	}
	for i, n := range vm.Spec.NICs {
		what := fmt.Sprintf("NIC %d", i)
		steps = append(steps, operation.NewStep("net.attach", "attach "+what, "detached "+what, attachNIC{VMID: vm.ID, NICID: n.NICID, ForStart: true}))
		s.NICs = append(s.NICs, n.NICID)
	}
	return append(steps, operation.NewStep("vmm.start", "start VM "+vm.Spec.Name, "stopped VM "+vm.Spec.Name, s))
}

// releaseSteps detach what a VM has; each is done even if another fails.
func releaseSteps(vm vmm.VM) (steps []operation.Step) {
	for i, n := range vm.Spec.NICs {
		steps = append(steps, operation.NewStep("net.detach", fmt.Sprintf("detach NIC %d", i), "", net.DetachRequest{NICID: n.NICID, VMID: vm.ID}))
	}
	for _, d := range vm.Spec.Disks {
		steps = append(steps, operation.NewStep("storage.detach", "detach disk "+d.Name, "", storage.DetachRequest{VolumeID: d.VolumeID, VMID: vm.ID}))
	}
	for i := range steps {
		steps[i].BestEffort = true
	}
	return steps
}

// partsOf are the ids of a VM and all that it has, and locks that keep the parts from being changed.
func partsOf(vm vmm.VM) (objects []string, ls []operation.Lock) {
	objects, ls = []string{vm.ID}, locks(lock("vm", vm.ID))
	for _, d := range vm.Spec.Disks {
		objects, ls = append(objects, d.VolumeID), append(ls, shared("volume", d.VolumeID))
	}
	for _, n := range vm.Spec.NICs {
		objects, ls = append(objects, n.NICID), append(ls, shared("nic", n.NICID))
	}
	return objects, ls
}

// StartVM attaches what the VM has and starts it. For a running VM it does nothing: the operation is empty.
func (c *Changes) StartVM(ctx context.Context, call Call, id string, paused bool) (operation.Operation, error) {
	vm, err := c.svc.VMM.Get(ctx, vmm.Ref{Ref: id})
	if err != nil {
		return operation.Operation{}, err
	}
	switch vm.State {
	case vmm.StateRunning:
		return operation.Operation{}, nil
	case vmm.StateStopping:
		return operation.Operation{}, errs.New(errs.Precondition, "it is stopping").With(vmRes(vm)).Because("VM_BUSY").Do("wait until it has stopped, or mvirt vm kill " + vm.Spec.Name)
	case vmm.StatePaused:
		return operation.Operation{}, errs.New(errs.Precondition, "it is paused").With(vmRes(vm)).Because("VM_PAUSED").Do("mvirt vm resume " + vm.Spec.Name)
	case vmm.StateUnknown:
		return operation.Operation{}, errs.New(errs.Precondition, "a hypervisor is there that does not answer: %s", vm.Reason).With(vmRes(vm)).
			Because("VM_UNKNOWN").Do("mvirt vm kill " + vm.Spec.Name + ", then start it")
	}
	objects, ls := partsOf(vm)
	return c.run(ctx, call, operation.Plan{Type: "vm.start", Title: "start VM " + vm.Spec.Name, Mode: operation.Undo, Objects: objects, Locks: ls,
		Steps: startSteps(vm, paused)})
}

// StopVM presses the power button, waits, forces (unless noForce), and releases what the VM had attached.
func (c *Changes) StopVM(ctx context.Context, call Call, id string, timeout time.Duration, noForce bool) (operation.Operation, error) {
	return c.end(ctx, call, id, "vm.stop", "stop", func(vm vmm.VM) operation.Step {
		return operation.NewStep("vmm.stop", "stop VM "+vm.Spec.Name, "", vmm.StopRequest{Ref: vm.ID, Timeout: timeout, NoForce: noForce})
	}, false)
}

// KillVM ends the hypervisor at once and releases what the VM had attached. It takes the place of an
// operation that starts, stops or changes the VM.
func (c *Changes) KillVM(ctx context.Context, call Call, id string) (operation.Operation, error) {
	return c.end(ctx, call, id, "vm.kill", "kill", func(vm vmm.VM) operation.Step {
		return operation.NewStep("vmm.kill", "kill VM "+vm.Spec.Name, "", vmm.Ref{Ref: vm.ID})
	}, true)
}

func (c *Changes) end(ctx context.Context, call Call, id, typ, verb string, first func(vmm.VM) operation.Step, preempt bool) (operation.Operation, error) {
	vm, err := c.svc.VMM.Get(ctx, vmm.Ref{Ref: id})
	if err != nil {
		return operation.Operation{}, err
	}
	if !vm.State.Live() && c.engine.On("vm:"+vm.ID) == "" {
		return operation.Operation{}, nil // what it may still have attached, the reconciler releases
	}
	objects, ls := partsOf(vm)
	if preempt {
		ls = ls[:1] // whoever works on its volumes is left alone
	}
	return c.run(ctx, call, operation.Plan{Type: typ, Title: verb + " VM " + vm.Spec.Name, Mode: operation.Finish, Objects: objects, Locks: ls,
		Steps: append([]operation.Step{first(vm)}, releaseSteps(vm)...), Preempt: preempt})
}

// ReleaseVM detaches what a VM that does not run still has attached: after its guest powered itself off.
func (c *Changes) ReleaseVM(ctx context.Context, call Call, vm vmm.VM, why string) (operation.Operation, error) {
	steps := releaseSteps(vm)
	if len(steps) == 0 {
		return operation.Operation{}, nil
	}
	objects, ls := partsOf(vm)
	steps = append([]operation.Step{checkStopped(vm)}, steps...)
	return c.run(ctx, call, operation.Plan{Type: "vm.release", Title: "release what VM " + vm.Spec.Name + " had attached: " + why, Mode: operation.Finish,
		Objects: objects, Locks: ls, Steps: steps})
}

// PauseVM, ResumeVM and RebootVM are single steps under the VM's lock.
func (c *Changes) PauseVM(ctx context.Context, call Call, vm vmm.VM) (operation.Operation, error) {
	return c.run(ctx, call, one("vm.pause", operation.Undo, operation.NewStep("vmm.pause", "pause VM "+vm.Spec.Name, "resumed VM "+vm.Spec.Name, vmm.Ref{Ref: vm.ID}), locks(lock("vm", vm.ID)), vm.ID))
}

// ResumeVM lets a paused VM go on.
func (c *Changes) ResumeVM(ctx context.Context, call Call, vm vmm.VM) (operation.Operation, error) {
	return c.run(ctx, call, one("vm.resume", operation.Undo, operation.NewStep("vmm.resume", "resume VM "+vm.Spec.Name, "paused VM "+vm.Spec.Name, vmm.Ref{Ref: vm.ID}), locks(lock("vm", vm.ID)), vm.ID))
}

// RebootVM reboots a running VM.
func (c *Changes) RebootVM(ctx context.Context, call Call, vm vmm.VM, hard bool, timeout time.Duration) (operation.Operation, error) {
	return c.run(ctx, call, one("vm.reboot", operation.Undo, operation.NewStep("vmm.reboot", "reboot VM "+vm.Spec.Name, "",
		vmm.RebootRequest{Ref: vm.ID, Hard: hard, Timeout: timeout}), locks(lock("vm", vm.ID)), vm.ID))
}

// UpdateVM is what changes in a definition; nil is left as it is.
type UpdateVM struct {
	Name       *string
	CPUs       *uint32
	Memory     *uint64
	Autostart  *bool
	Cmdline    *string
	CloudInit  *vmm.CloudInit
	KernelName *string
	Kernel     *os.File // closed when the operation ends or is refused
	Initramfs  *os.File
}

// UpdateVM changes a definition. vCPUs and memory of a running VM change at once where the plugin can.
func (c *Changes) UpdateVM(ctx context.Context, call Call, vm vmm.VM, u UpdateVM) (operation.Operation, error) {
	patch := specPatch{VMID: vm.ID, Name: u.Name, CPUs: u.CPUs, Memory: u.Memory, Autostart: u.Autostart, Cmdline: u.Cmdline, Kernel: u.KernelName,
		CloudInit: u.CloudInit, Resize: u.CPUs != nil || u.Memory != nil, Files: u.Kernel != nil || u.Initramfs != nil}
	old := &specPatch{}
	keep(&old.Name, u.Name, vm.Spec.Name)
	keep(&old.CPUs, u.CPUs, vm.Spec.CPUs)
	keep(&old.Memory, u.Memory, vm.Spec.MemoryBytes)
	keep(&old.Autostart, u.Autostart, vm.Spec.Autostart)
	keep(&old.Cmdline, u.Cmdline, vm.Spec.Boot.Cmdline)
	keep(&old.Kernel, u.KernelName, vm.Spec.Boot.KernelName)
	keep(&old.CloudInit, u.CloudInit, vm.Spec.CloudInit)
	patch.Old = old
	p := one("vm.update", operation.Undo, operation.NewStep("vmm.update", "change VM "+vm.Spec.Name, "changed VM "+vm.Spec.Name+" back", patch), locks(lock("vm", vm.ID)), vm.ID)
	if u.Name != nil {
		p.Locks = append(p.Locks, lock("name:vm", *u.Name))
	}
	p.Files, p.Values = files(u.Kernel, u.Initramfs), map[string]any{kernelFile: u.Kernel, initramfsFile: u.Initramfs}
	return c.run(ctx, call, p)
}

// keep notes what a field is, if it is to change.
func keep[T any](old **T, change *T, is T) {
	if change != nil {
		*old = &is
	}
}

// hostName is the VM's name where it can be one (RFC 1123, section 2.1), or "".
func hostName(name string) string {
	for _, r := range name {
		if r == '_' {
			return ""
		}
	}
	return name
}

// trimName keeps a made name within what names may be.
func trimName(name string) string {
	if len(name) <= ident.MaxName {
		return name
	}
	tail := name[len(name)-20:]
	return name[:ident.MaxName-20] + tail
}
