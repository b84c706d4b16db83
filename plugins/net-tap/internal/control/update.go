package control

import (
	"context"
	"errors"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/store"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

var _ net.Updater = (*Service)(nil)

// UpdateNetwork implements net.Updater. The engine knows at once; guests learn what is announced with their
// next lease, and over IPv6 by a router advertisement that is sent right away.
func (s *Service) UpdateNetwork(_ context.Context, req net.UpdateNetworkRequest) (net.Network, error) {
	s.mu.Lock()
	rec := s.networkLocked(req.Ref)
	if rec == nil || rec.Deleting {
		s.mu.Unlock()
		return net.Network{}, notFound("network", req.Ref)
	}
	rt := s.nets[rec.Request.ID]
	s.mu.Unlock()
	rt.mu.Lock()
	defer rt.mu.Unlock()

	s.mu.Lock()
	if rec = s.data.Networks[rt.id]; rec == nil || rec.Deleting {
		s.mu.Unlock()
		return net.Network{}, notFound("network", req.Ref)
	}
	next := *rec
	err := s.applyUpdateLocked(&next.Request, &req)
	if err == nil {
		err = s.commitLocked(func() { s.data.Networks[rt.id] = &next }, store.PutNetwork(&next))
	}
	s.mu.Unlock()
	if err != nil {
		return net.Network{}, err
	}
	if next.Request.MTU != rec.Request.MTU {
		err = rt.setTAPMTU(int(next.Request.MTU))
	}
	// The rest of it is what a repair does. Should it fail now, it is repeated until it does not.
	if err = errors.Join(err, rt.ensure()); err != nil {
		rt.kick()
		return net.Network{}, errs.Wrap(errs.Internal, err, "network %s is changed, but not everywhere yet", next.Request.Name)
	}
	return s.GetNetwork(context.Background(), net.Ref{Ref: rt.id})
}

func (s *Service) applyUpdateLocked(r *net.CreateNetworkRequest, req *net.UpdateNetworkRequest) error {
	if req.Name != "" && req.Name != r.Name {
		if err := ident.CheckName("name", req.Name); err != nil {
			return err
		}
		if s.networkLocked(req.Name) != nil {
			return errs.New(errs.Exists, "a network named %s exists", req.Name).Do("choose another name")
		}
		r.Name = req.Name
	}
	if req.SetDNS {
		r.DNS = req.DNS
	}
	if req.SetNTP {
		r.NTP = req.NTP
	}
	if req.SetDomain {
		r.Domain = req.Domain
	}
	if req.MTU != 0 {
		r.MTU = req.MTU
	}
	if req.SetHost {
		r.HostAccess = req.HostAccess
	}
	return s.checkNetwork(r)
}

// setTAPMTU changes the MTU of the TAPs of attached NICs.
func (rt *runtime) setTAPMTU(mtu int) error {
	_, nics := rt.records()
	var all []error
	for _, n := range nics {
		if n.Attach != nil && n.Attach.Mode == net.AttachTAPFD && rt.ns != nil {
			all = append(all, rt.ns.SetTAPMTU(n.IfName, mtu))
		}
	}
	return errors.Join(all...)
}

// UpdateNIC implements net.Updater.
func (s *Service) UpdateNIC(_ context.Context, req net.UpdateNICRequest) (net.NIC, error) {
	s.mu.Lock()
	rec := s.nicLocked(req.Ref)
	if rec == nil {
		s.mu.Unlock()
		return net.NIC{}, notFound("nic", req.Ref)
	}
	id, rt := rec.ID, s.nets[rec.NetworkID]
	s.mu.Unlock()
	rt.mu.Lock()
	defer rt.mu.Unlock()
	next, err := s.updateNIC(id, &req)
	if err != nil {
		return net.NIC{}, err
	}
	rt.pushNIC(next)
	return s.viewNIC(id)
}

func (s *Service) updateNIC(id string, req *net.UpdateNICRequest) (*nicRec, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec := s.data.NICs[id]
	if rec == nil {
		return nil, notFound("nic", req.Ref)
	}
	n := s.data.Networks[rec.NetworkID]
	next := *rec
	if req.Name != "" && req.Name != rec.Name {
		if err := ident.CheckName("name", req.Name); err != nil {
			return nil, err
		}
		if s.nicLocked(req.Name) != nil {
			return nil, errs.New(errs.Exists, "a NIC named %s exists", req.Name).Do("choose another name")
		}
		next.Name = req.Name
	}
	if req.SetRoutedPrefixes {
		if err := checkRouted(req.RoutedPrefixes, &n.Request); err != nil {
			return nil, err
		}
		_, _, routed := s.usedLocked(rec.NetworkID)
		if err := routedFree(req.RoutedPrefixes, routed, id); err != nil {
			return nil, err
		}
		next.Routed = append(next.Routed[:0:0], req.RoutedPrefixes...)
	}
	if req.SetSecurityGroups {
		groups, err := s.groupIDsLocked(req.SecurityGroups)
		if err != nil {
			return nil, err
		}
		next.Groups = groups
	}
	if req.SetLink {
		next.LinkDown = req.LinkDown
	}
	err := s.commitLocked(func() { s.data.NICs[id] = &next }, store.PutNIC(&next))
	return &next, err
}
