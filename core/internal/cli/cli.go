// Package cli is the program mvirt: what people type, one file for each noun. It speaks to the core's public
// API only, holds no state, and reads no file but those that the caller names.
//
// What a command was asked for goes to standard output; progress, notes and errors go to standard error. An
// error says what failed, why, and what to do, and the exit code tells its kind (exitcodes.go).
package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/fdpass"
	"github.com/mvirt/mvirt/sdk/ident"
)

// Std is what the process gives to the program, so that tests can give something else.
type Std struct {
	In  io.Reader
	Out io.Writer
	Err io.Writer
	Env func(string) string
	Now func() time.Time
	// HandOver gives an opened file to the core and returns the token for the call.
	HandOver func(ctx context.Context, socket string, f *os.File) (string, error)
}

// OSStd is the real process.
func OSStd() Std {
	return Std{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Env: os.Getenv, Now: time.Now,
		HandOver: func(ctx context.Context, socket string, f *os.File) (string, error) {
			return fdpass.Deposit(ctx, socket, nil, f)
		}}
}

// Main runs one command line (without argv[0]) and returns the exit code. SIGINT, SIGTERM and
// SIGHUP cancel it, so that a terminal is always put back.
func Main(ctx context.Context, args []string, std Std) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	a := &app{std: std, ctx: ctx}
	defer a.close()
	root := a.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	return a.report(cmd, err)
}

// app is one run of the program.
type app struct {
	std    Std
	ctx    context.Context
	client *client.Client

	socket  string
	remote  client.Options
	output  string
	quiet   bool
	noColor bool
}

func (a *app) close() {
	if a.client != nil {
		_ = a.client.Close()
	}
}

