package host_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/sdktest/fakeplugin"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
)

func TestAllKinds(t *testing.T) {
	for _, kind := range service.Kinds() {
		t.Run(string(kind), func(t *testing.T) {
			p, err := host.Launch(t.Context(), host.Config{Kind: kind,
				Spawner: &host.Local{Command: []string{"/proc/self/exe", "--data-dir", t.TempDir()}, Env: []string{fakeplugin.Env + "=" + string(kind)}, Dir: short(t)}})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Kill()
			if i := p.Info(); i.Kind != kind || i.Name != "fake-"+string(kind) || i.ContractMajor != service.ContractMajor || int(i.PID) != p.PID() {
				t.Errorf("%+v", i)
			}
			if _, err := p.Base.Health(t.Context()); err != nil {
				t.Error(err)
			}
			switch kind {
			case service.KindStorage:
				_, err = p.Storage.ListVolumes(t.Context())
			case service.KindNet:
				_, err = p.Net.ListNetworks(t.Context())
			case service.KindVMM:
				_, err = p.VMM.List(t.Context())
			case service.KindLog:
				_, err = p.Log.Stats(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
			if err := p.Stop(t.Context()); err != nil {
				t.Error(err)
			}
			if e, ended := p.Exit(); !ended || e.Code != 0 || e.Signal != 0 {
				t.Errorf("%v %v", e, ended)
			}
		})
	}
}

// TestBadPrograms launches what is no plugin; each error says which, why and what to do, in time, and leaves
// no process and no directory.
func TestBadPrograms(t *testing.T) {
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("not a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	command := func(c ...string) func(*host.Config) {
		return func(cfg *host.Config) { cfg.Spawner.(*host.Local).Command = c }
	}
	quick := func(cfg *host.Config) { cfg.StartTimeout = 300 * time.Millisecond }
	for _, c := range []struct {
		name, behaviour, reason, text string
		more                          func(*host.Config)
	}{
		{"missing", "", host.ReasonMissing, "/no/such/file", command("/no/such/file")},
		{"not executable", "", host.ReasonNotExec, plain, command(plain)},
		{"a text file", "", host.ReasonNotExec, text, command(text)},
		{"a directory", "", host.ReasonNotExec, "/", command("/")},
		{"another program", "", host.ReasonExited, "exit status 0", command("/bin/true")},
		{"exits at once", "exits", host.ReasonExited, "cannot open the pool tank", nil},
		{"hangs in its handshake", "hangs", host.ReasonHandshake, "waiting for a disk", quick},
		{"says something else", "garbage", host.ReasonNotAPlugin, "usage: frobnicate", nil},
		{"another contract version", "version", host.ReasonContract, "version 7", nil},
		{"net/rpc", "netrpc", host.ReasonNotAPlugin, "netrpc", nil},
		{"nobody listens", "nobody", host.ReasonPeer, "", quick},
		{"a stranger listens", "stranger", host.ReasonPeer, "", func(c *host.Config) { c.StartTimeout = 3 * time.Second }},
		{"accepts and is mute", "mute", host.ReasonHandshake, "", quick},
		{"cannot open its store", "open fails", host.ReasonExited, "the store is damaged", nil},
		{"another kind", "log:", host.ReasonWrongKind, "kind log, not net", func(c *host.Config) { c.Kind = service.KindNet }},
	} {
		t.Run(c.name, func(t *testing.T) {
			began := time.Now()
			p, err := launch(t, c.behaviour, c.more)
			if err == nil {
				p.Kill()
				t.Fatal("launched")
			}
			if errs.ReasonOf(err) != c.reason || !strings.Contains(err.Error(), c.text) || errs.RemedyOf(err) == "" || errs.KindOf(err) == errs.Unknown {
				t.Errorf("reason %s, want %s\n%v\nremedy %q", errs.ReasonOf(err), c.reason, err, errs.RemedyOf(err))
			}
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
			if kids := children(t); len(kids) > 0 {
				t.Errorf("processes left: %v", kids)
			}
		})
	}
}

// children are the pids of this process's children.
func children(t *testing.T) []string {
	t.Helper()
	var list []string
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, f := range tasks {
		b, _ := os.ReadFile(f)
		list = append(list, strings.Fields(string(b))...)
	}
	return list
}

func TestKilledPluginIsNoticed(t *testing.T) {
	p := mustLaunch(t, "log:", nil)
	began := time.Now()
	if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Exited()
	if d := time.Since(began); d > time.Second {
		t.Errorf("noticed after %v", d)
	}
	if e, _ := p.Exit(); e.Signal != syscall.SIGKILL || !strings.Contains(e.String(), "signal 9") {
		t.Errorf("%v", e)
	}
	if _, err := p.Log.Stats(t.Context()); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("a call after the death: %v", err)
	}
}

func TestCallInFlightWhenItDies(t *testing.T) {
	p := mustLaunch(t, "log:dies", nil)
	if _, err := p.Log.Stats(t.Context()); errs.KindOf(err) != errs.Unavailable {
		t.Errorf("%v", err)
	}
}

// freeze stops a process and returns when all of it has stopped.
func freeze(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); ; {
		running := false
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		for _, f := range tasks {
			b, _ := os.ReadFile(f)
			if _, rest, ok := strings.Cut(string(b), ") "); ok && rest[0] != 'T' {
				running = true
			}
		}
		if !running {
			return
		}
		if time.Now().After(end) {
			t.Fatal("it does not stop")
		}
	}
}

