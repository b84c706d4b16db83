package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

func TestExampleParses(t *testing.T) {
	cfg, err := Parse("example.toml", []byte(Example()))
	if err != nil {
		t.Fatal(err)
	}
	if got := cfg.Kinds(); len(got) != 4 {
		t.Fatalf("kinds: %v, want all four", got)
	}
	// What the example writes out is the default, so that comments cannot drift from the code.
	want := defaultCore()
	want.SocketGroup = "mvirt"
	if cfg.Core != want {
		t.Errorf("the example's core differs from the defaults:\n got %+v\nwant %+v", cfg.Core, want)
	}
	for k, p := range cfg.Plugins {
		d := defaultPlugin(k)
		if p.HealthInterval != d.HealthInterval || p.HealthMisses != d.HealthMisses || p.NoFile != d.NoFile {
			t.Errorf("%s: %+v", k, p)
		}
	}
	net := cfg.Plugins[service.KindNet]
	if args := strings.Join(net.Arguments(), " "); args != "--metadata-dir /var/lib/mvirt/net --socket-dir /run/mvirt/net --worker-user=mvirt-worker" {
		t.Errorf("arguments: %s", args)
	}
}

// Every key that the code knows is explained in the example.
func TestExampleNamesEveryKey(t *testing.T) {
	for _, k := range append(keysOf(fileCore{}), keysOf(filePlugin{})...) {
		if k == "group" || strings.Contains(Example(), "\n"+k+" = ") || strings.Contains(Example(), " "+k+" ") ||
			strings.Contains(Example(), "#   "+k) || strings.Contains(Example(), ", "+k+" = ") {
			continue
		}
		t.Errorf("the example does not mention %s", k)
	}
}

func TestValues(t *testing.T) {
	cfg, err := Parse("f", []byte(`
[core]
socket_mode = "0600"
spool_limit = "2G"
call_wait = "0s"
[plugin.vmm]
command = "/bin/x"
health_interval = "250ms"
health_misses = 7
sha256 = "`+strings.Repeat("AB", 32)+`"
[plugin.vmm.env]
FOO = "bar"
[plugin.log]
attach = "unix:///run/log.sock"
`))
	if err != nil {
		t.Fatal(err)
	}
	p := cfg.Plugins[service.KindVMM]
	if cfg.Core.SocketMode != 0o600 || cfg.Core.SpoolLimit != 2<<30 || cfg.Core.CallWait != 0 ||
		p.HealthInterval != 250*time.Millisecond || p.HealthMisses != 7 || p.Env["FOO"] != "bar" || p.SHA256 != strings.Repeat("ab", 32) ||
		cfg.Plugins[service.KindLog].Attach != "unix:///run/log.sock" {
		t.Errorf("%+v %+v", cfg.Core, p)
	}
}

