package api

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/fake"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/supervisor"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
	"github.com/mvirt/mvirt/sdk/fdpass"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sup is a supervisor whose plugins are a fake world.
type sup struct {
	w    *fake.World
	mu   sync.Mutex
	down map[service.Kind]bool
	onUp map[service.Kind][]func(context.Context)
	ctx  context.Context
	wg   sync.WaitGroup
}

func newSup() *sup {
	s := &sup{w: fake.New(), down: map[service.Kind]bool{}, onUp: map[service.Kind][]func(context.Context){}}
	s.w.Gate = func(_ context.Context, call string, _ bool) error {
		k, _, _ := strings.Cut(call, ".")
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.down[service.Kind(k)] {
			return errs.New(errs.Unavailable, "the %s plugin is down", k).Because("PLUGIN_DOWN").Do("mvirt plugin show " + k)
		}
		return nil
	}
	return s
}

func (s *sup) Storage() supervisor.Storage                   { return s.w.Storage() }
func (s *sup) Net() supervisor.Net                           { return s.w.Net() }
func (s *sup) VMM() supervisor.VMM                           { return s.w.VMM() }
func (s *sup) Log() supervisor.Log                           { return s.w.Log() }
func (s *sup) Has(k service.Kind, f service.Feature) bool    { return s.w.Has(k, f) }
func (s *sup) Restart(context.Context, service.Kind) error   { return nil }
func (s *sup) OnUp(k service.Kind, fn func(context.Context)) { s.onUp[k] = append(s.onUp[k], fn) }
func (s *sup) Status(k service.Kind) supervisor.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := supervisor.Status{Kind: k, Configured: true, State: supervisor.StateUp, Info: service.Info{Kind: k, Name: "fake-" + string(k), Version: "1", ContractMajor: 1}}
	if s.down[k] {
		st.State, st.Reason = supervisor.StateWaiting, "killed"
	}
	return st
}

func (s *sup) Statuses() (out []supervisor.Status) {
	for _, k := range service.Kinds() {
		out = append(out, s.Status(k))
	}
	return out
}

func (s *sup) setDown(k service.Kind, down bool) {
	s.mu.Lock()
	s.down[k] = down
	s.mu.Unlock()
	if !down {
		s.up(k)
	}
}

func (s *sup) up(k service.Kind) {
	for _, fn := range s.onUp[k] {
		s.wg.Go(func() { fn(s.ctx) })
	}
}

// core is a core that serves on a socket, and a client of it.
type core struct {
	t      testing.TB
	sup    *sup
	dir    string
	srv    *Server
	health *health.Tracker
	conn   *grpc.ClientConn
	stop   func()
	tweak  func(*config.Config) // before the start; may be nil

	vms       apiv1.VMsClient
	volumes   apiv1.VolumesClient
	snapshots apiv1.SnapshotsClient
	templates apiv1.TemplatesClient
	networks  apiv1.NetworksClient
	nics      apiv1.NICsClient
	logs      apiv1.LogsClient
	system    apiv1.SystemClient
	ops       apiv1.OperationsClient
}

func newCore(t testing.TB) *core {
	c := &core{t: t, sup: newSup(), dir: t.TempDir(), health: &health.Tracker{}}
	c.start()
	t.Cleanup(func() { c.stop() })
	return c
}

