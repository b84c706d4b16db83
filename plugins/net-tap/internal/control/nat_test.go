package control

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/testguest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// outside makes a namespace that plays the world beyond the host, at 203.0.113.1, with a neighbour that
// would like to use the host as its router.
func outside(t *testing.T) {
	t.Helper()
	mustSh(t, `ip netns add world
ip link add ext0 type veth peer name w0 netns world
ip addr add 203.0.113.2/24 dev ext0
ip link set ext0 up
ip -n world addr add 203.0.113.1/24 dev w0
ip -n world link set w0 up
ip -n world link set lo up
ip route add default via 203.0.113.1`)
	t.Cleanup(func() {
		mustSh(t, `ip link del ext0; ip netns del world`)
		mustSh(t, `sysctl -qw net.ipv4.ip_forward=0`)
	})
}

func condition(t *testing.T, s *Service, code string) *service.Condition {
	t.Helper()
	h, err := s.Health(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range h.Conditions {
		if c.Code == code {
			return &c
		}
	}
	return nil
}

func forwarding(t *testing.T, name string) string {
	return strings.TrimSpace(mustSh(t, "cat /proc/sys/net/ipv4/conf/%s/forwarding", name))
}

func TestNAT(t *testing.T) {
	r := newRig(t)
	outside(t)
	r.network(nat("lan"))
	// The same subnet again: networks do not meet.
	r.network(nat("twin"), func(q *net.CreateNetworkRequest) { q.HostAccess = false })
	a, b := r.up(r.nic("lan")), r.up(r.nic("lan"))
	c := r.up(r.nic("twin"))
	if a.IP != c.IP {
		t.Fatalf("%v and %v: the test wants the same address twice", a.IP.Addr(), c.IP.Addr())
	}
	t.Run("guests reach the outside", func(t *testing.T) {
		ping(t, a, "203.0.113.1")
		ping(t, c, "203.0.113.1")
		ping(t, a, b.IP.Addr().String())
	})
	t.Run("the host reaches guests", func(t *testing.T) {
		mustSh(t, "ping -c1 -W2 %s", a.IP.Addr())
		mustSh(t, "ping -c1 -W2 %s", b.IP.Addr())
	})
	t.Run("guests do not reach the host", func(t *testing.T) {
		noPing(t, a, "203.0.113.2")
		noPing(t, c, "203.0.113.2")
		noPing(t, a, "169.254.64.0")
		noPing(t, a, "169.254.169.254")
	})
	t.Run("networks do not reach each other", func(t *testing.T) {
		r.network(nat("other"), func(q *net.CreateNetworkRequest) { q.Subnet4 = netip.MustParsePrefix("10.7.0.0/24") })
		d := r.up(r.nic("other"))
		mustSh(t, "ping -c1 -W2 %s", d.IP.Addr())
		noPing(t, a, d.IP.Addr().String())
		noPing(t, d, "10.0.0.3")
	})
	t.Run("the outside reaches nobody", func(t *testing.T) {
		mustSh(t, `ip -n world route add 10.0.0.0/8 via 203.0.113.2
ip -n world route add 198.51.100.0/24 via 203.0.113.2
! ip netns exec world ping -c1 -W1 %s`, a.IP.Addr())
	})
	t.Run("the host is no router for others", func(t *testing.T) {
		if forwarding(t, "ext0") != "1" || forwarding(t, "all") != "0" {
			t.Errorf("forwarding of ext0 %s, all %s", forwarding(t, "ext0"), forwarding(t, "all"))
		}
		mustSh(t, `ip netns add lan2
ip link add ext1 type veth peer name l0 netns lan2
ip addr add 198.51.100.1/24 dev ext1; ip link set ext1 up
ip -n lan2 addr add 198.51.100.2/24 dev l0; ip -n lan2 link set l0 up
ip -n lan2 route add default via 198.51.100.1`)
		defer mustSh(t, "ip link del ext1; ip netns del lan2")
		mustSh(t, "ping -c1 -W2 198.51.100.2")
		mustSh(t, "! ip netns exec world ping -c1 -W1 198.51.100.2")
	})
	t.Run("rules that others flush come back", func(t *testing.T) {
		mustSh(t, "nft flush ruleset")
		eventually(t, "host rules are back", func() bool {
			return strings.Contains(mustSh(t, "nft list ruleset"), "mvirt_net_"+string(r.instance))
		})
		ping(t, a, "203.0.113.1")
	})
	t.Run("a link that others delete comes back", func(t *testing.T) {
		links, _ := r.instance.HostLinks()
		for _, l := range links {
			mustSh(t, "ip link del %s", l)
		}
		eventually(t, "links are back", func() bool {
			now, _ := r.instance.HostLinks()
			return len(now) == len(links)
		})
		eventually(t, "packets flow", func() bool {
			_, err := a.Ping(0xcb007101, 200*time.Millisecond)
			return err == nil
		})
	})
	r.wipe()
	if forwarding(t, "ext0") != "0" {
		t.Error("forwarding stays on")
	}
	if s := mustSh(t, "nft list ruleset"); strings.Contains(s, "mvirt") {
		t.Errorf("rules stay: %s", s)
	}
	if s := mustSh(t, "ls /run/netns; ip -br link"); strings.Contains(s, "mvirt") || strings.Contains(s, "mvh") {
		t.Errorf("left: %s", s)
	}
}

func TestHostRouteCollision(t *testing.T) {
	r := newRig(t)
	outside(t)
	r.network(nat("lan"), func(q *net.CreateNetworkRequest) { q.Subnet4 = netip.MustParsePrefix("203.0.112.0/20") })
	if c := condition(t, r.Service, "HOST_ROUTE_COLLISION"); c == nil || !strings.Contains(c.Text, "203.0.113.0/24") || c.Remedy == "" {
		t.Errorf("%+v", c)
	}
	mustSh(t, "ping -c1 -W2 203.0.113.1")
}

func ping6(t *testing.T, g *testguest.Guest, dst string) uint8 {
	t.Helper()
	hops, err := g.Ping6(wire.IP6Of(netip.MustParseAddr(dst)), 30*time.Second)
	if err != nil {
		t.Error(err)
	}
	return hops
}

func noPing6(t *testing.T, g *testguest.Guest, dst string) {
	t.Helper()
	if _, err := g.Ping6(wire.IP6Of(netip.MustParseAddr(dst)), 300*time.Millisecond); err == nil {
		t.Errorf("%v reached %s", g.IP6.Addr(), dst)
	}
}

func TestIPv6(t *testing.T) {
	r := newRig(t)
	outside(t)
	mustSh(t, `ip addr add 2001:db8::2/64 dev ext0 nodad
ip -n world addr add 2001:db8::1/64 dev w0 nodad
ip -6 route add default via 2001:db8::1`)
	both := func(q *net.CreateNetworkRequest) { q.Subnet6 = netip.MustParsePrefix("fd00:1::/64") }
	only6 := func(q *net.CreateNetworkRequest) {
		q.Subnet4, q.Subnet6, q.HostAccess = netip.Prefix{}, netip.MustParsePrefix("fd00:1::/64"), false
	}
	r.network(nat("dual"), both)
	r.network(nat("six"), only6)
	na := r.nic("dual")
	a, b, c := r.up(na), r.up(r.nic("dual")), r.guest(r.nic("six"))
	for _, g := range []*testguest.Guest{a, b, c} {
		if err := g.Up6(30 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if a.IP6.Addr() != na.IPv6 || na.IPv6.String() != "fd00:1::2" {
		t.Errorf("%v, allocated %v", a.IP6.Addr(), na.IPv6)
	}
	if h := ping6(t, a, b.IP6.Addr().String()); h != 63 {
		t.Errorf("hop limit %d", h)
	}
	ping6(t, a, "fe80::1")
	ping6(t, a, "2001:db8::1")
	ping6(t, c, "2001:db8::1")
	ping(t, a, b.IP.Addr().String())
	mustSh(t, "ping -c1 -W2 %s", a.IP6.Addr())
	noPing6(t, a, "2001:db8::2")
	noPing6(t, c, "2001:db8::2")
	noPing6(t, a, "fd6d:7669:7274::a9fe:4000")
	noPing6(t, a, "fd6d:7669:7274::a9fe:4003")
	mustSh(t, "ip -n world route add fd00:1::/64 via 2001:db8::2; ! ip netns exec world ping -c1 -W1 %s", a.IP6.Addr())
	if s := strings.TrimSpace(mustSh(t, "cat /proc/sys/net/ipv6/conf/all/forwarding")); s != "0" && exists("/proc/sys/net/ipv6/conf/all/force_forwarding") {
		t.Error("the whole host forwards")
	}
	r.reopen()
	ping6(t, a, "2001:db8::1")
}
