package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable/block"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/dict"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rawlog"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/steadyfs"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// formatVersion is the version of the whole layout. A store of a newer version is refused.
const formatVersion = 1

// Names in the Misc key space.
const (
	miscFormat = "format" // uint32
	miscChain  = "chain"  // arrival number (8) and hash (32) behind the newest packed audit entry
	miscAnchor = "anchor" // the same behind the newest audit entry that retention has removed
	miscLevel  = "level"  // + level: next segment (4) and next arrival number (8) behind all packed entries
)

// pebbleOptions are tuned for few large values that do not compress further and are never rewritten but by
// compaction.
func (s *Store) pebbleOptions() *pebble.Options {
	// Pebble takes memtables out of the cache's budget. Two to three exist under load.
	mem := uint64(min(max(s.opt.CacheSize/4, 1<<20), 64<<20))
	o := &pebble.Options{
		FS: s.fs, Cache: s.cache, Logger: pebbleLog{s.log.Named("pebble"), s.opt.OnPanic},
		MemTableSize:                mem,
		MemTableStopWritesThreshold: 3,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       24,
		LBaseMaxBytes:               64 << 20,
		MaxOpenFiles:                512,
		FormatMajorVersion:          pebble.FormatNewest,
		EventListener:               s.listener(),
		ReadOnly:                    s.opt.ReadOnly,
		// What is packed stands in the raw log until it has been flushed into a table.
		DisableWAL: true,
	}
	for i := range o.Levels {
		l := &o.Levels[i]
		// Blocks of entries are larger than this and stand alone; dictionary keys share blocks.
		l.BlockSize = 4 << 10
		l.IndexBlockSize = 16 << 10
		// For lookups of ids and objects that are not there.
		l.FilterPolicy = bloom.FilterPolicy(10)
		// What is packed is dense: trying to compress it takes a fifth of all time for nothing.
		l.Compression = func() *block.CompressionProfile { return block.NoCompression }
	}
	// A tombstone over deleted segments is compacted away though nothing else happens.
	o.FlushDelayDeleteRange = 10 * time.Second
	return o
}

// Open opens or creates the store in a directory.
func Open(opt Options) (*Store, error) {
	opt.defaults()
	s := &Store{opt: opt, log: opt.Log, seed: maphash.MakeSeed(), reqs: make(chan *request, 1024), synced: make(chan *group, 8),
		done: make(chan struct{}), stopped: make(chan struct{}), fsDone: make(chan struct{}), sealing: make(chan struct{}, 1), searchers: make(chan struct{}, max(2, runtime.GOMAXPROCS(0))), trims: make(chan struct{}, 1), follows: map[*follower]struct{}{}}
	s.roomy = sync.NewCond(&s.mu)
	s.conds.now = opt.Now
	s.fs = steadyfs.New(opt.FS, 100*time.Millisecond, s.fsDone, s.diskFull)
	if !opt.ReadOnly {
		err := opt.FS.MkdirAll(opt.Dir, 0o700)
		if err == nil {
			err = syncDir(opt.FS, opt.FS.PathDir(opt.Dir))
		}
		if err != nil {
			return nil, errs.Wrap(errs.Unknown, err, "make the data directory")
		}
	}
	s.cache = pebble.NewCache(opt.CacheSize)
	err := s.prepareDir()
	if err == nil {
		err = guard(func() (err error) { s.db, err = pebble.Open(s.dir, s.pebbleOptions()); return err })
	}
	if err == nil {
		if err = s.load(); err != nil {
			_ = guard(s.db.Close)
			if s.raw != nil {
				_ = s.raw.Close()
			}
		}
	}
	if err != nil {
		s.cache.Unref()
		if s.lock != nil {
			_ = s.lock.Close()
		}
		return nil, openError(opt.Dir, err)
	}
	if opt.ReadOnly {
		close(s.stopped)
		return s, nil
	}
	s.checkSpace()
	if it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{keys.Object}, UpperBound: []byte{keys.Object + 1}}); err == nil {
		s.wg.Go(func() {
			s.objects.Fill(it, s.done)
			_ = it.Close() // what it says, Fill has seen
		})
	}
	s.wg.Add(4)
	go s.commitLoop()
	go s.syncLoop()
	go s.sealLoop()
	go s.careLoop()
	s.kickSealer()
	return s, nil
}