func (c *core) start() {
	c.t.Helper()
	cfg := &config.Config{Core: config.Core{Socket: filepath.Join(c.dir, "m.sock"), SocketMode: 0o660, StateDir: filepath.Join(c.dir, "state"), StopTimeout: 5 * time.Second}}
	if c.tweak != nil {
		c.tweak(cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.sup.ctx, c.sup.onUp = ctx, map[service.Kind][]func(context.Context){}
	srv, err := New(Options{Config: cfg, Supervisor: c.sup, Health: c.health, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Version: "test"})
	if err != nil {
		c.t.Fatal(err)
	}
	c.srv = srv
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	for _, k := range service.Kinds() {
		c.sup.up(k)
	}
	conn, err := grpc.NewClient("unix:"+cfg.Core.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, inv grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return grpcerr.FromStatus(inv(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(true))...))
		}), grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		c.t.Fatal(err)
	}
	c.conn = conn
	c.vms, c.volumes, c.snapshots, c.templates = apiv1.NewVMsClient(conn), apiv1.NewVolumesClient(conn), apiv1.NewSnapshotsClient(conn), apiv1.NewTemplatesClient(conn)
	c.networks, c.nics, c.logs, c.system, c.ops = apiv1.NewNetworksClient(conn), apiv1.NewNICsClient(conn), apiv1.NewLogsClient(conn), apiv1.NewSystemClient(conn), apiv1.NewOperationsClient(conn)
	stopped := false
	c.stop = func() {
		if stopped {
			return
		}
		stopped = true
		conn.Close()
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("Run: %v", err)
		}
		c.sup.wg.Wait()
	}
	if _, err := c.system.GetStatus(c.ctx(), &apiv1.GetStatusRequest{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *core) ctx() context.Context { return c.t.Context() }

// furnish makes a template, a network and a volume.
func (c *core) furnish() {
	c.t.Helper()
	c.sup.w.AddTemplate("01900000-0000-7000-8000-0000000000aa", "debian-12", 1<<20)
	_, err := c.networks.Create(c.ctx(), &apiv1.CreateNetworkRequest{Name: "lan", Mode: "nat", Subnet4: "10.0.0.0/24"})
	c.ok(err)
	_, err = c.volumes.Create(c.ctx(), &apiv1.CreateVolumeRequest{Name: "data", SizeBytes: 1 << 20})
	c.ok(err)
}

func (c *core) ok(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatalf("%v (%s)", err, errs.RemedyOf(err))
	}
}

func (c *core) createVM(name string, start bool) *apiv1.VM {
	c.t.Helper()
	vm, err := c.vms.Create(c.ctx(), &apiv1.CreateVMRequest{Name: name, Start: start, MemoryBytes: 64 << 20,
		Disks: []*apiv1.NewDisk{{Template: "debian-12", SizeBytes: 2 << 20}}, Nics: []*apiv1.NewNIC{{Network: "lan"}}})
	c.ok(err)
	return vm
}

// audits are the messages of the audit entries about an object, oldest first.
func (c *core) audits(object string) (out []string) {
	c.t.Helper()
	q, err := c.logs.Query(c.ctx(), &apiv1.QueryLogsRequest{Objects: []string{object}, Levels: []string{"audit"}})
	c.ok(err)
	for {
		r, err := q.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		c.ok(err)
		out = append(out, r.GetEntry().GetMessage())
	}
}

func TestLifeOfAVM(t *testing.T) {
	c := newCore(t)
	c.furnish()
	vm := c.createVM("web", true)
	if vm.GetState() != "running" || len(vm.GetDisks()) != 1 || vm.GetDisks()[0].GetVolumeName() != "web-root" || !vm.GetDisks()[0].GetOwned() ||
		vm.GetNics()[0].GetNetworkName() != "lan" || vm.GetNics()[0].GetIpv4() == "" || vm.GetOperation() == "" {
		t.Fatalf("created: %v", vm)
	}
	if got := c.sup.w.String(); !strings.Contains(got, "volume web-root attached to web") || !strings.Contains(got, "nic web-nic0 attached to web") {
		t.Fatalf("world:\n%s", got)
	}
	list, err := c.vms.List(c.ctx(), &apiv1.ListVMsRequest{})
	c.ok(err)
	if l := list.GetVms(); len(l) != 1 || l[0].GetDisks()[0].GetVolumeName() != "web-root" || l[0].GetNics()[0].GetIpv4() != vm.GetNics()[0].GetIpv4() {
		t.Fatalf("list: %v", l)
	}
	_, err = c.vms.Delete(c.ctx(), &apiv1.DeleteRequest{Ref: "web"})
	if !errors.Is(err, errs.Precondition) || errs.RemedyOf(err) == "" {
		t.Fatalf("delete of a running VM: %v", err)
	}
	vm, err = c.vms.Stop(c.ctx(), &apiv1.StopVMRequest{Ref: vm.GetId()[:8]})
	c.ok(err)
	if vm.GetState() != "stopped" || strings.Contains(c.sup.w.String(), "attached") {
		t.Fatalf("stopped: %v\n%s", vm, c.sup.w)
	}
	del, err := c.vms.Delete(c.ctx(), &apiv1.DeleteRequest{Ref: "web", DryRun: true})
	c.ok(err)
	want := []string{"vm web", "nic web-nic0", "volume web-root"}
	if !slices.Equal(del.GetRemoved(), want) {
		t.Fatalf("dry run: %v", del.GetRemoved())
	}
	del, err = c.vms.Delete(c.ctx(), &apiv1.DeleteRequest{Ref: "web"})
	c.ok(err)
	if !slices.Equal(del.GetRemoved(), want) {
		t.Fatalf("removed: %v", del.GetRemoved())
	}
	if got := c.sup.w.String(); got != "network lan\ntemplate debian-12\nvolume data size:1048576" {
		t.Fatalf("left:\n%s", got)
	}
	got := c.audits(vm.GetId())
	for i, want := range []string{"create VM web: done", "vm.delete refused to ", "stop VM web: done", "delete VM web: done"} {
		if i >= len(got) || !strings.HasPrefix(got[i], want) {
			t.Fatalf("audit trail %q: entry %d is not %q", got, i, want)
		}
	}
}

