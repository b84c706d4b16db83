// Package keys is the layout of the key space; docs/formats-log.md explains it.
//
// The first byte is the keyspace. Numbers are big-endian, so that keys order as numbers do. Levels are one
// byte, as in the contract.
package keys

import (
	"encoding/binary"
	"errors"
)

// Keyspaces. They are on disk and never change.
const (
	Block   = 'd' // logs_data: level, segment, block → packed entries
	Filter  = 'f' // level, segment, page → filter over the UUIDv7 ids of a segment
	Posting = 'i' // index_objects: level, epoch, group, segment → rows of the group's objects
	Misc    = 'M' // name → one value each
	Segment = 'm' // level, segment → description of a segment
	Name    = 'n' // object number → object id
	Object  = 'o' // object id → object number
	Times   = 't' // level, segment → time of each block's first entry
	OtherID = 'u' // id that is no UUIDv7 → level, segment
	Shape   = 'x' // text → shape number
	Text    = 'y' // shape number → text
)

// EpochShift: a posting epoch is 32 segments.
const EpochShift = 5

// GroupShift: a posting group is 64 objects.
const GroupShift = 6

// ErrBad is returned for a key that is none.
var ErrBad = errors.New("malformed key")

// seg makes a key of a keyspace, a level and a number.
func seg(space, level byte, s uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{space, level}, s)
}

// BlockKey is the key of a block.
func BlockKey(dst []byte, level byte, segment uint32, block uint16) []byte {
	dst = append(dst, Block, level)
	dst = binary.BigEndian.AppendUint32(dst, segment)
	return binary.BigEndian.AppendUint16(dst, block)
}

// SegmentPrefix is what all blocks, or filter pages, of a segment begin with; for Segment and Times it is the key.
func SegmentPrefix(space, level byte, segment uint32) []byte { return seg(space, level, segment) }

// FilterKey is the key of a filter page.
func FilterKey(level byte, segment uint32, page byte) []byte {
	return append(seg(Filter, level, segment), page)
}

// PostingKey is the key of a posting page.
func PostingKey(dst []byte, level byte, segment, group uint32) []byte {
	dst = append(dst, Posting, level)
	dst = binary.BigEndian.AppendUint32(dst, segment>>EpochShift)
	dst = binary.BigEndian.AppendUint32(dst, group)
	return binary.BigEndian.AppendUint32(dst, segment)
}

// EpochPrefix is what all posting pages of an epoch begin with.
func EpochPrefix(level byte, epoch uint32) []byte { return seg(Posting, level, epoch) }

// NumberKey is the key of a number in Name or Text.
func NumberKey(space byte, n uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{space}, n)
}

// BytesKey is the key of a text in Object, Shape, OtherID or Misc. As the rest of the key is the whole text,
// one that is a prefix of another is another key.
func BytesKey(space byte, text []byte) []byte {
	k := make([]byte, 0, 1+len(text))
	return append(append(k, space), text...)
}

// End is the first key behind all keys that begin with prefix.
func End(prefix []byte) []byte {
	e := append([]byte(nil), prefix...)
	for i := len(e) - 1; i >= 0; i-- {
		if e[i]++; e[i] != 0 {
			return e[:i+1]
		}
	}
	return nil
}

// ParseSegment reads keys of Segment and Times.
func ParseSegment(k []byte) (level byte, segment uint32, err error) {
	if len(k) != 6 {
		return 0, 0, ErrBad
	}
	return k[1], binary.BigEndian.Uint32(k[2:]), nil
}

// ParseBlock reads keys of Block.
func ParseBlock(k []byte) (level byte, segment uint32, block uint16, err error) {
	if len(k) != 8 || k[0] != Block {
		return 0, 0, 0, ErrBad
	}
	return k[1], binary.BigEndian.Uint32(k[2:]), binary.BigEndian.Uint16(k[6:]), nil
}

// ParseFilter reads keys of Filter.
func ParseFilter(k []byte) (level byte, segment uint32, page byte, err error) {
	if len(k) != 7 || k[0] != Filter {
		return 0, 0, 0, ErrBad
	}
	return k[1], binary.BigEndian.Uint32(k[2:]), k[6], nil
}

// ParsePosting reads keys of Posting.
func ParsePosting(k []byte) (level byte, segment, group uint32, err error) {
	if len(k) != 14 || k[0] != Posting {
		return 0, 0, 0, ErrBad
	}
	epoch := binary.BigEndian.Uint32(k[2:])
	segment = binary.BigEndian.Uint32(k[10:])
	if segment>>EpochShift != epoch {
		return 0, 0, 0, ErrBad
	}
	return k[1], segment, binary.BigEndian.Uint32(k[6:]), nil
}

// ParseNumber reads keys of Name and Text.
func ParseNumber(k []byte) (uint32, error) {
	if len(k) != 5 {
		return 0, ErrBad
	}
	return binary.BigEndian.Uint32(k[1:]), nil
}
