package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

// benchRounds is how often each way is measured, in turns.
const benchRounds = 5

// TestGuestFigures measures two real guests that have two NICs each: one on the packet engine by vhost-user, one
// on a plain TAP and a kernel bridge.
func TestGuestFigures(t *testing.T) {
	if os.Getenv("MVIRT_BENCH_NET") == "" {
		t.Skip("measured by make bench-net only")
	}
	needRoot(t)
	files := guestFiles(t)
	root := t.TempDir()
	probe(t, root)
	files = overlay(t, files, root)
	dir, err := os.MkdirTemp("/run", "figures")
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir)
	defer p.Kill()
	ctx := t.Context()
	network, err := p.Net.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.0.0.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	sh(t, "ip link add br9 type bridge; ip link set br9 up; for i in 0 1; do ip tuntap add tap$i mode tap vnet_hdr; ip link set tap$i master br9 up; done")
	var vms []*vm
	for i := range 2 {
		nic, err := p.Net.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: "lan"})
		if err != nil {
			t.Fatal(err)
		}
		tap := fmt.Sprint("tap", i)
		vms = append(vms, boot(t, p, files, fmt.Sprint("guest", i), nic, net.AttachVhostUser,
			"-netdev", "tap,id=p,ifname="+tap+",script=no,downscript=no,vhost=off", "-device", "virtio-net-pci,netdev=p,vectors=0,mac=52:54:00:00:00:0"+strconv.Itoa(i+1)))
	}
	a, b := vms[0], vms[1]
	for i, v := range vms {
		v.login()
		v.run(true, fmt.Sprintf("killall udhcpc; ip addr add 192.168.7.%d/24 dev eth1; ip link set eth1 up; ip addr show dev eth0 | grep %s", i+1, v.nic.IPv4))
	}
	b.run(true, "(/probe sink >/tmp/sink 2>&1 &); (/probe echo >/tmp/echo 2>&1 &); for i in $(seq 60); do grep sinks /tmp/sink && grep echoes /tmp/echo && break; sleep 1; done; grep sinks /tmp/sink")
	number := func(text, key string) float64 {
		f := strings.Fields(text)
		i := slices.Index(f, key)
		if i < 0 || i+1 >= len(f) {
			t.Fatalf("no %s in %q", key, text)
		}
		v, err := strconv.ParseFloat(f[i+1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	ways := []string{b.nic.IPv4.String(), "192.168.7.2"}
	var speed, p50, p99 [2][]float64
	var ratio, share []float64
	for _, w := range ways {
		a.run(true, "/probe pump "+w+" 1") // warm
	}
	for range benchRounds {
		for i, w := range ways {
			cpu, wall := cpuOf(t, network.WorkerPID), time.Now()
			speed[i] = append(speed[i], number(a.output("/probe pump "+w+" 4"), "pumped")/1e6)
			if i == 0 {
				share = append(share, (cpuOf(t, network.WorkerPID)-cpu)/time.Since(wall).Seconds())
			}
			out := a.output("/probe rtt " + w + " 1000")
			p50[i], p99[i] = append(p50[i], number(out, "p50")), append(p99[i], number(out, "p99"))
		}
		ratio = append(ratio, speed[0][len(speed[0])-1]/speed[1][len(speed[1])-1])
	}
	mid := func(v []float64) float64 { return slices.Sorted(slices.Values(v))[len(v)/2] }
	fmt.Printf("figure vm_to_vm_tcp_vs_bridge %.4g x aim >= 1.2\n", mid(ratio))
	fmt.Printf("figure vm_to_vm_tcp %.4g MB/s report\nfigure bridge_tcp %.4g MB/s report\n", mid(speed[0]), mid(speed[1]))
	fmt.Printf("figure vm_to_vm_worker_cpu %.4g %% report\n", 100*mid(share))
	fmt.Printf("figure vm_rtt_p50 %.4g us report\nfigure vm_rtt_p99 %.4g us report\n", mid(p50[0]), mid(p99[0]))
	fmt.Printf("figure bridge_rtt_p50 %.4g us report\nfigure bridge_rtt_p99 %.4g us report\n", mid(p50[1]), mid(p99[1]))
	fmt.Println("note two guests under TCG, a processor each: they use nearly all of both, the engine what vm_to_vm_worker_cpu says of one")
}

// cpuOf is the processor time of a process in seconds.
func cpuOf(t *testing.T, pid uint32) float64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(pid), "stat"))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	u, _ := strconv.Atoi(f[11])
	k, _ := strconv.Atoi(f[12])
	return float64(u+k) / 100
}
