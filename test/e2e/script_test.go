package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mvirt/mvirt/test/system"
)

// serial makes scripts run one after the other: they share one system, and each looks at all of it.
type serial struct{ *testing.T }

func (s serial) Parallel() {}
func (s serial) Run(name string, f func(testscript.T)) {
	s.T.Run(name, func(t *testing.T) { f(serial{t}) })
}
func (s serial) Verbose() bool { return testing.Verbose() }

func TestScripts(t *testing.T) {
	runScripts(t, shared.sys, "testdata/*.txtar")
}

func runScripts(t *testing.T, sys *system.System, glob string) {
	t.Helper()
	files, err := filepath.Glob(glob)
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts match %s: %v", glob, err)
	}
	testscript.RunT(serial{t}, testscript.Params{
		Files: files,
		Setup: func(env *testscript.Env) error {
			before, err := inventory(sys)
			if err != nil {
				return err
			}
			env.Values["before"] = before
			env.Setenv("MVIRT_SOCKET", sys.Socket)
			env.Setenv("PATH", filepath.Join(sys.Dir, "bin")+":"+os.Getenv("PATH"))
			env.Setenv("KERNEL", shared.guest.Kernel)
			env.Setenv("INITRAMFS", shared.guest.Initramfs)
			env.Setenv("QCOW2", shared.guest.RootQcow2)
			env.Setenv("RAW", shared.guest.RootRaw)
			env.Setenv("URL", shared.web.URL)
			env.Setenv("DIR", sys.Dir)
			if sys != shared.sys { // scripts run their commands as root; what they read must be readable for the user too
				return os.Chmod(env.WorkDir, 0o755)
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"mvirt":     cmdMvirt,
			"fails":     cmdFails,
			"unchanged": func(ts *testscript.TestScript, neg bool, _ []string) { cmdUnchanged(ts, neg, sys) },
			"console":   func(ts *testscript.TestScript, _ bool, args []string) { cmdConsole(ts, sys, args) },
			"killplugin": func(ts *testscript.TestScript, _ bool, args []string) {
				cmdKillPlugin(ts, sys, args)
			},
			"badimages": cmdBadImages,
			"sleep1":    func(*testscript.TestScript, bool, []string) { time.Sleep(time.Second) },
		},
	})
}

// cmdMvirt runs the CLI; it must succeed.
func cmdMvirt(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("mvirt", args...)
	if neg {
		ts.Fatalf("use: fails CODE ARGS")
	}
	if err != nil {
		ts.Fatalf("mvirt %s: %v", strings.Join(args, " "), err)
	}
}

// cmdFails runs the CLI, which must fail with this exit code, with one error and one remedy on standard error
// and nothing on standard output. A word may hold \x00 and the like, and "*300" repeats the letter before it.
func cmdFails(ts *testscript.TestScript, _ bool, args []string) {
	code, err := strconv.Atoi(args[0])
	ts.Check(err)
	args = slices.Clone(args[1:])
	for i, a := range args {
		if letter, n, ok := strings.Cut(a, "*"); ok && len(letter) == 1 {
			times, err := strconv.Atoi(n)
			ts.Check(err)
			args[i] = strings.Repeat(letter, times)
		}
	}
	err = ts.Exec("mvirt", args...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code {
		ts.Fatalf("mvirt %s: %v, want exit code %d", strings.Join(args, " "), err, code)
	}
	out, text := ts.ReadFile("stdout"), ts.ReadFile("stderr")
	var errorsSeen, remedies int
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "error: "):
			errorsSeen++
		case strings.HasPrefix(line, "to do: "):
			remedies++
		}
	}
	if out != "" || errorsSeen != 1 || remedies != 1 {
		ts.Fatalf("mvirt %s: want one error with one remedy and no output", strings.Join(args, " "))
	}
}

