package engine

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"unsafe"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
)

func flowMem(n int) []byte {
	mem := make([]byte, n+64)
	off := int(-uintptr(unsafe.Pointer(&mem[0])) & 63)
	return mem[off : off+n]
}

func newFlows(t testing.TB, buckets int) *Flows {
	f, err := NewFlows(flowMem(64+buckets*flowWays*64), 1)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// guarded is a world in which b is in group g with these rules; a is open.
func guarded(t testing.TB, rules ...Rule) *world {
	w := newWorld(t)
	w.r.SetFlows(newFlows(t, 64))
	w.r.SetGroups([]Group{{ID: "g", Rules: rules}, {ID: "peers"}})
	w.r.SetNIC(NICConfig{ID: "b", MAC: macB, IPv4: netip.MustParseAddr("10.0.0.3"), Groups: []string{"g"}})
	return w
}

func l4(proto uint8, sport, dport uint16, flags uint8) []byte {
	switch proto {
	case wire.ProtoTCP:
		b := make([]byte, 20)
		wire.PutBe16(b, sport)
		wire.PutBe16(b[2:], dport)
		b[12], b[13] = 5<<4, flags
		return b
	case wire.ProtoICMP:
		b := echo(uint8(dport), 8)
		wire.PutBe16(b[4:], sport)
		wire.PutBe16(b[2:], 0)
		wire.PutBe16(b[2:], wire.Checksum(b))
		return b
	}
	return udp(sport, dport, 4)
}

// try sends from "a", "b" or "up" and says whether it arrived at the other end.
func (w *world) try(from, src, dst string, proto uint8, sport, dport uint16, flags uint8) bool {
	w.t.Helper()
	w.clear()
	f := v4{src: src, dst: dst, proto: proto, payload: l4(proto, sport, dport, flags)}
	switch from {
	case "a":
		w.a.put(f.frame(), 0, Offload{})
	case "b":
		f.smac = macB
		w.b.put(f.frame(), 0, Offload{})
	case "up":
		w.up.put(f.frame(), 0, Offload{})
	}
	w.poll()
	return len(w.a.tx)+len(w.b.tx)+len(w.up.tx) == 1
}

const (
	tcp, udpP, icmpP = wire.ProtoTCP, wire.ProtoUDP, wire.ProtoICMP
	aIP, bIP, oIP    = "10.0.0.2", "10.0.0.3", "8.8.8.8"
)

func (w *world) want(ok bool, from, src, dst string, proto uint8, sport, dport uint16, flags uint8) {
	w.t.Helper()
	if w.try(from, src, dst, proto, sport, dport, flags) != ok {
		w.t.Errorf("%s: %s:%d > %s:%d proto %d flags %d arrived: %v", from, src, sport, dst, dport, proto, flags, !ok)
	}
}

func TestDefaultDeny(t *testing.T) {
	w := guarded(t)
	w.want(false, "a", aIP, bIP, tcp, 1000, 80, tcpSYN)
	w.want(false, "up", oIP, bIP, udpP, 53, 1000, 0)
	w.want(false, "a", aIP, bIP, icmpP, 1, 8, 0)
	w.want(true, "a", aIP, oIP, udpP, 1, 2, 0) // a is open
	if s, _ := w.r.Status("b"); s.RxDropped != 3 {
		t.Errorf("%+v", s.Counters)
	}
	// b may go out, and gets answers to what it asked, and to nothing else.
	w.want(true, "b", bIP, oIP, udpP, 1000, 53, 0)
	w.want(true, "up", oIP, bIP, udpP, 53, 1000, 0)
	w.want(false, "up", oIP, bIP, udpP, 53, 1001, 0)
	w.want(false, "up", oIP, bIP, udpP, 54, 1000, 0)
	w.want(false, "up", "8.8.4.4", bIP, udpP, 53, 1000, 0)
	w.want(true, "b", bIP, aIP, tcp, 1000, 22, tcpSYN)
	w.want(true, "a", aIP, bIP, tcp, 22, 1000, tcpSYN|tcpACK)
	w.want(true, "b", bIP, aIP, icmpP, 7, 8, 0)
	w.want(true, "a", aIP, bIP, icmpP, 7, 0, 0)
	w.want(false, "a", aIP, bIP, icmpP, 8, 0, 0) // a reply to nothing
	w.want(false, "a", aIP, bIP, icmpP, 7<<8, 8, 0)
}

func TestRules(t *testing.T) {
	peer := netip.MustParsePrefix
	tests := []struct {
		name  string
		rules []Rule
		yes   func(w *world)
	}{
		{"port", []Rule{{Inbound: true, Proto: tcp, From: 80}}, func(w *world) {
			w.want(true, "a", aIP, bIP, tcp, 1, 80, tcpSYN)
			w.want(false, "a", aIP, bIP, tcp, 1, 81, tcpSYN)
			w.want(false, "a", aIP, bIP, udpP, 1, 80, 0)
		}},
		{"ports", []Rule{{Inbound: true, Proto: udpP, From: 1000, To: 2000}}, func(w *world) {
			w.want(false, "a", aIP, bIP, udpP, 1, 999, 0)
			w.want(true, "a", aIP, bIP, udpP, 1, 1000, 0)
			w.want(true, "a", aIP, bIP, udpP, 1, 2000, 0)
			w.want(false, "a", aIP, bIP, udpP, 1, 2001, 0)
		}},
		{"ping", []Rule{{Inbound: true, Proto: icmpP, From: 8, To: 8}}, func(w *world) {
			w.want(true, "a", aIP, bIP, icmpP, 1, 8, 0)
			w.want(true, "b", bIP, aIP, icmpP, 1, 0, 0)
			w.want(false, "a", aIP, bIP, icmpP, 1, 13, 0)
		}},
		{"prefix", []Rule{{Inbound: true, Any: true, Peer: peer("8.8.0.0/16")}}, func(w *world) {
			w.want(true, "up", oIP, bIP, tcp, 1, 80, tcpSYN)
			w.want(false, "up", "9.9.9.9", bIP, tcp, 1, 80, tcpSYN)
			w.want(false, "a", aIP, bIP, tcp, 1, 80, tcpSYN)
		}},
		{"IPv6 prefix", []Rule{{Inbound: true, Any: true, Peer: peer("::/0")}}, func(w *world) {
			w.want(false, "up", oIP, bIP, tcp, 1, 80, tcpSYN)
		}},
		{"group", []Rule{{Inbound: true, Any: true, Group: "peers"}}, func(w *world) {
			w.want(false, "a", aIP, bIP, tcp, 1, 80, tcpSYN)
			w.r.SetNIC(NICConfig{ID: "a", MAC: macA, IPv4: netip.MustParseAddr(aIP), Groups: []string{"peers"}})
			w.want(true, "a", aIP, bIP, tcp, 2, 80, tcpSYN)
			w.want(false, "up", oIP, bIP, tcp, 1, 80, tcpSYN)
		}},
		{"outbound", []Rule{{Proto: tcp, From: 443}}, func(w *world) {
			w.want(true, "b", bIP, oIP, tcp, 1, 443, tcpSYN)
			w.want(true, "up", oIP, bIP, tcp, 443, 1, tcpSYN|tcpACK)
			w.want(false, "b", bIP, oIP, tcp, 1, 80, tcpSYN)
			w.want(false, "b", bIP, aIP, udpP, 1, 53, 0)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { tt.yes(guarded(t, tt.rules...)) })
	}
}

func TestGuardedBothEnds(t *testing.T) {
	w := guarded(t, Rule{Inbound: true, Proto: tcp, From: 80})
	w.r.SetGroups([]Group{{ID: "g", Rules: []Rule{{Inbound: true, Proto: tcp, From: 80}}}, {ID: "h", Rules: []Rule{{Proto: tcp, From: 81}}}})
	w.r.SetNIC(NICConfig{ID: "a", MAC: macA, IPv4: netip.MustParseAddr(aIP), Groups: []string{"h"}})
	w.want(false, "a", aIP, bIP, tcp, 1, 80, tcpSYN) // the sender's own rules forbid
	if s, _ := w.r.Status("a"); s.TxDropped != 1 {
		t.Errorf("%+v", s.Counters)
	}
	w.want(false, "a", aIP, bIP, tcp, 1, 81, tcpSYN) // the receiver's
}

func TestRulesChangeLive(t *testing.T) {
	w := guarded(t, Rule{Inbound: true, Proto: tcp, From: 80})
	w.want(true, "a", aIP, bIP, tcp, 1, 80, tcpSYN)
	w.want(true, "b", bIP, aIP, tcp, 80, 1, tcpSYN|tcpACK)
	w.r.SetGroups([]Group{{ID: "g"}})
	w.want(false, "b", bIP, aIP, tcp, 80, 1, tcpACK) // also the answers stop... unless b begins, which it may
	w.want(false, "a", aIP, bIP, tcp, 1, 80, tcpACK)
	w.r.SetNIC(NICConfig{ID: "b", MAC: macB, IPv4: netip.MustParseAddr(bIP)})
	w.want(true, "a", aIP, bIP, tcp, 1, 80, tcpACK)
}

func TestErrorsFollowFlows(t *testing.T) {
	w := guarded(t)
	out := v4{src: bIP, dst: oIP, smac: macB, payload: l4(udpP, 1000, 53, 0)}.frame()
	errorFrom := func(src string, quoted []byte) bool {
		w.clear()
		p := make([]byte, 1500)
		n := wire.ICMPv4Error(p, quoted[14:], ip(src), 3, 3, 0, 1)
		w.up.put(p[:n], 0, Offload{})
		w.poll()
		return len(w.b.tx) == 1
	}
	if errorFrom(oIP, out) {
		t.Error("an error about nothing came through")
	}
	w.b.put(out, 0, Offload{})
	w.poll()
	if !errorFrom(oIP, out) || !errorFrom("9.9.9.9", out) { // any router on the way may complain
		t.Error("an error about a flow was held back")
	}
	if errorFrom(oIP, v4{src: bIP, dst: oIP, payload: l4(udpP, 1001, 53, 0)}.frame()) {
		t.Error("an error about another flow came through")
	}
}

func TestGuardedFragments(t *testing.T) {
	w := guarded(t, Rule{Inbound: true, Proto: udpP, From: 53})
	send := func(flags uint16, payload []byte) bool {
		w.clear()
		w.a.put(v4{src: aIP, dst: bIP, flags: flags, payload: payload}.frame(), 0, Offload{})
		w.poll()
		return len(w.b.tx) == 1
	}
	rest := make([]byte, 40)
	if send(5, rest) {
		t.Error("a later fragment without its first came through")
	}
	if send(0x2000, udp(1, 54, 32)) || send(5, rest) {
		t.Error("fragments to a closed port came through")
	}
	if !send(0x2000, udp(1, 53, 32)) || !send(5, rest) {
		t.Error("fragments to an open port did not come through")
	}
	w.now += (fragTimeout + 1) * 1e9
	if send(5, rest) {
		t.Error("a fragment came through long after")
	}
}

func TestTimeouts(t *testing.T) {
	for _, tt := range []struct {
		name    string
		proto   uint8
		prepare func(w *world)
		secs    int64
	}{
		{"UDP unanswered", udpP, func(w *world) {}, timeoutNew},
		{"UDP answered", udpP, func(w *world) { w.want(true, "up", oIP, bIP, udpP, 53, 9, 0) }, timeoutUDP},
		{"TCP half open", tcp, func(w *world) {}, timeoutNew},
		{"TCP established", tcp, func(w *world) { w.want(true, "up", oIP, bIP, tcp, 53, 9, tcpSYN|tcpACK) }, timeoutTCP},
		{"TCP closed", tcp, func(w *world) { w.want(true, "up", oIP, bIP, tcp, 53, 9, tcpFIN|tcpACK) }, timeoutClosing},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := guarded(t)
			w.want(true, "b", bIP, oIP, tt.proto, 9, 53, tcpSYN)
			tt.prepare(w)
			w.now += tt.secs * 1e9
			w.want(true, "up", oIP, bIP, tt.proto, 53, 9, tcpACK)
			w.now += (timeoutTCP + 1) * 1e9
			w.want(false, "up", oIP, bIP, tt.proto, 53, 9, tcpACK)
		})
	}
}

