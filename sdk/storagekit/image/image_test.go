package image

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
)

// memTarget is a disk in memory that counts what is written.
type memTarget struct {
	mu    sync.Mutex
	b     []byte
	wrote int64
}

func (m *memTarget) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrote += int64(len(p))
	if int64(len(m.b)) < off+int64(len(p)) {
		return 0, fmt.Errorf("write at %d behind the end", off)
	}
	return copy(m.b[off:], p), nil
}

func (m *memTarget) Grow(size int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if size > 1<<30 {
		return errors.New("test target is full")
	}
	if d := size - int64(len(m.b)); d > 0 {
		m.b = append(m.b, make([]byte, d)...)
	}
	return nil
}

type quiet struct {
	format atomic.Value
	wrote  atomic.Int64
}

func (q *quiet) Format(name string, _ int64) { q.format.Store(name) }
func (q *quiet) Progress(_, _, n int64)      { q.wrote.Add(n) }

var testLimits = Limits{MaxVirtualSize: 1 << 30, MaxScratch: 1 << 30, Writers: 2}

type memSource struct{ *bytes.Reader }

func (m memSource) Size() (int64, error) { return m.Reader.Size(), nil }
func (m memSource) Hint() int64          { return m.Reader.Size() }
func (m memSource) Sparse() *os.File     { return nil }

func scratchIn(dir string) func() (*os.File, error) {
	return func() (*os.File, error) { return os.CreateTemp(dir, "scratch") }
}

func convertBytes(t testing.TB, img []byte) ([]byte, *quiet, *memTarget, error) {
	t.Helper()
	dst, rep := &memTarget{}, &quiet{}
	size, err := Convert(context.Background(), memSource{bytes.NewReader(img)}, dst, scratchIn(t.TempDir()), testLimits, rep)
	if err == nil && int64(len(dst.b)) != size {
		t.Fatalf("size %d, target %d", size, len(dst.b))
	}
	return dst.b, rep, dst, err
}

// disk makes a raw disk of n bytes: text, noise, zeros and odd ends, 64 KiB at a time.
func disk(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for off := 0; off < n; off += 64 << 10 {
		end := min(off+64<<10, n)
		switch r.IntN(4) {
		case 0:
		case 1:
			for i := off; i < end; i++ {
				b[i] = byte(r.Uint32())
			}
		case 2:
			s := []byte("the quick brown fox jumps over the lazy dog, line ")
			for i := off; i < end; {
				i += copy(b[i:end], s)
				i += copy(b[i:end], fmt.Sprintln(r.IntN(1000)))
			}
		case 3:
			for i := off + 5000; i < min(off+9000, end); i++ {
				b[i] = 7
			}
		}
	}
	return b
}

func qemuImg(t testing.TB, args ...string) {
	t.Helper()
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("qemu-img is not installed (package qemu-utils)")
	}
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
}

func TestQemuImages(t *testing.T) {
	dir := t.TempDir()
	raw := disk(9<<20 + 512*3)
	in := filepath.Join(dir, "in.raw")
	if err := os.WriteFile(in, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"v3":         {"-o", "compat=1.1"},
		"v2":         {"-o", "compat=0.10"},
		"zlib":       {"-c"},
		"zlib v2":    {"-c", "-o", "compat=0.10"},
		"zstd":       {"-c", "-o", "compression_type=zstd"},
		"cluster512": {"-o", "cluster_size=512"},
		"zlib 512":   {"-c", "-o", "cluster_size=512"},
		"cluster2M":  {"-o", "cluster_size=2M"},
		"zlib 2M":    {"-c", "-o", "cluster_size=2M"},
		"zstd 2M":    {"-c", "-o", "cluster_size=2M,compression_type=zstd"},
		"prealloc":   {"-o", "preallocation=metadata"},
		"lazy":       {"-o", "lazy_refcounts=on"},
	} {
		t.Run(name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "out.qcow2")
			qemuImg(t, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), in, out)...)
			img, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			got, rep, dst, err := convertBytes(t, img)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, raw) {
				t.Fatal("the disk differs")
			}
			if rep.format.Load() != "qcow2" || rep.wrote.Load() != dst.wrote {
				t.Errorf("format %v, told %d, wrote %d", rep.format.Load(), rep.wrote.Load(), dst.wrote)
			}
			// Of smaller clusters, zero ones are known to be zero without looking at whole blocks.
			if want := nonzero(raw); dst.wrote > want || dst.wrote < want && !strings.Contains(name, "512") {
				t.Errorf("wrote %d bytes, %d are not zero", dst.wrote, want)
			}
		})
	}
}

