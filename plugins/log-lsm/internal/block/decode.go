package block

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/klauspost/compress/zstd"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/bits"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// Names resolves the numbers in blocks.
type Names interface {
	Shape(num uint32) (*Shape, error)
	Object(num uint32) (string, error)
}

// maxHeap bounds what a block may unpack to: [Rows] entries of the largest size, and some.
const maxHeap = 4 * Rows * (64 << 10)

// Reader reads one block at a time. It refers to the bytes given to Open and is not safe for concurrent use.
type Reader struct {
	names Names
	zdec  *zstd.Decoder

	n        int
	flags    byte
	firstRow int
	t0       int64
	slope    uint64
	times    bits.Column
	ids      []byte
	idEnds   bits.Column
	ms       bits.Column
	ida      bits.Column
	idb      bits.Column
	order    bits.Column
	index    bits.Column
	objN     bits.Column
	objs     bits.Column
	nums     []uint32
	shapes   []*Shape
	comp     bits.Column // index into compNums
	compNums []uint32
	comps    []*Shape
	tail     []byte // from the variable parts on, read when first needed
	resolved bool   // shapes and comps are
	ready    bool
	cols     []bits.Column
	colAt    []int    // first column of each shape of the block
	rank     []uint16 // of each row among those of its shape
	objAt    []uint32 // first object of each row, when their number varies
	heap     []byte
	rawHeap  []byte // as stored
	heapLen  int
	heapBuf  []byte
	unpacked bool
	hashes   []byte
	scratch  []byte
}

// NewReader makes a reader.
func NewReader(names Names) (*Reader, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxHeap), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	return &Reader{names: names, zdec: z}, nil
}

// Close frees the reader.
func (r *Reader) Close() { r.zdec.Close() }

// Open begins reading a block whose first row has the number firstRow in its segment.
func (r *Reader) Open(b []byte, firstRow int) error {
	r.n, r.resolved, r.ready, r.unpacked = 0, false, false, false
	if len(b) < 8 {
		return ErrBad
	}
	if b[0] != Version {
		return fmt.Errorf("block of format version %d, this program reads %d: %w", b[0], Version, ErrBad)
	}
	sum := binary.LittleEndian.Uint32(b[len(b)-4:])
	b = b[:len(b)-4]
	if crc32.Checksum(b, crcTable) != sum {
		return fmt.Errorf("checksum does not agree: %w", ErrBad)
	}
	r.flags, r.firstRow = b[1], firstRow
	n64, k := binary.Uvarint(b[2:])
	if k <= 0 || n64 == 0 || n64 > 1<<16 {
		return ErrBad
	}
	n := int(n64)
	b = b[2+k:]
	if len(b) < 8 {
		return ErrBad
	}
	r.t0 = int64(binary.LittleEndian.Uint64(b))
	b = b[8:]
	if r.slope, k = binary.Uvarint(b); k <= 0 {
		return ErrBad
	}
	b = b[k:]
	c := colReader{b: b}
	c.read(&r.times, n)
	if r.flags&flagV7 != 0 {
		c.read(&r.ms, n)
		c.read(&r.ida, n)
		c.read(&r.idb, n)
	} else {
		c.read(&r.idEnds, n)
		if c.err == nil {
			end := r.idEnds.At(n - 1)
			if end > uint64(len(c.b)) {
				return ErrBad
			}
			r.ids, c.b = c.b[:end], c.b[end:]
		}
	}
	if r.flags&flagOrder != 0 {
		c.read(&r.order, n)
	}
	r.compNums = c.index(r.compNums[:0], &r.comp, n)
	r.nums = c.index(r.nums[:0], &r.index, n)
	c.read(&r.objN, n)
	if c.err != nil {
		return ErrBad
	}
	total := uint64(0)
	r.objAt = r.objAt[:0]
	if r.objN.Width() == 0 {
		if r.objN.Base() > log.MaxObjects {
			return ErrBad
		}
		total = r.objN.Base() * uint64(n)
	} else {
		for i := range n {
			r.objAt = append(r.objAt, uint32(total))
			v := r.objN.At(i)
			if v > log.MaxObjects {
				return ErrBad
			}
			total += v
		}
	}
	c.read(&r.objs, int(total))
	if c.err != nil {
		return ErrBad
	}
	r.tail = c.b
	r.n = n
	return nil
}

// colReader reads columns one after the other, keeping the first error.
type colReader struct {
	b   []byte
	err error
}

