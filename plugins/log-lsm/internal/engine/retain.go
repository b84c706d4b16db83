package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/posting"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// Retention says how long entries are kept. Whole segments are deleted, when all of a segment is to go: an
// entry may stay until the youngest of its segment goes. What is not packed yet stays.
type Retention struct {
	// Age by level; levels that are not there are kept for ever.
	Age map[log.Level]time.Duration
	// LevelSize bounds the packed bytes of a level.
	LevelSize map[log.Level]uint64
	// Size bounds the packed bytes of all; the oldest entries of the least grave levels go first, and audit
	// entries only when nothing else is left.
	Size uint64
	// Every is how often it is looked at; one minute.
	Every time.Duration
}

// Retain deletes what is not to be kept any longer. Segments of a level go in the order of their arrival.
func (s *Store) Retain() error {
	s.sealMu.Lock()
	defer s.sealMu.Unlock()
	s.life.RLock()
	defer s.life.RUnlock()
	select {
	case <-s.done:
		return nil
	default:
	}
	s.mu.RLock()
	segs := s.segs
	s.mu.RUnlock()
	drop := s.choose(segs)
	removed := false
	for l := byte(1); l < levels; l++ {
		if drop[l] > 0 {
			if err := s.drop(l, segs[l][:drop[l]]); err != nil {
				return err
			}
			removed = true
		}
	}
	if !removed {
		return nil
	}
	if err := s.sweepObjects(); err != nil {
		return err
	}
	// A power cut before this brings back what was deleted, wholly.
	if err := s.flush(); err != nil {
		return err
	}
	return s.giveBack()
}

// choose says how many segments of each level go.
func (s *Store) choose(segs [levels][]*segment) (drop [levels]int) {
	r := &s.opt.Retention
	now := s.opt.Now()
	var sizes [levels]uint64
	total := uint64(0)
	for l := byte(1); l < levels; l++ {
		for _, seg := range segs[l] {
			sizes[l] += seg.bytes
		}
		one := func() {
			sizes[l] -= segs[l][drop[l]].bytes
			drop[l]++
		}
		if age, ok := r.Age[log.Level(l)]; ok {
			limit := nanos(now.Add(-age))
			for drop[l] < len(segs[l]) && segs[l][drop[l]].maxTime < limit {
				one()
			}
		}
		if most, ok := r.LevelSize[log.Level(l)]; ok {
			for drop[l] < len(segs[l]) && sizes[l] > most {
				one()
			}
		}
		total += sizes[l]
	}
	for r.Size > 0 && total > r.Size {
		// Of the levels but audit, the one whose oldest segment is the oldest, a level graver counting as
		// if it were four times as young.
		best, bestAge := byte(0), time.Duration(-1)
		for l := byte(levels - 1); l > auditLevel; l-- {
			if drop[l] == len(segs[l]) {
				continue
			}
			age := max(now.Sub(time.Unix(0, segs[l][drop[l]].maxTime)), 0) >> (2 * (levels - 1 - l))
			if age > bestAge {
				best, bestAge = l, age
			}
		}
		if best == 0 {
			best = auditLevel
		}
		if drop[best] == len(segs[best]) {
			break
		}
		total -= segs[best][drop[best]].bytes
		drop[best]++
	}
	return drop
}

// drop deletes the first segments of a level: the table first, so that no reader begins what is going.
func (s *Store) drop(l byte, gone []*segment) error {
	last := gone[len(gone)-1]
	b := s.db.NewBatch()
	defer b.Close()
	if l == auditLevel {
		if err := s.moveAnchor(b, last); err != nil {
			return err
		}
	}
	for _, seg := range gone {
		if seg.nV7 < seg.rows {
			if err := s.dropOtherIDs(b, seg); err != nil {
				return err
			}
		}
	}
	var errsAll []error
	for _, space := range []byte{keys.Block, keys.Filter, keys.Segment, keys.Times} {
		errsAll = append(errsAll, b.DeleteRange(keys.SegmentPrefix(space, l, 0), keys.SegmentPrefix(space, l, last.id+1), nil))
	}
	// Postings stand by epoch; those of the epoch that is not wholly gone stay and are overlooked.
	if full := (last.id + 1) >> keys.EpochShift; full > 0 {
		errsAll = append(errsAll, b.DeleteRange(keys.EpochPrefix(l, 0), keys.EpochPrefix(l, full), nil))
	}
	if err := errors.Join(errsAll...); err != nil {
		return err
	}
	s.mu.Lock()
	s.segs[l] = slices.Clone(s.segs[l][len(gone):])
	s.mu.Unlock()
	if err := guard(func() error { return s.db.Apply(b, pebble.NoSync) }); err != nil {
		return err
	}
	n := 0
	for _, seg := range gone {
		n += seg.rows
	}
	s.log.Info("old entries deleted", "level", log.Level(l).String(), "entries", n, "up_to", time.Unix(0, last.maxTime).UTC())
	return nil
}

