package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/conformance"
)

// TestConformance needs OpenZFS: it makes a pool on a file, and removes it.
func TestConformance(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root and OpenZFS")
	}
	if out, err := exec.Command("zpool", "list").CombinedOutput(); err != nil {
		t.Skipf("OpenZFS is not usable here (the lab has it): %v %s", err, out)
	}
	bin, err := exec.LookPath("mvirt-zfs") // the lab carries it; elsewhere it is built
	if err != nil {
		bin = filepath.Join(t.TempDir(), "mvirt-zfs")
		run(t, "go", "build", "-o", bin, ".")
	}
	dir := t.TempDir()
	run(t, "truncate", "-s", "3G", filepath.Join(dir, "disk"))
	run(t, "zpool", "create", "-m", filepath.Join(dir, "mnt"), "mvtconf", filepath.Join(dir, "disk"))
	t.Cleanup(func() {
		run(t, "sh", "-c", "for i in $(seq 50); do zpool destroy -f mvtconf && exit; sleep 0.2; done; exit 1")
	})
	conformance.RunStorage(t, conformance.Config{
		Command:   []string{bin, "--pool", "mvtconf", "--slow", "10", "--worker-user", "nobody", "--allow-source-range", "127.0.0.0/8"},
		ImportURL: true,
		// For a lab on a host that is busy.
		StartTimeout: 3 * time.Minute, CheckTimeout: 20 * time.Minute,
		// The lab is slow: a developer may want a part, as "rollback,import".
		Only: strings.FieldsFunc(os.Getenv("MVIRT_CONFORMANCE_ONLY"), func(r rune) bool { return r == ',' }),
	})
}

func run(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
}
