package dhcp4

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

var (
	mac   = net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}
	lease = &Lease{
		Addr: ip("10.0.0.7"), Gateway: ip("169.254.0.1"), MAC: wire.GetMAC(mac),
		DNS: []wire.IP4{ip("1.1.1.1"), ip("9.9.9.9")}, NTP: []wire.IP4{ip("10.9.9.9")},
		Domain: "example.org", HostName: "web-0", MTU: 1450, Seconds: 3600,
	}
)

func ip(s string) wire.IP4 { return wire.IP4Of(netip.MustParseAddr(s)) }

func message(t testing.TB, mods ...dhcpv4.Modifier) []byte {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(mac)}, mods...)...)
	if err != nil {
		t.Fatal(err)
	}
	return m.ToBytes()
}

// serve answers and reads the reply with a library that others wrote.
func serve(t *testing.T, req []byte, l *Lease) (*dhcpv4.DHCPv4, Reply, Event) {
	t.Helper()
	out := make([]byte, MaxReply)
	rep, ev := Serve(req, l, out)
	if rep.Len == 0 {
		return nil, rep, ev
	}
	m, err := dhcpv4.FromBytes(out[:rep.Len])
	if err != nil {
		t.Fatalf("the reply does not parse: %v", err)
	}
	if want, err := dhcpv4.FromBytes(req); err == nil && want.TransactionID != m.TransactionID {
		t.Errorf("transaction id %v, want %v", m.TransactionID, want.TransactionID)
	}
	return m, rep, ev
}

func opt(code uint8, v ...byte) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.GenericOptionCode(code), v)
}

func typ(t Type) dhcpv4.Modifier { return opt(optType, byte(t)) }

func TestConversation(t *testing.T) {
	own, other := []byte{10, 0, 0, 7}, []byte{10, 0, 0, 8}
	gw := []byte{169, 254, 0, 1}
	tests := []struct {
		name  string
		mods  []dhcpv4.Modifier
		reply Type // 0: silence
		event Event
	}{
		{"discover", []dhcpv4.Modifier{typ(Discover)}, Offer, None},
		{"select", []dhcpv4.Modifier{typ(Request), opt(optRequested, own...), opt(optServer, gw...)}, ACK, Bound},
		{"select another server", []dhcpv4.Modifier{typ(Request), opt(optRequested, own...), opt(optServer, other...)}, 0, None},
		{"select a wrong address", []dhcpv4.Modifier{typ(Request), opt(optRequested, other...), opt(optServer, gw...)}, NAK, Refused},
		{"reboot", []dhcpv4.Modifier{typ(Request), opt(optRequested, own...)}, ACK, Bound},
		{"reboot elsewhere", []dhcpv4.Modifier{typ(Request), opt(optRequested, other...)}, NAK, Refused},
		{"renew", []dhcpv4.Modifier{typ(Request), dhcpv4.WithClientIP(own)}, ACK, Bound},
		{"renew a wrong address", []dhcpv4.Modifier{typ(Request), dhcpv4.WithClientIP(other)}, NAK, Refused},
		{"request nothing", []dhcpv4.Modifier{typ(Request)}, NAK, Refused},
		{"decline", []dhcpv4.Modifier{typ(Decline), opt(optRequested, own...), opt(optServer, gw...)}, 0, Declined},
		{"decline another", []dhcpv4.Modifier{typ(Decline), opt(optRequested, other...)}, 0, Bad},
		{"release", []dhcpv4.Modifier{typ(Release), dhcpv4.WithClientIP(own)}, 0, Released},
		{"release another", []dhcpv4.Modifier{typ(Release), dhcpv4.WithClientIP(other)}, 0, Bad},
		{"inform", []dhcpv4.Modifier{typ(Inform), dhcpv4.WithClientIP(own)}, ACK, None},
		{"inform from another", []dhcpv4.Modifier{typ(Inform), dhcpv4.WithClientIP(other)}, 0, Bad},
		{"relayed", []dhcpv4.Modifier{typ(Discover), dhcpv4.WithGatewayIP(other)}, 0, Bad},
		{"another guest's MAC", []dhcpv4.Modifier{typ(Discover), dhcpv4.WithHwAddr(net.HardwareAddr{2, 0, 0, 0, 0, 1})}, 0, Bad},
		{"an offer", []dhcpv4.Modifier{typ(Offer)}, 0, Bad},
		{"no type", nil, 0, Bad},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, rep, ev := serve(t, message(t, tt.mods...), lease)
			if rep.Type != tt.reply || ev != tt.event {
				t.Fatalf("reply %d event %d, want %d and %d", rep.Type, ev, tt.reply, tt.event)
			}
			if m == nil {
				return
			}
			if uint8(m.MessageType()) != uint8(tt.reply) {
				t.Errorf("type %v", m.MessageType())
			}
			if !m.ServerIdentifier().Equal(net.IP(gw)) {
				t.Errorf("server %v", m.ServerIdentifier())
			}
			switch tt.reply {
			case NAK:
				if !rep.Broadcast || rep.Dst != 0xffffffff || !m.YourIPAddr.IsUnspecified() {
					t.Errorf("NAK to %v, yiaddr %v", rep.Dst, m.YourIPAddr)
				}
			case Offer, ACK:
				if tt.name == "inform" {
					if !m.YourIPAddr.IsUnspecified() || m.IPAddressLeaseTime(0) != 0 {
						t.Errorf("an inform got a lease: %v", m)
					}
				} else if !m.YourIPAddr.Equal(own) || m.IPAddressLeaseTime(0) != time.Hour {
					t.Errorf("lease %v for %v", m.YourIPAddr, m.IPAddressLeaseTime(0))
				}
			}
		})
	}
}

