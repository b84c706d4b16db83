package main

import (
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
)

// What the process outside of the tests' namespaces, where packages can be had, tells the one inside.
const (
	withClients = "MVIRT_NET_CLIENTS" // set: test with them

	clientsDir = "MVIRT_NET_TEST_CLIENTS"
	clientsWhy = "MVIRT_NET_TEST_NO_CLIENTS"
)

// fetchClients has Debian's DHCP clients and all that they need unpacked in a cache, and tells where.
func fetchClients() {
	if os.Getenv(withClients) == "" || os.Geteuid() != 0 || os.Getenv(clientsDir)+os.Getenv(clientsWhy) != "" {
		return
	}
	dir, err := unpackClients()
	if err != nil {
		os.Setenv(clientsWhy, err.Error())
		return
	}
	os.Setenv(clientsDir, dir)
}

func unpackClients() (string, error) {
	empty, err := os.MkdirTemp("", "clients")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(empty)
	status := filepath.Join(empty, "status")
	if err := os.WriteFile(status, nil, 0o600); err != nil {
		return "", err
	}
	// With nothing installed, what apt would install is all that is needed.
	args := []string{"-qq", "--no-install-recommends", "-o", "Dir::State::status=" + status, "-o", "APT::Sandbox::User=root"}
	pkgs := []string{"install", "isc-dhcp-client", "dhcpcd-base", "systemd", "bash", "iproute2"}
	uris, err := exec.Command("apt-get", append(append(args, "--print-uris"), pkgs...)...).Output()
	if err != nil || len(uris) == 0 {
		return "", fmt.Errorf("apt-get does not know isc-dhcp-client, dhcpcd-base and systemd (is this Debian 12? apt-get update?): %v", err)
	}
	cache := "/var/cache/mvirt"
	if d := os.Getenv("XDG_CACHE_HOME"); d != "" {
		cache = filepath.Join(d, "mvirt")
	}
	dir := filepath.Join(cache, "clients", fmt.Sprintf("%x", sha256.Sum256(uris))[:16])
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	archives := filepath.Join(tmp, "archives")
	if err := os.MkdirAll(filepath.Join(archives, "partial"), 0o755); err != nil {
		return "", err
	}
	get := append(append(args, "-y", "--download-only", "-o", "Dir::Cache::archives="+archives), pkgs...)
	if out, err := exec.Command("apt-get", get...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("the DHCP clients cannot be downloaded: %v: %s", err, out)
	}
	debs, _ := filepath.Glob(filepath.Join(archives, "*.deb"))
	root := filepath.Join(tmp, "root")
	for _, d := range debs {
		if out, err := exec.Command("dpkg-deb", "-x", d, root).CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %v: %s", d, err, out)
		}
	}
	if err := os.Rename(root, dir); err != nil && !os.IsExist(err) {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// picker copies programs and the libraries that they need from one root to another.
type picker struct {
	t        *testing.T
	from, to string
	done     map[string]bool
}

var libDirs = []string{"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/systemd", "lib/systemd", "usr/lib/systemd"}

func (p *picker) put(data []byte, to string) {
	p.t.Helper()
	for _, d := range []string{"sbin/", "usr/bin/", "usr/sbin/"} { // in the guest they are links to bin
		if rest, ok := strings.CutPrefix(to, d); ok {
			to = "bin/" + rest
		}
	}
	to = filepath.Join(p.to, to)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o755); err != nil {
		p.t.Fatal(err)
	}
}

// pick copies a file to the same place.
func (p *picker) pick(path string) {
	p.t.Helper()
	data, err := os.ReadFile(filepath.Join(p.from, path))
	if err != nil {
		p.t.Fatal(err)
	}
	p.put(data, path)
	p.libs(filepath.Join(p.from, path))
}

