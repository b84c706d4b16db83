// Package posting is one page of the object index: which rows of a segment carry which objects of a group.
//
// A page on disk is
//
//	present  8 bytes little-endian: bit k is set when object (group<<6)+k has rows here
//	for each present object, in order:
//	  list: uvarint length<<1, then rows as differences in Rice code, or
//	  bitmap: uvarint length<<1|1, then one bit a row
//
// The list is: uvarint count, 1 byte k, then for each row the difference to the one before (less one; the
// first to -1) as quotient in unary (ones, then a zero) and k low bits, from the lowest bit of each byte up.
// The shorter of list and bitmap is stored. A list of length 2 is a single row, little-endian.
package posting

import (
	"encoding/binary"
	"errors"
	"fmt"
	mathbits "math/bits"
)

// MaxRows is the largest number of rows of a segment.
const MaxRows = 1 << 16

// ErrBad is returned for bytes that are no page.
var ErrBad = errors.New("malformed posting page")

// Builder makes a page; objects are added in ascending order. The zero Builder is ready, and again after Reset.
type Builder struct {
	present uint64
	body    []byte
	tmp     []byte
}

// Reset empties the builder.
func (b *Builder) Reset() { b.present, b.body = 0, b.body[:0] }

// Add gives the rows, ascending and without repetition, of the object with these six low bits; other rows are
// an error, and the page is of no use.
func (b *Builder) Add(low uint32, rows []uint16) error {
	for i := 1; i < len(rows); i++ {
		if rows[i] <= rows[i-1] {
			return fmt.Errorf("row %d behind row %d: %w", rows[i], rows[i-1], ErrBad)
		}
	}
	b.present |= 1 << (low & 63)
	if len(rows) == 1 {
		b.body = binary.LittleEndian.AppendUint16(append(b.body, 2<<1), rows[0])
		return nil
	}
	b.tmp = appendList(b.tmp[:0], rows)
	last := int(rows[len(rows)-1])
	if size := last/8 + 1; size < len(b.tmp) {
		b.body = binary.AppendUvarint(b.body, uint64(size)<<1|1)
		at := len(b.body)
		b.body = append(b.body, make([]byte, size)...)
		for _, r := range rows {
			b.body[at+int(r)/8] |= 1 << (r % 8)
		}
		return nil
	}
	b.body = binary.AppendUvarint(b.body, uint64(len(b.tmp))<<1)
	b.body = append(b.body, b.tmp...)
	return nil
}

// Page appends the page to dst.
func (b *Builder) Page(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint64(dst, b.present)
	return append(dst, b.body...)
}

func appendList(dst []byte, rows []uint16) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(rows)))
	mean := (uint(rows[len(rows)-1]) + 1) / uint(len(rows))
	k := uint(0)
	if mean > 1 {
		// The Rice parameter that is near the best for a geometric distribution of this mean.
		k = uint(mathbits.Len(mean)) - 1
	}
	dst = append(dst, byte(k))
	var acc uint64
	var fill uint
	flush := func() {
		for ; fill >= 8; fill -= 8 {
			dst = append(dst, byte(acc))
			acc >>= 8
		}
	}
	prev := -1
	for _, r := range rows {
		d := uint(int(r) - prev - 1)
		prev = int(r)
		for q := d >> k; q > 0; {
			ones := min(q, 32)
			acc |= (1<<ones - 1) << fill
			fill += ones
			q -= ones
			flush()
		}
		fill++ // the zero that ends the quotient
		flush()
		acc |= uint64(d&(1<<k-1)) << fill
		fill += k
		flush()
	}
	if fill > 0 {
		dst = append(dst, byte(acc))
	}
	return dst
}

// Find returns the encoded rows of an object of a page; ok is false when it has none here.
func Find(page []byte, low uint32) (List, bool, error) {
	var found List
	var ok bool
	err := Each(page, func(l uint32, list List) {
		if l == low&63 {
			found, ok = list, true
		}
	})
	return found, ok, err
}

// List is the encoded rows of one object; it points into the page.
type List struct {
	data   []byte
	bitmap bool
}

// Clone copies the list out of its page.
func (l List) Clone() List { return List{append([]byte(nil), l.data...), l.bitmap} }

// Each calls fn for each object of a page, in order.
func Each(page []byte, fn func(low uint32, list List)) error {
	if len(page) < 8 {
		return ErrBad
	}
	present := binary.LittleEndian.Uint64(page)
	page = page[8:]
	for ; present != 0; present &= present - 1 {
		h, n := binary.Uvarint(page)
		if n <= 0 || h>>1 > uint64(len(page)-n) {
			return ErrBad
		}
		page = page[n:]
		size := int(h >> 1)
		fn(uint32(mathbits.TrailingZeros64(present)), List{page[:size:size], h&1 == 1})
		page = page[size:]
	}
	if len(page) != 0 {
		return ErrBad
	}
	return nil
}

// Rows appends the rows, ascending, to dst.
func (l List) Rows(dst []uint16) ([]uint16, error) {
	if l.bitmap {
		if len(l.data) > MaxRows/8 {
			return nil, ErrBad
		}
		for i, x := range l.data {
			for ; x != 0; x &= x - 1 {
				dst = append(dst, uint16(i*8+mathbits.TrailingZeros8(x)))
			}
		}
		return dst, nil
	}
	if len(l.data) == 2 {
		return append(dst, binary.LittleEndian.Uint16(l.data)), nil
	}
	count, n := binary.Uvarint(l.data)
	if n <= 0 || count > MaxRows || n >= len(l.data) || l.data[n] > 16 {
		return nil, ErrBad
	}
	k := uint(l.data[n])
	r := reader{b: l.data[n+1:]}
	row := -1
	for range count {
		q, ok := r.unary()
		low, ok2 := r.take(k)
		row += int(q<<k|low) + 1
		if !ok || !ok2 || row >= MaxRows {
			return nil, ErrBad
		}
		dst = append(dst, uint16(row))
	}
	return dst, nil
}

type reader struct {
	b   []byte
	pos uint // bit
}

// unary counts ones up to the next zero.
func (r *reader) unary() (uint, bool) {
	q := uint(0)
	for {
		at := r.pos / 8
		if at >= uint(len(r.b)) || q > MaxRows {
			return 0, false
		}
		off := r.pos % 8
		ones := uint(mathbits.TrailingZeros8(^(r.b[at] >> off)))
		if ones >= 8-off { // all that is left of this byte
			q += 8 - off
			r.pos += 8 - off
			continue
		}
		r.pos += ones + 1
		return q + ones, true
	}
}

func (r *reader) take(k uint) (uint, bool) {
	if k == 0 {
		return 0, true
	}
	if r.pos+k > uint(len(r.b))*8 {
		return 0, false
	}
	at := r.pos / 8
	var v uint64
	for i := uint(0); i < 4 && at+i < uint(len(r.b)); i++ {
		v |= uint64(r.b[at+i]) << (8 * i)
	}
	v >>= r.pos % 8
	r.pos += k
	return uint(v) & (1<<k - 1), true
}
