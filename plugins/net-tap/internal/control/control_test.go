package control

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/testguest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/testns"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/worker"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// plain is set in the process that is an ordinary user, to its directory.
const plain = "MVIRT_NET_TEST_PLAIN"

// TestMain runs the tests on a host of their own. The test binary is the packet worker, too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == worker.Name {
		os.Exit(worker.Main(os.Args[2:]))
	}
	os.Exit(testns.Run(os.Getenv(plain) != "", m.Run))
}

func sh(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	out, err := exec.Command("sh", "-ec", line).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", line, err, out)
	}
	return nil
}

func mustSh(t *testing.T, format string, args ...any) string {
	t.Helper()
	line := fmt.Sprintf(format, args...)
	out, err := exec.Command("sh", "-ec", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

func needRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes TAPs and namespaces")
	}
}

// rig is a service with its directories, to be opened again and again.
type rig struct {
	t   *testing.T
	dir string
	*Service
}

type testHost struct{}

func (testHost) Audit(context.Context, service.AuditRecord) error { return nil }
func (testHost) Publish(context.Context, service.Event) error     { return nil }

func newRig(t *testing.T) *rig {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("/run", "net")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir}
	r.open()
	t.Cleanup(func() {
		if r.Service != nil {
			r.wipe()
			_ = r.Shutdown(ctx)
		}
	})
	return r
}

var ctx = context.Background()

func (r *rig) config() Config {
	level := hclog.Warn
	if testing.Verbose() {
		level = hclog.Debug
	}
	return Config{MetadataDir: filepath.Join(r.dir, "meta"), SocketDir: filepath.Join(r.dir, "sock"), WorkerUser: "nobody", LinkPrefix: DefaultLinkPrefix,
		Host: testHost{}, Log: hclog.New(&hclog.LoggerOptions{Output: os.Stderr, Level: level}), Tick: 200 * time.Millisecond}
}

func (r *rig) open() {
	r.t.Helper()
	s, err := Open(r.config())
	if err != nil {
		r.t.Fatal(err)
	}
	r.Service = s
}

// reopen ends the control plane and begins another, as a restart does.
func (r *rig) reopen() {
	r.t.Helper()
	if err := r.Shutdown(ctx); err != nil {
		r.t.Fatal(err)
	}
	r.Service = nil
	r.open()
}

// settle waits until a network's start or repair is done.
func (r *rig) settle(id string) {
	rt := r.runtimeOf(id)
	rt.mu.Lock()
	defer rt.mu.Unlock()
}

