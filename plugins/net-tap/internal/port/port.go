// Package port connects the engine to the kernel: a packet socket on a TAP's interface ([Socket]), and a
// TUN ([TUN]). Both carry virtio-net headers, so checksums and segmentation that a sender left to be done
// are done by whoever comes last, or never, between guests that agree.
//
// A port owns its descriptor, which must be non-blocking. Ports of one worker are served by one goroutine
// and share its [Buffers].
package port

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// hdrLen is struct virtio_net_hdr without its number of buffers: what packet sockets and TUNs use.
const hdrLen = 10

// frameMax is the largest frame: an offloaded one of 64 KiB behind its Ethernet header.
const frameMax = 65536 + wire.EthLen

// maxParts bounds the parts of one packet in a writev: header, head, tail.
const maxParts = 20

// Buffers is room for one burst. It is touched only as far as frames are long.
type Buffers struct {
	frames [engine.Burst][]byte
	hdrs   [engine.Burst][hdrLen]byte
	rx     [engine.Burst]mmsghdr
	rxIov  [engine.Burst][2]unix.Iovec
	tx     [engine.Burst]mmsghdr
	txIov  [engine.Burst][maxParts]unix.Iovec
	txHdrs [engine.Burst][hdrLen]byte
	sizes  [engine.Burst]int
}

// mmsghdr is the kernel's struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   uint32
}

// NewBuffers makes room.
func NewBuffers() *Buffers {
	b := &Buffers{}
	mem := make([]byte, engine.Burst*frameMax)
	for i := range b.frames {
		b.frames[i] = mem[i*frameMax : (i+1)*frameMax : (i+1)*frameMax]
		b.rxIov[i] = [2]unix.Iovec{
			{Base: &b.hdrs[i][0], Len: hdrLen},
			{Base: &b.frames[i][0], Len: frameMax},
		}
		b.rx[i].hdr.Iov, b.rx[i].hdr.Iovlen = &b.rxIov[i][0], 2
		b.tx[i].hdr.Iov = &b.txIov[i][0]
	}
	return b
}

// getHdr reads a virtio-net header in host order; shift is added to offsets.
func getHdr(b *[hdrLen]byte, shift uint16) engine.Offload {
	o := engine.Offload{Flags: b[0], GSO: b[1],
		HdrLen: binary.NativeEndian.Uint16(b[2:]), GSOSize: binary.NativeEndian.Uint16(b[4:]),
		CsumStart: binary.NativeEndian.Uint16(b[6:]), CsumOffs: binary.NativeEndian.Uint16(b[8:])}
	if o.Flags&engine.NeedsCsum != 0 {
		o.CsumStart += shift
	}
	return o
}

// putHdr writes one; shift is taken from offsets.
func putHdr(b *[hdrLen]byte, o *engine.Offload, shift uint16) {
	*b = [hdrLen]byte{o.Flags, o.GSO}
	if o.Flags&engine.NeedsCsum == 0 {
		return
	}
	binary.NativeEndian.PutUint16(b[6:], o.CsumStart-shift)
	binary.NativeEndian.PutUint16(b[8:], o.CsumOffs)
	if o.GSO != engine.GSONone {
		binary.NativeEndian.PutUint16(b[2:], o.HdrLen-shift)
		binary.NativeEndian.PutUint16(b[4:], o.GSOSize)
	}
}

// parts fills iov with a packet from offset skip of its head on; 0 if it has too many.
func parts(iov *[maxParts]unix.Iovec, hdr *[hdrLen]byte, p *engine.Packet, skip int) int {
	if len(p.Tail)+2 > maxParts || len(p.Head) <= skip {
		return 0
	}
	iov[0] = unix.Iovec{Base: &hdr[0], Len: hdrLen}
	iov[1] = unix.Iovec{Base: &p.Head[skip], Len: uint64(len(p.Head) - skip)}
	n := 2
	for _, t := range p.Tail {
		if len(t) > 0 {
			iov[n] = unix.Iovec{Base: &t[0], Len: uint64(len(t))}
			n++
		}
	}
	return n
}

// Socket is a packet socket (packet(7), SOCK_RAW with PACKET_VNET_HDR) bound to one interface: what the
// guest sends is received here, what is sent here the guest receives.
type Socket struct {
	fd   int
	b    *Buffers
	down bool
}

// NewSocket takes over fd.
func NewSocket(fd int, b *Buffers) *Socket { return &Socket{fd: fd, b: b} }

// FD is for polling.
func (s *Socket) FD() int { return s.fd }

// Close closes the descriptor.
func (s *Socket) Close() { unix.Close(s.fd) }

