package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
)

var logChecks = []check{
	{"append and query", checkAppendQuery},
	{"append is all or none", checkAppendAllOrNone},
	{"append is idempotent", checkAppendIdempotent},
	{"append limits", checkAppendLimits},
	{"append is durable", checkAppendDurable},
	{"query order and limit", checkQueryOrder},
	{"query filters", checkQueryFilters},
	{"objects are exact", checkObjectsExact},
	{"pages", checkPages},
	{"follow has no gap and no duplicate", checkFollow},
	{"query ends when told", checkQueryEnds},
	{"appends concurrently", checkAppendsConcurrently},
	{"log stats", checkLogStats},
}

// base is the time of the suite's entries: long ago, so that they lie apart from what a log may hold, and
// with nanoseconds.
var base = time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)

func (c *C) entry(i int, more func(*log.Entry)) log.Entry {
	e := log.Entry{Time: base.Add(time.Duration(i) * time.Millisecond), ID: ident.New(), Level: log.LevelInfo, Component: "ct", Message: fmt.Sprintf("entry %d of %s", i, c.tag),
		Objects: []string{c.object("all")}, Labels: map[string]string{"tag": c.tag}}
	if more != nil {
		more(&e)
	}
	return e
}

func (c *C) object(s string) string { return "ct-" + c.tag + "-" + s }

func (c *C) append(list ...log.Entry) { c.ok(c.p.Log.Append(c, list), "Append of %d", len(list)) }

// query collects what a query finds.
func (c *C) query(q log.Query) []log.Result {
	var out []log.Result
	c.ok(c.p.Log.Query(c, q, func(r log.Result) error { out = append(out, r); return nil }), "Query %+v", q)
	return out
}

func ids(list []log.Result) (out []string) {
	for _, r := range list {
		out = append(out, r.Entry.ID)
	}
	return out
}

func idsOf(list []log.Entry) (out []string) {
	for _, e := range list {
		out = append(out, e.ID)
	}
	return out
}

func (c *C) same(got, want []string, what string) {
	if !slices.Equal(got, want) {
		at := 0
		for at < len(got) && at < len(want) && got[at] == want[at] {
			at++
		}
		c.Errorf("%s: %d entries, must be %d; they part at %d", what, len(got), len(want), at)
	}
}

func (c *C) all() log.Query { return log.Query{Objects: []string{c.object("all")}} }

func checkAppendQuery(c *C) {
	e := c.entry(0, func(e *log.Entry) {
		e.Level, e.Message = log.LevelAudit, "späße\n\x00end"
		e.Objects = append(e.Objects, c.object("other"))
		e.Labels["who"] = "root"
	})
	c.append(e)
	got := c.query(c.all())
	if len(got) != 1 {
		c.Fatalf("%d entries, must be 1", len(got))
	}
	g := got[0].Entry
	if !g.Time.Equal(e.Time) || g.ID != e.ID || g.Level != e.Level || g.Component != e.Component || g.Message != e.Message ||
		!slices.Equal(g.Objects, e.Objects) || len(g.Labels) != 2 || g.Labels["who"] != "root" {
		c.Errorf("appended %+v\nfound %+v", e, g)
	}
	if got[0].PageToken == "" || got[0].CaughtUp {
		c.Errorf("result %+v", got[0])
	}
	c.append() // nothing is nothing
	if n := len(c.query(log.Query{Objects: []string{c.object("none")}})); n != 0 {
		c.Errorf("an object without entries has %d", n)
	}
}

func checkAppendAllOrNone(c *C) {
	good := c.entry(0, nil)
	err := c.p.Log.Append(c, []log.Entry{good, c.entry(1, func(e *log.Entry) { e.Level = 99 })})
	c.fails(err, errs.Invalid, "a batch with a bad entry")
	if n := len(c.query(c.all())); n != 0 {
		c.Errorf("%d entries of a refused batch are there", n)
	}
	c.append(good)
	c.same(ids(c.query(c.all())), []string{good.ID}, "after the good one alone")
}

