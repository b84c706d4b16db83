package engine

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv6"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

func ip6(s string) wire.IP6 { return wire.IP6Of(netip.MustParseAddr(s)) }

// newWorld6 is newWorld with IPv6 only.
func newWorld6(t testing.TB) *world {
	w := &world{t: t, a: &fakePort{}, b: &fakePort{}, up: &fakePort{}, now: 1e9}
	w.r = New(Network{Subnet6: netip.MustParsePrefix("fd00:1::/64"), MTU: 1500, Domain: "example.org",
		DNS: []netip.Addr{netip.MustParseAddr("2606:4700::1111"), netip.MustParseAddr("1.1.1.1")}})
	w.r.SetNIC(NICConfig{ID: "a", MAC: macA, IPv6: netip.MustParseAddr("fd00:1::2"), Routed: []netip.Prefix{netip.MustParsePrefix("2001:db8:7::/48")}})
	w.r.SetNIC(NICConfig{ID: "b", MAC: macB, IPv6: netip.MustParseAddr("fd00:1::3")})
	w.r.SetPort("a", w.a)
	w.r.SetPort("b", w.b)
	w.r.SetUplink(w.up)
	return w
}

type v6 struct {
	src, dst   string
	smac, dmac wire.MAC
	proto      uint8
	hops       uint8
	payload    []byte
	pad        int
	icmp       bool // payload is ICMPv6: fill in the checksum
}

func (p v6) frame() []byte {
	if p.smac == 0 {
		p.smac = macA
	}
	dst := ip6(p.dst)
	if p.dmac == 0 {
		p.dmac = GatewayMAC
		if dst.Multicast() {
			p.dmac = 0x333300000000 | wire.MAC(wire.GetIP4(dst[12:]))
		}
	}
	if p.hops == 0 {
		p.hops = 64
	}
	if p.proto == 0 {
		p.proto = wire.ProtoUDP
	}
	if p.icmp {
		p.proto = wire.ProtoICMPv6
	}
	if p.payload == nil {
		p.payload = udp(1000, 2000, 20)
	}
	f := make([]byte, 54+len(p.payload)+p.pad)
	wire.PutEth(f, p.dmac, p.smac, wire.TypeIPv6)
	src := ip6(p.src)
	wire.PutIPv6(f[14:], &src, &dst, p.proto, p.hops, len(p.payload))
	copy(f[54:], p.payload)
	if p.icmp {
		wire.SumICMPv6(f[14:], len(p.payload))
	}
	return f
}

func say6(f []byte) string {
	var in wire.Info
	if wire.Be16(f[12:]) != wire.TypeIPv6 {
		return "not IPv6"
	}
	if p := wire.ParseIPv6(f, len(f), &in); p != wire.OK || in.End != len(f) {
		return fmt.Sprintf("bad ipv6 %d", p)
	}
	s := fmt.Sprintf("%v > %v hops %d", netip.AddrFrom16([16]byte(f[22:38])), netip.AddrFrom16([16]byte(f[38:54])), f[21])
	if in.Proto == wire.ProtoICMPv6 && in.First {
		if wire.Fold(wire.Sum(wire.PseudoSum6(f[22:], in.Proto, len(f)-in.L4), f[in.L4:])) != 0 {
			s += " bad sum"
		}
		return s + fmt.Sprintf(" icmp %d/%d", in.DstPort>>8, in.DstPort&255)
	}
	return s + fmt.Sprintf(" proto %d", in.Proto)
}

func saySome6(fs [][]byte) string {
	s := ""
	for _, f := range fs {
		s += say6(f) + "\n"
	}
	return s
}

// nd makes a neighbour discovery message of a guest about target, with an address option.
func nd(typ uint8, target string, opt byte, mac wire.MAC) []byte {
	b := make([]byte, 24)
	if typ == wire.ICMP6RS {
		b = b[:8]
	}
	b[0] = typ
	if target != "" {
		t := ip6(target)
		copy(b[8:], t[:])
	}
	if opt != 0 {
		o := make([]byte, 8)
		o[0], o[1] = opt, 1
		mac.Put(o[2:])
		b = append(b, o...)
	}
	return b
}

