package launcher

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// selfCopy is a copy of the test binary that any user may execute, in a directory that any user may reach.
func selfCopy(t *testing.T) (dir, bin string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "mvirt-launcher-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	data, err := os.ReadFile("/proc/self/exe")
	must(t, err)
	bin = filepath.Join(dir, "plugin")
	must(t, os.WriteFile(bin, data, 0o755))
	must(t, os.Chmod(bin, 0o755))
	return dir, bin
}

func testEnv(dir string, uid uint32, pid int) []string {
	return []string{"HANDSHAKE=" + dir, "TEST_LAUNCH_DIR=" + dir, fmt.Sprintf("HOST=%d/%d", uid, pid)}
}

func parse(t *testing.T, text string) *config.Config {
	t.Helper()
	cfg, err := config.Parse("test.toml", []byte(text))
	must(t, err)
	return cfg
}

func readReport(t *testing.T, f *os.File) report {
	t.Helper()
	must(t, f.SetReadDeadline(time.Now().Add(20*time.Second)))
	line, err := bufio.NewReader(f).ReadString('\n')
	must(t, err)
	var r report
	must(t, json.Unmarshal([]byte(line), &r))
	return r
}

func waitGone(t *testing.T, gone <-chan struct{}) {
	t.Helper()
	select {
	case <-gone:
	case <-time.After(20 * time.Second):
		t.Fatal("the process does not end")
	}
}

func TestLocalStart(t *testing.T) {
	t.Setenv("SECRET_OF_THE_HOST", "x")
	dir, bin := selfCopy(t)
	cfg := parse(t, fmt.Sprintf("[core]\nrun_dir = %q\nstate_dir = %q\n[plugin.vmm]\ncommand = %q\nargs = [\"test-plugin\", \"\", \"a b\"]\nnofile = 512\ndata_dir = %q\nenv = {FOO = \"bar\"}\nuser = \"nobody-at-all\"\n",
		dir+"/run", dir+"/state", bin, dir+"/data"))
	l, err := NewLocal(cfg, testEnv)
	must(t, err)
	defer l.Close()
	// An inheritable descriptor of ours must not reach the plugin.
	leak, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0)
	must(t, err)
	defer unix.Close(leak)

	p, err := l.Spawn(context.Background(), service.KindVMM)
	must(t, err)
	defer closeAll([]*os.File{p.Stdout, p.Stderr})
	if _, err := l.Spawn(context.Background(), service.KindVMM); errs.KindOf(err) != errs.Conflict {
		t.Errorf("a second of the same kind: %v", err)
	}
	if _, err := l.Spawn(context.Background(), service.KindNet); errs.KindOf(err) != errs.Precondition {
		t.Errorf("one that is not configured: %v", err)
	}
	r := readReport(t, p.Stdout)
	if r.PID != p.PID {
		t.Errorf("pid %d, not %d", r.PID, p.PID)
	}
	if !slices.Equal(r.Args, []string{bin, "test-plugin", "", "a b"}) {
		t.Errorf("arguments %q", r.Args)
	}
	wantEnv := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=" + dir + "/data",
		"FOO=bar", "HANDSHAKE=" + p.Dir, "TEST_LAUNCH_DIR=" + p.Dir, fmt.Sprintf("HOST=%d/%d", os.Getuid(), os.Getpid())}
	if !slices.Equal(r.Env, wantEnv) {
		t.Errorf("environment %q\nwant        %q", r.Env, wantEnv)
	}
	if r.NoFile != 512 || r.Umask != 0o007 || r.Dir != "/" || r.WriteErr != "" {
		t.Errorf("nofile %d umask %o dir %s launch dir: %s", r.NoFile, r.Umask, r.Dir, r.WriteErr)
	}
	if r.status("NoNewPrivs") != "1" {
		t.Errorf("no_new_privs: %s", r.status("NoNewPrivs"))
	}
	for _, fd := range r.FDs {
		n, to, _ := strings.Cut(fd, " ")
		ok := n == "0" && to == "/dev/null" || (n == "1" || n == "2" || n == "3") && strings.HasPrefix(to, "pipe:") ||
			strings.HasPrefix(to, "anon_inode:") || strings.HasPrefix(to, "/proc/") || strings.HasPrefix(to, "/sys/fs/cgroup/") // the runtime's own
		if !ok {
			t.Errorf("descriptor %s got through", fd)
		}
	}
	if sid, err := unix.Getsid(p.PID); err != nil || sid != p.PID {
		t.Errorf("session %d, %v", sid, err)
	}
	p.Lifeline.Close()
	waitGone(t, p.Gone)
	if p.Exit().String() != "exit status 0" {
		t.Errorf("exit: %s", p.Exit())
	}
	l.st.removal.Wait()
	if left, _ := os.ReadDir(dir + "/run/p"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestExits(t *testing.T) {
	dir, bin := selfCopy(t)
	for _, c := range []struct {
		mode string
		sig  syscall.Signal
		want string
	}{
		{mode: "exit7", want: "exit status 7"},
		{mode: "", sig: syscall.SIGTERM, want: "killed by SIGTERM"},
		{mode: "stubborn", sig: syscall.SIGKILL, want: "killed by SIGKILL"},
	} {
		cfg := parse(t, fmt.Sprintf("[core]\nrun_dir = %q\nstate_dir = \"%[1]s-state\"\n[plugin.log]\ncommand = %q\nargs = [\"test-plugin\", %q]\n", dir+"/run", bin, c.mode))
		l, err := NewLocal(cfg, testEnv)
		must(t, err)
		p, err := l.Spawn(context.Background(), service.KindLog)
		must(t, err)
		readReport(t, p.Stdout)
		if c.sig != 0 {
			must(t, p.Signal(c.sig))
		}
		waitGone(t, p.Gone)
		if got := p.Exit().String(); got != c.want {
			t.Errorf("%s: %s", c.want, got)
		}
		closeAll([]*os.File{p.Stdout, p.Stderr, p.Lifeline})
		l.Close()
	}
}

// What only execve can find out is told with the same reasons.
func TestExecErrors(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ name, content, reason, remedy string }{
		{"text", "hello\n", ReasonBinaryFormat, "program for this machine"},
		{"empty", "", ReasonBinaryFormat, ""},
		{"no interpreter", "#!/nonexistent/sh\n", ReasonBinaryFormat, "interpreter"},
	} {
		bin := filepath.Join(dir, "bin")
		must(t, os.WriteFile(bin, []byte(c.content), 0o755))
		cfg := parse(t, fmt.Sprintf("[core]\nrun_dir = %q\nstate_dir = \"%[1]s-state\"\n[plugin.log]\ncommand = %q\n", dir+"/run", bin))
		l, err := NewLocal(cfg, testEnv)
		must(t, err)
		_, err = l.Spawn(context.Background(), service.KindLog)
		if errs.ReasonOf(err) != c.reason || !strings.Contains(errs.RemedyOf(err), c.remedy) {
			t.Errorf("%s: %s %v (%s)", c.name, errs.ReasonOf(err), err, errs.RemedyOf(err))
		}
		if left, _ := os.ReadDir(dir + "/run/p"); len(left) != 0 {
			t.Errorf("%s: left behind: %v", c.name, left)
		}
		l.Close()
	}
}

