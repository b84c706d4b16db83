package image

import (
	"encoding/binary"
	"math/bits"
)

// inflater decodes one DEFLATE stream (RFC 1951) from memory to memory. The general decoders of the library
// read through an interface and keep a window of their own; a qcow2 cluster needs neither, and goes about
// twice as fast through this. An inflater belongs to one goroutine and is reused, so that its tables are
// allocated once.
//
// A table entry is base<<16 | type<<12 | extra<<8 | length: length is the number of bits of the code, extra
// the number of bits that follow it and are added to base.
type inflater struct {
	lit   [1<<litBits + maxLit<<(maxCode-litBits)]uint32
	dist  [1<<distBits + maxDist<<(maxCode-distBits)]uint32
	pre   [1 << preBits]uint32
	lens  [maxLit + maxDist]uint8
	fixed bool // lit and dist hold the fixed codes

	src     []byte
	pos     int
	buf     uint64 // bits read and not yet used, lowest first
	n       uint   // how many
	overrun bool
}

const (
	litBits  = 10 // bits of the first-level tables
	distBits = 8
	preBits  = 7
	maxCode  = 15 // longest code, RFC 1951 section 3.2.7
	maxLit   = 288
	maxDist  = 32
)

const (
	entryLiteral = iota << 12
	entryBase
	entryEnd
	entrySub // base is where the second-level table begins, extra the bits that index it
	entryBad
	entryType = 7 << 12
)