// TestExhaustion has one guest open as many flows as it can: it fills its share, and no more; the others
// go on, old flows and new ones.
func TestExhaustion(t *testing.T) {
	w := guarded(t, Rule{Inbound: true, Proto: tcp, From: 80})
	w.r.SetFlows(newFlows(t, 256)) // 2,048 flows
	w.r.SetNIC(NICConfig{ID: "a", MAC: macA, IPv4: netip.MustParseAddr(aIP), Groups: []string{"peers"}})
	w.want(true, "b", bIP, oIP, tcp, 5, 443, tcpSYN)
	w.want(true, "up", oIP, bIP, tcp, 443, 5, tcpSYN|tcpACK)
	passed := 0
	for i := range 20000 {
		w.now += 1e5
		if w.try("a", aIP, "9.9.9.9", udpP, uint16(i), uint16(i>>3), 0) {
			passed++
		}
	}
	if n := w.r.flows.Len(); n > w.r.flows.quota+1 || passed < n-1 {
		t.Errorf("%d flows, %d packets passed, the share is %d", n, passed, w.r.flows.quota)
	}
	w.want(true, "up", oIP, bIP, tcp, 443, 5, tcpACK)
	ok := 0
	for i := range 100 {
		if w.try("b", bIP, oIP, tcp, uint16(1000+i), 443, tcpSYN) {
			ok++
		}
	}
	if ok != 100 {
		t.Errorf("only %d of another guest's 100 new connections passed", ok)
	}
	w.now += (timeoutNew + 1) * 1e9
	for range 10 * 8192 / sweepBuckets {
		w.now += sweepEvery
		w.r.Tick(w.now)
	}
	if n := w.r.flows.Len(); n > 1 {
		t.Errorf("%d flows are left after all but one expired", n)
	}
}

