// Package wire reads and writes the packet formats that the engine speaks: Ethernet (IEEE 802.3), ARP
// (RFC 826), IPv4 (RFC 791), IPv6 (RFC 8200), ICMP (RFC 792), ICMPv6 (RFC 4443), UDP (RFC 768), TCP
// (RFC 9293), and the Internet checksum (RFC 1071).
//
// All functions work on caller's buffers, allocate nothing, and check every length: bytes come from guests.
package wire

import (
	"encoding/binary"
	"net/netip"
)

// Header sizes and limits in bytes.
const (
	EthLen     = 14
	ARPLen     = 28
	IPv4MinLen = 20
	IPv6Len    = 40
	UDPLen     = 8
	TCPMinLen  = 20
	ICMPLen    = 8 // type, code, checksum, and four bytes that depend on the type
)

// EtherTypes (IEEE registry).
const (
	TypeIPv4 = 0x0800
	TypeARP  = 0x0806
	TypeIPv6 = 0x86dd
)

// IP protocol numbers (IANA).
const (
	ProtoHopByHop = 0
	ProtoICMP     = 1
	ProtoTCP      = 6
	ProtoUDP      = 17
	ProtoRouting  = 43
	ProtoFragment = 44
	ProtoESP      = 50
	ProtoAH       = 51
	ProtoICMPv6   = 58
	ProtoNoNext   = 59
	ProtoDestOpts = 60
	ProtoMobility = 135
	ProtoHIP      = 139
	ProtoShim6    = 140
)

// MAC is an Ethernet address in the low 48 bits, first byte on the wire highest: comparing is one
// instruction.
type MAC uint64

// Broadcast is ff:ff:ff:ff:ff:ff.
const Broadcast MAC = 0xffffffffffff

// GetMAC reads 6 bytes.
func GetMAC(b []byte) MAC {
	_ = b[5]
	return MAC(binary.BigEndian.Uint32(b))<<16 | MAC(binary.BigEndian.Uint16(b[4:]))
}

// Put writes 6 bytes.
func (m MAC) Put(b []byte) {
	_ = b[5]
	binary.BigEndian.PutUint32(b, uint32(m>>16))
	binary.BigEndian.PutUint16(b[4:], uint16(m))
}

// Group says whether m is a multicast or the broadcast address.
func (m MAC) Group() bool { return m>>40&1 == 1 }

// String is the usual "52:54:00:12:34:56".
func (m MAC) String() string {
	const hex = "0123456789abcdef"
	b := make([]byte, 0, 17)
	for i := 40; i >= 0; i -= 8 {
		if len(b) > 0 {
			b = append(b, ':')
		}
		x := byte(m >> i)
		b = append(b, hex[x>>4], hex[x&15])
	}
	return string(b)
}

// ParseMAC reads six hexadecimal pairs with colons between them; ok is false for anything else.
func ParseMAC(s string) (m MAC, ok bool) {
	if len(s) != 17 {
		return 0, false
	}
	for i := range 17 {
		c := s[i]
		if i%3 == 2 {
			if c != ':' {
				return 0, false
			}
			continue
		}
		var d byte
		switch {
		case c >= '0' && c <= '9':
			d = c - '0'
		case c >= 'a' && c <= 'f':
			d = c - 'a' + 10
		case c >= 'A' && c <= 'F':
			d = c - 'A' + 10
		default:
			return 0, false
		}
		m = m<<4 | MAC(d)
	}
	return m, true
}

// IP4 is an IPv4 address as a number, first byte highest.
type IP4 uint32

// GetIP4 reads 4 bytes.
func GetIP4(b []byte) IP4 { return IP4(binary.BigEndian.Uint32(b)) }

// Put writes 4 bytes.
func (a IP4) Put(b []byte) { binary.BigEndian.PutUint32(b, uint32(a)) }

// Addr converts to netip.
func (a IP4) Addr() netip.Addr {
	return netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)})
}

// IP4Of converts from netip; the zero address for anything that is not IPv4.
func IP4Of(a netip.Addr) IP4 {
	if !a.Is4() && !a.Is4In6() {
		return 0
	}
	b := a.As4()
	return GetIP4(b[:])
}

// Multicast is 224.0.0.0/4.
func (a IP4) Multicast() bool { return a>>28 == 0xe }

// LinkLocal is 169.254.0.0/16 (RFC 3927): never forwarded.
func (a IP4) LinkLocal() bool { return a>>16 == 0xa9fe }

// Routable says whether a may be the destination of a forwarded packet: not this-network, loopback,
// link-local, multicast, reserved or broadcast (RFC 6890).
func (a IP4) Routable() bool {
	return a>>24 != 0 && a>>24 != 127 && !a.LinkLocal() && a>>28 < 0xe
}

// IP6 is an IPv6 address.
type IP6 [16]byte

// IP6Of converts from netip; the zero address for anything that is not IPv6.
func IP6Of(a netip.Addr) IP6 {
	if !a.Is6() || a.Is4In6() {
		return IP6{}
	}
	return a.As16()
}

// Addr converts to netip.
func (a IP6) Addr() netip.Addr { return netip.AddrFrom16(a) }

// Multicast is ff00::/8.
func (a *IP6) Multicast() bool { return a[0] == 0xff }

// LinkLocal is fe80::/10.
func (a *IP6) LinkLocal() bool { return a[0] == 0xfe && a[1]&0xc0 == 0x80 }

// Unspecified is ::.
func (a *IP6) Unspecified() bool { return *a == IP6{} }

// Routable says whether a may be the destination of a forwarded packet: not unspecified, loopback,
// v4-mapped, link-local or multicast (RFC 6890).
func (a *IP6) Routable() bool {
	if a.Multicast() || a.LinkLocal() {
		return false
	}
	for _, b := range a[:10] {
		if b != 0 {
			return true
		}
	}
	return false // ::/80: unspecified, loopback, v4-compatible and v4-mapped
}

// Be16 reads a big-endian 16-bit number.
func Be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }

// PutBe16 writes a big-endian 16-bit number.
func PutBe16(b []byte, v uint16) { binary.BigEndian.PutUint16(b, v) }
