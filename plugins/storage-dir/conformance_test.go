package main

import (
	"path/filepath"
	"testing"

	"github.com/mvirt/mvirt/sdk/conformance"
)

func TestConformance(t *testing.T) {
	conformance.RunStorage(t, conformance.Config{
		Command: []string{build(t), "--data-dir", filepath.Join(t.TempDir(), "data"), "--worker-user", "nobody",
			"--allow-source-range", "127.0.0.0/8"},
		ImportURL: true,
	})
}
