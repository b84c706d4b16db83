package cli

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/version"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{Use: "status", Short: "How the host, the plugins and what runs on them are", Args: cobra.NoArgs,
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, _ []string) error {
			s, err := c.System.GetStatus(cmd.Context(), &apiv1.GetStatusRequest{})
			if err != nil {
				return err
			}
			switch {
			case a.structured():
				return a.emit(render.Message(s))
			case a.format() == render.Name:
				a.printf("%s\n", s.GetHostName())
				return nil
			}
			a.printStatus(s)
			return nil
		})}
}

func (a *app) printStatus(s *apiv1.Status) {
	color := a.color(a.std.Out)
	missing := map[string]bool{}
	for _, k := range s.GetUnavailable() {
		missing[k] = true
	}
	count := func(kind, format string, args ...any) string {
		if missing[kind] {
			return "not known: the " + kind + " plugin is down"
		}
		return fmt.Sprintf(format, args...)
	}
	st := s.GetStorage()
	storage := ""
	if st != nil {
		storage = fmt.Sprintf("%s: %s free of %s, %s promised to volumes", st.GetPlace(), units.Size(st.GetAvailableBytes()), units.Size(st.GetTotalBytes()), units.Size(st.GetProvisionedBytes()))
		if st.GetReflink() {
			storage += ", clones share blocks"
		}
	}
	pairs := []render.Pair{
		{Key: "Host", Value: fmt.Sprintf("%s, %d CPUs, %s memory", s.GetHostName(), s.GetCpus(), units.Size(s.GetMemoryBytes()))},
		{Key: "mvirtd", Value: fmt.Sprintf("%s, up %s", s.GetVersion(), a.age(s.GetStartedAt()))},
		{Key: "You are", Value: s.GetCaller()},
		{Key: "VMs", Value: count("vmm", "%d, %d running", s.GetVms(), s.GetVmsRunning())},
		{Key: "Disks", Value: count("storage", "%d volumes, %d templates", s.GetVolumes(), s.GetTemplates())},
		{Key: "Storage", Value: storage},
		{Key: "Networks", Value: count("net", "%d, %d NICs", s.GetNetworks(), s.GetNics())},
	}
	if n := s.GetOperationsRunning(); n > 0 {
		pairs = append(pairs, render.Pair{Key: "Operations", Value: fmt.Sprintf("%d running", n)})
	}
	a.printf("%s", render.Pairs(append(pairs, conditions(s.GetConditions())...), color))
	if len(s.GetPlugins()) > 0 {
		a.printf("\n%s", render.Rows(a.plugins().columns, s.GetPlugins(), a.format() == render.Wide, color))
	}
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "The versions of this program, mvirtd and the plugins", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o := render.Object{{Key: "client", Value: version.Version}, {Key: "go", Value: runtime.Version()}}
			lines := []render.Pair{{Key: "mvirt", Value: version.Version + " (" + runtime.Version() + ")"}}
			c, err := a.connect()
			if err == nil {
				var s *apiv1.Status
				if s, err = c.System.GetStatus(cmd.Context(), &apiv1.GetStatusRequest{}); err == nil {
					o = append(o, render.Member{Key: "server", Value: s.GetVersion()})
					lines = append(lines, render.Pair{Key: "mvirtd", Value: s.GetVersion()})
					plugins := render.Object{}
					for _, p := range s.GetPlugins() {
						v := strings.TrimSpace(p.GetName() + " " + p.GetVersion())
						plugins = append(plugins, render.Member{Key: p.GetKind(), Value: v})
						lines = append(lines, render.Pair{Key: p.GetKind(), Value: v})
					}
					o = append(o, render.Member{Key: "plugins", Value: plugins})
				}
			}
			if a.structured() {
				return a.emit(o)
			}
			a.printf("%s", render.Pairs(lines, a.color(a.std.Out)))
			if err != nil {
				a.note("mvirtd: %v", err)
			}
			return nil
		}}
}
