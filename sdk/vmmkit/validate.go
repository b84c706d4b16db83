package vmmkit

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/cloudinit"
)

// Limits of a definition.
const (
	MaxCPUs    = 256
	MinMemory  = 16 << 20
	MaxDisks   = 24
	MaxNICs    = 24
	maxCmdline = 2047 // COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h, less the NUL
	maxSerial  = 20   // VIRTIO_BLK_ID_BYTES
	maxLabels  = 64
	minVsock   = 3         // below are the hypervisor and the host; vsock(7)
	anyVsock   = 1<<32 - 1 // VMADDR_CID_ANY
	minLimit   = 1 << 20   // bytes a second: less than a request's worth starves the guest
	minOps     = 10
)

// hostMemory reads MemTotal, in bytes; 0 if it is not known.
func hostMemory() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for _, l := range bytes.Split(b, []byte("\n")) {
		if f := strings.Fields(string(l)); len(f) >= 2 && f[0] == "MemTotal:" {
			kib, err := strconv.ParseUint(f[1], 10, 54)
			if err != nil {
				return 0
			}
			return kib << 10
		}
	}
	return 0
}

// checkSpec says whether a definition makes sense on a host with that much memory (0: not known).
func checkSpec(s vmm.Spec, kernel bool, memory uint64) error {
	if err := ident.CheckName("spec.name", s.Name); err != nil {
		return err
	}
	if err := checkSize(s, memory); err != nil {
		return err
	}
	if err := checkTopology(s); err != nil {
		return err
	}
	if s.Vsock != 0 && s.Vsock < minVsock || s.Vsock == anyVsock {
		return errs.Field("spec.vsock", "give 3 to 4294967294, or 0 for none", "a guest cannot have the address %d", s.Vsock)
	}
	if err := checkBoot(s.Boot, kernel); err != nil {
		return err
	}
	if err := checkDisks(s.Disks); err != nil {
		return err
	}
	if err := checkNICs(s.NICs); err != nil {
		return err
	}
	if err := cloudinit.Check(s.CloudInit); err != nil {
		return err
	}
	if len(s.Labels) > maxLabels {
		return errs.Field("spec.labels", "use fewer labels", "%d labels, the limit is %d", len(s.Labels), maxLabels)
	}
	for k, v := range s.Labels {
		if k == "" || len(k) > ident.MaxName || len(v) > 256 {
			return errs.Field("spec.labels", "use keys of 1 to 63 bytes and values of at most 256",
				"label %s has a key or a value that is too long or empty", ident.Quote(k))
		}
	}
	return nil
}

func checkSize(s vmm.Spec, memory uint64) error {
	if s.CPUs < 1 || s.CPUs > MaxCPUs {
		return errs.Field("spec.cpus", fmt.Sprintf("give 1 to %d", MaxCPUs), "%d vCPUs", s.CPUs)
	}
	if s.MaxCPUs != 0 && (s.MaxCPUs < s.CPUs || s.MaxCPUs > MaxCPUs) {
		return errs.Field("spec.max_cpus", fmt.Sprintf("give %d to %d, or 0 for as many as there are", s.CPUs, MaxCPUs),
			"at most %d vCPUs with %d to begin with", s.MaxCPUs, s.CPUs)
	}
	const mib = 1 << 20
	if s.MemoryBytes < MinMemory || s.MemoryBytes%mib != 0 {
		return errs.Field("spec.memory_bytes", "give a multiple of 1 MiB, at least 16 MiB", "%d bytes of memory", s.MemoryBytes)
	}
	if s.MaxMemory != 0 && (s.MaxMemory < s.MemoryBytes || s.MaxMemory%mib != 0) {
		return errs.Field("spec.max_memory", "give a multiple of 1 MiB, at least the memory to begin with, or 0",
			"at most %d bytes of memory with %d to begin with", s.MaxMemory, s.MemoryBytes)
	}
	for field, m := range map[string]uint64{"spec.memory_bytes": s.MemoryBytes, "spec.max_memory": s.MaxMemory} {
		if memory != 0 && m > memory {
			return errs.Field(field, fmt.Sprintf("give at most %d MiB, less than the host has", memory/mib),
				"%d MiB of memory on a host that has %d MiB", m/mib, memory/mib)
		}
	}
	return nil
}

func checkTopology(s vmm.Spec) error {
	t, most := s.Topology, max(s.CPUs, s.MaxCPUs)
	switch {
	case t == (vmm.Topology{}):
		return nil
	case t.Threads != 1 && t.Threads != 2:
		return errs.Field("spec.topology.threads", "give 1 or 2", "%d threads a core", t.Threads)
	case uint64(t.Sockets)*uint64(t.Cores)*uint64(t.Threads) != uint64(most):
		return errs.Field("spec.topology", "let sockets, cores and threads multiply to the largest number of vCPUs",
			"%d sockets of %d cores of %d threads for %d vCPUs", t.Sockets, t.Cores, t.Threads, most)
	}
	return nil
}

