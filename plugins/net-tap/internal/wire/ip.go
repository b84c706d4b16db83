package wire

import "encoding/binary"

// Info is what Parse finds out about an IP packet.
type Info struct {
	V6       bool
	Proto    uint8  // transport protocol, after IPv6 extension headers
	Fragment bool   // any part of a fragmented packet
	First    bool   // not a fragment, or the first one: the transport header is here
	Ports    bool   // SrcPort and DstPort are valid (TCP, UDP, and ICMP as below)
	TCPFlags uint8  // 0 if not TCP or not First
	L4       int    // offset of the transport header from the start of the frame
	End      int    // offset of the packet's end from the start of the frame: shorter than a padded frame
	SrcPort  uint16 // for ICMP: the identifier of echo messages
	DstPort  uint16 // for ICMP: type<<8 | code
	FragID   uint32
	// RouterAlert says that a hop-by-hop header stands in an IPv6 packet.
	HopByHop bool
}

// Problem is why Parse refuses a packet. The zero value is "fine".
type Problem uint8

// Problems.
const (
	OK        Problem = iota
	Short             // a header or the packet ends behind the frame
	BadHeader         // version, header length or total length do not fit together
	BadSum            // IPv4 header checksum
	BadOption         // source routing or a broken option
	TooDeep           // IPv6 extension headers that go on for longer than the engine looks
)

// ParseIPv4 reads the IPv4 packet behind the Ethernet header. head is the frame's beginning, total the
// length of the whole frame; head holds all of it or enough for all headers, else Short.
func ParseIPv4(head []byte, total int, in *Info) Problem {
	*in = Info{}
	if len(head) < EthLen+IPv4MinLen {
		return Short
	}
	b := head[EthLen:]
	ihl := int(b[0]&15) * 4
	n := int(Be16(b[2:]))
	switch {
	case b[0]>>4 != 4 || ihl < IPv4MinLen || n < ihl:
		return BadHeader
	case len(b) < ihl || EthLen+n > total:
		return Short
	case ihl == IPv4MinLen && !sum20(b) || ihl > IPv4MinLen && Checksum(b[:ihl]) != 0:
		return BadSum
	}
	if ihl > IPv4MinLen && !optionsFine(b[IPv4MinLen:ihl]) {
		return BadOption
	}
	off := Be16(b[6:])
	in.Proto, in.L4, in.End = b[9], EthLen+ihl, EthLen+n
	in.Fragment, in.First = off&0x3fff != 0, off&0x1fff == 0
	if in.Fragment {
		in.FragID = uint32(Be16(b[4:]))
	}
	return in.transport(head)
}

// sum20 says whether the checksum over a header without options is right. The sum of words is the same in either
// byte order, but for the order of its own bytes (RFC 1071, section 2 (B)), and all ones has none.
func sum20(b []byte) bool {
	_ = b[19]
	x, y, z := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:]), uint64(binary.LittleEndian.Uint32(b[16:]))
	s := x>>32 + x&0xffffffff + y>>32 + y&0xffffffff + z
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return s == 0xffff
}

// optionsFine refuses source routing (RFC 7126 says drop) and options that overrun the header.
func optionsFine(o []byte) bool {
	for len(o) > 0 {
		switch o[0] {
		case 0:
			return true
		case 1:
			o = o[1:]
			continue
		case 131, 137:
			return false
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return false
		}
		o = o[o[1]:]
	}
	return true
}

// maxExtension bounds how many extension headers ParseIPv6 follows. Real packets have one or two.
const maxExtension = 8

// ParseIPv6 is like ParseIPv4 for IPv6. Extension headers must lie within head.
func ParseIPv6(head []byte, total int, in *Info) Problem {
	*in = Info{V6: true, First: true}
	if len(head) < EthLen+IPv6Len {
		return Short
	}
	b := head[EthLen:]
	n := int(Be16(b[4:]))
	switch {
	case b[0]>>4 != 6:
		return BadHeader
	case EthLen+IPv6Len+n > total:
		return Short
	}
	in.End = EthLen + IPv6Len + n
	in.Proto, in.L4 = b[6], EthLen+IPv6Len
	for range maxExtension {
		size := 0
		switch in.Proto {
		case ProtoHopByHop:
			if in.L4 != EthLen+IPv6Len {
				return BadHeader
			}
			in.HopByHop = true
			fallthrough
		case ProtoRouting, ProtoDestOpts, ProtoMobility, ProtoHIP, ProtoShim6:
			size = 1
		case ProtoAH:
			size = 2
		case ProtoFragment:
			size = 3
		default:
			return in.transport(head)
		}
		if in.L4+8 > in.End {
			return Short
		}
		if in.L4+8 > len(head) {
			return TooDeep
		}
		h := head[in.L4:]
		switch {
		case in.Proto == ProtoRouting && h[2] == 0:
			return BadOption // type 0: source routing, forbidden by RFC 5095
		case size == 1:
			size = (int(h[1]) + 1) * 8
		case size == 2:
			size = (int(h[1]) + 2) * 4
		default:
			size = 8
			if in.Fragment {
				return BadHeader
			}
			off := Be16(h[2:])
			in.Fragment, in.First = off&0xfff9 != 0, off>>3 == 0
			if in.Fragment {
				in.FragID = uint32(Be16(h[4:]))<<16 | uint32(Be16(h[6:]))
			}
		}
		in.Proto = h[0]
		in.L4 += size
		if in.L4 > in.End {
			return Short
		}
		if !in.First {
			return OK
		}
	}
	return TooDeep
}

