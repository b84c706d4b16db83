// Package net is the contract of net plugins: networks, NICs, security groups.
//
// # Words
//
// A network is an isolated routing domain; two networks may use the same subnet. A NIC is one VM's port on
// a network: a MAC and an address per family. VMs never share layer 2: each has a gateway, 169.254.0.1 and
// fe80::1, that looks the same everywhere. To attach a NIC is to hand its data path to one hypervisor.
//
//	CreateNetwork(lan, nat, 10.0.0.0/24)
//	CreateNIC(web-0, lan) → 52:54:00:…, 10.0.0.2
//	Attach(web-0, VM web, uid, [tap fd]) → descriptors, MTU
//	Detach(web-0, VM web); DeleteNIC(web-0); DeleteNetwork(lan)
//
// Networks and NICs are durable; after a restart of plugin or host all come back by themselves, and
// attachments of running VMs go on working meanwhile.
package net

import (
	"context"
	"net/netip"
	"os"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
)

// Service is the net contract.
type Service interface {
	service.Base

	// CreateNetwork makes a network. Kinds: Invalid (name, subnet, mode, MTU), Exists, Unsupported (a mode
	// or a family that the plugin lacks).
	CreateNetwork(ctx context.Context, req CreateNetworkRequest) (Network, error)
	GetNetwork(ctx context.Context, req Ref) (Network, error)
	ListNetworks(ctx context.Context) ([]Network, error)
	// DeleteNetwork fails with Precondition (NETWORK_IN_USE, names in the message) while NICs are on it.
	DeleteNetwork(ctx context.Context, req Ref) error

	// CreateNIC allocates MAC and addresses, chosen or free ones, in one transaction. Kinds: Invalid
	// (address outside the subnet, bad MAC), NotFound (network), Exists (name; address or MAC taken, Reason
	// ADDRESS_IN_USE or MAC_IN_USE), Exhausted (SUBNET_FULL).
	CreateNIC(ctx context.Context, req CreateNICRequest) (NIC, error)
	GetNIC(ctx context.Context, req Ref) (NIC, error)
	// ListNICs lists those of one network, or all with an empty NetworkID.
	ListNICs(ctx context.Context, req ListNICsRequest) ([]NIC, error)
	// DeleteNIC releases the addresses. Precondition (NIC_IN_USE) while attached.
	DeleteNIC(ctx context.Context, req Ref) error

	// Attach makes the data path for a hypervisor, by the first of Modes that the plugin can do. Attaching
	// again for the same owner gives a new handle to the same path; for another VM: Precondition (NIC_IN_USE).
	Attach(ctx context.Context, req AttachRequest) (Attachment, error)
	// Detach takes the data path down.
	Detach(ctx context.Context, req DetachRequest) error
}

// Ref names an object by its id or, where it is no id, by its name.
type Ref struct {
	Ref string
}

// Mode of a network. On the wire: append only.
type Mode uint32

// Modes.
const (
	ModePrivate Mode = 1 // NICs reach each other
	ModeNAT     Mode = 2 // and the outside, behind the host's address
	ModeBridge  Mode = 3 // NICs join an existing bridge of the host; our routing and DHCP stay out
)

var modeNames = map[Mode]string{ModePrivate: "private", ModeNAT: "nat", ModeBridge: "bridge"}

// String is "private", "nat", "bridge" or "?".
func (m Mode) String() string {
	if n, ok := modeNames[m]; ok {
		return n
	}
	return "?"
}

// ParseMode reads what String writes; 0 for anything else.
func ParseMode(s string) Mode {
	for m, n := range modeNames {
		if n == s {
			return m
		}
	}
	return 0
}

