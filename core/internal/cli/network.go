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

func (a *app) networks() *noun[*apiv1.Network] {
	n := newNoun[*apiv1.Network](a, "network")
	n.columns = []render.Column[*apiv1.Network]{
		{Head: "NAME", Cell: n.label},
		{Head: "MODE", Cell: (*apiv1.Network).GetMode},
		{Head: "IPV4", Cell: (*apiv1.Network).GetSubnet4},
		{Head: "IPV6", Cell: (*apiv1.Network).GetSubnet6},
		{Head: "NICS", Right: true, Cell: func(w *apiv1.Network) string { return fmt.Sprint(w.GetNicCount()) }},
		{Head: "STATE", Cell: func(w *apiv1.Network) string { return state(w.GetState(), w.GetStateReason()) },
			Color: func(w *apiv1.Network) render.Color { return render.State(w.GetState()) }},
		{Head: "AGE", Right: true, Cell: func(w *apiv1.Network) string { return a.age(w.GetCreatedAt()) }},
		{Head: "HOST", Wide: true, Cell: func(w *apiv1.Network) string { return yes(w.GetHostAccess()) }},
		{Head: "DNS", Wide: true, Cell: func(w *apiv1.Network) string { return strings.Join(w.GetDns(), ",") }},
		{Head: "MTU", Wide: true, Right: true, Cell: func(w *apiv1.Network) string { return fmt.Sprint(w.GetMtu()) }},
		{Head: "LABELS", Wide: true, Cell: func(w *apiv1.Network) string { return labelText(w.GetLabels()) }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.detail = func(w *apiv1.Network) []render.Pair {
		p := []render.Pair{
			{Key: "Name", Value: w.GetName()}, {Key: "Id", Value: w.GetId()}, {Key: "Mode", Value: w.GetMode()},
			{Key: "State", Value: state(w.GetState(), w.GetStateReason()), Color: render.State(w.GetState())},
			{Key: "IPv4", Value: w.GetSubnet4()}, {Key: "IPv4 gateway", Value: w.GetGateway4()},
			{Key: "IPv6", Value: w.GetSubnet6()}, {Key: "IPv6 gateway", Value: w.GetGateway6()},
			{Key: "DNS", Value: strings.Join(w.GetDns(), ", ")}, {Key: "NTP", Value: strings.Join(w.GetNtp(), ", ")}, {Key: "Domain", Value: w.GetDomain()},
			{Key: "MTU", Value: fmt.Sprint(w.GetMtu())}, {Key: "Bridge", Value: w.GetBridge()}, {Key: "Host may reach it", Value: yes(w.GetHostAccess())},
			{Key: "NICs", Value: fmt.Sprint(w.GetNicCount())},
		}
		if w.GetWorkerPid() != 0 {
			p = append(p, render.Pair{Key: "Packet worker", Value: fmt.Sprintf("pid %d", w.GetWorkerPid())})
		}
		return append(p, render.Pair{Key: "Labels", Value: labelText(w.GetLabels())}, render.Pair{Key: "Created", Value: a.when(w.GetCreatedAt())})
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.Network, error) {
		r, err := c.Networks.List(ctx, &apiv1.ListNetworksRequest{})
		return r.GetNetworks(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.Network, error) {
		return c.Networks.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

func (a *app) networkCommand() *cobra.Command {
	n := a.networks()
	cmd := &cobra.Command{Use: "network", Aliases: []string{"networks", "net"}, Short: "Isolated networks"}
	cmd.AddCommand(a.networkCreateCommand(), n.lsCommand(), n.showCommand(), a.networkUpdateCommand(),
		n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
			return c.Networks.Delete(ctx, r)
		}, nil))
	return cmd
}

func (a *app) networkCreateCommand() *cobra.Command {
	var req apiv1.CreateNetworkRequest
	var label []string
	var nat, private bool
	cmd := &cobra.Command{Use: "create NAME", Short: "Make a network", Args: cobra.ExactArgs(1),
		Example: "  mvirt network create lan --nat --ipv4 10.7.0.0/24\n  mvirt network create back --ipv4 10.8.0.0/24\n  mvirt network create office --mode bridge --bridge br0",
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var err error
			req.Name = args[0]
			switch {
			case nat:
				req.Mode = "nat"
			case private:
				req.Mode = "private"
			}
			if req.Labels, err = labels(label); err != nil {
				return err
			}
			w, err := c.Networks.Create(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return a.networks().changed(w, "created")
		})}
	f := cmd.Flags()
	f.StringVar(&req.Mode, "mode", "private", "private, nat (reaches out through the host) or bridge")
	f.BoolVar(&nat, "nat", false, "the same as --mode nat")
	f.BoolVar(&private, "private", false, "the same as --mode private")
	cmd.MarkFlagsMutuallyExclusive("mode", "nat", "private")
	f.StringVar(&req.Subnet4, "ipv4", "", "IPv4 subnet: 10.7.0.0/24")
	f.StringVar(&req.Subnet6, "ipv6", "", "IPv6 subnet: fd00:7::/64")
	f.StringVar(&req.Subnet4, "subnet", "", "the same as --ipv4")
	cmd.MarkFlagsMutuallyExclusive("ipv4", "subnet")
	f.StringSliceVar(&req.Dns, "dns", nil, "name servers to announce")
	f.StringSliceVar(&req.Ntp, "ntp", nil, "time servers to announce")
	f.StringVar(&req.Domain, "domain", "", "domain to announce")
	f.Uint32Var(&req.Mtu, "mtu", 0, "largest packet in bytes (default: the plugin's choice)")
	f.StringVar(&req.Bridge, "bridge", "", "host bridge, for mode bridge")
	f.BoolVar(&req.HostAccess, "host-access", false, "the host may open connections to the VMs")
	must(cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions([]string{"private", "nat", "bridge"}, cobra.ShellCompDirectiveNoFileComp)))
	idFlag(cmd, &req.Id)
	labelFlag(cmd, &label)
	return cmd
}

func (a *app) networkUpdateCommand() *cobra.Command {
	var dns, ntp []string
	var domain, name string
	var mtu uint32
	var host bool
	cmd := &cobra.Command{Use: "update NETWORK", Aliases: []string{"set"}, Short: "Change a network; its VMs learn of it", Args: cobra.ExactArgs(1), ValidArgsFunction: a.networks().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			req := &apiv1.UpdateNetworkRequest{Ref: args[0], Name: name, Mtu: mtu}
			set := cmd.Flags().Changed
			if set("dns") {
				req.Dns = &apiv1.StringList{Values: nonEmpty(dns)}
			}
			if set("ntp") {
				req.Ntp = &apiv1.StringList{Values: nonEmpty(ntp)}
			}
			if set("domain") {
				req.Domain = &domain
			}
			if set("host-access") {
				req.HostAccess = &host
			}
			if cmd.Flags().NFlag() == 0 {
				return nothingToChange(cmd)
			}
			w, err := c.Networks.Update(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.networks().changed(w, "updated")
		})}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "new name")
	f.StringSliceVar(&dns, "dns", nil, `name servers to announce; "" for none`)
	f.StringSliceVar(&ntp, "ntp", nil, `time servers to announce; "" for none`)
	f.StringVar(&domain, "domain", "", "domain to announce")
	f.Uint32Var(&mtu, "mtu", 0, "largest packet in bytes")
	f.BoolVar(&host, "host-access", false, "whether the host may open connections to the VMs")
	return cmd
}
