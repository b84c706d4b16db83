package worker

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhost"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhosttest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

// bench is a loop with NICs a and b, each with a vhost-user port.
type bench struct {
	t    testing.TB
	l    *loop
	dir  string
	done chan error
	mu   sync.Mutex
	said []string
}

var macs = map[string]wire.MAC{"a": 0x525400000002, "b": 0x525400000003}
var ips = map[string]wire.IP4{"a": 0x0a000002, "b": 0x0a000003}

func newBench(t testing.TB, pairs int) *bench {
	b := &bench{t: t, dir: t.TempDir(), done: make(chan error, 1)}
	l, err := newLoop(func(id, typ, text string) {
		b.mu.Lock()
		b.said = append(b.said, id+" "+typ+" "+text)
		b.mu.Unlock()
	})
	if err != nil {
		t.Fatal(err)
	}
	b.l = l
	go func() { b.done <- l.run() }()
	l.do(func() {
		l.router.SetNetwork(engine.Network{Subnet4: netip.MustParsePrefix("10.0.0.0/24"), MTU: 1500})
		for id, m := range macs {
			l.router.SetNIC(engine.NICConfig{ID: id, MAC: m, IPv4: ips[id].Addr()})
		}
	})
	for id, m := range macs {
		fd, err := wctl.ListenStream(b.path(id), os.Geteuid(), os.Getegid())
		if err != nil {
			t.Fatal(err)
		}
		cfg := vhost.Config{MTU: 1500, Pairs: pairs}
		m.Put(cfg.MAC[:])
		l.do(func() { err = l.attachVhost(id, fd, cfg) })
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		l.do(func() {
			l.detach("a")
			l.detach("b")
			l.stop = true
			if len(l.sources) != 0 || len(l.hot) != 0 {
				t.Errorf("%d descriptors and %d polled ports are left", len(l.sources), len(l.hot))
			}
		})
		if err := <-b.done; err != nil {
			t.Error(err)
		}
		unix.Close(l.epoll)
		unix.Close(l.wake)
	})
	return b
}

func (b *bench) path(id string) string { return b.dir + "/" + id }

func (b *bench) dial(id string, opt vhosttest.Options) *vhosttest.Driver {
	b.t.Helper()
	d, err := vhosttest.Dial(b.path(id), opt)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(d.Close)
	return d
}

// saw says whether an event with that text was sent.
func (b *bench) saw(part string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Contains(strings.Join(b.said, "\n"), part)
}

func (b *bench) status(id string) (s engine.Status) {
	b.l.do(func() { s, _ = b.l.router.Status(id) })
	return s
}

// frame is UDP from one NIC to another.
func frame(from, to string, payload []byte) []byte {
	f := make([]byte, 42+len(payload))
	copy(f[42:], payload)
	wire.PutEth(f, engine.GatewayMAC, macs[from], wire.TypeIPv4)
	wire.PutIPv4(f[14:], ips[from], ips[to], wire.ProtoUDP, 64, 1, 8+len(payload))
	wire.PutUDP4(f[34:], f[14:], 1000, 2000, len(payload))
	return f
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

// arrives waits for a frame with this payload.
func arrives(t *testing.T, d *vhosttest.Driver, pair int, payload []byte) []byte {
	t.Helper()
	hdr, f, err := d.WaitFrame(pair, 30*time.Second, func(_, f []byte) bool { return len(f) == 42+len(payload) })
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f[42:], payload) {
		t.Fatal("the payload is not what was sent")
	}
	var in wire.Info
	if p := wire.ParseIPv4(f, len(f), &in); p != wire.OK || f[22] != 63 {
		t.Errorf("problem %d, TTL %d", p, f[22])
	}
	return hdr
}

