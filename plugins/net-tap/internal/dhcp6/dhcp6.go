// Package dhcp6 is the DHCPv6 server (RFC 8415) for guests that each have exactly one address: stateful, a
// /128, with rapid commit; prefixes that are routed to a NIC are delegated to it on request.
//
// Like dhcp4 it is a function from one request to one reply, without state, and allocates nothing.
package dhcp6

import (
	"encoding/binary"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// UDP ports (RFC 8415, section 7.2).
const (
	ServerPort = 547
	ClientPort = 546
)

// Servers is ff02::1:2, All_DHCP_Relay_Agents_and_Servers.
var Servers = wire.IP6{0: 0xff, 1: 0x02, 13: 1, 15: 2}

// Type is a message type (RFC 8415, section 7.3).
type Type uint8

// Message types.
const (
	Solicit     Type = 1
	Advertise   Type = 2
	Request     Type = 3
	Confirm     Type = 4
	Renew       Type = 5
	Rebind      Type = 6
	Reply       Type = 7
	Release     Type = 8
	Decline     Type = 9
	InfoRequest Type = 11
)

// MaxReply is room enough for every reply: an IA_NA and an IA_PD of each of maxIA, and what is announced.
const MaxReply = 1280 - wire.IPv6Len - wire.UDPLen

// maxIA is how many identity associations of a request are answered.
const maxIA = 4

// MaxServers is how many DNS, and NTP, servers are announced.
const MaxServers = 8

// Prefix is a delegated prefix.
type Prefix struct {
	Addr wire.IP6
	Bits uint8
}

// Lease is what one NIC is told.
type Lease struct {
	Addr     wire.IP6
	MAC      wire.MAC // the gateway's, for the server's DUID
	DNS, NTP []wire.IP6
	Domain   []byte // in DNS wire format (RFC 1035, section 3.1), or nil
	Prefixes []Prefix
	Seconds  uint32
}

// Event is what a request means.
type Event uint8

// Events.
const (
	None Event = iota
	Bad
	Bound
	Declined
	Released
)

// Options (RFC 8415, section 24; RFC 3646; RFC 4075; RFC 5908).
const (
	optClientID    = 1
	optServerID    = 2
	optIANA        = 3
	optIAAddr      = 5
	optStatus      = 13
	optRapidCommit = 14
	optDNS         = 23
	optDomains     = 24
	optIAPD        = 25
	optIAPrefix    = 26
	optSNTP        = 31
	optNTP         = 56
)

// Status codes (RFC 8415, section 21.13).
const (
	statusOK        = 0
	statusNoAddrs   = 2
	statusNoBinding = 3
	statusNotOnLink = 4
	statusNoPrefix  = 6
)

// ia is an identity association of a request.
type ia struct {
	pd      bool
	id      [4]byte
	wants   bool // it names an address or prefix
	foreign bool // one of them is not this NIC's
}

type request struct {
	typ       Type
	client    []byte
	server    []byte
	rapid     bool
	ias       [maxIA]ia
	n         int
	declines  bool
	hasServer bool
}

// Serve reads the UDP payload req and writes the payload of the answer into out, which must hold MaxReply
// bytes; it returns its length, or 0 if there is nothing to say.
func Serve(req []byte, l *Lease, out []byte) (int, Event) {
	var r request
	if len(req) < 4 {
		return 0, Bad
	}
	r.typ = Type(req[0])
	if !r.parse(req[4:], l) {
		return 0, Bad
	}
	duid := duidOf(l.MAC)
	switch r.typ {
	case Solicit, Confirm, Rebind:
		if r.hasServer || r.client == nil {
			return 0, Bad
		}
	case Request, Renew, Release, Decline:
		if r.client == nil || string(r.server) != string(duid[:]) {
			return 0, Bad
		}
	case InfoRequest:
		if r.hasServer && string(r.server) != string(duid[:]) || r.n > 0 {
			return 0, Bad
		}
	default:
		return 0, Bad
	}
	w := writer{b: out[:4], most: min(len(out), MaxReply)}
	copy(out[1:4], req[1:4])
	out[0] = byte(Reply)
	w.bytes(optClientID, r.client)
	w.bytes(optServerID, duid[:])
	ev := None
	switch r.typ {
	case Solicit:
		if r.rapid {
			w.bytes(optRapidCommit, nil)
			ev = Bound
		} else {
			out[0] = byte(Advertise)
		}
		w.grant(&r, l)
	case Request:
		w.grant(&r, l)
		ev = Bound
	case Renew, Rebind:
		w.grant(&r, l)
		ev = Bound
	case Confirm:
		if !r.anyWanted() {
			return 0, Bad // RFC 8415, section 18.3.3: no addresses, no reply
		}
		w.status(statusFor(r.anyForeign(), statusNotOnLink))
	case Release:
		w.release(&r)
		ev = Released
	case Decline:
		w.release(&r)
		if r.declines {
			ev = Declined
		}
	}
	if r.typ != Confirm && r.typ != Release && r.typ != Decline {
		w.announce(l)
	}
	return len(w.b), ev
}

func statusFor(bad bool, code uint16) uint16 {
	if bad {
		return code
	}
	return statusOK
}

// duidOf is a DUID-LL (RFC 8415, section 11.4).
func duidOf(m wire.MAC) [10]byte {
	d := [10]byte{1: 3, 3: 1}
	m.Put(d[4:])
	return d
}

// parse reads the options; false if one overruns.
func (r *request) parse(o []byte, l *Lease) bool {
	for len(o) > 0 {
		if len(o) < 4 || len(o) < 4+int(wire.Be16(o[2:])) {
			return false
		}
		code, v := wire.Be16(o), o[4:4+int(wire.Be16(o[2:]))]
		o = o[4+len(v):]
		switch code {
		case optClientID:
			if len(v) < 3 || len(v) > 130 { // RFC 8415, section 11.1
				return false
			}
			r.client = v
		case optServerID:
			r.server, r.hasServer = v, true
		case optRapidCommit:
			r.rapid = true
		case optIANA, optIAPD:
			if len(v) < 12 {
				return false
			}
			if r.n < maxIA {
				a := &r.ias[r.n]
				r.n++
				a.pd = code == optIAPD
				copy(a.id[:], v)
				if !r.inner(a, v[12:], l) {
					return false
				}
			}
		}
	}
	return true
}

// inner reads the options inside an identity association.
func (r *request) inner(a *ia, o []byte, l *Lease) bool {
	for len(o) > 0 {
		if len(o) < 4 || len(o) < 4+int(wire.Be16(o[2:])) {
			return false
		}
		code, v := wire.Be16(o), o[4:4+int(wire.Be16(o[2:]))]
		o = o[4+len(v):]
		switch {
		case code == optIAAddr && !a.pd:
			if len(v) < 24 {
				return false
			}
			a.wants = true
			if wire.IP6(v[:16]) != l.Addr {
				a.foreign = true
			} else if r.typ == Decline {
				r.declines = true
			}
		case code == optIAPrefix && a.pd:
			if len(v) < 25 {
				return false
			}
			a.wants = true
			found := false
			for _, p := range l.Prefixes {
				found = found || p.Bits == v[8] && p.Addr == wire.IP6(v[9:25])
			}
			a.foreign = a.foreign || !found
		}
	}
	return true
}

func (r *request) anyWanted() bool {
	for _, a := range r.ias[:r.n] {
		if a.wants {
			return true
		}
	}
	return false
}

func (r *request) anyForeign() bool {
	for _, a := range r.ias[:r.n] {
		if a.foreign {
			return true
		}
	}
	return false
}

// writer appends options up to a limit.
type writer struct {
	b    []byte
	most int
}

func (w *writer) put(code uint16, n int) []byte {
	at := len(w.b)
	if at+4+n > w.most {
		return nil
	}
	w.b = w.b[:at+4+n]
	wire.PutBe16(w.b[at:], code)
	wire.PutBe16(w.b[at+2:], uint16(n))
	return w.b[at+4:]
}

func (w *writer) bytes(code uint16, v []byte) {
	if code == optClientID && v == nil {
		return
	}
	if b := w.put(code, len(v)); b != nil {
		copy(b, v)
	}
}

func (w *writer) status(code uint16) {
	if b := w.put(optStatus, 2); b != nil {
		wire.PutBe16(b, code)
	}
}

// begin starts an option whose length end fills in.
func (w *writer) begin(code uint16) int {
	if w.put(code, 0) == nil {
		return -1
	}
	return len(w.b)
}

func (w *writer) end(at int) {
	if at >= 0 {
		wire.PutBe16(w.b[at-2:], uint16(len(w.b)-at))
	}
}

// grant answers each identity association. On a renewal, addresses that are not the NIC's get a lifetime
// of 0 by being left out, and the right one is given in their stead.
func (w *writer) grant(r *request, l *Lease) {
	gaveAddr := false
	for i := range r.ias[:r.n] {
		a := &r.ias[i]
		code := uint16(optIANA)
		if a.pd {
			code = optIAPD
		}
		at := w.begin(code)
		if at < 0 || len(w.b)+12 > w.most {
			return
		}
		w.b = w.b[:at+12]
		copy(w.b[at:], a.id[:])
		binary.BigEndian.PutUint32(w.b[at+4:], l.Seconds/2)
		binary.BigEndian.PutUint32(w.b[at+8:], uint32(uint64(l.Seconds)*4/5))
		switch {
		case a.pd && len(l.Prefixes) > 0:
			for _, p := range l.Prefixes {
				if b := w.put(optIAPrefix, 25); b != nil {
					binary.BigEndian.PutUint32(b, l.Seconds)
					binary.BigEndian.PutUint32(b[4:], l.Seconds)
					b[8] = p.Bits
					copy(b[9:25], p.Addr[:])
				}
			}
		case a.pd:
			w.status(statusNoPrefix)
		case gaveAddr: // there is only one
			w.status(statusNoAddrs)
		default:
			gaveAddr = true
			if b := w.put(optIAAddr, 24); b != nil {
				copy(b, l.Addr[:])
				binary.BigEndian.PutUint32(b[16:], l.Seconds)
				binary.BigEndian.PutUint32(b[20:], l.Seconds)
			}
		}
		w.end(at)
	}
}

// release answers RELEASE and DECLINE.
func (w *writer) release(r *request) {
	w.status(statusOK)
	for i := range r.ias[:r.n] {
		a := &r.ias[i]
		if !a.foreign {
			continue
		}
		code := uint16(optIANA)
		if a.pd {
			code = optIAPD
		}
		at := w.begin(code)
		if at < 0 || len(w.b)+12 > w.most {
			return
		}
		w.b = w.b[:at+12]
		clear(w.b[at:])
		copy(w.b[at:], a.id[:])
		w.status(statusNoBinding)
		w.end(at)
	}
}

// announce adds what is told about the network.
func (w *writer) announce(l *Lease) {
	w.addrs(optDNS, l.DNS)
	if len(l.Domain) > 0 {
		w.bytes(optDomains, l.Domain)
	}
	w.addrs(optSNTP, l.NTP)
	if len(l.NTP) > 0 {
		if b := w.put(optNTP, 20*len(l.NTP)); b != nil {
			for i := range l.NTP {
				wire.PutBe16(b[20*i:], 1) // NTP_SUBOPTION_SRV_ADDR
				wire.PutBe16(b[20*i+2:], 16)
				copy(b[20*i+4:], l.NTP[i][:])
			}
		}
	}
}

func (w *writer) addrs(code uint16, as []wire.IP6) {
	if len(as) == 0 {
		return
	}
	if b := w.put(code, 16*len(as)); b != nil {
		for i := range as {
			copy(b[16*i:], as[i][:])
		}
	}
}
