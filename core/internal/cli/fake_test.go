package cli

import (
	"bytes"
	"context"
	"flag"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
)

var update = flag.Bool("update", false, "write the golden files")

// now is the time of all tests.
var now = time.Date(2026, 11, 24, 15, 4, 5, 0, time.UTC)

func ago(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-d)) }

// fake is an mvirt.v1 server that answers as a test says, and remembers what it was asked.
type fake struct {
	socket string
	unary  map[string]func(proto.Message) (proto.Message, error)
	stream map[string]func(grpc.ServerStream) error

	mu    sync.Mutex
	calls []string // "VMs.Get"
	last  map[string]proto.Message
	fds   [][]byte // what was handed over
}

func method(full string) string {
	return strings.ReplaceAll(strings.TrimPrefix(full, "/mvirt.v1."), "/", ".")
}

func newFake(t *testing.T) *fake {
	t.Helper()
	dir, err := os.MkdirTemp("", "cli") // t.TempDir's path can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &fake{socket: filepath.Join(dir, "s"), unary: map[string]func(proto.Message) (proto.Message, error){},
		stream: map[string]func(grpc.ServerStream) error{}, last: map[string]proto.Message{}}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(
		grpc.UnaryInterceptor(func(_ context.Context, req any, info *grpc.UnaryServerInfo, _ grpc.UnaryHandler) (any, error) {
			m := method(info.FullMethod)
			f.note(m, req.(proto.Message))
			do := f.unary[m]
			if do == nil {
				return nil, status.Error(codes.Unimplemented, "the fake does not know "+m)
			}
			return do(req.(proto.Message))
		}),
		grpc.StreamInterceptor(func(_ any, ss grpc.ServerStream, info *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
			m := method(info.FullMethod)
			f.note(m, nil)
			do := f.stream[m]
			if do == nil {
				return status.Error(codes.Unimplemented, "the fake does not know "+m)
			}
			return do(ss)
		}))
	apiv1.RegisterSystemServer(s, apiv1.UnimplementedSystemServer{})
	apiv1.RegisterPluginsServer(s, apiv1.UnimplementedPluginsServer{})
	apiv1.RegisterOperationsServer(s, apiv1.UnimplementedOperationsServer{})
	apiv1.RegisterTemplatesServer(s, apiv1.UnimplementedTemplatesServer{})
	apiv1.RegisterVolumesServer(s, apiv1.UnimplementedVolumesServer{})
	apiv1.RegisterSnapshotsServer(s, apiv1.UnimplementedSnapshotsServer{})
	apiv1.RegisterNetworksServer(s, apiv1.UnimplementedNetworksServer{})
	apiv1.RegisterNICsServer(s, apiv1.UnimplementedNICsServer{})
	apiv1.RegisterSecurityGroupsServer(s, apiv1.UnimplementedSecurityGroupsServer{})
	apiv1.RegisterVMsServer(s, apiv1.UnimplementedVMsServer{})
	apiv1.RegisterLogsServer(s, apiv1.UnimplementedLogsServer{})
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return f
}

func (f *fake) note(m string, req proto.Message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, m)
	f.last[m] = req
}

// request is what a method was asked last.
func request[T proto.Message](f *fake, m string) T {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, _ := f.last[m].(T)
	return r
}

// answer makes a method answer always the same.
func (f *fake) answer(m string, resp proto.Message) {
	f.unary[m] = func(proto.Message) (proto.Message, error) { return resp, nil }
}

// fail makes a method fail with what a core sends.
func (f *fake) fail(m string, kind errs.Kind, msg, field, remedy string) {
	err := grpcerr.ToStatus(&errs.Error{Op: "kind.Method", Kind: kind, Message: msg, Field: field, Remedy: remedy, Reason: "A_REASON"})
	f.unary[m] = func(proto.Message) (proto.Message, error) { return nil, err }
}

// send makes a stream send these messages, then end.
func (f *fake) send(m string, list ...proto.Message) {
	f.stream[m] = func(ss grpc.ServerStream) error {
		for _, x := range list {
			if err := ss.SendMsg(x); err != nil {
				return err
			}
		}
		return nil
	}
}

