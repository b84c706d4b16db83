package netbench

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/control"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/testns"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhosttest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/worker"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// asked is set by test/bench/net.
const asked = "MVIRT_BENCH_NET"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == worker.Name {
		os.Exit(worker.Main(os.Args[2:]))
	}
	os.Exit(testns.Run(os.Getenv(asked) == "", m.Run))
}

type quiet struct{}

func (quiet) Audit(context.Context, service.AuditRecord) error { return nil }
func (quiet) Publish(context.Context, service.Event) error     { return nil }

type bench struct {
	*testing.T
	dir string
	*control.Service
}

var ctx = context.Background()

func open(t *testing.T, dir string) *bench {
	s, err := control.Open(control.Config{MetadataDir: filepath.Join(dir, "meta"), SocketDir: filepath.Join(dir, "sock"), WorkerUser: "nobody",
		LinkPrefix: control.DefaultLinkPrefix, Log: hclog.NewNullLogger(), Host: quiet{}})
	if err != nil {
		t.Fatal(err)
	}
	return &bench{T: t, dir: dir, Service: s}
}

func figure(name string, value float64, unit, aim string) {
	fmt.Printf("figure %s %.4g %s %s\n", name, value, unit, aim)
}

func must[T any](b *bench, v T, err error) T {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
	return v
}

func (b *bench) network(name, subnet string) net.Network {
	n, err := b.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: name, Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix(subnet), MTU: 9000})
	return must(b, n, err)
}

func (b *bench) nic(network string, groups ...string) net.NIC {
	n, err := b.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: network, SecurityGroups: groups})
	return must(b, n, err)
}

// socket attaches a NIC by vhost-user.
func (b *bench) socket(n net.NIC) string {
	a, err := b.Attach(ctx, net.AttachRequest{NICID: n.ID, Owner: service.Owner{VMID: "v"}, Modes: []net.AttachMode{net.AttachVhostUser}})
	return must(b, a, err).SocketPath
}

func (b *bench) vhost(n net.NIC, opt vhosttest.Options) *vhosttest.Driver {
	d, err := vhosttest.Dial(b.socket(n), opt)
	return must(b, d, err)
}

// TestFigures prints them all.
func TestFigures(t *testing.T) {
	if os.Getenv(asked) == "" {
		t.Skip("measured by make bench-net only")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes TAPs and namespaces")
	}
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("note %d processors, load %s", runtime.NumCPU(), load)
	for _, part := range []struct {
		name string
		run  func(*bench)
	}{
		{"dpdk", (*bench).versusDPDK}, {"virtio-user", (*bench).virtioUser}, {"gso", (*bench).gso}, {"rtt", (*bench).roundTrip},
		{"idle", (*bench).idle}, {"restart", (*bench).restart},
	} {
		t.Run(part.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("/run", "bench")
			if err != nil {
				t.Fatal(err)
			}
			b := open(t, dir)
			defer func() { b.end() }()
			part.run(b)
		})
	}
}

// end ends what the part started, workers too: an idle one would still be another process on the machine.
func (b *bench) end() {
	nets, _ := b.ListNetworks(ctx)
	_ = b.Shutdown(ctx)
	for _, n := range nets {
		if n.WorkerPID > 0 {
			_ = syscall.Kill(int(n.WorkerPID), syscall.SIGKILL)
		}
	}
}

// usage is CPU seconds and resident bytes of a process.
func usage(pid uint32) (cpu float64, rss int) {
	s, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(s[strings.LastIndexByte(string(s), ')')+1:]))
	if len(f) < 22 {
		return 0, 0
	}
	u, _ := strconv.Atoi(f[11])
	k, _ := strconv.Atoi(f[12])
	p, _ := strconv.Atoi(f[21])
	return float64(u+k) / 100, p * os.Getpagesize()
}

