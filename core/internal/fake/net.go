package fake

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// Net is a net service in memory.
type Net struct {
	base
	w *World
}

// Net is the net service.
func (w *World) Net() *Net { return &Net{w: w} }

func (n *Net) CreateNetwork(ctx context.Context, req net.CreateNetworkRequest) (net.Network, error) {
	return do(ctx, n.w, "net.CreateNetwork", func() (net.Network, error) {
		for _, o := range n.w.networks {
			if o.Name == req.Name {
				if o.ID == req.ID {
					return o, nil
				}
				return o, errs.New(errs.Exists, "network %s", req.Name)
			}
		}
		v := net.Network{ID: req.ID, Name: req.Name, Mode: req.Mode, Subnet4: req.Subnet4, Subnet6: req.Subnet6, DNS: req.DNS, MTU: 1500, State: net.StateCreated, CreatedAt: now()}
		n.w.networks[req.ID] = v
		return v, nil
	})
}

func (n *Net) GetNetwork(ctx context.Context, req net.Ref) (net.Network, error) {
	return do(ctx, n.w, "net.GetNetwork", func() (net.Network, error) {
		for _, o := range n.w.networks {
			if o.ID == req.Ref || o.Name == req.Ref {
				return o, nil
			}
		}
		return net.Network{}, notFound("network", req.Ref)
	})
}

func (n *Net) ListNetworks(ctx context.Context) ([]net.Network, error) {
	return do(ctx, n.w, "net.ListNetworks", func() ([]net.Network, error) {
		return byName(n.w.networks, func(o net.Network) string { return o.Name }), nil
	})
}

func (n *Net) DeleteNetwork(ctx context.Context, req net.Ref) error {
	return run(ctx, n.w, "net.DeleteNetwork", func() error {
		for _, o := range n.w.nics {
			if o.NetworkID == req.Ref {
				return errs.New(errs.Precondition, "NICs are on it").Because("NETWORK_IN_USE")
			}
		}
		delete(n.w.networks, req.Ref)
		return nil
	})
}

func (w *World) nic(ref string) (*net.NIC, error) {
	for _, o := range w.nics {
		if o.ID == ref || o.Name == ref {
			return o, nil
		}
	}
	return nil, notFound("nic", ref)
}

func (n *Net) CreateNIC(ctx context.Context, req net.CreateNICRequest) (net.NIC, error) {
	return do(ctx, n.w, "net.CreateNIC", func() (net.NIC, error) {
		if req.Name == "" {
			req.Name = "nic-" + req.ID[len(req.ID)-8:]
		}
		if o, err := n.w.nic(req.Name); err == nil {
			if o.ID == req.ID {
				return *o, nil
			}
			return net.NIC{}, errs.New(errs.Exists, "nic %s", req.Name)
		}
		nw, ok := n.w.networks[req.NetworkID]
		if !ok {
			return net.NIC{}, notFound("network", req.NetworkID)
		}
		n.w.nextIP++
		o := &net.NIC{ID: req.ID, Name: req.Name, NetworkID: nw.ID, NetworkName: nw.Name, MAC: req.MAC, IPv4: req.IPv4, HostName: req.HostName,
			Labels: req.Labels, State: net.StateCreated, CreatedAt: now(), SecurityGroups: req.SecurityGroups}
		if o.MAC == "" {
			o.MAC = fmt.Sprintf("52:54:00:00:00:%02x", n.w.nextIP)
		}
		if !o.IPv4.IsValid() {
			o.IPv4 = netip.AddrFrom4([4]byte{10, 0, 0, n.w.nextIP})
		}
		n.w.nics[req.ID] = o
		return *o, nil
	})
}

func (n *Net) GetNIC(ctx context.Context, req net.Ref) (net.NIC, error) {
	return do(ctx, n.w, "net.GetNIC", func() (net.NIC, error) {
		o, err := n.w.nic(req.Ref)
		if err != nil {
			return net.NIC{}, err
		}
		return *o, nil
	})
}

func (n *Net) ListNICs(ctx context.Context, req net.ListNICsRequest) ([]net.NIC, error) {
	return do(ctx, n.w, "net.ListNICs", func() ([]net.NIC, error) {
		var out []net.NIC
		for _, o := range byName(n.w.nics, func(o *net.NIC) string { return o.Name }) {
			if (req.NetworkID == "" || o.NetworkID == req.NetworkID) && (req.VMID == "" || o.VMID == req.VMID) {
				out = append(out, *o)
			}
		}
		return out, nil
	})
}

