package worker

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhosttest"
)

// TestVhostBacklogWakes: a guest that gives its buffers back a few at a time, while packets wait for them, gets
// them all, whenever it does so: no kick is lost. What is sent is followed by silence, so that nothing but the
// guest's buffers can move the rest.
func TestVhostBacklogWakes(t *testing.T) {
	for _, opt := range []vhosttest.Options{{Size: 4, BufLen: 512}, {Size: 4, BufLen: 512, Features: vhosttest.Usual &^ vhosttest.EventIdx}, {Size: 64}} {
		b := newBench(t, 1)
		da, db := b.dial("a", vhosttest.Options{}), b.dial("b", opt)
		for round := range 300 {
			const n = 9 // of 1400 bytes: three buffers each in the small rings
			for i := range n {
				p := pattern(1200)
				binary.LittleEndian.PutUint32(p, uint32(round*n+i))
				for da.SendBatch(0, [12]byte{}, frame("a", "b", p)) == 0 {
					time.Sleep(10 * time.Microsecond)
				}
			}
			for i := range n {
				var f []byte
				for end := time.Now().Add(30 * time.Second); f == nil; {
					db.Receive(0, 1, func(_, x []byte) { f = append([]byte{}, x...) })
					if time.Now().After(end) {
						t.Fatalf("%d bytes, round %d: packet %d does not come", opt.BufLen, round, i)
					}
				}
				if got := binary.LittleEndian.Uint32(f[42:]); got != uint32(round*n+i) {
					t.Fatalf("packet %d came, not %d", got, round*n+i)
				}
			}
		}
	}
}
