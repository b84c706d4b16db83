package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
)

func (a *app) vms() *noun[*apiv1.VM] {
	n := newNoun[*apiv1.VM](a, "vm")
	n.columns = []render.Column[*apiv1.VM]{
		{Head: "NAME", Cell: n.label},
		{Head: "STATE", Cell: vmState, Color: func(v *apiv1.VM) render.Color { return render.State(v.GetState()) }},
		{Head: "CPUS", Right: true, Cell: func(v *apiv1.VM) string { return fmt.Sprint(v.GetCpus()) }},
		{Head: "MEMORY", Right: true, Cell: func(v *apiv1.VM) string { return units.Size(v.GetMemoryBytes()) }},
		{Head: "ADDRESS", Cell: func(v *apiv1.VM) string { return strings.Join(vmAddresses(v), ",") }},
		{Head: "SINCE", Right: true, Cell: func(v *apiv1.VM) string { return a.age(v.GetSince()) }},
		{Head: "AGE", Wide: true, Right: true, Cell: func(v *apiv1.VM) string { return a.age(v.GetCreatedAt()) }},
		{Head: "DISKS", Wide: true, Cell: func(v *apiv1.VM) string {
			var out []string
			for _, d := range v.GetDisks() {
				out = append(out, firstOf(d.GetVolumeName(), d.GetVolumeId())+"="+units.Size(d.GetSizeBytes()))
			}
			return strings.Join(out, ",")
		}},
		{Head: "PID", Wide: true, Right: true, Cell: func(v *apiv1.VM) string { return number(v.GetPid()) }},
		{Head: "LABELS", Wide: true, Cell: func(v *apiv1.VM) string { return labelText(v.GetLabels()) }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.detail = a.vmDetail
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.VM, error) {
		r, err := c.VMs.List(ctx, &apiv1.ListVMsRequest{})
		return r.GetVms(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.VM, error) {
		return c.VMs.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

func number(n uint32) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

// vmState is the state in a list: with the reason where it is not what it should be.
func vmState(v *apiv1.VM) string {
	s := v.GetState()
	if v.GetState() == "failed" || v.GetState() == "unknown" {
		s = state(s, v.GetReason())
	}
	if len(v.GetConditions()) > 0 {
		s += " !"
	}
	return s
}

func vmAddresses(v *apiv1.VM) []string {
	var out []string
	for _, i := range v.GetNics() {
		if s := firstOf(i.GetIpv4(), i.GetIpv6()); s != "" {
			out = append(out, s)
		}
	}
	return out
}

func (a *app) vmDetail(v *apiv1.VM) []render.Pair {
	var disks, nics []string
	for _, d := range v.GetDisks() {
		s := fmt.Sprintf("%s: volume %s, %s", d.GetName(), firstOf(d.GetVolumeName(), d.GetVolumeId()), units.Size(d.GetSizeBytes()))
		if d.GetReadOnly() {
			s += ", read-only"
		}
		if n := d.GetBytesPerSecond(); n != 0 {
			s += ", at most " + units.Size(n) + " a second"
		}
		if n := d.GetOpsPerSecond(); n != 0 {
			s += fmt.Sprintf(", at most %d operations a second", n)
		}
		if d.GetOwned() {
			s += ", goes with the VM"
		}
		disks = append(disks, s)
	}
	for _, i := range v.GetNics() {
		s := strings.Join(nonEmpty([]string{firstOf(i.GetNicName(), i.GetNicId()) + " on " + firstOf(i.GetNetworkName(), i.GetNetworkId()), i.GetMac(), i.GetIpv4(), i.GetIpv6()}), ", ")
		if i.GetOwned() {
			s += ", goes with the VM"
		}
		nics = append(nics, s)
	}
	boot := "firmware " + v.GetFirmware()
	if v.GetDirectBoot() {
		boot = "kernel " + v.GetKernelName()
	}
	cloud := ""
	if c := v.GetCloudInit(); c != nil {
		cloud = fmt.Sprintf("user data %s, meta data %s, network config %s", units.Size(uint64(len(c.GetUserData()))), units.Size(uint64(len(c.GetMetaData()))), units.Size(uint64(len(c.GetNetworkConfig()))))
	}
	cpus, memory := fmt.Sprint(v.GetCpus()), units.Size(v.GetMemoryBytes())
	if v.GetMaxCpus() > v.GetCpus() {
		cpus += fmt.Sprintf(" (up to %d)", v.GetMaxCpus())
	}
	if v.GetMaxMemoryBytes() > v.GetMemoryBytes() {
		memory += " (up to " + units.Size(v.GetMaxMemoryBytes()) + ")"
	}
	process := ""
	if v.GetPid() != 0 {
		process = fmt.Sprintf("%s, pid %d, uid %d", v.GetHypervisor(), v.GetPid(), v.GetUid())
	}
	p := []render.Pair{
		{Key: "Name", Value: v.GetName()}, {Key: "Id", Value: v.GetId()},
		{Key: "State", Value: state(v.GetState(), v.GetReason()), Color: render.State(v.GetState())}, {Key: "Wanted", Value: v.GetDesired()},
		{Key: "Since", Value: a.when(v.GetSince())}, {Key: "CPUs", Value: cpus}, {Key: "Memory", Value: memory},
		{Key: "Disk", Value: strings.Join(disks, "\n")}, {Key: "NIC", Value: strings.Join(nics, "\n")},
		{Key: "Boot", Value: strings.TrimSpace(boot)}, {Key: "Kernel command line", Value: v.GetCmdline()}, {Key: "Cloud-init", Value: cloud},
		{Key: "Start with the host", Value: yes(v.GetAutostart())}, {Key: "Nested virtualisation", Value: yes(v.GetNested())}, {Key: "Hypervisor", Value: process},
		{Key: "CPU topology", Value: topology(v.GetTopology())}, {Key: "Watchdog", Value: yes(v.GetWatchdog())}, {Key: "Virtio socket", Value: vsock(v)},
		{Key: "Operation", Value: v.GetOperation()}, {Key: "Labels", Value: labelText(v.GetLabels())}, {Key: "Created", Value: a.when(v.GetCreatedAt())},
	}
	if v.GetPending() {
		p = append(p, render.Pair{Key: "Pending", Value: "changes take effect at the next start", Color: render.Yellow})
	}
	return append(p, conditions(v.GetConditions())...)
}

func topology(t *apiv1.VMTopology) string {
	if t == nil {
		return ""
	}
	return fmt.Sprintf("%d sockets, %d cores each, %d threads each", t.GetSockets(), t.GetCores(), t.GetThreads())
}

func vsock(v *apiv1.VM) string {
	if v.GetVsock() == 0 {
		return ""
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", v.GetVsock(), v.GetVsockSocket()))
}

// conditions shows lasting trouble with its remedy.
func conditions(list []*apiv1.Condition) []render.Pair {
	var out []render.Pair
	for _, c := range list {
		text := c.GetSeverity() + ": " + c.GetText()
		if c.GetRemedy() != "" {
			text += "\nto do: " + c.GetRemedy()
		}
		out = append(out, render.Pair{Key: "Condition", Value: text, Color: render.State(c.GetSeverity())})
	}
	return out
}

func (a *app) vmCommand() *cobra.Command {
	n := a.vms()
	cmd := &cobra.Command{Use: "vm", Aliases: []string{"vms"}, Short: "Virtual machines"}
	ctx := func(cmd *cobra.Command) context.Context { return cmd.Context() }

	var start apiv1.StartVMRequest
	startCmd := a.vmVerb("start", "Start VMs", "started", func(c *client.Client, cmd *cobra.Command, ref string) (*apiv1.VM, error) {
		return c.VMs.Start(ctx(cmd), &apiv1.StartVMRequest{Ref: ref, Paused: start.Paused})
	})
	startCmd.Flags().BoolVar(&start.Paused, "paused", false, "leave it paused")

	var stopTime time.Duration
	var noForce bool
	stopCmd := a.vmVerb("stop", "Stop VMs in order: power button, wait, then by force", "stopped", func(c *client.Client, cmd *cobra.Command, ref string) (*apiv1.VM, error) {
		return c.VMs.Stop(ctx(cmd), &apiv1.StopVMRequest{Ref: ref, Timeout: duration(stopTime, cmd.Flags().Changed("timeout")), NoForce: noForce})
	})
	stopCmd.Flags().DurationVar(&stopTime, "timeout", 60*time.Second, "how long the guest may take")
	stopCmd.Flags().BoolVar(&noForce, "no-force", false, "fail instead of using force")

	kill := a.vmVerb("kill", "End VMs at once, as if the power failed", "killed", func(c *client.Client, cmd *cobra.Command, ref string) (*apiv1.VM, error) {
		return c.VMs.Kill(ctx(cmd), &apiv1.RefRequest{Ref: ref})
	})
	pause := a.vmVerb("pause", "Freeze VMs", "paused", func(c *client.Client, cmd *cobra.Command, ref string) (*apiv1.VM, error) {
		return c.VMs.Pause(ctx(cmd), &apiv1.RefRequest{Ref: ref})
	})
	resume := a.vmVerb("resume", "Let paused VMs go on", "resumed", func(c *client.Client, cmd *cobra.Command, ref string) (*apiv1.VM, error) {
		return c.VMs.Resume(ctx(cmd), &apiv1.RefRequest{Ref: ref})
	})
	var hard bool
	var rebootTime time.Duration
	reboot := a.vmVerb("reboot", "Restart VMs: in order, or by --hard", "rebooted", func(c *client.Client, cmd *cobra.Command, ref string) (*apiv1.VM, error) {
		return c.VMs.Reboot(ctx(cmd), &apiv1.RebootVMRequest{Ref: ref, Hard: hard, Timeout: duration(rebootTime, cmd.Flags().Changed("timeout"))})
	})
	reboot.Flags().BoolVar(&hard, "hard", false, "as by the reset button")
	reboot.Flags().DurationVar(&rebootTime, "timeout", 60*time.Second, "how long the guest may take")

	rm := n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
		return c.VMs.Delete(ctx, r)
	}, func(cmd *cobra.Command, r *apiv1.DeleteRequest) {
		f := cmd.Flags()
		f.BoolVarP(&r.Force, "force", "f", false, "kill it if it runs")
		f.BoolVar(&r.Keep, "keep", false, "keep the volumes and NICs that were made for it")
		f.BoolVarP(&r.Recursive, "recursive", "r", false, "remove all its volumes and NICs, also those that were not made for it")
		cmd.MarkFlagsMutuallyExclusive("keep", "recursive")
	})
	rm.Long = "Removes VMs, with the volumes and NICs that were made for them."
	cmd.AddCommand(a.vmCreateCommand(), n.lsCommand(), n.showCommand(), a.vmUpdateCommand(), startCmd, stopCmd, kill, pause, resume, reboot,
		a.consoleCommand(), rm, a.vmAttachCommand(), a.vmDetachCommand(), a.vmWatchCommand(), a.vmWaitCommand(), a.vmTopCommand(),
		a.vmSnapshotCommand(), a.vmRestoreCommand())
	return cmd
}

// vmVerb makes a command that does one thing to each VM named.
func (a *app) vmVerb(name, short, done string, do func(c *client.Client, cmd *cobra.Command, ref string) (*apiv1.VM, error)) *cobra.Command {
	return &cobra.Command{Use: name + " VM…", Short: short, Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.vms().complete(-1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			return a.each(cmd, args, func(ref string) error {
				v, err := do(c, cmd, ref)
				if err != nil {
					return err
				}
				return a.vms().changed(v, done)
			})
		})}
}

func (a *app) vmTopCommand() *cobra.Command {
	return &cobra.Command{Use: "counters VM", Aliases: []string{"stats"}, Short: "Show what a running VM has used", Args: cobra.ExactArgs(1), ValidArgsFunction: a.vms().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			m, err := c.VMs.Counters(cmd.Context(), &apiv1.RefRequest{Ref: args[0]})
			if err != nil {
				return err
			}
			if a.structured() {
				return a.emit(render.Message(m))
			}
			pairs := []render.Pair{{Key: "CPU time", Value: m.GetCpuTime().AsDuration().Round(time.Millisecond).String()}, {Key: "Memory", Value: units.Size(m.GetResidentBytes())}}
			for _, d := range m.GetDevices() {
				pairs = append(pairs, render.Pair{Key: d.GetName(), Value: fmt.Sprintf("read %s in %d, written %s in %d",
					units.Size(d.GetReadBytes()), d.GetReadOps(), units.Size(d.GetWriteBytes()), d.GetWriteOps())})
			}
			a.printf("%s", render.Pairs(pairs, a.color(a.std.Out)))
			return nil
		})}
}

