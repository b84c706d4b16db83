package conformance_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/mvirt/mvirt/sdk/conformance"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/sdktest"
	"github.com/mvirt/mvirt/sdk/sdktest/fakeplugin"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// The zoo: plugins that break their contract in one way each, as plugins in the wild do. The suite is worth
// what it catches: each animal must be caught by the check named here.
var zoo = []struct {
	name  string
	kind  service.Kind
	check string
	wrap  func(service.Base) service.Base
}{
	{"takes any name", service.KindStorage, "volume names", func(b service.Base) service.Base { return anyName{b.(*sdktest.Storage)} }},
	{"a create is a new object each time", service.KindStorage, "volume create is idempotent", func(b service.Base) service.Base { return newEachTime{b.(*sdktest.Storage)} }},
	{"lists in the order of a map", service.KindStorage, "volume get and list", func(b service.Base) service.Base { return unordered{b.(*sdktest.Storage)} }},
	{"a delete of nothing fails", service.KindStorage, "volume not found", func(b service.Base) service.Base { return strictDelete{b.(*sdktest.Storage)} }},
	{"errors without kinds", service.KindStorage, "volume not found", func(b service.Base) service.Base { return plainErrors{b.(*sdktest.Storage)} }},
	{"shrinks silently", service.KindStorage, "volume resize", func(b service.Base) service.Base { return shrinks{b.(*sdktest.Storage)} }},
	{"rolls back under a running VM", service.KindStorage, "rollback", func(b service.Base) service.Base { return rollsBack{b.(*sdktest.Storage)} }},
	{"two writers", service.KindStorage, "volume attach", func(b service.Base) service.Base { return twoWriters{b.(*sdktest.Storage)} }},
	{"a clone is the origin", service.KindStorage, "clones are apart", func(b service.Base) service.Base { return sharing{b.(*sdktest.Storage)} }},
	{"ignores checksums", service.KindStorage, "import of damaged images", func(b service.Base) service.Base { return noChecksum{b.(*sdktest.Storage)} }},
	{"ignores cancel", service.KindStorage, "import cancel", func(b service.Base) service.Base { return noCancel{b.(*sdktest.Storage)} }},
	{"one address twice", service.KindNet, "nic addresses", func(b service.Base) service.Base { return &oneAddress{Net: b.(*sdktest.Net)} }},
	{"a full subnet gives a NIC without address", service.KindNet, "subnet full", func(b service.Base) service.Base { return noAddress{b.(*sdktest.Net)} }},
	{"keeps networks apart by subnet", service.KindNet, "networks may overlap", func(b service.Base) service.Base { return noOverlap{b.(*sdktest.Net)} }},
	{"deletes networks in use", service.KindNet, "network in use", func(b service.Base) service.Base { return deletesUsed{b.(*sdktest.Net)} }},
	{"matches object prefixes", service.KindLog, "objects are exact", func(b service.Base) service.Base { return prefixes{b.(*sdktest.Log)} }},
	{"acknowledges before it stores", service.KindLog, "append is durable", func(b service.Base) service.Base { return &lazy{Log: b.(*sdktest.Log)} }},
	{"stores half of a bad batch", service.KindLog, "append is all or none", func(b service.Base) service.Base { return half{b.(*sdktest.Log)} }},
	{"follow loses what comes meanwhile", service.KindLog, "follow has no gap and no duplicate", func(b service.Base) service.Base { return gap{b.(*sdktest.Log)} }},
	{"limit takes the oldest", service.KindLog, "query order and limit", func(b service.Base) service.Base { return oldest{b.(*sdktest.Log)} }},
	{"ignores generations", service.KindVMM, "vm update", func(b service.Base) service.Base { return lastWins{b.(*sdktest.VMM)} }},
	{"deletes running VMs", service.KindVMM, "vm lifecycle", func(b service.Base) service.Base { return deletesRunning{b.(*sdktest.VMM)} }},
	{"watch without a snapshot", service.KindVMM, "watch", func(b service.Base) service.Base { return noSnapshot{b.(*sdktest.VMM)} }},
	{"panics", service.KindLog, "log stats", func(b service.Base) service.Base { return panics{b.(*sdktest.Log)} }},
	{"hangs at its end", service.KindLog, "shutdown", func(b service.Base) service.Base { return hangs{b.(*sdktest.Log)} }},
	{"dies in a call", service.KindLog, "log stats", func(b service.Base) service.Base { return dies{b.(*sdktest.Log)} }},
}

const zooEnv = "MVIRT_ZOO"

func zooHook() {
	name := os.Getenv(zooEnv)
	for _, z := range zoo {
		if z.name == name {
			plugin.Main(fakeplugin.Program(z.kind, func(_ plugin.Env, b service.Base) service.Base { return z.wrap(b) }))
		}
	}
}

