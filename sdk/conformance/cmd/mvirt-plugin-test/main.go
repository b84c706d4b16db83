// Command mvirt-plugin-test runs the conformance suite against any executable.
//
//	mvirt-plugin-test storage -- ./my-plugin --data-dir /tmp/x
//
// It exits with 0 when every check passed, 1 when one failed, 2 when the suite could not run.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/sdk/conformance"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	var cfg conformance.Config
	fs := pflag.NewFlagSet("mvirt-plugin-test", pflag.ContinueOnError)
	fs.StringArrayVar(&cfg.Env, "env", nil, "NAME=value for the plugin's environment, repeatable")
	fs.StringArrayVar(&cfg.Only, "only", nil, "run the checks whose name begins so, repeatable")
	skip := fs.StringArray("skip", nil, "NAME=reason: leave a check out, repeatable")
	list := fs.Bool("list", false, "list the checks and exit")
	verbose := fs.BoolP("verbose", "v", false, "show the plugin's log")
	fs.DurationVar(&cfg.CheckTimeout, "timeout", 2*time.Minute, "for each check")
	fs.Uint32Var(&cfg.UID, "uid", uint32(os.Getuid()), "user that volumes and NICs are attached for")
	fs.Uint32Var(&cfg.GID, "gid", uint32(os.Getgid()), "its group")
	fs.BoolVar(&cfg.ImportURL, "import-url", false, "import from http://127.0.0.1 too (the plugin must allow it)")
	fs.StringVar(&cfg.Kernel, "kernel", "", "vmm: kernel to boot")
	fs.StringVar(&cfg.Initramfs, "initramfs", "", "vmm: its initramfs")
	fs.StringVar(&cfg.Cmdline, "cmdline", "console=ttyS0", "vmm: its command line")
	fs.StringVar(&cfg.BootMarker, "boot-marker", "", "vmm: text that the guest prints on its console")
	fs.DurationVar(&cfg.BootTimeout, "boot-timeout", time.Minute, "vmm: time for that")
	usage := func() int {
		fmt.Fprintf(os.Stderr, "Usage: mvirt-plugin-test [flags] storage|net|vmm|log -- program [its flags]\n\n%s", fs.FlagUsages())
		return 2
	}
	if err := fs.Parse(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return usage()
	}
	if fs.NArg() == 0 {
		return usage()
	}
	kind := service.Kind(fs.Arg(0))
	names := conformance.Names(kind)
	switch kind {
	case service.KindStorage, service.KindNet, service.KindVMM, service.KindLog:
	default:
		fmt.Fprintf(os.Stderr, "%q is no kind of plugin\n", kind)
		return usage()
	}
	if *list {
		fmt.Println(strings.Join(names, "\n"))
		return 0
	}
	if fs.NArg() < 2 {
		return usage()
	}
	program, err := filepath.Abs(fs.Arg(1))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	cfg.Command = append([]string{program}, fs.Args()[2:]...)
	cfg.Skip = map[string]string{}
	for _, s := range *skip {
		name, why, ok := strings.Cut(s, "=")
		if !ok || why == "" {
			fmt.Fprintf(os.Stderr, "--skip %q gives no reason: NAME=reason\n", s)
			return 2
		}
		cfg.Skip[name] = why
	}
	if *verbose {
		cfg.Log = func(format string, args ...any) { fmt.Printf("      "+format+"\n", args...) }
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	passed, failed, skipped := 0, 0, 0
	err = conformance.Run(ctx, kind, cfg, func(r conformance.Result) {
		switch {
		case len(r.Failures) > 0:
			failed++
			fmt.Printf("FAIL  %s (%v)\n", r.Name, r.Took.Round(time.Millisecond))
			for _, f := range r.Failures {
				fmt.Println("      " + strings.ReplaceAll(f, "\n", "\n      "))
			}
		case r.Skipped != "":
			skipped++
			fmt.Printf("skip  %s: %s\n", r.Name, r.Skipped)
		default:
			passed++
			fmt.Printf("ok    %s (%v)\n", r.Name, r.Took.Round(time.Millisecond))
		}
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "the plugin does not start: %v\n", err)
		if r := errs.RemedyOf(err); r != "" {
			fmt.Fprintf(os.Stderr, "  → %s\n", r)
		}
		return 2
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if failed > 0 {
		return 1
	}
	return 0
}
