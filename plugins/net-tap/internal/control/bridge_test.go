package control

import (
	"net/netip"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/testguest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/net"
)

func TestBridge(t *testing.T) {
	r := newRig(t)
	// It has another port, and no address of its own: ours must not change the one that it has from there.
	mustSh(t, `ip link add br0 type bridge
ip link add ext8 type veth peer name ext7
ip link set ext8 master br0
ip link set ext8 up
ip link set ext7 up
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up`)
	t.Cleanup(func() { mustSh(t, "ip link del br0; ip link del ext8") })
	n := r.network(func(q *net.CreateNetworkRequest) { q.Mode, q.Bridge, q.Subnet4 = net.ModeBridge, "br0", netip.Prefix{} })
	if n.MTU != 1500 || n.Gateway4.IsValid() {
		t.Errorf("%+v", n)
	}
	nicA, nicB := r.nic("lan"), r.nic("lan")
	a := r.guest(nicA)
	b := r.guest(nicB)
	setUp := func(g *testguest.Guest, ip string) {
		t.Helper()
		g.SetIP(wire.IP4Of(netip.MustParseAddr(ip)))
		eventually(t, "the bridge answers", func() bool { // its port needs a moment to come up
			mac, err := g.ARP(wire.IP4Of(netip.MustParseAddr("10.9.0.1")), 200*time.Millisecond)
			g.GW = mac
			return err == nil
		})
	}
	setUp(a, "10.9.0.2")
	setUp(b, "10.9.0.3")
	see := func() {
		t.Helper()
		for _, g := range []*testguest.Guest{a, b} {
			eventually(t, "packets flow", func() bool {
				_, err := g.Ping(wire.IP4Of(netip.MustParseAddr("10.9.0.1")), 200*time.Millisecond)
				return err == nil
			})
		}
		mustSh(t, "ping -c1 -W2 10.9.0.2")
		mustSh(t, "ping -c1 -W2 10.9.0.3")
	}
	see()
	forged := a.Echo(a.IP, wire.IP4Of(netip.MustParseAddr("10.9.0.1")), 64, 1, 1, 8)
	wire.MAC(0x525400999999).Put(forged[6:])
	_ = a.Send(forged)
	eventually(t, "the forged frame is counted", func() bool {
		nic, _ := r.GetNIC(ctx, net.Ref{Ref: nicA.ID})
		return nic.Counters.TxSpoofed == 1
	})
	r.reopen()
	see()
	r.signalWorker(9)
	see()
	mustSh(t, "ip link del %s", "mvl"+nicA.ID[26:])
	see()
	r.wipe()
	if s := mustSh(t, "ip -br link | grep -E 'mv[lht]' || true"); s != "" {
		t.Errorf("left: %s", s)
	}
}
