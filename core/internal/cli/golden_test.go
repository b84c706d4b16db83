package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
)

var nouns = []string{"template", "import", "volume", "snapshot", "network", "nic", "sg", "vm", "plugin", "operation"}

// refs of one object of each noun.
var refs = map[string]string{"template": "debian-12", "import": "debian-12", "volume": "web-root", "snapshot": "web-root@monday", "network": "lan", "nic": "web-0", "sg": "ssh", "vm": "web", "plugin": "storage", "operation": "0190a000-0000-7000-8000-000000000009"}

func TestLists(t *testing.T) {
	f := world(t)
	for _, n := range nouns {
		for _, o := range []string{"table", "wide", "json", "yaml", "name"} {
			t.Run(n+"/"+o, func(t *testing.T) {
				r := f.run(t, "", n, "ls", "-o", o).ok(t)
				golden(t, "ls/"+n+"."+o, r.out)
				if r.err != "" {
					t.Errorf("stderr: %s", r.err)
				}
			})
		}
	}
}

func TestShow(t *testing.T) {
	f := world(t)
	for _, n := range nouns {
		t.Run(n, func(t *testing.T) {
			r := f.run(t, "", n, "show", refs[n]).ok(t)
			golden(t, "show/"+n+".table", r.out)
			var js, ys map[string]any
			if err := json.Unmarshal([]byte(f.run(t, "", n, "show", refs[n], "-o", "json").ok(t).out), &js); err != nil {
				t.Fatal(err)
			}
			if err := yaml.Unmarshal([]byte(f.run(t, "", n, "show", refs[n], "-o", "yaml").ok(t).out), &ys); err != nil {
				t.Fatal(err)
			}
			if len(js) == 0 || len(js) != len(ys) {
				t.Errorf("json has %d fields, yaml %d", len(js), len(ys))
			}
		})
	}
	t.Run("failed vm", func(t *testing.T) { golden(t, "show/vm-failed.table", f.run(t, "", "vm", "show", "db").ok(t).out) })
	t.Run("two", func(t *testing.T) {
		var list []map[string]any
		if err := json.Unmarshal([]byte(f.run(t, "", "vm", "show", "web", "db", "-o", "json").ok(t).out), &list); err != nil || len(list) != 2 {
			t.Errorf("%v, %v", list, err)
		}
	})
}

func TestStatus(t *testing.T) {
	f := world(t)
	golden(t, "status.table", f.run(t, "", "status").ok(t).out)
	golden(t, "status.json", f.run(t, "", "status", "-o", "json").ok(t).out)
	golden(t, "logs-stats.table", f.run(t, "", "logs", "stats").ok(t).out)
	golden(t, "vm-counters.table", f.run(t, "", "vm", "counters", "web").ok(t).out)
}

// TestWrites checks what each change prints, for people and for programs.
func TestWrites(t *testing.T) {
	f := world(t)
	lines := []string{
		"volume create web-root 20G", "volume resize web-root 20G", "volume rename web-root x", "volume rm web-root", "volume rm web-root --dry-run",
		"volume snapshot web-root monday", "volume rollback web-root@monday", "volume rollback web-root@monday --dry-run", "volume clone web-root copy", "snapshot create web-root@monday", "snapshot rm web-root@monday",
		"template rename debian-12 deb", "template rm debian-12", "network create lan --nat --ipv4 10.7.0.0/24", "network update lan --dns 9.9.9.9", "network rm lan",
		"nic create web-0 --network lan", "nic update web-0 --sg ssh", "nic rm web-0", "sg create ssh in:tcp:22", "sg set ssh in:tcp:22", "sg rm ssh",
		"vm create web --disk 1G", "vm create web --disk 1G --start", "vm start web", "vm stop web", "vm kill web", "vm pause web", "vm resume web", "vm reboot web", "vm update web --cpus 3", "vm attach web --disk 5G", "vm detach web --disk root", "vm rm web",
		"run debian-12 --name web", "plugin restart storage", "operation cancel 0190a000-0000-7000-8000-000000000009", "logs verify",
	}
	var all strings.Builder
	for _, l := range lines {
		args := strings.Fields(l)
		r := f.run(t, "", args...).ok(t)
		fmt.Fprintf(&all, "$ mvirt %s\n%s%s", l, r.out, r.err)
		if got := f.run(t, "", append(args, "-q")...).ok(t); got.err != "" || got.out != "" && !strings.Contains(l, "--dry-run") {
			t.Errorf("%s -q printed %q %q", l, got.out, got.err)
		}
		got := f.run(t, "", append(args, "-o", "json")...).ok(t)
		if !json.Valid([]byte(got.out)) || got.err != "" {
			t.Errorf("%s -o json printed %q, %q", l, got.out, got.err)
		}
	}
	golden(t, "writes", all.String())
}

