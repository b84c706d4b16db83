// Package control is the control plane of mvirt-net: it knows networks and NICs, makes what the kernel must
// hold for them, and keeps one packet worker a network running.
//
// What should be stands in metadata.db and is written first; then the kernel and the workers are made to
// fit. Every step can be repeated, so a start after a crash is the same work as a create: ensure, and sweep
// what is nobody's. Workers outlive the control plane; a new one finds them by their sockets.
//
// Locks: a runtime's mu (one network's kernel state and worker) is taken before the Service's mu (records).
// Records are replaced, never changed, so a pointer read under mu stays true to what was.
package control

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/store"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// Config is what the flags say.
type Config struct {
	MetadataDir string       // metadata.db, worker logs
	SocketDir   string       // control sockets of workers, vhost-user sockets
	WorkerUser  string       // who workers run as, if we are root
	LinkPrefix  netip.Prefix // where link addresses of nat networks come from
	Log         hclog.Logger
	Host        service.Host
	Starter     *jail.Client // starts and ends workers, which we as root then need no right for; nil: we do it
	// WorkerArgs starts a worker: arguments after the program's own name; nil: the plugin's.
	WorkerArgs []string
	// Tick is how often the kernel's state is looked over; 0: 10 s.
	Tick time.Duration
}

// DefaultLinkPrefix is link-local (RFC 3927), so that it is nobody's subnet, and apart from the addresses
// that clouds use (169.254.169.254) and from the gateway.
var DefaultLinkPrefix = netip.MustParsePrefix("169.254.64.0/18")

// Needs is what the plugin requires of the host. It works without any of it as far as it can, and says in
// its health what is missing.
func Needs() service.Needs {
	return service.Needs{
		Root:         true,
		Capabilities: []string{"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_CHOWN"},
		Devices:      []string{"/dev/net/tun"},
		Programs:     []string{"nft"},
	}
}

// Service implements net.Service.
type Service struct {
	cfg      Config
	log      hclog.Logger
	db       *store.Store
	instance hostnet.Instance
	priv     error // why the kernel cannot be changed, or nil
	cred     *workerCred
	stop     context.CancelFunc
	ctx      context.Context
	wg       sync.WaitGroup

	hostMu    sync.Mutex // the host's ruleset and forwarding
	hostRules string     // what was loaded last

	mu    sync.Mutex
	data  *store.Data
	nets  map[string]*runtime
	conds map[condKey]service.Condition
}

type condKey struct{ code, object string }

var (
	_ net.Service     = (*Service)(nil)
	_ net.IPv6er      = (*Service)(nil)
	_ net.VhostUserer = (*Service)(nil)
	_ net.Bridger     = (*Service)(nil)
)

// SupportsIPv6 implements net.IPv6er.
func (*Service) SupportsIPv6() {}

// SupportsBridge implements net.Bridger.
func (*Service) SupportsBridge() {}

// SupportsVhostUser implements net.VhostUserer.
func (*Service) SupportsVhostUser() {}

// Open reads the metadata and brings back all that it says. It fails only if the metadata cannot be used;
// trouble with the kernel or a network is a condition.
func Open(cfg Config) (*Service, error) {
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	if cfg.Tick == 0 {
		cfg.Tick = 10 * time.Second
	}
	if p := cfg.LinkPrefix; !p.IsValid() || !p.Addr().Is4() || p != p.Masked() || p.Bits() > 30 {
		return nil, errs.Field("link_prefix", "give an IPv4 prefix of at most /30 that nothing else uses, as "+DefaultLinkPrefix.String(),
			"--link-prefix %s is not usable", p)
	}
	dir, err := filepath.Abs(cfg.MetadataDir)
	if err != nil {
		return nil, err
	}
	cred, err := findCred(cfg.WorkerUser)
	if err != nil {
		return nil, err
	}
	db, err := store.Open(dir)
	if err != nil {
		return nil, err
	}
	s := &Service{cfg: cfg, log: cfg.Log, db: db, instance: instanceOf(dir), cred: cred,
		nets: map[string]*runtime{}, conds: map[condKey]service.Condition{}}
	s.ctx, s.stop = context.WithCancel(context.Background())
	for _, d := range []string{s.workerDir(), s.logDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			db.Close()
			return nil, errs.Wrap(errs.Unknown, err, "make a directory")
		}
	}
	// The socket directory itself must be passable for hypervisors; each socket has its own owner.
	if err := os.Chmod(cfg.SocketDir, 0o711); err != nil {
		db.Close()
		return nil, errs.Wrap(errs.Unknown, err, "open the socket directory to hypervisors")
	}
	if s.data, err = db.Load(); err != nil {
		db.Close()
		return nil, err
	}
	s.checkPrivileges()
	s.start()
	return s, nil
}

