package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/google/nftables"
)

// nftPaths are where nft(8) is looked for: a plugin's environment has no PATH.
var nftPaths = []string{"/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft", "/usr/local/sbin/nft"}

// ErrNoNFT says that nft(8) is not installed.
var ErrNoNFT = errors.New("nft is not installed")

// NFT finds the nft program.
func NFT() (string, error) {
	for _, p := range nftPaths {
		if st, err := os.Stat(p); err == nil && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", ErrNoNFT
}

// NamespaceRules is the ruleset of a nat network's namespace.
func NamespaceRules(hostAccess bool) string {
	access := ""
	if hostAccess {
		// What comes in at host0 as new is the host's own: its forward chain lets nothing else through.
		access = "\n\t\tiifname \"" + UplinkVeth + "\" oifname \"" + UplinkTUN + "\" accept"
	}
	return `table inet mvirt
delete table inet mvirt
table arp mvirt
delete table arp mvirt
table inet mvirt {
	chain raw {
		type filter hook prerouting priority raw; policy drop;
		iifname { "lo", "up0", "host0" } accept
	}
	chain input {
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		ct state established,related accept
		iifname "host0" ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		ct state invalid drop
		iifname "up0" oifname "host0" accept` + access + `
	}
	chain post {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "host0" masquerade
	}
}
table arp mvirt {
	chain input {
		type filter hook input priority filter; policy drop;
		iifname "host0" accept
	}
}
`
}

// PrivateRules is the ruleset of a private network's namespace: the kernel there hears nothing.
func PrivateRules() string {
	return `table inet mvirt
delete table inet mvirt
table arp mvirt
delete table arp mvirt
table inet mvirt {
	chain raw {
		type filter hook prerouting priority raw; policy drop;
	}
}
table arp mvirt {
	chain input {
		type filter hook input priority filter; policy drop;
	}
}
`
}

// HostRules is the host's ruleset: what protects the host and the networks from each other. links are the
// host's ends of the veth pairs, pool the prefix of their addresses, guards where forwarding is on only
// because of us.
func HostRules(i Instance, links []string, pool netip.Prefix, guards Guards) string {
	t := "inet mvirt_net_" + string(i)
	names := quoted(links)
	if names == "" {
		return "table " + t + "\ndelete table " + t + "\n"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "table %s\ndelete table %s\ntable %s {\n", t, t, t)
	fmt.Fprintf(&b, "\tset links {\n\t\ttype ifname\n\t\telements = { %s }\n\t}\n", names)
	b.WriteString(`	chain input {
		type filter hook input priority filter - 10; policy accept;
		iifname @links ct state established,related accept
		iifname @links ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
		iifname @links drop
	}
	chain forward {
		type filter hook forward priority filter - 10; policy accept;
		iifname @links oifname @links drop
		oifname @links ct state established,related accept
		oifname @links drop
		iifname @links accept
`)
	if g := quoted(guards.IPv4); g != "" {
		fmt.Fprintf(&b, "\t\tmeta nfproto ipv4 iifname { %s } oifname != \"mvh*\" drop\n", g)
	}
	if guards.All6 {
		b.WriteString("\t\tmeta nfproto ipv6 iifname != \"mvh*\" oifname != \"mvh*\" drop\n")
	} else if g := quoted(guards.IPv6); g != "" {
		fmt.Fprintf(&b, "\t\tmeta nfproto ipv6 iifname { %s } oifname != \"mvh*\" drop\n", g)
	}
	fmt.Fprintf(&b, `	}
	chain post {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr %s oifname != @links masquerade
		ip6 saddr %s oifname != @links masquerade
	}
}
`, pool, Link6)
	return b.String()
}

// quoted makes interface names safe to stand in a ruleset; names that nft could read otherwise are left out.
func quoted(names []string) string {
	s := slices.Sorted(slices.Values(names))
	out := make([]string, 0, len(s))
	for _, n := range s {
		if n != "" && len(n) < 16 && !strings.ContainsAny(n, "\"\\\n{}* \t") {
			out = append(out, `"`+n+`"`)
		}
	}
	return strings.Join(out, ", ")
}

// ApplyNFT loads a ruleset in the namespace, all or nothing.
func (n *NS) ApplyNFT(rules string) error {
	return inNS(n.fd, func() error { return ApplyNFT(rules) })
}

// ApplyNFT loads a ruleset in the host's namespace, all or nothing.
func ApplyNFT(rules string) error {
	nft, err := NFT()
	if err != nil {
		return err
	}
	// The child is made on this thread, and so in its namespace.
	cmd := exec.Cmd{Path: nft, Args: []string{"nft", "-f", "-"}, Env: []string{}, Stdin: strings.NewReader(rules)}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, firstLine(out.String()))
	}
	return nil
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	return s
}

// HasHostRules says whether the host's ruleset is loaded: others flush rulesets.
func HasHostRules(i Instance) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, err
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	for _, t := range tables {
		if t.Name == "mvirt_net_"+string(i) {
			return true, nil
		}
	}
	return false, err
}
