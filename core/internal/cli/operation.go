package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/sdk/errs"
)

func (a *app) operations() *noun[*apiv1.Operation] {
	n := &noun[*apiv1.Operation]{a: a, name: "operation", id: (*apiv1.Operation).GetId, label: (*apiv1.Operation).GetId}
	n.columns = []render.Column[*apiv1.Operation]{
		{Head: "ID", Cell: n.id},
		{Head: "TYPE", Cell: (*apiv1.Operation).GetType},
		{Head: "STATE", Cell: (*apiv1.Operation).GetState, Color: func(o *apiv1.Operation) render.Color { return render.State(o.GetState()) }},
		{Head: "PHASE", Cell: func(o *apiv1.Operation) string { return firstOf(o.GetError(), o.GetPhase()) }},
		{Head: "STEP", Right: true, Cell: func(o *apiv1.Operation) string { return fmt.Sprintf("%d/%d", o.GetDone(), o.GetTotal()) }},
		{Head: "AGE", Right: true, Cell: func(o *apiv1.Operation) string { return a.age(o.GetStartedAt()) }},
		{Head: "WHO", Wide: true, Cell: (*apiv1.Operation).GetWho},
		{Head: "OBJECTS", Wide: true, Cell: func(o *apiv1.Operation) string { return strings.Join(o.GetObjects(), ",") }},
	}
	n.detail = func(o *apiv1.Operation) []render.Pair {
		return []render.Pair{
			{Key: "Id", Value: o.GetId()}, {Key: "Type", Value: o.GetType()}, {Key: "State", Value: o.GetState(), Color: render.State(o.GetState())},
			{Key: "Phase", Value: o.GetPhase()}, {Key: "Steps", Value: fmt.Sprintf("%d of %d", o.GetDone(), o.GetTotal())},
			{Key: "Error", Value: o.GetError(), Color: render.Red}, {Key: "To do", Value: o.GetRemedy()}, {Key: "Undone", Value: strings.Join(o.GetUndone(), "\n")},
			{Key: "Who", Value: o.GetWho()}, {Key: "Objects", Value: strings.Join(o.GetObjects(), "\n")},
			{Key: "Started", Value: a.when(o.GetStartedAt())}, {Key: "Ended", Value: a.when(o.GetEndedAt())},
		}
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.Operation, error) {
		r, err := c.Operations.List(ctx, &apiv1.ListOperationsRequest{All: true})
		return r.GetOperations(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.Operation, error) {
		return c.Operations.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

func (a *app) operationCommand() *cobra.Command {
	n := a.operations()
	cmd := &cobra.Command{Use: "operation", Aliases: []string{"operations", "op"}, Short: "Changes of several steps: running, or done and undone"}
	var all bool
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List operations that run", Args: cobra.NoArgs,
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, _ []string) error {
			r, err := c.Operations.List(cmd.Context(), &apiv1.ListOperationsRequest{All: all})
			if err != nil {
				return err
			}
			if len(r.GetOperations()) == 0 && !all && !a.structured() && a.format() != render.Name {
				a.note("no operation runs; --all shows those that have ended")
				return nil
			}
			return n.print(r.GetOperations())
		})}
	ls.Flags().BoolVarP(&all, "all", "a", false, "also those that have ended")
	watch := &cobra.Command{Use: "watch OPERATION", Aliases: []string{"wait"}, Short: "Show an operation until it ends; its failure is the command's", Args: cobra.ExactArgs(1), ValidArgsFunction: n.complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			stream, err := c.Operations.Watch(cmd.Context(), &apiv1.RefRequest{Ref: args[0]})
			if err != nil {
				return err
			}
			var last *apiv1.Operation
			for {
				o, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					return err
				}
				last = o
				if a.structured() {
					if err := a.emitLine(render.Message(o)); err != nil {
						return err
					}
				} else if !a.quiet {
					a.printf("%s  %d/%d  %s\n", render.Paint(a.color(a.std.Out), render.State(o.GetState()), o.GetState()), o.GetDone(), o.GetTotal(), render.Clean(o.GetPhase()))
				}
			}
			return operationError(last)
		})}
	cancel := &cobra.Command{Use: "cancel OPERATION…", Short: "Cancel operations; what they did is undone", Args: cobra.MinimumNArgs(1), ValidArgsFunction: n.complete(-1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			return a.each(cmd, args, func(ref string) error {
				o, err := c.Operations.Cancel(cmd.Context(), &apiv1.RefRequest{Ref: ref})
				if err != nil {
					return err
				}
				return n.changed(o, "is "+o.GetState())
			})
		})}
	cmd.AddCommand(ls, n.showCommand(), watch, cancel)
	return cmd
}

// operationError is the error of an operation that did not end well.
func operationError(o *apiv1.Operation) error {
	if o == nil || o.GetState() == "done" {
		return nil
	}
	e := &errs.Error{Kind: client.Kind(o.GetErrorCode()), Resource: errs.Resource{Type: "operation", ID: o.GetId()}, Message: firstOf(o.GetError(), "it is "+o.GetState()), Remedy: o.GetRemedy()}
	if o.GetState() == "canceled" {
		e.Kind = errs.Canceled
	}
	return e
}
