package engine

import (
	"net/netip"
	"slices"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/dhcp4"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/dhcp6"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// LeaseSeconds is how long a DHCP lease lasts. Addresses never move between NICs that live, so the lease
// is only how fast a guest learns of changes; half of it is when it asks again.
const LeaseSeconds = 3600

// outMax is how many packets wait for one port within a burst: a packet and a reply to each of a burst.
const outMax = 2 * Burst

// scratchLen is the room of a packet that the engine makes itself: the longest is an ICMPv6 error (1280),
// or a DHCP reply.
const scratchLen = 1536

// endpoint is where packets go: a NIC or the uplink.
type endpoint struct {
	port Port
	nic  *NIC // nil for the uplink
	out  [outMax]*Packet
	n    int
	flow flowMemo
	Counters
}

// mac is the address on the link of what is there; the uplink has none.
func (e *endpoint) mac() wire.MAC {
	if e.nic == nil {
		return 0
	}
	return e.nic.cfg.MAC
}

// NIC is one NIC on the router.
type NIC struct {
	endpoint
	dst4    wire.IP4 // where the last packet went, and to whom: most have the same way
	to4     *NIC
	leg     endpoint // its port on the host's bridge, on a bridge network
	cfg     NICConfig
	ip4     wire.IP4 // 0: none
	ip6     wire.IP6
	has6    bool
	routed4 []prefix4
	routed6 []prefix6
	lease   dhcp4.Lease
	lease6  dhcp6.Lease
	errors  bucket // ICMP errors to this guest
	leased  bool
	decline bool
	nextRA  int64
	sentRA  int
	open    bool // in no security group
	in, out []rule
	hash    uint32 // of its id
}

type prefix4 struct{ addr, mask wire.IP4 }

func (p prefix4) contains(a wire.IP4) bool { return a&p.mask == p.addr }

// Router is the engine of one network.
type Router struct {
	net     Network
	mtu     int
	sub4    prefix4
	router4 wire.IP4 // the router's own address in the subnet, source of ICMP errors
	host4   wire.IP4 // host's address on the uplink, 0 if guests may not reach it
	has4    bool
	sub6    prefix6
	router6 wire.IP6
	has6    bool

	nics      map[string]*NIC
	fib4      fib4
	fib6      fib6
	groups    map[string]*Group
	rules     uint32 // counts changes of rules
	flows     *Flows
	frags     fragCache
	nextSweep int64
	uplink    endpoint
	now       int64 // nanoseconds, monotonic; set by Poll's caller

	burst   [Burst]Packet
	touched []*endpoint
	scratch [outMax]Packet
	used    int
	ipID    uint16
	upErrs  bucket
	linear  [2048]byte // one packet in one piece, for what is not forwarded
}

// New makes a router without NICs.
func New(n Network) *Router {
	r := &Router{nics: map[string]*NIC{}, touched: make([]*endpoint, 0, 64)}
	buf := make([]byte, outMax*scratchLen)
	for i := range r.scratch {
		r.scratch[i].Head = buf[i*scratchLen : (i+1)*scratchLen : (i+1)*scratchLen]
	}
	r.SetNetwork(n)
	return r
}

// SetNetwork changes the network's configuration under all NICs.
func (r *Router) SetNetwork(n Network) {
	r.net, r.mtu = n, n.MTU
	if r.mtu == 0 {
		r.mtu = 1500
	}
	r.has4 = n.Subnet4.IsValid()
	r.sub4, r.router4, r.host4 = prefix4{}, Gateway4, 0
	if r.has4 {
		r.sub4 = toPrefix4(n.Subnet4)
		r.router4 = wire.IP4Of(RouterAddr(n.Subnet4))
	}
	r.has6 = n.Subnet6.IsValid()
	r.sub6, r.router6 = prefix6{}, Gateway6
	if r.has6 {
		r.sub6 = toPrefix6(n.Subnet6)
		r.router6 = wire.IP6Of(RouterAddr(n.Subnet6))
	}
	for _, a := range n.HostAddrs {
		if a.Is4() {
			r.host4 = wire.IP4Of(a)
		}
	}
	for _, nic := range r.nics {
		r.configure(nic)
		nic.nextRA = 0 // guests are told at once
	}
}

// RouterAddr is the address in a subnet that the router has for itself: the first after the network's. It
// is never given to a NIC.
func RouterAddr(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// SetNIC adds a NIC or changes one in place; its port and counters stay.
func (r *Router) SetNIC(c NICConfig) {
	nic := r.nics[c.ID]
	if nic == nil {
		nic = &NIC{}
		nic.nic = nic
		r.nics[c.ID] = nic
	}
	moved := !sameAddrs(&nic.cfg, &c)
	if nic.cfg.Down && !c.Down {
		nic.nextRA, nic.sentRA = 0, 0 // its guest is told what it must know, as with a new driver
	}
	nic.cfg = c
	r.configure(nic)
	r.compile(nic)
	r.rules++
	if moved {
		r.rebuild()
	}
}

// sameAddrs says whether the forwarding table is the same for both.
func sameAddrs(a, b *NICConfig) bool {
	return a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6 && slices.Equal(a.Routed, b.Routed) && a.ID == b.ID
}

// DeleteNIC forgets a NIC and returns its port, if it had one, for the caller to close.
func (r *Router) DeleteNIC(id string) Port {
	nic := r.nics[id]
	if nic == nil {
		return nil
	}
	delete(r.nics, id)
	r.rebuild()
	p := nic.port
	nic.port = nil
	return p
}

// configure derives what the data path needs.
func (r *Router) configure(nic *NIC) {
	c := &nic.cfg
	nic.ip4, nic.ip6, nic.has6 = wire.IP4Of(c.IPv4), wire.IP6Of(c.IPv6), c.IPv6.IsValid()
	nic.routed4, nic.routed6 = nil, nil
	for _, p := range c.Routed {
		if p.Addr().Is4() {
			nic.routed4 = append(nic.routed4, toPrefix4(p))
		} else {
			nic.routed6 = append(nic.routed6, toPrefix6(p))
		}
	}
	nic.lease = dhcp4.Lease{Addr: nic.ip4, Gateway: Gateway4, MAC: c.MAC, DNS: list4(r.net.DNS),
		NTP: list4(r.net.NTP), Domain: r.net.Domain, HostName: c.HostName, MTU: uint16(r.mtu), Seconds: LeaseSeconds}
	nic.lease6 = dhcp6.Lease{Addr: nic.ip6, MAC: GatewayMAC, DNS: list6(r.net.DNS), NTP: list6(r.net.NTP),
		Domain: labels(r.net.Domain), Seconds: LeaseSeconds}
	for _, p := range nic.routed6 {
		nic.lease6.Prefixes = append(nic.lease6.Prefixes, dhcp6.Prefix{Addr: p.addr, Bits: uint8(p.bits)})
	}
}

func list6(as []netip.Addr) []wire.IP6 {
	var out []wire.IP6
	for _, a := range as {
		if a.Is6() && len(out) < dhcp6.MaxServers {
			out = append(out, wire.IP6Of(a))
		}
	}
	return out
}

func list4(as []netip.Addr) []wire.IP4 {
	var out []wire.IP4
	for _, a := range as {
		if a.Is4() && len(out) < dhcp4.MaxServers {
			out = append(out, wire.IP4Of(a))
		}
	}
	return out
}

// rebuild makes the forwarding table anew: NICs change seldom.
func (r *Router) rebuild() {
	for _, nic := range r.nics {
		nic.dst4, nic.to4 = 0, nil
	}
	r.fib4.reset(len(r.nics))
	r.fib6.reset(len(r.nics))
	for _, nic := range r.nics {
		if nic.ip4 != 0 {
			r.fib4.add(prefix4{nic.ip4, 0xffffffff}, nic)
		}
		for _, p := range nic.routed4 {
			r.fib4.add(p, nic)
		}
		if nic.has6 {
			r.fib6.add(prefix6{nic.ip6, 128}, nic)
		}
		for _, p := range nic.routed6 {
			r.fib6.add(p, nic)
		}
	}
}

// SetPort gives a NIC its port, nil for none, and returns the one it had. Counters begin at zero with a
// new port.
func (r *Router) SetPort(id string, p Port) (old Port, ok bool) {
	nic := r.nics[id]
	if nic == nil {
		return nil, false
	}
	old, nic.port = nic.port, p
	if p != nil {
		nic.Counters = Counters{}
	}
	nic.leased, nic.decline = false, false
	nic.nextRA, nic.sentRA = 0, 0
	return old, true
}

// Port is a NIC's port, or nil.
func (r *Router) Port(id string) Port {
	if nic := r.nics[id]; nic != nil {
		return nic.port
	}
	return nil
}

// Restart forgets what a NIC's guest was told: another driver is at the other end.
func (r *Router) Restart(id string) {
	if nic := r.nics[id]; nic != nil {
		nic.leased, nic.decline = false, false
		nic.nextRA, nic.sentRA = 0, 0
	}
}

// SetUplink gives the router its uplink, nil for none, and returns the one it had.
func (r *Router) SetUplink(p Port) (old Port) {
	old, r.uplink.port = r.uplink.port, p
	return old
}

// Status is what is told about one NIC.
type Status struct {
	Counters
	Attached bool
	Leased   bool // DHCP gave it its address since it was attached
	Declined bool // the guest refused its address
}

// Status tells about one NIC; false if there is none.
func (r *Router) Status(id string) (Status, bool) {
	nic := r.nics[id]
	if nic == nil {
		return Status{}, false
	}
	return Status{Counters: nic.Counters, Attached: nic.port != nil, Leased: nic.leased, Declined: nic.decline}, true
}

// Each calls f for every NIC.
func (r *Router) Each(f func(id string, s Status)) {
	for id := range r.nics {
		s, _ := r.Status(id)
		f(id, s)
	}
}

// PollNIC moves one burst from a NIC and says how many packets it held. now is a monotonic time.
func (r *Router) PollNIC(nic *NIC, now int64) int {
	if nic == nil || nic.port == nil {
		return 0
	}
	r.now = now
	n := nic.port.Receive(r.burst[:])
	for i := range n {
		r.fromNIC(nic, &r.burst[i])
	}
	if n > 0 {
		r.flush()
		nic.port.Release()
	}
	return n
}

// PollUplink is the same for the uplink.
func (r *Router) PollUplink(now int64) int {
	if r.uplink.port == nil {
		return 0
	}
	r.now = now
	n := r.uplink.port.Receive(r.burst[:])
	for i := range n {
		r.fromUplink(&r.burst[i])
	}
	if n > 0 {
		r.flush()
		r.uplink.port.Release()
	}
	return n
}

// NIC finds a NIC for PollNIC; nil if there is none.
func (r *Router) NIC(id string) *NIC { return r.nics[id] }

// fromNIC judges one frame that a guest sent.
func (r *Router) fromNIC(nic *NIC, p *Packet) {
	nic.TxPackets++
	nic.TxBytes += uint64(p.Len)
	if len(p.Head) < wire.EthLen || nic.cfg.Down {
		nic.TxDropped++
		return
	}
	if wire.GetMAC(p.Head[6:]) != nic.cfg.MAC {
		nic.TxSpoofed++
		return
	}
	if r.net.Bridged {
		r.toBridge(nic, p)
		return
	}
	dst := wire.GetMAC(p.Head)
	if dst != GatewayMAC && !dst.Group() {
		nic.TxDropped++ // somebody else's MAC: there is nobody else
		return
	}
	switch wire.Be16(p.Head[12:]) {
	case wire.TypeIPv4:
		r.guest4(nic, p, dst)
	case wire.TypeIPv6:
		r.guest6(nic, p, dst)
	case wire.TypeARP:
		r.guestARP(nic, p)
	default:
		nic.TxDropped++
	}
}

// Down says whether the link was taken down.
func (nic *NIC) Down() bool { return nic.cfg.Down }

// linkOnly says whether a packet is what only a link's own servers, routers and neighbours say to each other:
// sent to a neighbour's address it would be routed there, and is not.
func linkOnly(in *wire.Info) bool {
	if !in.Ports {
		return false
	}
	switch t := in.DstPort >> 8; in.Proto {
	case wire.ProtoUDP:
		return in.SrcPort == dhcp4.ServerPort && in.DstPort == dhcp4.ClientPort && !in.V6 ||
			in.SrcPort == dhcp6.ServerPort && in.DstPort == dhcp6.ClientPort && in.V6
	case wire.ProtoICMP:
		return t == wire.ICMPRedirect
	case wire.ProtoICMPv6:
		return t >= wire.ICMP6RS && t <= wire.ICMP6Redirect
	}
	return false
}

// fromUplink judges one packet that came from outside.
func (r *Router) fromUplink(p *Packet) {
	if len(p.Head) > wire.EthLen {
		switch p.Head[wire.EthLen] >> 4 {
		case 4:
			r.outside4(p)
			return
		case 6:
			r.outside6(p)
			return
		}
	}
	r.uplink.TxDropped++
}

// send queues p for e; it leaves with the next flush.
func (r *Router) send(e *endpoint, p *Packet) {
	if e.port == nil || e.nic != nil && e.nic.cfg.Down {
		e.RxDropped++
		return
	}
	if e.n == len(e.out) {
		r.flushOne(e)
	}
	if e.n == 0 {
		r.touched = append(r.touched, e)
	}
	e.out[e.n] = p
	e.n++
}

func (r *Router) flushOne(e *endpoint) {
	took, bytes := e.port.Transmit(e.out[:e.n])
	e.RxPackets += uint64(took)
	e.RxBytes += uint64(bytes)
	e.RxDropped += uint64(e.n - took)
	e.n = 0
}

func (r *Router) flush() {
	for _, e := range r.touched {
		if e.n > 0 {
			r.flushOne(e)
		}
	}
	r.touched = r.touched[:0]
	r.used = 0
}

// fresh is an empty packet of the engine's own, with room for scratchLen bytes in Head.
func (r *Router) fresh() *Packet {
	if r.used == len(r.scratch) {
		r.flush()
	}
	p := &r.scratch[r.used]
	r.used++
	p.Head, p.Tail, p.Len, p.Offload = p.Head[:cap(p.Head)], nil, 0, Offload{}
	return p
}

// done sets a fresh packet's length.
func (p *Packet) done(n int) *Packet {
	p.Head, p.Len = p.Head[:n], n
	return p
}

// bucket limits a rate (ICMP errors): at most burst at once, refilled at rate a second.
type bucket struct {
	tokens float64
	last   int64
}

// Limits of ICMP errors to one guest, and to the outside altogether: enough for traceroute and path MTU
// discovery, too few to be an amplifier (RFC 1812, section 4.3.2.8; Linux allows 1000/s a host).
const (
	errorRate  = 100
	errorBurst = 50
)

func (b *bucket) take(now int64) bool {
	if b.last == 0 {
		b.tokens = errorBurst
	} else {
		b.tokens = min(errorBurst, b.tokens+float64(now-b.last)*errorRate/1e9)
	}
	b.last = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// Recover makes the router usable after a panic in a poll: what was under way is dropped.
func (r *Router) Recover() {
	for _, e := range r.touched {
		e.n = 0
	}
	r.touched, r.used = r.touched[:0], 0
}