func TestVhostFeatures(t *testing.T) {
	for name, f := range map[string]uint64{
		"usual":             vhosttest.Usual,
		"plain":             vhosttest.Version1,
		"without event idx": vhosttest.Usual &^ vhosttest.EventIdx,
		"without mergeable": vhosttest.Usual &^ vhosttest.MrgRxbuf,
		"legacy":            vhosttest.Csum | vhosttest.GuestCsum,
		"legacy mergeable":  vhosttest.MrgRxbuf,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, 1)
			da, db := b.dial("a", vhosttest.Options{Features: f}), b.dial("b", vhosttest.Options{Features: f})
			// Around the ring several times.
			for i := range 1000 {
				payload := pattern(1 + i)
				for da.SendBatch(0, [12]byte{}, frame("a", "b", payload)) == 0 {
					time.Sleep(10 * time.Microsecond)
				}
				arrives(t, db, 0, payload)
			}
			if s := b.status("a"); s.TxPackets != 1000 || s.TxDropped != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestVhostMultiQueue(t *testing.T) {
	b := newBench(t, 4)
	da, db := b.dial("a", vhosttest.Options{Pairs: 4}), b.dial("b", vhosttest.Options{Pairs: 4})
	if n, err := da.Ask64(17); err != nil || n != 4 {
		t.Errorf("%d queue pairs: %v", n, err)
	}
	for pair := range 4 {
		da.SendBatch(pair, [12]byte{}, frame("a", "b", pattern(10+pair)))
	}
	got := 0
	for end := time.Now().Add(30 * time.Second); got < 4 && time.Now().Before(end); {
		for pair := range 4 {
			got += db.Receive(pair, 10, func(_, f []byte) {})
		}
	}
	if got != 4 {
		t.Errorf("%d packets of 4 queues", got)
	}
}

// TestVhostChains sends packets whose parts lie in many descriptors, direct and indirect.
func TestVhostChains(t *testing.T) {
	b := newBench(t, 1)
	da, db := b.dial("a", vhosttest.Options{}), b.dial("b", vhosttest.Options{})
	payload := pattern(900)
	whole := append(make([]byte, 12), frame("a", "b", payload)...)
	q := &da.Queues[1]
	for _, sizes := range [][]int{{12, 942}, {5, 7, 942}, {12, 14, 20, 8, 900}, {954}, {1, 1, 1, 951}, {12, 42, 100, 100, 100, 100, 100, 100, 100, 100, 100}} {
		for _, indirect := range []bool{false, true} {
			t.Run(fmt.Sprint(sizes, indirect), func(t *testing.T) {
				at, off := q.Buf+100*q.BufLen, 0
				copy(da.Mem[at:], whole)
				table := q.Buf + 200*q.BufLen
				for i, n := range sizes {
					flags := uint16(0)
					if i+1 < len(sizes) {
						flags = 1
					}
					if indirect {
						e := da.Mem[table+16*i:]
						binary.LittleEndian.PutUint64(e, vhosttest.GPA+uint64(at+off))
						binary.LittleEndian.PutUint32(e[8:], uint32(n))
						binary.LittleEndian.PutUint16(e[12:], flags)
						binary.LittleEndian.PutUint16(e[14:], uint16(i+1))
					} else {
						da.SetDesc(1, 20+i, vhosttest.GPA+uint64(at+off), uint32(n), flags, uint16(21+i))
					}
					off += n
				}
				head := uint16(20)
				if indirect {
					head = 3
					da.SetDesc(1, 3, vhosttest.GPA+uint64(table), uint32(16*len(sizes)), 4, 0)
				}
				da.Offer(1, head)
				arrives(t, db, 0, payload)
			})
		}
	}
}

// TestVhostOffloads: what a receiver did not negotiate is done for it.
func TestVhostOffloads(t *testing.T) {
	const total = 30000
	tcp := make([]byte, 20+total)
	copy(tcp[20:], pattern(total))
	wire.PutBe16(tcp, 1000)
	wire.PutBe16(tcp[2:], 2000)
	wire.IP4(5000).Put(tcp[4:])
	tcp[12], tcp[13] = 5<<4, 0x99 // CWR, ACK, PSH, FIN
	f := make([]byte, 34+len(tcp))
	wire.PutEth(f, engine.GatewayMAC, macs["a"], wire.TypeIPv4)
	wire.PutIPv4(f[14:], ips["a"], ips["b"], wire.ProtoTCP, 64, 9, len(tcp))
	copy(f[34:], tcp)
	wire.PutBe16(f[34+16:], ^wire.Fold(wire.PseudoSum4(f[26:], wire.ProtoTCP, len(tcp))))
	hdr := [12]byte{0: 1, 1: 1, 2: 54, 4: 0xb4, 5: 5, 6: 34, 8: 16} // NEEDS_CSUM, TCPv4, 1460
	for name, feat := range map[string]uint64{
		"all":                     vhosttest.Usual,
		"without segmentation":    vhosttest.Usual &^ (vhosttest.GuestTSO4 | vhosttest.GuestTSO6),
		"without any":             vhosttest.Version1 | vhosttest.MrgRxbuf,
		"without any, one buffer": vhosttest.Version1,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, 1)
			da := b.dial("a", vhosttest.Options{TxLen: 65536})
			db := b.dial("b", vhosttest.Options{Features: feat})
			if da.SendBatch(0, hdr, f) != 1 {
				t.Fatal("not sent")
			}
			got, next := []byte{}, uint32(5000)
			for len(got) < total {
				h, s, err := db.WaitFrame(0, 30*time.Second, func(_, _ []byte) bool { return true })
				if err != nil {
					t.Fatalf("after %d bytes: %v", len(got), err)
				}
				var in wire.Info
				if p := wire.ParseIPv4(s, len(s), &in); p != wire.OK {
					t.Fatalf("problem %d", p)
				}
				if seq := uint32(wire.GetIP4(s[38:])); seq != next {
					t.Fatalf("sequence %d, want %d", seq, next)
				}
				whole := len(s) == len(f)
				first, last := len(got) == 0, len(got)+len(s)-54 == total
				if want := flagsOf(first, last); in.TCPFlags != want && !whole {
					t.Errorf("flags %#x, want %#x", in.TCPFlags, want)
				}
				if feat&vhosttest.GuestCsum == 0 {
					if h[0] != 0 || wire.Fold(wire.Sum(wire.PseudoSum4(s[26:], wire.ProtoTCP, in.End-34), s[34:in.End])) != 0 {
						t.Fatal("the checksum is not made")
					}
				} else if h[0] != 1 {
					t.Error("the checksum is not said to be missing")
				}
				if whole != (feat&vhosttest.GuestTSO4 != 0) || !whole && len(s) > 1514 {
					t.Fatalf("a packet of %d bytes", len(s))
				}
				got = append(got, s[54:]...)
				next += uint32(len(s) - 54)
			}
			if !bytes.Equal(got, tcp[20:]) {
				t.Error("the data is not what was sent")
			}
		})
	}
}

