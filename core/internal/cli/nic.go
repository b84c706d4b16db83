package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
)

func (a *app) nics() *noun[*apiv1.NIC] {
	n := newNoun[*apiv1.NIC](a, "nic")
	network := func(i *apiv1.NIC) string { return firstOf(i.GetNetworkName(), i.GetNetworkId()) }
	vm := func(i *apiv1.NIC) string { return firstOf(i.GetVmName(), i.GetVmId()) }
	n.columns = []render.Column[*apiv1.NIC]{
		{Head: "NAME", Cell: n.label},
		{Head: "NETWORK", Cell: network},
		{Head: "IPV4", Cell: (*apiv1.NIC).GetIpv4},
		{Head: "IPV6", Cell: (*apiv1.NIC).GetIpv6},
		{Head: "MAC", Cell: (*apiv1.NIC).GetMac},
		{Head: "VM", Cell: vm},
		{Head: "STATE", Cell: func(i *apiv1.NIC) string { return state(i.GetState(), i.GetStateReason()) },
			Color: func(i *apiv1.NIC) render.Color { return render.State(i.GetState()) }},
		{Head: "RX", Wide: true, Right: true, Cell: func(i *apiv1.NIC) string { return units.Size(i.GetRxBytes()) }},
		{Head: "TX", Wide: true, Right: true, Cell: func(i *apiv1.NIC) string { return units.Size(i.GetTxBytes()) }},
		{Head: "DROPPED", Wide: true, Right: true, Cell: func(i *apiv1.NIC) string { return fmt.Sprint(i.GetRxDropped() + i.GetTxDropped()) }},
		{Head: "SPOOFED", Wide: true, Right: true, Cell: func(i *apiv1.NIC) string { return fmt.Sprint(i.GetTxSpoofed()) }},
		{Head: "GROUPS", Wide: true, Cell: func(i *apiv1.NIC) string { return strings.Join(i.GetSecurityGroups(), ",") }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.detail = func(i *apiv1.NIC) []render.Pair {
		return []render.Pair{
			{Key: "Name", Value: i.GetName()}, {Key: "Id", Value: i.GetId()},
			{Key: "State", Value: state(i.GetState(), i.GetStateReason()), Color: render.State(i.GetState())},
			{Key: "Network", Value: network(i)}, {Key: "VM", Value: vm(i)}, {Key: "MAC", Value: i.GetMac()},
			{Key: "IPv4", Value: i.GetIpv4()}, {Key: "IPv6", Value: i.GetIpv6()}, {Key: "Host name", Value: i.GetHostName()},
			{Key: "Routed prefixes", Value: strings.Join(i.GetRoutedPrefixes(), ", ")}, {Key: "Security groups", Value: strings.Join(i.GetSecurityGroups(), ", ")},
			{Key: "Attached by", Value: i.GetAttachMode()},
			{Key: "To the VM", Value: fmt.Sprintf("%d packets, %s, %d dropped", i.GetRxPackets(), units.Size(i.GetRxBytes()), i.GetRxDropped())},
			{Key: "From the VM", Value: fmt.Sprintf("%d packets, %s, %d dropped, %d spoofed", i.GetTxPackets(), units.Size(i.GetTxBytes()), i.GetTxDropped(), i.GetTxSpoofed())},
			{Key: "Labels", Value: labelText(i.GetLabels())}, {Key: "Created", Value: a.when(i.GetCreatedAt())},
		}
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.NIC, error) {
		r, err := c.NICs.List(ctx, &apiv1.ListNICsRequest{})
		return r.GetNics(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.NIC, error) {
		return c.NICs.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

func (a *app) nicCommand() *cobra.Command {
	n := a.nics()
	cmd := &cobra.Command{Use: "nic", Aliases: []string{"nics"}, Short: "VMs' ports on networks"}
	var list apiv1.ListNICsRequest
	ls := &cobra.Command{Use: "ls", Aliases: []string{"list"}, Short: "List NICs", Args: cobra.NoArgs,
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, _ []string) error {
			r, err := c.NICs.List(cmd.Context(), &list)
			if err != nil {
				return err
			}
			return n.print(r.GetNics())
		})}
	ls.Flags().StringVar(&list.Network, "network", "", "only those of this network")
	ls.Flags().StringVar(&list.Vm, "vm", "", "only those of this VM")
	a.networks().completeFlag(ls, "network")
	a.vms().completeFlag(ls, "vm")
	cmd.AddCommand(a.nicCreateCommand(), ls, n.showCommand(), a.nicUpdateCommand(),
		n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
			return c.NICs.Delete(ctx, r)
		}, nil))
	return cmd
}

func (a *app) nicCreateCommand() *cobra.Command {
	var req apiv1.CreateNICRequest
	var label []string
	cmd := &cobra.Command{Use: "create NAME --network NETWORK", Short: "Make a NIC; addresses are chosen unless given", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var err error
			req.Name = args[0]
			if req.Labels, err = labels(label); err != nil {
				return err
			}
			i, err := c.NICs.Create(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return a.nics().changed(i, "created ("+strings.Join(nonEmpty([]string{i.GetMac(), i.GetIpv4(), i.GetIpv6()}), ", ")+")")
		})}
	f := cmd.Flags()
	f.StringVar(&req.Network, "network", "", "the network")
	f.StringVar(&req.Mac, "mac", "", "hardware address")
	f.StringVar(&req.Ipv4, "ip", "", "IPv4 address of the network's subnet")
	f.StringVar(&req.Ipv6, "ip6", "", "IPv6 address of the network's subnet")
	f.StringSliceVar(&req.RoutedPrefixes, "route", nil, "prefixes that are routed to this NIC")
	f.StringSliceVar(&req.SecurityGroups, "sg", nil, "security groups")
	f.StringVar(&req.HostName, "host-name", "", "host name to announce by DHCP")
	must(cmd.MarkFlagRequired("network"))
	a.networks().completeFlag(cmd, "network")
	a.sgs().completeFlag(cmd, "sg")
	idFlag(cmd, &req.Id)
	labelFlag(cmd, &label)
	return cmd
}

func (a *app) nicUpdateCommand() *cobra.Command {
	var name string
	var routes, groups []string
	cmd := &cobra.Command{Use: "update NIC", Aliases: []string{"set"}, Short: "Change a NIC; works at once, also while its VM runs", Args: cobra.ExactArgs(1), ValidArgsFunction: a.nics().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			req := &apiv1.UpdateNICRequest{Ref: args[0], Name: name}
			if cmd.Flags().Changed("route") {
				req.RoutedPrefixes = &apiv1.StringList{Values: nonEmpty(routes)}
			}
			if cmd.Flags().Changed("sg") {
				req.SecurityGroups = &apiv1.StringList{Values: nonEmpty(groups)}
			}
			if cmd.Flags().NFlag() == 0 {
				return nothingToChange(cmd)
			}
			i, err := c.NICs.Update(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.nics().changed(i, "updated")
		})}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "new name")
	f.StringSliceVar(&routes, "route", nil, `prefixes that are routed to this NIC; "" for none`)
	f.StringSliceVar(&groups, "sg", nil, `security groups; "" for none`)
	a.sgs().completeFlag(cmd, "sg")
	return cmd
}
