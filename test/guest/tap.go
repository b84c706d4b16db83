package guest

import (
	"net"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TAP is a TAP in a network namespace that only its descriptors keep alive.
type TAP struct {
	Queues []*os.File // one a queue pair, with virtio-net headers of 12 bytes
	Wire   *os.File   // a packet socket: reads are frames that the guest sent
}

// NewTAP makes one; it needs root. Its files are the caller's to close.
func NewTAP(queues int) (TAP, error) {
	type result struct {
		tap TAP
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends, and its namespace with the last descriptor
		t, err := tapHere(queues)
		if err != nil {
			t.Close()
		}
		ch <- result{t, err}
	}()
	r := <-ch
	return r.tap, r.err
}

// Close closes all of its descriptors.
func (t TAP) Close() {
	for _, f := range append(t.Queues, t.Wire) {
		if f != nil {
			f.Close()
		}
	}
}

func tapHere(queues int) (TAP, error) {
	var tp TAP
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return tp, err
	}
	const name = "tap0"
	var req struct { // struct ifreq
		name  [16]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], name)
	req.flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if queues > 1 {
		req.flags |= unix.IFF_MULTI_QUEUE
	}
	for range queues {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return tp, err
		}
		tp.Queues = append(tp.Queues, os.NewFile(uintptr(fd), name))
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); e != 0 {
			return tp, e
		}
		hdr := int32(12)
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETVNETHDRSZ, uintptr(unsafe.Pointer(&hdr))); e != 0 {
			return tp, e
		}
	}
	ctl, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return tp, err
	}
	defer unix.Close(ctl)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return tp, err
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(ctl, unix.SIOCSIFFLAGS, ifr); err != nil {
		return tp, err
	}
	tp.Wire, err = Listen(name)
	return tp, err
}

// Listen opens a packet socket on an interface of this thread's network namespace: reads are frames.
func Listen(name string) (*os.File, error) {
	const all = uint16(unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8) // in network order
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(s, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifi.Index}); err != nil {
		unix.Close(s)
		return nil, err
	}
	return os.NewFile(uintptr(s), "wire"), nil
}