func TestOptions(t *testing.T) {
	m, _, _ := serve(t, message(t, typ(Discover), opt(optClientID, 1, 2, 3)), lease)
	check := func(name, got, want string) {
		if got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	check("mask", net.IP(m.SubnetMask()).String(), "255.255.255.255")
	check("router", m.Router()[0].String(), "169.254.0.1")
	check("routes", dhcpv4.Routes(m.ClasslessStaticRoute()).String(),
		"route to 169.254.0.1/32 via 0.0.0.0; route to 0.0.0.0/0 via 169.254.0.1")
	check("dns", m.DNS()[0].String()+","+m.DNS()[1].String(), "1.1.1.1,9.9.9.9")
	check("ntp", m.NTPServers()[0].String(), "10.9.9.9")
	check("domain", m.DomainName(), "example.org")
	check("host", m.HostName(), "web-0")
	check("mtu", string(m.Options.Get(dhcpv4.OptionInterfaceMTU)), "\x05\xaa")
	check("client id", string(m.Options.Get(dhcpv4.OptionClientIdentifier)), "\x01\x02\x03")
	if r := m.IPAddressRenewalTime(0); r != 30*time.Minute {
		t.Errorf("T1 %v", r)
	}
	if r := m.IPAddressRebindingTime(0); r != 3150*time.Second {
		t.Errorf("T2 %v", r)
	}
}

func TestBroadcastFlag(t *testing.T) {
	for _, flag := range []bool{false, true} {
		mods := []dhcpv4.Modifier{typ(Discover), dhcpv4.WithBroadcast(flag)}
		_, rep, _ := serve(t, message(t, mods...), lease)
		if rep.Broadcast != flag || (rep.Dst == 0xffffffff) != flag {
			t.Errorf("flag %v: broadcast %v to %v", flag, rep.Broadcast, rep.Dst)
		}
	}
	// A renewing client has an address: its flag does not count.
	_, rep, _ := serve(t, message(t, typ(Request), dhcpv4.WithClientIP(net.IP{10, 0, 0, 7}), dhcpv4.WithBroadcast(true)), lease)
	if rep.Broadcast || rep.Dst != lease.Addr {
		t.Errorf("renewal answered to %v", rep.Dst)
	}
}

func TestLimits(t *testing.T) {
	l := *lease
	for range MaxServers {
		l.DNS, l.NTP = append(l.DNS, 1), append(l.NTP, 2)
	}
	l.DNS, l.NTP = l.DNS[:MaxServers], l.NTP[:MaxServers]
	l.Domain = string(make([]byte, 253))
	l.HostName = string(make([]byte, 63))
	m, rep, _ := serve(t, message(t, typ(Discover)), &l)
	if rep.Len > 576-28 {
		t.Errorf("%d bytes to a client that takes 576", rep.Len)
	}
	if m.DomainName() != "" || len(m.DNS()) != MaxServers {
		t.Error("the wrong option was left out")
	}
	m, _, _ = serve(t, message(t, typ(Discover), opt(optMaxSize, 5, 220)), &l)
	if m.Options.Get(dhcpv4.OptionDomainName) == nil {
		t.Error("a larger size was not used")
	}
}

func TestOverload(t *testing.T) {
	req := message(t, opt(optOverload, 1))
	copy(req[offFile:], []byte{optType, 1, byte(Discover), optEnd})
	if _, rep, _ := serve(t, req, lease); rep.Type != Offer {
		t.Error("the type in the file field was not read")
	}
}

func FuzzServe(f *testing.F) {
	f.Add(message(f, typ(Discover)))
	f.Add(message(f, typ(Request), opt(optRequested, 10, 0, 0, 7), opt(optServer, 169, 254, 0, 1)))
	f.Add(message(f, typ(Inform), dhcpv4.WithClientIP(net.IP{10, 0, 0, 7}), opt(optMaxSize, 255, 255)))
	f.Add(message(f, typ(Release), opt(optOverload, 3)))
	f.Add(make([]byte, offOpts))
	out := make([]byte, MaxReply)
	f.Fuzz(func(t *testing.T, req []byte) {
		rep, _ := Serve(req, lease, out)
		if rep.Len == 0 {
			return
		}
		m, err := dhcpv4.FromBytes(out[:rep.Len])
		if err != nil {
			t.Fatalf("the reply does not parse: %v", err)
		}
		if y := m.YourIPAddr.To4(); !y.IsUnspecified() && wire.GetIP4(y) != lease.Addr {
			t.Fatalf("offered %v", y)
		}
	})
}

func TestNoAllocations(t *testing.T) {
	req, out := message(t, typ(Discover)), make([]byte, MaxReply)
	if n := testing.AllocsPerRun(100, func() { Serve(req, lease, out) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