// usage marks a command line that is wrong by itself; the exit code is exitUsage.
type usage struct{ error }

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "mvirt",
		Short: "Run and look after virtual machines",
		Long: `mvirt runs and looks after the virtual machines of this host.

Objects are named by name, by id, or by the beginning of an id (at least 4 characters). Sizes are whole
numbers with K, M, G or T in powers of 1024: "10G", "512M". "mvirt help exit-codes" lists the exit codes.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			for _, f := range render.Formats() {
				if a.output == f {
					return nil
				}
			}
			bad := a.output
			a.output = string(render.Table)
			return usage{errs.Field("output", "give one of "+strings.Join(render.Formats(), ", "), "there is no output format %s", ident.Quote(bad))}
		},
	}
	root.SetIn(a.std.In)
	root.SetOut(a.std.Out)
	root.SetErr(a.std.Err)
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	socket := a.std.Env("MVIRT_SOCKET")
	if socket == "" {
		socket = client.DefaultSocket
	}
	p := root.PersistentFlags()
	p.StringVar(&a.socket, "socket", socket, "the core's API socket; also MVIRT_SOCKET")
	p.StringVar(&a.remote.Host, "host", a.std.Env("MVIRT_HOST"), "NAME:PORT of another host's core; also MVIRT_HOST")
	p.StringVar(&a.remote.Cert, "tls-cert", a.std.Env("MVIRT_TLS_CERT"), "with --host: the client's certificate, PEM; also MVIRT_TLS_CERT")
	p.StringVar(&a.remote.Key, "tls-key", a.std.Env("MVIRT_TLS_KEY"), "with --host: its key, PEM; also MVIRT_TLS_KEY")
	p.StringVar(&a.remote.CA, "tls-ca", a.std.Env("MVIRT_TLS_CA"), "with --host: the authority of the server's certificate, PEM; also MVIRT_TLS_CA")
	p.StringVar(&a.remote.TokenFile, "token-file", a.std.Env("MVIRT_TOKEN_FILE"), "call with the rights of the token in this file; also MVIRT_TOKEN_FILE")
	p.StringVarP(&a.output, "output", "o", string(render.Table), "table, wide, json, yaml or name")
	p.BoolVarP(&a.quiet, "quiet", "q", false, "no progress, notes and confirmations")
	p.BoolVar(&a.noColor, "no-color", false, "no colours, also on a terminal; also NO_COLOR")
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(render.Formats(), cobra.ShellCompDirectiveNoFileComp)))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage{errs.Wrap(errs.Invalid, err, "%s", cmd.CommandPath())}
	})

	root.AddGroup(&cobra.Group{ID: "vm", Title: "Virtual machines:"}, &cobra.Group{ID: "store", Title: "Disks:"},
		&cobra.Group{ID: "net", Title: "Networks:"}, &cobra.Group{ID: "sys", Title: "The system:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("vm", a.vmCommand(), a.runCommand())
	add("store", a.templateCommand(), a.importCommand(), a.volumeCommand(), a.snapshotCommand())
	add("net", a.networkCommand(), a.nicCommand(), a.sgCommand())
	add("sys", a.statusCommand(), a.doctorCommand(), a.logsCommand(), a.eventsCommand(), a.operationCommand(), a.pluginCommand(), a.versionCommand())
	root.AddCommand(exitCodesTopic())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	strict(root)
	return root
}

// strict gives every command that has subcommands an error for what is none of them: cobra would print the
// help and succeed.
func strict(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		strict(c)
	}
	if cmd.HasSubCommands() && cmd.Run == nil && cmd.RunE == nil {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			e := errs.New(errs.Invalid, "%s has no command %s", cmd.CommandPath(), ident.Quote(args[0])).Do("see " + cmd.CommandPath() + " --help")
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				e.Remedy = "did you mean " + cmd.CommandPath() + " " + strings.Join(s, " or ") + "?"
			}
			return usage{e}
		}
	}
	if cmd.RunE != nil {
		// What cobra checks later by itself, but with an error that does not tell that it is about usage.
		cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
			err := cmd.ValidateRequiredFlags()
			if err == nil {
				err = cmd.ValidateFlagGroups()
			}
			if err != nil {
				return usage{errs.Wrap(errs.Invalid, err, "%s", cmd.CommandPath())}
			}
			return nil
		}
	}
	if cmd.Args != nil {
		check := cmd.Args
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usage{errs.Wrap(errs.Invalid, err, "%s", cmd.CommandPath())}
			}
			return nil
		}
	}
}

// connect gives the client, connecting at the first call.
func (a *app) connect() (*client.Client, error) {
	if a.client == nil {
		o := a.remote
		o.Socket = a.socket
		c, err := client.DialWith(a.ctx, o)
		if err != nil {
			return nil, err
		}
		a.client = c
	}
	return a.client, nil
}

// withClient is the shape of most commands: connect, then do.
func (a *app) withClient(do func(c *client.Client, cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.connect()
		if err != nil {
			return err
		}
		return do(c, cmd, args)
	}
}

func (a *app) format() render.Format { return render.Format(a.output) }

// structured says that a program reads the output.
func (a *app) structured() bool { return a.format() == render.JSON || a.format() == render.YAML }

func (a *app) color(w io.Writer) bool {
	return !a.noColor && a.std.Env("NO_COLOR") == "" && a.std.Env("TERM") != "dumb" && isTerminal(w)
}

func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func (a *app) printf(format string, args ...any) {
	fmt.Fprintf(a.std.Out, format, args...)
}

// note is for people only: it goes to standard error, and nowhere with --quiet.
func (a *app) note(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintf(a.std.Err, format+"\n", args...)
	}
}

// confirm says what a change did, where a person reads: not with --quiet, nor where a format was asked for.
func (a *app) confirm(format string, args ...any) {
	if !a.quiet && !a.structured() && a.format() != render.Name {
		a.printf(format+"\n", args...)
	}
}

// emit prints a value as JSON or YAML.
func (a *app) emit(v any) error {
	encode := render.EncodeJSON
	if a.format() == render.YAML {
		encode = render.EncodeYAML
	}
	b, err := encode(v)
	if err != nil {
		return err
	}
	_, err = a.std.Out.Write(b)
	return err
}

// emitLine prints one value of a stream: a JSON line, or a YAML document.
func (a *app) emitLine(v any) error {
	if a.format() == render.YAML {
		if _, err := io.WriteString(a.std.Out, "---\n"); err != nil {
			return err
		}
		return a.emit(v)
	}
	b, err := render.EncodeLine(v)
	if err != nil {
		return err
	}
	_, err = a.std.Out.Write(b)
	return err
}

// each does one thing to each ref. All are tried; errors but the last are printed as they come.
func (a *app) each(cmd *cobra.Command, refs []string, do func(ref string) error) error {
	var last error
	for _, ref := range refs {
		err := do(ref)
		if err == nil {
			continue
		}
		if last != nil {
			a.print(cmd, last)
		}
		if last = err; a.ctx.Err() != nil {
			break
		}
	}
	return last
}

func must(err error) {
	if err != nil {
		panic(err) // a flag that this package itself named wrongly; any test finds it
	}
}
