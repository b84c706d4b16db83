package engine

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
)

// segment describes up to maxRows packed entries of one level that arrived one after the other. It is
// immutable.
type segment struct {
	level   byte
	id      uint32
	rows    int
	first   uint64 // arrival number, within the level, of the first to arrive
	minTime int64
	maxTime int64
	bytes   uint64 // of its blocks, filter and postings, as stored
	nV7     int    // entries whose id is a UUIDv7
	ranges  []msRange

	// maxMS is the largest UUIDv7 time in this segment and all before it, those included that retention has
	// removed since; not stored.
	maxMS uint64
}

// msRange is an interval of UUIDv7 milliseconds, both ends included.
type msRange struct{ lo, hi uint64 }

// maxRanges bounds the intervals kept of a segment: a few senders with wrong clocks do not make every later
// id look as if it could be in this segment.
const maxRanges = 8

// segmentVersion is the version of the description.
const segmentVersion = 1

var crcTable = crc32.MakeTable(crc32.Castagnoli)

func (s *segment) encode() []byte {
	b := []byte{segmentVersion}
	b = binary.AppendUvarint(b, uint64(s.rows))
	b = binary.AppendUvarint(b, s.first)
	b = binary.BigEndian.AppendUint64(b, uint64(s.minTime))
	b = binary.BigEndian.AppendUint64(b, uint64(s.maxTime))
	b = binary.AppendUvarint(b, s.bytes)
	b = binary.AppendUvarint(b, uint64(s.nV7))
	b = binary.AppendUvarint(b, uint64(len(s.ranges)))
	for _, r := range s.ranges {
		b = binary.AppendUvarint(b, r.lo)
		b = binary.AppendUvarint(b, r.hi-r.lo)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, crcTable))
}

func decodeSegment(level byte, id uint32, b []byte) (*segment, error) {
	bad := func(what string) error {
		return fmt.Errorf("description of segment %d/%d: %s", level, id, what)
	}
	if len(b) < 5 || crc32.Checksum(b[:len(b)-4], crcTable) != binary.LittleEndian.Uint32(b[len(b)-4:]) {
		return nil, bad("checksum does not agree")
	}
	if b[0] != segmentVersion {
		return nil, bad(fmt.Sprintf("format version %d, this program reads %d", b[0], segmentVersion))
	}
	b = b[1 : len(b)-4]
	ok := true
	num := func() uint64 {
		v, k := binary.Uvarint(b)
		if k <= 0 {
			ok = false
			return 0
		}
		b = b[k:]
		return v
	}
	fixed := func() int64 {
		if len(b) < 8 {
			ok = false
			return 0
		}
		v := binary.BigEndian.Uint64(b)
		b = b[8:]
		return int64(v)
	}
	s := &segment{level: level, id: id}
	rows := num()
	s.first = num()
	s.minTime, s.maxTime = fixed(), fixed()
	s.bytes = num()
	nV7 := num()
	n := num()
	if !ok || rows == 0 || rows > maxRows || nV7 > rows || n > maxRanges {
		return nil, bad("malformed")
	}
	s.rows, s.nV7 = int(rows), int(nV7)
	for range n {
		lo := num()
		s.ranges = append(s.ranges, msRange{lo, lo + num()})
	}
	if !ok || len(b) != 0 {
		return nil, bad("malformed")
	}
	return s, nil
}

// covers says whether a UUIDv7 of this time could be here.
func (s *segment) covers(ms uint64) bool {
	for _, r := range s.ranges {
		if ms >= r.lo && ms <= r.hi {
			return true
		}
	}
	return false
}

// end is the arrival number behind the last row.
func (s *segment) end() uint64 { return s.first + uint64(s.rows) }

// makeRanges covers times by at most maxRanges intervals that leave out the widest gaps. It sorts ms.
func makeRanges(ms []uint64) []msRange {
	if len(ms) == 0 {
		return nil
	}
	if !slices.IsSorted(ms) {
		slices.Sort(ms)
	}
	type gap struct {
		size uint64
		at   int
	}
	var gaps []gap // the widest, by position
	for i := 1; i < len(ms); i++ {
		// Gaps under a minute are those of a quiet host.
		g := gap{ms[i] - ms[i-1], i}
		if g.size < 60_000 {
			continue
		}
		gaps = append(gaps, g)
		if len(gaps) >= maxRanges {
			least := 0
			for k := range gaps {
				if gaps[k].size < gaps[least].size {
					least = k
				}
			}
			gaps = slices.Delete(gaps, least, least+1)
		}
	}
	var out []msRange
	from := 0
	for _, g := range gaps {
		out = append(out, msRange{ms[from], ms[g.at-1]})
		from = g.at
	}
	return append(out, msRange{ms[from], ms[len(ms)-1]})
}

// link sets what depends on a segment's place behind another, before others see it.
func (s *segment) link(before *segment) {
	if before != nil {
		s.maxMS = before.maxMS
	}
	for _, r := range s.ranges {
		s.maxMS = max(s.maxMS, r.hi)
	}
}
