package netbench

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhosttest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

// Where the front-end and the back-end run: a core each.
const frontCPU, backCPU = 0, 1

// testpmd is DPDK's test program (Debian's dpdk-dev).
type testpmd struct {
	cmd *exec.Cmd
	in  io.Closer
	out *bufio.Scanner
}

// startTestpmd starts one that forwards on a core. Its drivers are preloaded: it refuses to load plugins from directories that
// others may write to.
func startTestpmd(t *testing.T, name string, cpu int, vdevs []string, args ...string) *testpmd {
	t.Helper()
	bin, err := exec.LookPath("dpdk-testpmd")
	if err != nil {
		t.Skip("dpdk-testpmd is not installed (Debian: dpdk-dev): nothing to compare with")
	}
	var pmds []string
	for _, p := range []string{"librte_net_vhost", "librte_net_virtio", "librte_mempool_ring"} {
		found, _ := filepath.Glob("/usr/lib/*/dpdk/pmds-*/" + p + ".so")
		if len(found) == 0 {
			t.Skipf("%s.so is not installed: nothing to compare with", p)
		}
		pmds = append(pmds, found[0])
	}
	eal := []string{"-l", "0,1", "--main-lcore", strconv.Itoa(1 - cpu), "--no-huge", "-m", "512", "--no-pci", "--file-prefix", name, "--no-telemetry"}
	for _, v := range vdevs {
		eal = append(eal, "--vdev", v)
	}
	p := &testpmd{cmd: exec.Command("stdbuf", append([]string{"-oL", bin}, append(append(eal, "--", "--auto-start", "--nb-cores=1", "--no-flush-rx", "--total-num-mbufs=16384", "--txd=1024", "--rxd=1024"), args...)...)...)}
	p.cmd.Env = append(os.Environ(), "LD_PRELOAD="+strings.Join(pmds, ":"))
	in, err := p.cmd.StdinPipe() // it ends when its input does
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = p.cmd.Stdout
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.in, p.out = in, bufio.NewScanner(out)
	return p
}

// line waits for a line that has what in it.
func (p *testpmd) line(what string) (string, error) {
	var last string
	for p.out.Scan() {
		if last = p.out.Text(); strings.Contains(last, what) {
			return last, nil
		}
	}
	return "", fmt.Errorf("testpmd ended; its last line was %q", last)
}

func (p *testpmd) stop() {
	_ = p.in.Close()
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	kill := time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	for p.out.Scan() { // until it has gone
	}
	_ = p.cmd.Wait()
}

// plain is what all front-ends of this comparison negotiate.
const plain = vhosttest.MrgRxbuf | vhosttest.Indirect | vhosttest.Version1

// path is one direction of traffic: into a, out of b.
type path struct{ a, b *vhosttest.Flood }

func (p path) close() { p.a.Close(); p.b.Close() }