func TestScriptStarts(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, "script")
	must(t, os.WriteFile(bin, []byte("#!/bin/sh\necho \"from a script: $1\"\n"), 0o755))
	cfg := parse(t, fmt.Sprintf("[core]\nrun_dir = %q\nstate_dir = \"%[1]s-state\"\n[plugin.log]\ncommand = %q\nargs = [\"x\"]\n", dir+"/run", bin))
	l, err := NewLocal(cfg, testEnv)
	must(t, err)
	defer l.Close()
	p, err := l.Spawn(context.Background(), service.KindLog)
	must(t, err)
	defer closeAll([]*os.File{p.Stdout, p.Stderr, p.Lifeline})
	must(t, p.Stdout.SetReadDeadline(time.Now().Add(20*time.Second)))
	if line, err := bufio.NewReader(p.Stdout).ReadString('\n'); line != "from a script: x\n" {
		t.Errorf("%q %v", line, err)
	}
	waitGone(t, p.Gone)
}

// A stopped process does not see its lifeline; the next launcher finds its record and kills it, and nobody
// else whose pid happens to be in a record.
func TestSweep(t *testing.T) {
	dir, bin := selfCopy(t)
	cfg := parse(t, fmt.Sprintf("[core]\nrun_dir = %q\nstate_dir = \"%[1]s-state\"\n[plugin.log]\ncommand = %q\nargs = [\"test-plugin\", \"stubborn\"]\n", dir+"/run", bin))
	l, err := NewLocal(cfg, testEnv)
	must(t, err)
	p, err := l.Spawn(context.Background(), service.KindLog)
	must(t, err)
	readReport(t, p.Stdout)
	must(t, p.Signal(syscall.SIGSTOP))
	bystander := fmt.Sprintf("%d %d %s\n", os.Getpid(), 12345, bootID()) // our own pid with another start time
	must(t, os.WriteFile(dir+"/run/p/net-9.pid", []byte(bystander), 0o600))
	must(t, os.WriteFile(dir+"/run/p/net-8.pid", []byte("garbage"), 0o600))
	must(t, os.WriteFile(dir+"/run/p/net-7.pid", []byte(fmt.Sprintf("%d 1 other-boot\n", p.PID)), 0o600))

	second, err := newStarter(l.st.table, dir+"/run", nil, testEnv)
	must(t, err)
	killed, err := second.sweep()
	if killed != 1 || err != nil {
		t.Errorf("killed %d, %v", killed, err)
	}
	waitGone(t, p.Gone)
	if p.Exit().Signal != syscall.SIGKILL {
		t.Errorf("exit: %s", p.Exit())
	}
	if left, _ := os.ReadDir(dir + "/run/p"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	closeAll([]*os.File{p.Stdout, p.Stderr, p.Lifeline})
	l.Close()
}

func TestEndKillsTheStubborn(t *testing.T) {
	dir, bin := selfCopy(t)
	cfg := parse(t, fmt.Sprintf("[core]\nrun_dir = %q\nstate_dir = \"%[1]s-state\"\n[plugin.log]\ncommand = %q\nargs = [\"test-plugin\", \"stubborn\"]\n", dir+"/run", bin))
	l, err := NewLocal(cfg, testEnv)
	must(t, err)
	p, err := l.Spawn(context.Background(), service.KindLog)
	must(t, err)
	readReport(t, p.Stdout)
	closeAll([]*os.File{p.Stdout, p.Stderr, p.Lifeline})
	l.st.end(50 * time.Millisecond)
	waitGone(t, p.Gone)
}
