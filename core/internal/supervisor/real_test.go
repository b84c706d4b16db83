package supervisor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	sdkplugin "github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
)

// The test binary is also the shim and the plugin that tests start.
func TestMain(m *testing.M) {
	launcher.Shim()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "--good":
			runGood()
		case "--bad":
			runBad(os.Args[2])
		}
	}
	goleak.VerifyTestMain(m)
}

// runGood is a log plugin that counts and does what Append is told by the first entry's message.
func runGood() {
	os.Args = slices.Delete(os.Args, 1, 2)
	sdkplugin.Main(sdkplugin.Program{Kind: service.KindLog, Name: "log-fake", Version: "1.2.3", Short: "for tests",
		Needs: service.Needs{Capabilities: []string{"CAP_SYS_BOOT"}, Devices: []string{"/dev/no-such-device"}, Programs: []string{"sh"}},
		Open: func(_ context.Context, env sdkplugin.Env) (service.Base, error) {
			env.Log.Info("opened", "pid", os.Getpid())
			return &realLog{env: env}, nil
		}})
}

type realLog struct{ env sdkplugin.Env }

func (l *realLog) Health(context.Context) (service.Health, error) { return service.Health{}, nil }
func (l *realLog) Shutdown(context.Context) error                 { l.env.Log.Info("shut down"); return nil }

func (l *realLog) Append(ctx context.Context, es []log.Entry) error {
	if len(es) == 0 {
		return nil
	}
	switch cmd, arg, _ := strings.Cut(es[0].Message, " "); cmd {
	case "hang":
		<-ctx.Done()
		return ctx.Err()
	case "exit":
		_, _ = syscall.Write(2, []byte("these are my last words\n")) // as a panic does; os.Stderr is go-plugin's by now
		os.Exit(3)
	case "exit-first": // only the first to come: the marker file tells
		f, err := os.OpenFile(arg, os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			f.Close()
			os.Exit(3)
		}
	case "panic":
		panic("on purpose")
	case "audit":
		return l.env.Host.Audit(ctx, service.AuditRecord{ID: "1", Message: arg})
	case "noise": // a line far longer than any buffer, and much of it, on each way out
		line := []byte(strings.Repeat("x", 200<<10) + "\n")
		for range 20 {
			_, _ = os.Stderr.Write(line)
			for _, fd := range []int{1, 2} { // what a child or C code does
				for b := line; len(b) > 0; {
					n, err := syscall.Write(fd, b)
					if err != nil {
						return err
					}
					b = b[n:]
				}
			}
		}
	}
	return nil
}

func (l *realLog) Query(_ context.Context, _ log.Query, fn func(log.Result) error) error {
	for i := range 3 {
		if err := fn(log.Result{Entry: log.Entry{ID: fmt.Sprint(i)}}); err != nil {
			return err
		}
	}
	return nil
}

func (l *realLog) Stats(context.Context) (log.Stats, error) {
	return log.Stats{Entries: uint64(os.Getpid())}, nil
}

// runBad is a program that is no good plugin.
func runBad(how string) {
	switch how {
	case "exit":
		fmt.Fprintln(os.Stderr, "no such database")
		os.Exit(9)
	case "hang":
		signal.Ignore(syscall.SIGTERM)
		time.Sleep(time.Hour) // not select: without cgo the runtime calls that a deadlock
	case "text":
		fmt.Println("Hello, I am no plugin")
		time.Sleep(time.Minute)
	case "version":
		fmt.Printf("1|99|unix|%s/x|grpc|\n", os.Getenv("MVIRT_LAUNCH_DIR"))
		time.Sleep(time.Minute)
	case "elsewhere": // a socket that nobody serves
		fmt.Printf("1|1|unix|%s/nothing|grpc|\n", os.Getenv("MVIRT_LAUNCH_DIR"))
		time.Sleep(time.Minute)
	case "kind":
		os.Args = os.Args[:1]
		sdkplugin.Main(sdkplugin.Program{Kind: service.KindLog, Name: "log-fake", Version: "1", Open: func(_ context.Context, env sdkplugin.Env) (service.Base, error) {
			return &realLog{env: env}, nil
		}})
	case "open":
		os.Args = os.Args[:1]
		sdkplugin.Main(sdkplugin.Program{Kind: service.KindLog, Name: "log-fake", Version: "1", Open: func(context.Context, sdkplugin.Env) (service.Base, error) {
			return nil, errs.New(errs.Precondition, "the database is from a newer version").Do("install a newer mvirt-log")
		}})
	}
	os.Exit(0)
}

