package unixsock

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100), strings.Repeat("e", 100))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second takes the place of a stale one
		f, err := Listen(dir, "s", 0o600)
		if err != nil {
			t.Fatal(err)
		}
		c, err := Dial(t.Context(), dir, "s") // before anybody accepts
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range []interface{ Close() error }{c, s, l, f} {
			if err := x.Close(); err != nil {
				t.Error(err)
			}
		}
		st, err := os.Stat(filepath.Join(dir, "s"))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", st, err)
		}
	}
	if _, err := Dial(t.Context(), dir, "s"); err == nil {
		t.Error("a dead socket was reached")
	}
	if _, err := Listen(dir, "../s", 0o600); err == nil {
		t.Error("a path was taken for a name")
	}
}
