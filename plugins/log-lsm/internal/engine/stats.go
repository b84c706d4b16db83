package engine

import (
	"context"
	"math"
	"runtime"
	"time"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/sdk/log"
)

// Stats says what is stored.
func (s *Store) Stats(context.Context) (log.Stats, error) {
	s.life.RLock()
	defer s.life.RUnlock()
	select {
	case <-s.done:
		return log.Stats{}, errClosed()
	default:
	}
	st := log.Stats{ByLevel: map[string]uint64{}}
	oldest, newest := int64(math.MaxInt64), int64(math.MinInt64)
	sn := s.snapshot()
	for l := 1; l < levels; l++ {
		n := uint64(0)
		for _, seg := range sn.segs[l] {
			n += uint64(seg.rows)
			oldest, newest = min(oldest, seg.minTime), max(newest, seg.maxTime)
		}
		for i := range sn.views {
			if v := &sn.views[i]; int(v.Level) == l {
				n += uint64(v.Len())
				for _, t := range v.Times {
					oldest, newest = min(oldest, t), max(newest, t)
				}
			}
		}
		if n > 0 {
			st.ByLevel[log.Level(l).String()] = n
		}
		st.Entries += n
	}
	if st.Entries > 0 {
		st.Oldest, st.Newest = time.Unix(0, oldest).UTC(), time.Unix(0, newest).UTC()
	}
	st.Objects = uint64(s.objects.Next()-1) + s.unpackedObjects(sn.views)
	m := s.db.Metrics()
	st.DiskBytes = m.DiskSpaceUsage() + s.raw.Size()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	st.MemoryBytes = mem.Sys - mem.HeapReleased
	return st, nil
}

// unpackedObjects estimates how many objects only entries in memory carry.
func (s *Store) unpackedObjects(views []head.View) uint64 {
	seen := map[head.ObjectHash]struct{}{}
	var nums []uint32
	fresh := uint64(0)
	for i := range views {
		for row := range views[i].Len() {
			hashes := views[i].Objects(row)
			nums = s.objects.Known(nums[:0], hashes)
			for k, h := range hashes {
				if nums[k] != 0 {
					continue
				}
				if _, ok := seen[h]; !ok {
					seen[h] = struct{}{}
					fresh++
				}
			}
		}
	}
	return fresh
}
