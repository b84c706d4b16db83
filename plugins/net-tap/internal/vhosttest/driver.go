// Package vhosttest is a vhost-user front-end and virtio-net driver in user space: a guest without a
// hypervisor, for tests, fuzzing and benchmarks. Its memory is a memfd, its rings are split.
package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
)

// Features of virtio-net and of the protocol, for Options.
const (
	Csum      = 1 << 0
	GuestCsum = 1 << 1
	GuestTSO4 = 1 << 7
	GuestTSO6 = 1 << 8
	HostTSO4  = 1 << 11
	HostTSO6  = 1 << 12
	MrgRxbuf  = 1 << 15
	MQ        = 1 << 22
	Indirect  = 1 << 28
	EventIdx  = 1 << 29
	protocol  = 1 << 30
	Version1  = 1 << 32

	// Usual is what Linux negotiates.
	Usual = Csum | GuestCsum | GuestTSO4 | GuestTSO6 | HostTSO4 | HostTSO6 | MrgRxbuf | Indirect | EventIdx | Version1
)

// GPA is the guest physical address of the guest's memory, and UserBase its address in the front-end, as the
// back-end is told: neither is true anywhere.
const (
	GPA      = 0x1_0000_0000
	UserBase = 0x7f00_0000_0000
)

// Options say what the guest is like; zero values mean the usual.
type Options struct {
	Features uint64
	Size     int // entries of a ring; 256
	Pairs    int // queue pairs; 1
	BufLen   int // bytes of a receive buffer; 2048
	TxLen    int // bytes of a send buffer; 2048
	Inflight bool
	Poll     bool // the driver polls: it wants no calls
}

// Queue is one ring, the driver's side.
type Queue struct {
	Num      int
	Desc     int // offsets in memory
	Avail    int
	Used     int
	Buf      int // offset of the first buffer
	BufLen   int
	Kick     int
	Call     int
	AvailIdx uint16
	LastUsed uint16
}

// Driver is a front-end with its guest.
type Driver struct {
	Mem    []byte
	MemFD  int
	Conn   int
	Queues []Queue // 2i receives, 2i+1 sends
	HdrLen int
	opt    Options
}

// Dial connects to a back-end and starts all rings.
func Dial(path string, opt Options) (*Driver, error) {
	if opt.Features == 0 {
		opt.Features = Usual
	}
	opt.Size = def(opt.Size, 256)
	opt.Pairs = def(opt.Pairs, 1)
	opt.BufLen = def(opt.BufLen, 2048)
	opt.TxLen = def(opt.TxLen, 2048)
	d := &Driver{opt: opt, HdrLen: 12, Conn: -1, MemFD: -1}
	if opt.Features&(Version1|MrgRxbuf) == 0 {
		d.HdrLen = 10
	}
	if err := d.layout(); err != nil {
		return nil, err
	}
	if err := d.Connect(path); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func def(v, d int) int {
	if v == 0 {
		return d
	}
	return v
}

// layout makes the memory: for each queue descriptors, rings and buffers.
func (d *Driver) layout() error {
	at := 4096
	take := func(n, align int) int {
		at = (at + align - 1) &^ (align - 1)
		off := at
		at += n
		return off
	}
	for i := range 2 * d.opt.Pairs {
		n := d.opt.Size
		q := Queue{Num: n, BufLen: d.opt.BufLen, Kick: -1, Call: -1}
		if i%2 == 1 {
			q.BufLen = d.opt.TxLen
		}
		q.Desc, q.Avail, q.Used = take(16*n, 4096), take(6+2*n, 64), take(6+8*n, 64)
		q.Buf = take(n*q.BufLen, 4096)
		d.Queues = append(d.Queues, q)
	}
	at = (at + 4095) &^ 4095
	var err error
	if d.MemFD, err = unix.MemfdCreate("guest", unix.MFD_CLOEXEC); err != nil {
		return err
	}
	if err = unix.Ftruncate(d.MemFD, int64(at)); err != nil {
		return err
	}
	if d.Mem, err = unix.Mmap(d.MemFD, 0, at, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	for i := range d.Queues {
		q := &d.Queues[i]
		for _, fd := range []*int{&q.Kick, &q.Call} {
			if *fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
				return err
			}
		}
		d.Reset(i)
	}
	return nil
}

// Reset fills a ring's descriptors: receive rings with all their buffers, send rings with none.
func (d *Driver) Reset(i int) {
	q := &d.Queues[i]
	q.AvailIdx, q.LastUsed = 0, 0
	clear(d.Mem[q.Avail : q.Avail+6+2*q.Num])
	clear(d.Mem[q.Used : q.Used+6+8*q.Num])
	for k := range q.Num {
		flags := uint16(0)
		if i%2 == 0 {
			flags = 2
		}
		d.SetDesc(i, k, GPA+uint64(q.Buf+k*q.BufLen), uint32(q.BufLen), flags, 0)
		if i%2 == 0 {
			d.offer(q, uint16(k))
		}
	}
	d.publish(q)
}

// SetDesc writes a descriptor.
func (d *Driver) SetDesc(queue, k int, addr uint64, n uint32, flags, next uint16) {
	b := d.Mem[d.Queues[queue].Desc+16*k:]
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], n)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

