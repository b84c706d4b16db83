package api

import (
	"context"
	stdnet "net"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

type networksAPI struct {
	apiv1.UnimplementedNetworksServer
	*Server
}

func (a *networksAPI) List(ctx context.Context, _ *apiv1.ListNetworksRequest) (*apiv1.ListNetworksResponse, error) {
	all, err := a.net.ListNetworks(ctx)
	if err != nil {
		return nil, err
	}
	out := &apiv1.ListNetworksResponse{}
	for _, n := range all {
		out.Networks = append(out.Networks, convert.Network(n))
	}
	return out, nil
}

func (a *networksAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.Network, error) {
	n, err := a.findNetwork(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	return convert.Network(n), nil
}

func (a *networksAPI) after(ctx context.Context, id string, op operation.Operation, err error) (*apiv1.Network, error) {
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return a.Get(ctx, &apiv1.RefRequest{Ref: id})
}

func (a *networksAPI) Create(ctx context.Context, req *apiv1.CreateNetworkRequest) (*apiv1.Network, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	create := net.CreateNetworkRequest{ID: id, Name: req.GetName(), Mode: net.ParseMode(req.GetMode()), Domain: req.GetDomain(), MTU: req.GetMtu(),
		Bridge: req.GetBridge(), HostAccess: req.GetHostAccess(), Labels: req.GetLabels()}
	if err := ident.CheckName("name", create.Name); err != nil {
		return nil, err
	}
	if create.Mode == 0 {
		return nil, errs.Field("mode", `write "private", "nat" or "bridge"`, "%s is not a mode of a network", ident.Quote(req.GetMode()))
	}
	if err := checkLabels(create.Labels); err != nil {
		return nil, err
	}
	if create.Subnet4, err = convert.Prefix("subnet4", req.GetSubnet4()); err != nil {
		return nil, err
	}
	if create.Subnet4.IsValid() && !create.Subnet4.Addr().Is4() {
		return nil, errs.Field("subnet4", "give IPv6 as subnet6", "%s is not an IPv4 subnet", create.Subnet4)
	}
	if create.Subnet6, err = convert.Prefix("subnet6", req.GetSubnet6()); err != nil {
		return nil, err
	}
	if create.Subnet6.IsValid() && !create.Subnet6.Addr().Is6() {
		return nil, errs.Field("subnet6", "give IPv4 as subnet4", "%s is not an IPv6 subnet", create.Subnet6)
	}
	if create.DNS, err = convert.Addrs("dns", req.GetDns()); err != nil {
		return nil, err
	}
	if create.NTP, err = convert.Addrs("ntp", req.GetNtp()); err != nil {
		return nil, err
	}
	call, err := a.again(ctx, "network", req.GetId(), func(ctx context.Context) error { _, err := a.net.GetNetwork(ctx, net.Ref{Ref: id}); return err })
	if err != nil {
		return nil, err
	}
	op, err := a.changes.CreateNetwork(ctx, call, create)
	return a.after(ctx, id, op, err)
}

func (a *networksAPI) Update(ctx context.Context, req *apiv1.UpdateNetworkRequest) (*apiv1.Network, error) {
	n, err := a.findNetwork(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	u := net.UpdateNetworkRequest{Ref: n.ID, Name: req.GetName(), MTU: req.GetMtu()}
	if u.Name != "" {
		if err := ident.CheckName("name", u.Name); err != nil {
			return nil, err
		}
	}
	if req.Dns != nil {
		u.SetDNS = true
		if u.DNS, err = convert.Addrs("dns", req.Dns.GetValues()); err != nil {
			return nil, err
		}
	}
	if req.Ntp != nil {
		u.SetNTP = true
		if u.NTP, err = convert.Addrs("ntp", req.Ntp.GetValues()); err != nil {
			return nil, err
		}
	}
	if req.Domain != nil {
		u.SetDomain, u.Domain = true, req.GetDomain()
	}
	if req.HostAccess != nil {
		u.SetHost, u.HostAccess = true, req.GetHostAccess()
	}
	op, err := a.changes.UpdateNetwork(ctx, a.call(ctx), n, u)
	return a.after(ctx, n.ID, op, err)
}

func (a *networksAPI) Delete(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	n, err := a.findNetwork(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	removed := []string{"network " + n.Name}
	if req.GetDryRun() {
		if n.NICCount > 0 {
			return nil, errs.New(errs.Precondition, "NICs are on it: %d", n.NICCount).With(errs.Resource{Type: "network", ID: n.ID, Name: n.Name}).
				Because("NETWORK_IN_USE").Do("mvirt nic ls --network " + n.Name + " lists them; delete them first")
		}
		return &apiv1.DeleteResponse{Removed: removed}, nil
	}
	op, err := a.changes.DeleteNetwork(ctx, a.call(ctx), n)
	return deleted(ctx, op, removed, err)
}

type nicsAPI struct {
	apiv1.UnimplementedNICsServer
	*Server
}

// owners tells by NIC which VM has it.
func (a *nicsAPI) owners(ctx context.Context) map[string][2]string {
	out := map[string][2]string{}
	for _, vm := range a.lookup.vms(ctx) {
		for _, n := range vm.Spec.NICs {
			out[n.NICID] = [2]string{vm.ID, vm.Spec.Name}
		}
	}
	return out
}

func (a *nicsAPI) List(ctx context.Context, req *apiv1.ListNICsRequest) (*apiv1.ListNICsResponse, error) {
	q := net.ListNICsRequest{}
	vmID := ""
	if req.GetNetwork() != "" {
		n, err := a.findNetwork(ctx, "network", req.GetNetwork())
		if err != nil {
			return nil, err
		}
		q.NetworkID = n.ID
	}
	if req.GetVm() != "" {
		vm, err := a.findVM(ctx, "vm", req.GetVm())
		if err != nil {
			return nil, err
		}
		vmID = vm.ID
	}
	all, err := a.net.ListNICs(ctx, q)
	if err != nil {
		return nil, err
	}
	owners := a.owners(ctx)
	out := &apiv1.ListNICsResponse{}
	for _, n := range all {
		o := owners[n.ID]
		if vmID != "" && o[0] != vmID && n.VMID != vmID {
			continue
		}
		out.Nics = append(out.Nics, convert.NIC(n, o[0], o[1]))
	}
	return out, nil
}

func (a *nicsAPI) show(ctx context.Context, n net.NIC) *apiv1.NIC {
	o := a.owners(ctx)[n.ID]
	return convert.NIC(n, o[0], o[1])
}

func (a *nicsAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.NIC, error) {
	n, err := a.findNIC(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	return a.show(ctx, n), nil
}

func (a *nicsAPI) after(ctx context.Context, id string, op operation.Operation, err error) (*apiv1.NIC, error) {
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return a.Get(ctx, &apiv1.RefRequest{Ref: id})
}

func (a *nicsAPI) Create(ctx context.Context, req *apiv1.CreateNICRequest) (*apiv1.NIC, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	create := net.CreateNICRequest{ID: id, Name: req.GetName(), MAC: req.GetMac(), HostName: req.GetHostName(), Labels: req.GetLabels()}
	if create.Name != "" {
		if err := ident.CheckName("name", create.Name); err != nil {
			return nil, err
		}
	}
	if create.MAC != "" {
		if m, err := stdnet.ParseMAC(create.MAC); err != nil || len(m) != 6 || m[0]&1 != 0 {
			return nil, errs.Field("mac", "write it like 52:54:00:12:34:56; the second digit must be even (unicast)", "%s is not a MAC address for a NIC", ident.Quote(create.MAC))
		}
	}
	if err := checkLabels(create.Labels); err != nil {
		return nil, err
	}
	if create.IPv4, err = convert.Addr("ipv4", req.GetIpv4()); err != nil {
		return nil, err
	}
	if create.IPv6, err = convert.Addr("ipv6", req.GetIpv6()); err != nil {
		return nil, err
	}
	if create.RoutedPrefixes, err = convert.Prefixes("routed_prefixes", req.GetRoutedPrefixes()); err != nil {
		return nil, err
	}
	n, err := a.findNetwork(ctx, "network", req.GetNetwork())
	if err != nil {
		return nil, err
	}
	create.NetworkID = n.ID
	if create.SecurityGroups, err = a.groupIDs(ctx, "security_groups", req.GetSecurityGroups()); err != nil {
		return nil, err
	}
	call, err := a.again(ctx, "nic", req.GetId(), func(ctx context.Context) error { _, err := a.net.GetNIC(ctx, net.Ref{Ref: id}); return err })
	if err != nil {
		return nil, err
	}
	op, err := a.changes.CreateNIC(ctx, call, create)
	return a.after(ctx, id, op, err)
}

func (a *nicsAPI) Update(ctx context.Context, req *apiv1.UpdateNICRequest) (*apiv1.NIC, error) {
	n, err := a.findNIC(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	u := net.UpdateNICRequest{Ref: n.ID, Name: req.GetName()}
	if u.Name != "" {
		if err := ident.CheckName("name", u.Name); err != nil {
			return nil, err
		}
	}
	if req.RoutedPrefixes != nil {
		u.SetRoutedPrefixes = true
		if u.RoutedPrefixes, err = convert.Prefixes("routed_prefixes", req.RoutedPrefixes.GetValues()); err != nil {
			return nil, err
		}
	}
	if req.SecurityGroups != nil {
		u.SetSecurityGroups = true
		if u.SecurityGroups, err = a.groupIDs(ctx, "security_groups", req.SecurityGroups.GetValues()); err != nil {
			return nil, err
		}
	}
	op, err := a.changes.UpdateNIC(ctx, a.call(ctx), n, u)
	return a.after(ctx, n.ID, op, err)
}

func (a *nicsAPI) Delete(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	n, err := a.findNIC(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	op, removed, err := a.changes.DeleteNIC(ctx, a.call(ctx), n.ID, req.GetDryRun())
	return deleted(ctx, op, removed, err)
}

type groupsAPI struct {
	apiv1.UnimplementedSecurityGroupsServer
	*Server
}

func (a *groupsAPI) List(ctx context.Context, _ *apiv1.ListSecurityGroupsRequest) (*apiv1.ListSecurityGroupsResponse, error) {
	all, err := a.net.ListSecurityGroups(ctx)
	if err != nil {
		return nil, err
	}
	out := &apiv1.ListSecurityGroupsResponse{}
	for _, g := range all {
		out.SecurityGroups = append(out.SecurityGroups, convert.SecurityGroup(g))
	}
	return out, nil
}

func (a *groupsAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.SecurityGroup, error) {
	g, err := a.findGroup(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	return convert.SecurityGroup(g), nil
}

// rules reads rules; self is the group they are for, which they may name although it is not there yet.
func (a *groupsAPI) rules(ctx context.Context, in []*apiv1.Rule, selfID, selfName string) ([]net.Rule, error) {
	return convert.Rules(in, func(field, ref string) (string, error) {
		if ref == selfID || ref == selfName {
			return selfID, nil
		}
		g, err := a.findGroup(ctx, field, ref)
		return g.ID, err
	})
}

func (a *groupsAPI) Create(ctx context.Context, req *apiv1.CreateSecurityGroupRequest) (*apiv1.SecurityGroup, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := checkLabels(req.GetLabels()); err != nil {
		return nil, err
	}
	rules, err := a.rules(ctx, req.GetRules(), id, req.GetName())
	if err != nil {
		return nil, err
	}
	create := net.CreateSecurityGroupRequest{ID: id, Name: req.GetName(), Rules: rules, Labels: req.GetLabels()}
	call, err := a.again(ctx, "group", req.GetId(), func(ctx context.Context) error { _, err := a.net.GetSecurityGroup(ctx, net.Ref{Ref: id}); return err })
	if err != nil {
		return nil, err
	}
	op, err := a.changes.CreateGroup(ctx, call, create)
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return a.Get(ctx, &apiv1.RefRequest{Ref: id})
}

func (a *groupsAPI) SetRules(ctx context.Context, req *apiv1.SetSecurityGroupRulesRequest) (*apiv1.SecurityGroup, error) {
	g, err := a.findGroup(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	rules, err := a.rules(ctx, req.GetRules(), g.ID, g.Name)
	if err != nil {
		return nil, err
	}
	op, err := a.changes.SetGroupRules(ctx, a.call(ctx), g, net.SetSecurityGroupRulesRequest{Ref: g.ID, Rules: rules})
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return a.Get(ctx, &apiv1.RefRequest{Ref: g.ID})
}

func (a *groupsAPI) Delete(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	g, err := a.findGroup(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	removed := []string{"security group " + g.Name}
	if req.GetDryRun() {
		return &apiv1.DeleteResponse{Removed: removed}, nil
	}
	op, err := a.changes.DeleteGroup(ctx, a.call(ctx), g)
	return deleted(ctx, op, removed, err)
}
