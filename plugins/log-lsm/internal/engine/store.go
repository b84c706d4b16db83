// Package engine is the store: entries are appended durably, kept in memory until there are enough of them to
// pack, packed into segments, indexed by object, queried, followed, and in the end deleted by retention.
//
// # How it works
//
// An append is encoded by its caller and handed to the committer, a single goroutine that takes all that
// waits, leaves out what is already stored, and writes one record to the log (package rawlog). A second
// goroutine syncs it, shows the entries to readers and answers the callers; meanwhile the committer writes
// the next record. This is the group commit.
//
// Each level has a head: its newest entries in memory, in the order of arrival. The entries of a level are
// numbered in that order, for ever. Full heads go to the sealer, which sorts them by (time, id), packs them
// into blocks of columns, and writes blocks, postings, filter, dictionary and the number up to which the
// level is packed in one atomic Pebble batch. Pebble's own log is off: batches become durable when its
// memtable is flushed into a table, whole batches in order, and only then the files of the raw log that hold
// nothing newer are let go. At start the heads are read back from the raw log, from the packed number on: so
// an entry is never lost and never twice, and its postings are in the same batch as its block.
//
// A segment holds one level, so that levels are kept for different times and a query for errors does not
// read debug entries. docs/formats-log.md has the layout.
package engine

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/dict"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rawlog"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/steadyfs"
	"github.com/mvirt/mvirt/sdk/errs"
)

// levels is the number of levels plus one: they count from 1.
const levels = 6

// maxRows is the size of a full segment. Rows are 16 bits wide in the index.
const maxRows = head.MaxRows

// Options of a store. Zero fields take the default.
type Options struct {
	Dir string
	FS  vfs.FS       // vfs.Default
	Log hclog.Logger // null logger
	Now func() time.Time

	// CacheSize bounds what the store keeps in memory for reading, and Pebble's memtables; 64 MiB.
	CacheSize int64
	// SegmentRows is how many entries of a level are packed together; 65,536. Tests use small ones.
	SegmentRows int
	// HeadBytes bounds the entries in memory that are not packed yet, over all levels; 24 MiB. While a
	// sealed part is being written, as much again may be in memory.
	HeadBytes int
	// RawBytes is when the log of what is not packed is cut short by packing; 64 MiB.
	RawBytes int64
	// MinFree is the free space in bytes below which appends are refused; 64 MiB.
	MinFree uint64
	// PollDisk is how often free space is looked at; one second.
	PollDisk time.Duration
	// Retention says what is deleted when.
	Retention Retention
	// ReadOnly opens for queries, Verify and Check; nothing is written.
	ReadOnly bool
	// searchFrom is how many rows a query by text walks before it searches several segments at once; 8,192.
	searchFrom uint64
	// OnPanic is called, for tests, instead of ending the process when Pebble cannot go on.
	OnPanic func(string)
}

// Store is an open store.
type Store struct {
	opt   Options
	log   hclog.Logger
	fs    *steadyfs.FS
	lock  io.Closer
	dir   string // of Pebble
	raw   *rawlog.Log
	cache *pebble.Cache
	db    *pebble.DB
	seed  maphash.Seed

	objects *dict.Objects
	shapes  *dict.Shapes
	unpack  *unpackers

	searchers chan struct{} // room for each goroutine that searches segments by text

	reqs    chan *request
	synced  chan *group
	done    chan struct{} // closed by Close
	stopped chan struct{} // closed when no append is answered any more
	fsDone  chan struct{} // closed when waiting for disk space shall end
	wg      sync.WaitGroup
	sealing chan struct{} // wakes the sealer

	full  fullFlag    // a write waits for disk space
	low   atomic.Bool // free space is under MinFree
	conds conditions

	// These belong to the committer.
	chain    chainState
	idSeg    idCache
	deaf     map[*segment]bool // their ids cannot be read
	groupIDs groupIDs
	rawFull  bool // the last write to the log found no space

	broken sticky // the log could not be synced

	// These belong to careLoop.
	tidySeen uint64
	tidyTime time.Time

	mu      sync.RWMutex
	active  [levels]*head.Head
	frozen  [levels][]*head.Head // oldest first
	segs    [levels][]*segment   // copied on write
	nextSeg [levels]uint32
	roomy   *sync.Cond // on mu: a frozen head is gone
	follows map[*follower]struct{}
	closed  bool
	sealErr error // of the last try to pack

	// life is held for reading while Pebble is used by a query; Close takes it.
	life      sync.RWMutex
	sealMu    sync.Mutex // serialises sealing, retention and checkpoints
	unflushed uint64     // packed bytes that are not in a table yet; under sealMu
	trims     chan struct{}
	closer    sync.Once
	stats     counters
}

