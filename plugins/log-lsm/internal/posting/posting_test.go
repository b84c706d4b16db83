package posting

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 300 {
		var b Builder
		want := map[uint32][]uint16{}
		for low := range uint32(64) {
			if rng.IntN(2) == 0 {
				continue
			}
			n := 1 + rng.IntN(1<<rng.IntN(14))
			var rows []uint16
			for range n {
				rows = append(rows, uint16(rng.IntN(MaxRows)))
			}
			slices.Sort(rows)
			rows = slices.Compact(rows)
			want[low] = rows
			if err := b.Add(low, rows); err != nil {
				t.Fatal(err)
			}
		}
		page := b.Page(nil)
		for low := range uint32(64) {
			list, ok, err := Find(page, low)
			if err != nil || ok != (want[low] != nil) {
				t.Fatalf("round %d object %d: found %v, %v", round, low, ok, err)
			}
			if !ok {
				continue
			}
			rows, err := list.Rows(nil)
			if err != nil || !slices.Equal(rows, want[low]) {
				t.Fatalf("round %d object %d: %d rows, want %d, %v", round, low, len(rows), len(want[low]), err)
			}
		}
	}
}

func TestEdges(t *testing.T) {
	all := make([]uint16, MaxRows)
	for i := range all {
		all[i] = uint16(i)
	}
	for _, rows := range [][]uint16{{0}, {65535}, {0, 65535}, all, all[:1000], all[64000:]} {
		var b Builder
		if err := b.Add(63, rows); err != nil {
			t.Fatal(err)
		}
		list, ok, err := Find(b.Page(nil), 63)
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		got, err := list.Rows(nil)
		if err != nil || !slices.Equal(got, rows) {
			t.Fatalf("%d rows, want %d, %v", len(got), len(rows), err)
		}
	}
}

func FuzzPage(f *testing.F) {
	var b Builder
	if err := b.Add(1, []uint16{1, 5, 900}); err != nil {
		f.Fatal(err)
	}
	if err := b.Add(9, []uint16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Page(nil))
	f.Fuzz(func(t *testing.T, page []byte) {
		_ = Each(page, func(_ uint32, l List) {
			rows, err := l.Rows(nil)
			if err == nil && !slices.IsSorted(rows) {
				t.Fatal("rows are not ascending")
			}
		})
	})
}

func TestRowsOutOfOrder(t *testing.T) {
	for _, rows := range [][]uint16{{1, 1}, {5, 4}, {65535, 0}, {1, 2, 3, 3}} {
		var b Builder
		if err := b.Add(1, rows); !errors.Is(err, ErrBad) {
			t.Errorf("%v: %v", rows, err)
		}
	}
}
