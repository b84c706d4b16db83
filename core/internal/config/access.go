package config

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/core/internal/authz"
)

// TLS is the table [tls]: the API over TCP. Without it there is no such listener.
type TLS struct {
	Listen   string // "ADDRESS:PORT"; "": not over TCP
	Cert     string // PEM, the server's certificate and what leads to its authority
	Key      string // PEM, readable by the core's user
	ClientCA string // PEM, the authorities of clients' certificates
}

type fileTLS struct {
	Listen   *string `toml:"listen"`
	Cert     *string `toml:"cert"`
	Key      *string `toml:"key"`
	ClientCA *string `toml:"client_ca"`
}

// fileAccess is a table [[access]].
type fileAccess struct {
	Name    string   `toml:"name"`
	Role    string   `toml:"role"`
	Users   []string `toml:"users"`
	Groups  []string `toml:"groups"`
	Certs   []string `toml:"certs"`
	Tokens  []string `toml:"tokens"`
	Kinds   []string `toml:"kinds"`
	Objects []string `toml:"objects"`
	Verbs   []string `toml:"verbs"`
}

func (c *checker) tls(o *TLS, f *fileTLS, access []authz.Grant) {
	if f == nil {
		return
	}
	c.path("tls.cert", f.Cert, &o.Cert)
	c.path("tls.key", f.Key, &o.Key)
	c.path("tls.client_ca", f.ClientCA, &o.ClientCA)
	if f.Listen == nil {
		c.bad("tls.listen", `write listen = "ADDRESS:PORT", or remove the table`, "missing")
		return
	}
	o.Listen = *f.Listen
	if _, err := netip.ParseAddrPort(o.Listen); err != nil {
		c.bad("tls.listen", `write an address and a port, as "192.0.2.1:7443" or "[::]:7443"`, "%q is no address with a port", o.Listen)
	}
	for _, k := range []struct {
		key string
		set *string
	}{{"cert", f.Cert}, {"key", f.Key}, {"client_ca", f.ClientCA}} {
		if k.set == nil {
			c.bad("tls.listen", "add "+k.key+" = \"/path/of.pem\"", "there is no listener without TLS on both sides, and tls.%s is missing", k.key)
		}
	}
	if !slices.ContainsFunc(access, func(g authz.Grant) bool { return len(g.Certs) > 0 || len(g.Tokens) > 0 }) {
		c.bad("tls.listen", "add an [[access]] table with certs", "nobody could use it: no [[access]] names a certificate or a token")
	}
}

func (c *checker) access(list []fileAccess) []authz.Grant {
	var out []authz.Grant
	verbs := authz.Verbs()
	for i, f := range list {
		g := authz.Grant{Name: f.Name, Users: f.Users, Groups: f.Groups, Certs: f.Certs, Tokens: f.Tokens, Kinds: f.Kinds, Objects: f.Objects, Verbs: f.Verbs}
		bad := func(key, remedy, format string, args ...any) {
			c.bad("access."+key, remedy, "table %d (%s): %s", i+1, f.Name, fmt.Sprintf(format, args...))
		}
		if f.Name == "" {
			bad("name", "give each table a name; messages and the audit trail have it", "it has no name")
		}
		var ok bool
		if g.Role, ok = authz.ParseRole(f.Role); !ok {
			bad("role", "use viewer, operator or admin", "%q is no role", f.Role)
		}
		if len(f.Users)+len(f.Groups)+len(f.Certs)+len(f.Tokens) == 0 {
			bad("users", "name users, groups, certs or tokens", "it is for nobody")
		}
		for key, names := range map[string][]string{"users": f.Users, "groups": f.Groups} {
			for _, n := range names {
				var s string
				c.account("access."+key, &n, &s)
			}
		}
		for _, n := range f.Certs {
			kind, name, _ := strings.Cut(n, ":")
			if name == "" || !slices.Contains([]string{"cn", "dns", "email", "uri"}, kind) {
				bad("certs", `write "cn:NAME", "dns:NAME", "email:NAME" or "uri:URI", as the client's certificate has it`, "%q is no identity", n)
			}
		}
		for j, t := range f.Tokens {
			sum, found := strings.CutPrefix(t, "sha256:")
			if b, err := hex.DecodeString(sum); !found || err != nil || len(b) != 32 {
				bad("tokens", "write sha256: and what this prints: printf %s TOKEN | sha256sum", "token %d is no sha256 sum; the token itself must not stand here", j+1)
				continue
			}
			g.Tokens[j] = strings.ToLower(sum)
		}
		for _, k := range f.Kinds {
			if !slices.Contains(authz.Kinds(), k) {
				bad("kinds", "kinds are "+strings.Join(authz.Kinds(), ", "), "%q is none", k)
			}
		}
		for _, o := range f.Objects {
			kind, name, _ := strings.Cut(o, ":")
			if name == "" || !slices.Contains(authz.Kinds(), kind) {
				bad("objects", `write "vm:NAME" or "vm:ID"`, "%s is no object", strconv.Quote(o))
			}
		}
		for _, v := range f.Verbs {
			if !verbs[v] {
				var all []string
				for w := range verbs {
					all = append(all, w)
				}
				slices.Sort(all)
				bad("verbs", "verbs are "+strings.Join(all, ", "), "%q is none", v)
			}
		}
		out = append(out, g)
	}
	return out
}
