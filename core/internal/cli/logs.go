package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
)

// levels, gravest first.
func levels() []string { return []string{"audit", "error", "warn", "info", "debug"} }

// logFlags are those of logs.
type logFlags struct {
	req          apiv1.QueryLogsRequest
	since, until string
	label        []string
	lines        int
	all, reverse bool
}

// linesDefault is how many of the newest entries are shown unless told otherwise.
const linesDefault = 200

func (a *app) logsCommand() *cobra.Command {
	var l logFlags
	cmd := &cobra.Command{Use: "logs [OBJECT…]", Aliases: []string{"log"}, Short: "What happened, and who did it",
		Long: `Shows the newest entries of the log, in the order in which they happened. Objects are names or ids of VMs, volumes,
networks, NICs, operations …: entries about any of them are shown.

Times are ages ("10m", "2h", "3d"), dates ("2026-11-24"), times of today ("15:04") or both ("2026-11-24 15:04").
With -o json each entry is one line of JSON.`,
		Example: "  mvirt logs web --since 1h\n  mvirt logs --level error --follow\n  mvirt logs --level-only audit --grep volume --all -o json",
		ValidArgsFunction: func(_ *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.anyObject(prefix, args), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			l.req.Objects = append(l.req.Objects, args...)
			return a.logs(cmd, c, &l)
		})}
	f := cmd.Flags()
	f.StringArrayVar(&l.req.Objects, "object", nil, "entries about this object, by name or id; may be repeated")
	f.BoolVar(&l.req.AllObjects, "all-objects", false, "only entries about all objects given, not any")
	f.StringVar(&l.since, "since", "", "not older than this")
	f.StringVar(&l.until, "until", "", "older than this")
	f.StringVar(&l.req.MaxLevel, "level", "", "this grave or graver: audit, error, warn, info, debug")
	f.StringSliceVar(&l.req.Levels, "level-only", nil, "exactly these levels")
	f.StringSliceVar(&l.req.Components, "component", nil, "written by these: core, console, or a plugin by its kind (storage, net, vmm, log) or name")
	f.StringArrayVar(&l.label, "label", nil, "with this label, as key=value")
	f.StringVarP(&l.req.Contains, "grep", "g", "", "messages that contain this text")
	f.BoolVarP(&l.req.IgnoreCase, "ignore-case", "i", false, "--grep does not tell upper from lower case")
	f.BoolVarP(&l.req.Follow, "follow", "f", false, "and what comes from now on, until Ctrl-C")
	f.IntVarP(&l.lines, "lines", "n", linesDefault, "how many of the newest entries")
	f.BoolVar(&l.all, "all", false, "all entries, not only the newest")
	f.BoolVarP(&l.reverse, "reverse", "r", false, "newest first")
	cmd.MarkFlagsMutuallyExclusive("lines", "all")
	cmd.MarkFlagsMutuallyExclusive("follow", "reverse")
	cmd.MarkFlagsMutuallyExclusive("follow", "until")
	cmd.MarkFlagsMutuallyExclusive("level", "level-only")
	must(cmd.RegisterFlagCompletionFunc("level", cobra.FixedCompletions(levels(), cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("level-only", cobra.FixedCompletions(levels(), cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("object", func(_ *cobra.Command, _ []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return a.anyObject(prefix, nil), cobra.ShellCompDirectiveNoFileComp
	}))
	must(cmd.RegisterFlagCompletionFunc("component", cobra.FixedCompletions([]string{"core", "console", "storage", "net", "vmm", "log"}, cobra.ShellCompDirectiveNoFileComp)))
	cmd.AddCommand(a.logStatsCommand(), a.logVerifyCommand())
	return cmd
}

// anyObject offers the names of everything that has log entries.
func (a *app) anyObject(prefix string, not []string) []cobra.Completion {
	out := a.vms().candidates(prefix, not)
	out = append(out, a.volumes().candidates(prefix, not)...)
	out = append(out, a.networks().candidates(prefix, not)...)
	out = append(out, a.nics().candidates(prefix, not)...)
	return append(out, a.templates().candidates(prefix, not)...)
}

func (a *app) logs(cmd *cobra.Command, c *client.Client, l *logFlags) error {
	r := &l.req
	var err error
	if r.Since, err = a.timeFlag("since", l.since); err != nil {
		return err
	}
	if r.Until, err = a.timeFlag("until", l.until); err != nil {
		return err
	}
	if r.Labels, err = labels(l.label); err != nil {
		return err
	}
	for _, s := range append(slices.Clone(r.Levels), firstOf(r.MaxLevel, "info")) {
		if !slices.Contains(levels(), s) {
			return errs.Field("level", "give one of "+strings.Join(levels(), ", "), "there is no level %q", s)
		}
	}
	if err := a.componentNames(cmd.Context(), c, r); err != nil {
		return err
	}
	if l.lines < 0 {
		return errs.Field("lines", "give 0 or more, or --all", "%d lines cannot be shown", l.lines)
	}
	show := a.entryPrinter()
	if l.all {
		r.NewestFirst = l.reverse
		return a.stream(cmd.Context(), c, r, show)
	}
	last, more, err := a.newest(cmd.Context(), c, r, l.lines)
	if err != nil {
		return err
	}
	if more && !cmd.Flags().Changed("lines") {
		a.note("(the newest %d; --all shows all, -n another number)", l.lines)
	}
	if l.reverse {
		slices.Reverse(last)
	}
	if !r.Follow {
		for _, e := range last {
			if err := show(e); err != nil {
				return err
			}
		}
		if len(last) == 0 && !a.structured() {
			a.note("no entries")
		}
		return nil
	}
	// What is shown and what follows come from one stream, which has no gap: it begins at the oldest entry
	// to show, and entries of the same instant that stand before it are skipped.
	skipTo := ""
	if len(last) > 0 {
		r.Since, skipTo = last[0].GetTime(), last[0].GetId()
	} else if l.lines == 0 {
		r.Since = timestamppb.New(a.std.Now())
	}
	return a.stream(cmd.Context(), c, r, func(e *apiv1.LogEntry) error {
		if skipTo != "" && e.GetId() != skipTo {
			return nil
		}
		skipTo = ""
		return show(e)
	})
}

// componentNames adds to kinds of plugins the names of those that are configured: entries carry names.
func (a *app) componentNames(ctx context.Context, c *client.Client, r *apiv1.QueryLogsRequest) error {
	kinds := []string{"storage", "net", "vmm", "log"}
	if !slices.ContainsFunc(r.Components, func(s string) bool { return slices.Contains(kinds, s) }) {
		return nil
	}
	list, err := c.Plugins.List(ctx, &apiv1.ListPluginsRequest{})
	if err != nil {
		return err
	}
	for _, p := range list.GetPlugins() {
		if name := p.GetName(); name != "" && slices.Contains(r.Components, p.GetKind()) && !slices.Contains(r.Components, name) {
			r.Components = append(r.Components, name)
		}
	}
	return nil
}

// newest gives the newest n entries, oldest first, and whether there are more.
func (a *app) newest(ctx context.Context, c *client.Client, r *apiv1.QueryLogsRequest, n int) ([]*apiv1.LogEntry, bool, error) {
	if n == 0 {
		return nil, false, nil
	}
	var list []*apiv1.LogEntry
	query := apiv1.QueryLogsRequest{Objects: r.Objects, AllObjects: r.AllObjects, Since: r.Since, Until: r.Until, MaxLevel: r.MaxLevel, Levels: r.Levels,
		Components: r.Components, Labels: r.Labels, Contains: r.Contains, IgnoreCase: r.IgnoreCase, NewestFirst: true, Limit: uint32(n) + 1}
	err := a.stream(ctx, c, &query, func(e *apiv1.LogEntry) error {
		list = append(list, e)
		return nil
	})
	more := len(list) > n
	if more {
		list = list[:n]
	}
	slices.Reverse(list)
	return list, more, err
}

// followRetry is how long a follower waits before it asks again when the log plugin, or the core, is away.
const followRetry = time.Second

// stream shows what a query gives. A follower does not end with the log plugin: it goes on behind what it has
// shown, with neither gap nor repeat.
func (a *app) stream(ctx context.Context, c *client.Client, r *apiv1.QueryLogsRequest, show func(*apiv1.LogEntry) error) error {
	told := false
	for {
		err := a.streamOnce(ctx, c, r, show)
		// Without a token nothing has been shown, and what comes first is the same again.
		if err == nil || !r.GetFollow() || ctx.Err() != nil || grpcerr.Kind(status.Code(err)) != errs.Unavailable && !errors.Is(err, errs.Unavailable) {
			return err
		}
		if !told {
			a.note("the log is away; this goes on when it is back: %v", err)
			told = true
		}
		t := time.NewTimer(followRetry)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

// streamOnce is one call of Query; r's page token then stands behind what was shown.
func (a *app) streamOnce(ctx context.Context, c *client.Client, r *apiv1.QueryLogsRequest, show func(*apiv1.LogEntry) error) error {
	stream, err := c.Logs.Query(ctx, r)
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case m.GetEntry() == nil:
			continue
		}
		if err := show(m.GetEntry()); err != nil {
			return err
		}
		if t := m.GetPageToken(); t != "" && r.GetFollow() {
			r.PageToken = t
		}
	}
}

func (a *app) timeFlag(name, text string) (*timestamppb.Timestamp, error) {
	if text == "" {
		return nil, nil
	}
	t, err := units.ParseTime(name, text, a.std.Now())
	if err != nil {
		return nil, err
	}
	return timestamppb.New(t), nil
}

// entryPrinter shows one entry as a line: time, level, component, message; wide: also objects and labels.
func (a *app) entryPrinter() func(*apiv1.LogEntry) error {
	color := a.color(a.std.Out)
	colors := map[string]render.Color{"audit": render.Cyan, "error": render.Red, "warn": render.Yellow, "debug": render.Dim}
	return func(e *apiv1.LogEntry) error {
		if a.structured() {
			return a.emitLine(render.Message(e))
		}
		if a.format() == render.Name {
			a.printf("%s\n", e.GetId())
			return nil
		}
		line := fmt.Sprintf("%s  %s  %-7s  %s",
			render.Paint(color, render.Dim, e.GetTime().AsTime().In(a.std.Now().Location()).Format("2006-01-02 15:04:05.000")),
			render.Paint(color, colors[e.GetLevel()], fmt.Sprintf("%-5s", e.GetLevel())),
			render.Clean(e.GetComponent()), render.Clean(e.GetMessage()))
		if who := firstOf(e.GetLabels()["who"], e.GetLabels()["caller"]); who != "" {
			line += render.Paint(color, render.Dim, "  by "+render.Clean(who))
		}
		if a.format() == render.Wide {
			line += "  " + render.Paint(color, render.Dim, render.Clean(strings.Join(append(slices.Clone(e.GetObjects()), labelText(e.GetLabels())), " ")))
		}
		_, err := fmt.Fprintln(a.std.Out, line)
		return err
	}
}

func (a *app) logStatsCommand() *cobra.Command {
	return &cobra.Command{Use: "stats", Short: "What the log holds", Args: cobra.NoArgs,
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, _ []string) error {
			s, err := c.Logs.Stats(cmd.Context(), &apiv1.LogStatsRequest{})
			if err != nil {
				return err
			}
			if a.structured() {
				return a.emit(render.Message(s))
			}
			pairs := []render.Pair{
				{Key: "Entries", Value: fmt.Sprint(s.GetEntries())}, {Key: "Objects", Value: fmt.Sprint(s.GetObjects())},
				{Key: "On disk", Value: units.Size(s.GetDiskBytes())}, {Key: "In memory", Value: units.Size(s.GetMemoryBytes())},
				{Key: "Oldest", Value: a.when(s.GetOldest())}, {Key: "Newest", Value: a.when(s.GetNewest())},
			}
			for _, l := range levels() {
				if n := s.GetByLevel()[l]; n > 0 {
					pairs = append(pairs, render.Pair{Key: "  " + l, Value: fmt.Sprint(n)})
				}
			}
			pairs = append(pairs, render.Pair{Key: "Dropped by rate limits", Value: fmt.Sprint(s.GetDropped())})
			if s.GetSpooled() > 0 {
				pairs = append(pairs, render.Pair{Key: "Waiting in the core", Value: fmt.Sprintf("%d, until the log plugin is back", s.GetSpooled()), Color: render.Yellow})
			}
			a.printf("%s", render.Pairs(pairs, a.color(a.std.Out)))
			return nil
		})}
}

func (a *app) logVerifyCommand() *cobra.Command {
	var since, until string
	cmd := &cobra.Command{Use: "verify", Short: "Check that no audit entry was changed or removed", Args: cobra.NoArgs,
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, _ []string) error {
			var req apiv1.VerifyLogsRequest
			var err error
			if req.Since, err = a.timeFlag("since", since); err != nil {
				return err
			}
			if req.Until, err = a.timeFlag("until", until); err != nil {
				return err
			}
			r, err := c.Logs.Verify(cmd.Context(), &req)
			if err != nil {
				return err
			}
			if a.structured() {
				if err := a.emit(render.Message(r)); err != nil {
					return err
				}
			} else {
				for _, b := range r.GetBreaks() {
					a.printf("%s  %s  %s: %s\n", a.when(b.GetTime()), b.GetEntryId(), b.GetWhat(), render.Clean(b.GetDetail()))
				}
			}
			if n := len(r.GetBreaks()); n > 0 {
				return errs.New(errs.Corrupt, "%d breaks in the chain of %d audit entries", n, r.GetChecked()).Do("compare with a backup or with what was sent elsewhere")
			}
			a.confirm("%d audit entries checked, no break; head %s", r.GetChecked(), r.GetHead())
			return nil
		})}
	cmd.Flags().StringVar(&since, "since", "", "not older than this")
	cmd.Flags().StringVar(&until, "until", "", "older than this")
	return cmd
}