// TestFrozen stops a plugin's process: each way to end it is bounded all the same.
func TestFrozen(t *testing.T) {
	for name, end := range map[string]func(*host.Plugin){
		"kill": func(p *host.Plugin) { p.Kill() },
		"stop": func(p *host.Plugin) {
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			if err := p.Stop(ctx); errs.KindOf(err) != errs.Deadline {
				t.Errorf("stop: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := mustLaunch(t, "log:", nil)
			freeze(t, p.PID())
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, err := p.Base.Health(ctx); errs.KindOf(err) != errs.Deadline || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("health: %v", err)
			}
			began := time.Now()
			end(p)
			if d := time.Since(began); d > 2*time.Second {
				t.Errorf("took %v", d)
			}
			if _, ended := p.Exit(); !ended {
				t.Error("still there")
			}
		})
	}
}

// TestGrandchildHoldsPipes: the death of the plugin is seen though its pipes stay open.
func TestGrandchildHoldsPipes(t *testing.T) {
	var grandchild int
	var mu sync.Mutex
	seen := make(chan struct{})
	p := mustLaunch(t, "log:grandchild", func(c *host.Config) {
		c.Log = func(l host.LogLine) {
			if l.Message == "grandchild" {
				mu.Lock()
				fmt.Sscan(l.Fields["pid"], &grandchild)
				mu.Unlock()
				close(seen)
			}
		}
	})
	<-seen
	mu.Lock()
	defer mu.Unlock()
	defer syscall.Kill(grandchild, syscall.SIGKILL)
	if grandchild == 0 || syscall.Kill(grandchild, 0) != nil {
		t.Fatal("no grandchild")
	}
	began := time.Now()
	syscall.Kill(p.PID(), syscall.SIGKILL)
	<-p.Exited()
	if d := time.Since(began); d > time.Second {
		t.Errorf("noticed after %v", d)
	}
	if syscall.Kill(grandchild, 0) != nil {
		t.Error("the grandchild has gone, so nothing was proved")
	}
}

