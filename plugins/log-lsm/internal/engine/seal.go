package engine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/bits"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/block"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/idset"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/posting"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
)

// copyBlock is the number under which a copy of the segment's description stands beside its blocks.
const copyBlock = 0xFFFF

// sealLoop packs frozen heads.
func (s *Store) sealLoop() {
	defer s.wg.Done()
	p, err := newPacker(s)
	if err != nil {
		s.conds.set(condEngine, 0, fmt.Sprintf("packing cannot begin: %v", err))
		return
	}
	defer p.close()
	defer s.lastFlush()
	for {
		select {
		case <-s.done:
			return
		case <-s.sealing:
		}
		for {
			h := s.nextFrozen()
			if h == nil {
				break
			}
			s.sealMu.Lock()
			err := p.seal(h)
			s.sealMu.Unlock()
			s.mu.Lock()
			s.sealErr = err
			s.roomy.Broadcast()
			s.mu.Unlock()
			if err != nil {
				// The raw entries stay, in the log and in memory; careLoop wakes us to try again.
				s.conds.set(condEngine, h.Level, fmt.Sprintf("entries of level %d are not packed: %v", h.Level, err))
				s.log.Error("packing failed", "level", h.Level, "error", err)
				break
			}
			s.conds.clear(condEngine, h.Level)
			select {
			case <-s.done:
				return
			default:
			}
		}
	}
}

// lastFlush makes durable what is packed, so that the next start need not pack it again.
func (s *Store) lastFlush() {
	s.sealMu.Lock()
	defer s.sealMu.Unlock()
	if s.unflushed > 0 {
		if err := s.flush(); err != nil {
			s.log.Warn("what was packed last is packed again at the next start", "error", err)
		}
	}
}

// nextFrozen is the frozen head with the most rows of those that are all durable.
func (s *Store) nextFrozen() *head.Head {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var best *head.Head
	for l := range s.frozen {
		if len(s.frozen[l]) == 0 {
			continue
		}
		if h := s.frozen[l][0]; h.Shown() == h.Len() && (best == nil || h.Len() > best.Len()) {
			best = h
		}
	}
	return best
}

// packer turns a head into a segment. Its buffers are used again.
type packer struct {
	s   *Store
	enc *block.Encoder

	perm   []uint32
	view   rec.View
	objs   []uint32
	pairs  []uint64 // object<<16 | row
	pairs2 []uint64
	ms     []uint64
	ids    [filterPages][]uint64
	times  []uint64
	post   posting.Builder
	rows   []uint16
	buf    []byte
	key    []byte
}

func newPacker(s *Store) (*packer, error) {
	enc, err := block.NewEncoder(s.shapes)
	if err != nil {
		return nil, err
	}
	return &packer{s: s, enc: enc}, nil
}

func (p *packer) close() { p.enc.Close() }

// order sorts the rows of a view by time and id.
func order(v *head.View, perm []uint32) []uint32 {
	perm = perm[:0]
	for i := range v.Len() {
		perm = append(perm, uint32(i))
	}
	slices.SortFunc(perm, func(a, b uint32) int { return compareRows(v, int(a), int(b)) })
	return perm
}

func compareRows(v *head.View, a, b int) int {
	if v.Times[a] != v.Times[b] {
		if v.Times[a] < v.Times[b] {
			return -1
		}
		return 1
	}
	return bytes.Compare(v.ID(a), v.ID(b))
}

