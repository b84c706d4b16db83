package locks

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

func TestLocks(t *testing.T) {
	var s Set
	ctx := t.Context()
	a, err := s.Lock(ctx, Read("x"), Write("y"), Read("y"), Read(""))
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Lock(ctx, Read("x"))
	if err != nil {
		t.Fatal("two readers:", err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	for _, w := range []Want{Write("x"), Read("y")} {
		if _, err := s.Lock(short, Read("z"), w); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%+v: %v", w, err)
		}
	}
	a()
	b()
	c, err := s.Lock(ctx, Write("x"), Write("y"), Write("z"))
	if err != nil {
		t.Fatal(err)
	}
	c()
	if len(s.held) != 0 {
		t.Errorf("%d locks are left", len(s.held))
	}
}

// TestNoDeadlock: whoever wants several asks in whatever order.
func TestNoDeadlock(t *testing.T) {
	var s Set
	var wg sync.WaitGroup
	n := 0
	for i := range 200 {
		wg.Go(func() {
			wants := []Want{Write("a"), Write("b"), Read("c")}
			if i%2 == 0 {
				wants = []Want{Read("c"), Write("b"), Write("a")}
			}
			unlock, err := s.Lock(t.Context(), wants...)
			if err != nil {
				t.Error(err)
				return
			}
			n++
			unlock()
		})
	}
	wg.Wait()
	if n != 200 || len(s.held) != 0 {
		t.Errorf("%d, %d left", n, len(s.held))
	}
}
