package api

import (
	"context"
	"fmt"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// Defaults and limits of VMs, as the contract of vmm has them.
const (
	defaultMemory = 512 << 20
	minMemory     = 16 << 20
	maxMemory     = 64 << 40 // beyond any host
	maxCPUs       = 256
	maxUserData   = 1 << 20 // cloud-init's data are read by the guest from a small ISO
	maxDevices    = 64
)

type vmsAPI struct {
	apiv1.UnimplementedVMsServer
	*Server
}

func (a *vmsAPI) List(ctx context.Context, _ *apiv1.ListVMsRequest) (*apiv1.ListVMsResponse, error) {
	look := a.lookup.all(ctx)
	known := a.mirror.settle(ctx, a.vmm)
	out := &apiv1.ListVMsResponse{}
	if known {
		out.Vms, known = a.mirror.list(look)
	}
	if !known {
		vms, err := a.vmm.List(ctx)
		if err != nil {
			return nil, err
		}
		out.Vms = make([]*apiv1.VM, len(vms))
		for i := range vms {
			out.Vms[i] = convert.VM(vms[i], look, false)
		}
	}
	about := map[string][]health.Condition{}
	for _, c := range a.health.List("") {
		if c.Object != "" {
			about[c.Object] = append(about[c.Object], c)
		}
	}
	for i, vm := range out.Vms {
		if cs := about[vm.GetId()]; len(cs) > 0 {
			vm = proto.Clone(vm).(*apiv1.VM) // the mirror's is shared
			vm.Conditions = convert.Conditions(cs)
			out.Vms[i] = vm
		}
	}
	return out, nil
}

// show answers with a VM in full.
func (a *vmsAPI) show(ctx context.Context, vm vmm.VM, op string) *apiv1.VM {
	out := convert.VM(vm, a.lookup.of(ctx, vm), true)
	for _, c := range a.health.List("") {
		if c.Object == vm.ID {
			out.Conditions = append(out.Conditions, convert.Conditions([]health.Condition{c})...)
		}
	}
	if out.Operation = op; op == "" {
		out.Operation = a.engine.On("vm:" + vm.ID)
	}
	return out
}

// after answers a change with the VM as it is now.
func (a *vmsAPI) after(ctx context.Context, id string, op operation.Operation, err error) (*apiv1.VM, error) {
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	vm, err := a.vmm.Get(ctx, vmm.Ref{Ref: id})
	if err != nil {
		return nil, err
	}
	return a.show(ctx, vm, op.ID), nil
}

func (a *vmsAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	return a.show(ctx, vm, ""), nil
}

func (a *vmsAPI) Create(ctx context.Context, req *apiv1.CreateVMRequest) (*apiv1.VM, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	spec, err := newSpec(req)
	if err != nil {
		return nil, err
	}
	if req.GetId() != "" {
		if err := a.settle(ctx, "vm:"+id); err != nil {
			return nil, err
		}
		if vm, err := a.vmm.Get(ctx, vmm.Ref{Ref: id}); err == nil {
			return a.repeated(ctx, vm, spec, req)
		}
	}
	create := plan.CreateVM{ID: id, Spec: spec, Start: req.GetStart()}
	for i, d := range req.GetDisks() {
		disk, err := a.newDisk(ctx, fmt.Sprintf("disks[%d].", i), d)
		if err != nil {
			return nil, err
		}
		create.Disks = append(create.Disks, disk)
	}
	for i, n := range req.GetNics() {
		nic, err := a.newNIC(ctx, fmt.Sprintf("nics[%d].", i), n)
		if err != nil {
			return nil, err
		}
		create.NICs = append(create.NICs, nic)
	}
	if create.Kernel, create.Initramfs, err = a.bootFiles(ctx, req.GetKernelToken(), req.GetInitramfsToken()); err != nil {
		return nil, err
	}
	call := a.call(ctx)
	call.Async = req.GetAsync()
	op, err := a.changes.CreateVM(ctx, call, create)
	if err == nil && call.Async {
		_ = ran(ctx, op, nil)
		return &apiv1.VM{Id: id, Name: spec.Name, State: "creating", Operation: op.ID}, nil
	}
	return a.after(ctx, id, op, err)
}

// repeated answers a create whose id is taken: the same request gets the same VM.
func (a *vmsAPI) repeated(ctx context.Context, vm vmm.VM, spec vmm.Spec, req *apiv1.CreateVMRequest) (*apiv1.VM, error) {
	h := vm.Spec
	if h.Name == spec.Name && h.CPUs == spec.CPUs && h.MemoryBytes == spec.MemoryBytes && len(h.Disks) == len(req.GetDisks()) && len(h.NICs) == len(req.GetNics()) &&
		h.Boot.Cmdline == spec.Boot.Cmdline && h.Boot.HasKernel == (req.GetKernelToken() != "") && h.CloudInit == spec.CloudInit {
		return a.show(ctx, vm, ""), nil
	}
	return nil, errs.New(errs.Exists, "another VM has this id").With(errs.Resource{Type: "vm", ID: vm.ID, Name: h.Name}).Do("leave the id out, or choose another")
}

// newSpec checks what does not need to ask anybody.
func newSpec(req *apiv1.CreateVMRequest) (vmm.Spec, error) {
	s := vmm.Spec{Name: req.GetName(), CPUs: req.GetCpus(), MaxCPUs: req.GetMaxCpus(), MemoryBytes: req.GetMemoryBytes(), MaxMemory: req.GetMaxMemoryBytes(),
		Boot: vmm.Boot{Cmdline: req.GetCmdline(), KernelName: req.GetKernelName(), Firmware: req.GetFirmware()}, CloudInit: cloudInit(req.GetCloudInit()),
		Autostart: req.GetAutostart(), Nested: req.GetNested(), HugePages: req.GetHugePages(), Labels: req.GetLabels(),
		Watchdog: req.GetWatchdog(), Vsock: req.GetVsock()}
	if t := req.GetTopology(); t != nil {
		s.Topology = vmm.Topology{Sockets: t.GetSockets(), Cores: t.GetCores(), Threads: t.GetThreads()}
	}
	if s.CPUs == 0 {
		s.CPUs = 1
	}
	if s.MemoryBytes == 0 {
		s.MemoryBytes = defaultMemory
	}
	if err := ident.CheckName("name", s.Name); err != nil {
		return s, err
	}
	if err := checkSize(s.CPUs, s.MaxCPUs, s.MemoryBytes, s.MaxMemory); err != nil {
		return s, err
	}
	if err := checkCloudInit(s.CloudInit); err != nil {
		return s, err
	}
	if err := checkLabels(s.Labels); err != nil {
		return s, err
	}
	direct := req.GetKernelToken() != ""
	switch {
	case !direct && s.Boot.Cmdline != "":
		return s, errs.Field("cmdline", "give a kernel, too, or no command line", "a kernel command line needs a kernel")
	case !direct && req.GetInitramfsToken() != "":
		return s, errs.Field("initramfs_token", "give a kernel, too", "an initramfs needs a kernel")
	case direct && s.Boot.Firmware != "":
		return s, errs.Field("firmware", "give one of the two", "a VM boots either a kernel or firmware")
	case s.Boot.Firmware != "" && s.Boot.Firmware != "bios" && s.Boot.Firmware != "uefi":
		return s, errs.Field("firmware", `write "bios" or "uefi", or nothing`, "%s is not a firmware", ident.Quote(s.Boot.Firmware))
	case len(req.GetDisks()) > maxDevices:
		return s, errs.Field("disks", fmt.Sprintf("give at most %d", maxDevices), "%d disks", len(req.GetDisks()))
	case len(req.GetNics()) > maxDevices:
		return s, errs.Field("nics", fmt.Sprintf("give at most %d", maxDevices), "%d NICs", len(req.GetNics()))
	case len(s.Boot.Cmdline) > 2000:
		return s, errs.Field("cmdline", "keep it below 2,000 bytes (the kernel's own limit is 2,048)", "the command line has %d bytes", len(s.Boot.Cmdline))
	case len(s.Boot.KernelName) > 4096:
		return s, errs.Field("kernel_name", "give the file's name", "the kernel's name has %d bytes", len(s.Boot.KernelName))
	}
	return s, nil
}

func checkSize(cpus, mostCPUs uint32, memory, mostMemory uint64) error {
	switch {
	case cpus < 1 || cpus > maxCPUs:
		return errs.Field("cpus", fmt.Sprintf("give 1 to %d", maxCPUs), "a VM cannot have %d vCPUs", cpus)
	case mostCPUs != 0 && (mostCPUs < cpus || mostCPUs > maxCPUs):
		return errs.Field("max_cpus", fmt.Sprintf("give at least cpus and at most %d", maxCPUs), "at most %d vCPUs do not fit %d", mostCPUs, cpus)
	case memory < minMemory || memory > maxMemory || memory%(1<<20) != 0:
		return errs.Field("memory_bytes", "give a multiple of 1 MiB, at least 16 MiB and at most 64 TiB", "a VM cannot have %d bytes of memory", memory)
	case mostMemory != 0 && (mostMemory < memory || mostMemory > maxMemory || mostMemory%(1<<20) != 0):
		return errs.Field("max_memory_bytes", "give a multiple of 1 MiB, at least memory_bytes", "at most %d bytes of memory do not fit %d", mostMemory, memory)
	}
	return nil
}

func cloudInit(c *apiv1.CloudInit) vmm.CloudInit {
	return vmm.CloudInit{UserData: c.GetUserData(), MetaData: c.GetMetaData(), NetworkConfig: c.GetNetworkConfig()}
}

func checkCloudInit(c vmm.CloudInit) error {
	for name, v := range map[string]string{"user_data": c.UserData, "meta_data": c.MetaData, "network_config": c.NetworkConfig} {
		if len(v) > maxUserData {
			return errs.Field("cloud_init."+name, "keep it below 1 MiB; let it fetch what is larger", "%s has %d bytes", name, len(v))
		}
	}
	return nil
}

// newDisk resolves a disk's refs.
func (a *vmsAPI) newDisk(ctx context.Context, field string, d *apiv1.NewDisk) (plan.NewDisk, error) {
	out := plan.NewDisk{Name: d.GetName(), SizeBytes: d.GetSizeBytes(), ReadOnly: d.GetReadOnly(),
		Limit: vmm.RateLimit{BytesPerSecond: d.GetBytesPerSecond(), OpsPerSecond: d.GetOpsPerSecond()}}
	given := 0
	for _, ref := range []string{d.GetTemplate(), d.GetVolume(), d.GetSnapshot()} {
		if ref != "" {
			given++
		}
	}
	if given > 1 {
		return out, errs.Field(field+"template", "give one of template, volume and snapshot", "a disk has more than one source")
	}
	if err := checkVolumeSize(field+"size_bytes", out.SizeBytes); err != nil {
		return out, err
	}
	switch {
	case d.GetTemplate() != "":
		t, err := a.findTemplate(ctx, field+"template", d.GetTemplate())
		if err != nil {
			return out, err
		}
		out.TemplateID = t.ID
		return out, checkSource(field+"size_bytes", "template "+t.Name, t.SizeBytes, out.SizeBytes)
	case d.GetVolume() != "":
		v, err := a.findVolume(ctx, field+"volume", d.GetVolume())
		out.VolumeID = v.ID
		return out, err
	case d.GetSnapshot() != "":
		s, err := a.findSnapshot(ctx, field+"snapshot", d.GetSnapshot())
		if err != nil {
			return out, err
		}
		out.SnapshotID, out.SourceVol = s.ID, s.VolumeID
		return out, checkSource(field+"size_bytes", "snapshot "+s.VolumeName+"@"+s.Name, s.SizeBytes, out.SizeBytes)
	}
	return out, nil
}

// newNIC resolves a NIC's refs.
func (a *vmsAPI) newNIC(ctx context.Context, field string, n *apiv1.NewNIC) (plan.NewNIC, error) {
	out := plan.NewNIC{MAC: n.GetMac()}
	var err error
	if n.GetNic() != "" {
		nic, err := a.findNIC(ctx, field+"nic", n.GetNic())
		if err != nil {
			return out, err
		}
		out.NICID = nic.ID
	}
	if n.GetNetwork() != "" {
		network, err := a.findNetwork(ctx, field+"network", n.GetNetwork())
		if err != nil {
			return out, err
		}
		out.NetworkID = network.ID
	}
	if out.IPv4, err = convert.Addr(field+"ipv4", n.GetIpv4()); err != nil {
		return out, err
	}
	if out.IPv6, err = convert.Addr(field+"ipv6", n.GetIpv6()); err != nil {
		return out, err
	}
	out.SecurityGroups, err = a.groupIDs(ctx, field+"security_groups", n.GetSecurityGroups())
	return out, err
}

// bootFiles takes the descriptors that the caller has handed over.
func (a *vmsAPI) bootFiles(ctx context.Context, kernel, initramfs string) (k, i *os.File, err error) {
	if k, err = a.takeFile(ctx, "kernel_token", kernel); err != nil {
		return nil, nil, err
	}
	if i, err = a.takeFile(ctx, "initramfs_token", initramfs); err != nil {
		if k != nil {
			k.Close()
		}
		return nil, nil, err
	}
	return k, i, nil
}

func (a *vmsAPI) Update(ctx context.Context, req *apiv1.UpdateVMRequest) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	u := plan.UpdateVM{Name: req.Name, CPUs: req.Cpus, Memory: req.MemoryBytes, Autostart: req.Autostart, Cmdline: req.Cmdline}
	if u.Name != nil {
		if err := ident.CheckName("name", *u.Name); err != nil {
			return nil, err
		}
	}
	cpus, memory := vm.Spec.CPUs, vm.Spec.MemoryBytes
	if u.CPUs != nil {
		cpus = *u.CPUs
	}
	if u.Memory != nil {
		memory = *u.Memory
	}
	if err := checkSize(cpus, 0, memory, 0); err != nil {
		return nil, err
	}
	if req.CloudInit != nil {
		c := cloudInit(req.CloudInit)
		if err := checkCloudInit(c); err != nil {
			return nil, err
		}
		u.CloudInit = &c
	}
	if req.GetKernelToken() != "" {
		name := req.GetKernelName()
		u.KernelName = &name
	}
	if u.Kernel, u.Initramfs, err = a.bootFiles(ctx, req.GetKernelToken(), req.GetInitramfsToken()); err != nil {
		return nil, err
	}
	op, err := a.changes.UpdateVM(ctx, a.call(ctx), vm, u)
	return a.after(ctx, vm.ID, op, err)
}