// seal writes a head as a segment and puts the segment in its place.
func (p *packer) seal(h *head.Head) error {
	s := p.s
	v := h.All()
	seg := &segment{level: h.Level, id: s.nextSeg[h.Level], rows: v.Len(), first: h.First}
	if seg.id == 1<<32-1 {
		return errors.New("no segment number is left")
	}
	b := s.db.NewBatchWithSize(v.Len() * 64)
	defer b.Close()
	if err := p.fill(b, &v, seg); err != nil {
		return err
	}
	err := errors.Join(
		s.objects.Flush(b),
		s.shapes.Flush(b),
		b.Set(keys.BytesKey(keys.Misc, fmt.Append(nil, miscLevel, h.Level)), levelCounter(seg.id+1, seg.end()), nil),
	)
	if err != nil {
		return err
	}
	if h.Level == auditLevel {
		st := chainState{n: seg.end()}
		_, tail := v.Rec(v.Len() - 1)
		copy(st.hash[:], tail)
		if err := b.Set(keys.BytesKey(keys.Misc, []byte(miscChain)), st.encode(), nil); err != nil {
			return err
		}
	}
	// Durable only with the next flush; until then the raw log keeps the entries.
	if err := guard(func() error { return s.db.Apply(b, pebble.NoSync) }); err != nil {
		return err
	}
	s.objects.Done()
	s.shapes.Done()
	s.stats.seals.Add(1)
	s.install(h, seg)
	s.unflushed += seg.bytes
	if s.unflushed >= flushBytes || s.raw.Size() >= uint64(s.opt.RawBytes)*3/4 {
		return s.flush()
	}
	return nil
}

// flushBytes is how much is packed between two flushes: the size of new tables, and with it how often they
// are compacted.
const flushBytes = 8 << 20

// flush makes durable what is packed, and lets go of the raw log's files whose entries all are. The caller
// holds sealMu.
func (s *Store) flush() error {
	packed := make([]uint64, levels)
	s.mu.RLock()
	for l := 1; l < levels; l++ {
		packed[l] = s.active[l].First
		if len(s.frozen[l]) > 0 {
			packed[l] = s.frozen[l][0].First
		}
	}
	s.mu.RUnlock()
	if err := guard(s.db.Flush); err != nil {
		return err
	}
	s.unflushed = 0
	if err := s.raw.Release(packed); err != nil {
		s.log.Warn("files of the raw log are not removed; the next start does it", "error", err)
	}
	return nil
}

// install puts a segment in the place of its head.
func (s *Store) install(h *head.Head, seg *segment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextSeg[h.Level]++
	table := s.segs[h.Level]
	var before *segment
	if len(table) > 0 {
		before = table[len(table)-1]
	}
	seg.link(before)
	s.segs[h.Level] = append(slices.Clip(slices.Clone(table)), seg)
	s.frozen[h.Level] = slices.Delete(slices.Clone(s.frozen[h.Level]), 0, 1)
	s.roomy.Broadcast()
}

func levelCounter(nextSeg uint32, nextFirst uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, nextSeg), nextFirst)
}

// fill writes all values of a segment into b and completes its description.
func (p *packer) fill(b *pebble.Batch, v *head.View, seg *segment) error {
	if v.Len() > maxRows {
		return fmt.Errorf("%d entries are too many for a segment", v.Len())
	}
	p.perm = order(v, p.perm)
	p.pairs, p.ms, p.times = p.pairs[:0], p.ms[:0], p.times[:0]
	for i := range p.ids {
		p.ids[i] = p.ids[i][:0]
	}
	seg.minTime, seg.maxTime = v.Times[p.perm[0]], v.Times[p.perm[len(p.perm)-1]]
	for row, at := range p.perm {
		r, tail := v.Rec(int(at))
		if err := rec.Parse(r, &p.view); err != nil {
			return err
		}
		if p.enc.Len() == 0 {
			p.times = append(p.times, uint64(p.view.Time)^1<<63)
		}
		if err := p.numbers(v.Objects(int(at)), row); err != nil {
			return err
		}
		if ms, ia, ib, ok := rec.V7(p.view.ID); ok {
			p.ms = append(p.ms, ms)
			hash := idset.Hash(ms, ia, ib)
			p.ids[pageOf(hash)] = append(p.ids[pageOf(hash)], inPage(hash))
		} else if err := b.Set(keys.BytesKey(keys.OtherID, p.view.ID), binary.BigEndian.AppendUint32([]byte{seg.level}, seg.id), nil); err != nil {
			return err
		}
		if err := p.enc.Add(&p.view, at, p.objs, tail); err != nil {
			return err
		}
		if p.enc.Len() == block.Rows || row == len(p.perm)-1 {
			first := row / block.Rows * block.Rows
			p.buf = p.enc.Encode(p.buf[:0], first)
			if err := p.set(b, seg, keys.BlockKey(p.key[:0], seg.level, seg.id, uint16(row/block.Rows))); err != nil {
				return err
			}
			// Packing takes a processor for a tenth of a second; appends pass through several goroutines and would
			// wait for the end of a time slice at each.
			runtime.Gosched()
		}
	}
	seg.nV7 = len(p.ms)
	seg.ranges = makeRanges(p.ms)
	for page := range p.ids {
		if len(p.ids[page]) == 0 {
			continue
		}
		p.buf = append(p.buf[:0], idset.Build(p.ids[page])...)
		if err := p.set(b, seg, keys.FilterKey(seg.level, seg.id, byte(page))); err != nil {
			return err
		}
	}
	p.buf = bits.Append(p.buf[:0], p.times)
	if err := p.set(b, seg, keys.SegmentPrefix(keys.Times, seg.level, seg.id)); err != nil {
		return err
	}
	if err := p.postings(b, seg); err != nil {
		return err
	}
	d := seg.encode()
	return errors.Join(
		b.Set(keys.SegmentPrefix(keys.Segment, seg.level, seg.id), d, nil),
		b.Set(keys.BlockKey(nil, seg.level, seg.id, copyBlock), d, nil))
}

