package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// source is one ordered stream of matching entries.
type source interface {
	next() bool
	key() (time int64, id []byte)
	entry() (log.Entry, error)
	trouble() (blocks int, err error) // what could not be read so far
	close()
}

// query is a log.Query under way.
type query struct {
	s      *Store
	ctx    context.Context
	q      log.Query
	fn     func(log.Result) error
	asc    bool
	lo, hi int64
	levels [levels]bool
	after  *position
	place  *place // where a follower left off
	part   *place // what is being merged, for the tokens of a follower
	match  *matcher
	objs   []wanted
	left   uint64 // of the limit

	batch  []log.Result
	size   int
	damage error
	blocks int
	m      *merger // while merging
	index  map[epochKey]*epoch

	ahead    map[*segment]opened // read before their turn
	searches []*search           // of the segments that come next
	walks    []*cursor           // opened without an index
	searched uint64              // rows of the segments that were searched ahead
	given    uint64              // entries handed over
}

// wanted is an object that is asked for.
type wanted struct {
	text string
	hash head.ObjectHash
	num  uint32
	ok   bool // some packed entry carries it
}

// Limits of what a query holds before it hands it over: nothing of the store is held while fn runs.
const (
	batchResults = 128
	batchBytes   = 256 << 10
)

// Query calls fn for each matching entry, as the contract says.
func (s *Store) Query(ctx context.Context, lq log.Query, fn func(log.Result) error) error {
	q := &query{s: s, ctx: ctx, q: lq, fn: fn, asc: !lq.NewestFirst, left: math.MaxUint64}
	if err := q.compile(); err != nil {
		return err
	}
	return q.run()
}

func (q *query) compile() error {
	lq := &q.q
	if lq.Follow && lq.NewestFirst {
		return errs.Field("newest_first", "follow oldest first", "follow goes forward in time, newest_first back")
	}
	q.lo, q.hi = math.MinInt64, math.MaxInt64
	if !lq.Since.IsZero() {
		q.lo = nanos(lq.Since)
	}
	if !lq.Until.IsZero() {
		q.hi = nanos(lq.Until)
		if q.hi != math.MinInt64 {
			q.hi--
		} else {
			q.lo = math.MaxInt64
		}
	}
	for l := byte(1); l < levels; l++ {
		q.levels[l] = (lq.MaxLevel == 0 || log.Level(l) <= lq.MaxLevel) && (len(lq.Levels) == 0 || slices.Contains(lq.Levels, log.Level(l)))
	}
	if lq.MaxLevel > log.LevelDebug {
		return errs.Field("max_level", "use 1 (audit) to 5 (debug), or 0 for all", "level %d does not exist", lq.MaxLevel)
	}
	for _, l := range lq.Levels {
		if l < log.LevelAudit || l > log.LevelDebug {
			return errs.Field("levels", "use 1 (audit) to 5 (debug)", "level %d does not exist", l)
		}
	}
	if lq.Limit > 0 {
		q.left = uint64(lq.Limit)
	}
	if lq.PageToken != "" {
		if err := q.parseToken(lq.PageToken); err != nil {
			return err
		}
	}
	q.match = newMatcher(lq)
	for _, o := range lq.Objects {
		if len(o) > log.MaxObjectLen {
			return errs.Field("objects", "give ids of 1 to 256 bytes", "object id of %d bytes", len(o))
		}
		if o == "" || slices.ContainsFunc(q.objs, func(w wanted) bool { return w.text == o }) {
			continue
		}
		q.objs = append(q.objs, wanted{text: o, hash: q.s.objects.Hash([]byte(o))})
	}
	if len(lq.Objects) > 0 && len(q.objs) == 0 {
		return errs.Field("objects", "give ids of 1 to 256 bytes", "an empty object id")
	}
	return nil
}

// nanos is t in nanoseconds since 1970, at the ends of what can be stored if need be.
func nanos(t interface {
	Unix() int64
	UnixNano() int64
}) int64 {
	const most = math.MaxInt64 / 1_000_000_000
	switch sec := t.Unix(); {
	case sec >= most:
		return math.MaxInt64
	case sec <= -most:
		return math.MinInt64
	}
	return t.UnixNano()
}

// enter begins a part that uses Pebble; leave ends it.
func (q *query) enter() error {
	q.s.life.RLock()
	select {
	case <-q.s.done:
		q.s.life.RUnlock()
		return errClosed()
	default:
		return nil
	}
}

