package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/bits"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/idset"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/posting"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
)

// CheckReport is the outcome of a check.
type CheckReport struct {
	Entries  uint64
	Segments int
	Problems []string // at most maxProblems
}

const maxProblems = 200

type checker struct {
	s   *Store
	ctx context.Context
	r   CheckReport
	// filter is the filter pages of the segment at hand; nil for one that cannot be read.
	filter map[byte][]byte
	ids    map[uint64]string // of entries seen, by hash, while there are few enough
}

// maxIDs bounds the memory in which ids are compared across segments.
const maxIDs = 4 << 20

func (c *checker) bad(format string, args ...any) {
	if len(c.r.Problems) < maxProblems {
		c.r.Problems = append(c.r.Problems, fmt.Sprintf(format, args...))
	}
}

// Check reads everything and compares all indexes with the entries, both ways: each posting with a row, each
// row's objects with a posting, and so on. Packing and retention wait meanwhile; appends go on until memory is
// used up.
func (s *Store) Check(ctx context.Context) (CheckReport, error) {
	s.sealMu.Lock()
	defer s.sealMu.Unlock()
	s.life.RLock()
	defer s.life.RUnlock()
	select {
	case <-s.done:
		return CheckReport{}, errClosed()
	default:
	}
	c := &checker{s: s, ctx: ctx, ids: map[uint64]string{}}
	sn := s.snapshot()
	c.keyspaces(&sn)
	for l := byte(1); l < levels; l++ {
		next := uint64(0)
		for i, seg := range sn.segs[l] {
			if err := ctx.Err(); err != nil {
				return c.r, err
			}
			if i > 0 && seg.first < next {
				c.bad("segment %d/%d begins at number %d, inside the one before", l, seg.id, seg.first)
			}
			next = seg.end()
			c.segment(seg)
		}
		if next > sn.mem[l] {
			c.bad("level %d: packed entries up to number %d, but memory begins at %d", l, next, sn.mem[l])
		}
	}
	for i := range sn.views {
		v := &sn.views[i]
		for row := range v.Len() {
			c.r.Entries++
			c.id(v.ID(row))
		}
	}
	c.dictionaries()
	return c.r, nil
}

func (c *checker) id(id []byte) {
	if len(c.ids) >= maxIDs {
		return
	}
	h := uint64(14695981039346656037)
	for _, x := range id {
		h = (h ^ uint64(x)) * 1099511628211
	}
	if old, ok := c.ids[h]; ok && old == string(id) {
		c.bad("id %q is stored twice", id)
	}
	c.ids[h] = string(id)
}

// each walks one key space.
func (c *checker) each(prefix []byte, fn func(k, v []byte)) {
	it, err := c.s.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: keys.End(prefix)})
	if err != nil {
		c.bad("key space %q: %v", prefix[0], err)
		return
	}
	for ok := it.First(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			c.bad("key %x: %v", it.Key(), err)
			continue
		}
		fn(it.Key(), v)
	}
	if err := it.Close(); err != nil {
		c.bad("key space %q cannot be read to its end: %v", prefix[0], err)
	}
}

// keyspaces looks for keys that belong to nothing.
func (c *checker) keyspaces(sn *snapshot) {
	find := func(l byte, id uint32) *segment {
		if l == 0 || l >= levels {
			return nil
		}
		i, ok := slices.BinarySearchFunc(sn.segs[l], id, func(s *segment, id uint32) int {
			return int(int64(s.id) - int64(id))
		})
		if !ok {
			return nil
		}
		return sn.segs[l][i]
	}
	owned := func(space byte, parse func(k []byte) (byte, uint32, error)) {
		c.each([]byte{space}, func(k, _ []byte) {
			l, id, err := parse(k)
			if err != nil || find(l, id) == nil {
				c.bad("key %x belongs to no segment (%v)", k, err)
			}
		})
	}
	owned(keys.Block, func(k []byte) (byte, uint32, error) {
		l, id, n, err := keys.ParseBlock(k)
		if s := find(l, id); err == nil && s != nil && n != copyBlock && int(n)*block.Rows >= s.rows {
			err = errors.New("behind its end")
			return 0, 0, err
		}
		return l, id, err
	})
	owned(keys.Filter, func(k []byte) (byte, uint32, error) {
		l, id, _, err := keys.ParseFilter(k)
		return l, id, err
	})
	owned(keys.Segment, keys.ParseSegment)
	owned(keys.Times, keys.ParseSegment)
	c.each([]byte{keys.Posting}, func(k, _ []byte) {
		l, id, _, err := keys.ParsePosting(k)
		// Postings of deleted segments stay until their epoch is gone.
		if err != nil || l == 0 || l >= levels || find(l, id) == nil && (len(sn.segs[l]) > 0 && id > sn.segs[l][0].id || id >= c.s.nextSeg[l]) {
			c.bad("posting %x belongs to no segment (%v)", k, err)
		}
	})
	c.each([]byte{keys.OtherID}, func(k, v []byte) {
		if len(v) != 5 || find(v[0], binary.BigEndian.Uint32(v[1:])) == nil {
			c.bad("id %q belongs to no segment", k[1:])
		}
	})
}

