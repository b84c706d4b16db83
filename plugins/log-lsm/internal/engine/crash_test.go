package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// cuts is how many power cuts TestPowerCuts makes: MVIRT_POWER_CUTS, 1,000 by default.
func cuts(t *testing.T) int {
	if s := os.Getenv("MVIRT_POWER_CUTS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if testing.Short() {
		return 100
	}
	return 1000
}

// TestPowerCuts cuts the power at random moments of a workload: afterwards every acknowledged entry is
// there, nothing is that was not sent, and the indexes agree with the entries both ways. A cut is a copy of
// the file system as it might be found: what was synced, and some of what was not. Life then goes on on the
// copy, so that later cuts hit stores that have been cut before.
func TestPowerCuts(t *testing.T) {
	rng := newRand(t)
	total := cuts(t)
	fs := vfs.NewCrashableMem()
	o := testOptions(fs)
	acked := map[string]log.Entry{}
	sent := map[string]log.Entry{}
	g := &gen{rng: rng, now: 1.7e18}
	for cut := range total {
		if cut%40 == 0 { // a new life, so that a check stays quick
			fs = vfs.NewCrashableMem()
			clear(acked)
			clear(sent)
			g.past = nil
		}
		o.FS = fs
		o.SegmentRows = []int{3, 20, 130, 400}[rng.IntN(4)]
		o.RawBytes = []int64{1, 64 << 10, 64 << 20}[rng.IntN(3)]
		s := mustOpen(t, o)
		var mu sync.Mutex
		var wg sync.WaitGroup
		stop := make(chan struct{})
		batches := make(chan []log.Entry, 64)
		for range 3 {
			wg.Go(func() {
				for b := range batches {
					err := s.Append(context.Background(), b)
					select {
					case <-stop: // acknowledged after the cut: says nothing
					default:
					}
					if err == nil {
						mu.Lock()
						for _, e := range b {
							if _, ok := acked[e.ID]; !ok {
								acked[e.ID] = e
							}
						}
						mu.Unlock()
					}
				}
			})
		}
		n := 1 + rng.IntN(12)
		for range n {
			b := g.batch(40)
			mu.Lock()
			for _, e := range b {
				if _, ok := sent[e.ID]; !ok {
					sent[e.ID] = e
				}
			}
			mu.Unlock()
			batches <- b
		}
		if rng.IntN(4) == 0 {
			waitPacked(t, s)
		}
		// What is acknowledged before the copy begins must be in it.
		mu.Lock()
		must := make(map[string]log.Entry, len(acked))
		for k, v := range acked {
			must[k] = v
		}
		mu.Unlock()
		next := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rand.New(rand.NewPCG(rng.Uint64(), 1))})
		close(stop)
		close(batches)
		wg.Wait()
		mustClose(t, s)
		fs = next
		o.FS = fs
		s = mustOpen(t, o)
		have := map[string]bool{}
		for _, r := range ask(t, s, log.Query{}) {
			if have[r.Entry.ID] {
				t.Fatalf("cut %d: %s is there twice", cut, r.Entry.ID)
			}
			have[r.Entry.ID] = true
			if _, ok := sent[r.Entry.ID]; !ok {
				t.Fatalf("cut %d: %s was never sent", cut, r.Entry.ID)
			}
		}
		for id := range must {
			if !have[id] {
				t.Fatalf("cut %d: %s was acknowledged and is gone (%d of %d are there)", cut, id, len(have), len(must))
			}
		}
		checkClean(t, s)
		if rep, err := s.Verify(context.Background(), log.VerifyRequest{}); err != nil || len(rep.Breaks) > 0 {
			t.Fatalf("cut %d: chain %+v, %v", cut, rep, err)
		}
		if t.Failed() {
			t.Fatalf("at cut %d", cut)
		}
		mustClose(t, s)
		// Go on from what was found.
		clear(acked)
		for id := range have {
			acked[id] = sent[id]
		}
	}
	t.Logf("%d power cuts", total)
}

