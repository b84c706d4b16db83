package dhcp6

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

var lease = &Lease{Addr: ip("fd00::7"), MAC: 0x026d76000001, DNS: []wire.IP6{ip("2606:4700::1111")}, NTP: []wire.IP6{ip("fd00::123")},
	Domain: (&rfc1035label.Labels{Labels: []string{"example.org"}}).ToBytes(), Seconds: 3600,
	Prefixes: []Prefix{{ip("2001:db8:7::"), 56}}}

func ip(s string) wire.IP6 { return wire.IP6Of(netip.MustParseAddr(s)) }

var (
	client = &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}}
	server = &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr{0x02, 0x6d, 0x76, 0, 0, 1}}
)

func message(t testing.TB, typ Type, opts ...dhcpv6.Option) []byte {
	m, err := dhcpv6.NewMessage()
	if err != nil {
		t.Fatal(err)
	}
	m.MessageType = dhcpv6.MessageType(typ)
	m.AddOption(dhcpv6.OptClientID(client))
	for _, o := range opts {
		m.AddOption(o)
	}
	return m.ToBytes()
}

func iana1(addrs ...string) dhcpv6.Option {
	o := &dhcpv6.OptIANA{IaId: [4]byte{1, 2, 3, 4}}
	for _, a := range addrs {
		o.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(a)})
	}
	return o
}

func TestConversation(t *testing.T) {
	sid := dhcpv6.OptServerID(server)
	rapid := &dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit}
	other := dhcpv6.OptServerID(client)
	tests := []struct {
		name   string
		req    []byte
		reply  Type // 0: silence
		event  Event
		addr   string
		status iana.StatusCode // of the whole message
		bare   bool            // no announcements
	}{
		{name: "solicit", req: message(t, Solicit, iana1()), reply: Advertise, addr: "fd00::7"},
		{name: "rapid commit", req: message(t, Solicit, iana1(), rapid), reply: Reply, event: Bound, addr: "fd00::7"},
		{name: "request", req: message(t, Request, sid, iana1("fd00::7")), reply: Reply, event: Bound, addr: "fd00::7"},
		{name: "request another address", req: message(t, Request, sid, iana1("fd00::8")), reply: Reply, event: Bound, addr: "fd00::7"},
		{name: "request of another server", req: message(t, Request, other, iana1()), event: Bad},
		{name: "renew", req: message(t, Renew, sid, iana1("fd00::7")), reply: Reply, event: Bound, addr: "fd00::7"},
		{name: "rebind", req: message(t, Rebind, iana1("fd00::7")), reply: Reply, event: Bound, addr: "fd00::7"},
		{name: "confirm", req: message(t, Confirm, iana1("fd00::7")), reply: Reply, bare: true},
		{name: "confirm elsewhere", req: message(t, Confirm, iana1("fd00::8")), reply: Reply, status: iana.StatusNotOnLink, bare: true},
		{name: "confirm nothing", req: message(t, Confirm, iana1()), event: Bad},
		{name: "release", req: message(t, Release, sid, iana1("fd00::7")), reply: Reply, event: Released, bare: true},
		{name: "decline", req: message(t, Decline, sid, iana1("fd00::7")), reply: Reply, event: Declined, bare: true},
		{name: "information", req: message(t, InfoRequest), reply: Reply},
		{name: "solicit with a server", req: message(t, Solicit, sid, iana1()), event: Bad},
		{name: "a reply", req: message(t, Reply), event: Bad},
		{name: "nothing", req: nil, event: Bad},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out := make([]byte, MaxReply)
			n, ev := Serve(tt.req, lease, out)
			if ev != tt.event || (n > 0) != (tt.reply != 0) {
				t.Fatalf("%d bytes, event %d", n, ev)
			}
			if n == 0 {
				return
			}
			m, err := dhcpv6.MessageFromBytes(out[:n])
			if err != nil {
				t.Fatal(err)
			}
			if Type(m.MessageType) != tt.reply || m.Options.ClientID() == nil || !m.Options.ServerID().Equal(server) {
				t.Errorf("%v", m)
			}
			got := ""
			if na := m.Options.OneIANA(); na != nil {
				if a := na.Options.OneAddress(); a != nil {
					got = a.IPv6Addr.String()
					if a.ValidLifetime != time.Hour || na.T1 != 30*time.Minute || na.IaId != [4]byte{1, 2, 3, 4} {
						t.Errorf("%v", na)
					}
				}
			}
			if got != tt.addr {
				t.Errorf("address %q, want %q", got, tt.addr)
			}
			if st := m.Options.Status(); st != nil && st.StatusCode != tt.status || st == nil && tt.status != 0 {
				t.Errorf("status %v", st)
			}
			if tt.bare {
				return
			}
			if d := m.Options.DNS(); len(d) != 1 || d[0].String() != "2606:4700::1111" {
				t.Errorf("DNS %v", d)
			}
			if l := m.Options.DomainSearchList(); l == nil || l.Labels[0] != "example.org" {
				t.Errorf("domains %v", l)
			}
			if s := m.Options.NTPServers(); len(s) != 1 || s[0].String() != "fd00::123" {
				t.Errorf("NTP %v", s)
			}
		})
	}
}

func TestDelegation(t *testing.T) {
	pd := &dhcpv6.OptIAPD{IaId: [4]byte{9}}
	out := make([]byte, MaxReply)
	n, _ := Serve(message(t, Solicit, iana1(), pd), lease, out)
	m, err := dhcpv6.MessageFromBytes(out[:n])
	if err != nil {
		t.Fatal(err)
	}
	p := m.Options.OneIAPD().Options.Prefixes()
	if len(p) != 1 || p[0].Prefix.String() != "2001:db8:7::/56" {
		t.Errorf("%v", m)
	}
	bare := *lease
	bare.Prefixes = nil
	n, _ = Serve(message(t, Solicit, pd), &bare, out)
	m, _ = dhcpv6.MessageFromBytes(out[:n])
	if st := m.Options.OneIAPD().Options.Status(); st == nil || st.StatusCode != iana.StatusNoPrefixAvail {
		t.Errorf("%v", m)
	}
}

func TestNoAllocations(t *testing.T) {
	req, out := message(t, Solicit, iana1()), make([]byte, MaxReply)
	if n := testing.AllocsPerRun(100, func() { Serve(req, lease, out) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzServe(f *testing.F) {
	f.Add(message(f, Solicit, iana1()))
	f.Add(message(f, Request, dhcpv6.OptServerID(server), iana1("fd00::7"), &dhcpv6.OptIAPD{}))
	f.Add(message(f, Decline, dhcpv6.OptServerID(server), iana1("fd00::8")))
	f.Add(message(f, InfoRequest))
	out := make([]byte, MaxReply)
	f.Fuzz(func(t *testing.T, req []byte) {
		n, _ := Serve(req, lease, out)
		if n == 0 {
			return
		}
		if _, err := dhcpv6.MessageFromBytes(req); err != nil {
			return // it is stricter, also about what we only echo
		}
		m, err := dhcpv6.MessageFromBytes(out[:n])
		if err != nil {
			t.Fatalf("the reply does not parse: %v: % x", err, out[:n])
		}
		for _, na := range m.Options.IANA() {
			for _, a := range na.Options.Addresses() {
				if a.IPv6Addr.String() != "fd00::7" {
					t.Fatalf("gave %v", a)
				}
			}
		}
	})
}
