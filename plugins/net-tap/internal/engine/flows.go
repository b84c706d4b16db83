package engine

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// Flows is the table of connections that security groups have let through, so that replies pass. It lies in
// memory that may outlive the worker (a memfd): the next worker goes on with it, and connections survive.
//
// # How it works
//
// The table has a fixed number of buckets with eight entries each; a flow's bucket is a keyed hash of its
// addresses, ports and protocol, the same for both directions. Nothing grows. A full bucket gives up its
// expired entry, or the oldest that was never answered; answered flows are never pushed out by new ones, the
// new flow is refused instead. No NIC may own more than its share of the table, so that one guest cannot
// use it up for the others.
//
// An entry is written with its state last and cleared with its state first, so that one that a dying worker
// left half written counts as free.
type Flows struct {
	hdr     *flowHeader
	buckets []flowBucket
	mask    uint64
	count   map[uint32]int // by owner
	total   int
	quota   int    // most flows a NIC
	changes uint64 // counts entries that began and ended
	sweepAt int
}

// flowHeader is the beginning of the memory.
type flowHeader struct {
	Magic   uint64
	Version uint32
	Buckets uint32
	Seed    [2]uint64
	Created uint32 // seconds
	_       [28]byte
}

const (
	flowMagic   = 0x6d76697274666c77 // "mvirtflw"
	flowVersion = 1
	flowWays    = 8

	// DefaultFlowBytes is the size of a table: 64 Ki flows. Untouched pages cost nothing.
	DefaultFlowBytes = 64 + 8192*flowWays*64
)

type flowBucket [flowWays]flowEntry

// flowEntry is 64 bytes. a is the lesser end in byte order; dir says which end began.
type flowEntry struct {
	key   flowKey // 40 bytes
	owner uint32  // hash of the NIC that pays for it
	seen  uint32  // seconds
	gen   uint32  // of the rules by which it was let through
	state atomic.Uint32
	flags uint8
	_     [7]byte
}

type flowKey struct {
	a, b         wire.IP6
	aPort, bPort uint16
	proto        uint32 // no padding: keys are compared as memory
}

// States of an entry.
const (
	flowFree    = 0
	flowNew     = 1 // nobody has answered
	flowReplied = 2
	flowClosing = 3 // TCP: FIN or RST was seen
)

// Flags of an entry.
const flowFromB = 1 // b began

// Timeouts in seconds. An established TCP connection may be silent for as long as the default keepalive of
// Linux (two hours) and a good deal more.
const (
	timeoutNew     = 30
	timeoutUDP     = 180
	timeoutTCP     = 24 * 3600
	timeoutClosing = 60
)

func (e *flowEntry) timeout() uint32 {
	switch e.state.Load() {
	case flowNew:
		return timeoutNew
	case flowClosing:
		return timeoutClosing
	}
	if e.key.proto == wire.ProtoTCP { // the others have no states
		return timeoutTCP
	}
	return timeoutUDP
}

func (e *flowEntry) expired(now uint32) bool { return now-e.seen > e.timeout() && now > e.seen }

// NewFlows uses mem as a table. What a worker before has left in it is taken over if it fits; anything else
// is cleared. now is in seconds on the clock that all workers share (CLOCK_MONOTONIC).
func NewFlows(mem []byte, now uint32) (*Flows, error) {
	const bucketLen = int(unsafe.Sizeof(flowBucket{}))
	if len(mem) < 64+bucketLen || uintptr(unsafe.Pointer(&mem[0]))%64 != 0 {
		return nil, errors.New("the flow table's memory is too small or not aligned")
	}
	n := 1 << (bits.Len(uint((len(mem)-64)/bucketLen)) - 1)
	f := &Flows{hdr: (*flowHeader)(unsafe.Pointer(&mem[0])), mask: uint64(n - 1), count: map[uint32]int{}}
	f.buckets = unsafe.Slice((*flowBucket)(unsafe.Pointer(&mem[64])), n)
	f.quota = n * flowWays / 4
	if f.hdr.Magic != flowMagic || f.hdr.Version != flowVersion || f.hdr.Buckets != uint32(n) {
		clear(mem)
		var seed [16]byte
		_, _ = rand.Read(seed[:])
		*f.hdr = flowHeader{Magic: flowMagic, Version: flowVersion, Buckets: uint32(n), Created: now,
			Seed: [2]uint64{binary.LittleEndian.Uint64(seed[:]), binary.LittleEndian.Uint64(seed[8:])}}
		return f, nil
	}
	for i := range f.buckets {
		for k := range f.buckets[i] {
			e := &f.buckets[i][k]
			if e.state.Load() == flowFree {
				continue
			}
			if e.state.Load() > flowClosing || f.hash(&e.key)&f.mask != uint64(i) || e.expired(now) {
				e.state.Store(flowFree)
				continue
			}
			f.count[e.owner]++
			f.total++
		}
	}
	return f, nil
}