func TestDiskFull(t *testing.T) {
	mem := vfs.NewMem()
	var full atomic.Bool
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full.Load() && op.Kind.ReadOrWrite() == errorfs.OpIsWrite && op.Kind != errorfs.OpRemove && op.Kind != errorfs.OpFileClose {
			return syscall.ENOSPC
		}
		return nil
	}))
	o := testOptions(fs)
	s := openTest(t, o)
	fill(t, s, 0, 500, log.LevelInfo)
	waitPacked(t, s)
	full.Store(true)
	refused := 0
	for i := range 50 {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		err := s.Append(ctx, []log.Entry{entry(1000+i, log.LevelInfo, "vm-1")})
		cancel()
		if errs.KindOf(err) == errs.Exhausted && errs.RemedyOf(err) != "" {
			refused++
		} else {
			t.Fatal(err)
		}
	}
	if refused != 50 {
		t.Fatalf("%d of 50 refused", refused)
	}
	if c := s.Conditions(); len(c) != 1 || c[0].Code != condFull {
		t.Fatalf("conditions %+v", c)
	}
	if n := len(ask(t, s, log.Query{})); n != 500 {
		t.Fatalf("%d entries can be read", n)
	}
	full.Store(false)
	fill(t, s, 2000, 100, log.LevelInfo)
	if n := len(ask(t, s, log.Query{})); n < 600 || n > 650 {
		t.Fatalf("%d entries", n)
	}
}

// TestDiskFullWhilePacking fills the disk below Pebble only: packing waits, and goes on by itself.
func TestDiskFullWhilePacking(t *testing.T) {
	mem := vfs.NewMem()
	var full atomic.Bool
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full.Load() && (op.Kind == errorfs.OpFileWrite || op.Kind == errorfs.OpCreate) {
			return syscall.ENOSPC
		}
		return nil
	}))
	s := openTest(t, testOptions(fs))
	fill(t, s, 0, 250, log.LevelInfo)
	full.Store(true)
	// The heads become full; the sealer meets the full disk.
	for i := 0; i < 100; i++ {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		err := s.Append(ctx, []log.Entry{entry(250+i, log.LevelInfo)})
		cancel()
		if err != nil && errs.KindOf(err) != errs.Exhausted {
			t.Fatal(err)
		}
		if err != nil {
			break
		}
	}
	full.Store(false)
	waitPacked(t, s)
	fill(t, s, 1000, 10, log.LevelInfo)
}

func TestFailedSync(t *testing.T) {
	mem := vfs.NewMem()
	var bad atomic.Bool
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if bad.Load() && op.Kind == errorfs.OpFileSyncData {
			return syscall.EIO
		}
		return nil
	}))
	s := mustOpen(t, testOptions(fs))
	fill(t, s, 0, 10, log.LevelInfo)
	bad.Store(true)
	if err := s.Append(context.Background(), []log.Entry{entry(10, log.LevelInfo)}); errs.KindOf(err) != errs.Unavailable {
		t.Fatal(err)
	}
	bad.Store(false)
	if err := s.Append(context.Background(), []log.Entry{entry(11, log.LevelInfo)}); errs.KindOf(err) != errs.Unavailable {
		t.Fatal("went on after a failed sync:", err)
	}
	if n := len(ask(t, s, log.Query{})); n != 10 {
		t.Fatalf("%d entries are shown", n)
	}
	if c := s.Conditions(); len(c) != 1 || c[0].Code != condBroken {
		t.Fatalf("conditions %+v", c)
	}
	mustClose(t, s)
	s = openTest(t, testOptions(fs))
	fill(t, s, 20, 10, log.LevelInfo)
	if n := len(ask(t, s, log.Query{})); n < 20 || n > 22 {
		t.Fatalf("%d entries", n)
	}
}

