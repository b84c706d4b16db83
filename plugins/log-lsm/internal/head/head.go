// Package head keeps the newest entries of one level in memory, in the order of their arrival, until they are
// packed. One goroutine adds; views are immutable and may be read by any.
package head

import (
	"bytes"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
)

// chunkSize is the size of the pieces in which records are kept; larger ones would wait half empty.
const chunkSize = 256 << 10

// Item is an encoded entry, prepared by whoever appends it.
type Item struct {
	Rec     []byte // rec encoding
	Time    int64
	IDHash  uint64
	Objects []ObjectHash
	ID      []byte // within Rec
	Level   byte
	V7      bool
	MS      uint64
	A, B    uint64
}

// ObjectHash stands for an object id while it is in memory: 128 bits, hashed with keys that are made at start
// and never leave the process, so that nobody can make two ids that are taken for one.
type ObjectHash struct{ A, B uint64 }

// Head holds entries of one level.
type Head struct {
	Level byte
	First uint64 // arrival number of row 0

	times  []int64
	refs   []ref
	idHash []uint64
	objEnd []uint32
	objs   []ObjectHash
	chunks [][]byte
	used   int      // bytes of the last chunk
	slots  []uint32 // open addressing by IDHash: the hash's 15 highest bits, row+1
	bytes  int
	shown  int // rows that are durable
}

type ref struct {
	chunk, off, size uint32
	tail             uint16 // bytes behind the record (hash of the audit chain)
}

// New makes an empty head.
func New(level byte, first uint64) *Head {
	return &Head{Level: level, First: first, slots: make([]uint32, 256)}
}

// Len is the number of rows, durable or not.
func (h *Head) Len() int { return len(h.times) }

// Shown is the number of durable rows.
func (h *Head) Shown() int { return h.shown }

// Show makes n more rows visible to views.
func (h *Head) Show(n int) { h.shown += n }

// Bytes is the memory in use, about.
func (h *Head) Bytes() int {
	return h.bytes + len(h.times)*(8+8+16+4) + len(h.objs)*16 + len(h.slots)*4
}

// Add takes an item behind the last; tail is stored behind its record.
func (h *Head) Add(it *Item, tail []byte) {
	size := len(it.Rec) + len(tail)
	if len(h.chunks) == 0 || len(h.chunks[len(h.chunks)-1])-h.used < size {
		// Whole at once: a view reads the slice's header while later records are written into it.
		h.chunks = append(h.chunks, make([]byte, max(chunkSize, size)))
		h.bytes += max(chunkSize, size)
		h.used = 0
	}
	last := len(h.chunks) - 1
	r := ref{chunk: uint32(last), off: uint32(h.used), size: uint32(len(it.Rec)), tail: uint16(len(tail))}
	h.used += copy(h.chunks[last][h.used:], it.Rec)
	h.used += copy(h.chunks[last][h.used:], tail)
	h.times = append(h.times, it.Time)
	h.refs = append(h.refs, r)
	h.idHash = append(h.idHash, it.IDHash)
	h.objs = append(h.objs, it.Objects...)
	h.objEnd = append(h.objEnd, uint32(len(h.objs)))
	if len(h.times)*2 > len(h.slots) {
		h.grow()
	} else {
		h.index(it.IDHash, uint32(len(h.times)))
	}
}

// MaxRows is the most rows of a head: a slot has 17 bits for them.
const MaxRows = 1 << 16

const rowMask = 1<<17 - 1

// tag keeps most lookups from going to another place in memory only to find another id.
func tag(hash uint64) uint32 { return uint32(hash>>49) << 17 }

func (h *Head) index(hash uint64, row uint32) {
	mask := uint64(len(h.slots) - 1)
	for i := hash & mask; ; i = (i + 1) & mask {
		if h.slots[i] == 0 {
			h.slots[i] = tag(hash) | row
			return
		}
	}
}

func (h *Head) grow() {
	h.slots = make([]uint32, len(h.slots)*4)
	for i, x := range h.idHash {
		h.index(x, uint32(i+1))
	}
}

// Has says whether an entry of this id is here.
func (h *Head) Has(hash uint64, id []byte) bool {
	mask := uint64(len(h.slots) - 1)
	for i := hash & mask; h.slots[i] != 0; i = (i + 1) & mask {
		if h.slots[i]&^rowMask != tag(hash) {
			continue
		}
		row := h.slots[i]&rowMask - 1
		if h.idHash[row] != hash {
			continue
		}
		r := h.refs[row]
		b := h.chunks[r.chunk][r.off+rec.IDAt-1:]
		if n := int(b[0]); n == len(id) && bytes.Equal(b[1:1+n], id) {
			return true
		}
	}
	return false
}

// View is the durable rows at one moment.
type View struct {
	Level  byte
	First  uint64
	Times  []int64
	refs   []ref
	objEnd []uint32
	objs   []ObjectHash
	chunks [][]byte
}

// View makes a view; the caller holds the lock that Add is called under.
func (h *Head) View() View {
	n := h.shown
	return View{h.Level, h.First, h.times[:n], h.refs[:n], h.objEnd[:n], h.objs, h.chunks[:len(h.chunks):len(h.chunks)]}
}

// All is a view of all rows, for the goroutine that adds, or when nobody does any more.
func (h *Head) All() View {
	return View{h.Level, h.First, h.times, h.refs, h.objEnd, h.objs, h.chunks}
}

// Len is the number of rows.
func (v *View) Len() int { return len(v.Times) }

// Rec is the record of a row, and what stands behind it.
func (v *View) Rec(row int) (record, tail []byte) {
	r := v.refs[row]
	c := v.chunks[r.chunk]
	return c[r.off : r.off+r.size : r.off+r.size], c[r.off+r.size : r.off+r.size+uint32(r.tail)]
}

// ID is the id of a row.
func (v *View) ID(row int) []byte {
	r := v.refs[row]
	c := v.chunks[r.chunk]
	at := r.off + rec.IDAt
	n := uint32(c[at-1])
	return c[at : at+n : at+n]
}

// Objects is the hashes of a row's objects.
func (v *View) Objects(row int) []ObjectHash {
	from := uint32(0)
	if row > 0 {
		from = v.objEnd[row-1]
	}
	return v.objs[from:v.objEnd[row]]
}

// Parse reads the record of a row.
func (v *View) Parse(row int, into *rec.View) error {
	b, _ := v.Rec(row)
	return rec.Parse(b, into)
}