// TestPickUp: connections that began before there was a table go on, for a while after it was made.
func TestPickUp(t *testing.T) {
	w := guarded(t)
	w.want(true, "b", bIP, oIP, tcp, 5, 443, tcpACK)
	w.want(true, "up", oIP, bIP, tcp, 443, 5, tcpACK)
	w.now += (pickUp + 1) * 1e9
	w.want(true, "up", oIP, bIP, tcp, 443, 5, tcpACK)
	w.want(false, "b", bIP, oIP, tcp, 6, 443, tcpACK)
	w.want(true, "b", bIP, oIP, tcp, 6, 443, tcpSYN)
}

// TestFlowsSurvive: the table is found again in the same memory, whole.
func TestFlowsSurvive(t *testing.T) {
	mem := flowMem(64 + 128*flowWays*64)
	f, err := NewFlows(mem, 1)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	var ts []tuple
	for i := range 200 {
		tp := tuple{proto: tcp, sport: uint16(rng.Uint32()), dport: 80}
		map4(&tp.src, []byte{10, 0, 0, byte(i)})
		map4(&tp.dst, []byte{10, 0, 1, byte(i)})
		if f.add(&tp, uint32(i%3), 10, 0) != nil {
			ts = append(ts, tp)
		}
	}
	// A writer that died in the middle leaves an entry without a state, or with garbage.
	f.buckets[3][0].key = flowKey{proto: 9}
	f.buckets[3][1].state.Store(77)
	g, err := NewFlows(mem, 12)
	if err != nil {
		t.Fatal(err)
	}
	if g.Len() > f.Len() || g.Len() < f.Len()-2 || len(g.count) != 3 {
		t.Errorf("%d flows of %d", g.Len(), f.Len())
	}
	found := 0
	for i := range ts {
		back := ts[i]
		back.src, back.dst, back.sport, back.dport = back.dst, back.src, back.dport, back.sport
		if e, reply := g.find(&back, 12); e != nil && reply {
			found++
		}
	}
	if found < len(ts)-2 {
		t.Errorf("%d of %d found", found, len(ts))
	}
	if h, _ := NewFlows(mem, 10+timeoutNew+5); h.Len() != 0 {
		t.Errorf("%d expired flows are taken over", h.Len())
	}
	mem[0]++
	if h, _ := NewFlows(mem, 12); h.Len() != 0 {
		t.Error("foreign memory is taken for a table")
	}
}