// segment compares a segment's rows with everything that is derived from them.
func (c *checker) segment(seg *segment) {
	c.r.Segments++
	c.filter = map[byte][]byte{}
	s := c.s
	where := fmt.Sprintf("segment %d/%d", seg.level, seg.id)
	if cp, err := s.readSegment(keys.BlockKey(nil, seg.level, seg.id, copyBlock), seg.level, seg.id); err != nil || !bytes.Equal(cp.encode(), seg.encode()) {
		c.bad("%s: the copy of its description differs (%v)", where, err)
	}
	cur, err := s.newCursor(seg, -1<<63, 1<<63-1, true)
	if err != nil {
		c.bad("%s: %v", where, err)
		return
	}
	defer cur.close()
	want := map[uint32][]uint16{} // object → rows
	seen := make([]bool, seg.rows)
	var times []uint64
	var ms []uint64
	var prev position
	n := 0
	for cur.next() {
		row := cur.cur*block.Rows + cur.at
		if row != n {
			c.bad("%s: row %d stands at %d", where, row, n)
		}
		if n > 0 && !prev.before(cur.time, cur.id, true) {
			c.bad("%s: row %d (%s) is not behind the one before", where, row, cur.id)
		}
		prev = position{time: cur.time, id: string(cur.id)}
		if cur.at == 0 {
			times = append(times, uint64(cur.time)^1<<63)
		}
		if o := cur.blk.Order(cur.at); o < 0 || o >= int64(seg.rows) || seen[o] {
			c.bad("%s: row %d has arrival number %d", where, row, o)
		} else {
			seen[o] = true
		}
		if cur.time < seg.minTime || cur.time > seg.maxTime {
			c.bad("%s: row %d is outside of the segment's times", where, row)
		}
		c.id(cur.id)
		ms = c.rowID(seg, cur, where, ms)
		for k := range cur.blk.NObjects(cur.at) {
			num := cur.blk.ObjectNum(cur.at, k)
			want[num] = append(want[num], uint16(row))
		}
		if _, err := cur.entry(); err != nil {
			c.bad("%s: row %d: %v", where, row, err)
		}
		if h, err := cur.blk.Hash(cur.at); err != nil || (len(h) == hashLen) != (seg.level == auditLevel) {
			c.bad("%s: row %d has a hash of %d bytes (%v)", where, row, len(h), err)
		}
		n++
		c.r.Entries++
	}
	if cur.err != nil {
		c.bad("%s: %d parts cannot be read: %v", where, cur.damaged, cur.err)
		return
	}
	if n != seg.rows {
		c.bad("%s: %d rows, its description says %d", where, n, seg.rows)
	}
	if len(ms) != seg.nV7 {
		c.bad("%s: %d UUIDv7, its description says %d", where, len(ms), seg.nV7)
	}
	if v, closer, err := s.db.Get(keys.SegmentPrefix(keys.Times, seg.level, seg.id)); err != nil {
		c.bad("%s: table of times: %v", where, err)
	} else {
		if !bytes.Equal(v, bits.Append(nil, times)) {
			c.bad("%s: the table of times differs from its blocks", where)
		}
		_ = closer.Close()
	}
	c.postings(seg, want, where)
}

