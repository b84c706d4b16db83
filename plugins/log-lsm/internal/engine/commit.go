package engine

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rawlog"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/steadyfs"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// maxGroup bounds the entries of one commit. More only makes the waiting longer: at this size the cost of a
// commit is that of its bytes.
const maxGroup = 16384

// maxGroupBytes bounds one commit in bytes, unless a single append is larger.
const maxGroupBytes = 2 << 20

// request is an append under way.
type request struct {
	items []head.Item
	bytes int
	done  chan error
}

// group is one commit.
type group struct {
	reqs  []*request
	total int // entries written
	added [levels]int
	heads [levels]*head.Head
	err   error
}

// Append makes entries durable, all or none.
func (s *Store) Append(ctx context.Context, entries []log.Entry) error {
	if len(entries) == 0 {
		return nil
	}
	if len(entries) > log.MaxBatch {
		return errs.Field("entries", "send them in several calls", "%d entries in one call, the limit is %d", len(entries), log.MaxBatch)
	}
	size := 0
	for i := range entries {
		e := &entries[i]
		if err := rec.Check(e, func() string { return fmt.Sprintf("entries[%d]", i) }); err != nil {
			return err
		}
		size += 32 + len(e.ID) + len(e.Component) + len(e.Message)
		for _, o := range e.Objects {
			size += len(o) + 1
		}
		for k, v := range e.Labels {
			size += len(k) + len(v) + 2
		}
	}
	if s.full.is() || s.low.Load() {
		return s.noSpace()
	}
	r := &request{items: make([]head.Item, 0, len(entries)), done: make(chan error, 1)}
	p := preparer{seed: s.seed, dict: s.objects, objs: make([]head.ObjectHash, 0, 2*len(entries))}
	buf := make([]byte, 0, size)
	for i := range entries {
		at := len(buf)
		buf = rec.Append(buf, &entries[i])
		it, err := p.parse(buf[at:len(buf):len(buf)])
		if err != nil {
			return errs.Wrap(errs.Internal, err, "an entry just encoded cannot be read")
		}
		r.items = append(r.items, it)
	}
	r.bytes = len(buf)
	select {
	case s.reqs <- r:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.done:
		return errClosed()
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stopped:
		select {
		case err := <-r.done:
			return err
		default:
			return errClosed()
		}
	case <-s.full.signal():
		// What was begun may still be finished when there is space; a repeat is recognised by its ids.
		return s.noSpace()
	}
}

// commitLoop is the committer.
func (s *Store) commitLoop() {
	defer s.wg.Done()
	defer close(s.synced)
	for {
		select {
		case r := <-s.reqs:
			g := s.collect(r)
			s.write(g)
			s.synced <- g
		case <-s.trims:
			s.trim()
		case <-s.done:
			for {
				select {
				case r := <-s.reqs:
					r.done <- errClosed()
				default:
					return
				}
			}
		}
	}
}

// collect takes what waits.
func (s *Store) collect(r *request) *group {
	g := &group{reqs: []*request{r}}
	n, size := len(r.items), r.bytes
	for n < maxGroup && size < maxGroupBytes {
		select {
		case r := <-s.reqs:
			g.reqs = append(g.reqs, r)
			n += len(r.items)
			size += r.bytes
		default:
			return g
		}
	}
	return g
}

// write leaves out what is there already, writes the rest to the log without waiting for the disk, and puts
// the entries into the heads, not visible yet.
func (s *Store) write(g *group) {
	if s.full.is() || s.low.Load() {
		g.err = s.noSpace()
		return
	}
	if g.err = s.broken.get(); g.err != nil {
		return
	}
	if g.err = s.waitRoom(); g.err != nil {
		return
	}
	var items [levels][]*head.Item
	total := 0
	for _, r := range g.reqs {
		total += len(r.items)
	}
	s.groupIDs.reset(total)
	have := s.stored()
	for _, r := range g.reqs {
		for i := range r.items {
			it := &r.items[i]
			if s.groupIDs.twice(it) {
				s.stats.duplicates.Add(1)
				continue
			}
			has, err := have.has(it)
			if err != nil {
				g.err = err
				return
			}
			if has {
				s.stats.duplicates.Add(1)
				continue
			}
			items[it.Level] = append(items[it.Level], it)
		}
	}
	chain := s.chain
	var tails []byte
	parts := make([]rawlog.Part, 0, levels)
	for l := byte(1); l < levels; l++ {
		if len(items[l]) == 0 {
			continue
		}
		size := 0
		for _, it := range items[l] {
			size += len(it.Rec) + hashLen + 5
		}
		v := make([]byte, 0, size)
		for _, it := range items[l] {
			if l == auditLevel {
				chain.add(it.Rec)
				tails = append(tails, chain.hash[:]...)
				v = binary.AppendUvarint(v, uint64(len(it.Rec)+hashLen))
				v = append(append(v, it.Rec...), chain.hash[:]...)
				continue
			}
			v = binary.AppendUvarint(v, uint64(len(it.Rec)))
			v = append(v, it.Rec...)
		}
		g.total += len(items[l])
		parts = append(parts, rawlog.Part{Level: l, First: s.active[l].First + uint64(s.active[l].Len()), Count: len(items[l]), Data: v})
	}
	if g.total == 0 {
		return
	}
	if err := s.raw.Append(parts); err != nil {
		g.total = 0
		g.err = s.writeError(err)
		return
	}
	if s.rawFull {
		s.rawFull = false
		s.conds.clear(condFull, auditLevel)
	}
	s.chain = chain
	s.stats.groups.Add(1)
	s.stats.appended.Add(uint64(g.total))
	s.mu.Lock()
	for l := byte(1); l < levels; l++ {
		// Rows have 16 bits in the index: what would go beyond begins a new head. A group is smaller than a head.
		if s.active[l].Len()+len(items[l]) > maxRows {
			s.freeze(l, 0)
			s.kickSealer()
		}
		h := s.active[l]
		for i, it := range items[l] {
			var tail []byte
			if l == auditLevel {
				tail = tails[i*hashLen:][:hashLen]
			}
			h.Add(it, tail)
		}
		g.heads[l], g.added[l] = h, len(items[l])
	}
	s.freezeFullLocked()
	s.mu.Unlock()
}

