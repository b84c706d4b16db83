package cli

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/sdk/ident"
)

// named is what every object of the API has.
type named interface {
	proto.Message
	GetId() string
	GetName() string
}

// noun is a kind of object: how it is listed, got, shown and deleted. It makes the commands that all nouns
// have in common.
type noun[T proto.Message] struct {
	a       *app
	name    string // "vm"
	columns []render.Column[T]
	id      func(T) string
	label   func(T) string // what people call it; also what -o name prints
	detail  func(T) []render.Pair
	list    func(ctx context.Context, c *client.Client) ([]T, error)
	get     func(ctx context.Context, c *client.Client, ref string) (T, error)
}

func newNoun[T named](a *app, name string) *noun[T] {
	return &noun[T]{a: a, name: name, id: T.GetId, label: func(o T) string {
		if o.GetName() == "" {
			return o.GetId()
		}
		return o.GetName()
	}}
}

// print shows a list.
func (n *noun[T]) print(list []T) error {
	a := n.a
	switch a.format() {
	case render.JSON, render.YAML:
		return a.emit(render.Messages(list))
	case render.Name:
		for _, o := range list {
			a.printf("%s\n", n.label(o))
		}
		return nil
	}
	if len(list) == 0 {
		a.note("no %s yet", plural(n.name))
		return nil
	}
	a.printf("%s", render.Rows(n.columns, list, a.format() == render.Wide, a.color(a.std.Out)))
	return nil
}

func plural(s string) string { return strings.ReplaceAll(s, "-", " ") + "s" }

// printOne shows one object in full.
func (n *noun[T]) printOne(o T) error {
	a := n.a
	switch {
	case a.structured():
		return a.emit(render.Message(o))
	case a.format() == render.Name:
		a.printf("%s\n", n.label(o))
	default:
		a.printf("%s", render.Pairs(n.detail(o), a.color(a.std.Out)))
	}
	return nil
}

// changed tells that o was made or changed: a sentence for people, the object for programs.
func (n *noun[T]) changed(o T, verb string) error {
	a := n.a
	switch {
	case a.structured():
		return a.emit(render.Message(o))
	case a.format() == render.Name:
		a.printf("%s\n", n.label(o))
	case a.format() == render.Wide:
		a.printf("%s", render.Rows(n.columns, []T{o}, true, a.color(a.std.Out)))
	default:
		a.confirm("%s %s %s", strings.ReplaceAll(n.name, "-", " "), render.Clean(n.label(o)), verb)
	}
	return nil
}

func (n *noun[T]) lsCommand() *cobra.Command {
	return &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List all " + plural(n.name), Args: cobra.NoArgs,
		RunE: n.a.withClient(func(c *client.Client, cmd *cobra.Command, _ []string) error {
			list, err := n.list(cmd.Context(), c)
			if err != nil {
				return err
			}
			return n.print(list)
		})}
}

func (n *noun[T]) showCommand() *cobra.Command {
	return &cobra.Command{Use: "show " + arg(n.name) + "…", Aliases: []string{"get", "info"}, Short: "Show all about a " + strings.ReplaceAll(n.name, "-", " "),
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: n.complete(-1),
		RunE: n.a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var all []T
			err := n.a.each(cmd, args, func(ref string) error {
				o, err := n.get(cmd.Context(), c, ref)
				if err != nil {
					return err
				}
				if n.a.structured() && len(args) > 1 {
					all = append(all, o)
					return nil
				}
				if len(all) > 0 && n.a.format() != render.Name {
					n.a.printf("\n")
				}
				all = append(all, o)
				return n.printOne(o)
			})
			if n.a.structured() && len(args) > 1 {
				if e := n.a.emit(render.Messages(all)); err == nil {
					err = e
				}
			}
			return err
		})}
}

