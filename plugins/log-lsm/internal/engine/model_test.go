package engine

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/uuid"

	"github.com/mvirt/mvirt/sdk/log"
)

var seedFlag = flag.Uint64("seed", 0, "seed of randomised tests; 0 takes one from the clock")

// newRand makes the generator of a randomised test and prints how to repeat it.
func newRand(t testing.TB) *rand.Rand {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("repeat with -run '^%s$' -args -seed=%d", t.Name(), seed)
	return rand.New(rand.NewPCG(seed, 42))
}

// model is the contract in its plainest form: a list.
type model struct {
	ids     map[string]bool
	entries []log.Entry // in order of arrival
}

func newModel() *model { return &model{ids: map[string]bool{}} }

func (m *model) append(es []log.Entry) {
	for _, e := range es {
		if !m.ids[e.ID] {
			m.ids[e.ID] = true
			e.Time = time.Unix(0, e.Time.UnixNano()).UTC()
			var objs []string
			for _, o := range e.Objects {
				if !slices.Contains(objs, o) {
					objs = append(objs, o)
				}
			}
			e.Objects = objs
			if len(e.Labels) == 0 {
				e.Labels = nil
			}
			m.entries = append(m.entries, e)
		}
	}
}

func matches(e *log.Entry, q *log.Query) bool {
	if len(q.Objects) > 0 {
		hits := 0
		for _, o := range q.Objects {
			if slices.Contains(e.Objects, o) {
				hits++
			}
		}
		if hits == 0 || q.AllObjects && hits < len(q.Objects) {
			return false
		}
	}
	if !q.Since.IsZero() && e.Time.Before(q.Since) || !q.Until.IsZero() && !e.Time.Before(q.Until) {
		return false
	}
	if q.MaxLevel != 0 && e.Level > q.MaxLevel || len(q.Levels) > 0 && !slices.Contains(q.Levels, e.Level) {
		return false
	}
	if len(q.Components) > 0 && !slices.Contains(q.Components, e.Component) {
		return false
	}
	for k, v := range q.Labels {
		if x, ok := e.Labels[k]; !ok || x != v {
			return false
		}
	}
	if q.IgnoreCase {
		return bytes.Contains(bytes.ToLower([]byte(e.Message)), []byte(strings.ToLower(q.Contains)))
	}
	return strings.Contains(e.Message, q.Contains)
}

func less(a, b log.Entry) int {
	if c := a.Time.Compare(b.Time); c != 0 {
		return c
	}
	return cmp.Compare(a.ID, b.ID)
}

// query answers from the list; after is the entry behind which it begins.
func (m *model) query(q log.Query, after *log.Entry) []log.Entry {
	var out []log.Entry
	for i := range m.entries {
		e := m.entries[i]
		if !matches(&e, &q) {
			continue
		}
		if after != nil && (less(e, *after) <= 0) != q.NewestFirst && less(e, *after) != 0 || after != nil && less(e, *after) == 0 {
			continue
		}
		out = append(out, e)
	}
	slices.SortFunc(out, less)
	if q.NewestFirst {
		slices.Reverse(out)
	}
	if q.Limit > 0 && len(out) > int(q.Limit) {
		out = out[:q.Limit]
	}
	return out
}

// gen makes entries that are as bad as entries may be.
type gen struct {
	rng  *rand.Rand
	now  int64
	past []log.Entry
}

var genObjects = []string{"vm-1", "vm-12", "vm-1\x00", "\x00", "\xff\xfe", "vol-1", "n", strings.Repeat("x", 256), "vm-2", "0190a0b0-0000-7000-8000-000000000001"}

func (g *gen) entry() log.Entry {
	rng := g.rng
	if len(g.past) > 0 {
		switch rng.IntN(40) {
		case 0: // sent again
			return g.past[rng.IntN(len(g.past))]
		case 1: // the same id at another time, with another text
			e := g.past[rng.IntN(len(g.past))]
			e.Time = e.Time.Add(time.Duration(rng.Int64N(1e9)))
			e.Message = "another"
			return e
		}
	}
	g.now += rng.Int64N(2e6)
	t := g.now
	switch rng.IntN(30) {
	case 0:
		t -= rng.Int64N(1e12) // late
	case 1:
		t += rng.Int64N(1e15) // from the future
	case 2:
		if len(g.past) > 0 {
			t = g.past[len(g.past)-1].Time.UnixNano() // the same nanosecond
		}
	}
	e := log.Entry{Time: time.Unix(0, t).UTC(), ID: uuid.Must(uuid.NewV7()).String(), Level: log.Level(1 + rng.IntN(5)),
		Component: []string{"core", "net", "", "console"}[rng.IntN(4)]}
	if rng.IntN(20) == 0 {
		e.ID = fmt.Sprintf("id-%d", rng.IntN(1e9))
	}
	switch rng.IntN(6) {
	case 0:
		e.Message = fmt.Sprintf("volume %d resized to %d", rng.IntN(10), rng.Uint64())
	case 1:
		e.Message = fmt.Sprintf("Started %s", genObjects[5])
	case 2:
		e.Message = "lease " + uuid.New().String() + " given"
	case 3:
		e.Message = strings.Repeat("ÄöU\x1b ", rng.IntN(200))
	case 4:
		e.Message = fmt.Sprintf("unique %x", rng.Uint64())
	}
	for range rng.IntN(4) {
		e.Objects = append(e.Objects, genObjects[rng.IntN(len(genObjects))])
	}
	if rng.IntN(3) == 0 {
		e.Labels = map[string]string{"who": []string{"uid:0", "uid:1000"}[rng.IntN(2)], "n": fmt.Sprint(rng.IntN(5))}
	}
	g.past = append(g.past, e)
	return e
}

