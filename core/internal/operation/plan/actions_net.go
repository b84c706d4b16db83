package plan

import (
	"context"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

type attachNIC struct {
	VMID     string
	NICID    string
	ForStart bool `json:",omitempty"` // as in attachVolume
}

func (a actions) net() map[string]operation.Action {
	n := a.svc.Net
	return map[string]operation.Action{
		"net.create_network": operation.Typed(
			func(ctx context.Context, _ *operation.Run, req net.CreateNetworkRequest) error {
				_, err := n.CreateNetwork(ctx, req)
				return err
			},
			func(ctx context.Context, _ *operation.Run, req net.CreateNetworkRequest) error {
				return gone(n.DeleteNetwork(ctx, net.Ref{Ref: req.ID}))
			},
			func(ctx context.Context, _ *operation.Run, req net.CreateNetworkRequest) (bool, error) {
				return found(second(n.GetNetwork(ctx, net.Ref{Ref: req.ID})))
			}),
		"net.update_network": done(n.UpdateNetwork),
		"net.delete_network": doneGone(n.DeleteNetwork),
		"net.create_nic": operation.Typed(
			func(ctx context.Context, r *operation.Run, req net.CreateNICRequest) error {
				nic, err := n.CreateNIC(ctx, req)
				if err == nil {
					r.Set("mac:"+nic.ID, nic.MAC)
				}
				return err
			},
			func(ctx context.Context, _ *operation.Run, req net.CreateNICRequest) error {
				return gone(n.DeleteNIC(ctx, net.Ref{Ref: req.ID}))
			},
			func(ctx context.Context, _ *operation.Run, req net.CreateNICRequest) (bool, error) {
				return found(second(n.GetNIC(ctx, net.Ref{Ref: req.ID})))
			}),
		"net.update_nic": done(n.UpdateNIC),
		"net.delete_nic": doneGone(n.DeleteNIC),
		"net.attach": operation.Typed(a.attachNIC,
			func(ctx context.Context, _ *operation.Run, at attachNIC) error {
				if lives, err := a.lives(ctx, at.ForStart, at.VMID); lives || err != nil {
					return err
				}
				return gone(n.Detach(ctx, net.DetachRequest{NICID: at.NICID, VMID: at.VMID}))
			}, nil),
		"net.detach": doneGone(n.Detach),
		"net.create_group": operation.Typed(
			func(ctx context.Context, _ *operation.Run, req net.CreateSecurityGroupRequest) error {
				_, err := n.CreateSecurityGroup(ctx, req)
				return err
			},
			func(ctx context.Context, _ *operation.Run, req net.CreateSecurityGroupRequest) error {
				return gone(n.DeleteSecurityGroup(ctx, net.Ref{Ref: req.ID}))
			},
			func(ctx context.Context, _ *operation.Run, req net.CreateSecurityGroupRequest) (bool, error) {
				return found(second(n.GetSecurityGroup(ctx, net.Ref{Ref: req.ID})))
			}),
		"net.set_group_rules": done(n.SetSecurityGroupRules),
		"net.delete_group":    doneGone(n.DeleteSecurityGroup),
	}
}

// attachNIC makes the data path and keeps it for vmm.start or a hot-plug. Its descriptors are closed when
// the operation ends; the hypervisor has its own by then.
func (a actions) attachNIC(ctx context.Context, r *operation.Run, at attachNIC) error {
	owner, err := a.owner(ctx, r, at.VMID)
	if err != nil {
		return err
	}
	path, err := a.svc.Net.Attach(ctx, net.AttachRequest{NICID: at.NICID, Owner: owner, Modes: a.modes(), Queues: 1})
	if err != nil {
		return err
	}
	r.Close(path.TAP...)
	r.Set("nic:"+at.NICID, path)
	return nil
}

// modes are the data paths that the hypervisor can take, best first.
func (a actions) modes() []net.AttachMode {
	m := []net.AttachMode{net.AttachTAPFD, net.AttachTAPName}
	if a.svc.Has(service.KindVMM, service.FeatureVMMVhostUser) {
		m = append([]net.AttachMode{net.AttachVhostUser}, m...)
	}
	return m
}
