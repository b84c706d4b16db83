package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
)

func (a *app) vmSnapshots() *noun[*apiv1.VMSnapshot] {
	n := newNoun[*apiv1.VMSnapshot](a, "vm snapshot")
	n.label = func(s *apiv1.VMSnapshot) string { return firstOf(s.GetVmName(), s.GetVmId()) + "@" + s.GetName() }
	n.columns = []render.Column[*apiv1.VMSnapshot]{
		{Head: "SNAPSHOT", Cell: n.label},
		{Head: "MEMORY", Right: true, Cell: func(s *apiv1.VMSnapshot) string { return units.Size(s.GetMemoryBytes()) }},
		{Head: "USED", Right: true, Cell: func(s *apiv1.VMSnapshot) string { return units.Size(s.GetSizeBytes()) }},
		{Head: "HYPERVISOR", Cell: func(s *apiv1.VMSnapshot) string { return s.GetHypervisor() }},
		{Head: "AGE", Right: true, Cell: func(s *apiv1.VMSnapshot) string { return a.age(s.GetCreatedAt()) }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.VMSnapshot, error) {
		r, err := c.VMs.ListSnapshots(ctx, &apiv1.ListVMSnapshotsRequest{})
		return r.GetSnapshots(), err
	}
	return n
}

func (a *app) vmSnapshotCommand() *cobra.Command {
	n := a.vmSnapshots()
	cmd := &cobra.Command{Use: "snapshot", Aliases: []string{"snapshots", "snap"}, Short: "Snapshots of VMs: memory, devices and volumes at one point, named vm@snapshot"}
	ls := &cobra.Command{Use: "ls [VM]", Aliases: []string{"list"}, Short: "List snapshots, all or a VM's", Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.vms().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			r, err := c.VMs.ListSnapshots(cmd.Context(), &apiv1.ListVMSnapshotsRequest{Vm: strings.Join(args, "")})
			if err != nil {
				return err
			}
			return n.print(r.GetSnapshots())
		})}
	cmd.AddCommand(a.vmSnapshotCreateCommand(), ls, n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
		return c.VMs.DeleteSnapshot(ctx, r)
	}, nil))
	return cmd
}

func (a *app) vmSnapshotCreateCommand() *cobra.Command {
	var req apiv1.SnapshotVMRequest
	cmd := &cobra.Command{Use: "create VM NAME", Short: "Keep a running VM as it is now", Long: "Keeps a running VM's memory and devices, and snapshots of its volumes at the same point. The VM is paused\nmeanwhile. VM NAME, or VM@NAME as one word.",
		Args: cobra.RangeArgs(1, 2), ValidArgsFunction: a.vms().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			vm, name, ok := strings.Cut(strings.Join(args, "@"), "@")
			if !ok || vm == "" || name == "" {
				return usage{errs.Field("name", "give the VM and a name: VM NAME, or VM@NAME", "the snapshot has no name")}
			}
			req.Ref, req.Name = vm, name
			s, err := c.VMs.Snapshot(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return a.vmSnapshots().changed(s, "taken")
		})}
	idFlag(cmd, &req.Id)
	cmd.Flags().BoolVar(&req.LeavePaused, "leave-paused", false, "do not let the VM go on")
	return cmd
}

func (a *app) vmRestoreCommand() *cobra.Command {
	var req apiv1.RestoreVMRequest
	var networks, nics []string
	cmd := &cobra.Command{Use: "restore VM@SNAPSHOT", Short: "Let a VM go on from a snapshot, itself or as a new one",
		Long: `Lets a stopped VM go on from a snapshot: its volumes are rolled back. With --name a new VM goes on from there, on
clones of the volumes. Its guest keeps the addresses that it had, so it needs --network for each NIC: another
network, or the same one when the first VM's NIC is gone.`,
		Args: cobra.ExactArgs(1), ValidArgsFunction: a.vmSnapshots().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			req.Snapshot = args[0]
			for _, text := range networks {
				i, err := parseNetwork(text)
				if err != nil {
					return err
				}
				req.Nics = append(req.Nics, i)
			}
			for _, ref := range nics {
				req.Nics = append(req.Nics, &apiv1.NewNIC{Nic: ref})
			}
			v, err := c.VMs.Restore(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return a.vms().changed(v, "restored from "+req.Snapshot)
		})}
	f := cmd.Flags()
	f.StringVar(&req.Name, "name", "", "make a new VM of this name")
	f.StringArrayVar(&networks, "network", nil, "a new VM: make a NIC on this network; may be repeated")
	f.StringArrayVar(&nics, "nic", nil, "a new VM: a NIC that is there; may be repeated")
	f.BoolVar(&req.Paused, "paused", false, "leave it paused")
	f.BoolVar(&req.DestroyNewer, "destroy-newer", false, "also remove the volumes' snapshots that are newer")
	idFlag(cmd, &req.Id)
	a.networks().completeFlag(cmd, "network")
	a.nics().completeFlag(cmd, "nic")
	return cmd
}