// realRig is a supervisor of a real plugin process, as the current user.
type realRig struct {
	t    *testing.T
	sup  *Supervisor
	tr   *health.Tracker
	host *recordingHost

	mu    sync.Mutex
	lines []Line
}

type recordingHost struct {
	mu   sync.Mutex
	recs []service.AuditRecord
}

func (h *recordingHost) Audit(_ context.Context, r service.AuditRecord) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.recs = append(h.recs, r)
	return nil
}
func (h *recordingHost) Publish(context.Context, service.Event) error { return nil }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mvirt-sup-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}

func selfCopy(t *testing.T, dir string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	bin := filepath.Join(dir, "fake-plugin")
	must(t, os.WriteFile(bin, data, 0o755))
	must(t, os.Chmod(bin, 0o755))
	return bin
}

// newReal starts a supervisor with a plugin table; $DIR and $BIN in it are replaced.
func newReal(t *testing.T, dir, core, table string) *realRig {
	t.Helper()
	text := fmt.Sprintf("[core]\nrun_dir = \"%[1]s/run\"\nstate_dir = \"%[1]s/state\"\n%s\n%s\n", dir, core, table)
	cfg, err := config.Parse("test.toml", []byte(text))
	must(t, err)
	spawner, err := launcher.NewLocal(cfg, HandshakeEnv)
	must(t, err)
	r := &realRig{t: t, tr: &health.Tracker{}, host: &recordingHost{}}
	r.sup = ForConfig(cfg, Wiring{Spawner: spawner, Health: r.tr, Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
		Host: func(service.Kind) service.Host { return r.host },
		Line: func(_ service.Kind, l Line) { r.mu.Lock(); r.lines = append(r.lines, l); r.mu.Unlock() }})
	r.sup.Start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		r.sup.Stop(ctx)
		spawner.Close()
		if left, _ := os.ReadDir(dir + "/run/p"); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return r
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Helper()
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func goodTable(bin string, more ...string) string {
	return fmt.Sprintf("[plugin.log]\ncommand = %q\nargs = [\"--good\"]\n%s\n", bin, strings.Join(more, "\n"))
}

func (r *realRig) ready() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	must(r.t, r.sup.Ready(ctx))
}

func (r *realRig) append(msg string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return r.sup.Log().Append(ctx, []log.Entry{{ID: "x", Level: log.LevelInfo, Message: msg}})
}

func (r *realRig) pid() int { return r.sup.Status(service.KindLog).PID }