// Down says whether the interface was found gone or down.
func (s *Socket) Down() bool { return s.down }

// Receive implements engine.Port.
func (s *Socket) Receive(pkts []engine.Packet) int {
	b := s.b
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&b.rx[0])),
		uintptr(min(len(pkts), engine.Burst)), unix.MSG_DONTWAIT|unix.MSG_TRUNC, 0, 0)
	if errno != 0 {
		s.down = errno == unix.ENETDOWN || errno == unix.ENXIO
		return 0
	}
	k := 0
	for i := range int(n) {
		size := int(b.rx[i].n) - hdrLen
		if size < wire.EthLen || size > frameMax {
			continue // MSG_TRUNC gives the true length: what did not fit is no frame of ours
		}
		pkts[k].Set(b.frames[i][:size])
		pkts[k].Offload = getHdr(&b.hdrs[i], 0)
		k++
	}
	return k
}

// Release implements engine.Port.
func (s *Socket) Release() {}

// Transmit implements engine.Port.
func (s *Socket) Transmit(pkts []*engine.Packet) (packets, bytes int) {
	b := s.b
	for len(pkts) > 0 {
		k := 0
		batch := pkts[:min(len(pkts), engine.Burst)]
		pkts = pkts[len(batch):]
		for _, p := range batch {
			if n := parts(&b.txIov[k], &b.txHdrs[k], p, 0); n > 0 {
				putHdr(&b.txHdrs[k], &p.Offload, 0)
				b.tx[k].hdr.Iovlen = uint64(n)
				b.sizes[k] = p.Len
				k++
			}
		}
		for at := 0; at < k; {
			n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&b.tx[at])),
				uintptr(k-at), unix.MSG_DONTWAIT, 0, 0)
			if errno != 0 {
				if errno == unix.EAGAIN || errno == unix.ENETDOWN || errno == unix.ENXIO {
					return packets, bytes
				}
				at++ // this one cannot be sent (EMSGSIZE, ENOBUFS, EINVAL): drop it, go on with the next
				continue
			}
			for i := at; i < at+int(n); i++ {
				bytes += b.sizes[i]
			}
			packets += int(n)
			at += int(n)
		}
	}
	return packets, bytes
}

// TUN is a TUN device with IFF_NO_PI and IFF_VNET_HDR: IP packets to and from the kernel of the network's
// namespace.
type TUN struct {
	fd int
	b  *Buffers
}

// NewTUN takes over fd.
func NewTUN(fd int, b *Buffers) *TUN { return &TUN{fd: fd, b: b} }

// FD is for polling.
func (t *TUN) FD() int { return t.fd }

// Close closes the descriptor.
func (t *TUN) Close() { unix.Close(t.fd) }

// Receive implements engine.Port: packets come with room for an Ethernet header in front.
func (t *TUN) Receive(pkts []engine.Packet) int {
	b, k := t.b, 0
	for k < min(len(pkts), engine.Burst) {
		iov := [2]unix.Iovec{
			{Base: &b.hdrs[k][0], Len: hdrLen},
			{Base: &b.frames[k][wire.EthLen], Len: frameMax - wire.EthLen},
		}
		b.rxIov[0] = iov
		n, _, errno := unix.RawSyscall(unix.SYS_READV, uintptr(t.fd), uintptr(unsafe.Pointer(&b.rxIov[0][0])), 2)
		if errno != 0 {
			break
		}
		size := int(n) - hdrLen
		if size <= 0 {
			continue
		}
		pkts[k].Set(b.frames[k][:wire.EthLen+size])
		pkts[k].Offload = getHdr(&b.hdrs[k], wire.EthLen)
		k++
	}
	b.rxIov[0] = [2]unix.Iovec{{Base: &b.hdrs[0][0], Len: hdrLen}, {Base: &b.frames[0][0], Len: frameMax}}
	return k
}

// Release implements engine.Port.
func (t *TUN) Release() {}

// Transmit implements engine.Port.
func (t *TUN) Transmit(pkts []*engine.Packet) (packets, bytes int) {
	b := t.b
	for _, p := range pkts {
		n := parts(&b.txIov[0], &b.txHdrs[0], p, wire.EthLen)
		if n == 0 {
			continue
		}
		putHdr(&b.txHdrs[0], &p.Offload, wire.EthLen)
		_, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(t.fd), uintptr(unsafe.Pointer(&b.txIov[0][0])), uintptr(n))
		switch errno {
		case 0:
			packets++
			bytes += p.Len
		case unix.EAGAIN:
			return packets, bytes
		}
	}
	return packets, bytes
}
