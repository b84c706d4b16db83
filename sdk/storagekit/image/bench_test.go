package image

import (
	"bytes"
	"compress/flate"
	"io"
	"os"
	"testing"

	kflate "github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// clusters is real data in pieces of 64 KiB: this test binary itself.
func clusters(b *testing.B) [][]byte {
	b.Helper()
	data, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		b.Fatal(err)
	}
	data = data[:min(len(data), 8<<20)&^(1<<16-1)]
	var out [][]byte
	for len(data) > 0 {
		out = append(out, data[:1<<16])
		data = data[1<<16:]
	}
	return out
}

func benchUnpack(b *testing.B, packed [][]byte, unpack func(dst, src []byte) error) {
	dst := make([]byte, 1<<16)
	b.SetBytes(1 << 16)
	for i := 0; b.Loop(); i++ {
		if err := unpack(dst, packed[i%len(packed)]); err != nil {
			b.Fatal(err)
		}
	}
}

func deflated(b *testing.B) (packed [][]byte) {
	for _, c := range clusters(b) {
		var buf bytes.Buffer
		w, _ := flate.NewWriter(&buf, 6)
		w.Write(c)
		w.Close()
		packed = append(packed, buf.Bytes())
	}
	return packed
}

func BenchmarkInflate(b *testing.B) {
	var f inflater
	benchUnpack(b, deflated(b), func(dst, src []byte) error { _, err := f.inflate(dst, src); return err })
}

func BenchmarkInflateLibrary(b *testing.B) {
	r := kflate.NewReader(bytes.NewReader(nil))
	benchUnpack(b, deflated(b), func(dst, src []byte) error {
		if err := r.(kflate.Resetter).Reset(bytes.NewReader(src), nil); err != nil {
			return err
		}
		_, err := io.ReadFull(r, dst)
		return err
	})
}

func BenchmarkZstd(b *testing.B) {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		b.Fatal(err)
	}
	var packed [][]byte
	for _, c := range clusters(b) {
		packed = append(packed, w.EncodeAll(c, nil))
	}
	u, err := newUnpacker(compressionZstd, 1<<16)
	if err != nil {
		b.Fatal(err)
	}
	defer u.close()
	benchUnpack(b, packed, u.unpack)
}
