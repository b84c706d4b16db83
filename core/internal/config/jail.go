package config

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Jail is the table [jail]: what keeps hypervisors apart when mvirtd runs as root.
type Jail struct {
	Enabled        bool     // each VM's hypervisor in a jail of its own
	UIDBase        uint32   // first of the uids, and gids of the same numbers, that VMs run as
	UIDCount       uint32   // how many
	StateDir       string   // which VM has which uid; root's, mode 0700
	Hypervisors    []string // the only programs that are started in jails; none: any that is root's alone to change
	MemoryOverhead uint64   // bytes that a control group may take on top of its VM's memory and a sixteenth of it
	PIDs           uint64   // processes and threads in a jail
}

type fileJail struct {
	Enabled        *bool    `toml:"enabled"`
	UIDBase        *int64   `toml:"uid_base"`
	UIDCount       *int64   `toml:"uid_count"`
	StateDir       *string  `toml:"state_dir"`
	Hypervisors    []string `toml:"hypervisors"`
	MemoryOverhead any      `toml:"memory_overhead"`
	PIDs           *int64   `toml:"pids"`
}

// Bounds of the uid range. Below 65536 are people and services; systemd's table of uids (UIDS-GIDS) leaves
// 1879048192 to 2147352575 to nobody.
const (
	leastUID       = 1 << 16
	mostUID        = 1<<31 - 1
	defaultUIDBase = 2_000_000_000
	defaultUIDs    = 1 << 16
)

func (c *checker) jail(o *Jail, f *fileJail, core *Core) {
	*o = Jail{Enabled: false, UIDBase: defaultUIDBase, UIDCount: defaultUIDs, MemoryOverhead: 512 << 20, PIDs: 1024,
		StateDir: filepath.Join(filepath.Dir(core.StateDir), "jail")}
	if f.Enabled != nil {
		o.Enabled = *f.Enabled
	}
	number := func(key string, v *int64, least, most int64, set func(int64)) {
		switch {
		case v == nil:
		case *v < least || *v > most:
			c.bad(key, fmt.Sprintf("use %d to %d", least, most), "%d is out of range", *v)
		default:
			set(*v)
		}
	}
	number("jail.uid_base", f.UIDBase, leastUID, mostUID, func(n int64) { o.UIDBase = uint32(n) })
	number("jail.uid_count", f.UIDCount, 1, 1<<24, func(n int64) { o.UIDCount = uint32(n) })
	if uint64(o.UIDBase)+uint64(o.UIDCount) > mostUID+1 {
		c.bad("jail.uid_count", "choose a lower uid_base or a smaller uid_count", "the range of uids ends behind %d", mostUID)
	}
	number("jail.pids", f.PIDs, 16, 1<<22, func(n int64) { o.PIDs = uint64(n) })
	c.path("jail.state_dir", f.StateDir, &o.StateDir)
	if o.StateDir == core.StateDir || inside(o.StateDir, core.StateDir) {
		c.bad("jail.state_dir", "put it beside core.state_dir: it is root's", "%s lies within core.state_dir", o.StateDir)
	}
	c.size("jail.memory_overhead", f.MemoryOverhead, 64<<20, 1<<40, &o.MemoryOverhead)
	for _, h := range f.Hypervisors {
		if !absClean(h) || strings.HasSuffix(h, "/") {
			c.bad("jail.hypervisors", "give absolute paths of programs", "%q is none", h)
		}
	}
	o.Hypervisors = f.Hypervisors
}
