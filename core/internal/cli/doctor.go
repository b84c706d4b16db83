package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/doctor"
	"github.com/mvirt/mvirt/sdk/errs"
)

// defaultConfig is where mvirtd looks too.
const defaultConfig = "/etc/mvirt/mvirt.toml"

func (a *app) doctorCommand() *cobra.Command {
	var path, vm string
	var fix bool
	cmd := &cobra.Command{Use: "doctor", Args: cobra.NoArgs, Short: "Check that every process of mvirt may do what it must, and no more",
		Long: `Compares each process of mvirt with what the configuration wants it to be: user, groups, capabilities,
no_new_privs, seccomp filter and namespaces, as the kernel tells them; and looks for what belongs to nothing:
processes, uids, control groups, launch directories, sockets. It works also when mvirtd does not run, and needs
root. Any difference, and anything left over, gives exit code 6.`,
		Example: "  mvirt doctor\n  mvirt doctor --jail web\n  mvirt doctor --fix",
		RunE: func(cmd *cobra.Command, _ []string) error {
			vms, names, conds, err := a.known(cmd.Context())
			if err != nil && !a.quiet {
				a.note("mvirtd does not answer (%v): what its plugins know is left out", err)
			}
			if vm != "" {
				if id := names[vm]; id != "" {
					vm = id
				}
				r, err := doctor.Jail(path, vm)
				if err != nil {
					return err
				}
				return a.printJail(r)
			}
			r, err := doctor.Look(path, vms)
			if err != nil {
				return err
			}
			if err := a.printReport(r, conds); err != nil {
				return err
			}
			if fix {
				if err := a.fix(r); err != nil {
					return err
				}
				if r, err = doctor.Look(path, vms); err != nil {
					return err
				}
			}
			if !r.Healthy() {
				return errs.New(errs.Precondition, "not everything is as it must be").Because("DOCTOR").
					Do("see the lines above; mvirt doctor --fix removes what is left over")
			}
			return nil
		}}
	f := cmd.Flags()
	f.StringVar(&path, "config", defaultConfig, "mvirtd's configuration")
	f.StringVar(&vm, "jail", "", "print all that the hypervisor of this VM can reach")
	f.BoolVar(&fix, "fix", false, "remove what belongs to nothing")
	return cmd
}

// known asks mvirtd, if it answers, which VMs there are and what lasting troubles it knows of.
func (a *app) known(ctx context.Context) (vms map[string]int, names map[string]string, conds []*apiv1.Condition, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := a.connect()
	if err != nil {
		return nil, nil, nil, err
	}
	list, err := c.VMs.List(ctx, &apiv1.ListVMsRequest{})
	if err != nil {
		return nil, nil, nil, err
	}
	vms, names = map[string]int{}, map[string]string{}
	for _, v := range list.GetVms() {
		vms[v.GetId()] = int(v.GetPid())
		names[v.GetName()], names[v.GetId()] = v.GetId(), v.GetId()
	}
	s, err := c.System.GetStatus(ctx, &apiv1.GetStatusRequest{})
	return vms, names, s.GetConditions(), err
}

func (a *app) printReport(r *doctor.Report, conds []*apiv1.Condition) error {
	if a.structured() {
		return a.emit(reportObject(r))
	}
	color := a.color(a.std.Out)
	columns := []render.Column[doctor.Process]{
		{Head: "PROCESS", Cell: func(p doctor.Process) string { return p.Name }},
		{Head: "PID", Right: true, Cell: func(p doctor.Process) string { return number(uint32(p.PID)) }},
		{Head: "UID", Right: true, Cell: func(p doctor.Process) string { return fmt.Sprint(p.Have.UID[1]) }},
		{Head: "GROUPS", Cell: func(p doctor.Process) string { return list(p.Have.Groups) }},
		{Head: "CAPABILITIES", Cell: func(p doctor.Process) string { return capabilities(p.Have.Effective) }},
		{Head: "BOUNDING", Wide: true, Cell: func(p doctor.Process) string { return capabilities(p.Have.Bounding) }},
		{Head: "AMBIENT", Wide: true, Cell: func(p doctor.Process) string { return capabilities(p.Have.Ambient) }},
		{Head: "NO_NEW_PRIVS", Cell: func(p doctor.Process) string { return yes(p.Have.NoNewPrivs) }},
		{Head: "SECCOMP", Cell: func(p doctor.Process) string { return yes(p.Have.Seccomp == 2) }},
		{Head: "AS WANTED", Cell: func(p doctor.Process) string {
			if len(p.Differences) == 0 {
				return "yes"
			}
			return "NO: " + strings.Join(p.Differences, "; ")
		}},
	}
	a.printf("%s", render.Rows(columns, r.Processes, a.format() == render.Wide, color))
	for _, n := range r.Notes {
		a.printf("note: %s\n", n)
	}
	for _, c := range conds {
		a.printf("%s: %s\n", strings.ToLower(c.GetCode()), c.GetText())
	}
	if len(r.Leftovers) == 0 {
		a.printf("Nothing is left over.\n")
	}
	for _, l := range r.Leftovers {
		a.printf("left over: %s %s (%s)\n", l.Class, l.What, l.Why)
	}
	return nil
}

