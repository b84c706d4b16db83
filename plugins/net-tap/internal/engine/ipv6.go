package engine

import (
	"github.com/mvirt/mvirt/plugins/net-tap/internal/dhcp6"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// Gateway6 is fe80::1, the gateway on every network.
var Gateway6 = wire.IP6{0: 0xfe, 1: 0x80, 15: 1}

// allNodes is ff02::1, and the MAC that it maps to (RFC 2464, section 7).
var allNodes = wire.IP6{0: 0xff, 1: 0x02, 15: 1}

const allNodesMAC wire.MAC = 0x333300000001

// owns6 says whether a NIC may send from a to the world.
func (nic *NIC) owns6(a *wire.IP6) bool {
	if nic.has6 && *a == nic.ip6 {
		return true
	}
	for i := range nic.routed6 {
		if nic.routed6[i].contains(a) {
			return true
		}
	}
	return false
}

// onLink says whether a NIC may send from a to the gateway: also from a link-local address of its choice
// (RFC 7217 lets a guest choose), which never leaves the link, but not the gateway's.
func (nic *NIC) onLink(a *wire.IP6) bool {
	return a.LinkLocal() && *a != Gateway6 || nic.owns6(a)
}

// guest6 judges and routes an IPv6 packet that a guest sent.
func (r *Router) guest6(nic *NIC, p *Packet, mac wire.MAC) {
	if !r.has6 || wire.ParseIPv6(p.Head, p.Len, &p.info) != wire.OK || !p.checkOffload() {
		nic.TxDropped++
		return
	}
	p.Trim(p.info.End)
	ip := p.Head[wire.EthLen:]
	src, dst := (*wire.IP6)(ip[8:24]), (*wire.IP6)(ip[24:40])
	if dst.Multicast() || *dst == Gateway6 || *dst == r.router6 {
		r.local6(nic, p, src, dst)
		return
	}
	if !nic.owns6(src) {
		if nic.onLink(src) {
			nic.TxDropped++ // link-local to a neighbour: there is none
		} else {
			nic.TxSpoofed++
		}
		return
	}
	if mac != GatewayMAC || !dst.Routable() {
		nic.TxDropped++
		return
	}
	if linkOnly(&p.info) {
		nic.TxSpoofed++
		return
	}
	if ip[7] <= 1 {
		nic.TxDropped++
		r.error6(&nic.endpoint, p, wire.ICMP6TimeExceeded, 0, 0)
		return
	}
	to, code := r.route6(dst)
	switch {
	case to == nil || to.port == nil:
		nic.TxDropped++
		r.error6(&nic.endpoint, p, wire.ICMP6Unreachable, code, 0)
	case to == &nic.endpoint:
		nic.TxDropped++
	default:
		r.forward6(&nic.endpoint, to, p)
	}
}

// outside6 judges and routes an IPv6 packet from the uplink.
func (r *Router) outside6(p *Packet) {
	up := &r.uplink
	if !r.has6 || wire.ParseIPv6(p.Head, p.Len, &p.info) != wire.OK || !p.checkOffload() {
		up.TxDropped++
		return
	}
	p.Trim(p.info.End)
	up.TxPackets++
	up.TxBytes += uint64(p.Len)
	ip := p.Head[wire.EthLen:]
	src, dst := (*wire.IP6)(ip[8:24]), (*wire.IP6)(ip[24:40])
	if !src.Routable() || !dst.Routable() || r.fib6.lookup(src) != nil {
		up.TxDropped++ // the kernel's own link-local chatter, or somebody who claims to be a guest
		return
	}
	if *dst == r.router6 {
		r.local6(nil, p, src, dst)
		return
	}
	to := r.fib6.lookup(dst)
	switch {
	case to == nil || to.port == nil:
		up.TxDropped++
		r.error6(up, p, wire.ICMP6Unreachable, wire.Code6AddrUnreach, 0)
	case ip[7] <= 1:
		up.TxDropped++
		r.error6(up, p, wire.ICMP6TimeExceeded, 0, 0)
	default:
		r.forward6(up, &to.endpoint, p)
	}
}

// route6 finds where dst is; the code is for the error if it is nowhere.
func (r *Router) route6(dst *wire.IP6) (*endpoint, uint8) {
	if nic := r.fib6.lookup(dst); nic != nil {
		return &nic.endpoint, wire.Code6AddrUnreach
	}
	if r.sub6.contains(dst) {
		return nil, wire.Code6AddrUnreach
	}
	if r.uplink.port != nil {
		return &r.uplink, 0
	}
	return nil, wire.Code6NoRoute
}

// forward6 lowers the hop limit, minds the MTU, and sends p on.
func (r *Router) forward6(from, to *endpoint, p *Packet) {
	if !r.allowed(from, to, p) {
		return
	}
	if p.tooBig(r.mtu) {
		from.TxDropped++
		r.error6(from, p, wire.ICMP6TooBig, 0, uint32(r.mtu))
		return
	}
	p.Head[wire.EthLen+7]--
	if to.nic != nil {
		wire.PutEth(p.Head, to.nic.cfg.MAC, GatewayMAC, wire.TypeIPv6)
	}
	r.send(to, p)
}

// error6 tells the sender of p what became of it, unless RFC 4443 section 2.4 (e) forbids.
func (r *Router) error6(to *endpoint, p *Packet, typ, code uint8, extra uint32) {
	in, ip := &p.info, p.Head[wire.EthLen:]
	src, dst := (*wire.IP6)(ip[8:24]), (*wire.IP6)(ip[24:40])
	if !in.First || dst.Multicast() || src.Multicast() || src.Unspecified() ||
		in.Proto == wire.ProtoICMPv6 && in.Ports && (in.DstPort>>8 < 128 || in.DstPort>>8 == wire.ICMP6Redirect) {
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
	n := wire.ICMPv6Error(q.Head, p.whole(r), &r.router6, typ, code, extra)
	wire.PutEth(q.Head, to.mac(), GatewayMAC, wire.TypeIPv6)
	r.send(to, q.done(n))
}

// local6 handles what is for the router itself or for everybody on the link; nic is nil for the uplink.
func (r *Router) local6(nic *NIC, p *Packet, src, dst *wire.IP6) {
	from := &r.uplink
	in := &p.info
	if nic != nil {
		from = &nic.endpoint
		if !nic.onLink(src) && !(src.Unspecified() && dst.Multicast() && in.Proto == wire.ProtoICMPv6) {
			nic.TxSpoofed++
			return
		}
	}
	switch {
	case in.Fragment || p.Len > len(r.linear) && in.Proto != wire.ProtoICMPv6:
		from.TxDropped++
	case in.Proto == wire.ProtoICMPv6 && in.Ports:
		r.icmp6(nic, p, src, dst)
	case in.Proto == wire.ProtoUDP && in.DstPort == dhcp6.ServerPort && nic != nil && *dst == dhcp6.Servers:
		r.dhcp6(nic, p, src)
	case dst.Multicast():
		from.TxDropped++ // ends here
	default:
		r.error6(from, p, wire.ICMP6Unreachable, wire.Code6PortUnreach, 0)
	}
}

// icmp6 answers echo requests and neighbour discovery.
func (r *Router) icmp6(nic *NIC, p *Packet, src, dst *wire.IP6) {
	in := &p.info
	typ := uint8(in.DstPort >> 8)
	if typ == wire.ICMP6Echo && !dst.Multicast() {
		if p.Flags&NeedsCsum != 0 || src.Unspecified() {
			return
		}
		icmp := p.Head[in.L4:]
		icmp[0] = wire.ICMP6EchoReply
		wire.PutBe16(icmp[2:], wire.Update16(wire.Be16(icmp[2:]), wire.ICMP6Echo<<8|uint16(icmp[1]), wire.ICMP6EchoReply<<8|uint16(icmp[1])))
		was := *src
		*src, *dst = *dst, was
		p.Head[wire.EthLen+7] = 64
		to := &r.uplink
		if nic != nil {
			to = &nic.endpoint
		}
		wire.PutEth(p.Head, to.mac(), GatewayMAC, wire.TypeIPv6)
		r.send(to, p)
		return
	}
	if nic == nil {
		return
	}
	switch typ {
	case wire.ICMP6RS, wire.ICMP6RA, wire.ICMP6NS, wire.ICMP6NA, wire.ICMP6Redirect:
		r.neighbour(nic, p, typ, src)
	}
	// The rest is listener reports and errors, which say nothing to us.
}

// dhcp6 serves a DHCPv6 request.
func (r *Router) dhcp6(nic *NIC, p *Packet, src *wire.IP6) {
	if !nic.has6 {
		nic.TxDropped++
		return
	}
	at := p.info.L4 + wire.UDPLen
	n := p.Copy(r.linear[:])
	q := r.fresh()
	const hdr = wire.EthLen + wire.IPv6Len + wire.UDPLen
	size, ev := dhcp6.Serve(r.linear[at:n], &nic.lease6, q.Head[hdr:hdr+dhcp6.MaxReply])
	switch ev {
	case dhcp6.Bound:
		nic.leased, nic.decline = true, false
	case dhcp6.Declined:
		nic.leased, nic.decline = false, true
	case dhcp6.Released:
		nic.leased = false
	case dhcp6.Bad:
		nic.TxDropped++
	}
	if size == 0 {
		return
	}
	ip := q.Head[wire.EthLen:]
	wire.PutEth(q.Head, nic.cfg.MAC, GatewayMAC, wire.TypeIPv6)
	wire.PutIPv6(ip, &Gateway6, src, wire.ProtoUDP, 64, wire.UDPLen+size)
	wire.PutUDP6(ip[wire.IPv6Len:], ip, dhcp6.ServerPort, dhcp6.ClientPort, size)
	r.send(&nic.endpoint, q.done(hdr+size))
}
