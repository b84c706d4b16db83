package cli

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

func (a *app) eventsCommand() *cobra.Command {
	var objects []string
	cmd := &cobra.Command{Use: "events [OBJECT…]", Short: "Show what happens from now on, until Ctrl-C",
		Long: "Shows events as they come: changes of state of VMs, plugins, operations. What was before is in mvirt logs.\nWith -o json each event is one line of JSON.",
		ValidArgsFunction: func(_ *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return a.anyObject(prefix, args), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var req apiv1.WatchEventsRequest
			for _, ref := range append(objects, args...) {
				ids, err := resolveAny(cmd.Context(), c, ref)
				if err != nil {
					return err
				}
				req.Objects = append(req.Objects, ids...)
			}
			stream, err := c.System.WatchEvents(cmd.Context(), &req)
			if err != nil {
				return err
			}
			for {
				e, err := stream.Recv()
				if err != nil {
					return err
				}
				if a.structured() {
					if err := a.emitLine(render.Message(e)); err != nil {
						return err
					}
					continue
				}
				if e.GetMissed() > 0 {
					a.note("%d events were missed", e.GetMissed())
					if e.GetType() == "" {
						continue
					}
				}
				a.printf("%s\n", render.Clean(strings.Join(nonEmpty([]string{e.GetTime().AsTime().In(a.std.Now().Location()).Format("15:04:05.000"), e.GetType(), e.GetMessage(), labelText(e.GetLabels())}), "  ")))
			}
		})}
	cmd.Flags().StringArrayVar(&objects, "object", nil, "only events of this object, by name or id; may be repeated")
	return cmd
}

// resolveAny gives the ids of all objects, of any kind, that are called ref.
func resolveAny(ctx context.Context, c *client.Client, ref string) ([]string, error) {
	if ident.CheckID("object", ref) == nil {
		return []string{ref}, nil
	}
	r := &apiv1.RefRequest{Ref: ref}
	var ids []string
	for _, get := range []func() (interface{ GetId() string }, error){
		func() (interface{ GetId() string }, error) { return c.VMs.Get(ctx, r) },
		func() (interface{ GetId() string }, error) { return c.Volumes.Get(ctx, r) },
		func() (interface{ GetId() string }, error) { return c.Templates.Get(ctx, r) },
		func() (interface{ GetId() string }, error) { return c.Networks.Get(ctx, r) },
		func() (interface{ GetId() string }, error) { return c.NICs.Get(ctx, r) },
		func() (interface{ GetId() string }, error) { return c.Operations.Get(ctx, r) },
	} {
		o, err := get()
		switch {
		case err == nil:
			ids = append(ids, o.GetId())
		case errors.Is(err, errs.NotFound), errors.Is(err, errs.Invalid), errors.Is(err, errs.Unsupported), errors.Is(err, errs.Unavailable):
		default:
			return nil, err
		}
	}
	if len(ids) == 0 {
		return nil, errs.New(errs.NotFound, "there is nothing called %s", ident.Quote(ref)).Do("see mvirt vm ls, volume ls, network ls …")
	}
	return ids, nil
}