// Names in the data directory.
const (
	lockName   = "LOCK"      // held while a store is open
	storeDir   = "store"     // everything that is kept, in the two directories that follow
	dbDir      = "db"        // Pebble's
	rawDir     = "raw"       // entries that are not packed yet
	readyDir   = "store.new" // a restored store, complete, that takes the place of the other
	restoreDir = ".restore"  // a restored store, incomplete
	backupDir  = ".backup"   // + number: a copy that is being streamed
)

// prepareDir takes the lock, finishes a restore and removes what a crash has left.
func (s *Store) prepareDir() error {
	fs, dir := s.opt.FS, s.opt.Dir
	var err error
	switch s.lock, err = fs.Lock(fs.PathJoin(dir, lockName)); {
	case errors.Is(err, os.ErrNotExist):
		return errs.New(errs.NotFound, "%s holds no log", dir).Do("give the --data-dir of the log plugin")
	case err != nil:
		return errs.Wrap(errs.Conflict, err, "another process has the log in %s open", dir)
	}
	s.dir = fs.PathJoin(dir, storeDir, dbDir)
	if s.opt.ReadOnly {
		return nil
	}
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n == restoreDir || strings.HasPrefix(n, backupDir) {
			if err := fs.RemoveAll(fs.PathJoin(dir, n)); err != nil {
				return err
			}
		}
	}
	if slices.Contains(names, readyDir) {
		if err := install(fs, dir); err != nil {
			return err
		}
	}
	if err := fs.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	return errors.Join(syncDir(fs, fs.PathJoin(dir, storeDir)), syncDir(fs, dir))
}

// install puts a restored store in its place.
func install(fs vfs.FS, dir string) error {
	if err := fs.RemoveAll(fs.PathJoin(dir, storeDir)); err != nil {
		return err
	}
	if err := fs.Rename(fs.PathJoin(dir, readyDir), fs.PathJoin(dir, storeDir)); err != nil {
		return err
	}
	return syncDir(fs, dir)
}