// Length and distance codes: RFC 1951, section 3.2.5.
var lengthBase = [...]uint16{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
var lengthExtra = [...]uint8{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
var distBase = [...]uint16{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577}
var distExtra = [...]uint8{0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13}

// Order of the code length codes: RFC 1951, section 3.2.7.
var preOrder = [...]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// inflate decodes src into dst and returns how much of dst is filled. It stops without looking further when
// dst is full: the end of a qcow2 cluster's stream may be missing (QEMU accepts that, too).
func (f *inflater) inflate(dst, src []byte) (int, error) {
	f.src, f.pos, f.buf, f.n, f.overrun = src, 0, 0, 0, false
	o := 0
	for o < len(dst) {
		head := f.take(3)
		if f.overrun {
			return o, errPacked
		}
		var err error
		switch head >> 1 {
		case 0:
			o, err = f.stored(dst, o)
		case 1:
			if !f.fixed {
				f.makeFixed()
			}
			o, err = f.block(dst, o)
		case 2:
			if err = f.makeDynamic(); err == nil {
				o, err = f.block(dst, o)
			}
		default:
			err = errPacked
		}
		if err != nil {
			return o, err
		}
		if head&1 != 0 {
			break
		}
	}
	return o, nil
}

// refill tops the bit buffer up to at least 56 bits, or to what is left.
func (f *inflater) refill() {
	if f.pos+8 <= len(f.src) {
		f.buf |= binary.LittleEndian.Uint64(f.src[f.pos:]) << f.n
		f.pos += int((63 - f.n) >> 3)
		f.n |= 56
		return
	}
	for f.n < 56 && f.pos < len(f.src) {
		f.buf |= uint64(f.src[f.pos]) << f.n
		f.pos++
		f.n += 8
	}
}

// take returns the next n bits, n at most 32; behind the end it sets overrun.
func (f *inflater) take(n uint) uint32 {
	if f.n < n {
		f.refill()
		if f.n < n {
			f.overrun = true
			return 0
		}
	}
	v := uint32(f.buf & (1<<n - 1))
	f.buf >>= n
	f.n -= n
	return v
}

func (f *inflater) stored(dst []byte, o int) (int, error) {
	f.take(f.n & 7)
	length := f.take(16)
	inverse := f.take(16)
	if f.overrun || length != ^inverse&0xffff {
		return o, errPacked
	}
	// The bytes still in the bit buffer are given back. refill may have loaded bits above f.n of a byte that
	// pos has not passed yet, so the buffer is emptied as a whole.
	f.pos -= int(f.n >> 3)
	f.buf, f.n = 0, 0
	want := min(int(length), len(dst)-o)
	if f.pos+want > len(f.src) {
		return o, errPacked
	}
	o += copy(dst[o:o+want], f.src[f.pos:])
	f.pos += want
	return o, nil
}

func (f *inflater) makeFixed() {
	l := f.lens[:]
	for i := range maxLit {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		default:
			l[i] = 8
		}
	}
	for i := range maxDist {
		l[maxLit+i] = 5
	}
	f.build(f.lit[:], litBits, l[:maxLit], litEntry)
	f.build(f.dist[:], distBits, l[maxLit:], distEntry)
	f.fixed = true
}

func (f *inflater) makeDynamic() error {
	f.fixed = false
	nlit, ndist, npre := int(f.take(5))+257, int(f.take(5))+1, int(f.take(4))+4
	if f.overrun || nlit > 286 || ndist > 30 {
		return errPacked
	}
	var pre [19]uint8
	for i := range npre {
		pre[preOrder[i]] = uint8(f.take(3))
	}
	if f.overrun || !f.build(f.pre[:], preBits, pre[:], preEntry) {
		return errPacked
	}
	for i := 0; i < nlit+ndist; {
		f.refill()
		e := f.pre[f.buf&(1<<preBits-1)]
		if e&entryType == entryBad || uint(e&0xff) > f.n {
			return errPacked
		}
		f.buf >>= e & 0xff
		f.n -= uint(e & 0xff)
		sym := uint8(e >> 16)
		if sym < 16 {
			f.lens[i] = sym
			i++
			continue
		}
		var value uint8
		var times int
		switch sym {
		case 16:
			if i == 0 {
				return errPacked
			}
			value, times = f.lens[i-1], 3+int(f.take(2))
		case 17:
			times = 3 + int(f.take(3))
		default:
			times = 11 + int(f.take(7))
		}
		if f.overrun || i+times > nlit+ndist {
			return errPacked
		}
		for range times {
			f.lens[i] = value
			i++
		}
	}
	if f.lens[256] == 0 { // a block without an end
		return errPacked
	}
	if !f.build(f.lit[:], litBits, f.lens[:nlit], litEntry) || !f.build(f.dist[:], distBits, f.lens[nlit:nlit+ndist], distEntry) {
		return errPacked
	}
	return nil
}

func preEntry(sym int) uint32 { return uint32(sym)<<16 | entryLiteral }

func litEntry(sym int) uint32 {
	switch {
	case sym < 256:
		return uint32(sym)<<16 | entryLiteral
	case sym == 256:
		return entryEnd
	case sym-257 < len(lengthBase):
		return uint32(lengthBase[sym-257])<<16 | entryBase | uint32(lengthExtra[sym-257])<<8
	}
	return entryBad
}

func distEntry(sym int) uint32 {
	if sym < len(distBase) {
		return uint32(distBase[sym])<<16 | entryBase | uint32(distExtra[sym])<<8
	}
	return entryBad
}

// build makes the decoding table of a canonical code (RFC 1951, section 3.2.2). It tells false when the
// lengths make no code: over-subscribed, or incomplete with more than one symbol.
func (f *inflater) build(table []uint32, first uint, lens []uint8, entry func(int) uint32) bool {
	var count [maxCode + 1]int
	longest := uint(0)
	for _, l := range lens {
		count[l]++
		longest = max(longest, uint(l))
	}
	count[0] = 0
	var next [maxCode + 2]uint32
	code, left, used := uint32(0), 1, 0
	for l := 1; l <= maxCode; l++ {
		left = left<<1 - count[l]
		if left < 0 {
			return false
		}
		used += count[l]
		code = (code + uint32(count[l-1])) << 1
		next[l] = code
	}
	if left > 0 && used > 1 {
		return false
	}
	for i := range 1 << first {
		table[i] = entryBad
	}
	subBits := uint(0)
	if longest > first {
		subBits = longest - first
	}
	free := 1 << first
	for sym, l8 := range lens {
		if l8 == 0 {
			continue
		}
		l := uint(l8)
		c := next[l]
		next[l]++
		rev := uint(bits.Reverse32(c) >> (32 - l))
		e := entry(sym) | uint32(l)
		if l <= first {
			for i := rev; i < 1<<first; i += 1 << l {
				table[i] = e
			}
			continue
		}
		low := rev & (1<<first - 1)
		if table[low]&entryType != entrySub {
			table[low] = uint32(free)<<16 | entrySub | uint32(subBits)<<8 | uint32(first)
			for i := range 1 << subBits {
				table[free+i] = entryBad
			}
			free += 1 << subBits
		}
		base := uint(table[low] >> 16)
		for i := rev >> first; i < 1<<subBits; i += 1 << (l - first) {
			table[base+i] = e
		}
	}
	return true
}

// block decodes symbols until the end of the block or of dst.
func (f *inflater) block(dst []byte, o int) (int, error) {
	const slack = 258 + 16 // the longest match, and what the wide copies may write beyond
	lit, dist := &f.lit, &f.dist
	src, pos, buf, n := f.src, f.pos, f.buf, f.n
	for pos+8 <= len(src) && o+slack <= len(dst) {
		// 56 bits: enough for two literals of the first level and a refill, or for one length and distance
		// (15+5+15+13).
		buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
		pos += int((63 - n) >> 3)
		n |= 56
		e := lit[buf&(1<<litBits-1)]
		if e&entryType == entryLiteral {
			buf >>= e & 63
			n -= uint(e & 0xff)
			dst[o] = byte(e >> 16)
			o++
			e = lit[buf&(1<<litBits-1)]
			if e&entryType == entryLiteral {
				buf >>= e & 63
				n -= uint(e & 0xff)
				dst[o] = byte(e >> 16)
				o++
				e = lit[buf&(1<<litBits-1)]
				if e&entryType == entryLiteral {
					buf >>= e & 63
					n -= uint(e & 0xff)
					dst[o] = byte(e >> 16)
					o++
					continue
				}
			}
			if pos+8 > len(src) {
				break
			}
			buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
			pos += int((63 - n) >> 3)
			n |= 56
		}
		if e&entryType == entrySub {
			e = lit[uint(e>>16)+uint(buf>>litBits)&(1<<(e>>8&15)-1)]
			if e&entryType == entryLiteral {
				buf >>= e & 63
				n -= uint(e & 0xff)
				dst[o] = byte(e >> 16)
				o++
				continue
			}
		}
		buf >>= e & 63
		n -= uint(e & 0xff)
		if e&entryType != entryBase {
			f.pos, f.buf, f.n = pos, buf, n
			if e&entryType == entryEnd {
				return o, nil
			}
			return o, errPacked
		}
		x := uint(e >> 8 & 15)
		length := int(e>>16) + int(buf&(1<<x-1))
		buf >>= x
		n -= x
		d := dist[buf&(1<<distBits-1)]
		if d&entryType == entrySub {
			d = dist[uint(d>>16)+uint(buf>>distBits)&(1<<(d>>8&15)-1)]
		}
		if d&entryType != entryBase {
			return o, errPacked
		}
		buf >>= d & 63
		n -= uint(d & 0xff)
		x = uint(d >> 8 & 15)
		back := int(d>>16) + int(buf&(1<<x-1))
		buf >>= x
		n -= x
		if back > o {
			return o, errPacked
		}
		o = repeat(dst, o, back, length)
	}
	f.pos, f.buf, f.n = pos, buf, n
	return f.blockTail(dst, o)
}

// repeat copies length bytes from back before o; there are 16 bytes of room behind them.
func repeat(dst []byte, o, back, length int) int {
	end := o + length
	switch {
	case back >= 8 && length <= 40:
		for s := o - back; o < end; o, s = o+8, s+8 {
			binary.LittleEndian.PutUint64(dst[o:], binary.LittleEndian.Uint64(dst[s:]))
		}
	case back >= length:
		copy(dst[o:end], dst[o-back:])
	case back == 1:
		v := uint64(dst[o-1]) * 0x0101010101010101
		for ; o < end; o += 8 {
			binary.LittleEndian.PutUint64(dst[o:], v)
		}
	default:
		// What was copied doubles each time.
		from := o - back
		for o < end {
			o += copy(dst[o:end], dst[from:o])
		}
	}
	return end
}

// blockTail is block for the last bytes of src and dst, with every bound looked at.
func (f *inflater) blockTail(dst []byte, o int) (int, error) {
	for o < len(dst) {
		e, ok := f.symbol(f.lit[:], litBits)
		if !ok {
			return o, errPacked
		}
		switch e & entryType {
		case entryLiteral:
			dst[o] = byte(e >> 16)
			o++
			continue
		case entryEnd:
			return o, nil
		case entryBase:
		default:
			return o, errPacked
		}
		length := int(e>>16) + int(f.take(uint(e>>8&15)))
		d, ok := f.symbol(f.dist[:], distBits)
		if !ok || d&entryType != entryBase {
			return o, errPacked
		}
		back := int(d>>16) + int(f.take(uint(d>>8&15)))
		if f.overrun || back > o {
			return o, errPacked
		}
		for ; length > 0 && o < len(dst); length-- {
			dst[o] = dst[o-back]
			o++
		}
	}
	return o, nil
}

func (f *inflater) symbol(table []uint32, first uint) (uint32, bool) {
	f.refill()
	e := table[f.buf&(1<<first-1)]
	if e&entryType == entrySub {
		e = table[uint(e>>16)+uint(f.buf>>first)&(1<<(e>>8&15)-1)]
	}
	l := uint(e & 0xff)
	if e&entryType == entryBad || l > f.n {
		return 0, false
	}
	f.buf >>= l
	f.n -= l
	return e, true
}
