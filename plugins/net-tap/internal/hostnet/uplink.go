package hostnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Names inside a network's namespace.
const (
	UplinkTUN  = "up0"   // to the engine
	UplinkVeth = "host0" // to the host
)

// Uplink says how a nat network is joined to the host.
type Uplink struct {
	ID       string       // of the network, for aliases
	HostLink string       // the veth's end in the host
	Link4    netip.Prefix // a /31: the host has the first address, the namespace the second
	Subnet4  netip.Prefix // or none
	Subnet6  netip.Prefix // or none
	MTU      int
	Host     bool // the host may open connections to NICs
}

// HostAddr4 is the host's address on the link.
func (u *Uplink) HostAddr4() netip.Addr { return u.Link4.Addr() }

func (u *Uplink) nsAddr4() netip.Addr { return u.Link4.Addr().Next() }

// Link6 is where the links' IPv6 addresses come from: a unique local prefix (RFC 4193) of our own ("mvirt"
// in its bits), in whose last 32 bits stand the IPv4 ones.
var Link6 = netip.MustParsePrefix("fd6d:7669:7274::/96")

// HostAddr6 is the host's IPv6 address on the link.
func (u *Uplink) HostAddr6() netip.Addr { return link6(u.HostAddr4()) }

func (u *Uplink) nsAddr6() netip.Addr { return link6(u.nsAddr4()) }

func link6(a netip.Addr) netip.Addr {
	b, v4 := Link6.Addr().As16(), a.As4()
	copy(b[12:], v4[:])
	return netip.AddrFrom16(b)
}

// EnsureUplink makes all of a nat network's way out, or repairs it, and returns the TUN for the engine. If
// another process has the TUN open the error is EBUSY.
func (n *NS) EnsureUplink(i Instance, u Uplink) (*os.File, error) {
	tun, err := n.openUplinkTUN(i, u)
	if err != nil {
		return nil, err
	}
	if err := n.ensureUplink(i, u); err != nil {
		tun.Close()
		return nil, err
	}
	return tun, nil
}

// RepairUplink is EnsureUplink for a worker that has its TUN already.
func (n *NS) RepairUplink(i Instance, u Uplink) error { return n.ensureUplink(i, u) }

func (n *NS) openUplinkTUN(i Instance, u Uplink) (*os.File, error) {
	var tun *os.File
	err := inNS(n.fd, func() error {
		fd, err := openTUN(UplinkTUN, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
		if err != nil {
			return err
		}
		tun = os.NewFile(uintptr(fd), "/dev/net/tun")
		// The kernel may leave checksums and segmentation to the engine, and the other way round.
		const offload = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offload); err != nil {
			return fmt.Errorf("offloads of %s: %w", UplinkTUN, err)
		}
		return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
	})
	if err == nil {
		var l netlink.Link
		if l, err = n.h.LinkByName(UplinkTUN); err == nil {
			err = n.h.LinkSetAlias(l, i.Alias("uplink", u.ID))
		}
	}
	if err != nil {
		if tun != nil {
			tun.Close()
		}
		return nil, err
	}
	return tun, nil
}

func (n *NS) ensureUplink(i Instance, u Uplink) error {
	host, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer host.Close()
	if err := n.ensureVeth(host, i, u); err != nil {
		return fmt.Errorf("veth pair %s: %w", u.HostLink, err)
	}
	tun, err := n.h.LinkByName(UplinkTUN)
	if err != nil {
		return err
	}
	if err := errors.Join(n.h.LinkSetMTU(tun, u.MTU), n.h.LinkSetUp(tun)); err != nil {
		return fmt.Errorf("set up %s: %w", UplinkTUN, err)
	}
	veth, err := n.h.LinkByName(UplinkVeth)
	if err != nil {
		return err
	}
	// Forwarding between these two only: a TAP's frames never come this way.
	if err := n.sysctl("net/ipv4/conf/"+UplinkTUN+"/forwarding", "1", "net/ipv4/conf/"+UplinkVeth+"/forwarding", "1"); err != nil {
		return err
	}
	var routes []*netlink.Route
	if u.Subnet4.IsValid() {
		routes = append(routes,
			&netlink.Route{LinkIndex: veth.Attrs().Index, Dst: ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0)), Gw: u.HostAddr4().AsSlice()},
			&netlink.Route{LinkIndex: tun.Attrs().Index, Dst: ipNet(u.Subnet4), Scope: netlink.SCOPE_LINK})
	}
	if u.Subnet6.IsValid() {
		// The namespace is ours alone, TAPs there have no IPv6: forwarding between all is between these two.
		if err := n.sysctl("net/ipv6/conf/"+UplinkTUN+"/disable_ipv6", "0", "net/ipv6/conf/all/forwarding", "1"); err != nil {
			return err
		}
		routes = append(routes,
			&netlink.Route{LinkIndex: veth.Attrs().Index, Dst: ipNet(netip.PrefixFrom(netip.IPv6Unspecified(), 0)), Gw: u.HostAddr6().AsSlice()},
			&netlink.Route{LinkIndex: tun.Attrs().Index, Dst: ipNet(u.Subnet6)})
	}
	for _, r := range routes {
		if err := n.h.RouteReplace(r); err != nil {
			return fmt.Errorf("route %s: %w", r.Dst, err)
		}
	}
	if err := n.ApplyNFT(NamespaceRules(u.Host)); err != nil {
		return err
	}
	return sysctl("net/ipv4/conf/"+u.HostLink+"/forwarding", "1", "net/ipv6/conf/"+u.HostLink+"/force_forwarding", "1")
}

