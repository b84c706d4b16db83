package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/log"
	sdkplugin "github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
)

// The test binary is mvirtd, its shim and core, and the log plugin that it runs.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch {
		case os.Args[1] == "--fake-log":
			os.Args = os.Args[:1]
			sdkplugin.Main(sdkplugin.Program{Kind: service.KindLog, Name: "log-fake", Version: "1",
				Open: func(context.Context, sdkplugin.Env) (service.Base, error) { return fakeLog{}, nil }})
		case strings.HasPrefix(os.Args[1], "mvirt-"), os.Args[1] == "--config":
			main()
		}
	}
	os.Exit(m.Run())
}

type fakeLog struct{}

func (fakeLog) Health(context.Context) (service.Health, error)                 { return service.Health{}, nil }
func (fakeLog) Shutdown(context.Context) error                                 { return nil }
func (fakeLog) Append(context.Context, []log.Entry) error                      { return nil }
func (fakeLog) Query(context.Context, log.Query, func(log.Result) error) error { return nil }
func (fakeLog) Stats(context.Context) (log.Stats, error)                       { return log.Stats{}, nil }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestArguments(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.toml")
	must(t, os.WriteFile(bad, []byte("[core]\ncall_wait = \"3\"\nuzer = \"x\"\n"), 0o600))
	wrong := filepath.Join(dir, "wrong.toml")
	must(t, os.WriteFile(wrong, []byte("[core]\ncall_wait = \"3\"\n"), 0o600))
	open := filepath.Join(dir, "open.toml")
	must(t, os.WriteFile(open, nil, 0o600))
	must(t, os.Chmod(open, 0o666))
	for _, c := range []struct {
		args     []string
		code     int
		out, err string
	}{
		{args: []string{"--version"}, out: "mvirtd "},
		{args: []string{"--help"}, err: "Usage: mvirtd"},
		{args: []string{"--print-example-config"}, out: "[plugin.vmm]"},
		{args: []string{"--bogus"}, code: exitUsage, err: "unknown flag"},
		{args: []string{"start"}, code: exitUsage, err: "unexpected argument \"start\""},
		{args: []string{"--config", dir + "/none"}, code: exitConfig, err: "there is no configuration file " + dir + "/none\n  do: copy the commented example"},
		{args: []string{"--config", bad}, code: exitConfig, err: bad + ":3:1: core.uzer: unknown key"},
		{args: []string{"--config", wrong, "--check-config"}, code: exitConfig, err: wrong + ":2:1: core.call_wait: \"3\" is no duration"},
		{args: []string{"--config", open}, code: exitConfig, err: "can be written to by others (mode 0666)\n  do: chmod go-w " + open},
		{args: []string{"--config", dir}, code: exitConfig, err: "is not a regular file"},
	} {
		var out, errb bytes.Buffer
		code := run(c.args, &out, &errb)
		if code != c.code || !strings.Contains(out.String(), c.out) || !strings.Contains(errb.String(), c.err) {
			t.Errorf("%v: code %d, want %d\nout: %.300s\nerr: %.500s\nwant %q, %q", c.args, code, c.code, out.String(), errb.String(), c.out, c.err)
		}
	}
	if _, err := config.Parse("x", []byte(config.Example())); err != nil {
		t.Error(err)
	}
}

// daemon is a running mvirtd.
type daemon struct {
	t      *testing.T
	cmd    *exec.Cmd
	dir    string
	notify *net.UnixConn
	out    *bytes.Buffer
	done   chan error
}

// start runs mvirtd as root, or with a uid as that user, until it says that it is ready.
func start(t *testing.T, uid int) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "mvirtd-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	self, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	bin := dir + "/mvirtd"
	must(t, os.WriteFile(bin, self, 0o755))
	own := dir + "/own"
	must(t, os.Mkdir(own, 0o755))
	must(t, os.Chown(own, uid, -1))
	text := fmt.Sprintf("[core]\nsocket = %q\nrun_dir = %q\nstate_dir = %q\nuser = \"4100\"\ngroup = \"4101\"\n[plugin.log]\ncommand = %q\nargs = [\"--fake-log\"]\nuser = \"4001\"\ngroup = \"4002\"\n",
		own+"/run/mvirt.sock", own+"/run", own+"/lib/core", bin)
	must(t, os.WriteFile(dir+"/mvirt.toml", []byte(text), 0o644))
	d := &daemon{t: t, dir: own, out: &bytes.Buffer{}, done: make(chan error, 1)}
	d.notify, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/notify", Net: "unixgram"})
	must(t, err)
	must(t, os.Chmod(dir+"/notify", 0o666))
	t.Cleanup(func() { d.notify.Close() })
	d.cmd = exec.Command(bin, "--config", dir+"/mvirt.toml")
	d.cmd.Env = []string{"NOTIFY_SOCKET=" + dir + "/notify"}
	d.cmd.Stdout, d.cmd.Stderr = d.out, d.out
	d.cmd.WaitDelay = 5 * time.Second
	if uid != os.Geteuid() {
		d.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	must(t, d.cmd.Start())
	go func() { d.done <- d.cmd.Wait() }()
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		if t.Failed() {
			t.Logf("mvirtd said:\n%s", d.out)
		}
	})
	if got := d.notified(); !strings.HasPrefix(got, "READY=1") {
		t.Fatalf("notified %q", got)
	}
	return d
}