func TestLayout(t *testing.T) {
	if n := unsafe.Sizeof(flowEntry{}); n != 64 {
		t.Errorf("an entry has %d bytes", n)
	}
	if n := unsafe.Sizeof(flowHeader{}); n != 64 {
		t.Errorf("the header has %d bytes", n)
	}
}

// FuzzFlows compares the table with a map.
func FuzzFlows(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Fuzz(func(t *testing.T, ops []byte) {
		fl := newFlows(t, 2)
		now := uint32(100)
		for len(ops) >= 3 {
			tp := tuple{proto: 17, sport: uint16(ops[1] & 7), dport: uint16(ops[2] & 3)}
			tp.src[15], tp.dst[15] = ops[1]>>6, ops[2]>>6
			switch ops[0] & 3 {
			case 0:
				if e, _ := fl.find(&tp, now); e == nil {
					fl.add(&tp, uint32(ops[1]&1), now, 0)
				}
			case 1:
				if e, _ := fl.find(&tp, now); e != nil {
					e.state.Store(flowReplied)
				}
			case 2:
				now += uint32(ops[1])
				fl.sweep(now)
			}
			ops = ops[3:]
			n, sum := 0, 0
			for i := range fl.buckets {
				for k := range fl.buckets[i] {
					if fl.buckets[i][k].state.Load() != flowFree {
						n++
					}
				}
			}
			for _, c := range fl.count {
				sum += c
			}
			if n != fl.total || sum != n {
				t.Fatalf("%d entries, total %d, by owner %d", n, fl.total, sum)
			}
		}
	})
}

