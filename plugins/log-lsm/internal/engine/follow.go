package engine

import (
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// follower is a query that waits for what comes. It holds its place, not entries: what it has not fetched
// when its head is packed is read from disk.
type follower struct {
	pos  [levels]uint64 // arrival number, by level, of the next entry
	bell chan struct{}
}

// wake never blocks.
func (f *follower) wake() {
	select {
	case f.bell <- struct{}{}:
	default:
	}
}

func (s *Store) newFollower() *follower {
	f := &follower{bell: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.follows[f] = struct{}{}
	return f
}

func (s *Store) dropFollower(f *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.follows, f)
}

// live gives entries as they come.
func (q *query) live(f *follower) error {
	q.batch = append(q.batch, log.Result{CaughtUp: true})
	if err := q.deliver(); err != nil {
		return err
	}
	q.after = nil
	for q.left > 0 {
		more, err := q.round(f)
		if err != nil {
			return err
		}
		if more {
			continue
		}
		select {
		case <-f.bell:
		case <-q.ctx.Done():
			return q.ctx.Err()
		case <-q.s.done:
			return errClosed()
		}
	}
	return nil
}

// round fetches what has come; more says that it was cut short.
func (q *query) round(f *follower) (more bool, err error) {
	if err := q.enter(); err != nil {
		return false, err
	}
	defer q.leave()
	sn := q.s.snapshot()
	missed := uint64(0)
	for l := byte(1); l < levels; l++ {
		if q.levels[l] && f.pos[l] < sn.mem[l] {
			missed += sn.mem[l] - f.pos[l]
		}
	}
	if missed > 0 {
		return true, q.catchUp(f, &sn, missed)
	}
	var r rec.View
	for i := range sn.views {
		v := &sn.views[i]
		l := v.Level
		if !q.levels[l] {
			continue
		}
		for f.pos[l] < v.First+uint64(v.Len()) {
			if f.pos[l] < v.First {
				// Only after damage: numbers are missing.
				f.pos[l] = v.First
			}
			row := int(f.pos[l] - v.First)
			f.pos[l]++
			if t := v.Times[row]; t < q.lo || t > q.hi || !q.inMemory(v, row) {
				continue
			}
			if err := v.Parse(row, &r); err != nil {
				continue
			}
			q.add(log.Result{Entry: r.Entry(), PageToken: token(v.Times[row], v.ID(row), &place{from: f.pos, open: true})})
			if q.left == 0 {
				return false, q.flush()
			}
			if len(q.batch) >= batchResults || q.size >= batchBytes {
				return true, q.flush()
			}
		}
	}
	return false, q.flush()
}

// catchUp reads from disk what was packed before it could be fetched.
func (q *query) catchUp(f *follower, sn *snapshot, missed uint64) error {
	q.batch = append(q.batch, log.Result{Missed: missed})
	part := place{from: f.pos}
	for l := range f.pos {
		f.pos[l] = max(f.pos[l], sn.mem[l])
	}
	part.upto = f.pos
	sn.views = nil
	// The index may know the objects only now.
	clear(q.index)
	if err := q.merge(sn, &part); err != nil {
		return err
	}
	if err := q.flush(); err != nil {
		return err
	}
	return q.damaged()
}
