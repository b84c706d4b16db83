package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// openTest opens a store that is checked and closed at the end of the test.
func openTest(t testing.TB, o Options) *Store {
	s := mustOpen(t, o)
	t.Cleanup(func() {
		checkClean(t, s)
		mustClose(t, s)
	})
	return s
}

func checkClean(t testing.TB, s *Store) CheckReport {
	t.Helper()
	r, err := s.Check(context.Background())
	if err != nil {
		t.Error(err)
	}
	for _, p := range r.Problems {
		t.Error("check: " + p)
	}
	for _, c := range s.Conditions() {
		t.Errorf("condition %s: %s", c.Code, c.Text)
	}
	return r
}

// waitPacked waits until the sealer has nothing to do.
func waitPacked(t testing.TB, s *Store) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		n := 0
		for l := range s.frozen {
			n += len(s.frozen[l])
		}
		if n == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("heads are not packed")
		}
		s.kickSealer()
		s.roomy.Wait()
	}
}

func entry(i int, level log.Level, objs ...string) log.Entry {
	return log.Entry{Time: time.Unix(1_700_000_000, int64(i)*1e6).UTC(), ID: uuid.Must(uuid.NewV7()).String(), Level: level,
		Component: "test", Message: fmt.Sprintf("entry %d of many", i), Objects: objs}
}

