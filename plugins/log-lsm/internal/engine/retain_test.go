package engine

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/sdk/log"
)

// clock is a time that tests set.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func TestRetentionByAge(t *testing.T) {
	fs := vfs.NewMem()
	o := testOptions(fs)
	c := &clock{time.Unix(1_700_000_000, 0)}
	o.Now = c.now
	o.SegmentRows = 50
	o.Retention.Age = map[log.Level]time.Duration{log.LevelDebug: time.Hour, log.LevelAudit: 100 * time.Hour}
	s := openTest(t, o)
	add := func(n int, level log.Level, at time.Time, obj string) {
		var b []log.Entry
		for i := range n {
			e := entry(i, level, obj)
			e.Time = at.Add(time.Duration(i) * time.Millisecond)
			b = append(b, e)
		}
		if err := s.Append(context.Background(), b); err != nil {
			t.Fatal(err)
		}
	}
	add(500, log.LevelDebug, c.t, "old")
	add(500, log.LevelAudit, c.t, "vm-1")
	add(500, log.LevelInfo, c.t, "vm-1")
	c.t = c.t.Add(2 * time.Hour)
	add(500, log.LevelDebug, c.t, "new")
	waitPacked(t, s)
	if err := s.Retain(); err != nil {
		t.Fatal(err)
	}
	count := func(l log.Level) int { return len(ask(t, s, log.Query{Levels: []log.Level{l}})) }
	if d, a, i := count(log.LevelDebug), count(log.LevelAudit), count(log.LevelInfo); d != 500 || a != 500 || i != 500 {
		t.Fatalf("debug %d audit %d info %d", d, a, i)
	}
	if n := len(ask(t, s, log.Query{Objects: []string{"old"}})); n != 0 {
		t.Fatalf("%d entries of what is gone", n)
	}
	if _, ok, err := s.objects.Find([]byte("old")); ok || err != nil {
		t.Fatal("the object is still in the dictionary", err)
	}
	checkClean(t, s)
	// An object that comes back gets another number.
	add(60, log.LevelInfo, c.t, "old")
	waitPacked(t, s)
	if n := len(ask(t, s, log.Query{Objects: []string{"old"}})); n != 60 {
		t.Fatalf("%d entries", n)
	}
	// The chain is whole although its oldest part is gone.
	c.t = c.t.Add(200 * time.Hour)
	add(75, log.LevelAudit, c.t, "vm-1")
	waitPacked(t, s)
	if err := s.Retain(); err != nil {
		t.Fatal(err)
	}
	rep, err := s.Verify(context.Background(), log.VerifyRequest{})
	if err != nil || len(rep.Breaks) != 0 || rep.Checked < 75 || rep.Checked > 130 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

func TestRetentionBySizeGivesSpaceBack(t *testing.T) {
	o := Options{Dir: t.TempDir(), SegmentRows: 500, PollDisk: time.Hour, Retention: Retention{Every: time.Hour, Size: 300 << 10}, CacheSize: 8 << 20}
	s := openTest(t, o)
	fill(t, s, 0, 2000, log.LevelAudit, "vm-1")
	for i := range 10 {
		fill(t, s, 2000+3000*i, 3000, log.LevelDebug, fmt.Sprintf("vm-%d", i))
	}
	waitPacked(t, s)
	s.sealMu.Lock()
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	s.sealMu.Unlock()
	before := s.db.Metrics().Total().TablesSize
	if err := s.Retain(); err != nil {
		t.Fatal(err)
	}
	after := s.db.Metrics().Total().TablesSize
	if after >= before || after > 400<<10 {
		t.Fatalf("tables have %d bytes, had %d; the limit is %d and what the tables themselves take", after, before, 300<<10)
	}
	if n := len(ask(t, s, log.Query{Levels: []log.Level{log.LevelAudit}})); n != 2000 {
		t.Fatalf("%d audit entries are left of 2,000, though debug entries could go", n)
	}
	if n := len(ask(t, s, log.Query{NewestFirst: true, Limit: 1, MaxLevel: log.LevelDebug})); n != 1 {
		t.Fatal("the newest are gone")
	}
}

// TestEpochsGo shows that postings of whole epochs are deleted with their segments.
func TestEpochsGo(t *testing.T) {
	o := testOptions(vfs.NewMem())
	o.SegmentRows = 2
	c := &clock{time.Unix(1_700_000_000, 0)}
	o.Now = c.now
	o.Retention.Age = map[log.Level]time.Duration{log.LevelInfo: time.Hour}
	s := openTest(t, o)
	fill(t, s, 0, 200, log.LevelInfo, "vm-1")
	waitPacked(t, s)
	c.t = c.t.Add(100 * time.Hour)
	if err := s.Retain(); err != nil {
		t.Fatal(err)
	}
	n := 0
	ck := &checker{s: s}
	ck.each([]byte{keys.Posting}, func(_, _ []byte) { n++ })
	if n >= 1<<keys.EpochShift {
		t.Fatalf("%d postings are left", n)
	}
	if err := s.Retain(); err != nil {
		t.Fatal(err)
	}
}

func TestDuplicatesAcrossSegments(t *testing.T) {
	o := testOptions(vfs.NewMem())
	o.SegmentRows = 100
	s := openTest(t, o)
	es := fill(t, s, 0, 3000, log.LevelInfo, "vm-1")
	waitPacked(t, s)
	for i := 0; i < len(es); i += 100 {
		if err := s.Append(context.Background(), es[i:i+100]); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < len(es); i += 7 {
		e := es[i]
		e.Time = e.Time.Add(time.Hour)
		e.Level = log.LevelDebug
		if err := s.Append(context.Background(), []log.Entry{e}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(ask(t, s, log.Query{})); n != 3000 {
		t.Fatalf("%d entries", n)
	}
}
