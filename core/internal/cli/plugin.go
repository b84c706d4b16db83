package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
)

func (a *app) plugins() *noun[*apiv1.Plugin] {
	n := &noun[*apiv1.Plugin]{a: a, name: "plugin", id: (*apiv1.Plugin).GetKind, label: (*apiv1.Plugin).GetKind}
	n.columns = []render.Column[*apiv1.Plugin]{
		{Head: "KIND", Cell: n.label},
		{Head: "NAME", Cell: (*apiv1.Plugin).GetName},
		{Head: "VERSION", Cell: (*apiv1.Plugin).GetVersion},
		{Head: "STATE", Cell: func(p *apiv1.Plugin) string { return state(p.GetState(), p.GetReason()) },
			Color: func(p *apiv1.Plugin) render.Color { return render.State(p.GetState()) }},
		{Head: "USER", Cell: (*apiv1.Plugin).GetUser},
		{Head: "PID", Right: true, Cell: func(p *apiv1.Plugin) string { return number(p.GetPid()) }},
		{Head: "RESTARTS", Right: true, Cell: func(p *apiv1.Plugin) string { return fmt.Sprint(p.GetRestarts()) }},
		{Head: "UP", Right: true, Cell: func(p *apiv1.Plugin) string { return a.age(p.GetStartedAt()) }},
		{Head: "CONTRACT", Wide: true, Cell: (*apiv1.Plugin).GetContract},
		{Head: "COMMAND", Wide: true, Cell: (*apiv1.Plugin).GetCommand},
	}
	n.detail = func(p *apiv1.Plugin) []render.Pair {
		last := p.GetLastExit()
		if last != "" && p.GetLastExitAt() != nil {
			last += ", " + a.when(p.GetLastExitAt())
		}
		next := ""
		if p.GetNextStartAt() != nil {
			next = p.GetNextStartAt().AsTime().In(a.std.Now().Location()).Format("2006-01-02 15:04:05 MST")
		}
		pairs := []render.Pair{
			{Key: "Kind", Value: p.GetKind()}, {Key: "Name", Value: p.GetName()}, {Key: "Version", Value: p.GetVersion()},
			{Key: "Contract", Value: p.GetContract()},
			{Key: "State", Value: state(p.GetState(), p.GetReason()), Color: render.State(p.GetState())},
			{Key: "Command", Value: p.GetCommand()}, {Key: "User", Value: p.GetUser()}, {Key: "Pid", Value: number(p.GetPid())},
			{Key: "Capabilities", Value: firstOf(strings.Join(p.GetCapabilities(), " "), "none")}, {Key: "No new privileges", Value: yes(p.GetNoNewPrivs())},
			{Key: "Needs", Value: strings.Join(p.GetNeeds(), ", ")}, {Key: "Features", Value: strings.Join(p.GetFeatures(), " ")},
			{Key: "Started", Value: a.when(p.GetStartedAt())}, {Key: "Restarts", Value: fmt.Sprint(p.GetRestarts())},
			{Key: "Next start", Value: next}, {Key: "Last exit", Value: last},
			{Key: "Last words", Value: strings.Join(p.GetLastStderr(), "\n")},
		}
		return append(pairs, conditions(p.GetConditions())...)
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.Plugin, error) {
		r, err := c.Plugins.List(ctx, &apiv1.ListPluginsRequest{})
		return r.GetPlugins(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.Plugin, error) {
		return c.Plugins.Get(ctx, &apiv1.GetPluginRequest{Kind: ref})
	}
	return n
}

func (a *app) pluginCommand() *cobra.Command {
	n := a.plugins()
	cmd := &cobra.Command{Use: "plugin", Aliases: []string{"plugins"}, Short: "The plugins that do the work, by kind: storage, net, vmm, log"}
	restart := &cobra.Command{Use: "restart KIND…", Short: "End plugins in order and start them again; VMs keep running", Args: cobra.MinimumNArgs(1), ValidArgsFunction: n.complete(-1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			return a.each(cmd, args, func(ref string) error {
				p, err := c.Plugins.Restart(cmd.Context(), &apiv1.RestartPluginRequest{Kind: ref})
				if err != nil {
					return err
				}
				return n.changed(p, fmt.Sprintf("restarted (pid %d)", p.GetPid()))
			})
		})}
	cmd.AddCommand(n.lsCommand(), n.showCommand(), restart)
	return cmd
}
