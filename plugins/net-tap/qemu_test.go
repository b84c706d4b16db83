package main

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// vm is a real guest: the test guest of test/guest under QEMU without KVM.
type vm struct {
	t    *testing.T
	name string
	nic  net.NIC
	cmd  *exec.Cmd
	in   io.WriteCloser

	mu   sync.Mutex
	text string
	gone string // how QEMU ended

	more  chan struct{}
	ended chan struct{}
}

// guestFiles builds the guest, or finds it in its cache.
func guestFiles(t *testing.T) string {
	t.Helper()
	for _, p := range []string{"qemu-system-x86_64", "go"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed: no real guest", p)
		}
	}
	dir := t.TempDir()
	cmd := exec.Command("go", "run", "../../test/guest/cmd/mkguest", "--out", dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("the test guest cannot be made here: %v: %s", err, out)
	}
	return dir
}

// overlay gives a copy of the guest whose initramfs also has what lies under root.
func overlay(t *testing.T, files, root string) string {
	t.Helper()
	dir := t.TempDir()
	sh(t, `ln -s %[1]s/vmlinuz %[2]s/vmlinuz
cp %[1]s/initramfs.cpio %[2]s/initramfs.cpio
cd %[3]s; find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 >> %[2]s/initramfs.cpio`, files, dir, root)
	return dir
}

// memory is what a guest needs, in MiB: its initramfs is there twice for a moment.
func memory(t *testing.T, dir string) string {
	st, err := os.Stat(filepath.Join(dir, "initramfs.cpio"))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%dM", 184+2*st.Size()>>20)
}

// boot attaches a NIC and starts a guest on it.
func boot(t *testing.T, p *host.Plugin, dir, name string, nic net.NIC, mode net.AttachMode, more ...string) *vm {
	t.Helper()
	att, err := p.Net.Attach(t.Context(), net.AttachRequest{NICID: nic.ID, Owner: service.Owner{VMID: ident.New(), UID: uint32(os.Getuid()), GID: uint32(os.Getgid())},
		Modes: []net.AttachMode{mode}})
	if err != nil {
		t.Fatal(err)
	}
	mem := memory(t, dir)
	args := []string{"-M", "q35", "-cpu", "max", "-m", mem, "-display", "none", "-nodefaults", "-no-user-config", "-serial", "stdio",
		"-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", filepath.Join(dir, "initramfs.cpio"), "-append", "console=ttyS0 quiet no_timer_check tsc=reliable",
		"-object", "memory-backend-memfd,id=m,share=on,size=" + mem, "-numa", "node,memdev=m",
		// Without MSI-X: QEMU 7.2 crashes when a vhost-user device masks a vector and there is no KVM
		// (kvm_virtio_pci_irqfd_release with vector_irqfd unset).
		"-device", "virtio-net-pci,netdev=n,vectors=0,mac=" + att.MAC}
	v := &vm{t: t, name: name, nic: nic, more: make(chan struct{}, 1), ended: make(chan struct{})}
	v.cmd = exec.Command("qemu-system-x86_64")
	switch mode {
	case net.AttachVhostUser:
		args = append(args, "-chardev", "socket,id=c,path="+att.SocketPath+",reconnect=1", "-netdev", "vhost-user,id=n,chardev=c")
	case net.AttachTAPFD:
		args = append(args, "-netdev", "tap,id=n,fd=3,vhost=off")
		v.cmd.ExtraFiles = att.TAP
	}
	v.cmd.Args = append(append(v.cmd.Args, args...), more...)
	v.cmd.Stderr = os.Stderr
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if v.in, err = v.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, f := range att.TAP {
		f.Close()
	}
	go func() {
		r := bufio.NewReader(out)
		for {
			b, err := r.ReadByte()
			v.mu.Lock()
			if err == nil {
				v.text += string(rune(b))
			} else {
				v.gone = fmt.Sprint("QEMU has ended: ", v.cmd.Wait())
			}
			v.mu.Unlock()
			if err != nil {
				close(v.ended)
				return
			}
			select {
			case v.more <- struct{}{}:
			default:
			}
		}
	}()
	t.Cleanup(func() {
		_ = v.cmd.Process.Kill()
		<-v.ended
	})
	return v
}

// see waits until the console has said something.
func (v *vm) see(what string, limit time.Duration) { v.t.Helper(); v.find(what, limit, false) }

// wait does, and begins behind it the next time.
func (v *vm) wait(what string, limit time.Duration) { v.t.Helper(); v.find(what, limit, true) }

func (v *vm) find(what string, limit time.Duration, move bool) {
	v.t.Helper()
	end := time.After(limit)
	for {
		v.mu.Lock()
		i := strings.Index(v.text, what)
		if i >= 0 {
			if move {
				v.text = v.text[i+len(what):]
			}
			v.mu.Unlock()
			return
		}
		text := v.text
		v.mu.Unlock()
		select {
		case <-v.more:
		case <-v.ended:
			v.t.Fatalf("%s: %s; it said %q", v.name, v.gone, text)
		case <-end:
			v.t.Fatalf("%s does not say %q but %q", v.name, what, text)
		}
	}
}

// run runs a command in the guest and fails unless it succeeds as wanted.
func (v *vm) run(want bool, command string) {
	v.t.Helper()
	fmt.Fprintf(v.in, "{ %s; } >/tmp/out 2>&1 && echo ye''s || { cat /tmp/out; echo n''o; }\n", command)
	ok := "yes"
	if !want {
		ok = "no"
	}
	v.wait("\n"+ok, 120*time.Second)
}

