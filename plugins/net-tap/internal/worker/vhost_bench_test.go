package worker

import (
	"testing"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhosttest"
)

// BenchmarkVhost is one packet from ring to ring, the driver's two sides included, all on one core.
func BenchmarkVhost(b *testing.B) {
	for _, bm := range []struct {
		name  string
		size  int
		group bool
	}{{"64", 64, false}, {"64 guarded", 64, true}, {"1500", 1500, true}} {
		b.Run(bm.name, func(b *testing.B) {
			w := newBench(b, 1)
			opt := vhosttest.Options{Features: vhosttest.Usual &^ vhosttest.EventIdx, Size: 1024, Poll: true}
			da, db := w.dial("a", opt), w.dial("b", opt)
			frames := make([][]byte, engine.Burst)
			for i := range frames {
				frames[i] = frame("a", "b", pattern(bm.size-42))
			}
			got := 0
			w.l.do(func() { // in the loop's own goroutine: nothing else runs
				if bm.group {
					f, err := engine.NewFlows(make([]byte, engine.DefaultFlowBytes), 1)
					if err != nil {
						b.Error(err)
					}
					w.l.router.SetFlows(f)
					w.l.router.SetGroup(engine.Group{ID: "g", Rules: []engine.Rule{{Inbound: true, Proto: 17, From: 2000}}})
					w.l.router.SetNIC(engine.NICConfig{ID: "b", MAC: macs["b"], IPv4: ips["b"].Addr(), Groups: []string{"g"}})
				}
				nic := w.l.router.NIC("a")
				now := w.l.now()
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; i < b.N; i += engine.Burst {
					da.SendBatch(0, [12]byte{}, frames...)
					w.l.router.PollNIC(nic, now)
					got += db.Receive(0, engine.Burst, nil)
				}
				b.StopTimer()
			})
			if got < b.N*9/10 {
				b.Errorf("%d of %d packets arrived", got, b.N)
			}
		})
	}
}
