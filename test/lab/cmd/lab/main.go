// Command lab builds and runs the lab: see package lab and test/lab/README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/mvirt/mvirt/test/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	code := 0
	var o lab.Options
	root := &cobra.Command{Use: "lab", Short: "A Debian guest where ZFS, KVM and vhost-net are real",
		SilenceUsage: true, SilenceErrors: true}
	source := root.PersistentFlags().String("source", defaultSource(), "directory of build.sh")
	common := func(c *cobra.Command) *cobra.Command {
		c.Flags().DurationVar(&o.Timeout, "timeout", 20*time.Minute, "kill the guest after this")
		c.Flags().StringVar(&o.Memory, "memory", "4G", "memory of the guest")
		c.Flags().StringSliceVar(&o.Disks, "disk", []string{"8G"}, "empty disks; serials lab-disk0, lab-disk1, …")
		c.Flags().BoolVar(&o.Systemd, "systemd", false, "boot systemd instead of a bare init")
		c.Flags().StringVar(&o.KernelLog, "kernel-log", "", "file for the kernel's console")
		return c
	}
	run := func(ctx context.Context) error {
		img, err := lab.Build(ctx, *source)
		if err != nil {
			return err
		}
		o.Output = os.Stdout
		code, err = img.Run(ctx, o)
		return err
	}
	runCmd := common(&cobra.Command{Use: "run DIR", Short: "Run DIR/run inside and exit as it does", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o.In = args[0]
			if _, err := os.Stat(filepath.Join(o.In, "run")); err != nil {
				return fmt.Errorf("%s holds no file named run: %w", o.In, err)
			}
			return run(c.Context())
		}})
	runCmd.Flags().StringVar(&o.Out, "out", "", "directory for what the run left in /lab/out")
	testCmd := common(&cobra.Command{Use: "test [SCRIPT…]", Short: "Run the lab tests (test/lab/tests/*.sh), or those named", RunE: func(c *cobra.Command, args []string) error {
		failed := 0
		for _, systemd := range []bool{false, true} {
			dir, err := os.MkdirTemp("", "mvirt-labtest-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			n, err := stage(c.Context(), *source, dir, args, systemd)
			if err != nil {
				return err
			}
			if n == 0 {
				continue
			}
			o.In, o.Systemd = dir, systemd
			if err := run(c.Context()); err != nil {
				return err
			}
			if code != 0 {
				failed = code
			}
		}
		code = failed
		return nil
	}})
	testCmd.Flags().StringVar(&o.Out, "out", "", "directory for what the tests left in /lab/out")
	shellCmd := common(&cobra.Command{Use: "shell [DIR]", Short: "A shell inside; DIR is in /lab/in", Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o.Shell = true
			o.Timeout = max(o.Timeout, 12*time.Hour)
			if len(args) == 1 {
				o.In = args[0]
			}
			if fd := int(os.Stdin.Fd()); term.IsTerminal(fd) {
				old, err := term.MakeRaw(fd)
				if err != nil {
					return err
				}
				defer term.Restore(fd, old)
			}
			return run(c.Context())
		}})
	buildCmd := &cobra.Command{Use: "build", Short: "Build the guest, if the cache does not hold it", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			img, err := lab.Build(c.Context(), *source)
			fmt.Println(img.Dir)
			return err
		}}
	root.AddCommand(runCmd, testCmd, shellCmd, buildCmd)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(125)
	}
	os.Exit(code)
}

func defaultSource() string {
	if _, err := os.Stat("test/lab/build.sh"); err == nil {
		return "test/lab"
	}
	return "."
}

// wantsSystemd is the line by which a script asks to be run under systemd.
const wantsSystemd = "\n# lab: systemd\n"

