package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
)

func (a *app) imports() *noun[*apiv1.Import] {
	n := newNoun[*apiv1.Import](a, "import")
	n.columns = []render.Column[*apiv1.Import]{
		{Head: "ID", Cell: n.id},
		{Head: "NAME", Cell: n.label},
		{Head: "STATE", Cell: func(i *apiv1.Import) string { return state(i.GetState(), i.GetFailure()) },
			Color: func(i *apiv1.Import) render.Color { return render.State(i.GetState()) }},
		{Head: "PHASE", Cell: (*apiv1.Import).GetPhase},
		{Head: "DONE", Right: true, Cell: func(i *apiv1.Import) string {
			if i.GetTotalBytes() == 0 {
				return units.Size(i.GetDoneBytes())
			}
			return units.Size(i.GetDoneBytes()) + "/" + units.Size(i.GetTotalBytes())
		}},
		{Head: "AGE", Right: true, Cell: func(i *apiv1.Import) string { return a.age(i.GetStartedAt()) }},
		{Head: "SOURCE", Wide: true, Cell: (*apiv1.Import).GetSource},
		{Head: "FORMAT", Wide: true, Cell: (*apiv1.Import).GetSourceFormat},
	}
	n.detail = func(i *apiv1.Import) []render.Pair {
		return []render.Pair{
			{Key: "Id", Value: i.GetId()}, {Key: "Name", Value: i.GetName()}, {Key: "Source", Value: i.GetSource()},
			{Key: "State", Value: i.GetState(), Color: render.State(i.GetState())}, {Key: "Phase", Value: i.GetPhase()},
			{Key: "Failure", Value: i.GetFailure(), Color: render.Red}, {Key: "To do", Value: i.GetRemedy()},
			{Key: "Read", Value: units.Size(i.GetDoneBytes())}, {Key: "Of", Value: units.Size(i.GetTotalBytes())}, {Key: "Written", Value: units.Size(i.GetBytesWritten())},
			{Key: "Format", Value: i.GetSourceFormat()}, {Key: "Started", Value: a.when(i.GetStartedAt())}, {Key: "Ended", Value: a.when(i.GetEndedAt())},
		}
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.Import, error) {
		r, err := c.Templates.ListImports(ctx, &apiv1.ListImportsRequest{})
		return r.GetImports(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.Import, error) {
		list, err := n.list(ctx, c)
		if err != nil {
			return nil, err
		}
		for _, i := range list {
			if i.GetId() == ref || i.GetName() == ref {
				return i, nil
			}
		}
		return nil, errs.New(errs.NotFound, "there is no import %s", ref).Do("see mvirt import ls")
	}
	return n
}

func (a *app) importCommand() *cobra.Command {
	n := a.imports()
	cmd := &cobra.Command{Use: "import", Aliases: []string{"imports"}, Short: "Imports of templates that run or ran"}
	cancel := &cobra.Command{Use: "cancel IMPORT…", Short: "Cancel imports; nothing of them remains", Args: cobra.MinimumNArgs(1), ValidArgsFunction: n.complete(-1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			return a.each(cmd, args, func(ref string) error {
				if _, err := c.Templates.CancelImport(cmd.Context(), &apiv1.RefRequest{Ref: ref}); err != nil {
					return err
				}
				if a.structured() {
					return a.emitLine(render.Object{{Key: "canceled", Value: ref}})
				}
				a.confirm("import %s canceled", ref)
				return nil
			})
		})}
	watch := &cobra.Command{Use: "watch IMPORT", Aliases: []string{"wait"}, Short: "Show the progress of an import until it ends", Args: cobra.ExactArgs(1), ValidArgsFunction: n.complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			stream, err := c.Templates.WatchImport(cmd.Context(), &apiv1.RefRequest{Ref: args[0]})
			if err != nil {
				return err
			}
			t, err := a.followImport(stream)
			if err != nil {
				return err
			}
			return a.templates().changed(t, "imported")
		})}
	cmd.AddCommand(n.lsCommand(), n.showCommand(), watch, cancel)
	return cmd
}
