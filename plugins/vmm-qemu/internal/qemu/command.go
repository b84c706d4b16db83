package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
)

// sparePorts is how many devices can be plugged beyond those that a VM starts with.
const sparePorts = 6

// obj is the argument of an option that takes JSON: names and paths in it are data and never syntax.
type obj map[string]any

// command makes a command line. All that is not JSON consists of our own words, numbers, and the two
// arguments that QEMU takes whole (-kernel, -initrd: our paths; -append: the kernel's command line).
type command struct {
	d      *Driver
	m      vmmkit.Machine
	args   []string
	files  []*os.File     // descriptors from firstFile on
	opened []*os.File     // those of them that are ours to close
	port   int            // next root port
	reads  []string       // firmware
	was    *snapshotState // what a snapshot was made with; nil: boot
}

func (c *command) add(args ...string) { c.args = append(c.args, args...) }

func (c *command) json(option string, o obj) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	c.add(option, string(b))
	return nil
}

// shared tells whether guest memory must be shared: exactly when a back-end in another process reads it.
func (c *command) shared() bool {
	for _, n := range c.m.NICs {
		if n.SocketPath != "" {
			return true
		}
	}
	return c.was != nil && c.was.Shared
}

func (c *command) build() error {
	s := c.m.Spec
	const mib = 1 << 20
	maxCPUs := max(s.MaxCPUs, s.CPUs)
	machine := "q35,usb=off,vmport=off,graphics=off,memory-backend=ram,accel=" + c.d.accel()
	if s.Boot.Firmware == "uefi" {
		machine += ",pflash0=code,pflash1=vars"
	}
	boot := c.bootSize()
	sockets, cores, threads := uint32(1), maxCPUs, uint32(1)
	if t := s.Topology; t != (vmm.Topology{}) {
		sockets, cores, threads = t.Sockets, t.Cores, t.Threads
	}
	memory := strconv.FormatUint(boot.BootMemory/mib, 10)
	if boot.Region > 0 {
		memory = fmt.Sprintf("size=%sM,maxmem=%dM", memory, (boot.BootMemory+boot.Region)/mib)
	}
	c.add("-name", c.m.Marker, "-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", machine, "-cpu", c.cpu(), "-smp", fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=%d,cores=%d,threads=%d", boot.BootCPUs, maxCPUs, sockets, cores, threads),
		"-m", memory, "-uuid", c.m.ID, "-rtc", "base=utc", "-boot", "strict=on",
		"-action", "shutdown=pause,reboot=reset,panic=none,watchdog=reset",
		"-chardev", "socket,id=api,fd=3,server=on,wait=off", "-mon", "chardev=api,mode=control",
		"-chardev", "socket,id=serial,fd=4,server=on,wait=off,logfile=console.log,logappend=on")
	err := errors.Join(c.json("-object", c.memory("ram", boot.BootMemory)), c.json("-device", obj{"driver": "isa-serial", "chardev": "serial"}))
	if err := errors.Join(err, c.ports(), c.boot(), c.devices(), c.extras(boot)); err != nil {
		return err
	}
	if c.was != nil {
		return c.incoming()
	}
	if c.m.Paused {
		c.add("-S")
	}
	return nil
}

// extras makes the devices that few VMs have, behind all others: slots are given in order.
func (c *command) extras(boot size) error {
	var all error
	if boot.Region > 0 {
		all = errors.Join(all, c.json("-object", c.memory(memoryDevice, boot.Region)),
			c.json("-device", obj{"driver": "virtio-mem-pci", "id": memoryDevice, "memdev": memoryDevice, "requested-size": 0, "bus": "pcie.0"}))
	}
	if c.m.Spec.Watchdog {
		all = errors.Join(all, c.json("-device", obj{"driver": "i6300esb", "bus": "pcie.0"}))
	}
	if c.m.Spec.Vsock != 0 {
		all = errors.Join(all, c.vsock())
	}
	return all
}