func (p *picker) libs(file string) {
	p.t.Helper()
	f, err := elf.Open(file)
	if err != nil {
		return // a script
	}
	defer f.Close()
	need, err := f.ImportedLibraries()
	if err != nil {
		p.t.Fatal(err)
	}
	for _, l := range need {
		if p.done[l] {
			continue
		}
		p.done[l] = true
		found := ""
		for _, d := range libDirs {
			if _, err := os.Stat(filepath.Join(p.from, d, l)); err == nil {
				found = filepath.Join(p.from, d, l)
				break
			}
		}
		if found == "" {
			p.t.Fatalf("%s needs %s, which no package has", file, l)
		}
		data, err := os.ReadFile(found)
		if err != nil {
			p.t.Fatal(err)
		}
		p.put(data, "lib/x86_64-linux-gnu/"+l)
		p.libs(found)
	}
}

// glob picks all files that match.
func (p *picker) glob(pattern string) {
	p.t.Helper()
	all, _ := filepath.Glob(filepath.Join(p.from, pattern))
	for _, f := range all {
		if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() {
			rel, _ := filepath.Rel(p.from, f)
			p.pick(rel)
		}
	}
}

// clientRoot makes what the guest needs to run the three clients.
func clientRoot(t *testing.T) string {
	t.Helper()
	from := os.Getenv(clientsDir)
	if from == "" {
		t.Skipf("no DHCP clients: %s", os.Getenv(clientsWhy))
	}
	p := &picker{t: t, from: from, to: t.TempDir(), done: map[string]bool{}}
	for _, f := range []string{"sbin/dhclient", "sbin/dhclient-script", "etc/dhcp/dhclient.conf", "usr/sbin/dhcpcd", "etc/dhcpcd.conf",
		"usr/lib/dhcpcd/dhcpcd-run-hooks", "lib/systemd/systemd-networkd", "bin/bash", "bin/ip", "usr/bin/run-parts"} {
		if _, err := os.Stat(filepath.Join(from, f)); err != nil {
			if alt := strings.TrimPrefix(f, "usr/"); alt != f {
				f = alt
			}
		}
		p.pick(f)
	}
	// Busybox's sh prefers its own applets, which lack options that the script uses.
	script, err := os.ReadFile(filepath.Join(from, "sbin/dhclient-script"))
	if err != nil {
		t.Fatal(err)
	}
	p.put([]byte(strings.Replace(string(script), "#!/bin/sh", "#!/bin/bash", 1)), "sbin/dhclient-script")
	p.glob("etc/dhcp/dhclient-*-hooks.d/*")
	p.glob("usr/lib/dhcpcd/dhcpcd-hooks/*")
	loader, err := os.ReadFile(filepath.Join(from, "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"))
	if err != nil {
		t.Fatal(err)
	}
	p.put(loader, "lib64/ld-linux-x86-64.so.2")
	p.put([]byte("[Match]\nName=eth0\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n[DHCPv4]\nUseMTU=yes\n"), "etc/systemd/network/10-eth0.network")
	p.put([]byte("0123456789abcdef0123456789abcdef\n"), "etc/machine-id")
	p.put([]byte(clientSetup), "setup")
	return p.to
}

// clientSetup makes users and directories as the packages' scripts do, and begin makes the interface what it
// is before any client has run.
const clientSetup = `#!/bin/sh
case $1 in
once)
	for u in systemd-network:998 dhcpcd:997 _dhcpcd:997; do
		echo "${u%%:*}:x:${u##*:}:${u##*:}::/var/lib/dhcpcd:/bin/false" >>/etc/passwd
		echo "${u%%:*}:x:${u##*:}:" >>/etc/group
	done
	mkdir -p /var/lib/dhcp /var/lib/dhcpcd /run /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp
	chown -R 998:998 /run/systemd/netif
	;;
begin)
	killall udhcpc 2>/dev/null
	: >/etc/resolv.conf
	ip addr flush dev eth0
	ip link set eth0 down
	ip link set eth0 mtu 1500
	echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6
	ip link set eth0 up
	;;
esac
`

