// Package dhcp4 is the DHCPv4 server (RFC 2131, RFC 2132) for guests that each have exactly one address
// and a gateway that is link-local: a lease is a /32, the gateway is reached by a host route (option 121,
// RFC 3442).
//
// It is a function from one request to one reply, without state: the lease is what the NIC says. Requests
// come from guests, so every length is checked; nothing is allocated.
package dhcp4

import (
	"encoding/binary"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// UDP ports (RFC 2131, section 4.1).
const (
	ServerPort = 67
	ClientPort = 68
)

// Type is a DHCP message type (option 53).
type Type uint8

// Message types.
const (
	Discover Type = 1
	Offer    Type = 2
	Request  Type = 3
	Decline  Type = 4
	ACK      Type = 5
	NAK      Type = 6
	Release  Type = 7
	Inform   Type = 8
)

// Limits on what a lease announces, so that a reply always fits into a frame.
const (
	MaxServers = 8 // DNS, and NTP
	MaxReply   = 1024
)

// Lease is what one NIC is told.
type Lease struct {
	Addr     wire.IP4
	Gateway  wire.IP4 // router and server identifier
	MAC      wire.MAC
	DNS, NTP []wire.IP4
	Domain   string
	HostName string
	MTU      uint16
	Seconds  uint32 // lease time; renewal at 1/2, rebinding at 7/8
}

// Reply says how to send the message that Serve wrote.
type Reply struct {
	Len       int
	Type      Type
	Dst       wire.IP4
	Broadcast bool // to ff:ff:ff:ff:ff:ff, else to the lease's MAC
}

// Event is what a request means to the owner of the lease, whether answered or not.
type Event uint8

// Events.
const (
	None     Event = iota
	Bad            // not a DHCP request that this server could answer
	Bound          // the guest has its address
	Refused        // the guest wanted an address that is not its own
	Declined       // the guest says that somebody else uses its address
	Released
)

// Offsets in the fixed part (RFC 2131, figure 1).
const (
	offXID    = 4
	offFlags  = 10
	offCIAddr = 12
	offYIAddr = 16
	offSIAddr = 20
	offGIAddr = 24
	offCHAddr = 28
	offSName  = 44
	offFile   = 108
	offCookie = 236
	offOpts   = 240
)

const cookie = 0x63825363

// Options (RFC 2132, and RFC 3397, RFC 3442 for the last two).
const (
	optPad       = 0
	optMask      = 1
	optRouter    = 3
	optDNS       = 6
	optHostName  = 12
	optDomain    = 15
	optMTU       = 26
	optNTP       = 42
	optRequested = 50
	optLease     = 51
	optOverload  = 52
	optType      = 53
	optServer    = 54
	optMaxSize   = 57
	optT1        = 58
	optT2        = 59
	optClientID  = 61
	optRoutes    = 121
	optEnd       = 255
)

// request is what is read from a message.
type request struct {
	typ                Type
	ciaddr, requested  wire.IP4
	server             wire.IP4
	hasServer, hasAddr bool
	clientID           []byte
	maxSize            int
	overload           byte
}

// Serve reads the UDP payload req and writes the payload of the answer into out, which must hold MaxReply
// bytes. Reply.Len is 0 if there is nothing to send.
func Serve(req []byte, l *Lease, out []byte) (Reply, Event) {
	var r request
	if !r.parse(req, l.MAC) {
		return Reply{}, Bad
	}
	switch r.typ {
	case Discover:
		return r.answer(req, l, out, Offer), None
	case Request:
		want := r.requested
		switch {
		case r.hasServer && r.server != l.Gateway:
			return Reply{}, None // the guest chose another server's offer: there is none, but it may believe so
		case !r.hasAddr:
			want = r.ciaddr // RENEWING, REBINDING
		}
		if want != l.Addr || r.ciaddr != 0 && r.ciaddr != l.Addr {
			return r.nak(req, l, out), Refused
		}
		return r.answer(req, l, out, ACK), Bound
	case Decline:
		if r.requested == l.Addr {
			return Reply{}, Declined
		}
	case Release:
		if r.ciaddr == l.Addr {
			return Reply{}, Released
		}
	case Inform:
		if r.ciaddr == l.Addr {
			return r.answer(req, l, out, ACK), None
		}
	}
	return Reply{}, Bad
}

// parse fills r; false if the message is none that a server has to look at.
func (r *request) parse(b []byte, mac wire.MAC) bool {
	if len(b) < offOpts || b[0] != 1 || b[1] != 1 || b[2] != 6 ||
		binary.BigEndian.Uint32(b[offCookie:]) != cookie ||
		wire.GetMAC(b[offCHAddr:]) != mac ||
		wire.GetIP4(b[offGIAddr:]) != 0 { // a relay inside a guest is not ours to serve
		return false
	}
	r.ciaddr = wire.GetIP4(b[offCIAddr:])
	r.maxSize = 576
	if !r.options(b[offOpts:]) {
		return false
	}
	// Option 52: options go on in the file field, then in sname (RFC 2131, section 4.1).
	if o := r.overload; o&1 != 0 && !r.options(b[offFile:offCookie]) {
		return false
	}
	if o := r.overload; o&2 != 0 && !r.options(b[offSName:offFile]) {
		return false
	}
	return r.typ != 0
}

// options reads one options field; false if an option overruns it.
func (r *request) options(o []byte) bool {
	for len(o) > 0 && o[0] != optEnd {
		if o[0] == optPad {
			o = o[1:]
			continue
		}
		if len(o) < 2 || len(o) < 2+int(o[1]) {
			return false
		}
		v := o[2 : 2+int(o[1])]
		switch o[0] {
		case optType:
			if len(v) != 1 {
				return false
			}
			r.typ = Type(v[0])
		case optRequested:
			if len(v) != 4 {
				return false
			}
			r.requested, r.hasAddr = wire.GetIP4(v), true
		case optServer:
			if len(v) != 4 {
				return false
			}
			r.server, r.hasServer = wire.GetIP4(v), true
		case optMaxSize:
			if len(v) == 2 {
				r.maxSize = max(576, int(wire.Be16(v)))
			}
		case optClientID:
			r.clientID = v
		case optOverload:
			if len(v) == 1 {
				r.overload = v[0]
			}
		}
		o = o[2+len(v):]
	}
	return true
}

// begin writes the fixed part of a reply.
func (r *request) begin(req []byte, l *Lease, out []byte) writer {
	clear(out[:offOpts])
	out[0], out[1], out[2] = 2, 1, 6
	copy(out[offXID:], req[offXID:offXID+4])
	copy(out[offFlags:], req[offFlags:offFlags+2])
	copy(out[offCHAddr:offCHAddr+16], req[offCHAddr:offCHAddr+16])
	binary.BigEndian.PutUint32(out[offCookie:], cookie)
	// The size limit counts IP and UDP headers; one byte stays for the end option.
	most := min(r.maxSize-wire.IPv4MinLen-wire.UDPLen, MaxReply, len(out)) - 1
	return writer{b: out[:offOpts], most: most}
}

// answer writes an OFFER or ACK. Options are put in the order of need: what does not fit is left out.
func (r *request) answer(req []byte, l *Lease, out []byte, t Type) Reply {
	w := r.begin(req, l, out)
	inform := r.typ == Inform
	w.u8(optType, uint8(t))
	w.ip(optServer, l.Gateway)
	if !inform {
		l.Addr.Put(out[offYIAddr:])
		w.u32(optLease, l.Seconds)
		w.u32(optT1, l.Seconds/2)
		w.u32(optT2, uint32(uint64(l.Seconds)*7/8))
	}
	if t == ACK && r.ciaddr != 0 {
		r.ciaddr.Put(out[offCIAddr:])
	}
	w.ip(optMask, 0xffffffff)
	w.ip(optRouter, l.Gateway)
	w.routes(l.Gateway)
	if l.MTU >= 68 {
		w.u16(optMTU, l.MTU)
	}
	w.ips(optDNS, l.DNS)
	w.str(optHostName, l.HostName)
	w.bytes(optClientID, r.clientID) // RFC 6842
	w.ips(optNTP, l.NTP)
	w.str(optDomain, l.Domain)
	rep := Reply{Type: t, Dst: l.Addr, Len: w.end()}
	if r.ciaddr == 0 && req[offFlags]&0x80 != 0 {
		rep.Dst, rep.Broadcast = 0xffffffff, true
	}
	return rep
}

// nak writes a NAK, which always goes to everybody on the link: the guest has no address.
func (r *request) nak(req []byte, l *Lease, out []byte) Reply {
	w := r.begin(req, l, out)
	w.u8(optType, uint8(NAK))
	w.ip(optServer, l.Gateway)
	w.bytes(optClientID, r.clientID)
	return Reply{Type: NAK, Dst: 0xffffffff, Broadcast: true, Len: w.end()}
}

// writer appends options up to a limit.
type writer struct {
	b    []byte
	most int
}

// put makes room for an option of n bytes; nil if it is empty, too long or does not fit.
func (w *writer) put(code byte, n int) []byte {
	at := len(w.b)
	if n == 0 || n > 255 || at+2+n > w.most {
		return nil
	}
	w.b = w.b[:at+2+n]
	w.b[at], w.b[at+1] = code, byte(n)
	return w.b[at+2:]
}

func (w *writer) u8(code byte, v uint8) {
	if b := w.put(code, 1); b != nil {
		b[0] = v
	}
}

func (w *writer) u16(code byte, v uint16) {
	if b := w.put(code, 2); b != nil {
		wire.PutBe16(b, v)
	}
}

func (w *writer) u32(code byte, v uint32) {
	if b := w.put(code, 4); b != nil {
		binary.BigEndian.PutUint32(b, v)
	}
}

func (w *writer) ip(code byte, v wire.IP4) { w.u32(code, uint32(v)) }

func (w *writer) ips(code byte, v []wire.IP4) {
	if b := w.put(code, 4*len(v)); b != nil {
		for i, a := range v {
			a.Put(b[4*i:])
		}
	}
}

func (w *writer) str(code byte, s string) {
	if b := w.put(code, len(s)); b != nil {
		copy(b, s)
	}
}

func (w *writer) bytes(code byte, v []byte) {
	if b := w.put(code, len(v)); b != nil {
		copy(b, v)
	}
}

// routes writes option 121: the gateway is on the link, everything else behind it.
func (w *writer) routes(gw wire.IP4) {
	if b := w.put(optRoutes, 9+5); b != nil {
		b[0] = 32
		gw.Put(b[1:])
		wire.IP4(0).Put(b[5:])
		b[9] = 0
		gw.Put(b[10:])
	}
}

// end writes the end option and pads to BOOTP's minimum of 300 bytes, which some clients insist on.
func (w *writer) end() int {
	n := len(w.b)
	b := w.b[:max(n+1, 300)]
	clear(b[n:])
	b[n] = optEnd
	return len(b)
}