func (g *gen) batch(most int) []log.Entry {
	es := make([]log.Entry, 1+g.rng.IntN(most))
	for i := range es {
		es[i] = g.entry()
	}
	return es
}

func (g *gen) query() log.Query {
	rng := g.rng
	var q log.Query
	for range rng.IntN(3) {
		q.Objects = append(q.Objects, genObjects[rng.IntN(len(genObjects))])
	}
	if rng.IntN(8) == 0 {
		q.Objects = append(q.Objects, "not there")
	}
	q.AllObjects = rng.IntN(2) == 0
	if len(g.past) > 0 && rng.IntN(3) == 0 {
		q.Since = g.past[rng.IntN(len(g.past))].Time
	}
	if len(g.past) > 0 && rng.IntN(3) == 0 {
		q.Until = g.past[rng.IntN(len(g.past))].Time.Add(time.Duration(rng.IntN(2)))
	}
	if rng.IntN(3) == 0 {
		q.MaxLevel = log.Level(1 + rng.IntN(5))
	}
	if rng.IntN(4) == 0 {
		q.Levels = []log.Level{log.Level(1 + rng.IntN(5)), log.Level(1 + rng.IntN(5))}
	}
	if rng.IntN(4) == 0 {
		q.Components = []string{[]string{"core", "net", "", "x"}[rng.IntN(4)]}
	}
	if rng.IntN(6) == 0 {
		q.Labels = map[string]string{"who": "uid:0"}
	}
	switch rng.IntN(8) {
	case 0:
		q.Contains = []string{"resized", "volume 1", "ölze", "1", "Started vol-1", "unique", "e"}[rng.IntN(7)]
	case 1:
		q.Contains, q.IgnoreCase = []string{"RESIZED", "äÖu", "STARTED", "LEASE 1"}[rng.IntN(4)], true
	}
	q.NewestFirst = rng.IntN(2) == 0
	if rng.IntN(2) == 0 {
		q.Limit = uint32(1 + rng.IntN(50))
	}
	return q
}

// ask runs a query that does not follow.
func ask(t testing.TB, s *Store, q log.Query) []log.Result {
	t.Helper()
	var out []log.Result
	if err := s.Query(context.Background(), q, func(r log.Result) error { out = append(out, r); return nil }); err != nil {
		t.Fatalf("query %+v: %v", q, err)
	}
	return out
}

func compare(t testing.TB, q log.Query, got []log.Result, want []log.Entry) {
	t.Helper()
	for i := range min(len(got), len(want)) {
		if !reflect.DeepEqual(got[i].Entry, want[i]) {
			t.Fatalf("query %+v, result %d\n got %+v\nwant %+v", q, i, got[i].Entry, want[i])
		}
	}
	if len(got) != len(want) {
		missing := ""
		if len(want) > len(got) {
			missing = fmt.Sprintf("; first missing: %+v", want[len(got)])
		}
		t.Fatalf("query %+v: %d results, want %d%s", q, len(got), len(want), missing)
	}
}

// testOptions are a small store in memory.
func testOptions(fs vfs.FS) Options {
	return Options{Dir: "/log", FS: fs, CacheSize: 4 << 20, SegmentRows: 300, searchFrom: 200, PollDisk: time.Hour, Retention: Retention{Every: time.Hour}}
}

func mustOpen(t testing.TB, o Options) *Store {
	t.Helper()
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustClose(t testing.TB, s *Store) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := s.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestMetamorphic drives a store and the model with the same operations, restarts included.
func TestMetamorphic(t *testing.T) {
	rng := newRand(t)
	for round := range 6 {
		fs := vfs.NewMem()
		o := testOptions(fs)
		o.SegmentRows = []int{1, 7, 128, 129, 500, 5000}[rng.IntN(6)]
		m := newModel()
		g := &gen{rng: rng, now: 1.7e18}
		s := mustOpen(t, o)
		for step := range 400 {
			switch k := rng.IntN(20); {
			case k < 9:
				b := g.batch(60)
				if err := s.Append(context.Background(), b); err != nil {
					t.Fatal(err)
				}
				m.append(b)
			case k < 18:
				q := g.query()
				res := ask(t, s, q)
				compare(t, q, res, m.query(q, nil))
				if len(res) > 0 && rng.IntN(2) == 0 {
					r := res[rng.IntN(len(res))]
					q.PageToken = r.PageToken
					compare(t, q, ask(t, s, q), m.query(q, &r.Entry))
				}
			default:
				checkClean(t, s)
				mustClose(t, s)
				if k == 19 {
					o.SegmentRows = []int{1, 7, 128, 129, 500, 5000}[rng.IntN(6)]
				}
				s = mustOpen(t, o)
			}
			_ = step
		}
		st, err := s.Stats(context.Background())
		if err != nil || st.Entries != uint64(len(m.entries)) {
			t.Fatalf("round %d: %d entries, want %d, %v", round, st.Entries, len(m.entries), err)
		}
		checkClean(t, s)
		if rep, err := s.Verify(context.Background(), log.VerifyRequest{}); err != nil || len(rep.Breaks) > 0 || rep.Checked != st.ByLevel["audit"] {
			t.Fatalf("chain: %+v, %v", rep, err)
		}
		mustClose(t, s)
	}
}
