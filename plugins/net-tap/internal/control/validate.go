package control

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

// MTU limits: IPv6's minimum, and jumbo frames.
const (
	mtuDefault = 1500
	mtuMin     = 1280
	mtuMax     = 9000
)

// maxServers is how many DNS or NTP servers of one family are announced.
const maxServers = 8

// noNetwork are prefixes that no guest's subnet may touch (RFC 6890).
var noNetwork = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// same says whether two requests ask for the same.
func same(a, b any) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

func (s *Service) checkNetwork(r *net.CreateNetworkRequest) error {
	if err := ident.CheckID("id", r.ID); err != nil {
		return err
	}
	if err := ident.CheckName("name", r.Name); err != nil {
		return err
	}
	switch r.Mode {
	case net.ModePrivate, net.ModeNAT:
	case net.ModeBridge:
		return s.checkBridge(r)
	default:
		return errs.Field("mode", "give private, nat or bridge", "mode %d is none", uint32(r.Mode))
	}
	if !r.Subnet4.IsValid() && !r.Subnet6.IsValid() {
		return errs.Field("subnet4", "give an IPv4 subnet such as 10.0.0.0/24, an IPv6 subnet such as fd00:1::/64, or both", "the network has no subnet")
	}
	if r.Subnet4.IsValid() {
		if err := checkSubnet4(r.Subnet4); err != nil {
			return err
		}
	}
	if r.Subnet6.IsValid() {
		if err := checkSubnet6(r.Subnet6); err != nil {
			return err
		}
	}
	if r.Mode == net.ModeNAT && r.Subnet4.IsValid() && r.Subnet4.Overlaps(s.cfg.LinkPrefix) {
		return errs.Field("subnet4", "choose another subnet, or start mvirt-net with another --link-prefix",
			"%s overlaps %s, where the host's links have their addresses", r.Subnet4, s.cfg.LinkPrefix)
	}
	if r.Bridge != "" {
		return errs.Field("bridge", "leave it empty", "a %s network has no bridge", r.Mode)
	}
	if r.HostAccess && r.Mode != net.ModeNAT {
		return errs.Field("host_access", "use mode nat, or leave host access off", "only a nat network can be reached by the host")
	}
	return checkAnnounced(r)
}

// checkBridge checks a network of mode bridge: addresses and what guests are told are the bridge's business.
func (s *Service) checkBridge(r *net.CreateNetworkRequest) error {
	switch {
	case r.Subnet4.IsValid() || r.Subnet6.IsValid():
		return errs.Field("subnet4", "leave the subnets out", "addresses on a bridge network are given by whoever is on the bridge")
	case len(r.DNS) > 0 || len(r.NTP) > 0 || r.Domain != "":
		return errs.Field("dns", "leave DNS, NTP and domain out", "a bridge network announces nothing")
	case r.HostAccess:
		return errs.Field("host_access", "leave it off", "the host is on the bridge, or it is not: that is not ours to change")
	case r.Bridge == "" || len(r.Bridge) > 15 || strings.ContainsAny(r.Bridge, "/ \t\n:"):
		return errs.Field("bridge", "name a bridge of the host, such as br0", "bridge %s cannot be", ident.Quote(r.Bridge))
	}
	mtu, ok := hostnet.Bridge(r.Bridge)
	if !ok {
		return errs.Field("bridge", "make it first: ip link add "+r.Bridge+" type bridge", "the host has no bridge %s", r.Bridge)
	}
	if r.MTU == 0 {
		r.MTU = uint32(min(max(mtu, mtuMin), mtuMax))
	}
	return checkAnnounced(r)
}

// checkAnnounced checks what guests are told.
func checkAnnounced(r *net.CreateNetworkRequest) error {
	if r.MTU == 0 {
		r.MTU = mtuDefault
	}
	if r.MTU < mtuMin || r.MTU > mtuMax {
		return errs.Field("mtu", fmt.Sprintf("give %d to %d, or 0 for %d", mtuMin, mtuMax, mtuDefault), "an MTU of %d is not possible", r.MTU)
	}
	if err := checkServers("dns", r.DNS); err != nil {
		return err
	}
	if err := checkServers("ntp", r.NTP); err != nil {
		return err
	}
	return checkDomain("domain", r.Domain)
}

func checkSubnet4(p netip.Prefix) error {
	const remedy = "give an IPv4 subnet of /8 to /30 whose host bits are zero, such as 10.0.0.0/24"
	switch {
	case !p.Addr().Is4():
		return errs.Field("subnet4", remedy, "%s is not an IPv4 subnet", p)
	case p.Bits() < 8 || p.Bits() > 30:
		return errs.Field("subnet4", remedy, "%s is a /%d", p, p.Bits())
	case p != p.Masked():
		return errs.Field("subnet4", "write "+p.Masked().String(), "%s has host bits set", p)
	}
	return checkReserved("subnet4", p)
}

func checkSubnet6(p netip.Prefix) error {
	const remedy = "give an IPv6 subnet of /32 to /126 whose host bits are zero, such as fd00:1::/64"
	switch {
	case !p.Addr().Is6() || p.Addr().Is4In6():
		return errs.Field("subnet6", remedy, "%s is not an IPv6 subnet", p)
	case p.Bits() < 32 || p.Bits() > 126:
		return errs.Field("subnet6", remedy, "%s is a /%d", p, p.Bits())
	case p != p.Masked():
		return errs.Field("subnet6", "write "+p.Masked().String(), "%s has host bits set", p)
	case p.Overlaps(hostnet.Link6):
		return errs.Field("subnet6", remedy, "%s overlaps %s, where the host's links have their addresses", p, hostnet.Link6)
	}
	return checkReserved("subnet6", p)
}