// CreateNetworkRequest asks for a network.
type CreateNetworkRequest struct {
	ID         string
	Name       string
	Mode       Mode
	Subnet4    netip.Prefix // zero: no IPv4. /8 to /30; host bits must be zero
	Subnet6    netip.Prefix // zero: no IPv6
	DNS        []netip.Addr // announced; empty: none
	NTP        []netip.Addr
	Domain     string // announced search domain, or ""
	MTU        uint32 // 0: 1500; 1280 to 9000
	Bridge     string // mode bridge: the host's bridge
	HostAccess bool   // mode nat: the host itself may open connections to the NICs
	Labels     map[string]string
}

// Network is a network as it is now.
type Network struct {
	ID          string
	Name        string
	Mode        Mode
	Subnet4     netip.Prefix
	Subnet6     netip.Prefix
	Gateway4    netip.Addr // link-local, the same on every network
	Gateway6    netip.Addr
	DNS         []netip.Addr
	NTP         []netip.Addr
	Domain      string
	MTU         uint32
	Bridge      string
	HostAccess  bool
	Labels      map[string]string
	CreatedAt   time.Time
	State       State
	StateReason string
	NICCount    uint32
	WorkerPID   uint32 // packet worker, 0 if none runs
}

// State of a network or NIC. On the wire: append only.
type State uint32

// States.
const (
	StateCreated   State = 1 // NIC: not attached; network: ready
	StateConnected State = 2 // NIC: attached and its data path is up
	StateError     State = 3 // StateReason says why
)

// CreateNICRequest asks for a NIC. Empty addresses are allocated.
type CreateNICRequest struct {
	ID             string
	Name           string // "" : derived from the id
	NetworkID      string // id or name
	MAC            string // "" : one is made; unicast, "52:54:00:12:34:56"
	IPv4           netip.Addr
	IPv6           netip.Addr
	RoutedPrefixes []netip.Prefix // also reach this NIC, and may be sent from
	SecurityGroups []string       // ids or names
	HostName       string         // told to the guest by DHCP
	Labels         map[string]string
}

// NIC is a NIC as it is now.
type NIC struct {
	ID             string
	Name           string
	NetworkID      string
	NetworkName    string
	MAC            string
	IPv4           netip.Addr
	IPv6           netip.Addr
	RoutedPrefixes []netip.Prefix
	SecurityGroups []string // ids
	HostName       string
	Labels         map[string]string
	CreatedAt      time.Time
	State          State
	StateReason    string
	LinkDown       bool   // told to be unplugged, see UpdateNICRequest
	VMID           string // attached to, or ""
	AttachMode     AttachMode
	Counters       Counters
}

// Counters of a NIC, seen from the guest: Rx is what it received. They start at zero with the attachment.
type Counters struct {
	RxPackets uint64
	RxBytes   uint64
	RxDropped uint64
	TxPackets uint64
	TxBytes   uint64
	TxDropped uint64 // for want of room or a route
	TxSpoofed uint64 // not the guest's to send
}

// ListNICsRequest narrows a list of NICs.
type ListNICsRequest struct {
	NetworkID string // id or name, or empty
	VMID      string // or empty
}

// AttachMode is a kind of data path. On the wire: append only.
type AttachMode uint32

// Attach modes.
const (
	AttachTAPFD     AttachMode = 1 // descriptors of a TAP with virtio-net headers
	AttachVhostUser AttachMode = 2 // a socket, the plugin is the back-end and listens
	AttachTAPName   AttachMode = 3 // a persistent TAP that Owner.UID may open by name
)

// AttachRequest asks for a NIC's data path.
type AttachRequest struct {
	NICID  string
	Owner  service.Owner
	Modes  []AttachMode // what the hypervisor can do, best first
	Queues uint32       // pairs; 0: 1
}

// Attachment is a data path.
type Attachment struct {
	Mode       AttachMode
	TAP        []*os.File // AttachTAPFD: one a queue pair; IFF_VNET_HDR set, header of 12 bytes
	SocketPath string     // AttachVhostUser
	TAPName    string     // AttachTAPName
	MAC        string
	MTU        uint32
	Queues     uint32
}