func nonzero(raw []byte) (n int64) {
	var zero [Block]byte
	for off := 0; off < len(raw); off += Block {
		b := raw[off:min(off+Block, len(raw))]
		if !bytes.Equal(b, zero[:len(b)]) {
			n += int64(len(b))
		}
	}
	return n
}

// TestTruncatedEverywhere cuts an image at many places: each is an error, none a hang, a panic or a wrong disk.
func TestTruncatedEverywhere(t *testing.T) {
	dir := t.TempDir()
	raw := disk(1 << 20)
	in := filepath.Join(dir, "in.raw")
	if err := os.WriteFile(in, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{}, {"-c"}, {"-c", "-o", "compression_type=zstd"}} {
		out := filepath.Join(dir, "out.qcow2")
		qemuImg(t, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), in, out)...)
		img, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		for cut := 4; cut < len(img)-512; cut += len(img)/41 + 1 {
			_, _, _, err := convertBytes(t, img[:cut])
			if errs.KindOf(err) != errs.Invalid || errs.RemedyOf(err) == "" {
				t.Fatalf("%v cut at %d of %d: %v", args, cut, len(img), err)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	path := func(n string) string { return filepath.Join(dir, n) }
	if err := os.WriteFile(path("raw"), disk(1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", path("raw"), path("backing"))
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+path("data")+",data_file_raw=on", path("datafile"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path("extended"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s", path("aes"), "1M")
	// LUKS by its number in the header (qcow2.txt, crypt_method): qemu-img measures the processor to make one,
	// and gives up on a busy host.
	luks, err := os.ReadFile(path("aes"))
	if err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint32(luks[32:], 2)
	if err := os.WriteFile(path("luks"), luks, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "create", "-q", "-f", "qcow2", path("good"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", path("huge"), "1T")
	for _, f := range []string{"vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"} {
		qemuImg(t, "convert", "-O", f, path("raw"), path(f))
	}
	good, err := os.ReadFile(path("good"))
	if err != nil {
		t.Fatal(err)
	}
	patch := func(off int, v ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[off:], v)
		return b
	}
	all := map[string]struct {
		img  []byte
		want string
	}{
		"empty":          {[]byte{}, "empty"},
		"html":           {[]byte(" <!DOCTYPE html><title>404</title>"), "HTML"},
		"bzip2":          {[]byte("BZh91AY"), "bzip2"},
		"zip":            {[]byte("PK\x03\x04...."), "zip"},
		"qcow1":          {[]byte("QFI\xfa...."), "qcow"},
		"twice":          {gz(t, gz(t, disk(1<<16))), "twice"},
		"version":        {patch(4, 0, 0, 0, 9), "version 9"},
		"cluster bits":   {patch(20, 0, 0, 0, 30), "cluster bits"},
		"no size":        {patch(24, 0, 0, 0, 0, 0, 0, 0, 0), "no size"},
		"lying size":     {patch(24, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0), "limit"},
		"size beyond L1": {patch(24, 0, 0, 0, 0, 0x3f, 0xff, 0xfe, 0), "L1 table"},
		"L1 nowhere":     {patch(40, 0, 0, 0, 0, 0, 0, 0, 1), "L1 table"},
		"L1 far":         {patch(40, 0, 0, 0, 9, 0, 0, 0, 0), "truncated"},
		"corrupt bit":    {patch(79, 2), "corrupt"},
		"unknown bit":    {patch(72, 0x80), "features"},
		"aes":            {patch(35, 1), "encrypted"},
		"header length":  {patch(100, 0, 0, 0, 3), "header length"},
		"refcount order": {patch(96, 0, 0, 0, 77), "refcount"},
	}
	for _, f := range []string{"backing", "datafile", "extended", "luks", "huge", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"} {
		b, err := os.ReadFile(path(f))
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{"backing": "backing file", "datafile": "external file", "extended": "extended L2", "luks": "encrypted",
			"huge": "limit", "vmdk": "VMDK", "vdi": "VDI", "vhdx": "VHDX", "vpc": "VHD", "qed": "QED", "parallels": "Parallels"}[f]
		all[f] = struct {
			img  []byte
			want string
		}{b, want}
	}
	for name, c := range all {
		t.Run(name, func(t *testing.T) {
			_, _, dst, err := convertBytes(t, c.img)
			if errs.KindOf(err) != errs.Invalid || errs.RemedyOf(err) == "" || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v (remedy %q), want Invalid with %q", err, errs.RemedyOf(err), c.want)
			}
			if dst.wrote != 0 {
				t.Errorf("wrote %d bytes", dst.wrote)
			}
		})
	}
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestCompressed(t *testing.T) {
	dir := t.TempDir()
	raw := disk(5<<20 + 512)
	in, qcow := filepath.Join(dir, "in.raw"), filepath.Join(dir, "in.qcow2")
	if err := os.WriteFile(in, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuImg(t, "convert", "-f", "raw", "-O", "qcow2", in, qcow)
	for _, tool := range [][]string{{"gzip", "-1"}, {"xz", "-1"}, {"zstd", "-q"}, {"zstd", "-q", "-19"}} {
		if _, err := exec.LookPath(tool[0]); err != nil {
			t.Logf("skipped: %s is not installed", tool[0])
			continue
		}
		for _, f := range []string{in, qcow} {
			cmd := exec.Command(tool[0], append(tool[1:], "-c", f)...)
			packed, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprint(tool, " ", filepath.Ext(f))
			got, rep, _, err := convertBytes(t, packed)
			if err != nil || !bytes.Equal(got, raw) {
				t.Errorf("%s: %v, equal: %v", name, err, bytes.Equal(got, raw))
			}
			t.Log(name, rep.format.Load())
			for _, cut := range []int{10, 100, len(packed) / 2, len(packed) - 9, len(packed) - 1} {
				if _, _, _, err := convertBytes(t, packed[:cut]); errs.KindOf(err) != errs.Invalid || errs.RemedyOf(err) == "" {
					t.Errorf("%s cut at %d of %d: %v", name, cut, len(packed), err)
				}
			}
			bad := bytes.Clone(packed)
			for i := len(bad) / 2; i < len(bad)/2+64; i++ {
				bad[i] ^= 0x55
			}
			if got, _, _, err := convertBytes(t, bad); err == nil && !bytes.Equal(got, raw) {
				t.Errorf("%s: damage unnoticed", name)
			}
		}
	}
}

// TestXzCut: an xz file is whole only with its last stream's footer. Cut at any place, between two blocks as well,
// it is refused; with padding or a second stream behind it is not.
func TestXzCut(t *testing.T) {
	if _, err := exec.LookPath("xz"); err != nil {
		t.Skip("xz is not installed")
	}
	raw := bytes.Repeat([]byte("mvirt 0123456789"), 16384)
	cmd := exec.Command("xz", "-1", "--block-size=65536", "-c")
	cmd.Stdin = bytes.NewReader(raw)
	packed, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for cut := 16; cut < len(packed); cut++ {
		if _, _, _, err := convertBytes(t, packed[:cut]); errs.KindOf(err) != errs.Invalid || errs.RemedyOf(err) == "" {
			t.Errorf("cut at %d of %d: %v", cut, len(packed), err)
		}
	}
	padded := append(bytes.Clone(packed), make([]byte, 8)...)
	for want, in := range map[int][]byte{1: padded, 2: append(bytes.Clone(padded), packed...)} {
		got, _, _, err := convertBytes(t, in)
		if err != nil || !bytes.Equal(got, bytes.Repeat(raw, want)) {
			t.Errorf("%d streams: %v", want, err)
		}
	}
}

// TestRaw: sizes that are no multiple of anything are rounded up to sectors.
func TestRaw(t *testing.T) {
	for _, n := range []int{1, 511, 512, 4096, 4097, 3<<20 + 100} {
		raw := disk(n)
		raw[0] = 1
		got, rep, dst, err := convertBytes(t, raw)
		want := append(bytes.Clone(raw), make([]byte, (n+511)/512*512-n)...)
		if err != nil || !bytes.Equal(got, want) || rep.format.Load() != "raw" {
			t.Errorf("%d bytes: %v, %v", n, err, rep.format.Load())
		}
		if dst.wrote != nonzero(raw) {
			t.Errorf("%d bytes: wrote %d of %d", n, dst.wrote, nonzero(raw))
		}
	}
}

// TestRawSparseFile: a source with holes is read through SEEK_DATA, with the same result.
func TestRawSparseFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := make([]byte, 32<<20)
	for _, off := range []int{0, 5<<20 + 100, 9 << 20, 32<<20 - 3} {
		n := copy(want[off:], "data")
		if _, err := f.WriteAt(want[off:off+n], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	dst := &memTarget{}
	if _, err := Convert(context.Background(), &FileSource{File: f, Length: 32 << 20}, dst, nil, testLimits, &quiet{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dst.b, want) || dst.wrote != 4*Block {
		t.Errorf("equal %v, wrote %d", bytes.Equal(dst.b, want), dst.wrote)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Convert(ctx, memSource{bytes.NewReader(disk(8 << 20))}, &memTarget{}, nil, testLimits, &quiet{})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestTargetError(t *testing.T) {
	img := disk(8 << 20)
	_, err := Convert(context.Background(), memSource{bytes.NewReader(img)}, failing{}, nil, testLimits, &quiet{})
	if !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

type failing struct{}

func (failing) WriteAt([]byte, int64) (int, error) { return 0, os.ErrClosed }
func (failing) Grow(int64) error                   { return nil }

// TestInflate compares with the standard library on every level and many shapes of data.
func TestInflate(t *testing.T) {
	var f inflater
	r := rand.New(rand.NewPCG(3, 4))
	for n := range 300 {
		raw := make([]byte, r.IntN(200<<10)+1)
		switch n % 5 {
		case 0:
			for i := range raw {
				raw[i] = byte(r.Uint32())
			}
		case 1:
			for i := range raw {
				raw[i] = byte(r.IntN(4))
			}
		case 2:
			copy(raw, disk(len(raw)))
		case 3: // short distances of all lengths
			d := r.IntN(20) + 1
			for i := range raw {
				if i < d || r.IntN(100) == 0 {
					raw[i] = byte(r.Uint32())
				} else {
					raw[i] = raw[i-d]
				}
			}
		case 4:
			for i := range raw {
				raw[i] = byte(r.NormFloat64() * 20)
			}
		}
		var packed bytes.Buffer
		w, err := flate.NewWriter(&packed, n%11-2)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(raw); err != nil {
			t.Fatal(err)
		}
		if n%3 == 0 {
			w.Flush()
		}
		w.Close()
		src := append(packed.Bytes(), make([]byte, r.IntN(600))...)
		got := make([]byte, len(raw))
		k, err := f.inflate(got, src)
		if err != nil || k != len(raw) || !bytes.Equal(got, raw) {
			t.Fatalf("shape %d level %d: %d of %d, %v", n%5, n%11-2, k, len(raw), err)
		}
		for range 20 {
			cut := src[:r.IntN(packed.Len())]
			k, err := f.inflate(got, cut)
			if err == nil && k == len(raw) && !bytes.Equal(got, raw) {
				t.Fatal("a cut stream gave another disk")
			}
		}
	}
}

func FuzzInflate(f *testing.F) {
	var packed bytes.Buffer
	w, _ := flate.NewWriter(&packed, 9)
	w.Write(disk(70 << 10))
	w.Close()
	f.Add(packed.Bytes())
	f.Add([]byte{0x4b, 0x4c, 0x02, 0x00})
	f.Add([]byte{1, 1, 0, 0xfe, 0xff, 7})
	f.Fuzz(func(t *testing.T, src []byte) {
		var in inflater
		got := make([]byte, 64<<10)
		n, err := in.inflate(got, src)
		want, werr := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(src)), int64(len(got))))
		if err == nil && werr == nil && (n != len(want) || !bytes.Equal(got[:n], want)) {
			t.Fatalf("%d bytes, the library has %d", n, len(want))
		}
		if err != nil && werr == nil {
			t.Fatalf("the library reads it: %v", err)
		}
		if err == nil && werr != nil && n != len(got) {
			t.Fatalf("the library refuses it: %v", werr)
		}
	})
}

// FuzzQcow2 changes images: whatever they say, a conversion ends in an error or a disk within the limits.
func FuzzQcow2(f *testing.F) {
	f.Add(tinyQcow2(2, 0))
	f.Add(tinyQcow2(3, 0))
	f.Add(tinyQcow2(3, 1))
	f.Fuzz(func(t *testing.T, img []byte) {
		lim := Limits{MaxVirtualSize: 4 << 20, MaxScratch: 1 << 20, Writers: 2}
		dst := &memTarget{}
		size, err := Convert(context.Background(), memSource{bytes.NewReader(img)}, dst, scratchIn(t.TempDir()), lim, &quiet{})
		if err == nil && (size > lim.MaxVirtualSize+511 || int64(len(dst.b)) != size) {
			t.Fatalf("size %d, target %d", size, len(dst.b))
		}
		if err != nil && errs.KindOf(err) == errs.Unknown {
			t.Fatalf("an error without a kind: %v", err)
		}
	})
}

// tinyQcow2 is an image of 512-byte clusters: header, L1, one L2, a data and a compressed cluster.
func tinyQcow2(version uint32, comp byte) []byte {
	b := make([]byte, 512*6)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], version)
	be.PutUint32(b[20:], 9)
	be.PutUint64(b[24:], 8*512)
	be.PutUint32(b[36:], 1)
	be.PutUint64(b[40:], 512)
	if version == 3 {
		be.PutUint32(b[96:], 4)
		be.PutUint32(b[100:], 112)
		if comp != 0 {
			be.PutUint64(b[72:], featCompression)
			b[104] = comp
		}
	}
	be.PutUint64(b[512:], 1024|1<<63)
	be.PutUint64(b[1024:], 1536|1<<63)
	be.PutUint64(b[1024+16:], 2048|1<<62)
	for i := range 512 {
		b[1536+i] = byte(i)
	}
	var packed bytes.Buffer
	w, _ := flate.NewWriter(&packed, 9)
	w.Write(bytes.Repeat([]byte("mvirt..."), 64))
	w.Close()
	copy(b[2048:], packed.Bytes())
	return b
}

func TestTinyQcow2(t *testing.T) {
	got, _, _, err := convertBytes(t, tinyQcow2(3, 0))
	if err != nil || got[1] != 1 || string(got[1024:1029]) != "mvirt" || got[512] != 0 {
		t.Errorf("%v", err)
	}
}
