package hostnet

import (
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Guards say where the host forwards only because of us: there it must not become a router for its
// neighbours, see [HostRules].
type Guards struct {
	IPv4 []string `json:",omitempty"` // interfaces
	IPv6 []string `json:",omitempty"`
	// All6: IPv6 forwarding is on for the whole host, because its kernel is older than 6.17 and knows
	// nothing finer (force_forwarding).
	All6 bool `json:",omitempty"`
}

// Equal compares.
func (g Guards) Equal(o Guards) bool {
	return slices.Equal(g.IPv4, o.IPv4) && slices.Equal(g.IPv6, o.IPv6) && g.All6 == o.All6
}

// Where the switches are.
const (
	dir4, file4 = "/proc/sys/net/ipv4/conf/", "/forwarding"
	dir6, file6 = "/proc/sys/net/ipv6/conf/", "/force_forwarding"
	all6        = dir6 + "all/forwarding"
)

// Forwarding says where forwarding has to be turned on for the packets of nat networks to come back in: on
// the interfaces with a default route, and only if the host does not forward anyway. mine is what an earlier
// call said; what is no longer wanted of it is turned off. The result must be remembered before it is acted
// on with [Guards.TurnOn].
func Forwarding(mine Guards, want4, want6 bool) (Guards, error) {
	var g Guards
	var err error
	if g.IPv4, err = perInterface(unix.AF_INET, dir4, file4, dir4+"all"+file4, mine.IPv4, want4); err != nil {
		return mine, err
	}
	if _, err := os.Stat(all6); err != nil {
		return g, nil // no IPv6 here
	}
	if _, err := os.Stat(dir6 + "all" + file6); err == nil {
		g.IPv6, err = perInterface(unix.AF_INET6, dir6, file6, all6, mine.IPv6, want6)
		if err != nil {
			return mine, err
		}
		return g, nil
	}
	on, err := isOn(all6)
	if err != nil {
		return mine, err
	}
	g.All6 = want6 && (!on || mine.All6)
	if mine.All6 && !want6 {
		_ = os.WriteFile(all6, []byte("0"), 0)
	}
	return g, nil
}

// perInterface finds the interfaces for one family; whole is the switch for all.
func perInterface(family int, dir, file, whole string, mine []string, want bool) ([]string, error) {
	if on, err := isOn(whole); err != nil || on {
		return nil, err // somebody wants this host to be a router: nothing to guard or to put back
	}
	var ifs, out []string
	if want {
		var err error
		if ifs, err = defaultInterfaces(family); err != nil {
			return mine, err
		}
	}
	for _, name := range ifs {
		on, err := isOn(dir + name + file)
		if err != nil || on && !slices.Contains(mine, name) {
			continue // the operator's own doing
		}
		out = append(out, name)
	}
	for _, name := range mine {
		if !slices.Contains(ifs, name) {
			_ = os.WriteFile(dir+name+file, []byte("0"), 0)
		}
	}
	return out, nil
}

func defaultInterfaces(family int) ([]string, error) {
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, r := range routes {
		if r.Dst != nil {
			if ones, _ := r.Dst.Mask.Size(); ones > 0 {
				continue
			}
		}
		idx := []int{r.LinkIndex}
		for _, h := range r.MultiPath {
			idx = append(idx, h.LinkIndex)
		}
		for _, i := range idx {
			if i == 0 {
				continue
			}
			if l, err := netlink.LinkByIndex(i); err == nil && !slices.Contains(out, l.Attrs().Name) && l.Attrs().Name != "lo" {
				out = append(out, l.Attrs().Name)
			}
		}
	}
	return out, nil
}

// TurnOn turns forwarding on where g says.
func (g Guards) TurnOn() error {
	var errs []error
	for _, n := range g.IPv4 {
		errs = append(errs, turnOn(dir4+n+file4))
	}
	for _, n := range g.IPv6 {
		errs = append(errs, turnOn(dir6+n+file6))
	}
	if g.All6 {
		errs = append(errs, keepRA(), turnOn(all6))
	}
	return errors.Join(errs...)
}

// keepRA lets interfaces that learn their addresses and routes from router advertisements go on doing so:
// the kernel stops when it forwards, unless accept_ra is 2.
func keepRA() error {
	ents, err := os.ReadDir(dir6)
	for _, e := range ents {
		path := dir6 + e.Name() + "/accept_ra"
		if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == "1" && e.Name() != "default" && e.Name() != "all" {
			_ = os.WriteFile(path, []byte("2"), 0)
		}
	}
	return err
}

func isOn(path string) (bool, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)) == "1", err
}

func turnOn(path string) error {
	if on, err := isOn(path); err != nil || on {
		return err
	}
	return os.WriteFile(path, []byte("1"), 0)
}