func checkAppendIdempotent(c *C) {
	a, b := c.entry(0, nil), c.entry(1, nil)
	c.append(a)
	c.append(a)
	c.append(a, b, b)
	c.same(ids(c.query(c.all())), []string{a.ID, b.ID}, "entries that were appended again")
	newest := c.all()
	newest.NewestFirst = true
	c.same(ids(c.query(newest)), []string{b.ID, a.ID}, "the same, newest first")
	c.restart(true)
	c.append(a)
	c.same(ids(c.query(c.all())), []string{a.ID, b.ID}, "appended again after a restart")
}

func checkAppendLimits(c *C) {
	for what, bad := range map[string]func(*log.Entry){
		"no id":              func(e *log.Entry) { e.ID = "" },
		"an id of 65 bytes":  func(e *log.Entry) { e.ID = strings.Repeat("i", 65) },
		"no level":           func(e *log.Entry) { e.Level = 0 },
		"level 6":            func(e *log.Entry) { e.Level = 6 },
		"too long a message": func(e *log.Entry) { e.Message = strings.Repeat("m", log.MaxMessage+1) },
		"too many objects":   func(e *log.Entry) { e.Objects = make([]string, log.MaxObjects+1) },
		"too long an object": func(e *log.Entry) { e.Objects = []string{strings.Repeat("o", log.MaxObjectLen+1)} },
		"too many labels":    func(e *log.Entry) { e.Labels = manyLabels(log.MaxLabels + 1) },
	} {
		err := c.p.Log.Append(c, []log.Entry{c.entry(0, bad)})
		c.fails(err, errs.Invalid, "%s", what)
	}
	biggest := c.entry(1, func(e *log.Entry) {
		e.Message, e.Labels = strings.Repeat("m", log.MaxMessage), manyLabels(log.MaxLabels)
		for i := len(e.Objects); i < log.MaxObjects; i++ {
			e.Objects = append(e.Objects, (c.object(fmt.Sprint(i)) + strings.Repeat("o", log.MaxObjectLen))[:log.MaxObjectLen])
		}
	})
	c.append(biggest)
	got := c.query(c.all())
	if len(got) != 1 || len(got[0].Entry.Message) != log.MaxMessage || len(got[0].Entry.Objects) != log.MaxObjects || len(got[0].Entry.Labels) != log.MaxLabels {
		c.Errorf("the largest entry did not come back whole")
	}
	batch := make([]log.Entry, log.MaxBatch+1)
	for i := range batch {
		batch[i] = c.entry(2+i, func(e *log.Entry) { e.Message = strings.Repeat("x", 500) }) // more than gRPC's 4 MiB in all
	}
	c.fails(c.p.Log.Append(c, batch), errs.Invalid, "a batch over the limit")
	c.append(batch[1:]...)
	if n := len(c.query(c.all())); n != log.MaxBatch+1 {
		c.Errorf("%d entries, must be %d", n, log.MaxBatch+1)
	}
}

func manyLabels(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprint("label", i)] = "v"
	}
	return m
}

func checkAppendDurable(c *C) {
	var want []string
	for i := range 20 {
		e := c.entry(i, nil)
		c.append(e)
		want = append(want, e.ID)
		if i%7 == 6 {
			c.restart(true)
		}
	}
	c.restart(true)
	c.same(ids(c.query(c.all())), want, "acknowledged entries after kills of the plugin")
	c.restart(false)
	c.same(ids(c.query(c.all())), want, "after an orderly restart")
}

// some appends n entries out of order and returns them in order.
func (c *C) some(n int) []log.Entry {
	list := make([]log.Entry, n)
	for i := range list {
		list[i] = c.entry(i, nil)
	}
	list[n/2].Time = list[n/2-1].Time // two at one time: the id decides
	if list[n/2].ID < list[n/2-1].ID {
		list[n/2].ID, list[n/2-1].ID = list[n/2-1].ID, list[n/2].ID
	}
	mixed := slices.Clone(list)
	for i := range mixed {
		j := (i * 7) % n
		mixed[i], mixed[j] = mixed[j], mixed[i]
	}
	c.append(mixed[:n/3]...)
	c.append(mixed[n/3:]...)
	return list
}