func flagsOf(first, last bool) uint8 {
	f := uint8(0x10)
	if first {
		f |= 0x80
	}
	if last {
		f |= 0x09
	}
	return f
}

// TestVhostNotNegotiated: what the sender did not negotiate it may not ask for.
func TestVhostNotNegotiated(t *testing.T) {
	b := newBench(t, 1)
	da, db := b.dial("a", vhosttest.Options{Features: vhosttest.Version1}), b.dial("b", vhosttest.Options{})
	da.SendBatch(0, [12]byte{0: 1, 6: 34, 8: 6}, frame("a", "b", pattern(33)))
	da.SendBatch(0, [12]byte{}, frame("a", "b", pattern(44)))
	arrives(t, db, 0, pattern(44))
	if s := b.status("b"); s.RxPackets != 1 {
		t.Errorf("%+v", s)
	}
}

// TestVhostSlowGuest: packets for a guest without buffers wait, in order, up to a bound.
func TestVhostSlowGuest(t *testing.T) {
	b := newBench(t, 1)
	da, db := b.dial("a", vhosttest.Options{}), b.dial("b", vhosttest.Options{})
	const n = 600 // more than the ring's 256
	for i := range n {
		p := pattern(100)
		binary.LittleEndian.PutUint32(p, uint32(i))
		for da.SendBatch(0, [12]byte{}, frame("a", "b", p)) == 0 {
			time.Sleep(10 * time.Microsecond)
		}
	}
	for i := range n {
		_, f, err := db.WaitFrame(0, 30*time.Second, func(_, _ []byte) bool { return true })
		if err != nil || binary.LittleEndian.Uint32(f[42:]) != uint32(i) {
			t.Fatalf("packet %d: %v", i, err)
		}
	}
	// Much more than the bound: the rest is dropped and counted, and memory does not grow.
	big := pattern(1400)
	for range 10000 {
		for da.SendBatch(0, [12]byte{}, frame("a", "b", big)) == 0 {
			time.Sleep(time.Microsecond)
		}
	}
	deadline := time.Now().Add(30 * time.Second)
	for b.status("a").TxPackets < n+10000 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if s := b.status("b"); s.RxDropped == 0 || s.RxPackets+s.RxDropped != n+10000 {
		t.Errorf("%+v", s)
	}
}

func TestVhostReconnects(t *testing.T) {
	for _, inflight := range []bool{false, true} {
		t.Run(fmt.Sprint(inflight), func(t *testing.T) {
			b := newBench(t, 1)
			opt := vhosttest.Options{Inflight: inflight}
			da, db := b.dial("a", opt), b.dial("b", opt)
			for i := range 200 {
				da.SendBatch(0, [12]byte{}, frame("a", "b", pattern(200+i)))
				arrives(t, db, 0, pattern(200+i))
				d, id := da, "a"
				if i%2 == 0 {
					d, id = db, "b"
				}
				d.Disconnect()
				if err := d.Connect(b.path(id)); err != nil {
					t.Fatal(err)
				}
			}
			if n := strings.Count(fds(t), "\n"); n > 60 {
				t.Errorf("%d descriptors are open: %s", n, fds(t))
			}
		})
	}
}