// blockMemory is the size of the pieces in which memory comes and goes (virtio-mem's default on x86), in bytes.
const blockMemory = 2 << 20

// memoryDevice is the id of the device that brings memory beyond what a VM boots with, and of its back-end.
const memoryDevice = "more-memory"

// bootSize is how many vCPUs and how much memory the machine begins with, and how much can come.
func (c *command) bootSize() size {
	if c.was != nil {
		return c.was.size
	}
	s := c.m.Spec
	b := size{BootCPUs: s.CPUs, BootMemory: s.MemoryBytes}
	if s.MaxMemory > s.MemoryBytes {
		b.Region = (s.MaxMemory - s.MemoryBytes + blockMemory - 1) / blockMemory * blockMemory
	}
	return b
}

func (c *command) memory(id string, bytes uint64) obj {
	if c.shared() || c.m.Spec.HugePages {
		return obj{"qom-type": "memory-backend-memfd", "id": id, "size": bytes, "share": c.shared(), "hugetlb": c.m.Spec.HugePages}
	}
	return obj{"qom-type": "memory-backend-ram", "id": id, "size": bytes}
}

// vsock gives the guest a virtio socket whose other side is the host's kernel.
func (c *command) vsock() error {
	f, err := os.OpenFile(vhostVsock, os.O_RDWR, 0)
	if err != nil {
		return errs.Wrap(errs.Unavailable, err, "the host's side of the virtio socket cannot be opened")
	}
	c.opened = append(c.opened, f)
	return c.json("-device", obj{"driver": "vhost-vsock-pci", "guest-cid": c.m.Spec.Vsock, "vhostfd": c.pass(f), "bus": "pcie.0"})
}

// pass hands a file to the process and gives its number there.
func (c *command) pass(f *os.File) string {
	c.files = append(c.files, f)
	return strconv.Itoa(firstFile + len(c.files) - 1)
}

// firstFile is the number of the first descriptor after those of the two sockets.
const firstFile = 5

func (c *command) cpu() string {
	switch {
	case c.d.kvm != nil:
		// What distributions ask for today (x86-64-v2 of the psABI). All that TCG can do ("max") makes a guest
		// boot a tenth slower here.
		const cpu = "qemu64,popcnt=on,ssse3=on,sse4.1=on,sse4.2=on,lahf_lm=on,svm=off"
		if c.m.Spec.Topology.Threads > 1 {
			return cpu + ",vendor=GenuineIntel" // AMD's way to tell of threads is not emulated
		}
		return cpu
	case c.m.Spec.Nested:
		return "host" + c.threads()
	}
	return "host,vmx=off,svm=off" + c.threads()
}

// threads is what tells a guest on an AMD processor of threads.
func (c *command) threads() string {
	if cpu, err := os.ReadFile("/proc/cpuinfo"); err == nil && c.m.Spec.Topology.Threads > 1 && hasFlag(string(cpu), "topoext") {
		return ",topoext=on"
	}
	return ""
}

// ports makes the root ports that disks and NICs are plugged into, eight functions a slot, from slot 2 on. The
// guest numbers devices in their order.
func (c *command) ports() error {
	for i := range c.countPorts() {
		o := obj{"driver": "pcie-root-port", "id": portID(i), "chassis": i + 1, "bus": "pcie.0", "addr": fmt.Sprintf("0x%x.%d", 2+i/8, i%8)}
		if i%8 == 0 {
			o["multifunction"] = true
		}
		if err := c.json("-device", o); err != nil {
			return err
		}
	}
	return nil
}

func (c *command) countPorts() int {
	if c.was != nil {
		return c.was.Ports
	}
	n := len(c.m.Disks) + len(c.m.NICs) + sparePorts
	if c.m.CloudInit != "" {
		n++
	}
	return n
}

func portID(i int) string { return "port" + strconv.Itoa(i) }