func checkReserved(field string, p netip.Prefix) error {
	for _, q := range noNetwork {
		if p.Overlaps(q) {
			return errs.Field(field, "choose another prefix, for example from 10.0.0.0/8", "%s lies in %s, which has a meaning of its own", p, q)
		}
	}
	return nil
}

func checkServers(field string, as []netip.Addr) error {
	n4, n6 := 0, 0
	for _, a := range as {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Zone() != "" || a.Is4In6() {
			return errs.Field(field, "give unicast addresses that guests can reach", "%s is no server's address", a)
		}
		if a.Is4() {
			n4++
		} else {
			n6++
		}
	}
	if n4 > maxServers || n6 > maxServers {
		return errs.Field(field, fmt.Sprintf("give at most %d of each family", maxServers), "%d servers are too many to announce", len(as))
	}
	return nil
}

// checkDomain wants a DNS name (RFC 1035, section 2.3.1, with digits first allowed) or nothing.
func checkDomain(field, d string) error {
	if d == "" {
		return nil
	}
	ok := len(d) <= 253
	for _, label := range strings.Split(d, ".") {
		ok = ok && checkLabel(label)
	}
	if !ok {
		return errs.Field(field, "give a DNS name such as example.org", "%s %s is not one", field, ident.Quote(d))
	}
	return nil
}

func checkLabel(l string) bool {
	if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
		return false
	}
	for _, c := range []byte(l) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// checkNIC checks what does not depend on other NICs. n is the network.
func checkNIC(r *net.CreateNICRequest, n *net.CreateNetworkRequest) error {
	if r.MAC != "" {
		m, ok := wire.ParseMAC(r.MAC)
		if !ok || m.Group() || m == 0 || m == engine.GatewayMAC {
			return errs.Field("mac", "give a unicast address such as 52:54:00:12:34:56, or none", "MAC %s is not usable", ident.Quote(r.MAC))
		}
		r.MAC = m.String()
	}
	if a := r.IPv4; a.IsValid() {
		if err := checkHost4("ipv4", a, n.Subnet4); err != nil {
			return err
		}
	}
	if a := r.IPv6; a.IsValid() {
		remedy := "leave it out"
		if n.Subnet6.IsValid() {
			remedy = fmt.Sprintf("give an address of %s other than its first two, or none", n.Subnet6)
		}
		switch {
		case !n.Subnet6.IsValid() || !n.Subnet6.Contains(a):
			return errs.Field("ipv6", remedy, "%s is outside the network's subnets", a)
		case a == n.Subnet6.Addr() || a == engine.RouterAddr(n.Subnet6):
			return errs.Field("ipv6", remedy, "%s is the network's own router", a)
		}
	}
	if r.HostName != "" {
		if err := checkDomain("host_name", r.HostName); err != nil || len(r.HostName) > 63 {
			return errs.Field("host_name", "give a host name of at most 63 letters, digits and '-'", "host name %s is not usable", ident.Quote(r.HostName))
		}
	}
	return checkRouted(r.RoutedPrefixes, n)
}

// checkHost4 says whether a is an address that a NIC of the subnet may have.
func checkHost4(field string, a netip.Addr, p netip.Prefix) error {
	remedy := "leave it out"
	if p.IsValid() {
		remedy = fmt.Sprintf("give an address of %s other than its first two and its last, or none", p)
	}
	switch {
	case !p.IsValid() || !p.Contains(a):
		return errs.Field(field, remedy, "%s is outside the network's subnets", a)
	case a == p.Addr() || a == lastAddr(p):
		return errs.Field(field, remedy, "%s is the subnet's network or broadcast address", a)
	case a == engine.RouterAddr(p):
		return errs.Field(field, remedy, "%s is the network's own router", a)
	}
	return nil
}

// lastAddr is the highest address in an IPv4 prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	a := wire.IP4Of(p.Addr()) | wire.IP4(uint32(0xffffffff)>>p.Bits())
	return a.Addr()
}

// checkRouted checks routed prefixes alone, without regard to other NICs.
func checkRouted(ps []netip.Prefix, n *net.CreateNetworkRequest) error {
	for i, p := range ps {
		switch {
		case !p.IsValid() || p != p.Masked():
			return errs.Field("routed_prefixes", "give prefixes with zero host bits, such as 192.168.7.0/24", "%s is no prefix", p)
		case p.Addr().Is6():
			if !n.Subnet6.IsValid() {
				return errs.Field("routed_prefixes", "leave it out", "network %s has no IPv6, %s cannot be routed", n.Name, p)
			}
		case p.Bits() < 8:
			return errs.Field("routed_prefixes", "route a /8 or a smaller prefix", "%s is too wide", p)
		}
		if err := checkReserved("routed_prefixes", p); err != nil {
			return err
		}
		if n.Subnet4.IsValid() && p.Overlaps(n.Subnet4) || n.Subnet6.IsValid() && p.Overlaps(n.Subnet6) {
			return errs.Field("routed_prefixes", "route prefixes outside the network's own subnets", "%s overlaps the subnet of network %s", p, n.Name)
		}
		for _, q := range ps[:i] {
			if p.Overlaps(q) {
				return errs.Field("routed_prefixes", "name each prefix once", "%s and %s overlap", q, p)
			}
		}
	}
	return nil
}