// TestCorruptTables spoils bytes of tables: no panic, what is damaged is said, everything else is readable.
func TestCorruptTables(t *testing.T) {
	rng := newRand(t)
	for round := range 15 {
		fs := vfs.NewMem()
		o := testOptions(fs)
		s := mustOpen(t, o)
		want := fill(t, s, 0, 3000, log.LevelInfo, "vm-1", "vm-2")
		want = append(want, fill(t, s, 3000, 900, log.LevelAudit, "vm-1")...)
		waitPacked(t, s)
		if err := s.db.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := s.db.Compact(context.Background(), []byte{0}, []byte{0xff}, false); err != nil {
			t.Fatal(err)
		}
		mustClose(t, s)
		dir := fs.PathJoin("/log", storeDir, dbDir)
		names, err := fs.List(dir)
		if err != nil {
			t.Fatal(err)
		}
		spoilt := 0
		for _, n := range names {
			if len(n) > 4 && n[len(n)-4:] == ".sst" {
				b, err := fs.UnsafeGetFileDataBuffer(fs.PathJoin(dir, n))
				if err != nil {
					t.Fatal(err)
				}
				for range 1 + rng.IntN(3) {
					b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
					spoilt++
				}
			}
		}
		if spoilt == 0 {
			t.Fatal("no table")
		}
		s, err = Open(o)
		if err != nil {
			if k := errs.KindOf(err); k != errs.Corrupt || errs.RemedyOf(err) == "" {
				t.Fatalf("round %d: %v (%v)", round, err, k)
			}
			continue
		}
		known := map[string]bool{}
		for _, e := range want {
			known[e.ID] = true
		}
		for _, q := range []log.Query{{}, {NewestFirst: true}, {Objects: []string{"vm-2"}}, {Contains: "entry 7"}} {
			n := 0
			err := s.Query(context.Background(), q, func(r log.Result) error {
				if !known[r.Entry.ID] {
					t.Fatalf("round %d: an entry that was never sent", round)
				}
				n++
				return nil
			})
			if err != nil && errs.KindOf(err) != errs.Corrupt {
				t.Fatalf("round %d: %v", round, err)
			}
			if q.Contains == "" && q.Objects == nil && n < len(want) && err == nil && len(s.Conditions()) == 0 {
				t.Fatalf("round %d: %d of %d entries, and nothing is said", round, n, len(want))
			}
			if err == nil && n == 0 {
				t.Fatalf("round %d: nothing found, and nothing said", round)
			}
		}
		if _, err := s.Check(context.Background()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Verify(context.Background(), log.VerifyRequest{}); err != nil && errs.KindOf(err) != errs.Corrupt {
			t.Fatal(err)
		}
		// New entries are taken all the same.
		if err := s.Append(context.Background(), []log.Entry{entry(9999, log.LevelInfo)}); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		if err := s.Close(ctx); err != nil && !pebble.IsCorruptionError(err) && !errors.Is(err, context.DeadlineExceeded) {
			t.Logf("round %d: close: %v", round, err)
		}
		cancel()
	}
}

// TestVerify edits, removes and inserts audit entries behind the store's back.
func TestVerify(t *testing.T) {
	build := func(t *testing.T) (*vfs.MemFS, []log.Entry) {
		fs := vfs.NewMem()
		s := mustOpen(t, testOptions(fs))
		es := fill(t, s, 0, 700, log.LevelAudit, "vm-1")
		waitPacked(t, s)
		checkClean(t, s)
		if rep, err := s.Verify(context.Background(), log.VerifyRequest{}); err != nil || len(rep.Breaks) != 0 || rep.Checked != 700 || len(rep.Head) != 64 {
			t.Fatalf("%+v, %v", rep, err)
		}
		mustClose(t, s)
		return fs, es
	}
	verify := func(t *testing.T, fs vfs.FS) log.VerifyReport {
		s := mustOpen(t, testOptions(fs))
		defer mustClose(t, s)
		rep, err := s.Verify(context.Background(), log.VerifyRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return rep
	}
	// rewrite packs a segment again with other entries, as somebody would who has this program's source.
	rewrite := func(t *testing.T, fs vfs.FS, change func(rows []tampered) []tampered) {
		s := mustOpen(t, testOptions(fs))
		defer mustClose(t, s)
		s.sealMu.Lock()
		defer s.sealMu.Unlock()
		seg := s.segs[auditLevel][0]
		rewriteSegment(t, s, seg, change)
	}
	t.Run("edited", func(t *testing.T) {
		fs, es := build(t)
		rewrite(t, fs, func(rows []tampered) []tampered { rows[10].entry.Message = "nothing happened"; return rows })
		rep := verify(t, fs)
		if len(rep.Breaks) != 1 || rep.Breaks[0].What != "edited" || rep.Breaks[0].EntryID != es[10].ID {
			t.Fatalf("%+v", rep.Breaks)
		}
	})
	t.Run("removed", func(t *testing.T) {
		fs, es := build(t)
		rewrite(t, fs, func(rows []tampered) []tampered { return append(rows[:20], rows[21:]...) })
		rep := verify(t, fs)
		if len(rep.Breaks) == 0 || rep.Breaks[0].EntryID != es[21].ID {
			t.Fatalf("%+v", rep.Breaks)
		}
	})
	// The hash that comes with what is inserted: of another entry, made up, or right for its place.
	for name, forge := range map[string]func(before, behind, rec []byte) []byte{
		"taken":   func(_, behind, _ []byte) []byte { return behind },
		"made up": func(_, _, rec []byte) []byte { h := sha256.Sum256(rec); return h[:] },
		"right": func(before, _, rec []byte) []byte {
			h := sha256.Sum256(append(bytes.Clone(before), rec...))
			return h[:]
		},
	} {
		t.Run("inserted, hash "+name, func(t *testing.T) {
			fs, _ := build(t)
			extra := []log.Entry{entry(30, log.LevelAudit), entry(30, log.LevelAudit)}
			if extra[0].ID > extra[1].ID {
				extra[0].ID, extra[1].ID = extra[1].ID, extra[0].ID
			}
			rewrite(t, fs, func(rows []tampered) []tampered {
				var put []tampered
				before := rows[30].hash
				for _, e := range extra {
					before = forge(before, rows[31].hash, rec.Append(nil, &e))
					put = append(put, tampered{e, before})
				}
				return append(rows[:31:31], append(put, rows[31:]...)...)
			})
			got := map[string]string{}
			for _, b := range verify(t, fs).Breaks {
				if b.What == "inserted" {
					got[b.EntryID] = b.Detail
				}
			}
			// A segment that has grown makes the one behind it begin with numbers that are taken: those are told too.
			for _, e := range extra {
				if got[e.ID] == "" {
					t.Errorf("inserted entry %s is not named: %v", e.ID, got)
				}
			}
		})
	}
	t.Run("newest packed removed", func(t *testing.T) {
		fs, _ := build(t)
		tamper(t, fs, func(db *pebble.DB) {
			v := append([]byte(nil), 0, 0, 0, 0, 0, 0, 0, 0)
			v = append(v, make([]byte, hashLen)...)
			v[6], v[7] = 0x27, 0x10 // says 10,000
			if err := db.Set(keys.BytesKey(keys.Misc, []byte(miscChain)), v, pebble.Sync); err != nil {
				t.Fatal(err)
			}
		})
		s := mustOpen(t, testOptions(fs))
		defer mustClose(t, s)
		rep, err := s.Verify(context.Background(), log.VerifyRequest{})
		if err != nil || len(rep.Breaks) == 0 || rep.Breaks[len(rep.Breaks)-1].What != "removed" {
			t.Fatalf("%+v, %v", rep.Breaks, err)
		}
	})
}