// result of a command line.
type result struct {
	out, err string
	code     int
}

// run runs a command line against the fake.
func (f *fake) run(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	std := Std{In: strings.NewReader(stdin), Out: &out, Err: &errOut, Env: func(k string) string {
		if k == "MVIRT_SOCKET" {
			return f.socket
		}
		return ""
	}, Now: func() time.Time { return now },
		HandOver: func(_ context.Context, socket string, file *os.File) (string, error) {
			if filepath.Dir(socket) != filepath.Dir(f.socket) || filepath.Base(socket) != "fd.sock" {
				t.Errorf("handed over to %s", socket)
			}
			b, err := io.ReadAll(file)
			f.mu.Lock()
			f.fds = append(f.fds, b)
			f.mu.Unlock()
			return "token-of-" + string(b), err
		}}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	code := Main(ctx, args, std)
	return result{out.String(), errOut.String(), code}
}

// golden compares with testdata/name, or writes it with -update.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n--- got\n%s--- want\n%s", name, got, want)
	}
}

func (r result) ok(t *testing.T) result {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit code %d\n%s%s", r.code, r.out, r.err)
	}
	return r
}

// world fills a fake with one or two objects of each kind.
func world(t *testing.T) *fake {
	f := newFake(t)
	tmpl := &apiv1.Template{Id: "0190a000-0000-7000-8000-000000000001", Name: "debian-12", SizeBytes: 2 << 30, AllocatedBytes: 620 << 20, SourceFormat: "qcow2", Source: "file:debian-12.qcow2",
		Checksum: "sha256:00ff", CreatedAt: ago(50 * time.Hour), State: "ready", CloneCount: 2}
	vol := &apiv1.Volume{Id: "0190a000-0000-7000-8000-000000000002", Name: "web-root", SizeBytes: 20 << 30, AllocatedBytes: 1300 << 20, BlockSize: 4096, OriginType: "template", OriginId: tmpl.Id,
		CreatedAt: ago(90 * time.Minute), State: "ready", SnapshotCount: 1, Labels: map[string]string{"tier": "front", "app": "web"},
		Users: []*apiv1.VolumeUser{{VmId: "0190a000-0000-7000-8000-000000000005", VmName: "web", Attached: true, Path: "/srv/web-root.raw"}}}
	snap := &apiv1.Snapshot{Id: "0190a000-0000-7000-8000-000000000003", Name: "monday", VolumeId: vol.Id, VolumeName: vol.Name, SizeBytes: 20 << 30, UsedBytes: 12 << 20, CreatedAt: ago(time.Hour)}
	netw := &apiv1.Network{Id: "0190a000-0000-7000-8000-000000000004", Name: "lan", Mode: "nat", Subnet4: "10.7.0.0/24", Gateway4: "169.254.0.1", Dns: []string{"9.9.9.9"}, Mtu: 1500, HostAccess: true,
		CreatedAt: ago(72 * time.Hour), State: "ready", NicCount: 1, WorkerPid: 77}
	nic := &apiv1.NIC{Id: "0190a000-0000-7000-8000-000000000006", Name: "web-0", NetworkId: netw.Id, NetworkName: "lan", Mac: "52:54:00:00:00:01", Ipv4: "10.7.0.2", VmName: "web", State: "attached", AttachMode: "tap",
		CreatedAt: ago(time.Hour), RxPackets: 10, RxBytes: 2048, TxPackets: 5, TxBytes: 1024, TxSpoofed: 3}
	sg := &apiv1.SecurityGroup{Id: "0190a000-0000-7000-8000-000000000007", Name: "ssh", NicCount: 1, CreatedAt: ago(time.Hour), Rules: []*apiv1.Rule{{Direction: "in", Protocol: "tcp", PortFrom: 22, PortTo: 22}, {Direction: "in", Protocol: "tcp", PortFrom: 8000, PortTo: 8080, Cidr: "10.0.0.0/8"}}}
	web := &apiv1.VM{Id: "0190a000-0000-7000-8000-000000000005", Name: "web", State: "running", Desired: "running", Since: ago(10 * time.Minute), Cpus: 2, MaxCpus: 4, MemoryBytes: 1 << 30, CreatedAt: ago(time.Hour), StartedAt: ago(10 * time.Minute),
		Disks: []*apiv1.VMDisk{{Name: "root", VolumeId: vol.Id, VolumeName: vol.Name, SizeBytes: vol.SizeBytes, Owned: true}}, Pid: 4711, Uid: 64001, Hypervisor: "qemu 7.2 tcg",
		Nics: []*apiv1.VMNIC{{NicId: nic.Id, NicName: "web-0", NetworkName: "lan", Mac: nic.Mac, Ipv4: nic.Ipv4, Owned: true}}, DirectBoot: true, KernelName: "vmlinuz", Cmdline: "console=ttyS0", Autostart: true,
		CloudInit: &apiv1.CloudInit{UserData: "#!/bin/sh\n"}}
	db := &apiv1.VM{Id: "0190b000-0000-7000-8000-000000000008", Name: "db", State: "failed", Reason: "the hypervisor ended: killed by signal 9\x1b[2J", Desired: "running", Since: ago(30 * time.Second), Cpus: 1, MemoryBytes: 512 << 20, CreatedAt: ago(time.Hour),
		Conditions: []*apiv1.Condition{{Code: "VOLUME_GONE", Severity: "critical", Text: "volume db-root is gone", Remedy: "restore it, or remove the VM"}}}
	plugin := &apiv1.Plugin{Kind: "storage", Name: "storage-dir", Version: "0.1.0", State: "up", Pid: 99, User: "mvirt-dir", StartedAt: ago(time.Hour), Restarts: 1, Contract: "1.0", Features: []string{"snapshots", "resize"},
		LastExit: "killed by signal 9 (SIGKILL)", LastExitAt: ago(time.Hour), LastStderr: []string{"panic: on purpose", "goroutine 1"}, Command: "/usr/lib/mvirt/mvirt-dir", NoNewPrivs: true}
	down := &apiv1.Plugin{Kind: "net", State: "quarantined", Reason: "five deaths within two minutes", Restarts: 5, LastExit: "exit status 1"}
	op := &apiv1.Operation{Id: "0190a000-0000-7000-8000-000000000009", Type: "vm.create", State: "failed", Phase: "undoing", Done: 2, Total: 5, Error: "no address is free in lan", Remedy: "remove NICs, or make a larger network",
		ErrorCode: uint32(codes.ResourceExhausted), Undone: []string{"volume x-root"}, Who: "root (uid 0)", Objects: []string{web.Id}, StartedAt: ago(time.Minute), EndedAt: ago(58 * time.Second)}
	imp := &apiv1.Import{Id: "0190a000-0000-7000-8000-00000000000a", Name: "debian-12", Source: "file:debian-12.qcow2", State: "running", Phase: "converting", DoneBytes: 100 << 20, TotalBytes: 400 << 20, StartedAt: ago(5 * time.Second)}

	byRef := func(list ...interface {
		proto.Message
		GetId() string
		GetName() string
	}) func(proto.Message) (proto.Message, error) {
		return func(req proto.Message) (proto.Message, error) {
			ref := req.(*apiv1.RefRequest).GetRef()
			for _, o := range list {
				if o.GetId() == ref || o.GetName() == ref {
					return o, nil
				}
			}
			return nil, status.Errorf(codes.NotFound, "there is no %q", ref)
		}
	}
	f.answer("Templates.List", &apiv1.ListTemplatesResponse{Templates: []*apiv1.Template{tmpl}})
	f.unary["Templates.Get"] = byRef(tmpl)
	f.answer("Templates.ListImports", &apiv1.ListImportsResponse{Imports: []*apiv1.Import{imp}})
	f.answer("Templates.Rename", tmpl)
	f.answer("Volumes.List", &apiv1.ListVolumesResponse{Volumes: []*apiv1.Volume{vol}})
	f.unary["Volumes.Get"] = byRef(vol)
	for _, m := range []string{"Create", "Resize", "Rename"} {
		f.answer("Volumes."+m, vol)
	}
	f.answer("Snapshots.List", &apiv1.ListSnapshotsResponse{Snapshots: []*apiv1.Snapshot{snap}})
	f.answer("Snapshots.Get", snap)
	f.answer("Snapshots.Create", snap)
	f.answer("Snapshots.Rollback", vol)
	f.answer("Networks.List", &apiv1.ListNetworksResponse{Networks: []*apiv1.Network{netw}})
	f.unary["Networks.Get"] = byRef(netw)
	f.answer("Networks.Create", netw)
	f.answer("Networks.Update", netw)
	f.answer("NICs.List", &apiv1.ListNICsResponse{Nics: []*apiv1.NIC{nic}})
	f.unary["NICs.Get"] = byRef(nic)
	f.answer("NICs.Create", nic)
	f.answer("NICs.Update", nic)
	f.answer("SecurityGroups.List", &apiv1.ListSecurityGroupsResponse{SecurityGroups: []*apiv1.SecurityGroup{sg}})
	f.unary["SecurityGroups.Get"] = byRef(sg)
	f.answer("SecurityGroups.Create", sg)
	f.answer("SecurityGroups.SetRules", sg)
	f.answer("VMs.List", &apiv1.ListVMsResponse{Vms: []*apiv1.VM{web, db}})
	f.unary["VMs.Get"] = byRef(web, db)
	for _, m := range []string{"Create", "Update", "Start", "Stop", "Kill", "Pause", "Resume", "Reboot", "AttachVolume", "DetachVolume", "AttachNIC", "DetachNIC"} {
		f.answer("VMs."+m, web)
	}
	f.answer("VMs.Counters", &apiv1.VMCounters{ResidentBytes: 300 << 20, Devices: []*apiv1.DeviceCounters{{Name: "root", ReadBytes: 10 << 20, ReadOps: 100, WriteBytes: 1 << 20, WriteOps: 7}}})
	for _, n := range []string{"Templates", "Volumes", "Snapshots", "Networks", "NICs", "SecurityGroups", "VMs"} {
		f.answer(n+".Delete", &apiv1.DeleteResponse{Removed: []string{"thing one", "thing two"}})
	}
	f.answer("Plugins.List", &apiv1.ListPluginsResponse{Plugins: []*apiv1.Plugin{plugin, down}})
	f.answer("Plugins.Get", plugin)
	f.answer("Plugins.Restart", plugin)
	f.answer("Operations.List", &apiv1.ListOperationsResponse{Operations: []*apiv1.Operation{op}})
	f.answer("Operations.Get", op)
	f.answer("Operations.Cancel", op)
	f.answer("System.GetStatus", &apiv1.Status{Version: "0.1.0", StartedAt: ago(26 * time.Hour), HostName: "host", Cpus: 8, MemoryBytes: 64 << 30, Plugins: []*apiv1.Plugin{plugin, down}, Vms: 2, VmsRunning: 1, Volumes: 1, Templates: 1,
		Storage: &apiv1.StorageStats{Place: "/var/lib/mvirt/dir", TotalBytes: 100 << 30, AvailableBytes: 40 << 30, ProvisionedBytes: 20 << 30, Reflink: true}, Caller: "root (uid 0)", Unavailable: []string{"net"},
		Conditions: []*apiv1.Condition{{Severity: "critical", Text: "the net plugin is down", Remedy: "see mvirt plugin show net"}}})
	f.answer("Logs.Stats", &apiv1.LogStats{Entries: 10, Objects: 3, DiskBytes: 4 << 20, Oldest: ago(time.Hour), Newest: ago(time.Second), ByLevel: map[string]uint64{"audit": 7, "info": 3}, Spooled: 2})
	f.answer("Logs.Verify", &apiv1.VerifyLogsResponse{Checked: 7, Head: "abcd"})
	return f
}