func (c *colReader) read(col *bits.Column, n int) {
	if c.err == nil {
		*col, c.b, c.err = bits.Read(c.b, n)
	}
}

// index reads what appendIndex has written.
func (c *colReader) index(nums []uint32, col *bits.Column, n int) []uint32 {
	count := c.uvarint()
	if c.err == nil && (count == 0 || count > uint64(n)) {
		c.err = ErrBad
	}
	if c.err != nil {
		return nums
	}
	var list bits.Column
	c.read(&list, int(count))
	c.read(col, n)
	for i := 0; c.err == nil && i < int(count); i++ {
		v := list.At(i)
		if v > 1<<32-1 {
			c.err = ErrBad
		}
		nums = append(nums, uint32(v))
	}
	return nums
}

func (c *colReader) uvarint() uint64 {
	if c.err != nil {
		return 0
	}
	v, k := binary.Uvarint(c.b)
	if k <= 0 {
		c.err = ErrBad
		return 0
	}
	c.b = c.b[k:]
	return v
}

// Len is the number of rows.
func (r *Reader) Len() int { return r.n }

// Time is a row's time in nanoseconds since 1970.
func (r *Reader) Time(i int) int64 {
	return r.t0 + int64(uint64(i)*r.slope+uint64(bits.Zag(r.times.At(i))))
}

// AppendID appends a row's id.
func (r *Reader) AppendID(dst []byte, i int) ([]byte, error) {
	if r.flags&flagV7 != 0 {
		ms := uint64(r.Time(i)/1e6 - bits.Zag(r.ms.At(i)))
		return rec.AppendV7(dst, ms, r.ida.At(i), r.idb.At(i)), nil
	}
	from := uint64(0)
	if i > 0 {
		from = r.idEnds.At(i - 1)
	}
	to := r.idEnds.At(i)
	if from > to || to > uint64(len(r.ids)) {
		return dst, ErrBad
	}
	return append(dst, r.ids[from:to]...), nil
}

// Order is the arrival number of a row within its segment.
func (r *Reader) Order(i int) int64 {
	if r.flags&flagOrder == 0 {
		return int64(r.firstRow + i)
	}
	return int64(r.firstRow+i) + bits.Zag(r.order.At(i))
}

// NObjects is the number of objects of a row.
func (r *Reader) NObjects(i int) int { return int(r.objN.At(i)) }

// ObjectNum is the number of a row's object k.
func (r *Reader) ObjectNum(i, k int) uint32 {
	if r.objN.Width() == 0 {
		return uint32(r.objs.At(i*int(r.objN.Base()) + k))
	}
	return uint32(r.objs.At(int(r.objAt[i]) + k))
}

// resolveAll finds the shapes and components of the block.
func (r *Reader) resolveAll() error {
	if r.resolved {
		return nil
	}
	var err error
	if r.shapes, err = r.resolve(r.shapes[:0], r.nums); err != nil {
		return err
	}
	if r.comps, err = r.resolve(r.comps[:0], r.compNums); err != nil {
		return err
	}
	r.resolved = true
	return nil
}

// prepare reads shapes and the columns of variable parts.
func (r *Reader) prepare() error {
	if r.ready {
		return nil
	}
	r.cols, r.colAt, r.rank = r.cols[:0], r.colAt[:0], r.rank[:0]
	if err := r.resolveAll(); err != nil {
		return err
	}
	var small [16]uint16
	count := small[:0]
	for range r.nums {
		count = append(count, 0)
	}
	for i := range r.n {
		k := r.index.At(i)
		if k >= uint64(len(count)) {
			return ErrBad
		}
		r.rank = append(r.rank, count[k])
		count[k]++
		if m := r.comp.At(i); m >= uint64(len(r.comps)) || (r.comps[m] == nil) != (r.shapes[k] == nil) {
			return ErrBad
		}
	}
	c := colReader{b: r.tail}
	for k, s := range r.shapes {
		slots := literalSlots
		if s != nil {
			slots = s.slots
		}
		r.colAt = append(r.colAt, len(r.cols))
		for _, mark := range slots {
			n := int(count[k])
			if mark == markString {
				n++
			}
			// Each slot has two places; only a UUID needs the second.
			r.cols = append(r.cols, bits.Column{}, bits.Column{})
			c.read(&r.cols[len(r.cols)-2], n)
			if mark == markUUID {
				c.read(&r.cols[len(r.cols)-1], n)
			}
		}
	}
	raw, stored := c.uvarint(), c.uvarint()
	if c.err != nil || raw > maxHeap || stored > uint64(len(c.b)) || r.flags&flagPacked == 0 && raw != stored {
		return ErrBad
	}
	r.rawHeap, c.b = c.b[:stored], c.b[stored:]
	r.heapLen = int(raw)
	r.hashes = nil
	if r.flags&flagHash != 0 {
		if len(c.b) != r.n*HashLen {
			return ErrBad
		}
		r.hashes, c.b = c.b, nil
	}
	if len(c.b) != 0 {
		return ErrBad
	}
	r.ready = true
	return nil
}