func (d *daemon) notified() string {
	d.t.Helper()
	b := make([]byte, 4096)
	must(d.t, d.notify.SetReadDeadline(time.Now().Add(20*time.Second)))
	n, err := d.notify.Read(b)
	must(d.t, err)
	return string(b[:n])
}

// child waits for a process among mvirtd's children whose command line holds a word, other than not.
func (d *daemon) child(word string, not int) int {
	d.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		f, err := os.Open(fmt.Sprintf("/proc/%d/task/%d/children", d.cmd.Process.Pid, d.cmd.Process.Pid))
		if err != nil {
			d.t.Skipf("this kernel does not list children: %v", err)
		}
		var pids []int
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", d.cmd.Process.Pid))
		f.Close()
		for _, task := range tasks { // a thread's children are its own
			b, _ := os.ReadFile(task)
			sc := bufio.NewScanner(bytes.NewReader(b))
			sc.Split(bufio.ScanWords)
			for sc.Scan() {
				if pid, err := strconv.Atoi(sc.Text()); err == nil {
					pids = append(pids, pid)
				}
			}
		}
		for _, pid := range pids {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if pid != not && bytes.Contains(b, []byte(word)) && !bytes.Contains(b, []byte("mvirt-exec-shim")) {
				return pid
			}
		}
	}
	d.t.Fatalf("no child %q", word)
	return 0
}

func uidOf(t *testing.T, pid int) uint32 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(fmt.Sprintf("/proc/%d", pid), &st))
	return st.Uid
}

func waitDead(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if unix.Kill(pid, 0) != nil {
			return
		}
	}
	t.Errorf("process %d lives on", pid)
}

func (d *daemon) stop() {
	d.t.Helper()
	must(d.t, d.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case err := <-d.done:
		if err != nil {
			d.t.Errorf("ended with %v", err)
		}
	case <-time.After(30 * time.Second):
		d.t.Fatal("does not stop")
	}
	if left, _ := os.ReadDir(d.dir + "/run/p"); len(left) != 0 {
		d.t.Errorf("left behind: %v", left)
	}
}

func TestAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it switches users")
	}
	d := start(t, 0)
	core := d.child(launcher.CoreArg, 0)
	plugin := d.child("--fake-log", 0)
	if u := uidOf(t, core); u != 4100 {
		t.Errorf("the core runs as %d", u)
	}
	if u := uidOf(t, plugin); u != 4001 {
		t.Errorf("the plugin runs as %d", u)
	}
	// SIGHUP does nothing.
	must(t, d.cmd.Process.Signal(syscall.SIGHUP))

	// A plugin that is killed comes back, beside the same core.
	must(t, unix.Kill(plugin, unix.SIGKILL))
	second := d.child("--fake-log", plugin)
	if d.child(launcher.CoreArg, 0) != core {
		t.Error("the core changed")
	}
	// A core that is killed takes its plugins along, and both come back.
	must(t, unix.Kill(core, unix.SIGKILL))
	if got := d.notified(); !strings.HasPrefix(got, "READY=1") {
		t.Errorf("notified %q", got)
	}
	core2, third := d.child(launcher.CoreArg, core), d.child("--fake-log", second)
	waitDead(t, second)

	d.stop()
	if got := d.notified(); !strings.HasPrefix(got, "STOPPING=1") {
		t.Errorf("notified %q", got)
	}
	waitDead(t, core2)
	waitDead(t, third)
}

// kill -9 of the launcher: core and plugin end by themselves.
func TestLauncherKilled(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it switches users")
	}
	d := start(t, 0)
	core, plugin := d.child(launcher.CoreArg, 0), d.child("--fake-log", 0)
	must(t, d.cmd.Process.Kill())
	waitDead(t, core)
	waitDead(t, plugin)
}

func TestAsUser(t *testing.T) {
	uid := os.Geteuid()
	if uid == 0 {
		uid = 4100
	}
	d := start(t, uid)
	plugin := d.child("--fake-log", 0)
	if u := uidOf(t, plugin); int(u) != uid {
		t.Errorf("the plugin runs as %d", u)
	}
	must(t, unix.Kill(plugin, unix.SIGKILL))
	d.child("--fake-log", plugin)
	d.stop()
}
