package convert

import (
	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
)

var networkStates = map[net.State]string{net.StateCreated: "ready", net.StateConnected: "ready", net.StateError: "error"}
var nicStates = map[net.State]string{net.StateCreated: "created", net.StateConnected: "connected", net.StateError: "error"}
var attachModes = map[net.AttachMode]string{net.AttachTAPFD: "tap", net.AttachVhostUser: "vhost-user", net.AttachTAPName: "tap-name"}

// Network converts a network.
func Network(n net.Network) *apiv1.Network {
	return &apiv1.Network{Id: n.ID, Name: n.Name, Mode: n.Mode.String(), Subnet4: str(n.Subnet4), Subnet6: str(n.Subnet6), Gateway4: str(n.Gateway4),
		Gateway6: str(n.Gateway6), Dns: strs(n.DNS), Ntp: strs(n.NTP), Domain: n.Domain, Mtu: n.MTU, Bridge: n.Bridge, HostAccess: n.HostAccess,
		Labels: n.Labels, CreatedAt: Time(n.CreatedAt), State: networkStates[n.State], StateReason: n.StateReason, NicCount: n.NICCount, WorkerPid: n.WorkerPID}
}

// NIC converts a NIC; vm is the VM that has it, "" if none or not known.
func NIC(n net.NIC, vmID, vmName string) *apiv1.NIC {
	c := n.Counters
	out := &apiv1.NIC{Id: n.ID, Name: n.Name, NetworkId: n.NetworkID, NetworkName: n.NetworkName, Mac: n.MAC, Ipv4: str(n.IPv4), Ipv6: str(n.IPv6),
		RoutedPrefixes: strs(n.RoutedPrefixes), SecurityGroups: n.SecurityGroups, HostName: n.HostName, Labels: n.Labels, CreatedAt: Time(n.CreatedAt),
		State: nicStates[n.State], StateReason: n.StateReason, VmId: vmID, VmName: vmName, RxPackets: c.RxPackets, RxBytes: c.RxBytes, RxDropped: c.RxDropped,
		TxPackets: c.TxPackets, TxBytes: c.TxBytes, TxDropped: c.TxDropped, TxSpoofed: c.TxSpoofed}
	if n.VMID != "" {
		out.AttachMode = attachModes[n.AttachMode]
		if out.VmId == "" {
			out.VmId = n.VMID
		}
	}
	return out
}

// SecurityGroup converts a group.
func SecurityGroup(g net.SecurityGroup) *apiv1.SecurityGroup {
	out := &apiv1.SecurityGroup{Id: g.ID, Name: g.Name, Labels: g.Labels, CreatedAt: Time(g.CreatedAt), NicCount: g.NICCount}
	for _, r := range g.Rules {
		dir := "in"
		if r.Direction == net.Outbound {
			dir = "out"
		}
		out.Rules = append(out.Rules, &apiv1.Rule{Direction: dir, Protocol: r.Protocol, PortFrom: r.PortFrom, PortTo: r.PortTo, Cidr: str(r.CIDR), Group: r.GroupID})
	}
	return out
}

// Rules reads rules. group turns a group's ref into its id.
func Rules(in []*apiv1.Rule, group func(field, ref string) (string, error)) ([]net.Rule, error) {
	var out []net.Rule
	for i, r := range in {
		field := "rules[" + itoa(uint32(i)) + "]"
		rule := net.Rule{Protocol: r.GetProtocol(), PortFrom: r.GetPortFrom(), PortTo: r.GetPortTo()}
		switch r.GetDirection() {
		case "in":
			rule.Direction = net.Inbound
		case "out":
			rule.Direction = net.Outbound
		default:
			return nil, errs.Field(field+".direction", `write "in" or "out"`, "%q is not a direction", limit(r.GetDirection()))
		}
		if rule.Protocol == "" {
			rule.Protocol = "any"
		}
		if rule.PortFrom > 65535 || rule.PortTo > 65535 || rule.PortTo != 0 && rule.PortTo < rule.PortFrom {
			return nil, errs.Field(field+".port_from", "give ports from 0 to 65535, the lower first", "%d to %d is not a range of ports", rule.PortFrom, rule.PortTo)
		}
		var err error
		if rule.CIDR, err = Prefix(field+".cidr", r.GetCidr()); err != nil {
			return nil, err
		}
		if r.GetGroup() != "" {
			if r.GetCidr() != "" {
				return nil, errs.Field(field+".group", "give one of the two", "a rule names both a group and a subnet")
			}
			if rule.GroupID, err = group(field+".group", r.GetGroup()); err != nil {
				return nil, err
			}
		}
		out = append(out, rule)
	}
	return out, nil
}
