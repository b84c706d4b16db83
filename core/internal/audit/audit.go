// Package audit gets entries into the log plugin: audit entries without loss, log lines as far as there is room.
//
// # How it works
//
// [Recorder.Append] makes an entry durable in the spool, a directory of segment files, and returns; a
// goroutine delivers what is spooled, in order, and removes it. So a mutation is acknowledged whether the log
// plugin is up or not, and one path serves both. Entries carry ids and the log contract stores an id once:
// delivering again after a crash is harmless, and each entry arrives exactly once.
//
// The spool is bounded. When it is full, [Recorder.Admit] says so, and the core refuses further changes
// rather than make changes that nobody will ever read about.
//
// [Recorder.Note] is for log lines of plugins and guests: a queue of its own in memory, limited in rate by
// source; what does not fit is counted, and the count is noted.
package audit

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
)

// Limits of delivery.
const (
	maxBatch      = 500     // entries an Append: some 250 KB, a fraction of a message's limit
	maxBatchBytes = 1 << 20 // of payload
	deliverWait   = 30 * time.Second
	firstRetry    = 100 * time.Millisecond // the log plugin is back within some 50 ms; Kick tells it sooner
	longestRetry  = 5 * time.Second
	closeWait     = 3 * time.Second // for the last entries at the end
)

// Appender is what of the log contract is used.
type Appender interface {
	Append(ctx context.Context, entries []log.Entry) error
}

// Options of a recorder.
type Options struct {
	Dir   string // of the spool; made 0700
	Limit uint64 // bytes of the spool; 0: 256 MiB
	To    Appender
	Log   *slog.Logger // the core's own, for trouble with the spool itself; nil: slog.Default
	Now   func() time.Time
	// Trouble is told of lasting trouble ("" when it is over); may be nil.
	Trouble func(code, text, remedy string)

	sync func(*os.File) error // nil: File.Sync
}

// Recorder records.
type Recorder struct {
	opt   Options
	spool *spool
	notes *notes
	kick  chan struct{} // capacity 1
	base  context.Context
	stop  context.CancelFunc
	tasks sync.WaitGroup

	mu        sync.Mutex
	failing   bool          // the last delivery failed
	delivered uint64        // sequence number up to which all entries are delivered
	moved     chan struct{} // closed when delivered grows
}

// Open opens the spool and begins to deliver.
func Open(opt Options) (*Recorder, error) {
	if opt.Limit == 0 {
		opt.Limit = 256 << 20
	}
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.sync == nil {
		opt.sync = (*os.File).Sync
	}
	if opt.Trouble == nil {
		opt.Trouble = func(string, string, string) {}
	}
	s, lost, err := openSpool(opt.Dir, opt.Limit, opt.sync)
	if err != nil {
		return nil, err
	}
	r := &Recorder{opt: opt, spool: s, kick: make(chan struct{}, 1), moved: make(chan struct{}), delivered: s.firstPending() - 1}
	r.base, r.stop = context.WithCancel(context.Background())
	r.notes = newNotes(opt)
	for _, l := range lost {
		opt.Log.Error("the audit spool was damaged", "detail", l)
		e := log.Entry{Level: log.LevelAudit, Component: "core", Message: "audit spool: " + l, Labels: map[string]string{"op": "audit.spool", "outcome": "damaged"}}
		if err := r.Append(context.Background(), e); err != nil {
			s.close()
			return nil, err
		}
	}
	r.tasks.Go(r.deliver)
	r.tasks.Go(func() { r.notes.run(r.base) })
	return r, nil
}

// Append makes an entry durable. A missing id or time is filled in; what exceeds the contract's limits is cut.
func (r *Recorder) Append(ctx context.Context, e log.Entry) error {
	if e.ID == "" {
		e.ID = ident.New()
	}
	e.Time = r.storable(e.Time)
	if err := r.spool.append(ctx, trim(e)); err != nil {
		return err
	}
	r.Kick()
	return nil
}

// storable is a time, or now when there is none. A plugin's time is what it wrote: one that no store can keep is
// no reason to lose the entry.
func (r *Recorder) storable(t time.Time) time.Time {
	if y := t.UTC().Year(); y < 1970 || y > 2200 {
		return r.opt.Now()
	}
	return t
}

// Admit returns nil while the spool has room for what changes make.
func (r *Recorder) Admit() error {
	if r.spool.hasRoom() {
		return nil
	}
	return errs.New(errs.Unavailable, "the audit spool is full (%d bytes), so nothing may be changed", r.opt.Limit).Because("AUDIT_FULL").
		Do("get the log plugin to work again: mvirt plugin show log")
}

// Note passes a log line on, if there is room. It never blocks.
func (r *Recorder) Note(e log.Entry) {
	if e.ID == "" {
		e.ID = ident.New()
	}
	e.Time = r.storable(e.Time)
	r.notes.add(trim(e))
}

// Dropped is how many log lines have been dropped since the start, because they were too many at once.
func (r *Recorder) Dropped() uint64 {
	r.notes.mu.Lock()
	defer r.notes.mu.Unlock()
	return r.notes.lost
}

