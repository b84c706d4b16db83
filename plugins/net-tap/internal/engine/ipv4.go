package engine

import (
	"github.com/mvirt/mvirt/plugins/net-tap/internal/dhcp4"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// owns4 says whether a NIC may send from a.
func (nic *NIC) owns4(a wire.IP4) bool {
	if a == nic.ip4 && a != 0 {
		return true
	}
	for _, p := range nic.routed4 {
		if p.contains(a) {
			return true
		}
	}
	return false
}

// guestARP answers for the gateway, and for nobody else.
func (r *Router) guestARP(nic *NIC, p *Packet) {
	a, ok := wire.ParseARP(p.Head[wire.EthLen:])
	switch {
	case !ok:
		nic.TxDropped++
		return
	case a.SenderMAC != nic.cfg.MAC || a.SenderIP != 0 && !nic.owns4(a.SenderIP):
		nic.TxSpoofed++
		return
	case a.Op != 1 || a.TargetIP != Gateway4 || !r.has4:
		return
	}
	q := r.fresh()
	wire.PutEth(q.Head, nic.cfg.MAC, GatewayMAC, wire.TypeARP)
	rep := wire.ARP{Op: 2, SenderMAC: GatewayMAC, SenderIP: Gateway4, TargetMAC: a.SenderMAC, TargetIP: a.SenderIP}
	rep.Put(q.Head[wire.EthLen:])
	r.send(&nic.endpoint, q.done(wire.EthLen+wire.ARPLen))
}

// guest4 judges and routes an IPv4 packet that a guest sent.
func (r *Router) guest4(nic *NIC, p *Packet, mac wire.MAC) {
	if !r.has4 || wire.ParseIPv4(p.Head, p.Len, &p.info) != wire.OK || !p.checkOffload() {
		nic.TxDropped++
		return
	}
	p.Trim(p.info.End)
	ip := p.Head[wire.EthLen:]
	src, dst := wire.GetIP4(ip[12:]), wire.GetIP4(ip[16:])
	if in := &p.info; in.Proto == wire.ProtoUDP && in.Ports && in.DstPort == dhcp4.ServerPort &&
		(dst == 0xffffffff || dst == Gateway4) {
		if src != 0 && src != nic.ip4 {
			nic.TxSpoofed++
			return
		}
		r.dhcp4(nic, p)
		return
	}
	if !nic.owns4(src) {
		nic.TxSpoofed++
		return
	}
	if mac != GatewayMAC {
		nic.TxDropped++ // broadcast and multicast end here
		return
	}
	if linkOnly(&p.info) {
		nic.TxSpoofed++
		return
	}
	if dst == Gateway4 || dst == r.router4 {
		r.local4(nic, p)
		return
	}
	if !dst.Routable() && (dst != r.host4 || dst == 0) {
		nic.TxDropped++
		return
	}
	if ip[8] <= 1 {
		nic.TxDropped++
		r.error4(&nic.endpoint, p, wire.ICMPTimeExceeded, 0, 0)
		return
	}
	var to *endpoint
	var code uint8
	if dst == nic.dst4 {
		to, code = &nic.to4.endpoint, wire.CodeHostUnreachable
	} else if to, code = r.route4(dst); to != nil && to.nic != nil {
		nic.dst4, nic.to4 = dst, to.nic
	}
	switch {
	case to == nil || to.port == nil:
		nic.TxDropped++
		r.error4(&nic.endpoint, p, wire.ICMPUnreachable, code, 0)
	case to == &nic.endpoint:
		nic.TxDropped++
	default:
		r.forward4(&nic.endpoint, to, p)
	}
}

// outside4 judges and routes an IPv4 packet from the uplink.
func (r *Router) outside4(p *Packet) {
	up := &r.uplink
	if wire.ParseIPv4(p.Head, p.Len, &p.info) != wire.OK || !p.checkOffload() {
		up.TxDropped++
		return
	}
	p.Trim(p.info.End)
	up.TxPackets++
	up.TxBytes += uint64(p.Len)
	ip := p.Head[wire.EthLen:]
	src, dst := wire.GetIP4(ip[12:]), wire.GetIP4(ip[16:])
	if r.fib4.lookup(src) != nil || src == Gateway4 { // nobody outside is a guest
		up.TxDropped++
		return
	}
	if dst == r.router4 && r.has4 {
		r.local4(nil, p)
		return
	}
	to := r.fib4.lookup(dst)
	switch {
	case to == nil || to.port == nil:
		up.TxDropped++
		r.error4(up, p, wire.ICMPUnreachable, wire.CodeHostUnreachable, 0)
	case ip[8] <= 1:
		up.TxDropped++
		r.error4(up, p, wire.ICMPTimeExceeded, 0, 0)
	default:
		r.forward4(up, &to.endpoint, p)
	}
}

// route4 finds where dst is; the code is for the error if it is nowhere.
func (r *Router) route4(dst wire.IP4) (*endpoint, uint8) {
	if nic := r.fib4.lookup(dst); nic != nil {
		return &nic.endpoint, wire.CodeHostUnreachable
	}
	if r.sub4.contains(dst) {
		return nil, wire.CodeHostUnreachable
	}
	if r.uplink.port != nil {
		return &r.uplink, 0
	}
	return nil, wire.CodeNetUnreachable
}

// forward4 lowers the TTL, minds the MTU, and sends p on from one endpoint to another.
func (r *Router) forward4(from, to *endpoint, p *Packet) {
	ip := p.Head[wire.EthLen:]
	if !r.allowed(from, to, p) {
		return
	}
	if p.tooBig(r.mtu) {
		if ip[6]&0x40 != 0 || p.GSO != GSONone || p.Flags&NeedsCsum != 0 {
			from.TxDropped++
			r.error4(from, p, wire.ICMPUnreachable, wire.CodeFragNeeded, uint32(r.mtu))
			return
		}
		wire.DecTTL(ip)
		r.fragment4(to, p)
		return
	}
	wire.DecTTL(ip)
	if to.nic != nil {
		wire.PutEth(p.Head, to.nic.cfg.MAC, GatewayMAC, wire.TypeIPv4)
	}
	r.send(to, p)
}

// tooBig says whether a packet, or the segments that an offload would cut it into, exceed mtu.
func (p *Packet) tooBig(mtu int) bool {
	if p.GSO == GSONone || p.GSO == GSOUDP {
		return p.GSO == GSONone && p.Len-wire.EthLen > mtu
	}
	return p.transportEnd()-wire.EthLen+int(p.GSOSize) > mtu
}

// transportEnd is where the payload of a TCP or UDP packet begins.
func (p *Packet) transportEnd() int {
	if p.info.Proto == wire.ProtoTCP && p.info.L4+13 <= len(p.Head) {
		return p.info.L4 + int(p.Head[p.info.L4+12]>>4)*4
	}
	return p.info.L4 + wire.UDPLen
}

// fragment4 cuts p into fragments that fit (RFC 791). Only the headers are made; the data stays where it is.
func (r *Router) fragment4(to *endpoint, p *Packet) {
	ihl := int(p.Head[wire.EthLen]&15) * 4
	hdr := wire.EthLen + ihl
	old := wire.Be16(p.Head[wire.EthLen+6:])
	step := (r.mtu - ihl) &^ 7
	for at := hdr; at < p.Len; at += step {
		n := min(step, p.Len-at)
		off := old + uint16((at-hdr)/8)
		if at+n < p.Len {
			off |= 0x2000
		}
		q := r.fresh()
		copy(q.Head, p.Head[:hdr])
		ip := q.Head[wire.EthLen:hdr]
		wire.PutBe16(ip[2:], uint16(ihl+n))
		wire.PutBe16(ip[6:], off)
		wire.PutBe16(ip[10:], 0)
		wire.PutBe16(ip[10:], wire.Checksum(ip))
		if to.nic != nil {
			wire.PutEth(q.Head, to.nic.cfg.MAC, GatewayMAC, wire.TypeIPv4)
		}
		q.done(hdr)
		// fresh may have flushed, never dropped: p is the caller's until the burst ends.
		q.Tail = p.Range(q.tail[:0], at, n)
		q.Len = hdr + n
		r.send(to, q)
	}
}

// local4 answers packets to the router itself; nic is nil for the uplink.
func (r *Router) local4(nic *NIC, p *Packet) {
	from := &r.uplink
	if nic != nil {
		from = &nic.endpoint
	}
	ip, in := p.Head[wire.EthLen:], &p.info
	switch {
	case in.Proto == wire.ProtoICMP && !in.Fragment && in.Ports && in.DstPort == wire.ICMPEcho<<8:
		if p.Flags&NeedsCsum != 0 {
			return
		}
		icmp := p.Head[in.L4:]
		icmp[0] = wire.ICMPEchoReply
		wire.PutBe16(icmp[2:], wire.Update16(wire.Be16(icmp[2:]), wire.ICMPEcho<<8, 0))
		src, dst := wire.GetIP4(ip[12:]), wire.GetIP4(ip[16:])
		dst.Put(ip[12:])
		src.Put(ip[16:])
		ip[8] = 64
		wire.PutBe16(ip[10:], 0)
		wire.PutBe16(ip[10:], wire.Checksum(ip[:in.L4-wire.EthLen]))
		if nic != nil {
			wire.PutEth(p.Head, nic.cfg.MAC, GatewayMAC, wire.TypeIPv4)
		}
		r.send(from, p)
	case in.Proto == wire.ProtoICMP:
	case in.Proto == wire.ProtoUDP, in.Proto == wire.ProtoTCP:
		r.error4(from, p, wire.ICMPUnreachable, wire.CodePortUnreachable, 0)
	default:
		r.error4(from, p, wire.ICMPUnreachable, wire.CodeProtoUnreachable, 0)
	}
}

// error4 tells the sender of p, at endpoint to, what became of it, unless RFC 1812 section 4.3.2.7 forbids.
func (r *Router) error4(to *endpoint, p *Packet, typ, code uint8, extra uint32) {
	in, ip := &p.info, p.Head[wire.EthLen:]
	src, dst := wire.GetIP4(ip[12:]), wire.GetIP4(ip[16:])
	if !in.First || dst.Multicast() || dst == 0xffffffff || src == 0 || src.Multicast() || src>>24 == 127 ||
		in.Proto == wire.ProtoICMP && wire.ICMPIsError(uint8(in.DstPort>>8)) {
		return
	}
	b := &r.upErrs
	if to.nic != nil {
		b = &to.nic.errors
	}
	if !b.take(r.now) {
		return
	}
	q := r.fresh()
	r.ipID++
	n := wire.ICMPv4Error(q.Head, p.whole(r), r.router4, typ, code, extra, r.ipID)
	wire.PutEth(q.Head, to.mac(), GatewayMAC, wire.TypeIPv4)
	r.send(to, q.done(n))
}

// whole is the packet from its IP header on in one piece, as much as an error quotes.
func (p *Packet) whole(r *Router) []byte {
	if len(p.Tail) == 0 {
		return p.Head[wire.EthLen:]
	}
	n := p.Copy(r.linear[:])
	return r.linear[wire.EthLen:n]
}

// dhcp4 serves a DHCP request.
func (r *Router) dhcp4(nic *NIC, p *Packet) {
	if nic.ip4 == 0 || p.info.Fragment || p.Len > len(r.linear) {
		nic.TxDropped++
		return
	}
	at := p.info.L4 + wire.UDPLen
	n := p.Copy(r.linear[:])
	q := r.fresh()
	const hdr = wire.EthLen + wire.IPv4MinLen + wire.UDPLen
	rep, ev := dhcp4.Serve(r.linear[at:n], &nic.lease, q.Head[hdr:hdr+dhcp4.MaxReply])
	switch ev {
	case dhcp4.Bound:
		nic.leased, nic.decline = true, false
	case dhcp4.Declined:
		nic.leased, nic.decline = false, true
	case dhcp4.Released:
		nic.leased = false
	case dhcp4.Bad:
		nic.TxDropped++
	}
	if rep.Len == 0 {
		return
	}
	mac := nic.cfg.MAC
	if rep.Broadcast {
		mac = wire.Broadcast
	}
	wire.PutEth(q.Head, mac, GatewayMAC, wire.TypeIPv4)
	ip := q.Head[wire.EthLen:]
	r.ipID++
	wire.PutIPv4(ip, Gateway4, rep.Dst, wire.ProtoUDP, 64, r.ipID, wire.UDPLen+rep.Len)
	wire.PutUDP4(ip[wire.IPv4MinLen:], ip, dhcp4.ServerPort, dhcp4.ClientPort, rep.Len)
	r.send(&nic.endpoint, q.done(hdr+rep.Len))
}
