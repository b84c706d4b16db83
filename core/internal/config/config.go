// Package config turns mvirt.toml into a checked configuration with defaults.
//
// The file is the only thing that decides which programs run and as whom, so nothing in it is guessed: an
// unknown key, a value of the wrong type and a value out of range are errors, each with file, line and
// column, the key, and what to write instead. All errors are reported at once, not one per attempt.
//
// Durations are strings as Go writes them ("250ms", "2m"); sizes are strings with K, M, G or T (powers of
// 1024) or plain numbers of bytes; modes are octal strings.
package config

import (
	_ "embed"
	"io/fs"
	"time"

	"github.com/mvirt/mvirt/core/internal/authz"
	"github.com/mvirt/mvirt/sdk/service"
)

// DefaultPath is where mvirtd looks when no --config is given.
const DefaultPath = "/etc/mvirt/mvirt.toml"

// MaxFile is the largest configuration file that is read, in bytes: far above any real one, and small
// enough that a mistaken path (a disk image) fails at once.
const MaxFile = 1 << 20

// Config is a whole, checked configuration.
type Config struct {
	Path    string // the file it came from
	Core    Core
	Jail    Jail
	TLS     TLS
	Access  []authz.Grant            // who may do what; none: whoever can open the socket may do everything
	Plugins map[service.Kind]*Plugin // only kinds that the file has a table for
}

// Core is the table [core].
type Core struct {
	Socket      string      // API socket, absolute
	SocketGroup string      // name or number; who may connect besides the owner. "" : the core's own group
	SocketMode  fs.FileMode // of the API socket
	StateDir    string      // the core's journal and audit spool; made 0700 for User
	RunDir      string      // sockets and launch directories; made by the root half
	User        string      // name or number of the user that the core runs as, when started as root
	Group       string      // "" : User's primary group
	LogLevel    string      // debug, info, warn or error: what the core writes to its stderr
	CallWait    time.Duration
	CallTimeout time.Duration
	StopTimeout time.Duration
	// RestartDelayMax is the longest delay before the core is started again after it ended by itself.
	RestartDelayMax time.Duration
	SpoolLimit      uint64 // bytes of audit and log entries kept on disk while the log plugin is away
	Cgroup          string // "auto", "none", or the absolute path of a cgroup v2 directory
}

// Plugin is a table [plugin.<kind>].
type Plugin struct {
	Kind         service.Kind
	Command      string // absolute path of the binary; "" with Attach
	Args         []string
	User         string   // name or number; needed when mvirtd runs as root
	Group        string   // "" : User's primary group
	Groups       []string // supplementary groups, exactly these
	Capabilities []string // CAP_…; kept in the bounding set, and held by the process
	DataDir      string   // made 0700 for User, or ""
	WorkerUser   string   // handed to the plugin as --worker-user; must exist. "" : not handed over
	SHA256       string   // lower-case hex of the binary, or ""
	Env          map[string]string
	NoFile       uint64 // RLIMIT_NOFILE
	Attach       string // "unix:///path": serve by itself, started by somebody else

	HealthInterval time.Duration
	HealthDeadline time.Duration
	HealthMisses   int
	StartTimeout   time.Duration
	StopTimeout    time.Duration

	RestartDelayMax  time.Duration // longest delay before the next attempt after a death
	QuarantineDeaths int           // within two minutes; 0: never
}

// Defaults of [core]. Durations and counts of plugins follow the supervision rules in docs/operating.md.
func defaultCore() Core {
	return Core{
		Socket:          "/run/mvirt/mvirt.sock",
		SocketMode:      0o660,
		StateDir:        "/var/lib/mvirt/core",
		RunDir:          "/run/mvirt",
		User:            "mvirt",
		LogLevel:        "info",
		CallWait:        3 * time.Second,
		CallTimeout:     2 * time.Minute,
		StopTimeout:     30 * time.Second,
		RestartDelayMax: 30 * time.Second,
		SpoolLimit:      256 << 20,
		Cgroup:          "auto",
	}
}

func defaultPlugin(k service.Kind) Plugin {
	return Plugin{
		Kind:             k,
		NoFile:           65536,
		HealthInterval:   5 * time.Second,
		HealthDeadline:   2 * time.Second,
		HealthMisses:     3,
		StartTimeout:     10 * time.Second,
		StopTimeout:      10 * time.Second,
		RestartDelayMax:  30 * time.Second,
		QuarantineDeaths: 5,
	}
}

// Arguments are what the plugin's process gets, without argv[0].
func (p *Plugin) Arguments() []string {
	args := append([]string(nil), p.Args...)
	if p.WorkerUser != "" {
		args = append(args, "--worker-user="+p.WorkerUser)
	}
	return args
}

// Kinds lists the configured kinds in the order in which they are started.
func (c *Config) Kinds() []service.Kind {
	var out []service.Kind
	for _, k := range service.Kinds() {
		if c.Plugins[k] != nil {
			out = append(out, k)
		}
	}
	return out
}

//go:embed example.toml
var example string

// Example is a commented configuration with all keys, installed as /etc/mvirt/mvirt.toml.
func Example() string { return example }
