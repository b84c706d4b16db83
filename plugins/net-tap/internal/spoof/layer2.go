package spoof

import (
	"net/netip"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// behind puts a class behind a frame, as padding.
func behind(frame []byte, class string) []byte { return append(frame, note(Forged, class)...) }

// arp: nobody but the gateway hears a guest's ARP.
func (b *builder) arp() {
	f := b.f
	my, peer, gw := wire.IP4Of(f.My4), wire.IP4Of(f.Peer4), wire.IP4(0xa9fe0001)
	for class, a := range map[string]wire.ARP{
		"arp-spa":             {Op: 1, SenderMAC: f.MAC, SenderIP: peer, TargetIP: gw},
		"arp-sha":             {Op: 1, SenderMAC: f.PeerMAC, SenderIP: my, TargetIP: gw},
		"arp-gratuitous":      {Op: 1, SenderMAC: f.MAC, SenderIP: peer, TargetIP: peer},
		"arp-own-gratuitous":  {Op: 1, SenderMAC: f.MAC, SenderIP: my, TargetIP: my},
		"arp-reply-gateway":   {Op: 2, SenderMAC: f.MAC, SenderIP: gw, TargetMAC: f.PeerMAC, TargetIP: peer},
		"arp-reply-peer":      {Op: 2, SenderMAC: f.MAC, SenderIP: my, TargetMAC: f.PeerMAC, TargetIP: peer},
		"arp-request-of-peer": {Op: 1, SenderMAC: f.MAC, SenderIP: my, TargetIP: peer},
	} {
		for _, to := range []wire.MAC{wire.Broadcast, f.PeerMAC, Gateway} {
			d := make([]byte, wire.EthLen+wire.ARPLen)
			wire.PutEth(d, to, f.MAC, wire.TypeARP)
			a.Put(d[wire.EthLen:])
			b.add(class, behind(d, class))
		}
	}
}

// icmp6 makes an ICMPv6 message with the class in an option that nobody knows.
func (b *builder) icmp6(class string, to wire.MAC, src, dst netip.Addr, hops uint8, typ uint8, body []byte, opts ...byte) {
	text := note(Forged, class)
	n := (2 + len(text) + 7) / 8
	opt := make([]byte, 8*n)
	opt[0], opt[1] = 200, byte(n)
	copy(opt[2:], text)
	m := append([]byte{typ, 0, 0, 0}, body...)
	m = append(append(m, opts...), opt...)
	d := make([]byte, 54, 54+len(m))
	d = append(d, m...)
	s, t := wire.IP6(src.As16()), wire.IP6(dst.As16())
	wire.PutEth(d, to, b.f.MAC, wire.TypeIPv6)
	wire.PutIPv6(d[14:], &s, &t, wire.ProtoICMPv6, hops, len(m))
	wire.SumICMPv6(d[14:], len(m))
	b.add(class, d)
}

// neighbours: no neighbour discovery of a guest's reaches another, and no router's message at all.
func (b *builder) neighbours() {
	f := b.f
	a := netip.MustParseAddr
	gw, nodes := a("fe80::1"), a("ff02::1")
	ll := linkLocal(f.MAC)
	target := func(t netip.Addr, flags byte) []byte {
		x := t.As16()
		return append([]byte{flags, 0, 0, 0}, x[:]...)
	}
	lla := func(typ byte, m wire.MAC) []byte {
		o := []byte{typ, 1, 0, 0, 0, 0, 0, 0}
		m.Put(o[2:])
		return o
	}
	for _, to := range []struct {
		name string
		mac  wire.MAC
		ip   netip.Addr
	}{{"all", 0x333300000001, nodes}, {"peer", f.PeerMAC, f.Peer6}, {"routed", Gateway, f.Peer6}} {
		for _, src := range []struct {
			name string
			ip   netip.Addr
		}{{"", ll}, {"-own", f.My6}, {"-as-gateway", gw}} {
			n := "-" + to.name + src.name
			b.icmp6("na-gateway"+n, to.mac, src.ip, to.ip, 255, wire.ICMP6NA, target(gw, 0xa0), lla(2, f.MAC)...)
			b.icmp6("na-peer"+n, to.mac, src.ip, to.ip, 255, wire.ICMP6NA, target(f.Peer6, 0x20), lla(2, f.MAC)...)
			b.icmp6("ns-lla"+n, to.mac, src.ip, to.ip, 255, wire.ICMP6NS, target(f.Peer6, 0), lla(1, f.PeerMAC)...)
			b.icmp6("ns-peer"+n, to.mac, src.ip, to.ip, 255, wire.ICMP6NS, target(f.Peer6, 0), lla(1, f.MAC)...)
			ra := append([]byte{64, 0xc0, 0x07, 0x08}, make([]byte, 8)...)
			b.icmp6("ra"+n, to.mac, src.ip, to.ip, 255, wire.ICMP6RA, ra, lla(1, f.MAC)...)
			red := append(target(ll, 0), target(f.Peer6, 0)[4:]...)
			b.icmp6("redirect"+n, to.mac, src.ip, to.ip, 255, wire.ICMP6Redirect, red)
		}
	}
	// An ICMPv4 redirect, straight to the peer.
	text := note(Forged, "redirect-v4")
	d := make([]byte, 42+len(text))
	copy(d[42:], text)
	wire.PutEth(d, Gateway, f.MAC, wire.TypeIPv4)
	wire.PutIPv4(d[14:], wire.IP4Of(f.My4), wire.IP4Of(f.Peer4), wire.ProtoICMP, 64, 9, 8+len(text))
	d[34], d[35] = wire.ICMPRedirect, 1
	wire.IP4Of(f.My4).Put(d[38:])
	wire.PutBe16(d[36:], wire.Checksum(d[34:]))
	b.add("redirect-v4", d)
}

// linkLocal is the address that a MAC makes (RFC 4291, appendix A).
func linkLocal(m wire.MAC) netip.Addr {
	var h [6]byte
	m.Put(h[:])
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: h[0] ^ 2, h[1], h[2], 0xff, 0xfe, h[3], h[4], h[5]})
}