func checkLimit(field string, l vmm.RateLimit) error {
	switch {
	case l.BytesPerSecond != 0 && l.BytesPerSecond < minLimit, l.BytesPerSecond > 1<<50:
		return errs.Field(field+".bytes_per_second", "give at least 1 MiB, or 0 for no limit", "a limit of %d bytes a second", l.BytesPerSecond)
	case l.OpsPerSecond != 0 && l.OpsPerSecond < minOps, l.OpsPerSecond > 1<<40:
		return errs.Field(field+".ops_per_second", fmt.Sprintf("give at least %d, or 0 for no limit", minOps), "a limit of %d operations a second", l.OpsPerSecond)
	}
	return nil
}

func checkBoot(b vmm.Boot, kernel bool) error {
	switch {
	case !kernel && b.Cmdline != "":
		return errs.Field("spec.boot.cmdline", "give a kernel too, or no command line", "a command line without a kernel")
	case kernel && b.Firmware != "":
		return errs.Field("spec.boot.firmware", "give a kernel or a firmware, not both", "firmware and kernel at once")
	case b.Firmware != "" && b.Firmware != "bios" && b.Firmware != "uefi":
		return errs.Field("spec.boot.firmware", "give bios or uefi, or nothing for bios", "no firmware is called %s", ident.Quote(b.Firmware))
	case len(b.Cmdline) > maxCmdline:
		return errs.Field("spec.boot.cmdline", fmt.Sprintf("shorten it to %d bytes", maxCmdline),
			"the command line is %d bytes long, the kernel takes %d", len(b.Cmdline), maxCmdline)
	case len(b.KernelName) > 255:
		return errs.Field("spec.boot.kernel_name", "shorten it to 255 bytes", "the kernel's name is %d bytes long", len(b.KernelName))
	}
	for i := range len(b.Cmdline) {
		if c := b.Cmdline[i]; c < 0x20 || c == 0x7f {
			return errs.Field("spec.boot.cmdline", "leave control characters out", "the command line holds the byte 0x%02x at %d", c, i)
		}
	}
	return nil
}

func checkDisks(disks []vmm.Disk) error {
	if len(disks) > MaxDisks {
		return errs.Field("spec.disks", "use fewer, larger disks", "%d disks, the limit is %d", len(disks), MaxDisks)
	}
	names, volumes := map[string]bool{}, map[string]bool{}
	for i, d := range disks {
		field := fmt.Sprintf("spec.disks[%d]", i)
		if err := checkDiskName(field+".name", d.Name); err != nil {
			return err
		}
		if names[d.Name] {
			return errs.Field(field+".name", "give each disk its own name", "two disks are called %s", d.Name)
		}
		if err := ident.CheckID(field+".volume_id", d.VolumeID); err != nil {
			return err
		}
		if err := checkLimit(field+".limit", d.Limit); err != nil {
			return err
		}
		if volumes[d.VolumeID] {
			return errs.Field(field+".volume_id", "give each volume once", "volume %s is there twice", d.VolumeID)
		}
		names[d.Name], volumes[d.VolumeID] = true, true
	}
	return nil
}

func checkDiskName(field, name string) error {
	if err := ident.CheckName(field, name); err != nil {
		return err
	}
	if len(name) > maxSerial {
		return errs.Field(field, fmt.Sprintf("use at most %d bytes", maxSerial), "the disk's name %s is too long to be its serial", name)
	}
	return nil
}

func checkNICs(nics []vmm.NIC) error {
	if len(nics) > MaxNICs {
		return errs.Field("spec.nics", "use fewer NICs", "%d NICs, the limit is %d", len(nics), MaxNICs)
	}
	ids, macs := map[string]bool{}, map[string]bool{}
	for i, n := range nics {
		field := fmt.Sprintf("spec.nics[%d]", i)
		if err := ident.CheckID(field+".nic_id", n.NICID); err != nil {
			return err
		}
		if err := checkMAC(field+".mac", n.MAC); err != nil {
			return err
		}
		mac := strings.ToLower(n.MAC)
		if ids[n.NICID] || macs[mac] {
			return errs.Field(field, "give each NIC once", "NIC %s or its MAC %s is there twice", n.NICID, n.MAC)
		}
		ids[n.NICID], macs[mac] = true, true
	}
	return nil
}

