// Package spoof is the suite of forged packets that a hostile guest can send: each class of them, and honest
// ones that must arrive. It makes frames and recognises them on the far side; the program in probe sends them
// from inside a real guest and listens in others. For tests only.
//
// A frame carries its class as text ("FORGED:v4-neighbour;"), in its payload, in an option, or behind what it
// is: so a capture needs no knowledge of protocols, and what was taken apart and put together is found too.
package spoof

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// Gateway is the MAC of the gateway on every network.
const Gateway wire.MAC = 0x026d76000001

// Facts is what the sender knows: all that a hostile guest can find out.
type Facts struct {
	MAC  wire.MAC // its own, as all that is called My
	My4  netip.Addr
	My6  netip.Addr
	Own4 netip.Prefix // prefixes that are routed to it
	Own6 netip.Prefix

	PeerMAC wire.MAC // of another NIC on the same network
	Peer4   netip.Addr
	Peer6   netip.Addr
	Peers4  netip.Prefix // prefixes that are routed to that one
	Peers6  netip.Prefix

	Far4   []netip.Addr // where else things are sent: other NICs, the outside
	Far6   []netip.Addr
	Other4 netip.Addr // a NIC on another network
	Other6 netip.Addr
}

// Frame is one frame of the suite.
type Frame struct {
	Class string
	Data  []byte
}

// Marks that a frame carries in front of its class.
const (
	Forged = "FORGED:"
	Honest = "HONEST:"
)

// Last is the class of the honest packet that ends the suite, one to each destination: whoever has seen it has
// seen all that comes.
const Last = "last"

// Scan gives the marks in a frame, and "STRANGER:mac" if it comes from neither the gateway nor own: nobody else
// can be on a NIC's link.
func Scan(frame []byte, own wire.MAC) []string {
	var out []string
	for _, m := range []string{Forged, Honest} {
		rest := frame
		for {
			i := bytes.Index(rest, []byte(m))
			if i < 0 {
				break
			}
			rest = rest[i:]
			end := bytes.IndexByte(rest, ';')
			if end < 0 || end > 64 {
				break
			}
			out = append(out, string(rest[:end]))
			rest = rest[end:]
		}
	}
	if len(frame) >= wire.EthLen {
		if src := wire.GetMAC(frame[6:]); src != Gateway && src != own && own != 0 {
			out = append(out, fmt.Sprintf("STRANGER:%v", src))
		}
	}
	return out
}

// Tally collects marks, each once, in the order in which they came.
type Tally []string

// Add adds what a frame shows.
func (t *Tally) Add(frame []byte, own wire.MAC) {
	for _, m := range Scan(frame, own) {
		if !slices.Contains(*t, m) {
			*t = append(*t, m)
		}
	}
}

// Done says whether the suite's last packet has come.
func (t Tally) Done() bool { return slices.Contains(t, Honest+Last) }

// Bad gives what should not have come.
func (t Tally) Bad() []string {
	return slices.DeleteFunc(slices.Clone(t), func(s string) bool { return strings.HasPrefix(s, Honest) })
}

// Missing gives the honest classes of want that have not come.
func (t Tally) Missing(want ...string) []string {
	return slices.DeleteFunc(slices.Clone(want), func(s string) bool { return slices.Contains(t, Honest+s) })
}

// builder makes frames.
type builder struct {
	f   *Facts
	out []Frame
}

func (b *builder) add(class string, data []byte) { b.out = append(b.out, Frame{class, data}) }

// note is the payload of a class.
func note(mark, class string) []byte { return []byte(mark + class + ";") }

// udp makes an IPv4 or IPv6 datagram in a frame.
func udp(mac, to wire.MAC, src, dst netip.Addr, sport, dport uint16, data []byte) []byte {
	if src.Is4() {
		f := make([]byte, 42+len(data))
		copy(f[42:], data)
		wire.PutEth(f, to, mac, wire.TypeIPv4)
		wire.PutIPv4(f[14:], wire.IP4Of(src), wire.IP4Of(dst), wire.ProtoUDP, 64, 7, 8+len(data))
		wire.PutUDP4(f[34:], f[14:], sport, dport, len(data))
		return f
	}
	s, d := wire.IP6(src.As16()), wire.IP6(dst.As16())
	f := make([]byte, 62+len(data))
	copy(f[62:], data)
	wire.PutEth(f, to, mac, wire.TypeIPv6)
	wire.PutIPv6(f[14:], &s, &d, wire.ProtoUDP, 64, 8+len(data))
	wire.PutUDP6(f[54:], f[14:], sport, dport, len(data))
	return f
}

