package kernels

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
)

func file(t *testing.T, content []byte) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(content); err != nil { // leaves the offset at the end: Add must not care
		t.Fatal(err)
	}
	return f
}

func bzImage(seed byte) []byte {
	b := make([]byte, 4096)
	copy(b[0x202:], "HdrS")
	b[4000] = seed
	return b
}

func TestHeldOnceGoneLast(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	a, err := s.Add(Kernel, file(t, bzImage(1)))
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Add(Kernel, file(t, bzImage(1)))
	if err != nil || a != b {
		t.Fatalf("%s and %s, %v", a, b, err)
	}
	c, err := s.Add(Initramfs, file(t, []byte("anything")))
	if err != nil {
		t.Fatal(err)
	}
	s.Release(a)
	if _, err := os.Stat(s.Path(a)); err != nil {
		t.Errorf("gone while held: %v", err)
	}
	s.Release(b)
	if _, err := os.Stat(s.Path(a)); err == nil {
		t.Error("still there")
	}

	// A crash later: one is held by a definition, the other by nobody.
	lost, err := s.Add(Kernel, file(t, bzImage(2)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".new-123"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	s.Hold(c)
	s.Hold("")
	if err := s.Sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.Path(lost)); err == nil {
		t.Error("what nobody holds is still there")
	}
	ents, err := os.ReadDir(dir)
	if err != nil || len(ents) != 1 || ents[0].Name() != c {
		t.Errorf("left: %v, %v", ents, err)
	}
}

func TestRefused(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for name, f := range map[string]*os.File{
		"text": file(t, []byte("not a kernel")), "empty": file(t, nil), "directory": dir,
		"gzip": file(t, []byte{0x1f, 0x8b, 8, 0}), "almost": file(t, make([]byte, 0x206)),
	} {
		_, err := s.Add(Kernel, f)
		var e *errs.Error
		if !errors.As(err, &e) || e.Kind != errs.Invalid || e.Field != "kernel" || e.Remedy == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if ents, _ := os.ReadDir(s.dir); len(ents) != 0 {
		t.Errorf("left behind: %v", ents)
	}
}
