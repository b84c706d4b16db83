// Package testguest is a guest in user space for tests: it speaks Ethernet on a TAP's descriptor as a
// virtual machine would through its hypervisor, so that leases, pings and forged packets can be tried
// without one.
package testguest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// hdrLen is the virtio-net header on the TAP.
const hdrLen = 12

// Conn moves whole frames without a virtio-net header.
type Conn interface {
	Read(frame []byte) (int, error)
	Write(frame []byte) error
	Close() error
}

// Guest is one guest. What it receives goes to Frames, but for the echo requests to it, which it answers.
type Guest struct {
	MAC    wire.MAC
	IP     wire.IP4
	IP6    wire.IP6
	GW     wire.MAC
	Frames chan []byte
	Lease  *dhcpv4.DHCPv4

	conn Conn
	mu   sync.Mutex
	done chan struct{}
	seq  uint16
	mute bool
}

// New starts a guest.
func New(c Conn, mac wire.MAC) *Guest {
	g := &Guest{MAC: mac, conn: c, Frames: make(chan []byte, 4096), done: make(chan struct{})}
	go g.read()
	return g
}

// SetIP gives the guest an address by hand.
func (g *Guest) SetIP(ip wire.IP4) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.IP = ip
}

// Mute makes it answer nothing.
func (g *Guest) Mute(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.mute = on
}

// Close stops it.
func (g *Guest) Close() {
	g.conn.Close()
	<-g.done
}

func (g *Guest) read() {
	defer close(g.done)
	for {
		b := make([]byte, 65536+14)
		n, err := g.conn.Read(b)
		if err != nil {
			return
		}
		f := b[:n]
		if g.answer(f) || g.answer6(f) {
			continue
		}
		select {
		case g.Frames <- f:
		default:
		}
	}
}

// answer replies to echo requests, and to ARP requests for its address.
func (g *Guest) answer(f []byte) bool {
	var in wire.Info
	g.mu.Lock()
	ip, mute := g.IP, g.mute
	g.mu.Unlock()
	if len(f) >= 42 && wire.Be16(f[12:]) == wire.TypeARP && !mute {
		if a, ok := wire.ParseARP(f[14:]); ok && a.Op == 1 && a.TargetIP == ip && ip != 0 {
			r := make([]byte, 60)
			wire.PutEth(r, a.SenderMAC, g.MAC, wire.TypeARP)
			rep := wire.ARP{Op: 2, SenderMAC: g.MAC, SenderIP: ip, TargetMAC: a.SenderMAC, TargetIP: a.SenderIP}
			rep.Put(r[14:])
			_ = g.conn.Write(r)
			return true
		}
	}
	if mute || len(f) < 34 || wire.Be16(f[12:]) != wire.TypeIPv4 || wire.ParseIPv4(f, len(f), &in) != wire.OK ||
		in.Proto != wire.ProtoICMP || in.DstPort != wire.ICMPEcho<<8 || wire.GetIP4(f[30:]) != ip {
		return false
	}
	r := append([]byte{}, f[:in.End]...)
	wire.PutEth(r, wire.GetMAC(f[6:]), g.MAC, wire.TypeIPv4)
	copy(r[26:30], f[30:34])
	copy(r[30:34], f[26:30])
	r[22] = 64
	wire.PutBe16(r[24:], 0)
	wire.PutBe16(r[24:], wire.Checksum(r[14:in.L4]))
	r[in.L4] = wire.ICMPEchoReply
	wire.PutBe16(r[in.L4+2:], 0)
	wire.PutBe16(r[in.L4+2:], wire.Checksum(r[in.L4:]))
	_ = g.conn.Write(r)
	return true
}

// Send sends a frame as it is.
func (g *Guest) Send(f []byte) error { return g.conn.Write(f) }

