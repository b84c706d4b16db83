package control

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
)

// Interface names are at most 15 bytes (IFNAMSIZ): three of prefix, ten of the id.
const (
	tapPrefix  = "mvt"
	hostPrefix = "mvh"
	legPrefix  = "mvl"
)

// instanceOf tells instances apart by where their metadata is, so that one whose metadata was lost still
// knows its own leftovers.
func instanceOf(dir string) hostnet.Instance {
	h := sha256.Sum256([]byte(dir))
	return hostnet.Instance(hex.EncodeToString(h[:4]))
}

// shortName makes a short name from an id's random end (RFC 9562: the last 62 bits of a version 7 UUID). If
// it is taken, others are derived until one is free.
func shortName(prefix, id string, n int, taken func(string) bool) string {
	s := id[24:]
	for i := 0; ; i++ {
		if name := prefix + s[len(s)-n:]; !taken(name) {
			return name
		}
		h := sha256.Sum256(fmt.Appendf(nil, "%s/%d", id, i))
		s = hex.EncodeToString(h[:6])
	}
}

// nicByName, netByName find what a Ref means; nil if nothing.
func (s *Service) networkLocked(ref string) *netRec {
	if n := s.data.Networks[ref]; n != nil {
		return n
	}
	for _, n := range s.data.Networks {
		if n.Request.Name == ref {
			return n
		}
	}
	return nil
}

func (s *Service) nicLocked(ref string) *nicRec {
	if n := s.data.NICs[ref]; n != nil {
		return n
	}
	for _, n := range s.data.NICs {
		if n.Name == ref {
			return n
		}
	}
	return nil
}

// freeLinkLocked finds a /31 for a nat network's link.
func (s *Service) freeLinkLocked(host []netip.Prefix) (netip.Prefix, error) {
	used := map[netip.Addr]bool{}
	for _, n := range s.data.Networks {
		used[n.Link4.Addr()] = true
	}
	p := s.cfg.LinkPrefix
next:
	for a := p.Addr(); p.Contains(a); a = a.Next().Next() {
		if used[a] {
			continue
		}
		link := netip.PrefixFrom(a, 31)
		for _, h := range host { // another instance's, or somebody else's
			if h.Overlaps(link) {
				continue next
			}
		}
		return link, nil
	}
	return netip.Prefix{}, errs.New(errs.Exhausted, "no link addresses are left in %s", p).
		Do("delete nat networks, or start mvirt-net with a wider --link-prefix")
}

// usedLocked collects what the NICs of a network have.
func (s *Service) usedLocked(network string) (addrs map[netip.Addr]*nicRec, macs map[string]*nicRec, routed map[netip.Prefix]*nicRec) {
	addrs, macs, routed = map[netip.Addr]*nicRec{}, map[string]*nicRec{}, map[netip.Prefix]*nicRec{}
	for _, n := range s.data.NICs {
		if n.NetworkID != network {
			continue
		}
		if n.IPv4.IsValid() {
			addrs[n.IPv4] = n
		}
		if n.IPv6.IsValid() {
			addrs[n.IPv6] = n
		}
		macs[n.MAC] = n
		for _, p := range n.Routed {
			routed[p] = n
		}
	}
	return
}

// freeAddr is the lowest free address of a subnet: behind the router's, and for IPv4 before the broadcast's.
func freeAddr(n *net.CreateNetworkRequest, p netip.Prefix, used map[netip.Addr]*nicRec) (netip.Addr, error) {
	last := netip.Addr{}
	if p.Addr().Is4() {
		last = lastAddr(p)
	}
	for a := engine.RouterAddr(p).Next(); a != last && p.Contains(a); a = a.Next() {
		if used[a] == nil {
			return a, nil
		}
	}
	return netip.Addr{}, errs.New(errs.Exhausted, "all addresses of subnet %s are in use", p).
		With(errs.Resource{Type: "network", ID: n.ID, Name: n.Name}).Because("SUBNET_FULL").
		Do("delete NICs on network " + n.Name + ", or create a network with a larger subnet")
}

// freshMAC makes an address in the range that QEMU and KVM use for guests (52:54:00), not in use anywhere.
func (s *Service) freshMACLocked() string {
	for {
		var b [6]byte
		_, _ = rand.Read(b[:]) // never fails (crypto/rand)
		b[0], b[1], b[2] = 0x52, 0x54, 0x00
		m := wire.GetMAC(b[:]).String()
		free := true
		for _, n := range s.data.NICs {
			free = free && n.MAC != m
		}
		if free {
			return m
		}
	}
}
