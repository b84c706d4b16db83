package engine

import (
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// tampered is an audit entry with the hash that is stored beside it.
type tampered struct {
	entry log.Entry
	hash  []byte
}

// rewriteSegment replaces a segment's entries; the entries must be in the order of arrival, which is that of
// time here. Numbers follow from places.
func rewriteSegment(t *testing.T, s *Store, seg *segment, change func([]tampered) []tampered) {
	t.Helper()
	c, err := s.newCursor(seg, -1<<63, 1<<63-1, true)
	if err != nil {
		t.Fatal(err)
	}
	var rows []tampered
	for c.next() {
		e, err := c.entry()
		if err != nil {
			t.Fatal(err)
		}
		h, err := c.blk.Hash(c.at)
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, tampered{e, append([]byte(nil), h...)})
	}
	c.close()
	rows = change(rows)
	h := head.New(seg.level, seg.first)
	for _, r := range rows {
		p := preparer{seed: s.seed, dict: s.objects}
		it, err := p.parse(rec.Append(nil, &r.entry))
		if err != nil {
			t.Fatal(err)
		}
		h.Add(&it, r.hash)
	}
	p, err := newPacker(s)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	v := h.All()
	again := &segment{level: seg.level, id: seg.id, rows: v.Len(), first: seg.first}
	b := s.db.NewBatch()
	if err := p.fill(b, &v, again); err != nil {
		t.Fatal(err)
	}
	if err := s.objects.Flush(b); err != nil {
		t.Fatal(err)
	}
	if err := s.shapes.Flush(b); err != nil {
		t.Fatal(err)
	}
	if err := s.db.Apply(b, pebble.NoSync); err != nil {
		t.Fatal(err)
	}
	if err := s.db.Flush(); err != nil {
		t.Fatal(err)
	}
	s.objects.Done()
	s.shapes.Done()
}