func (d *Driver) offer(q *Queue, head uint16) {
	binary.LittleEndian.PutUint16(d.Mem[q.Avail+4+2*(int(q.AvailIdx)%q.Num):], head)
	q.AvailIdx++
}

func (d *Driver) word(off int) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&d.Mem[off])) }

func (d *Driver) publish(q *Queue) {
	flags := uint32(0)
	if d.opt.Poll {
		flags = 1
	}
	d.word(q.Avail).Store(uint32(q.AvailIdx)<<16 | flags)
}

// Offer makes chains available, as tests of malformed ones want to.
func (d *Driver) Offer(queue int, heads ...uint16) {
	q := &d.Queues[queue]
	for _, h := range heads {
		d.offer(q, h)
	}
	d.publish(q)
	d.KickQueue(queue)
}

// KickQueue kicks whether or not it was asked for.
func (d *Driver) KickQueue(queue int) {
	one := [8]byte{1}
	_, _ = unix.Write(d.Queues[queue].Kick, one[:])
}

// kick kicks if the device wants it.
func (d *Driver) kick(q *Queue, old uint16) {
	if d.opt.Features&EventIdx != 0 {
		event := binary.LittleEndian.Uint16(d.Mem[q.Used+4+8*q.Num:])
		if q.AvailIdx-event-1 >= q.AvailIdx-old {
			return
		}
	} else if d.word(q.Used).Load()&1 != 0 {
		return
	}
	one := [8]byte{1}
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(q.Kick), uintptr(unsafe.Pointer(&one)), 8)
}

// SendBatch queues frames with the same header, one descriptor each, and returns how many there was room
// for. It reclaims what the device has used.
func (d *Driver) SendBatch(pair int, hdr [12]byte, frames ...[]byte) int {
	q := &d.Queues[2*pair+1]
	q.LastUsed = uint16(d.word(q.Used).Load() >> 16)
	old := q.AvailIdx
	sent := 0
	for _, f := range frames {
		if int(q.AvailIdx-q.LastUsed) >= q.Num || d.HdrLen+len(f) > q.BufLen {
			break
		}
		k := int(q.AvailIdx) % q.Num
		b := d.Mem[q.Buf+k*q.BufLen:]
		copy(b, hdr[:d.HdrLen])
		copy(b[d.HdrLen:], f)
		d.SetDesc(2*pair+1, k, GPA+uint64(q.Buf+k*q.BufLen), uint32(d.HdrLen+len(f)), 0, 0)
		d.offer(q, uint16(k))
		sent++
	}
	if sent > 0 {
		d.publish(q)
		d.kick(q, old)
	}
	return sent
}

// Receive takes up to max packets and calls f with the header and the frame of each; with mergeable buffers
// the parts are put together. It gives the buffers back.
func (d *Driver) Receive(pair, max int, f func(hdr, frame []byte)) int {
	q := &d.Queues[2*pair]
	n := 0
	old := q.AvailIdx
	idx := uint16(d.word(q.Used).Load() >> 16)
	for q.LastUsed != idx && n < max {
		take := func() []byte {
			e := d.Mem[q.Used+4+8*(int(q.LastUsed)%q.Num):]
			id, size := binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:])
			q.LastUsed++
			d.offer(q, uint16(id))
			off := q.Buf + int(id)*q.BufLen
			return d.Mem[off : off+int(size)]
		}
		b := take()
		hdr, frame := b[:d.HdrLen], b[d.HdrLen:]
		if d.HdrLen == 12 && f != nil {
			if parts := binary.LittleEndian.Uint16(hdr[10:]); parts > 1 {
				frame = append([]byte{}, frame...)
				for range parts - 1 {
					frame = append(frame, take()...)
				}
			}
		}
		if f != nil {
			f(hdr, frame)
		}
		n++
	}
	if n > 0 {
		d.publish(q)
		// Ask for a call about the next packet.
		binary.LittleEndian.PutUint16(d.Mem[q.Avail+4+2*q.Num:], q.LastUsed)
		d.kick(q, old)
	}
	return n
}

