package engine

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/bits"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/sdk/log"
)

// cursor walks the rows of a segment in the order of (time, id), or against it. It holds nothing of Pebble
// between calls: blocks are copied.
type cursor struct {
	s   *Store
	seg *segment
	asc bool
	lo  int64 // bounds of time, both ends included
	hi  int64

	// What narrows the walk; set before the first next.
	rows     []uint16 // only these, when some is set
	some     bool
	after    *position // only what is behind it in the direction of the walk
	minOrder uint64    // only what arrived at this number or later
	maxOrder uint64    // and, when not 0, before this one
	arrived  []uint32  // only these arrival numbers within the segment, ascending, when not nil
	match    *matcher

	row  int // next row, or next index of rows
	blk  *block.Reader
	buf  []byte
	cur  int // block in blk, -1 none
	dec  decision
	at   int // row within the block
	time int64
	id   []byte

	seen    uint64 // rows looked at
	err     error  // the first damage; the walk goes on behind it
	damaged int    // blocks that could not be read
	done    bool
}

func (s *Store) newCursor(seg *segment, lo, hi int64, asc bool) (*cursor, error) {
	blk, err := s.unpack.get()
	if err != nil {
		return nil, err
	}
	c := &cursor{s: s, seg: seg, asc: asc, lo: lo, hi: hi, blk: blk, cur: -1}
	if !asc {
		c.row = seg.rows - 1
	}
	if lo > seg.minTime && asc || hi < seg.maxTime && !asc {
		c.seek()
	}
	return c, nil
}

func (c *cursor) close() {
	if c.blk != nil {
		c.s.unpack.put(c.blk)
		c.blk = nil
	}
}

// seek skips whole blocks that lie before the bounds. Without the table of times it reads them.
func (c *cursor) seek() {
	n := (c.seg.rows + block.Rows - 1) / block.Rows
	v, closer, err := c.s.db.Get(keys.SegmentPrefix(keys.Times, c.seg.level, c.seg.id))
	if err != nil {
		c.fail(err)
		return
	}
	defer closer.Close()
	col, _, err := bits.Read(v, n)
	if err != nil {
		c.fail(err)
		return
	}
	flip := func(t int64) uint64 { return uint64(t) ^ 1<<63 }
	if c.asc {
		// Equal times may begin in the block before.
		b := sort.Search(n, func(i int) bool { return col.At(i) >= flip(c.lo) })
		c.row = max(b-1, 0) * block.Rows
		return
	}
	b := sort.Search(n, func(i int) bool { return col.At(i) > flip(c.hi) })
	c.row = min(b*block.Rows, c.seg.rows) - 1
}

// only narrows the walk to these rows, ascending.
func (c *cursor) only(rows []uint16) {
	from := c.row
	c.rows, c.some = rows, true
	if c.asc {
		c.row = sort.Search(len(rows), func(i int) bool { return int(rows[i]) >= from })
	} else {
		c.row = sort.Search(len(rows), func(i int) bool { return int(rows[i]) > from }) - 1
	}
}

func (c *cursor) fail(err error) {
	if c.err == nil {
		c.err = err
	}
	c.damaged++
}

// onlyArrived narrows the walk to what a head had found before it was packed.
func (c *cursor) onlyArrived(rows []uint32) {
	c.arrived = slices.Clone(rows)
	slices.Sort(c.arrived)
}

// load makes a block current; false when nothing in it matches, or it cannot be read.
func (c *cursor) load(n int) bool {
	if c.cur == n {
		return true // a block in which nothing matches is skipped at once
	}
	c.cur = -1
	var kb [8]byte
	v, closer, err := c.s.db.Get(keys.BlockKey(kb[:0], c.seg.level, c.seg.id, uint16(n)))
	if err == nil {
		c.buf = append(c.buf[:0], v...)
		_ = closer.Close()
		err = c.blk.Open(c.buf, n*block.Rows)
	}
	if err == nil && c.blk.Len() != min(block.Rows, c.seg.rows-n*block.Rows) {
		err = fmt.Errorf("block %d of segment %d/%d has %d rows: %w", n, c.seg.level, c.seg.id, c.blk.Len(), block.ErrBad)
	}
	some := true
	if err == nil && c.match != nil {
		some, err = c.match.decide(c.blk, &c.dec)
	}
	if err != nil {
		if errors.Is(err, pebble.ErrNotFound) && !c.s.hasSegment(c.seg) {
			c.done = true // retention has removed it meanwhile
			return false
		}
		c.fail(err)
		return false
	}
	c.cur = n
	return some
}

// next goes to the next row that matches; false at the end.
func (c *cursor) next() bool {
	step := 1
	if !c.asc {
		step = -1
	}
	for !c.done {
		row := c.row
		if c.some {
			if c.row < 0 || c.row >= len(c.rows) {
				return false
			}
			row = int(c.rows[c.row])
		}
		if row < 0 || row >= c.seg.rows {
			return false
		}
		n := row / block.Rows
		if !c.load(n) {
			c.skip(n)
			continue
		}
		c.row += step
		c.seen++
		c.at = row % block.Rows
		c.time = c.blk.Time(c.at)
		if c.time < c.lo || c.time > c.hi {
			if c.asc && c.time > c.hi || !c.asc && c.time < c.lo {
				return false
			}
			continue
		}
		if c.minOrder > c.seg.first || c.maxOrder != 0 && c.maxOrder < c.seg.end() {
			if n := c.seg.first + uint64(c.blk.Order(c.at)); n < c.minOrder || c.maxOrder != 0 && n >= c.maxOrder {
				continue
			}
		}
		if c.arrived != nil {
			if _, ok := slices.BinarySearch(c.arrived, uint32(c.blk.Order(c.at))); !ok {
				continue
			}
		}
		if c.match != nil {
			ok, err := c.match.row(c.blk, c.at, &c.dec)
			if err != nil {
				c.fail(err)
				continue
			}
			if !ok {
				continue
			}
		}
		var err error
		if c.id, err = c.blk.AppendID(c.id[:0], c.at); err != nil {
			c.fail(err)
			continue
		}
		if c.after != nil && !c.after.before(c.time, c.id, c.asc) {
			continue
		}
		return true
	}
	return false
}

// skip goes behind a block that cannot be read.
func (c *cursor) skip(n int) {
	for {
		row := c.row
		if c.some {
			if c.row < 0 || c.row >= len(c.rows) {
				return
			}
			row = int(c.rows[c.row])
		}
		if row < 0 || row/block.Rows != n {
			return
		}
		if c.asc {
			c.row++
		} else {
			c.row--
		}
	}
}

func (c *cursor) key() (int64, []byte) { return c.time, c.id }

func (c *cursor) entry() (log.Entry, error) { return c.blk.Entry(c.at, log.Level(c.seg.level)) }

func (c *cursor) trouble() (int, error) { return c.damaged, c.err }

// hasSegment says whether retention has left a segment.
func (s *Store) hasSegment(seg *segment) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := s.segs[seg.level]
	i := sort.Search(len(t), func(i int) bool { return t[i].id >= seg.id })
	return i < len(t) && t[i].id == seg.id
}

// position is a place in the order of (time, id).
type position struct {
	time     int64
	id       string
	included bool // the place itself counts as behind it
}

// before says whether p comes before (t, id) in a walk.
func (p *position) before(t int64, id []byte, asc bool) bool {
	c := 0
	switch {
	case p.time < t:
		c = -1
	case p.time > t:
		c = 1
	default:
		c = bytes.Compare([]byte(p.id), id)
	}
	return asc && c < 0 || !asc && c > 0 || c == 0 && p.included
}
