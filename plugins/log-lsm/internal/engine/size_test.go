package engine

import (
	"os"
	"testing"

	"github.com/cockroachdb/pebble/v2"
)

// TestSizes prints what an entry costs by key space; it asserts that a packed entry is small.
func TestSizes(t *testing.T) {
	n := 200_000
	if os.Getenv("MVIRT_BENCH_ENTRIES") != "" {
		n = benchN()
	}
	if testing.Short() {
		t.Skip("loads 200,000 entries; not with -short")
	}
	s := openTest(t, Options{Dir: t.TempDir()})
	load(t, s, workload(n), 8, 1000)
	compactAll(t, s)
	type size struct{ keys, key, value int }
	sizes := map[byte]*size{}
	it, err := s.db.NewIter(&pebble.IterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		z := sizes[it.Key()[0]]
		if z == nil {
			z = &size{}
			sizes[it.Key()[0]] = z
		}
		z.keys++
		z.key += len(it.Key())
		z.value += len(it.Value())
	}
	if err := it.Close(); err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, k := range []byte("dfiMmnotuxy") {
		if z := sizes[k]; z != nil {
			t.Logf("%c: %7d keys, %6.2f B of keys and %6.2f B of values an entry", k, z.keys, float64(z.key)/float64(n), float64(z.value)/float64(n))
			total += z.key + z.value
		}
	}
	m := s.db.Metrics()
	t.Logf("all: %.1f B; tables %.1f B an entry", float64(total)/float64(n), float64(m.Total().TablesSize)/float64(n))
	if per := float64(sizes['d'].value+sizes['i'].value+sizes['f'].value) / float64(n); per > 60 {
		t.Errorf("a packed entry takes %.1f bytes", per)
	}
}
