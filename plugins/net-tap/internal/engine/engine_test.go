package engine

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// fakePort is a port whose other side is the test.
type fakePort struct {
	rx  []Packet // to be received by the engine
	tx  [][]byte // sent by the engine
	off []Offload
	max int // takes no more than that; 0: all
}

func (f *fakePort) Receive(pkts []Packet) int {
	n := min(len(pkts), len(f.rx))
	copy(pkts, f.rx[:n])
	f.rx = f.rx[n:]
	return n
}

func (f *fakePort) Release() {}

func (f *fakePort) Transmit(pkts []*Packet) (packets, bytes int) {
	for _, p := range pkts {
		if f.max > 0 && len(f.tx) >= f.max {
			break
		}
		b := make([]byte, p.Len)
		if p.Copy(b) != p.Len {
			panic("a packet is longer than its parts")
		}
		f.tx = append(f.tx, b)
		f.off = append(f.off, p.Offload)
		packets++
		bytes += p.Len
	}
	return
}

// put queues a frame, cut into parts behind cut bytes if cut is not 0.
func (f *fakePort) put(frame []byte, cut int, o Offload) {
	var p Packet
	b := bytes.Clone(frame)
	p.Set(b)
	if cut > 0 && cut < len(b) {
		p.Head, p.Tail = b[:cut:cut], [][]byte{b[cut:]}
	}
	p.Offload = o
	f.rx = append(f.rx, p)
}

const (
	macA, macB = wire.MAC(0x525400000002), wire.MAC(0x525400000003)
	macC       = wire.MAC(0x525400000004)
)

func ip(s string) wire.IP4 { return wire.IP4Of(netip.MustParseAddr(s)) }

// world is two guests, and an uplink with the outside behind it.
type world struct {
	t    testing.TB
	r    *Router
	a, b *fakePort
	up   *fakePort
	now  int64
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, a: &fakePort{}, b: &fakePort{}, up: &fakePort{}, now: 1e9}
	w.r = New(Network{Subnet4: netip.MustParsePrefix("10.0.0.0/24"), MTU: 1500, DNS: []netip.Addr{netip.MustParseAddr("1.1.1.1")},
		HostAddrs: []netip.Addr{netip.MustParseAddr("169.254.64.0")}})
	w.r.SetNIC(NICConfig{ID: "a", MAC: macA, IPv4: netip.MustParseAddr("10.0.0.2"),
		Routed: []netip.Prefix{netip.MustParsePrefix("192.168.7.0/24")}})
	w.r.SetNIC(NICConfig{ID: "b", MAC: macB, IPv4: netip.MustParseAddr("10.0.0.3"), HostName: "b"})
	w.r.SetNIC(NICConfig{ID: "off", MAC: macC, IPv4: netip.MustParseAddr("10.0.0.4")}) // not attached
	w.r.SetPort("a", w.a)
	w.r.SetPort("b", w.b)
	w.r.SetUplink(w.up)
	return w
}

// poll lets everything that was queued through.
func (w *world) poll() {
	for len(w.a.rx)+len(w.b.rx)+len(w.up.rx) > 0 {
		w.r.PollNIC(w.r.NIC("a"), w.now)
		w.r.PollNIC(w.r.NIC("b"), w.now)
		w.r.PollUplink(w.now)
	}
}

func (w *world) clear() {
	w.a.tx, w.b.tx, w.up.tx, w.a.off, w.b.off, w.up.off = nil, nil, nil, nil, nil, nil
}

type v4 struct {
	src, dst string
	smac     wire.MAC
	dmac     wire.MAC
	proto    uint8
	ttl      uint8
	flags    uint16 // fragment field
	options  []byte
	payload  []byte // behind the IP header
	pad      int
	badSum   bool
}

func (p v4) frame() []byte {
	if p.smac == 0 {
		p.smac = macA
	}
	if p.dmac == 0 {
		p.dmac = GatewayMAC
	}
	if p.ttl == 0 {
		p.ttl = 64
	}
	if p.proto == 0 {
		p.proto = wire.ProtoUDP
	}
	if p.payload == nil {
		p.payload = udp(1000, 2000, 20)
	}
	hl := 20 + len(p.options)
	f := make([]byte, 14+hl+len(p.payload)+p.pad)
	wire.PutEth(f, p.dmac, p.smac, wire.TypeIPv4)
	wire.PutIPv4(f[14:], ip(p.src), ip(p.dst), p.proto, p.ttl, 77, hl-20+len(p.payload))
	f[14] = 0x40 | byte(hl/4)
	copy(f[34:], p.options)
	wire.PutBe16(f[20:], p.flags)
	wire.PutBe16(f[24:], 0)
	wire.PutBe16(f[24:], wire.Checksum(f[14:14+hl]))
	if p.badSum {
		f[24]++
	}
	copy(f[14+hl:], p.payload)
	return f
}

