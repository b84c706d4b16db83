package control

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/store"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

var _ net.SecurityGrouper = (*Service)(nil)

// Limits of security groups: a group fits into one message to a worker, and a packet that begins a flow is
// compared with all rules of its NIC.
const (
	maxRules  = 256
	maxGroups = 16 // a NIC
)

// CreateSecurityGroup implements net.SecurityGrouper.
func (s *Service) CreateSecurityGroup(_ context.Context, req net.CreateSecurityGroupRequest) (net.SecurityGroup, error) {
	if err := ident.CheckID("id", req.ID); err != nil {
		return net.SecurityGroup{}, err
	}
	if err := ident.CheckName("name", req.Name); err != nil {
		return net.SecurityGroup{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.data.Groups[req.ID]; old != nil {
		if !same(old.Created, req) {
			return net.SecurityGroup{}, errs.New(errs.Exists, "another security group has the id %s", req.ID).With(resGroup(old))
		}
		return s.viewGroupLocked(old), nil
	}
	if old := s.groupLocked(req.Name); old != nil {
		return net.SecurityGroup{}, errs.New(errs.Exists, "a security group named %s exists", req.Name).With(resGroup(old)).
			Do("choose another name")
	}
	rec := &store.Group{Created: req, Group: net.SecurityGroup{ID: req.ID, Name: req.Name, Labels: cloneMap(req.Labels), CreatedAt: time.Now().UTC()}}
	var err error
	if rec.Group.Rules, err = s.checkRulesLocked(req.Rules, rec); err != nil {
		return net.SecurityGroup{}, err
	}
	err = s.commitLocked(func() { s.data.Groups[req.ID] = rec }, store.PutGroup(rec))
	return s.viewGroupLocked(rec), err
}

func resGroup(g *store.Group) errs.Resource {
	return errs.Resource{Type: "security_group", ID: g.Group.ID, Name: g.Group.Name}
}

func (s *Service) groupLocked(ref string) *store.Group {
	if g := s.data.Groups[ref]; g != nil {
		return g
	}
	for _, g := range s.data.Groups {
		if g.Group.Name == ref {
			return g
		}
	}
	return nil
}

// checkRulesLocked checks rules and turns names of groups into ids. self may be named before it is stored.
func (s *Service) checkRulesLocked(rules []net.Rule, self *store.Group) ([]net.Rule, error) {
	if len(rules) > maxRules {
		return nil, errs.Field("rules", fmt.Sprintf("give at most %d rules, or use several groups", maxRules), "%d rules are too many", len(rules))
	}
	out := slices.Clone(rules)
	for i := range out {
		r := &out[i]
		field := fmt.Sprintf("rules[%d]", i)
		if r.Direction != net.Inbound && r.Direction != net.Outbound {
			return nil, errs.Field(field+".direction", "give inbound or outbound", "direction %d is none", uint32(r.Direction))
		}
		x, ok := protocol(r.Protocol)
		if !ok {
			return nil, errs.Field(field+".protocol", "give tcp, udp, icmp, icmpv6, any, or a number from 0 to 255", "protocol %s is none", ident.Quote(r.Protocol))
		}
		limit := uint32(0)
		switch {
		case x.Any:
		case x.Proto == wire.ProtoTCP || x.Proto == wire.ProtoUDP:
			limit = 65535
		case x.Proto == wire.ProtoICMP || x.Proto == wire.ProtoICMPv6:
			limit = 255
		}
		if r.PortFrom > limit || r.PortTo > limit || r.PortTo != 0 && r.PortTo < r.PortFrom {
			return nil, errs.Field(field+".port_from", "give ports for tcp and udp, types for icmp, the lower one first; none for other protocols",
				"%d to %d is no range of %s", r.PortFrom, r.PortTo, r.Protocol)
		}
		if r.CIDR.IsValid() && r.CIDR != r.CIDR.Masked() {
			return nil, errs.Field(field+".cidr", "write "+r.CIDR.Masked().String(), "%s has host bits set", r.CIDR)
		}
		if r.GroupID == "" {
			continue
		}
		if r.CIDR.IsValid() {
			return nil, errs.Field(field+".group_id", "give a prefix or a group, or two rules", "a rule names both %s and a group", r.CIDR)
		}
		g := s.groupLocked(r.GroupID)
		if r.GroupID == self.Group.ID || r.GroupID == self.Group.Name {
			g = self
		}
		if g == nil {
			return nil, notFound("security group", r.GroupID)
		}
		r.GroupID = g.Group.ID
	}
	return out, nil
}

// protocol reads a rule's protocol.
func protocol(s string) (engine.Rule, bool) {
	switch strings.ToLower(s) {
	case "any", "":
		return engine.Rule{Any: true}, true
	case "tcp":
		return engine.Rule{Proto: wire.ProtoTCP}, true
	case "udp":
		return engine.Rule{Proto: wire.ProtoUDP}, true
	case "icmp":
		return engine.Rule{Proto: wire.ProtoICMP}, true
	case "icmpv6":
		return engine.Rule{Proto: wire.ProtoICMPv6}, true
	}
	n, err := strconv.ParseUint(s, 10, 8)
	return engine.Rule{Proto: uint8(n)}, err == nil
}

// engineGroup is what workers are told about a group.
func engineGroup(g *store.Group) *engine.Group {
	out := &engine.Group{ID: g.Group.ID}
	for _, r := range g.Group.Rules {
		x, _ := protocol(r.Protocol)
		x.Inbound, x.From, x.To, x.Peer, x.Group = r.Direction == net.Inbound, uint16(r.PortFrom), uint16(r.PortTo), r.CIDR, r.GroupID
		out.Rules = append(out.Rules, x)
	}
	return out
}

// GetSecurityGroup implements net.SecurityGrouper.
func (s *Service) GetSecurityGroup(_ context.Context, req net.Ref) (net.SecurityGroup, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.groupLocked(req.Ref)
	if g == nil {
		return net.SecurityGroup{}, notFound("security group", req.Ref)
	}
	return s.viewGroupLocked(g), nil
}

// ListSecurityGroups implements net.SecurityGrouper.
func (s *Service) ListSecurityGroups(context.Context) ([]net.SecurityGroup, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []net.SecurityGroup
	for _, g := range s.data.Groups {
		out = append(out, s.viewGroupLocked(g))
	}
	slices.SortFunc(out, func(a, b net.SecurityGroup) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

func (s *Service) viewGroupLocked(g *store.Group) net.SecurityGroup {
	v := g.Group
	v.Rules, v.Labels = slices.Clone(v.Rules), cloneMap(v.Labels)
	for _, n := range s.data.NICs {
		if slices.Contains(n.Groups, v.ID) {
			v.NICCount++
		}
	}
	return v
}

// SetSecurityGroupRules implements net.SecurityGrouper. When it returns, the rules hold for every packet.
func (s *Service) SetSecurityGroupRules(_ context.Context, req net.SetSecurityGroupRulesRequest) (net.SecurityGroup, error) {
	s.mu.Lock()
	old := s.groupLocked(req.Ref)
	if old == nil {
		s.mu.Unlock()
		return net.SecurityGroup{}, notFound("security group", req.Ref)
	}
	next := *old
	rules, err := s.checkRulesLocked(req.Rules, old)
	if err == nil {
		next.Group.Rules = rules
		err = s.commitLocked(func() { s.data.Groups[next.Group.ID] = &next }, store.PutGroup(&next))
	}
	rts := s.usersLocked(next.Group.ID)
	s.mu.Unlock()
	if err != nil {
		return net.SecurityGroup{}, err
	}
	for _, rt := range rts {
		rt.mu.Lock()
		rt.push(wctl.Request{Op: wctl.OpGroup, Group: rt.currentGroup(next.Group.ID)})
		rt.mu.Unlock()
	}
	return s.GetSecurityGroup(context.Background(), net.Ref{Ref: next.Group.ID})
}

// currentGroup is the group as it is now: of two changes at once, the later one must be the last that a
// worker hears.
func (rt *runtime) currentGroup(id string) *engine.Group {
	rt.s.mu.Lock()
	defer rt.s.mu.Unlock()
	if g := rt.s.data.Groups[id]; g != nil {
		return engineGroup(g)
	}
	return &engine.Group{ID: id}
}

// usersLocked lists the networks with NICs in a group.
func (s *Service) usersLocked(group string) []*runtime {
	var out []*runtime
	for _, n := range s.data.NICs {
		if rt := s.nets[n.NetworkID]; rt != nil && slices.Contains(n.Groups, group) && !slices.Contains(out, rt) {
			out = append(out, rt)
		}
	}
	return out
}

// DeleteSecurityGroup implements net.SecurityGrouper.
func (s *Service) DeleteSecurityGroup(_ context.Context, req net.Ref) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.groupLocked(req.Ref)
	if g == nil {
		return nil
	}
	var users []string
	for _, n := range s.data.NICs {
		if slices.Contains(n.Groups, g.Group.ID) {
			users = append(users, "NIC "+n.Name)
		}
	}
	for _, o := range s.data.Groups {
		if o != g && slices.ContainsFunc(o.Group.Rules, func(r net.Rule) bool { return r.GroupID == g.Group.ID }) {
			users = append(users, "security group "+o.Group.Name)
		}
	}
	if len(users) > 0 {
		slices.Sort(users)
		return errs.New(errs.Precondition, "it is in use by %s", some(users)).With(resGroup(g)).Because("GROUP_IN_USE").
			Do("take it from these first")
	}
	return s.commitLocked(func() { delete(s.data.Groups, g.Group.ID) }, store.DeleteGroup(g.Group.ID))
}

// groupIDsLocked turns refs into ids.
func (s *Service) groupIDsLocked(refs []string) ([]string, error) {
	if len(refs) > maxGroups {
		return nil, errs.Field("security_groups", fmt.Sprintf("give at most %d", maxGroups), "%d security groups are too many", len(refs))
	}
	var out []string
	for _, ref := range refs {
		g := s.groupLocked(ref)
		if g == nil {
			return nil, notFound("security group", ref)
		}
		if !slices.Contains(out, g.Group.ID) {
			out = append(out, g.Group.ID)
		}
	}
	return out, nil
}

// sendGroups tells the worker about the groups of some NICs.
func (rt *runtime) sendGroups(nics []*nicRec) error {
	sent := map[string]bool{}
	for _, n := range nics {
		for _, id := range n.Groups {
			if sent[id] {
				continue
			}
			sent[id] = true
			if err := rt.call(wctl.Request{Op: wctl.OpGroup, Group: rt.currentGroup(id)}); err != nil {
				return err
			}
		}
	}
	return nil
}

// ensureFlows gives the worker its flow table: the one of the worker before it, or a new one.
func (rt *runtime) ensureFlows(has bool) error {
	if has {
		if rt.flows == nil { // an earlier control plane made it
			_, fds, err := rt.ask(wctl.Request{Op: wctl.OpFlows})
			if err != nil {
				return err
			}
			if len(fds) == 1 {
				rt.flows = os.NewFile(uintptr(fds[0]), "flows")
			} else {
				wctl.CloseAll(fds)
			}
		}
		return nil
	}
	if rt.flows == nil {
		fd, err := unix.MemfdCreate("mvirt-flows", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			return errs.Wrap(errs.Internal, err, "memory for the flow table")
		}
		rt.flows = os.NewFile(uintptr(fd), "flows")
		if err := unix.Ftruncate(fd, engine.DefaultFlowBytes); err != nil {
			return errs.Wrap(errs.Internal, err, "memory for the flow table")
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
			return errs.Wrap(errs.Internal, err, "seal the flow table")
		}
	}
	return rt.call(wctl.Request{Op: wctl.OpFlows}, int(rt.flows.Fd()))
}