// udp makes a frame between two NICs.
func udp(from net.NIC, to net.NIC, n int) []byte {
	m, _ := wire.ParseMAC(from.MAC)
	f := make([]byte, n)
	wire.PutEth(f, 0x026d76000001, m, wire.TypeIPv4)
	wire.PutIPv4(f[14:], wire.IP4Of(from.IPv4), wire.IP4Of(to.IPv4), wire.ProtoUDP, 64, 1, n-34)
	wire.PutUDP4(f[34:], f[14:], 1000, 2000, n-42)
	return f
}

// pump sends frames from one driver to another for a while and returns what arrived.
func pump(a, d *vhosttest.Driver, hdr [12]byte, frame []byte, burst int, limit time.Duration) (packets int, took time.Duration) {
	frames := make([][]byte, burst)
	for i := range frames {
		frames[i] = frame
	}
	began := time.Now()
	for round := 0; ; round++ {
		a.SendBatch(0, hdr, frames...)
		packets += d.Receive(0, 2*burst, nil)
		if round%64 == 0 {
			if took = time.Since(began); took > limit {
				return packets, took
			}
		}
	}
}

const rounds = 7

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// gso measures frames of 64 KiB against copying the same bytes.
func (b *bench) gso() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	n := b.network("gso", "10.1.0.0/24")
	na, nb := b.nic("gso"), b.nic("gso")
	const size = 65536 - 64
	opt := vhosttest.Options{TxLen: 65536, BufLen: 65536, Size: 64}
	a, d := b.vhost(na, opt), b.vhost(nb, opt)
	defer a.Close()
	defer d.Close()
	frame := udp(na, nb, size)
	frame[23] = wire.ProtoTCP
	wire.PutBe16(frame[24:], 0)
	wire.PutBe16(frame[24:], wire.Checksum(frame[14:34]))
	frame[46] = 5 << 4
	frame[47] = 16
	hdr := [12]byte{0: 1, 1: 1, 2: 54, 4: 0xb4, 5: 5, 6: 34, 8: 16}
	pump(a, d, hdr, frame, 8, 200*time.Millisecond)
	var ours, plain, ratio []float64
	bufs := make([]byte, 2*64*65536)
	for range rounds {
		cpu, _ := usage(n.WorkerPID)
		k, took := pump(a, d, hdr, frame, 8, 500*time.Millisecond)
		now, _ := usage(n.WorkerPID)
		// The driver copies as well, on another core if there is one: what the worker's core moves is what
		// it had time for.
		x := float64(k) * size / 1e9 / max(took.Seconds(), 1e-9)
		if now-cpu < took.Seconds()*0.8 {
			x = float64(k) * size / 1e9 / max(now-cpu, 0.01)
		}
		began, c := time.Now(), 0
		for time.Since(began) < 300*time.Millisecond {
			for i := range 64 {
				c += copy(bufs[(64+i)*65536:(65+i)*65536], bufs[i*65536:i*65536+size])
			}
		}
		y := float64(c) / 1e9 / time.Since(began).Seconds()
		ours, plain, ratio = append(ours, x), append(plain, y), append(ratio, x/y)
	}
	figure("gso_gbytes", median(ours), "GB/s", "report")
	figure("memcpy_gbytes", median(plain), "GB/s", "report")
	figure("gso_vs_memcpy", median(ratio), "ratio", "aim >= 0.5")
}

// roundTrip measures echo requests between two guests on vhost-user, and the same over two TAPs on a kernel
// bridge.
func (b *bench) roundTrip() {
	b.network("rtt", "10.2.0.0/24")
	na, nb := b.nic("rtt"), b.nic("rtt")
	a, d := b.vhost(na, vhosttest.Options{}), b.vhost(nb, vhosttest.Options{})
	defer a.Close()
	defer d.Close()
	there, back := udp(na, nb, 98), udp(nb, na, 98)
	var times []float64
	for range 20000 {
		began := time.Now()
		a.SendBatch(0, [12]byte{}, there)
		for d.Receive(0, 1, nil) == 0 {
		}
		d.SendBatch(0, [12]byte{}, back)
		for a.Receive(0, 1, nil) == 0 {
		}
		times = append(times, float64(time.Since(began).Nanoseconds())/1e3)
	}
	slices.Sort(times)
	figure("rtt_p50", times[len(times)/2], "us", "report")
	figure("rtt_p99", times[len(times)*99/100], "us", "report")
}