func (q *query) leave() { q.s.life.RUnlock() }

func (q *query) run() error {
	var f *follower
	if q.q.Follow {
		f = q.s.newFollower()
		defer q.s.dropFollower(f)
	}
	if err := q.enter(); err != nil {
		return err
	}
	err := q.history(f)
	if err == nil {
		err = q.flush()
	}
	q.leave()
	if err != nil || !q.q.Follow || q.left == 0 {
		if err == nil {
			err = q.damaged()
		}
		return err
	}
	if err := q.damaged(); err != nil {
		return err
	}
	return q.live(f)
}

// damaged is what could not be read, as an error.
func (q *query) damaged() error {
	if q.damage == nil {
		return nil
	}
	q.s.conds.set(condCorrupt, 0, fmt.Sprintf("parts of the log cannot be read: %v", q.damage))
	return &errs.Error{Op: "log.Query", Kind: errs.Corrupt, Reason: "LOG_DAMAGED", Err: q.damage,
		Message: fmt.Sprintf("the entries given are all that can be read; %d parts of the store are damaged", q.blocks),
		Remedy:  "restore the log from a backup; the damage stays, but everything else goes on"}
}

func (q *query) note(blocks int, err error) {
	if err == nil {
		return
	}
	q.blocks += blocks
	if q.damage == nil {
		q.damage = err
	}
}

// history gives what is stored at this moment; f then begins behind it.
func (q *query) history(f *follower) error {
	sn := q.s.snapshot()
	if f != nil {
		f.pos = sn.next
	}
	if f == nil {
		return q.merge(&sn, nil)
	}
	parts := []place{{upto: sn.next}}
	if p := q.place; p != nil {
		for l := range p.from {
			if p.from[l] > sn.next[l] || p.upto[l] > sn.next[l] {
				return errs.New(errs.OutOfRange, "the page token is of another store, or of entries that were lost").Do("begin without page_token")
			}
		}
		if p.open {
			q.after = nil
			parts = []place{{from: p.from, upto: sn.next}}
		} else {
			parts = []place{*p, {from: p.upto, upto: sn.next}}
		}
	}
	for i := range parts {
		if err := q.merge(&sn, &parts[i]); err != nil {
			return err
		}
		q.after = nil
	}
	return nil
}

// place is where a follower stands, in arrival numbers by level: between from and upto it has seen what is up
// to the position of the token, and nothing of what came later; open says that upto is now and that it has
// seen nothing behind from.
type place struct {
	from, upto [levels]uint64
	open       bool
}

// merge walks a snapshot in order. part, if given, leaves out what arrived earlier or later.
func (q *query) merge(sn *snapshot, part *place) error {
	q.part = part
	defer func() { q.part = nil }()
	if err := q.resolve(); err != nil {
		return err
	}
	m := &merger{asc: q.asc}
	q.m = m
	defer func() { q.dropAhead(); m.close(q); q.m = nil }()
	for i := range sn.views {
		v := &sn.views[i]
		if !q.levels[v.Level] {
			continue
		}
		first, end := 0, v.Len()
		if part != nil {
			first = within(part.from[v.Level], v.First, end)
			end = within(part.upto[v.Level], v.First, end)
		}
		if hs := q.headSource(v, first, end); hs != nil {
			m.add(q, hs)
		}
	}
	pending := q.pending(sn, part)
	for q.left > 0 {
		for len(pending) > 0 {
			if len(m.heap) > 0 {
				t, _ := m.heap[0].key()
				if q.asc && pending[0].minTime > t || !q.asc && pending[0].maxTime < t {
					break
				}
			}
			c, err := q.take(pending, part)
			if err != nil {
				return err
			}
			pending = pending[1:]
			if c != nil {
				m.add(q, c)
			}
			if err := q.ctx.Err(); err != nil {
				return err
			}
		}
		if len(m.heap) == 0 {
			return nil
		}
		if err := q.give(m.heap[0]); err != nil {
			return err
		}
		m.advance(q)
	}
	return nil
}

// within is number n as a row of a head of this many rows.
func within(n, first uint64, rows int) int {
	if n <= first {
		return 0
	}
	return int(min(n-first, uint64(rows)))
}