func TestSlowShutdownIsCut(t *testing.T) {
	p := mustLaunch(t, "log:slow shutdown", nil)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := p.Stop(ctx); errs.KindOf(err) != errs.Deadline {
		t.Errorf("%v", err)
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
	if e, _ := p.Exit(); e.Signal != syscall.SIGKILL {
		t.Errorf("%v", e)
	}
}

func TestPanicIsAnError(t *testing.T) {
	var mu sync.Mutex
	var stack string
	p := mustLaunch(t, "log:panics", func(c *host.Config) {
		c.Log = func(l host.LogLine) {
			mu.Lock()
			defer mu.Unlock()
			stack += l.Fields["stack"]
		}
	})
	for range 3 {
		if _, err := p.Log.Stats(t.Context()); errs.KindOf(err) != errs.Internal || !strings.Contains(err.Error(), "nil map") || errs.RemedyOf(err) == "" {
			t.Errorf("%v", err)
		}
	}
	if _, err := p.Base.Health(t.Context()); err != nil {
		t.Errorf("it did not survive: %v", err)
	}
	p.Kill()
	mu.Lock()
	defer mu.Unlock()
	if !strings.Contains(stack, "odd") {
		t.Errorf("no stack in the log: %q", stack)
	}
}

func TestLongLinesAndNoise(t *testing.T) {
	var mu sync.Mutex
	n, longest := 0, 0
	p := mustLaunch(t, "log:noise", func(c *host.Config) {
		c.Log = func(l host.LogLine) {
			mu.Lock()
			defer mu.Unlock()
			if l.Message == "noise" && l.Level == "info" && l.Fields["n"] == fmt.Sprint(n) {
				n++
			}
			longest = max(longest, len(l.Message))
		}
	})
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if n != 2000 || longest == 0 || longest > 64<<10 {
		t.Errorf("%d lines in order, the longest had %d bytes", n, longest)
	}
}

func TestPrintsBecomeLog(t *testing.T) {
	lines := make(chan string, 100)
	p := mustLaunch(t, "log:prints", func(c *host.Config) { c.Log = func(l host.LogLine) { lines <- l.Message } })
	if _, err := p.Log.Stats(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"printed to stdout": true, "printed to stderr": true}
	for len(want) > 0 {
		select {
		case l := <-lines:
			delete(want, l)
		case <-time.After(5 * time.Second):
			t.Fatalf("not seen: %v", want)
		}
	}
}

// TestEnvironment: the plugin gets nothing of ours.
func TestEnvironment(t *testing.T) {
	t.Setenv("SECRET_OF_THE_HOST", "x")
	var mu sync.Mutex
	var env, fds []string
	p := mustLaunch(t, "log:environment", func(c *host.Config) {
		c.Log = func(l host.LogLine) {
			mu.Lock()
			defer mu.Unlock()
			if l.Message == "env" {
				env = append(env, l.Fields["entry"])
			} else if l.Message == "fd" {
				fds = append(fds, l.Fields["n"]+" "+l.Fields["to"])
			}
		}
	})
	p.Stop(t.Context())
	mu.Lock()
	defer mu.Unlock()
	if len(env) < 8 {
		t.Fatalf("%q", env)
	}
	for _, e := range env {
		if !strings.HasPrefix(e, "MVIRT_") && !strings.HasPrefix(e, "PLUGIN_") && !strings.HasPrefix(e, "TEST_DIR=") {
			t.Errorf("in its environment: %s", e)
		}
	}
	for _, f := range fds {
		if strings.HasPrefix(f, "0 ") && f != "0 /dev/null" {
			t.Errorf("stdin: %s", f)
		}
	}
}

type hostRecorder struct {
	mu    sync.Mutex
	calls []string
}

func (h *hostRecorder) Audit(_ context.Context, r service.AuditRecord) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = append(h.calls, "audit "+r.Message+" "+strings.Join(r.Objects, ","))
	return nil
}

func (h *hostRecorder) Publish(_ context.Context, e service.Event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = append(h.calls, "event "+e.Type)
	return nil
}