// from adds a class of datagrams with a source address, to everybody of its family.
func (b *builder) from(mark, class string, mac wire.MAC, src netip.Addr) {
	f := b.f
	to := append([]netip.Addr{f.Peer4}, f.Far4...)
	if src.Is6() {
		to = append([]netip.Addr{f.Peer6}, f.Far6...)
	}
	for _, dst := range to {
		b.add(class, udp(mac, Gateway, src, dst, 4000, 4001, note(mark, class)))
	}
}

// Suite makes all frames, the honest ones among the forged, and the last ones at the end.
func Suite(f *Facts) []Frame {
	b := &builder{f: f}
	b.from(Honest, "v4", f.MAC, f.My4)
	b.from(Honest, "v6", f.MAC, f.My6)
	b.from(Honest, "v4-routed", f.MAC, f.Own4.Addr().Next())
	b.from(Honest, "v6-routed", f.MAC, f.Own6.Addr().Next())
	b.macs()
	b.sources()
	b.arp()
	b.neighbours()
	b.servers()
	b.odd()
	b.fragments()
	b.from(Honest, "v4-after", f.MAC, f.My4)
	b.from(Honest, "v6-after", f.MAC, f.My6)
	b.from(Honest, Last, f.MAC, f.My4)
	return b.out
}

// macs: another's address on the link, in either direction.
func (b *builder) macs() {
	f := b.f
	for class, m := range map[string]wire.MAC{"mac-made-up": 0x525400999999, "mac-peer": f.PeerMAC, "mac-gateway": Gateway, "mac-broadcast": wire.Broadcast} {
		b.from(Forged, class+"-v4", m, f.My4)
		b.from(Forged, class+"-v6", m, f.My6)
	}
	// Straight to the neighbour, or to all, past the gateway.
	for class, m := range map[string]wire.MAC{"to-peer-mac": f.PeerMAC, "to-broadcast-mac": wire.Broadcast, "to-multicast-mac": 0x01005e000001} {
		b.add(class, udp(f.MAC, m, f.My4, f.Peer4, 1, 2, note(Forged, class)))
		b.add(class+"-v6", udp(f.MAC, m, f.My6, f.Peer6, 1, 2, note(Forged, class+"-v6")))
	}
}

// sources: addresses that are not the guest's.
func (b *builder) sources() {
	f := b.f
	a := netip.MustParseAddr
	for class, src := range map[string]netip.Addr{
		"v4-unused": lastOf(f.My4), "v4-peer": f.Peer4, "v4-other-network": f.Other4, "v4-outside": a("8.8.8.8"), "v4-gateway": a("169.254.0.1"),
		"v4-link-local": a("169.254.7.7"), "v4-loopback": a("127.0.0.1"), "v4-zero": a("0.0.0.0"), "v4-broadcast": a("255.255.255.255"), "v4-multicast": a("224.0.0.5"),
		"v4-routed-not-own": f.Peers4.Addr().Next(), "v4-next-to-routed": lastIn4(f.Own4).Next(),
		"v6-unused": a("fd00:1::dead"), "v6-peer": f.Peer6, "v6-other-network": f.Other6, "v6-outside": a("2001:db8:ffff::1"), "v6-gateway": a("fe80::1"),
		"v6-link-local": a("fe80::7"), "v6-loopback": a("::1"), "v6-unspecified": a("::"), "v6-multicast": a("ff02::5"), "v6-mapped": netip.AddrFrom16(f.Peer4.As16()),
		"v6-routed-not-own": f.Peers6.Addr().Next(),
	} {
		b.from(Forged, class, f.MAC, src)
	}
	// To what is no neighbour of the guest's.
	for class, dst := range map[string]netip.Addr{"to-other-network": f.Other4, "to-broadcast": a("255.255.255.255"), "to-multicast": a("224.0.0.251"), "to-loopback": a("127.0.0.1")} {
		b.add(class, udp(f.MAC, Gateway, f.My4, dst, 1, 2, note(Forged, class)))
	}
	for class, dst := range map[string]netip.Addr{"to-other-network-v6": f.Other6, "to-all-nodes": a("ff02::1"), "to-site": a("ff05::2"), "to-peer-link-local": a("fe80::5054:ff:fe00:1")} {
		b.add(class, udp(f.MAC, Gateway, f.My6, dst, 1, 2, note(Forged, class)))
	}
}

// lastOf is an address near a that nobody has.
func lastOf(a netip.Addr) netip.Addr {
	b := a.As4()
	b[3] = 250
	return netip.AddrFrom4(b)
}

// lastIn4 is a prefix's last address.
func lastIn4(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	wire.IP4(uint32(wire.GetIP4(b[:])) | ^uint32(0)>>p.Bits()).Put(b[:])
	return netip.AddrFrom4(b)
}
