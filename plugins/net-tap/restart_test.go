package main

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

// gapAim is what the death of a worker may cost, in milliseconds; it is held to only where nothing else runs
// (MVIRT_NET_QUIET), because two guests without KVM share the processors with the new worker.
const gapAim = 200

var watched = regexp.MustCompile(`datagrams (\d+) of (\d+) gap (\d+) ms; connection: (\d+) lines, gap (\d+) ms, alive (\w+)`)

// TestRestarts kills the control plane and the worker while two real guests, one on vhost-user and one on a
// TAP, hold a connection that a security group guards.
func TestRestarts(t *testing.T) {
	needRoot(t)
	if testing.Short() {
		t.Skip("short: booting guests without KVM takes long")
	}
	files := guestFiles(t)
	root := t.TempDir()
	probe(t, root)
	files = overlay(t, files, root)
	dir, err := os.MkdirTemp("/run", "restarts")
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir)
	defer func() { p.Kill() }()
	ctx := t.Context()
	if _, err := p.Net.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.0.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Net.CreateSecurityGroup(ctx, net.CreateSecurityGroupRequest{ID: ident.New(), Name: "echo",
		Rules: []net.Rule{{Direction: net.Inbound, Protocol: "tcp", PortFrom: 7}, {Direction: net.Inbound, Protocol: "udp", PortFrom: 7}}}); err != nil {
		t.Fatal(err)
	}
	var vms []*vm
	for i, mode := range []net.AttachMode{net.AttachVhostUser, net.AttachTAPFD} {
		nic, err := p.Net.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: "lan", SecurityGroups: []string{"echo"}})
		if err != nil {
			t.Fatal(err)
		}
		vms = append(vms, boot(t, p, files, []string{"vhost-user", "TAP"}[i], nic, mode))
	}
	for _, v := range vms {
		v.login()
		v.run(true, "(/probe echo >/tmp/echo 2>&1 &); for i in $(seq 60); do grep echoes /tmp/echo && break; sleep 1; done; grep echoes /tmp/echo")
	}
	worker := func() uint32 {
		n, err := p.Net.GetNetwork(ctx, net.Ref{Ref: "lan"})
		if err != nil {
			t.Fatal(err)
		}
		return n.WorkerPID
	}
	killPlane := func() {
		pid := worker()
		p.Kill()
		<-p.Exited()
		p = launch(t, dir)
		now := worker()
		for end := time.Now().Add(30 * time.Second); now == 0 && time.Now().Before(end); now = worker() {
			time.Sleep(5 * time.Millisecond) // it answers before it has adopted its workers
		}
		if now != pid {
			t.Errorf("worker %d, then %d", pid, now)
		}
	}
	killWorker := func() {
		pid := worker()
		sh(t, "kill -9 %d", pid)
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			if now := worker(); now != 0 && now != pid {
				return
			}
			if time.Now().After(end) {
				t.Fatal("there is no new worker")
			}
		}
	}
	for i, a := range vms {
		b := vms[1-i]
		for _, x := range []struct {
			name string
			kill func()
		}{{"nothing", func() {}}, {"control plane", killPlane}, {"worker", killWorker}} {
			t.Run(a.name+" "+x.name, func(t *testing.T) {
				a.t, b.t = t, t
				a.run(true, "rm -f /tmp/stop; (/probe watch "+b.nic.IPv4.String()+" /tmp/stop >/tmp/watch 2>&1 &); for i in $(seq 60); do grep watches /tmp/watch && break; sleep 1; done; sleep 2; grep watches /tmp/watch")
				x.kill()
				a.run(true, "sleep 2; touch /tmp/stop; for i in $(seq 60); do grep datagrams /tmp/watch && break; sleep 1; done; grep datagrams /tmp/watch")
				m := watched.FindStringSubmatch(a.output("cat /tmp/watch"))
				if m == nil {
					t.Fatalf("the guest says %q", a.output("cat /tmp/watch"))
				}
				if m[6] != "true" {
					t.Errorf("the connection died: %s", m[0])
				}
				gap, _ := strconv.Atoi(m[3])
				got, _ := strconv.Atoi(m[1])
				sent, _ := strconv.Atoi(m[2])
				fmt.Printf("note %s, %s killed: %s\n", a.name, x.name, m[0])
				if x.name != "worker" && sent-got > 1 {
					t.Errorf("%d of %d datagrams lost", sent-got, sent) // the last may still have been on its way
				}
				if os.Getenv("MVIRT_NET_QUIET") != "" && gap >= gapAim {
					t.Errorf("a gap of %d ms, aim below %d", gap, gapAim)
				}
			})
		}
	}
}
