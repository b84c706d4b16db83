package vhost

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of a descriptor (virtio 1.2, section 2.7.5).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
)

const (
	descLen      = 16
	maxRingSize  = 32768
	maxIndirect  = 1024 // descriptors in an indirect table; Linux uses at most 19
	noInterrupt  = 1    // avail.flags: the driver wants no calls
	noNotify     = 1    // used.flags: we want no kicks
	badRingIndex = "a descriptor index is outside the ring"
)

// ring is the device's side of a split virtqueue. Everything that it reads from guest memory it reads once,
// and checks after it has read it.
type ring struct {
	num   uint32
	mask  uint32
	desc  []byte // 16*num
	avail []byte // flags, idx, ring[num], used_event
	used  []byte // flags, idx, ring[num] of 8 bytes, avail_event
	kick  int
	call  int
	errFD int

	addrs    [3]uint64 // of desc, used, avail in the front-end's memory
	hasAddrs bool
	started  bool
	enabled  bool

	lastAvail uint16 // next to fetch
	seen      uint16 // the driver's index when it was last looked at
	usedIdx   uint16 // next to give back
	signalled uint16 // usedIdx at the last call
	valid     bool   // signalled means something
	eventIdx  bool
	quiet     bool // we asked for no kicks
}

func newRing() ring { return ring{kick: -1, call: -1, errFD: -1} }

// start maps the ring's parts and takes up where it was left.
func (r *ring) start(m *memory, eventIdx bool) error {
	if r.num == 0 || !r.hasAddrs {
		return errors.New("the ring was started before its size and addresses were set")
	}
	n := int(r.num)
	var err error
	if r.desc, err = m.user(r.addrs[0], descLen*n, 16); err != nil {
		return fmt.Errorf("descriptor table: %w", err)
	}
	if r.used, err = m.user(r.addrs[1], 6+8*n, 4); err != nil {
		return fmt.Errorf("used ring: %w", err)
	}
	// Two bytes suffice by the specification; everybody has it behind the descriptors or on a page, and an
	// aligned word can be read at once.
	if r.avail, err = m.user(r.addrs[2], 6+2*n, 4); err != nil {
		return fmt.Errorf("available ring: %w", err)
	}
	r.mask, r.eventIdx = r.num-1, eventIdx
	r.usedIdx = uint16(word(r.used).Load() >> 16)
	r.valid, r.quiet, r.started = false, false, true
	return nil
}

// stop forgets the ring's memory.
func (r *ring) stop() {
	r.started, r.desc, r.avail, r.used = false, nil, nil, nil
}

func (r *ring) closeFDs() {
	for _, fd := range []*int{&r.kick, &r.call, &r.errFD} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}

func (r *ring) live() bool { return r.started && r.enabled }

// word is the aligned 32-bit word at the beginning of b: flags and index of a ring.
func word(b []byte) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&b[0])) }

func u16at(b []byte, off int) *uint16 {
	_ = b[off+1]
	return (*uint16)(unsafe.Pointer(&b[off]))
}

// waiting is how many chains the driver has made available.
func (r *ring) waiting() (uint16, error) {
	r.seen = uint16(word(r.avail).Load() >> 16)
	n := r.seen - r.lastAvail
	if uint32(n) > r.num {
		return 0, errors.New("the available index has jumped")
	}
	return n, nil
}

// head is the i-th waiting chain's first descriptor.
func (r *ring) head(i uint16) (uint16, error) {
	h := *u16at(r.avail, 4+2*int(uint32(r.lastAvail+i)&r.mask))
	if uint32(h) >= r.num {
		return 0, errors.New(badRingIndex)
	}
	return h, nil
}

// chain walks a chain of descriptors.
type chain struct {
	table []byte
	n     uint32 // descriptors in the table
	next  uint32
	left  uint32 // how many may still follow: a longer chain is a loop
	more  bool
	ind   bool
}

func (r *ring) chain(head uint16) chain {
	return chain{table: r.desc, n: r.num, next: uint32(head), left: r.num, more: true}
}