func udp(sport, dport uint16, n int) []byte {
	b := make([]byte, 8+n)
	wire.PutBe16(b, sport)
	wire.PutBe16(b[2:], dport)
	wire.PutBe16(b[4:], uint16(len(b)))
	return b
}

func echo(typ uint8, n int) []byte {
	b := make([]byte, 8+n)
	b[0] = typ
	b[5] = 9
	for i := range n {
		b[8+i] = byte(i)
	}
	wire.PutBe16(b[2:], wire.Checksum(b))
	return b
}

func arp(op uint16, smac wire.MAC, sip, tip string) []byte {
	f := make([]byte, 60)
	wire.PutEth(f, wire.Broadcast, macA, wire.TypeARP)
	a := wire.ARP{Op: op, SenderMAC: smac, SenderIP: ip(sip), TargetIP: ip(tip)}
	a.Put(f[14:])
	return f
}

// say describes a frame in a few words.
func say(f []byte) string {
	var in wire.Info
	switch wire.Be16(f[12:]) {
	case wire.TypeARP:
		a, _ := wire.ParseARP(f[14:])
		return fmt.Sprintf("arp %d %v is %v", a.Op, a.SenderIP.Addr(), a.SenderMAC)
	case wire.TypeIPv4:
		if p := wire.ParseIPv4(f, len(f), &in); p != wire.OK {
			return fmt.Sprintf("bad ipv4 %d", p)
		}
		s := fmt.Sprintf("%v > %v ttl %d", wire.GetIP4(f[26:]).Addr(), wire.GetIP4(f[30:]).Addr(), f[22])
		if in.Fragment {
			s += fmt.Sprintf(" fragment %d+%d", int(wire.Be16(f[20:])&0x1fff)*8, in.End-in.L4)
		}
		if in.Proto == wire.ProtoICMP && in.Ports {
			if wire.Checksum(f[in.L4:in.End]) != 0 {
				s += " bad sum"
			}
			return s + fmt.Sprintf(" icmp %d/%d", in.DstPort>>8, in.DstPort&255)
		}
		return s + fmt.Sprintf(" proto %d", in.Proto)
	}
	return "?"
}

func saySome(fs [][]byte) string {
	s := ""
	for _, f := range fs {
		s += say(f) + "\n"
	}
	return s
}

