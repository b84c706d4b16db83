// Package bus spreads events to whoever listens. A listener that is too slow loses events, and is told how
// many; it never slows down others or the sender.
package bus

import (
	"context"
	"slices"
	"sync"
	"time"
)

// queue is how many events wait for one listener: some seconds of a busy host.
const queue = 512

// Event is something that happened.
type Event struct {
	Time    time.Time
	Type    string // "vm.state", "plugin.state", …
	Objects []string
	Labels  map[string]string
	Message string
}

// Bus spreads events. The zero value is ready.
type Bus struct {
	mu        sync.Mutex
	listeners map[*listener]struct{}
}

type listener struct {
	objects []string // empty: all
	ch      chan Event
	missed  uint64 // Bus.mu guards it
}

// Publish sends an event to all listeners. It never blocks. Listeners share the event: nobody changes it.
func (b *Bus) Publish(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for l := range b.listeners {
		if len(l.objects) > 0 && !slices.ContainsFunc(l.objects, func(o string) bool { return slices.Contains(e.Objects, o) }) {
			continue
		}
		select {
		case l.ch <- e:
		default:
			l.missed++
		}
	}
}

// Listen calls fn with each event about any of objects (none: about anything) from now on, until fn or ctx
// ends it. missed is how many events were lost before this one. ready, if not nil, is called once it listens.
func (b *Bus) Listen(ctx context.Context, objects []string, ready func() error, fn func(e Event, missed uint64) error) error {
	l := &listener{objects: objects, ch: make(chan Event, queue)}
	b.mu.Lock()
	if b.listeners == nil {
		b.listeners = map[*listener]struct{}{}
	}
	b.listeners[l] = struct{}{}
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		delete(b.listeners, l)
		b.mu.Unlock()
	}()
	if ready != nil {
		if err := ready(); err != nil {
			return err
		}
	}
	for {
		select {
		case e := <-l.ch:
			b.mu.Lock()
			missed := l.missed
			l.missed = 0
			b.mu.Unlock()
			if err := fn(e, missed); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