func fill(t testing.TB, s *Store, from, n int, level log.Level, objs ...string) []log.Entry {
	t.Helper()
	var all []log.Entry
	for i := 0; i < n; i += 100 {
		var b []log.Entry
		for k := i; k < min(i+100, n); k++ {
			b = append(b, entry(from+k, level, objs...))
		}
		if err := s.Append(context.Background(), b); err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return all
}

func TestInvalid(t *testing.T) {
	s := openTest(t, testOptions(vfs.NewMem()))
	good := entry(1, log.LevelInfo)
	bad := good
	bad.Level = 9
	err := s.Append(context.Background(), []log.Entry{good, bad})
	if errs.KindOf(err) != errs.Invalid || !strings.Contains(err.Error(), "entries[1]") {
		t.Fatal(err)
	}
	if res := ask(t, s, log.Query{}); len(res) != 0 {
		t.Fatal("half of a batch was stored")
	}
	for field, q := range map[string]log.Query{
		"page_token": {PageToken: "x"}, "newest_first": {Follow: true, NewestFirst: true}, "max_level": {MaxLevel: 7},
		"levels": {Levels: []log.Level{9}}, "objects": {Objects: []string{""}},
	} {
		err := s.Query(context.Background(), q, func(log.Result) error { return nil })
		var e *errs.Error
		if !errors.As(err, &e) || e.Kind != errs.Invalid || e.Field != field {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func TestObjectsOfAnyBytes(t *testing.T) {
	o := testOptions(vfs.NewMem())
	o.SegmentRows = 4
	s := openTest(t, o)
	ids := []string{"a", "ab", "a\x00", "a\x00b", "\x00", "\x00\x00", "\xff", "\xff\xff", "abc"}
	for i, id := range ids {
		if err := s.Append(context.Background(), []log.Entry{entry(i, log.LevelInfo, id)}); err != nil {
			t.Fatal(err)
		}
	}
	waitPacked(t, s)
	for i, id := range ids {
		res := ask(t, s, log.Query{Objects: []string{id}})
		if len(res) != 1 || res[0].Entry.Objects[0] != id || res[0].Entry.Message != fmt.Sprintf("entry %d of many", i) {
			t.Errorf("object %q: %d results", id, len(res))
		}
	}
}

func TestFollow(t *testing.T) {
	o := testOptions(vfs.NewMem())
	o.SegmentRows = 64 // heads are packed all the time: followers miss, and read from disk
	s := openTest(t, o)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	const writers, each = 4, 1500
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				e := entry(i, log.Level(1+(i+w)%5), fmt.Sprintf("w%d", w))
				if err := s.Append(ctx, []log.Entry{e}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	errEnough := errors.New("enough")
	follow := func(q log.Query, want int, slow bool) {
		seen := map[string]bool{}
		caught := 0
		token := ""
		for len(seen) < want {
			q.PageToken = token
			n := 0
			err := s.Query(ctx, q, func(r log.Result) error {
				if r.CaughtUp {
					caught++
					return nil
				}
				if r.Missed > 0 {
					return nil
				}
				if seen[r.Entry.ID] {
					return fmt.Errorf("%s came twice", r.Entry.ID)
				}
				seen[r.Entry.ID] = true
				token = r.PageToken
				n++
				if slow && n%50 == 0 {
					time.Sleep(time.Millisecond)
				}
				if len(seen) == want || caught > 0 && n == 700 {
					return errEnough // and begin again from the token
				}
				return nil
			})
			if !errors.Is(err, errEnough) {
				t.Errorf("follow %v: %v after %d of %d", q.Objects, err, len(seen), want)
				return
			}
		}
	}
	wg.Go(func() { follow(log.Query{Follow: true}, writers*each, false) })
	wg.Go(func() { follow(log.Query{Follow: true}, writers*each, true) })
	wg.Go(func() { follow(log.Query{Follow: true, Objects: []string{"w1"}}, each, false) })
	wg.Wait()
}

func TestFollowStopsAtClose(t *testing.T) {
	s := mustOpen(t, testOptions(vfs.NewMem()))
	done := make(chan error, 1)
	caught := make(chan struct{})
	go func() {
		done <- s.Query(context.Background(), log.Query{Follow: true}, func(r log.Result) error {
			if r.CaughtUp {
				close(caught)
			}
			return nil
		})
	}()
	<-caught
	mustClose(t, s)
	if err := <-done; errs.KindOf(err) != errs.Unavailable {
		t.Fatal(err)
	}
	if err := s.Append(context.Background(), []log.Entry{entry(1, 1)}); errs.KindOf(err) != errs.Unavailable {
		t.Fatal(err)
	}
}

// TestSlowReaders shows that a reader who stops reading holds up nobody.
func TestSlowReaders(t *testing.T) {
	o := testOptions(vfs.NewMem())
	s := openTest(t, o)
	fill(t, s, 0, 1000, log.LevelInfo)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	stuck := make(chan struct{}, 20)
	for i := range 20 {
		wg.Go(func() {
			first := true
			_ = s.Query(ctx, log.Query{Follow: i%2 == 0}, func(log.Result) error {
				if first {
					stuck <- struct{}{}
					<-ctx.Done()
				}
				first = false
				return ctx.Err()
			})
		})
	}
	for range 20 {
		<-stuck
	}
	fill(t, s, 1000, 5000, log.LevelInfo)
	waitPacked(t, s)
	cancel()
	wg.Wait()
	if n := len(ask(t, s, log.Query{})); n != 6000 {
		t.Fatalf("%d entries", n)
	}
}

func TestPageTokenIsStable(t *testing.T) {
	s := openTest(t, testOptions(vfs.NewMem()))
	want := fill(t, s, 0, 950, log.LevelInfo)
	var got []string
	token := ""
	for page := 0; ; page++ {
		res := ask(t, s, log.Query{NewestFirst: true, Limit: 100, PageToken: token})
		if len(res) == 0 {
			break
		}
		for _, r := range res {
			got = append(got, r.Entry.ID)
		}
		token = res[len(res)-1].PageToken
		fill(t, s, 10000+page*100, 100, log.LevelInfo) // newer: before the place of the token
	}
	if len(got) != len(want) {
		t.Fatalf("%d entries, want %d", len(got), len(want))
	}
	for i := range got {
		if got[i] != want[len(want)-1-i].ID {
			t.Fatalf("entry %d differs", i)
		}
	}
}

func TestRefusesNewerFormat(t *testing.T) {
	fs := vfs.NewMem()
	mustClose(t, mustOpen(t, testOptions(fs)))
	tamper(t, fs, func(db *pebble.DB) {
		if err := db.Set(keys.BytesKey(keys.Misc, []byte(miscFormat)), []byte{0, 0, 0, formatVersion + 1}, pebble.Sync); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := Open(testOptions(fs)); errs.KindOf(err) != errs.Precondition || errs.ReasonOf(err) != "FORMAT_NEWER" {
		t.Fatal(err)
	}
}

func TestLocked(t *testing.T) {
	fs := vfs.NewMem()
	openTest(t, testOptions(fs))
	if _, err := Open(testOptions(fs)); errs.KindOf(err) != errs.Conflict {
		t.Fatal(err)
	}
}

// tamper opens the store's Pebble behind its back.
func tamper(t testing.TB, fs vfs.FS, fn func(db *pebble.DB)) {
	t.Helper()
	db, err := pebble.Open(fs.PathJoin("/log", storeDir, dbDir), &pebble.Options{FS: fs, Logger: quiet{}, FormatMajorVersion: pebble.FormatNewest})
	if err != nil {
		t.Fatal(err)
	}
	fn(db)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

type quiet struct{}

func (quiet) Infof(string, ...any)      {}
func (quiet) Errorf(string, ...any)     {}
func (quiet) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }

func TestBackupAndRestore(t *testing.T) {
	fs := vfs.NewMem()
	s := openTest(t, testOptions(fs))
	m := newModel()
	g := &gen{rng: newRand(t), now: 1.7e18}
	for range 40 {
		b := g.batch(60)
		if err := s.Append(context.Background(), b); err != nil {
			t.Fatal(err)
		}
		m.append(b)
	}
	var buf bytes.Buffer
	if err := s.Backup(context.Background(), &buf); err != nil {
		t.Fatal(err)
	}
	fill(t, s, 0, 100, log.LevelInfo) // not in the backup
	names, err := fs.List("/log")
	if err != nil || len(names) != 2 {
		t.Fatalf("left behind: %v, %v", names, err)
	}

	for cut := 0; cut < buf.Len(); cut += 1 + buf.Len()/17 {
		spoilt := bytes.Clone(buf.Bytes())
		spoilt[cut] ^= 0x40
		fs2 := vfs.NewMem()
		_ = fs2.MkdirAll("/log", 0o700)
		if err := Unpack(context.Background(), fs2, "/log", bytes.NewReader(spoilt)); err == nil {
			// Only padding and times of the tar may differ without harm; the files have checksums.
			r, err := Open(testOptions(fs2))
			if err != nil {
				t.Fatal(err)
			}
			compare(t, log.Query{}, ask(t, r, log.Query{}), m.query(log.Query{}, nil))
			mustClose(t, r)
		}
		fs3 := vfs.NewMem()
		_ = fs3.MkdirAll("/log", 0o700)
		err := Unpack(context.Background(), fs3, "/log", io.LimitReader(&lazy{buf.Bytes()}, int64(cut)))
		names, _ := fs3.List("/log")
		if cut < buf.Len()-1024 && (err == nil || len(names) != 0) {
			t.Fatalf("cut at %d: %v, left behind %v", cut, err, names)
		}
	}

	fs4 := vfs.NewMem()
	_ = fs4.MkdirAll("/log", 0o700)
	if err := Unpack(context.Background(), fs4, "/log", bytes.NewReader(buf.Bytes())); err != nil {
		t.Fatal(err)
	}
	r := openTest(t, testOptions(fs4))
	compare(t, log.Query{}, ask(t, r, log.Query{}), m.query(log.Query{}, nil))
	rep, err := r.Verify(context.Background(), log.VerifyRequest{})
	if err != nil || len(rep.Breaks) != 0 || rep.Checked == 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
}

type lazy struct{ b []byte }

func (l *lazy) Read(p []byte) (int, error) {
	if len(l.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, l.b)
	l.b = l.b[n:]
	return n, nil
}

// TestSegmentEdge fills heads up to the last row that the index can name, in appends of sizes that do not
// divide it: rows have 16 bits, and a head that went beyond once had its index built without end.
func TestSegmentEdge(t *testing.T) {
	s := openTest(t, Options{Dir: t.TempDir(), HeadBytes: 1 << 30, RawBytes: 1 << 30})
	const n = 2*maxRows + 777
	at := int64(1_700_000_000e9)
	for done := 0; done < n; {
		es := make([]log.Entry, min(9973, n-done))
		for i := range es {
			k := at + int64(done+i)*1e6
			es[i] = log.Entry{Time: time.Unix(0, k).UTC(), ID: string(rec.AppendV7(nil, uint64(k/1e6), 1, uint64(done+i))), Level: log.LevelInfo, Message: "m", Objects: []string{"vm-1"}}
		}
		if err := s.Append(context.Background(), es); err != nil {
			t.Fatal(err)
		}
		done += len(es)
	}
	waitPacked(t, s)
	got := 0
	if err := s.Query(context.Background(), log.Query{Objects: []string{"vm-1"}}, func(log.Result) error { got++; return nil }); err != nil || got != n {
		t.Fatalf("%d of %d entries: %v", got, n, err)
	}
}