// pending lists the segments that may hold something, in the order in which they are needed.
func (q *query) pending(sn *snapshot, part *place) []*segment {
	var out []*segment
	if len(q.objs) > 0 {
		known := 0
		for _, w := range q.objs {
			if w.ok {
				known++
			}
		}
		if known == 0 || q.q.AllObjects && known < len(q.objs) {
			return nil
		}
	}
	lo, hi := q.lo, q.hi
	if q.after != nil {
		if q.asc {
			lo = max(lo, q.after.time)
		} else {
			hi = min(hi, q.after.time)
		}
	}
	for l := range sn.segs {
		if !q.levels[l] {
			continue
		}
		for _, s := range sn.segs[l] {
			if s.maxTime < lo || s.minTime > hi || part != nil && (s.end() <= part.from[l] || s.first >= part.upto[l]) {
				continue
			}
			out = append(out, s)
		}
	}
	if q.asc {
		sort.SliceStable(out, func(i, k int) bool { return out[i].minTime < out[k].minTime })
	} else {
		sort.SliceStable(out, func(i, k int) bool { return out[i].maxTime > out[k].maxTime })
	}
	return out
}

// openSegment opens a cursor; nil when the index says that nothing is there.
func (q *query) openSegment(seg *segment, part *place) (source, error) {
	match := q.match
	var rows []uint16
	if len(q.objs) > 0 {
		var err error
		var ok bool
		rows, ok, err = q.rows(seg)
		if err != nil {
			q.note(1, err)
		}
		if !ok {
			match = q.withObjects()
		} else if len(rows) == 0 {
			return nil, nil
		}
	}
	lo, hi := q.lo, q.hi
	if q.after != nil {
		if q.asc {
			lo = max(lo, q.after.time)
		} else {
			hi = min(hi, q.after.time)
		}
	}
	c, err := q.s.newCursor(seg, lo, hi, q.asc)
	if err != nil {
		return nil, err
	}
	c.after, c.match = q.after, match
	if part != nil {
		c.minOrder, c.maxOrder = part.from[seg.level], part.upto[seg.level]
	}
	if rows != nil {
		c.only(rows)
	}
	return c, nil
}

// resolve looks up the numbers of the objects.
func (q *query) resolve() error {
	for i := range q.objs {
		w := &q.objs[i]
		var err error
		if w.num, w.ok, err = q.s.objects.Find([]byte(w.text)); err != nil {
			return errs.Wrap(kind(err), err, "look an object up")
		}
	}
	return nil
}

// withObjects is the matcher for rows where the index is of no use.
func (q *query) withObjects() *matcher {
	m := &matcher{}
	if q.match != nil {
		*m = *q.match
		m.msg, m.shapes = nil, nil
	}
	m.all = q.q.AllObjects
	for _, w := range q.objs {
		if w.ok {
			m.nums = append(m.nums, w.num)
		}
	}
	return m
}

// give hands an entry over, soon.
func (q *query) give(src source) error {
	e, err := src.entry()
	if err != nil {
		if !errors.Is(err, errGone) {
			q.note(1, err)
		}
		return nil
	}
	t, id := src.key()
	q.given++
	q.add(log.Result{Entry: e, PageToken: token(t, id, q.part)})
	if len(q.batch) >= batchResults || q.size >= batchBytes {
		return q.flush()
	}
	return nil
}

func (q *query) add(r log.Result) {
	q.batch = append(q.batch, r)
	q.size += 200 + len(r.Entry.Message)
	if q.left != math.MaxUint64 && r.PageToken != "" {
		q.left--
	}
}

// flush calls fn for what has been found; meanwhile nothing of the store is in use.
func (q *query) flush() error {
	if len(q.batch) == 0 {
		return q.ctx.Err()
	}
	q.m.release()
	q.leave()
	err := q.deliver()
	if e := q.enterAlways(); err == nil {
		err = e
	}
	if err == nil {
		err = q.m.restore(q)
	}
	return err
}

// enterAlways is enter for use between leave and a deferred leave: it holds life even when it fails.
func (q *query) enterAlways() error {
	q.s.life.RLock()
	select {
	case <-q.s.done:
		return errClosed()
	default:
		return nil
	}
}

func (q *query) deliver() error {
	defer func() {
		clear(q.batch)
		q.batch, q.size = q.batch[:0], 0
	}()
	for _, r := range q.batch {
		if err := q.ctx.Err(); err != nil {
			return err
		}
		if err := q.fn(r); err != nil {
			return err
		}
	}
	return nil
}