// step reads the next descriptor, following into an indirect table. write is what it must be for.
func (c *chain) step(m *memory, write bool) (addr uint64, n uint32, err error) {
	for {
		if c.left == 0 {
			return 0, 0, errors.New("a chain of descriptors has no end")
		}
		c.left--
		d := c.table[c.next*descLen : c.next*descLen+descLen]
		addr = *(*uint64)(unsafe.Pointer(&d[0]))
		meta := *(*uint64)(unsafe.Pointer(&d[8])) // length, flags and next at once
		n = uint32(meta)
		flags, next := uint16(meta>>32), uint32(uint16(meta>>48))
		if flags&descIndirect != 0 {
			if c.ind || flags&descNext != 0 || n == 0 || n%descLen != 0 || n > maxIndirect*descLen {
				return 0, 0, errors.New("an indirect descriptor is malformed")
			}
			t := m.at(addr, n)
			if uint32(len(t)) != n || uintptr(unsafe.Pointer(&t[0]))%8 != 0 {
				return 0, 0, errors.New("an indirect table is outside the guest's memory or not aligned")
			}
			c.table, c.n, c.next, c.left, c.ind = t, n/descLen, 0, n/descLen, true
			continue
		}
		if (flags&descWrite != 0) != write {
			return 0, 0, errors.New("a descriptor has the wrong direction")
		}
		c.more = flags&descNext != 0
		if c.more {
			if next >= c.n {
				return 0, 0, errors.New(badRingIndex)
			}
			c.next = next
		}
		return addr, n, nil
	}
}

// one reads a descriptor that is a whole chain by itself, or n is 0: the way of nearly all packets. What is
// none is read anew, descriptor by descriptor (step): nothing of this look at it is used then.
func (r *ring) one(head uint16, write bool) (addr uint64, n uint32) {
	d := r.desc[int(head)*descLen:][:descLen]
	addr = *(*uint64)(unsafe.Pointer(&d[0]))
	meta := *(*uint64)(unsafe.Pointer(&d[8]))
	want := uint32(0)
	if write {
		want = descWrite
	}
	if uint32(meta>>32)&0xffff != want {
		return 0, 0
	}
	return addr, uint32(meta)
}

// put writes the used element for a chain, k places behind the published index.
func (r *ring) put(k uint16, head uint16, n uint32) {
	off := 4 + 8*int(uint32(r.usedIdx+k)&r.mask)
	e := r.used[off : off+8]
	*(*uint32)(unsafe.Pointer(&e[0])) = uint32(head)
	*(*uint32)(unsafe.Pointer(&e[4])) = n
}

// publish gives n chains back: the index is stored after the elements (an atomic store is a full barrier
// on amd64 and ordered everywhere).
func (r *ring) publish(n uint16) {
	r.usedIdx += n
	flags := uint32(0)
	if r.quiet && !r.eventIdx {
		flags = noNotify
	}
	word(r.used).Store(uint32(r.usedIdx)<<16 | flags)
}

// signal calls the driver if it wants to be (virtio 1.2, section 2.7.7).
func (r *ring) signal() {
	if r.call < 0 || r.signalled == r.usedIdx && r.valid {
		return
	}
	old := r.signalled
	was := r.valid
	r.signalled, r.valid = r.usedIdx, true
	if r.eventIdx {
		event := *u16at(r.avail, 4+2*int(r.num))
		if was && r.usedIdx-event-1 >= r.usedIdx-old {
			return
		}
	} else if uint16(word(r.avail).Load())&noInterrupt != 0 {
		return
	}
	one := [8]byte{1}
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(r.call), uintptr(unsafe.Pointer(&one)), 8)
}

// notify turns kicks on or off. When it turns them on, the caller must look at the ring once more.
func (r *ring) notify(on bool) {
	if r.quiet == !on || !r.started {
		return
	}
	r.quiet = !on
	if r.eventIdx {
		if on {
			// The event index stands behind the used ring. Exchange is a full barrier: the store must be seen
			// before the available index is read again.
			*u16at(r.used, 4+8*int(r.num)) = r.lastAvail
			fence()
		}
		return
	}
	flags := uint32(0)
	if !on {
		flags = noNotify
	}
	word(r.used).Store(uint32(r.usedIdx)<<16 | flags)
}

// rearm asks for a kick about the next chain, with EVENT_IDX.
func (r *ring) rearm() {
	if r.eventIdx && !r.quiet && r.started {
		*u16at(r.used, 4+8*int(r.num)) = r.lastAvail
		fence()
	}
}

// await asks for a kick about the next chain that the driver adds, whatever lies in the ring unused, and says
// whether it has added some since the ring was last looked at: for those there was no kick.
func (r *ring) await() bool {
	if r.eventIdx && !r.quiet && r.started {
		*u16at(r.used, 4+8*int(r.num)) = uint16(word(r.avail).Load() >> 16)
		fence()
	}
	return uint16(word(r.avail).Load()>>16) != r.seen
}

// fence is a full memory barrier.
func fence() {
	var x atomic.Uint32
	x.Swap(1)
}
