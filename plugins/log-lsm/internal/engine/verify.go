package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// maxBreaks bounds a report: who has replaced everything is told by the first thousand.
const maxBreaks = 1000

// chainLink is an audit entry with its place in the chain.
type chainLink struct {
	n    uint64
	time int64
	id   string
	rec  []byte // canonical encoding
	hash []byte // as stored
}

// Verify walks the audit chain in the order of arrival. With bounds of time it reports only breaks within
// them; it walks everything all the same, for the head.
func (s *Store) Verify(ctx context.Context, req log.VerifyRequest) (log.VerifyReport, error) {
	v := &verifier{s: s, ctx: ctx, lo: -1 << 63, hi: 1<<63 - 1}
	if !req.Since.IsZero() {
		v.lo = nanos(req.Since)
	}
	if !req.Until.IsZero() {
		v.hi = nanos(req.Until) - 1
	}
	s.life.RLock()
	defer s.life.RUnlock()
	select {
	case <-s.done:
		return log.VerifyReport{}, errClosed()
	default:
	}
	if err := v.run(); err != nil {
		return log.VerifyReport{}, err
	}
	return v.report, nil
}

type verifier struct {
	s      *Store
	ctx    context.Context
	lo, hi int64
	report log.VerifyReport
	state  chainState
	last   chainLink // the newest link seen
	any    bool
	recent []passed // the newest links that were walked, at most maxRecent
}

// passed is a link that has been walked.
type passed struct {
	id     string
	time   int64
	n      uint64
	before [hashLen]byte // the chain in front of it
	noted  int           // its place in the report's breaks; -1: none
}

// maxRecent bounds how many entries in a row are recognised as inserted; of more, the first are called edited.
const maxRecent = 256

func (v *verifier) run() error {
	s := v.s
	// The recorded end is that of the packed entries; what is in memory comes behind it.
	raw, err := s.misc(miscChain)
	if err != nil {
		return s.damaged(auditLevel, err)
	}
	end, err := decodeChain(raw)
	if err != nil {
		return errs.Wrap(errs.Corrupt, err, "verify the audit chain")
	}
	sn := s.snapshot()
	if raw, err = s.misc(miscAnchor); err != nil {
		return s.damaged(auditLevel, err)
	}
	if v.state, err = decodeChain(raw); err != nil {
		return errs.Wrap(errs.Corrupt, err, "verify the audit chain")
	}
	for _, seg := range sn.segs[auditLevel] {
		links, err := v.segment(seg)
		if err != nil {
			return err
		}
		v.walk(links)
		if v.any && v.state.n == end.n && v.state.hash != end.hash {
			v.note(v.last.id, v.last.time, "edited", "the newest packed entry does not agree with the recorded end of the chain")
		}
		if err := v.ctx.Err(); err != nil {
			return err
		}
	}
	for i := range sn.views {
		h := &sn.views[i]
		if h.Level != auditLevel {
			continue
		}
		links := make([]chainLink, 0, h.Len())
		for row := range h.Len() {
			r, tail := h.Rec(row)
			links = append(links, chainLink{n: h.First + uint64(row), time: h.Times[row], id: string(h.ID(row)), rec: r, hash: tail})
		}
		v.walk(links)
	}
	if v.state.n < end.n {
		v.note("", v.last.time, "removed", fmt.Sprintf("the newest %d audit entries, from number %d on, are gone", end.n-v.state.n, v.state.n))
	}
	v.report.Head = hex.EncodeToString(v.state.hash[:])
	return nil
}

// segment reads the links of a segment in the order of arrival.
func (v *verifier) segment(seg *segment) ([]chainLink, error) {
	c, err := v.s.newCursor(seg, seg.minTime, seg.maxTime, true)
	if err != nil {
		return nil, err
	}
	defer c.close()
	links := make([]chainLink, 0, seg.rows)
	for c.next() {
		e, err := c.entry()
		if err != nil {
			c.fail(err)
			continue
		}
		h, err := c.blk.Hash(c.at)
		if err != nil {
			c.fail(err)
			continue
		}
		links = append(links, chainLink{n: seg.first + uint64(c.blk.Order(c.at)), time: c.time, id: e.ID, rec: rec.Append(nil, &e), hash: bytes.Clone(h)})
	}
	if c.err != nil {
		v.note("", seg.minTime, "removed", fmt.Sprintf("%d parts of the entries up to %s cannot be read: %v", c.damaged, time.Unix(0, seg.maxTime).UTC().Format(time.RFC3339), c.err))
	}
	slices.SortFunc(links, func(a, b chainLink) int {
		switch {
		case a.n < b.n:
			return -1
		case a.n > b.n:
			return 1
		}
		return 0
	})
	return links, nil
}

// walk checks links, which are in order.
func (v *verifier) walk(links []chainLink) {
	for i := range links {
		l := &links[i]
		v.any = true
		switch {
		case l.n < v.state.n:
			v.note(l.id, l.time, "inserted", fmt.Sprintf("an entry of number %d, which another has", l.n))
			continue
		case l.n > v.state.n:
			v.note(l.id, l.time, "removed", fmt.Sprintf("%d entries before this one, from number %d on, are gone", l.n-v.state.n, v.state.n))
			// What the chain was before this entry is lost with them; it is taken up again here.
			v.state = chainState{n: l.n + 1}
			copy(v.state.hash[:], l.hash)
			v.report.Checked++
			v.last = *l
			v.recent = v.recent[:0]
			continue
		}
		p := passed{id: l.id, time: l.time, n: l.n, before: v.state.hash, noted: -1}
		if !l.follows(&v.state.hash) && !v.insertedBefore(l) {
			p.noted = v.note(l.id, l.time, "edited", fmt.Sprintf("entry number %d is not what the chain was made over: it was changed, or what stood right before it was removed", l.n))
		}
		if len(v.recent) == maxRecent {
			v.recent = slices.Delete(v.recent, 0, maxRecent/2)
		}
		v.recent = append(v.recent, p)
		v.state.n++
		copy(v.state.hash[:], l.hash)
		v.report.Checked++
		v.last = *l
	}
}

// follows says whether the hash of a link is that of its entry behind this one.
func (l *chainLink) follows(before *[hashLen]byte) bool {
	h := sha256.New()
	h.Write(before[:])
	h.Write(l.rec)
	return bytes.Equal(h.Sum(nil), l.hash)
}

// insertedBefore says whether a link that does not follow the one before it follows an earlier one: then what
// stands between was put there later, and is named.
func (v *verifier) insertedBefore(l *chainLink) bool {
	if len(v.report.Breaks) >= maxBreaks {
		return false
	}
	for i := len(v.recent) - 1; i >= 0; i-- {
		if !l.follows(&v.recent[i].before) {
			continue
		}
		for _, p := range v.recent[i:] {
			detail := fmt.Sprintf("entry number %d was not there when %s was appended", p.n, l.id)
			if p.noted >= 0 {
				b := &v.report.Breaks[p.noted]
				b.What, b.Detail = "inserted", detail
				continue
			}
			v.note(p.id, p.time, "inserted", detail)
		}
		v.recent = v.recent[:0]
		return true
	}
	return false
}

// note adds to the report and says at which place; -1: it is not reported.
func (v *verifier) note(id string, t int64, what, detail string) int {
	if t < v.lo || t > v.hi || len(v.report.Breaks) >= maxBreaks {
		return -1
	}
	v.report.Breaks = append(v.report.Breaks, log.VerifyBreak{EntryID: id, Time: time.Unix(0, t).UTC(), What: what, Detail: detail})
	return len(v.report.Breaks) - 1
}