func TestZoo(t *testing.T) {
	for _, z := range zoo {
		t.Run(z.name, func(t *testing.T) {
			t.Parallel()
			cfg := conformance.Config{Command: []string{"/proc/self/exe", "--data-dir", t.TempDir()}, Env: []string{zooEnv + "=" + z.name}, Only: []string{z.check},
				Kernel: os.Args[0], BootMarker: "login: "}
			ran, caught := 0, false
			err := conformance.Run(t.Context(), z.kind, cfg, func(r conformance.Result) {
				ran++
				if r.Name == z.check && len(r.Failures) > 0 {
					caught = true
					t.Logf("caught: %.200s", r.Failures[0])
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if ran == 0 || !caught {
				t.Errorf("%d checks ran, and %q did not catch it", ran, z.check)
			}
		})
	}
}

// TestFrozenNames: names of checks are public.
func TestFrozenNames(t *testing.T) {
	b, err := os.ReadFile("testdata/names.golden")
	if err != nil {
		t.Fatal(err)
	}
	var is []string
	for _, k := range service.Kinds() {
		for _, n := range conformance.Names(k) {
			is = append(is, string(k)+"/"+n)
		}
	}
	for _, l := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if !slices.Contains(is, l) {
			t.Errorf("the check %q is gone", l)
		}
	}
}

type anyName struct{ *sdktest.Storage }

func (s anyName) CreateVolume(ctx context.Context, r storage.CreateVolumeRequest) (storage.Volume, error) {
	if ident.CheckName("", r.Name) != nil {
		r.Name = "x" + r.ID[:8] + r.ID[len(r.ID)-12:]
	}
	return s.Storage.CreateVolume(ctx, r)
}

type newEachTime struct{ *sdktest.Storage }

func (s newEachTime) CreateVolume(ctx context.Context, r storage.CreateVolumeRequest) (storage.Volume, error) {
	r.ID = ident.New()
	return s.Storage.CreateVolume(ctx, r)
}

type unordered struct{ *sdktest.Storage }

func (s unordered) ListVolumes(ctx context.Context) ([]storage.Volume, error) {
	l, err := s.Storage.ListVolumes(ctx)
	slices.Reverse(l)
	return l, err
}

type strictDelete struct{ *sdktest.Storage }

func (s strictDelete) DeleteVolume(ctx context.Context, r storage.DeleteVolumeRequest) error {
	if _, err := s.GetVolume(ctx, storage.Ref{Ref: r.Ref}); err != nil {
		return err
	}
	return s.Storage.DeleteVolume(ctx, r)
}

type plainErrors struct{ *sdktest.Storage }

func (s plainErrors) GetVolume(ctx context.Context, r storage.Ref) (storage.Volume, error) {
	v, err := s.Storage.GetVolume(ctx, r)
	if err != nil {
		err = errors.New(err.Error())
	}
	return v, err
}

type shrinks struct{ *sdktest.Storage }

func (s shrinks) ResizeVolume(ctx context.Context, r storage.ResizeVolumeRequest) (storage.Volume, error) {
	v, err := s.Storage.ResizeVolume(ctx, r)
	if errs.KindOf(err) == errs.Invalid {
		return s.GetVolume(ctx, storage.Ref{Ref: r.Ref})
	}
	return v, err
}

type rollsBack struct{ *sdktest.Storage }

func (s rollsBack) Rollback(ctx context.Context, r storage.RollbackRequest) error {
	err := s.Storage.Rollback(ctx, r)
	if errs.ReasonOf(err) == "VOLUME_IN_USE" {
		return nil
	}
	return err
}

type twoWriters struct{ *sdktest.Storage }

func (s twoWriters) Attach(ctx context.Context, r storage.AttachRequest) (storage.Attachment, error) {
	a, err := s.Storage.Attach(ctx, r)
	if errs.ReasonOf(err) == "VOLUME_IN_USE" {
		return storage.Attachment{Path: "/x", Format: storage.FormatRaw}, nil
	}
	return a, err
}

type sharing struct{ *sdktest.Storage }

func (s sharing) Attach(ctx context.Context, r storage.AttachRequest) (storage.Attachment, error) {
	v, err := s.GetVolume(ctx, storage.Ref{Ref: r.VolumeID})
	a, aerr := s.Storage.Attach(ctx, r)
	if err == nil && aerr == nil && v.OriginType == "volume" { // its clones are links to what they came from
		a.Path = strings.Replace(a.Path, v.ID, v.OriginID, 1)
	}
	return a, aerr
}

type noChecksum struct{ *sdktest.Storage }

func (s noChecksum) StartImport(ctx context.Context, r storage.ImportRequest) (storage.Import, error) {
	r.Checksum = ""
	return s.Storage.StartImport(ctx, r)
}

type noCancel struct{ *sdktest.Storage }

func (s noCancel) CancelImport(context.Context, storage.Ref) error { return nil }

func (s noCancel) WatchImport(ctx context.Context, r storage.Ref, fn func(storage.Import) error) error {
	return s.Storage.WatchImport(ctx, r, func(i storage.Import) error {
		if err := fn(i); err != nil {
			return err
		}
		i.State = storage.ImportDone // and it appears
		return fn(i)
	})
}

type oneAddress struct {
	*sdktest.Net
	mu    sync.Mutex
	first net.NIC
}

func (n *oneAddress) CreateNIC(ctx context.Context, r net.CreateNICRequest) (net.NIC, error) {
	v, err := n.Net.CreateNIC(ctx, r)
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.first.IPv4.IsValid() {
		n.first = v
	}
	v.IPv4 = n.first.IPv4
	return v, err
}

type noAddress struct{ *sdktest.Net }

func (n noAddress) CreateNIC(ctx context.Context, r net.CreateNICRequest) (net.NIC, error) {
	v, err := n.Net.CreateNIC(ctx, r)
	if errs.KindOf(err) == errs.Exhausted {
		return net.NIC{ID: r.ID, Name: "x", NetworkID: r.NetworkID}, nil
	}
	return v, err
}

type noOverlap struct{ *sdktest.Net }

func (n noOverlap) CreateNetwork(ctx context.Context, r net.CreateNetworkRequest) (net.Network, error) {
	list, err := n.ListNetworks(ctx)
	for _, o := range list {
		if o.ID != r.ID && o.Subnet4.Overlaps(r.Subnet4) {
			return net.Network{}, errs.New(errs.Exists, "overlaps %s", o.Name)
		}
	}
	if err != nil {
		return net.Network{}, err
	}
	return n.Net.CreateNetwork(ctx, r)
}

type deletesUsed struct{ *sdktest.Net }

func (n deletesUsed) DeleteNetwork(ctx context.Context, r net.Ref) error {
	err := n.Net.DeleteNetwork(ctx, r)
	if errs.KindOf(err) == errs.Precondition {
		return nil
	}
	return err
}

type prefixes struct{ *sdktest.Log }

func (l prefixes) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	want := q.Objects
	q.Objects = nil
	return l.Log.Query(ctx, q, func(r log.Result) error {
		for _, o := range r.Entry.Objects {
			for _, w := range want {
				if strings.HasPrefix(o, w) {
					return fn(r)
				}
			}
		}
		return nil
	})
}

type lazy struct {
	*sdktest.Log
	mu   sync.Mutex
	last []log.Entry
}

// Append stores a batch when the next one comes.
func (l *lazy) Append(ctx context.Context, e []log.Entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.Log.Append(ctx, l.last)
	l.last = slices.Clone(e)
	return err
}

type half struct{ *sdktest.Log }

func (l half) Append(ctx context.Context, list []log.Entry) error {
	for _, e := range list {
		if err := l.Log.Append(ctx, []log.Entry{e}); err != nil {
			return err
		}
	}
	return nil
}

type gap struct{ *sdktest.Log }

func (l gap) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	n := 0
	return l.Log.Query(ctx, q, func(r log.Result) error {
		if n++; q.Follow && n%50 == 49 && !r.CaughtUp {
			return nil
		}
		return fn(r)
	})
}