func (s *Service) workerDir() string { return filepath.Join(s.cfg.SocketDir, "workers") }
func (s *Service) logDir() string    { return filepath.Join(s.cfg.MetadataDir, "workers") }

// Remedy of everything that needs privileges.
const privRemedy = "run mvirt-net as root, or with CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN"

func (s *Service) checkPrivileges() {
	missing, err := hostnet.Missing()
	switch {
	case err != nil:
		s.priv = errs.New(errs.Denied, "%v", err).Do("load the kernel module tun, and let mvirt-net open /dev/net/tun")
		s.raise("TUN_MISSING", "", service.SeverityCritical, s.priv)
	case missing != "":
		s.priv = errs.New(errs.Denied, "the network plugin lacks %s", missing).Do(privRemedy)
		s.raise("NO_PRIVILEGES", "", service.SeverityCritical, s.priv)
	}
	if _, err := hostnet.NFT(); err != nil && s.priv == nil {
		s.raise("NFT_MISSING", "", service.SeverityCritical, errs.New(errs.Precondition, "%v", err).Do("install nftables"))
	}
}

// raise sets a condition; it keeps Since while it lasts.
func (s *Service) raise(code, object string, sev service.Severity, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := condKey{code, object}
	c, ok := s.conds[k]
	if !ok {
		c = service.Condition{Code: code, Severity: sev, Since: time.Now(), Object: object}
		s.log.Warn("trouble", "code", code, "object", object, "error", err)
	}
	c.Text, c.Remedy = err.Error(), errs.RemedyOf(err)
	s.conds[k] = c
}

// clear ends a condition.
func (s *Service) clear(code, object string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.conds[condKey{code, object}]; ok {
		delete(s.conds, condKey{code, object})
		s.log.Info("trouble is over", "code", code, "object", object)
	}
}

// Health implements service.Base.
func (s *Service) Health(context.Context) (service.Health, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var h service.Health
	for _, c := range s.conds {
		h.Conditions = append(h.Conditions, c)
	}
	return h, nil
}

// Shutdown implements service.Base. Workers go on.
func (s *Service) Shutdown(context.Context) error {
	s.stop()
	s.mu.Lock()
	nets := make([]*runtime, 0, len(s.nets))
	for _, rt := range s.nets {
		nets = append(nets, rt)
	}
	s.mu.Unlock()
	for _, rt := range nets {
		rt.mu.Lock()
		rt.letGo()
		rt.mu.Unlock()
	}
	s.wg.Wait()
	return s.db.Close()
}

// runtimeOf finds a network's runtime.
func (s *Service) runtimeOf(id string) *runtime {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nets[id]
}

// commit makes changes durable, then visible. It is called with mu held.
func (s *Service) commitLocked(visible func(), changes ...store.Change) error {
	if err := s.db.Do(changes...); err != nil {
		return err
	}
	visible()
	return nil
}

func notFound(kind, ref string) error {
	return errs.New(errs.NotFound, "there is no %s %q", kind, ref).With(errs.Resource{Type: kind, Name: ref}).
		Do(fmt.Sprintf("list them: mvirt %s ls", kind))
}
