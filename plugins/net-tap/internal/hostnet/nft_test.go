package hostnet

import (
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// TestGolden holds the rulesets as an operator would read them.
func TestGolden(t *testing.T) {
	pool := netip.MustParsePrefix("169.254.64.0/18")
	for name, got := range map[string]string{
		"namespace":      NamespaceRules(false),
		"namespace-host": NamespaceRules(true),
		"private":        PrivateRules(),
		"host":           HostRules("0123abcd", []string{"mvhbbb", "mvhaaa"}, pool, Guards{}),
		"host-guarded":   HostRules("0123abcd", []string{"mvhaaa"}, pool, Guards{IPv4: []string{"eth0"}, IPv6: []string{"eth1"}}),
		"host-all6":      HostRules("0123abcd", []string{"mvhaaa"}, pool, Guards{All6: true}),
		"host-none":      HostRules("0123abcd", nil, pool, Guards{}),
		"host-hostile":   HostRules("0123abcd", []string{"mvhaaa", "a\" drop; x", "waytoolongforaname"}, pool, Guards{IPv4: []string{"eth0\n"}}),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join("testdata", name+".nft")
			if *rewrite {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil || string(want) != got {
				t.Errorf("%v: got\n%s", err, got)
			}
			nft, err := NFT()
			if err != nil {
				t.Skip("nft is not installed: the rules are not loaded")
			}
			if os.Geteuid() != 0 {
				t.Skip("not root: the rules are not loaded")
			}
			// Twice: the first load must not be in the way of the second.
			cmd := exec.Command("unshare", "-n", "sh", "-ec", nft+" -f "+path+"; "+nft+" -f "+path)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("nft: %v: %s", err, out)
			}
		})
	}
}

func TestAlias(t *testing.T) {
	if a := Instance("0123abcd").Alias("nic", "x"); !strings.HasPrefix(a, "mvirt:0123abcd:") {
		t.Error(a)
	}
}
