package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/conformance"
	"github.com/mvirt/mvirt/test/guest"
)

// The suite with a real cloud-hypervisor and KVM. MVIRT_VMM_BIN names a built mvirt-vmm where there is no go.
func TestConformance(t *testing.T) {
	real := os.Getenv("MVIRT_CLOUD_HYPERVISOR")
	if real == "" {
		t.Skip("NOT TESTED WITH A REAL cloud-hypervisor: MVIRT_CLOUD_HYPERVISOR does not name one. Run this in the lab.")
	}
	g, err := guest.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	bin := os.Getenv("MVIRT_VMM_BIN")
	if bin == "" {
		bin = filepath.Join(t.TempDir(), "mvirt-vmm")
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
	}
	conformance.RunVMM(t, conformance.Config{
		Command:      []string{bin, "--data-dir", filepath.Join(t.TempDir(), "data"), "--cloud-hypervisor", real},
		Kernel:       g.Kernel,
		Initramfs:    g.Initramfs,
		Cmdline:      "console=ttyS0 quiet",
		BootMarker:   "login:",
		BootTimeout:  3 * time.Minute,
		CheckTimeout: 10 * time.Minute,
		MemoryBytes:  256 << 20,
	})
}
