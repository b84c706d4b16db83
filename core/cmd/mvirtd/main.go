// Command mvirtd runs plugins and serves the public API. Started as root it is the launcher, which starts
// this same program once more, unprivileged, as the core; see package launcher. Started as an ordinary user
// it is the core, and plugins run as that user too.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/version"
)

// Exit codes besides 0. A service manager need not restart after the last two.
const (
	exitFailure = 1
	exitUsage   = 2
	exitConfig  = launcher.ExitConfig
)

func main() {
	launcher.Shim()
	// A reader of our log that goes away must not take us along. Not ignored but caught, so that the programs
	// that we start get the default back.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	if len(os.Args) > 1 && os.Args[1] == launcher.CoreArg {
		os.Exit(exitCode(asCore()))
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	fs := pflag.NewFlagSet("mvirtd", pflag.ContinueOnError)
	fs.SetOutput(stderr)
	path := fs.String("config", config.DefaultPath, "configuration file")
	check := fs.Bool("check-config", false, "check the configuration, and whether its users and groups exist, then exit")
	example := fs.Bool("print-example-config", false, "print a commented configuration with all keys, then exit")
	ver := fs.Bool("version", false, "print the version, then exit")
	fs.Usage = func() {
		fmt.Fprintf(stderr, "Usage: mvirtd [flags]\n\nStarted as root, mvirtd starts plugins under the users that its configuration names and serves the API\nas an unprivileged user. SIGTERM stops it and its plugins; VMs keep running.\n\n%s", fs.FlagUsages())
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return 0
		}
		fmt.Fprintf(stderr, "mvirtd: %v\n", err)
		return exitUsage
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "mvirtd: unexpected argument %q\n", fs.Arg(0))
		return exitUsage
	}
	switch {
	case *ver:
		fmt.Fprintf(stdout, "mvirtd %s\n", version.Version)
		return 0
	case *example:
		fmt.Fprint(stdout, config.Example())
		return 0
	}
	cfg, text, err := load(*path)
	if err == nil && (*check || os.Geteuid() == 0) {
		_, err = launcher.Grants(cfg, os.Geteuid() == 0)
	}
	if err != nil {
		report(stderr, err)
		return exitConfig
	}
	if *check {
		fmt.Fprintf(stdout, "%s: ok\n", *path)
		return 0
	}
	n := newNotifier()
	if os.Geteuid() == 0 {
		err = asLauncher(cfg, text, n)
	} else {
		err = asUser(cfg, n)
	}
	if err != nil {
		report(stderr, err)
	}
	return exitCode(err)
}

// load reads the configuration after checking that nobody whom we do not trust could have written it.
func load(path string) (*config.Config, []byte, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, nil, err
	}
	f, err := launcher.OpenConfig(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	var text bytes.Buffer
	cfg, err := config.Read(path, io.TeeReader(f, &text))
	return cfg, text.Bytes(), err
}

func exitCode(err error) int {
	switch errs.KindOf(err) {
	case errs.Precondition, errs.Invalid:
		return exitConfig
	}
	if err != nil {
		return exitFailure
	}
	return 0
}

// report prints each problem with what to do about it.
func report(w io.Writer, err error) {
	var many interface{ Unwrap() []error }
	var problems config.Problems
	switch {
	case errors.As(err, &problems):
		for _, p := range problems {
			fmt.Fprintf(w, "mvirtd: %s\n", p.Error())
		}
	case errors.As(err, &many):
		for _, e := range many.Unwrap() {
			report(w, e)
		}
	default:
		fmt.Fprintf(w, "mvirtd: %v\n", err)
		if r := errs.RemedyOf(err); r != "" {
			fmt.Fprintf(w, "  do: %s\n", r)
		}
	}
}

func newLogger(level string) *slog.Logger {
	var l slog.Level
	_ = l.UnmarshalText([]byte(strings.ToUpper(level))) // the configuration was checked
	opt := &slog.HandlerOptions{Level: l}
	if os.Getenv("JOURNAL_STREAM") != "" { // the journal stamps lines itself
		opt.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opt))
}