// Each bad binary: one clear error that names the trouble and the remedy, and nothing left behind.
func TestBadBinaries(t *testing.T) {
	for _, c := range []struct {
		name, args, more string
		change           func(t *testing.T, bin string)
		reason           string
		want             []string
	}{
		{name: "missing", change: func(t *testing.T, bin string) { must(t, os.Remove(bin)) }, reason: "BINARY_MISSING", want: []string{"does not exist", "install the plugin, or correct command in [plugin.log]"}},
		{name: "not executable", change: func(t *testing.T, bin string) { must(t, os.Chmod(bin, 0o644)) }, reason: "BINARY_NOT_EXECUTABLE", want: []string{"is not executable", "chmod 755 "}},
		{name: "writable by others", change: func(t *testing.T, bin string) { must(t, os.Chmod(bin, 0o777)) }, reason: "BINARY_WRITABLE", want: []string{"can be written to by others", "chmod go-w "}},
		{name: "pinned sum", more: "sha256 = \"" + strings.Repeat("0", 64) + "\"", reason: "BINARY_SHA256", want: []string{"not the pinned 000", "set sha256"}},
		{name: "no program", change: func(t *testing.T, bin string) { must(t, os.WriteFile(bin, []byte("junk"), 0o755)) }, reason: "BINARY_FORMAT", want: []string{"exec format error", "program for this machine"}},
		{name: "not a plugin", args: "text", reason: "NOT_A_PLUGIN", want: []string{"Hello, I am no plugin", "command"}},
		{name: "other contract version", args: "version", reason: "CONTRACT_VERSION", want: []string{"contract version 99", "version 1"}},
		{name: "other kind", args: "kind", reason: "WRONG_KIND", want: []string{"[plugin.log]"}},
		{name: "exits at once", args: "exit", reason: "EXITED", want: []string{"exit status 9", "no such database"}},
		{name: "cannot open its data", args: "open", reason: "EXITED", want: []string{"from a newer version", "install a newer mvirt-log"}},
		{name: "hangs in its handshake", args: "hang", more: "start_timeout = \"1s\"", reason: "HANDSHAKE_TIMEOUT", want: []string{"1s", "start_timeout"}},
		{name: "serves elsewhere", args: "elsewhere", more: "start_timeout = \"3s\"", reason: "", want: []string{"socket"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // they mostly wait
			dir := shortDir(t)
			bin := selfCopy(t, dir)
			if c.change != nil {
				c.change(t, bin)
			}
			kind := "log"
			if c.args == "kind" {
				kind = "vmm"
			}
			args := `"--good"`
			if c.args != "" {
				args = `"--bad", "` + c.args + `"`
			}
			r := newReal(t, dir, "call_wait = \"20s\"", fmt.Sprintf("[plugin.%s]\ncommand = %q\nargs = [%s]\n%s\n", kind, bin, args, c.more))
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			begun := time.Now()
			err := r.sup.Ready(ctx) // quarantined in the end
			if errs.ReasonOf(err) != "PLUGIN_QUARANTINED" {
				t.Fatalf("%v", err)
			}
			if d := time.Since(begun); d > 25*time.Second {
				t.Errorf("took %s", d)
			}
			st := r.sup.Status(service.Kind(kind))
			all := st.Reason + " | " + st.Remedy
			for _, w := range c.want {
				if !strings.Contains(all, w) {
					t.Errorf("%q is not said in: %s", w, all)
				}
			}
			if got := errs.ReasonOf(r.sup.units[service.Kind(kind)].failure); c.reason != "" && got != c.reason {
				t.Errorf("reason %s, want %s: %s", got, c.reason, st.Reason)
			}
			if strings.Contains(st.Remedy, "\n") || st.Remedy == "" {
				t.Errorf("remedy %q", st.Remedy)
			}
			if left, _ := os.ReadDir(dir + "/run/p"); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestRealPlugin(t *testing.T) {
	dir := shortDir(t)
	r := newReal(t, dir, "", goodTable(selfCopy(t, dir)))
	r.ready()
	must(t, r.append("hello"))
	st := r.sup.Status(service.KindLog)
	if st.Info.Name != "log-fake" || st.Info.Version != "1.2.3" || st.State != StateUp || st.PID == 0 || st.Resident == 0 || st.Actual == nil || !st.Actual.NoNewPrivs {
		t.Errorf("%+v", st)
	}
	if !slices.Contains(st.Missing, "device /dev/no-such-device") || slices.Contains(st.Missing, "program sh") {
		t.Errorf("missing: %v", st.Missing)
	}
	n := 0
	must(t, r.sup.Log().Query(context.Background(), log.Query{}, func(log.Result) error { n++; return nil }))
	if n != 3 {
		t.Errorf("%d results", n)
	}
	must(t, r.append("audit from the plugin"))
	if len(r.host.recs) != 1 || r.host.recs[0].Message != "from the plugin" {
		t.Errorf("audit: %+v", r.host.recs)
	}
	// A panic in a handler is an error of that call alone.
	pid := r.pid()
	if err := r.append("panic"); errs.KindOf(err) != errs.Internal {
		t.Errorf("panic: %v", err)
	}
	// Lines longer than any buffer block nobody.
	must(t, r.append("noise"))
	must(t, r.append("hello"))
	if r.pid() != pid {
		t.Error("the plugin died of it")
	}
	r.mu.Lock()
	opened := slices.ContainsFunc(r.lines, func(l Line) bool {
		return l.Message == "opened" && l.Level == "info" && l.Fields["pid"] == fmt.Sprint(pid)
	})
	r.mu.Unlock()
	if !opened {
		t.Error("the plugin's log lines do not arrive")
	}
	// Orderly restart: the plugin's own Shutdown runs.
	must(t, r.sup.Restart(context.Background(), service.KindLog))
	st = r.sup.Status(service.KindLog)
	if st.PID == pid || !st.LastExit.Wanted || !strings.Contains(st.LastExit.Text, "exit status 0") {
		t.Errorf("%+v %+v", st, st.LastExit)
	}
	r.mu.Lock()
	shut := slices.ContainsFunc(r.lines, func(l Line) bool { return l.Message == "shut down" })
	r.mu.Unlock()
	if !shut {
		t.Error("Shutdown was not called")
	}
}

// kill -9, again and again: the next call succeeds, soon.
func TestKillLoop(t *testing.T) {
	dir := shortDir(t)
	r := newReal(t, dir, "call_wait = \"10s\"", goodTable(selfCopy(t, dir)))
	r.ready()
	var took []time.Duration
	for range 15 {
		must(t, r.append("hello"))
		must(t, unix.Kill(r.pid(), unix.SIGKILL))
		begun := time.Now()
		must(t, r.append("hello"))
		took = append(took, time.Since(begun))
		if st := r.sup.Status(service.KindLog); !strings.Contains(st.LastExit.Text, "killed by SIGKILL") {
			t.Errorf("last exit: %+v", st.LastExit)
		}
		must(t, r.sup.Restart(context.Background(), service.KindLog)) // forgets the deaths
	}
	slices.Sort(took)
	t.Logf("kill -9 to the next good call: p50 %s, worst %s", took[len(took)/2], took[len(took)-1])
	// How fast is bench-core's to say (plugin_restart_p50_ms): hosts of tests are shared and noisy.
}

func TestRealQuarantine(t *testing.T) {
	dir := shortDir(t)
	r := newReal(t, dir, "call_wait = \"10s\"", goodTable(selfCopy(t, dir)))
	r.ready()
	for i := range quarantineDeaths {
		must(t, r.append("hello"))
		must(t, unix.Kill(r.pid(), unix.SIGKILL))
		if i < quarantineDeaths-1 {
			must(t, r.append("hello")) // by the next instance
		}
	}
	err := r.append("hello")
	if errs.ReasonOf(err) != "PLUGIN_QUARANTINED" || !strings.Contains(err.Error(), "killed by SIGKILL") || errs.RemedyOf(err) != "mvirt plugin restart log" {
		t.Errorf("%v (%s)", err, errs.RemedyOf(err))
	}
	if cs := r.tr.List("plugin.log"); len(cs) != 1 || cs[0].Code != "PLUGIN_DOWN" || cs[0].Severity != service.SeverityCritical {
		t.Errorf("conditions: %+v", cs)
	}
	must(t, r.sup.Restart(context.Background(), service.KindLog))
	must(t, r.append("hello"))
}

// freeze stops a process and returns when the kernel has stopped it.
func freeze(t *testing.T, pid int) {
	t.Helper()
	must(t, unix.Kill(pid, unix.SIGSTOP))
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		must(t, err)
		if strings.Contains(string(b), ") T ") {
			return
		}
	}
	t.Fatal("the process does not stop")
}

// SIGSTOP: nothing dies, nothing answers. Health finds it.
func TestStoppedProcess(t *testing.T) {
	dir := shortDir(t)
	r := newReal(t, dir, "call_wait = \"10s\"", goodTable(selfCopy(t, dir), `health_interval = "100ms"`, `health_deadline = "100ms"`, "health_misses = 3"))
	r.ready()
	must(t, r.append("hello"))
	pid := r.pid()
	freeze(t, pid)
	must(t, r.append("hello")) // hangs, is cut by the kill, and repeated on the next instance
	st := r.sup.Status(service.KindLog)
	if st.PID == pid || !strings.Contains(st.LastExit.Text, "no answer to 3 health checks") || !strings.Contains(st.LastExit.Text, "killed by SIGKILL") {
		t.Errorf("%+v", st.LastExit)
	}
}

// A stopped process does not hold up an orderly stop either.
func TestStopOfAStoppedProcess(t *testing.T) {
	dir := shortDir(t)
	r := newReal(t, dir, "", goodTable(selfCopy(t, dir), `stop_timeout = "300ms"`))
	r.ready()
	pid := r.pid()
	freeze(t, pid)
	begun := time.Now()
	must(t, r.sup.Restart(context.Background(), service.KindLog))
	if d := time.Since(begun); d > 8*time.Second {
		t.Errorf("took %s", d)
	}
	if r.pid() == pid {
		t.Error("the same process")
	}
}

func TestCallsOfADyingPlugin(t *testing.T) {
	dir := shortDir(t)
	r := newReal(t, dir, "call_wait = \"10s\"", goodTable(selfCopy(t, dir)))
	r.ready()
	must(t, r.append("exit-first "+dir+"/marker")) // repeated on the next instance
	st := r.sup.Status(service.KindLog)
	if !strings.Contains(st.LastExit.Text, "exit status 3") {
		t.Errorf("%+v", st.LastExit)
	}
	err := r.append("exit")
	if errs.ReasonOf(err) != "PLUGIN_DIED" || !errors.Is(err, errs.Unavailable) {
		t.Errorf("%v", err)
	}
	must(t, r.append("hello")) // by the next instance
	if st := r.sup.Status(service.KindLog); !slices.Contains(st.LastExit.Stderr, "these are my last words") {
		t.Errorf("last lines: %q", st.LastExit.Stderr)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := r.sup.Log().Append(ctx, []log.Entry{{ID: "x", Message: "hang"}}); errs.KindOf(err) != errs.Deadline {
		t.Errorf("a call that hangs: %v", err)
	}
}

// A stand-alone plugin is attached to, noticed when it dies, and attached to again.
func TestAttach(t *testing.T) {
	dir := shortDir(t)
	bin := selfCopy(t, dir)
	addr := "unix://" + dir + "/log.sock"
	start := func() *os.Process {
		t.Helper()
		pr, pw, err := os.Pipe()
		must(t, err)
		p, err := os.StartProcess(bin, []string{bin, "--good", "--listen", addr}, &os.ProcAttr{Files: []*os.File{nil, nil, pw}, Dir: "/"})
		pw.Close()
		must(t, err)
		br := bufio.NewReader(pr)
		for {
			line, err := br.ReadString('\n')
			must(t, err)
			if strings.Contains(line, "serving") {
				break
			}
		}
		go func() { _, _ = io.Copy(io.Discard, br); pr.Close() }()
		return p
	}
	p := start()
	r := newReal(t, dir, "call_wait = \"10s\"", "[plugin.log]\nattach = \""+addr+"\"\n")
	r.ready()
	must(t, r.append("hello"))
	if st := r.sup.Status(service.KindLog); st.PID != p.Pid || st.Attach != addr {
		t.Errorf("%+v", st)
	}
	must(t, p.Kill())
	_, _ = p.Wait()
	p = start()
	must(t, r.append("hello"))
	if st := r.sup.Status(service.KindLog); st.PID != p.Pid || st.Restarts == 0 {
		t.Errorf("%+v", st)
	}
	// Neither a restart nor a stop of ours ends a process that is not ours.
	must(t, r.sup.Restart(context.Background(), service.KindLog))
	must(t, r.append("hello"))
	begun := time.Now()
	r.sup.Stop(context.Background())
	if d := time.Since(begun); d > 3*time.Second {
		t.Errorf("stopping took %s", d)
	}
	must(t, p.Signal(syscall.Signal(0)))
	must(t, p.Kill())
	_, _ = p.Wait()
}

// Callers who do not stop calling see nothing of kills and restarts but a longer call.
func TestKillUnderLoad(t *testing.T) {
	dir := shortDir(t)
	r := newReal(t, dir, "call_wait = \"20s\"", goodTable(selfCopy(t, dir)))
	r.ready()
	const callers = 8
	var calls [callers]atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := r.append("hello"); err != nil {
					t.Errorf("caller %d: %v", i, err)
				}
				calls[i].Add(1)
			}
		})
	}
	// settle waits until each caller has come through a few times.
	settle := func() {
		for i := range calls {
			for end, want := time.Now().Add(20*time.Second), calls[i].Load()+5; calls[i].Load() < want; {
				if time.Now().After(end) {
					t.Errorf("caller %d does not come through", i)
					return
				}
				time.Sleep(time.Millisecond)
			}
		}
	}
	for range 12 {
		settle()
		if pid := r.pid(); pid > 0 {
			must(t, unix.Kill(pid, unix.SIGKILL))
		}
		settle()
		must(t, r.sup.Restart(context.Background(), service.KindLog))
	}
	close(stop)
	wg.Wait()
}