// dial connects two drivers with frames of one size.
func dial(t *testing.T, a, b string, frame []byte) path {
	t.Helper()
	var p path
	for _, x := range []struct {
		path string
		f    **vhosttest.Flood
	}{{a, &p.a}, {b, &p.b}} {
		var d *vhosttest.Driver
		var err error
		for range 200 { // testpmd makes its sockets a while after it started
			if d, err = vhosttest.Dial(x.path, vhosttest.Options{Features: plain, Size: 1024, Poll: true}); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if err != nil {
			t.Fatal(err)
		}
		if *x.f, err = vhosttest.NewFlood(d, [12]byte{}, frame); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// rate pumps for a while and returns packets per second.
func (p path) rate(t *testing.T, size int, limit time.Duration) float64 {
	t.Helper()
	packets, total := 0, 0
	began, took := time.Now(), time.Duration(0)
	for round := 0; ; round++ {
		p.a.Send(64)
		n, bytes := p.b.Drain(64)
		packets += n
		total += bytes
		if round%256 == 0 {
			if took = time.Since(began); took > limit {
				break
			}
		}
	}
	if packets == 0 || total != packets*(12+size) {
		t.Errorf("%d packets of %d bytes were %d bytes", packets, size, total)
	}
	return float64(packets) / took.Seconds()
}

// pause stops the back-end, which polls for ever, while another has its core to itself; resume lets it go on.
func (p *testpmd) pause()  { _ = p.cmd.Process.Signal(unix.SIGSTOP) }
func (p *testpmd) resume() { _ = p.cmd.Process.Signal(unix.SIGCONT) }

// first lets a thread run before all others: a ring between two threads stands still whenever either is taken off
// its core, and what else runs on the machine would be what is measured.
func first(t *testing.T, tid int, on bool) {
	t.Helper()
	nice := 0
	if on {
		nice = -20
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, tid, nice); err != nil {
		t.Fatal(err)
	}
}

// pin keeps a process, all of its threads, on one core, or where they are if that is -1, and before others.
func pin(t *testing.T, pid, cpu int) {
	t.Helper()
	var set unix.CPUSet
	set.Set(cpu)
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range threads {
		tid, _ := strconv.Atoi(e.Name())
		if cpu >= 0 {
			if err := unix.SchedSetaffinity(tid, &set); err != nil {
				t.Fatal(err)
			}
		}
		first(t, tid, true)
	}
}

// alone gives the thread frontCPU, before others, until the returned function is called.
func alone(t *testing.T) (end func()) {
	t.Helper()
	runtime.LockOSThread()
	var was, set unix.CPUSet
	_ = unix.SchedGetaffinity(0, &was)
	set.Set(frontCPU)
	_ = unix.SchedSetaffinity(0, &set)
	first(t, 0, true)
	return func() {
		first(t, 0, false)
		_ = unix.SchedSetaffinity(0, &was)
		runtime.UnlockOSThread()
	}
}

// versusDPDK measures NIC to NIC through the engine, with routing, anti-spoofing and a security group, and the
// same frames through DPDK's vhost driver, which only exchanges MAC addresses, in turns: the same front-end
// on one core, the back-end on another.
func (b *bench) versusDPDK() {
	if runtime.NumCPU() < 2 {
		b.Skip("needs two processors")
	}
	n := b.network("packets", "10.0.0.0/24")
	g, err := b.CreateSecurityGroup(ctx, net.CreateSecurityGroupRequest{ID: ident.New(), Name: "g", Rules: []net.Rule{{Direction: net.Inbound, Protocol: "udp", PortFrom: 2000}}})
	must(b, g, err)
	na, nb := b.nic("packets"), b.nic("packets", "g")
	pin(b.T, int(n.WorkerPID), backCPU)
	sa, sb := b.socket(na), b.socket(nb)
	da, db := filepath.Join(b.dir, "dpdk-a"), filepath.Join(b.dir, "dpdk-b")
	vdevs := []string{"net_vhost0,iface=" + da, "net_vhost1,iface=" + db}
	pmd := startTestpmd(b.T, "back", backCPU, vdevs, "--forward-mode=mac")
	defer pmd.stop()
	if _, err := pmd.line("Press enter"); err != nil {
		b.Fatal(err)
	}
	pin(b.T, pmd.cmd.Process.Pid, -1)
	const slice = 250 * time.Millisecond
	for _, size := range []int{64, 1500} {
		frame := udp(na, nb, size)
		ours, theirs := dial(b.T, sa, sb, frame), dial(b.T, da, db, frame)
		end := alone(b.T)
		ours.rate(b.T, size, slice)
		theirs.rate(b.T, size, slice)
		var us, them, ratio []float64
		for range rounds {
			pmd.pause()
			x := ours.rate(b.T, size, slice)
			pmd.resume()
			y := theirs.rate(b.T, size, slice)
			us, them, ratio = append(us, x/1e6), append(them, y/1e6), append(ratio, x/y)
		}
		end()
		aim := "aim >= 0.8"
		if size == 1500 {
			aim = "aim >= 1.0"
		}
		figure(fmt.Sprintf("pps_%d_vs_dpdk", size), median(ratio), "x", aim)
		figure(fmt.Sprintf("pps_%d", size), median(us), "Mpps", "report")
		figure(fmt.Sprintf("pps_%d_best", size), slices.Max(us), "Mpps", "report")
		figure(fmt.Sprintf("dpdk_pps_%d", size), median(them), "Mpps", "report")
		got := ours.b.Last()[12:]
		if len(got) != size || wire.GetMAC(got).String() != nb.MAC || got[22] != frame[22]-1 || string(got[34:]) != string(frame[34:]) {
			b.Errorf("what arrives is not what was sent: %x", got[:64])
		}
		if nic, err := b.GetNIC(ctx, net.Ref{Ref: na.ID}); err != nil || nic.Counters.TxSpoofed+nic.Counters.TxDropped > 0 {
			b.Errorf("%+v %v", nic.Counters, err)
		}
		ours.close()
		theirs.close()
	}
}

// virtioUser validates the front-end that the figures above come from: how fast DPDK's own front-end sends to
// and receives from DPDK's vhost driver, and how fast ours does.
func (b *bench) virtioUser() {
	for _, way := range []struct{ name, back, front, column string }{{"send", "rxonly", "txonly", "Tx-pps:"}, {"receive", "txonly", "rxonly", "Rx-pps:"}} {
		sock := filepath.Join(b.dir, way.name)
		back := startTestpmd(b.T, "back"+way.name, backCPU, []string{"net_vhost0,iface=" + sock}, "--port-topology=loop", "--forward-mode="+way.back)
		if _, err := back.line("Press enter"); err != nil {
			b.Fatal(err)
		}
		front := startTestpmd(b.T, "front"+way.name, frontCPU, []string{"net_virtio_user0,path=" + sock + ",queue_size=1024"},
			"--port-topology=loop", "--forward-mode="+way.front, "--stats-period=1")
		pin(b.T, back.cmd.Process.Pid, -1)
		if _, err := front.line("Port statistics"); err != nil {
			b.Fatal(err)
		}
		pin(b.T, front.cmd.Process.Pid, -1)
		var theirs, ours []float64
		for len(theirs) < 5 {
			l, err := front.line(way.column)
			if err != nil {
				b.Fatal(err)
			}
			f := strings.Fields(l[strings.Index(l, way.column):])
			if v, _ := strconv.ParseFloat(f[1], 64); v > 0 {
				theirs = append(theirs, v/1e6)
			}
		}
		front.stop()
		func() {
			defer alone(b.T)()
			d, err := vhosttest.Dial(sock, vhosttest.Options{Features: plain, Size: 1024, Poll: true})
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			f, err := vhosttest.NewFlood(d, [12]byte{}, make([]byte, 64))
			if err != nil {
				b.Fatal(err)
			}
			for range rounds {
				packets, began := 0, time.Now()
				for time.Since(began) < 300*time.Millisecond {
					for range 64 {
						if way.name == "send" {
							packets += f.Send(32)
						} else {
							n, _ := f.Drain(32)
							packets += n
						}
					}
				}
				ours = append(ours, float64(packets)/time.Since(began).Seconds()/1e6)
			}
		}()
		back.stop()
		figure("front_end_"+way.name+"_vs_virtio_user", median(ours)/median(theirs), "x", "aim >= 0.9")
		figure("front_end_"+way.name, median(ours), "Mpps", "report")
		figure("virtio_user_"+way.name, median(theirs), "Mpps", "report")
	}
}
