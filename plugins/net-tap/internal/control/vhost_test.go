package control

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/testguest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhosttest"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// vhostConn is a guest's device on a vhost-user NIC. It connects again when its back-end has gone, as
// hypervisors do.
type vhostConn struct {
	mu   sync.Mutex
	d    *vhosttest.Driver
	path string
	stop chan struct{}
}

func (c *vhostConn) Read(frame []byte) (n int, err error) {
	for n == 0 {
		select {
		case <-c.stop:
			return 0, os.ErrClosed
		default:
		}
		c.mu.Lock()
		got := c.d.Receive(0, 1, func(_, f []byte) { n = copy(frame, f) })
		c.mu.Unlock()
		if got == 0 {
			time.Sleep(50 * time.Microsecond)
		}
	}
	return n, nil
}

func (c *vhostConn) Write(frame []byte) error {
	for {
		c.mu.Lock()
		n := c.d.SendBatch(0, [12]byte{}, frame)
		c.mu.Unlock()
		if n > 0 {
			return nil
		}
		time.Sleep(50 * time.Microsecond)
	}
}

// reconnect tries until it is connected again.
func (c *vhostConn) reconnect(limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(time.Millisecond) {
		c.mu.Lock()
		c.d.Disconnect()
		err := c.d.Connect(c.path)
		c.mu.Unlock()
		if err == nil {
			return true
		}
	}
	return false
}

func (c *vhostConn) Close() error { close(c.stop); return nil }

