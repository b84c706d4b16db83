package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
)

// Limits of log lines. The rate is far above what a healthy plugin says and far below what it takes to fill
// the queue of a log plugin (measured: some 100,000 lines a second over stderr).
const (
	noteQueue   = 8192 // entries
	noteBytes   = 8 << 20
	noteBatch   = 1000
	noteRate    = 500.0 // lines a second and source …
	noteBurst   = 2000.0
	noteSources = 1000 // of which a rate is kept; beyond it, all others share one
	countEvery  = 10 * time.Second
)

// notes is the queue of log lines.
type notes struct {
	opt  Options
	more chan struct{} // capacity 1

	mu      sync.Mutex
	queue   []log.Entry
	bytes   int
	sources map[string]*bucket
	idle    chan struct{} // closed when the queue was found empty
	busy    bool
	lost    uint64 // lines dropped since the start
}

type bucket struct {
	tokens  float64
	at      time.Time
	dropped uint64
}

func newNotes(opt Options) *notes {
	return &notes{opt: opt, more: make(chan struct{}, 1), sources: map[string]*bucket{}, idle: make(chan struct{})}
}

// source is what a rate is kept for: the component and, for guests, the VM.
func source(e log.Entry) string {
	if len(e.Objects) > 0 && e.Component == "console" {
		return e.Component + " " + e.Objects[0]
	}
	return e.Component
}

func (n *notes) add(e log.Entry) {
	now := n.opt.Now()
	size := len(e.Message) + 200
	n.mu.Lock()
	src := source(e)
	b := n.sources[src]
	if b == nil {
		if len(n.sources) >= noteSources {
			src = "others"
			b = n.sources[src]
		}
		if b == nil {
			b = &bucket{tokens: noteBurst, at: now}
			n.sources[src] = b
		}
	}
	if d := now.Sub(b.at); d > 0 {
		b.tokens = min(noteBurst, b.tokens+d.Seconds()*noteRate)
	}
	b.at = now
	if b.tokens < 1 || len(n.queue) >= noteQueue || n.bytes+size > noteBytes {
		b.dropped++
		n.lost++
		n.mu.Unlock()
		return
	}
	b.tokens--
	n.queue = append(n.queue, e)
	n.bytes += size
	n.mu.Unlock()
	n.wake()
}

func (n *notes) wake() {
	select {
	case n.more <- struct{}{}:
	default:
	}
}

// countsLocked takes the counts of dropped lines as entries.
func (n *notes) countsLocked(now time.Time) (out []log.Entry) {
	for src, b := range n.sources {
		if b.dropped > 0 {
			out = append(out, log.Entry{Time: now, ID: ident.New(), Level: log.LevelWarn, Component: "core",
				Message: fmt.Sprintf("%d log lines of %s were dropped: too many at once", b.dropped, src), Labels: map[string]string{"source": src}})
			b.dropped = 0
		}
		if now.Sub(b.at) > time.Minute {
			delete(n.sources, src)
		}
	}
	return out
}

// run hands lines to the log plugin until ctx ends. Lines that it does not take wait for the next try.
func (n *notes) run(ctx context.Context) {
	tick := time.NewTicker(countEvery)
	defer tick.Stop()
	for {
		select {
		case <-n.more:
		case <-tick.C:
			n.mu.Lock()
			n.queue = append(n.countsLocked(n.opt.Now()), n.queue...)
			n.mu.Unlock()
		case <-ctx.Done():
			return
		}
		for n.hand(ctx) {
		}
	}
}

// hand hands one batch over; true: there may be more to do at once.
func (n *notes) hand(ctx context.Context) bool {
	n.mu.Lock()
	batch := n.queue[:min(len(n.queue), noteBatch)]
	n.busy = len(batch) > 0
	if !n.busy {
		close(n.idle)
		n.idle = make(chan struct{})
	}
	n.mu.Unlock()
	if len(batch) == 0 {
		return false
	}
	hctx, cancel := context.WithTimeout(ctx, deliverWait)
	err := n.append(hctx, batch)
	cancel()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.busy = false
	if err != nil {
		return false // the next line, the next tick or Kick tries again
	}
	for _, e := range batch {
		n.bytes -= len(e.Message) + 200
	}
	n.queue = append([]log.Entry(nil), n.queue[len(batch):]...)
	n.bytes = max(n.bytes, 0)
	return true
}

// append hands lines over. One that the plugin calls invalid is dropped: it would hold up all that come behind it.
// What went through before an error is sent again, and its ids are known then.
func (n *notes) append(ctx context.Context, batch []log.Entry) error {
	err := n.opt.To.Append(ctx, batch)
	if err == nil || !errors.Is(err, errs.Invalid) {
		return err
	}
	if len(batch) > 1 {
		half := len(batch) / 2
		if err := n.append(ctx, batch[:half]); err != nil {
			return err
		}
		return n.append(ctx, batch[half:])
	}
	n.opt.Log.Warn("the log plugin refuses a log line for good; it is dropped", "component", batch[0].Component, "error", err)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lost++
	return nil
}

// flush waits until the queue was empty once, or ctx ends.
func (n *notes) flush(ctx context.Context) {
	n.mu.Lock()
	n.queue = append(n.queue, n.countsLocked(n.opt.Now())...)
	empty, idle := len(n.queue) == 0 && !n.busy, n.idle
	n.mu.Unlock()
	if empty {
		return
	}
	n.wake()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}
