package launcher

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// cgroup2Mount is where a cgroup v2 hierarchy is mounted, or "".
func cgroup2Mount(t *testing.T) string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		for i := range f {
			if f[i] == "-" && i+1 < len(f) && f[i+1] == "cgroup2" {
				return f[4]
			}
		}
	}
	return ""
}

// Each plugin gets a group of its own, which belongs to its user; the launcher stands beside, not above.
func TestCgroups(t *testing.T) {
	needRoot(t)
	mount := cgroup2Mount(t)
	if mount == "" {
		t.Skip("no cgroup v2 hierarchy is mounted here")
	}
	base := filepath.Join(mount, fmt.Sprintf("mvirt-test-%d", os.Getpid()))
	if err := os.Mkdir(base, 0o755); err != nil {
		t.Skipf("cannot make a control group here: %v", err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	home := mount
	for line := range strings.Lines(string(own)) {
		if p, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			home = filepath.Join(mount, p)
		}
	}
	t.Cleanup(func() {
		must(t, os.WriteFile(filepath.Join(home, "cgroup.procs"), []byte("0"), 0))
		for _, d := range []string{"log/plugin", "log", "launcher", ""} {
			if err := os.Remove(filepath.Join(base, d)); err != nil && !os.IsNotExist(err) {
				t.Errorf("left behind: %v", err)
			}
		}
	})
	cg, _, err := newCgroups(base)
	must(t, err)
	dir, bin := selfCopy(t)
	text := rootConfig(dir, bin, "[plugin.log]\ncommand = \"BIN\"\nargs = [\"test-plugin\", \"\"]\nuser = \"4001\"\ngroup = \"4002\"\n")
	tab, err := newTable(parse(t, text), true, systemAccounts())
	must(t, err)
	st, err := newStarter(tab, dir+"/run", cg, testEnv)
	must(t, err)
	l, err := st.start(service.KindLog)
	must(t, err)
	readReport(t, l.stdout)
	got, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", l.child.pid))
	must(t, err)
	if want := "0::" + strings.TrimPrefix(base, mount) + "/log/plugin\n"; !strings.Contains(string(got), want) {
		t.Errorf("the plugin is in %q, not in %q", got, want)
	}
	var s unix.Stat_t
	must(t, unix.Stat(base+"/log/cgroup.procs", &s))
	if s.Uid != 4001 {
		t.Errorf("the group belongs to %d", s.Uid)
	}
	must(t, unix.Stat(base+"/cgroup.procs", &s))
	if s.Uid != 0 {
		t.Errorf("the base belongs to %d", s.Uid)
	}
	closeAll([]*os.File{l.stdout, l.stderr, l.lifeline})
	waitGone(t, l.child.gone)
	st.end(0)
	l.child.close()
	st.dirs.dir.Close()
}

func TestCgroupSettings(t *testing.T) {
	if cg, why, err := newCgroups("none"); cg != nil || why == "" || err != nil {
		t.Errorf("none: %v %q %v", cg, why, err)
	}
	if _, _, err := newCgroups(t.TempDir()); errs.KindOf(err) != errs.Precondition || errs.RemedyOf(err) == "" {
		t.Errorf("an ordinary directory: %v", err)
	}
	if base, why := delegated(); base == "" && why == "" {
		t.Error("auto finds nothing and does not say why")
	}
}
