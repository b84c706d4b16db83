package sdktest

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	mnet "github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// Net is a net.Service that allocates and keeps, and moves no packets: what it attaches is one end of a
// socket pair.
type Net struct {
	dir string

	mu sync.Mutex
	st netState
}

type netState struct {
	Networks table[mnet.CreateNetworkRequest, mnet.Network]
	NICs     table[mnet.CreateNICRequest, mnet.NIC]
}

var (
	_ mnet.Service = (*Net)(nil)
	_ mnet.Updater = (*Net)(nil)
)

// NewNet opens the fake in dir.
func NewNet(dir string) (*Net, error) {
	n := &Net{dir: dir}
	n.st.Networks = newTable[mnet.CreateNetworkRequest]("network", func(v *mnet.Network) string { return v.Name })
	n.st.NICs = newTable[mnet.CreateNICRequest]("nic", func(v *mnet.NIC) string { return v.Name })
	return n, load(dir, &n.st)
}

// Health implements service.Base.
func (n *Net) Health(context.Context) (service.Health, error) { return service.Health{}, nil }

// Shutdown implements service.Base.
func (n *Net) Shutdown(context.Context) error { return nil }

func (n *Net) networkLocked(v mnet.Network) mnet.Network {
	v.NICCount = 0
	for _, r := range n.st.NICs.Objects {
		if r.V.NetworkID == v.ID {
			v.NICCount++
		}
	}
	return v
}

// CreateNetwork implements net.Service.
func (n *Net) CreateNetwork(_ context.Context, req mnet.CreateNetworkRequest) (mnet.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	old, err := n.st.Networks.create(req.ID, req.Name, req)
	if err != nil {
		return mnet.Network{}, err
	}
	if old != nil {
		return n.networkLocked(old.V), nil
	}
	mtu := req.MTU
	if mtu == 0 {
		mtu = 1500
	}
	switch {
	case req.Mode == mnet.ModeBridge:
		return mnet.Network{}, errs.New(errs.Unsupported, "networks of mode bridge are not supported")
	case req.Mode != mnet.ModePrivate && req.Mode != mnet.ModeNAT:
		return mnet.Network{}, errs.Field("mode", "give private or nat", "mode %d is not one", req.Mode)
	case req.Subnet6.IsValid():
		return mnet.Network{}, errs.New(errs.Unsupported, "IPv6 is not supported")
	case !req.Subnet4.IsValid() || !req.Subnet4.Addr().Is4() || req.Subnet4 != req.Subnet4.Masked() || req.Subnet4.Bits() < 8 || req.Subnet4.Bits() > 30:
		return mnet.Network{}, errs.Field("subnet4", "give a subnet of /8 to /30 without host bits, like 10.0.0.0/24", "subnet4 %s cannot be used", req.Subnet4)
	case mtu < 1280 || mtu > 9000:
		return mnet.Network{}, errs.Field("mtu", "give 1280 to 9000", "mtu %d cannot be used", req.MTU)
	}
	v := mnet.Network{ID: req.ID, Name: req.Name, Mode: req.Mode, Subnet4: req.Subnet4, Gateway4: netip.MustParseAddr("169.254.0.1"), DNS: req.DNS, NTP: req.NTP,
		Domain: req.Domain, MTU: mtu, HostAccess: req.HostAccess, Labels: req.Labels, CreatedAt: time.Now().UTC(), State: mnet.StateCreated}
	n.st.Networks.Objects[v.ID] = &record[mnet.CreateNetworkRequest, mnet.Network]{req, v}
	return v, save(n.dir, &n.st)
}

// GetNetwork implements net.Service.
func (n *Net) GetNetwork(_ context.Context, req mnet.Ref) (mnet.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.Networks.find(req.Ref)
	if err != nil {
		return mnet.Network{}, err
	}
	return n.networkLocked(r.V), nil
}

// ListNetworks implements net.Service.
func (n *Net) ListNetworks(context.Context) ([]mnet.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := n.st.Networks.list()
	for i := range out {
		out[i] = n.networkLocked(out[i])
	}
	return out, nil
}

