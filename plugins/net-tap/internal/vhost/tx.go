package vhost

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
)

// segmenter is room for software segmentation.
type segmenter struct {
	head [engine.HeadLen]byte
	pkt  engine.Packet
}

// outcome of a delivery.
type outcome uint8

const (
	delivered outcome = iota
	full              // no room in the ring now
	lost              // cannot be delivered at all
)

// Transmit implements engine.Port.
func (p *Port) Transmit(pkts []*engine.Packet) (packets, bytes int) {
	if !p.up || p.trouble != nil {
		return 0, 0
	}
	p.drain()
	var used [maxPairs]uint16
	pairs := p.enabledPairs()
	for _, pkt := range pkts {
		pair := uint32(0)
		if pairs > 1 {
			pair = pkt.Hash() % uint32(pairs)
		}
		r := &p.rings[2*pair]
		n := pkt.Len
		res := full
		if p.backlog.empty() {
			res = p.give(r, pkt, &used[pair])
		}
		if res == full && p.backlog.push(pkt) {
			res = delivered
		}
		if res == delivered {
			packets++
			bytes += n
		}
	}
	for i := range pairs {
		p.finish(&p.rings[2*i], used[i])
	}
	if p.wantRoom() {
		p.drain()
	}
	return packets, bytes
}

// maxPairs bounds queue pairs.
const maxPairs = 16

// enabledPairs is how many queue pairs the driver uses.
func (p *Port) enabledPairs() int {
	n := 0
	for n < p.pairs && p.rings[2*n].live() {
		n++
	}
	return max(n, 1)
}

func (p *Port) finish(r *ring, used uint16) {
	if used > 0 {
		r.lastAvail += used
		r.publish(used)
		r.signal()
	}
}

// wantRoom asks for kicks about new buffers while packets wait, and for none otherwise. It says whether there are
// new buffers already, for which no kick will come.
func (p *Port) wantRoom() bool {
	r := &p.rings[0]
	if !r.live() {
		return false
	}
	if p.backlog.empty() {
		r.notify(false)
		return false
	}
	r.notify(true)
	return r.await()
}

// drainMax bounds how often drain looks again at a ring whose driver adds buffers all the time.
const drainMax = 64

// drain delivers what waits.
func (p *Port) drain() {
	for range drainMax {
		if p.backlog.empty() || !p.up || p.trouble != nil || !p.drainOnce() {
			return
		}
	}
}

// drainOnce delivers what there are buffers for, and says whether there are new ones.
func (p *Port) drainOnce() bool {
	r := &p.rings[0]
	var used uint16
	for !p.backlog.empty() {
		pkt := p.backlog.front()
		if p.give(r, pkt, &used) == full {
			// A driver that keeps fewer buffers than this packet needs must not hold up those behind it.
			if p.backlog.stuck++; used > 0 || p.backlog.stuck < stuckMax {
				break
			}
		}
		p.backlog.stuck = 0
		p.backlog.pop()
	}
	p.finish(r, used)
	return p.wantRoom()
}

// give delivers one packet as this guest can take it: with the offloads that its driver negotiated, and
// otherwise with checksums made and segments cut.
func (p *Port) give(r *ring, pkt *engine.Packet, used *uint16) outcome {
	cut := false
	switch pkt.GSO &^ engine.GSOECN {
	case engine.GSONone:
	case engine.GSOTCP4:
		cut = !p.has(fGuestTSO4)
	case engine.GSOTCP6:
		cut = !p.has(fGuestTSO6)
	case engine.GSOUDPL4: // from a TAP, whose hypervisor knows it: no guest of ours is offered it
		cut = true
	default:
		return lost
	}
	if pkt.GSO&engine.GSOECN != 0 && !p.has(fGuestECN) {
		cut = true
	}
	if !cut {
		if pkt.Flags&engine.NeedsCsum != 0 && !p.has(fGuestCsum) && !pkt.CompleteCsum() {
			return lost
		}
		return p.write(r, pkt, used)
	}
	// All segments or none: half a packet would be sent again.
	was, res := *used, delivered
	ok := pkt.Segment(&p.seg.head, &p.seg.pkt, func(q *engine.Packet) bool {
		if !p.has(fGuestCsum) && !q.CompleteCsum() {
			res = lost
			return false
		}
		res = p.write(r, q, used)
		return res == delivered
	})
	if !ok {
		*used = was
		if res == delivered {
			res = lost
		}
	}
	return res
}