func BenchmarkGuarded(b *testing.B) {
	w := guarded(b, Rule{Inbound: true, Proto: udpP, From: 2000})
	frame := v4{src: "10.0.0.2", dst: "10.0.0.3", payload: udp(1000, 2000, 18)}.frame()
	nic := w.r.NIC("a")
	w.r.SetPort("b", nullPort{})
	w.r.now = 5e9
	var pkts [Burst]Packet
	b.ReportAllocs()
	for i := 0; i < b.N; i += Burst {
		for k := range pkts {
			frame[22] = 64
			wire.PutBe16(frame[24:], 0)
			wire.PutBe16(frame[24:], wire.Checksum(frame[14:34]))
			pkts[k].Set(frame)
			w.r.fromNIC(nic, &pkts[k])
		}
		w.r.flush()
	}
	if s, _ := w.r.Status("b"); s.RxDropped > 0 {
		b.Error(s)
	}
}

// TestFlowMemo: what a sender's last packet belonged to is not believed once anything has changed.
func TestFlowMemo(t *testing.T) {
	f := newFlows(t, 64)
	var m flowMemo
	a := &tuple{src: wire.IP6{15: 1}, dst: wire.IP6{15: 2}, sport: 1, dport: 2, proto: wire.ProtoUDP}
	if e, _ := f.recall(&m, a, 1); e != nil {
		t.Fatal("a flow in an empty table")
	}
	want := f.add(a, 1, 1, 0)
	for range 2 {
		if e, reply := f.recall(&m, a, 1); e != want || reply {
			t.Error(e, reply)
		}
	}
	back := &tuple{src: a.dst, dst: a.src, sport: 2, dport: 1, proto: a.proto}
	if e, reply := f.recall(&m, back, 1); e != want || !reply {
		t.Error(e, reply)
	}
	if e, _ := f.recall(&m, back, 1+timeoutNew+1); e != nil {
		t.Error("an expired flow")
	}
	f.add(a, 1, 100, 0)
	f.recall(&m, a, 100)
	f.drop(m.e)
	if e, _ := f.recall(&m, a, 100); e != nil {
		t.Error("a dropped flow")
	}
	f.add(a, 1, 100, 0)
	f.recall(&m, a, 100)
	if e, _ := newFlows(t, 64).recall(&m, a, 100); e != nil {
		t.Error("a flow of another table")
	}
}
