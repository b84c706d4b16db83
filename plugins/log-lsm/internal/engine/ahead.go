package engine

import (
	"context"
	"runtime"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/sdk/log"
)

// What a query reads ahead, several segments at once.
//
// The newest hundred entries of one object among a hundred thousand lie in a hundred blocks, few in each segment. The
// index says which, so they are fetched and decoded together: on a disk the waits overlap, in memory the work
// is spread over the processors. A query by text has no index: whole segments are searched, some at once,
// for the numbers of the rows that match.
const (
	aheadWorkers = 8   // that fetch entries: more than processors, because disks make them wait
	aheadRows    = 256 // entries fetched at once, at most, and with them the memory
	aheadSegs    = 256 // segments looked up for them
	listRows     = 32  // of one segment; an object with more here is walked by a cursor
)

// found is an entry read ahead.
type found struct {
	time  int64
	id    []byte
	entry log.Entry
	err   error
}

// list is the matching entries of a segment, in order: a source like a cursor.
type list struct {
	items   []found
	at      int
	damaged int
	err     error
}

func (l *list) next() bool                { l.at++; return l.at <= len(l.items) }
func (l *list) key() (int64, []byte)      { f := &l.items[l.at-1]; return f.time, f.id }
func (l *list) entry() (log.Entry, error) { f := &l.items[l.at-1]; return f.entry, f.err }
func (l *list) trouble() (int, error)     { return l.damaged, l.err }
func (l *list) close()                    {}

// opened is a segment that has been looked at before its turn.
type opened struct {
	src source // nil: nothing is there
	err error
}

// take is the source of a segment, read ahead or opened now; nil when nothing is there.
func (q *query) take(pending []*segment, part *place) (source, error) {
	seg := pending[0]
	switch {
	case len(q.objs) > 0:
		if _, ok := q.ahead[seg]; !ok {
			if err := q.fetch(pending, part); err != nil {
				return nil, err
			}
		}
	case q.match != nil:
		return q.takeSearched(pending, part)
	}
	if o, ok := q.ahead[seg]; ok {
		delete(q.ahead, seg)
		return o.src, o.err
	}
	return q.openSegment(seg, part)
}

// fetch opens the first of the pending segments, as many as the query will need by what the index says, and
// reads those that have few rows.
func (q *query) fetch(pending []*segment, part *place) error {
	want := int(min(q.left, aheadRows))
	var lists []*cursor
	var segs []*segment
	if q.ahead == nil {
		q.ahead = map[*segment]opened{}
	}
	for i, seg := range pending {
		if want <= 0 || i >= aheadSegs {
			break
		}
		if err := q.ctx.Err(); err != nil {
			return err
		}
		src, err := q.openSegment(seg, part)
		q.ahead[seg] = opened{src, err}
		if err != nil {
			break
		}
		c, ok := src.(*cursor)
		if !ok {
			continue
		}
		if !c.some || len(c.rows) > listRows {
			break // long enough for itself
		}
		want -= len(c.rows)
		lists, segs = append(lists, c), append(segs, seg)
	}
	if len(lists) < 2 {
		return nil
	}
	out := make([]*list, len(lists))
	each(len(lists), aheadWorkers, func(i int) {
		c := lists[i]
		if c.match != nil {
			c.match = c.match.clone()
		}
		out[i] = c.drain()
	})
	for i, seg := range segs {
		q.ahead[seg] = opened{src: out[i]}
	}
	return nil
}

// each calls fn for 0 to n-1, from several goroutines.
func each(n, workers int, fn func(i int)) {
	var wg sync.WaitGroup
	workers = min(workers, n)
	for w := range workers {
		// Neighbours lie near each other on disk and in the cache: one goroutine takes a stretch of them.
		from, to := w*n/workers, (w+1)*n/workers
		work := func() {
			for i := from; i < to; i++ {
				fn(i)
			}
		}
		if w == workers-1 {
			work()
			continue
		}
		wg.Go(work)
	}
	wg.Wait()
}

// drain reads all that a cursor would give, and closes it.
func (c *cursor) drain() *list {
	l := &list{items: make([]found, 0, len(c.rows))}
	for c.next() {
		f := found{time: c.time, id: append([]byte(nil), c.id...)}
		f.entry, f.err = c.entry()
		l.items = append(l.items, f)
	}
	l.damaged, l.err = c.trouble()
	c.close()
	return l
}

