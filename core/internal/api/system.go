package api

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/core/internal/bus"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
)

type systemAPI struct {
	apiv1.UnimplementedSystemServer
	*Server
}

// GetStatus counts what there is. A plugin that does not answer at once is left out and named.
func (a *systemAPI) GetStatus(ctx context.Context, _ *apiv1.GetStatusRequest) (*apiv1.Status, error) {
	host, _ := os.Hostname()
	out := &apiv1.Status{Version: a.opt.Version, StartedAt: convert.Time(a.started), HostName: host, Cpus: uint32(runtime.NumCPU()), MemoryBytes: hostMemory(),
		Conditions: convert.Conditions(a.health.List("")), OperationsRunning: uint32(len(a.engine.List(false)))}
	if c := callerOf(ctx); c.who.Name != "" {
		out.Caller = fmt.Sprintf("%s (uid %d)", c.who.Name, c.who.UID)
	}
	for _, st := range a.sup.Statuses() {
		out.Plugins = append(out.Plugins, convert.Plugin(st, a.users.User))
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	ask := func(k service.Kind, fns ...func() error) {
		if !a.up(k) {
			out.Unavailable = append(out.Unavailable, string(k))
			return
		}
		for _, fn := range fns {
			wg.Go(func() {
				if err := fn(); err != nil {
					mu.Lock()
					defer mu.Unlock()
					if !slices.Contains(out.Unavailable, string(k)) {
						out.Unavailable = append(out.Unavailable, string(k))
					}
				}
			})
		}
	}
	if !a.up(service.KindLog) {
		out.Unavailable = append(out.Unavailable, string(service.KindLog))
	}
	// Which kinds are up is settled before the first answer arrives: the list is written under mu from then on.
	mu.Lock()
	ask(service.KindVMM, func() error {
		vms, err := a.vmm.List(ctx)
		out.Vms = uint32(len(vms))
		for _, vm := range vms {
			if vm.State == vmm.StateRunning || vm.State == vmm.StatePaused {
				out.VmsRunning++
			}
		}
		return err
	})
	ask(service.KindStorage, func() error {
		st, err := a.storage.Stats(ctx)
		if err == nil {
			out.Storage, out.Volumes, out.Templates = convert.StorageStats(st), st.Volumes, st.Templates
		}
		return err
	})
	ask(service.KindNet, func() error {
		all, err := a.net.ListNetworks(ctx)
		out.Networks = uint32(len(all))
		return err
	}, func() error {
		all, err := a.net.ListNICs(ctx, net.ListNICsRequest{})
		out.Nics = uint32(len(all))
		return err
	})
	mu.Unlock()
	wg.Wait()
	slices.Sort(out.Unavailable)
	return out, nil
}

// hostMemory is the host's memory in bytes (MemTotal of proc_meminfo(5)).
func hostMemory() uint64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if rest, ok := strings.CutPrefix(sc.Text(), "MemTotal:"); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			return n << 10
		}
	}
	return 0
}

// WatchEvents sends headers once it listens, so that a client knows from when on it misses nothing.
func (a *systemAPI) WatchEvents(req *apiv1.WatchEventsRequest, ss grpc.ServerStreamingServer[apiv1.Event]) error {
	if len(req.GetObjects()) > 1000 {
		return errs.Field("objects", "watch all, or at most 1,000", "%d objects", len(req.GetObjects()))
	}
	return a.bus.Listen(ss.Context(), req.GetObjects(), func() error { return ss.SendHeader(metadata.MD{}) }, func(e bus.Event, missed uint64) error {
		return ss.Send(&apiv1.Event{Time: convert.Time(e.Time), Type: e.Type, Objects: e.Objects, Labels: e.Labels, Message: e.Message, Missed: missed})
	})
}

type pluginsAPI struct {
	apiv1.UnimplementedPluginsServer
	*Server
}

