package idset

import (
	"math/rand/v2"
	"testing"
)

func TestFilter(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	hs := make([]uint64, 65536)
	for i := range hs {
		hs[i] = Hash(rng.Uint64()>>16, rng.Uint64()>>52, rng.Uint64()>>2)
	}
	f := Build(hs)
	for _, h := range hs {
		if ok, err := Has(f, h); !ok || err != nil {
			t.Fatal("an id is missing", err)
		}
	}
	wrong := 0
	for range 100000 {
		if ok, _ := Has(f, Hash(rng.Uint64()>>16, 0, rng.Uint64()>>2)); ok {
			wrong++
		}
	}
	if wrong > 600 {
		t.Fatalf("%d of 100,000 strangers taken for members", wrong)
	}
	for _, bad := range [][]byte{nil, make([]byte, 63)} {
		if _, err := Has(bad, 1); err == nil {
			t.Fatal("a filter of a wrong size accepted")
		}
	}
}
