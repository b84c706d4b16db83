// Package engine moves and judges every packet of one network: a layer 3 router between ports.
//
// # How it works
//
// A [Router] has NICs and, on a nat network, an uplink. Each has a [Port], which moves frames in bursts and
// knows nothing of networks; all of routing, address resolution, DHCP, anti-spoofing and ICMP is here, the
// same for every kind of port. One goroutine owns a router: it calls [Router.Poll] for the ports that have
// something, and between those calls everything else. Nothing is locked, and nothing is allocated per packet.
//
// A packet's head, at least all headers that the engine looks at, is a private copy, so that a guest cannot
// change it between check and use; the rest may lie in guest memory and is copied once, to where it goes.
//
// Guests never share layer 2. To each, the world is one neighbour with the MAC [GatewayMAC] and the
// addresses 169.254.0.1 and fe80::1. A guest may send only from what is its own, and nothing that is
// broadcast or multicast leaves the NIC it came from.
package engine

import (
	"net/netip"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// The gateway looks the same on every network.
const (
	GatewayMAC wire.MAC = 0x026d76000001 // locally administered, "mv"
	Gateway4   wire.IP4 = 0xa9fe0001     // 169.254.0.1
)

// Burst is how many packets move at a time: DPDK's number, where per-burst costs have become small and
// the packets still fit into the first-level cache.
const Burst = 32

// HeadLen is how much of a packet's beginning a port copies at least (or all of it, if it is shorter):
// Ethernet, IPv6 with extension headers of 100 bytes, TCP with options.
const HeadLen = 14 + 40 + 100 + 60

// Offload is the virtio-net header (virtio 1.2, section 5.1.6) without its number of buffers. Offsets count
// from the Ethernet header.
type Offload struct {
	Flags, GSO                           uint8
	HdrLen, GSOSize, CsumStart, CsumOffs uint16
}

// Values in Offload.
const (
	NeedsCsum = 1 // Flags: the checksum at CsumStart+CsumOffs is still to be made
	DataValid = 2 // Flags: the checksum was checked

	GSONone  = 0
	GSOTCP4  = 1
	GSOUDP   = 3 // UDP fragmentation offload
	GSOTCP6  = 4
	GSOUDPL4 = 5
	GSOECN   = 0x80
)

// Packet is one frame on its way.
type Packet struct {
	Head []byte   // from the Ethernet header on; private to the engine while it has the packet
	Tail [][]byte // the rest, in parts; may be memory that a guest changes meanwhile
	Len  int      // of Head and Tail together
	Offload
	info wire.Info
	tail [maxTail][]byte // room for Tail
}

// maxTail is how many parts a packet may have behind its head: Linux sends at most 18, and a few more come
// from parts that cross the border of a memory region.
const maxTail = 24

// MaxLen is the longest packet: an offloaded one of 64 KiB behind its Ethernet header.
const MaxLen = 65535 + wire.EthLen

// Begin makes the packet empty, for a port that adds parts.
func (p *Packet) Begin() { p.Head, p.Tail, p.Len = nil, p.tail[:0], 0 }

// AddTail adds a part behind the head; false if there are too many, or too many bytes.
func (p *Packet) AddTail(b []byte) bool {
	if len(p.Tail) == maxTail || p.Len+len(b) > MaxLen {
		return false
	}
	p.Tail = append(p.Tail, b)
	p.Len += len(b)
	return true
}

// Finish sets the head, which is private, and what is to be done to the packet.
func (p *Packet) Finish(head []byte, o Offload) { p.Head, p.Len, p.Offload = head, p.Len+len(head), o }

// Hash spreads flows over queues.
func (p *Packet) Hash() uint32 {
	in := &p.info
	h := uint32(in.SrcPort)<<16 | uint32(in.DstPort)
	if len(p.Head) >= wire.EthLen+20 {
		h ^= uint32(wire.GetIP4(p.Head[wire.EthLen+12:])) ^ uint32(wire.GetIP4(p.Head[wire.EthLen+16:]))
	}
	h *= 2654435761
	return h >> 16
}

// Set makes the packet hold one contiguous frame.
func (p *Packet) Set(frame []byte) {
	p.Head, p.Tail, p.Len, p.Offload = frame, nil, len(frame), Offload{}
}

// Trim shortens the packet to n bytes.
func (p *Packet) Trim(n int) {
	if n >= p.Len {
		return
	}
	p.Len = n
	if n <= len(p.Head) {
		p.Head, p.Tail = p.Head[:n], nil
		return
	}
	n -= len(p.Head)
	for i, t := range p.Tail {
		if n <= len(t) {
			p.Tail[i] = t[:n]
			p.Tail = p.Tail[:i+1]
			return
		}
		n -= len(t)
	}
}

// Range appends to dst the parts of the packet from offset from, n bytes long.
func (p *Packet) Range(dst [][]byte, from, n int) [][]byte {
	take := func(b []byte) {
		if from >= len(b) {
			from -= len(b)
			return
		}
		b = b[from:]
		from = 0
		if n < len(b) {
			b = b[:n]
		}
		if len(b) > 0 {
			dst = append(dst, b)
			n -= len(b)
		}
	}
	take(p.Head)
	for _, t := range p.Tail {
		take(t)
	}
	return dst
}

// Copy writes the packet's bytes to b and returns how many there were room for.
func (p *Packet) Copy(b []byte) int {
	n := copy(b, p.Head)
	for _, t := range p.Tail {
		n += copy(b[n:], t)
	}
	return n
}

// Port moves frames between the engine and one guest or the uplink. Its methods are called by the
// router's goroutine only.
type Port interface {
	// Receive fills pkts with what the other side sent and returns how many. They stay valid until Release.
	Receive(pkts []Packet) int
	// Release gives the buffers of the last Receive back.
	Release()
	// Transmit copies pkts to the other side and returns how many packets and bytes it took. It does not
	// wait: what there is no room for is dropped.
	Transmit(pkts []*Packet) (packets, bytes int)
}

// Network is the part of a network's configuration that the engine needs.
type Network struct {
	Subnet4 netip.Prefix
	Subnet6 netip.Prefix
	Bridged bool // frames pass to and from a bridge of the host, see SetLeg
	MTU     int
	DNS     []netip.Addr
	NTP     []netip.Addr
	Domain  string
	// HostAddrs are the host's own addresses on the uplink, to which guests may answer although they are
	// link-local.
	HostAddrs []netip.Addr
}

// NICConfig is the part of a NIC's configuration that the engine needs.
type NICConfig struct {
	ID       string
	MAC      wire.MAC
	IPv4     netip.Addr
	IPv6     netip.Addr
	Routed   []netip.Prefix
	HostName string
	Groups   []string // ids of security groups
	Down     bool     // the link is down: nothing passes
}

// Counters count packets and bytes; Rx is what the guest received.
type Counters struct {
	RxPackets, RxBytes, RxDropped            uint64
	TxPackets, TxBytes, TxDropped, TxSpoofed uint64
}

// Reparse finds the headers again in a packet that the engine made or let through before, and that a port
// kept as bytes.
func (p *Packet) Reparse() {
	if len(p.Head) < wire.EthLen {
		return
	}
	if wire.Be16(p.Head[12:]) == wire.TypeIPv6 {
		wire.ParseIPv6(p.Head, p.Len, &p.info)
	} else {
		wire.ParseIPv4(p.Head, p.Len, &p.info)
	}
}