// dropAhead lets go of what was read ahead and not needed.
func (q *query) dropAhead() {
	for seg, o := range q.ahead {
		if o.src != nil {
			o.src.close()
		}
		delete(q.ahead, seg)
	}
	for _, s := range q.searches {
		s.cancel()
		<-s.done
	}
	q.searches, q.walks, q.searched = nil, nil, 0
}

// search is a segment being searched for rows that match.
type search struct {
	seg    *segment
	cancel context.CancelFunc
	done   chan struct{}
	rows   []uint16
	ok     bool // rows are right; if not, the segment is walked in the usual way, which says what is wrong
}

// sparse: segments are searched ahead when fewer than one in so many of the rows walked so far matched, since
// blocks in which something matches are read twice.
const sparse = 16

// takeSearched is take for a query without objects. The first segments are walked as they are, since many
// queries end there; when little was found, the next are searched ahead.
func (q *query) takeSearched(pending []*segment, part *place) (source, error) {
	seg := pending[0]
	if len(q.searches) == 0 {
		walked := q.searched
		for _, c := range q.walks {
			walked += c.seen
		}
		if walked < q.s.opt.searchFrom || q.given*sparse > walked {
			src, err := q.openSegment(seg, part)
			if c, ok := src.(*cursor); ok {
				q.walks = append(q.walks, c)
			}
			return src, err
		}
	}
	for i := len(q.searches); i < min(len(pending), 2*runtime.GOMAXPROCS(0)); i++ {
		q.searches = append(q.searches, q.startSearch(pending[i]))
	}
	s := q.searches[0]
	q.searches = q.searches[1:]
	<-s.done
	s.cancel()
	q.searched += uint64(seg.rows)
	if s.seg != seg || !s.ok {
		return q.openSegment(seg, part)
	}
	if len(s.rows) == 0 {
		return nil, nil
	}
	src, err := q.openSegment(seg, part)
	if c, ok := src.(*cursor); ok {
		c.match = nil
		c.only(s.rows)
	}
	return src, err
}

func (q *query) startSearch(seg *segment) *search {
	ctx, cancel := context.WithCancel(q.ctx)
	s := &search{seg: seg, cancel: cancel, done: make(chan struct{})}
	m, lo, hi := q.match.clone(), q.lo, q.hi
	go func() {
		defer close(s.done)
		select {
		case q.s.searchers <- struct{}{}:
		case <-ctx.Done():
			return
		}
		defer func() { <-q.s.searchers }()
		if !q.s.life.TryRLock() {
			return // the store is being closed
		}
		defer q.s.life.RUnlock()
		s.rows, s.ok = q.s.searchSegment(ctx, seg, m, lo, hi)
	}()
	return s
}

// searchSegment finds the rows between two times that match, ascending; ok is false when anything is amiss.
func (s *Store) searchSegment(ctx context.Context, seg *segment, m *matcher, lo, hi int64) (rows []uint16, ok bool) {
	b, err := s.unpack.get()
	if err != nil {
		return nil, false
	}
	defer s.unpack.put(b)
	blocks := (seg.rows + block.Rows - 1) / block.Rows
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: keys.BlockKey(nil, seg.level, seg.id, 0), UpperBound: keys.BlockKey(nil, seg.level, seg.id, uint16(blocks))})
	if err != nil {
		return nil, false
	}
	var d decision
	n := 0
	for valid := it.First(); valid && ctx.Err() == nil; valid = it.Next() {
		var v []byte
		if v, err = it.ValueAndErr(); err != nil {
			break
		}
		_, _, num, kerr := keys.ParseBlock(it.Key())
		if kerr != nil || int(num) != n {
			break
		}
		if err = b.Open(v, n*block.Rows); err != nil || b.Len() != min(block.Rows, seg.rows-n*block.Rows) {
			break
		}
		if rows, err = m.search(b, &d, n*block.Rows, lo, hi, rows); err != nil {
			break
		}
		n++
	}
	return rows, it.Close() == nil && err == nil && n == blocks
}

// search appends the rows of a block that match; first is the number of its first row.
func (m *matcher) search(b *block.Reader, d *decision, first int, lo, hi int64, rows []uint16) ([]uint16, error) {
	some, err := m.decide(b, d)
	if err != nil || !some {
		return rows, err
	}
	for i := range b.Len() {
		if d.shapes[b.ShapeIndex(i)] < 0 {
			continue
		}
		ok, err := m.row(b, i, d)
		if err != nil {
			return rows, err
		}
		if t := b.Time(i); ok && t >= lo && t <= hi {
			rows = append(rows, uint16(first+i))
		}
	}
	return rows, nil
}