// idle measures workers that have nothing to do, and the time until a NIC can be used.
func (b *bench) idle() {
	n := b.network("idle", "10.3.0.0/24")
	first := b.nic("idle")
	d := b.vhost(first, vhosttest.Options{})
	defer d.Close()
	time.Sleep(200 * time.Millisecond)
	_, rss := usage(n.WorkerPID)
	figure("worker_rss_1_nic", float64(rss)/1e6, "MB", "report")
	var times []float64
	for range 63 {
		began := time.Now()
		nic := b.nic("idle")
		x := b.vhost(nic, vhosttest.Options{})
		x.SendBatch(0, [12]byte{}, arp(nic))
		if _, _, err := x.WaitFrame(0, time.Second, func(_, f []byte) bool { return wire.Be16(f[12:]) == wire.TypeARP }); err != nil {
			b.Fatal(err)
		}
		times = append(times, float64(time.Since(began).Microseconds())/1e3)
		defer x.Close()
	}
	figure("nic_create_to_usable_p50", median(times), "ms", "report")
	time.Sleep(500 * time.Millisecond)
	_, rss = usage(n.WorkerPID)
	figure("worker_rss_64_nics", float64(rss)/1e6, "MB", "report")
	cpu, _ := usage(n.WorkerPID)
	time.Sleep(10 * time.Second)
	now, _ := usage(n.WorkerPID)
	figure("idle_cpu_64_nics", (now-cpu)/10*100, "%", "aim <= 0.05")
}

func arp(n net.NIC) []byte {
	m, _ := wire.ParseMAC(n.MAC)
	f := make([]byte, 60)
	wire.PutEth(f, wire.Broadcast, m, wire.TypeARP)
	a := wire.ARP{Op: 1, SenderMAC: m, SenderIP: wire.IP4Of(n.IPv4), TargetIP: 0xa9fe0001}
	a.Put(f[14:])
	return f
}

// restart measures 1,000 attached NICs on ten networks coming back after everything of ours was killed.
func (b *bench) restart() {
	for i := range 10 {
		name := fmt.Sprintf("many%d", i)
		b.network(name, fmt.Sprintf("10.%d.0.0/16", 100+i))
		for range 100 {
			nic := b.nic(name)
			a, err := b.Attach(ctx, net.AttachRequest{NICID: nic.ID, Owner: service.Owner{VMID: "v"}, Modes: []net.AttachMode{net.AttachTAPFD}})
			must(b, a, err)
			a.TAP[0].Close()
		}
	}
	nets, err := b.ListNetworks(ctx)
	must(b, nets, err)
	if err := b.Shutdown(ctx); err != nil {
		b.Fatal(err)
	}
	for _, n := range nets {
		if p, err := os.FindProcess(int(n.WorkerPID)); err == nil && n.WorkerPID > 0 {
			_ = p.Kill()
		}
	}
	began := time.Now()
	b.Service = open(b.T, b.dir).Service // ends with the part
	nics, err := b.ListNICs(ctx, net.ListNICsRequest{})
	must(b, nics, err)
	for up := 0; up < 1000; {
		up = 0
		for i := range 10 {
			l, err := b.ListNICs(ctx, net.ListNICsRequest{NetworkID: fmt.Sprintf("many%d", i)})
			must(b, l, err)
			for _, n := range l {
				if n.State == net.StateConnected {
					up++
				}
			}
		}
		if time.Since(began) > time.Minute {
			b.Fatalf("%d of 1000 NICs are back", up)
		}
		time.Sleep(5 * time.Millisecond)
	}
	figure("start_1000_nics", time.Since(began).Seconds(), "s", "report")
}
