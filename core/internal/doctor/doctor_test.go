package doctor

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/ident"
)

const sample = `Name:	x
State:	S (sleeping)
Uid:	7	7	7	7
Gid:	8	8	8	8
Groups:	9 3 
CapInh:	0000000000000000
CapPrm:	0000000000001001
CapEff:	0000000000001001
CapBnd:	0000000000001001
CapAmb:	0000000000001000
NoNewPrivs:	1
Seccomp:	2
`

func TestParse(t *testing.T) {
	f, err := parse(sample)
	if err != nil {
		t.Fatal(err)
	}
	if f.UID != [4]uint32{7, 7, 7, 7} || f.GID[2] != 8 || !slices.Equal(f.Groups, []uint32{3, 9}) || f.Effective != 0x1001 || f.Permitted != 0x1001 ||
		f.Bounding != 0x1001 || f.Ambient != 0x1000 || !f.NoNewPrivs || f.Seccomp != 2 {
		t.Errorf("%+v", f)
	}
	for _, bad := range []string{"", strings.Replace(sample, "CapBnd", "CapX", 1), strings.Replace(sample, "Uid:	7", "Uid:", 1), strings.Replace(sample, "1001", "zz", 1)} {
		if _, err := parse(bad); err == nil {
			t.Errorf("it was taken for a status:\n%s", bad)
		}
	}
}

// Each line of a status that is not as wanted is told, and nothing else is.
func TestDifferences(t *testing.T) {
	want := Want{UID: 7, GID: 8, Groups: []uint32{3, 9}, Caps: 0x1001, Ambient: 0x1000, NoNewPrivs: true, Seccomp: true}
	f, err := parse(sample)
	if err != nil {
		t.Fatal(err)
	}
	if d := want.differences(1, f); len(d) != 0 {
		t.Fatalf("as wanted, but: %v", d)
	}
	for what, change := range map[string]func(*Facts){
		"uid": func(f *Facts) { f.UID[2] = 0 }, "gid": func(f *Facts) { f.GID[3] = 0 }, "groups": func(f *Facts) { f.Groups = nil },
		"effective capabilities": func(f *Facts) { f.Effective = 0 }, "permitted capabilities": func(f *Facts) { f.Permitted |= 2 },
		"bounding set": func(f *Facts) { f.Bounding |= 1 << 21 }, "ambient capabilities": func(f *Facts) { f.Ambient = 0 },
		"no_new_privs": func(f *Facts) { f.NoNewPrivs = false }, "there is no seccomp": func(f *Facts) { f.Seccomp = 0 },
	} {
		g := f
		change(&g)
		if d := want.differences(1, g); len(d) != 1 || !strings.HasPrefix(d[0], what) {
			t.Errorf("%s: %v", what, d)
		}
	}
	most := Want{UID: 7, GID: 8, Caps: 0x1fff, AtMost: true}
	f.Ambient = 0
	if d := most.differences(1, f); len(d) != 0 {
		t.Errorf("less than the most is a difference: %v", d)
	}
	f.Bounding |= 1 << 20
	if d := most.differences(1, f); len(d) != 1 {
		t.Errorf("more than the most is none: %v", d)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What belongs to nothing is found, what belongs to something is not, and removal removes exactly that.
func TestLeftovers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it looks at other users' processes")
	}
	dir := t.TempDir()
	cfg := &config.Config{Core: config.Core{RunDir: filepath.Join(dir, "run"), Cgroup: "none"},
		Jail: config.Jail{Enabled: true, UIDBase: 1_510_000_000, UIDCount: 10, StateDir: filepath.Join(dir, "jail")}}
	must(t, os.MkdirAll(filepath.Join(dir, "run/p"), 0o755))
	must(t, os.MkdirAll(cfg.Jail.StateDir, 0o700))
	here, gone := ident.New(), ident.New()
	must(t, os.WriteFile(filepath.Join(cfg.Jail.StateDir, here), []byte("1510000001\n"), 0o600))
	must(t, os.WriteFile(filepath.Join(cfg.Jail.StateDir, gone), []byte("1510000002\n"), 0o600))
	live, err := net.Listen("unix", filepath.Join(dir, "run/live.sock"))
	must(t, err)
	defer live.Close()
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "run/dead.sock")})
	must(t, err)
	dead.SetUnlinkOnClose(false)
	must(t, dead.Close())
	must(t, os.Mkdir(filepath.Join(dir, "run/p/net-7"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "run/p/net-7.pid"), []byte("1 1 none\n"), 0o600))
	process := func(uid uint32) *exec.Cmd {
		c := exec.Command("/bin/sleep", "1000")
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		must(t, c.Start())
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		return c
	}
	mine, stray := process(1_510_000_001), process(1_510_000_005)

	look := func() []Leftover {
		s := &system{cfg: cfg, report: &Report{}}
		s.leftovers(map[string]int{here: mine.Process.Pid})
		return s.report.Leftovers
	}
	var got []string
	for _, l := range look() {
		got = append(got, l.Class+" "+l.What)
	}
	slices.Sort(got)
	want := []string{"launch directory " + filepath.Join(dir, "run/p/net-7"), fmt.Sprintf("process %d under uid 1510000005: /bin/sleep 1000", stray.Process.Pid),
		"socket " + filepath.Join(dir, "run/dead.sock"), "uid 1510000002, of VM " + gone}
	if !slices.Equal(got, want) {
		t.Fatalf("got  %q\nwant %q", got, want)
	}
	for _, l := range look() {
		must(t, l.Fix())
	}
	_ = stray.Wait()
	if l := look(); len(l) != 0 {
		t.Errorf("after the removal: %+v", l)
	}
	if err := mine.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a VM's own process: %v", err)
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{`/a\040b`: "/a b", `/a\`: `/a\`, `\134`: `\`, `/x\9zz`: `/x\9zz`} {
		if got := unescape(in); got != want {
			t.Errorf("%q became %q", in, got)
		}
	}
}
