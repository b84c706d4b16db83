package engine

import (
	"slices"
	"sort"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// headSource is the matching rows of a view, from row first to before end, in order; nil when there are none.
func (q *query) headSource(v *head.View, first, end int) source {
	hs := &headSource{v: *v}
	for i := first; i < end; i++ {
		if t := v.Times[i]; t < q.lo || t > q.hi {
			continue
		}
		if q.after != nil && !q.after.before(v.Times[i], v.ID(i), q.asc) {
			continue
		}
		if !q.inMemory(v, i) {
			continue
		}
		hs.rows = append(hs.rows, uint32(i))
	}
	if len(hs.rows) == 0 {
		return nil
	}
	slices.SortFunc(hs.rows, func(a, b uint32) int {
		c := compareRows(v, int(a), int(b))
		if !q.asc {
			return -c
		}
		return c
	})
	return hs
}

// inMemory says whether a row of a head has the objects and matches otherwise.
func (q *query) inMemory(v *head.View, i int) bool {
	if len(q.objs) > 0 {
		hits := 0
		for _, h := range v.Objects(i) {
			for k := range q.objs {
				if q.objs[k].hash == h {
					hits++
				}
			}
		}
		if hits == 0 || q.q.AllObjects && hits < len(q.objs) {
			return false
		}
	} else if q.match == nil {
		return true
	}
	var r rec.View
	if v.Parse(i, &r) != nil {
		return false
	}
	if len(q.objs) > 0 {
		hits := 0
		r.Objects(func(o []byte) {
			for k := range q.objs {
				if q.objs[k].text == string(o) {
					hits++
				}
			}
		})
		if hits == 0 || q.q.AllObjects && hits < len(q.objs) {
			return false
		}
	}
	return q.match.view(&r)
}

// headSource reads a head. While results are handed over it lets go of the head, which may be packed
// meanwhile: a reader who takes his time does not keep memory.
type headSource struct {
	v    head.View
	rows []uint32
	at   int
	cur  position // of the current row, while released
	n    int      // rows of the view, while released
}

func (h *headSource) next() bool { h.at++; return h.at <= len(h.rows) }
func (h *headSource) key() (int64, []byte) {
	row := int(h.rows[h.at-1])
	return h.v.Times[row], h.v.ID(row)
}
func (h *headSource) entry() (log.Entry, error) {
	var r rec.View
	if err := h.v.Parse(int(h.rows[h.at-1]), &r); err != nil {
		return log.Entry{}, err
	}
	return r.Entry(), nil
}
func (h *headSource) trouble() (int, error) { return 0, nil }
func (h *headSource) close()                {}

// release lets go of all heads; restore takes them back, or the segments that they have become.
func (m *merger) release() {
	if m == nil {
		return
	}
	for _, s := range m.heap {
		if h, ok := s.(*headSource); ok {
			t, id := h.key()
			h.cur, h.n = position{time: t, id: string(id), included: true}, h.v.Len()
			h.v = head.View{Level: h.v.Level, First: h.v.First}
		}
	}
}

func (m *merger) restore(q *query) error {
	if m == nil {
		return nil
	}
	for i, s := range m.heap {
		h, ok := s.(*headSource)
		if !ok || h.revive(q.s) {
			continue
		}
		seg := q.s.segmentFrom(h.v.Level, h.v.First)
		if seg == nil {
			m.heap[i] = spent{h.cur} // retention was faster
			continue
		}
		// What has been looked up in the index is older than the segment.
		clear(q.index)
		if err := q.resolve(); err != nil {
			return err
		}
		after := q.after
		q.after = &h.cur
		c, err := q.openSegment(seg, nil)
		q.after = after
		if err != nil {
			return err
		}
		cur, ok := c.(*cursor)
		if !ok {
			m.heap[i] = spent{h.cur}
			continue
		}
		cur.onlyArrived(h.rows)
		if !cur.next() {
			q.note(cur.trouble())
			cur.close()
			m.heap[i] = spent{h.cur}
			continue
		}
		m.heap[i] = cur
	}
	return nil
}

// revive finds the head again.
func (h *headSource) revive(s *Store) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, x := range append(slices.Clone(s.frozen[h.v.Level]), s.active[h.v.Level]) {
		if x.First == h.v.First && x.Shown() >= h.n {
			h.v = x.View()
			return true
		}
	}
	return false
}

// segmentFrom is the segment whose first entry to arrive has this number.
func (s *Store) segmentFrom(level byte, first uint64) *segment {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := s.segs[level]
	i := sort.Search(len(t), func(i int) bool { return t[i].first >= first })
	if i < len(t) && t[i].first == first {
		return t[i]
	}
	return nil
}

// spent is a source at its last row.
type spent struct{ pos position }

func (s spent) next() bool                { return false }
func (s spent) key() (int64, []byte)      { return s.pos.time, []byte(s.pos.id) }
func (s spent) entry() (log.Entry, error) { return log.Entry{}, errGone }
func (s spent) trouble() (int, error)     { return 0, nil }
func (s spent) close()                    {}