func TestBad(t *testing.T) {
	const ok = "[plugin.vmm]\ncommand = \"/bin/x\"\n"
	long := "/" + strings.Repeat("a", 120)
	for _, c := range []struct{ name, text, want, remedy string }{
		{"unknown core key", "[core]\n  sokket = \"/x\"\n" + ok, "f:2:3: core.sokket: unknown key", "keys of core: socket, "},
		{"unknown plugin key", ok + "user = \"a\"\nkommand = \"\"\n", "f:4:1: plugin.vmm.kommand: unknown key", "keys of a plugin: command"},
		{"unknown kind", "[plugin.gpu]\ncommand = \"/bin/x\"\n", "f:1:", "plugin.storage, plugin.net"},
		{"unknown table", "[extra]\na = 1\n" + ok, "f:1:2: extra", "tables are core, jail, tls, access and plugin.<kind>"},
		{"syntax", "[core\n", "f:1:", "example"},
		{"type", "[core]\nsocket = 5\n" + ok, "f:2:", "example"},
		{"twice", "[core]\nuser = \"a\"\nuser = \"b\"\n" + ok, "f:3:1", ""},
		{"no plugin", "[core]\n", "f: plugin: no plugin is configured", "[plugin.storage]"},
		{"empty", "", "no plugin is configured", ""},
		{"no command", "[plugin.vmm]\nuser = \"a\"\n", "f:1:2: plugin.vmm.command: missing", "add command"},
		{"relative command", "[plugin.vmm]\ncommand = \"bin/x\"\n", "f:2:1: plugin.vmm.command: \"bin/x\"", "absolute"},
		{"dotdot", "[plugin.vmm]\ncommand = \"/bin/../x\"\n", "plugin.vmm.command", "absolute"},
		{"root as a dir", "[core]\nstate_dir = \"/\"\n" + ok, "f:2:1: core.state_dir", ""},
		{"mode", "[core]\nsocket_mode = \"rw\"\n" + ok, "core.socket_mode: \"rw\" is no file mode", "0660"},
		{"mode sticky", "[core]\nsocket_mode = \"1777\"\n" + ok, "core.socket_mode", "0660"},
		{"mode owner", "[core]\nsocket_mode = \"0060\"\n" + ok, "shuts the owner out", "0660"},
		{"duration", "[core]\ncall_wait = \"3\"\n" + ok, "core.call_wait: \"3\" is no duration", "5s"},
		{"duration as number", "[core]\ncall_wait = 3\n" + ok, "f:2:", ""},
		{"duration range", "[core]\ncall_wait = \"2h\"\n" + ok, "out of range", "use 0s to 1m0s"},
		{"negative duration", "[core]\ncall_wait = \"-1s\"\n" + ok, "out of range", ""},
		{"level", "[core]\nlog_level = \"loud\"\n" + ok, "core.log_level", "debug, info"},
		{"size", "[core]\nspool_limit = \"lots\"\n" + ok, "core.spool_limit", "256M"},
		{"size overflow", "[core]\nspool_limit = \"18446744073709551615T\"\n" + ok, "core.spool_limit", "256M"},
		{"size negative", "[core]\nspool_limit = -5\n" + ok, "negative", ""},
		{"size float", "[core]\nspool_limit = 1.5\n" + ok, "no size", ""},
		{"socket too long", "[core]\nsocket = \"" + long + "\"\n" + ok, "121 bytes long", "107"},
		{"run_dir too long", "[core]\nrun_dir = \"" + long + "\"\n" + ok, "core.run_dir", "short"},
		{"user", "[core]\nuser = \"a b\"\n" + ok, "core.user", "/etc/passwd"},
		{"user -1", "[core]\nuser = \"4294967295\"\n" + ok, "core.user", ""},
		{"user option", "[core]\nuser = \"-x\"\n" + ok, "core.user", ""},
		{"cgroup", "[core]\ncgroup = \"yes\"\n" + ok, "core.cgroup", "auto"},
		{"capability", ok + "capabilities = [\"NET_ADMIN\"]\n", "plugin.vmm.capabilities", "CAP_NET_ADMIN"},
		{"sha", ok + "sha256 = \"abc\"\n", "plugin.vmm.sha256", "64 hex digits"},
		{"env reserved", ok + "env = {LD_PRELOAD = \"/x\"}\n", "plugin.vmm.env.LD_PRELOAD", "launcher"},
		{"env name", ok + "env = {\"a=b\" = \"x\"}\n", "plugin.vmm.env.a=b", "plain name"},
		{"nofile", ok + "nofile = 3\n", "plugin.vmm.nofile", "64 to"},
		{"misses", ok + "health_misses = 0\n", "plugin.vmm.health_misses", "1 to 100"},
		{"attach and command", ok + "attach = \"unix:///x\"\n", "exclude each other", "or attach"},
		{"attach address", "[plugin.vmm]\nattach = \"tcp://1.2.3.4\"\n", "plugin.vmm.attach", "unix:///"},
		{"attach with sha", "[plugin.vmm]\nattach = \"unix:///x\"\nargs = []\n", "f:3:1: plugin.vmm.args", "remove"},
		{"nul in args", ok + "args = [\"a\\u0000b\"]\n", "NUL", ""},
		{"tls alone", ok + "[tls]\nlisten = \"127.0.0.1:7443\"\n", "tls.cert is missing", "cert"},
		{"tls without listen", ok + "[tls]\ncert = \"/c\"\n", "tls.listen: missing", "remove the table"},
		{"tls for nobody", ok + "[tls]\nlisten = \"127.0.0.1:7443\"\ncert = \"/c\"\nkey = \"/k\"\nclient_ca = \"/a\"\n", "nobody could use it", "[[access]]"},
		{"tls address", ok + "[tls]\nlisten = \"7443\"\n", "is no address with a port", "192.0.2.1"},
		{"access unknown", ok + "[[access]]\nroll = \"admin\"\n", "unknown key", "keys of access: name, role"},
		{"access role", ok + "[[access]]\nname = \"a\"\nusers = [\"x\"]\nrole = \"boss\"\n", "\"boss\" is no role", "viewer, operator or admin"},
		{"access nobody", ok + "[[access]]\nname = \"a\"\nrole = \"admin\"\n", "it is for nobody", "users"},
		{"access token", ok + "[[access]]\nname = \"a\"\nrole = \"admin\"\ntokens = [\"secret\"]\n", "must not stand here", "sha256sum"},
		{"access cert", ok + "[[access]]\nname = \"a\"\nrole = \"admin\"\ncerts = [\"ops\"]\n", "is no identity", "cn:NAME"},
		{"access kind", ok + "[[access]]\nname = \"a\"\nrole = \"admin\"\nusers = [\"x\"]\nkinds = [\"vms\"]\n", "\"vms\" is none", "vm, volume"},
		{"access object", ok + "[[access]]\nname = \"a\"\nrole = \"admin\"\nusers = [\"x\"]\nobjects = [\"web\"]\n", "is no object", "vm:NAME"},
		{"access verb", ok + "[[access]]\nname = \"a\"\nrole = \"admin\"\nusers = [\"x\"]\nverbs = [\"run\"]\n", "\"run\" is none", "start"},
		{"shared data dir", ok + "data_dir = \"/d\"\n[plugin.log]\ncommand = \"/x\"\ndata_dir = \"/d\"\n", "the same as", "its own"},
		{"nested data dir", ok + "data_dir = \"/d/vmm\"\n[plugin.log]\ncommand = \"/x\"\ndata_dir = \"/d\"\n", "within each other", "side by side"},
		{"data dir in state dir", ok + "data_dir = \"/var/lib/mvirt/core/x\"\n", "within each other", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("f", []byte(c.text))
			if err == nil {
				t.Fatal("accepted")
			}
			if !errors.Is(err, errs.Invalid) {
				t.Errorf("kind: %v", err)
			}
			if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.remedy) {
				t.Errorf("got  %s\nwant %s … (%s)", err, c.want, c.remedy)
			}
		})
	}
}

