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
	d     *Driver
	m     vmmkit.Machine
	args  []string
	files []*os.File // descriptors from 5 on
	port  int        // next root port
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
	return false
}

func (c *command) build() error {
	s := c.m.Spec
	const mib = 1 << 20
	maxCPUs := max(s.MaxCPUs, s.CPUs)
	machine := "q35,usb=off,vmport=off,graphics=off,memory-backend=ram,accel=" + c.d.accel()
	if s.Boot.Firmware == "uefi" {
		machine += ",pflash0=code,pflash1=vars"
	}
	c.add("-name", c.m.Marker, "-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", machine, "-cpu", c.cpu(), "-smp", fmt.Sprintf("cpus=%d,maxcpus=%d,sockets=1,cores=%d,threads=1", s.CPUs, maxCPUs, maxCPUs),
		"-m", strconv.FormatUint(s.MemoryBytes/mib, 10), "-uuid", c.m.ID, "-rtc", "base=utc", "-boot", "strict=on",
		"-action", "shutdown=pause,reboot=reset,panic=none",
		"-chardev", "socket,id=api,fd=3,server=on,wait=off", "-mon", "chardev=api,mode=control",
		"-chardev", "socket,id=serial,fd=4,server=on,wait=off,logfile=console.log,logappend=on")
	ram := obj{"qom-type": "memory-backend-ram", "id": "ram", "size": s.MemoryBytes}
	if c.shared() || s.HugePages {
		ram = obj{"qom-type": "memory-backend-memfd", "id": "ram", "size": s.MemoryBytes, "share": c.shared(), "hugetlb": s.HugePages}
	}
	err := errors.Join(c.json("-object", ram), c.json("-device", obj{"driver": "isa-serial", "chardev": "serial"}))
	if err := errors.Join(err, c.ports(), c.boot(), c.devices()); err != nil {
		return err
	}
	if c.m.Paused {
		c.add("-S")
	}
	return nil
}

func (c *command) cpu() string {
	switch {
	case c.d.kvm != nil:
		// What distributions ask for today (x86-64-v2 of the psABI). All that TCG can do ("max") makes a guest
		// boot a tenth slower here.
		return "qemu64,popcnt=on,ssse3=on,sse4.1=on,sse4.2=on,lahf_lm=on,svm=off"
	case c.m.Spec.Nested:
		return "host"
	}
	return "host,vmx=off,svm=off"
}

// ports makes the root ports that disks and NICs are plugged into, eight functions a slot, from slot 2 on. The
// guest numbers devices in their order.
func (c *command) ports() error {
	n := len(c.m.Disks) + len(c.m.NICs) + sparePorts
	if c.m.CloudInit != "" {
		n++
	}
	for i := range n {
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

func portID(i int) string { return "port" + strconv.Itoa(i) }

func (c *command) nextPort() string {
	c.port++
	return portID(c.port - 1)
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
		dev := diskDevice(d, c.nextPort())
		if c.m.Kernel == "" {
			dev["bootindex"] = i + 1
		}
		all = errors.Join(all, c.json("-blockdev", blockdev(d)), c.json("-device", dev))
	}
	for _, n := range c.m.NICs {
		net, chardev, err := c.netdev(n)
		if err != nil {
			return err
		}
		if chardev != "" {
			c.add("-chardev", chardev)
		}
		all = errors.Join(all, c.json("-netdev", net), c.json("-device", nicDevice(n, c.nextPort())))
	}
	if c.m.CloudInit != "" {
		ci := vmm.DiskAttachment{Name: "cidata", Path: c.m.CloudInit, ReadOnly: true}
		dev := diskDevice(ci, c.nextPort())
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
	return obj{"driver": "raw", "node-name": diskID(d.Name), "read-only": d.ReadOnly, "discard": "unmap", "file": file}
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
			fds = append(fds, strconv.Itoa(5+len(c.files)))
			c.files = append(c.files, f)
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