func TestPluginCallsItsHost(t *testing.T) {
	h := &hostRecorder{}
	p := mustLaunch(t, "log:host calls", func(c *host.Config) { c.Host = h })
	if _, err := p.Log.Stats(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if got := strings.Join(h.calls, "; "); got != "audit hello vm; event x" {
		t.Error(got)
	}
}

// TestOthersAreKeptOut: another process of the same user reaches the sockets and is refused, as the kernel
// tells its pid.
func TestOthersAreKeptOut(t *testing.T) {
	var dir string
	p := mustLaunch(t, "log:", func(c *host.Config) {
		c.Host = &hostRecorder{}
		l := c.Spawner.(*host.Local)
		c.Spawner = spy{l, &dir}
	})
	sockets, _ := filepath.Glob(dir + "/*")
	n := 0
	for _, s := range sockets {
		fi, err := os.Lstat(s)
		if err != nil || fi.Mode()&os.ModeSocket == 0 {
			continue
		}
		n++
		cmd := exec.Command("/proc/self/exe", "-test.run", "^TestConnectHelper$")
		cmd.Env = append(os.Environ(), "CONNECT_TO="+s)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "refused-by-peer") {
			t.Errorf("%s: %v %s", filepath.Base(s), err, out)
		}
	}
	if n < 3 {
		t.Errorf("only %d sockets in %v", n, sockets)
	}
	if _, err := p.Log.Stats(t.Context()); err != nil {
		t.Errorf("after the attempts: %v", err)
	}
}

type spy struct {
	*host.Local
	dir *string
}

func (s spy) Spawn(ctx context.Context) (*host.Process, error) {
	p, err := s.Local.Spawn(ctx)
	if err == nil {
		*s.dir = p.LaunchDir
	}
	return p, err
}

