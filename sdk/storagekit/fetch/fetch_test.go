package fetch

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
)

func TestPolicy(t *testing.T) {
	denied := []string{"127.0.0.1", "127.255.255.254", "::1", "::", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
		"169.254.169.254", "100.64.0.1", "198.18.0.1", "192.0.0.8", "224.0.0.1", "240.0.0.1", "255.255.255.255", "fd00:ec2::254", "fe80::1",
		"fe80::1%eth0", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::"}
	allowed := []string{"8.8.8.8", "172.32.0.1", "172.15.255.255", "192.167.255.255", "9.255.255.255", "2a00:1450:4001::1", "2620:fe::fe"}
	for _, a := range denied {
		if a == "::ffff:8.8.8.8" {
			continue // the mapped form of a public address is that address
		}
		if (Policy{}).check(netip.MustParseAddr(a)) == nil {
			t.Errorf("%s is let through", a)
		}
	}
	for _, a := range allowed {
		if err := (Policy{}).check(netip.MustParseAddr(a)); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	p := Policy{Allow: []netip.Prefix{netip.MustParsePrefix("192.168.7.0/24")}}
	for a, ok := range map[string]bool{"192.168.7.9": true, "::ffff:192.168.7.9": true, "192.168.8.1": false, "127.0.0.1": false} {
		if (p.check(netip.MustParseAddr(a)) == nil) != ok {
			t.Errorf("%s: let through is not %v", a, ok)
		}
	}
}

func TestURLs(t *testing.T) {
	for _, u := range []string{"http://example.org/a", "https://user:pw@example.org:8443/x?token=1", "HTTPS://EXAMPLE.org/"} {
		if _, err := ParseURL("url", u); err != nil {
			t.Errorf("%s: %v", u, err)
		}
	}
	for _, u := range []string{"", "example.org", "/etc/passwd", "file:///etc/passwd", "ftp://a/b", "http:", "http:///x", "http:opaque", "javascript:1",
		"http://a b/", "http://[::1", "https://x/" + strings.Repeat("y", 9000)} {
		if _, err := ParseURL("url", u); errs.KindOf(err) != errs.Invalid || errs.RemedyOf(err) == "" {
			t.Errorf("%q: %v", u, err)
		}
	}
	if got := Show("https://user:pw@example.org/img.qcow2?sig=secret#frag"); got != "https://example.org/img.qcow2?…" {
		t.Error(got)
	}
}

func TestContentRange(t *testing.T) {
	for s, want := range map[string][2]int64{"bytes 5-9/10": {5, 10}, "bytes 0-0/*": {0, -1}} {
		if from, total, ok := contentRange(s); !ok || from != want[0] || total != want[1] {
			t.Errorf("%q: %d %d %v", s, from, total, ok)
		}
	}
	for _, s := range []string{"", "bytes", "bytes 5", "bytes x-9/10", "bytes 5-9/x", "items 5-9/10", "bytes 5-9"} {
		if _, _, ok := contentRange(s); ok {
			t.Errorf("%q is accepted", s)
		}
	}
}

func FuzzShow(f *testing.F) {
	f.Add("https://user:hunter2@example.org/a?b=hunter2#hunter2")
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := ParseURL("url", s); err == nil && strings.Contains(Show(s), "@") && !strings.Contains(s[strings.Index(s, "//"):], "/@") {
			// An @ in what is shown must come from the path, never from user and password.
			if u := Show(s); strings.Contains(strings.SplitN(u, "/", 4)[2], "@") {
				t.Errorf("%q shows %q", s, u)
			}
		}
	})
}
