package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/store"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

type (
	netRec = store.Network
	nicRec = store.NIC
)

// CreateNetwork implements net.Service.
func (s *Service) CreateNetwork(_ context.Context, req net.CreateNetworkRequest) (net.Network, error) {
	created := req
	if req.Mode == net.ModeBridge && s.isRepeat(&req) {
		return s.GetNetwork(context.Background(), net.Ref{Ref: req.ID}) // its bridge may be gone by now
	}
	if err := s.checkNetwork(&req); err != nil {
		return net.Network{}, err
	}
	if req.Mode != net.ModePrivate && s.priv != nil {
		return net.Network{}, s.priv
	}
	hostAddrs, err := hostnet.Addresses()
	if err != nil {
		return net.Network{}, errs.Wrap(errs.Internal, err, "list the host's addresses")
	}

	s.mu.Lock()
	if old := s.data.Networks[req.ID]; old != nil {
		rt := s.nets[req.ID]
		s.mu.Unlock()
		if !same(old.Created, created) || old.Deleting {
			return net.Network{}, errs.New(errs.Exists, "another network has the id %s", req.ID).With(resNet(&req))
		}
		rt.mu.Lock() // its create may be under way
		defer rt.mu.Unlock()
		return s.GetNetwork(context.Background(), net.Ref{Ref: req.ID})
	}
	if old := s.networkLocked(req.Name); old != nil {
		s.mu.Unlock()
		return net.Network{}, errs.New(errs.Exists, "a network named %s exists", req.Name).With(resNet(&req)).
			Do("choose another name")
	}
	rec := &netRec{Request: req, Created: created, CreatedAt: time.Now().UTC(),
		NS: shortName(hostnet.NSPrefix, req.ID, 12, func(n string) bool {
			return slices.ContainsFunc(values(s.data.Networks), func(o *netRec) bool { return o.NS == n })
		})}
	if req.Mode == net.ModeNAT {
		rec.HostLink = shortName(hostPrefix, req.ID, 10, func(n string) bool {
			return slices.ContainsFunc(values(s.data.Networks), func(o *netRec) bool { return o.HostLink == n })
		})
		if rec.Link4, err = s.freeLinkLocked(hostAddrs); err != nil {
			s.mu.Unlock()
			return net.Network{}, err
		}
	}
	rt := s.newRuntime(req.ID)
	rt.mu.Lock()
	defer rt.mu.Unlock()
	err = s.commitLocked(func() {
		s.data.Networks[req.ID] = rec
		s.nets[req.ID] = rt
	}, store.PutNetwork(rec))
	s.mu.Unlock()
	if err != nil {
		rt.letGo()
		return net.Network{}, err
	}
	if err := rt.ensure(); err != nil {
		return net.Network{}, s.undoNetwork(rt, rec, err)
	}
	s.log.Info("network created", "network", req.Name, "mode", req.Mode, "subnet4", req.Subnet4)
	return s.GetNetwork(context.Background(), net.Ref{Ref: req.ID})
}

// isRepeat says whether a request made a network already.
func (s *Service) isRepeat(req *net.CreateNetworkRequest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.data.Networks[req.ID]
	return old != nil && !old.Deleting && same(old.Created, *req)
}

// undoNetwork removes a network whose making failed.
func (s *Service) undoNetwork(rt *runtime, rec *netRec, cause error) error {
	if err := s.removeNetwork(rt, rec); err != nil {
		s.log.Error("undo of a failed network", "network", rec.Request.Name, "error", err)
	}
	return &errs.Error{Op: "net.CreateNetwork", Resource: resNet(&rec.Request), Err: cause}
}

func resNet(r *net.CreateNetworkRequest) errs.Resource {
	return errs.Resource{Type: "network", ID: r.ID, Name: r.Name}
}

// GetNetwork implements net.Service.
func (s *Service) GetNetwork(_ context.Context, req net.Ref) (net.Network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec := s.networkLocked(req.Ref)
	if rec == nil || rec.Deleting {
		return net.Network{}, notFound("network", req.Ref)
	}
	return s.viewNetworkLocked(rec), nil
}