// portFor is where a device goes: the next port, or the one that it had when the snapshot was made, under the
// id that it had then.
func (c *command) portFor(id string) (string, error) {
	if c.was != nil {
		p := c.was.At[id]
		if p == "" {
			return "", otherShape("the snapshot has no device %q", id)
		}
		return p, nil
	}
	c.port++
	return portID(c.port - 1), nil
}

func (c *command) boot() error {
	if c.m.Kernel != "" {
		c.add("-kernel", c.m.Kernel)
		if c.m.Initramfs != "" {
			c.add("-initrd", c.m.Initramfs)
		}
		if cl := c.m.Spec.Boot.Cmdline; cl != "" {
			c.add("-append", cl)
		}
		return nil
	}
	if c.m.Spec.Boot.Firmware != "uefi" {
		return nil // SeaBIOS, QEMU's own default
	}
	code, vars, err := c.d.ovmf()
	if err != nil {
		return err
	}
	own := filepath.Join(c.m.Dir, "uefi-vars.fd")
	if err := copyOnce(vars, own); err != nil {
		return errs.Wrap(errs.Unknown, err, "the VM's UEFI variables cannot be made")
	}
	c.reads = append(c.reads, code)
	file := func(p string, ro bool) obj { return obj{"driver": "file", "filename": p, "read-only": ro} }
	return errors.Join(
		c.json("-blockdev", obj{"driver": "raw", "node-name": "code", "read-only": true, "file": file(code, true)}),
		c.json("-blockdev", obj{"driver": "raw", "node-name": "vars", "read-only": false, "file": file(own, false)}))
}