func (n *NS) ensureVeth(host *netlink.Handle, i Instance, u Uplink) error {
	hl, err := host.LinkByName(u.HostLink)
	nl, err2 := n.h.LinkByName(UplinkVeth)
	if err == nil && !i.owns(hl.Attrs()) {
		return fmt.Errorf("an interface named %s exists and is not ours", u.HostLink)
	}
	if err != nil || err2 != nil {
		if err == nil { // half a pair, or its other end is elsewhere
			if err := host.LinkDel(hl); err != nil {
				return err
			}
		}
		pair := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: u.HostLink, MTU: u.MTU, Alias: i.Alias("host", u.ID)},
			PeerName:  UplinkVeth, PeerNamespace: netlink.NsFd(n.fd), PeerMTU: uint32(u.MTU),
		}
		if err := host.LinkAdd(pair); err != nil {
			return err
		}
		if hl, err = host.LinkByName(u.HostLink); err != nil {
			return err
		}
		if err := host.LinkSetAlias(hl, i.Alias("host", u.ID)); err != nil {
			return err
		}
		if nl, err = n.h.LinkByName(UplinkVeth); err != nil {
			return err
		}
		if err := n.h.LinkSetAlias(nl, i.Alias("veth", u.ID)); err != nil {
			return err
		}
	}
	if err := errors.Join(host.LinkSetMTU(hl, u.MTU), n.h.LinkSetMTU(nl, u.MTU)); err != nil {
		return err
	}
	// Nobody on the link is believed to be a router, and without IPv6 in the network there is none on it.
	no6 := "1"
	if u.Subnet6.IsValid() {
		no6 = "0"
	}
	v6 := func(name string) []string {
		c := "net/ipv6/conf/" + name + "/"
		return []string{c + "accept_ra", "0", c + "accept_dad", "0", c + "disable_ipv6", no6}
	}
	if err := sysctl(append(v6(u.HostLink), "net/ipv4/conf/"+u.HostLink+"/rp_filter", "1")...); err != nil {
		return err
	}
	if err := n.sysctl(v6(UplinkVeth)...); err != nil {
		return err
	}
	for _, e := range []struct {
		h      *netlink.Handle
		l      netlink.Link
		a4, a6 netip.Addr
	}{{host, hl, u.HostAddr4(), u.HostAddr6()}, {n.h, nl, u.nsAddr4(), u.nsAddr6()}} {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(e.a4, 31)), Scope: int(netlink.SCOPE_UNIVERSE)}
		if err := e.h.AddrReplace(e.l, addr); err != nil {
			return fmt.Errorf("address %s: %w", e.a4, err)
		}
		if u.Subnet6.IsValid() {
			addr = &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(e.a6, 127)), Flags: unix.IFA_F_NODAD}
			if err := e.h.AddrReplace(e.l, addr); err != nil {
				return fmt.Errorf("address %s: %w", e.a6, err)
			}
		}
		if err := e.h.LinkSetUp(e.l); err != nil {
			return err
		}
	}
	return nil
}