type oldest struct{ *sdktest.Log }

func (l oldest) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	if q.NewestFirst && q.Limit > 0 {
		var list []log.Result
		q.NewestFirst = false
		if err := l.Log.Query(ctx, q, func(r log.Result) error { list = append(list, r); return nil }); err != nil {
			return err
		}
		slices.Reverse(list)
		for _, r := range list {
			if err := fn(r); err != nil {
				return err
			}
		}
		return nil
	}
	return l.Log.Query(ctx, q, fn)
}

type lastWins struct{ *sdktest.VMM }

func (m lastWins) Update(ctx context.Context, r vmm.UpdateRequest) (vmm.VM, error) {
	if v, err := m.Get(ctx, vmm.Ref{Ref: r.ID}); err == nil {
		r.Generation = v.Generation
	}
	return m.VMM.Update(ctx, r)
}

type deletesRunning struct{ *sdktest.VMM }

func (m deletesRunning) Delete(ctx context.Context, r vmm.Ref) error {
	m.VMM.Kill(ctx, r)
	return m.VMM.Delete(ctx, r)
}

type noSnapshot struct{ *sdktest.VMM }

func (m noSnapshot) Watch(ctx context.Context, fn func(vmm.Event) error) error {
	return m.VMM.Watch(ctx, func(e vmm.Event) error {
		if e.Type == vmm.EventSnapshot {
			return nil
		}
		return fn(e)
	})
}

type panics struct{ *sdktest.Log }

func (l panics) Stats(context.Context) (log.Stats, error) { panic("index out of range, say") }

type hangs struct{ *sdktest.Log }

func (l hangs) Shutdown(context.Context) error { select {} }

type dies struct{ *sdktest.Log }

func (l dies) Stats(context.Context) (log.Stats, error) {
	os.Exit(7)
	return log.Stats{}, nil
}
