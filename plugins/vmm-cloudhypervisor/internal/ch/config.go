package ch

import (
	"os"

	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/chapi"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
)

// Ids of devices: what mvirt calls a disk or a NIC, with its kind.
func diskID(name string) string { return "disk-" + name }
func nicID(id string) string    { return "nic-" + id }

// hugePage is the size of the huge pages that are used, in bytes: every x86-64 processor has it.
const hugePage = 2 << 20

const cidataID = "cidata"

// shared tells whether guest memory must be shared: exactly when a back-end in another process reads it.
func shared(nics []vmm.NICAttachment) bool {
	for _, n := range nics {
		if n.SocketPath != "" {
			return true
		}
	}
	return false
}

// config is a VM without the NICs whose descriptors travel apart.
func (d *Driver) config(m vmmkit.Machine, v chVersion) (chapi.VMConfig, error) {
	s := m.Spec
	c := chapi.VMConfig{
		CPUs:    chapi.CPUs{Boot: s.CPUs, Max: max(s.CPUs, s.MaxCPUs), Nested: s.Nested},
		Memory:  chapi.Memory{Size: s.MemoryBytes, Shared: shared(m.NICs), HugePages: s.HugePages},
		RNG:     chapi.RNG{Src: "/dev/urandom"},
		Balloon: &chapi.Balloon{DeflateOnOOM: true, FreePageReporting: true},
		Serial:  chapi.Console{Mode: "Socket", Socket: serialSocket},
		Console: chapi.Console{Mode: "Off"},
		PVPanic: true,
	}
	if s.HugePages {
		c.Memory.HugePageSize = hugePage
	}
	if t := s.Topology; t != (vmm.Topology{}) {
		c.CPUs.Topology = &chapi.Topology{ThreadsPerCore: t.Threads, CoresPerDie: t.Cores, DiesPerPackage: 1, Packages: t.Sockets}
	}
	if s.Vsock != 0 {
		c.Vsock = &chapi.Vsock{CID: s.Vsock, Socket: vsockSocket}
	}
	c.Watchdog = s.Watchdog
	c.Landlock, c.LandlockRules = d.landlock(m)
	if s.MaxMemory > s.MemoryBytes {
		c.Memory.HotplugSize = s.MaxMemory - s.MemoryBytes
	}
	if v.less(chVersion{53, 0}) {
		c.Platform = &chapi.Platform{UUID: m.ID}
	} else {
		c.Platform = &chapi.Platform{SystemUUID: m.ID}
	}
	if m.Kernel != "" {
		c.Payload = chapi.Payload{Kernel: m.Kernel, Initramfs: m.Initramfs, Cmdline: s.Boot.Cmdline}
	} else {
		fw, err := d.firmware(s.Boot.Firmware)
		if err != nil {
			return c, err
		}
		c.Payload.Firmware = fw
	}
	for _, a := range m.Disks {
		disk := diskConfig(a)
		disk.NumQueues = min(s.CPUs, 4)
		c.Disks = append(c.Disks, disk)
	}
	if m.CloudInit != "" {
		c.Disks = append(c.Disks, chapi.Disk{ID: cidataID, Path: m.CloudInit, ReadOnly: true, Serial: cidataID, ImageType: "Raw"})
	}
	for _, n := range m.NICs {
		if len(n.TAP) == 0 {
			c.Net = append(c.Net, netConfig(n))
		}
	}
	return c, nil
}

// diskConfig is a disk. A block device is not to be cached twice.
func diskConfig(a vmm.DiskAttachment) chapi.Disk {
	return chapi.Disk{ID: diskID(a.Name), Path: a.Path, ReadOnly: a.ReadOnly, Direct: a.Block, Serial: a.Name, ImageType: "Raw",
		RateLimiter: rateLimiter(a.Limit)}
}

// rateLimiter is a disk's limit. An empty bucket stops the disk for 100 ms; one that fills in a second is not
// emptied by that.
func rateLimiter(l vmm.RateLimit) *chapi.RateLimiter {
	const second = 1000
	var r chapi.RateLimiter
	if l.BytesPerSecond != 0 {
		r.Bandwidth = &chapi.TokenBucket{Size: l.BytesPerSecond, RefillTime: second}
	}
	if l.OpsPerSecond != 0 {
		r.Ops = &chapi.TokenBucket{Size: l.OpsPerSecond, RefillTime: second}
	}
	if r == (chapi.RateLimiter{}) {
		return nil
	}
	return &r
}

// landlock says which paths a hypervisor may open. Those that its configuration names it adds itself; the rest
// is for its sockets, which it makes anew at each reboot, and for disks that are plugged later.
func (d *Driver) landlock(m vmmkit.Machine) (bool, []chapi.LandlockRule) {
	if !d.cfg.Landlock {
		return false, nil
	}
	rules := []chapi.LandlockRule{{Path: m.Dir, Access: "rw"}}
	for _, p := range d.cfg.LandlockPaths {
		if _, err := os.Stat(p); err == nil {
			rules = append(rules, chapi.LandlockRule{Path: p, Access: "rw"})
		}
	}
	return true, rules
}

// netConfig is a NIC. Its MTU and address are not told: they are the net plugin's to set on a TAP, and an
// attempt to do so would fail for want of privilege.
func netConfig(n vmm.NICAttachment) chapi.Net {
	c := chapi.Net{ID: nicID(n.NICID), MAC: n.MAC, NumQueues: 2 * max(1, int(n.Queues), len(n.TAP)), TAP: n.TAPName}
	if n.SocketPath != "" {
		c.VhostUser, c.VhostSocket, c.VhostMode = true, n.SocketPath, "Client"
	}
	return c
}