// DetachRequest asks to take a VM's data path down.
type DetachRequest struct {
	NICID string
	VMID  string
}

// Updater is the optional feature FeatureNetUpdate. Changes reach live NICs.
type Updater interface {
	UpdateNetwork(ctx context.Context, req UpdateNetworkRequest) (Network, error)
	UpdateNIC(ctx context.Context, req UpdateNICRequest) (NIC, error)
}

// UpdateNetworkRequest replaces what is not nil.
type UpdateNetworkRequest struct {
	Ref        string
	Name       string // "" : as it is
	SetDNS     bool   // replace DNS by the list below, also by an empty one
	DNS        []netip.Addr
	SetNTP     bool
	NTP        []netip.Addr
	SetDomain  bool
	Domain     string
	MTU        uint32 // 0: as it is; what guests learn at their next lease
	SetHost    bool
	HostAccess bool
}

// UpdateNICRequest replaces what its Set flag says.
type UpdateNICRequest struct {
	Ref               string
	Name              string // "" : as it is
	SetRoutedPrefixes bool
	RoutedPrefixes    []netip.Prefix
	SetSecurityGroups bool
	SecurityGroups    []string
	// SetLink replaces whether the link is down, as if a cable were pulled: nothing passes either way, and
	// guests are told where the attach mode can (VIRTIO_NET_F_STATUS).
	SetLink  bool
	LinkDown bool
}

// IPv6er marks the optional feature FeatureNetIPv6.
type IPv6er interface{ SupportsIPv6() }

// Bridger marks the optional feature FeatureNetBridge.
type Bridger interface{ SupportsBridge() }

// VhostUserer marks the optional feature FeatureNetVhostUser.
type VhostUserer interface{ SupportsVhostUser() }

// SecurityGrouper is the optional feature FeatureNetSecurity. A NIC without groups is open; with any group
// attached, inbound is denied unless a rule allows it, and outbound is allowed unless an outbound rule
// exists. Rules are stateful: replies pass.
type SecurityGrouper interface {
	CreateSecurityGroup(ctx context.Context, req CreateSecurityGroupRequest) (SecurityGroup, error)
	GetSecurityGroup(ctx context.Context, req Ref) (SecurityGroup, error)
	ListSecurityGroups(ctx context.Context) ([]SecurityGroup, error)
	// SetSecurityGroupRules replaces all rules at once.
	SetSecurityGroupRules(ctx context.Context, req SetSecurityGroupRulesRequest) (SecurityGroup, error)
	// DeleteSecurityGroup fails with Precondition (GROUP_IN_USE) while a NIC or a rule names it.
	DeleteSecurityGroup(ctx context.Context, req Ref) error
}

// CreateSecurityGroupRequest asks for a group.
type CreateSecurityGroupRequest struct {
	ID     string
	Name   string
	Rules  []Rule
	Labels map[string]string
}

// SetSecurityGroupRulesRequest replaces a group's rules.
type SetSecurityGroupRulesRequest struct {
	Ref   string
	Rules []Rule
}

// SecurityGroup is a set of rules that NICs share.
type SecurityGroup struct {
	ID        string
	Name      string
	Rules     []Rule
	Labels    map[string]string
	CreatedAt time.Time
	NICCount  uint32
}

// Direction of a rule, seen from the guest. On the wire: append only.
type Direction uint32

// Directions.
const (
	Inbound  Direction = 1
	Outbound Direction = 2
)

// Rule allows traffic.
type Rule struct {
	Direction Direction
	Protocol  string       // "tcp", "udp", "icmp", "icmpv6", "any" or a number
	PortFrom  uint32       // destination; 0 and 0: all. For icmp: type
	PortTo    uint32       // inclusive; 0: PortFrom
	CIDR      netip.Prefix // peer; zero: any
	GroupID   string       // or: peers in this group, id or name
}

// Backuper is the optional feature FeatureNetBackup.
type Backuper = service.Backuper