func checkQueryOrder(c *C) {
	list := c.some(50)
	want := idsOf(list)
	c.same(ids(c.query(c.all())), want, "oldest first")
	newest := slices.Clone(want)
	slices.Reverse(newest)
	q := c.all()
	q.NewestFirst = true
	c.same(ids(c.query(q)), newest, "newest first")
	q.Limit = 7
	c.same(ids(c.query(q)), newest[:7], "the newest seven")
	q.NewestFirst = false
	c.same(ids(c.query(q)), want[:7], "the oldest seven")
	q.Limit = 1000
	c.same(ids(c.query(q)), want, "a limit beyond the end")
}

func checkQueryFilters(c *C) {
	list := make([]log.Entry, 40)
	for i := range list {
		list[i] = c.entry(i, func(e *log.Entry) {
			e.Level = log.Level(1 + i%5)
			e.Component = []string{"core", "net", "storage"}[i%3]
			e.Labels["n"] = fmt.Sprint(i % 4)
			if i%2 == 0 {
				e.Objects = append(e.Objects, c.object("even"))
			}
			if i%3 == 0 {
				e.Objects = append(e.Objects, c.object("third"))
				e.Message += " Needle"
			}
		})
	}
	c.append(list...)
	try := func(what string, q log.Query, match func(i int) bool) {
		if q.Objects == nil {
			q.Objects = []string{c.object("all")}
		}
		for _, newest := range []bool{false, true} {
			q.NewestFirst = newest
			var want []string
			for i, e := range list {
				if match(i) {
					want = append(want, e.ID)
				}
			}
			if newest {
				slices.Reverse(want)
			}
			c.same(ids(c.query(q)), want, fmt.Sprintf("%s, newest first %v", what, newest))
			if len(want) > 2 {
				q.Limit = 2
				c.same(ids(c.query(q)), want[:2], fmt.Sprintf("%s, newest first %v, two of them", what, newest))
				q.Limit = 0
			}
		}
	}
	try("since", log.Query{Since: list[10].Time}, func(i int) bool { return i >= 10 })
	try("until", log.Query{Until: list[10].Time}, func(i int) bool { return i < 10 })
	try("since and until", log.Query{Since: list[5].Time, Until: list[9].Time.Add(1)}, func(i int) bool { return i >= 5 && i <= 9 })
	try("max level warn", log.Query{MaxLevel: log.LevelWarn}, func(i int) bool { return i%5 < 3 })
	try("levels", log.Query{Levels: []log.Level{log.LevelAudit, log.LevelDebug}}, func(i int) bool { return i%5 == 0 || i%5 == 4 })
	try("components", log.Query{Components: []string{"net", "storage"}}, func(i int) bool { return i%3 != 0 })
	try("labels", log.Query{Labels: map[string]string{"n": "2", "tag": c.tag}}, func(i int) bool { return i%4 == 2 })
	try("a label that none has", log.Query{Labels: map[string]string{"n": ""}}, func(int) bool { return false })
	try("contains", log.Query{Contains: "Needle"}, func(i int) bool { return i%3 == 0 })
	try("contains, another case", log.Query{Contains: "needle"}, func(int) bool { return false })
	try("contains, whatever case", log.Query{Contains: "nEEDLE", IgnoreCase: true}, func(i int) bool { return i%3 == 0 })
	even, third := c.object("even"), c.object("third")
	try("any of two objects", log.Query{Objects: []string{even, third}}, func(i int) bool { return i%2 == 0 || i%3 == 0 })
	try("all of two objects", log.Query{Objects: []string{even, third}, AllObjects: true}, func(i int) bool { return i%6 == 0 })
	try("all, one of them unknown", log.Query{Objects: []string{even, c.object("none")}, AllObjects: true}, func(int) bool { return false })
	try("any, one of them unknown", log.Query{Objects: []string{even, c.object("none")}}, func(i int) bool { return i%2 == 0 })
	try("everything at once", log.Query{Objects: []string{even}, Since: list[4].Time, MaxLevel: log.LevelInfo, Components: []string{"core", "net"}, Contains: "entry"},
		func(i int) bool { return i%2 == 0 && i >= 4 && i%5 < 4 && i%3 != 2 })
}

