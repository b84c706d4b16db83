package control

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/testguest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

// datagram sends one from a to b and says whether it came.
func datagram(a, b *testguest.Guest, sport, dport uint16) bool {
	_ = a.Send(a.UDP(a.GW, a.IP, b.IP, sport, dport, []byte("hello")))
	_, err := b.Wait(300*time.Millisecond, func(f []byte) bool {
		return wire.Be16(f[12:]) == wire.TypeIPv4 && f[23] == wire.ProtoUDP && wire.Be16(f[36:]) == dport && wire.Be16(f[34:]) == sport
	})
	return err == nil
}

func TestSecurityGroups(t *testing.T) {
	r := newRig(t)
	r.network()
	web, err := r.CreateSecurityGroup(ctx, net.CreateSecurityGroupRequest{ID: ident.New(), Name: "web",
		Rules: []net.Rule{{Direction: net.Inbound, Protocol: "udp", PortFrom: 80}}})
	if err != nil {
		t.Fatal(err)
	}
	nicB := r.nic("lan", func(q *net.CreateNICRequest) { q.SecurityGroups = []string{"web"} })
	a, b := r.up(r.nic("lan")), r.up(nicB)
	check := func(what string, got, want bool) {
		t.Helper()
		if got != want {
			t.Errorf("%s: passed %v", what, got)
		}
	}
	check("an open port", datagram(a, b, 1000, 80), true)
	check("its answer", datagram(b, a, 80, 1000), true)
	check("a closed port", datagram(a, b, 1000, 81), false)
	check("outbound", datagram(b, a, 5, 6), true)
	check("its answer", datagram(a, b, 6, 5), true)
	noPing(t, a, b.IP.Addr().String())

	// Neither restart forgets a flow.
	r.reopen()
	check("an answer after the control plane's restart", datagram(a, b, 6, 5), true)
	r.signalWorker(syscall.SIGKILL)
	eventually(t, "packets flow", func() bool { return datagram(a, b, 1000, 80) })
	check("an answer after the worker's death", datagram(a, b, 6, 5), true)
	check("a closed port after it", datagram(a, b, 1000, 81), false)

	// Rules, and the membership itself, change under live traffic.
	if _, err := r.SetSecurityGroupRules(ctx, net.SetSecurityGroupRulesRequest{Ref: "web",
		Rules: []net.Rule{{Direction: net.Inbound, Protocol: "icmp"}, {Direction: net.Inbound, Protocol: "any", GroupID: "web"}}}); err != nil {
		t.Fatal(err)
	}
	check("a port that was open", datagram(a, b, 1000, 80), false)
	ping(t, a, b.IP.Addr().String())
	if _, err := r.UpdateNIC(ctx, net.UpdateNICRequest{Ref: nicB.ID, SetSecurityGroups: true}); err != nil {
		t.Fatal(err)
	}
	check("without groups", datagram(a, b, 7, 81), true)

	if err := r.DeleteSecurityGroup(ctx, net.Ref{Ref: "none"}); err != nil {
		t.Error(err)
	}
	if _, err := r.UpdateNIC(ctx, net.UpdateNICRequest{Ref: nicB.ID, SetSecurityGroups: true, SecurityGroups: []string{web.ID}}); err != nil {
		t.Fatal(err)
	}
	wantErr(t, r.DeleteSecurityGroup(ctx, net.Ref{Ref: "web"}), errs.Precondition, "", "GROUP_IN_USE")
	if g, err := r.GetSecurityGroup(ctx, net.Ref{Ref: "web"}); err != nil || g.NICCount != 1 || g.Rules[1].GroupID != web.ID {
		t.Errorf("%+v %v", g, err)
	}
}

func TestBadGroups(t *testing.T) {
	r := newRig(t)
	in := net.Inbound
	for _, tt := range []struct {
		name  string
		field string
		rule  net.Rule
	}{
		{"direction", "rules[0].direction", net.Rule{Protocol: "tcp"}},
		{"protocol", "rules[0].protocol", net.Rule{Direction: in, Protocol: "smtp"}},
		{"protocol number", "rules[0].protocol", net.Rule{Direction: in, Protocol: "256"}},
		{"port", "rules[0].port_from", net.Rule{Direction: in, Protocol: "tcp", PortFrom: 65536}},
		{"order of ports", "rules[0].port_from", net.Rule{Direction: in, Protocol: "tcp", PortFrom: 80, PortTo: 79}},
		{"type", "rules[0].port_from", net.Rule{Direction: in, Protocol: "icmp", PortFrom: 256}},
		{"ports of any", "rules[0].port_from", net.Rule{Direction: in, Protocol: "any", PortFrom: 1}},
		{"host bits", "rules[0].cidr", net.Rule{Direction: in, Protocol: "tcp", CIDR: prefix("10.0.0.1/24")}},
		{"two peers", "rules[0].group_id", net.Rule{Direction: in, Protocol: "tcp", CIDR: prefix("10.0.0.0/24"), GroupID: "self"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := r.CreateSecurityGroup(ctx, net.CreateSecurityGroupRequest{ID: ident.New(), Name: "self", Rules: []net.Rule{tt.rule}})
			wantErr(t, err, errs.Invalid, tt.field, "")
		})
	}
	_, err := r.CreateSecurityGroup(ctx, net.CreateSecurityGroupRequest{ID: ident.New(), Name: "g", Rules: []net.Rule{{Direction: in, Protocol: "tcp", GroupID: "none"}}})
	wantErr(t, err, errs.NotFound, "", "")
	_, err = r.CreateSecurityGroup(ctx, net.CreateSecurityGroupRequest{ID: ident.New(), Name: "g", Rules: make([]net.Rule, maxRules+1)})
	wantErr(t, err, errs.Invalid, "rules", "")
	if l, _ := r.ListSecurityGroups(ctx); len(l) != 0 {
		t.Errorf("left: %v", l)
	}
}