// copyOnce copies src to dst unless dst is there, wholly or not at all.
func copyOnce(src, dst string) error {
	if _, err := os.Stat(dst); err == nil {
		return nil
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.CreateTemp(filepath.Dir(dst), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Rename(out.Name(), dst)
}

func (c *command) devices() error {
	var all error
	for i, d := range c.m.Disks {
		port, err := c.portFor(diskID(d.Name))
		if err != nil {
			return err
		}
		dev := diskDevice(d, port)
		if d.Limit != (vmm.RateLimit{}) {
			all = errors.Join(all, c.json("-object", throttle(d)))
		}
		if c.m.Kernel == "" {
			dev["bootindex"] = i + 1
		}
		all = errors.Join(all, c.json("-blockdev", blockdev(d)), c.json("-device", dev))
	}
	for i, n := range c.m.NICs {
		id := nicID(n.NICID)
		if c.was != nil {
			id = nicID(c.m.Restore.Spec.NICs[i].NICID)
		}
		port, err := c.portFor(id)
		if err != nil {
			return err
		}
		net, chardev, err := c.netdev(n)
		if err != nil {
			return err
		}
		if chardev != "" {
			c.add("-chardev", chardev)
		}
		all = errors.Join(all, c.json("-netdev", net), c.json("-device", nicDevice(n, port)))
	}
	if c.m.CloudInit != "" {
		ci := vmm.DiskAttachment{Name: "cidata", Path: c.m.CloudInit, ReadOnly: true}
		port, err := c.portFor("cidata")
		if err != nil {
			return err
		}
		dev := diskDevice(ci, port)
		dev["id"], dev["drive"] = "cidata", "cidata"
		bd := blockdev(ci)
		bd["node-name"] = "cidata"
		all = errors.Join(all, c.json("-blockdev", bd), c.json("-device", dev))
	}
	return errors.Join(all,
		c.json("-object", obj{"qom-type": "rng-random", "id": "rng", "filename": "/dev/urandom"}),
		c.json("-device", obj{"driver": "virtio-rng-pci", "rng": "rng", "bus": "pcie.0"}),
		c.json("-device", obj{"driver": "pvpanic-pci", "bus": "pcie.0"}))
}

// Ids of devices and their back-ends. A disk's is at most 5+20 bytes: node names end at 31.
func diskID(name string) string { return "disk-" + name }
func nicID(id string) string    { return "nic-" + id }

// blockdev is a disk's back-end. The format is said, never guessed (CVE-2026-27211), and what a path is called
// says nothing: with the driver given, QEMU takes the name as it is.
func blockdev(d vmm.DiskAttachment) obj {
	file := obj{"driver": "file", "filename": d.Path, "read-only": d.ReadOnly, "discard": "unmap"}
	if d.Block {
		// A block device is not to be cached twice; reads and writes go to it straight.
		file["driver"], file["cache"], file["aio"] = "host_device", obj{"direct": true}, "native"
	}
	raw := obj{"driver": "raw", "read-only": d.ReadOnly, "discard": "unmap", "file": file}
	if d.Limit == (vmm.RateLimit{}) {
		raw["node-name"] = diskID(d.Name)
		return raw
	}
	return obj{"driver": "throttle", "node-name": diskID(d.Name), "throttle-group": limitID(d.Name), "read-only": d.ReadOnly,
		"discard": "unmap", "file": raw}
}

func limitID(name string) string { return "limit-" + name }

// throttle is the object that a disk with a limit is held to.
func throttle(d vmm.DiskAttachment) obj {
	limits := obj{}
	if n := d.Limit.BytesPerSecond; n != 0 {
		limits["bps-total"] = n
	}
	if n := d.Limit.OpsPerSecond; n != 0 {
		limits["iops-total"] = n
	}
	return obj{"qom-type": "throttle-group", "id": limitID(d.Name), "limits": limits}
}

func diskDevice(d vmm.DiskAttachment, port string) obj {
	return obj{"driver": "virtio-blk-pci", "id": diskID(d.Name), "drive": diskID(d.Name), "serial": d.Name, "bus": port}
}

func nicDevice(n vmm.NICAttachment, port string) obj {
	o := obj{"driver": "virtio-net-pci", "id": nicID(n.NICID), "netdev": nicID(n.NICID), "mac": n.MAC, "bus": port, "romfile": ""}
	if n.MTU != 0 {
		o["host_mtu"] = n.MTU
	}
	if q := queues(n); q > 1 {
		o["mq"], o["vectors"] = true, 2*q+2 // one each for receive and transmit, control, configuration
	}
	return o
}

func queues(n vmm.NICAttachment) int { return max(1, int(n.Queues), len(n.TAP)) }

// netdev is a NIC's back-end. TAP descriptors are numbered as the process will have them. For a vhost-user
// socket there is a chardev to be made first.
func (c *command) netdev(n vmm.NICAttachment) (net obj, chardev string, err error) {
	switch {
	case len(n.TAP) > 0:
		var fds []string
		for _, f := range n.TAP {
			fds = append(fds, c.pass(f))
		}
		return tapNetdev(n, fds), "", nil
	case n.TAPName != "":
		return namedTAP(n), "", nil
	}
	// -chardev takes no JSON (QEMU 7.2), so the path is option text and may hold only what is none.
	for i := range len(n.SocketPath) {
		if b := n.SocketPath[i]; !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || strings.IndexByte("/._-", b) >= 0) {
			return nil, "", errs.Field("nics.socket_path", "use letters, digits, '/', '.', '_' and '-'",
				"the socket's path %s holds the byte 0x%02x", ident.Quote(n.SocketPath), b)
		}
	}
	return vhostNetdev(n), "socket,id=" + nicID(n.NICID) + ",reconnect=1,path=" + n.SocketPath, nil
}

func tapNetdev(n vmm.NICAttachment, fds []string) obj {
	return obj{"type": "tap", "id": nicID(n.NICID), "fds": strings.Join(fds, ":"), "vhost": false}
}

func namedTAP(n vmm.NICAttachment) obj {
	return obj{"type": "tap", "id": nicID(n.NICID), "ifname": n.TAPName, "script": "no", "downscript": "no", "vhost": false, "queues": queues(n)}
}

func vhostNetdev(n vmm.NICAttachment) obj {
	return obj{"type": "vhost-user", "id": nicID(n.NICID), "chardev": nicID(n.NICID), "queues": queues(n)}
}