func TestFromGuest(t *testing.T) {
	gw := "169.254.0.1"
	tests := []struct {
		name     string
		frame    []byte
		a, b, up string // what comes out, one line a frame
		spoofed  uint64
		dropped  uint64
	}{
		{name: "to another guest", frame: v4{src: "10.0.0.2", dst: "10.0.0.3"}.frame(), b: "10.0.0.2 > 10.0.0.3 ttl 63 proto 17\n"},
		{name: "padding is cut off", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", pad: 9}.frame(), b: "10.0.0.2 > 10.0.0.3 ttl 63 proto 17\n"},
		{name: "outside", frame: v4{src: "10.0.0.2", dst: "8.8.8.8"}.frame(), up: "10.0.0.2 > 8.8.8.8 ttl 63 proto 17\n"},
		{name: "from a routed prefix", frame: v4{src: "192.168.7.9", dst: "10.0.0.3"}.frame(), b: "192.168.7.9 > 10.0.0.3 ttl 63 proto 17\n"},
		{name: "to the host", frame: v4{src: "10.0.0.2", dst: "169.254.64.0"}.frame(), up: "10.0.0.2 > 169.254.64.0 ttl 63 proto 17\n"},
		{name: "to another link-local address", frame: v4{src: "10.0.0.2", dst: "169.254.169.254"}.frame(), dropped: 1},
		{name: "another's address", frame: v4{src: "10.0.0.3", dst: "8.8.8.8"}.frame(), spoofed: 1},
		{name: "nobody's address", frame: v4{src: "1.2.3.4", dst: "10.0.0.3"}.frame(), spoofed: 1},
		{name: "no address", frame: v4{src: "0.0.0.0", dst: "10.0.0.3"}.frame(), spoofed: 1},
		{name: "the gateway's address", frame: v4{src: gw, dst: "10.0.0.3"}.frame(), spoofed: 1},
		{name: "next to a routed prefix", frame: v4{src: "192.168.8.9", dst: "10.0.0.3"}.frame(), spoofed: 1},
		{name: "another's MAC", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", smac: macB}.frame(), spoofed: 1},
		{name: "to another's MAC", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", dmac: macB}.frame(), dropped: 1},
		{name: "broadcast MAC", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", dmac: wire.Broadcast}.frame(), dropped: 1},
		{name: "broadcast", frame: v4{src: "10.0.0.2", dst: "255.255.255.255", dmac: wire.Broadcast}.frame(), dropped: 1},
		{name: "multicast", frame: v4{src: "10.0.0.2", dst: "224.0.0.251"}.frame(), dropped: 1},
		{name: "loopback", frame: v4{src: "10.0.0.2", dst: "127.0.0.1"}.frame(), dropped: 1},
		{name: "reserved", frame: v4{src: "10.0.0.2", dst: "240.0.0.1"}.frame(), dropped: 1},
		{name: "to itself", frame: v4{src: "10.0.0.2", dst: "10.0.0.2"}.frame(), dropped: 1},
		{name: "subnet broadcast", frame: v4{src: "10.0.0.2", dst: "10.0.0.255"}.frame(), dropped: 1, a: "10.0.0.1 > 10.0.0.2 ttl 64 icmp 3/1\n"},
		{name: "free address", frame: v4{src: "10.0.0.2", dst: "10.0.0.77"}.frame(), dropped: 1, a: "10.0.0.1 > 10.0.0.2 ttl 64 icmp 3/1\n"},
		{name: "a NIC that is not attached", frame: v4{src: "10.0.0.2", dst: "10.0.0.4"}.frame(), dropped: 1, a: "10.0.0.1 > 10.0.0.2 ttl 64 icmp 3/1\n"},
		{name: "TTL 1", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", ttl: 1}.frame(), dropped: 1, a: "10.0.0.1 > 10.0.0.2 ttl 64 icmp 11/0\n"},
		{name: "no error about an error", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", ttl: 1, proto: 1, payload: echo(3, 20)}.frame(), dropped: 1},
		{name: "ping the gateway", frame: v4{src: "10.0.0.2", dst: gw, proto: 1, payload: echo(8, 40)}.frame(), a: "169.254.0.1 > 10.0.0.2 ttl 64 icmp 0/0\n"},
		{name: "ping the router", frame: v4{src: "10.0.0.2", dst: "10.0.0.1", proto: 1, payload: echo(8, 1400)}.frame(), a: "10.0.0.1 > 10.0.0.2 ttl 64 icmp 0/0\n"},
		{name: "UDP to the gateway", frame: v4{src: "10.0.0.2", dst: gw}.frame(), a: "10.0.0.1 > 10.0.0.2 ttl 64 icmp 3/3\n"},
		{name: "too big, may not be cut", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", flags: 0x4000, payload: udp(1, 2, 1600)}.frame(), dropped: 1, a: "10.0.0.1 > 10.0.0.2 ttl 64 icmp 3/4\n"},
		{name: "too big, is cut", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", payload: udp(1, 2, 3000)}.frame(),
			b: "10.0.0.2 > 10.0.0.3 ttl 63 fragment 0+1480 proto 17\n10.0.0.2 > 10.0.0.3 ttl 63 fragment 1480+1480 proto 17\n10.0.0.2 > 10.0.0.3 ttl 63 fragment 2960+48 proto 17\n"},
		{name: "a fragment", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", flags: 0x2001}.frame(), b: "10.0.0.2 > 10.0.0.3 ttl 63 fragment 8+28 proto 17\n"},
		{name: "bad header sum", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", badSum: true}.frame(), dropped: 1},
		{name: "source route", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", options: []byte{131, 7, 4, 1, 2, 3, 4, 0}}.frame(), dropped: 1},
		{name: "harmless option", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", options: []byte{148, 4, 0, 0}}.frame(), b: "10.0.0.2 > 10.0.0.3 ttl 63 proto 17\n"},
		{name: "option that overruns", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", options: []byte{148, 40, 0, 0}}.frame(), dropped: 1},
		{name: "short TCP", frame: v4{src: "10.0.0.2", dst: "10.0.0.3", proto: 6, payload: make([]byte, 10)}.frame(), dropped: 1},
		{name: "lying length", frame: v4{src: "10.0.0.2", dst: "10.0.0.3"}.frame()[:40], dropped: 1},
		{name: "runt", frame: []byte{1, 2, 3}, dropped: 1},
		{name: "other protocol", frame: append(v4{src: "10.0.0.2", dst: "10.0.0.3"}.frame()[:12], 0x88, 0xcc, 1, 2), dropped: 1},
		{name: "VLAN", frame: append(v4{src: "10.0.0.2", dst: "10.0.0.3"}.frame()[:12], 0x81, 0, 0, 1, 8, 0), dropped: 1},
		{name: "ARP for the gateway", frame: arp(1, macA, "10.0.0.2", gw), a: "arp 2 169.254.0.1 is 02:6d:76:00:00:01\n"},
		{name: "ARP without an address", frame: arp(1, macA, "0.0.0.0", gw), a: "arp 2 169.254.0.1 is 02:6d:76:00:00:01\n"},
		{name: "ARP for another guest", frame: arp(1, macA, "10.0.0.2", "10.0.0.3")},
		{name: "ARP probe for itself", frame: arp(1, macA, "0.0.0.0", "10.0.0.2")},
		{name: "ARP from another's address", frame: arp(1, macA, "10.0.0.3", gw), spoofed: 1},
		{name: "ARP from another's MAC", frame: arp(1, macB, "10.0.0.2", gw), spoofed: 1},
		{name: "ARP claims the gateway", frame: arp(2, macA, gw, "10.0.0.3"), spoofed: 1},
		{name: "gratuitous ARP", frame: arp(1, macA, "10.0.0.2", "10.0.0.2")},
	}
	for _, tt := range tests {
		for _, cut := range []int{0, HeadLen} { // in one piece, and as a port with guest memory gives it
			t.Run(fmt.Sprintf("%s/%d", tt.name, cut), func(t *testing.T) {
				w := newWorld(t)
				w.a.put(tt.frame, cut, Offload{})
				w.poll()
				for _, c := range []struct{ who, got, want string }{
					{"a", saySome(w.a.tx), tt.a}, {"b", saySome(w.b.tx), tt.b}, {"uplink", saySome(w.up.tx), tt.up},
				} {
					if c.got != c.want {
						t.Errorf("%s got\n%swant\n%s", c.who, c.got, c.want)
					}
				}
				s, _ := w.r.Status("a")
				if s.TxSpoofed != tt.spoofed || s.TxDropped != tt.dropped || s.TxPackets != 1 {
					t.Errorf("%+v", s.Counters)
				}
				for _, f := range w.b.tx {
					if wire.GetMAC(f) != macB || wire.GetMAC(f[6:]) != GatewayMAC {
						t.Errorf("MACs % x", f[:12])
					}
				}
			})
		}
	}
}

func TestFromOutside(t *testing.T) {
	tests := []struct {
		name, a, up string
		frame       []byte
	}{
		{name: "to a guest", frame: v4{src: "8.8.8.8", dst: "10.0.0.2"}.frame(), a: "8.8.8.8 > 10.0.0.2 ttl 63 proto 17\n"},
		{name: "to a routed prefix", frame: v4{src: "8.8.8.8", dst: "192.168.7.1"}.frame(), a: "8.8.8.8 > 192.168.7.1 ttl 63 proto 17\n"},
		{name: "a guest's address", frame: v4{src: "10.0.0.3", dst: "10.0.0.2"}.frame()},
		{name: "nobody", frame: v4{src: "8.8.8.8", dst: "10.0.0.9"}.frame(), up: "10.0.0.1 > 8.8.8.8 ttl 64 icmp 3/1\n"},
		{name: "elsewhere", frame: v4{src: "8.8.8.8", dst: "9.9.9.9"}.frame(), up: "10.0.0.1 > 8.8.8.8 ttl 64 icmp 3/1\n"},
		{name: "TTL 1", frame: v4{src: "8.8.8.8", dst: "10.0.0.2", ttl: 1}.frame(), up: "10.0.0.1 > 8.8.8.8 ttl 64 icmp 11/0\n"},
		{name: "ping the router", frame: v4{src: "8.8.8.8", dst: "10.0.0.1", proto: 1, payload: echo(8, 4)}.frame(), up: "10.0.0.1 > 8.8.8.8 ttl 64 icmp 0/0\n"},
		{name: "too big", frame: v4{src: "8.8.8.8", dst: "10.0.0.2", flags: 0x4000, payload: udp(1, 2, 2000)}.frame(), up: "10.0.0.1 > 8.8.8.8 ttl 64 icmp 3/4\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.up.put(tt.frame, 0, Offload{})
			w.poll()
			if g := saySome(w.a.tx); g != tt.a {
				t.Errorf("a got %swant %s", g, tt.a)
			}
			if g := saySome(w.up.tx); g != tt.up {
				t.Errorf("uplink got %swant %s", g, tt.up)
			}
			if len(w.b.tx) > 0 {
				t.Errorf("b got %s", saySome(w.b.tx))
			}
		})
	}
}

// TestFragments puts the pieces together again.
func TestFragments(t *testing.T) {
	for _, cut := range []int{0, 300} {
		w := newWorld(t)
		data := udp(1, 2, 5000)
		for i := range data[8:] {
			data[8+i] = byte(i * 7)
		}
		w.a.put(v4{src: "10.0.0.2", dst: "10.0.0.3", payload: data}.frame(), cut, Offload{})
		w.poll()
		var got []byte
		for i, f := range w.b.tx {
			if f[20]&0x20 != 0 == (i == len(w.b.tx)-1) {
				t.Errorf("fragment %d: more-fragments flag %x", i, f[20])
			}
			got = append(got, f[34:]...)
		}
		if !bytes.Equal(got, data) {
			t.Errorf("%d bytes came, %d were sent", len(got), len(data))
		}
	}
}

func TestOffload(t *testing.T) {
	tcp := make([]byte, 20+40000)
	tcp[12] = 5 << 4
	frame := v4{src: "10.0.0.2", dst: "10.0.0.3", proto: 6, payload: tcp}.frame()
	tso := Offload{Flags: NeedsCsum, GSO: GSOTCP4, GSOSize: 1460, CsumStart: 34, CsumOffs: 16}
	mod := func(f func(*Offload)) Offload { o := tso; f(&o); return o }
	tests := []struct {
		name string
		o    Offload
		ok   bool
	}{
		{"segmentation", tso, true},
		{"with ECN", mod(func(o *Offload) { o.GSO |= GSOECN }), true},
		{"for the wrong family", mod(func(o *Offload) { o.GSO = GSOTCP6 }), false},
		{"of UDP", mod(func(o *Offload) { o.GSO = GSOUDPL4 }), false},
		{"of unknown kind", mod(func(o *Offload) { o.GSO = 9 }), false},
		{"without checksum", mod(func(o *Offload) { o.Flags = 0 }), false},
		{"without size", mod(func(o *Offload) { o.GSOSize = 0 }), false},
		{"checksum before the header", mod(func(o *Offload) { o.CsumStart = 10 }), false},
		{"checksum at the wrong place", mod(func(o *Offload) { o.CsumOffs = 6 }), false},
		{"checksum behind the packet", mod(func(o *Offload) { o.CsumStart = 40100 }), false},
		{"segments larger than the MTU", mod(func(o *Offload) { o.GSOSize = 1470 }), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.a.put(frame, HeadLen, tt.o)
			w.poll()
			if (len(w.b.tx) == 1) != tt.ok {
				t.Fatalf("%d packets", len(w.b.tx))
			}
			if tt.ok {
				want := tt.o
				want.HdrLen = 54
				if w.b.off[0] != want {
					t.Errorf("%+v, want %+v", w.b.off[0], want)
				}
			}
		})
	}
}

// TestSegment cuts packets of both protocols and families and puts them together again.
func TestSegment(t *testing.T) {
	const total = 10000
	data := make([]byte, total)
	for i := range data {
		data[i] = byte(i * 31 >> 4)
	}
	for name, tt := range map[string]struct {
		proto uint8
		gso   uint8
		six   bool
	}{"TCP": {wire.ProtoTCP, GSOTCP4, false}, "TCP6": {wire.ProtoTCP, GSOTCP6, true}, "UDP": {wire.ProtoUDP, GSOUDPL4, false}, "UDP6": {wire.ProtoUDP, GSOUDPL4, true}} {
		t.Run(name, func(t *testing.T) {
			l4len, offs := 20, 16
			h := make([]byte, 20)
			h[12], h[13] = 5<<4, 0x18
			if tt.proto == wire.ProtoUDP {
				l4len, offs = 8, 6
				h = udp(1, 2, total)[:8]
			}
			payload := append(bytes.Clone(h), data...)
			var f []byte
			l4 := 34
			if tt.six {
				f, l4 = v6{src: "fd00:1::2", dst: "fd00:1::3", proto: tt.proto, payload: payload}.frame(), 54
			} else {
				f = v4{src: "10.0.0.2", dst: "10.0.0.3", proto: tt.proto, payload: payload}.frame()
			}
			var p, q Packet
			p.Set(f)
			p.Head, p.Tail = f[:HeadLen:HeadLen], [][]byte{f[HeadLen:]}
			p.Offload = Offload{Flags: NeedsCsum, GSO: tt.gso, GSOSize: 1400, CsumStart: uint16(l4), CsumOffs: uint16(offs)}
			p.Reparse()
			var room [HeadLen]byte
			var got []byte
			ok := p.Segment(&room, &q, func(s *Packet) bool {
				if !s.CompleteCsum() {
					t.Fatal("no checksum")
				}
				b := make([]byte, s.Len)
				s.Copy(b)
				var in wire.Info
				res, pseudo := wire.OK, uint64(0)
				if tt.six {
					res, pseudo = wire.ParseIPv6(b, len(b), &in), wire.PseudoSum6(b[22:], tt.proto, len(b)-l4)
				} else {
					res, pseudo = wire.ParseIPv4(b, len(b), &in), wire.PseudoSum4(b[26:], tt.proto, len(b)-l4)
				}
				if res != wire.OK || in.End != len(b) || wire.Fold(wire.Sum(pseudo, b[l4:])) != 0 {
					t.Fatalf("problem %d, %d of %d bytes, or a bad checksum", res, in.End, len(b))
				}
				got = append(got, b[l4+l4len:]...)
				return true
			})
			if !ok || !bytes.Equal(got, data) {
				t.Errorf("%v, %d bytes", ok, len(got))
			}
		})
	}
}

func TestDHCPThroughTheEngine(t *testing.T) {
	w := newWorld(t)
	m, err := dhcpv4.NewDiscovery([]byte{0x52, 0x54, 0, 0, 0, 3})
	if err != nil {
		t.Fatal(err)
	}
	frame := v4{src: "0.0.0.0", dst: "255.255.255.255", smac: macB, dmac: wire.Broadcast, payload: append(udp(68, 67, len(m.ToBytes()))[:8], m.ToBytes()...)}.frame()
	w.b.put(frame, HeadLen, Offload{})
	w.poll()
	if len(w.b.tx) != 1 {
		t.Fatalf("%d answers", len(w.b.tx))
	}
	f := w.b.tx[0]
	var in wire.Info
	if p := wire.ParseIPv4(f, len(f), &in); p != wire.OK || wire.GetIP4(f[26:]) != Gateway4 || in.SrcPort != 67 || in.DstPort != 68 {
		t.Fatalf("problem %d: %s", p, say(f))
	}
	if wire.Fold(wire.Sum(wire.PseudoSum4(f[26:], 17, in.End-in.L4), f[in.L4:in.End])) != 0 {
		t.Error("bad UDP checksum")
	}
	rep, err := dhcpv4.FromBytes(f[in.L4+8 : in.End])
	if err != nil || rep.YourIPAddr.String() != "10.0.0.3" || rep.HostName() != "b" {
		t.Error(rep, err)
	}
	if len(w.a.tx)+len(w.up.tx) > 0 {
		t.Error("a broadcast crossed to another port")
	}
}

func TestErrorsAreLimited(t *testing.T) {
	w := newWorld(t)
	for range 500 {
		w.a.put(v4{src: "10.0.0.2", dst: "10.0.0.3", ttl: 1}.frame(), 0, Offload{})
	}
	w.poll()
	if len(w.a.tx) != errorBurst {
		t.Errorf("%d errors at once, want %d", len(w.a.tx), errorBurst)
	}
	w.clear()
	w.now += 1e8 // a tenth of a second
	for range 500 {
		w.a.put(v4{src: "10.0.0.2", dst: "10.0.0.3", ttl: 1}.frame(), 0, Offload{})
	}
	w.poll()
	if len(w.a.tx) != errorRate/10 {
		t.Errorf("%d errors in a tenth of a second, want %d", len(w.a.tx), errorRate/10)
	}
}

func TestFullPortCounts(t *testing.T) {
	w := newWorld(t)
	w.b.max = 10
	for range 100 {
		w.a.put(v4{src: "10.0.0.2", dst: "10.0.0.3"}.frame(), 0, Offload{})
	}
	w.poll()
	s, _ := w.r.Status("b")
	if s.RxPackets != 10 || s.RxDropped != 90 || s.RxBytes != 620 {
		t.Errorf("%+v", s)
	}
}

func TestReconfigure(t *testing.T) {
	w := newWorld(t)
	send := func() { w.a.put(v4{src: "10.0.0.2", dst: "10.0.0.9"}.frame(), 0, Offload{}); w.poll() }
	send()
	if len(w.b.tx) != 0 {
		t.Fatal("10.0.0.9 is nobody's")
	}
	w.r.SetNIC(NICConfig{ID: "b", MAC: macB, IPv4: netip.MustParseAddr("10.0.0.9")})
	send()
	if len(w.b.tx) != 1 {
		t.Error("a changed address is not reached")
	}
	if p := w.r.DeleteNIC("b"); p != w.b {
		t.Error("the port of a deleted NIC is not given back")
	}
	send()
	if len(w.b.tx) != 1 {
		t.Error("a deleted NIC gets packets")
	}
}

func TestLongestPrefix(t *testing.T) {
	var f fib4
	f.reset(0)
	nics := map[string]*NIC{}
	for _, p := range []string{"10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "192.168.0.0/20"} {
		nics[p] = &NIC{}
		f.add(toPrefix4(netip.MustParsePrefix(p)), nics[p])
	}
	for a, want := range map[string]string{"10.1.2.3": "10.1.2.3/32", "10.1.2.4": "10.1.2.0/24", "10.1.3.4": "10.1.0.0/16",
		"10.2.0.1": "10.0.0.0/8", "192.168.15.1": "192.168.0.0/20", "192.168.16.1": "", "11.0.0.1": ""} {
		if got := f.lookup(ip(a)); got != nics[want] {
			t.Errorf("%s is not at %s", a, want)
		}
	}
}

// FuzzTx lets a guest send anything, with any offload, in one piece or two. What comes out must be well
// formed, and what comes out at another guest must be the sender's own.
func FuzzTx(f *testing.F) {
	f.Add(v4{src: "10.0.0.2", dst: "10.0.0.3"}.frame(), uint16(0), []byte{})
	f.Add(v4{src: "10.0.0.2", dst: "8.8.8.8", ttl: 1}.frame(), uint16(20), []byte{1, 1, 0, 0, 5, 0xb4, 0, 34, 0, 16})
	f.Add(v4{src: "192.168.7.9", dst: "10.0.0.3", payload: udp(1, 2, 3000)}.frame(), uint16(HeadLen), []byte{})
	f.Add(v4{src: "10.0.0.2", dst: "169.254.0.1", proto: 1, payload: echo(8, 40)}.frame(), uint16(0), []byte{})
	f.Add(arp(1, macA, "10.0.0.2", "169.254.0.1"), uint16(0), []byte{})
	m, _ := dhcpv4.NewDiscovery([]byte{0x52, 0x54, 0, 0, 0, 2})
	f.Add(v4{src: "0.0.0.0", dst: "255.255.255.255", dmac: wire.Broadcast, payload: append(udp(68, 67, len(m.ToBytes()))[:8], m.ToBytes()...)}.frame(), uint16(0), []byte{})
	f.Fuzz(func(t *testing.T, frame []byte, cut uint16, off []byte) {
		w := newWorld(t)
		if cut > 0 && int(cut) < HeadLen {
			cut = HeadLen // what ports promise
		}
		var o Offload
		if len(off) >= 10 {
			o = Offload{Flags: off[0], GSO: off[1], HdrLen: wire.Be16(off[2:]), GSOSize: wire.Be16(off[4:]), CsumStart: wire.Be16(off[6:]), CsumOffs: wire.Be16(off[8:])}
		}
		w.a.put(frame, int(cut), o)
		w.poll()
		for i, g := range w.b.tx {
			var in wire.Info
			if p := wire.ParseIPv4(g, len(g), &in); wire.Be16(g[12:]) != wire.TypeIPv4 || p != wire.OK || in.End != len(g) {
				t.Fatalf("problem %d in % x", p, g)
			}
			src := wire.GetIP4(g[26:])
			if wire.GetMAC(g) != macB || wire.GetMAC(g[6:]) != GatewayMAC || src != ip("10.0.0.2") && src>>8 != ip("192.168.7.0")>>8 {
				t.Fatalf("forged: % x", g)
			}
			checkSane(t, g, w.b.off[i])
		}
		for i, g := range w.up.tx {
			if src := wire.GetIP4(g[26:]); src != ip("10.0.0.2") && src>>8 != ip("192.168.7.0")>>8 {
				t.Fatalf("forged: % x", g)
			}
			checkSane(t, g, w.up.off[i])
		}
	})
}

func checkSane(t *testing.T, g []byte, o Offload) {
	if o.Flags&^NeedsCsum != 0 || o.Flags == 0 && o != (Offload{}) ||
		o.Flags != 0 && int(o.CsumStart)+int(o.CsumOffs)+2 > len(g) || o.GSO != 0 && int(o.HdrLen) > len(g) {
		t.Fatalf("offload %+v of %d bytes", o, len(g))
	}
	if o.GSO == GSONone && len(g) > 14+1500 {
		t.Fatalf("%d bytes", len(g))
	}
}

// FuzzUplink is the same from outside.
func FuzzUplink(f *testing.F) {
	f.Add(v4{src: "8.8.8.8", dst: "10.0.0.2"}.frame(), uint16(0))
	f.Add(v4{src: "8.8.8.8", dst: "10.0.0.9", ttl: 1}.frame(), uint16(300))
	f.Fuzz(func(t *testing.T, frame []byte, cut uint16) {
		w := newWorld(t)
		if cut > 0 && int(cut) < HeadLen {
			cut = HeadLen
		}
		w.up.put(frame, int(cut), Offload{})
		w.poll()
		for _, g := range append(w.a.tx, w.b.tx...) {
			var in wire.Info
			if p := wire.ParseIPv4(g, len(g), &in); p != wire.OK || in.End != len(g) {
				t.Fatalf("problem %d in % x", p, g)
			}
		}
	})
}

func TestNoAllocations(t *testing.T) {
	w := newWorld(t)
	frame := v4{src: "10.0.0.2", dst: "10.0.0.3"}.frame()
	nic, pkt := w.r.NIC("a"), Packet{}
	w.r.SetPort("b", nullPort{})
	n := testing.AllocsPerRun(1000, func() {
		for range Burst {
			frame[22] = 64
			wire.PutBe16(frame[24:], 0)
			wire.PutBe16(frame[24:], wire.Checksum(frame[14:34]))
			pkt.Set(frame)
			w.r.fromNIC(nic, &pkt)
		}
		w.r.flush()
	})
	if n != 0 {
		t.Errorf("%v allocations a burst", n)
	}
}

type nullPort struct{}

func (nullPort) Receive([]Packet) int { return 0 }
func (nullPort) Release()             {}
func (nullPort) Transmit(p []*Packet) (int, int) {
	n := 0
	for _, q := range p {
		n += q.Len
	}
	return len(p), n
}

func BenchmarkForward(b *testing.B) {
	w := newWorld(b)
	frame := v4{src: "10.0.0.2", dst: "10.0.0.3", payload: udp(1, 2, 18)}.frame()
	nic := w.r.NIC("a")
	w.r.SetPort("b", nullPort{})
	var pkts [Burst]Packet
	b.ReportAllocs()
	for i := 0; i < b.N; i += Burst {
		for k := range pkts {
			frame[22] = 64
			wire.PutBe16(frame[24:], 0)
			wire.PutBe16(frame[24:], wire.Checksum(frame[14:34]))
			pkts[k].Set(frame)
			w.r.fromNIC(nic, &pkts[k])
		}
		w.r.flush()
	}
}
