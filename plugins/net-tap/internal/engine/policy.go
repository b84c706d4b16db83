package engine

import (
	"crypto/rand"
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// Group is a security group: rules that allow. See package sdk/net for what they mean.
type Group struct {
	ID    string
	Rules []Rule
}

// Rule allows packets of one direction, seen from the NIC.
type Rule struct {
	Inbound  bool
	Any      bool // any protocol
	Proto    uint8
	From, To uint16       // destination ports, or ICMP types; 0 and 0: all
	Peer     netip.Prefix // the other end; invalid: any
	Group    string       // or: NICs of this network in this group
}

// rule is a Rule made ready.
type rule struct {
	any      bool
	proto    uint8
	from, to uint16
	v4, v6   bool // whether a prefix of the family is asked for
	p4       prefix4
	p6       prefix6
	group    string
}

// SetGroups replaces all security groups. Connections that the new rules do not allow end with their next
// packet.
func (r *Router) SetGroups(gs []Group) {
	r.groups = make(map[string]*Group, len(gs))
	for i := range gs {
		r.groups[gs[i].ID] = &gs[i]
	}
	for _, nic := range r.nics {
		r.compile(nic)
	}
	r.rules++
}

// SetGroup adds or replaces one security group.
func (r *Router) SetGroup(g Group) {
	if r.groups == nil {
		r.groups = map[string]*Group{}
	}
	r.groups[g.ID] = &g
	r.recompile(g.ID)
}

// DeleteGroup forgets one.
func (r *Router) DeleteGroup(id string) {
	delete(r.groups, id)
	r.recompile(id)
}

func (r *Router) recompile(id string) {
	for _, nic := range r.nics {
		if slices.Contains(nic.cfg.Groups, id) {
			r.compile(nic)
		}
	}
	r.rules++
}

// SetFlows gives the router its table. Flows in it were let through by rules that may have changed since.
func (r *Router) SetFlows(f *Flows) {
	var b [4]byte
	_, _ = rand.Read(b[:])
	r.flows, r.rules = f, binary.LittleEndian.Uint32(b[:])
}

// compile makes a NIC's rules ready. A group that is not known yet allows nothing.
func (r *Router) compile(nic *NIC) {
	nic.open = len(nic.cfg.Groups) == 0
	nic.in, nic.out = nil, nil
	for _, id := range nic.cfg.Groups {
		g := r.groups[id]
		if g == nil {
			continue
		}
		for _, x := range g.Rules {
			c := rule{any: x.Any, proto: x.Proto, from: x.From, to: x.To, group: x.Group}
			if c.to == 0 && c.from != 0 {
				c.to = c.from
			}
			if x.Peer.IsValid() {
				if x.Peer.Addr().Is4() {
					c.v4, c.p4 = true, toPrefix4(x.Peer)
				} else {
					c.v6, c.p6 = true, toPrefix6(x.Peer)
				}
			}
			if x.Inbound {
				nic.in = append(nic.in, c)
			} else {
				nic.out = append(nic.out, c)
			}
		}
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(nic.cfg.ID))
	nic.hash = h.Sum32()
}

// match says whether a rule allows a flow with the peer at addr; peer is its NIC, or nil.
func (c *rule) match(t *tuple, v6 bool, addr *wire.IP6, peer *NIC) bool {
	if !c.any && c.proto != t.proto {
		return false
	}
	if c.from != 0 || c.to != 0 {
		port := t.dport
		if t.proto == wire.ProtoICMP || t.proto == wire.ProtoICMPv6 {
			port = t.dport >> 8
		}
		if port < c.from || port > c.to {
			return false
		}
	}
	switch {
	case c.v4:
		return !v6 && c.p4.contains(wire.GetIP4(addr[12:]))
	case c.v6:
		return v6 && (c.p6.bits == 0 || c.p6.contains(addr))
	case c.group != "":
		if peer == nil {
			return false
		}
		for _, g := range peer.cfg.Groups {
			if g == c.group {
				return true
			}
		}
		return false
	}
	return true
}

// verdict says whether the rules of both ends allow a flow to begin: sender is nil for the uplink, and
// receiver too. bySender says whose rules refuse.
func verdict(t *tuple, v6 bool, sender, receiver *NIC) (ok, bySender bool) {
	if sender != nil && !sender.open && len(sender.out) > 0 {
		found := false
		for i := range sender.out {
			found = found || sender.out[i].match(t, v6, &t.dst, receiver)
		}
		if !found {
			return false, true
		}
	}
	if receiver != nil && !receiver.open {
		for i := range receiver.in {
			if receiver.in[i].match(t, v6, &t.src, sender) {
				return true, false
			}
		}
		return false, false
	}
	return true, false
}

// allowed judges a packet that would be forwarded by the security groups of its sender and its receiver,
// and counts it where it is refused.
func (r *Router) allowed(from, to *endpoint, p *Packet) bool {
	s, d := from.nic, to.nic
	if (s == nil || s.open) && (d == nil || d.open) {
		return true
	}
	ok, bySender := r.judge(s, d, p)
	if !ok {
		if bySender {
			from.TxDropped++
		} else {
			to.RxDropped++
		}
	}
	return ok
}

func (r *Router) judge(s, d *NIC, p *Packet) (ok, bySender bool) {
	in := &p.info
	now := uint32(r.now / 1e9)
	var t tuple
	p.tuple(&t)
	if !in.First {
		return r.frags.known(&t, in.FragID, now), false
	}
	ok, bySender = r.judgeFirst(s, d, p, &t, now)
	if ok && in.Fragment {
		r.frags.note(&t, in.FragID, now)
	}
	return ok, bySender
}

func (r *Router) judgeFirst(s, d *NIC, p *Packet, t *tuple, now uint32) (ok, bySender bool) {
	memo := &r.uplink.flow
	if s != nil {
		memo = &s.flow
	}
	in := &p.info
	echo := uint16(0)
	if in.Ports && (in.Proto == wire.ProtoICMP || in.Proto == wire.ProtoICMPv6) {
		switch typ := uint8(in.DstPort >> 8); {
		case isError(in.V6, typ):
			if r.related(p, now) {
				return true, false
			}
			return verdict(t, in.V6, s, d)
		case isEcho(in.V6, typ):
			// One flow for requests and replies: the identifier is the port of both ends.
			echo = in.DstPort
			t.dport = t.sport
		default:
			return verdict(t, in.V6, s, d)
		}
	}
	if r.flows == nil {
		return false, false
	}
	e, reply := r.flows.recall(memo, t, now)
	if e != nil && in.Proto == wire.ProtoTCP && in.TCPFlags&(tcpSYN|tcpACK) == tcpSYN && e.state.Load() == flowClosing {
		r.flows.drop(e) // the ports are used again
		e = nil
	}
	if e == nil {
		if echo != 0 {
			t.dport = echo // rules know types
			if isReply(in.V6, uint8(echo>>8)) {
				return verdict(t, in.V6, s, d) // a reply that nobody asked for
			}
		}
		if ok, bySender := verdict(t, in.V6, s, d); !ok {
			return false, bySender
		}
		if echo != 0 {
			t.dport = t.sport
		}
		if !r.flows.begins(in, now) {
			return false, false
		}
		payer := s
		if payer == nil || payer.open && d != nil {
			payer = d
		}
		if e = r.flows.add(t, payer.hash, now, r.rules); e == nil {
			return false, payer == s
		}
		e.note(in, false)
		return true, false
	}
	if e.gen != r.rules {
		// The rules have changed: would it be let through today?
		q := *t
		a, b := s, d
		if reply {
			q.src, q.dst, q.sport, q.dport = t.dst, t.src, t.dport, t.sport
			a, b = d, s
		}
		if echo != 0 {
			q.dport = requestType(in.V6)
		}
		if ok, bySender := verdict(&q, in.V6, a, b); !ok {
			r.flows.drop(e)
			return false, bySender != reply
		}
		e.gen = r.rules
	}
	e.seen = now
	e.note(in, reply)
	return true, false
}

// TCP flags.
const (
	tcpFIN = 1
	tcpSYN = 2
	tcpRST = 4
	tcpPSH = 8
	tcpACK = 16
	tcpCWR = 128
)

// note follows a flow's state.
func (e *flowEntry) note(in *wire.Info, reply bool) {
	switch {
	case in.Proto == wire.ProtoTCP && in.TCPFlags&(tcpFIN|tcpRST) != 0:
		e.state.Store(flowClosing)
	case reply && e.state.Load() == flowNew:
		e.state.Store(flowReplied)
	}
}

// tuple reads addresses and ports of a parsed packet.
func (p *Packet) tuple(t *tuple) {
	ip := p.Head[wire.EthLen:]
	t.proto, t.sport, t.dport = p.info.Proto, p.info.SrcPort, p.info.DstPort
	if p.info.V6 {
		copy(t.src[:], ip[8:24])
		copy(t.dst[:], ip[24:40])
		return
	}
	map4(&t.src, ip[12:16])
	map4(&t.dst, ip[16:20])
}

// map4 writes an IPv4 address as IPv6 has it (::ffff:0:0/96).
func map4(a *wire.IP6, b []byte) {
	*a = wire.IP6{10: 0xff, 11: 0xff}
	copy(a[12:], b)
}

// related says whether an ICMP error is about a flow that exists: the packet that it quotes says which.
func (r *Router) related(p *Packet, now uint32) bool {
	if r.flows == nil {
		return false
	}
	in := &p.info
	at := in.L4 + wire.ICMPLen
	var t tuple
	var l4 int
	h := p.Head
	if in.V6 {
		if at+wire.IPv6Len+4 > len(h) || h[at]>>4 != 6 {
			return false
		}
		t.proto, l4 = h[at+6], at+wire.IPv6Len
		copy(t.src[:], h[at+8:])
		copy(t.dst[:], h[at+24:])
	} else {
		if at+wire.IPv4MinLen > len(h) || h[at]>>4 != 4 {
			return false
		}
		t.proto, l4 = h[at+9], at+int(h[at]&15)*4
		map4(&t.src, h[at+12:at+16])
		map4(&t.dst, h[at+16:at+20])
	}
	if l4+8 > len(h) {
		return false
	}
	switch t.proto {
	case wire.ProtoTCP, wire.ProtoUDP:
		t.sport, t.dport = wire.Be16(h[l4:]), wire.Be16(h[l4+2:])
	case wire.ProtoICMP, wire.ProtoICMPv6:
		t.sport = wire.Be16(h[l4+4:])
		t.dport = t.sport
	}
	var outer tuple
	p.tuple(&outer)
	if outer.dst != t.src { // an error goes to whoever sent what it is about
		return false
	}
	e, _ := r.flows.find(&t, now)
	return e != nil
}

func isError(v6 bool, typ uint8) bool {
	if v6 {
		return typ < 128
	}
	return wire.ICMPIsError(typ)
}

func isEcho(v6 bool, typ uint8) bool {
	if v6 {
		return typ == wire.ICMP6Echo || typ == wire.ICMP6EchoReply
	}
	return typ == wire.ICMPEcho || typ == wire.ICMPEchoReply
}

func isReply(v6 bool, typ uint8) bool {
	return typ == wire.ICMP6EchoReply && v6 || typ == wire.ICMPEchoReply && !v6
}

func requestType(v6 bool) uint16 {
	if v6 {
		return wire.ICMP6Echo << 8
	}
	return wire.ICMPEcho << 8
}

// fragSlots bounds the fragmented packets whose later fragments may follow the first.
const fragSlots = 256

// fragTimeout is how long they may take, in seconds (RFC 8200 gives reassembly a minute; half is plenty here).
const fragTimeout = 30

// fragCache remembers first fragments that were let through.
type fragCache [fragSlots]struct {
	src, dst wire.IP6
	id       uint32
	proto    uint8
	seen     uint32
}

func fragSlot(t *tuple, id uint32) uint32 {
	h := id*2654435761 ^ wireHash(&t.src) ^ wireHash(&t.dst)*31
	return (h >> 8) % fragSlots
}

func wireHash(a *wire.IP6) uint32 {
	var h uint32 = 2166136261
	for _, b := range a {
		h = (h ^ uint32(b)) * 16777619
	}
	return h
}

func (c *fragCache) note(t *tuple, id, now uint32) {
	s := &c[fragSlot(t, id)]
	s.src, s.dst, s.id, s.proto, s.seen = t.src, t.dst, id, t.proto, now
}

func (c *fragCache) known(t *tuple, id, now uint32) bool {
	s := &c[fragSlot(t, id)]
	return s.src == t.src && s.dst == t.dst && s.id == id && s.proto == t.proto && now-s.seen <= fragTimeout
}