func TestUpdates(t *testing.T) {
	r := newRig(t)
	outside(t)
	r.network(nat("lan"), func(q *net.CreateNetworkRequest) { q.Subnet6 = prefix("fd00:1::/64") })
	nic := r.nic("lan")
	a, b := r.up(nic), r.up(r.nic("lan"))
	if err := a.Up6(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	mustSh(t, "ping -c1 -W2 %s", a.IP.Addr())
	n, err := r.UpdateNetwork(ctx, net.UpdateNetworkRequest{Ref: "lan", Name: "renamed", MTU: 1400, SetHost: true, SetDNS: true,
		DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("2620:fe::fe")}, SetDomain: true, Domain: "example.net"})
	if err != nil || n.Name != "renamed" || n.MTU != 1400 || n.HostAccess {
		t.Fatalf("%+v %v", n, err)
	}
	if _, err := a.Wait(30*time.Second, func(f []byte) bool { // an advertisement with the new server
		return wire.Be16(f[12:]) == wire.TypeIPv6 && f[20] == wire.ProtoICMPv6 && f[54] == wire.ICMP6RA &&
			wire.Be16(f[84:]) == 1400
	}); err != nil {
		t.Error("no advertisement after the update:", err)
	}
	if err := a.Up(30 * time.Second); err != nil { // the next lease
		t.Fatal(err)
	}
	if a.Lease.DNS()[0].String() != "9.9.9.9" || a.Lease.DomainName() != "example.net" {
		t.Errorf("lease %v", a.Lease)
	}
	mustSh(t, "! ping -c1 -W1 %s", a.IP.Addr())
	if s := mustSh(t, "ip -n %s link show; ip link", "mvirt-"+n.ID[24:]); !contains(s, "mtu 1400", 4) { // two TAPs, the TUN, the veth pair
		t.Errorf("MTU: %s", s)
	}
	ping(t, a, "203.0.113.1")

	// A routed prefix reaches the NIC as soon as the update returns, and may be sent from.
	old := b.IP
	routed := netip.MustParseAddr("192.168.50.9")
	noPing(t, a, routed.String())
	for _, l := range must(r.ListNICs(ctx, net.ListNICsRequest{})) {
		if l.IPv4 == old.Addr() {
			if _, err := r.UpdateNIC(ctx, net.UpdateNICRequest{Ref: l.ID, SetRoutedPrefixes: true, RoutedPrefixes: []netip.Prefix{prefix("192.168.50.0/24")}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = a.Send(a.UDP(a.GW, a.IP, wire.IP4Of(routed), 1, 2, nil))
	if _, err := b.Wait(30*time.Second, func(f []byte) bool {
		return wire.Be16(f[12:]) == wire.TypeIPv4 && wire.GetIP4(f[30:]) == wire.IP4Of(routed)
	}); err != nil {
		t.Error("the routed prefix does not reach its NIC:", err)
	}
	_ = b.Send(b.UDP(b.GW, wire.IP4Of(routed), a.IP, 2, 1, nil))
	if _, err := a.Wait(30*time.Second, func(f []byte) bool {
		return wire.Be16(f[12:]) == wire.TypeIPv4 && wire.GetIP4(f[26:]) == wire.IP4Of(routed)
	}); err != nil {
		t.Error("the NIC may not send from its routed prefix:", err)
	}
	_, err = r.UpdateNetwork(ctx, net.UpdateNetworkRequest{Ref: "renamed", MTU: 1})
	wantErr(t, err, errs.Invalid, "mtu", "")
	if _, err = r.UpdateNetwork(ctx, net.UpdateNetworkRequest{Ref: "lan"}); !errors.Is(err, errs.NotFound) {
		t.Error(err)
	}
}

func contains(s, part string, times int) bool {
	n := 0
	for i := 0; i+len(part) <= len(s); i++ {
		if s[i:i+len(part)] == part {
			n++
		}
	}
	return n >= times
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