func TestBadInput(t *testing.T) {
	c := newCore(t)
	c.furnish()
	c.createVM("web", false)
	create := func(fn func(*apiv1.CreateVMRequest)) error {
		r := &apiv1.CreateVMRequest{Name: "new", Disks: []*apiv1.NewDisk{{Template: "debian-12"}}, Nics: []*apiv1.NewNIC{{Network: "lan"}}}
		fn(r)
		_, err := c.vms.Create(c.ctx(), r)
		return err
	}
	cases := []struct {
		name  string
		err   error
		kind  errs.Kind
		field string
	}{
		{"no name", create(func(r *apiv1.CreateVMRequest) { r.Name = "" }), errs.Invalid, "name"},
		{"path as name", create(func(r *apiv1.CreateVMRequest) { r.Name = "../x" }), errs.Invalid, "name"},
		{"NUL in name", create(func(r *apiv1.CreateVMRequest) { r.Name = "a\x00b" }), errs.Invalid, "name"},
		{"long name", create(func(r *apiv1.CreateVMRequest) { r.Name = strings.Repeat("a", 300) }), errs.Invalid, "name"},
		{"name taken", create(func(r *apiv1.CreateVMRequest) { r.Name = "web" }), errs.Exists, ""},
		{"bad id", create(func(r *apiv1.CreateVMRequest) { r.Id = "7" }), errs.Invalid, "id"},
		{"257 vCPUs", create(func(r *apiv1.CreateVMRequest) { r.Cpus = 257 }), errs.Invalid, "cpus"},
		{"1 byte of memory", create(func(r *apiv1.CreateVMRequest) { r.MemoryBytes = 1 }), errs.Invalid, "memory_bytes"},
		{"absurd memory", create(func(r *apiv1.CreateVMRequest) { r.MemoryBytes = 1 << 60 }), errs.Invalid, "memory_bytes"},
		{"no such template", create(func(r *apiv1.CreateVMRequest) { r.Disks[0].Template = "plan9" }), errs.NotFound, ""},
		{"no such network", create(func(r *apiv1.CreateVMRequest) { r.Nics[0].Network = "wan" }), errs.NotFound, ""},
		{"no network", create(func(r *apiv1.CreateVMRequest) { r.Nics[0].Network = "" }), errs.Invalid, "nics[0].network"},
		{"smaller than its template", create(func(r *apiv1.CreateVMRequest) { r.Disks[0].SizeBytes = 512 }), errs.Invalid, "disks[0].size_bytes"},
		{"odd size", create(func(r *apiv1.CreateVMRequest) { r.Disks[0].SizeBytes = 1<<21 + 1 }), errs.Invalid, "disks[0].size_bytes"},
		{"two sources", create(func(r *apiv1.CreateVMRequest) { r.Disks[0].Volume = "data" }), errs.Invalid, "disks[0].template"},
		{"empty disk", create(func(r *apiv1.CreateVMRequest) { r.Disks[0].Template = "" }), errs.Invalid, "disks[0].size_bytes"},
		{"cmdline without kernel", create(func(r *apiv1.CreateVMRequest) { r.Cmdline = "quiet" }), errs.Invalid, "cmdline"},
		{"kernel never handed over", create(func(r *apiv1.CreateVMRequest) { r.KernelToken = strings.Repeat("a", 32) }), errs.Invalid, "kernel_token"},
		{"our label", create(func(r *apiv1.CreateVMRequest) { r.Labels = map[string]string{"mvirt.vm": "x"} }), errs.Invalid, "labels"},
		{"bad address", create(func(r *apiv1.CreateVMRequest) { r.Nics[0].Ipv4 = "10.0.0" }), errs.Invalid, "nics[0].ipv4"},
	}
	before := c.sup.w.String()
	for _, tc := range cases {
		var e *errs.Error
		if !errors.Is(tc.err, tc.kind) || !errors.As(tc.err, &e) || e.Field != tc.field {
			t.Errorf("%s: %v, field %q; want %v, field %q", tc.name, tc.err, e.Field, tc.kind, tc.field)
		}
		if errs.RemedyOf(tc.err) == "" {
			t.Errorf("%s: no remedy in %v", tc.name, tc.err)
		}
	}
	if got := c.sup.w.String(); got != before {
		t.Errorf("something was left:\n%s", got)
	}
}

