package wire

import (
	"encoding/binary"
	"math/bits"
)

// Sum is a running ones' complement sum over big-endian 16-bit words (RFC 1071), kept in 64 bits. It may
// be carried over from part to part as long as each part but the last has an even length.
func Sum(sum uint64, b []byte) uint64 {
	var c uint64
	for len(b) >= 32 {
		sum, c = bits.Add64(sum, binary.BigEndian.Uint64(b), 0)
		sum, c = bits.Add64(sum, binary.BigEndian.Uint64(b[8:]), c)
		sum, c = bits.Add64(sum, binary.BigEndian.Uint64(b[16:]), c)
		sum, c = bits.Add64(sum, binary.BigEndian.Uint64(b[24:]), c)
		sum, c = bits.Add64(sum, 0, c)
		sum += c
		b = b[32:]
	}
	for len(b) >= 8 {
		sum, c = bits.Add64(sum, binary.BigEndian.Uint64(b), 0)
		sum += c
		b = b[8:]
	}
	for len(b) >= 2 {
		sum, c = bits.Add64(sum, uint64(binary.BigEndian.Uint16(b)), 0)
		sum += c
		b = b[2:]
	}
	if len(b) == 1 {
		sum, c = bits.Add64(sum, uint64(b[0])<<8, 0)
		sum += c
	}
	return sum
}

// AddSum adds two sums.
func AddSum(a, b uint64) uint64 {
	s, c := bits.Add64(a, b, 0)
	return s + c
}

// SwapSum turns the sum of a part that began at an odd offset into what it counts for at an even one
// (RFC 1071, section 2 (B): a byte-swapped sum is the sum of swapped bytes).
func SwapSum(sum uint64) uint64 { return uint64(bits.ReverseBytes16(^Fold(sum))) }

// Fold ends a sum: the 16-bit value to store in a checksum field. A correct packet, its checksum field
// included, folds to 0.
func Fold(sum uint64) uint16 {
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	return ^uint16(sum)
}

// Checksum is Fold(Sum(0, b)).
func Checksum(b []byte) uint16 { return Fold(Sum(0, b)) }

// Update16 is checksum field c after a 16-bit word covered by it changes from old to new (RFC 1624, eqn 3).
func Update16(c, old, new uint16) uint16 {
	s := uint32(^c) + uint32(^old) + uint32(new)
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return ^uint16(s)
}

// PseudoSum4 is the sum of the IPv4 pseudo header over TCP or UDP: addr is the 8 bytes of source and
// destination, n the length of header and payload.
func PseudoSum4(addr []byte, proto uint8, n int) uint64 {
	return Sum(uint64(proto)+uint64(n), addr[:8])
}

// PseudoSum6 is the same for IPv6 (RFC 8200, section 8.1): addr is the 32 bytes of both addresses.
func PseudoSum6(addr []byte, proto uint8, n int) uint64 {
	return Sum(uint64(proto)+uint64(n), addr[:32])
}
