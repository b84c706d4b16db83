package vhosttest

import (
	"encoding/binary"
	"errors"
	"unsafe"
)

// Flood is a driver that does as little as one can: for measuring back-ends rather than itself. Each packet
// costs it what it costs a poll-mode driver at least, a write to the packet's first cache line and to the ring,
// and a look at what has arrived; the rest of a packet was written once.
type Flood struct {
	d    *Driver
	head [64]byte // header and the beginning of the frame
	txAv []byte
}

// NewFlood fills all send buffers of the first queue pair with a frame.
func NewFlood(d *Driver, hdr [12]byte, frame []byte) (*Flood, error) {
	q := &d.Queues[1]
	n := d.HdrLen + len(frame)
	if n > q.BufLen || q.Num&(q.Num-1) != 0 {
		return nil, errors.New("the frame does not fit, or the ring's size is no power of two")
	}
	for k := range q.Num {
		b := d.Mem[q.Buf+k*q.BufLen:]
		copy(b, hdr[:d.HdrLen])
		copy(b[d.HdrLen:], frame)
		d.SetDesc(1, k, GPA+uint64(q.Buf+k*q.BufLen), uint32(n), 0, 0)
	}
	f := &Flood{d: d}
	copy(f.head[:], d.Mem[q.Buf:])
	f.txAv = d.Mem[q.Avail+4 : q.Avail+4+2*q.Num]
	return f, nil
}

// Send makes up to n packets available and returns how many there was room for. The device gives buffers back
// in the order in which it got them, as both back-ends that are measured do.
func (f *Flood) Send(n int) int {
	d := f.d
	q := &d.Queues[1]
	q.LastUsed = uint16(d.word(q.Used).Load() >> 16)
	n = min(n, q.Num-int(q.AvailIdx-q.LastUsed))
	if n <= 0 {
		return 0
	}
	old, mask := q.AvailIdx, q.Num-1
	for range n {
		k := int(q.AvailIdx) & mask
		*(*[64]byte)(unsafe.Pointer(&d.Mem[q.Buf+k*q.BufLen])) = f.head
		*(*uint16)(unsafe.Pointer(&f.txAv[2*k])) = uint16(k)
		q.AvailIdx++
	}
	d.publish(q)
	d.kick(q, old)
	return n
}

// Drain takes up to n received packets of one buffer each, gives the buffers back, and returns how many they
// were and the sum of their lengths, headers included, as the device said it.
func (f *Flood) Drain(n int) (packets, bytes int) {
	d := f.d
	q := &d.Queues[0]
	old, mask := q.AvailIdx, q.Num-1
	idx := uint16(d.word(q.Used).Load() >> 16)
	for q.LastUsed != idx && packets < n {
		e := binary.LittleEndian.Uint64(d.Mem[q.Used+4+8*(int(q.LastUsed)&mask):])
		*(*uint16)(unsafe.Pointer(&d.Mem[q.Avail+4+2*(int(q.AvailIdx)&mask)])) = uint16(e)
		q.AvailIdx++
		q.LastUsed++
		packets++
		bytes += int(e >> 32)
	}
	if packets > 0 {
		d.publish(q)
		d.kick(q, old)
	}
	return packets, bytes
}

// Last is the packet received last, header included: to see that it is what was sent.
func (f *Flood) Last() []byte {
	d := f.d
	q := &d.Queues[0]
	e := d.Mem[q.Used+4+8*(int(q.LastUsed-1)&(q.Num-1)):]
	off := q.Buf + int(binary.LittleEndian.Uint32(e))*q.BufLen
	return d.Mem[off : off+int(binary.LittleEndian.Uint32(e[4:]))]
}

// Close closes the driver.
func (f *Flood) Close() { f.d.Close() }
