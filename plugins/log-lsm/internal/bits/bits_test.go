package bits

import (
	"math/rand/v2"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for w := 0; w <= 64; w++ {
		for _, n := range []int{0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129} {
			vals := make([]uint64, n)
			base := rng.Uint64()
			for i := range vals {
				v := rng.Uint64()
				if w < 64 {
					v &= 1<<w - 1
					base >>= 1
				}
				vals[i] = v
				if w < 63 && base < 1<<62 {
					vals[i] += base
				}
			}
			enc := append(Append(nil, vals), 0xAA)
			c, rest, err := Read(enc, n)
			if err != nil || len(rest) != 1 || rest[0] != 0xAA {
				t.Fatalf("width %d, %d rows: rest %x, %v", w, n, rest, err)
			}
			for i, v := range vals {
				if got := c.At(i); got != v {
					t.Fatalf("width %d, row %d of %d: %d, want %d", w, i, n, got, v)
				}
			}
		}
	}
}

func TestZig(t *testing.T) {
	for _, v := range []int64{0, 1, -1, 1 << 62, -1 << 63, 1<<63 - 1} {
		if Zag(Zig(v)) != v {
			t.Fatalf("%d does not come back", v)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(Append(nil, []uint64{1, 2, 3}), 3)
	f.Add([]byte{64, 0}, 1)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if n > 1<<16 {
			return
		}
		c, rest, err := Read(b, n)
		if err != nil {
			return
		}
		if len(rest) > len(b) {
			t.Fatal("rest grew")
		}
		for i := range c.Len() {
			c.At(i)
		}
	})
}