// moveAnchor notes where the audit chain begins after its oldest entries are gone.
func (s *Store) moveAnchor(b *pebble.Batch, last *segment) error {
	c, err := s.newCursor(last, last.minTime, last.maxTime, true)
	if err != nil {
		return err
	}
	defer c.close()
	st := chainState{n: last.end()}
	found := false
	for c.next() {
		if uint64(c.blk.Order(c.at)) != uint64(last.rows-1) {
			continue
		}
		h, err := c.blk.Hash(c.at)
		if err != nil {
			return err
		}
		copy(st.hash[:], h)
		found = true
	}
	if c.err != nil || !found {
		return fmt.Errorf("the audit chain cannot be cut behind a damaged segment: %w", errors.Join(c.err, block.ErrBad))
	}
	return b.Set(keys.BytesKey(keys.Misc, []byte(miscAnchor)), st.encode(), nil)
}

// dropOtherIDs deletes the id keys of a segment's entries whose ids are no UUIDv7.
func (s *Store) dropOtherIDs(b *pebble.Batch, seg *segment) error {
	c, err := s.newCursor(seg, seg.minTime, seg.maxTime, true)
	if err != nil {
		return err
	}
	defer c.close()
	for c.next() {
		if _, _, _, ok := rec.V7(c.id); !ok {
			if err := b.Delete(keys.BytesKey(keys.OtherID, c.id), nil); err != nil {
				return err
			}
		}
	}
	return c.err
}

// sweepObjects deletes object ids that no entry carries any more. It runs under sealMu, so no number can come
// into use meanwhile; numbers are never used twice.
func (s *Store) sweepObjects() error {
	live := map[uint32]uint64{} // group → objects in use
	s.mu.RLock()
	floor := s.nextSeg
	for l := range s.segs {
		if len(s.segs[l]) > 0 {
			floor[l] = s.segs[l][0].id
		}
	}
	s.mu.RUnlock()
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{keys.Posting}, UpperBound: []byte{keys.Posting + 1}})
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		l, id, group, err := keys.ParsePosting(it.Key())
		if err == nil && (len(it.Value()) < 8 || l >= levels) {
			err = posting.ErrBad
		}
		if err == nil && id < floor[l] {
			continue // of a segment that is gone, in an epoch that is not
		}
		if err != nil {
			_ = it.Close()
			return err
		}
		live[group] |= binary.LittleEndian.Uint64(it.Value())
	}
	if err := it.Close(); err != nil {
		return err
	}
	if it, err = s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{keys.Name}, UpperBound: []byte{keys.Name + 1}}); err != nil {
		return err
	}
	b := s.db.NewBatch()
	defer b.Close()
	var gone []uint32
	last := s.objects.Next() - 1
	for ok := it.First(); ok; ok = it.Next() {
		num, err := keys.ParseNumber(it.Key())
		if err == nil && num != last && live[num>>keys.GroupShift]&(1<<(num&63)) == 0 {
			// The last number stays: from it the next one is counted.
			gone = append(gone, num)
			err = errors.Join(b.Delete(keys.BytesKey(keys.Object, it.Value()), nil), b.Delete(it.Key(), nil))
		}
		if err != nil {
			_ = it.Close()
			return err
		}
	}
	if err := it.Close(); err != nil {
		return err
	}
	if len(gone) == 0 {
		return nil
	}
	// Forgotten before they are deleted, so that nobody takes a number from memory that is going.
	s.objects.Forget(gone)
	if err := guard(func() error { return s.db.Apply(b, pebble.NoSync) }); err != nil {
		return err
	}
	s.objects.Forget(gone)
	return nil
}

// giveBack compacts what has been deleted, so that its space comes back at once.
func (s *Store) giveBack() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-s.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	s.mu.RLock()
	segs := s.segs
	next := s.nextSeg
	s.mu.RUnlock()
	for l := byte(1); l < levels; l++ {
		floor := next[l]
		if len(segs[l]) > 0 {
			floor = segs[l][0].id
		}
		if floor == 0 {
			continue
		}
		for _, space := range []byte{keys.Block, keys.Filter} {
			if err := guard(func() error {
				return s.db.Compact(ctx, keys.SegmentPrefix(space, l, 0), keys.SegmentPrefix(space, l, floor), false)
			}); err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return err
			}
		}
	}
	return nil
}
