package control

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestBadNetworks(t *testing.T) {
	r := newRig(t)
	tests := []struct {
		name  string
		kind  errs.Kind
		field string
		mod   func(*net.CreateNetworkRequest)
	}{
		{"no id", errs.Invalid, "id", func(q *net.CreateNetworkRequest) { q.ID = "" }},
		{"path as name", errs.Invalid, "name", func(q *net.CreateNetworkRequest) { q.Name = "../x" }},
		{"no mode", errs.Invalid, "mode", func(q *net.CreateNetworkRequest) { q.Mode = 0 }},
		{"no subnet", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = netip.Prefix{} }},
		{"host bits", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("10.0.0.1/24") }},
		{"too small", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("10.0.0.0/31") }},
		{"too large", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("0.0.0.0/0") }},
		{"not IPv4", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("fd00::/64") }},
		{"loopback", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("127.0.0.0/24") }},
		{"link-local", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("169.254.0.0/24") }},
		{"multicast", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("224.0.0.0/24") }},
		{"MTU", errs.Invalid, "mtu", func(q *net.CreateNetworkRequest) { q.MTU = 100 }},
		{"large MTU", errs.Invalid, "mtu", func(q *net.CreateNetworkRequest) { q.MTU = 65535 }},
		{"DNS", errs.Invalid, "dns", func(q *net.CreateNetworkRequest) { q.DNS = []netip.Addr{netip.MustParseAddr("0.0.0.0")} }},
		{"many DNS", errs.Invalid, "dns", func(q *net.CreateNetworkRequest) {
			for i := range 9 {
				q.DNS = append(q.DNS, netip.AddrFrom4([4]byte{9, 9, 9, byte(i)}))
			}
		}},
		{"NTP", errs.Invalid, "ntp", func(q *net.CreateNetworkRequest) { q.NTP = []netip.Addr{{}} }},
		{"domain", errs.Invalid, "domain", func(q *net.CreateNetworkRequest) { q.Domain = "a b" }},
		{"long domain", errs.Invalid, "domain", func(q *net.CreateNetworkRequest) { q.Domain = strings.Repeat("a.", 200) + "a" }},
		{"no bridge", errs.Invalid, "bridge", func(q *net.CreateNetworkRequest) { q.Mode, q.Subnet4 = net.ModeBridge, netip.Prefix{} }},
		{"a bridge that is not there", errs.Invalid, "bridge", func(q *net.CreateNetworkRequest) {
			q.Mode, q.Subnet4, q.Bridge = net.ModeBridge, netip.Prefix{}, "br77"
		}},
		{"an interface that is no bridge", errs.Invalid, "bridge", func(q *net.CreateNetworkRequest) {
			q.Mode, q.Subnet4, q.Bridge = net.ModeBridge, netip.Prefix{}, "lo"
		}},
		{"subnet on a bridge", errs.Invalid, "subnet4", func(q *net.CreateNetworkRequest) { q.Mode, q.Bridge = net.ModeBridge, "lo" }},
		{"IPv6 host bits", errs.Invalid, "subnet6", func(q *net.CreateNetworkRequest) { q.Subnet6 = prefix("fd00::1/64") }},
		{"IPv6 too small", errs.Invalid, "subnet6", func(q *net.CreateNetworkRequest) { q.Subnet6 = prefix("fd00::/127") }},
		{"IPv6 link-local", errs.Invalid, "subnet6", func(q *net.CreateNetworkRequest) { q.Subnet6 = prefix("fe80::/64") }},
		{"IPv6 that is IPv4", errs.Invalid, "subnet6", func(q *net.CreateNetworkRequest) { q.Subnet6 = prefix("10.0.0.0/24") }},
		{"the links' own", errs.Invalid, "subnet6", func(q *net.CreateNetworkRequest) { q.Subnet6 = prefix("fd6d:7669:7274::/64") }},
		{"bridge name on a private network", errs.Invalid, "bridge", func(q *net.CreateNetworkRequest) { q.Bridge = "br0" }},
		{"host access on a private network", errs.Invalid, "host_access", func(q *net.CreateNetworkRequest) { q.HostAccess = true }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModePrivate, Subnet4: prefix("10.0.0.0/24")}
			tt.mod(&req)
			_, err := r.CreateNetwork(ctx, req)
			wantErr(t, err, tt.kind, tt.field, "")
		})
	}
	if l, _ := r.ListNetworks(ctx); len(l) != 0 {
		t.Errorf("left: %v", l)
	}
}

func wantErr(t *testing.T, err error, kind errs.Kind, field, reason string) {
	t.Helper()
	var e *errs.Error
	switch {
	case !errors.Is(err, kind):
		t.Errorf("%v, want kind %v", err, kind)
	case errs.RemedyOf(err) == "":
		t.Errorf("no remedy: %v", err)
	case field != "" && (!errors.As(err, &e) || e.Field != field):
		t.Errorf("%v is not about %s", err, field)
	case errs.ReasonOf(err) != reason:
		t.Errorf("reason %q, want %q: %v", errs.ReasonOf(err), reason, err)
	}
}