// Wait returns the first frame that want accepts.
func (g *Guest) Wait(d time.Duration, want func(f []byte) bool) ([]byte, error) {
	t := time.After(d)
	for {
		select {
		case f := <-g.Frames:
			if want(f) {
				return f, nil
			}
		case <-t:
			return nil, errors.New("no such frame came")
		case <-g.done:
			return nil, errors.New("the guest's device is gone")
		}
	}
}

// ARP asks who has ip and returns the answer.
func (g *Guest) ARP(ip wire.IP4, d time.Duration) (wire.MAC, error) {
	f := make([]byte, 60)
	wire.PutEth(f, wire.Broadcast, g.MAC, wire.TypeARP)
	a := wire.ARP{Op: 1, SenderMAC: g.MAC, SenderIP: g.IP, TargetIP: ip}
	a.Put(f[14:])
	if err := g.Send(f); err != nil {
		return 0, err
	}
	var mac wire.MAC
	_, err := g.Wait(d, func(f []byte) bool {
		r, ok := wire.ParseARP(f[14:])
		mac = r.SenderMAC
		return wire.Be16(f[12:]) == wire.TypeARP && ok && r.Op == 2 && r.SenderIP == ip
	})
	return mac, err
}

// Up gets a lease and the gateway's MAC, as an operating system does at boot.
func (g *Guest) Up(d time.Duration) error {
	hw := make(net.HardwareAddr, 6)
	g.MAC.Put(hw)
	m, err := dhcpv4.NewDiscovery(hw)
	if err != nil {
		return err
	}
	offer, err := g.dhcp(m, dhcpv4.MessageTypeOffer, d)
	if err != nil {
		return fmt.Errorf("no offer: %w", err)
	}
	if m, err = dhcpv4.NewRequestFromOffer(offer); err != nil {
		return err
	}
	if g.Lease, err = g.dhcp(m, dhcpv4.MessageTypeAck, d); err != nil {
		return fmt.Errorf("no acknowledgement: %w", err)
	}
	g.mu.Lock()
	g.IP = wire.GetIP4(g.Lease.YourIPAddr.To4())
	g.mu.Unlock()
	gw := wire.GetIP4(g.Lease.Router()[0].To4())
	if g.GW, err = g.ARP(gw, d); err != nil {
		return fmt.Errorf("no ARP answer of %v: %w", gw.Addr(), err)
	}
	return nil
}

func (g *Guest) dhcp(m *dhcpv4.DHCPv4, want dhcpv4.MessageType, d time.Duration) (*dhcpv4.DHCPv4, error) {
	if err := g.Send(g.UDP(wire.Broadcast, 0, 0xffffffff, 68, 67, m.ToBytes())); err != nil {
		return nil, err
	}
	var rep *dhcpv4.DHCPv4
	_, err := g.Wait(d, func(f []byte) bool {
		var in wire.Info
		if wire.Be16(f[12:]) != wire.TypeIPv4 || wire.ParseIPv4(f, len(f), &in) != wire.OK || in.DstPort != 68 || in.Proto != wire.ProtoUDP {
			return false
		}
		r, err := dhcpv4.FromBytes(f[in.L4+8 : in.End])
		rep = r
		return err == nil && r.TransactionID == m.TransactionID && r.MessageType() == want
	})
	return rep, err
}