// transport reads ports and flags. A first fragment that is too short for its transport header is refused
// (RFC 1858, RFC 7112): it exists only to pass filters.
func (in *Info) transport(head []byte) Problem {
	if !in.First {
		return OK
	}
	need := 0
	switch in.Proto {
	case ProtoTCP:
		need = TCPMinLen
	case ProtoUDP, ProtoICMP, ProtoICMPv6:
		need = UDPLen
		if in.Proto == ProtoICMPv6 {
			need = 4
		}
	default:
		return OK
	}
	if in.L4+need > in.End {
		return Short
	}
	if in.L4+need > len(head) {
		return TooDeep
	}
	h := head[in.L4:]
	switch in.Proto {
	case ProtoTCP:
		in.TCPFlags = h[13]
		in.SrcPort, in.DstPort = Be16(h), Be16(h[2:])
	case ProtoUDP:
		in.SrcPort, in.DstPort = Be16(h), Be16(h[2:])
		// A whole datagram's length field must lie within the packet.
		if n := int(Be16(h[4:])); !in.Fragment && (n < UDPLen || in.L4+n > in.End) && n != 0 {
			return BadHeader
		}
	case ProtoICMP:
		in.DstPort = Be16(h)
		if t := h[0]; t == ICMPEcho || t == ICMPEchoReply {
			in.SrcPort = Be16(h[4:])
		}
	case ProtoICMPv6:
		in.DstPort = Be16(h)
		if t := h[0]; (t == ICMP6Echo || t == ICMP6EchoReply) && in.L4+6 <= in.End && in.L4+6 <= len(head) {
			in.SrcPort = Be16(h[4:])
		}
	}
	in.Ports = true
	return OK
}

// DecTTL lowers the TTL of the IPv4 header at b by one and mends its checksum.
func DecTTL(b []byte) {
	old := Be16(b[8:])
	b[8]--
	PutBe16(b[10:], Update16(Be16(b[10:]), old, Be16(b[8:])))
}

// PutIPv4 writes a 20-byte header without options for a payload of n bytes.
func PutIPv4(b []byte, src, dst IP4, proto, ttl uint8, id uint16, n int) {
	_ = b[19]
	b[0], b[1] = 0x45, 0
	PutBe16(b[2:], uint16(IPv4MinLen+n))
	PutBe16(b[4:], id)
	PutBe16(b[6:], 0)
	b[8], b[9] = ttl, proto
	PutBe16(b[10:], 0)
	src.Put(b[12:])
	dst.Put(b[16:])
	PutBe16(b[10:], Checksum(b[:IPv4MinLen]))
}

// PutIPv6 writes a header for a payload of n bytes.
func PutIPv6(b []byte, src, dst *IP6, proto, hops uint8, n int) {
	_ = b[39]
	b[0], b[1], b[2], b[3] = 0x60, 0, 0, 0
	PutBe16(b[4:], uint16(n))
	b[6], b[7] = proto, hops
	copy(b[8:24], src[:])
	copy(b[24:40], dst[:])
}

// PutUDP4 writes the UDP header at b in front of its payload, which is already there; ip is the header
// written by PutIPv4. n is the length of the payload.
func PutUDP4(b, ip []byte, src, dst uint16, n int) {
	putUDP(b, src, dst, n)
	finishUDP(b, PseudoSum4(ip[12:], ProtoUDP, UDPLen+n), n)
}

// PutUDP6 is the same for IPv6.
func PutUDP6(b, ip []byte, src, dst uint16, n int) {
	putUDP(b, src, dst, n)
	finishUDP(b, PseudoSum6(ip[8:], ProtoUDP, UDPLen+n), n)
}

func putUDP(b []byte, src, dst uint16, n int) {
	PutBe16(b, src)
	PutBe16(b[2:], dst)
	PutBe16(b[4:], uint16(UDPLen+n))
	PutBe16(b[6:], 0)
}

func finishUDP(b []byte, pseudo uint64, n int) {
	c := Fold(Sum(pseudo, b[:UDPLen+n]))
	if c == 0 {
		c = 0xffff // 0 would mean "no checksum" (RFC 768)
	}
	PutBe16(b[6:], c)
}
