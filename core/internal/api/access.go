package api

import (
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/peer"
	"github.com/mvirt/mvirt/core/internal/authz"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// visibleTime bounds the look-up of what a limited caller may see.
const visibleTime = 5 * time.Second

// maxToken is the longest token that is looked at.
const maxToken = 512

// tokenOf is the bearer token of a call, or "".
func tokenOf(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	all := md.Get("authorization")
	if len(all) == 0 {
		return ""
	}
	scheme, token, ok := strings.Cut(all[0], " ")
	token = strings.TrimSpace(token)
	if !ok || len(all) > 1 || !strings.EqualFold(scheme, "bearer") || token == "" || len(token) > maxToken {
		return "(none)" // one that was meant and is not usable must not turn into no token at all
	}
	return token
}

// identify fills in who calls and what they may do.
func (s *Server) identify(ctx context.Context, c *caller) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return
	}
	c.peer = p
	sub := authz.Subject{Local: !p.Remote, UID: p.UID, Certs: p.Certs, Token: tokenOf(ctx)}
	if p.Remote {
		c.who = operation.Who{Remote: p.Addr, Name: "a certificate without a name"}
		if len(p.Certs) > 0 {
			c.who.Name = p.Certs[0]
		}
	} else {
		c.who = operation.Who{Name: s.users.User(p.UID), UID: p.UID, PID: uint32(max(0, p.PID))}
		sub.User = c.who.Name
		if len(s.opt.Config.Access) > 0 {
			sub.Groups = s.users.Groups(p.UID, p.GID)
		}
	}
	c.rights = s.access.Of(sub)
	if sub.Token != "" {
		c.who.Name += " by token " + c.rights.Names()
	}
}

// permitted asks for one object that a call names.
func permitted(ctx context.Context, word, id, name string) error {
	c := callerOf(ctx)
	if c.method == "" {
		return nil // the core's own look-up: there is no caller
	}
	return c.rights.Object(c.method, strings.ReplaceAll(word, " ", "_"), id, name)
}

// hideMissing keeps a caller who may see only some objects from learning which names are taken.
func hideMissing(ctx context.Context, word, ref string, err error) error {
	c := callerOf(ctx)
	if c.method == "" || !c.rights.Narrow(c.method) {
		return err
	}
	if denied := permitted(ctx, word, "", ref); denied != nil {
		return denied
	}
	return err
}

// visible are the ids of the objects that the caller's limited grants name.
func (s *Server) visible(ctx context.Context, c *caller) map[string]bool {
	c.once.Do(func() {
		c.ids = map[string]bool{}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), visibleTime)
		defer cancel()
		for _, r := range c.rights.Refs() {
			if ident.CheckID("ref", r.Ref) == nil {
				c.ids[r.Ref] = true
			} else if id := s.idOf(ctx, r); id != "" {
				c.ids[id] = true
			}
		}
	})
	return c.ids
}

// idOf looks a granted name up, without asking for permission; "" if there is no such object now.
func (s *Server) idOf(ctx context.Context, r authz.Ref) string {
	var id string
	var err error
	switch r.Kind {
	case "vm":
		var v vmm.VM
		v, err = s.vmm.Get(ctx, vmm.Ref{Ref: r.Ref})
		id = v.ID
	case "volume":
		var v storage.Volume
		v, err = s.storage.GetVolume(ctx, storage.Ref{Ref: r.Ref})
		id = v.ID
	case "template":
		var v storage.Template
		v, err = s.storage.GetTemplate(ctx, storage.Ref{Ref: r.Ref})
		id = v.ID
	case "network":
		var v net.Network
		v, err = s.net.GetNetwork(ctx, net.Ref{Ref: r.Ref})
		id = v.ID
	case "nic":
		var v net.NIC
		v, err = s.net.GetNIC(ctx, net.Ref{Ref: r.Ref})
		id = v.ID
	case "security_group":
		var v net.SecurityGroup
		v, err = s.net.GetSecurityGroup(ctx, net.Ref{Ref: r.Ref})
		id = v.ID
	}
	if err != nil {
		return ""
	}
	return id
}

// concerns tells whether one of the objects is one that a limited caller may see.
func (s *Server) concerns(ctx context.Context, c *caller, objects []string) bool {
	ids := s.visible(ctx, c)
	return slices.ContainsFunc(objects, func(o string) bool { return ids[o] })
}

// keep gives the elements that may be seen; the list's own memory may be shared and is left alone.
func keep[T any](list []T, sees func(T) bool) []T {
	var out []T
	for _, e := range list {
		if sees(e) {
			out = append(out, e)
		}
	}
	return out
}

// limited takes out of an answer, or of one message of a stream, what its caller may not see. It returns nil
// when nothing is left of the message.
func (s *Server) limited(ctx context.Context, c *caller, m proto.Message) proto.Message {
	if !c.rights.Limited() && !c.rights.Narrow(c.method) {
		return m
	}
	sees := c.rights.Sees
	narrow := c.rights.Narrow(c.method)
	switch r := m.(type) {
	case *apiv1.ListVMsResponse:
		r.Vms = keep(r.Vms, func(v *apiv1.VM) bool { return sees("vm", v.Id, v.Name) })
	case *apiv1.ListVolumesResponse:
		r.Volumes = keep(r.Volumes, func(v *apiv1.Volume) bool { return sees("volume", v.Id, v.Name) })
	case *apiv1.ListSnapshotsResponse:
		r.Snapshots = keep(r.Snapshots, func(v *apiv1.Snapshot) bool {
			return sees("snapshot", v.Id, v.VolumeName+"@"+v.Name) || sees("volume", v.VolumeId, v.VolumeName)
		})
	case *apiv1.ListTemplatesResponse:
		r.Templates = keep(r.Templates, func(v *apiv1.Template) bool { return sees("template", v.Id, v.Name) })
	case *apiv1.ListImportsResponse:
		r.Imports = keep(r.Imports, func(v *apiv1.Import) bool { return sees("template", v.Id, v.Name) })
	case *apiv1.ListNetworksResponse:
		r.Networks = keep(r.Networks, func(v *apiv1.Network) bool { return sees("network", v.Id, v.Name) })
	case *apiv1.ListNICsResponse:
		r.Nics = keep(r.Nics, func(v *apiv1.NIC) bool { return sees("nic", v.Id, v.Name) })
	case *apiv1.ListSecurityGroupsResponse:
		r.SecurityGroups = keep(r.SecurityGroups, func(v *apiv1.SecurityGroup) bool { return sees("security_group", v.Id, v.Name) })
	case *apiv1.ListOperationsResponse:
		if narrow {
			r.Operations = keep(r.Operations, func(v *apiv1.Operation) bool { return s.concerns(ctx, c, v.Objects) })
		}
	case *apiv1.Operation:
		if narrow && !s.concerns(ctx, c, r.Objects) {
			return nil
		}
	case *apiv1.VMEvent:
		if r.Vm != nil && !sees("vm", r.Vm.Id, r.Vm.Name) {
			return nil
		}
	case *apiv1.Event:
		if narrow && !s.concerns(ctx, c, r.Objects) {
			return nil
		}
	case *apiv1.LogResult:
		if narrow && r.Entry != nil && !s.concerns(ctx, c, r.Entry.Objects) {
			if r.PageToken == "" && !r.CaughtUp && r.Missed == 0 {
				return nil
			}
			r.Entry = nil
		}
	}
	return m
}

// noSuchOperation is the answer for one that is not there or not to be seen.
func noSuchOperation() error {
	return errs.New(errs.Denied, "you may not read this operation").Because("NOT_GRANTED").Do("ask the host's administrator")
}