// HostRoute adds or removes the host's routes to a network's subnets. The error is ErrCollision, with the
// other route in its text, if the host knows a part of a subnet already.
func HostRoute(u Uplink, want bool) error {
	host, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer host.Close()
	l, err := host.LinkByName(u.HostLink)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		subnet  netip.Prefix
		gw, src netip.Addr
		family  int
	}{{u.Subnet4, u.nsAddr4(), u.HostAddr4(), unix.AF_INET}, {u.Subnet6, u.nsAddr6(), u.HostAddr6(), unix.AF_INET6}} {
		if !f.subnet.IsValid() {
			continue
		}
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(f.subnet), Gw: f.gw.AsSlice(), Src: f.src.AsSlice()}
		if !want {
			if err := host.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
			continue
		}
		if err := collides(host, f.family, f.subnet, l.Attrs().Index); err != nil {
			return err
		}
		if err := host.RouteReplace(r); err != nil {
			return err
		}
	}
	return nil
}

// collides looks for another way to a part of subnet than link.
func collides(host *netlink.Handle, family int, subnet netip.Prefix, link int) error {
	routes, err := host.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return err
	}
	for _, o := range routes {
		if o.Dst == nil || o.LinkIndex == link {
			continue
		}
		p := prefixOf(o.Dst)
		if !p.IsValid() || p.Bits() == 0 || p.Addr().IsMulticast() || o.Type == unix.RTN_UNREACHABLE {
			continue
		}
		if p.Overlaps(subnet) {
			return fmt.Errorf("%w: the host has a route to %s", ErrCollision, p)
		}
	}
	return nil
}

// ErrCollision says that a network's subnet overlaps one that the host reaches otherwise.
var ErrCollision = errors.New("the subnet collides with another")

// Bridge says whether the host has a bridge of that name, and its MTU.
func Bridge(name string) (mtu int, ok bool) {
	l, err := netlink.LinkByName(name)
	if err != nil || l.Type() != "bridge" {
		return 0, false
	}
	return l.Attrs().MTU, true
}

// EnsureLeg makes a NIC's way to a bridge of the host: a veth pair of one name, with one end on the bridge
// and the other in the namespace.
func (n *NS) EnsureLeg(i Instance, name, id, bridge string, mtu int) error {
	host, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer host.Close()
	br, err := host.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", bridge, err)
	}
	hl, err := host.LinkByName(name)
	if err == nil && !i.owns(hl.Attrs()) {
		return fmt.Errorf("an interface named %s exists and is not ours", name)
	}
	if err != nil || !n.HasLink(name) {
		if err == nil {
			if err := host.LinkDel(hl); err != nil {
				return err
			}
		}
		// A bridge without an address of its own takes the lowest of its ports': ours must not change it.
		h := fnv.New32a()
		_, _ = h.Write([]byte(id))
		high := net.HardwareAddr(binary.BigEndian.AppendUint32([]byte{0xfe, 0xff}, h.Sum32()))
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu, HardwareAddr: high}, PeerName: name, PeerNamespace: netlink.NsFd(n.fd), PeerMTU: uint32(mtu)}
		if err := host.LinkAdd(pair); err != nil {
			return fmt.Errorf("veth pair %s: %w", name, err)
		}
		if hl, err = host.LinkByName(name); err != nil {
			return err
		}
		if err := host.LinkSetAlias(hl, i.Alias("leg", id)); err != nil {
			return err
		}
	}
	nl, err := n.h.LinkByName(name)
	if err != nil {
		return err
	}
	// The host itself has no address there: it is on the bridge.
	if err := sysctl("net/ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil {
		return err
	}
	return errors.Join(n.h.LinkSetAlias(nl, i.Alias("leg", id)), host.LinkSetMTU(hl, mtu), n.h.LinkSetMTU(nl, mtu),
		host.LinkSetMaster(hl, br), host.LinkSetUp(hl), n.h.LinkSetUp(nl))
}

// HostLinks lists the instance's veth ends in the host.
func (i Instance) HostLinks() ([]string, error) {
	links, err := netlink.LinkList()
	var out []string
	for _, l := range links {
		if a := l.Attrs(); i.owns(a) {
			out = append(out, a.Name)
		}
	}
	return out, err
}

// DeleteHostLink removes an interface of the host's namespace, if it is the instance's.
func (i Instance) DeleteHostLink(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		return err
	}
	if !i.owns(l.Attrs()) {
		return nil
	}
	if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// Addresses lists the prefixes that the host's interfaces are on, for checks against our own choices.
func Addresses() ([]netip.Prefix, error) {
	as, err := netlink.AddrList(nil, unix.AF_INET)
	var out []netip.Prefix
	for _, a := range as {
		out = append(out, prefixOf(a.IPNet))
	}
	return out, err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixOf(n *net.IPNet) netip.Prefix {
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones).Masked()
}