// checkObjectsExact holds that one object's entries are not another's, whatever bytes the ids are made of.
func checkObjectsExact(c *C) {
	o := c.object("x")
	objects := []string{o, o + "1", o + "10", o[:len(o)-1], o + "\x00", o + "\x00\x00", o + "\xff", o + "\xff\xff", o + "\x00" + strings.Repeat("\x01", 16), "\x00" + o, o + "/", strings.ToUpper(o)}
	var list []log.Entry
	for i, id := range objects {
		list = append(list, c.entry(i, func(e *log.Entry) { e.Objects = []string{id} }))
	}
	c.append(list...)
	for i, id := range objects {
		for _, newest := range []bool{false, true} {
			got := ids(c.query(log.Query{Objects: []string{id}, NewestFirst: newest, Labels: map[string]string{"tag": c.tag}}))
			c.same(got, []string{list[i].ID}, fmt.Sprintf("entries of object %q", id))
		}
	}
	var some []string
	for i := range objects {
		if i%2 == 0 {
			some = append(some, objects[i])
		}
	}
	if n := len(c.query(log.Query{Objects: some})); n != len(some) {
		c.Errorf("%d entries of %d objects", n, len(some))
	}
}

func checkPages(c *C) {
	list := c.some(30)
	for _, newest := range []bool{false, true} {
		want := idsOf(list)
		if newest {
			slices.Reverse(want)
		}
		var got []string
		q := c.all()
		q.NewestFirst, q.Limit = newest, 7
		for range 10 {
			page := c.query(q)
			if len(page) == 0 {
				break
			}
			got = append(got, ids(page)...)
			q.PageToken = page[len(page)-1].PageToken
		}
		c.same(got, want, fmt.Sprintf("all pages, newest first %v", newest))
	}
	q := c.all()
	q.PageToken = "no such token"
	err := c.p.Log.Query(c, q, func(log.Result) error { return nil })
	if k := errs.KindOf(err); k != errs.Invalid && k != errs.OutOfRange {
		c.Errorf("a page token that is none: %v", err)
	}
}

// checkFollow appends from four sides while it follows: what comes, history and live, is each entry once.
func checkFollow(c *C) {
	const writers, each = 4, 100
	for _, history := range []int{0, 200} {
		object := c.object(fmt.Sprint("follow", history))
		make1 := func(i int) log.Entry {
			return c.entry(i, func(e *log.Entry) { e.Objects, e.Time = []string{object}, time.Now() })
		}
		want := map[string]bool{}
		var mu sync.Mutex
		for i := range history {
			e := make1(i)
			want[e.ID] = true
			c.append(e)
		}
		ctx, cancel := context.WithTimeout(c, 20*time.Second)
		done := errors.New("all seen")
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					e := make1(w*each + i)
					mu.Lock()
					want[e.ID] = true
					mu.Unlock()
					if err := c.p.Log.Append(ctx, []log.Entry{e}); err != nil {
						mu.Lock()
						c.Errorf("Append: %v", err)
						mu.Unlock()
						return
					}
				}
			})
		}
		seen := map[string]int{}
		caughtUp := 0
		err := c.p.Log.Query(ctx, log.Query{Objects: []string{object}, Follow: true}, func(r log.Result) error {
			if r.CaughtUp {
				caughtUp++
				return nil
			}
			if r.Missed > 0 {
				return nil
			}
			seen[r.Entry.ID]++
			if len(seen) == history+writers*each {
				return done
			}
			return nil
		})
		wg.Wait()
		cancel()
		if !errors.Is(err, done) {
			c.Fatalf("with a history of %d: saw %d of %d, then %v", history, len(seen), history+writers*each, err)
		}
		for id, n := range seen {
			if n != 1 || !want[id] {
				c.Errorf("entry %s came %d times", id, n)
			}
		}
		if caughtUp != 1 {
			c.Errorf("caught_up came %d times", caughtUp)
		}
	}
	q := c.all()
	q.Follow, q.NewestFirst = true, true
	c.fails(c.p.Log.Query(c, q, func(log.Result) error { return nil }), errs.Invalid, "follow with newest first")
	// A filter and a limit hold for what is live, too.
	ctx, cancel := context.WithTimeout(c, 20*time.Second)
	defer cancel()
	object := c.object("limit")
	var got []string
	err := c.p.Log.Query(ctx, log.Query{Objects: []string{object}, Follow: true, Limit: 2, MaxLevel: log.LevelWarn}, func(r log.Result) error {
		if r.CaughtUp {
			for i, l := range []log.Level{log.LevelInfo, log.LevelError, log.LevelDebug, log.LevelWarn, log.LevelWarn} {
				c.append(c.entry(i, func(e *log.Entry) { e.Objects, e.Level, e.Time = []string{object}, l, time.Now() }))
			}
			return nil
		}
		got = append(got, r.Entry.Level.String())
		return nil
	})
	if err != nil || !slices.Equal(got, []string{"error", "warn"}) {
		c.Errorf("two grave ones, live: %v, %v", got, err)
	}
}

