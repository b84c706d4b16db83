package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/test/system"
)

// corePid is the process of the core: the mvirtd that is not root.
func corePid(ctx context.Context, s *system.System) (int, error) {
	things, err := system.Owned(ctx, s.Place)
	if err != nil {
		return 0, err
	}
	for _, p := range things.Processes {
		if p.Name == "mvirtd" && p.User == "mvirt" {
			return p.PID, nil
		}
	}
	return 0, fmt.Errorf("no core runs")
}

// TestCoreKilledDuringVMCreate kills the core at ever later moments of a create with a disk, a NIC and a
// start. Afterwards either all of it is there or nothing is, and the next create works.
func TestCoreKilledDuringVMCreate(t *testing.T) {
	s := shared.sys
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	must := func(args ...string) string {
		t.Helper()
		out, err := s.CLI(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	must("network", "create", "crash", "--ipv4", "10.9.9.0/24")
	must("template", "import", "crash", shared.guest.RootQcow2)
	// A network keeps its name space while it lives, from its first NIC on; what NICs have in it counts.
	objects := func() string {
		t.Helper()
		all, err := inventory(s)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for line := range strings.Lines(all) {
			if !strings.HasPrefix(line, "network namespace ") && !strings.HasSuffix(line, "/lo\n") {
				b.WriteString(line)
			}
		}
		return b.String()
	}
	begin := objects()
	create := []string{"vm", "create", "victim", "--template", "crash", "--disk", "100M", "--memory", "128M", "--network", "crash", "--start"}
	t0 := time.Now()
	must(create...)
	whole := time.Since(t0)
	must("vm", "rm", "--force", "victim")

	const rounds = 12
	const lives = 4 // deaths in one life of the launcher: with each the next start is delayed more, on purpose
	seen := map[string]int{}
	for i := range rounds {
		if i%lives == lives-1 {
			if err := s.Stop(ctx); err != nil {
				t.Fatal(err)
			}
			if err := s.Launch(ctx); err != nil {
				t.Fatal(err)
			}
		}
		pid, err := corePid(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		cmd := s.Command(ctx, create...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(whole * time.Duration(i+1) / rounds) // the moment is what this test varies
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		cerr := cmd.Wait()
		if err := s.WaitUp(ctx, time.Minute); err != nil {
			t.Fatal(err)
		}
		settle(ctx, t, s)
		vms := strings.TrimSpace(must("vm", "ls", "-o", "name"))
		switch vms {
		case "":
			seen["undone"]++
			if after := objects(); after != begin {
				t.Fatalf("round %d: the create was undone, but this is left:\n%s\nbefore it:\n%s", i, after, begin)
			}
		case "victim":
			seen["whole"]++
			var vm struct {
				State string
				Disks []any
				NICs  []any
			}
			if err := json.Unmarshal([]byte(must("vm", "show", "victim", "-o", "json")), &vm); err != nil {
				t.Fatal(err)
			}
			if vm.State != "running" || len(vm.Disks) != 1 || len(vm.NICs) != 1 {
				t.Fatalf("round %d: the VM is there, but not whole: %+v", i, vm)
			}
			must("vm", "rm", "--force", "victim")
		default:
			t.Fatalf("round %d: VMs: %s", i, vms)
		}
		if cerr == nil && vms == "" {
			t.Fatalf("round %d: the create was acknowledged and then undone", i)
		}
	}
	t.Logf("killed at %d moments of %v: %v", rounds, whole, seen)
	must("vm", "create", "victim", "--template", "crash", "--disk", "100M", "--network", "crash")
	must("vm", "rm", "victim")
	must("template", "rm", "crash")
	must("network", "rm", "crash")
}

// settle waits until no operation is under way.
func settle(ctx context.Context, t *testing.T, s *system.System) {
	t.Helper()
	for range 300 {
		out, err := s.CLI(ctx, "operation", "ls", "-o", "json")
		if err == nil && strings.TrimSpace(out) == "[]" {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	out, err := s.CLI(ctx, "operation", "ls")
	t.Fatalf("operations do not end: %v\n%s", err, out)
}

// TestUnprivileged runs what works without root as an ordinary user: volumes, and a VM without a network.
func TestUnprivileged(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	place := system.UserPlace(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	s, err := system.Start(ctx, system.Options{Place: place, Bin: shared.bin, User: "mvirt-worker", Kinds: []string{"log", "storage", "vmm"},
		Args: map[string][]string{"storage": {"--allow-source-range", "127.0.0.0/8"}}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Stop(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
		left, err := system.Owned(context.WithoutCancel(ctx), place)
		if err != nil || len(left.Processes) > 0 {
			t.Errorf("left: %v, %v", left.Processes, err)
		}
		_, _ = system.Sweep(context.WithoutCancel(ctx), place)
	}()
	things, err := system.Owned(ctx, place)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range things.Processes {
		if p.User != "mvirt-worker" {
			t.Errorf("%v runs as somebody else", p)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		out, err := s.CLI(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	run("template", "import", "base", shared.guest.RootQcow2)
	run("vm", "create", "web", "--template", "base", "--disk", "100M", "--memory", "128M", "--kernel", shared.guest.Kernel, "--initramfs", shared.guest.Initramfs,
		"--cmdline", "console=ttyS0 quiet root=LABEL=mvirt-root", "--start")
	if _, err := s.Console(ctx, "web", "", "login:", 2*time.Minute, "--read-only", "--replay", "all"); err != nil {
		t.Fatal(err)
	}
	if out, err := s.CLI(ctx, "network", "ls"); err == nil || !strings.Contains(err.Error(), "to do: ") {
		t.Errorf("without a net plugin: %q, %v", out, err)
	}
	run("vm", "kill", "web")
	run("vm", "rm", "web")
	run("template", "rm", "base")
}

// TestBadPlugins starts mvirtd with a storage plugin that is none. mvirtd serves all the same, the other
// plugins are up, and mvirt says what is wrong with the one, and what to do.
func TestBadPlugins(t *testing.T) {
	for name, c := range map[string]struct {
		command func(dir string) string // instead of mvirt-dir
		says    string
	}{
		"missing":        {func(dir string) string { return dir + "/bin/none" }, "does not exist"},
		"not executable": {func(dir string) string { return script(t, dir, "plain", "#!/bin/sh\n", 0o644) }, "is not executable"},
		"writable":       {func(dir string) string { return script(t, dir, "open", "#!/bin/sh\n", 0o777) }, "can be written to by others"},
		"no plugin":      {func(dir string) string { return script(t, dir, "hello", "#!/bin/sh\necho hello\nsleep 30\n", 0o755) }, "is no mvirt plugin"},
		"exits at once":  {func(dir string) string { return script(t, dir, "exit", "#!/bin/sh\necho no disk >&2\nexit 3\n", 0o755) }, "its last lines: no disk"},
	} {
		t.Run(name, func(t *testing.T) {
			place := system.RootPlace("e2e-bad")
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			defer system.Sweep(context.Background(), place)
			s, err := system.Start(ctx, system.Options{Place: place, Bin: shared.bin, Kinds: []string{"log", "storage"}, Down: []string{"storage"},
				Config: func(text string) string {
					return strings.Replace(text, place.Dir+"/bin/mvirt-dir", c.command(place.Dir), 1)
				}})
			if err != nil {
				t.Fatal(err)
			}
			out, err := s.CLI(ctx, "plugin", "show", "storage")
			if err != nil {
				t.Fatal(err)
			}
			_, cerr := s.CLI(ctx, "volume", "ls")
			if cerr == nil || !strings.Contains(cerr.Error(), "exit status 9") || strings.Count(cerr.Error(), "error: ") != 1 || strings.Count(cerr.Error(), "to do: ") != 1 {
				t.Errorf("volume ls: %v\nplugin show: %s", cerr, out)
			}
			if out, err := s.CLI(ctx, "logs", "stats"); err != nil {
				t.Errorf("the other plugin: %s %v", out, err)
			}
			if !strings.Contains(out, c.says) || !strings.Contains(out, "to do: ") {
				t.Errorf("plugin show does not say %q and what to do:\n%s", c.says, out)
			}
			if err := s.Stop(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

func script(t *testing.T, dir, name, text string, mode os.FileMode) string {
	path := dir + "/bin/" + name
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}