// TestDHCPClients lets the clients that distributions use configure a real guest: addresses, routes, DNS, MTU.
func TestDHCPClients(t *testing.T) {
	needRoot(t)
	if testing.Short() {
		t.Skip("short: booting guests without KVM takes long")
	}
	if os.Getenv(withClients) == "" {
		t.Skip("runs with " + withClients + "=1 only: it downloads 70 packages, and it has not been seen to pass yet")
	}
	files := overlay(t, guestFiles(t), clientRoot(t))
	dir, err := os.MkdirTemp("/run", "dhcp")
	if err != nil {
		t.Fatal(err)
	}
	p := launch(t, dir)
	defer p.Kill()
	ctx := t.Context()
	if _, err := p.Net.CreateNetwork(ctx, net.CreateNetworkRequest{ID: ident.New(), Name: "lan", Mode: net.ModePrivate, MTU: 1400, Domain: "lan.example",
		Subnet4: netip.MustParsePrefix("10.0.0.0/24"), Subnet6: netip.MustParsePrefix("fd00:1::/64"),
		DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8::53")}}); err != nil {
		t.Fatal(err)
	}
	nic, err := p.Net.CreateNIC(ctx, net.CreateNICRequest{ID: ident.New(), NetworkID: "lan", HostName: "web"})
	if err != nil {
		t.Fatal(err)
	}
	v := boot(t, p, files, "guest", nic, net.AttachVhostUser)
	nicC, c := softGuest(t, p, "lan")
	if err := c.Up6(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	v.login()
	v.run(true, "sh /setup once")
	for _, client := range []struct{ name, start, stop, dns string }{
		{"dhclient", "dhclient -v -4 -1 -pf /run/d4.pid -lf /var/lib/dhcp/d4 eth0 && sleep 3 && dhclient -v -6 -1 -pf /run/d6.pid -lf /var/lib/dhcp/d6 eth0",
			"killall dhclient; true", "cat /etc/resolv.conf"},
		{"dhcpcd", "dhcpcd -t 60 -w eth0", "dhcpcd -x eth0; killall dhcpcd; true", "cat /etc/resolv.conf"},
		{"systemd-networkd", "mount -o remount,ro /sys; (/lib/systemd/systemd-networkd >/tmp/networkd 2>&1 &)", "killall systemd-networkd; mount -o remount,rw /sys; true",
			"cat /run/systemd/netif/leases/* /run/systemd/netif/links/*"},
	} {
		t.Run(client.name, func(t *testing.T) {
			v.t = t
			v.run(true, "sh /setup begin")
			v.run(true, client.start)
			for _, want := range []struct{ what, command, text string }{
				{"IPv4 address", "ip -4 addr show dev eth0", "inet " + nic.IPv4.String() + "/32"},
				{"IPv4 default route", "ip -4 route", "default via 169.254.0.1 dev eth0"},
				{"IPv6 address", "ip -6 addr show dev eth0", "inet6 " + nic.IPv6.String() + "/128"},
				{"IPv6 default route", "ip -6 route", "default via fe80::1 dev eth0"},
				{"MTU", "ip link show dev eth0", "mtu 1400"},
				{"DNS", client.dns, "192.0.2.53"},
				{"domain", client.dns, "lan.example"},
			} {
				if !v.until(want.command, want.text, 60*time.Second) {
					t.Errorf("no %s: %s", want.what, v.output(want.command+"; cat /tmp/networkd; true"))
				}
			}
			v.run(true, "ping -c2 -W5 "+nicC.IPv4.String())
			v.run(true, "for i in $(seq 20); do ping -6 -c1 -W5 "+nicC.IPv6.String()+" && break; sleep 1; done; ping -6 -c1 -W5 "+nicC.IPv6.String())
			v.run(true, client.stop)
		})
	}
	v.t = t
}

// until asks until a command prints a text.
func (v *vm) until(command, text string, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		if strings.Contains(v.output(command), text) {
			return true
		}
	}
	return false
}