func TestRefs(t *testing.T) {
	c := newCore(t)
	c.sup.w.AddTemplate("01900000-0000-7000-8000-0000000000aa", "debian-12", 1<<20)
	for _, id := range []string{"abcd0000-0000-7000-8000-000000000001", "abcd0000-0000-7000-8000-000000000002", "abce0000-0000-7000-8000-000000000003"} {
		_, err := c.volumes.Create(c.ctx(), &apiv1.CreateVolumeRequest{Id: id, Name: "v" + id[35:], SizeBytes: 512})
		c.ok(err)
	}
	get := func(ref string) (string, error) {
		v, err := c.volumes.Get(c.ctx(), &apiv1.RefRequest{Ref: ref})
		return v.GetName(), err
	}
	for ref, want := range map[string]string{"v1": "v1", "abce": "v3", "abcd0000-0000-7000-8000-000000000002": "v2", "abcd0000-0000-7000-8000-000000000001": "v1"} {
		if got, err := get(ref); err != nil || got != want {
			t.Errorf("%s: %s %v", ref, got, err)
		}
	}
	if _, err := get("abcd"); !errors.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "v1") || !strings.Contains(err.Error(), "v2") || errs.ReasonOf(err) != "AMBIGUOUS" {
		t.Errorf("ambiguous: %v", err)
	}
	for _, ref := range []string{"abc", "nothing", "../../etc/passwd", "\x1b[2J", "abcdef01"} {
		if _, err := get(ref); !errors.Is(err, errs.NotFound) || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%q: %v", ref, err)
		}
	}
	_, err := c.snapshots.Create(c.ctx(), &apiv1.CreateSnapshotRequest{Volume: "v1", Name: "s"})
	c.ok(err)
	s, err := c.snapshots.Get(c.ctx(), &apiv1.RefRequest{Ref: "v1@s"})
	c.ok(err)
	if s2, err := c.snapshots.Get(c.ctx(), &apiv1.RefRequest{Ref: s.GetId()[:13]}); err != nil || s2.GetId() != s.GetId() {
		t.Errorf("snapshot by prefix: %v %v", s2, err)
	}
	// A create with the same id again is the same object; with other fields it is refused and nothing is harmed.
	_, err = c.volumes.Create(c.ctx(), &apiv1.CreateVolumeRequest{Id: "abce0000-0000-7000-8000-000000000003", Name: "v3", SizeBytes: 512})
	c.ok(err)
	if _, err := c.volumes.Create(c.ctx(), &apiv1.CreateVolumeRequest{Id: "abce0000-0000-7000-8000-000000000003", Name: "else", SizeBytes: 512}); !errors.Is(err, errs.Exists) {
		t.Errorf("same id, other name: %v", err)
	}
	if got, err := get("v3"); err != nil || got != "v3" {
		t.Errorf("v3 is harmed: %v", err)
	}
}