// inventory is everything that a failed command could leave: objects, and files and processes on the host.
func inventory(sys *system.System) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var b strings.Builder
	for _, n := range []string{"vm", "volume", "snapshot", "nic", "network", "template", "sg"} {
		out, err := sys.CLI(ctx, n, "ls", "-o", "name")
		if err != nil && !strings.Contains(err.Error(), "exit status 9") && !strings.Contains(err.Error(), "exit status 12") { // without a net plugin
			return "", err
		}
		for line := range strings.Lines(out) {
			fmt.Fprintf(&b, "%s %s", n, line)
		}
	}
	things, err := system.Owned(ctx, sys.Place)
	if err != nil {
		return "", err
	}
	for _, s := range things.List() {
		// Plugins may have been restarted, and files elsewhere may be those of other tests that run now.
		if !strings.HasPrefix(s, "process mvirt") && !strings.HasPrefix(s, "socket ") && !strings.HasPrefix(s, "file ") {
			fmt.Fprintln(&b, s)
		}
	}
	for _, pattern := range []string{"storage/volumes/*", "storage/templates/*", "storage/snapshots/*", "storage/.tmp/*", "vmm/vm/*", "vmm/kernels/*"} {
		list, err := filepath.Glob(filepath.Join(sys.Dir, pattern))
		if err != nil {
			return "", err
		}
		for _, f := range list {
			fmt.Fprintln(&b, strings.TrimPrefix(f, sys.Dir))
		}
	}
	return b.String(), nil
}

// cmdUnchanged checks that all is as it was at the beginning of the script.
func cmdUnchanged(ts *testscript.TestScript, _ bool, sys *system.System) {
	before := ts.Value("before").(string)
	after, err := inventory(sys)
	ts.Check(err)
	if before != after {
		ts.Fatalf("before:\n%s\nafter:\n%s", before, after)
	}
}

// cmdConsole waits for a text on a VM's console, after typing a line if one is given: console VM UNTIL [LINE].
func cmdConsole(ts *testscript.TestScript, sys *system.System, args []string) {
	flags, text := []string{"--replay", "all", "--read-only"}, ""
	if len(args) > 2 {
		flags, text = []string{"--replay", "0"}, args[2]+"\n"
	}
	out, err := sys.Console(context.Background(), args[0], text, args[1], 2*time.Minute, flags...)
	ts.Check(err)
	ts.Logf("%s", out)
}

// cmdKillPlugin ends a plugin as a crash would: killplugin KIND.
func cmdKillPlugin(ts *testscript.TestScript, sys *system.System, args []string) {
	out, err := sys.CLI(context.Background(), "plugin", "ls", "-o", "json")
	ts.Check(err)
	_, rest, _ := strings.Cut(out, `"kind": "`+args[0]+`"`)
	_, rest, _ = strings.Cut(rest, `"pid": `)
	digits, _, _ := strings.Cut(rest, ",")
	pid, err := strconv.Atoi(digits)
	ts.Check(err)
	ts.Check(syscall.Kill(pid, syscall.SIGKILL))
}

// cmdBadImages makes images that are wrong, each in its way, in the script's directory.
func cmdBadImages(ts *testscript.TestScript, _ bool, _ []string) {
	good, err := os.ReadFile(shared.guest.RootQcow2)
	ts.Check(err)
	write := func(name string, data []byte) { ts.Check(os.WriteFile(ts.MkAbs(name), data, 0o644)) }
	write("truncated.qcow2", good[:len(good)/3])
	write("header-only.qcow2", good[:50])
	write("empty.raw", nil)
	// The header's fields stand in docs/interop/qcow2.rst of QEMU: backing file at 8 and 16, size at 24.
	backing := slices.Clone(good)
	binary.BigEndian.PutUint64(backing[8:], 0x200)
	binary.BigEndian.PutUint32(backing[16:], uint32(len("/etc/passwd")))
	copy(backing[0x200:], "/etc/passwd")
	write("backing.qcow2", backing)
	lying := slices.Clone(good)
	binary.BigEndian.PutUint64(lying[24:], 1<<62)
	write("lying.qcow2", lying)
	sum := exec.Command("sha256sum", shared.guest.RootQcow2)
	out, err := sum.Output()
	ts.Check(err)
	ts.Setenv("SHA256", strings.Fields(string(out))[0])
}