// WaitFrame returns the first frame that want accepts.
func (d *Driver) WaitFrame(pair int, limit time.Duration, want func(hdr, frame []byte) bool) (hdr, frame []byte, err error) {
	for end := time.Now().Add(limit); ; {
		d.Receive(pair, 1, func(h, f []byte) {
			if hdr == nil && want(h, f) {
				hdr, frame = append([]byte{}, h...), append([]byte{}, f...)
			}
		})
		if hdr != nil {
			return hdr, frame, nil
		}
		if time.Now().After(end) {
			return nil, nil, errors.New("no such frame came")
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// Close ends the connection and forgets the memory.
func (d *Driver) Close() {
	d.Disconnect()
	for i := range d.Queues {
		for _, fd := range []int{d.Queues[i].Kick, d.Queues[i].Call} {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	}
	if d.Mem != nil {
		_ = unix.Munmap(d.Mem)
	}
	if d.MemFD >= 0 {
		unix.Close(d.MemFD)
	}
}

// Disconnect ends the connection; the guest's memory stays.
func (d *Driver) Disconnect() {
	if d.Conn >= 0 {
		unix.Close(d.Conn)
		d.Conn = -1
	}
}

// Connect connects, or connects again: the rings go on where the used index says.
func (d *Driver) Connect(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	d.Conn = fd
	if err := wctl.WithPath(path, func(p string) error { return unix.Connect(fd, &unix.SockaddrUnix{Name: p}) }); err != nil {
		return err
	}
	tv := unix.NsecToTimeval(int64(30 * time.Second))
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	return d.negotiate()
}

func (d *Driver) negotiate() error {
	offered, err := d.Ask64(1)
	if err != nil {
		return err
	}
	want := d.opt.Features
	if d.opt.Pairs > 1 {
		want |= MQ
	}
	if want&^offered != 0 {
		return fmt.Errorf("features %#x are not offered", want&^offered)
	}
	proto, err := d.Ask64(15)
	if err != nil {
		return err
	}
	steps := []func() error{
		func() error { return d.Tell(16, le(proto&(1<<0|1<<3|1<<9|1<<12|1<<16))) }, // MQ, REPLY_ACK, CONFIG, INFLIGHT, STATUS
		func() error { return d.Tell(3, nil) },
		func() error { return d.Tell(2, le(want|protocol)) },
		func() error { return d.Tell(5, d.memTable(), d.MemFD) },
	}
	if d.opt.Inflight {
		steps = append(steps, d.inflight)
	}
	for _, s := range steps {
		if err := s(); err != nil {
			return err
		}
	}
	for i := range d.Queues {
		if err := d.StartRing(i); err != nil {
			return err
		}
	}
	for i := range d.Queues {
		if err := d.Tell(18, State(i, 1)); err != nil {
			return err
		}
	}
	if proto&(1<<16) != 0 {
		return d.Tell(39, le(0xf)) // the driver is there (virtio 1.2, section 2.1): DPDK waits for it
	}
	return nil
}

func (d *Driver) inflight() error {
	p := make([]byte, 20)
	binary.LittleEndian.PutUint16(p[16:], uint16(len(d.Queues)))
	binary.LittleEndian.PutUint16(p[18:], uint16(d.opt.Size))
	reply, fds, err := d.Ask(31, p)
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("inflight: %d descriptors: %w", len(fds), err)
	}
	defer unix.Close(fds[0])
	return d.Tell(32, reply, fds[0])
}

// StartRing sends a ring's size, base, addresses and descriptors.
func (d *Driver) StartRing(i int) error {
	q := &d.Queues[i]
	addr := make([]byte, 40)
	binary.LittleEndian.PutUint32(addr, uint32(i))
	for k, off := range []int{q.Desc, q.Used, q.Avail} {
		binary.LittleEndian.PutUint64(addr[8+8*k:], UserBase+uint64(off))
	}
	used := int(d.word(q.Used).Load() >> 16)
	return errors.Join(d.Tell(8, State(i, q.Num)), d.Tell(10, State(i, used)), d.Tell(9, addr),
		d.Tell(13, le(uint64(i)), q.Call), d.Tell(12, le(uint64(i)), q.Kick))
}

// memTable is the payload of SET_MEM_TABLE with one region.
func (d *Driver) memTable() []byte {
	p := make([]byte, 8+32)
	p[0] = 1
	binary.LittleEndian.PutUint64(p[8:], GPA)
	binary.LittleEndian.PutUint64(p[16:], uint64(len(d.Mem)))
	binary.LittleEndian.PutUint64(p[24:], UserBase)
	return p
}