func checkMAC(field, s string) error {
	m, err := net.ParseMAC(s)
	if err != nil || len(m) != 6 || len(s) != 17 || s[2] != ':' || m[0]&1 != 0 || bytes.Equal(m, make([]byte, 6)) {
		return errs.Field(field, "give a unicast address like 52:54:00:12:34:56", "%s is no MAC address for a NIC", ident.Quote(s))
	}
	return nil
}

// checkStart says whether attachments are those of the definition.
func checkStart(s vmm.Spec, disks []vmm.DiskAttachment, nics []vmm.NICAttachment) error {
	if len(disks) != len(s.Disks) {
		return errs.Field("disks", "attach each of the definition's volumes", "%d disks for a VM that has %d", len(disks), len(s.Disks))
	}
	for i, d := range disks {
		field := fmt.Sprintf("disks[%d]", i)
		if w := s.Disks[i]; d.Name != w.Name || d.VolumeID != w.VolumeID || d.ReadOnly != w.ReadOnly {
			return errs.Field(field, "attach the definition's volumes in its order", "disk %s (%s) where the definition has %s (%s)",
				ident.Quote(d.Name), ident.Quote(d.VolumeID), w.Name, w.VolumeID)
		}
		if err := checkDiskAttachment(field, d); err != nil {
			return err
		}
	}
	if len(nics) != len(s.NICs) {
		return errs.Field("nics", "attach each of the definition's NICs", "%d NICs for a VM that has %d", len(nics), len(s.NICs))
	}
	for i, n := range nics {
		field := fmt.Sprintf("nics[%d]", i)
		if w := s.NICs[i]; n.NICID != w.NICID || !strings.EqualFold(n.MAC, w.MAC) {
			return errs.Field(field, "attach the definition's NICs in its order", "NIC %s (%s) where the definition has %s (%s)",
				ident.Quote(n.NICID), ident.Quote(n.MAC), w.NICID, w.MAC)
		}
		if err := checkNICAttachment(field, n); err != nil {
			return err
		}
	}
	return nil
}

func checkPath(field, p string) error {
	if !filepath.IsAbs(p) || filepath.Clean(p) != p || len(p) > 4095 || strings.ContainsRune(p, 0) {
		return errs.Field(field, "give a clean absolute path", "%s is not a clean absolute path", ident.Quote(p))
	}
	return nil
}

func checkDiskAttachment(field string, d vmm.DiskAttachment) error {
	if err := checkDiskName(field+".name", d.Name); err != nil {
		return err
	}
	if err := ident.CheckID(field+".volume_id", d.VolumeID); err != nil {
		return err
	}
	if d.Format != "raw" {
		return errs.Field(field+".format", "say raw", "a disk in the format %s cannot be run on", ident.Quote(d.Format))
	}
	if err := checkLimit(field+".limit", d.Limit); err != nil {
		return err
	}
	return checkPath(field+".path", d.Path)
}

func checkNICAttachment(field string, n vmm.NICAttachment) error {
	if err := ident.CheckID(field+".nic_id", n.NICID); err != nil {
		return err
	}
	if err := checkMAC(field+".mac", n.MAC); err != nil {
		return err
	}
	ways := 0
	for _, there := range []bool{len(n.TAP) > 0, n.SocketPath != "", n.TAPName != ""} {
		if there {
			ways++
		}
	}
	const maxQueues = 64
	switch {
	case ways != 1:
		return errs.Field(field, "give TAP descriptors, a socket or a TAP's name", "NIC %s has %d data paths, not one", n.NICID, ways)
	case n.Queues > maxQueues || len(n.TAP) > maxQueues:
		return errs.Field(field+".queues", fmt.Sprintf("use at most %d", maxQueues), "NIC %s has %d queues", n.NICID, max(n.Queues, uint32(len(n.TAP))))
	case len(n.TAP) > 0 && n.Queues > 1 && int(n.Queues) != len(n.TAP):
		return errs.Field(field+".queues", "give a descriptor for each queue pair", "%d descriptors for %d queues", len(n.TAP), n.Queues)
	case n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535):
		return errs.Field(field+".mtu", "give 68 to 65535, or 0", "an MTU of %d", n.MTU)
	case n.SocketPath != "":
		return checkPath(field+".socket_path", n.SocketPath)
	case n.TAPName != "" && !ifName(n.TAPName):
		return errs.Field(field+".tap_name", "give an interface's name", "%s is no interface's name", ident.Quote(n.TAPName))
	}
	for _, f := range n.TAP {
		if f == nil {
			return errs.Field(field+".tap", "give open descriptors", "NIC %s has a descriptor that is not there", n.NICID)
		}
	}
	return nil
}

// ifName tells whether s can name an interface (IFNAMSIZ is 16 with the NUL) and nothing else.
func ifName(s string) bool {
	if len(s) > 15 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.' && i > 0) {
			return false
		}
	}
	return true
}