// rowID checks what finds an entry by its id.
func (c *checker) rowID(seg *segment, cur *cursor, where string, ms []uint64) []uint64 {
	m, a, b, ok := rec.V7(cur.id)
	if !ok {
		v, closer, err := c.s.db.Get(keys.BytesKey(keys.OtherID, cur.id))
		if err != nil {
			c.bad("%s: id %q is not in the index of ids: %v", where, cur.id, err)
			return ms
		}
		if want := binary.BigEndian.AppendUint32([]byte{seg.level}, seg.id); !bytes.Equal(v, want) {
			c.bad("%s: id %q is said to be in %x", where, cur.id, v)
		}
		_ = closer.Close()
		return ms
	}
	if !seg.covers(m) {
		c.bad("%s: id %s is outside of the ranges of ids", where, cur.id)
	}
	h := idset.Hash(m, a, b)
	page, known := c.filter[pageOf(h)]
	if !known {
		v, closer, err := c.s.db.Get(keys.FilterKey(seg.level, seg.id, pageOf(h)))
		if err != nil {
			c.bad("%s: filter page %d: %v", where, pageOf(h), err)
		} else {
			page = bytes.Clone(v)
			_ = closer.Close()
		}
		c.filter[pageOf(h)] = page
	}
	if page == nil {
		return append(ms, m)
	}
	if in, err := idset.Has(page, inPage(h)); !in || err != nil {
		c.bad("%s: id %s is not in the filter (%v)", where, cur.id, err)
	}
	return append(ms, m)
}

// postings compares the index of a segment with what its rows say. It takes from want what it finds.
func (c *checker) postings(seg *segment, want map[uint32][]uint16, where string) {
	groups := map[uint32]bool{}
	for num := range want {
		groups[num>>keys.GroupShift] = true
	}
	for g := range groups {
		v, closer, err := c.s.db.Get(keys.PostingKey(nil, seg.level, seg.id, g))
		if err != nil {
			c.bad("%s: postings of group %d: %v", where, g, err)
			continue
		}
		err = posting.Each(v, func(low uint32, list posting.List) {
			num := g<<keys.GroupShift | low
			rows, err := list.Rows(nil)
			if err != nil || !slices.Equal(rows, want[num]) {
				c.bad("%s: object %d has %d rows, its postings say %d (%v)", where, num, len(want[num]), len(rows), err)
			}
			delete(want, num)
		})
		if err != nil {
			c.bad("%s: postings of group %d: %v", where, g, err)
		}
		_ = closer.Close()
	}
	for num := range want {
		c.bad("%s: object %d has no postings", where, num)
	}
	// Pages of groups that no row has an object of.
	prefix := keys.EpochPrefix(seg.level, seg.id>>keys.EpochShift)
	c.each(prefix, func(k, _ []byte) {
		_, id, g, err := keys.ParsePosting(k)
		if err == nil && id == seg.id && !groups[g] {
			c.bad("%s: postings of group %d, of which no row has an object", where, g)
		}
	})
}

// dictionaries compares both directions.
func (c *checker) dictionaries() {
	for _, d := range []struct {
		text, num byte
		what      string
	}{{keys.Object, keys.Name, "object"}, {keys.Shape, keys.Text, "shape"}} {
		n, m := 0, 0
		c.each([]byte{d.text}, func(k, v []byte) {
			n++
			if len(v) != 4 {
				c.bad("%s %q has a malformed number", d.what, k[1:])
				return
			}
			back, closer, err := c.s.db.Get(keys.NumberKey(d.num, binary.BigEndian.Uint32(v)))
			if err != nil || !bytes.Equal(back, k[1:]) {
				c.bad("%s %q has number %x, which is %q (%v)", d.what, k[1:], v, back, err)
			}
			if err == nil {
				_ = closer.Close()
			}
			if d.text == keys.Shape {
				if _, err := block.ParseShape(1, string(k[1:])); err != nil {
					c.bad("shape %q: %v", k[1:], err)
				}
			}
		})
		c.each([]byte{d.num}, func(_, _ []byte) { m++ })
		if n != m {
			c.bad("%d %ss by text, %d by number", n, d.what, m)
		}
	}
}