// DeleteNetwork implements net.Service.
func (n *Net) DeleteNetwork(_ context.Context, req mnet.Ref) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.Networks.find(req.Ref)
	if err != nil {
		return nil
	}
	var users []string
	for _, nic := range n.st.NICs.list() {
		if nic.NetworkID == r.V.ID {
			users = append(users, nic.Name)
		}
	}
	if len(users) > 0 {
		return errs.New(errs.Precondition, "the NICs %s are on it", strings.Join(users, ", ")).Because("NETWORK_IN_USE").
			With(errs.Resource{Type: "network", ID: r.V.ID, Name: r.V.Name}).Do("delete them first")
	}
	delete(n.st.Networks.Objects, r.V.ID)
	return save(n.dir, &n.st)
}

// CreateNIC implements net.Service.
func (n *Net) CreateNIC(_ context.Context, req mnet.CreateNICRequest) (mnet.NIC, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	name := req.Name
	if name == "" && ident.CheckID("id", req.ID) == nil {
		name = "nic-" + req.ID[24:]
	}
	old, err := n.st.NICs.create(req.ID, name, req)
	if err != nil {
		return mnet.NIC{}, err
	}
	if old != nil {
		return old.V, nil
	}
	nw, err := n.st.Networks.find(req.NetworkID)
	if err != nil {
		return mnet.NIC{}, err
	}
	if len(req.SecurityGroups) > 0 {
		return mnet.NIC{}, errs.New(errs.Unsupported, "security groups are not supported")
	}
	v := mnet.NIC{ID: req.ID, Name: name, NetworkID: nw.V.ID, NetworkName: nw.V.Name, MAC: req.MAC, RoutedPrefixes: req.RoutedPrefixes, HostName: req.HostName,
		Labels: req.Labels, CreatedAt: time.Now().UTC(), State: mnet.StateCreated}
	if v.MAC == "" {
		var b [3]byte
		rand.Read(b[:])
		v.MAC = fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[0], b[1], b[2])
	}
	mac, err := net.ParseMAC(v.MAC)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || slices.Equal(mac, make([]byte, 6)) {
		return mnet.NIC{}, errs.Field("mac", "give a unicast address like 52:54:00:12:34:56", "mac %s cannot be used", ident.Quote(v.MAC))
	}
	v.MAC = mac.String()
	taken := map[netip.Addr]bool{}
	for _, r := range n.st.NICs.Objects {
		if r.V.NetworkID != v.NetworkID {
			continue
		}
		taken[r.V.IPv4] = true
		if r.V.MAC == v.MAC {
			return mnet.NIC{}, errs.New(errs.Exists, "NIC %s has the address %s", r.V.Name, v.MAC).Because("MAC_IN_USE")
		}
	}
	if v.IPv4, err = address(nw.V.Subnet4, req.IPv4, taken); err != nil {
		return mnet.NIC{}, err
	}
	if req.IPv6.IsValid() {
		return mnet.NIC{}, errs.Field("ipv6", "leave it out", "the network has no IPv6 subnet")
	}
	n.st.NICs.Objects[v.ID] = &record[mnet.CreateNICRequest, mnet.NIC]{req, v}
	return v, save(n.dir, &n.st)
}

func address(subnet netip.Prefix, want netip.Addr, taken map[netip.Addr]bool) (netip.Addr, error) {
	usable := func(a netip.Addr) bool { // neither the subnet's own address nor its broadcast address
		return subnet.Contains(a) && a != subnet.Addr() && subnet.Contains(a.Next())
	}
	if want.IsValid() {
		switch {
		case !want.Is4() || !usable(want):
			return want, errs.Field("ipv4", "give a host address of the network's subnet", "%s is not one of %s", want, subnet)
		case taken[want]:
			return want, errs.New(errs.Exists, "%s is taken", want).Because("ADDRESS_IN_USE")
		}
		return want, nil
	}
	for a := subnet.Addr().Next(); usable(a); a = a.Next() {
		if !taken[a] {
			return a, nil
		}
	}
	return want, errs.New(errs.Exhausted, "%s has no free address", subnet).Because("SUBNET_FULL").Do("delete NICs, or make another network")
}

// GetNIC implements net.Service.
func (n *Net) GetNIC(_ context.Context, req mnet.Ref) (mnet.NIC, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.NICs.find(req.Ref)
	if err != nil {
		return mnet.NIC{}, err
	}
	return r.V, nil
}

