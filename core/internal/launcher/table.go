package launcher

import (
	"errors"
	"os"
	"sort"
	"strings"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/service"
)

// spec is all that is needed to start one plugin; it comes from the configuration alone.
type spec struct {
	kind    service.Kind
	command string
	args    []string
	env     []string
	sha256  string
	dataDir string
	id      identity
	caps    uint64
	nofile  uint64
	worker  *identity // who its workers run as, if it has workers that are started for it
}

// table is what may be started, and for whom.
type table struct {
	specs map[service.Kind]*spec
	core  identity
	root  bool // identities are switched to; otherwise everything runs as the current user
	trust trust
}

// newTable resolves the names in the configuration. All problems are reported at once.
func newTable(cfg *config.Config, root bool, acc accounts) (*table, error) {
	t := &table{specs: map[service.Kind]*spec{}, root: root, trust: ownTrust()}
	self := identity{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	var problems []error
	t.core = self
	if root {
		id, err := acc.identity("core", cfg.Core.User, cfg.Core.Group, nil)
		if g := cfg.Core.SocketGroup; g != "" {
			// In this group, the core may hand its socket to it.
			gid, gerr := acc.group(g)
			id.Groups = []uint32{gid}
			if gerr != nil && (err == nil || g != cfg.Core.User) { // the user's own group comes with the user
				problems = append(problems, errs.Wrap(errs.Precondition, gerr, "core.socket_group"))
			}
		}
		if err == nil && id.UID == 0 {
			err = errs.New(errs.Precondition, "core.user: the core must not run as root").Because("CORE_IS_ROOT").
				Do(`set user = "mvirt" in [core]; useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin mvirt`)
		}
		problems = append(problems, err)
		t.core = id
	}
	bounding, err := ownBounding()
	problems = append(problems, err)
	for _, k := range cfg.Kinds() {
		p := cfg.Plugins[k]
		if p.Attach != "" {
			continue
		}
		key := "plugin." + string(k)
		s := &spec{kind: k, command: p.Command, args: p.Arguments(), sha256: p.SHA256, dataDir: p.DataDir, id: self, nofile: p.NoFile}
		s.env = environment(p)
		caps, err := capabilitySet(p.Capabilities)
		if err != nil {
			problems = append(problems, errs.Wrap(errs.Precondition, err, "%s.capabilities", key))
		}
		if root {
			if s.id, err = acc.identity(key, p.User, p.Group, p.Groups); err != nil {
				problems = append(problems, err)
			}
			s.caps = caps
			if lacking := caps &^ bounding; lacking != 0 && os.Geteuid() == 0 { // the core, which only asks, has an empty one
				problems = append(problems, errs.New(errs.Precondition, "%s.capabilities: mvirtd itself may not hold %s here (it is not in its bounding set)",
					key, strings.Join(CapabilityNames(lacking), ", ")).Because("CAPABILITY_MISSING").
					Do("start mvirtd outside the container, or allow it the capability"))
			}
			if p.WorkerUser != "" {
				id, err := acc.identity(key, p.WorkerUser, "", nil)
				if err == nil && id.UID == 0 {
					err = errs.New(errs.Precondition, "%s.worker_user: workers must not run as root", key).Do("name another user")
				}
				if err != nil {
					problems = append(problems, errs.Wrap(errs.Precondition, err, "%s.worker_user", key))
				} else {
					s.worker = &id
				}
			}
		}
		t.specs[k] = s
	}
	return t, errors.Join(problems...)
}

// environment is a plugin's environment without what the handshake adds.
func environment(p *config.Plugin) []string {
	home := p.DataDir
	if home == "" {
		home = "/"
	}
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=" + home}
	names := make([]string, 0, len(p.Env))
	for k := range p.Env {
		names = append(names, k)
	}
	sort.Strings(names)
	for _, k := range names {
		env = append(env, k+"="+p.Env[k])
	}
	return env
}

// Grant is what a plugin is given, for showing.
type Grant struct {
	UID, GID     uint32
	Groups       []uint32
	Capabilities []string // permitted, effective and the whole bounding set
	NoNewPrivs   bool
	Enforced     bool // false: not root, so nothing was set but no_new_privs
}

// Wanted is what every process of a system must be, for comparing it with what is.
type Wanted struct {
	Launcher uint64 // capabilities that it holds at most
	Core     Grant
	Plugins  map[service.Kind]Grant
	Worker   map[service.Kind]uint32 // uid of a plugin's workers
	Groups   []uint32                // supplementary groups of hypervisors in jails
}

// WantedOf tells what a configuration wants when mvirtd runs as root, by what is in /etc/passwd now.
func WantedOf(cfg *config.Config) (Wanted, error) {
	t, err := newTable(cfg, true, systemAccounts())
	if err != nil {
		return Wanted{}, err
	}
	w := Wanted{Launcher: t.ownCaps(), Core: Grant{UID: t.core.UID, GID: t.core.GID, Groups: t.core.Groups, NoNewPrivs: true, Enforced: true},
		Worker: map[service.Kind]uint32{}}
	if w.Plugins, err = Grants(cfg, true); err != nil {
		return w, err
	}
	for k, p := range cfg.Plugins {
		if p.WorkerUser == "" {
			continue
		}
		if w.Worker[k], _, err = lookupUser(p.WorkerUser); err != nil {
			return w, err
		}
	}
	if s := t.specs[service.KindVMM]; s != nil {
		w.Groups = s.id.Groups
	}
	return w, nil
}

// CapabilitySet is the set that names make up; unknown ones count for nothing.
func CapabilitySet(names []string) uint64 {
	var set uint64
	for _, n := range names {
		one, _ := capabilitySet([]string{n})
		set |= one
	}
	return set
}

// ProcessesOf lists the processes that have a uid as one of their four.
func ProcessesOf(uid uint32) []int { return processesOf(uid) }

// StartTime is when a process started, in clock ticks since boot.
func StartTime(pid int) (uint64, error) { return startTime(pid) }

// JailedVMs reads which VM has which uid, without a launcher. Without jails there are none.
func JailedVMs(cfg *config.Config) ([]jail.VM, error) {
	d, err := os.Open(cfg.Jail.StateDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	u := &uids{dir: d, base: cfg.Jail.UIDBase, count: cfg.Jail.UIDCount, byVM: map[string]uint32{}, byUID: map[uint32]string{}}
	err = u.load(false)
	return u.list(), err
}

// Grants tells what each plugin is given under a configuration, by what is in /etc/passwd now.
func Grants(cfg *config.Config, root bool) (map[service.Kind]Grant, error) {
	t, err := newTable(cfg, root, systemAccounts())
	out := map[service.Kind]Grant{}
	for k, s := range t.specs {
		out[k] = Grant{UID: s.id.UID, GID: s.id.GID, Groups: s.id.Groups, Capabilities: CapabilityNames(s.caps), NoNewPrivs: true, Enforced: root}
	}
	return out, err
}
