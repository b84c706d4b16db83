// Package hostnet is what mvirt-net does to the kernel: namespaces, TAPs, the uplink of a nat network, and
// the host's protection. All of it is idempotent, and what is made can be told from what others made: names
// begin with "mvirt-" or "mv", and every link carries an alias with the instance's tag.
//
// # How a nat network is joined to the host
//
//	engine ── TUN up0 │ namespace mvirt-… │ veth host0 ══ mvh… │ host ── outside
//	                  │ masquerade        │ 169.254.64.1   .0  │ masquerade
//
// The guests' subnet is known only inside the namespace, so two networks may have the same; the host sees
// the link's own address. TAPs live in the namespace too, have no address, and what the kernel hears on
// them it drops: the engine alone takes their packets, from a packet socket.
package hostnet

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// nsDir is where named namespaces are, as ip-netns(8) has it.
const nsDir = "/run/netns"

// NSPrefix begins the names of our namespaces.
const NSPrefix = "mvirt-"

// Instance marks what belongs to one metadata directory: 8 hexadecimal digits.
type Instance string

// Alias is the alias of a link of ours; id is what it is for.
func (i Instance) Alias(kind, id string) string { return "mvirt:" + string(i) + ":" + kind + ":" + id }

func (i Instance) owns(l *netlink.LinkAttrs) bool {
	return strings.HasPrefix(l.Alias, "mvirt:"+string(i)+":")
}

// NS is an open network namespace of ours.
type NS struct {
	Name string
	fd   int
	h    *netlink.Handle
}

// Close closes the descriptors; the namespace stays.
func (n *NS) Close() {
	n.h.Close()
	unix.Close(n.fd)
}

// inNS runs f on a thread in namespace fd.
func inNS(fd int, f func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			errc <- err
			return
		}
		defer unix.Close(home)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			errc <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		err = f()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread() // else the thread ends with the goroutine
		}
		errc <- err
	}()
	return <-errc
}

// EnsureNS opens the namespace of that name and makes it first if it is not there. The loopback's alias
// tells whose it is.
func (i Instance) EnsureNS(name string) (*NS, error) {
	if n, err := openNS(name); err == nil {
		return n, i.tagNS(n)
	} else if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errNotNS) {
		return nil, err
	}
	if err := makeNS(name); err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	n, err := openNS(name)
	if err != nil {
		return nil, err
	}
	return n, i.tagNS(n)
}

func (i Instance) tagNS(n *NS) error {
	lo, err := n.h.LinkByName("lo")
	if err == nil {
		err = n.h.LinkSetAlias(lo, i.Alias("ns", n.Name))
	}
	if err == nil {
		// Before there is any interface: none of them ever gets an IPv6 address by itself, and the kernel
		// answers ARP for an interface's own addresses only.
		err = n.sysctl("net/ipv6/conf/default/disable_ipv6", "1", "net/ipv4/conf/all/arp_ignore", "1",
			"net/ipv4/conf/all/rp_filter", "0", "net/ipv4/conf/default/rp_filter", "0",
			"net/ipv4/conf/all/send_redirects", "0", "net/ipv4/conf/default/send_redirects", "0",
			"net/ipv4/conf/all/accept_redirects", "0")
	}
	if err != nil {
		n.Close()
		return fmt.Errorf("set up namespace %s: %w", n.Name, err)
	}
	return nil
}

var errNotNS = errors.New("not a network namespace")

func openNS(name string) (*NS, error) {
	fd, err := unix.Open(filepath.Join(nsDir, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open namespace %s: %w", name, err)
	}
	// A file that a crash or a reboot left is no namespace.
	if typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || typ != unix.CLONE_NEWNET {
		unix.Close(fd)
		return nil, errNotNS
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(fd))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &NS{Name: name, fd: fd, h: h}, nil
}

// makeNS does what `ip netns add` does, so that `ip netns` sees it.
func makeNS(name string) error {
	if err := os.MkdirAll(nsDir, 0o755); err != nil {
		return err
	}
	// The directory must be a shared mount: else a namespace deleted here lives on in other mount namespaces.
	if err := unix.Mount("", nsDir, "none", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		if err := unix.Mount(nsDir, nsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
		if err := unix.Mount("", nsDir, "none", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	path := filepath.Join(nsDir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread belongs to the new namespace and ends here
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, "")
		}
		errc <- err
	}()
	if err := <-errc; err != nil {
		os.Remove(path)
		return err
	}
	return nil
}

// DeleteNS removes a namespace and all in it; that it is not there is fine.
func DeleteNS(name string) error {
	path := filepath.Join(nsDir, name)
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // not a mount (any more)
		}
		if err != nil {
			return fmt.Errorf("unmount namespace %s: %w", name, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// OurNS lists the names of the namespaces that belong to the instance.
func (i Instance) OurNS() ([]string, error) {
	ents, err := os.ReadDir(nsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range ents {
		if !strings.HasPrefix(e.Name(), NSPrefix) {
			continue
		}
		n, err := openNS(e.Name())
		if err != nil {
			continue
		}
		if lo, err := n.h.LinkByName("lo"); err == nil && i.owns(lo.Attrs()) {
			out = append(out, e.Name())
		}
		n.Close()
	}
	return out, err
}

// sysctl writes pairs of name and value inside the namespace. A name that the kernel lacks (no IPv6) is
// passed over.
func (n *NS) sysctl(pairs ...string) error {
	return inNS(n.fd, func() error { return sysctl(pairs...) })
}

func sysctl(pairs ...string) error {
	for k := 0; k+1 < len(pairs); k += 2 {
		path := "/proc/sys/" + pairs[k]
		if b, err := os.ReadFile(path); errors.Is(err, os.ErrNotExist) || err == nil && strings.TrimSpace(string(b)) == pairs[k+1] {
			continue
		}
		if err := os.WriteFile(path, []byte(pairs[k+1]), 0); err != nil {
			return err
		}
	}
	return nil
}
