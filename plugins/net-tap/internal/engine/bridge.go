package engine

import (
	"github.com/mvirt/mvirt/plugins/net-tap/internal/dhcp4"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/dhcp6"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// On a bridge network the engine does not route: each NIC has a leg, a port on the host's bridge, and frames
// pass between the two. The guest's MAC is still its own, it is no DHCP server and no router, and security
// groups hold.

// SetLeg gives a NIC its port on the bridge, nil for none, and returns the one it had.
func (r *Router) SetLeg(id string, p Port) (old Port, ok bool) {
	nic := r.nics[id]
	if nic == nil {
		return nil, false
	}
	old, nic.leg.port = nic.leg.port, p
	return old, true
}

// PollLeg moves one burst from the bridge to a NIC.
func (r *Router) PollLeg(nic *NIC, now int64) int {
	if nic == nil || nic.leg.port == nil {
		return 0
	}
	r.now = now
	n := nic.leg.port.Receive(r.burst[:])
	for i := range n {
		r.fromBridge(nic, &r.burst[i])
	}
	if n > 0 {
		r.flush()
		nic.leg.port.Release()
	}
	return n
}

// toBridge judges a frame that a guest sent; its MAC was checked already.
func (r *Router) toBridge(nic *NIC, p *Packet) {
	switch wire.Be16(p.Head[12:]) {
	case wire.TypeARP:
		a, ok := wire.ParseARP(p.Head[wire.EthLen:])
		if !ok {
			nic.TxDropped++
			return
		}
		if a.SenderMAC != nic.cfg.MAC {
			nic.TxSpoofed++
			return
		}
		p.Offload = Offload{}
	case wire.TypeIPv4, wire.TypeIPv6:
		if !p.parse() {
			nic.TxDropped++
			return
		}
		if serves(&p.info) {
			nic.TxSpoofed++ // what only the network's own servers and routers may say
			return
		}
		if !nic.open && !configures(&p.info) {
			if ok, _ := r.judge(nic, nil, p); !ok {
				nic.TxDropped++
				return
			}
		}
	default:
		nic.TxDropped++
		return
	}
	r.send(&nic.leg, p)
}

// fromBridge judges a frame that came from the bridge.
func (r *Router) fromBridge(nic *NIC, p *Packet) {
	if len(p.Head) < wire.EthLen || nic.port == nil {
		nic.leg.TxDropped++
		return
	}
	if dst := wire.GetMAC(p.Head); dst != nic.cfg.MAC && !dst.Group() {
		return // flooded to all ports, for somebody else
	}
	switch wire.Be16(p.Head[12:]) {
	case wire.TypeARP:
		p.Offload = Offload{}
	case wire.TypeIPv4, wire.TypeIPv6:
		if !p.parse() {
			nic.RxDropped++
			return
		}
		if !nic.open && !configures(&p.info) {
			if ok, _ := r.judge(nil, nic, p); !ok {
				nic.RxDropped++
				return
			}
		}
	default:
		nic.RxDropped++
		return
	}
	r.send(&nic.endpoint, p)
}

// parse reads an IP packet and cuts off padding.
func (p *Packet) parse() bool {
	res := wire.Short
	if wire.Be16(p.Head[12:]) == wire.TypeIPv4 {
		res = wire.ParseIPv4(p.Head, p.Len, &p.info)
	} else {
		res = wire.ParseIPv6(p.Head, p.Len, &p.info)
	}
	if res != wire.OK || !p.checkOffload() {
		return false
	}
	p.Trim(p.info.End)
	return true
}

// serves says whether a packet is a DHCP server's or a router's.
func serves(in *wire.Info) bool {
	switch {
	case !in.Ports:
		return false
	case in.Proto == wire.ProtoUDP:
		return !in.V6 && in.SrcPort == dhcp4.ServerPort || in.V6 && in.SrcPort == dhcp6.ServerPort
	case in.Proto == wire.ProtoICMPv6:
		t := in.DstPort >> 8
		return t == wire.ICMP6RA || t == wire.ICMP6Redirect
	}
	return false
}

// configures says whether a packet belongs to how a host gets on a network, which security groups do not
// judge: DHCP, neighbour discovery, listener reports.
func configures(in *wire.Info) bool {
	switch {
	case !in.Ports:
		return false
	case in.Proto == wire.ProtoUDP && !in.V6:
		return in.SrcPort == dhcp4.ClientPort && in.DstPort == dhcp4.ServerPort || in.SrcPort == dhcp4.ServerPort && in.DstPort == dhcp4.ClientPort
	case in.Proto == wire.ProtoUDP:
		return in.SrcPort == dhcp6.ClientPort && in.DstPort == dhcp6.ServerPort || in.SrcPort == dhcp6.ServerPort && in.DstPort == dhcp6.ClientPort
	case in.Proto == wire.ProtoICMPv6:
		switch t := in.DstPort >> 8; t {
		case wire.ICMP6RS, wire.ICMP6RA, wire.ICMP6NS, wire.ICMP6NA, wire.ICMP6MLDQuery, wire.ICMP6MLDReport, wire.ICMP6MLDDone, wire.ICMP6MLDv2Report:
			return true
		}
	}
	return false
}
