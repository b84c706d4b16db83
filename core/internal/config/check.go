package config

import (
	"encoding/hex"
	"fmt"
	"io/fs"
	"path/filepath"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
)

// maxSunPath is the room for a unix socket's path without the final NUL: unix(7), sun_path[108].
const maxSunPath = 107

// launchPath is the longest that the launcher puts below RunDir ("/p/storage-<10 digits>/") together with
// the longest socket name that go-plugin makes there ("plugin<10 digits>").
const launchPath = len("/p/storage-4294967295/plugin4294967295")

type checker struct {
	file     string
	at       map[string]position
	problems Problems
}

func (c *checker) bad(key, remedy, format string, args ...any) {
	p := Problem{File: c.file, Key: key, Text: fmt.Sprintf(format, args...), Remedy: remedy}
	for k := key; ; k = k[:strings.LastIndexByte(k, '.')] {
		if pos, ok := c.at[k]; ok {
			p.Line, p.Column = pos.line, pos.column
			break
		}
		if !strings.Contains(k, ".") {
			break
		}
	}
	c.problems = append(c.problems, p)
}

func (c *checker) sorted() Problems {
	sort.SliceStable(c.problems, func(i, j int) bool {
		a, b := c.problems[i], c.problems[j]
		if a.Line != b.Line {
			return a.Line < b.Line
		}
		return a.Column < b.Column
	})
	return c.problems
}

func (c *checker) build(f *fileConfig) *Config {
	cfg := &Config{Path: c.file, Core: defaultCore(), Plugins: map[service.Kind]*Plugin{}}
	c.core(&cfg.Core, &f.Core)
	c.jail(&cfg.Jail, &f.Jail, &cfg.Core)
	tables := f.tables()
	for _, k := range service.Kinds() {
		if fp := tables[k]; fp != nil {
			p := defaultPlugin(k)
			c.plugin(&p, fp)
			cfg.Plugins[k] = &p
		}
	}
	cfg.Access = c.access(f.Access)
	c.tls(&cfg.TLS, f.TLS, cfg.Access)
	if len(cfg.Plugins) == 0 {
		c.bad("plugin", "add a table such as [plugin.storage] with a command", "no plugin is configured")
	}
	c.dataDirs(cfg)
	return cfg
}

func (f *fileConfig) tables() map[service.Kind]*filePlugin {
	return map[service.Kind]*filePlugin{service.KindStorage: f.Plugin.Storage, service.KindNet: f.Plugin.Net,
		service.KindVMM: f.Plugin.VMM, service.KindLog: f.Plugin.Log}
}

func (c *checker) core(o *Core, f *fileCore) {
	c.path("core.socket", f.Socket, &o.Socket)
	c.account("core.socket_group", f.SocketGroup, &o.SocketGroup)
	if f.SocketMode != nil {
		m, err := strconv.ParseUint(*f.SocketMode, 8, 32)
		switch {
		case err != nil || m > 0o777:
			c.bad("core.socket_mode", `write octal digits in quotes, as "0660"`, "%q is no file mode", *f.SocketMode)
		case m&0o600 != 0o600:
			c.bad("core.socket_mode", `use "0600", "0660" or "0666"`, "%q shuts the owner out", *f.SocketMode)
		default:
			o.SocketMode = fs.FileMode(m)
		}
	}
	c.path("core.state_dir", f.StateDir, &o.StateDir)
	c.path("core.run_dir", f.RunDir, &o.RunDir)
	c.account("core.user", f.User, &o.User)
	c.account("core.group", f.Group, &o.Group)
	if f.LogLevel != nil {
		switch *f.LogLevel {
		case "debug", "info", "warn", "error":
			o.LogLevel = *f.LogLevel
		default:
			c.bad("core.log_level", "use debug, info, warn or error", "%q is no level", *f.LogLevel)
		}
	}
	c.duration("core.call_wait", f.CallWait, 0, time.Minute, &o.CallWait)
	c.duration("core.call_timeout", f.CallTimeout, time.Second, time.Hour, &o.CallTimeout)
	c.duration("core.stop_timeout", f.StopTimeout, time.Second, 10*time.Minute, &o.StopTimeout)
	c.duration("core.restart_delay_max", f.RestartDelayMax, 100*time.Millisecond, 10*time.Minute, &o.RestartDelayMax)
	c.size("core.spool_limit", f.SpoolLimit, 1<<20, 1<<40, &o.SpoolLimit)
	if f.Cgroup != nil {
		switch {
		case *f.Cgroup == "auto", *f.Cgroup == "none", absClean(*f.Cgroup):
			o.Cgroup = *f.Cgroup
		default:
			c.bad("core.cgroup", `use "auto", "none" or the absolute path of a cgroup v2 directory`, "%q is none of these", *f.Cgroup)
		}
	}
	if len(o.Socket) > maxSunPath {
		c.bad("core.socket", fmt.Sprintf("use a path of at most %d bytes", maxSunPath), "the path is %d bytes long", len(o.Socket))
	}
	if most := maxSunPath - launchPath; len(o.RunDir) > most {
		c.bad("core.run_dir", fmt.Sprintf("use a path of at most %d bytes: unix socket paths are short", most),
			"the path is %d bytes long", len(o.RunDir))
	}
}