func (a *app) vmAttachCommand() *cobra.Command {
	var disk, nic, network string
	cmd := &cobra.Command{Use: "attach VM --disk SPEC | --nic NIC | --network SPEC", Short: "Give a VM a disk or a NIC, also while it runs", Long: "Gives a VM a disk or a NIC.\n\n" + specHelp,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.vms().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var v *apiv1.VM
			switch {
			case disk != "":
				d, err := parseDisk(disk)
				if err != nil {
					return err
				}
				if v, err = c.VMs.AttachVolume(cmd.Context(), &apiv1.AttachVolumeRequest{Ref: args[0], Disk: d}); err != nil {
					return err
				}
			default:
				i := &apiv1.NewNIC{Nic: nic}
				if network != "" {
					var err error
					if i, err = parseNetwork(network); err != nil {
						return err
					}
				}
				var err error
				if v, err = c.VMs.AttachNIC(cmd.Context(), &apiv1.AttachNICRequest{Ref: args[0], Nic: i}); err != nil {
					return err
				}
			}
			return a.vms().changed(v, "updated")
		})}
	f := cmd.Flags()
	f.StringVar(&disk, "disk", "", "a disk: volume=NAME, or what a new one shall be")
	f.StringVar(&nic, "nic", "", "a NIC that is there")
	f.StringVar(&network, "network", "", "make a NIC on this network")
	cmd.MarkFlagsMutuallyExclusive("disk", "nic", "network")
	cmd.MarkFlagsOneRequired("disk", "nic", "network")
	a.nics().completeFlag(cmd, "nic")
	a.networks().completeFlag(cmd, "network")
	return cmd
}

