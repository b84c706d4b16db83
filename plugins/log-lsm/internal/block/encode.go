// Package block is the codec of packed entries: some hundred entries of one level, ordered by time and id,
// as columns of integers in one value. Any row can be read without reading the others.
//
// What makes it small is that log text repeats: an entry is taken apart into its component and its shape (the
// fixed text of the message, label keys and the fixed text of label values), which are stored once for the
// whole store and named by a number, and the variable parts (numbers, hexadecimal words, UUIDs, names of the
// entry's own objects), which become columns by shape. What has no shape that others share is stored whole,
// and compressed with the rest of its kind in the block. docs/formats-log.md has the layout byte by byte.
package block

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"github.com/klauspost/compress/zstd"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/bits"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
)

// Version is the block format's; a reader refuses others.
const Version = 1

// Rows is how many entries a full block has. Smaller blocks read faster one by one, larger ones are smaller.
const Rows = 128

// HashLen is the length of the audit chain's hash.
const HashLen = 32

// Flags of a block.
const (
	flagV7     = 1 << iota // all ids are UUIDv7 and stored as numbers
	flagOrder              // rows do not stand in the order of arrival
	flagHash               // each row has a hash of the audit chain
	flagPacked             // the heap is compressed
)

// ErrBad is returned for bytes that are no block.
var ErrBad = errors.New("malformed block")

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// Shapes gives numbers to shapes.
type Shapes interface {
	// Intern returns the shape of this text, or nil when it is not (yet) worth a number.
	Intern(text []byte) (*Shape, error)
}

// Encoder makes blocks. It is not safe for concurrent use.
type Encoder struct {
	shapes Shapes
	zenc   *zstd.Encoder
	h      shaper

	n      int
	v7     bool
	times  []int64
	ids    []byte
	idEnds []uint64
	ms     []uint64
	ida    []uint64
	idb    []uint64
	order  []uint64 // arrival number in the segment
	shape  []*Shape
	comp   []*Shape
	varAt  []int // first of vars of each row
	objN   []uint64
	objs   []uint64
	hashes []byte

	// scratch of Encode
	list  []*Shape
	nums  []uint64
	index []uint64
	col   []uint64
	heap  []byte
	pack  []byte
}

// NewEncoder makes an encoder that takes shapes from s.
func NewEncoder(s Shapes) (*Encoder, error) {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(1<<18))
	if err != nil {
		return nil, err
	}
	e := &Encoder{shapes: s, zenc: z}
	e.reset()
	return e, nil
}

// Close frees the encoder.
func (e *Encoder) Close() { _ = e.zenc.Close() }

func (e *Encoder) reset() {
	e.n, e.v7 = 0, true
	e.times, e.ids, e.idEnds = e.times[:0], e.ids[:0], e.idEnds[:0]
	e.ms, e.ida, e.idb = e.ms[:0], e.ida[:0], e.idb[:0]
	e.order, e.shape, e.comp, e.varAt = e.order[:0], e.shape[:0], e.comp[:0], e.varAt[:0]
	e.objN, e.objs, e.hashes = e.objN[:0], e.objs[:0], e.hashes[:0]
	e.h.vars, e.h.arena = e.h.vars[:0], e.h.arena[:0]
}

// Len is the number of rows added since the last block.
func (e *Encoder) Len() int { return e.n }

// Add puts the next row. Rows come in the order of time and id. order is the arrival number within the
// segment, objs the numbers of the entry's objects, hash the audit chain's or nil (all rows alike).
func (e *Encoder) Add(v *rec.View, order uint32, objs []uint32, hash []byte) error {
	e.varAt = append(e.varAt, len(e.h.vars))
	arena := len(e.h.arena)
	e.h.entry(v)
	comp, err := e.shapes.Intern(v.Component)
	if err != nil {
		return err
	}
	var s *Shape
	if len(e.h.text) <= MaxShape {
		if s, err = e.shapes.Intern(e.h.text); err != nil {
			return err
		}
	}
	if s == nil || comp == nil {
		s, comp = nil, nil
		e.h.vars = e.h.vars[:e.varAt[e.n]]
		e.h.arena = e.h.arena[:arena]
		e.h.arena = literal(e.h.arena, v)
		e.h.vars = append(e.h.vars, uint64(arena)<<stringShift|uint64(len(e.h.arena)-arena))
	}
	e.shape, e.comp = append(e.shape, s), append(e.comp, comp)
	e.times = append(e.times, v.Time)
	e.ids = append(e.ids, v.ID...)
	e.idEnds = append(e.idEnds, uint64(len(e.ids)))
	ms, a, b, ok := rec.V7(v.ID)
	e.v7 = e.v7 && ok
	// Nanoseconds to milliseconds rounds toward zero; whatever it does, the reader does the same.
	e.ms = append(e.ms, bits.Zig(v.Time/1e6-int64(ms)))
	e.ida, e.idb = append(e.ida, a), append(e.idb, b)
	e.order = append(e.order, uint64(order))
	e.objN = append(e.objN, uint64(len(objs)))
	for _, o := range objs {
		e.objs = append(e.objs, uint64(o))
	}
	e.hashes = append(e.hashes, hash...)
	e.n++
	return nil
}