// servers: what only DHCP servers say.
func (b *builder) servers() {
	f := b.f
	a := netip.MustParseAddr
	for class, src := range map[string]netip.Addr{"dhcp4-reply": f.My4, "dhcp4-reply-as-gateway": a("169.254.0.1")} {
		for _, dst := range []netip.Addr{a("255.255.255.255"), f.Peer4} {
			for _, to := range []wire.MAC{wire.Broadcast, f.PeerMAC, Gateway} {
				b.add(class, udp(f.MAC, to, src, dst, 67, 68, dhcp4Reply(f, class)))
			}
		}
	}
	for class, src := range map[string]netip.Addr{"dhcp6-reply": f.My6, "dhcp6-reply-link-local": linkLocal(f.MAC), "dhcp6-reply-as-gateway": a("fe80::1")} {
		for _, dst := range []netip.Addr{a("ff02::1"), linkLocal(f.PeerMAC), f.Peer6} {
			for _, to := range []wire.MAC{0x333300000001, f.PeerMAC, Gateway} {
				b.add(class, udp(f.MAC, to, src, dst, 547, 546, append([]byte{7, 1, 2, 3, 0, 200, 0, byte(len(Forged + class + ";"))}, note(Forged, class)...)))
			}
		}
	}
}

// dhcp4Reply is an ACK of an address with the class as host name (RFC 2131, RFC 2132).
func dhcp4Reply(f *Facts, class string) []byte {
	text := note(Forged, class)
	p := make([]byte, 240)
	p[0], p[1], p[2] = 2, 1, 6
	wire.IP4Of(f.Peer4).Put(p[16:])
	f.PeerMAC.Put(p[28:])
	copy(p[236:], []byte{99, 130, 83, 99})
	p = append(p, 53, 1, 5, 12, byte(len(text)))
	return append(append(p, text...), 255)
}