func fds(t *testing.T) string {
	ents, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	s := ""
	for _, e := range ents {
		l, _ := os.Readlink("/proc/self/fd/" + e.Name())
		s += l + "\n"
	}
	return s
}

// TestVhostMalformed: each of these ends the connection of the guest that did it, with a reason; another
// guest's goes on, and the same guest may come back.
func TestVhostMalformed(t *testing.T) {
	const gpa = vhosttest.GPA
	tests := []struct {
		name string
		do   func(d *vhosttest.Driver)
		want string
	}{
		{"index out of the ring", func(d *vhosttest.Driver) { d.Offer(1, 999) }, "outside the ring"},
		{"index that jumps", func(d *vhosttest.Driver) { d.Queues[1].AvailIdx += 300; d.Offer(1, 0) }, "jumped"},
		{"address outside", func(d *vhosttest.Driver) { d.SetDesc(1, 0, 0x1000, 100, 0, 0); d.Offer(1, 0) }, "outside the guest's memory"},
		{"address near 2^64", func(d *vhosttest.Driver) { d.SetDesc(1, 0, ^uint64(0)-10, 100, 0, 0); d.Offer(1, 0) }, "outside the guest's memory"},
		{"length past the end", func(d *vhosttest.Driver) {
			d.SetDesc(1, 0, gpa+uint64(len(d.Mem))-16, 60000, 0, 0)
			d.Offer(1, 0)
		}, "outside the guest's memory"},
		{"loop", func(d *vhosttest.Driver) {
			d.SetDesc(1, 0, gpa, 0, 1, 1)
			d.SetDesc(1, 1, gpa, 0, 1, 0)
			d.Offer(1, 0)
		}, "no end"},
		{"next out of the ring", func(d *vhosttest.Driver) { d.SetDesc(1, 0, gpa, 100, 1, 777); d.Offer(1, 0) }, "outside the ring"},
		{"wrong direction", func(d *vhosttest.Driver) { d.SetDesc(1, 0, gpa, 100, 2, 0); d.Offer(1, 0) }, "wrong direction"},
		{"shorter than its header", func(d *vhosttest.Driver) { d.SetDesc(1, 0, gpa, 5, 0, 0); d.Offer(1, 0) }, "shorter than its header"},
		{"indirect of odd length", func(d *vhosttest.Driver) { d.SetDesc(1, 0, gpa, 17, 4, 0); d.Offer(1, 0) }, "malformed"},
		{"indirect outside", func(d *vhosttest.Driver) { d.SetDesc(1, 0, 16, 32, 4, 0); d.Offer(1, 0) }, "outside"},
		{"indirect in indirect", func(d *vhosttest.Driver) {
			q := &d.Queues[1]
			e := d.Mem[q.Buf:]
			binary.LittleEndian.PutUint64(e, gpa+uint64(q.Buf))
			binary.LittleEndian.PutUint32(e[8:], 16)
			binary.LittleEndian.PutUint16(e[12:], 4)
			d.SetDesc(1, 0, gpa+uint64(q.Buf), 16, 4, 0)
			d.Offer(1, 0)
		}, "malformed"},
		{"unknown message", func(d *vhosttest.Driver) { _ = d.Raw(vhosttest.Message(99, 0, nil)) }, "not known"},
		{"message of another version", func(d *vhosttest.Driver) { _ = d.Raw([]byte{1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0}) }, "version"},
		{"long message", func(d *vhosttest.Driver) { _ = d.Raw([]byte{1, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255}) }, "bytes"},
		{"ring that is none", func(d *vhosttest.Driver) { _ = d.Raw(vhosttest.Message(8, 0, vhosttest.State(7, 256))) }, "ring 7"},
		{"features not offered", func(d *vhosttest.Driver) { _ = d.Raw(vhosttest.Message(2, 0, bytes.Repeat([]byte{255}, 8))) }, "not offered"},
		{"memory without descriptor", func(d *vhosttest.Driver) {
			_ = d.Raw(vhosttest.Message(5, 0, append([]byte{1, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 32)...)))
		}, "0 descriptors"},
		{"memory larger than its file", func(d *vhosttest.Driver) {
			p := append([]byte{1, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 32)...)
			p[8+12] = 1
			_ = d.Raw(vhosttest.Message(5, 0, p), d.MemFD)
		}, "in a file of"},
		{"memory that goes away", func(d *vhosttest.Driver) {
			_ = unix.Ftruncate(d.MemFD, 0)
			d.KickQueue(1)
		}, "failed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, 1)
			db := b.dial("b", vhosttest.Options{})
			da := b.dial("a", vhosttest.Options{})
			tt.do(da)
			for end := time.Now().Add(30 * time.Second); !b.saw(tt.want); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					b.mu.Lock()
					defer b.mu.Unlock()
					t.Fatalf("no reason with %q in %q", tt.want, b.said)
				}
			}
			again := b.dial("a", vhosttest.Options{})
			again.SendBatch(0, [12]byte{}, frame("a", "b", pattern(60)))
			arrives(t, db, 0, pattern(60))
			db.SendBatch(0, [12]byte{}, frame("b", "a", pattern(61)))
			arrives(t, again, 0, pattern(61))
			if !b.saw("a fine") || b.saw("b trouble") {
				t.Errorf("events %q", b.said)
			}
		})
	}
}

