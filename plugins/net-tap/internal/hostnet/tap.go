package hostnet

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tunHdr is the virtio-net header length that hypervisors are given: with the number of buffers.
const tunHdr = 12

// TAP says what a NIC's TAP is like.
type TAP struct {
	Name   string
	Alias  string
	MTU    int
	Queues int
}

// socketBuffer is how much a packet socket may hold for the engine: some ten frames of 64 KiB, or a
// thousand small ones.
const socketBuffer = 4 << 20

// OpenTAP makes the TAP, or opens the one there is, and returns its queues. If a queue is in use elsewhere
// the error is EBUSY.
func (n *NS) OpenTAP(t TAP) (queues []*os.File, err error) {
	err = inNS(n.fd, func() error {
		flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if t.Queues > 1 {
			flags |= unix.IFF_MULTI_QUEUE
		}
		for range max(t.Queues, 1) {
			fd, err := openTUN(t.Name, flags)
			if err != nil {
				return err
			}
			queues = append(queues, os.NewFile(uintptr(fd), "/dev/net/tun"))
			if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, tunHdr); err != nil {
				return fmt.Errorf("set header length of %s: %w", t.Name, err)
			}
		}
		return unix.IoctlSetInt(int(queues[0].Fd()), unix.TUNSETPERSIST, 1)
	})
	if err == nil {
		err = n.setTAP(t)
	}
	if err != nil {
		for _, q := range queues {
			q.Close()
		}
		return nil, err
	}
	return queues, nil
}

func (n *NS) setTAP(t TAP) error {
	l, err := n.h.LinkByName(t.Name)
	if err != nil {
		return err
	}
	if err := n.h.LinkSetAlias(l, t.Alias); err != nil {
		return err
	}
	if err := n.h.LinkSetMTU(l, t.MTU); err != nil {
		return fmt.Errorf("set MTU %d of %s: %w", t.MTU, t.Name, err)
	}
	return n.h.LinkSetUp(l)
}

// SetTAPMTU changes the MTU of a TAP.
func (n *NS) SetTAPMTU(name string, mtu int) error {
	l, err := n.h.LinkByName(name)
	if err != nil {
		return err
	}
	return n.h.LinkSetMTU(l, mtu)
}

// openTUN attaches to a TUN or TAP in the thread's namespace.
func openTUN(name string, flags uint16) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("attach to %s: %w", name, err)
	}
	return fd, nil
}

// HasLink says whether the namespace has an interface of that name.
func (n *NS) HasLink(name string) bool {
	_, err := n.h.LinkByName(name)
	return err == nil
}

// DeleteLink removes an interface; that it is not there is fine.
func (n *NS) DeleteLink(name string) error { return deleteLink(n.h, name) }

func deleteLink(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		return err
	}
	if err := h.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}

// TAPs lists the names of the instance's TAPs in the namespace.
func (n *NS) TAPs(i Instance) ([]string, error) {
	links, err := n.h.LinkList()
	var out []string
	for _, l := range links {
		if a := l.Attrs(); i.owns(a) && l.Type() == "tuntap" && a.Name != UplinkTUN {
			out = append(out, a.Name)
		}
	}
	return out, err
}

// PacketSocket opens the engine's side of a TAP: a packet socket with virtio-net headers, bound to the
// interface and to nothing else.
func (n *NS) PacketSocket(name string) (fd int, err error) {
	err = inNS(n.fd, func() error {
		l, err := n.h.LinkByName(name)
		if err != nil {
			return err
		}
		// Protocol 0: nothing is received before bind says from where.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("packet socket: %w", err)
		}
		for _, o := range []struct{ opt, val int }{
			{unix.PACKET_VNET_HDR, 1},
			{unix.PACKET_IGNORE_OUTGOING, 1},
			{unix.PACKET_QDISC_BYPASS, 1},
		} {
			if err = unix.SetsockoptInt(fd, unix.SOL_PACKET, o.opt, o.val); err != nil {
				unix.Close(fd)
				return fmt.Errorf("packet socket option %d: %w", o.opt, err)
			}
		}
		if err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, untagged()); err != nil {
			unix.Close(fd)
			return fmt.Errorf("packet socket filter: %w", err)
		}
		for _, o := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
			if unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, socketBuffer) != nil {
				// Without CAP_NET_ADMIN over the host the system's limit has to do.
				_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
			}
		}
		sa := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: l.Attrs().Index}
		if err = unix.Bind(fd, sa); err != nil {
			unix.Close(fd)
			return fmt.Errorf("bind packet socket to %s: %w", name, err)
		}
		return nil
	})
	return fd, err
}

// untagged is a filter that lets through what has no VLAN tag. The kernel takes tags off before a packet socket
// sees the frame, so that the engine could not tell: what was sent into a VLAN would arrive outside of it.
func untagged() *unix.SockFprog {
	const vlanTagPresent = 0xfffff000 + 48 // SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT (linux/filter.h)
	f := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: vlanTagPresent},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x7fffffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	return &unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
}

func htons(v uint16) uint16 {
	if *(*byte)(unsafe.Pointer(&[]uint16{1}[0])) == 0 {
		return v
	}
	return v<<8 | v>>8
}
