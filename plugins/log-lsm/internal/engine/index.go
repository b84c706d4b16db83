package engine

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/posting"
)

// epochKey names the postings of one object in 32 segments, which stand side by side.
type epochKey struct {
	level byte
	epoch uint32
	num   uint32
}

// epoch is those postings, by segment.
type epoch struct {
	lists map[uint32]posting.List
	err   error
}

// maxEpochs bounds what a query keeps of the index.
const maxEpochs = 64

// rows finds the rows of a segment that carry the objects asked for; ok is false when the index cannot tell.
func (q *query) rows(seg *segment) (rows []uint16, ok bool, err error) {
	var out, tmp []uint16
	first := true
	for i := range q.objs {
		w := &q.objs[i]
		if !w.ok {
			continue
		}
		e := q.epoch(epochKey{seg.level, seg.id >> keys.EpochShift, w.num})
		if e.err != nil {
			return nil, false, e.err
		}
		list, found := e.lists[seg.id]
		tmp = tmp[:0]
		if found {
			if tmp, err = list.Rows(tmp); err != nil {
				return nil, false, err
			}
			if len(tmp) > 0 && int(tmp[len(tmp)-1]) >= seg.rows {
				return nil, false, fmt.Errorf("postings of segment %d/%d point behind its end: %w", seg.level, seg.id, posting.ErrBad)
			}
		}
		switch {
		case first:
			out = append(out, tmp...)
		case q.q.AllObjects:
			out = intersect(out, tmp)
		default:
			out = union(out, tmp)
		}
		first = false
		if q.q.AllObjects && len(out) == 0 {
			break
		}
	}
	return out, true, nil
}

// epoch reads postings, and keeps them for the neighbouring segments.
func (q *query) epoch(k epochKey) *epoch {
	if e := q.index[k]; e != nil {
		return e
	}
	if q.index == nil {
		q.index = map[epochKey]*epoch{}
	}
	for old := range q.index {
		if len(q.index) < maxEpochs {
			break
		}
		delete(q.index, old)
	}
	e := &epoch{lists: map[uint32]posting.List{}}
	q.index[k] = e
	prefix := binary.BigEndian.AppendUint32(keys.EpochPrefix(k.level, k.epoch), k.num>>keys.GroupShift)
	it, err := q.s.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: keys.End(prefix)})
	if err != nil {
		e.err = err
		return e
	}
	for ok := it.First(); ok; ok = it.Next() {
		_, id, _, err := keys.ParsePosting(it.Key())
		if err != nil {
			e.err = err
			break
		}
		v, err := it.ValueAndErr()
		if err != nil {
			e.err = err
			break
		}
		list, found, err := posting.Find(v, k.num)
		if err != nil {
			e.err = err
			break
		}
		if found {
			e.lists[id] = list.Clone()
		}
	}
	if err := it.Close(); err != nil && e.err == nil {
		e.err = err
	}
	return e
}

func intersect(a, b []uint16) []uint16 {
	out := a[:0]
	for i, k := 0, 0; i < len(a) && k < len(b); {
		switch {
		case a[i] < b[k]:
			i++
		case a[i] > b[k]:
			k++
		default:
			out = append(out, a[i])
			i++
			k++
		}
	}
	return out
}

func union(a, b []uint16) []uint16 {
	out := make([]uint16, 0, len(a)+len(b))
	out = append(append(out, a...), b...)
	slices.Sort(out)
	return slices.Compact(out)
}