func TestBadNICs(t *testing.T) {
	r := newRig(t)
	r.network()
	first := r.nic("lan", func(q *net.CreateNICRequest) {
		q.Name, q.MAC, q.IPv4 = "first", "52:54:00:00:00:01", netip.MustParseAddr("10.0.0.9")
		q.RoutedPrefixes = []netip.Prefix{prefix("192.168.0.0/16")}
	})
	tests := []struct {
		name   string
		kind   errs.Kind
		field  string
		reason string
		mod    func(*net.CreateNICRequest)
	}{
		{"network", errs.NotFound, "", "", func(q *net.CreateNICRequest) { q.NetworkID = "none" }},
		{"name", errs.Invalid, "name", "", func(q *net.CreateNICRequest) { q.Name = "a/b" }},
		{"name taken", errs.Exists, "", "", func(q *net.CreateNICRequest) { q.Name = "first" }},
		{"MAC", errs.Invalid, "mac", "", func(q *net.CreateNICRequest) { q.MAC = "52:54" }},
		{"multicast MAC", errs.Invalid, "mac", "", func(q *net.CreateNICRequest) { q.MAC = "01:00:5e:00:00:01" }},
		{"gateway's MAC", errs.Invalid, "mac", "", func(q *net.CreateNICRequest) { q.MAC = "02:6d:76:00:00:01" }},
		{"MAC taken", errs.Exists, "", "MAC_IN_USE", func(q *net.CreateNICRequest) { q.MAC = first.MAC }},
		{"outside", errs.Invalid, "ipv4", "", func(q *net.CreateNICRequest) { q.IPv4 = netip.MustParseAddr("10.0.1.1") }},
		{"network address", errs.Invalid, "ipv4", "", func(q *net.CreateNICRequest) { q.IPv4 = netip.MustParseAddr("10.0.0.0") }},
		{"router", errs.Invalid, "ipv4", "", func(q *net.CreateNICRequest) { q.IPv4 = netip.MustParseAddr("10.0.0.1") }},
		{"broadcast", errs.Invalid, "ipv4", "", func(q *net.CreateNICRequest) { q.IPv4 = netip.MustParseAddr("10.0.0.255") }},
		{"address taken", errs.Exists, "", "ADDRESS_IN_USE", func(q *net.CreateNICRequest) { q.IPv4 = first.IPv4 }},
		{"routed prefix taken", errs.Exists, "", "ADDRESS_IN_USE", func(q *net.CreateNICRequest) { q.RoutedPrefixes = []netip.Prefix{prefix("192.168.3.0/24")} }},
		{"routed prefix in the subnet", errs.Invalid, "routed_prefixes", "", func(q *net.CreateNICRequest) { q.RoutedPrefixes = []netip.Prefix{prefix("10.0.0.128/25")} }},
		{"routed host bits", errs.Invalid, "routed_prefixes", "", func(q *net.CreateNICRequest) { q.RoutedPrefixes = []netip.Prefix{prefix("172.16.0.1/24")} }},
		{"routed default", errs.Invalid, "routed_prefixes", "", func(q *net.CreateNICRequest) { q.RoutedPrefixes = []netip.Prefix{prefix("0.0.0.0/0")} }},
		{"host name", errs.Invalid, "host_name", "", func(q *net.CreateNICRequest) { q.HostName = "a\nb" }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req := net.CreateNICRequest{ID: ident.New(), NetworkID: "lan"}
			tt.mod(&req)
			_, err := r.CreateNIC(ctx, req)
			wantErr(t, err, tt.kind, tt.field, tt.reason)
		})
	}
	if l, _ := r.ListNICs(ctx, net.ListNICsRequest{}); len(l) != 1 {
		t.Errorf("left: %v", l)
	}
}