func (a *app) vmDetachCommand() *cobra.Command {
	var disk, nic string
	cmd := &cobra.Command{Use: "detach VM --disk DISK | --nic NIC", Short: "Take a disk or a NIC from a VM, also while it runs", Args: cobra.ExactArgs(1), ValidArgsFunction: a.vms().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var v *apiv1.VM
			var err error
			if disk != "" {
				v, err = c.VMs.DetachVolume(cmd.Context(), &apiv1.DetachVolumeRequest{Ref: args[0], Disk: disk})
			} else {
				v, err = c.VMs.DetachNIC(cmd.Context(), &apiv1.DetachNICRequest{Ref: args[0], Nic: nic})
			}
			if err != nil {
				return err
			}
			return a.vms().changed(v, "updated")
		})}
	cmd.Flags().StringVar(&disk, "disk", "", "disk, by its name in the VM or its volume")
	cmd.Flags().StringVar(&nic, "nic", "", "NIC")
	cmd.MarkFlagsMutuallyExclusive("disk", "nic")
	cmd.MarkFlagsOneRequired("disk", "nic")
	a.volumes().completeFlag(cmd, "disk")
	a.nics().completeFlag(cmd, "nic")
	return cmd
}

func (a *app) vmWatchCommand() *cobra.Command {
	return &cobra.Command{Use: "watch [VM…]", Short: "Show VMs as they are and each change, until Ctrl-C", ValidArgsFunction: a.vms().complete(-1),
		Long: "Shows VMs as they are, then each change as it comes, one line each; with -o json one JSON object each.",
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			return a.watchVMs(cmd.Context(), c, args, func(e *apiv1.VMEvent) (bool, error) {
				if a.structured() {
					return false, a.emitLine(render.Message(e))
				}
				v := e.GetVm()
				if v == nil {
					if e.GetType() == "lagged" {
						a.note("some changes were missed")
					}
					return false, nil
				}
				t := e.GetTime().AsTime().In(a.std.Now().Location()).Format("15:04:05")
				what := render.Paint(a.color(a.std.Out), render.State(v.GetState()), state(v.GetState(), v.GetReason()))
				if e.GetType() == "deleted" || e.GetType() == "rebooted" || e.GetType() == "panicked" {
					what = e.GetType()
				}
				a.printf("%s  %s  %s  %s\n", t, render.Clean(v.GetName()), what, strings.Join(vmAddresses(v), ","))
				return false, nil
			})
		})}
}

