package convert

import (
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// Lookup finds volumes and NICs by id for display; what it does not know is left blank.
type Lookup interface {
	Volume(id string) (storage.Volume, bool)
	NIC(id string) (net.NIC, bool)
}

// VM converts a VM. With full, also what only "show" needs (cloud-init).
func VM(v vmm.VM, look Lookup, full bool) *apiv1.VM {
	s := &v.Spec
	out := &apiv1.VM{Id: v.ID, Name: s.Name, State: v.State.String(), Reason: v.Reason, Since: Time(v.Since), Cpus: s.CPUs, MemoryBytes: s.MemoryBytes,
		MaxCpus: s.MaxCPUs, MaxMemoryBytes: s.MaxMemory, DirectBoot: s.Boot.HasKernel, KernelName: s.Boot.KernelName, Cmdline: s.Boot.Cmdline,
		Firmware: s.Boot.Firmware, Autostart: s.Autostart, Nested: s.Nested, Labels: s.Labels, CreatedAt: Time(v.CreatedAt), StartedAt: Time(v.StartedAt),
		Pid: v.PID, Uid: v.RunAs.UID, Hypervisor: v.Hypervisor, Pending: v.Pending, Generation: v.Generation,
		Watchdog: s.Watchdog, Vsock: s.Vsock, VsockSocket: v.VsockSocket, HugePages: s.HugePages}
	if t := s.Topology; t != (vmm.Topology{}) {
		out.Topology = &apiv1.VMTopology{Sockets: t.Sockets, Cores: t.Cores, Threads: t.Threads}
	}
	if v.Desired != 0 {
		out.Desired = v.Desired.String()
	}
	if n := len(s.Disks); n > 0 {
		disks := make([]apiv1.VMDisk, n)
		out.Disks = make([]*apiv1.VMDisk, n)
		for i, d := range s.Disks {
			p := &disks[i]
			p.Name, p.VolumeId, p.ReadOnly, p.Owned = d.Name, d.VolumeID, d.ReadOnly, d.Delete
			p.BytesPerSecond, p.OpsPerSecond = d.Limit.BytesPerSecond, d.Limit.OpsPerSecond
			if vol, ok := look.Volume(d.VolumeID); ok {
				p.VolumeName, p.SizeBytes = vol.Name, vol.SizeBytes
			}
			out.Disks[i] = p
		}
	}
	if n := len(s.NICs); n > 0 {
		nics := make([]apiv1.VMNIC, n)
		out.Nics = make([]*apiv1.VMNIC, n)
		for i, d := range s.NICs {
			p := &nics[i]
			p.NicId, p.Mac, p.Owned = d.NICID, d.MAC, d.Delete
			if nic, ok := look.NIC(d.NICID); ok {
				p.NicName, p.NetworkName, p.NetworkId, p.Mac, p.Ipv4, p.Ipv6 = nic.Name, nic.NetworkName, nic.NetworkID, nic.MAC, str(nic.IPv4), str(nic.IPv6)
			}
			out.Nics[i] = p
		}
	}
	if c := s.CloudInit; full && c != (vmm.CloudInit{}) {
		out.CloudInit = &apiv1.CloudInit{UserData: c.UserData, MetaData: c.MetaData, NetworkConfig: c.NetworkConfig}
	}
	return out
}

// EventTypes are the names of a VM's events.
var EventTypes = map[vmm.EventType]string{vmm.EventSnapshot: "snapshot", vmm.EventSnapshotEnd: "snapshot_end", vmm.EventChanged: "changed",
	vmm.EventDeleted: "deleted", vmm.EventRebooted: "rebooted", vmm.EventPanicked: "panicked", vmm.EventLagged: "lagged"}

// Counters converts counters.
func Counters(c vmm.Counters) *apiv1.VMCounters {
	out := &apiv1.VMCounters{CpuTime: durationpb.New(c.CPUTime), ResidentBytes: c.ResidentBytes}
	for _, d := range c.Devices {
		out.Devices = append(out.Devices, &apiv1.DeviceCounters{Name: d.Name, ReadBytes: d.ReadBytes, ReadOps: d.ReadOps, WriteBytes: d.WriteBytes, WriteOps: d.WriteOps})
	}
	return out
}