// LinkLocal is the guest's link-local address, made from its MAC.
func (g *Guest) LinkLocal() wire.IP6 {
	a := wire.IP6{0: 0xfe, 1: 0x80}
	var m [6]byte
	g.MAC.Put(m[:])
	copy(a[8:], []byte{m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
	return a
}

// Up6 gets an IPv6 address by rapid commit and the gateway's MAC by neighbour discovery.
func (g *Guest) Up6(d time.Duration) error {
	hw := make(net.HardwareAddr, 6)
	g.MAC.Put(hw)
	m, err := dhcpv6.NewSolicit(hw, dhcpv6.WithRapidCommit)
	if err != nil {
		return err
	}
	data := m.ToBytes()
	f := make([]byte, 62+len(data))
	copy(f[62:], data)
	src, dst := g.LinkLocal(), wire.IP6{0: 0xff, 1: 2, 13: 1, 15: 2}
	wire.PutEth(f, 0x333300010002, g.MAC, wire.TypeIPv6)
	wire.PutIPv6(f[14:], &src, &dst, wire.ProtoUDP, 1, 8+len(data))
	wire.PutUDP6(f[54:], f[14:], 546, 547, len(data))
	if err := g.Send(f); err != nil {
		return err
	}
	_, err = g.Wait(d, func(f []byte) bool {
		if len(f) < 66 || wire.Be16(f[12:]) != wire.TypeIPv6 || f[20] != wire.ProtoUDP || wire.Be16(f[56:]) != 546 {
			return false
		}
		r, err := dhcpv6.MessageFromBytes(f[62:])
		if err != nil || r.TransactionID != m.TransactionID || r.Options.OneIANA() == nil || r.Options.OneIANA().Options.OneAddress() == nil {
			return false
		}
		g.mu.Lock()
		g.IP6 = wire.IP6(r.Options.OneIANA().Options.OneAddress().IPv6Addr)
		g.mu.Unlock()
		return true
	})
	if err != nil {
		return fmt.Errorf("no DHCPv6 reply: %w", err)
	}
	ns := make([]byte, 54+32)
	gw, to := wire.IP6{0: 0xfe, 1: 0x80, 15: 1}, wire.IP6{0: 0xff, 1: 2, 11: 1, 12: 0xff, 15: 1}
	wire.PutEth(ns, 0x3333ff000001, g.MAC, wire.TypeIPv6)
	wire.PutIPv6(ns[14:], &src, &to, wire.ProtoICMPv6, 255, 32)
	ns[54] = wire.ICMP6NS
	copy(ns[62:], gw[:])
	ns[78], ns[79] = 1, 1
	g.MAC.Put(ns[80:])
	wire.SumICMPv6(ns[14:], 32)
	if err := g.Send(ns); err != nil {
		return err
	}
	_, err = g.Wait(d, func(f []byte) bool {
		ok := len(f) == 86 && wire.Be16(f[12:]) == wire.TypeIPv6 && f[54] == wire.ICMP6NA && wire.IP6(f[62:78]) == gw
		if ok {
			g.GW = wire.GetMAC(f[80:])
		}
		return ok
	})
	if err != nil {
		return fmt.Errorf("no neighbour advertisement of the gateway: %w", err)
	}
	return nil
}

// Ping6 sends one echo request and returns the answer's hop limit.
func (g *Guest) Ping6(dst wire.IP6, d time.Duration) (hops uint8, err error) {
	g.seq++
	f := make([]byte, 54+64)
	wire.PutEth(f, g.GW, g.MAC, wire.TypeIPv6)
	wire.PutIPv6(f[14:], &g.IP6, &dst, wire.ProtoICMPv6, 64, 64)
	f[54] = wire.ICMP6Echo
	wire.PutBe16(f[60:], g.seq)
	seq := g.seq
	wire.SumICMPv6(f[14:], 64)
	if err := g.Send(f); err != nil {
		return 0, err
	}
	r, err := g.Wait(d, func(f []byte) bool {
		return len(f) == 118 && wire.Be16(f[12:]) == wire.TypeIPv6 && f[54] == wire.ICMP6EchoReply && wire.IP6(f[22:38]) == dst && wire.Be16(f[60:]) == seq
	})
	if err != nil {
		return 0, fmt.Errorf("ping %v from %v: %w", dst.Addr(), g.IP6.Addr(), err)
	}
	return r[21], nil
}

// answer6 replies to IPv6 echo requests.
func (g *Guest) answer6(f []byte) bool {
	g.mu.Lock()
	ip, mute := g.IP6, g.mute
	g.mu.Unlock()
	if mute || len(f) < 62 || wire.Be16(f[12:]) != wire.TypeIPv6 || f[20] != wire.ProtoICMPv6 || f[54] != wire.ICMP6Echo ||
		wire.IP6(f[38:54]) != ip || ip.Unspecified() {
		return false
	}
	r := append([]byte{}, f...)
	wire.PutEth(r, wire.GetMAC(f[6:]), g.MAC, wire.TypeIPv6)
	copy(r[22:38], f[38:54])
	copy(r[38:54], f[22:38])
	r[21], r[54] = 64, wire.ICMP6EchoReply
	wire.SumICMPv6(r[14:], len(r)-54)
	_ = g.conn.Write(r)
	return true
}

// UDP makes a frame from the guest's MAC.
func (g *Guest) UDP(to wire.MAC, src, dst wire.IP4, sport, dport uint16, data []byte) []byte {
	f := make([]byte, 42+len(data))
	copy(f[42:], data)
	wire.PutEth(f, to, g.MAC, wire.TypeIPv4)
	wire.PutIPv4(f[14:], src, dst, wire.ProtoUDP, 64, 1, 8+len(data))
	wire.PutUDP4(f[34:], f[14:], sport, dport, len(data))
	return f
}

// Echo makes an echo request from src.
func (g *Guest) Echo(src, dst wire.IP4, ttl uint8, id, seq uint16, size int) []byte {
	f := make([]byte, 42+size)
	wire.PutEth(f, g.GW, g.MAC, wire.TypeIPv4)
	wire.PutIPv4(f[14:], src, dst, wire.ProtoICMP, ttl, seq, 8+size)
	b := f[34:]
	b[0] = wire.ICMPEcho
	wire.PutBe16(b[4:], id)
	wire.PutBe16(b[6:], seq)
	wire.PutBe16(b[2:], wire.Checksum(b))
	return f
}

// Ping sends one echo request and returns the answer's TTL.
func (g *Guest) Ping(dst wire.IP4, d time.Duration) (ttl uint8, err error) {
	g.seq++
	seq := g.seq
	if err := g.Send(g.Echo(g.IP, dst, 64, 7, seq, 56)); err != nil {
		return 0, err
	}
	f, err := g.Wait(d, func(f []byte) bool {
		var in wire.Info
		return wire.Be16(f[12:]) == wire.TypeIPv4 && wire.ParseIPv4(f, len(f), &in) == wire.OK && in.Proto == wire.ProtoICMP &&
			in.DstPort == wire.ICMPEchoReply<<8 && wire.GetIP4(f[26:]) == dst && wire.Be16(f[in.L4+6:]) == seq
	})
	if err != nil {
		return 0, fmt.Errorf("ping %v from %v: %w", dst.Addr(), g.IP.Addr(), err)
	}
	return f[22], nil
}

// TAP is a guest's side of a TAP with 12-byte virtio-net headers, as a hypervisor has it.
type TAP struct{ f *os.File }

// NewTAP takes over f.
func NewTAP(f *os.File) (*TAP, error) {
	if err := unix.SetNonblock(int(f.Fd()), true); err != nil {
		return nil, err
	}
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		return nil, err
	}
	f.Close()
	return &TAP{f: os.NewFile(uintptr(fd), "tap")}, nil
}

// Read implements Conn.
func (t *TAP) Read(frame []byte) (int, error) {
	b := make([]byte, hdrLen+len(frame))
	n, err := t.f.Read(b)
	if err != nil {
		return 0, err
	}
	if n < hdrLen {
		return 0, errors.New("short read")
	}
	return copy(frame, b[hdrLen:n]), nil
}

// Write implements Conn.
func (t *TAP) Write(frame []byte) error {
	_, err := t.f.Write(append(make([]byte, hdrLen), frame...))
	return err
}

// Close implements Conn.
func (t *TAP) Close() error { return t.f.Close() }