func (c *checker) plugin(o *Plugin, f *filePlugin) {
	pre := "plugin." + string(o.Kind) + "."
	switch {
	case f.Attach != nil && f.Command != nil:
		c.bad(pre+"attach", "give command for a plugin that mvirt starts, or attach for one that runs by itself", "command and attach exclude each other")
	case f.Attach != nil:
		p, ok := strings.CutPrefix(*f.Attach, "unix://")
		if !ok || !absClean(p) || len(p) > maxSunPath {
			c.bad(pre+"attach", "write unix:///absolute/path.sock, as the plugin's --listen has it", "%q is no unix socket address", *f.Attach)
		}
		o.Attach = *f.Attach
		for _, k := range []struct {
			name string
			set  bool
		}{{"args", f.Args != nil}, {"capabilities", f.Capabilities != nil}, {"data_dir", f.DataDir != nil}, {"sha256", f.SHA256 != nil},
			{"env", f.Env != nil}, {"nofile", f.NoFile != nil}, {"group", f.Group != nil}, {"groups", f.Groups != nil}, {"worker_user", f.WorkerUser != nil}} {
			if k.set {
				c.bad(pre+k.name, "remove it; whoever starts the plugin decides that", "has no meaning with attach")
			}
		}
	case f.Command == nil:
		c.bad(pre+"command", `add command = "/usr/lib/mvirt/…", the plugin's binary`, "missing")
	default:
		c.path(pre+"command", f.Command, &o.Command)
	}
	for i, a := range f.Args {
		if strings.ContainsRune(a, 0) {
			c.bad(pre+"args", "remove the NUL byte", "argument %d holds a NUL byte", i+1)
		}
	}
	o.Args = f.Args
	c.account(pre+"user", f.User, &o.User)
	c.account(pre+"group", f.Group, &o.Group)
	c.account(pre+"worker_user", f.WorkerUser, &o.WorkerUser)
	for i, g := range f.Groups {
		c.account(pre+"groups", &f.Groups[i], &g)
	}
	o.Groups = f.Groups
	for _, name := range f.Capabilities {
		if !strings.HasPrefix(name, "CAP_") || strings.ToUpper(name) != name {
			c.bad(pre+"capabilities", `write names as capabilities(7) does: "CAP_NET_ADMIN"`, "%q is no capability", name)
		}
	}
	o.Capabilities = f.Capabilities
	c.path(pre+"data_dir", f.DataDir, &o.DataDir)
	if f.SHA256 != nil {
		if b, err := hex.DecodeString(*f.SHA256); err != nil || len(b) != 32 {
			c.bad(pre+"sha256", "give the 64 hex digits that sha256sum prints for the binary", "%q is no sha256 sum", *f.SHA256)
		}
		o.SHA256 = strings.ToLower(*f.SHA256)
	}
	for k, v := range f.Env {
		switch {
		case k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0):
			c.bad(pre+"env."+k, "use a plain name and a value without NUL", "not an environment entry")
		case strings.HasPrefix(k, "MVIRT_") || strings.HasPrefix(k, "PLUGIN_") || strings.HasPrefix(k, "LD_"):
			c.bad(pre+"env."+k, "MVIRT_, PLUGIN_ and LD_ names belong to the launcher; use another", "this name is reserved")
		}
	}
	o.Env = f.Env
	if f.NoFile != nil {
		if *f.NoFile < 64 || *f.NoFile > 1<<20 {
			c.bad(pre+"nofile", "use 64 to 1048576", "%d is out of range", *f.NoFile)
		}
		o.NoFile = uint64(*f.NoFile)
	}
	c.duration(pre+"health_interval", f.HealthInterval, 50*time.Millisecond, time.Hour, &o.HealthInterval)
	c.duration(pre+"health_deadline", f.HealthDeadline, 50*time.Millisecond, time.Hour, &o.HealthDeadline)
	c.duration(pre+"start_timeout", f.StartTimeout, 100*time.Millisecond, 10*time.Minute, &o.StartTimeout)
	c.duration(pre+"stop_timeout", f.StopTimeout, 100*time.Millisecond, 10*time.Minute, &o.StopTimeout)
	c.duration(pre+"restart_delay_max", f.RestartDelayMax, 100*time.Millisecond, 10*time.Minute, &o.RestartDelayMax)
	if f.QuarantineDeaths != nil {
		if *f.QuarantineDeaths != 0 && (*f.QuarantineDeaths < 2 || *f.QuarantineDeaths > 1000) {
			c.bad(pre+"quarantine_deaths", "use 2 to 1000, or 0 for never", "%d is out of range", *f.QuarantineDeaths)
		}
		o.QuarantineDeaths = int(*f.QuarantineDeaths)
	}
	if f.HealthMisses != nil {
		if *f.HealthMisses < 1 || *f.HealthMisses > 100 {
			c.bad(pre+"health_misses", "use 1 to 100", "%d is out of range", *f.HealthMisses)
		}
		o.HealthMisses = int(*f.HealthMisses)
	}
}