// hash is keyed by a random seed, so that nobody can aim at a bucket (the multiply-and-fold mixing of
// wyhash, which is public domain, on the six words of a key).
func (f *Flows) hash(k *flowKey) uint64 {
	mix := func(a, b uint64) uint64 { hi, lo := bits.Mul64(a, b); return hi ^ lo }
	le := binary.LittleEndian
	s0, s1 := f.hdr.Seed[0], f.hdr.Seed[1]|1
	h := mix(le.Uint64(k.a[:])^s0, le.Uint64(k.a[8:])^s1)
	h = mix(le.Uint64(k.b[:])^s1^h, le.Uint64(k.b[8:])^s0)
	return mix(h^(uint64(k.aPort)<<32|uint64(k.bPort)<<16|uint64(k.proto)), s1)
}

// tuple is one direction of a flow.
type tuple struct {
	src, dst     wire.IP6
	sport, dport uint16
	proto        uint8
}

// keyOf orders the ends; fromB says that the source is b.
func (t *tuple) keyOf() (k flowKey, fromB bool) {
	be := binary.BigEndian
	s, d := be.Uint64(t.src[:]), be.Uint64(t.dst[:])
	if s == d {
		s, d = be.Uint64(t.src[8:]), be.Uint64(t.dst[8:])
	}
	fromB = s > d || s == d && t.sport > t.dport
	k.proto = uint32(t.proto)
	if fromB {
		k.a, k.b, k.aPort, k.bPort = t.dst, t.src, t.dport, t.sport
	} else {
		k.a, k.b, k.aPort, k.bPort = t.src, t.dst, t.sport, t.dport
	}
	return k, fromB
}

// flowMemo is the flow that a sender's last packet belonged to: most packets belong to the same. It holds for as
// long as no entry of the table has begun or ended.
type flowMemo struct {
	t       tuple
	e       *flowEntry
	reply   bool
	changes uint64
	of      *Flows
}

// recall is find with a memo.
func (f *Flows) recall(m *flowMemo, t *tuple, now uint32) (e *flowEntry, reply bool) {
	if m.e != nil && m.of == f && m.changes == f.changes && m.t == *t && !m.e.expired(now) {
		return m.e, m.reply
	}
	e, reply = f.find(t, now)
	*m = flowMemo{t: *t, e: e, reply: reply, changes: f.changes, of: f}
	return e, reply
}

// find looks a flow up; reply says that the tuple runs against the direction in which it began.
func (f *Flows) find(t *tuple, now uint32) (e *flowEntry, reply bool) {
	k, fromB := t.keyOf()
	b := &f.buckets[f.hash(&k)&f.mask]
	for i := range b {
		if e := &b[i]; e.state.Load() != flowFree && e.key == k {
			if e.expired(now) {
				f.drop(e)
				return nil, false
			}
			return e, fromB != (e.flags&flowFromB != 0)
		}
	}
	return nil, false
}

// add makes an entry for a flow that the tuple begins; nil if there is no room for it.
func (f *Flows) add(t *tuple, owner, now, gen uint32) *flowEntry {
	if f.count[owner] >= f.quota {
		return nil
	}
	k, fromB := t.keyOf()
	b := &f.buckets[f.hash(&k)&f.mask]
	var victim *flowEntry
	for i := range b {
		e := &b[i]
		switch st := e.state.Load(); {
		case st == flowFree:
			victim = e
		case e.expired(now):
			f.drop(e)
			victim = e
		case st == flowNew && (victim == nil || victim.state.Load() == flowNew && e.seen < victim.seen):
			victim = e
			continue
		default:
			continue
		}
		break
	}
	if victim == nil {
		return nil
	}
	if victim.state.Load() != flowFree {
		f.drop(victim)
	}
	victim.key, victim.owner, victim.seen, victim.gen, victim.flags = k, owner, now, gen, 0
	if fromB {
		victim.flags = flowFromB
	}
	victim.state.Store(flowNew)
	f.changes++
	f.count[owner]++
	f.total++
	return victim
}

// drop frees an entry.
func (f *Flows) drop(e *flowEntry) {
	e.state.Store(flowFree)
	f.changes++
	f.total--
	if f.count[e.owner]--; f.count[e.owner] <= 0 {
		delete(f.count, e.owner)
	}
}

// sweepBuckets is how many buckets a sweep looks at: the default table in a minute, at one sweep a second.
const sweepBuckets = 8192 / 60

// How often there is a sweep, in nanoseconds: seldom while there are no flows.
const (
	sweepEvery = 1e9
	sweepIdle  = 60e9
)

// sweep frees expired entries, a part of the table at a time.
func (f *Flows) sweep(now uint32) {
	for range min(sweepBuckets, len(f.buckets)) {
		b := &f.buckets[f.sweepAt]
		f.sweepAt = (f.sweepAt + 1) & int(f.mask)
		for i := range b {
			if e := &b[i]; e.state.Load() != flowFree && e.expired(now) {
				f.drop(e)
			}
		}
	}
}

// pickUp is how long, in seconds, a new table lets TCP connections in that it has not seen begin: those that
// went on while there was no table.
const pickUp = 300

// begins says whether a packet may begin a flow: with TCP, only a SYN does.
func (f *Flows) begins(in *wire.Info, now uint32) bool {
	return in.Proto != wire.ProtoTCP || in.TCPFlags&(tcpSYN|tcpACK|tcpRST|tcpFIN) == tcpSYN || now-f.hdr.Created < pickUp
}

// Len is how many flows there are.
func (f *Flows) Len() int { return f.total }
