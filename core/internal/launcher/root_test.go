package launcher

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

// rig runs the launcher inside the test, with the test binary as core and plugins, and reads what they say.
type rig struct {
	t     *testing.T
	dir   string
	lines chan string
	sigs  chan os.Signal
	done  chan error
}

func newRig(t *testing.T, dir, text string, args ...string) *rig {
	t.Helper()
	needRoot(t)
	cfg := parse(t, text)
	r := &rig{t: t, dir: dir, lines: make(chan string, 100), sigs: make(chan os.Signal, 2), done: make(chan error, 1)}
	pr, pw, err := os.Pipe()
	must(t, err)
	stderr := os.Stderr
	os.Stderr = pw
	go func() {
		sc := bufio.NewScanner(pr)
		sc.Buffer(nil, 1<<20)
		for sc.Scan() {
			r.lines <- sc.Text()
		}
		close(r.lines)
	}()
	var stop sync.Once
	t.Cleanup(func() {
		stop.Do(func() {
			r.sigs <- syscall.SIGTERM
			select {
			case <-r.done:
			case <-time.After(30 * time.Second):
				t.Error("the launcher does not end")
			}
			os.Stderr = stderr
			pw.Close()
			for range r.lines {
			}
			pr.Close()
		})
	})
	go func() {
		err := RunRoot(RootOptions{Config: cfg, Text: []byte(text), Env: testEnv, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Args: args,
			Signal: func(c chan<- os.Signal) {
				go func() {
					for s := range r.sigs {
						c <- s
						if s == syscall.SIGTERM {
							return
						}
					}
				}()
			}})
		r.done <- err
		r.done <- err // for the clean-up
	}()
	return r
}

// expect reads lines until one starts with prefix and returns the rest of it.
func (r *rig) expect(prefix string) string {
	r.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case l, ok := <-r.lines:
			if !ok {
				r.t.Fatalf("the end instead of %q", prefix)
			}
			if rest, ok := strings.CutPrefix(l, prefix); ok {
				return rest
			}
		case err := <-r.done:
			r.t.Fatalf("the launcher ended instead of saying %q: %v", prefix, err)
		case <-deadline:
			r.t.Fatalf("nothing instead of %q", prefix)
		}
	}
}

func (r *rig) report(prefix string) report {
	r.t.Helper()
	var rep report
	if err := json.Unmarshal([]byte(r.expect(prefix)), &rep); err != nil {
		r.t.Fatal(err)
	}
	return rep
}

// config with users by number, so that no account has to be made: core 4100, and per plugin what is given.
func rootConfig(dir, bin, plugins string) string {
	return fmt.Sprintf("[core]\nrun_dir = %q\nstate_dir = %q\nuser = \"4100\"\ngroup = \"4101\"\nsocket_group = \"4102\"\nstop_timeout = \"5s\"\n%s",
		dir+"/run", dir+"/lib/core", strings.ReplaceAll(plugins, "BIN", bin))
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

func waitDead(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 20000)
		if err == unix.EINTR {
			continue
		}
		if n == 0 {
			t.Fatalf("process %d lives on", pid)
		}
		return
	}
}

const threePlugins = `
[plugin.storage]
command = "BIN"
args = ["test-plugin", "stay"]
user = "4001"
group = "4002"
groups = ["4005", "4004"]
data_dir = "@/lib/storage"
env = {TEST_DATA_DIR = "@/lib/storage"}
[plugin.net]
command = "BIN"
args = ["test-plugin", "stay"]
user = "0"
group = "0"
capabilities = ["CAP_NET_ADMIN", "CAP_CHOWN"]
[plugin.vmm]
command = "BIN"
args = ["test-plugin", "stay"]
user = "4003"
group = "4003"
capabilities = ["CAP_NET_RAW"]
`

