package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/tty"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
)

// consoleOptions are the flags of vm console.
type consoleOptions struct {
	readOnly bool
	steal    bool
	history  bool // print what is kept, then end
	replay   string
	escape   string
	until    string
	timeout  time.Duration
}

// replayAll is the most that can be asked for, and as much as is ever kept.
const replayAll = 8 << 20

// replayDefault is enough for what fills a screen and its boot messages.
const replayDefault = "16K"

func (a *app) consoleCommand() *cobra.Command {
	var o consoleOptions
	cmd := &cobra.Command{Use: "console VM", Short: "Join a VM's serial console",
		Long: `Joins the serial console of a VM. What it printed before is shown first. Any number may watch; one writes.

On a terminal, Ctrl-] leaves; the VM goes on. In a pipe, standard input goes to the guest, and after its end the
command keeps watching until the VM ends, --until is seen, or --timeout is over.`,
		Example: "  mvirt vm console web\n  mvirt vm console web --log | less\n  echo uptime | mvirt vm console web --replay 0 --until 'load average' --timeout 10s",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.vms().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			return a.console(cmd.Context(), c, args[0], o)
		})}
	f := cmd.Flags()
	f.BoolVar(&o.readOnly, "read-only", false, "watch only")
	f.BoolVar(&o.steal, "steal", false, "take the writer's place")
	f.BoolVar(&o.history, "log", false, "print what is kept and end; works for stopped VMs too")
	f.StringVar(&o.replay, "replay", replayDefault, `how much of what was printed before to show; "0" for nothing, "all"`)
	f.StringVar(&o.escape, "escape", "^]", `control key that leaves, or "none"`)
	f.StringVar(&o.until, "until", "", "leave when the guest has printed this text")
	f.DurationVar(&o.timeout, "timeout", 0, "leave after so long; with --until that is a failure")
	cmd.MarkFlagsMutuallyExclusive("log", "steal")
	return cmd
}

// errDetached ends a console session by the user's wish.
var errDetached = errors.New("detached")

func (a *app) console(ctx context.Context, c *client.Client, ref string, o consoleOptions) error {
	escape, err := tty.ParseEscape(o.escape)
	if err != nil {
		return err
	}
	open := &apiv1.ConsoleOpen{Ref: ref, ReadOnly: o.readOnly || o.history, Steal: o.steal, NoFollow: o.history}
	if open.Replay, err = replayBytes(o); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if o.timeout > 0 {
		t := time.AfterFunc(o.timeout, func() { cancel(context.DeadlineExceeded) })
		defer t.Stop()
	}
	stream, err := c.VMs.Console(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&apiv1.ConsoleInput{Kind: &apiv1.ConsoleInput_Open{Open: open}}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	in, interactive := a.std.In.(*os.File)
	interactive = interactive && isTerminal(in) && !open.ReadOnly
	restore := func() {}
	defer func() { restore() }()

	match, seen := tty.NewMatcher(o.until), false
	for {
		m, err := stream.Recv()
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			return a.consoleEnd(o, ref, seen, "")
		case context.Cause(ctx) == errDetached:
			restore()
			a.note("\n[detached from %s; it keeps running]", ref)
			return nil
		case errors.Is(context.Cause(ctx), context.DeadlineExceeded):
			restore()
			if o.until == "" {
				return nil
			}
			return errs.New(errs.Deadline, "%s has not printed %q within %v", ref, o.until, o.timeout).Do("look at the console (mvirt vm console " + ref + " --log), or give a longer --timeout")
		default:
			return err
		}
		if m.GetOpened() && !open.ReadOnly {
			if interactive {
				if restore, err = tty.Raw(in); err != nil {
					return err
				}
				if !a.quiet {
					fmt.Fprintf(a.std.Err, "[console of %s; %s leaves]\r\n", ref, escape)
				}
			}
			go func() {
				if feed(a.std.In, stream, escape, interactive) {
					cancel(errDetached)
				}
			}()
		}
		if _, err := a.std.Out.Write(m.GetData()); err != nil {
			return err
		}
		if !seen && match.Write(m.GetData()) {
			seen = true
			restore()
			return nil
		}
		if m.GetEnded() != "" {
			restore()
			return a.consoleEnd(o, ref, seen, m.GetEnded())
		}
	}
}

// consoleEnd is the end of a session from the other side.
func (a *app) consoleEnd(o consoleOptions, ref string, seen bool, why string) error {
	if o.until != "" && !seen {
		return errs.New(errs.Precondition, "the console ended and %q was not printed: %s", o.until, firstOf(why, "no more output")).Do("see mvirt vm show " + ref)
	}
	if !o.history && why != "" {
		a.note("\n[console ended: %s]", render.Clean(why))
	}
	return nil
}

// feed sends what is typed until its end and says whether the escape key was typed. The end of a pipe is no
// reason to leave: the other side is told that no more input comes.
func feed(in io.Reader, stream apiv1.VMs_ConsoleClient, escape tty.Escape, interactive bool) (left bool) {
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		data := buf[:n]
		if interactive {
			data, left = escape.Cut(data)
		}
		if len(data) > 0 {
			piece := append([]byte(nil), data...)
			if stream.Send(&apiv1.ConsoleInput{Kind: &apiv1.ConsoleInput_Data{Data: piece}}) != nil {
				return false // Recv tells why
			}
		}
		switch {
		case left:
			return true
		case err != nil:
			_ = stream.CloseSend()
			return false
		}
	}
}

func replayBytes(o consoleOptions) (uint32, error) {
	if o.replay == "all" || o.history && o.replay == replayDefault {
		return replayAll, nil
	}
	n, err := units.ParseSize("replay", o.replay)
	return uint32(min(n, replayAll)), err
}
