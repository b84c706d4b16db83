package posixacl

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestAgainstGetfacl lets the system's own tool say what the attribute means.
func TestAgainstGetfacl(t *testing.T) {
	getfacl, err := exec.LookPath("getfacl")
	if err != nil {
		t.Skip("getfacl is not installed (package acl)")
	}
	for _, mode := range []os.FileMode{0o600, 0o640, 0o755} {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
		show := func() string {
			out, err := exec.Command(getfacl, "-n", "-c", "-p", path).Output()
			if err != nil {
				t.Fatal(err)
			}
			return strings.Join(strings.Fields(string(out)), " ")
		}
		before := show()
		for range 2 {
			if err := Grant(path, 60001, Read|Write); err != nil {
				t.Fatal(err)
			}
		}
		if err := Grant(path, 60002, Read); err != nil {
			t.Fatal(err)
		}
		if got := show(); !strings.Contains(got, "user:60001:rw-") || !strings.Contains(got, "user:60002:r--") || !strings.Contains(got, "mask::rw") {
			t.Errorf("mode %o: %s", mode, got)
		}
		if p, ok, err := Of(path, 60001); p != Read|Write || !ok || err != nil {
			t.Errorf("Of = %d, %v, %v", p, ok, err)
		}
		for range 2 {
			if err := Revoke(path, 60001); err != nil {
				t.Fatal(err)
			}
		}
		if got := show(); strings.Contains(got, "60001") || !strings.Contains(got, "user:60002:r--") {
			t.Errorf("after Revoke: %s", got)
		}
		if err := Revoke(path, 60002); err != nil {
			t.Fatal(err)
		}
		if got := show(); got != before {
			t.Errorf("mode %o: %q is left of %q", mode, got, before)
		}
	}
	if err := Revoke(filepath.Join(t.TempDir(), "none"), 1); err != nil {
		t.Errorf("Revoke of nothing: %v", err)
	}
}

// TestMaskedEntry: chmod takes the mask away; granting again must see it.
func TestMaskedEntry(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Grant(path, 60001, Read|Write); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if p, _, _ := Of(path, 60001); p != 0 {
		t.Fatalf("chmod 0600 left %d", p)
	}
	if err := Grant(path, 60001, Read|Write); err != nil {
		t.Fatal(err)
	}
	if p, _, _ := Of(path, 60001); p != Read|Write {
		t.Errorf("after granting again: %d", p)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255})
	f.Add([]byte{2, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := decode("x", b)
		if err == nil && len(encode(l)) != len(b) {
			t.Errorf("%d entries from %d bytes", len(l), len(b))
		}
	})
}