// stage fills dir with what the lab tests need: the scripts that want systemd, or those that do not, the
// programs of bin/, packages of dist/, the guest that tests boot, compiled test binaries of the packages listed
// in tests/packages, and what MVIRT_LAB_EXTRA names. It returns how many scripts there are.
func stage(ctx context.Context, source, dir string, only []string, systemd bool) (int, error) {
	repo := filepath.Join(source, "..", "..")
	scripts, err := filepath.Glob(filepath.Join(source, "tests", "*.sh"))
	if err != nil {
		return 0, err
	}
	for _, sub := range []string{"bin", "tests", "gotest", "extra", "dist"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return 0, err
		}
	}
	link := func(from, to string) error {
		abs, err := filepath.Abs(from)
		if err != nil {
			return err
		}
		return os.Symlink(abs, filepath.Join(dir, to))
	}
	chosen := 0
	for _, s := range scripts {
		name := strings.TrimSuffix(filepath.Base(s), ".sh")
		if len(only) > 0 && !contains(only, name) {
			continue
		}
		text, err := os.ReadFile(s)
		if err != nil {
			return 0, err
		}
		if strings.Contains("\n"+string(text), wantsSystemd) != systemd {
			continue
		}
		chosen++
		if err := link(s, filepath.Join("tests", name+".sh")); err != nil {
			return 0, err
		}
	}
	if chosen == 0 {
		return 0, nil
	}
	bins, err := filepath.Glob(filepath.Join(repo, "bin", "*"))
	if err != nil {
		return 0, err
	}
	if len(bins) == 0 {
		return 0, errors.New("bin/ is empty; run `make build` first")
	}
	for _, b := range bins {
		if err := link(b, filepath.Join("bin", filepath.Base(b))); err != nil {
			return 0, err
		}
	}
	list, err := os.ReadFile(filepath.Join(source, "tests", "packages"))
	if err != nil {
		return 0, err
	}
	for _, pkg := range strings.Fields(string(list)) {
		out := filepath.Join(dir, "gotest", strings.ReplaceAll(strings.TrimPrefix(pkg, "./"), "/", "_")+".test")
		abs, err := filepath.Abs(out)
		if err != nil {
			return 0, err
		}
		cmd := exec.CommandContext(ctx, goTool(), "test", "-c", "-o", abs, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		cmd.Dir, cmd.Stderr = repo, os.Stderr
		if err := cmd.Run(); err != nil {
			return 0, fmt.Errorf("compiling the tests of %s: %w", pkg, err)
		}
	}
	for _, extra := range strings.FieldsFunc(os.Getenv("MVIRT_LAB_EXTRA"), func(r rune) bool { return r == ':' || r == ' ' }) {
		if err := link(extra, filepath.Join("extra", filepath.Base(extra))); err != nil {
			return 0, err
		}
	}
	debs, err := filepath.Glob(filepath.Join(repo, "dist", "*.deb"))
	if err != nil {
		return 0, err
	}
	for _, d := range debs {
		if err := link(d, filepath.Join("dist", filepath.Base(d))); err != nil {
			return 0, err
		}
	}
	mk := exec.CommandContext(ctx, goTool(), "run", "./test/guest/cmd/mkguest", "--out", filepath.Join(dir, "guest"))
	mk.Dir, mk.Stderr = repo, os.Stderr
	if err := mk.Run(); err != nil {
		return 0, fmt.Errorf("building the guest that tests boot: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tests", ".env"), []byte(settings(os.Environ())), 0o644); err != nil {
		return 0, err
	}
	return chosen, link(filepath.Join(source, "tests", "run"), "run")
}

// goTool is the go command: $GO, as make has it, else that of the PATH.
func goTool() string {
	if g := os.Getenv("GO"); g != "" {
		return g
	}
	return "go"
}

// carried are prefixes of the variables that tests inside see.
var carried = [...]string{"MVIRT_LAB_", "MVIRT_CRASH_"}

// settings are those variables as lines of shell.
func settings(environ []string) string {
	var b strings.Builder
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		for _, prefix := range carried {
			if strings.HasPrefix(name, prefix) {
				fmt.Fprintf(&b, "export %s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
			}
		}
	}
	return b.String()
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}