// Encode appends the block of the rows added since the last one to dst; firstRow is the number of its first
// row in the segment.
func (e *Encoder) Encode(dst []byte, firstRow int) []byte {
	start := len(dst)
	n := e.n
	flags := byte(0)
	if e.v7 {
		flags |= flagV7
	}
	for i, o := range e.order {
		if o != uint64(firstRow+i) {
			flags |= flagOrder
			break
		}
	}
	if len(e.hashes) > 0 {
		flags |= flagHash
	}
	dst = append(dst, Version, flags)
	dst = binary.AppendUvarint(dst, uint64(n))
	dst = e.appendTimes(dst)
	if e.v7 {
		dst = bits.Append(dst, e.ms)
		dst = bits.Append(dst, e.ida)
		dst = bits.Append(dst, e.idb)
	} else {
		dst = bits.Append(dst, e.idEnds)
		dst = append(dst, e.ids...)
	}
	if flags&flagOrder != 0 {
		for i := range e.order {
			e.order[i] = bits.Zig(int64(e.order[i]) - int64(firstRow+i))
		}
		dst = bits.Append(dst, e.order)
	}
	dst = e.appendIndex(dst, e.comp)
	dst = e.appendIndex(dst, e.shape)
	dst = bits.Append(dst, e.objN)
	dst = bits.Append(dst, e.objs)
	dst = e.appendVars(dst)
	stored := e.heap
	if len(e.heap) > 200 {
		e.pack = e.zenc.EncodeAll(e.heap, e.pack[:0])
		if len(e.pack) < len(e.heap)*9/10 {
			stored = e.pack
			dst[start+1] |= flagPacked
		}
	}
	dst = binary.AppendUvarint(dst, uint64(len(e.heap)))
	dst = binary.AppendUvarint(dst, uint64(len(stored)))
	dst = append(dst, stored...)
	dst = append(dst, e.hashes...)
	dst = binary.LittleEndian.AppendUint32(dst, crc32.Checksum(dst[start:], crcTable))
	e.reset()
	return dst
}

// appendTimes stores times as residuals to a straight line, which take fewer bits than offsets and are
// still read one by one. All arithmetic is modulo 2^64.
func (e *Encoder) appendTimes(dst []byte) []byte {
	t0 := e.times[0]
	slope := uint64(0)
	if e.n > 1 {
		slope = uint64(e.times[e.n-1]-t0) / uint64(e.n-1)
	}
	e.col = e.col[:0]
	for i, t := range e.times {
		e.col = append(e.col, bits.Zig(int64(uint64(t-t0)-uint64(i)*slope)))
	}
	dst = binary.LittleEndian.AppendUint64(dst, uint64(t0))
	dst = binary.AppendUvarint(dst, slope)
	return bits.Append(dst, e.col)
}

// appendIndex writes the distinct shapes of rows in the order of first use, and each row's index into them,
// which stay in list and index. nil has number 0.
func (e *Encoder) appendIndex(dst []byte, shapes []*Shape) []byte {
	e.list, e.nums, e.index = e.list[:0], e.nums[:0], e.index[:0]
rows:
	for _, s := range shapes {
		for k, x := range e.list {
			if x == s {
				e.index = append(e.index, uint64(k))
				continue rows
			}
		}
		e.index = append(e.index, uint64(len(e.list)))
		e.list = append(e.list, s)
		num := uint64(0)
		if s != nil {
			num = uint64(s.Num)
		}
		e.nums = append(e.nums, num)
	}
	dst = binary.AppendUvarint(dst, uint64(len(e.list)))
	dst = bits.Append(dst, e.nums)
	return bits.Append(dst, e.index)
}

// appendVars writes the columns of each shape's slots and fills the heap.
func (e *Encoder) appendVars(dst []byte) []byte {
	e.heap = e.heap[:0]
	for k, s := range e.list {
		slots := literalSlots
		if s != nil {
			slots = s.slots
		}
		at := 0
		for _, mark := range slots {
			switch mark {
			case markString:
				e.col = append(e.col[:0], uint64(len(e.heap)))
				for i, x := range e.index {
					if x == uint64(k) {
						v := e.h.vars[e.varAt[i]+at]
						off := v >> stringShift
						e.heap = append(e.heap, e.h.arena[off:off+v&(1<<stringShift-1)]...)
						e.col = append(e.col, uint64(len(e.heap)))
					}
				}
				dst = bits.Append(dst, e.col)
			case markUUID:
				dst = e.appendSlot(dst, k, at)
				at++
				dst = e.appendSlot(dst, k, at)
			default:
				dst = e.appendSlot(dst, k, at)
			}
			at++
		}
	}
	return dst
}

func (e *Encoder) appendSlot(dst []byte, k, at int) []byte {
	e.col = e.col[:0]
	for i, x := range e.index {
		if x == uint64(k) {
			e.col = append(e.col, e.h.vars[e.varAt[i]+at])
		}
	}
	return bits.Append(dst, e.col)
}

// literalSlots are the slots of rows without shape; never written to.
var literalSlots = []byte{markString}
