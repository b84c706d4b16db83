package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/test/guest"
)

// disk makes a volume.
func (r *rig) disk(name string, size int64) (vmm.Disk, vmm.DiskAttachment) {
	r.t.Helper()
	// What would be options, were the path one.
	path := filepath.Join(r.t.TempDir(), name+",format=qcow2,if=x y")
	f, err := os.Create(path)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		r.t.Fatal(err)
	}
	id := ident.New()
	return vmm.Disk{Name: name, VolumeID: id}, vmm.DiskAttachment{Name: name, VolumeID: id, Path: path, Format: "raw", SizeBytes: uint64(size)}
}

// tap is a TAP, and a socket that sees what the guest sends on it.
type tap struct{ guest.TAP }

func newTAP(t *testing.T, queues int) tap {
	t.Helper()
	tp, err := guest.NewTAP(queues)
	if errors.Is(err, unix.EPERM) {
		t.Skip("making a TAP needs root")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tp.Close)
	return tap{tp}
}

// sees waits for a frame from a MAC.
func (tp tap) sees(t *testing.T, mac string) {
	t.Helper()
	want, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	if err := tp.Wire.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	for {
		n, err := tp.Wire.Read(buf)
		if err != nil {
			t.Fatalf("no frame from %s: %v", mac, err)
		}
		if n >= 12 && bytes.Equal(buf[6:12], want) {
			return
		}
	}
}

func TestDevices(t *testing.T) {
	r := newRig(t)
	rootDisk, root := r.disk("root", 8<<20)
	dataDisk, data := r.disk("data", 4<<20)
	dataDisk.ReadOnly, data.ReadOnly = true, true
	tap1 := newTAP(t, 2)
	nic := vmm.NIC{NICID: ident.New(), MAC: "52:54:00:aa:00:01"}
	vm := r.create(func(req *vmm.CreateRequest) {
		req.Spec.CPUs = 2
		req.Spec.Disks = []vmm.Disk{rootDisk, dataDisk}
		req.Spec.NICs = []vmm.NIC{nic}
		req.Spec.CloudInit.UserData = "#!/bin/sh\necho user-data of $(hostname)\n"
	})
	start := vmm.StartRequest{Disks: []vmm.DiskAttachment{root, data},
		NICs: []vmm.NICAttachment{{NICID: nic.NICID, MAC: nic.MAC, MTU: 1400, Queues: 2, TAP: tap1.Queues}}}
	vm = r.start(vm.ID, start)
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.until("mvirt-guest: cidata on /dev/vdc")
	c.until("mvirt-guest: boot vm1")
	c.until("mvirt-guest: nic eth0 52:54:00:aa:00:01")
	tap1.sees(t, nic.MAC)
	c.until("user-data of vm1")
	c.send("root\n")
	c.until("/root # ")
	c.send("cat /sys/block/vda/serial; blockdev --getsize64 /dev/vda; cat /sys/block/vdb/ro; cat /sys/class/net/eth0/mtu; ls -d /sys/class/net/eth0/queues/rx-1\n")
	c.until("root")
	c.until("8388608")
	c.until("1\r\n")
	c.until("1400")
	c.until("\n/sys/class/net/eth0/queues/rx-1")
}