func TestEmptyLists(t *testing.T) {
	f := world(t)
	f.answer("VMs.List", &apiv1.ListVMsResponse{})
	if r := f.run(t, "", "vm", "ls").ok(t); r.out != "" || !strings.Contains(r.err, "no vms") {
		t.Errorf("%q %q", r.out, r.err)
	}
	if r := f.run(t, "", "vm", "ls", "-o", "json").ok(t); r.out != "[]\n" || r.err != "" {
		t.Errorf("%q %q", r.out, r.err)
	}
}

// TestErrors checks message, remedy, JSON form and exit code for each kind of failure.
func TestErrors(t *testing.T) {
	f := world(t)
	for kind, want := range map[errs.Kind]int{errs.Invalid: exitInvalid, errs.NotFound: exitNotFound, errs.Exists: exitExists, errs.Precondition: exitPrecondition,
		errs.Conflict: exitConflict, errs.Exhausted: exitExhausted, errs.Unavailable: exitUnavailable, errs.Denied: exitDenied, errs.Unauthorized: exitDenied,
		errs.Deadline: exitDeadline, errs.Unsupported: exitUnsupported, errs.Corrupt: exitCorrupt, errs.Canceled: exitCanceled, errs.Internal: exitError, errs.OutOfRange: exitInvalid} {
		f.fail("VMs.Start", kind, "it did not work", "a_field", "do something else")
		r := f.run(t, "", "vm", "start", "web")
		if r.code != want || r.out != "" || r.err != "error: it did not work\nto do: do something else\n" {
			t.Errorf("%v: code %d (want %d), %q, %q", kind, r.code, want, r.out, r.err)
		}
		r = f.run(t, "", "vm", "start", "web", "-o", "json")
		var e struct {
			Error struct {
				Message, Kind, Reason, Field, Remedy string
				ExitCode                             int `json:"exit_code"`
			}
		}
		if err := json.Unmarshal([]byte(r.err), &e); err != nil || e.Error.Message != "it did not work" || e.Error.ExitCode != want || e.Error.Field != "a_field" || e.Error.Remedy != "do something else" || e.Error.Reason != "A_REASON" {
			t.Errorf("%v as JSON: %q, %v", kind, r.err, err)
		}
	}
	t.Run("several", func(t *testing.T) {
		r := f.run(t, "", "vm", "show", "web", "nix", "db", "nox")
		if r.code != exitNotFound || !strings.Contains(r.out, "4711") || !strings.Contains(r.out, "db") || strings.Count(r.err, "error:") != 2 {
			t.Errorf("%+v", r)
		}
	})
	t.Run("no daemon", func(t *testing.T) {
		r := f.run(t, "", "vm", "ls", "--socket", f.socket+"x")
		if r.code != exitUnavailable || !strings.Contains(r.err, "to do: start mvirtd") {
			t.Errorf("%+v", r)
		}
		r = f.run(t, "", "vm", "ls", "--socket", "/"+strings.Repeat("x", 200))
		if r.code != exitInvalid || !strings.Contains(r.err, "200 bytes") && !strings.Contains(r.err, "201 bytes") {
			t.Errorf("%+v", r)
		}
	})
}

