package wire

import (
	"context"

	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
	"github.com/mvirt/mvirt/sdk/internal/pb/hostpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/netpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/storagepb"
	"github.com/mvirt/mvirt/sdk/internal/pb/vmmpb"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// PluginServer serves mvirt.plugin.v1.
type PluginServer struct {
	pluginpb.UnimplementedPluginServer
	Info service.Info
	Base service.Base
	Stop func(context.Context) error // ends the plugin in order
}

// Describe implements mvirt.plugin.v1.
func (s *PluginServer) Describe(context.Context, *pluginpb.Empty) (*pluginpb.Info, error) {
	return serviceInfoToPB(&Enc{}, &s.Info), nil
}

// GetHealth implements mvirt.plugin.v1.
func (s *PluginServer) GetHealth(ctx context.Context, _ *pluginpb.Empty) (*pluginpb.Health, error) {
	h, err := s.Base.Health(ctx)
	if err != nil {
		return nil, grpcerr.ToStatus(withOp("plugin.Health", err))
	}
	return serviceHealthToPB(&Enc{}, &h), nil
}

// Shutdown implements mvirt.plugin.v1.
func (s *PluginServer) Shutdown(ctx context.Context, _ *pluginpb.Empty) (*pluginpb.Empty, error) {
	if err := s.Stop(ctx); err != nil {
		return nil, grpcerr.ToStatus(withOp("plugin.Shutdown", err))
	}
	return &pluginpb.Empty{}, nil
}

// Register registers impl, which is of one of the four kinds, on s.
func Register(s grpc.ServiceRegistrar, impl service.Base, x *Exchange) (service.Kind, bool) {
	switch v := impl.(type) {
	case storage.Service:
		storagepb.RegisterStorageServer(s, &storageServer{impl: v, x: x})
		return service.KindStorage, true
	case net.Service:
		netpb.RegisterNetServer(s, &netServer{impl: v, x: x})
		return service.KindNet, true
	case vmm.Service:
		vmmpb.RegisterVMMServer(s, &vmmServer{impl: v, x: x})
		return service.KindVMM, true
	case log.Service:
		logpb.RegisterLogServer(s, &logServer{impl: v, x: x})
		return service.KindLog, true
	}
	return "", false
}

// KindOf says of which kind an implementation is.
func KindOf(impl service.Base) (service.Kind, bool) {
	switch impl.(type) {
	case storage.Service:
		return service.KindStorage, true
	case net.Service:
		return service.KindNet, true
	case vmm.Service:
		return service.KindVMM, true
	case log.Service:
		return service.KindLog, true
	}
	return "", false
}

// Features lists what an implementation can do beyond its contract, from the optional interfaces it satisfies.
func Features(impl service.Base) (list []service.Feature) {
	add := func(has bool, f service.Feature) {
		if has {
			list = append(list, f)
		}
	}
	_, backup := impl.(service.Backuper)
	switch impl.(type) {
	case storage.Service:
		add(backup, service.FeatureStorageBackup)
	case net.Service:
		_, update := impl.(net.Updater)
		_, v6 := impl.(net.IPv6er)
		_, sg := impl.(net.SecurityGrouper)
		_, bridge := impl.(net.Bridger)
		_, vhost := impl.(net.VhostUserer)
		add(update, service.FeatureNetUpdate)
		add(v6, service.FeatureNetIPv6)
		add(sg, service.FeatureNetSecurity)
		add(bridge, service.FeatureNetBridge)
		add(backup, service.FeatureNetBackup)
		add(vhost, service.FeatureNetVhostUser)
	case vmm.Service:
		_, disk := impl.(vmm.DiskHotplugger)
		_, nic := impl.(vmm.NICHotplugger)
		_, resize := impl.(vmm.Resizer)
		_, snap := impl.(vmm.Snapshotter)
		_, count := impl.(vmm.Counter)
		_, grow := impl.(vmm.DiskResizer)
		_, vhost := impl.(vmm.VhostUserer)
		add(disk, service.FeatureVMMHotplugDisk)
		add(nic, service.FeatureVMMHotplugNIC)
		add(resize, service.FeatureVMMResize)
		add(snap, service.FeatureVMMSnapshot)
		add(count, service.FeatureVMMCounters)
		add(backup, service.FeatureVMMBackup)
		add(grow, service.FeatureVMMDiskResize)
		add(vhost, service.FeatureVMMVhostUser)
	case log.Service:
		_, verify := impl.(log.Verifier)
		add(verify, service.FeatureLogVerify)
		add(backup, service.FeatureLogBackup)
	}
	return list
}

// baseClient is what the clients of all kinds share.
type baseClient struct {
	x        *Exchange
	plugin   pluginpb.PluginClient
	features map[service.Feature]bool
}

// Has tells whether the plugin declared a feature.
func (c *baseClient) Has(f service.Feature) bool { return c.features[f] }

func (c *baseClient) has(f service.Feature) bool { return c.features[f] }

// Health implements service.Base.
func (c *baseClient) Health(ctx context.Context) (service.Health, error) {
	return invoke(ctx, c.x, "plugin.Health", struct{}{}, emptyToPB, c.plugin.GetHealth, serviceHealthFromPB)
}

// Shutdown implements service.Base.
func (c *baseClient) Shutdown(ctx context.Context) error {
	_, err := invoke(ctx, c.x, "plugin.Shutdown", struct{}{}, emptyToPB, c.plugin.Shutdown, emptyFromPB)
	return err
}

// Describe asks a plugin who it is.
func Describe(ctx context.Context, conn grpc.ClientConnInterface) (service.Info, error) {
	return invoke(ctx, nil, "plugin.Describe", struct{}{}, emptyToPB, pluginpb.NewPluginClient(conn).Describe, serviceInfoFromPB)
}

// Clients are the typed clients of a connection; only the one of the plugin's kind is set.
type Clients struct {
	Base    service.Base
	Storage *StorageClient
	Net     *NetClient
	VMM     *VMMClient
	Log     *LogClient
}

// The clients, by names that other packages can say.
type (
	StorageClient = storageClient
	NetClient     = netClient
	VMMClient     = vmmClient
)

// NewClients makes the client for a plugin that described itself as info.
func NewClients(conn grpc.ClientConnInterface, info service.Info, x *Exchange) Clients {
	b := baseClient{x: x, plugin: pluginpb.NewPluginClient(conn), features: map[service.Feature]bool{}}
	for _, f := range info.Features {
		b.features[f] = true
	}
	c := Clients{}
	switch info.Kind {
	case service.KindStorage:
		c.Storage = &storageClient{b, storagepb.NewStorageClient(conn)}
		c.Base = c.Storage
	case service.KindNet:
		c.Net = &netClient{b, netpb.NewNetClient(conn)}
		c.Base = c.Net
	case service.KindVMM:
		c.VMM = &vmmClient{b, vmmpb.NewVMMClient(conn)}
		c.Base = c.VMM
	case service.KindLog:
		c.Log = &LogClient{logClient: logClient{b, logpb.NewLogClient(conn)}}
		c.Base = c.Log
	}
	return c
}

// HostServer serves mvirt.host.v1 for one plugin.
type HostServer struct {
	hostpb.UnimplementedHostServer
	Host service.Host
}

// Audit implements mvirt.host.v1.
func (s *HostServer) Audit(ctx context.Context, m *pluginpb.AuditRecord) (*pluginpb.Empty, error) {
	return serve(ctx, nil, "host.Audit", m, serviceAuditRecordFromPB, noResp(s.Host.Audit), emptyToPB)
}

// Publish implements mvirt.host.v1.
func (s *HostServer) Publish(ctx context.Context, m *pluginpb.Event) (*pluginpb.Empty, error) {
	return serve(ctx, nil, "host.Publish", m, serviceEventFromPB, noResp(s.Host.Publish), emptyToPB)
}

// HostClient is a service.Host at the other end of a connection.
type HostClient struct{ rpc hostpb.HostClient }

// NewHostClient makes one.
func NewHostClient(conn grpc.ClientConnInterface) *HostClient {
	return &HostClient{hostpb.NewHostClient(conn)}
}

// Audit implements service.Host.
func (c *HostClient) Audit(ctx context.Context, rec service.AuditRecord) error {
	_, err := invoke(ctx, nil, "host.Audit", rec, serviceAuditRecordToPB, c.rpc.Audit, emptyFromPB)
	return err
}

// Publish implements service.Host.
func (c *HostClient) Publish(ctx context.Context, ev service.Event) error {
	_, err := invoke(ctx, nil, "host.Publish", ev, serviceEventToPB, c.rpc.Publish, emptyFromPB)
	return err
}
