package main

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/testguest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/testns"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// asPlugin makes the test binary be mvirt-net.
const asPlugin = "MVIRT_NET_TEST_AS_PLUGIN"

func TestMain(m *testing.M) {
	if os.Getenv(asPlugin) != "" || len(os.Args) > 1 && os.Args[1] == "packet-worker" {
		main()
	}
	flag.Parse()
	if !testing.Short() {
		fetchClients()
	}
	os.Exit(testns.Run(false, m.Run))
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes TAPs and namespaces")
	}
}

func launch(t *testing.T, dir string) *host.Plugin {
	t.Helper()
	p, err := host.Launch(t.Context(), host.Config{
		Kind: service.KindNet,
		Spawner: &host.Local{Command: []string{"/proc/self/exe", "--metadata-dir", filepath.Join(dir, "meta"),
			"--socket-dir", filepath.Join(dir, "sock"), "--worker-user", "nobody"}, Env: []string{asPlugin + "=1"}, Dir: "/run"},
		Log: func(l host.LogLine) {
			if testing.Verbose() {
				fmt.Fprintln(os.Stderr, l)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestWhole does what a user sees: two guests on a nat network, through the plugin as a process of its own,
// which is killed while packets flow.
func TestWhole(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	sh(t, `ip netns add world
ip link add ext0 type veth peer name w0 netns world
ip addr add 203.0.113.2/24 dev ext0; ip link set ext0 up
ip -n world addr add 203.0.113.1/24 dev w0; ip -n world link set w0 up
ip route add default via 203.0.113.1`)
	dir, err := os.MkdirTemp("/run", "whole")
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir)
	defer func() { p.Kill() }()
	if h, err := p.Base.Health(ctx); err != nil || len(h.Conditions) > 0 {
		t.Fatal(h, err)
	}
	n, err := p.Net.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModeNAT,
		Subnet4: netip.MustParsePrefix("10.0.0.0/24"), HostAccess: true})
	if err != nil {
		t.Fatal(err)
	}
	var guests []*testguest.Guest
	var nics []net.NIC
	for range 2 {
		nic, err := p.Net.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: "lan"})
		if err != nil {
			t.Fatal(err)
		}
		att, err := p.Net.Attach(ctx, net.AttachRequest{NICID: nic.ID, Owner: service.Owner{VMID: ident.New()}, Modes: []net.AttachMode{net.AttachTAPFD}})
		if err != nil {
			t.Fatal(err)
		}
		tap, err := testguest.NewTAP(att.TAP[0])
		if err != nil {
			t.Fatal(err)
		}
		m, _ := wire.ParseMAC(att.MAC)
		g := testguest.New(tap, m)
		defer g.Close()
		if err := g.Up(5 * time.Second); err != nil {
			t.Fatal(err)
		}
		guests, nics = append(guests, g), append(nics, nic)
	}
	see := func() {
		t.Helper()
		for _, dst := range []wire.IP4{guests[1].IP, 0xa9fe0001, 0xcb007101} {
			if _, err := guests[0].Ping(dst, 3*time.Second); err != nil {
				t.Error(err)
			}
		}
		sh(t, "ping -c1 -W2 %s", guests[0].IP.Addr())
	}
	see()
	p.Kill()
	<-p.Exited()
	see() // nobody controls, packets flow
	p = launch(t, dir)
	see()
	now, err := p.Net.GetNetwork(ctx, net.Ref{Ref: "lan"})
	if err != nil || now.WorkerPID != n.WorkerPID || !alive(n.WorkerPID) {
		t.Errorf("worker %d, then %d: %v", n.WorkerPID, now.WorkerPID, err)
	}
	for _, nic := range nics {
		got, err := p.Net.GetNIC(ctx, net.Ref{Ref: nic.ID})
		if err != nil || got.State != net.StateConnected || got.Counters.RxPackets == 0 {
			t.Errorf("%+v %v", got, err)
		}
		if err := p.Net.Detach(ctx, net.DetachRequest{NICID: nic.ID, VMID: got.VMID}); err != nil {
			t.Error(err)
		}
		if err := p.Net.DeleteNIC(ctx, net.Ref{Ref: nic.ID}); err != nil {
			t.Error(err)
		}
	}
	if err := p.Net.DeleteNetwork(ctx, net.Ref{Ref: "lan"}); err != nil {
		t.Error(err)
	}
	stop, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := p.Stop(stop); err != nil {
		t.Error(err)
	}
	if s := sh(t, "ls /run/netns; ip -br link; nft list ruleset; ls -R %s/sock", dir); strings.Contains(s, "mv") || strings.Contains(s, ".sock") {
		t.Errorf("left: %s", s)
	}
	if alive(n.WorkerPID) {
		t.Error("the worker is left")
	}
}

// alive says whether a process runs; one that nobody has reaped yet does not.
func alive(pid uint32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(b), ") Z ")
}

func sh(t *testing.T, format string, args ...any) string {
	t.Helper()
	line := fmt.Sprintf(format, args...)
	out, err := exec.Command("sh", "-ec", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}
