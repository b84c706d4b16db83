package supervisor

import (
	"context"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
)

type vmmProxy struct{ proxy }

func (p vmmProxy) Create(ctx context.Context, req vmm.CreateRequest) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Create", once: req.Kernel != nil || req.Initramfs != nil}, vmm.Service.Create, req)
}

func (p vmmProxy) Get(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Get"}, vmm.Service.Get, req)
}

func (p vmmProxy) List(ctx context.Context) ([]vmm.VM, error) {
	return unary0(ctx, p.proxy, method{op: "vmm.List"}, vmm.Service.List)
}

func (p vmmProxy) Update(ctx context.Context, req vmm.UpdateRequest) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Update", once: req.Kernel != nil || req.Initramfs != nil}, vmm.Service.Update, req)
}

func (p vmmProxy) Delete(ctx context.Context, req vmm.Ref) error {
	return command(ctx, p.proxy, method{op: "vmm.Delete"}, vmm.Service.Delete, req)
}

func (p vmmProxy) Start(ctx context.Context, req vmm.StartRequest) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Start"}, vmm.Service.Start, req)
}

func (p vmmProxy) Stop(ctx context.Context, req vmm.StopRequest) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Stop", extra: req.Timeout}, vmm.Service.Stop, req)
}

func (p vmmProxy) Kill(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Kill"}, vmm.Service.Kill, req)
}

func (p vmmProxy) Pause(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Pause"}, vmm.Service.Pause, req)
}

func (p vmmProxy) Resume(ctx context.Context, req vmm.Ref) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Resume"}, vmm.Service.Resume, req)
}

func (p vmmProxy) Reboot(ctx context.Context, req vmm.RebootRequest) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Reboot", once: true, extra: req.Timeout}, vmm.Service.Reboot, req)
}

// Console is not repeated: what was typed may have been delivered.
func (p vmmProxy) Console(ctx context.Context, req vmm.ConsoleRequest, cio vmm.ConsoleIO) error {
	return stream(ctx, p.proxy, method{op: "vmm.Console", once: true}, new(bool),
		func(ctx context.Context, s vmm.Service) error { return s.Console(ctx, req, cio) })
}

func (p vmmProxy) Watch(ctx context.Context, fn func(vmm.Event) error) error {
	return server(ctx, p.proxy, method{op: "vmm.Watch"}, fn, func(ctx context.Context, s vmm.Service, fn func(vmm.Event) error) error {
		return s.Watch(ctx, fn)
	})
}

func (p vmmProxy) PlugDisk(ctx context.Context, req vmm.PlugDiskRequest) error {
	return command(ctx, p.proxy, method{op: "vmm.PlugDisk", feature: service.FeatureVMMHotplugDisk}, vmm.DiskHotplugger.PlugDisk, req)
}

func (p vmmProxy) UnplugDisk(ctx context.Context, req vmm.UnplugRequest) error {
	return command(ctx, p.proxy, method{op: "vmm.UnplugDisk", feature: service.FeatureVMMHotplugDisk}, vmm.DiskHotplugger.UnplugDisk, req)
}

func (p vmmProxy) PlugNIC(ctx context.Context, req vmm.PlugNICRequest) error {
	return command(ctx, p.proxy, method{op: "vmm.PlugNIC", feature: service.FeatureVMMHotplugNIC}, vmm.NICHotplugger.PlugNIC, req)
}

func (p vmmProxy) UnplugNIC(ctx context.Context, req vmm.UnplugRequest) error {
	return command(ctx, p.proxy, method{op: "vmm.UnplugNIC", feature: service.FeatureVMMHotplugNIC}, vmm.NICHotplugger.UnplugNIC, req)
}

func (p vmmProxy) DiskResized(ctx context.Context, req vmm.DiskResizedRequest) error {
	return command(ctx, p.proxy, method{op: "vmm.DiskResized", feature: service.FeatureVMMDiskResize}, vmm.DiskResizer.DiskResized, req)
}

func (p vmmProxy) Resize(ctx context.Context, req vmm.ResizeRequest) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Resize", feature: service.FeatureVMMResize}, vmm.Resizer.Resize, req)
}

func (p vmmProxy) Snapshot(ctx context.Context, req vmm.SnapshotRequest) (vmm.MemorySnapshot, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Snapshot", feature: service.FeatureVMMSnapshot, extra: memoryTime}, vmm.Snapshotter.Snapshot, req)
}

func (p vmmProxy) StartFromSnapshot(ctx context.Context, req vmm.StartFromSnapshotRequest) (vmm.VM, error) {
	return unary(ctx, p.proxy, method{op: "vmm.StartFromSnapshot", feature: service.FeatureVMMSnapshot, extra: memoryTime}, vmm.Snapshotter.StartFromSnapshot, req)
}

func (p vmmProxy) ListSnapshots(ctx context.Context, req vmm.Ref) ([]vmm.MemorySnapshot, error) {
	return unary(ctx, p.proxy, method{op: "vmm.ListSnapshots", feature: service.FeatureVMMSnapshot}, vmm.Snapshotter.ListSnapshots, req)
}

func (p vmmProxy) DeleteSnapshot(ctx context.Context, req vmm.Ref) error {
	return command(ctx, p.proxy, method{op: "vmm.DeleteSnapshot", feature: service.FeatureVMMSnapshot}, vmm.Snapshotter.DeleteSnapshot, req)
}

func (p vmmProxy) Counters(ctx context.Context, req vmm.Ref) (vmm.Counters, error) {
	return unary(ctx, p.proxy, method{op: "vmm.Counters", feature: service.FeatureVMMCounters}, vmm.Counter.Counters, req)
}

// memoryTime is what writing or reading a guest's memory may take beyond an ordinary call.
const memoryTime = 30 * time.Minute
