package block

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// memDict keeps shapes and objects in memory.
type memDict struct {
	byText map[string]*Shape
	shapes []*Shape
	objs   map[string]uint32
	names  []string
	refuse bool
}

func newDict() *memDict { return &memDict{byText: map[string]*Shape{}, objs: map[string]uint32{}} }

func (d *memDict) Intern(text []byte) (*Shape, error) {
	if d.refuse {
		return nil, nil
	}
	if s := d.byText[string(text)]; s != nil {
		return s, nil
	}
	s, err := ParseShape(uint32(len(d.shapes)+1), string(text))
	if err != nil {
		return nil, err
	}
	d.byText[string(text)] = s
	d.shapes = append(d.shapes, s)
	return s, nil
}

func (d *memDict) Shape(n uint32) (*Shape, error) {
	if n == 0 || int(n) > len(d.shapes) {
		return nil, fmt.Errorf("no shape %d: %w", n, ErrBad)
	}
	return d.shapes[n-1], nil
}

func (d *memDict) Object(n uint32) (string, error) {
	if int(n) >= len(d.names) {
		return "", fmt.Errorf("no object %d: %w", n, ErrBad)
	}
	return d.names[n], nil
}

func (d *memDict) num(o string) uint32 {
	n, ok := d.objs[o]
	if !ok {
		n = uint32(len(d.names))
		d.objs[o] = n
		d.names = append(d.names, o)
	}
	return n
}

func messages(rng *rand.Rand) []string {
	id := uuid.New().String()
	return []string{
		"", "plain", "volume resized to 10737418240 bytes in 0.034 s", "eth0 up, vda1 down, x86 on br00", "at 0xffff8880deadbeef and 0x",
		id, "vm " + id + "x", "vm " + id + " gone", "vm-1 and vm-12 and vm-1", "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
		"18446744073709551615 9999999999999999999 99999999999999999999 007 0", "xK29sQ8z7b5 token", "\x1b[1m\r\n\t esc", "ünïcödé 5µs 日本3語",
		fmt.Sprintf("n %d of %d", rng.IntN(1e6), rng.Uint64()), strings.Repeat("a1", 3000), "01.02.003 -5 +6 1e9 3f2a91 3f2a9g", "mac 52:54:00:ab:cd:ef at 12:34:56.789", "aa:bb", "aa:bb:", "a:aa:bb:cc:d", "00:11:22:33:44:5", "de:ad:be",
	}
}

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for round := range 200 {
		d := newDict()
		d.refuse = round%5 == 4
		enc, err := NewEncoder(d)
		if err != nil {
			t.Fatal(err)
		}
		var want []log.Entry
		tm := rng.Int64()
		n := 1 + rng.IntN(Rows)
		for i := range n {
			tm += rng.Int64N(1e9)
			ms := messages(rng)
			e := log.Entry{Time: time.Unix(0, tm).UTC(), ID: uuid.Must(uuid.NewV7()).String(), Component: []string{"", "core", "net"}[rng.IntN(3)],
				Message: ms[rng.IntN(len(ms))], Level: log.LevelInfo}
			if round%3 == 1 && rng.IntN(10) == 0 {
				e.ID = fmt.Sprintf("odd-%d", i)
			}
			for k := range rng.IntN(4) {
				e.Objects = append(e.Objects, []string{"vm-1", "vm-12", "a\x00b", "0190"}[(k+i)%4])
			}
			if rng.IntN(2) == 0 {
				e.Labels = map[string]string{"who": "uid:1000", "request": uuid.New().String()}
			}
			want = append(want, e)
			var v rec.View
			if err := rec.Parse(rec.Append(nil, &e), &v); err != nil {
				t.Fatal(err)
			}
			var objs []uint32
			for _, o := range e.Objects {
				objs = append(objs, d.num(o))
			}
			var hash []byte
			if round%4 == 0 {
				hash = bytes.Repeat([]byte{byte(i)}, HashLen)
			}
			order := uint32(1000 + i)
			if round%2 == 0 {
				order = uint32(1000 + n - i)
			}
			if err := enc.Add(&v, order, objs, hash); err != nil {
				t.Fatal(err)
			}
		}
		b := enc.Encode([]byte("before"), 1000)[6:]
		enc.Close()
		r, err := NewReader(d)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Open(b, 1000); err != nil {
			t.Fatal(err)
		}
		for i := range want {
			got, err := r.Entry(i, log.LevelInfo)
			if err != nil || !reflect.DeepEqual(got, want[i]) {
				t.Fatalf("round %d row %d: %v\n got %+v\nwant %+v", round, i, err, got, want[i])
			}
			order := int64(1000 + i)
			if round%2 == 0 {
				order = int64(1000 + n - i)
			}
			if r.Order(i) != order {
				t.Fatalf("order %d, want %d", r.Order(i), order)
			}
			h, err := r.Hash(i)
			if err != nil || round%4 == 0 && (len(h) != HashLen || h[0] != byte(i)) || round%4 != 0 && h != nil {
				t.Fatalf("hash %x, %v", h, err)
			}
		}
		r.Close()
	}
}