func (r *Reader) resolve(dst []*Shape, nums []uint32) ([]*Shape, error) {
	for _, num := range nums {
		var s *Shape
		if num != 0 {
			var err error
			if s, err = r.names.Shape(num); err != nil {
				return dst, err
			}
		}
		dst = append(dst, s)
	}
	return dst, nil
}

// Prepare reads what ShapeIndex and ComponentIndex need, and checks it. Shapes and Components alone need less.
func (r *Reader) Prepare() error { return r.prepare() }

// Components are the distinct components of the block, nil for rows stored whole; ComponentIndex refers to
// them.
func (r *Reader) Components() ([]*Shape, error) {
	err := r.resolveAll()
	return r.comps, err
}

// ComponentIndex is a row's index into Components; Prepare must have been called for the block.
func (r *Reader) ComponentIndex(i int) int { return int(r.comp.At(i)) }

// Hash is a row's hash of the audit chain, or nil.
func (r *Reader) Hash(i int) ([]byte, error) {
	if err := r.prepare(); err != nil || r.hashes == nil {
		return nil, err
	}
	return r.hashes[i*HashLen:][:HashLen:HashLen], nil
}

// Shape is a row's shape; nil for a row stored whole.
func (r *Reader) Shape(i int) (*Shape, error) {
	if err := r.prepare(); err != nil {
		return nil, err
	}
	return r.shapes[r.index.At(i)], nil
}

// Shapes are the distinct shapes of the block; ShapeIndex refers to them. nil stands for rows stored whole.
func (r *Reader) Shapes() ([]*Shape, error) {
	err := r.resolveAll()
	return r.shapes, err
}

// ShapeIndex is a row's index into Shapes; Prepare must have been called for the block.
func (r *Reader) ShapeIndex(i int) int { return int(r.index.At(i)) }

func (r *Reader) stringAt(col *bits.Column, rank int) ([]byte, error) {
	if !r.unpacked {
		r.heap = r.rawHeap
		if r.flags&flagPacked != 0 {
			var err error
			if r.heapBuf, err = r.zdec.DecodeAll(r.rawHeap, r.heapBuf[:0]); err != nil || len(r.heapBuf) != r.heapLen {
				return nil, fmt.Errorf("the heap does not unpack: %w", ErrBad)
			}
			r.heap = r.heapBuf
		}
		r.unpacked = true
	}
	from, to := col.At(rank), col.At(rank+1)
	if from > to || to > uint64(len(r.heap)) {
		return nil, ErrBad
	}
	return r.heap[from:to], nil
}

// render writes the text of pieces for a row.
func (r *Reader) render(dst []byte, pieces []piece, i, cols, rank int) ([]byte, error) {
	for k := range pieces {
		p := &pieces[k]
		if p.mark == 0 {
			dst = append(dst, p.lit...)
			continue
		}
		if p.mark == markObject {
			if int(p.arg) >= r.NObjects(i) {
				return dst, ErrBad
			}
			name, err := r.names.Object(r.ObjectNum(i, int(p.arg)))
			if err != nil {
				return dst, err
			}
			dst = append(dst, name...)
			continue
		}
		col := &r.cols[cols+2*p.slot]
		switch p.mark {
		case markInt:
			dst = appendUint(dst, col.At(rank))
		case markDigits:
			dst = appendDigits(dst, col.At(rank), int(p.arg))
		case markHex:
			dst = appendHex(dst, col.At(rank), int(p.arg))
		case markUUID:
			dst = rec.AppendUUID(dst, col.At(rank), r.cols[cols+2*p.slot+1].At(rank))
		case markString:
			s, err := r.stringAt(col, rank)
			if err != nil {
				return dst, err
			}
			dst = append(dst, s...)
		}
	}
	return dst, nil
}

func appendUint(dst []byte, v uint64) []byte {
	var buf [20]byte
	i := len(buf)
	for {
		i--
		buf[i] = byte('0' + v%10)
		if v /= 10; v == 0 {
			return append(dst, buf[i:]...)
		}
	}
}