func syncDir(fs vfs.FS, dir string) error {
	d, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func openError(dir string, err error) error {
	if e := (*errs.Error)(nil); errors.As(err, &e) {
		return err
	}
	e := &errs.Error{Op: "log.Open", Kind: kind(err), Message: "cannot open the store in " + dir, Err: err}
	switch e.Kind {
	case errs.Corrupt:
		e.Remedy = "restore the log from a backup into an empty directory, or move the directory away to begin a new log"
	case errs.Exhausted:
		e.Remedy = "free space on the disk of the data directory"
	default:
		e.Remedy = "see that the directory is this plugin's alone and writable"
	}
	return e
}

// load reads everything that is kept in memory.
func (s *Store) load() error {
	if err := s.checkFormat(); err != nil {
		return err
	}
	objNext, err := s.nextNumber(keys.Name)
	if err != nil {
		return err
	}
	shapeNext, err := s.nextNumber(keys.Text)
	if err != nil {
		return err
	}
	s.objects = dict.NewObjects(s.db, objNext, int(s.opt.CacheSize/512))
	s.shapes = dict.NewShapes(s.db, shapeNext)
	s.unpack = &unpackers{names: names{s}}
	if err := s.loadSegments(); err != nil {
		return err
	}
	if err := s.chain.load(s); err != nil {
		return err
	}
	if err := s.loadRaw(); err != nil {
		return err
	}
	s.joinChain()
	return nil
}

// joinChain carries the audit chain from its end among the packed entries to the newest. When there are fewer
// entries than the recorded end says, their numbers stay free, so that a verification says so for ever.
func (s *Store) joinChain() {
	next := s.active[auditLevel].First + uint64(s.active[auditLevel].Len())
	switch {
	case s.chain.n > next:
		s.conds.set(condCorrupt, auditLevel, fmt.Sprintf("the newest %d audit entries, from number %d on, are gone", s.chain.n-next, next))
		s.freeze(auditLevel, s.chain.n)
	case s.chain.n < next:
		for _, h := range append(slices.Clone(s.frozen[auditLevel]), s.active[auditLevel]) {
			if v := h.All(); v.Len() > 0 {
				_, tail := v.Rec(v.Len() - 1)
				copy(s.chain.hash[:], tail)
			}
		}
		s.chain.n = next
	}
}

// misc reads one value of the Misc key space; nil when it is not there.
func (s *Store) misc(name string) ([]byte, error) {
	v, closer, err := s.db.Get(keys.BytesKey(keys.Misc, []byte(name)))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer closer.Close()
	return append([]byte{}, v...), nil
}

func (s *Store) checkFormat() error {
	v, err := s.misc(miscFormat)
	if err != nil {
		return err
	}
	if v == nil {
		it, err := s.db.NewIter(nil)
		if err != nil {
			return err
		}
		empty := !it.First()
		if err := it.Close(); err != nil {
			return err
		}
		if s.opt.ReadOnly {
			return errs.New(errs.NotFound, "%s holds no log", s.opt.Dir).Do("give the --data-dir of the log plugin")
		}
		if !empty {
			return errs.New(errs.Corrupt, "%s holds a store that is not a log", s.opt.Dir).Do("give another --data-dir")
		}
		if err := s.db.Set(keys.BytesKey(keys.Misc, []byte(miscFormat)), binary.BigEndian.AppendUint32(nil, formatVersion), pebble.NoSync); err != nil {
			return err
		}
		return guard(s.db.Flush)
	}
	if len(v) != 4 {
		return errs.New(errs.Corrupt, "the format version in %s is malformed", s.opt.Dir).Do("restore the log from a backup")
	}
	if n := binary.BigEndian.Uint32(v); n != formatVersion {
		return errs.New(errs.Precondition, "the log in %s has format version %d, this program knows %d", s.opt.Dir, n, formatVersion).
			Because("FORMAT_NEWER").Do("use the version of the log plugin that wrote it, or a newer one")
	}
	return nil
}

// nextNumber is the number behind the largest of a dictionary.
func (s *Store) nextNumber(space byte) (uint32, error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{space}, UpperBound: []byte{space + 1}})
	if err != nil {
		return 0, err
	}
	next := uint32(1)
	if it.Last() {
		n, err := keys.ParseNumber(it.Key())
		if err != nil {
			_ = it.Close()
			return 0, err
		}
		next = n + 1
	}
	return next, it.Close()
}

// loadSegments reads the descriptions of all segments, and from each level's counter where its head begins.
func (s *Store) loadSegments() error {
	var next [levels]uint64
	for l := byte(1); l < levels; l++ {
		v, err := s.misc(fmt.Sprint(miscLevel, l))
		if err != nil {
			return err
		}
		if len(v) == 12 {
			s.nextSeg[l], next[l] = binary.BigEndian.Uint32(v), binary.BigEndian.Uint64(v[4:])
		}
		s.active[l] = head.New(l, next[l])
	}
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{keys.Segment}, UpperBound: []byte{keys.Segment + 1}})
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		l, id, err := keys.ParseSegment(it.Key())
		if err == nil && (l == 0 || l >= levels) {
			err = keys.ErrBad
		}
		var seg *segment
		if err == nil {
			seg, err = decodeSegment(l, id, it.Value())
		}
		if err != nil {
			s.conds.set(condCorrupt, l, fmt.Sprintf("a segment of level %d cannot be read: %v", l, err))
			continue
		}
		s.segs[l] = append(s.segs[l], seg)
	}
	if err := it.Close(); err != nil {
		// A damaged table hides the keys behind the damage from an iterator, not from single reads.
		s.conds.set(condCorrupt, 0, fmt.Sprintf("the table of segments is damaged: %v", err))
		s.probeSegments()
	}
	for l := range s.segs {
		var before *segment
		for _, seg := range s.segs[l] {
			seg.link(before)
			before = seg
		}
	}
	return nil
}