func (a *pluginsAPI) List(context.Context, *apiv1.ListPluginsRequest) (*apiv1.ListPluginsResponse, error) {
	out := &apiv1.ListPluginsResponse{}
	for _, st := range a.sup.Statuses() {
		out.Plugins = append(out.Plugins, convert.Plugin(st, a.users.User))
	}
	return out, nil
}

// kind finds a plugin by its kind or its product's name.
func (a *pluginsAPI) kind(ref string) (service.Kind, error) {
	for _, st := range a.sup.Statuses() {
		if string(st.Kind) == ref || st.Info.Name != "" && st.Info.Name == ref {
			return st.Kind, nil
		}
	}
	if ref == "" {
		return "", errs.Field("kind", "give one of storage, net, vmm and log", "no plugin is named")
	}
	return "", errs.New(errs.NotFound, "there is no such plugin").With(errs.Resource{Type: "plugin", Name: shown(ref)}).Do("mvirt plugin ls lists them")
}

func (a *pluginsAPI) Get(_ context.Context, req *apiv1.GetPluginRequest) (*apiv1.Plugin, error) {
	k, err := a.kind(req.GetKind())
	if err != nil {
		return nil, err
	}
	return convert.Plugin(a.sup.Status(k), a.users.User), nil
}

func (a *pluginsAPI) Restart(ctx context.Context, req *apiv1.RestartPluginRequest) (*apiv1.Plugin, error) {
	k, err := a.kind(req.GetKind())
	if err != nil {
		return nil, err
	}
	if err := a.audit.Admit(); err != nil && k != service.KindLog { // a full spool must not stand in the way of its own cure
		return nil, err
	}
	if err := a.sup.Restart(ctx, k); err != nil {
		return nil, err
	}
	st := a.sup.Status(k)
	a.record(ctx, "plugin.restart", "ok", fmt.Sprintf("%s plugin restarted", k), "plugin:"+string(k))
	return convert.Plugin(st, a.users.User), nil
}

type operationsAPI struct {
	apiv1.UnimplementedOperationsServer
	*Server
}

func (a *operationsAPI) find(ctx context.Context, ref string) (operation.Operation, error) {
	o, err := find(ctx, kindOf[operation.Operation]{"operation", "mvirt operation ls --all",
		func(_ context.Context, ref string) (operation.Operation, error) { return a.engine.Get(ref) },
		func(context.Context) ([]operation.Operation, error) { return a.engine.List(true), nil },
		func(o operation.Operation) (string, string) { return o.ID, o.Title }, nil}, "ref", ref)
	if c := callerOf(ctx); err == nil && c.rights.Narrow(c.method) && !a.concerns(ctx, c, o.Objects) {
		return o, noSuchOperation()
	}
	return o, err
}

func (a *operationsAPI) List(_ context.Context, req *apiv1.ListOperationsRequest) (*apiv1.ListOperationsResponse, error) {
	out := &apiv1.ListOperationsResponse{}
	for _, o := range a.engine.List(req.GetAll()) {
		out.Operations = append(out.Operations, convert.Operation(o, grpcCode))
	}
	return out, nil
}

func (a *operationsAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.Operation, error) {
	o, err := a.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	return convert.Operation(o, grpcCode), nil
}

func (a *operationsAPI) Watch(req *apiv1.RefRequest, ss grpc.ServerStreamingServer[apiv1.Operation]) error {
	o, err := a.find(ss.Context(), req.GetRef())
	if err != nil {
		return err
	}
	return a.engine.Watch(ss.Context(), o.ID, func(o operation.Operation) error { return ss.Send(convert.Operation(o, grpcCode)) })
}

func (a *operationsAPI) Cancel(ctx context.Context, req *apiv1.RefRequest) (*apiv1.Operation, error) {
	o, err := a.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	ended := o.State.Final()
	if o, err = a.engine.Cancel(o.ID, callerOf(ctx).who); err != nil {
		return nil, err
	}
	if !ended {
		a.record(ctx, "operation.cancel", "ok", "operation "+o.Title+" cancelled", append([]string{o.ID}, o.Objects...)...)
	}
	return convert.Operation(o, grpcCode), nil
}