// TestUsage checks command lines that are wrong by themselves: exit code 2 or 3, a remedy, no call made.
func TestUsage(t *testing.T) {
	f := world(t)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/empty", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for line, code := range map[string]int{
		"vmm": exitUsage, "vm lss": exitUsage, "vm ls extra": exitUsage, "vm show": exitUsage, "vm ls --nope": exitUsage, "vm ls -o xml": exitUsage, "volume create x": exitUsage,
		"volume create x 0": exitInvalid, "volume create x 10X": exitInvalid, "volume create x 5G --size 6G": exitUsage, "volume create x 1G --template a --volume b": exitUsage, "volume resize x": exitUsage, "volume resize web-root 1.5G": exitInvalid,
		"snapshot create web-root": exitUsage, "vm create Bad/Name --disk 1G": exitInvalid, "vm create .. --disk 1G": exitInvalid, "vm create x --cpus 0": exitInvalid, "vm create x --memory 0": exitInvalid, "vm create x --memory lots": exitInvalid, "vm create x --cpus -1": exitUsage,
		"vm create x --disk": exitUsage, "vm create x --disk ,": exitInvalid, "vm create x --disk 1G,color=red": exitInvalid, "vm create x --disk volume=a,size=1G": exitInvalid, "vm create x --disk template=a,volume=b": exitInvalid, "vm create x --disk 0": exitInvalid, "vm create x --network ,ip=1.2.3.4": exitInvalid,
		"vm create x --network lan,ip=1,ip=2": exitInvalid, "vm create x --kernel " + dir + "/none": exitNotFound, "vm create x --kernel " + dir: exitInvalid, "vm create x --cmdline quiet": exitInvalid, "vm create x --user-data " + dir + "/empty": exitInvalid, "vm create x --label nolabel": exitInvalid,
		"vm update web": exitUsage, "network update lan": exitUsage, "nic update web-0": exitUsage, "vm attach web": exitUsage, "vm attach web --disk 1G --nic x": exitUsage, "nic create x": exitUsage, "sg create x in:tcp:99999": exitInvalid, "sg create x sideways:tcp": exitInvalid, "sg create x in:gre:5": exitInvalid, "sg set ssh": exitUsage,
		"template import x " + dir + "/none": exitNotFound, "template import .x " + dir + "/empty": exitInvalid, "logs --level loud": exitInvalid, "logs --since soon": exitInvalid, "logs -n -1": exitInvalid, "logs --follow --reverse": exitUsage, "vm console web --escape x": exitInvalid, "vm console web --replay much": exitInvalid, "vm rm web --keep --recursive": exitUsage,
	} {
		before := len(f.calls)
		r := f.run(t, "", strings.Fields(line)...)
		if r.code != code || r.out != "" || !strings.HasPrefix(r.err, "error: ") || !strings.Contains(r.err, "\nto do: ") {
			t.Errorf("mvirt %s: code %d (want %d)\n%s%s", line, r.code, code, r.out, r.err)
		}
		if n := len(f.calls); n != before {
			t.Errorf("mvirt %s: calls %v", line, f.calls[before:])
		}
	}
}

// TestExitCodesDoc keeps docs/exit-codes.md and the codes the same.
func TestExitCodesDoc(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/exit-codes.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\| (\d+) \| (.*?) \|`).FindAllStringSubmatch(string(doc), -1)
	if len(rows) != len(exitCodes()) {
		t.Fatalf("the document has %d codes, the program %d", len(rows), len(exitCodes()))
	}
	for i, c := range exitCodes() {
		if rows[i][1] != fmt.Sprint(c.Code) || rows[i][2] != c.Meaning {
			t.Errorf("document: %v, program: %v", rows[i][1:], c)
		}
	}
	help := world(t).run(t, "", "help", "exit-codes").ok(t).out
	for _, c := range exitCodes() {
		if !strings.Contains(help, c.Meaning) {
			t.Errorf("help exit-codes does not tell %q", c.Meaning)
		}
	}
}