func TestFromGuest6(t *testing.T) {
	const ll = "fe80::5054:ff:fe00:2"
	frag := func(off uint16, rest []byte) []byte {
		return append([]byte{wire.ProtoUDP, 0, byte(off >> 8), byte(off), 0, 0, 0, 9}, rest...)
	}
	tests := []struct {
		name     string
		frame    []byte
		a, b, up string
		spoofed  uint64
		dropped  uint64
	}{
		{name: "to another guest", frame: v6{src: "fd00:1::2", dst: "fd00:1::3"}.frame(), b: "fd00:1::2 > fd00:1::3 hops 63 proto 17\n"},
		{name: "padding", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", pad: 5}.frame(), b: "fd00:1::2 > fd00:1::3 hops 63 proto 17\n"},
		{name: "outside", frame: v6{src: "fd00:1::2", dst: "2001:db8::1"}.frame(), up: "fd00:1::2 > 2001:db8::1 hops 63 proto 17\n"},
		{name: "from a routed prefix", frame: v6{src: "2001:db8:7:1::9", dst: "fd00:1::3"}.frame(), b: "2001:db8:7:1::9 > fd00:1::3 hops 63 proto 17\n"},
		{name: "another's address", frame: v6{src: "fd00:1::3", dst: "2001:db8::1"}.frame(), spoofed: 1},
		{name: "the gateway's address", frame: v6{src: "fe80::1", dst: "fd00:1::3"}.frame(), spoofed: 1},
		{name: "no address", frame: v6{src: "::", dst: "fd00:1::3"}.frame(), spoofed: 1},
		{name: "another's MAC", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", smac: macB}.frame(), spoofed: 1},
		{name: "from link-local to the world", frame: v6{src: ll, dst: "fd00:1::3"}.frame(), dropped: 1},
		{name: "to a link-local neighbour", frame: v6{src: "fd00:1::2", dst: "fe80::3"}.frame(), dropped: 1},
		{name: "multicast", frame: v6{src: "fd00:1::2", dst: "ff02::fb"}.frame(), dropped: 1},
		{name: "wide multicast", frame: v6{src: "fd00:1::2", dst: "ff0e::1"}.frame(), dropped: 1},
		{name: "loopback", frame: v6{src: "fd00:1::2", dst: "::1"}.frame(), dropped: 1},
		{name: "v4-mapped", frame: v6{src: "fd00:1::2", dst: "::ffff:10.0.0.1"}.frame(), dropped: 1},
		{name: "free address", frame: v6{src: "fd00:1::2", dst: "fd00:1::77"}.frame(), dropped: 1, a: "fd00:1::1 > fd00:1::2 hops 64 icmp 1/3\n"},
		{name: "hop limit 1", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", hops: 1}.frame(), dropped: 1, a: "fd00:1::1 > fd00:1::2 hops 64 icmp 3/0\n"},
		{name: "no error about an error", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", hops: 1, icmp: true, payload: make([]byte, 40)}.frame(), dropped: 1},
		{name: "too big", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", payload: udp(1, 2, 1600)}.frame(), dropped: 1, a: "fd00:1::1 > fd00:1::2 hops 64 icmp 2/0\n"},
		{name: "a fragment", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", proto: wire.ProtoFragment, payload: frag(8|1, make([]byte, 40))}.frame(), b: "fd00:1::2 > fd00:1::3 hops 63 proto 17\n"},
		{name: "a first fragment without its ports", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", proto: wire.ProtoFragment, payload: frag(1, make([]byte, 4))}.frame(), dropped: 1},
		{name: "source route", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", proto: wire.ProtoRouting, payload: append([]byte{17, 0, 0, 1, 0, 0, 0, 0}, udp(1, 2, 3)...)}.frame(), dropped: 1},
		{name: "extension headers without end", frame: v6{src: "fd00:1::2", dst: "fd00:1::3", proto: wire.ProtoDestOpts, payload: func() []byte {
			b := make([]byte, 8*20)
			for i := 0; i < len(b); i += 8 {
				b[i] = wire.ProtoDestOpts
			}
			return b
		}()}.frame(), dropped: 1},
		{name: "ping the gateway", frame: v6{src: ll, dst: "fe80::1", icmp: true, payload: append([]byte{128, 0, 0, 0, 0, 1, 0, 2}, make([]byte, 300)...)}.frame(), a: "fe80::1 > fe80::5054:ff:fe00:2 hops 64 icmp 129/0\n"},
		{name: "ping the router", frame: v6{src: "fd00:1::2", dst: "fd00:1::1", icmp: true, payload: []byte{128, 0, 0, 0, 0, 1, 0, 2}}.frame(), a: "fd00:1::1 > fd00:1::2 hops 64 icmp 129/0\n"},
		{name: "ping everybody", frame: v6{src: "fd00:1::2", dst: "ff02::1", icmp: true, payload: []byte{128, 0, 0, 0, 0, 1, 0, 2}}.frame()},
		{name: "UDP to the gateway", frame: v6{src: "fd00:1::2", dst: "fe80::1"}.frame(), a: "fd00:1::1 > fd00:1::2 hops 64 icmp 1/4\n"},
		{name: "NS for the gateway", frame: v6{src: ll, dst: "ff02::1:ff00:1", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fe80::1", 1, macA)}.frame(), a: "fe80::1 > fe80::5054:ff:fe00:2 hops 255 icmp 136/0\n"},
		{name: "NS from the world", frame: v6{src: ll, dst: "ff02::1:ff00:1", hops: 254, icmp: true, payload: nd(wire.ICMP6NS, "fe80::1", 1, macA)}.frame(), dropped: 1},
		{name: "NS with another's MAC", frame: v6{src: ll, dst: "ff02::1:ff00:1", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fe80::1", 1, macB)}.frame(), spoofed: 1},
		{name: "NS from another's address", frame: v6{src: "fd00:1::3", dst: "ff02::1:ff00:1", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fe80::1", 1, macA)}.frame(), spoofed: 1},
		{name: "NS for another guest", frame: v6{src: "fd00:1::2", dst: "ff02::1:ff00:3", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fd00:1::3", 1, macA)}.frame()},
		{name: "address detection", frame: v6{src: "::", dst: "ff02::1:ff00:2", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fd00:1::2", 0, 0)}.frame()},
		{name: "the gateway's address wanted", frame: v6{src: "::", dst: "ff02::1:ff00:1", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fe80::1", 0, 0)}.frame(), a: "fe80::1 > ff02::1 hops 255 icmp 136/0\n"},
		{name: "NA for its own", frame: v6{src: "fd00:1::2", dst: "ff02::1", hops: 255, icmp: true, payload: nd(wire.ICMP6NA, "fd00:1::2", 2, macA)}.frame()},
		{name: "NA for another", frame: v6{src: "fd00:1::2", dst: "ff02::1", hops: 255, icmp: true, payload: nd(wire.ICMP6NA, "fd00:1::3", 2, macA)}.frame(), spoofed: 1},
		{name: "NA for the gateway", frame: v6{src: ll, dst: "ff02::1", hops: 255, icmp: true, payload: nd(wire.ICMP6NA, "fe80::1", 2, macA)}.frame(), spoofed: 1},
		{name: "RA", frame: v6{src: ll, dst: "ff02::1", hops: 255, icmp: true, payload: nd(wire.ICMP6RA, "", 1, macA)}.frame(), spoofed: 1},
		{name: "redirect", frame: v6{src: ll, dst: "ff02::1", hops: 255, icmp: true, payload: nd(wire.ICMP6Redirect, "fd00:1::3", 2, macA)}.frame(), spoofed: 1},
		{name: "listener report", frame: v6{src: ll, dst: "ff02::16", icmp: true, payload: append([]byte{143, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 20)...)}.frame()},
		{name: "RS", frame: v6{src: ll, dst: "ff02::2", hops: 255, icmp: true, payload: nd(wire.ICMP6RS, "", 1, macA)}.frame(), a: "fe80::1 > fe80::5054:ff:fe00:2 hops 255 icmp 134/0\n"},
		{name: "RS without an address", frame: v6{src: "::", dst: "ff02::2", hops: 255, icmp: true, payload: nd(wire.ICMP6RS, "", 0, 0)}.frame(), a: "fe80::1 > ff02::1 hops 255 icmp 134/0\n"},
		{name: "option of length 0", frame: v6{src: ll, dst: "ff02::2", hops: 255, icmp: true, payload: append(nd(wire.ICMP6RS, "", 0, 0), make([]byte, 8)...)}.frame(), dropped: 1},
	}
	for _, tt := range tests {
		for _, cut := range []int{0, HeadLen} {
			t.Run(fmt.Sprintf("%s/%d", tt.name, cut), func(t *testing.T) {
				w := newWorld6(t)
				w.a.put(tt.frame, cut, Offload{})
				w.poll()
				for _, c := range []struct{ who, got, want string }{
					{"a", saySome6(w.a.tx), tt.a}, {"b", saySome6(w.b.tx), tt.b}, {"uplink", saySome6(w.up.tx), tt.up},
				} {
					if c.got != c.want {
						t.Errorf("%s got\n%swant\n%s", c.who, c.got, c.want)
					}
				}
				s, _ := w.r.Status("a")
				if s.TxSpoofed != tt.spoofed || s.TxDropped != tt.dropped {
					t.Errorf("%+v", s.Counters)
				}
			})
		}
	}
}

func TestFromOutside6(t *testing.T) {
	for name, tt := range map[string]struct {
		a, up string
		frame []byte
	}{
		"to a guest":        {frame: v6{src: "2001:db8::1", dst: "fd00:1::2"}.frame(), a: "2001:db8::1 > fd00:1::2 hops 63 proto 17\n"},
		"to a routed one":   {frame: v6{src: "2001:db8::1", dst: "2001:db8:7::1"}.frame(), a: "2001:db8::1 > 2001:db8:7::1 hops 63 proto 17\n"},
		"a guest's address": {frame: v6{src: "fd00:1::3", dst: "fd00:1::2"}.frame()},
		"link-local":        {frame: v6{src: "fe80::7", dst: "fd00:1::2"}.frame()},
		"multicast":         {frame: v6{src: "2001:db8::1", dst: "ff02::2"}.frame()},
		"nobody":            {frame: v6{src: "2001:db8::1", dst: "fd00:1::9"}.frame(), up: "fd00:1::1 > 2001:db8::1 hops 64 icmp 1/3\n"},
		"ping the router":   {frame: v6{src: "2001:db8::1", dst: "fd00:1::1", icmp: true, payload: []byte{128, 0, 0, 0, 0, 1, 0, 2}}.frame(), up: "fd00:1::1 > 2001:db8::1 hops 64 icmp 129/0\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld6(t)
			w.up.put(tt.frame, 0, Offload{})
			w.poll()
			if g := saySome6(w.a.tx); g != tt.a {
				t.Errorf("a got %swant %s", g, tt.a)
			}
			if g := saySome6(w.up.tx); g != tt.up {
				t.Errorf("uplink got %swant %s", g, tt.up)
			}
		})
	}
}

func TestAdvertisement(t *testing.T) {
	w := newWorld6(t)
	next := w.r.Tick(w.now)
	if len(w.a.tx) != 1 || len(w.b.tx) != 1 || next <= w.now {
		t.Fatalf("%d advertisements, next %d", len(w.a.tx), next)
	}
	f := w.a.tx[0]
	if say6(f) != "fe80::1 > ff02::1 hops 255 icmp 134/0" || wire.GetMAC(f) != allNodesMAC {
		t.Error(say6(f))
	}
	m, err := icmp.ParseMessage(58, f[54:])
	if err != nil || m.Type != ipv6.ICMPTypeRouterAdvertisement {
		t.Fatal(m, err)
	}
	if b := f[54:]; b[4] != 64 || b[5] != 0xc0 || wire.Be16(b[6:]) != 1800 {
		t.Errorf("header % x", b[:16])
	}
	opts := map[byte][]byte{}
	for o := f[70:]; len(o) > 0; o = o[int(o[1])*8:] {
		opts[o[0]] = o[:int(o[1])*8]
	}
	if o := opts[1]; len(o) != 8 || wire.GetMAC(o[2:]) != GatewayMAC {
		t.Errorf("link-layer % x", o)
	}
	if o := opts[5]; len(o) != 8 || wire.Be16(o[6:]) != 1500 {
		t.Errorf("MTU % x", o)
	}
	if o := opts[25]; len(o) != 24 || netip.AddrFrom16([16]byte(o[8:])).String() != "2606:4700::1111" {
		t.Errorf("DNS % x", o)
	}
	if o := opts[31]; len(o) != 24 || string(o[8:21]) != "\x07example\x03org\x00" {
		t.Errorf("domain % x", o)
	}
	if len(opts) != 4 { // no prefix: addresses come by DHCPv6 and are /128
		t.Errorf("options %v", opts)
	}
	w.r.SetPort("b", nil)
	for range 5 { // not sooner than it said
		now := next
		w.clear()
		if w.r.Tick(now - 1); len(w.a.tx) != 0 {
			t.Fatal("too early")
		}
		if next = w.r.Tick(now); next < now+int64(raInitialEvery) || next > now+int64(raEveryMin+raEverySpread) {
			t.Fatalf("next in %d s", (next-now)/1e9)
		}
	}
}

func TestDHCPv6ThroughTheEngine(t *testing.T) {
	w := newWorld6(t)
	m, err := dhcpv6.NewSolicit(net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2}, dhcpv6.WithRapidCommit)
	if err != nil {
		t.Fatal(err)
	}
	req := func(src string) []byte {
		return v6{src: src, dst: "ff02::1:2", payload: append(udp(546, 547, len(m.ToBytes()))[:8], m.ToBytes()...)}.frame()
	}
	w.a.put(req("fe80::2"), HeadLen, Offload{})
	w.poll()
	if len(w.a.tx) != 1 || say6(w.a.tx[0]) != "fe80::1 > fe80::2 hops 64 proto 17" {
		t.Fatalf("%s", saySome6(w.a.tx))
	}
	f := w.a.tx[0]
	if wire.Fold(wire.Sum(wire.PseudoSum6(f[22:], 17, len(f)-54), f[54:])) != 0 {
		t.Error("bad UDP checksum")
	}
	rep, err := dhcpv6.MessageFromBytes(f[62:])
	if err != nil || rep.MessageType != dhcpv6.MessageTypeReply || rep.Options.OneIANA().Options.OneAddress().IPv6Addr.String() != "fd00:1::2" {
		t.Error(rep, err)
	}
	if s, _ := w.r.Status("a"); !s.Leased {
		t.Error("the lease is not noted")
	}
	w.clear()
	w.a.put(req("fd00:1::3"), HeadLen, Offload{})
	w.poll()
	if len(w.a.tx)+len(w.b.tx) != 0 {
		t.Error("an answer to a forged request")
	}
}

func TestLongestPrefix6(t *testing.T) {
	var f fib6
	f.reset(0)
	nics := map[string]*NIC{}
	for _, p := range []string{"2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:2::/63", "2001:db8:1:2::3/128"} {
		nics[p] = &NIC{}
		f.add(toPrefix6(netip.MustParsePrefix(p)), nics[p])
	}
	for a, want := range map[string]string{"2001:db8:1:2::3": "2001:db8:1:2::3/128", "2001:db8:1:3::3": "2001:db8:1:2::/63",
		"2001:db8:1:4::": "2001:db8:1::/48", "2001:db8:2::": "2001:db8::/32", "2001:db9::": ""} {
		b := ip6(a)
		if got := f.lookup(&b); got != nics[want] {
			t.Errorf("%s is not at %s", a, want)
		}
	}
}

// FuzzTx6 is FuzzTx for a network with IPv6.
func FuzzTx6(f *testing.F) {
	f.Add(v6{src: "fd00:1::2", dst: "fd00:1::3"}.frame(), uint16(0))
	f.Add(v6{src: "fd00:1::2", dst: "2001:db8::1", hops: 1}.frame(), uint16(HeadLen))
	f.Add(v6{src: "fe80::2", dst: "ff02::2", hops: 255, icmp: true, payload: nd(wire.ICMP6RS, "", 1, macA)}.frame(), uint16(0))
	f.Add(v6{src: "fe80::2", dst: "ff02::1:ff00:1", hops: 255, icmp: true, payload: nd(wire.ICMP6NS, "fe80::1", 1, macA)}.frame(), uint16(0))
	m, _ := dhcpv6.NewSolicit(net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2})
	f.Add(v6{src: "fe80::2", dst: "ff02::1:2", payload: append(udp(546, 547, len(m.ToBytes()))[:8], m.ToBytes()...)}.frame(), uint16(0))
	f.Fuzz(func(t *testing.T, frame []byte, cut uint16) {
		w := newWorld6(t)
		if cut > 0 && int(cut) < HeadLen {
			cut = HeadLen
		}
		w.a.put(frame, int(cut), Offload{})
		w.poll()
		own := func(a wire.IP6) bool { return a == ip6("fd00:1::2") || mask6(&a, 48) == ip6("2001:db8:7::") }
		for _, g := range append(w.b.tx, w.up.tx...) {
			var in wire.Info
			if p := wire.ParseIPv6(g, len(g), &in); p != wire.OK || in.End != len(g) || !own(wire.IP6(g[22:38])) || len(g) > 1514 {
				t.Fatalf("problem %d in % x", p, g)
			}
		}
		for _, g := range w.a.tx {
			if s := say6(g); len(s) < 10 || s[:3] == "bad" {
				t.Fatalf("%s: % x", s, g)
			}
		}
	})
}
