package cli

import (
	"strings"
	"testing"
)

// complete gives what the shell would offer for a command line.
func complete(t *testing.T, f *fake, args ...string) []string {
	t.Helper()
	r := f.run(t, "", append([]string{"__complete"}, args...)...).ok(t)
	var out []string
	for line := range strings.Lines(r.out) {
		if word, _, _ := strings.Cut(strings.TrimSpace(line), "\t"); !strings.HasPrefix(word, ":") {
			out = append(out, word)
		}
	}
	return out
}

func TestCompletion(t *testing.T) {
	f := world(t)
	for line, want := range map[string]string{
		"vm start ":                "web db",
		"vm start w":               "web",
		"vm start web ":            "db", // not what is there already
		"vm start 0190b":           "0190b000-0000-7000-8000-000000000008",
		"vm console web ":          "",
		"volume rm ":               "web-root",
		"volume rollback ":         "web-root@monday",
		"snapshot ls ":             "web-root",
		"template rename ":         "debian-12",
		"network show ":            "lan",
		"nic update ":              "web-0",
		"nic create x --network ":  "lan",
		"nic create x --sg ":       "ssh",
		"vm create x --template ":  "debian-12",
		"vm create x --network l":  "lan",
		"plugin restart ":          "storage net",
		"logs ":                    "stats verify web db web-root lan web-0 debian-12",
		"logs --level ":            "audit error warn info debug",
		"vm ls -o ":                "table wide json yaml name",
		"network create x --mode ": "private nat bridge",
		"run deb":                  "debian-12",
	} {
		args := strings.Split(line, " ")
		if got := strings.Join(complete(t, f, args...), " "); got != want {
			t.Errorf("mvirt %s⇥ offers %q, want %q", line, got, want)
		}
	}
	if got := complete(t, f, "vo"); len(got) != 1 || got[0] != "volume" {
		t.Errorf("commands: %v", got)
	}
}

// TestCompletionWithoutDaemon checks that the tab key neither fails nor prints into the line being typed.
func TestCompletionWithoutDaemon(t *testing.T) {
	f := world(t)
	r := f.run(t, "", "__complete", "--socket", f.socket+"x", "vm", "start", "").ok(t)
	if strings.Contains(r.out, "error") || !strings.HasPrefix(r.out, ":") {
		t.Errorf("%q", r.out)
	}
}