// write copies one packet into the guest's buffers, behind the used ones that are not published yet.
func (p *Port) write(r *ring, pkt *engine.Packet, used *uint16) outcome {
	n, err := r.waiting()
	if err != nil {
		p.broken(err)
		return lost
	}
	if *used < n && p.writeOne(r, pkt, *used) {
		*used++
		return delivered
	}
	var hdr [12]byte
	p.putHeader(&hdr, &pkt.Offload)
	src := source{hdr: hdr[:p.hdrLen], pkt: pkt}
	left := p.hdrLen + pkt.Len
	var count [2]*byte // where the number of buffers stands
	chains, at := uint16(0), 0
	for left > 0 {
		if *used+chains >= n {
			if uint32(chains) == r.num {
				return lost // all the buffers that can be are too few
			}
			return full
		}
		head, err := r.head(*used + chains)
		if err != nil {
			p.broken(err)
			return lost
		}
		c := r.chain(head)
		wrote := 0
		for c.more && left > 0 {
			addr, size, err := c.step(&p.mem, true)
			if err != nil {
				p.broken(err)
				return lost
			}
			for size > 0 && left > 0 {
				b := p.mem.at(addr, size)
				if len(b) == 0 {
					p.broken(errors.New("a buffer lies outside the guest's memory"))
					return lost
				}
				k := src.copy(b)
				for i := max(at, 10); i < min(at+k, 12); i++ {
					count[i-10] = &b[i-at]
				}
				at += k
				wrote += k
				left -= k
				addr += uint64(k)
				size -= uint32(k)
			}
		}
		if left > 0 && !p.has(fMrgRxbuf) {
			return lost // the buffer is too small, and only one may be used
		}
		if wrote == 0 {
			p.broken(errors.New("a buffer without room"))
			return lost
		}
		r.put(*used+chains, head, uint32(wrote))
		chains++
	}
	if p.hdrLen == 12 && count[0] != nil && count[1] != nil {
		*count[0], *count[1] = byte(chains), byte(chains>>8)
	}
	*used += chains
	return delivered
}

// writeOne copies a packet into the buffer that is k places on, if that is a single descriptor with room for all
// of it; else it has done nothing.
func (p *Port) writeOne(r *ring, pkt *engine.Packet, k uint16) bool {
	head, err := r.head(k)
	if err != nil {
		return false
	}
	need := uint32(p.hdrLen + pkt.Len)
	addr, size := r.one(head, true)
	b := p.mem.at(addr, need)
	if size < need || uint32(len(b)) != need {
		return false
	}
	if pkt.Flags == 0 && pkt.GSO == engine.GSONone && p.hdrLen == 12 {
		*(*[8]byte)(b) = [8]byte{}
		*(*[4]byte)(b[8:]) = [4]byte{2: 1}
	} else {
		var hdr [12]byte
		p.putHeader(&hdr, &pkt.Offload)
		copy(b[:p.hdrLen], hdr[:])
	}
	b = b[p.hdrLen:]
	b = b[copy(b, pkt.Head):]
	for _, t := range pkt.Tail {
		b = b[copy(b, t):]
	}
	r.put(k, head, need)
	return true
}

// putHeader writes the virtio-net header, with one buffer.
func (p *Port) putHeader(h *[12]byte, o *engine.Offload) {
	*h = [12]byte{0: o.Flags, 1: o.GSO, 10: 1}
	if o.Flags&engine.NeedsCsum != 0 {
		binary.LittleEndian.PutUint16(h[6:], o.CsumStart)
		binary.LittleEndian.PutUint16(h[8:], o.CsumOffs)
	}
	if o.GSO != engine.GSONone {
		binary.LittleEndian.PutUint16(h[2:], o.HdrLen)
		binary.LittleEndian.PutUint16(h[4:], o.GSOSize)
	}
}