// dataDirs refuses directories that two owners would share.
func (c *checker) dataDirs(cfg *Config) {
	owner := map[string]string{cfg.Core.StateDir: "core.state_dir", cfg.Core.RunDir: "core.run_dir"}
	if cfg.Core.StateDir == cfg.Core.RunDir {
		c.bad("core.state_dir", "give each its own directory", "is the same as core.run_dir")
	}
	for _, k := range cfg.Kinds() {
		d := cfg.Plugins[k].DataDir
		if d == "" {
			continue
		}
		key := "plugin." + string(k) + ".data_dir"
		if o, taken := owner[d]; taken {
			c.bad(key, "give each its own directory", "is the same as %s", o)
		}
		owner[d] = key
		for other, name := range owner {
			if name != key && (inside(d, other) || (inside(other, d))) {
				c.bad(key, "put them side by side: each belongs to another user", "%s and %s lie within each other", d, name)
			}
		}
	}
}

func inside(p, dir string) bool { return strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/") }

func (c *checker) path(key string, v *string, out *string) {
	if v == nil {
		return
	}
	if !absClean(*v) || *v == "/" {
		c.bad(key, "give an absolute path without \"..\", \".\" or a slash at the end", "%q is not usable", *v)
		return
	}
	*out = *v
}

func absClean(p string) bool {
	return filepath.IsAbs(p) && filepath.Clean(p) == p && !strings.ContainsRune(p, 0)
}

// account accepts a name as useradd(8) does, or a number. Whether it exists is asked when it is used.
func (c *checker) account(key string, v *string, out *string) {
	if v == nil {
		return
	}
	s := *v
	ok := s != "" && len(s) <= 32
	for i := range len(s) {
		b := s[i]
		alpha := b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '_'
		if !alpha && (i == 0 || b != '-' && b != '.' && (b != '$' || i != len(s)-1)) {
			ok = false
		}
	}
	if n, err := strconv.ParseUint(s, 10, 64); err == nil && n > 1<<32-2 {
		ok = false // (uid_t)-1 means "leave as it is" to the kernel
	}
	if !ok {
		c.bad(key, "give a name from /etc/passwd or /etc/group, or a number", "%q is no account", s)
		return
	}
	*out = s
}

func (c *checker) duration(key string, v *string, least, most time.Duration, out *time.Duration) {
	if v == nil {
		return
	}
	d, err := time.ParseDuration(*v)
	switch {
	case err != nil:
		c.bad(key, `write a number with a unit in quotes, as "250ms", "5s" or "2m"`, "%q is no duration", *v)
	case d < least || d > most:
		c.bad(key, fmt.Sprintf("use %s to %s", least, most), "%s is out of range", *v)
	default:
		*out = d
	}
}

func (c *checker) size(key string, v any, least, most uint64, out *uint64) {
	const remedy = `write bytes as a number, or with K, M, G or T in quotes, as "256M"`
	var n uint64
	switch x := v.(type) {
	case nil:
		return
	case int64:
		if x < 0 {
			c.bad(key, remedy, "%d is negative", x)
			return
		}
		n = uint64(x)
	case string:
		var ok bool
		if n, ok = parseSize(x); !ok {
			c.bad(key, remedy, "%q is no size", x)
			return
		}
	default:
		c.bad(key, remedy, "%v is no size", v)
		return
	}
	if n < least || n > most {
		c.bad(key, fmt.Sprintf("use %d to %d bytes", least, most), "%v is out of range", v)
		return
	}
	*out = n
}

func parseSize(s string) (uint64, bool) {
	shift := 0
	if n := len(s); n > 0 {
		if i := strings.IndexByte("KMGT", s[n-1]); i >= 0 {
			shift, s = 10*(i+1), s[:n-1]
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > 1<<63>>shift {
		return 0, false
	}
	return n << shift, true
}

// keysOf lists the TOML keys of a table.
func keysOf(v any) []string {
	t := reflect.TypeOf(v)
	out := make([]string, t.NumField())
	for i := range out {
		out[i] = t.Field(i).Tag.Get("toml")
	}
	return out
}