// TestConnectHelper is run by TestOthersAreKeptOut in a process of its own.
func TestConnectHelper(t *testing.T) {
	path := os.Getenv("CONNECT_TO")
	if path == "" {
		t.Skip("a helper of TestOthersAreKeptOut")
	}
	typ := unix.SOCK_STREAM
	if strings.HasSuffix(path, "fd.sock") {
		typ = unix.SOCK_SEQPACKET
	}
	fd, err := unix.Socket(unix.AF_UNIX, typ, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	buf := make([]byte, 100)
	n, err := unix.Read(fd, buf)
	if n == 0 || errors.Is(err, unix.ECONNRESET) || n > 0 && buf[0] == 'E' {
		fmt.Println("refused-by-peer")
		return
	}
	fmt.Printf("answered %q %v\n", buf[:max(n, 0)], err)
}

// TestLifeline: when the host is gone, so is the plugin.
func TestLifeline(t *testing.T) {
	var life *os.File
	p := mustLaunch(t, "log:", func(c *host.Config) { c.Spawner = lifeSpy{c.Spawner.(*host.Local), &life} })
	life.Close()
	select {
	case <-p.Exited():
	case <-time.After(5 * time.Second):
		t.Fatal("still there")
	}
	if e, _ := p.Exit(); e.Code != 0 || e.Signal != 0 {
		t.Errorf("%v", e)
	}
}

type lifeSpy struct {
	*host.Local
	life **os.File
}

func (s lifeSpy) Spawn(ctx context.Context) (*host.Process, error) {
	p, err := s.Local.Spawn(ctx)
	if err == nil {
		*s.life = p.Lifeline
	}
	return p, err
}

// TestWithoutGoPlugin holds what docs/writing-a-plugin.md says to authors in other languages: a gRPC server and
// one line are enough.
func TestWithoutGoPlugin(t *testing.T) {
	p := mustLaunch(t, "raw", nil)
	if _, err := p.Log.Stats(t.Context()); err != nil {
		t.Error(err)
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if e, _ := p.Exit(); e.Code != 0 || e.Signal != 0 {
		t.Errorf("%v", e)
	}
}

func TestSIGTERM(t *testing.T) {
	p := mustLaunch(t, "log:", nil)
	syscall.Kill(p.PID(), syscall.SIGTERM)
	select {
	case <-p.Exited():
	case <-time.After(5 * time.Second):
		t.Fatal("still there")
	}
	if e, _ := p.Exit(); e.Code != 0 || e.Signal != 0 {
		t.Errorf("%v", e)
	}
}

func TestCancelReachesTheHandler(t *testing.T) {
	p := mustLaunch(t, "log:slow call", nil)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := p.Log.Stats(ctx); errs.KindOf(err) != errs.Canceled || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Errorf("the handler did not end: %v", err)
	}
}

func TestUndeclaredFeature(t *testing.T) {
	p := mustLaunch(t, "log:", nil)
	if p.Log.Has(service.FeatureLogVerify) {
		t.Error("declared")
	}
	_, err := p.Log.Verify(t.Context(), log.VerifyRequest{})
	if errs.KindOf(err) != errs.Unsupported || errs.RemedyOf(err) == "" {
		t.Errorf("%v", err)
	}
	if err := p.Log.Backup(t.Context(), os.Stderr); errs.KindOf(err) != errs.Unsupported {
		t.Errorf("%v", err)
	}
}

// TestManyLaunches: no goroutine (see TestMain), descriptor, process or directory is left.
func TestManyLaunches(t *testing.T) {
	count := func() int { l, _ := os.ReadDir("/proc/self/fd"); return len(l) }
	p := mustLaunch(t, "log:", nil)
	p.Stop(t.Context())
	before := count()
	for i := range 10 {
		p := mustLaunch(t, "log:", nil)
		if i%2 == 0 {
			p.Kill()
		} else if err := p.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		p.Kill() // may be repeated
	}
	for end := time.Now().Add(5 * time.Second); count() > before && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if n := count(); n > before {
		t.Errorf("%d descriptors, were %d", n, before)
	}
}

func TestAttach(t *testing.T) {
	dir := short(t)
	sock := filepath.Join(dir, "log.sock")
	addr := "unix://" + sock
	if _, err := host.Attach(t.Context(), addr, host.Config{Kind: service.KindLog}); errs.ReasonOf(err) != host.ReasonMissing || errs.RemedyOf(err) == "" {
		t.Errorf("nothing there: %v", err)
	}
	if _, err := host.Attach(t.Context(), "tcp://x", host.Config{}); errs.KindOf(err) != errs.Invalid {
		t.Errorf("no socket: %v", err)
	}
	cmd := exec.Command("/proc/self/exe", "--data-dir", t.TempDir(), "--listen", addr)
	cmd.Env = []string{fakeplugin.Env + "=storage"}
	stderr, _ := cmd.StderrPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("SIGTERM: %v", err)
		}
	}()
	stderr.Read(make([]byte, 1000)) // "serving"
	if _, err := host.Attach(t.Context(), addr, host.Config{Kind: service.KindLog}); errs.ReasonOf(err) != host.ReasonWrongKind {
		t.Errorf("wrong kind: %v", err)
	}
	for range 2 {
		p, err := host.Attach(t.Context(), addr, host.Config{Kind: service.KindStorage})
		if err != nil {
			t.Fatal(err)
		}
		f, _ := os.Open("/proc/self/exe")
		_, err = p.Storage.StartImport(t.Context(), storage.ImportRequest{ID: "0190a0a0-0000-7000-8000-000000000001", Name: "exe", File: f})
		f.Close()
		if err != nil {
			t.Errorf("a descriptor: %v", err)
		}
		if err := p.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		<-p.Exited()
		if syscall.Kill(cmd.Process.Pid, 0) != nil {
			t.Fatal("leaving ended it")
		}
	}
	p, err := host.Attach(t.Context(), addr, host.Config{Kind: service.KindStorage})
	if err != nil {
		t.Fatal(err)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	<-p.Exited()
	p.Kill()
}
