package ch

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/test/guest"
)

// vsockMode makes the test's own binary, copied into a guest, answer on a virtio socket.
const vsockMode = "mvirt-vsock-echo"

const vsockPort = 5000

// answerVsock is what runs in the guest.
func answerVsock() int {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: vsockPort})
	}
	if err == nil {
		err = unix.Listen(fd, 1)
	}
	fmt.Println("vsock listens", err)
	if err != nil {
		return 1
	}
	conn, _, err := unix.Accept(fd)
	if err != nil {
		fmt.Println("vsock accept", err)
		return 1
	}
	buf := make([]byte, 100)
	n, err := unix.Read(conn, buf)
	if err != nil {
		fmt.Println("vsock read", err)
		return 1
	}
	_, err = unix.Write(conn, append([]byte("guest got "), buf[:n]...))
	fmt.Println("vsock answered", err)
	return 0
}

// static tells whether a binary runs without libraries.
func static(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

// login gets a shell, and a prompt that what is typed does not look like.
func (s *screen) login() {
	s.t.Helper()
	s.until("login:")
	s.send("root\n")
	s.until("/root # ")
}

var asked int

// ask runs a command in the guest's shell and gives its output.
func (s *screen) ask(command string) string {
	s.t.Helper()
	asked++
	mark := "done-" + strconv.Itoa(asked)
	s.send("echo beg''in-" + mark[5:] + "; " + command + "; echo " + mark[:5] + "''" + mark[5:] + "\n")
	s.mu.Lock()
	from := s.seen
	s.mu.Unlock()
	s.until(mark)
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.got.String()[from : s.seen-len(mark)]
	_, out, _ = strings.Cut(out, "begin-"+mark[5:]) // before it is what was typed
	return strings.TrimSpace(strings.ReplaceAll(out, "\r", ""))
}

// Each device that a definition may ask for, as a guest sees it.
func TestRealDevices(t *testing.T) {
	r, g := realRig(t)
	ctx := t.Context()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	isStatic := static(self)
	program := vmm.DiskAttachment{Name: "program", VolumeID: ident.New(), Path: filepath.Join(t.TempDir(), "program"), Format: "raw"}
	slow := vmm.DiskAttachment{Name: "slow", VolumeID: ident.New(), Path: filepath.Join(t.TempDir(), "slow"), Format: "raw"}
	if isStatic {
		copyFile(t, self, program.Path)
		st, err := os.Stat(program.Path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(program.Path, (st.Size()+4095)&^4095); err != nil {
			t.Fatal(err)
		}
	} else if err := os.WriteFile(program.Path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(slow.Path, bytes.Repeat([]byte{7}, 12<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	// A named TAP as the net plugin makes it: there, up, and owned by who runs the hypervisor.
	const tapName = "mvtest0"
	for _, c := range [][]string{{"tuntap", "add", tapName, "mode", "tap", "user", strconv.Itoa(os.Getuid()), "vnet_hdr"}, {"link", "set", tapName, "up"}} {
		if out, err := exec.CommandContext(ctx, "ip", c...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v %s", c, err, out)
		}
	}
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", tapName).Run() })
	wire, err := guest.Listen(tapName)
	if err != nil {
		t.Fatal(err)
	}
	defer wire.Close()
	nic := vmm.NICAttachment{NICID: ident.New(), MAC: "52:54:00:00:00:31", TAPName: tapName}
	vm, err := r.m.Create(ctx, vmm.CreateRequest{ID: ident.New(), Kernel: open(t, g.Kernel), Initramfs: open(t, g.Initramfs), Spec: vmm.Spec{
		Name: "devices", CPUs: 2, MaxCPUs: 4, MemoryBytes: 256 << 20, MaxMemory: 512 << 20, Topology: vmm.Topology{Sockets: 1, Cores: 2, Threads: 2},
		Boot: vmm.Boot{Cmdline: "console=ttyS0 quiet"}, Vsock: 7, Watchdog: true, Nested: true,
		NICs: []vmm.NIC{{NICID: nic.NICID, MAC: nic.MAC}},
		Disks: []vmm.Disk{{Name: "program", VolumeID: program.VolumeID}, {Name: "slow", VolumeID: slow.VolumeID,
			Limit: vmm.RateLimit{BytesPerSecond: 2 << 20}}}}})
	if err != nil {
		t.Fatal(err)
	}
	if vm, err = r.m.Start(ctx, vmm.StartRequest{ID: vm.ID, Disks: []vmm.DiskAttachment{program, slow}, NICs: []vmm.NICAttachment{nic}}); err != nil {
		t.Fatal(err)
	}
	c := r.console(vm.ID)
	c.login()
	seesFrame(t, guest.TAP{Wire: wire}, nic.MAC)

	if got := c.ask("cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list"); got != "0-1" {
		t.Errorf("thread siblings %q: the guest does not see two threads a core", got)
	}
	if got := c.ask("grep -cw svm /proc/cpuinfo"); got != "2" {
		t.Errorf("%s of 2 vCPUs have svm with nested on", got)
	}
	if got := c.ask("cat /sys/bus/virtio/devices/*/device | sort -u | tr '\\n' ' '"); !strings.Contains(got, "0x0023") || !strings.Contains(got, "0x0013") {
		t.Errorf("devices %s: no watchdog (0x23) or no socket (0x13)", got)
	}
	took := func(device string) int {
		got := c.ask("a=$(cut -d. -f1 /proc/uptime); cat " + device + " >/dev/null; b=$(cut -d. -f1 /proc/uptime); echo took $((b-a))")
		_, got, _ = strings.Cut(got, "took ") // what boots still may print before
		n, err := strconv.Atoi(strings.TrimSpace(got))
		if err != nil {
			t.Errorf("reading %s: %v", device, err)
		}
		return n
	}
	if n := took("/dev/vdb"); n < 4 {
		t.Errorf("12 MiB at 2 MiB a second took %d s", n)
	}
	if isStatic {
		c.send("cat /dev/vda >/run/p; chmod +x /run/p; /run/p " + vsockMode + " &\n")
		c.until("vsock listens <nil>")
		vsockTalks(t, vm.VsockSocket)
		c.until("vsock answered <nil>")
	} else {
		t.Log("NOT TESTED: a program that answers on a virtio socket; build the test with CGO_ENABLED=0")
	}

	mem := func() int {
		n, err := strconv.Atoi(c.ask("awk '/MemTotal/{print $2}' /proc/meminfo"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := mem()
	if vm, err = (vmmkit.Resizable{Manager: r.m}).Resize(ctx, vmm.ResizeRequest{Ref: vm.ID, CPUs: 4, MemoryBytes: 512 << 20}); err != nil {
		t.Errorf("resize: %v", err)
	}
	c.ask("n=0; while [ ! -e /sys/devices/system/cpu/cpu3/online ] && [ $n -lt 300 ]; do n=$((n+1)); usleep 100000; done; for i in 2 3; do echo 1 >/sys/devices/system/cpu/cpu$i/online; done")
	if got := c.ask("grep -c ^processor /proc/cpuinfo"); got != "4" {
		t.Errorf("%s vCPUs after the resize", got)
	}
	c.ask("n=0; while [ $(awk '/MemTotal/{print $2}' /proc/meminfo) -lt " + strconv.Itoa(before+200<<10) +
		" ] && [ $n -lt 100 ]; do n=$((n+1)); for b in /sys/devices/system/memory/memory*/state; do echo online >$b; done 2>/dev/null; usleep 100000; done")
	if after := mem(); after < before+200<<10 {
		t.Errorf("memory %d kB, and after the resize %d", before, after)
	} else {
		t.Logf("memory %d kB, after the resize %d", before, after)
	}
	// Limits hold for what is plugged, too.
	if err := r.m.UnplugDisk(ctx, vmm.UnplugRequest{ID: vm.ID, Name: "slow"}); err != nil {
		t.Error(err)
	}
	c.until("mvirt-guest: disk gone vdb")
	slow.Limit = vmm.RateLimit{BytesPerSecond: 4 << 20}
	if err := r.m.PlugDisk(ctx, vmm.PlugDiskRequest{ID: vm.ID, Disk: slow}); err != nil {
		t.Error(err)
	}
	c.until("mvirt-guest: disk add vdb slow")
	if n := took("/dev/vdb"); n < 1 {
		t.Errorf("12 MiB at 4 MiB a second, plugged, took %d s", n)
	}
	if _, err := r.m.Kill(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
		t.Error(err)
	}
}

// vsockTalks connects from the host as programs do.
func vsockTalks(t *testing.T, path string) {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(realLimit)); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	fmt.Fprintf(conn, "CONNECT %d\n", vsockPort)
	if line, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(line, "OK ") {
		t.Errorf("connect: %q, %v", line, err)
		return
	}
	fmt.Fprint(conn, "hello")
	answer := make([]byte, len("guest got hello"))
	if _, err := io.ReadFull(in, answer); err != nil || string(answer) != "guest got hello" {
		t.Errorf("answer %q, %v", answer, err)
	}
}

// A kernel as an ELF file with a PVH entry, on huge pages, without nested virtualisation.
func TestRealVmlinux(t *testing.T) {
	r, g := realRig(t)
	const pages = "/proc/sys/vm/nr_hugepages"
	if err := os.WriteFile(pages, []byte("80"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(pages, []byte("0"), 0) })
	free := func() int {
		b, err := os.ReadFile("/proc/meminfo")
		if err != nil {
			t.Fatal(err)
		}
		_, s, _ := strings.Cut(string(b), "HugePages_Free:")
		n, err := strconv.Atoi(strings.Fields(s)[0])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	had := free()
	vm, err := r.m.Create(t.Context(), vmm.CreateRequest{ID: ident.New(), Kernel: open(t, vmlinux(t, g.Kernel)), Initramfs: open(t, g.Initramfs),
		Spec: vmm.Spec{Name: "pvh", CPUs: 1, MemoryBytes: 160 << 20, HugePages: had >= 80, Boot: vmm.Boot{Cmdline: "console=ttyS0 quiet"}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.m.Start(t.Context(), vmm.StartRequest{ID: vm.ID}); err != nil {
		t.Fatal(err)
	}
	c := r.console(vm.ID)
	c.login()
	if had < 80 {
		t.Errorf("NOT TESTED on huge pages: the kernel gave %d of 80", had)
	} else if now := free(); now >= had {
		t.Errorf("%d huge pages are free, and were before", now)
	}
	if got := c.ask("grep -cw svm /proc/cpuinfo"); got != "0" {
		t.Errorf("%s vCPUs have svm with nested off", got)
	}
}