func (n *noun[T]) rmCommand(del func(context.Context, *client.Client, *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error), flags func(*cobra.Command, *apiv1.DeleteRequest)) *cobra.Command {
	var req apiv1.DeleteRequest
	cmd := &cobra.Command{Use: "rm " + arg(n.name) + "…", Aliases: []string{"delete"}, Short: "Remove " + plural(n.name),
		Args: cobra.MinimumNArgs(1), ValidArgsFunction: n.complete(-1),
		RunE: n.a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			return n.a.each(cmd, args, func(ref string) error {
				r := proto.Clone(&req).(*apiv1.DeleteRequest)
				r.Ref = ref
				resp, err := del(cmd.Context(), c, r)
				if err != nil {
					return err
				}
				return n.a.removed(resp, req.DryRun, n.name+" "+ref)
			})
		})}
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what would go, change nothing")
	if flags != nil {
		flags(cmd, &req)
	}
	return cmd
}

// removed prints what went, or would go.
func (a *app) removed(resp *apiv1.DeleteResponse, dry bool, what string) error {
	if a.structured() {
		return a.emitLine(render.Object{{Key: "removed", Value: nonNil(resp.GetRemoved())}, {Key: "dry_run", Value: dry}})
	}
	list := resp.GetRemoved()
	if len(list) == 0 {
		list = []string{what}
	}
	verb := "removed"
	if dry {
		verb = "would remove"
	}
	for _, s := range list {
		if dry {
			a.printf("%s %s\n", verb, render.Clean(s)) // asked for, so also with --quiet
		} else {
			a.confirm("%s %s", verb, render.Clean(s))
		}
	}
	return nil
}

func nonNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func (n *noun[T]) renameCommand(rename func(context.Context, *client.Client, *apiv1.RenameRequest) (T, error)) *cobra.Command {
	return &cobra.Command{Use: "rename " + arg(n.name) + " NAME", Short: "Give a " + n.name + " another name", Args: cobra.ExactArgs(2),
		ValidArgsFunction: n.complete(1),
		RunE: n.a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			o, err := rename(cmd.Context(), c, &apiv1.RenameRequest{Ref: args[0], Name: args[1]})
			if err != nil {
				return err
			}
			return n.changed(o, "renamed")
		})}
}

// completionTime bounds what a press of the tab key may wait for.
const completionTime = 2 * time.Second

// complete offers the objects' names for the first `most` arguments (-1: all).
func (n *noun[T]) complete(most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return n.candidates(prefix, args), cobra.ShellCompDirectiveNoFileComp
	}
}

// candidates lists names that begin with prefix, or ids where the prefix looks like one, except those in not.
func (n *noun[T]) candidates(prefix string, not []string) []cobra.Completion {
	ctx, cancel := context.WithTimeout(n.a.ctx, completionTime)
	defer cancel()
	c, err := n.a.connect()
	if err != nil {
		return nil
	}
	list, err := n.list(ctx, c)
	if err != nil {
		return nil
	}
	taken := map[string]bool{}
	for _, s := range not {
		taken[s] = true
	}
	var out []cobra.Completion
	for _, o := range list {
		label, id := n.label(o), n.id(o)
		if ident.CheckName("name", label) != nil && !strings.Contains(label, "@") && label != id {
			continue // would not survive the shell
		}
		switch {
		case taken[label] || taken[id]:
		case strings.HasPrefix(label, prefix):
			out = append(out, cobra.CompletionWithDesc(label, n.describe(o)))
		case len(prefix) >= 4 && strings.HasPrefix(id, prefix):
			out = append(out, cobra.CompletionWithDesc(id, label))
		}
	}
	return out
}

// describe is the second column of a completion: the first column behind the name that says something.
func (n *noun[T]) describe(o T) string {
	var parts []string
	for _, col := range n.columns {
		if col.Wide || col.Head == "NAME" || col.Head == "ID" || col.Head == "AGE" {
			continue
		}
		if s := col.Cell(o); s != "" && s != "-" {
			parts = append(parts, s)
		}
		if len(parts) == 2 {
			break
		}
	}
	return render.Clean(strings.Join(parts, ", "))
}

// completeFlag offers the objects of n for a flag.
func (n *noun[T]) completeFlag(cmd *cobra.Command, flag string) {
	must(cmd.RegisterFlagCompletionFunc(flag, n.complete(-1)))
}

func arg(name string) string { return strings.ToUpper(name) }