// probeSegments reads descriptions one by one, each with its copy beside the data as second source.
func (s *Store) probeSegments() {
	for l := byte(1); l < levels; l++ {
		s.segs[l] = nil
		for id := range s.nextSeg[l] {
			seg, err := s.readSegment(keys.SegmentPrefix(keys.Segment, l, id), l, id)
			if err != nil {
				seg, err = s.readSegment(keys.BlockKey(nil, l, id, copyBlock), l, id)
			}
			if err == nil {
				s.segs[l] = append(s.segs[l], seg)
			} else if !errors.Is(err, pebble.ErrNotFound) {
				s.conds.set(condCorrupt, l, fmt.Sprintf("segment %d of level %d cannot be read: %v", id, l, err))
			}
		}
	}
}

func (s *Store) readSegment(key []byte, l byte, id uint32) (*segment, error) {
	v, closer, err := s.db.Get(key)
	if err != nil {
		return nil, err
	}
	defer closer.Close()
	return decodeSegment(l, id, v)
}

// loadRaw fills the heads with what has not been packed.
func (s *Store) loadRaw() error {
	p := preparer{seed: s.seed, dict: s.objects}
	part := func(r rawlog.Part) error {
		l := r.Level
		if l == 0 || l >= levels {
			return fmt.Errorf("level %d", l)
		}
		bad := func(n uint64) {
			s.conds.set(condCorrupt, l, fmt.Sprintf("entry %d of level %s cannot be read", n, log.Level(l)))
		}
		tail := 0
		if l == auditLevel {
			tail = hashLen
		}
		b := r.Data
		for n := r.First; n < r.First+uint64(r.Count); n++ {
			size, k := binary.Uvarint(b)
			if k <= 0 || size > uint64(len(b)-k) || int(size) < tail {
				bad(n)
				return nil
			}
			e := b[k : k+int(size)]
			b = b[k+int(size):]
			next := s.active[l].First + uint64(s.active[l].Len())
			if n < next {
				continue // packed already, or written again after a failed write
			}
			if n > next {
				s.conds.set(condCorrupt, l, fmt.Sprintf("%d entries of level %s are missing before number %d", n-next, log.Level(l), n))
				s.freeze(l, n)
			}
			item, err := p.parse(e[:len(e)-tail])
			if err != nil {
				bad(n)
				continue
			}
			s.active[l].Add(&item, e[len(e)-tail:])
			s.active[l].Show(1)
			if s.active[l].Len() >= s.opt.SegmentRows {
				s.freeze(l, 0)
			}
			p.objs = p.objs[:0]
		}
		return nil
	}
	var damages []rawlog.Damage
	var err error
	s.raw, damages, err = rawlog.Open(s.opt.FS, s.opt.FS.PathJoin(s.opt.Dir, storeDir, rawDir), levels, s.opt.ReadOnly, part)
	for _, d := range damages {
		s.conds.set(condCorrupt, 0, "the log of entries not packed yet is damaged: "+d.String())
	}
	return err
}

// freeze hands a level's head to the sealer and begins a new one, at next or right behind. It is called
// before the goroutines run, or with mu held.
func (s *Store) freeze(l byte, next uint64) {
	h := s.active[l]
	if next == 0 {
		next = h.First + uint64(h.Len())
	}
	if h.Len() > 0 {
		s.frozen[l] = append(s.frozen[l], h)
	}
	s.active[l] = head.New(l, next)
}

// preparer makes items of encoded entries.
type preparer struct {
	seed maphash.Seed
	dict *dict.Objects
	objs []head.ObjectHash
	view rec.View
}

// parse reads an encoded entry; the item refers to b, and to objs until the next call of reset.
func (p *preparer) parse(b []byte) (head.Item, error) {
	if err := rec.Parse(b, &p.view); err != nil {
		return head.Item{}, err
	}
	v := &p.view
	it := head.Item{Rec: b, Time: v.Time, ID: v.ID, Level: byte(v.Level), IDHash: maphash.Bytes(p.seed, v.ID)}
	it.MS, it.A, it.B, it.V7 = rec.V7(v.ID)
	from := len(p.objs)
	for rest, n := v.RawObjects(), 0; n < v.NObjects; n++ {
		var o []byte
		o, rest = rec.NextObject(rest)
		p.objs = append(p.objs, p.dict.Hash(o))
	}
	it.Objects = p.objs[from:len(p.objs):len(p.objs)]
	return it, nil
}
