package conformance

import (
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

var netChecks = []check{
	{"network names", checkNetworkNames},
	{"network create is idempotent", checkNetworkIdempotent},
	{"network refuses", checkNetworkRefuses},
	{"network list", checkNetworkList},
	{"network in use", checkNetworkInUse},
	{"nic names", checkNICNames},
	{"nic create is idempotent", checkNICIdempotent},
	{"nic addresses", checkNICAddresses},
	{"subnet full", checkSubnetFull},
	{"networks may overlap", checkOverlap},
	{"nics concurrently", checkNICsConcurrently},
	{"nic attach", checkNICAttach},
	{"nics survive restarts", checkNICsSurvive},
	{"network update", checkNetworkUpdate},
	{"security groups", checkSecurityGroups},
}

func (c *C) network(name, subnet string) net.Network {
	n, err := c.p.Net.CreateNetwork(c, net.CreateNetworkRequest{ID: ident.New(), Name: c.name(name), Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix(subnet)})
	c.ok(err, "CreateNetwork %s", name)
	c.removeNetwork(n.ID)
	return n
}

func (c *C) removeNetwork(id string) {
	c.later(func() { c.ok(c.p.Net.DeleteNetwork(c, net.Ref{Ref: id}), "DeleteNetwork") })
}

func (c *C) nic(network string, more func(*net.CreateNICRequest)) (net.NIC, error) {
	req := net.CreateNICRequest{ID: ident.New(), NetworkID: network}
	if more != nil {
		more(&req)
	}
	n, err := c.p.Net.CreateNIC(c, req)
	if err == nil {
		c.later(func() { c.ok(c.p.Net.DeleteNIC(c, net.Ref{Ref: req.ID}), "DeleteNIC") })
	}
	return n, err
}

func (c *C) mustNIC(network string, more func(*net.CreateNICRequest)) net.NIC {
	n, err := c.nic(network, more)
	c.ok(err, "CreateNIC")
	return n
}

func checkNetworkNames(c *C) {
	for _, n := range badNames {
		v, err := c.p.Net.CreateNetwork(c, net.CreateNetworkRequest{ID: ident.New(), Name: n, Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.91.0.0/24")})
		c.fails(err, errs.Invalid, "network name %q", n)
		if err == nil {
			c.removeNetwork(v.ID)
		}
	}
	for _, ref := range []string{ident.New(), "ct-none"} {
		_, err := c.p.Net.GetNetwork(c, net.Ref{Ref: ref})
		c.fails(err, errs.NotFound, "GetNetwork of nothing")
		_, err = c.p.Net.GetNIC(c, net.Ref{Ref: ref})
		c.fails(err, errs.NotFound, "GetNIC of nothing")
		c.ok(c.p.Net.DeleteNetwork(c, net.Ref{Ref: ref}), "DeleteNetwork of nothing")
		c.ok(c.p.Net.DeleteNIC(c, net.Ref{Ref: ref}), "DeleteNIC of nothing")
		c.ok(c.p.Net.Detach(c, net.DetachRequest{NICID: ref, VMID: ident.New()}), "Detach of nothing")
		_, err = c.p.Net.Attach(c, net.AttachRequest{NICID: ref, Owner: c.owner(ident.New()), Modes: []net.AttachMode{net.AttachTAPFD}})
		c.fails(err, errs.NotFound, "Attach of nothing")
	}
}

func checkNetworkIdempotent(c *C) {
	req := net.CreateNetworkRequest{ID: ident.New(), Name: c.name("n"), Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.91.1.0/24"),
		DNS: []netip.Addr{netip.MustParseAddr("9.9.9.9")}, Domain: "example.test", Labels: map[string]string{"a": "b"}}
	first, err := c.p.Net.CreateNetwork(c, req)
	c.ok(err, "CreateNetwork")
	c.removeNetwork(req.ID)
	if first.ID != req.ID || first.Mode != net.ModePrivate || first.Subnet4 != req.Subnet4 || first.MTU != 1500 || !slices.Equal(first.DNS, req.DNS) ||
		first.Domain != req.Domain || first.Labels["a"] != "b" || first.CreatedAt.IsZero() || first.State != net.StateCreated || !first.Gateway4.IsValid() {
		c.Errorf("created %+v", first)
	}
	for range 3 {
		again, err := c.p.Net.CreateNetwork(c, req)
		c.ok(err, "the same create again")
		if again.ID != first.ID || !again.CreatedAt.Equal(first.CreatedAt) {
			c.Errorf("the same create gave another network: %+v", again)
		}
	}
	other := req
	other.Subnet4 = netip.MustParsePrefix("10.91.2.0/24")
	_, err = c.p.Net.CreateNetwork(c, other)
	c.fails(err, errs.Exists, "the same id, another subnet")
	other = req
	other.ID = ident.New()
	_, err = c.p.Net.CreateNetwork(c, other)
	c.fails(err, errs.Exists, "another id, the same name")
	for range 2 {
		c.ok(c.p.Net.DeleteNetwork(c, net.Ref{Ref: req.ID}), "DeleteNetwork")
	}
}

func checkNetworkRefuses(c *C) {
	try := func(what string, kind errs.Kind, more func(*net.CreateNetworkRequest)) {
		req := net.CreateNetworkRequest{ID: ident.New(), Name: c.name("bad"), Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.91.3.0/24")}
		more(&req)
		_, err := c.p.Net.CreateNetwork(c, req)
		c.fails(err, kind, "%s", what)
		if err == nil {
			c.removeNetwork(req.ID)
		}
	}
	for _, s := range []string{"10.91.3.1/24", "10.0.0.0/7", "10.91.3.0/31", "10.91.3.0/32", "0.0.0.0/0", "fd00::/64"} {
		try("IPv4 subnet "+s, errs.Invalid, func(r *net.CreateNetworkRequest) { r.Subnet4 = netip.MustParsePrefix(s) })
	}
	try("no subnet", errs.Invalid, func(r *net.CreateNetworkRequest) { r.Subnet4 = netip.Prefix{} })
	try("no mode", errs.Invalid, func(r *net.CreateNetworkRequest) { r.Mode = 0 })
	try("mode 99", errs.Invalid, func(r *net.CreateNetworkRequest) { r.Mode = 99 })
	try("MTU 100", errs.Invalid, func(r *net.CreateNetworkRequest) { r.MTU = 100 })
	try("MTU 70000", errs.Invalid, func(r *net.CreateNetworkRequest) { r.MTU = 70000 })
	if !c.has(service.FeatureNetIPv6) {
		try("an IPv6 subnet without the feature", errs.Unsupported, func(r *net.CreateNetworkRequest) { r.Subnet6 = netip.MustParsePrefix("fd00:91::/64") })
	}
	if !c.has(service.FeatureNetBridge) {
		try("mode bridge without the feature", errs.Unsupported, func(r *net.CreateNetworkRequest) {
			r.Mode, r.Bridge, r.Subnet4 = net.ModeBridge, "br0", netip.Prefix{}
		})
	}
	_, err := c.p.Net.GetNetwork(c, net.Ref{Ref: c.name("bad")})
	c.fails(err, errs.NotFound, "what refused creates left")
}

func checkNetworkList(c *C) {
	var want []string
	for i, n := range []string{"m", "a", "z"} {
		want = append(want, c.network(n, "10.91."+[]string{"4", "5", "6"}[i]+".0/24").ID)
	}
	list, err := c.p.Net.ListNetworks(c)
	c.ok(err, "ListNetworks")
	for _, id := range want {
		if !slices.ContainsFunc(list, func(n net.Network) bool { return n.ID == id }) {
			c.Errorf("%s is not listed", id)
		}
	}
	got, err := c.p.Net.GetNetwork(c, net.Ref{Ref: c.name("a")})
	c.ok(err, "GetNetwork by name")
	if got.ID != want[1] {
		c.Errorf("by name %+v", got)
	}
}

func checkNetworkInUse(c *C) {
	n := c.network("n", "10.91.7.0/24")
	nic := c.mustNIC(n.ID, func(r *net.CreateNICRequest) { r.Name = c.name("nic") })
	err := c.p.Net.DeleteNetwork(c, net.Ref{Ref: n.ID})
	c.because(err, errs.Precondition, "NETWORK_IN_USE", "DeleteNetwork with a NIC on it")
	if err != nil && !strings.Contains(err.Error(), nic.Name) {
		c.Errorf("the message does not name the NIC: %v", err)
	}
	if got, _ := c.p.Net.GetNetwork(c, net.Ref{Ref: n.ID}); got.NICCount != 1 {
		c.Errorf("nic_count %d", got.NICCount)
	}
	c.ok(c.p.Net.DeleteNIC(c, net.Ref{Ref: nic.ID}), "DeleteNIC")
	c.ok(c.p.Net.DeleteNetwork(c, net.Ref{Ref: n.ID}), "DeleteNetwork")
}

func checkNICNames(c *C) {
	n := c.network("n", "10.91.8.0/24")
	for _, name := range badNames {
		if name == "" {
			continue // one is derived from the id
		}
		_, err := c.nic(n.ID, func(r *net.CreateNICRequest) { r.Name = name })
		c.fails(err, errs.Invalid, "NIC name %q", name)
	}
	if v := c.mustNIC(n.ID, nil); v.Name == "" {
		c.Errorf("no name was derived: %+v", v)
	}
	_, err := c.nic(ident.New(), nil)
	c.fails(err, errs.NotFound, "a network that does not exist")
	c.mustNIC(n.Name, func(r *net.CreateNICRequest) { r.Name = c.name("x") })
	_, err = c.nic(n.ID, func(r *net.CreateNICRequest) { r.Name = c.name("x") })
	c.fails(err, errs.Exists, "a name that is taken")
}

func checkNICIdempotent(c *C) {
	n := c.network("n", "10.91.9.0/24")
	req := net.CreateNICRequest{ID: ident.New(), Name: c.name("nic"), NetworkID: n.ID, HostName: "web", Labels: map[string]string{"a": "b"}}
	first, err := c.p.Net.CreateNIC(c, req)
	c.ok(err, "CreateNIC")
	c.later(func() { c.ok(c.p.Net.DeleteNIC(c, net.Ref{Ref: req.ID}), "DeleteNIC") })
	if first.NetworkID != n.ID || first.NetworkName != n.Name || !n.Subnet4.Contains(first.IPv4) || first.HostName != "web" || first.Labels["a"] != "b" ||
		first.State != net.StateCreated || first.VMID != "" || first.CreatedAt.IsZero() || len(first.MAC) != 17 || first.MAC != strings.ToLower(first.MAC) {
		c.Errorf("created %+v", first)
	}
	for range 3 {
		again, err := c.p.Net.CreateNIC(c, req)
		c.ok(err, "the same create again")
		if again.IPv4 != first.IPv4 || again.MAC != first.MAC {
			c.Errorf("the same create gave other addresses: %+v", again)
		}
	}
	other := req
	other.HostName = "db"
	_, err = c.p.Net.CreateNIC(c, other)
	c.fails(err, errs.Exists, "the same id, another host name")
}

func checkNICAddresses(c *C) {
	n := c.network("n", "10.91.10.0/24")
	seen := map[netip.Addr]bool{}
	macs := map[string]bool{}
	for range 10 {
		v := c.mustNIC(n.ID, nil)
		if seen[v.IPv4] || macs[v.MAC] || !n.Subnet4.Contains(v.IPv4) || v.IPv4 == netip.MustParseAddr("10.91.10.0") || v.IPv4 == netip.MustParseAddr("10.91.10.255") {
			c.Errorf("allocated %s and %s", v.IPv4, v.MAC)
		}
		seen[v.IPv4], macs[v.MAC] = true, true
	}
	want := netip.MustParseAddr("10.91.10.200")
	v := c.mustNIC(n.ID, func(r *net.CreateNICRequest) { r.IPv4, r.MAC = want, "52:54:00:AB:CD:EF" })
	if v.IPv4 != want || v.MAC != "52:54:00:ab:cd:ef" {
		c.Errorf("asked for %s and 52:54:00:ab:cd:ef, got %s and %s", want, v.IPv4, v.MAC)
	}
	_, err := c.nic(n.ID, func(r *net.CreateNICRequest) { r.IPv4 = want })
	c.because(err, errs.Exists, "ADDRESS_IN_USE", "an address that is taken")
	_, err = c.nic(n.ID, func(r *net.CreateNICRequest) { r.MAC = v.MAC })
	c.because(err, errs.Exists, "MAC_IN_USE", "a MAC that is taken")
	for _, a := range []string{"10.91.11.5", "10.91.10.0", "10.91.10.255", "fd00::1"} {
		_, err = c.nic(n.ID, func(r *net.CreateNICRequest) { r.IPv4 = netip.MustParseAddr(a) })
		c.fails(err, errs.Invalid, "the address %s", a)
	}
	for _, m := range []string{"x", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "52:54:00:12:34", "00:00:00:00:00:00", "02-00-00"} {
		_, err = c.nic(n.ID, func(r *net.CreateNICRequest) { r.MAC = m })
		c.fails(err, errs.Invalid, "the MAC %s", m)
	}
	c.ok(c.p.Net.DeleteNIC(c, net.Ref{Ref: v.ID}), "DeleteNIC")
	if again := c.mustNIC(n.ID, func(r *net.CreateNICRequest) { r.IPv4, r.MAC = want, v.MAC }); again.IPv4 != want {
		c.Errorf("a released address was not given again: %+v", again)
	}
}

func checkSubnetFull(c *C) {
	n := c.network("n", "10.91.12.0/29")
	var got []net.NIC
	for len(got) < 9 {
		v, err := c.nic(n.ID, nil)
		if err != nil {
			c.because(err, errs.Exhausted, "SUBNET_FULL", "a NIC more than the subnet has addresses")
			break
		}
		if !v.IPv4.IsValid() {
			c.Errorf("NIC %d has no address: %+v", len(got), v)
		}
		got = append(got, v)
	}
	if len(got) < 4 || len(got) > 6 {
		c.Fatalf("a /29 gave %d addresses, must give 4 to 6", len(got))
	}
	list, err := c.p.Net.ListNICs(c, net.ListNICsRequest{NetworkID: n.ID})
	c.ok(err, "ListNICs")
	if len(list) != len(got) {
		c.Errorf("a refused create left a NIC: %d are listed, %d were made", len(list), len(got))
	}
	c.ok(c.p.Net.DeleteNIC(c, net.Ref{Ref: got[1].ID}), "DeleteNIC")
	if v := c.mustNIC(n.ID, nil); v.IPv4 != got[1].IPv4 {
		c.Errorf("the one free address is %s, got %s", got[1].IPv4, v.IPv4)
	}
}

func checkOverlap(c *C) {
	a, b := c.network("a", "10.91.13.0/24"), c.network("b", "10.91.13.0/24")
	want := netip.MustParseAddr("10.91.13.77")
	for _, n := range []net.Network{a, b} {
		c.mustNIC(n.ID, func(r *net.CreateNICRequest) { r.IPv4 = want })
	}
	for _, n := range []net.Network{a, b} {
		list, err := c.p.Net.ListNICs(c, net.ListNICsRequest{NetworkID: n.Name})
		c.ok(err, "ListNICs by the network's name")
		if len(list) != 1 || list[0].NetworkID != n.ID {
			c.Errorf("on %s: %+v", n.Name, list)
		}
	}
}

func checkNICsConcurrently(c *C) {
	n := c.network("n", "10.91.14.0/24")
	var mu sync.Mutex
	var wg sync.WaitGroup
	seen := map[netip.Addr]string{}
	for range 16 {
		id := ident.New()
		c.later(func() { c.ok(c.p.Net.DeleteNIC(c, net.Ref{Ref: id}), "DeleteNIC") })
		wg.Go(func() {
			v, err := c.p.Net.CreateNIC(c, net.CreateNICRequest{ID: id, NetworkID: n.ID})
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[v.IPv4] != "" {
				c.Errorf("side by side: %s was given twice, or %v", v.IPv4, err)
			}
			seen[v.IPv4] = id
		})
	}
	wg.Wait()
}

func checkNICAttach(c *C) {
	n := c.network("n", "10.91.15.0/24")
	v := c.mustNIC(n.ID, nil)
	vm := ident.New()
	modes := []net.AttachMode{net.AttachTAPFD, net.AttachTAPName, net.AttachVhostUser}
	attach := func(vm string) (net.Attachment, error) {
		a, err := c.p.Net.Attach(c, net.AttachRequest{NICID: v.ID, Owner: c.owner(vm), Modes: modes})
		for _, f := range a.TAP {
			if f == nil {
				c.Errorf("a nil descriptor")
				continue
			}
			f.Close()
		}
		return a, err
	}
	a, err := attach(vm)
	if k := errs.KindOf(err); k == errs.Denied || k == errs.Unsupported {
		c.Skipf("the plugin cannot make a data path here: %v", err)
	}
	c.ok(err, "Attach")
	c.later(func() { c.ok(c.p.Net.Detach(c, net.DetachRequest{NICID: v.ID, VMID: vm}), "Detach") })
	switch {
	case a.Mode == net.AttachTAPFD && len(a.TAP) != 1, a.Mode == net.AttachTAPName && a.TAPName == "", a.Mode == net.AttachVhostUser && a.SocketPath == "",
		a.MAC != v.MAC, a.MTU < 1280, a.Mode == 0:
		c.Errorf("attachment %+v", a)
	}
	again, err := attach(vm)
	c.ok(err, "Attach again")
	if again.Mode != a.Mode || again.MAC != a.MAC {
		c.Errorf("attaching again gave %+v, was %+v", again, a)
	}
	_, err = attach(ident.New())
	c.because(err, errs.Precondition, "NIC_IN_USE", "Attach for another VM")
	c.because(c.p.Net.DeleteNIC(c, net.Ref{Ref: v.ID}), errs.Precondition, "NIC_IN_USE", "DeleteNIC while attached")
	got, err := c.p.Net.GetNIC(c, net.Ref{Ref: v.ID})
	c.ok(err, "GetNIC")
	if got.VMID != vm || got.State != net.StateConnected || got.AttachMode != a.Mode {
		c.Errorf("attached NIC %+v", got)
	}
	if list, err := c.p.Net.ListNICs(c, net.ListNICsRequest{VMID: vm}); err != nil || len(list) != 1 || list[0].ID != v.ID {
		c.Errorf("ListNICs of the VM: %+v, %v", list, err)
	}
	c.ok(c.p.Net.Detach(c, net.DetachRequest{NICID: v.ID, VMID: ident.New()}), "Detach of a VM that is not attached")
	if got, _ := c.p.Net.GetNIC(c, net.Ref{Ref: v.ID}); got.VMID != vm {
		c.Errorf("detaching another VM took the attachment away")
	}
	c.restart(true)
	if got, err := c.p.Net.GetNIC(c, net.Ref{Ref: v.ID}); err != nil || got.VMID != vm {
		c.Errorf("the attachment did not survive a kill of the plugin: %+v, %v", got, err)
	}
	for range 3 {
		c.ok(c.p.Net.Detach(c, net.DetachRequest{NICID: v.ID, VMID: vm}), "Detach")
	}
	got, err = c.p.Net.GetNIC(c, net.Ref{Ref: v.ID})
	c.ok(err, "GetNIC")
	if got.VMID != "" || got.State != net.StateCreated {
		c.Errorf("detached NIC %+v", got)
	}
}

func checkNICsSurvive(c *C) {
	n := c.network("n", "10.91.16.0/24")
	v := c.mustNIC(n.ID, func(r *net.CreateNICRequest) { r.Labels = map[string]string{"k": "v"} })
	for _, kill := range []bool{false, true} {
		c.restart(kill)
		got, err := c.p.Net.GetNIC(c, net.Ref{Ref: v.ID})
		c.ok(err, "GetNIC after a restart (killed: %v)", kill)
		if got.MAC != v.MAC || got.IPv4 != v.IPv4 || got.Name != v.Name || got.Labels["k"] != "v" || !got.CreatedAt.Equal(v.CreatedAt) {
			c.Errorf("after a restart %+v, was %+v", got, v)
		}
		_, err = c.nic(n.ID, func(r *net.CreateNICRequest) { r.IPv4 = v.IPv4 })
		c.because(err, errs.Exists, "ADDRESS_IN_USE", "its address after a restart")
	}
}

func checkNetworkUpdate(c *C) {
	if !c.has(service.FeatureNetUpdate) {
		c.Skipf("the plugin does not declare the feature NET_UPDATE")
	}
	n, other := c.network("n", "10.91.17.0/24"), c.network("o", "10.91.18.0/24")
	dns := []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.8.8")}
	got, err := c.p.Net.UpdateNetwork(c, net.UpdateNetworkRequest{Ref: n.ID, SetDNS: true, DNS: dns, SetDomain: true, Domain: "d.test"})
	c.ok(err, "UpdateNetwork")
	if !slices.Equal(got.DNS, dns) || got.Domain != "d.test" || got.Name != n.Name || got.MTU != n.MTU {
		c.Errorf("updated %+v", got)
	}
	got, err = c.p.Net.UpdateNetwork(c, net.UpdateNetworkRequest{Ref: n.ID, Name: c.name("renamed"), SetDNS: true})
	c.ok(err, "UpdateNetwork")
	if got.Name != c.name("renamed") || len(got.DNS) != 0 || got.Domain != "d.test" {
		c.Errorf("updated %+v", got)
	}
	_, err = c.p.Net.UpdateNetwork(c, net.UpdateNetworkRequest{Ref: n.ID, Name: other.Name})
	c.fails(err, errs.Exists, "a rename to a name that is taken")
	_, err = c.p.Net.UpdateNetwork(c, net.UpdateNetworkRequest{Ref: ident.New()})
	c.fails(err, errs.NotFound, "UpdateNetwork of nothing")
	v := c.mustNIC(n.ID, nil)
	routed := []netip.Prefix{netip.MustParsePrefix("10.92.0.0/24")}
	nic, err := c.p.Net.UpdateNIC(c, net.UpdateNICRequest{Ref: v.ID, SetRoutedPrefixes: true, RoutedPrefixes: routed})
	c.ok(err, "UpdateNIC")
	if !slices.Equal(nic.RoutedPrefixes, routed) || nic.IPv4 != v.IPv4 {
		c.Errorf("updated %+v", nic)
	}
}

func checkSecurityGroups(c *C) {
	if !c.has(service.FeatureNetSecurity) {
		c.Skipf("the plugin does not declare the feature NET_SECURITY")
	}
	rules := []net.Rule{{Direction: net.Inbound, Protocol: "tcp", PortFrom: 22, CIDR: netip.MustParsePrefix("10.0.0.0/8")}}
	req := net.CreateSecurityGroupRequest{ID: ident.New(), Name: c.name("sg"), Rules: rules}
	for range 2 {
		g, err := c.p.Net.CreateSecurityGroup(c, req)
		c.ok(err, "CreateSecurityGroup")
		if g.ID != req.ID || len(g.Rules) != 1 || g.Rules[0].Protocol != "tcp" {
			c.Errorf("created %+v", g)
		}
	}
	c.later(func() { c.ok(c.p.Net.DeleteSecurityGroup(c, net.Ref{Ref: req.ID}), "DeleteSecurityGroup") })
	for _, r := range []net.Rule{{Direction: 9, Protocol: "tcp"}, {Direction: net.Inbound, Protocol: "nonsense"}, {Direction: net.Inbound, Protocol: "tcp", PortFrom: 99999},
		{Direction: net.Inbound, Protocol: "tcp", PortFrom: 10, PortTo: 5}} {
		_, err := c.p.Net.SetSecurityGroupRules(c, net.SetSecurityGroupRulesRequest{Ref: req.ID, Rules: []net.Rule{r}})
		c.fails(err, errs.Invalid, "the rule %+v", r)
	}
	g, err := c.p.Net.SetSecurityGroupRules(c, net.SetSecurityGroupRulesRequest{Ref: req.Name})
	c.ok(err, "SetSecurityGroupRules")
	if len(g.Rules) != 0 {
		c.Errorf("rules %+v", g.Rules)
	}
	n := c.network("n", "10.91.19.0/24")
	v := c.mustNIC(n.ID, func(r *net.CreateNICRequest) { r.SecurityGroups = []string{req.Name} })
	if !slices.Equal(v.SecurityGroups, []string{req.ID}) {
		c.Errorf("groups %v, must be ids", v.SecurityGroups)
	}
	c.because(c.p.Net.DeleteSecurityGroup(c, net.Ref{Ref: req.ID}), errs.Precondition, "GROUP_IN_USE", "DeleteSecurityGroup in use")
	_, err = c.nic(n.ID, func(r *net.CreateNICRequest) { r.SecurityGroups = []string{ident.New()} })
	c.fails(err, errs.NotFound, "a group that does not exist")
}
