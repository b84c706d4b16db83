package hostnet

import (
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Forwarding turns IPv4 forwarding on where the packets of nat networks come back in: on the interfaces with
// a default route, and only if the host does not forward anyway. mine are the interfaces on which an earlier
// call turned it on; the result is the new list, to be remembered before it is relied on. They are the
// guards of [HostRules], so that the host does not become a router for its neighbours.
func Forwarding(mine []string) ([]string, error) {
	if on, err := readForwarding("all"); err != nil || on {
		return nil, err // somebody wants this host to be a router: nothing to guard or to put back
	}
	routes, err := netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return mine, err
	}
	var want []string
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
			if l, err := netlink.LinkByIndex(i); err == nil && i != 0 && !slices.Contains(want, l.Attrs().Name) {
				want = append(want, l.Attrs().Name)
			}
		}
	}
	var out []string
	for _, name := range want {
		on, err := readForwarding(name)
		if err != nil {
			continue
		}
		if on && !slices.Contains(mine, name) {
			continue // the operator's own doing
		}
		out = append(out, name)
	}
	for _, name := range mine {
		if !slices.Contains(want, name) {
			_ = writeForwarding(name, "0")
		}
	}
	return out, nil
}

// SetForwarding turns it on for the interfaces that Forwarding returned.
func SetForwarding(names []string) error {
	var errs []error
	for _, n := range names {
		errs = append(errs, writeForwarding(n, "1"))
	}
	return errors.Join(errs...)
}

// ResetForwarding turns it off again where we turned it on, unless the whole host forwards by now.
func ResetForwarding(mine []string) {
	if on, err := readForwarding("all"); err != nil || on {
		return
	}
	for _, n := range mine {
		_ = writeForwarding(n, "0")
	}
}

func readForwarding(name string) (bool, error) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + name + "/forwarding")
	return strings.TrimSpace(string(b)) == "1", err
}

func writeForwarding(name, v string) error {
	if on, err := readForwarding(name); err != nil || on == (v == "1") {
		return err
	}
	return os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/forwarding", []byte(v), 0)
}