// groupIDs finds ids that stand twice in one group: open addressing over the items taken so far.
type groupIDs struct {
	slots []uint32 // index+1 into items
	items []*head.Item
}

func (d *groupIDs) reset(n int) {
	size := 64
	for size < 2*n {
		size *= 2
	}
	if cap(d.slots) < size {
		d.slots = make([]uint32, size)
	}
	d.slots = d.slots[:size]
	clear(d.slots)
	clear(d.items)
	d.items = d.items[:0]
}

// twice says whether an item of this id has been given before; if not, it is remembered.
func (d *groupIDs) twice(it *head.Item) bool {
	mask := uint64(len(d.slots) - 1)
	i := it.IDHash & mask
	for ; d.slots[i] != 0; i = (i + 1) & mask {
		if o := d.items[d.slots[i]-1]; o.IDHash == it.IDHash && bytes.Equal(o.ID, it.ID) {
			return true
		}
	}
	d.items = append(d.items, it)
	d.slots[i] = uint32(len(d.items))
	return false
}

// waitRoom waits until the sealer has kept up.
func (s *Store) waitRoom() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.closed {
		n, size := 0, 0
		for l := range s.frozen {
			n += len(s.frozen[l])
			for _, h := range s.frozen[l] {
				size += h.Bytes()
			}
		}
		switch {
		case n == 0 || size < s.opt.HeadBytes && n < 2*levels:
			return nil
		case s.sealErr != nil:
			return errs.Wrap(errs.Unavailable, s.sealErr, "entries cannot be packed, and memory for more is used up")
		}
		s.roomy.Wait()
	}
	return errClosed()
}

// freezeFullLocked hands full heads to the sealer; when all together are too large, the largest.
func (s *Store) freezeFullLocked() {
	total, largest := 0, byte(0)
	for l := byte(1); l < levels; l++ {
		if s.active[l].Len() >= s.opt.SegmentRows {
			s.freeze(l, 0)
			s.kickSealer()
			continue
		}
		b := s.active[l].Bytes()
		total += b
		if largest == 0 || b > s.active[largest].Bytes() {
			largest = l
		}
	}
	if total >= s.opt.HeadBytes && s.active[largest].Len() > 0 {
		s.freeze(largest, 0)
		s.kickSealer()
	}
	// A level with few entries must not keep the log of all.
	if old := s.raw.Oldest(s.opt.RawBytes); old != nil {
		for l := byte(1); l < levels; l++ {
			if s.active[l].Len() > 0 && s.active[l].First < old[l] {
				s.freeze(l, 0)
				s.kickSealer()
			}
		}
	}
}

func (s *Store) kickSealer() {
	select {
	case s.sealing <- struct{}{}:
	default:
	}
}

// syncLoop makes groups durable, shows their entries and answers. All groups that wait share one sync.
func (s *Store) syncLoop() {
	defer s.wg.Done()
	defer close(s.stopped)
	for g := range s.synced {
		groups := []*group{g}
	more:
		for {
			select {
			case g, ok := <-s.synced:
				if !ok {
					break more
				}
				groups = append(groups, g)
			default:
				break more
			}
		}
		total := 0
		for _, g := range groups {
			total += g.total
		}
		var err error
		if total > 0 {
			err = s.sync()
		}
		for _, g := range groups {
			if g.err == nil {
				g.err = err
			}
			if g.err == nil && g.total > 0 {
				s.show(g)
			}
			for _, r := range g.reqs {
				r.done <- g.err
			}
		}
	}
}

// sync makes the log durable. When that fails nobody knows what is on disk: what was written since the last
// sync is in the heads with numbers that the chain and later entries build on, so the store takes no more
// until it is opened again, which reads what there is.
func (s *Store) sync() error {
	if err := s.broken.get(); err != nil {
		return err
	}
	err := s.raw.Sync()
	if err == nil {
		return nil
	}
	e := &errs.Error{Op: "log.Append", Kind: errs.Unavailable, Message: "the disk did not make entries durable; the log takes no more until it is started again", Err: err,
		Remedy: "check the disk of the log's data directory, then restart the log plugin"}
	if steadyfs.NoSpace(err) {
		e.Kind = errs.Exhausted
	}
	s.conds.set(condBroken, 0, e.Message+": "+err.Error())
	s.broken.set(e)
	return e
}

// writeError is the answer to an append that could not be written, and is as if it had not been tried.
func (s *Store) writeError(err error) error {
	if steadyfs.NoSpace(err) {
		s.conds.set(condFull, auditLevel, "the disk of the log is full; entries are refused, reading goes on")
		s.rawFull = true
		return s.noSpace()
	}
	return errs.Wrap(kind(err), err, "write to the log")
}

// sticky is an error that stays.
type sticky struct {
	mu  sync.Mutex
	err error
}

func (s *sticky) get() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *sticky) set(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

func (s *Store) show(g *group) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range g.heads {
		if g.added[l] > 0 {
			g.heads[l].Show(g.added[l])
		}
	}
	for f := range s.follows {
		f.wake()
	}
	// A frozen head may have become all durable.
	for l := range s.frozen {
		if len(s.frozen[l]) > 0 {
			s.kickSealer()
			break
		}
	}
}