// signalWorker sends a signal to the worker of network "lan" and returns its process id.
func (r *rig) signalWorker(sig syscall.Signal) uint32 {
	r.t.Helper()
	n, err := r.GetNetwork(ctx, net.Ref{Ref: "lan"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.settle(n.ID)
	if n, err = r.GetNetwork(ctx, net.Ref{Ref: "lan"}); err != nil || n.WorkerPID == 0 { // 0 would be ourselves
		r.t.Fatal("no worker", err)
	}
	if err := syscall.Kill(int(n.WorkerPID), sig); err != nil {
		r.t.Fatal(err)
	}
	return n.WorkerPID
}

// wipe removes all networks.
func (r *rig) wipe() {
	nics, _ := r.ListNICs(ctx, net.ListNICsRequest{})
	for _, n := range nics {
		_ = r.Detach(ctx, net.DetachRequest{NICID: n.ID, VMID: n.VMID})
		if err := r.DeleteNIC(ctx, net.Ref{Ref: n.ID}); err != nil {
			r.t.Error(err)
		}
	}
	nets, _ := r.ListNetworks(ctx)
	for _, n := range nets {
		if err := r.DeleteNetwork(ctx, net.Ref{Ref: n.ID}); err != nil {
			r.t.Error(err)
		}
	}
}

func (r *rig) network(mods ...func(*net.CreateNetworkRequest)) net.Network {
	r.t.Helper()
	req := net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.0.0.0/24")}
	for _, m := range mods {
		m(&req)
	}
	n, err := r.CreateNetwork(ctx, req)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

func nat(name string) func(*net.CreateNetworkRequest) {
	return func(r *net.CreateNetworkRequest) { r.Mode, r.Name, r.HostAccess = net.ModeNAT, name, true }
}

func (r *rig) nic(network string, mods ...func(*net.CreateNICRequest)) net.NIC {
	r.t.Helper()
	req := net.CreateNICRequest{ID: ident.New(), NetworkID: network}
	for _, m := range mods {
		m(&req)
	}
	n, err := r.CreateNIC(ctx, req)
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// guest attaches a NIC and starts a guest on it.
func (r *rig) guest(n net.NIC) *testguest.Guest {
	r.t.Helper()
	att, err := r.Attach(ctx, net.AttachRequest{NICID: n.ID, Owner: service.Owner{VMID: "vm-" + n.ID}, Modes: []net.AttachMode{net.AttachTAPFD}})
	if err != nil {
		r.t.Fatal(err)
	}
	tap, err := testguest.NewTAP(att.TAP[0])
	if err != nil {
		r.t.Fatal(err)
	}
	m, _ := wire.ParseMAC(att.MAC)
	g := testguest.New(tap, m)
	r.t.Cleanup(g.Close)
	return g
}

// up is guest with a lease.
func (r *rig) up(n net.NIC) *testguest.Guest {
	r.t.Helper()
	g := r.guest(n)
	if err := g.Up(5 * time.Second); err != nil {
		r.t.Fatal(err)
	}
	if g.IP.Addr() != n.IPv4 {
		r.t.Fatalf("the lease is %v, want %v", g.IP.Addr(), n.IPv4)
	}
	return g
}

func ping(t *testing.T, g *testguest.Guest, dst string) uint8 {
	t.Helper()
	ttl, err := g.Ping(wire.IP4Of(netip.MustParseAddr(dst)), 30*time.Second)
	if err != nil {
		t.Error(err)
	}
	return ttl
}

func noPing(t *testing.T, g *testguest.Guest, dst string) {
	t.Helper()
	if _, err := g.Ping(wire.IP4Of(netip.MustParseAddr(dst)), 300*time.Millisecond); err == nil {
		t.Errorf("%v reached %s", g.IP.Addr(), dst)
	}
}

// eventually waits for something that another process does.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func TestPrivate(t *testing.T) {
	r := newRig(t)
	n := r.network()
	a, b := r.up(r.nic("lan")), r.up(r.nic("lan"))
	if ttl := ping(t, a, "169.254.0.1"); ttl != 64 {
		t.Errorf("gateway's TTL %d", ttl)
	}
	if ttl := ping(t, a, b.IP.Addr().String()); ttl != 63 {
		t.Errorf("TTL from NIC to NIC %d, want 63", ttl)
	}
	noPing(t, a, "192.0.2.1")
	nics, err := r.ListNICs(ctx, net.ListNICsRequest{NetworkID: "lan"})
	if err != nil || len(nics) != 2 {
		t.Fatal(nics, err)
	}
	for _, n := range nics {
		if n.State != net.StateConnected || n.Counters.TxPackets == 0 || n.Counters.RxPackets == 0 || n.Counters.TxSpoofed != 0 {
			t.Errorf("%+v", n)
		}
	}
	if n.WorkerPID == 0 {
		t.Error("no worker")
	}
	st := mustSh(t, "grep -E 'Uid|NoNewPrivs|CapEff|CapPrm|Seccomp:' /proc/%d/status | tr -s '\\t\\n' ' '", n.WorkerPID)
	want := "Uid: 65534 65534 65534 65534 CapPrm: 0000000000000000 CapEff: 0000000000000000 NoNewPrivs: 1 Seccomp: 2 "
	if st != want {
		t.Errorf("worker is %q, want %q", st, want)
	}
}

// TestVLANTags: what a guest sends with a VLAN tag does not arrive, with or without it.
func TestVLANTags(t *testing.T) {
	r := newRig(t)
	r.network()
	a, b := r.up(r.nic("lan")), r.up(r.nic("lan"))
	for _, tags := range [][]byte{{0x81, 0, 0, 5}, {0x81, 0, 0xe0, 0}, {0x88, 0xa8, 0, 5, 0x81, 0, 0, 6}} {
		f := a.UDP(a.GW, a.IP, b.IP, 1, 2, []byte("tagged"))
		if err := a.Send(append(append(append([]byte{}, f[:12]...), tags...), f[12:]...)); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Send(a.UDP(a.GW, a.IP, b.IP, 1, 2, []byte("honest"))); err != nil {
		t.Fatal(err)
	}
	f, err := b.Wait(10*time.Second, func(f []byte) bool { return len(f) == 48 && f[23] == wire.ProtoUDP })
	if err != nil || string(f[42:]) != "honest" {
		t.Errorf("the first that arrives is %q: %v", f, err)
	}
}
