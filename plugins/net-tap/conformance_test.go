package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/mvirt/mvirt/sdk/conformance"
)

func TestConformance(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("/run", "conf")
	if err != nil {
		t.Fatal(err)
	}
	conformance.RunNet(t, conformance.Config{
		Command: []string{"/proc/self/exe", "--metadata-dir", filepath.Join(dir, "meta"), "--socket-dir", filepath.Join(dir, "sock"),
			"--worker-user", "nobody"},
		Env: []string{asPlugin + "=1"},
	})
	if s := sh(t, "ls /run/netns 2>/dev/null | grep mvirt- || true; ip -br link | grep mvh || true"); s != "" {
		t.Errorf("left: %s", s)
	}
}