func checkQueryEnds(c *C) {
	c.append(c.entry(0, nil), c.entry(1, nil), c.entry(2, nil))
	enough := errors.New("enough")
	n := 0
	err := c.p.Log.Query(c, c.all(), func(log.Result) error { n++; return enough })
	if !errors.Is(err, enough) || n != 1 {
		c.Errorf("after %d results: %v", n, err)
	}
	ctx, cancel := context.WithCancel(c)
	began := time.Now()
	q := c.all()
	q.Follow = true
	err = c.p.Log.Query(ctx, q, func(r log.Result) error {
		if r.CaughtUp {
			cancel()
		}
		return nil
	})
	cancel()
	if errs.KindOf(err) != errs.Canceled || time.Since(began) > 10*time.Second {
		c.Errorf("a cancelled follower ended after %v with %v", time.Since(began), err)
	}
	// A follower that does not read must not hold up writers.
	ctx, cancel = context.WithCancel(c)
	defer cancel()
	hold := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.p.Log.Query(ctx, q, func(log.Result) error { <-hold; return nil })
	}()
	began = time.Now()
	for i := range 50 {
		c.append(c.entry(i, func(e *log.Entry) { e.Message = strings.Repeat("x", 60_000) }))
	}
	if d := time.Since(began); d > 20*time.Second {
		c.Errorf("fifty appends took %v beside a follower that does not read", d)
	}
	close(hold)
	cancel()
	<-ended
}

func checkAppendsConcurrently(c *C) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var want []string
	for w := range 8 {
		wg.Go(func() {
			for i := range 25 {
				e := c.entry(w*25+i, nil)
				err := c.p.Log.Append(c, []log.Entry{e})
				mu.Lock()
				if err != nil {
					c.Errorf("Append: %v", err)
				}
				want = append(want, e.ID)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	got := ids(c.query(c.all()))
	slices.Sort(got)
	slices.Sort(want)
	c.same(got, want, "appends side by side")
}

func checkLogStats(c *C) {
	before, err := c.p.Log.Stats(c)
	c.ok(err, "Stats")
	c.append(c.entry(0, func(e *log.Entry) { e.Level = log.LevelAudit }), c.entry(1, nil))
	after, err := c.p.Log.Stats(c)
	c.ok(err, "Stats")
	if after.Entries < before.Entries+2 || after.Oldest.After(base) || after.Newest.Before(base) || after.ByLevel["audit"] < before.ByLevel["audit"]+1 {
		c.Errorf("before %+v, after two entries %+v", before, after)
	}
}
