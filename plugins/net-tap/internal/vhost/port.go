// Package vhost is a vhost-user back-end for virtio-net: it lets the engine move packets straight from and
// to a guest's memory. The protocol is QEMU's (docs/interop/vhost-user.rst), the device virtio 1.2's, split
// rings.
//
// # How it works
//
// A [Port] listens for one front-end at a time. Everything happens in the goroutine of the worker's loop,
// messages too, so rings and memory never change under a burst. The hypervisor and the guest are both
// hostile: every address, length and index is read once and checked then; what is malformed ends the
// connection, with a reason, and nothing else. The guest's headers are copied before they are judged.
//
// A packet that a guest sends stays in its ring until its burst has been judged and copied to where it
// goes; then all chains of the burst are given back in order. A packet for a guest whose ring is full waits
// in a bounded backlog, as it would in the queue of a TAP.
package vhost

import (
	"errors"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// Host is what a port needs of the loop that it lives in.
type Host interface {
	Watch(fd int) error // tell the port when fd can be read
	Unwatch(fd int)
	// Broken asks for Fail when the burst that is under way is over.
	Broken(p *Port)
	// Told says that the front-end has said something that changes the Session, or has gone.
	Told(p *Port)
	// Changed says that the port came up or went down, or why it failed.
	Changed(p *Port, up bool, trouble string)
}

// Config is a port's configuration.
type Config struct {
	MAC   [6]byte
	MTU   int
	Pairs int // queue pairs, at least 1
}

// Port is a NIC's back-end. It implements engine.Port.
type Port struct {
	cfg   Config
	pairs int
	host  Host

	listen   int
	conn     int
	backend  int // the channel for what we say unasked, or -1
	linkDown bool
	msg      message
	features uint64
	proto    uint64
	status   uint64
	inflight bool
	mem      memory
	rings    []ring // 2i is received by the guest, 2i+1 is sent by it
	hdrLen   int
	up       bool

	next    int    // queue pair to serve next
	from    *ring  // whose chains the current burst holds
	fetched uint16 // how many
	heads   [engine.Burst]uint16
	copies  [engine.Burst][engine.HeadLen]byte
	backlog backlog
	seg     segmenter
	trouble error // found while a burst was under way
}

// New makes a port that listens on a socket, which it takes over.
func New(listen int, cfg Config, h Host) (*Port, error) {
	p := &Port{cfg: cfg, pairs: max(cfg.Pairs, 1), host: h, listen: listen, conn: -1, backend: -1}
	p.rings = make([]ring, 2*p.pairs)
	p.clear()
	if err := unix.SetNonblock(listen, true); err != nil {
		return nil, err
	}
	return p, h.Watch(listen)
}

// Close ends everything.
func (p *Port) Close() {
	p.disconnect("")
	p.host.Unwatch(p.listen)
	unix.Close(p.listen)
	p.backlog.free()
}

// SetLink says whether the link is up, and has the front-end read it anew if it gave a channel for that; it
// tells the guest. A front-end without one learns it when it next looks.
func (p *Port) SetLink(up bool) {
	if p.linkDown == !up {
		return
	}
	p.linkDown = !up
	if p.backend < 0 || p.proto&(protoBackend|protoConfig) != protoBackend|protoConfig {
		return
	}
	var b [headerLen]byte
	b[0], b[4] = configChanged, flagVersion
	// Nobody waits for a front-end that does not read: it is told again with the next change.
	_ = unix.Sendto(p.backend, b[:], unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil)
}

func (p *Port) closeBackend() {
	if p.backend >= 0 {
		unix.Close(p.backend)
		p.backend = -1
	}
}

// Up says whether a guest's driver is at the other end.
func (p *Port) Up() bool { return p.up }

// clear is the state before a connection.
func (p *Port) clear() {
	for i := range p.rings {
		p.rings[i] = newRing()
	}
	p.features, p.proto, p.status, p.inflight = 0, 0, 0, false
	p.setHeader()
	p.from, p.fetched, p.trouble = nil, 0, nil
}

// offered are the device's features.
func (p *Port) offered() uint64 {
	f := uint64(fAll)
	if p.pairs < 2 {
		f &^= fMQ
	}
	return f
}

func (p *Port) has(f uint64) bool { return p.features&f != 0 }

// setHeader follows virtio 1.2, section 5.1.6.1: legacy drivers without mergeable buffers have a shorter one.
func (p *Port) setHeader() {
	p.hdrLen = 12
	if !p.has(fVersion1 | fMrgRxbuf) {
		p.hdrLen = 10
	}
}

// Ready is called by the loop when fd, one of those watched, can be read. It says whether the port may have
// packets.
func (p *Port) Ready(fd int) bool {
	switch fd {
	case p.listen:
		p.accept()
		return false
	case p.conn:
		p.talk()
		return p.up
	}
	for i := range p.rings {
		if r := &p.rings[i]; r.kick == fd {
			var b [8]byte
			_, _ = unix.Read(fd, b[:])
			if i%2 == 0 {
				p.drain()
			}
			return p.up
		}
	}
	return false
}

// accept takes a new front-end; one that was there before has lost.
func (p *Port) accept() {
	fd, _, err := unix.Accept4(p.listen, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return
	}
	if p.conn >= 0 {
		p.disconnect("another front-end has connected")
	}
	if err := p.host.Watch(fd); err != nil {
		unix.Close(fd)
		return
	}
	p.conn = fd
}

// maxMessages is how many messages are handled at a time, so that a front-end cannot keep the loop.
const maxMessages = 16

func (p *Port) talk() {
	told := false
	defer func() {
		if told && p.conn >= 0 {
			p.host.Told(p)
		}
	}()
	for range maxMessages {
		done, err := p.msg.read(p.conn)
		if err == nil && done {
			err = p.handle(&p.msg)
			p.msg.reset()
			told = true
		}
		switch {
		case errors.Is(err, io.EOF):
			p.disconnect("")
			return
		case err != nil:
			p.disconnect("the front-end: " + err.Error())
			return
		case !done:
			return
		}
	}
}

// Fail ends the connection for a reason.
func (p *Port) Fail(why string) { p.disconnect(why) }

// disconnect forgets the front-end and its guest's memory. The next one may connect.
func (p *Port) disconnect(why string) {
	if p.conn < 0 {
		return
	}
	for i := range p.rings {
		r := &p.rings[i]
		if why != "" && r.errFD >= 0 {
			one := [8]byte{1}
			_, _ = unix.Write(r.errFD, one[:])
		}
		if r.kick >= 0 {
			p.host.Unwatch(r.kick)
		}
		r.stop()
		r.closeFDs()
	}
	p.host.Unwatch(p.conn)
	// Others may hold the connection for the next worker: the front-end must see its end all the same.
	_ = unix.Shutdown(p.conn, unix.SHUT_RDWR)
	unix.Close(p.conn)
	p.conn = -1
	p.closeBackend()
	p.msg.reset()
	p.mem.clear()
	p.clear()
	p.backlog.reset()
	p.up = false
	p.host.Changed(p, false, why)
	p.host.Told(p)
}

// startRing starts a ring, or starts it anew with other addresses.
func (p *Port) startRing(idx int) error {
	r := &p.rings[idx]
	if err := r.start(&p.mem, p.has(fEventIdx)); err != nil {
		return err
	}
	if p.inflight {
		r.lastAvail = r.usedIdx
	}
	p.changed()
	return nil
}

// unmapRings and remapRings enclose a change of the guest's memory.
func (p *Port) unmapRings() {
	for i := range p.rings {
		p.rings[i].desc, p.rings[i].avail, p.rings[i].used = nil, nil, nil
	}
}

func (p *Port) remapRings() error {
	for i := range p.rings {
		if r := &p.rings[i]; r.started {
			was := *r
			if err := r.start(&p.mem, r.eventIdx); err != nil {
				r.stop()
				return err
			}
			r.usedIdx, r.signalled, r.valid = was.usedIdx, was.signalled, was.valid
		}
	}
	return nil
}

func (p *Port) stopRing(idx int) {
	r := &p.rings[idx]
	if r.kick >= 0 {
		p.host.Unwatch(r.kick)
		unix.Close(r.kick)
		r.kick = -1
	}
	r.stop()
	p.changed()
}

func (p *Port) stopRings() {
	for i := range p.rings {
		p.stopRing(i)
		p.rings[i].enabled = false
	}
}

// changed notes whether there is a driver.
func (p *Port) changed() {
	up := p.rings[0].live() && p.rings[1].live()
	if up != p.up {
		p.up = up
		p.host.Changed(p, up, "")
	}
}

// Receive implements engine.Port: the queue pairs take turns.
func (p *Port) Receive(pkts []engine.Packet) int {
	for range p.pairs {
		r := &p.rings[2*p.next+1]
		p.next = (p.next + 1) % p.pairs
		if !r.live() || p.trouble != nil {
			continue
		}
		n, err := r.waiting()
		if err != nil {
			p.broken(err)
			return 0
		}
		if n == 0 {
			continue
		}
		return p.fetch(r, pkts, min(int(n), len(pkts), engine.Burst))
	}
	return 0
}

// fetch takes n chains from a ring.
func (p *Port) fetch(r *ring, pkts []engine.Packet, n int) int {
	p.from, p.fetched = r, 0
	k := 0
	for i := range n {
		head, err := r.head(uint16(i))
		if err == nil {
			p.heads[i] = head
			p.fetched++
			ok := p.readOne(r, head, &pkts[k], &p.copies[i])
			if !ok {
				ok, err = p.read(r, head, &pkts[k], &p.copies[i])
			}
			if ok {
				k++
			}
		}
		if err != nil {
			p.broken(err)
			break
		}
	}
	if k == 0 {
		p.Release()
	}
	return k
}

// readOne makes a packet of a chain of one descriptor without offloads; false if it is none.
func (p *Port) readOne(r *ring, head uint16, pkt *engine.Packet, room *[engine.HeadLen]byte) bool {
	addr, n := r.one(head, false)
	b := p.mem.at(addr, n)
	if n > engine.MaxLen || uint32(len(b)) != n || len(b) < p.hdrLen+wire.EthLen || *(*uint16)(unsafe.Pointer(&b[0])) != 0 {
		return false
	}
	b = b[p.hdrLen:]
	k := copy(room[:], b)
	pkt.Head, pkt.Tail, pkt.Len, pkt.Offload = room[:k], nil, len(b), engine.Offload{}
	if k < len(b) {
		pkt.Begin()
		pkt.AddTail(b[k:])
		pkt.Finish(room[:k], engine.Offload{})
	}
	return true
}

// read makes a packet of a chain. ok is false for one that is no packet; an error ends the connection.
func (p *Port) read(r *ring, head uint16, pkt *engine.Packet, room *[engine.HeadLen]byte) (ok bool, err error) {
	var hdr [12]byte
	c := r.chain(head)
	have, headLen := 0, 0
	pkt.Begin()
	for c.more {
		addr, n, err := c.step(&p.mem, false)
		if err != nil {
			return false, err
		}
		for n > 0 {
			b := p.mem.at(addr, n)
			if len(b) == 0 {
				return false, errors.New("a descriptor points outside the guest's memory")
			}
			addr += uint64(len(b))
			n -= uint32(len(b))
			if have < p.hdrLen {
				k := copy(hdr[have:p.hdrLen], b)
				have += k
				b = b[k:]
			}
			if headLen < len(room) {
				k := copy(room[headLen:], b)
				headLen += k
				b = b[k:]
			}
			if len(b) > 0 && !pkt.AddTail(b) {
				return false, nil // more parts, or bytes, than any driver's packet has
			}
		}
	}
	if have < p.hdrLen {
		return false, errors.New("a chain is shorter than its header")
	}
	pkt.Finish(room[:headLen], p.offload(&hdr))
	o := &pkt.Offload
	// What was not negotiated may not be asked for.
	if o.Flags&engine.NeedsCsum != 0 && !p.has(fCsum) {
		return false, nil
	}
	switch o.GSO {
	case engine.GSONone:
	case engine.GSOTCP4, engine.GSOTCP4 | engine.GSOECN:
		ok = p.has(fHostTSO4)
	case engine.GSOTCP6, engine.GSOTCP6 | engine.GSOECN:
		ok = p.has(fHostTSO6)
	}
	return (ok || o.GSO == engine.GSONone) && pkt.Len >= wire.EthLen, nil
}

func (p *Port) offload(h *[12]byte) engine.Offload {
	le := func(i int) uint16 { return uint16(h[i]) | uint16(h[i+1])<<8 }
	return engine.Offload{Flags: h[0], GSO: h[1], HdrLen: le(2), GSOSize: le(4), CsumStart: le(6), CsumOffs: le(8)}
}

// Release implements engine.Port: the burst's chains go back to the driver, all at once.
func (p *Port) Release() {
	r := p.from
	if r == nil {
		return
	}
	p.from = nil
	if p.fetched > 0 && r.started {
		for i := range p.fetched {
			r.put(i, p.heads[i], 0)
		}
		r.lastAvail += p.fetched
		r.publish(p.fetched)
		r.signal()
	}
	p.fetched = 0
}

// broken notes what Receive or Transmit found wrong. Packets of the burst may still lie in the guest's
// memory, so the end comes later.
func (p *Port) broken(err error) {
	if p.trouble == nil {
		p.trouble = err
		p.host.Broken(p)
	}
}

// End ends the connection for what was found wrong.
func (p *Port) End() {
	if p.trouble != nil {
		p.disconnect("the guest: " + p.trouble.Error())
	}
}

// Poll turns kicks off while the loop looks by itself, and on again before it sleeps; then it says whether
// something has come meanwhile.
func (p *Port) Poll(on bool) (more bool) {
	if !p.up {
		return false
	}
	for i := 1; i < len(p.rings); i += 2 {
		r := &p.rings[i]
		if !r.live() {
			continue
		}
		r.notify(!on)
		if !on {
			r.rearm()
			n, err := r.waiting()
			more = more || n > 0 || err != nil
		}
	}
	return more
}
