package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// sink is a log plugin that stores an id once and can be away.
type sink struct {
	mu     sync.Mutex
	fail   func(n int) error // of the nth call
	calls  int
	after  bool // fail after storing
	got    []log.Entry
	ids    map[string]bool
	arrive chan struct{}
}

func newSink() *sink { return &sink{ids: map[string]bool{}, arrive: make(chan struct{}, 1)} }

func (s *sink) Append(_ context.Context, entries []log.Entry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	var err error
	if s.fail != nil {
		err = s.fail(s.calls)
	}
	if err == nil || s.after {
		for _, e := range entries {
			if !s.ids[e.ID] {
				s.ids[e.ID] = true
				s.got = append(s.got, e)
			}
		}
	}
	select {
	case s.arrive <- struct{}{}:
	default:
	}
	return err
}

func (s *sink) messages() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.got {
		out = append(out, e.Message)
	}
	return out
}

// open opens a spool that leaves out the fsyncs: what a power cut leaves, the tests make themselves.
func open(t *testing.T, dir string, to Appender) *Recorder {
	t.Helper()
	r, err := Open(Options{Dir: dir, To: to, Log: quiet, sync: func(*os.File) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func put(t *testing.T, r *Recorder, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := r.Append(t.Context(), log.Entry{ID: fmt.Sprintf("id-%d", i), Level: log.LevelAudit, Message: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
}

func inOrder(t *testing.T, got []string, n int) {
	t.Helper()
	if len(got) != n {
		t.Fatalf("%d entries arrived, want %d: %q", len(got), n, got)
	}
	for i, m := range got {
		if m != fmt.Sprint(i) {
			t.Fatalf("entry %d is %q", i, m)
		}
	}
}

var errAway = errs.New(errs.Unavailable, "away")

func away(int) error { return errAway }

func TestDeliveryInOrderOnce(t *testing.T) {
	for _, after := range []bool{false, true} {
		s := newSink()
		s.after = after
		s.fail = func(n int) error {
			if n%3 != 0 {
				return errAway
			}
			return nil
		}
		r := open(t, t.TempDir(), s)
		put(t, r, 0, 50)
		done := make(chan error, 1)
		go func() { done <- r.Flush(t.Context()) }()
		for waiting := true; waiting; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				waiting = false
			case <-s.arrive:
				r.Kick()
			}
		}
		inOrder(t, s.messages(), 50)
		if r.Spooled() != 0 {
			t.Errorf("%d spooled", r.Spooled())
		}
		if err := r.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKeptWhileAway(t *testing.T) {
	dir, s := t.TempDir(), newSink()
	s.fail = away
	for i := range 4 { // four runs of the core, none of which can deliver
		r := open(t, dir, s)
		put(t, r, i*10, i*10+10)
		if got := r.Spooled(); got != uint64(i*10+10) {
			t.Fatalf("run %d: %d spooled", i, got)
		}
		r.Close(closedContext())
	}
	s.mu.Lock()
	s.fail = nil
	s.mu.Unlock()
	r := open(t, dir, s)
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	inOrder(t, s.messages(), 40)
	r.Close(t.Context())
	names, _ := filepath.Glob(filepath.Join(dir, "*"+segmentExt))
	if len(names) != 1 {
		t.Errorf("segments stay: %v", names)
	}
	s = newSink()
	r = open(t, dir, s)
	r.Flush(t.Context())
	r.Close(t.Context())
	if got := s.messages(); len(got) != 0 {
		t.Errorf("delivered again: %q", got)
	}
}

func closedContext() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// TestPowerCut cuts the spool at each length, and in each place flips a bit: whatever was acknowledged before
// the cut arrives, and the spool works on.
func TestPowerCut(t *testing.T) {
	dir, s := t.TempDir(), newSink()
	s.fail = away
	r := open(t, dir, s)
	var ends []int64 // size of the segment after each acknowledgement
	path := filepath.Join(dir, fmt.Sprintf("%016x%s", 1, segmentExt))
	for i := range 5 {
		put(t, r, i, i+1)
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, st.Size())
	}
	r.Close(closedContext())
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(data []byte, least int, what string) {
		t.Helper()
		d := t.TempDir()
		if err := os.WriteFile(filepath.Join(d, filepath.Base(path)), data, 0o600); err != nil {
			t.Fatal(err)
		}
		s := newSink()
		r := open(t, d, s)
		if err := r.Append(t.Context(), log.Entry{ID: "later", Level: log.LevelAudit, Message: "later"}); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := r.Flush(t.Context()); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		r.Close(t.Context())
		var got []string
		for _, m := range s.messages() {
			if !strings.HasPrefix(m, "audit spool: ") {
				got = append(got, m)
			}
		}
		if len(got) < least+1 || got[len(got)-1] != "later" {
			t.Fatalf("%s: got %q, want at least %d and the later one", what, got, least)
		}
		inOrder(t, got[:len(got)-1], len(got)-1)
	}
	for cut := 0; cut <= len(whole); cut++ {
		least := 0
		for _, e := range ends {
			if int64(cut) >= e {
				least++
			}
		}
		check(whole[:cut], least, fmt.Sprintf("cut at %d", cut))
		torn := append([]byte(nil), whole...)
		clear(torn[cut:]) // the length is there, the data is not
		check(torn, least, fmt.Sprintf("zeros from %d", cut))
	}
	for at := len(segmentMagic); at < len(whole); at += 3 {
		flipped := append([]byte(nil), whole...)
		flipped[at] ^= 0x10
		least := 0
		for _, e := range ends {
			if int64(at) >= e {
				least++
			}
		}
		check(flipped, least, fmt.Sprintf("bit flipped at %d", at))
	}
	d := t.TempDir()
	os.WriteFile(filepath.Join(d, filepath.Base(path)), []byte("mvirt-audit-9\n\x00\x00"), 0o600)
	if _, err := Open(Options{Dir: d, To: newSink(), Log: quiet}); !errors.Is(err, errs.Precondition) {
		t.Errorf("a newer format: %v", err)
	}
}

func TestDamageIsReported(t *testing.T) {
	dir, s := t.TempDir(), newSink()
	s.fail = away
	r := open(t, dir, s)
	big := strings.Repeat("x", 60000)
	for i := range 40 { // more than one segment
		if err := r.Append(t.Context(), log.Entry{ID: fmt.Sprint("b", i), Level: log.LevelAudit, Message: big}); err != nil {
			t.Fatal(err)
		}
	}
	r.Close(closedContext())
	names, _ := filepath.Glob(filepath.Join(dir, "*"+segmentExt))
	if len(names) < 3 {
		t.Fatalf("%d segments", len(names))
	}
	data, _ := os.ReadFile(names[0])
	data[100] ^= 1
	os.WriteFile(names[0], data, 0o600)
	s = newSink()
	r = open(t, dir, s)
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Close(t.Context())
	reported, rest := 0, 0
	for _, m := range s.messages() {
		if strings.Contains(m, "damaged and are lost") {
			reported++
		} else {
			rest++
		}
	}
	if reported != 1 || rest < 15 {
		t.Errorf("reported %d times, %d entries survived", reported, rest)
	}
}

func TestFull(t *testing.T) {
	s := newSink()
	s.fail = away
	r, err := Open(Options{Dir: t.TempDir(), Limit: 1 << 20, To: s, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 60000)
	n := 0
	for ; r.Admit() == nil; n++ {
		if err := r.Append(t.Context(), log.Entry{Level: log.LevelAudit, Message: big}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Admit(); !errors.Is(err, errs.Unavailable) || errs.RemedyOf(err) == "" {
		t.Errorf("%v", err)
	}
	if err := r.Append(t.Context(), log.Entry{Level: log.LevelAudit, Message: big}); err != nil {
		t.Errorf("what has begun cannot be recorded any more: %v", err)
	}
	for err == nil && n < 1000 {
		err = r.Append(t.Context(), log.Entry{Level: log.LevelAudit, Message: big})
		n++
	}
	if !errors.Is(err, errs.Exhausted) {
		t.Errorf("no limit: %v", err)
	}
	s.mu.Lock()
	s.fail = nil
	s.mu.Unlock()
	r.Kick()
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.Admit(); err != nil {
		t.Errorf("delivered, and still full: %v", err)
	}
	r.Close(t.Context())
}

func TestPoison(t *testing.T) {
	s := newSink()
	var entries []string
	r, err := Open(Options{Dir: t.TempDir(), To: refusing{s}, Log: quiet, Trouble: func(code, text, _ string) {
		if code == "AUDIT_REFUSED" {
			entries = append(entries, text)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		m := fmt.Sprint(i)
		if i == 7 {
			m = "poison"
		}
		if err := r.Append(t.Context(), log.Entry{Level: log.LevelAudit, Message: m}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Close(t.Context())
	if got := s.messages(); len(got) != 19 || len(entries) != 1 {
		t.Errorf("%d arrived, %d complaints", len(got), len(entries))
	}
}

type refusing struct{ *sink }

func (r refusing) Append(ctx context.Context, entries []log.Entry) error {
	for _, e := range entries {
		if e.Message == "poison" {
			return errs.New(errs.Invalid, "poison")
		}
	}
	return r.sink.Append(ctx, entries)
}

func TestAppendTogether(t *testing.T) {
	s := newSink()
	r := open(t, t.TempDir(), s)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			if err := r.Append(t.Context(), log.Entry{ID: fmt.Sprint("c", i), Level: log.LevelAudit, Message: "m"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := r.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Close(t.Context())
	if got := len(s.messages()); got != 200 {
		t.Errorf("%d arrived", got)
	}
	if err := r.Append(t.Context(), log.Entry{Level: log.LevelAudit}); !errors.Is(err, errs.Unavailable) {
		t.Errorf("append after close: %v", err)
	}
}

func TestNotes(t *testing.T) {
	now := time.Unix(1000, 0)
	s := newSink()
	r, err := Open(Options{Dir: t.TempDir(), To: s, Log: quiet, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		r.Note(log.Entry{Level: log.LevelInfo, Component: "loud", Message: fmt.Sprint(i)})
	}
	r.Note(log.Entry{Level: log.LevelInfo, Component: "shy", Message: "hello"})
	if n := r.Dropped(); n != 3000 {
		t.Errorf("%d dropped", n)
	}
	r.Close(t.Context())
	loud, shy, counted := 0, 0, ""
	for _, e := range s.got {
		switch e.Component {
		case "loud":
			loud++
		case "shy":
			shy++
		case "core":
			counted = e.Message
		}
	}
	if loud != noteBurst || shy != 1 || !strings.HasPrefix(counted, "3000 log lines of loud were dropped") {
		t.Errorf("%d loud, %d shy, %q", loud, shy, counted)
	}
}

// TestNotesRefused: a line that the log plugin refuses does not hold up the others, nor does a time that cannot be.
func TestNotesRefused(t *testing.T) {
	s := newSink()
	now := time.Unix(1_700_000_000, 0)
	r, err := Open(Options{Dir: t.TempDir(), To: refusing{s}, Log: quiet, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []string{"a", "poison", "b", "poison", "c"} {
		r.Note(log.Entry{Level: log.LevelInfo, Component: "x", Message: m, Time: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)})
	}
	r.Close(t.Context())
	if got := strings.Join(s.messages(), ""); got != "abc" {
		t.Errorf("%q arrived", got)
	}
	for _, e := range s.got {
		if !e.Time.Equal(now) {
			t.Errorf("time %s", e.Time)
		}
	}
	if n := r.Dropped(); n != 2 {
		t.Errorf("%d dropped", n)
	}
}

func TestTrim(t *testing.T) {
	e := trim(log.Entry{Message: strings.Repeat("é", log.MaxMessage), Objects: append([]string{"", strings.Repeat("o", 300)}, make([]string, 100)...),
		Labels: map[string]string{"k": strings.Repeat("v", 10000), "": "x", "bad\xff": "\xff"}})
	if len(e.Message) > log.MaxMessage || len(e.Objects) != 0 || len(e.Labels["k"]) > 4096 || e.Labels["bad?"] != "?" {
		t.Errorf("%d bytes, %d objects, labels %v", len(e.Message), len(e.Objects), len(e.Labels))
	}
}

func FuzzSegment(f *testing.F) {
	f.Add([]byte(segmentMagic))
	f.Add([]byte(segmentMagic + "\x02\x00\x00\x00\x00\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "0000000000000001.spool")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, size, whole, _, err := scanSegment(path)
		if err == nil && (size > whole || whole != int64(len(data))) {
			t.Fatalf("size %d of %d, %d given", size, whole, len(data))
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	r, err := Open(Options{Dir: b.TempDir(), To: newSink(), Log: quiet})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := r.Append(b.Context(), log.Entry{Level: log.LevelAudit, Message: "VM web: done"}); err != nil {
			b.Fatal(err)
		}
	}
	r.Close(b.Context())
}
