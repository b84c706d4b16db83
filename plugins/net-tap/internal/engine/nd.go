package engine

import (
	"encoding/binary"
	"hash/fnv"
	"math"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// Router advertisement timing (RFC 4861, section 6.2.1 and 10): a few soon after a guest appears, then now
// and then. The lifetime outlasts two that are lost.
const (
	raInitial      = 3
	raInitialEvery = 16e9
	raEveryMin     = 200e9
	raEverySpread  = 400e9
	raLifetime     = 1800 // seconds
)

// ND option types (RFC 4861, RFC 8106).
const (
	optSourceLL = 1
	optTargetLL = 2
	optMTU      = 5
	optRDNSS    = 25
	optDNSSL    = 31
)

// neighbour handles neighbour discovery: it answers for the gateway only, and advertises it. Messages are
// believed only if they cannot have been forwarded (hop limit 255) and their checksum is right.
func (r *Router) neighbour(nic *NIC, p *Packet, typ uint8, src *wire.IP6) {
	in := &p.info
	n := p.Copy(r.linear[:])
	if n != p.Len || p.Head[wire.EthLen+7] != 255 || in.DstPort&255 != 0 {
		nic.TxDropped++
		return
	}
	ip, m := r.linear[wire.EthLen:n], r.linear[in.L4:n]
	if p.Flags&NeedsCsum == 0 && wire.Fold(wire.Sum(wire.PseudoSum6(ip[8:], wire.ProtoICMPv6, len(m)), m)) != 0 {
		nic.TxDropped++
		return
	}
	need := 8
	if typ != wire.ICMP6RS {
		need = 24
	}
	if typ == wire.ICMP6RA || typ == wire.ICMP6Redirect {
		nic.TxSpoofed++ // a guest is no router
		return
	}
	if len(m) < need {
		nic.TxDropped++
		return
	}
	mac, ok := linkLayer(m[need:])
	if !ok {
		nic.TxDropped++
		return
	}
	if mac != 0 && mac != nic.cfg.MAC {
		nic.TxSpoofed++
		return
	}
	switch typ {
	case wire.ICMP6RS:
		if nic.errors.take(r.now) {
			dst, to := src, nic.cfg.MAC
			if src.Unspecified() {
				dst, to = &allNodes, allNodesMAC
			}
			r.advertise(nic, dst, to)
		}
	case wire.ICMP6NA:
		if t := (*wire.IP6)(m[8:24]); !t.LinkLocal() && !nic.owns6(t) || *t == Gateway6 {
			nic.TxSpoofed++
		}
	case wire.ICMP6NS:
		if *(*wire.IP6)(m[8:24]) != Gateway6 {
			return // address detection of its own, or a search for a neighbour: nobody else is here
		}
		q := r.fresh()
		ip := q.Head[wire.EthLen:]
		dst, to, flags := *src, nic.cfg.MAC, byte(0xe0) // router, solicited, override
		if src.Unspecified() {                          // the guest would like the gateway's address
			dst, to, flags = allNodes, allNodesMAC, 0xa0
		}
		a := ip[wire.IPv6Len:]
		clear(a[:32])
		a[0], a[4] = wire.ICMP6NA, flags
		copy(a[8:], Gateway6[:])
		a[24], a[25] = optTargetLL, 1
		GatewayMAC.Put(a[26:])
		wire.PutEth(q.Head, to, GatewayMAC, wire.TypeIPv6)
		wire.PutIPv6(ip, &Gateway6, &dst, wire.ProtoICMPv6, 255, 32)
		wire.SumICMPv6(ip, 32)
		r.send(&nic.endpoint, q.done(wire.EthLen+wire.IPv6Len+32))
	}
}

// linkLayer finds a link-layer address option; 0 if there is none. ok is false if an option is malformed.
func linkLayer(o []byte) (m wire.MAC, ok bool) {
	for len(o) > 0 {
		if len(o) < 8 || o[1] == 0 || int(o[1])*8 > len(o) {
			return 0, false
		}
		if o[0] == optSourceLL || o[0] == optTargetLL {
			if o[1] != 1 {
				return 0, false
			}
			m = wire.GetMAC(o[2:])
		}
		o = o[int(o[1])*8:]
	}
	return m, true
}

// advertise sends a router advertisement: the gateway, addresses by DHCPv6 (M and O), MTU, DNS.
func (r *Router) advertise(nic *NIC, dst *wire.IP6, mac wire.MAC) {
	q := r.fresh()
	ip := q.Head[wire.EthLen:]
	a := ip[wire.IPv6Len:]
	clear(a[:16])
	a[0] = wire.ICMP6RA
	a[4] = 64   // hop limit
	a[5] = 0xc0 // M, O
	wire.PutBe16(a[6:], raLifetime)
	n := 16
	opt := func(typ byte, size int) []byte {
		b := a[n : n+size]
		clear(b)
		b[0], b[1] = typ, byte(size/8)
		n += size
		return b
	}
	GatewayMAC.Put(opt(optSourceLL, 8)[2:])
	binary.BigEndian.PutUint32(opt(optMTU, 8)[4:], uint32(r.mtu))
	if dns := nic.lease6.DNS; len(dns) > 0 {
		b := opt(optRDNSS, 8+16*len(dns))
		binary.BigEndian.PutUint32(b[4:], raLifetime)
		for i := range dns {
			copy(b[8+16*i:], dns[i][:])
		}
	}
	if d := nic.lease6.Domain; len(d) > 0 {
		b := opt(optDNSSL, 8+(len(d)+7)&^7)
		binary.BigEndian.PutUint32(b[4:], raLifetime)
		copy(b[8:], d)
	}
	wire.PutEth(q.Head, mac, GatewayMAC, wire.TypeIPv6)
	wire.PutIPv6(ip, &Gateway6, dst, wire.ProtoICMPv6, 255, n)
	wire.SumICMPv6(ip, n)
	r.send(&nic.endpoint, q.done(wire.EthLen+wire.IPv6Len+n))
}

// Tick does what is due by the clock, and says when it wants to be called next.
func (r *Router) Tick(now int64) (next int64) {
	next = math.MaxInt64
	if r.flows != nil {
		if now >= r.nextSweep {
			r.flows.sweep(uint32(now / 1e9))
			r.nextSweep = now + sweepEvery
			if r.flows.Len() == 0 {
				r.nextSweep = now + sweepIdle
			}
		}
		next = r.nextSweep
	}
	if !r.has6 {
		return next
	}
	r.now = now
	for _, nic := range r.nics {
		if nic.port == nil || !nic.has6 {
			continue
		}
		if now >= nic.nextRA {
			r.advertise(nic, &allNodes, allNodesMAC)
			nic.sentRA++
			nic.nextRA = now + raInitialEvery
			if nic.sentRA >= raInitial {
				// Spread by the NIC, so that thousands do not speak at once.
				h := fnv.New32a()
				_, _ = h.Write([]byte(nic.cfg.ID))
				nic.nextRA = now + raEveryMin + int64(h.Sum32())*raEverySpread/math.MaxUint32
			}
		}
		next = min(next, nic.nextRA)
	}
	r.flush()
	return next
}

// labels writes a domain name in DNS wire format (RFC 1035, section 3.1).
func labels(domain string) []byte {
	if domain == "" {
		return nil
	}
	var out []byte
	start := 0
	for i := 0; i <= len(domain); i++ {
		if i == len(domain) || domain[i] == '.' {
			out = append(out, byte(i-start))
			out = append(out, domain[start:i]...)
			start = i + 1
		}
	}
	return append(out, 0)
}
