package main

import (
	"path/filepath"
	"testing"

	"github.com/mvirt/mvirt/sdk/conformance"
	"github.com/mvirt/mvirt/test/guest"
)

func TestConformance(t *testing.T) {
	g, err := guest.Build(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	conformance.RunVMM(t, conformance.Config{
		Command:     []string{build(t), "--data-dir", filepath.Join(t.TempDir(), "data")},
		Kernel:      g.Kernel,
		Initramfs:   g.Initramfs,
		Cmdline:     "console=ttyS0 quiet",
		BootMarker:  "login:",
		BootTimeout: limit,
		MemoryBytes: 160 << 20,
	})
}