func TestKernelIsHandedOver(t *testing.T) {
	c := newCore(t)
	c.furnish()
	path := filepath.Join(t.TempDir(), "vmlinuz")
	c.ok(os.WriteFile(path, []byte("kernel"), 0o600))
	f, err := os.Open(path)
	c.ok(err)
	defer f.Close()
	token, err := fdpass.Deposit(c.ctx(), filepath.Join(c.dir, "fd.sock"), nil, f)
	c.ok(err)
	vm, err := c.vms.Create(c.ctx(), &apiv1.CreateVMRequest{Name: "direct", KernelToken: token, KernelName: "vmlinuz", Cmdline: "quiet"})
	c.ok(err)
	if !vm.GetDirectBoot() || vm.GetKernelName() != "vmlinuz" {
		t.Fatalf("%v", vm)
	}
	if _, err := c.vms.Create(c.ctx(), &apiv1.CreateVMRequest{Name: "again", KernelToken: token}); !errors.Is(err, errs.Invalid) {
		t.Fatalf("a token works twice: %v", err)
	}
	for _, a := range c.audits(vm.GetId()) {
		if strings.Contains(a, token) {
			t.Errorf("a token stands in the audit trail: %s", a)
		}
	}
}

func TestPluginDown(t *testing.T) {
	c := newCore(t)
	c.furnish()
	c.createVM("web", false)
	c.sup.setDown(service.KindStorage, true)
	list, err := c.vms.List(c.ctx(), &apiv1.ListVMsRequest{})
	c.ok(err)
	if len(list.GetVms()) != 1 {
		t.Fatalf("%v", list)
	}
	_, err = c.networks.List(c.ctx(), &apiv1.ListNetworksRequest{})
	c.ok(err)
	if _, err := c.volumes.List(c.ctx(), &apiv1.ListVolumesRequest{}); !errors.Is(err, errs.Unavailable) || errs.RemedyOf(err) == "" {
		t.Fatalf("volumes: %v", err)
	}
	st, err := c.system.GetStatus(c.ctx(), &apiv1.GetStatusRequest{})
	c.ok(err)
	if !slices.Equal(st.GetUnavailable(), []string{"storage"}) || st.GetVms() != 1 || st.GetNetworks() != 1 {
		t.Fatalf("%v", st)
	}
	_, err = c.vms.Start(c.ctx(), &apiv1.StartVMRequest{Ref: "web"})
	if !errors.Is(err, errs.Unavailable) {
		t.Fatalf("start without storage: %v", err)
	}
}

// TestAuditWhileLogIsDown makes changes while the log plugin is away; all entries arrive later, in order, once.
func TestAuditWhileLogIsDown(t *testing.T) {
	c := newCore(t)
	c.furnish()
	c.sup.setDown(service.KindLog, true)
	vm := c.createVM("web", true)
	_, err := c.vms.Pause(c.ctx(), &apiv1.RefRequest{Ref: "web"})
	c.ok(err)
	if _, err := c.vms.Get(c.ctx(), &apiv1.RefRequest{Ref: "nobody"}); err == nil {
		t.Fatal("nobody")
	}
	c.stop() // the core goes and comes while the entries wait
	c.start()
	c.sup.setDown(service.KindLog, false)
	got := c.audits(vm.GetId())
	if len(got) != 2 || got[0] != "create VM web: done" || got[1] != "pause VM web: done" {
		t.Fatalf("%q", got)
	}
	seen := map[string]int{}
	for _, e := range c.sup.w.Entries() {
		if e.Level == log.LevelAudit {
			seen[e.ID]++
		}
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("entry %s arrived %d times", id, n)
		}
	}
}

func TestGuestPowersOff(t *testing.T) {
	c := newCore(t)
	c.furnish()
	vm := c.createVM("web", true)
	ev, err := c.system.WatchEvents(c.ctx(), &apiv1.WatchEventsRequest{Objects: []string{vm.GetId()}})
	c.ok(err)
	if _, err := ev.Header(); err != nil {
		t.Fatal(err)
	}
	c.sup.w.PowerOff("web")
	state, released := false, false
	for !state || !released {
		e, err := ev.Recv()
		c.ok(err)
		state = state || e.GetType() == "vm.state" && strings.Contains(e.GetMessage(), "guest powered off")
		released = released || e.GetType() == "operation.done" && e.GetLabels()["op"] == "vm.release"
	}
	if strings.Contains(c.sup.w.String(), "attached") {
		t.Fatalf("still attached:\n%s", c.sup.w)
	}
	got := strings.Join(c.audits(vm.GetId()), "\n")
	if !strings.Contains(got, "VM web is stopped: guest powered off") || !strings.Contains(got, "release what VM web had attached") {
		t.Fatalf("audit:\n%s", got)
	}
	// Start at once afterwards works, even if the release were still under way.
	_, err = c.vms.Start(c.ctx(), &apiv1.StartVMRequest{Ref: "web"})
	c.ok(err)
}

