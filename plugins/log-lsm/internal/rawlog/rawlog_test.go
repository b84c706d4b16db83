package rawlog

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

const dir = "/raw"

func collect(t *testing.T, fs vfs.FS, readOnly bool) (*Log, []Part, []Damage) {
	t.Helper()
	var parts []Part
	l, d, err := Open(fs, dir, 6, readOnly, func(p Part) error { parts = append(parts, p); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return l, parts, d
}

func TestPowerCuts(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		fs := vfs.NewCrashableMem()
		l, _, _ := collect(t, fs, false)
		written, acked := 0, 0
		steps := 1 + rng.IntN(20)
		for range steps {
			p := Part{Level: byte(1 + rng.IntN(5)), First: uint64(written), Count: 1, Data: bytes.Repeat([]byte{byte(written)}, rng.IntN(9000))}
			if err := l.Append([]Part{p}); err != nil {
				t.Fatal(err)
			}
			written++
			if rng.IntN(3) == 0 {
				if err := l.Sync(); err != nil {
					t.Fatal(err)
				}
				acked = written
			}
			if rng.IntN(8) == 0 {
				if err := l.rotate(); err != nil {
					t.Fatal(err)
				}
				acked = written
			}
			if rng.IntN(8) == 0 {
				_ = l.Release([]uint64{0, 1, 1, 1, 1, 1})
			}
		}
		cut := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		_ = l.Close()
		l2, parts, damages := collect(t, cut, false)
		if len(damages) != 0 {
			t.Fatalf("round %d: %v", round, damages)
		}
		// The first may have been released.
		next := acked
		if len(parts) > 0 {
			next = int(parts[0].First)
		}
		for _, p := range parts {
			if int(p.First) != next {
				t.Fatalf("round %d: part %d, want %d", round, p.First, next)
			}
			for _, c := range p.Data {
				if c != byte(p.First) {
					t.Fatal("other data")
				}
			}
			next++
		}
		if next < acked {
			t.Fatalf("round %d: %d parts, %d were durable", round, next, acked)
		}
		_ = l2.Close()
	}
}

func TestDamageIsTold(t *testing.T) {
	fs := vfs.NewMem()
	l, _, _ := collect(t, fs, false)
	for i := range 10 {
		if err := l.Append([]Part{{Level: 1, First: uint64(i), Count: 1, Data: bytes.Repeat([]byte{7}, 100)}}); err != nil {
			t.Fatal(err)
		}
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := fs.PathJoin(dir, fileName(0))
	b, err := fs.UnsafeGetFileDataBuffer(path)
	if err != nil {
		t.Fatal(err)
	}
	b[fileHead+4*(recordHead+120)+50] ^= 1
	l2, parts, damages := collect(t, fs, true)
	if len(damages) != 1 || len(parts) != 9 {
		t.Fatalf("%d parts, damage %v", len(parts), damages)
	}
	_ = l2.Close()
}

func FuzzOpen(f *testing.F) {
	fs := vfs.NewMem()
	l, _, _ := Open(fs, dir, 6, false, func(Part) error { return nil })
	_ = l.Append([]Part{{Level: 1, Count: 3, Data: []byte("hello")}, {Level: 2, Count: 3, Data: []byte("there")}})
	_ = l.Close()
	b, _ := fs.UnsafeGetFileDataBuffer(fs.PathJoin(dir, fileName(0)))
	f.Add(bytes.Clone(b))
	f.Fuzz(func(t *testing.T, b []byte) {
		fs := vfs.NewMem()
		_ = fs.MkdirAll(dir, 0o700)
		file, err := fs.Create(fs.PathJoin(dir, fileName(0)), vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = file.Write(b)
		_ = file.Close()
		l, _, err := Open(fs, dir, 6, true, func(p Part) error {
			if p.Level > 100 {
				return fmt.Errorf("level")
			}
			return nil
		})
		if err == nil {
			_ = l.Close()
		}
	})
}
