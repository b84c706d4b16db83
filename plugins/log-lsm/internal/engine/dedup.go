package engine

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/idset"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
)

// filterPages is into how many values the id filter of a segment is split.
const filterPages = 16

// idCache holds the ids of the segment that was last searched row by row: a sender that repeats many
// entries is then answered from memory.
type idCache struct {
	seg    *segment
	hashes []uint64 // sorted
}

// stored is what the committer compares new entries with. The heads are changed only by the committer, and a
// frozen one is dropped only after its segment has been added, so one look a commit misses nothing.
type stored struct {
	s     *Store
	heads []*head.Head
	segs  [levels][]*segment
}

func (s *Store) stored() *stored {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := &stored{s: s, segs: s.segs}
	for l := byte(1); l < levels; l++ {
		if s.active[l].Len() > 0 {
			st.heads = append(st.heads, s.active[l])
		}
		st.heads = append(st.heads, s.frozen[l]...)
	}
	return st
}

// has says whether an entry of this id is stored, in memory or on disk, shown or not.
func (st *stored) has(it *head.Item) (bool, error) {
	s := st.s
	for _, h := range st.heads {
		if h.Has(it.IDHash, it.ID) {
			return true, nil
		}
	}
	if !it.V7 {
		_, closer, err := s.db.Get(keys.BytesKey(keys.OtherID, it.ID))
		if errors.Is(err, pebble.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, s.damaged(0, err)
		}
		return true, closer.Close()
	}
	for l := byte(1); l < levels; l++ {
		table := st.segs[l]
		for i := len(table) - 1; i >= 0 && table[i].maxMS >= it.MS; i-- {
			if !table[i].covers(it.MS) || s.deaf[table[i]] {
				continue
			}
			found, err := s.segmentHas(table[i], it)
			if err != nil {
				// A damaged segment must not stop the log, nor make it slow; at worst an entry is stored twice.
				if s.deaf == nil {
					s.deaf = map[*segment]bool{}
				}
				s.deaf[table[i]] = true
				s.conds.set(condCorrupt, l, fmt.Sprintf("ids of segment %d of level %d cannot be read: %v", table[i].id, l, err))
				continue
			}
			if found {
				return true, nil
			}
		}
	}
	return false, nil
}

// pageOf and inPage split a hash: the page takes the highest bits, which the filter of the page then lacks.
func pageOf(h uint64) byte   { return byte(h >> 60) }
func inPage(h uint64) uint64 { return h<<4 | h>>60 }

func (s *Store) segmentHas(seg *segment, it *head.Item) (bool, error) {
	h := idset.Hash(it.MS, it.A, it.B)
	if s.idSeg.seg != seg {
		v, closer, err := s.db.Get(keys.FilterKey(seg.level, seg.id, pageOf(h)))
		if errors.Is(err, pebble.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		maybe, err := idset.Has(v, inPage(h))
		_ = closer.Close()
		if err != nil || !maybe {
			return false, err
		}
		// The usual repeat has the same time: one block tells.
		if it.Time >= seg.minTime && it.Time <= seg.maxTime {
			found, err := s.hasAt(seg, it)
			if found || err != nil {
				return found, err
			}
		}
		if err := s.idSeg.load(s, seg); err != nil {
			return false, err
		}
	}
	_, found := slices.BinarySearch(s.idSeg.hashes, h)
	if !found {
		return false, nil
	}
	// Equal hashes are no proof.
	return s.hasID(seg, it)
}

// hasAt looks for an id among the entries of its time.
func (s *Store) hasAt(seg *segment, it *head.Item) (bool, error) {
	c, err := s.newCursor(seg, it.Time, it.Time, true)
	if err != nil {
		return false, err
	}
	defer c.close()
	for c.next() {
		if string(c.id) == string(it.ID) {
			return true, nil
		}
	}
	return false, c.err
}

// hasID looks for an id among all entries of a segment.
func (s *Store) hasID(seg *segment, it *head.Item) (bool, error) {
	c, err := s.newCursor(seg, seg.minTime, seg.maxTime, true)
	if err != nil {
		return false, err
	}
	defer c.close()
	for c.next() {
		if string(c.id) == string(it.ID) {
			return true, nil
		}
	}
	return false, c.err
}

func (ic *idCache) load(s *Store, seg *segment) error {
	ic.seg, ic.hashes = nil, ic.hashes[:0]
	c, err := s.newCursor(seg, seg.minTime, seg.maxTime, true)
	if err != nil {
		return err
	}
	defer c.close()
	for c.next() {
		if ms, a, b, ok := rec.V7(c.id); ok {
			ic.hashes = append(ic.hashes, idset.Hash(ms, a, b))
		}
	}
	if c.err != nil {
		return c.err
	}
	slices.Sort(ic.hashes)
	ic.seg = seg
	return nil
}