func TestIdempotent(t *testing.T) {
	r := newRig(t)
	req := net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModePrivate, Subnet4: prefix("10.0.0.0/24")}
	for range 2 {
		if _, err := r.CreateNetwork(ctx, req); err != nil {
			t.Fatal(err)
		}
	}
	other := req
	other.MTU = 9000
	_, err := r.CreateNetwork(ctx, other)
	if !errors.Is(err, errs.Exists) {
		t.Error(err)
	}
	nic := net.CreateNICRequest{ID: ident.New(), NetworkID: "lan"}
	a, err := r.CreateNIC(ctx, nic)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := r.CreateNIC(ctx, nic); err != nil || b.MAC != a.MAC || b.IPv4 != a.IPv4 {
		t.Error(b, err)
	}
	nic.Name = "x"
	if _, err := r.CreateNIC(ctx, nic); !errors.Is(err, errs.Exists) {
		t.Error(err)
	}
	err = r.DeleteNetwork(ctx, net.Ref{Ref: "lan"})
	wantErr(t, err, errs.Precondition, "", "NETWORK_IN_USE")
	if !strings.Contains(err.Error(), a.Name) {
		t.Errorf("%v does not name %s", err, a.Name)
	}
	owner := service.Owner{VMID: "v1"}
	modes := []net.AttachMode{net.AttachTAPFD}
	for range 2 { // again for the same VM, while the first handle is open
		att, err := r.Attach(ctx, net.AttachRequest{NICID: a.ID, Owner: owner, Modes: modes})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { att.TAP[0].Close() })
	}
	_, err = r.Attach(ctx, net.AttachRequest{NICID: a.ID, Owner: service.Owner{VMID: "v2"}, Modes: modes})
	wantErr(t, err, errs.Precondition, "", "NIC_IN_USE")
	wantErr(t, r.DeleteNIC(ctx, net.Ref{Ref: a.ID}), errs.Precondition, "", "NIC_IN_USE")
	if err := r.Detach(ctx, net.DetachRequest{NICID: a.ID, VMID: "v2"}); err != nil {
		t.Error(err)
	}
	if n, _ := r.GetNIC(ctx, net.Ref{Ref: a.ID}); n.VMID != "v1" {
		t.Error("another VM's detach detached")
	}
	for range 2 {
		if err := r.Detach(ctx, net.DetachRequest{NICID: a.ID, VMID: "v1"}); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		if err := errors.Join(r.DeleteNIC(ctx, net.Ref{Ref: a.ID})); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		if err := r.DeleteNetwork(ctx, net.Ref{Ref: "lan"}); err != nil {
			t.Error(err)
		}
	}
}

// TestFull fills a subnet from many sides at once.
func TestFull(t *testing.T) {
	r := newRig(t)
	r.network(func(q *net.CreateNetworkRequest) { q.Subnet4 = prefix("10.0.0.0/28") })
	const room = 16 - 3 // network, router, broadcast
	var mu sync.Mutex
	seen, full := map[string]bool{}, 0
	var wg sync.WaitGroup
	for range room + 5 {
		wg.Go(func() {
			n, err := r.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: "lan"})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil && !seen[n.IPv4.String()] && !seen[n.MAC]:
				seen[n.IPv4.String()], seen[n.MAC] = true, true
			case err == nil:
				t.Errorf("%v or %v given twice", n.IPv4, n.MAC)
			default:
				full++
				wantErr(t, err, errs.Exhausted, "", "SUBNET_FULL")
				if !strings.Contains(err.Error(), "10.0.0.0/28") || !strings.Contains(err.Error(), "lan") {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if full != 5 || len(seen) != 2*room {
		t.Errorf("%d refused, %d given", full, len(seen)/2)
	}
	l, _ := r.ListNICs(ctx, net.ListNICsRequest{})
	if err := r.DeleteNIC(ctx, net.Ref{Ref: l[3].ID}); err != nil {
		t.Fatal(err)
	}
	if n := r.nic("lan"); n.IPv4 != l[3].IPv4 {
		t.Errorf("the freed address is %v, given was %v", l[3].IPv4, n.IPv4)
	}
}

func TestNames(t *testing.T) {
	taken := map[string]bool{}
	id := ident.New()
	for range 100 { // even with the same id, which cannot be
		n := shortName(tapPrefix, id, 10, func(s string) bool { return taken[s] })
		if taken[n] || len(n) > 15 {
			t.Fatalf("%q", n)
		}
		taken[n] = true
	}
}

// TestUnprivileged runs the service as an ordinary user.
func TestUnprivileged(t *testing.T) {
	if os.Getenv(plain) == "" {
		if os.Geteuid() != 0 {
			t.Skip("as an ordinary user the test binary cannot become another one")
		}
		dir, err := os.MkdirTemp("/run", "plain")
		if err != nil {
			t.Fatal(err)
		}
		mustSh(t, "chown 65534 %s; chmod 755 /run", dir)
		cmd := exec.Command("/proc/self/exe", "-test.run=TestUnprivileged$", "-test.v")
		cmd.Env = append(os.Environ(), plain+"="+dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestUnprivileged") {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	r := &rig{t: t, dir: os.Getenv(plain)}
	r.open()
	defer func() { r.wipe(); _ = r.Shutdown(ctx) }()
	c := condition(t, r.Service, "NO_PRIVILEGES")
	if c == nil || c.Severity != service.SeverityCritical || !strings.Contains(c.Text, "CAP_NET_ADMIN") || c.Remedy != privRemedy {
		t.Fatalf("%+v", c)
	}
	_, err := r.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: "n", Mode: net.ModeNAT, Subnet4: prefix("10.0.0.0/24")})
	wantErr(t, err, errs.Denied, "", "")
	n := r.network()
	if n.WorkerPID == 0 {
		t.Error("a private network needs no privileges, and has no worker")
	}
	nic := r.nic("lan")
	_, err = r.Attach(ctx, net.AttachRequest{NICID: nic.ID, Owner: service.Owner{VMID: "v"}, Modes: []net.AttachMode{net.AttachTAPFD}})
	wantErr(t, err, errs.Denied, "", "")
}