// output is what a command in the guest prints.
func (v *vm) output(command string) string {
	v.t.Helper()
	fmt.Fprintf(v.in, "echo be''gins; { %s; } 2>&1; echo en''ds\n", command)
	v.wait("begins", 60*time.Second)
	v.see("\nends", 60*time.Second)
	v.mu.Lock()
	defer v.mu.Unlock()
	i := strings.Index(v.text, "\nends")
	out := v.text[:i]
	v.text = v.text[i+len("\nends"):]
	return strings.ReplaceAll(out, "\r", "")
}

// login waits until the guest has its address and a shell.
func (v *vm) login() {
	v.t.Helper()
	v.see("mvirt-guest: address eth0 "+v.nic.IPv4.String()+"/32", 300*time.Second)
	v.see("login:", 120*time.Second)
	v.see("mvirt-guest: ready", 120*time.Second)
	fmt.Fprintf(v.in, "root\n")
	v.wait("#", 30*time.Second)
}

// TestRealGuests boots Linux on a TAP and on vhost-user, and lets them use the network.
func TestRealGuests(t *testing.T) {
	needRoot(t)
	if testing.Short() {
		t.Skip("short: booting guests without KVM takes long")
	}
	files := guestFiles(t)
	ctx := t.Context()
	sh(t, `ip netns add real
ip link add ext9 type veth peer name w9 netns real
ip addr add 198.51.100.2/24 dev ext9; ip link set ext9 up
ip -n real addr add 198.51.100.1/24 dev w9; ip -n real link set w9 up
ip route replace default via 198.51.100.1`)
	dir, err := os.MkdirTemp("/run", "real")
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir)
	defer func() { p.Kill() }()
	if _, err := p.Net.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModeNAT, HostAccess: true,
		Subnet4: netip.MustParsePrefix("10.0.0.0/24"), Subnet6: netip.MustParsePrefix("fd00:1::/64")}); err != nil {
		t.Fatal(err)
	}
	var vms []*vm
	for i, mode := range []net.AttachMode{net.AttachVhostUser, net.AttachTAPFD} {
		nic, err := p.Net.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: "lan", HostName: fmt.Sprintf("vm%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		vms = append(vms, boot(t, p, files, fmt.Sprintf("vm%d", i), nic, mode))
	}
	for _, v := range vms {
		v.login()
	}
	a, b := vms[0], vms[1]
	for _, v := range vms {
		other := a
		if v == a {
			other = b
		}
		v.run(true, "ping -c2 -W5 169.254.0.1")
		v.run(true, "ping -c2 -W5 "+other.nic.IPv4.String())
		v.run(true, "ping -c2 -W5 198.51.100.1")
		v.run(false, "ping -c1 -W1 198.51.100.2")
		v.run(true, "for i in $(seq 30); do ip -6 route | grep 'default via fe80::1' && break; sleep 1; done; ip -6 route | grep default")
		sh(t, "ping -c2 -W5 %s", v.nic.IPv4)
	}
	t.Run("TCP", func(t *testing.T) { // through the offloads of both kinds of port
		for _, x := range [][2]*vm{{a, b}, {b, a}} {
			from, to := x[0], x[1]
			to.run(true, "(nc -l -p 9000 > /tmp/got) & sleep 1")
			from.run(true, "seq 1 300000 > /tmp/data; nc "+to.nic.IPv4.String()+" 9000 < /tmp/data")
			to.run(true, "sleep 1; seq 1 300000 | cmp - /tmp/got")
		}
	})
	t.Run("forged packets", func(t *testing.T) {
		// From another address, from another MAC: they leave the guest and arrive nowhere.
		a.run(true, "ip addr add 10.0.0.99/32 dev eth0")
		a.run(false, "ping -c2 -W1 -I 10.0.0.99 "+b.nic.IPv4.String())
		a.run(true, "ip addr del 10.0.0.99/32 dev eth0")
		a.run(true, "ip link set eth0 address 52:54:00:99:99:99")
		a.run(false, "ping -c2 -W1 "+b.nic.IPv4.String())
		a.run(true, "ip link set eth0 address "+a.nic.MAC)
		a.run(true, "ping -c2 -W5 "+b.nic.IPv4.String())
		n, err := p.Net.GetNIC(ctx, net.Ref{Ref: a.nic.ID})
		if err != nil || n.Counters.TxSpoofed < 3 || n.State != net.StateConnected {
			t.Errorf("%+v %v", n, err)
		}
	})
	t.Run("restarts", func(t *testing.T) {
		p.Kill()
		a.run(true, "ping -c2 -W5 "+b.nic.IPv4.String())
		p = launch(t, dir)
		n, err := p.Net.GetNetwork(ctx, net.Ref{Ref: "lan"})
		if err != nil || n.WorkerPID == 0 {
			t.Fatal(n, err)
		}
		if _, err := p.Net.ListNICs(ctx, net.ListNICsRequest{}); err != nil {
			t.Fatal(err)
		}
		sh(t, "kill -9 %d", n.WorkerPID)
		a.run(true, "ping -c5 -W5 "+b.nic.IPv4.String()) // some may be lost
		b.run(true, "ping -c2 -W5 198.51.100.1")
	})
}