// Kick tells that the log plugin came up.
func (r *Recorder) Kick() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
	r.notes.wake()
}

// Spooled is how many entries wait for the log plugin.
func (r *Recorder) Spooled() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.spool.last() - r.delivered
}

// Flush waits until what has been appended so far is delivered, or ctx ends.
func (r *Recorder) Flush(ctx context.Context) error {
	want := r.spool.last()
	for {
		r.mu.Lock()
		got, moved := r.delivered, r.moved
		r.mu.Unlock()
		if got >= want {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Close delivers what it can until ctx ends, and stops. What is left is delivered at the next start.
func (r *Recorder) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeWait)
	defer cancel()
	r.mu.Lock()
	if r.failing {
		cancel() // the log plugin is away: waiting would only hold up the end
	}
	r.mu.Unlock()
	ferr := r.Flush(ctx)
	r.notes.flush(ctx)
	r.stop()
	r.tasks.Wait()
	err := r.spool.close()
	if ferr != nil {
		r.opt.Log.Warn("audit entries stay in the spool until the next start", "entries", r.Spooled())
	}
	return err
}

// deliver moves entries from the spool to the log plugin until the recorder is closed.
func (r *Recorder) deliver() {
	retry := firstRetry
	for {
		batch, err := r.spool.next(maxBatch, maxBatchBytes)
		if err != nil {
			r.opt.Log.Error("reading the audit spool", "error", err)
			r.opt.Trouble("AUDIT_SPOOL", "the audit spool cannot be read: "+err.Error(), "see the disk under the core's state_dir")
		}
		if len(batch) == 0 {
			select {
			case <-r.kick:
				continue
			case <-r.base.Done():
				return
			}
		}
		err = r.hand(batch)
		r.mu.Lock()
		r.failing = err != nil
		r.mu.Unlock()
		if err != nil {
			r.opt.Trouble("AUDIT_DELAYED", "audit entries wait for the log plugin: "+err.Error(), "mvirt plugin show log")
			t := time.NewTimer(retry)
			select {
			case <-t.C:
				retry = min(2*retry, longestRetry)
			case <-r.kick:
				retry = firstRetry
			case <-r.base.Done():
				t.Stop()
				return
			}
			t.Stop()
			continue
		}
		retry = firstRetry
		r.opt.Trouble("AUDIT_DELAYED", "", "")
		last := batch[len(batch)-1].seq
		if err := r.spool.done(last); err != nil {
			r.opt.Log.Error("trimming the audit spool", "error", err)
		}
		r.mu.Lock()
		r.delivered = last
		close(r.moved)
		r.moved = make(chan struct{})
		r.mu.Unlock()
	}
}

// hand gives a batch to the log plugin. An entry that the plugin calls invalid is dropped alone, with a
// complaint: it would stop all that come behind it.
func (r *Recorder) hand(batch []record) error {
	entries := make([]log.Entry, len(batch))
	for i := range batch {
		entries[i] = batch[i].entry
	}
	ctx, cancel := context.WithTimeout(r.base, deliverWait)
	defer cancel()
	err := r.opt.To.Append(ctx, entries)
	if err == nil || !errors.Is(err, errs.Invalid) {
		return err
	}
	if len(batch) > 1 {
		half := len(batch) / 2
		if err := r.hand(batch[:half]); err != nil {
			return err
		}
		return r.hand(batch[half:])
	}
	r.opt.Log.Error("the log plugin refuses an audit entry for good; it is dropped", "id", entries[0].ID, "message", entries[0].Message, "error", err)
	r.opt.Trouble("AUDIT_REFUSED", "the log plugin refused an audit entry for good: "+err.Error(), "report this as a bug of the log plugin or of mvirt")
	return nil
}

// trim keeps an entry within the contract's limits, and text within UTF-8.
func trim(e log.Entry) log.Entry {
	e.Message = cut(e.Message, log.MaxMessage)
	e.Component = cut(e.Component, 64)
	if len(e.Objects) > log.MaxObjects {
		e.Objects = e.Objects[:log.MaxObjects]
	}
	objects := make([]string, 0, len(e.Objects))
	for _, o := range e.Objects {
		if o != "" && len(o) <= log.MaxObjectLen {
			objects = append(objects, strings.ToValidUTF8(o, "?"))
		}
	}
	e.Objects = objects
	if len(e.Labels) > 0 {
		labels := make(map[string]string, min(len(e.Labels), log.MaxLabels))
		for k, v := range e.Labels {
			if k == "" || len(labels) == log.MaxLabels {
				continue
			}
			labels[cut(k, 128)] = cut(v, 4096)
		}
		e.Labels = labels
	}
	return e
}

// cut shortens s to at most n bytes of valid UTF-8, with a mark.
func cut(s string, n int) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= n {
		return s
	}
	const mark = "…"
	return strings.ToValidUTF8(s[:n-len(mark)], "") + mark
}