// Every identity is really switched to, as the kernel tells it about the running processes.
func TestRootIdentities(t *testing.T) {
	needRoot(t)
	dir, bin := selfCopy(t)
	r := newRig(t, dir, rootConfig(dir, bin, strings.ReplaceAll(threePlugins, "@", dir)), "storage,net,vmm,log", "stay")
	core := r.report("core ")
	storage, net, vmm := r.report("plugin "), r.report("plugin "), r.report("plugin ")
	r.expect("failed ") // log is not configured
	const none = "0000000000000000"
	hex := func(caps ...string) string {
		n, err := capabilitySet(caps)
		must(t, err)
		return fmt.Sprintf("%016x", n)
	}
	for _, c := range []struct {
		who                        string
		r                          report
		uid, gid, groups           string
		prm, eff, bnd, amb, inheri string
	}{
		{"core", core, "4100", "4101", "4102", none, none, none, none, none},
		{"storage", storage, "4001", "4002", "4004 4005", none, none, none, none, none},
		{"net", net, "0", "0", "", hex("CAP_NET_ADMIN", "CAP_CHOWN"), hex("CAP_NET_ADMIN", "CAP_CHOWN"), hex("CAP_NET_ADMIN", "CAP_CHOWN"), none, none},
		{"vmm", vmm, "4003", "4003", "", hex("CAP_NET_RAW"), hex("CAP_NET_RAW"), hex("CAP_NET_RAW"), hex("CAP_NET_RAW"), hex("CAP_NET_RAW")},
	} {
		four := func(s string) string { return strings.TrimSpace(strings.Repeat(s+" ", 4)) }
		for name, want := range map[string]string{"Uid": four(c.uid), "Gid": four(c.gid), "Groups": c.groups, "CapPrm": c.prm, "CapEff": c.eff,
			"CapBnd": c.bnd, "CapAmb": c.amb, "CapInh": c.inheri, "NoNewPrivs": "1"} {
			if got := c.r.status(name); got != want {
				t.Errorf("%s: %s is %q, want %q", c.who, name, got, want)
			}
		}
	}
	for _, p := range []report{storage, net, vmm} {
		if p.WriteErr != "" {
			t.Errorf("launch directory: %s", p.WriteErr)
		}
	}
	if storage.DataErr != "" {
		t.Errorf("data directory: %s", storage.DataErr)
	}
	for path, want := range map[string]string{"/run": "0:4101 1775", "/run/p": "0:0 755", "/lib": "0:0 755", "/lib/core": "4100:4101 700", "/lib/storage": "4001:4002 700"} {
		var st unix.Stat_t
		must(t, unix.Stat(dir+path, &st))
		if got := fmt.Sprintf("%d:%d %o", st.Uid, st.Gid, st.Mode&0o7777); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	for _, e := range storage.Env {
		if d, ok := strings.CutPrefix(e, "HANDSHAKE="); ok {
			var st unix.Stat_t
			must(t, unix.Stat(d, &st))
			if got := fmt.Sprintf("%d:%d %o", st.Uid, st.Gid, st.Mode&0o7777); got != "4001:4101 2770" {
				t.Errorf("launch directory %s", got)
			}
		}
	}
	if slices.Contains(storage.Env, "SUDO_USER") || len(storage.Env) != 7 || !slices.Contains(storage.Env, fmt.Sprintf("HOST=4100/%d", core.PID)) {
		t.Errorf("environment %q", storage.Env)
	}

	// Orderly stop: the core is asked, plugins go with it, nothing is left.
	r.sigs <- syscall.SIGTERM
	r.expect("stop")
	if err := <-r.done; err != nil {
		t.Errorf("stop: %v", err)
	}
	for _, p := range []report{core, storage, net, vmm} {
		waitDead(t, p.PID)
	}
	if left, _ := os.ReadDir(dir + "/run/p"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// kill -9 of the core: its plugins end, and a new core comes.
func TestRootCoreKilled(t *testing.T) {
	needRoot(t)
	dir, bin := selfCopy(t)
	r := newRig(t, dir, rootConfig(dir, bin, strings.ReplaceAll(threePlugins, "@", dir)), "storage,net", "stay")
	for range 3 {
		core, p1, p2 := r.report("core "), r.report("plugin "), r.report("plugin ")
		r.expect("done")
		must(t, unix.Kill(core.PID, unix.SIGKILL))
		for _, p := range []report{core, p1, p2} {
			waitDead(t, p.PID)
		}
	}
	r.report("core ")
	r.expect("done")
}

// A stubborn plugin that does not mind its lifeline is killed before the next core starts.
func TestRootStubbornPlugin(t *testing.T) {
	needRoot(t)
	dir, bin := selfCopy(t)
	cfg := rootConfig(dir, bin, "[plugin.vmm]\ncommand = \"BIN\"\nargs = [\"test-plugin\", \"stubborn\"]\nuser = \"4003\"\ngroup = \"4003\"\n")
	r := newRig(t, dir, cfg, "vmm", "exit")
	p := r.report("plugin ")
	next := r.report("plugin ") // of the second core: the kind was free again
	if p.PID == next.PID || alive(p.PID) {
		t.Errorf("the old process %d lives beside %d", p.PID, next.PID)
	}
}

func TestRootSignalAndExit(t *testing.T) {
	needRoot(t)
	dir, bin := selfCopy(t)
	cfg := rootConfig(dir, bin, "[plugin.vmm]\ncommand = \"BIN\"\nargs = [\"test-plugin\", \"stay\"]\nuser = \"4003\"\ngroup = \"4003\"\n")
	r := newRig(t, dir, cfg, "vmm", "term")
	r.report("plugin ")
	if got := r.expect("exited "); got != "killed by SIGTERM" {
		t.Errorf("exit: %s", got)
	}
}

// A core that talks nonsense, or far too much, is killed and started again.
func TestRootHostileCore(t *testing.T) {
	needRoot(t)
	for _, how := range []string{"garbage", "flood"} {
		t.Run(how, func(t *testing.T) {
			dir, bin := selfCopy(t)
			cfg := rootConfig(dir, bin, "[plugin.vmm]\ncommand = \"BIN\"\nargs = [\"test-plugin\", \"stay\"]\nuser = \"4003\"\ngroup = \"4003\"\n")
			r := newRig(t, dir, cfg, "vmm", how)
			first := r.report("core ")
			second := r.report("core ")
			if first.PID == second.PID || alive(first.PID) {
				t.Error("it lives on")
			}
		})
	}
}

func TestRootConfigExit(t *testing.T) {
	needRoot(t)
	dir, bin := selfCopy(t)
	cfg := rootConfig(dir, bin, "[plugin.vmm]\ncommand = \"BIN\"\nargs = [\"test-plugin\", \"stay\"]\nuser = \"4003\"\ngroup = \"4003\"\n")
	r := newRig(t, dir, cfg, "vmm", "config")
	select {
	case err := <-r.done:
		if errs.KindOf(err) != errs.Precondition {
			t.Errorf("%v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a core that cannot run is started for ever")
	}
}

// Everything that is wrong with the accounts is said at once, with the command that cures it.
func TestRootAccounts(t *testing.T) {
	needRoot(t)
	cfg := parse(t, `
[core]
user = "no-such-core"
[plugin.storage]
command = "/bin/x"
[plugin.vmm]
command = "/bin/x"
user = "no-such-vmm"
groups = ["no-such-group"]
worker_user = "no-such-worker"
[plugin.net]
command = "/bin/x"
user = "4711"
`)
	_, err := newTable(cfg, true, systemAccounts())
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"there is no user no-such-core", "plugin.storage.user: missing", "there is no user no-such-vmm",
		"there is no group no-such-group", "there is no user no-such-worker", "the number 4711 has no entry"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not said in:\n%v", want, err)
		}
	}
	if !strings.HasPrefix(errs.RemedyOf(err), "useradd --system --user-group ") {
		t.Errorf("remedy: %s", errs.RemedyOf(err))
	}
	cfg = parse(t, "[core]\nuser = \"root\"\n[plugin.vmm]\ncommand = \"/bin/x\"\nuser = \"0\"\n")
	if _, err := newTable(cfg, true, systemAccounts()); errs.ReasonOf(err) != "CORE_IS_ROOT" {
		t.Errorf("a core as root: %v", err)
	}
}

// Two launchers on one state directory: the second is refused and names the first.
func TestRootLock(t *testing.T) {
	needRoot(t)
	dir, bin := selfCopy(t)
	text := rootConfig(dir, bin, "[plugin.vmm]\ncommand = \"BIN\"\nargs = [\"test-plugin\", \"stay\"]\nuser = \"4003\"\ngroup = \"4003\"\n")
	r := newRig(t, dir, text, "vmm", "stay")
	r.expect("done")
	err := RunRoot(RootOptions{Config: parse(t, text), Text: []byte(text), Env: testEnv, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if errs.ReasonOf(err) != "ALREADY_RUNNING" || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("%v", err)
	}
}