// set writes p.buf and counts it.
func (p *packer) set(b *pebble.Batch, seg *segment, key []byte) error {
	p.key = key
	seg.bytes += uint64(len(key) + len(p.buf))
	return b.Set(key, p.buf, nil)
}

// numbers sets p.objs for the entry in p.view and notes its postings.
func (p *packer) numbers(hashes []head.ObjectHash, row int) error {
	p.objs = p.s.objects.Known(p.objs[:0], hashes)
	rest := p.view.RawObjects()
	for i := range p.objs {
		var o []byte
		o, rest = rec.NextObject(rest)
		if p.objs[i] == 0 {
			var err error
			if p.objs[i], err = p.s.objects.Intern(o); err != nil {
				return err
			}
		}
		p.pairs = append(p.pairs, uint64(p.objs[i])<<16|uint64(row))
	}
	return nil
}

// postings writes one page for each group of objects.
func (p *packer) postings(b *pebble.Batch, seg *segment) error {
	p.sortPairs()
	for i := 0; i < len(p.pairs); {
		group := uint32(p.pairs[i] >> 16 >> keys.GroupShift)
		p.post.Reset()
		for i < len(p.pairs) && uint32(p.pairs[i]>>16>>keys.GroupShift) == group {
			num := p.pairs[i] >> 16
			p.rows = p.rows[:0]
			for ; i < len(p.pairs) && p.pairs[i]>>16 == num; i++ {
				p.rows = append(p.rows, uint16(p.pairs[i]))
			}
			if err := p.post.Add(uint32(num), p.rows); err != nil {
				return fmt.Errorf("index of object %d: %w", num, err)
			}
		}
		p.buf = p.post.Page(p.buf[:0])
		if group&15 == 0 {
			runtime.Gosched()
		}
		if err := p.set(b, seg, keys.PostingKey(p.key[:0], seg.level, seg.id, group)); err != nil {
			return err
		}
	}
	return nil
}

// sortPairs sorts by object; rows are in order already, and the sort (radix, 11 bits a pass) is stable.
func (p *packer) sortPairs() {
	top := uint64(0)
	for _, x := range p.pairs {
		top = max(top, x>>16)
	}
	if cap(p.pairs2) < len(p.pairs) {
		p.pairs2 = make([]uint64, len(p.pairs), cap(p.pairs))
	}
	from, to := p.pairs, p.pairs2[:len(p.pairs)]
	for shift := uint(16); shift == 16 || top>>(shift-16) > 0; shift += 11 {
		var count [2049]int
		for _, x := range from {
			count[x>>shift&2047+1]++
		}
		for i := 1; i < len(count); i++ {
			count[i] += count[i-1]
		}
		for _, x := range from {
			d := x >> shift & 2047
			to[count[d]] = x
			count[d]++
		}
		from, to = to, from
	}
	p.pairs, p.pairs2 = from, to[:cap(to)]
}
