// Package idset is the filter over the ids of a segment: it says "not here" for certain and "perhaps here"
// wrongly about once in a thousand, so that an entry sent again is recognised without reading the segment.
//
// It is a Bloom filter in blocks of 64 bytes (one cache line an id), 14 bits an id and 8 probes.
package idset

import "errors"

// BitsPerID and probes: about 0.2 % false positives with blocked placement.
const (
	BitsPerID = 14
	probes    = 8
	line      = 64 // bytes
)

// ErrBad is returned for bytes that are no filter.
var ErrBad = errors.New("malformed id filter")

// Hash mixes the free bits of a UUIDv7. Whoever chooses ids that collide makes only their own repeats slower.
func Hash(ms, a, b uint64) uint64 {
	h := (b ^ ms<<20 ^ a<<8) * 0x9e3779b97f4a7c15
	h ^= h >> 32
	h *= 0xd6e8feb86659fd93
	return h ^ h>>29
}

// Build makes the filter of these hashes.
func Build(hashes []uint64) []byte {
	lines := (len(hashes)*BitsPerID + line*8 - 1) / (line * 8)
	f := make([]byte, max(lines, 1)*line)
	n := uint64(len(f) / line)
	for _, h := range hashes {
		b := f[(h>>32)*n>>32*line:][:line]
		for x, i := h, 0; i < probes; i++ {
			x = x*0x9e3779b97f4a7c15 + 1
			bit := x >> 55 // 9 bits
			b[bit/8] |= 1 << (bit % 8)
		}
	}
	return f
}

// Has says whether h may be in the filter.
func Has(f []byte, h uint64) (bool, error) {
	if len(f) == 0 || len(f)%line != 0 {
		return false, ErrBad
	}
	n := uint64(len(f) / line)
	b := f[(h>>32)*n>>32*line:][:line]
	for x, i := h, 0; i < probes; i++ {
		x = x*0x9e3779b97f4a7c15 + 1
		bit := x >> 55
		if b[bit/8]&(1<<(bit%8)) == 0 {
			return false, nil
		}
	}
	return true, nil
}
