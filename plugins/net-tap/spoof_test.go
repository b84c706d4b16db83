package main

import (
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/spoof"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/testguest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// softGuest is a guest in this process on a new NIC, with a TAP.
func softGuest(t *testing.T, p *host.Plugin, network string) (net.NIC, *testguest.Guest) {
	t.Helper()
	nic, err := p.Net.CreateNIC(t.Context(), net.CreateNICRequest{ID: ident.New(), NetworkID: network})
	if err != nil {
		t.Fatal(err)
	}
	att, err := p.Net.Attach(t.Context(), net.AttachRequest{NICID: nic.ID, Owner: service.Owner{VMID: ident.New()}, Modes: []net.AttachMode{net.AttachTAPFD}})
	if err != nil {
		t.Fatal(err)
	}
	tap, err := testguest.NewTAP(att.TAP[0])
	if err != nil {
		t.Fatal(err)
	}
	m, _ := wire.ParseMAC(att.MAC)
	g := testguest.New(tap, m)
	t.Cleanup(g.Close)
	if err := g.Up(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	return nic, g
}

// probe builds the program that sends and listens, for guests and for here.
func probe(t *testing.T, dir string) string {
	t.Helper()
	bin := filepath.Join(dir, "probe")
	cmd := exec.Command("go", "build", "-o", bin, "./internal/spoof/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return bin
}

// heard reads what a listener printed.
func heard(t *testing.T, text string) spoof.Tally {
	t.Helper()
	var got spoof.Tally
	for _, l := range strings.Split(text, "\n") {
		if _, m, ok := strings.Cut(strings.TrimSpace(l), "probe: got "); ok {
			got = append(got, m)
		}
	}
	if !strings.Contains(text, "probe: done") {
		t.Errorf("the listener did not see the last packet: %s", text)
	}
	return got
}

// TestSpoofing sends every class of forged packets from inside a real guest and looks for them in another real
// guest, at a NIC of the same network, at one of another network, and outside.
func TestSpoofing(t *testing.T) {
	needRoot(t)
	if testing.Short() {
		t.Skip("short: booting guests without KVM takes long")
	}
	files := guestFiles(t)
	root := t.TempDir()
	tool := probe(t, root)
	files = overlay(t, files, root)
	sh(t, `ip netns add forge
ip link add ext7 type veth peer name w7 netns forge
ip addr add 198.18.7.2/24 dev ext7; ip link set ext7 up
ip -n forge addr add 198.18.7.1/24 dev w7; ip -n forge link set w7 up
ip route replace default via 198.18.7.1`)
	t.Cleanup(func() { _ = exec.Command("sh", "-c", "ip link del ext7; ip netns del forge").Run() })
	dir, err := os.MkdirTemp("/run", "spoof")
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir)
	defer p.Kill()
	ctx := t.Context()
	for name, s := range map[string][2]string{"lan": {"10.0.0.0/24", "fd00:1::/64"}, "other": {"10.9.0.0/24", "fd00:9::/64"}} {
		if _, err := p.Net.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: name, Mode: net.ModeNAT,
			Subnet4: netip.MustParsePrefix(s[0]), Subnet6: netip.MustParsePrefix(s[1])}); err != nil {
			t.Fatal(err)
		}
	}
	var vms []*vm
	for i, mode := range []net.AttachMode{net.AttachVhostUser, net.AttachTAPFD} {
		routed := [][]netip.Prefix{
			{netip.MustParsePrefix("192.0.2.16/28"), netip.MustParsePrefix("fd00:a::/64")},
			{netip.MustParsePrefix("192.0.2.0/28"), netip.MustParsePrefix("fd00:b::/64")},
		}[i]
		nic, err := p.Net.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: "lan", RoutedPrefixes: routed})
		if err != nil {
			t.Fatal(err)
		}
		vms = append(vms, boot(t, p, files, []string{"sender", "peer"}[i], nic, mode))
	}
	nicC, c := softGuest(t, p, "lan")
	nicD, d := softGuest(t, p, "other")
	for _, v := range vms {
		v.login()
	}
	// Either of the two sends, so that both kinds of port are judged.
	for i, a := range vms {
		b := vms[1-i]
		t.Run(a.name, func(t *testing.T) {
			mac, _ := wire.ParseMAC(a.nic.MAC)
			peer, _ := wire.ParseMAC(b.nic.MAC)
			facts := spoof.Facts{MAC: mac, My4: a.nic.IPv4, My6: a.nic.IPv6, Own4: a.nic.RoutedPrefixes[0], Own6: a.nic.RoutedPrefixes[1],
				PeerMAC: peer, Peer4: b.nic.IPv4, Peer6: b.nic.IPv6, Peers4: b.nic.RoutedPrefixes[0], Peers6: b.nic.RoutedPrefixes[1],
				Far4: []netip.Addr{nicC.IPv4, netip.MustParseAddr("198.18.7.1")}, Far6: []netip.Addr{nicC.IPv6}, Other4: nicD.IPv4, Other6: nicD.IPv6}
			text, err := json.Marshal(facts)
			if err != nil {
				t.Fatal(err)
			}
			collect(c)
			collect(d)
			b.run(true, "(/probe listen eth0 >/tmp/heard 2>&1 &) ; for i in $(seq 60); do grep listens /tmp/heard && break; sleep 1; done; grep listens /tmp/heard")
			cmd := exec.CommandContext(ctx, "ip", "netns", "exec", "forge", tool, "listen", "w7")
			cmd.Env = append(os.Environ(), "PROBE_ANY_MAC=1")
			outside := make(chan string, 1)
			var out strings.Builder
			ready := &waitFor{what: "probe: listens", seen: make(chan struct{}), to: &out}
			cmd.Stdout, cmd.Stderr = ready, ready
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			go func() { _ = cmd.Wait(); outside <- out.String() }()
			<-ready.seen
			before, err := p.Net.GetNIC(ctx, net.Ref{Ref: a.nic.ID})
			if err != nil {
				t.Fatal(err)
			}
			a.run(true, "/probe send eth0 '"+string(text)+"' && true")
			b.run(true, "for i in $(seq 90); do grep done /tmp/heard && break; sleep 1; done; grep done /tmp/heard")
			after, err := p.Net.GetNIC(ctx, net.Ref{Ref: a.nic.ID})
			if err != nil || after.Counters.TxSpoofed-before.Counters.TxSpoofed < 100 {
				t.Errorf("%d packets counted as spoofed: %v", after.Counters.TxSpoofed-before.Counters.TxSpoofed, err)
			}
			both := []string{"v4", "v4-routed", "v4-fragments", "v4-after", spoof.Last}
			got := map[string]spoof.Tally{"peer": heard(t, b.output("cat /tmp/heard")), "NIC": collect(c), "other network": collect(d)}
			select {
			case text := <-outside:
				got["outside"] = heard(t, text)
			case <-time.After(60 * time.Second):
				t.Fatal("the last packet did not get outside")
			}
			for who, tally := range got {
				want := append([]string{"v6", "v6-routed", "v6-after"}, both...)
				switch who {
				case "outside": // whose source is masqueraded, fragments and all
					want = []string{"v4", "v4-after", spoof.Last}
				case "other network":
					want = nil
				}
				bad, missing := tally.Bad(), tally.Missing(want...)
				if who == "outside" {
					// The other network's address means nothing to this one: what is sent there goes where the
					// host's default route goes, as to any address, and does not reach the other network.
					bad = slices.DeleteFunc(bad, func(m string) bool { return m == spoof.Forged+"to-other-network" })
				}
				if len(bad)+len(missing) > 0 {
					t.Errorf("%s: %s got %v, and did not get %v", a.name, who, bad, missing)
				}
				t.Logf("%s: %s got %v", a.name, who, tally)
			}
			if n, err := p.Net.GetNIC(ctx, net.Ref{Ref: b.nic.ID}); err != nil || n.State != net.StateConnected {
				t.Errorf("%+v %v", n, err)
			}
		})
	}
}

// collect takes all that a guest in this process has received up to the answer to an echo request of its own.
func collect(g *testguest.Guest) spoof.Tally {
	var t spoof.Tally
	_ = g.Send(g.Echo(g.IP, 0xa9fe0001, 64, 77, 1, 8))
	_, _ = g.Wait(30*time.Second, func(f []byte) bool {
		t.Add(f, g.MAC)
		return len(f) >= 42 && wire.Be16(f[12:]) == wire.TypeIPv4 && f[23] == wire.ProtoICMP && f[34] == wire.ICMPEchoReply && wire.Be16(f[38:]) == 77
	})
	return t
}

// waitFor is a writer that tells when it has seen a text.
type waitFor struct {
	what string
	seen chan struct{}
	to   *strings.Builder
	done bool
}

func (w *waitFor) Write(b []byte) (int, error) {
	w.to.Write(b)
	if !w.done && strings.Contains(w.to.String(), w.what) {
		w.done = true
		close(w.seen)
	}
	return len(b), nil
}