// ListNICs implements net.Service.
func (n *Net) ListNICs(_ context.Context, req mnet.ListNICsRequest) ([]mnet.NIC, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	network := ""
	if req.NetworkID != "" {
		r, err := n.st.Networks.find(req.NetworkID)
		if err != nil {
			return nil, err
		}
		network = r.V.ID
	}
	return slices.DeleteFunc(n.st.NICs.list(), func(v mnet.NIC) bool {
		return network != "" && v.NetworkID != network || req.VMID != "" && v.VMID != req.VMID
	}), nil
}

func nicInUse(v mnet.NIC) error {
	return errs.New(errs.Precondition, "VM %s uses the NIC", v.VMID).Because("NIC_IN_USE").With(errs.Resource{Type: "nic", ID: v.ID, Name: v.Name}).Do("stop the VM first")
}

// DeleteNIC implements net.Service.
func (n *Net) DeleteNIC(_ context.Context, req mnet.Ref) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.NICs.find(req.Ref)
	if err != nil {
		return nil
	}
	if r.V.VMID != "" {
		return nicInUse(r.V)
	}
	delete(n.st.NICs.Objects, r.V.ID)
	return save(n.dir, &n.st)
}

// Attach implements net.Service.
func (n *Net) Attach(_ context.Context, req mnet.AttachRequest) (mnet.Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.NICs.find(req.NICID)
	if err != nil {
		return mnet.Attachment{}, err
	}
	switch {
	case req.Owner.VMID == "":
		return mnet.Attachment{}, errs.Field("owner.vm_id", "say which VM attaches", "owner.vm_id is empty")
	case r.V.VMID != "" && r.V.VMID != req.Owner.VMID:
		return mnet.Attachment{}, nicInUse(r.V)
	case !slices.Contains(req.Modes, mnet.AttachTAPFD):
		return mnet.Attachment{}, errs.New(errs.Unsupported, "only TAP descriptors are supported")
	}
	queues := max(req.Queues, 1)
	var files []*os.File
	for range queues {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return mnet.Attachment{}, errs.Wrap(errs.Exhausted, err, "socket pair")
		}
		unix.Close(pair[1])
		files = append(files, os.NewFile(uintptr(pair[0]), "tap"))
	}
	r.V.VMID, r.V.State, r.V.AttachMode = req.Owner.VMID, mnet.StateConnected, mnet.AttachTAPFD
	return mnet.Attachment{Mode: mnet.AttachTAPFD, TAP: files, MAC: r.V.MAC, MTU: n.st.Networks.Objects[r.V.NetworkID].V.MTU, Queues: queues}, save(n.dir, &n.st)
}

// Detach implements net.Service.
func (n *Net) Detach(_ context.Context, req mnet.DetachRequest) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.NICs.find(req.NICID)
	if err != nil || r.V.VMID != req.VMID {
		return nil
	}
	r.V.VMID, r.V.State, r.V.AttachMode = "", mnet.StateCreated, 0
	return save(n.dir, &n.st)
}

// UpdateNetwork implements net.Updater.
func (n *Net) UpdateNetwork(_ context.Context, req mnet.UpdateNetworkRequest) (mnet.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.Networks.find(req.Ref)
	if err == nil && req.Name != "" {
		if err = ident.CheckName("name", req.Name); err == nil {
			err = n.st.Networks.free(req.Name, r.V.ID)
		}
	}
	if err != nil {
		return mnet.Network{}, err
	}
	if req.Name != "" {
		r.V.Name = req.Name
	}
	if req.SetDNS {
		r.V.DNS = req.DNS
	}
	if req.SetNTP {
		r.V.NTP = req.NTP
	}
	if req.SetDomain {
		r.V.Domain = req.Domain
	}
	if req.MTU != 0 {
		r.V.MTU = req.MTU
	}
	if req.SetHost {
		r.V.HostAccess = req.HostAccess
	}
	return n.networkLocked(r.V), save(n.dir, &n.st)
}

// UpdateNIC implements net.Updater.
func (n *Net) UpdateNIC(_ context.Context, req mnet.UpdateNICRequest) (mnet.NIC, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, err := n.st.NICs.find(req.Ref)
	if err == nil && req.Name != "" {
		if err = ident.CheckName("name", req.Name); err == nil {
			err = n.st.NICs.free(req.Name, r.V.ID)
		}
	}
	if err != nil {
		return mnet.NIC{}, err
	}
	if req.Name != "" {
		r.V.Name = req.Name
	}
	if req.SetRoutedPrefixes {
		r.V.RoutedPrefixes = req.RoutedPrefixes
	}
	return r.V, save(n.dir, &n.st)
}