func (a *vmsAPI) Delete(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	op, removed, err := a.changes.DeleteVM(ctx, a.call(ctx), plan.DeleteVM{ID: vm.ID, Force: req.GetForce(), Keep: req.GetKeep(),
		Recursive: req.GetRecursive(), DryRun: req.GetDryRun()})
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return &apiv1.DeleteResponse{Removed: removed}, nil
}

func (a *vmsAPI) Start(ctx context.Context, req *apiv1.StartVMRequest) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	op, err := a.changes.StartVM(ctx, a.call(ctx), vm.ID, req.GetPaused())
	return a.after(ctx, vm.ID, op, err)
}

func (a *vmsAPI) Stop(ctx context.Context, req *apiv1.StopVMRequest) (*apiv1.VM, error) {
	timeout, err := convert.FromDuration("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	if req.GetTimeout() != nil && timeout == 0 && !req.GetNoForce() {
		op, err := a.changes.KillVM(ctx, a.call(ctx), vm.ID) // no time to wait: what is left is force
		return a.after(ctx, vm.ID, op, err)
	}
	op, err := a.changes.StopVM(ctx, a.call(ctx), vm.ID, timeout, req.GetNoForce())
	return a.after(ctx, vm.ID, op, err)
}

// change makes the handlers of changes that need a VM and nothing else.
func (a *vmsAPI) change(ctx context.Context, ref string, fn func(ctx context.Context, c plan.Call, vm vmm.VM) (operation.Operation, error)) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", ref)
	if err != nil {
		return nil, err
	}
	op, err := fn(ctx, a.call(ctx), vm)
	return a.after(ctx, vm.ID, op, err)
}