// ListNetworks implements net.Service.
func (s *Service) ListNetworks(context.Context) ([]net.Network, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []net.Network
	for _, rec := range s.data.Networks {
		if !rec.Deleting {
			out = append(out, s.viewNetworkLocked(rec))
		}
	}
	slices.SortFunc(out, func(a, b net.Network) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

func (s *Service) viewNetworkLocked(rec *netRec) net.Network {
	r := &rec.Request
	n := net.Network{ID: r.ID, Name: r.Name, Mode: r.Mode, Subnet4: r.Subnet4, Subnet6: r.Subnet6,
		DNS: slices.Clone(r.DNS), NTP: slices.Clone(r.NTP), Domain: r.Domain, MTU: r.MTU, Bridge: r.Bridge,
		HostAccess: r.HostAccess, Labels: cloneMap(r.Labels), CreatedAt: rec.CreatedAt, State: net.StateCreated}
	if r.Subnet4.IsValid() {
		n.Gateway4 = engine.Gateway4.Addr()
	}
	if r.Subnet6.IsValid() {
		n.Gateway6 = engine.Gateway6.Addr()
	}
	for _, nic := range s.data.NICs {
		if nic.NetworkID == r.ID {
			n.NICCount++
		}
	}
	if rt := s.nets[r.ID]; rt != nil {
		n.WorkerPID = rt.pid.Load()
	}
	var why []string
	for k, c := range s.conds {
		if k.object == r.ID && c.Severity == service.SeverityCritical {
			why = append(why, c.Text)
		}
	}
	if len(why) > 0 {
		slices.Sort(why)
		n.State, n.StateReason = net.StateError, strings.Join(why, "; ")
	}
	return n
}

// DeleteNetwork implements net.Service.
func (s *Service) DeleteNetwork(_ context.Context, req net.Ref) error {
	s.mu.Lock()
	rec := s.networkLocked(req.Ref)
	if rec == nil {
		s.mu.Unlock()
		return nil
	}
	rt := s.nets[rec.Request.ID]
	s.mu.Unlock()
	rt.mu.Lock()
	defer rt.mu.Unlock()

	s.mu.Lock()
	if rec = s.data.Networks[rt.id]; rec == nil {
		s.mu.Unlock()
		return nil
	}
	var nics []string
	for _, n := range s.data.NICs {
		if n.NetworkID == rt.id {
			nics = append(nics, n.Name)
		}
	}
	if len(nics) > 0 {
		s.mu.Unlock()
		slices.Sort(nics)
		return errs.New(errs.Precondition, "%d NICs are on it: %s", len(nics), some(nics)).With(resNet(&rec.Request)).
			Because("NETWORK_IN_USE").Do("delete these NICs first")
	}
	marked := *rec
	marked.Deleting = true
	err := s.commitLocked(func() { s.data.Networks[rt.id] = &marked }, store.PutNetwork(&marked))
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if err := s.removeNetwork(rt, &marked); err != nil {
		return errs.Wrap(errs.Internal, err, "network %s is only partly removed", rec.Request.Name)
	}
	s.log.Info("network deleted", "network", rec.Request.Name)
	return nil
}

// some lists the first few names.
func some(names []string) string {
	const most = 8
	if len(names) > most {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", len(names)-most)
	}
	return strings.Join(names, ", ")
}

// removeNetwork takes all of a network down and forgets it. rt.mu is held. It may be repeated.
func (s *Service) removeNetwork(rt *runtime, rec *netRec) error {
	rt.gone = true
	rt.stopWorker()
	rt.letGo()
	if s.priv == nil {
		if rec.HostLink != "" {
			if err := s.instance.DeleteHostLink(rec.HostLink); err != nil {
				return err
			}
		}
		if err := hostnet.DeleteNS(rec.NS); err != nil {
			return err
		}
	}
	s.mu.Lock()
	err := s.commitLocked(func() {
		delete(s.data.Networks, rt.id)
		delete(s.nets, rt.id)
		for k := range s.conds {
			if k.object == rt.id {
				delete(s.conds, k)
			}
		}
	}, store.DeleteNetwork(rt.id))
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if rec.HostLink != "" {
		return s.applyHost()
	}
	return nil
}

func values[K comparable, V any](m map[K]V) []V {
	out := make([]V, 0, len(m))
	for _, v := range m {
		out = append(out, v)
	}
	return out
}

func cloneMap(m map[string]string) map[string]string {
	if m == nil {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}
