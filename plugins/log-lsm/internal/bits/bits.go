// Package bits packs columns of integers: a column stores its smallest value once and every value as the
// difference to it, all in the same number of bits (frame of reference), so that any row is read without
// reading the ones before it.
//
// A column on disk is
//
//	width  1 byte, 0 to 64
//	base   uvarint, the smallest value
//	data   ceil(n*width/8) bytes, values from the lowest bit up
//
// n is not stored; the caller knows how many rows there are.
package bits

import (
	"encoding/binary"
	"errors"
	mathbits "math/bits"
)

// ErrBad is returned for bytes that are not a column.
var ErrBad = errors.New("malformed packed column")

// Append packs vals behind dst. base and width are found here.
func Append(dst []byte, vals []uint64) []byte {
	if len(vals) == 0 {
		return append(dst, 0, 0)
	}
	lo, hi := vals[0], vals[0]
	for _, v := range vals[1:] {
		lo, hi = min(lo, v), max(hi, v)
	}
	width := mathbits.Len64(hi - lo)
	dst = append(dst, byte(width))
	dst = binary.AppendUvarint(dst, lo)
	if width == 0 {
		return dst
	}
	var acc uint64
	var fill int
	for _, v := range vals {
		v -= lo
		acc |= v << fill
		if fill+width >= 64 {
			dst = binary.LittleEndian.AppendUint64(dst, acc)
			// A shift by 64 is 0 in Go, which is what is wanted when the value ended exactly at the edge.
			acc = v >> (64 - fill)
			fill = fill + width - 64
			continue
		}
		fill += width
	}
	for ; fill > 0; fill -= 8 {
		dst = append(dst, byte(acc))
		acc >>= 8
	}
	return dst
}

// Column reads a packed column. It refers to the bytes it was read from. The zero Column has no rows.
type Column struct {
	data  []byte
	base  uint64
	width uint
	n     int
}

// Read takes a column of n rows from the front of b and returns what follows it.
func Read(b []byte, n int) (Column, []byte, error) {
	if len(b) < 2 || b[0] > 64 || n < 0 {
		return Column{}, nil, ErrBad
	}
	w := uint(b[0])
	base, k := binary.Uvarint(b[1:])
	if k <= 0 {
		return Column{}, nil, ErrBad
	}
	b = b[1+k:]
	if n > 0 && w > 0 && uint64(n) > uint64(len(b))*8/uint64(w) {
		return Column{}, nil, ErrBad
	}
	size := (n*int(w) + 7) / 8
	return Column{data: b[:size:size], base: base, width: w, n: n}, b[size:], nil
}

// Len is the number of rows.
func (c *Column) Len() int { return c.n }

// Width is the number of bits of a row; 0 means that all rows are equal.
func (c *Column) Width() uint { return c.width }

// Base is the smallest value.
func (c *Column) Base() uint64 { return c.base }

// At is the value of row i; it panics when there is no such row, as a slice does.
func (c *Column) At(i int) uint64 {
	if uint(i) >= uint(c.n) {
		panic("bits: row out of range")
	}
	if c.width == 0 {
		return c.base
	}
	pos := uint(i) * c.width
	at, shift := pos/8, pos%8
	mask := ^uint64(0) >> (64 - c.width)
	if at+8 <= uint(len(c.data)) {
		v := binary.LittleEndian.Uint64(c.data[at:]) >> shift
		if shift+c.width > 64 {
			v |= uint64(c.data[at+8]) << (64 - shift)
		}
		return c.base + v&mask
	}
	var v uint64
	for k, x := range c.data[at:] {
		v |= uint64(x) << (8 * k)
	}
	return c.base + (v>>shift)&mask
}

// AppendTo appends all rows to dst.
func (c *Column) AppendTo(dst []uint64) []uint64 {
	for i := range c.n {
		dst = append(dst, c.At(i))
	}
	return dst
}

// Zig maps small numbers of either sign to small unsigned ones.
func Zig(v int64) uint64 { return uint64(v<<1) ^ uint64(v>>63) }

// Zag undoes Zig.
func Zag(u uint64) int64 { return int64(u>>1) ^ -int64(u&1) }