func (a *vmsAPI) Kill(ctx context.Context, req *apiv1.RefRequest) (*apiv1.VM, error) {
	return a.change(ctx, req.GetRef(), func(ctx context.Context, c plan.Call, vm vmm.VM) (operation.Operation, error) {
		return a.changes.KillVM(ctx, c, vm.ID)
	})
}

func (a *vmsAPI) Pause(ctx context.Context, req *apiv1.RefRequest) (*apiv1.VM, error) {
	return a.change(ctx, req.GetRef(), a.changes.PauseVM)
}

func (a *vmsAPI) Resume(ctx context.Context, req *apiv1.RefRequest) (*apiv1.VM, error) {
	return a.change(ctx, req.GetRef(), a.changes.ResumeVM)
}

func (a *vmsAPI) Reboot(ctx context.Context, req *apiv1.RebootVMRequest) (*apiv1.VM, error) {
	timeout, err := convert.FromDuration("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	return a.change(ctx, req.GetRef(), func(ctx context.Context, c plan.Call, vm vmm.VM) (operation.Operation, error) {
		return a.changes.RebootVM(ctx, c, vm, req.GetHard(), timeout)
	})
}

func (a *vmsAPI) AttachVolume(ctx context.Context, req *apiv1.AttachVolumeRequest) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	disk, err := a.newDisk(ctx, "disk.", req.GetDisk())
	if err != nil {
		return nil, err
	}
	op, err := a.changes.AttachDisk(ctx, a.call(ctx), vm.ID, disk)
	return a.after(ctx, vm.ID, op, err)
}