func TestAsyncImportAndCancel(t *testing.T) {
	c := newCore(t)
	s, err := c.templates.Import(c.ctx(), &apiv1.ImportTemplateRequest{Name: "img", Url: "https://user:secret@example.org/x.qcow2?token=secret"})
	c.ok(err)
	first, err := s.Recv()
	c.ok(err)
	if first.GetState() != "running" {
		t.Fatalf("%v", first)
	}
	ops, err := c.ops.List(c.ctx(), &apiv1.ListOperationsRequest{})
	c.ok(err)
	if len(ops.GetOperations()) != 1 || ops.GetOperations()[0].GetType() != "template.import" {
		t.Fatalf("%v", ops)
	}
	_, err = c.ops.Cancel(c.ctx(), &apiv1.RefRequest{Ref: ops.GetOperations()[0].GetId()})
	c.ok(err)
	for {
		i, err := s.Recv()
		c.ok(err)
		if i.GetState() == "canceled" {
			break
		}
	}
	for {
		op, err := c.ops.Get(c.ctx(), &apiv1.RefRequest{Ref: ops.GetOperations()[0].GetId()})
		c.ok(err)
		if op.GetState() == "canceled" {
			break
		}
	}
	for _, e := range c.sup.w.Entries() {
		for _, v := range e.Labels {
			if strings.Contains(v, "secret") {
				t.Errorf("a secret stands in the audit trail: %v", e)
			}
		}
	}
}

func TestConsole(t *testing.T) {
	c := newCore(t)
	c.furnish()
	c.createVM("web", true)
	s, err := c.vms.Console(c.ctx())
	c.ok(err)
	c.ok(s.Send(&apiv1.ConsoleInput{Kind: &apiv1.ConsoleInput_Open{Open: &apiv1.ConsoleOpen{Ref: "web"}}}))
	want := []string{"", "hello\n", "ls"}
	for i, w := range want {
		m, err := s.Recv()
		c.ok(err)
		if string(m.GetData()) != w || i == 0 && !m.GetOpened() {
			t.Fatalf("message %d: %v", i, m)
		}
		if i == 1 {
			c.ok(s.Send(&apiv1.ConsoleInput{Kind: &apiv1.ConsoleInput_Data{Data: []byte("ls")}}))
		}
	}
	c.ok(s.Send(&apiv1.ConsoleInput{Kind: &apiv1.ConsoleInput_Data{Data: []byte("quit")}}))
	m, err := s.Recv()
	c.ok(err)
	if m.GetEnded() == "" {
		t.Fatalf("%v", m)
	}
}

func TestSocket(t *testing.T) {
	c := newCore(t)
	path := filepath.Join(c.dir, "m.sock")
	st, err := os.Stat(path)
	c.ok(err)
	if st.Mode().Perm() != 0o660 {
		t.Errorf("mode %v", st.Mode())
	}
	if _, err := listen(config.Core{Socket: path, SocketMode: 0o600}); !errors.Is(err, errs.Exists) {
		t.Errorf("a second listener: %v", err)
	}
	c.stop()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
	// A socket that a dead core left behind is replaced; a file is not.
	l, err := net.Listen("unix", path)
	c.ok(err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	l, err = listen(config.Core{Socket: path, SocketMode: 0o600})
	c.ok(err)
	l.Close()
	c.ok(os.WriteFile(path, nil, 0o600))
	if _, err := listen(config.Core{Socket: path, SocketMode: 0o600}); !errors.Is(err, errs.Exists) {
		t.Errorf("a file in the place of the socket: %v", err)
	}
}