// fix removes what is left over, and says what.
func (a *app) fix(r *doctor.Report) error {
	var first error
	for _, l := range r.Leftovers {
		err := l.Fix()
		switch {
		case err == nil:
			a.note("removed %s %s", l.Class, l.What)
		case first == nil:
			first = errs.Wrap(errs.KindOf(err), err, "%s %s stays", l.Class, l.What)
			fallthrough
		default:
			a.note("%s %s stays: %v", l.Class, l.What, err)
		}
	}
	return first
}

func list(n []uint32) string {
	if len(n) == 0 {
		return "-"
	}
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(n), " ", ","), "[]")
}

func capabilities(set uint64) string { return doctor.CapabilityText(set) }

func reportObject(r *doctor.Report) render.Object {
	var procs, left []any
	for _, p := range r.Processes {
		procs = append(procs, render.Object{{Key: "name", Value: p.Name}, {Key: "pid", Value: p.PID}, {Key: "uid", Value: p.Have.UID[1]}, {Key: "gid", Value: p.Have.GID[1]},
			{Key: "groups", Value: slices.Clone(p.Have.Groups)}, {Key: "effective", Value: capabilities(p.Have.Effective)},
			{Key: "permitted", Value: capabilities(p.Have.Permitted)}, {Key: "bounding", Value: capabilities(p.Have.Bounding)},
			{Key: "ambient", Value: capabilities(p.Have.Ambient)}, {Key: "no_new_privs", Value: p.Have.NoNewPrivs}, {Key: "seccomp", Value: p.Have.Seccomp},
			{Key: "differences", Value: slices.Clone(p.Differences)}})
	}
	for _, l := range r.Leftovers {
		left = append(left, render.Object{{Key: "class", Value: l.Class}, {Key: "what", Value: l.What}, {Key: "why", Value: l.Why}})
	}
	return render.Object{{Key: "config", Value: r.Config}, {Key: "landlock", Value: r.Landlock}, {Key: "processes", Value: procs}, {Key: "notes", Value: r.Notes},
		{Key: "leftovers", Value: left}, {Key: "healthy", Value: r.Healthy()}}
}

func (a *app) printJail(r *doctor.Reach) error {
	if a.structured() {
		var mounts []any
		for _, m := range r.Mounts {
			mounts = append(mounts, render.Object{{Key: "path", Value: m.Path}, {Key: "source", Value: m.Source}, {Key: "writable", Value: m.Writable}})
		}
		return a.emit(render.Object{{Key: "vm", Value: r.VM}, {Key: "pid", Value: r.Process.PID}, {Key: "uid", Value: r.Process.Have.UID[1]},
			{Key: "differences", Value: r.Process.Differences}, {Key: "mounts", Value: mounts}, {Key: "open", Value: r.Open},
			{Key: "interfaces", Value: r.Interfaces}, {Key: "limits", Value: r.Limits}, {Key: "namespaces", Value: r.Namespaces}})
	}
	p := r.Process
	pairs := []render.Pair{{Key: "VM", Value: r.VM}, {Key: "Pid", Value: fmt.Sprint(p.PID)}, {Key: "Uid", Value: fmt.Sprint(p.Have.UID[1])},
		{Key: "Groups", Value: list(p.Have.Groups)}, {Key: "Capabilities", Value: capabilities(p.Have.Effective | p.Have.Permitted | p.Have.Bounding | p.Have.Ambient)},
		{Key: "No new privs", Value: yes(p.Have.NoNewPrivs)}, {Key: "Seccomp", Value: yes(p.Have.Seccomp == 2)},
		{Key: "As wanted", Value: firstOf(strings.Join(p.Differences, "; "), "yes")},
		{Key: "Namespaces", Value: strings.Join(r.Namespaces, ", ")}, {Key: "Interfaces", Value: firstOf(strings.Join(r.Interfaces, ", "), "none")},
		{Key: "Limits", Value: firstOf(strings.Join(r.Limits, ", "), "none: this host gives mvirt no control groups")}}
	a.printf("%s\nWhat it sees of the file system:\n", render.Pairs(pairs, a.color(a.std.Out)))
	for _, m := range r.Mounts {
		how := "read-only"
		if m.Writable {
			how = "writable"
		}
		a.printf("  %-9s  %s  (%s)\n", how, m.Path, m.Source)
	}
	a.printf("What it has open:\n")
	for _, o := range r.Open {
		a.printf("  %s\n", o)
	}
	if len(p.Differences) > 0 {
		return errs.New(errs.Precondition, "the jail is not as it must be").Because("DOCTOR")
	}
	return nil
}
