package engine

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// newBridged is a world whose guest a has a leg on a bridge, in place of the uplink.
func newBridged(t testing.TB, rules []Rule, groups ...string) *world {
	w := &world{t: t, a: &fakePort{}, b: &fakePort{}, up: &fakePort{}, now: 1e9}
	w.r = New(Network{Bridged: true, MTU: 1500})
	w.r.SetFlows(newFlows(t, 64))
	w.r.SetGroup(Group{ID: "g", Rules: rules})
	w.r.SetNIC(NICConfig{ID: "a", MAC: macA, Groups: groups})
	w.r.SetPort("a", w.a)
	w.r.SetLeg("a", w.up)
	return w
}

func (w *world) pollBridge() {
	for len(w.a.rx)+len(w.up.rx) > 0 {
		w.r.PollNIC(w.r.NIC("a"), w.now)
		w.r.PollLeg(w.r.NIC("a"), w.now)
	}
}

func TestToBridge(t *testing.T) {
	for name, tt := range map[string]struct {
		frame   []byte
		pass    bool
		spoofed uint64
	}{
		"IPv4":            {frame: v4{src: "10.9.0.2", dst: "10.9.0.3", dmac: macB}.frame(), pass: true},
		"broadcast":       {frame: v4{src: "10.9.0.2", dst: "255.255.255.255", dmac: wire.Broadcast}.frame(), pass: true},
		"IPv6":            {frame: v6{src: "fe80::2", dst: "ff02::fb"}.frame(), pass: true},
		"ARP":             {frame: arp(1, macA, "10.9.0.2", "10.9.0.1"), pass: true},
		"another's MAC":   {frame: v4{src: "10.9.0.2", dst: "10.9.0.3", smac: macB}.frame(), spoofed: 1},
		"ARP for another": {frame: arp(2, macB, "10.9.0.3", "10.9.0.1"), spoofed: 1},
		"DHCP request":    {frame: v4{src: "0.0.0.0", dst: "255.255.255.255", dmac: wire.Broadcast, payload: udp(68, 67, 300)}.frame(), pass: true},
		"DHCP server":     {frame: v4{src: "10.9.0.2", dst: "10.9.0.3", dmac: macB, payload: udp(67, 68, 300)}.frame(), spoofed: 1},
		"DHCPv6 server":   {frame: v6{src: "fe80::2", dst: "fe80::3", payload: udp(547, 546, 30)}.frame(), spoofed: 1},
		"RA":              {frame: v6{src: "fe80::2", dst: "ff02::1", hops: 255, icmp: true, payload: nd(wire.ICMP6RA, "", 1, macA)}.frame(), spoofed: 1},
		"NS":              {frame: v6{src: "fe80::2", dst: "ff02::1:ff00:3", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fe80::3", 1, macA)}.frame(), pass: true},
		"spanning tree":   {frame: append(v4{src: "10.9.0.2", dst: "10.9.0.3"}.frame()[:12], 0, 38, 0x42, 0x42, 3)},
		"VLAN":            {frame: append(v4{src: "10.9.0.2", dst: "10.9.0.3"}.frame()[:12], 0x81, 0, 0, 1, 8, 0)},
		"lying length":    {frame: v4{src: "10.9.0.2", dst: "10.9.0.3"}.frame()[:40]},
		"runt":            {frame: []byte{1}},
	} {
		for _, guarded := range []bool{false, true} {
			t.Run(fmt.Sprint(name, guarded), func(t *testing.T) {
				w := newBridged(t, nil)
				if guarded {
					w = newBridged(t, nil, "g")
				}
				w.a.put(tt.frame, 0, Offload{})
				w.pollBridge()
				if (len(w.up.tx) == 1) != tt.pass {
					t.Errorf("%d frames passed", len(w.up.tx))
				}
				if s, _ := w.r.Status("a"); s.TxSpoofed != tt.spoofed || !tt.pass && s.TxSpoofed+s.TxDropped != 1 {
					t.Errorf("%+v", s)
				}
				if tt.pass && wire.GetMAC(w.up.tx[0][6:]) != macA {
					t.Error("the frame was changed")
				}
			})
		}
	}
}

func TestFromBridge(t *testing.T) {
	w := newBridged(t, []Rule{{Inbound: true, Proto: wire.ProtoTCP, From: 22}}, "g")
	in := func(f []byte) bool {
		w.clear()
		w.up.put(f, 0, Offload{})
		w.pollBridge()
		return len(w.a.tx) == 1
	}
	to := func(p v4) []byte { p.smac = macB; return p.frame() }
	if !in(to(v4{src: "10.9.0.3", dst: "10.9.0.2", dmac: macA, proto: 6, payload: l4(wire.ProtoTCP, 9, 22, tcpSYN)})) {
		t.Error("an open port is closed")
	}
	if in(to(v4{src: "10.9.0.3", dst: "10.9.0.2", dmac: macA, proto: 6, payload: l4(wire.ProtoTCP, 9, 23, tcpSYN)})) {
		t.Error("a closed port is open")
	}
	if in(to(v4{src: "10.9.0.3", dst: "10.9.0.2", dmac: macC, proto: 6, payload: l4(wire.ProtoTCP, 9, 22, tcpSYN)})) {
		t.Error("somebody else's frame came in")
	}
	if !in(to(v4{src: "10.9.0.1", dst: "255.255.255.255", dmac: wire.Broadcast, payload: udp(67, 68, 300)})) {
		t.Error("a DHCP answer did not come in")
	}
	if !in(arp(1, macB, "10.9.0.3", "10.9.0.2")) {
		t.Error("ARP did not come in")
	}
	w.a.put(v4{src: "10.9.0.2", dst: "9.9.9.9", dmac: macB, payload: udp(5, 53, 3)}.frame(), 0, Offload{})
	w.pollBridge()
	if !in(to(v4{src: "9.9.9.9", dst: "10.9.0.2", dmac: macA, payload: udp(53, 5, 3)})) {
		t.Error("an answer did not come in")
	}
}

// FuzzBridge lets both sides send anything.
func FuzzBridge(f *testing.F) {
	f.Add(v4{src: "10.9.0.2", dst: "10.9.0.3", dmac: macB}.frame(), uint16(0))
	f.Add(v6{src: "fe80::2", dst: "ff02::1:ff00:3", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fe80::3", 1, macA)}.frame(), uint16(HeadLen))
	f.Fuzz(func(t *testing.T, frame []byte, cut uint16) {
		if cut > 0 && int(cut) < HeadLen {
			cut = HeadLen
		}
		w := newBridged(t, []Rule{{Inbound: true, Any: true, Peer: netip.MustParsePrefix("10.0.0.0/8")}}, "g")
		w.a.put(frame, int(cut), Offload{})
		w.up.put(frame, int(cut), Offload{})
		w.pollBridge()
		for _, g := range w.up.tx {
			if wire.GetMAC(g[6:]) != macA {
				t.Fatalf("forged: % x", g)
			}
		}
	})
}
