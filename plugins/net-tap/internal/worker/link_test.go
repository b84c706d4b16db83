package worker

import (
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhosttest"
)

// TestLinkStatus: a link that is taken down passes nothing, its guest is told, also by a worker that took the
// session over, and it comes up again.
func TestLinkStatus(t *testing.T) {
	w := newBench(t, 1)
	da, db := w.dial("a", vhosttest.Options{}), w.dial("b", vhosttest.Options{})
	// A channel for what the back-end says unasked: MQ, REPLY_ACK, BACKEND_REQ, CONFIG, STATUS.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	proto := binary.LittleEndian.AppendUint64(nil, 1<<0|1<<3|1<<5|1<<9|1<<16)
	if err := da.Tell(16, proto); err != nil {
		t.Fatal(err)
	}
	if err := da.Tell(21, nil, pair[1]); err != nil {
		t.Fatal(err)
	}
	unix.Close(pair[1])
	tv := unix.NsecToTimeval(int64(10 * time.Second))
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	link := func() bool {
		t.Helper()
		ask := make([]byte, 12+8)
		binary.LittleEndian.PutUint32(ask[4:], 8)
		b, _, err := da.Ask(24, ask)
		if err != nil || len(b) != 20 {
			t.Fatalf("%x %v", b, err)
		}
		return b[12+6]&1 == 1
	}
	told := func() {
		t.Helper()
		var b [64]byte
		n, err := unix.Read(pair[0], b[:])
		if err != nil || n != 12 || b[0] != 2 || b[4] != 1 {
			t.Fatalf("told %x: %v", b[:max(n, 0)], err)
		}
	}
	set := func(down bool) {
		w.l.do(func() { w.l.setNIC(engine.NICConfig{ID: "a", MAC: macs["a"], IPv4: ips["a"].Addr(), Down: down}) })
	}
	if !link() {
		t.Fatal("the link is down from the beginning")
	}
	set(true)
	told()
	if link() {
		t.Error("the link is up")
	}
	da.SendBatch(0, [12]byte{}, frame("a", "b", pattern(100)))
	db.SendBatch(0, [12]byte{}, frame("b", "a", pattern(100)))
	for end := time.Now().Add(10 * time.Second); w.status("a").TxDropped == 0 || w.status("a").RxDropped == 0; {
		if time.Now().After(end) {
			t.Fatalf("%+v", w.status("a"))
		}
	}
	if n := da.Receive(0, 9, nil) + db.Receive(0, 9, nil); n > 0 {
		t.Errorf("%d packets passed", n)
	}
	set(true) // nothing new: nothing is told
	set(false)
	told()
	if !link() {
		t.Error("the link is down")
	}
	da.SendBatch(0, [12]byte{}, frame("a", "b", pattern(101)))
	arrives(t, db, 0, pattern(101))
}