func TestHotplug(t *testing.T) {
	r := newRig(t)
	rootDisk, root := r.disk("root", 8<<20)
	vm := r.create(func(req *vmm.CreateRequest) { req.Spec.Disks = []vmm.Disk{rootDisk} })
	vm = r.start(vm.ID, vmm.StartRequest{Disks: []vmm.DiskAttachment{root}})
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20})
	c.login()

	_, extra := r.disk("extra", 4<<20)
	plug := vmm.PlugDiskRequest{ID: vm.ID, Disk: extra}
	for range 2 { // the second changes nothing
		if err := r.m.PlugDisk(t.Context(), plug); err != nil {
			t.Fatal(err)
		}
	}
	c.until("mvirt-guest: disk add vdb extra 4194304")
	if got := r.get(vm.ID); !got.Pending {
		t.Error("a plugged disk that the definition has not is not pending")
	}
	spec := vm.Spec
	spec.Disks = append(spec.Disks, vmm.Disk{Name: "extra", VolumeID: extra.VolumeID})
	got, err := r.m.Update(t.Context(), vmm.UpdateRequest{ID: vm.ID, Generation: vm.Generation, Spec: spec})
	if err != nil || got.Pending {
		t.Errorf("definition with the disk: %+v, %v", got, err)
	}

	if err := os.Truncate(extra.Path, 6<<20); err != nil {
		t.Fatal(err)
	}
	if err := r.m.DiskResized(t.Context(), vmm.DiskResizedRequest{ID: vm.ID, Name: "extra", SizeBytes: 6 << 20}); err != nil {
		t.Fatal(err)
	}
	c.until("mvirt-guest: disk change vdb extra 6291456")
	if err := r.m.DiskResized(t.Context(), vmm.DiskResizedRequest{ID: vm.ID, Name: "extra", SizeBytes: 1 << 20}); !errors.Is(err, errs.Invalid) {
		t.Errorf("shrunk: %v", err)
	}
	if st, err := os.Stat(extra.Path); err != nil || st.Size() != 6<<20 {
		t.Errorf("the volume: %v, %v", st, err)
	}
	c.send("dd if=/dev/zero of=/dev/vdb bs=64k count=16 conv=fsync && echo writ''ten\n")
	c.until("written")
	cnt, err := r.m.Counters(t.Context(), vmm.Ref{Ref: vm.ID})
	if err != nil || cnt.CPUTime == 0 || cnt.ResidentBytes < 1<<20 {
		t.Errorf("counters: %+v, %v", cnt, err)
	}
	found := false
	for _, d := range cnt.Devices {
		found = found || d.Name == "extra" && d.WriteBytes == 1<<20
	}
	if !found {
		t.Errorf("counters: %+v, want extra with 1 MiB written", cnt.Devices)
	}

	// The plugin comes back and still knows what was plugged.
	c.stop()
	r.close()
	r.open()
	if err := r.m.UnplugDisk(t.Context(), vmm.UnplugRequest{ID: vm.ID, Name: "extra"}); err != nil {
		t.Fatal(err)
	}
	if open := openFiles(t, vm.PID); strings.Contains(open, extra.Path) {
		t.Error("the unplugged disk's file is still open")
	}
	if err := r.m.UnplugDisk(t.Context(), vmm.UnplugRequest{ID: vm.ID, Name: "extra"}); err != nil {
		t.Errorf("unplug again: %v", err)
	}
	if err := r.m.PlugDisk(t.Context(), plug); err != nil {
		t.Errorf("plug again: %v", err)
	}
	gone := plug
	gone.Disk.Name, gone.Disk.VolumeID, gone.Disk.Path = "gone", ident.New(), "/does/not/exist"
	if err := r.m.PlugDisk(t.Context(), gone); err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("a disk that is not there: %v", err)
	}

	tp := newTAP(t, 1)
	nic := vmm.NICAttachment{NICID: ident.New(), MAC: "52:54:00:aa:00:02", TAP: tp.Queues, Queues: 1}
	if err := r.m.PlugNIC(t.Context(), vmm.PlugNICRequest{ID: vm.ID, NIC: nic}); err != nil {
		t.Fatal(err)
	}
	tp.sees(t, nic.MAC)
	if err := r.m.UnplugNIC(t.Context(), vmm.UnplugRequest{ID: vm.ID, Name: nic.NICID}); err != nil {
		t.Fatal(err)
	}
	err = r.m.PlugNIC(t.Context(), vmm.PlugNICRequest{ID: vm.ID, NIC: vmm.NICAttachment{NICID: nic.NICID, MAC: nic.MAC, SocketPath: "/tmp/s"}})
	if !errors.Is(err, errs.Precondition) {
		t.Errorf("vhost-user without shared memory: %v", err)
	}
	// What was there all the time has not noticed.
	c = r.console(vm.ID, vmm.ConsoleRequest{})
	c.send("dd if=/dev/vda of=/dev/null bs=1M iflag=direct && echo re''ad-all\n")
	c.until("read-all")
	if got := r.get(vm.ID); got.State != vmm.StateRunning {
		t.Errorf("in the end: %+v", got)
	}
}

func openFiles(t *testing.T, pid uint32) string {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil {
			all.WriteString(to + "\n")
		}
	}
	return all.String()
}

// Firmware boot: SeaBIOS runs the boot sector of the first disk.
func TestFirmwareBoot(t *testing.T) {
	r := newRig(t)
	rootDisk, root := r.disk("root", 1<<20)
	// mov dx,0x3f8; for each byte of the text: out dx,al; then halt. 16-bit, loaded at 0x7c00.
	sector := []byte{0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x14, 0x7c, 0xba, 0xf8, 0x03, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xf4}
	sector = append(sector, "boot sector runs\n\x00"...)
	sector = append(sector, make([]byte, 510-len(sector))...)
	sector = append(sector, 0x55, 0xaa)
	f, err := os.OpenFile(root.Path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(sector); err != nil {
		t.Fatal(err)
	}
	f.Close()
	vm := r.create(func(req *vmm.CreateRequest) {
		req.Kernel, req.Initramfs, req.Spec.Boot.Cmdline = nil, nil, ""
		req.Spec.Disks = []vmm.Disk{rootDisk}
	})
	r.start(vm.ID, vmm.StartRequest{Disks: []vmm.DiskAttachment{root}})
	c := r.console(vm.ID, vmm.ConsoleRequest{Replay: 1 << 20, ReadOnly: true})
	c.until("boot sector runs")
	if _, err := r.m.Kill(t.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
		t.Fatal(err)
	}
	if err := <-c.end; !errors.Is(err, io.EOF) {
		t.Errorf("the console ended with %v", err)
	}
}
