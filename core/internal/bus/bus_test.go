package bus

import (
	"context"
	"errors"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestSlowListener sees that a listener who does not keep up loses events, is told how many, and slows nobody.
func TestSlowListener(t *testing.T) {
	var b Bus
	b.Publish(Event{Type: "nobody listens"})
	enough := errors.New("enough")
	const more = 100
	hold, ready, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var got, missed uint64
	go func() {
		done <- b.Listen(context.Background(), nil, func() error { close(ready); return nil }, func(e Event, m uint64) error {
			if got == 0 {
				<-hold
			}
			got++
			missed += m
			if e.Type == "last" {
				return enough
			}
			return nil
		})
	}()
	<-ready
	for range queue + more { // the listener holds one, the queue holds the rest
		b.Publish(Event{Type: "e"})
	}
	close(hold)
	for sent := false; !sent; { // until there is room again
		b.mu.Lock()
		for l := range b.listeners {
			sent = len(l.ch) == 0
		}
		b.mu.Unlock()
	}
	b.Publish(Event{Type: "last"})
	if err := <-done; !errors.Is(err, enough) {
		t.Fatal(err)
	}
	if missed < more-1 || missed > more || got+missed != queue+more+1 {
		t.Errorf("got %d, missed %d of %d", got, missed, queue+more+1)
	}
}

func TestOnlyWhatWasAskedFor(t *testing.T) {
	var b Bus
	ctx, cancel := context.WithCancel(context.Background())
	ready, got := make(chan struct{}), make(chan Event, 10)
	done := make(chan error, 1)
	go func() {
		done <- b.Listen(ctx, []string{"vm1"}, func() error { close(ready); return nil }, func(e Event, _ uint64) error { got <- e; return nil })
	}()
	<-ready
	b.Publish(Event{Type: "other", Objects: []string{"vm2"}})
	b.Publish(Event{Type: "mine", Objects: []string{"net", "vm1"}})
	if e := <-got; e.Type != "mine" || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
