// Package locks holds one lock for each key, shared or exclusive, with waiting that ends with a context.
package locks

import (
	"context"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/semaphore"
)

const all = 1 << 30

// Set is a set of locks. The zero value is ready.
type Set struct {
	mu   sync.Mutex
	held map[string]*entry
}

type entry struct {
	sem  *semaphore.Weighted
	refs int
}

// Want is a lock to take.
type Want struct {
	Key       string
	Exclusive bool
}

// Read wants key shared.
func Read(key string) Want { return Want{key, false} }

// Write wants key alone.
func Write(key string) Want { return Want{key, true} }

// Lock takes all wanted locks, in one order for everybody, and returns what gives them back. Of two wants of
// one key the exclusive one counts; empty keys are left out.
func (s *Set) Lock(ctx context.Context, wants ...Want) (unlock func(), err error) {
	slices.SortFunc(wants, func(a, b Want) int {
		if c := strings.Compare(a.Key, b.Key); c != 0 || a.Exclusive == b.Exclusive {
			return c
		}
		if a.Exclusive {
			return -1
		}
		return 1
	})
	wants = slices.CompactFunc(wants, func(a, b Want) bool { return a.Key == b.Key })
	var undo []func()
	unlock = func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}
	for _, w := range wants {
		if w.Key == "" {
			continue
		}
		weight := int64(1)
		if w.Exclusive {
			weight = all
		}
		e := s.use(w.Key)
		if err := e.sem.Acquire(ctx, weight); err != nil {
			s.drop(w.Key)
			unlock()
			return nil, err
		}
		undo = append(undo, func() { e.sem.Release(weight); s.drop(w.Key) })
	}
	return unlock, nil
}

func (s *Set) use(key string) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = map[string]*entry{}
	}
	e := s.held[key]
	if e == nil {
		e = &entry{sem: semaphore.NewWeighted(all)}
		s.held[key] = e
	}
	e.refs++
	return e
}

func (s *Set) drop(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.held[key]
	if e.refs--; e.refs == 0 {
		delete(s.held, key)
	}
}