func TestExtremeTimes(t *testing.T) {
	d := newDict()
	enc, _ := NewEncoder(d)
	times := []int64{-1 << 63, -1, 0, 1, 1<<63 - 1}
	for i, tm := range times {
		e := log.Entry{Time: time.Unix(0, tm), ID: "01900000-0000-7000-8000-000000000000", Level: 1}
		var v rec.View
		_ = rec.Parse(rec.Append(nil, &e), &v)
		if err := enc.Add(&v, uint32(i), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	r, _ := NewReader(d)
	defer r.Close()
	if err := r.Open(enc.Encode(nil, 0), 0); err != nil {
		t.Fatal(err)
	}
	for i, tm := range times {
		e, err := r.Entry(i, 1)
		if r.Time(i) != tm || err != nil || e.ID != "01900000-0000-7000-8000-000000000000" {
			t.Fatalf("row %d: %d %s, %v", i, r.Time(i), e.ID, err)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		text, needle string
		want         int
	}{
		{"volume \xff resized", "resized", 1}, {"volume \xff resized", "gone", -1}, {"volume \xff resized", "e 5", 0},
		{"vm \xfc gone", "abc", 0}, {"fixed", "x1", -1}, {"fixed", "core", -1}, {"a\xffb", "ab", -1},
		{"vcpu \xff woken \xff times", "woken 77 times", 0}, {"vcpu \xff woken \xff times", "halted 77 times", -1}, {"id \xfd\x08 is", "d beef", 0},
		{"id \xfd\x08 is", "d xeef", -1}, {"id \xf9 is", "d xeef", 0}, {"id \xfa\x00 is", "?!", 0}, {"a \xff", "", 1},
	} {
		s, err := ParseShape(1, c.text)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.Matches(c.needle); got != c.want {
			t.Errorf("%q contains %q: %d, want %d", c.text, c.needle, got, c.want)
		}
	}
}

// FuzzOpen spoils blocks; with the checksum made right, nothing may panic.
func FuzzOpen(f *testing.F) {
	d := newDict()
	enc, _ := NewEncoder(d)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 40 {
		ms := messages(rng)
		e := log.Entry{Time: time.Unix(int64(i), 0), ID: uuid.Must(uuid.NewV7()).String(), Message: ms[i%len(ms)], Level: 1, Objects: []string{"vm-1"}}
		var v rec.View
		_ = rec.Parse(rec.Append(nil, &e), &v)
		_ = enc.Add(&v, uint32(i), []uint32{d.num("vm-1")}, nil)
	}
	good := enc.Encode(nil, 0)
	f.Add(good)
	r, _ := NewReader(d)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4 {
			b = fixSum(b)
		}
		if r.Open(b, 0) != nil {
			return
		}
		for i := range r.Len() {
			_, _ = r.Entry(i, 1)
			_, _ = r.Hash(i)
			r.Order(i)
		}
	})
}

func FuzzShape(f *testing.F) {
	f.Add("a \xff b\xf8k\xf8\xfd\x08")
	f.Fuzz(func(t *testing.T, s string) { _, _ = ParseShape(1, s) })
}

func fixSum(b []byte) []byte {
	b = bytes.Clone(b)
	sum := crc32.Checksum(b[:len(b)-4], crcTable)
	binary.LittleEndian.PutUint32(b[len(b)-4:], sum)
	return b
}