// TestVhostBadBuffers: a receiver that offers nonsense pays for it alone.
func TestVhostBadBuffers(t *testing.T) {
	for name, do := range map[string]func(d *vhosttest.Driver){
		"outside": func(d *vhosttest.Driver) {
			for k := range 256 {
				d.SetDesc(0, k, 64, 2048, 2, 0)
			}
		},
		"wrong direction": func(d *vhosttest.Driver) {
			for k := range 256 {
				d.SetDesc(0, k, vhosttest.GPA, 2048, 0, 0)
			}
		},
		"empty": func(d *vhosttest.Driver) {
			for k := range 256 {
				d.SetDesc(0, k, vhosttest.GPA, 0, 2, 0)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, 1)
			da, db := b.dial("a", vhosttest.Options{}), b.dial("b", vhosttest.Options{})
			do(db)
			da.SendBatch(0, [12]byte{}, frame("a", "b", pattern(60)))
			for end := time.Now().Add(30 * time.Second); !b.saw("b trouble"); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("nothing happened")
				}
			}
			if b.saw("a trouble") {
				t.Error("the sender was punished")
			}
			db2 := b.dial("b", vhosttest.Options{})
			da.SendBatch(0, [12]byte{}, frame("a", "b", pattern(70)))
			arrives(t, db2, 0, pattern(70))
		})
	}
}

// FuzzVhostMessages sends anything to the back-end.
func FuzzVhostMessages(f *testing.F) {
	f.Add(vhosttest.Message(1, 0, nil))
	f.Add(append(vhosttest.Message(16, 0, make([]byte, 8)), vhosttest.Message(8, 8, vhosttest.State(0, 256))...))
	f.Add(append(vhosttest.Message(10, 0, vhosttest.State(1, 7)), vhosttest.Message(11, 0, vhosttest.State(1, 0))...))
	f.Add(vhosttest.Message(24, 0, []byte{0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0}))
	f.Add(vhosttest.Message(31, 0, make([]byte, 20)))
	b := newBench(f, 2)
	f.Fuzz(func(t *testing.T, data []byte) {
		b.t = t
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: b.path("a")}); err != nil {
			t.Fatal(err)
		}
		_, _ = unix.SendmsgN(fd, data, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		b.l.do(func() {})
	})
}

// FuzzVhostRing lets a guest write anything into a ring: descriptors, the available ring, and some memory.
func FuzzVhostRing(f *testing.F) {
	f.Add(make([]byte, 64), uint16(1), uint16(0))
	f.Add(append(binary.LittleEndian.AppendUint64(nil, vhosttest.GPA), 60, 0, 0, 0, 1, 0, 1, 0), uint16(2), uint16(1))
	f.Add(append(binary.LittleEndian.AppendUint64(nil, vhosttest.GPA+4096), 32, 0, 0, 0, 4, 0, 0, 0), uint16(3), uint16(1))
	b := newBench(f, 1)
	f.Fuzz(func(t *testing.T, desc []byte, n, queue uint16) {
		d, err := vhosttest.Dial(b.path("a"), vhosttest.Options{Size: 16})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		q := &d.Queues[queue&1]
		copy(d.Mem[q.Desc:q.Desc+16*q.Num], desc)
		copy(d.Mem[q.Buf:], desc)
		q.AvailIdx += n
		d.Offer(int(queue&1), uint16(len(desc)))
		b.l.do(func() { // and something for it to receive
			b.l.router.Restart("a")
			b.l.next = 0
		})
		b.l.do(func() {})
	})
}
