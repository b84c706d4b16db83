package control

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/store"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

// CreateNIC implements net.Service.
func (s *Service) CreateNIC(_ context.Context, req net.CreateNICRequest) (net.NIC, error) {
	created := req
	if err := ident.CheckID("id", req.ID); err != nil {
		return net.NIC{}, err
	}
	if req.Name == "" {
		req.Name = "nic-" + req.ID[24:]
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return net.NIC{}, err
	}
	rec, rt, err := s.addNIC(&req, created)
	if err != nil {
		return net.NIC{}, err
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	rt.pushNIC(rec)
	return s.viewNIC(rec.ID)
}

// addNIC allocates and records, all under mu: no two NICs get the same.
func (s *Service) addNIC(req *net.CreateNICRequest, created net.CreateNICRequest) (*nicRec, *runtime, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.data.NICs[req.ID]; old != nil {
		if !same(old.Created, created) {
			return nil, nil, errs.New(errs.Exists, "another NIC has the id %s", req.ID).With(resNIC(old))
		}
		return old, s.nets[old.NetworkID], nil
	}
	n := s.networkLocked(req.NetworkID)
	if n == nil || n.Deleting {
		return nil, nil, notFound("network", req.NetworkID)
	}
	if old := s.nicLocked(req.Name); old != nil {
		return nil, nil, errs.New(errs.Exists, "a NIC named %s exists", req.Name).With(resNIC(old)).Do("choose another name")
	}
	if err := checkNIC(req, &n.Request); err != nil {
		return nil, nil, err
	}
	addrs, macs, routed := s.usedLocked(n.Request.ID)
	if req.MAC == "" {
		req.MAC = s.freshMACLocked()
	} else if o := macs[req.MAC]; o != nil {
		return nil, nil, errs.New(errs.Exists, "MAC %s is NIC %s's", req.MAC, o.Name).Because("MAC_IN_USE").
			With(resNIC(o)).Do("choose another MAC, or none")
	}
	for _, f := range []struct {
		subnet netip.Prefix
		addr   *netip.Addr
	}{{n.Request.Subnet4, &req.IPv4}, {n.Request.Subnet6, &req.IPv6}} {
		if o := addrs[*f.addr]; o != nil {
			return nil, nil, errs.New(errs.Exists, "address %s is NIC %s's", *f.addr, o.Name).Because("ADDRESS_IN_USE").
				With(resNIC(o)).Do("choose another address, or none")
		}
		if f.subnet.IsValid() && !f.addr.IsValid() {
			a, err := freeAddr(&n.Request, f.subnet, addrs)
			if err != nil {
				return nil, nil, err
			}
			*f.addr = a
		}
	}
	if err := routedFree(req.RoutedPrefixes, routed, req.ID); err != nil {
		return nil, nil, err
	}
	groups, err := s.groupIDsLocked(req.SecurityGroups)
	if err != nil {
		return nil, nil, err
	}
	rec := &nicRec{ID: req.ID, Name: req.Name, NetworkID: n.Request.ID, MAC: req.MAC, IPv4: req.IPv4, IPv6: req.IPv6,
		Routed: slices.Clone(req.RoutedPrefixes), Groups: groups, HostName: req.HostName,
		Labels: cloneMap(req.Labels), Created: created, CreatedAt: time.Now().UTC(),
		IfName: shortName(tapPrefix, req.ID, 10, func(name string) bool {
			return slices.ContainsFunc(values(s.data.NICs), func(o *nicRec) bool { return o.IfName == name })
		})}
	err = s.commitLocked(func() { s.data.NICs[rec.ID] = rec }, store.PutNIC(rec))
	return rec, s.nets[n.Request.ID], err
}

// routedFree says whether prefixes are nobody else's.
func routedFree(ps []netip.Prefix, routed map[netip.Prefix]*nicRec, id string) error {
	for _, p := range ps {
		for q, o := range routed {
			if o.ID != id && p.Overlaps(q) {
				return errs.New(errs.Exists, "%s is routed to NIC %s already", q, o.Name).Because("ADDRESS_IN_USE").
					With(resNIC(o)).Do("take the prefix from that NIC first")
			}
		}
	}
	return nil
}

func resNIC(n *nicRec) errs.Resource { return errs.Resource{Type: "nic", ID: n.ID, Name: n.Name} }

// engineNIC is what the worker is told about a NIC.
func engineNIC(n *nicRec) *engine.NICConfig {
	m, _ := wire.ParseMAC(n.MAC)
	return &engine.NICConfig{ID: n.ID, MAC: m, IPv4: n.IPv4, IPv6: n.IPv6, Routed: n.Routed, HostName: n.HostName, Groups: n.Groups, Down: n.LinkDown}
}

// GetNIC implements net.Service.
func (s *Service) GetNIC(_ context.Context, req net.Ref) (net.NIC, error) {
	s.mu.Lock()
	rec := s.nicLocked(req.Ref)
	s.mu.Unlock()
	if rec == nil {
		return net.NIC{}, notFound("nic", req.Ref)
	}
	return s.viewNIC(rec.ID)
}

// viewNIC is a NIC with what its worker knows.
func (s *Service) viewNIC(id string) (net.NIC, error) {
	s.mu.Lock()
	rec := s.data.NICs[id]
	if rec == nil {
		s.mu.Unlock()
		return net.NIC{}, notFound("nic", id)
	}
	nic, rt := s.viewNICLocked(rec), s.nets[rec.NetworkID]
	s.mu.Unlock()
	if rec.Attach != nil {
		st, err := rt.status(id)
		fillStatus(&nic, st[id], err)
	}
	return nic, nil
}

// ListNICs implements net.Service.
func (s *Service) ListNICs(_ context.Context, req net.ListNICsRequest) ([]net.NIC, error) {
	s.mu.Lock()
	network := ""
	if req.NetworkID != "" {
		n := s.networkLocked(req.NetworkID)
		if n == nil {
			s.mu.Unlock()
			return nil, notFound("network", req.NetworkID)
		}
		network = n.Request.ID
	}
	var out []net.NIC
	busy := map[string]*runtime{}
	for _, rec := range s.data.NICs {
		if network != "" && rec.NetworkID != network || req.VMID != "" && (rec.Attach == nil || rec.Attach.VMID != req.VMID) {
			continue
		}
		out = append(out, s.viewNICLocked(rec))
		if rec.Attach != nil {
			busy[rec.NetworkID] = s.nets[rec.NetworkID]
		}
	}
	s.mu.Unlock()
	for id, rt := range busy {
		st, err := rt.status("")
		for i := range out {
			if out[i].NetworkID == id && out[i].VMID != "" {
				fillStatus(&out[i], st[out[i].ID], err)
			}
		}
	}
	slices.SortFunc(out, func(a, b net.NIC) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

func (s *Service) viewNICLocked(rec *nicRec) net.NIC {
	nic := net.NIC{ID: rec.ID, Name: rec.Name, NetworkID: rec.NetworkID, MAC: rec.MAC, IPv4: rec.IPv4, IPv6: rec.IPv6,
		RoutedPrefixes: slices.Clone(rec.Routed), SecurityGroups: slices.Clone(rec.Groups), HostName: rec.HostName,
		Labels: cloneMap(rec.Labels), CreatedAt: rec.CreatedAt, State: net.StateCreated, LinkDown: rec.LinkDown}
	if n := s.data.Networks[rec.NetworkID]; n != nil {
		nic.NetworkName = n.Request.Name
	}
	if a := rec.Attach; a != nil {
		nic.VMID, nic.AttachMode = a.VMID, a.Mode
	}
	return nic
}

// fillStatus adds what the worker says about an attached NIC.
func fillStatus(nic *net.NIC, st *wctl.NICStatus, err error) {
	nic.State = net.StateConnected
	switch {
	case err != nil:
		nic.State, nic.StateReason = net.StateError, "its packet worker does not answer and is being replaced: "+err.Error()
		return
	case st == nil || !st.Attached && st.Trouble == "":
		nic.State, nic.StateReason = net.StateError, "its data path is not up"
		if st == nil {
			return
		}
	case st.Trouble != "":
		nic.State, nic.StateReason = net.StateError, st.Trouble
	case st.Waiting:
		nic.State, nic.StateReason = net.StateCreated, "attached; the hypervisor's driver is not connected yet"
	case st.Declined:
		nic.State, nic.StateReason = net.StateError, "the guest refused its address by DHCPDECLINE: it believes that another machine has it"
	}
	c := st.Counters
	nic.Counters = net.Counters{RxPackets: c.RxPackets, RxBytes: c.RxBytes, RxDropped: c.RxDropped,
		TxPackets: c.TxPackets, TxBytes: c.TxBytes, TxDropped: c.TxDropped, TxSpoofed: c.TxSpoofed}
}

// DeleteNIC implements net.Service.
func (s *Service) DeleteNIC(_ context.Context, req net.Ref) error {
	s.mu.Lock()
	rec := s.nicLocked(req.Ref)
	if rec == nil {
		s.mu.Unlock()
		return nil
	}
	if rec.Attach != nil {
		s.mu.Unlock()
		return errs.New(errs.Precondition, "it is attached to VM %s", rec.Attach.VMID).With(resNIC(rec)).
			Because("NIC_IN_USE").Do("stop the VM or detach the NIC first")
	}
	rt := s.nets[rec.NetworkID]
	err := s.commitLocked(func() {
		delete(s.data.NICs, rec.ID)
		for k := range s.conds {
			if k.object == rec.ID {
				delete(s.conds, k)
			}
		}
	}, store.DeleteNIC(rec.ID))
	s.mu.Unlock()
	if err != nil {
		return err
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	rt.push(wctl.Request{Op: wctl.OpDeleteNIC, ID: rec.ID})
	return nil
}