// source reads a header and a packet, part by part.
type source struct {
	hdr  []byte
	pkt  *engine.Packet
	part int // 0: header, 1: head, then the tail
	off  int
}

func (s *source) copy(b []byte) int {
	n := 0
	for n < len(b) {
		var from []byte
		switch {
		case s.part == 0:
			from = s.hdr
		case s.part == 1:
			from = s.pkt.Head
		case s.part-2 < len(s.pkt.Tail):
			from = s.pkt.Tail[s.part-2]
		default:
			return n
		}
		k := copy(b[n:], from[s.off:])
		n += k
		s.off += k
		if s.off == len(from) {
			s.part++
			s.off = 0
		}
	}
	return n
}

// backlogLen bounds what waits for a guest that has no buffers: less than the 500 packets that a TAP holds,
// and not more than 2 MiB, so that it smooths bursts and does no more.
const backlogLen = 2 << 20

// recordHead is in front of each packet in the backlog: length and offload.
const recordHead = 16

// backlog is a queue of packets in one piece of memory that exists only once it was needed.
type backlog struct {
	mem        []byte
	head, tail int // of the records; head == tail: empty
	wrap       int // where the records end before they go on at 0, or 0
	stuck      int // tries without success
	pkt        engine.Packet
}

// stuckMax is how many kicks a waiting packet is given.
const stuckMax = 64

func (b *backlog) empty() bool { return b.head == b.tail }

func (b *backlog) reset() { b.head, b.tail, b.wrap = 0, 0, 0 }

func (b *backlog) free() {
	if b.mem != nil {
		_ = unix.Munmap(b.mem)
		b.mem = nil
	}
	b.reset()
}

// push copies a packet; false if there is no room.
func (b *backlog) push(p *engine.Packet) bool {
	if b.mem == nil {
		mem, err := unix.Mmap(-1, 0, backlogLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return false
		}
		b.mem = mem
	}
	need := (recordHead + p.Len + 7) &^ 7
	if b.empty() {
		b.reset()
	}
	switch {
	case b.wrap == 0 && b.tail+need > len(b.mem):
		if need >= b.head {
			return false
		}
		b.wrap, b.tail = b.tail, 0
	case b.wrap != 0 && b.tail+need >= b.head:
		return false
	}
	r := b.mem[b.tail : b.tail+need]
	le := binary.LittleEndian
	le.PutUint32(r, uint32(p.Len))
	r[4], r[5] = p.Flags, p.GSO
	le.PutUint16(r[6:], p.HdrLen)
	le.PutUint16(r[8:], p.GSOSize)
	le.PutUint16(r[10:], p.CsumStart)
	le.PutUint16(r[12:], p.CsumOffs)
	p.Copy(r[recordHead : recordHead+p.Len])
	b.tail += need
	return true
}

// front is the oldest packet, valid until pop.
func (b *backlog) front() *engine.Packet {
	r := b.mem[b.head:]
	le := binary.LittleEndian
	n := int(le.Uint32(r))
	b.pkt.Set(r[recordHead : recordHead+n : recordHead+n])
	b.pkt.Offload = engine.Offload{Flags: r[4], GSO: r[5], HdrLen: le.Uint16(r[6:]), GSOSize: le.Uint16(r[8:]),
		CsumStart: le.Uint16(r[10:]), CsumOffs: le.Uint16(r[12:])}
	b.pkt.Reparse()
	return &b.pkt
}

func (b *backlog) pop() {
	b.head += (recordHead + int(binary.LittleEndian.Uint32(b.mem[b.head:])) + 7) &^ 7
	if b.wrap != 0 && b.head >= b.wrap {
		b.head, b.wrap = 0, 0
	}
}