// vhostGuest attaches a NIC by vhost-user and starts a guest on it.
func (r *rig) vhostGuest(n net.NIC) (*testguest.Guest, *vhostConn) {
	r.t.Helper()
	att, err := r.Attach(ctx, net.AttachRequest{NICID: n.ID, Owner: service.Owner{VMID: "vm-" + n.ID, UID: 65534, GID: 65534},
		Modes: []net.AttachMode{net.AttachVhostUser, net.AttachTAPFD}})
	if err != nil || att.Mode != net.AttachVhostUser {
		r.t.Fatal(att, err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(att.SocketPath, &st); err != nil || st.Uid != 65534 && os.Geteuid() == 0 || st.Mode&0o777 != 0o600 {
		r.t.Errorf("socket of user %d with mode %o: %v", st.Uid, st.Mode, err)
	}
	if nic, _ := r.GetNIC(ctx, net.Ref{Ref: n.ID}); nic.State != net.StateCreated || nic.VMID == "" {
		r.t.Errorf("before the driver connects: %+v", nic)
	}
	d, err := vhosttest.Dial(att.SocketPath, vhosttest.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	c := &vhostConn{d: d, path: att.SocketPath, stop: make(chan struct{})}
	m, _ := wire.ParseMAC(att.MAC)
	g := testguest.New(c, m)
	r.t.Cleanup(func() { g.Close(); d.Close() })
	if err := g.Up(5 * time.Second); err != nil {
		r.t.Fatal(err)
	}
	return g, c
}

func TestVhostUser(t *testing.T) {
	r := newRig(t)
	outside(t)
	lan := r.network(nat("lan"))
	nicA := r.nic("lan")
	a, ca := r.vhostGuest(nicA)
	b := r.up(r.nic("lan")) // a TAP on the same network
	c, _ := r.vhostGuest(r.nic("lan"))
	see := func() {
		t.Helper()
		ping(t, a, "169.254.0.1")
		ping(t, a, b.IP.Addr().String())
		ping(t, a, c.IP.Addr().String())
		ping(t, b, a.IP.Addr().String())
		ping(t, a, "203.0.113.1")
		mustSh(t, "ping -c1 -W2 %s", a.IP.Addr())
		if n, _ := r.GetNIC(ctx, net.Ref{Ref: nicA.ID}); n.State != net.StateConnected || n.AttachMode != net.AttachVhostUser {
			t.Errorf("%+v", n)
		}
	}
	see()
	_, sent, lost := stream(t, a, c, func() {
		for range 3 {
			r.reopen()
			_, _ = r.ListNICs(ctx, net.ListNICsRequest{})
		}
	})
	if lost != 0 {
		t.Errorf("the control plane's restart lost %d of %d packets", lost, sent)
	}
	see()
	// A worker that dies: the next one goes on with the sessions, and the front-ends notice nothing.
	before := ca.d.Conn
	gap, sent, lost := stream(t, a, c, func() {
		time.Sleep(50 * time.Millisecond)
		pid := r.signalWorker(syscall.SIGKILL)
		eventually(t, "another worker runs", func() bool {
			now, _ := r.GetNetwork(ctx, net.Ref{Ref: "lan"})
			return now.WorkerPID != 0 && now.WorkerPID != pid
		})
		r.settle(lan.ID)
		time.Sleep(100 * time.Millisecond)
	})
	t.Logf("worst gap %v, %d of %d lost", gap, lost, sent)
	if lost == sent {
		t.Errorf("packets did not flow for %v, %d of %d lost", gap, lost, sent)
	}
	see()
	if ca.d.Conn != before {
		t.Error("the front-end had to connect again")
	}
	// Both die: front-ends come back to the same socket.
	pid := r.signalWorker(0)
	if err := r.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	_ = syscall.Kill(int(pid), syscall.SIGKILL)
	r.open()
	began := time.Now()
	if !ca.reconnect(5 * time.Second) {
		t.Fatal("no way back")
	}
	eventually(t, "packets flow", func() bool {
		_, err := a.Ping(b.IP, 100*time.Millisecond)
		return err == nil
	})
	t.Logf("back after %v", time.Since(began))
	// Detach removes the socket.
	if err := r.Detach(ctx, net.DetachRequest{NICID: nicA.ID, VMID: "vm-" + nicA.ID}); err != nil {
		t.Fatal(err)
	}
	if exists(ca.path) {
		t.Error("the socket is left")
	}
}

func TestVhostLeaks(t *testing.T) {
	r := newRig(t)
	n := r.network()
	rounds := leakRounds(t)
	round := func() {
		nic := r.nic("lan")
		att, err := r.Attach(ctx, net.AttachRequest{NICID: nic.ID, Owner: service.Owner{VMID: "v"}, Modes: []net.AttachMode{net.AttachVhostUser}})
		if err != nil {
			t.Fatal(err)
		}
		d, err := vhosttest.Dial(att.SocketPath, vhosttest.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Detach(ctx, net.DetachRequest{NICID: nic.ID, VMID: "v"}); err != nil {
			t.Fatal(err)
		}
		d.Close()
		if err := r.DeleteNIC(ctx, net.Ref{Ref: nic.ID}); err != nil {
			t.Fatal(err)
		}
	}
	look := func() string {
		fds := func(pid int) int { return strings.Count(mustSh(t, "ls /proc/%d/fd", pid), "\n") }
		return fmt.Sprintf("worker: %d descriptors, %d mappings\ncontrol: %d descriptors\nsockets: %s", fds(int(n.WorkerPID)),
			strings.Count(mustSh(t, "cat /proc/%d/maps", n.WorkerPID), "memfd"), fds(os.Getpid()), mustSh(t, "ls %s/sock | wc -l", r.dir))
	}
	for range 3 {
		round()
	}
	before := steady(look)
	for range rounds {
		round()
	}
	sameAsBefore(t, before, look)
}

// TestStaleSockets: sockets of NICs that are not attached are swept, other files are not.
func TestStaleSockets(t *testing.T) {
	r := newRig(t)
	mustSh(t, "cd %s/sock; touch 01a20e21-ba8e-792e-afcf-157010781a3d.sock other.sock 01a20e21-ba8e-792e-afcf-157010781a3d.sock.new", r.dir)
	r.reopen()
	eventually(t, "they are swept", func() bool { return mustSh(t, "ls %s/sock", r.dir) == "other.sock\nworkers\n" })
}
