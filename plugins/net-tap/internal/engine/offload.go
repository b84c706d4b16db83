package engine

import (
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// checkOffload judges what a sender asks to be done to its packet: the offsets must lie in the packet, and
// a segmentation must fit what the packet is. It clears what only the engine may say.
func (p *Packet) checkOffload() bool {
	o, in := &p.Offload, &p.info
	o.Flags &= NeedsCsum
	if o.Flags == 0 {
		if o.GSO != GSONone { // segments need checksums
			return false
		}
		p.Offload = Offload{}
		return true
	}
	start, offs := int(o.CsumStart), int(o.CsumOffs)
	if start < in.L4 || start+offs+2 > in.End || start+offs+2 > len(p.Head) && len(p.Tail) == 0 {
		return false
	}
	o.HdrLen = 0
	if o.GSO == GSONone {
		o.GSOSize = 0
		return true
	}
	if o.GSOSize == 0 || !in.First || in.Fragment {
		return false
	}
	switch o.GSO &^ GSOECN {
	case GSOTCP4, GSOTCP6:
		if in.Proto != wire.ProtoTCP || (o.GSO&^GSOECN == GSOTCP6) != in.V6 || start != in.L4 || offs != 16 {
			return false
		}
	case GSOUDP, GSOUDPL4:
		if in.Proto != wire.ProtoUDP || start != in.L4 || offs != 6 || o.GSO&GSOECN != 0 {
			return false
		}
	default:
		return false
	}
	end := p.transportEnd()
	if end < in.L4+wire.UDPLen || end > in.End || end > len(p.Head) {
		return false
	}
	o.HdrLen = uint16(end)
	return true
}

// CompleteCsum makes the checksum that was left to be made, for a receiver that does not take such packets.
// It is false if it cannot be done, because the field does not lie in the head.
func (p *Packet) CompleteCsum() bool {
	if p.Flags&NeedsCsum == 0 {
		return true
	}
	start, at := int(p.CsumStart), int(p.CsumStart)+int(p.CsumOffs)
	if start > len(p.Head) || at+2 > len(p.Head) {
		return false
	}
	// The field holds the sum of the pseudo header.
	sum := wire.Sum(0, p.Head[start:])
	odd := (len(p.Head)-start)%2 == 1
	for _, t := range p.Tail {
		s := wire.Sum(0, t)
		if odd {
			s = wire.SwapSum(s)
		}
		sum = wire.AddSum(sum, s)
		odd = odd != (len(t)%2 == 1)
	}
	c := wire.Fold(sum)
	if c == 0 && p.CsumOffs == 6 {
		c = 0xffff // UDP: 0 means none
	}
	wire.PutBe16(p.Head[at:], c)
	p.Offload = Offload{}
	return true
}

// Segment cuts a TCP or UDP packet whose segmentation was left to be done. It calls f with each segment, whose
// head is in room and which is valid until f returns; the payload is not copied. Segments still want their
// checksums. It is false if the packet is none that can be cut, or f says so.
func (p *Packet) Segment(room *[HeadLen]byte, q *Packet, f func(q *Packet) bool) bool {
	in, size := &p.info, int(p.GSOSize)
	hdr := p.transportEnd()
	g, least := p.GSO&^GSOECN, wire.TCPMinLen
	if g == GSOUDPL4 {
		least = wire.UDPLen
	}
	if g != GSOTCP4 && g != GSOTCP6 && g != GSOUDPL4 || size == 0 || hdr > len(p.Head) || hdr > len(room) || hdr < in.L4+least {
		return false
	}
	ip := p.Head[wire.EthLen:]
	id := wire.Be16(ip[4:])
	seq := uint32(wire.GetIP4(p.Head[in.L4+4:]))
	flags := uint8(0)
	if g != GSOUDPL4 {
		flags = p.Head[in.L4+13]
	}
	for at := hdr; at < p.Len; at += size {
		n := min(size, p.Len-at)
		copy(room[:hdr], p.Head[:hdr])
		h := room[wire.EthLen:hdr]
		l4 := in.L4 - wire.EthLen
		var pseudo uint64
		if in.V6 {
			wire.PutBe16(h[4:], uint16(hdr-wire.EthLen-wire.IPv6Len+n))
			pseudo = wire.PseudoSum6(h[8:], in.Proto, hdr-in.L4+n)
		} else {
			wire.PutBe16(h[2:], uint16(hdr-wire.EthLen+n))
			wire.PutBe16(h[4:], id)
			id++
			wire.PutBe16(h[10:], 0)
			wire.PutBe16(h[10:], wire.Checksum(h[:l4]))
			pseudo = wire.PseudoSum4(h[12:], in.Proto, hdr-in.L4+n)
		}
		offs := 16
		if g == GSOUDPL4 {
			offs = 6
			wire.PutBe16(h[l4+4:], uint16(wire.UDPLen+n))
		} else {
			wire.IP4(seq + uint32(at-hdr)).Put(h[l4+4:])
			fl := flags
			if at+n < p.Len {
				fl &^= tcpFIN | tcpPSH // only the last one
			}
			if at > hdr {
				fl &^= tcpCWR // only the first one (RFC 3168)
			}
			h[l4+13] = fl
		}
		wire.PutBe16(h[l4+offs:], ^wire.Fold(pseudo))
		q.Head = room[:hdr]
		q.Tail = p.Range(q.tail[:0], at, n)
		q.Len = hdr + n
		q.info = *in
		q.info.End = q.Len
		q.Offload = Offload{Flags: NeedsCsum, CsumStart: uint16(in.L4), CsumOffs: uint16(offs)}
		if !f(q) {
			return false
		}
	}
	return true
}