func (a *vmsAPI) DetachVolume(ctx context.Context, req *apiv1.DetachVolumeRequest) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	ref := req.GetDisk()
	named := false
	for _, d := range vm.Spec.Disks {
		named = named || d.Name == ref
	}
	if !named {
		v, err := a.findVolume(ctx, "disk", ref)
		if err != nil {
			return nil, err
		}
		ref = v.ID
	}
	op, err := a.changes.DetachDisk(ctx, a.call(ctx), vm.ID, ref)
	return a.after(ctx, vm.ID, op, err)
}

func (a *vmsAPI) AttachNIC(ctx context.Context, req *apiv1.AttachNICRequest) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	nic, err := a.newNIC(ctx, "nic.", req.GetNic())
	if err != nil {
		return nil, err
	}
	op, err := a.changes.AttachNIC(ctx, a.call(ctx), vm.ID, nic)
	return a.after(ctx, vm.ID, op, err)
}

func (a *vmsAPI) DetachNIC(ctx context.Context, req *apiv1.DetachNICRequest) (*apiv1.VM, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	nic, err := a.findNIC(ctx, "nic", req.GetNic())
	if err != nil {
		return nil, err
	}
	op, err := a.changes.DetachNIC(ctx, a.call(ctx), vm.ID, nic.ID)
	return a.after(ctx, vm.ID, op, err)
}

func (a *vmsAPI) Counters(ctx context.Context, req *apiv1.RefRequest) (*apiv1.VMCounters, error) {
	vm, err := a.findVM(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	c, err := a.vmm.Counters(ctx, vmm.Ref{Ref: vm.ID})
	if err != nil {
		return nil, err
	}
	return convert.Counters(c), nil
}

func (a *vmsAPI) Watch(_ *apiv1.WatchVMsRequest, ss grpc.ServerStreamingServer[apiv1.VMEvent]) error {
	ctx := ss.Context()
	return a.vmm.Watch(ctx, func(e vmm.Event) error {
		out := &apiv1.VMEvent{Type: convert.EventTypes[e.Type], Time: convert.Time(e.Time)}
		if e.VM.ID != "" {
			out.Vm = convert.VM(e.VM, a.lookup.all(ctx), false)
		}
		return ss.Send(out)
	})
}
