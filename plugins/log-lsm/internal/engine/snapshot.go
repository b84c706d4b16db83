package engine

import (
	"slices"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
)

// snapshot is what a query reads: it does not change, but that retention removes.
type snapshot struct {
	segs  [levels][]*segment
	views []head.View
	next  [levels]uint64 // arrival number behind what is here
	mem   [levels]uint64 // arrival number of the first entry in memory
}

func (s *Store) snapshotLocked() snapshot {
	sn := snapshot{segs: s.segs}
	for l := byte(1); l < levels; l++ {
		a := s.active[l]
		sn.next[l], sn.mem[l] = a.First, a.First
		if len(s.frozen[l]) > 0 {
			sn.mem[l] = s.frozen[l][0].First
		}
		for _, h := range append(slices.Clone(s.frozen[l]), a) {
			if h.Shown() > 0 {
				sn.views = append(sn.views, h.View())
			}
			if h.Shown() < h.Len() || h == a {
				sn.next[l] = h.First + uint64(h.Shown())
				break
			}
		}
	}
	return sn
}

func (s *Store) snapshot() snapshot {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.snapshotLocked()
}