type counters struct {
	appended, duplicates, groups, seals atomic.Uint64
}

// errClosed is what calls get after Close.
func errClosed() error {
	return errs.New(errs.Unavailable, "the log store is shut down").Do("try again when the log plugin is up")
}

// full disk, said the same way everywhere.
func (s *Store) noSpace() error {
	return errs.New(errs.Exhausted, "the disk of %s is full; nothing new is stored until there is space", s.opt.Dir).
		Because("DISK_FULL").Do("free space, or lower the retention of the log plugin (--retain-age, --retain-size); appends go on by themselves")
}

func (o *Options) defaults() {
	if o.FS == nil {
		o.FS = vfs.Default
	}
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.CacheSize == 0 {
		o.CacheSize = 64 << 20
	}
	if o.searchFrom == 0 {
		o.searchFrom = 8192
	}
	if o.SegmentRows == 0 || o.SegmentRows > maxRows {
		o.SegmentRows = maxRows
	}
	if o.HeadBytes == 0 {
		o.HeadBytes = 24 << 20
	}
	if o.RawBytes == 0 {
		o.RawBytes = 64 << 20
	}
	if o.MinFree == 0 {
		o.MinFree = 64 << 20
	}
	if o.PollDisk == 0 {
		o.PollDisk = time.Second
	}
}

// unpackers lends block readers, which are costly to make.
type unpackers struct {
	names block.Names
	pool  sync.Pool
}

func (u *unpackers) get() (*block.Reader, error) {
	if r, ok := u.pool.Get().(*block.Reader); ok {
		return r, nil
	}
	return block.NewReader(u.names)
}

func (u *unpackers) put(r *block.Reader) { u.pool.Put(r) }

type names struct{ s *Store }

func (n names) Shape(num uint32) (*block.Shape, error) { return n.s.shapes.Shape(num) }
func (n names) Object(num uint32) (string, error)      { return n.s.objects.Name(num) }

// Close ends all queries, makes everything durable and closes the store. Calls under way get Unavailable.
func (s *Store) Close(ctx context.Context) error {
	var err error
	s.closer.Do(func() { err = s.close(ctx) })
	return err
}

func (s *Store) close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for f := range s.follows {
		f.wake()
	}
	s.roomy.Broadcast()
	s.mu.Unlock()
	close(s.done)
	stopped := make(chan struct{})
	go func() { s.wg.Wait(); close(stopped) }()
	select {
	case <-stopped:
	case <-ctx.Done():
		// A write that waits for disk space is given up; its callers have been told that it failed.
		close(s.fsDone)
		<-stopped
	}
	select {
	case <-s.fsDone:
	default:
		defer close(s.fsDone)
	}
	s.life.Lock()
	defer s.life.Unlock()
	// The raw log has everything that Pebble has not flushed.
	err := errors.Join(s.raw.Close(), guard(func() error { return s.db.Close() }))
	s.cache.Unref()
	return errors.Join(err, s.lock.Close())
}

// guard turns a panic of Pebble into an error.
func guard(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			if e, ok := p.(error); ok {
				err = fmt.Errorf("the store's engine gave up: %w", e)
			} else {
				err = fmt.Errorf("the store's engine gave up: %v", p)
			}
		}
	}()
	return fn()
}

// kind classifies an error of Pebble.
func kind(err error) errs.Kind {
	switch {
	case err == nil:
		return errs.Unknown
	case pebble.IsCorruptionError(err), errors.Is(err, block.ErrBad), errors.Is(err, dict.ErrMissing):
		return errs.Corrupt
	case steadyfs.NoSpace(err):
		return errs.Exhausted
	}
	if k := errs.KindOf(err); k != errs.Unknown {
		return k
	}
	return errs.Internal
}

// pebbleLog passes Pebble's messages on. Fatal ones end the process, from which the supervisor and the log
// recover it; a store whose log cannot be written must not go on.
type pebbleLog struct {
	log     hclog.Logger
	onPanic func(string)
}

func (l pebbleLog) Infof(format string, args ...any)  { l.log.Trace(fmt.Sprintf(format, args...)) }
func (l pebbleLog) Errorf(format string, args ...any) { l.log.Warn(fmt.Sprintf(format, args...)) }
func (l pebbleLog) Fatalf(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	l.log.Error("the store's engine cannot go on", "error", msg)
	if l.onPanic != nil {
		l.onPanic(msg)
	}
	panic(msg)
}

// damaged notes damage and gives the error to return.
func (s *Store) damaged(level byte, err error) error {
	k := kind(err)
	if k == errs.Corrupt {
		s.conds.set(condCorrupt, level, fmt.Sprintf("a part of the log cannot be read: %v", err))
	}
	return errs.Wrap(k, err, "read the log")
}
