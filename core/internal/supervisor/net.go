package supervisor

import (
	"context"

	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

type netProxy struct{ proxy }

func (p netProxy) CreateNetwork(ctx context.Context, req net.CreateNetworkRequest) (net.Network, error) {
	return unary(ctx, p.proxy, method{op: "net.CreateNetwork"}, net.Service.CreateNetwork, req)
}

func (p netProxy) GetNetwork(ctx context.Context, req net.Ref) (net.Network, error) {
	return unary(ctx, p.proxy, method{op: "net.GetNetwork"}, net.Service.GetNetwork, req)
}

func (p netProxy) ListNetworks(ctx context.Context) ([]net.Network, error) {
	return unary0(ctx, p.proxy, method{op: "net.ListNetworks"}, net.Service.ListNetworks)
}

func (p netProxy) DeleteNetwork(ctx context.Context, req net.Ref) error {
	return command(ctx, p.proxy, method{op: "net.DeleteNetwork"}, net.Service.DeleteNetwork, req)
}

func (p netProxy) CreateNIC(ctx context.Context, req net.CreateNICRequest) (net.NIC, error) {
	return unary(ctx, p.proxy, method{op: "net.CreateNIC"}, net.Service.CreateNIC, req)
}

func (p netProxy) GetNIC(ctx context.Context, req net.Ref) (net.NIC, error) {
	return unary(ctx, p.proxy, method{op: "net.GetNIC"}, net.Service.GetNIC, req)
}

func (p netProxy) ListNICs(ctx context.Context, req net.ListNICsRequest) ([]net.NIC, error) {
	return unary(ctx, p.proxy, method{op: "net.ListNICs"}, net.Service.ListNICs, req)
}

func (p netProxy) DeleteNIC(ctx context.Context, req net.Ref) error {
	return command(ctx, p.proxy, method{op: "net.DeleteNIC"}, net.Service.DeleteNIC, req)
}

func (p netProxy) Attach(ctx context.Context, req net.AttachRequest) (net.Attachment, error) {
	return unary(ctx, p.proxy, method{op: "net.Attach"}, net.Service.Attach, req)
}

func (p netProxy) Detach(ctx context.Context, req net.DetachRequest) error {
	return command(ctx, p.proxy, method{op: "net.Detach"}, net.Service.Detach, req)
}

func (p netProxy) UpdateNetwork(ctx context.Context, req net.UpdateNetworkRequest) (net.Network, error) {
	return unary(ctx, p.proxy, method{op: "net.UpdateNetwork", feature: service.FeatureNetUpdate}, net.Updater.UpdateNetwork, req)
}

func (p netProxy) UpdateNIC(ctx context.Context, req net.UpdateNICRequest) (net.NIC, error) {
	return unary(ctx, p.proxy, method{op: "net.UpdateNIC", feature: service.FeatureNetUpdate}, net.Updater.UpdateNIC, req)
}

func (p netProxy) CreateSecurityGroup(ctx context.Context, req net.CreateSecurityGroupRequest) (net.SecurityGroup, error) {
	return unary(ctx, p.proxy, method{op: "net.CreateSecurityGroup", feature: service.FeatureNetSecurity}, net.SecurityGrouper.CreateSecurityGroup, req)
}

func (p netProxy) GetSecurityGroup(ctx context.Context, req net.Ref) (net.SecurityGroup, error) {
	return unary(ctx, p.proxy, method{op: "net.GetSecurityGroup", feature: service.FeatureNetSecurity}, net.SecurityGrouper.GetSecurityGroup, req)
}

func (p netProxy) ListSecurityGroups(ctx context.Context) ([]net.SecurityGroup, error) {
	return unary0(ctx, p.proxy, method{op: "net.ListSecurityGroups", feature: service.FeatureNetSecurity}, net.SecurityGrouper.ListSecurityGroups)
}

func (p netProxy) SetSecurityGroupRules(ctx context.Context, req net.SetSecurityGroupRulesRequest) (net.SecurityGroup, error) {
	return unary(ctx, p.proxy, method{op: "net.SetSecurityGroupRules", feature: service.FeatureNetSecurity}, net.SecurityGrouper.SetSecurityGroupRules, req)
}

func (p netProxy) DeleteSecurityGroup(ctx context.Context, req net.Ref) error {
	return command(ctx, p.proxy, method{op: "net.DeleteSecurityGroup", feature: service.FeatureNetSecurity}, net.SecurityGrouper.DeleteSecurityGroup, req)
}