// odd: tags, other protocols, source routes.
func (b *builder) odd() {
	f := b.f
	tag := func(class string, tags ...byte) {
		d := udp(f.MAC, Gateway, f.My4, f.Peer4, 1, 2, note(Forged, class))
		x := append(append(append([]byte{}, d[:12]...), tags...), d[12:]...)
		for _, to := range []wire.MAC{Gateway, f.PeerMAC, wire.Broadcast} {
			y := append([]byte{}, x...)
			to.Put(y)
			b.add(class, y)
		}
	}
	tag("vlan", 0x81, 0, 0, 5)
	tag("vlan-priority", 0x81, 0, 0xe0, 0)
	tag("qinq", 0x88, 0xa8, 0, 5, 0x81, 0, 0, 6)
	for class, typ := range map[string]uint16{"lldp": 0x88cc, "mpls": 0x8847, "pppoe": 0x8863, "eapol": 0x888e, "length-802.3": 38} {
		for _, to := range []wire.MAC{f.PeerMAC, wire.Broadcast, 0x0180c2000000, Gateway} {
			d := make([]byte, 14, 80)
			wire.PutEth(d, to, f.MAC, typ)
			b.add(class, append(append(d, 0x42, 0x42, 3), note(Forged, class)...))
		}
	}
	// Loose source route by the peer (option 131).
	text := note(Forged, "source-route")
	d := make([]byte, 14+28+8+len(text))
	copy(d[50:], text)
	wire.PutEth(d, Gateway, f.MAC, wire.TypeIPv4)
	wire.PutIPv4(d[14:], wire.IP4Of(f.My4), wire.IP4Of(f.Peer4), wire.ProtoUDP, 64, 3, 16+len(text))
	d[14] = 0x47
	copy(d[34:], []byte{131, 7, 4})
	wire.IP4Of(f.Other4).Put(d[37:])
	d[41] = 1
	wire.PutBe16(d[24:], 0)
	wire.PutBe16(d[24:], wire.Checksum(d[14:42]))
	wire.PutBe16(d[44:], 2)
	wire.PutBe16(d[46:], uint16(8+len(text)))
	b.add("source-route", d)
	// Routing header of type 0 (RFC 5095).
	u := udp(f.MAC, Gateway, f.My6, f.Peer6, 1, 2, note(Forged, "routing-header"))
	rh := make([]byte, 24)
	rh[0], rh[1], rh[3] = wire.ProtoUDP, 2, 1
	x := f.Other6.As16()
	copy(rh[8:], x[:])
	v := append(append(append([]byte{}, u[:54]...), rh...), u[54:]...)
	v[20] = wire.ProtoRouting
	wire.PutBe16(v[18:], uint16(len(v)-54))
	b.add("routing-header", v)
}

// fragments: honest ones arrive; those of a forged source, and those made to get past filters, do not.
func (b *builder) fragments() {
	f := b.f
	cut := func(mark, class string, src, dst netip.Addr, step int) {
		d := udp(f.MAC, Gateway, src, dst, 4000, 4001, append(make([]byte, 40), note(mark, class)...))
		for at := 0; at < len(d)-34; at += step {
			n := min(step, len(d)-34-at)
			g := append(append([]byte{}, d[:34]...), d[34+at:34+at+n]...)
			off := uint16(at / 8)
			if at+n < len(d)-34 {
				off |= 0x2000
			}
			wire.PutBe16(g[16:], uint16(20+n))
			wire.PutBe16(g[20:], off)
			wire.PutBe16(g[24:], 0)
			wire.PutBe16(g[24:], wire.Checksum(g[14:34]))
			b.add(class, g)
		}
	}
	// The text lies in the second fragment as a whole.
	for _, dst := range append([]netip.Addr{f.Peer4}, f.Far4...) {
		cut(Honest, "v4-fragments", f.My4, dst, 48)
		cut(Forged, "v4-fragments-peer", f.Peer4, dst, 48)
		cut(Forged, "v4-fragments-outside", netip.MustParseAddr("8.8.8.8"), dst, 48)
	}
	// A TCP header cut after its ports (RFC 1858).
	text := note(Forged, "v4-tiny-fragment")
	d := make([]byte, 14+20+8)
	wire.PutEth(d, Gateway, f.MAC, wire.TypeIPv4)
	wire.PutIPv4(d[14:], wire.IP4Of(f.My4), wire.IP4Of(f.Peer4), wire.ProtoTCP, 64, 77, 8)
	wire.PutBe16(d[20:], 0x2000)
	wire.PutBe16(d[24:], 0)
	wire.PutBe16(d[24:], wire.Checksum(d[14:34]))
	b.add("v4-tiny-fragment", append(d, text...))
	// IPv6: a fragment header, later fragment, of a forged source.
	for class, src := range map[string]netip.Addr{"v6-fragment-peer": f.Peer6, "v6-fragment-outside": netip.MustParseAddr("2001:db8::1")} {
		body := append([]byte{wire.ProtoUDP, 0, 0, 8, 0, 0, 0, 9}, note(Forged, class)...)
		d := make([]byte, 54, 54+len(body))
		s, t := wire.IP6(src.As16()), wire.IP6(f.Peer6.As16())
		wire.PutEth(d, Gateway, f.MAC, wire.TypeIPv6)
		wire.PutIPv6(d[14:], &s, &t, wire.ProtoFragment, 64, len(body))
		b.add(class, append(d, body...))
	}
}