func (n *Net) DeleteNIC(ctx context.Context, req net.Ref) error {
	return run(ctx, n.w, "net.DeleteNIC", func() error {
		o, err := n.w.nic(req.Ref)
		if err != nil {
			return nil
		}
		if o.VMID != "" {
			return errs.New(errs.Precondition, "attached").Because("NIC_IN_USE")
		}
		delete(n.w.nics, o.ID)
		return nil
	})
}

func (n *Net) Attach(ctx context.Context, req net.AttachRequest) (net.Attachment, error) {
	return do(ctx, n.w, "net.Attach", func() (net.Attachment, error) {
		o, err := n.w.nic(req.NICID)
		if err != nil {
			return net.Attachment{}, err
		}
		if o.VMID != "" && o.VMID != req.Owner.VMID {
			return net.Attachment{}, errs.New(errs.Precondition, "attached to %s", o.VMID).Because("NIC_IN_USE")
		}
		f, err := os.Open(os.DevNull)
		if err != nil {
			return net.Attachment{}, err
		}
		o.VMID, o.State, o.AttachMode = req.Owner.VMID, net.StateConnected, net.AttachTAPFD
		return net.Attachment{Mode: net.AttachTAPFD, TAP: []*os.File{f}, MAC: o.MAC, MTU: 1500, Queues: 1}, nil
	})
}

func (n *Net) Detach(ctx context.Context, req net.DetachRequest) error {
	return run(ctx, n.w, "net.Detach", func() error {
		if o := n.w.nics[req.NICID]; o != nil && o.VMID == req.VMID {
			o.VMID, o.State, o.AttachMode = "", net.StateCreated, 0
		}
		return nil
	})
}

func (n *Net) UpdateNetwork(ctx context.Context, req net.UpdateNetworkRequest) (net.Network, error) {
	return do(ctx, n.w, "net.UpdateNetwork", func() (net.Network, error) {
		if err := n.w.lacks(service.FeatureNetUpdate); err != nil {
			return net.Network{}, err
		}
		o := n.w.networks[req.Ref]
		if req.Name != "" {
			o.Name = req.Name
		}
		if req.SetDNS {
			o.DNS = req.DNS
		}
		n.w.networks[req.Ref] = o
		return o, nil
	})
}

func (n *Net) UpdateNIC(ctx context.Context, req net.UpdateNICRequest) (net.NIC, error) {
	return do(ctx, n.w, "net.UpdateNIC", func() (net.NIC, error) {
		o, err := n.w.nic(req.Ref)
		if err != nil {
			return net.NIC{}, err
		}
		if req.Name != "" {
			o.Name = req.Name
		}
		if req.SetSecurityGroups {
			o.SecurityGroups = req.SecurityGroups
		}
		return *o, nil
	})
}

func (n *Net) CreateSecurityGroup(ctx context.Context, req net.CreateSecurityGroupRequest) (net.SecurityGroup, error) {
	return do(ctx, n.w, "net.CreateSecurityGroup", func() (net.SecurityGroup, error) {
		g := net.SecurityGroup{ID: req.ID, Name: req.Name, Rules: req.Rules, CreatedAt: now()}
		n.w.groups[req.ID] = g
		return g, nil
	})
}

func (n *Net) GetSecurityGroup(ctx context.Context, req net.Ref) (net.SecurityGroup, error) {
	return do(ctx, n.w, "net.GetSecurityGroup", func() (net.SecurityGroup, error) {
		for _, g := range n.w.groups {
			if g.ID == req.Ref || g.Name == req.Ref {
				return g, nil
			}
		}
		return net.SecurityGroup{}, notFound("security group", req.Ref)
	})
}

func (n *Net) ListSecurityGroups(ctx context.Context) ([]net.SecurityGroup, error) {
	return do(ctx, n.w, "net.ListSecurityGroups", func() ([]net.SecurityGroup, error) {
		return byName(n.w.groups, func(g net.SecurityGroup) string { return g.Name }), nil
	})
}

func (n *Net) SetSecurityGroupRules(ctx context.Context, req net.SetSecurityGroupRulesRequest) (net.SecurityGroup, error) {
	return do(ctx, n.w, "net.SetSecurityGroupRules", func() (net.SecurityGroup, error) {
		g := n.w.groups[req.Ref]
		g.Rules = req.Rules
		n.w.groups[req.Ref] = g
		return g, nil
	})
}

func (n *Net) DeleteSecurityGroup(ctx context.Context, req net.Ref) error {
	return run(ctx, n.w, "net.DeleteSecurityGroup", func() error { delete(n.w.groups, req.Ref); return nil })
}
