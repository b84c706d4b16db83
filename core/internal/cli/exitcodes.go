package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/sdk/errs"
)

// Exit codes. They are an interface: docs/exit-codes.md lists them, and a test keeps the two the same.
const (
	exitOK           = 0
	exitError        = 1
	exitUsage        = 2
	exitInvalid      = 3
	exitNotFound     = 4
	exitExists       = 5
	exitPrecondition = 6
	exitConflict     = 7
	exitExhausted    = 8
	exitUnavailable  = 9
	exitDenied       = 10
	exitDeadline     = 11
	exitUnsupported  = 12
	exitCorrupt      = 13
	exitCanceled     = 14
	exitInterrupted  = 130
)

// exitCode is one line of the documentation.
type exitCode struct {
	Code    int
	Meaning string
}

func exitCodes() []exitCode {
	return []exitCode{
		{exitOK, "done"},
		{exitError, "another failure, or a bug in mvirt"},
		{exitUsage, "the command line is wrong: no such command or flag, arguments missing"},
		{exitInvalid, "a value in the request is wrong; the message names the field"},
		{exitNotFound, "no such object, or no such file"},
		{exitExists, "the name or id is taken"},
		{exitPrecondition, "the object's state forbids it: running, attached, in use"},
		{exitConflict, "somebody else changes the object now; trying again may work"},
		{exitExhausted, "disk, addresses or memory are used up"},
		{exitUnavailable, "mvirtd or the plugin needed is not there; trying again may work"},
		{exitDenied, "you may not"},
		{exitDeadline, "not finished, or not seen, in the time allowed"},
		{exitUnsupported, "the plugin does not have this feature"},
		{exitCorrupt, "stored data is damaged, or a verification found a break"},
		{exitCanceled, "cancelled by somebody"},
		{exitInterrupted, "interrupted (Ctrl-C or SIGTERM)"},
	}
}

func exitCodesTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString("Exit codes of mvirt:\n\n")
	for _, c := range exitCodes() {
		fmt.Fprintf(&b, "  %3d  %s\n", c.Code, c.Meaning)
	}
	b.WriteString("\nA command with several objects tries all; the code is that of the last one that failed.")
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: b.String()}
}

func (a *app) codeOf(err error) int {
	var u usage
	switch {
	case a.ctx.Err() != nil:
		return exitInterrupted
	case errors.As(err, &u):
		return exitUsage
	}
	switch errs.KindOf(err) {
	case errs.Invalid, errs.OutOfRange:
		return exitInvalid
	case errs.NotFound:
		return exitNotFound
	case errs.Exists:
		return exitExists
	case errs.Precondition:
		return exitPrecondition
	case errs.Conflict:
		return exitConflict
	case errs.Exhausted:
		return exitExhausted
	case errs.Unavailable:
		return exitUnavailable
	case errs.Denied, errs.Unauthorized:
		return exitDenied
	case errs.Deadline:
		return exitDeadline
	case errs.Unsupported:
		return exitUnsupported
	case errs.Corrupt:
		return exitCorrupt
	case errs.Canceled:
		return exitCanceled
	}
	return exitError
}

// report prints the error that ended the program and gives its exit code.
func (a *app) report(cmd *cobra.Command, err error) int {
	a.print(cmd, err)
	return a.codeOf(err)
}

// print writes an error to standard error: a sentence for each of what failed, why, and what to do; or one
// JSON object with -o json or yaml.
func (a *app) print(cmd *cobra.Command, err error) {
	code := a.codeOf(err)
	if code == exitInterrupted && errors.Is(err, context.Canceled) {
		err = errs.New(errs.Canceled, "interrupted")
	}
	var e *errs.Error
	if !errors.As(err, &e) {
		e = &errs.Error{Err: err}
	}
	remedy := errs.RemedyOf(err)
	var u usage
	if remedy == "" && errors.As(err, &u) && cmd != nil {
		remedy = "see " + cmd.CommandPath() + " --help"
	}
	message := sentence(err)
	if a.structured() {
		o := render.Object{
			{Key: "message", Value: message}, {Key: "kind", Value: errs.KindOf(err).String()}, {Key: "exit_code", Value: code},
			{Key: "reason", Value: errs.ReasonOf(err)}, {Key: "field", Value: fieldOf(err)}, {Key: "remedy", Value: remedy},
			{Key: "resource", Value: render.Object{{Key: "type", Value: e.Resource.Type}, {Key: "id", Value: e.Resource.ID}, {Key: "name", Value: e.Resource.Name}}},
		}
		encode := render.EncodeLine
		if a.format() == render.YAML {
			encode = render.EncodeYAML
		}
		if b, err := encode(render.Object{{Key: "error", Value: o}}); err == nil {
			_, _ = a.std.Err.Write(b)
		}
		return
	}
	color := a.color(a.std.Err)
	fmt.Fprintln(a.std.Err, render.Paint(color, render.Red, "error:")+" "+render.Clean(message))
	if remedy != "" {
		fmt.Fprintln(a.std.Err, render.Paint(color, render.Cyan, "to do:")+" "+render.Clean(remedy))
	}
}

// sentence is the error without the names of internal calls, which tell a user nothing.
func sentence(err error) string {
	var u usage
	if errors.As(err, &u) {
		err = u.error
	}
	e, ok := err.(*errs.Error) //nolint:errorlint // only the outermost: its causes are walked one by one
	if !ok {
		return err.Error()
	}
	var parts []string
	if r := e.Resource.String(); r != "" && !strings.Contains(e.Message, firstOf(e.Resource.Name, e.Resource.ID)) {
		parts = append(parts, r)
	}
	if e.Message != "" {
		parts = append(parts, e.Message)
	}
	if e.Err != nil {
		parts = append(parts, sentence(e.Err))
	}
	if e.Message == "" && e.Err == nil {
		parts = append(parts, e.Kind.String())
	}
	return strings.Join(parts, ": ")
}

func fieldOf(err error) string {
	for e := (*errs.Error)(nil); errors.As(err, &e); e = nil {
		if e.Field != "" {
			return e.Field
		}
		err = e.Err
	}
	return ""
}
