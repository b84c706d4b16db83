package cli

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

func (a *app) runCommand() *cobra.Command {
	var s vmSpec
	var name string
	var detach, remove bool
	cmd := &cobra.Command{Use: "run TEMPLATE|FILE|URL", Short: "Make a VM of an image, start it and join its console", Args: cobra.ExactArgs(1),
		Long: `Makes a VM of a template, starts it and joins its console. A file or URL is imported first, unless a template
with its name is there. Leaving the console leaves the VM running; with --rm it is removed when it ends or the
console is left. Without a terminal, or with -d, it does not join.

` + specHelp,
		Example: "  mvirt run debian-12 --network lan --disk 20G --memory 1G\n  mvirt run ./image.qcow2 --name try --rm",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.templates().candidates(prefix, nil), cobra.ShellCompDirectiveDefault
		},
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			template, err := a.runTemplate(ctx, c, args[0])
			if err != nil {
				return err
			}
			s.template, s.req.Start = template, true
			if s.req.Name = name; name == "" {
				s.req.Name = suggest(template)
			}
			r, err := a.vmRequest(ctx, c, cmd, &s)
			if err != nil {
				return err
			}
			v, err := c.VMs.Create(ctx, r)
			if err != nil {
				return err
			}
			join := !detach && isTerminal(a.std.In) && !a.structured()
			if !join {
				return a.vms().changed(v, "created and started"+addressText(v))
			}
			a.note("vm %s started%s", v.GetName(), addressText(v))
			err = a.console(ctx, c, v.GetId(), consoleOptions{replay: "all", escape: "^]"})
			if remove {
				err = firstError(err, a.runRemove(c, v))
			}
			return err
		})}
	a.vmFlags(cmd, &s)
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "the VM's name (default: the template's with a suffix)")
	f.BoolVarP(&detach, "detach", "d", false, "do not join the console")
	f.BoolVar(&remove, "rm", false, "remove the VM with its disks when the console is left or the VM ends")
	cmd.MarkFlagsMutuallyExclusive("detach", "rm")
	return cmd
}

func addressText(v *apiv1.VM) string {
	if list := vmAddresses(v); len(list) > 0 {
		return " (" + strings.Join(list, ", ") + ")"
	}
	return ""
}

// runRemove removes also after Ctrl-C, hence a context of its own.
func (a *app) runRemove(c *client.Client, v *apiv1.VM) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.ctx), time.Minute)
	defer cancel()
	resp, err := c.VMs.Delete(ctx, &apiv1.DeleteRequest{Ref: v.GetId(), Force: true})
	if err != nil {
		return err
	}
	return a.removed(resp, false, "vm "+v.GetName())
}

func firstError(list ...error) error {
	for _, err := range list {
		if err != nil {
			return err
		}
	}
	return nil
}

// runTemplate gives the template to run: source itself, or what is imported from it.
func (a *app) runTemplate(ctx context.Context, c *client.Client, source string) (string, error) {
	name := source
	if _, err := os.Stat(source); isURL(source) || err == nil && ident.CheckName("name", source) != nil {
		name = imageName(source)
	}
	t, err := c.Templates.Get(ctx, &apiv1.RefRequest{Ref: name})
	if err == nil {
		return firstOf(t.GetName(), t.GetId()), nil
	}
	if errs.KindOf(err) != errs.NotFound || name == source {
		return "", err
	}
	a.note("importing %s as template %s", source, name)
	t, err = a.importTemplate(ctx, c, &apiv1.ImportTemplateRequest{Name: name, CancelOnDisconnect: true}, source, false)
	return t.GetName(), err
}

// imageName makes a template's name of a path or URL: its last part without what says the format.
func imageName(source string) string {
	s, _, _ := strings.Cut(source, "?")
	s = strings.ToLower(filepath.Base(s))
	for cut := true; cut; {
		cut = false
		for _, ext := range []string{".gz", ".xz", ".zst", ".bz2", ".qcow2", ".raw", ".img"} {
			if t := strings.TrimSuffix(s, ext); t != s {
				s, cut = t, true
			}
		}
	}
	s = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.' {
			return r
		}
		return '-'
	}, s)
	for strings.Contains(s, "..") {
		s = strings.ReplaceAll(s, "..", ".")
	}
	if len(s) > ident.MaxName {
		s = s[:ident.MaxName]
	}
	if s = strings.Trim(s, "-_."); s == "" {
		return "image"
	}
	return s
}

// suggest makes a name that is probably free: the template's, with four random letters.
func suggest(template string) string {
	const most = ident.MaxName - 5
	if len(template) > most {
		template = strings.TrimRight(template[:most], "-_.")
	}
	return fmt.Sprintf("%s-%s", template, strings.ToLower(rand.Text()[:4]))
}