func TestAllProblemsAtOnceInFileOrder(t *testing.T) {
	_, err := Parse("f", []byte("[core]\nuser = \"a b\"\ncall_wait = \"x\"\n[plugin.vmm]\ncommand = \"y\"\n"))
	var ps Problems
	if !errors.As(err, &ps) || len(ps) != 3 || ps[0].Line != 2 || ps[1].Line != 3 || ps[2].Line != 5 {
		t.Fatalf("%v", err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none")); errs.KindOf(err) != errs.NotFound || errs.RemedyOf(err) == "" {
		t.Errorf("missing: %v", err)
	}
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, MaxFile+5), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(big); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("big: %v", err)
	}
}

// Whatever the bytes: no panic, and either a configuration or problems that name the file.
func FuzzParse(f *testing.F) {
	f.Add([]byte(Example()))
	f.Add([]byte("[core]\nuser = \"\"\n[[plugin]]\n"))
	f.Add([]byte("plugin.vmm = {command = \"/x\", env = {a = \"b\"}}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Parse("f", data)
		if (cfg == nil) == (err == nil) {
			t.Fatal("neither or both")
		}
		var ps Problems
		if err != nil && (!errors.As(err, &ps) || len(ps) == 0) {
			t.Fatalf("%T %v", err, err)
		}
	})
}
