package dict

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/head"
	"github.com/mvirt/mvirt/plugins/log-lsm/internal/keys"
)

func open(t *testing.T) *pebble.DB {
	t.Helper()
	db, err := pebble.Open("/db", &pebble.Options{FS: vfs.NewMem()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func flushed(t *testing.T, db *pebble.DB, flush func(*pebble.Batch) error) {
	t.Helper()
	b := db.NewBatch()
	if err := flush(b); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(pebble.Sync); err != nil {
		t.Fatal(err)
	}
}

func TestObjects(t *testing.T) {
	db := open(t)
	d := NewObjects(db, 1, 1) // 1,024 places, for 5,000 ids
	const n = 5000
	nums := map[string]uint32{}
	for i := range n {
		id := fmt.Sprintf("id-%d", i)
		num, err := d.Intern([]byte(id))
		if err != nil {
			t.Fatal(err)
		}
		nums[id] = num
	}
	// Not written yet, and long out of the places: still known.
	for id, want := range nums {
		if num, err := d.Intern([]byte(id)); err != nil || num != want {
			t.Fatalf("%s: %d, want %d, %v", id, num, want, err)
		}
	}
	flushed(t, db, d.Flush)
	d.Done()
	d = NewObjects(db, d.Next(), 1)
	for id, want := range nums {
		num, ok, err := d.Find([]byte(id))
		if err != nil || !ok || num != want {
			t.Fatalf("%s: %d %v, want %d, %v", id, num, ok, want, err)
		}
		if name, err := d.Name(num); err != nil || name != id {
			t.Fatalf("%d is %q, %v", num, name, err)
		}
	}
	if _, ok, err := d.Find([]byte("id-")); ok || err != nil {
		t.Fatal("a prefix of ids was found", err)
	}
	if _, err := d.Name(n + 7); !errors.Is(err, ErrMissing) {
		t.Fatal(err)
	}
}

func TestShapes(t *testing.T) {
	db := open(t)
	d := NewShapes(db, 1)
	text := []byte("volume \xff resized")
	for i := range worth - 1 {
		if s, err := d.Intern(text); s != nil || err != nil {
			t.Fatalf("worth a number after %d, %v", i+1, err)
		}
	}
	s, err := d.Intern(text)
	if err != nil || s == nil || s.Num != 1 {
		t.Fatal(s, err)
	}
	flushed(t, db, d.Flush)
	d.Done()
	d = NewShapes(db, 2)
	if s, err := d.Shape(1); err != nil || s.Num != 1 {
		t.Fatal(err)
	}
	// More shapes than memory has room for; none changes its number.
	for i := range maxShapesInMemory + 100 {
		for range worth {
			if _, err := d.Intern(fmt.Appendf(nil, "shape %d \xff", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	flushed(t, db, d.Flush)
	d.Done()
	for i := range 200 {
		var num uint32
		for range worth {
			if s, err := d.Intern(fmt.Appendf(nil, "shape %d \xff", i)); err != nil {
				t.Fatal(err)
			} else if s != nil {
				num = s.Num
			}
		}
		if num != uint32(i+2) {
			t.Fatalf("shape %d has number %d", i, num)
		}
	}
}

// counting counts what a dictionary asks the store.
type counting struct {
	*pebble.DB
	n int
}

func (c *counting) Get(key []byte) ([]byte, io.Closer, error) { c.n++; return c.DB.Get(key) }

// TestSieve: the store is not asked for new ids, known ones are found as ever, also those of before a restart.
func TestSieve(t *testing.T) {
	db := &counting{DB: open(t)}
	fill := func(d *Objects) {
		it, err := db.NewIter(&pebble.IterOptions{LowerBound: []byte{keys.Object}, UpperBound: []byte{keys.Object + 1}})
		if err != nil {
			t.Fatal(err)
		}
		d.Fill(it, nil)
		if err := it.Close(); err != nil {
			t.Fatal(err)
		}
	}
	d := NewObjects(db, 1, 1)
	fill(d)
	const n = 20_000 // more than are kept in memory
	nums := map[string]uint32{}
	for round := range 3 {
		db.n = 0
		for i := range n {
			id := fmt.Sprintf("id-%d-%d", round, i)
			num, err := d.Intern([]byte(id))
			if err != nil {
				t.Fatal(err)
			}
			nums[id] = num
		}
		if db.n > n/100 {
			t.Errorf("round %d: the store was asked %d times for %d new ids", round, db.n, n)
		}
		flushed(t, db.DB, d.Flush)
		d.Done()
		if round == 1 {
			d = NewObjects(db, d.Next(), 1)
			fill(d)
		}
	}
	seen := map[uint32]bool{}
	for id, want := range nums {
		if num, err := d.Intern([]byte(id)); err != nil || num != want || seen[num] {
			t.Fatalf("%s: %d, %v, want %d", id, num, err, want)
		}
		seen[want] = true
	}
	var s sieve
	s.ready = true
	for i := range uint64(sieveMost + 1) {
		s.add(head.ObjectHash{A: i << 32, B: i})
	}
	if s.lacks(head.ObjectHash{A: 1, B: 1}) {
		t.Error("a sieve that is given up still says that an id is new")
	}
}
