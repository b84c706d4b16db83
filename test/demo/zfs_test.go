package main

import (
	"strings"
	"testing"

	"github.com/mvirt/mvirt/test/system"
)

// TestConfigure: the storage section alone is another one, whatever stands before and behind it.
func TestConfigure(t *testing.T) {
	const before = "[core]\nsocket = \"x\"\n\n[plugin.log]\ncommand = \"l\"\n"
	const section = "\n[plugin.storage]\ncommand = \"mvirt-dir\"\nargs = [\"--data-dir\", \"d\"]\nuser = \"mvirt-dir\"\n"
	const behind = "\n[plugin.net]\ncommand = \"n\"\n"
	s := &story{place: system.RootPlace("demo"), slow: 1}
	if got := s.configure(before + section + behind); got != before+section+behind {
		t.Errorf("without a pool: %s", got)
	}
	s.pool = "tank"
	for _, end := range []string{behind, ""} {
		got := s.configure(before + section + end)
		if strings.Contains(got, "mvirt-dir") || !strings.HasPrefix(got, before) || !strings.HasSuffix(got, end) ||
			strings.Count(got, "[plugin.storage]") != 1 || !strings.Contains(got, `"--pool", "tank"`) {
			t.Errorf("with a pool: %s", got)
		}
	}
	s.slow = 4
	if got := s.configure(before + section + behind); strings.Count(got, "start_timeout") != 3 {
		t.Errorf("slow: %s", got)
	}
}
