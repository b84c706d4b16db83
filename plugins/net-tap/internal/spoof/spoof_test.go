package spoof_test

import (
	"net/netip"
	"testing"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/spoof"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// port gives frames to the engine and keeps what comes out.
type port struct {
	in  [][]byte
	own wire.MAC
	got spoof.Tally
}

func (p *port) Receive(pkts []engine.Packet) int {
	n := min(len(pkts), len(p.in))
	for i := range n {
		pkts[i].Set(p.in[i])
	}
	p.in = p.in[n:]
	return n
}

func (p *port) Release() {}

func (p *port) Transmit(pkts []*engine.Packet) (packets, bytes int) {
	for _, x := range pkts {
		b := make([]byte, x.Len)
		bytes += x.Copy(b)
		p.got.Add(b, p.own)
	}
	return len(pkts), bytes
}

// TestSuite sends the suite through the engine alone; TestSpoofing of the plugin does it from a real guest.
func TestSuite(t *testing.T) {
	a, pf := netip.MustParseAddr, netip.MustParsePrefix
	r := engine.New(engine.Network{Subnet4: pf("10.0.0.0/24"), Subnet6: pf("fd00:1::/64")})
	f := spoof.Facts{MAC: 0x525400000001, My4: a("10.0.0.2"), My6: a("fd00:1::2"), Own4: pf("192.0.2.16/28"), Own6: pf("fd00:a::/64"),
		PeerMAC: 0x525400000002, Peer4: a("10.0.0.3"), Peer6: a("fd00:1::3"), Peers4: pf("192.0.2.0/28"), Peers6: pf("fd00:b::/64"),
		Far4: []netip.Addr{a("198.51.100.1")}, Far6: []netip.Addr{a("2001:db8::1")}, Other4: a("10.9.0.2"), Other6: a("fd00:9::2")}
	sender, peer, up := &port{own: f.MAC}, &port{own: f.PeerMAC}, &port{}
	r.SetNIC(engine.NICConfig{ID: "a", MAC: f.MAC, IPv4: f.My4, IPv6: f.My6, Routed: []netip.Prefix{f.Own4, f.Own6}})
	r.SetNIC(engine.NICConfig{ID: "b", MAC: f.PeerMAC, IPv4: f.Peer4, IPv6: f.Peer6, Routed: []netip.Prefix{f.Peers4, f.Peers6}})
	r.SetPort("a", sender)
	r.SetPort("b", peer)
	r.SetUplink(up)
	frames := spoof.Suite(&f)
	classes := map[string]bool{}
	for _, x := range frames {
		sender.in = append(sender.in, x.Data)
		classes[x.Class] = true
	}
	for r.PollNIC(r.NIC("a"), 1) > 0 {
	}
	if len(classes) < 100 {
		t.Errorf("only %d classes", len(classes))
	}
	// To other networks the uplink is the way: the host's rules stop that.
	want := spoof.Forged + "to-other-network"
	for name, p := range map[string]*port{"the peer": peer, "outside": up} {
		var bad []string
		for _, m := range p.got.Bad() {
			if p != up || m != want && m != want+"-v6" {
				bad = append(bad, m)
			}
		}
		missing := p.got.Missing("v4", "v6", "v4-routed", "v6-routed", "v4-fragments", "v4-after", "v6-after", spoof.Last)
		if bad != nil || len(missing) > 0 {
			t.Errorf("%s got %v, and not %v", name, bad, missing)
		}
	}
	if s, _ := r.Status("a"); s.TxSpoofed < 50 {
		t.Errorf("%+v", s)
	}
}

// TestScan: marks are found, and strangers.
func TestScan(t *testing.T) {
	b := append(make([]byte, 14), "xFORGED:a;yHONEST:b;FORGED:c"...)
	if got := spoof.Scan(b, 5); len(got) != 3 || got[0] != "FORGED:a" || got[1] != "HONEST:b" || got[2] != "STRANGER:00:00:00:00:00:00" {
		t.Error(got)
	}
}