// watchVMs calls fn for each event of the VMs named (all if none) until fn says that it has seen enough.
func (a *app) watchVMs(ctx context.Context, c *client.Client, refs []string, fn func(*apiv1.VMEvent) (bool, error)) error {
	ids := map[string]bool{}
	for _, ref := range refs {
		v, err := c.VMs.Get(ctx, &apiv1.RefRequest{Ref: ref})
		if err != nil {
			return err
		}
		ids[v.GetId()] = true
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.VMs.Watch(ctx, &apiv1.WatchVMsRequest{})
	if err != nil {
		return err
	}
	for {
		e, err := stream.Recv()
		if err != nil {
			return err
		}
		if len(ids) > 0 && e.GetVm() != nil && !ids[e.GetVm().GetId()] {
			continue
		}
		if enough, err := fn(e); enough || err != nil {
			return err
		}
	}
}

func (a *app) vmWaitCommand() *cobra.Command {
	var until string
	var timeout time.Duration
	cmd := &cobra.Command{Use: "wait VM…", Short: "Wait until VMs are in a state", Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.vms().complete(-1),
		Long: "Waits until all the VMs are in the state given by --for, or gone with --for deleted. \"mvirt vm console VM\n--until TEXT\" waits for what the guest prints.",
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, timeout)
				defer cancel()
			}
			waiting := map[string]string{} // id: name
			for _, ref := range args {
				v, err := c.VMs.Get(ctx, &apiv1.RefRequest{Ref: ref})
				if err != nil {
					return err
				}
				if v.GetState() != until {
					waiting[v.GetId()] = v.GetName()
				}
			}
			if len(waiting) == 0 {
				return nil
			}
			err := a.watchVMs(ctx, c, nil, func(e *apiv1.VMEvent) (bool, error) {
				v := e.GetVm()
				switch {
				case waiting[v.GetId()] == "":
				case e.GetType() == "deleted":
					if until != "deleted" {
						return true, errs.New(errs.NotFound, "vm %s is deleted", v.GetName())
					}
					delete(waiting, v.GetId())
				case v.GetState() == until:
					delete(waiting, v.GetId())
				case v.GetState() == "failed" && until == "running":
					return true, errs.New(errs.Precondition, "vm %s failed: %s", v.GetName(), v.GetReason()).Do("see mvirt logs " + v.GetName())
				}
				return len(waiting) == 0, nil
			})
			if errors.Is(err, errs.Deadline) && timeout > 0 {
				return errs.New(errs.Deadline, "not %s within %v: %s", until, timeout, strings.Join(values(waiting), ", ")).Do("see mvirt vm show, or give a longer --timeout")
			}
			return err
		})}
	cmd.Flags().StringVar(&until, "for", "running", "running, stopped, paused, failed or deleted")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up after so long (default: never)")
	must(cmd.RegisterFlagCompletionFunc("for", cobra.FixedCompletions([]string{"running", "stopped", "paused", "failed", "deleted"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

func values(m map[string]string) []string {
	out := make([]string, 0, len(m))
	for _, v := range m {
		out = append(out, v)
	}
	return out
}
