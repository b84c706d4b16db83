// Package api serves the public API mvirt.v1 on a unix socket: it knows who calls, decides whether they may,
// checks and resolves what they say, hands changes to package plan, and translates answers and errors.
//
// # Shape
//
// Each service of the proto is a small type in a file of its own. Reads go straight to the plugins' proxies;
// what joins several kinds (names of volumes in a VM) takes what it can get and never waits for a plugin
// that is down. Every change is an operation; its end is audited by the engine's hook, its refusal by the
// interceptor, so that no handler can forget.
package api

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/peer"
	"github.com/mvirt/mvirt/core/internal/audit"
	"github.com/mvirt/mvirt/core/internal/authz"
	"github.com/mvirt/mvirt/core/internal/bus"
	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/consolelog"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/core/internal/reconcile"
	"github.com/mvirt/mvirt/core/internal/supervisor"
	"github.com/mvirt/mvirt/sdk/fdpass"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/version"
)

// Supervisor is what of the supervisor is used.
type Supervisor interface {
	Storage() supervisor.Storage
	Net() supervisor.Net
	VMM() supervisor.VMM
	Log() supervisor.Log
	Has(kind service.Kind, f service.Feature) bool
	Status(kind service.Kind) supervisor.Status
	Statuses() []supervisor.Status
	Restart(ctx context.Context, kind service.Kind) error
	OnUp(kind service.Kind, fn func(ctx context.Context))
}

// Options of a server.
type Options struct {
	Config     *config.Config
	Supervisor Supervisor
	Health     *health.Tracker
	Log        *slog.Logger // nil: slog.Default
	Version    string       // "" : version.Version
}

// Server is the core's public half: API, operations, reconciler, audit.
type Server struct {
	opt     Options
	log     *slog.Logger
	health  *health.Tracker
	sup     Supervisor
	storage supervisor.Storage
	net     supervisor.Net
	vmm     supervisor.VMM
	logs    supervisor.Log
	access  *authz.Policy
	tls     *tls.Config // nil: not over TCP
	remote  atomic.Pointer[net.Listener]
	users   peer.Names
	started time.Time

	audit    *audit.Recorder
	engine   *operation.Engine
	changes  *plan.Changes
	recon    *reconcile.Reconciler
	consoles *consolelog.Collector
	bus      bus.Bus
	lookup   lookup
	mirror   mirror
	files    fileTable

	grpc  *grpc.Server
	tasks sync.WaitGroup
}

// New opens the journal and the audit spool and registers with the supervisor, which must not have been
// started yet. Nothing is served before [Server.Run].
func New(opt Options) (*Server, error) {
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	if opt.Version == "" {
		opt.Version = version.Version
	}
	sup := opt.Supervisor
	s := &Server{opt: opt, log: opt.Log, health: opt.Health, sup: sup, storage: sup.Storage(), net: sup.Net(), vmm: sup.VMM(), logs: sup.Log(),
		access: authz.New(opt.Config.Access, uint32(os.Geteuid())), started: time.Now()}
	s.lookup.s = s
	s.files.table = fdpass.NewTable()
	dir := opt.Config.Core.StateDir
	var err error
	if s.tls, err = tlsConfig(opt.Config.TLS); err != nil {
		return nil, err
	}
	s.audit, err = audit.Open(audit.Options{Dir: filepath.Join(dir, "spool"), Limit: opt.Config.Core.SpoolLimit, To: s.logs, Log: opt.Log, Trouble: s.trouble})
	if err != nil {
		return nil, err
	}
	svc := plan.Services{Storage: s.storage, Net: s.net, VMM: s.vmm, Has: sup.Has}
	s.engine, err = operation.Open(operation.Options{Path: filepath.Join(dir, "operations.db"), Actions: plan.Actions(svc), Admit: s.audit.Admit,
		Ended: s.operationEnded, Changed: s.operationChanged, Log: opt.Log})
	if err != nil {
		s.audit.Close(closed())
		return nil, err
	}
	s.changes = plan.New(svc, s.engine)
	s.consoles = consolelog.New(s.vmm, s.audit.Note)
	s.recon = reconcile.New(reconcile.Options{Services: svc, Changes: s.changes, Engine: s.engine, Health: opt.Health, Audit: s.audit.Append,
		Publish: s.bus.Publish, Log: opt.Log, StateDir: dir, Up: s.up, Seen: s.consoles.Saw, Event: s.mirror.event, Watching: s.mirror.reset})
	for _, k := range service.Kinds() {
		sup.OnUp(k, func(ctx context.Context) { s.pluginUp(ctx, k) })
	}
	s.grpc = s.newGRPC()
	return s, nil
}

// closed is a context that has ended.
func closed() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// pluginUp is told that a plugin came up.
func (s *Server) pluginUp(ctx context.Context, k service.Kind) {
	s.engine.Kick()
	s.lookup.forget()
	st := s.sup.Status(k)
	s.bus.Publish(bus.Event{Type: "plugin.up", Labels: map[string]string{"kind": string(k), "name": st.Info.Name, "version": st.Info.Version},
		Message: string(k) + " plugin " + st.Info.Name + " is up"})
	if k == service.KindLog {
		s.audit.Kick()
		return
	}
	s.recon.PluginUp(ctx, k)
}

func (s *Server) trouble(code, text, remedy string) {
	if text == "" {
		s.health.Clear("core", code, "")
		return
	}
	s.health.Set("core", service.Condition{Code: code, Severity: service.SeverityWarning, Text: text, Remedy: remedy})
}

// up tells whether the plugin of a kind answers now, so that what can do without it need not wait.
func (s *Server) up(k service.Kind) bool { return s.sup.Status(k).State == supervisor.StateUp }

// Run settles what the last run left behind and serves until ctx ends; then it finishes what is under way,
// within the configured time, and returns.
func (s *Server) Run(ctx context.Context) error {
	api, err := listen(s.opt.Config.Core)
	if err != nil {
		return err
	}
	remote, err := s.listenTCP()
	if err != nil {
		api.Close()
		return err
	}
	files, err := s.files.listen(s.opt.Config.Core)
	if err != nil {
		api.Close()
		closeListener(remote)
		return err
	}
	found, err := s.engine.Recover(ctx)
	if err != nil {
		api.Close()
		closeListener(remote)
		files()
		return err
	}
	for _, op := range found {
		s.log.Info("the last run left an operation behind", "operation", op.ID, "title", op.Title)
	}
	rctx, stop := context.WithCancel(context.Background())
	s.tasks.Go(func() { s.recon.Run(rctx) })
	s.tasks.Go(func() { s.watchHealth(rctx) })

	serving := make(chan error, 2)
	go func() { serving <- s.grpc.Serve(api) }()
	if remote != nil {
		go func() { serving <- s.grpc.Serve(remote) }()
	}
	select {
	case <-ctx.Done():
		err = nil
	case err = <-serving:
	}
	files()
	limit, cancel := context.WithTimeout(context.Background(), s.opt.Config.Core.StopTimeout)
	defer cancel()
	stopped := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(stopped) }()
	// Streams (consoles, watches) would hold the graceful stop for ever; unary calls end with their operations.
	cerr := s.engine.Close(limit)
	stop()
	s.tasks.Wait()
	select {
	case <-stopped:
	case <-time.After(drain):
		s.grpc.Stop()
		<-stopped
	}
	return errors.Join(err, cerr, s.audit.Close(limit))
}

// drain is how long answers of calls that have ended get to leave.
const drain = 200 * time.Millisecond

// watchHealth publishes changes of conditions as events.
func (s *Server) watchHealth(ctx context.Context) {
	type key struct{ source, code, object string }
	have := map[key]string{}
	for {
		changed := s.health.Changed()
		now := map[key]string{}
		for _, c := range s.health.List("") {
			k := key{c.Source, c.Code, c.Object}
			now[k] = c.Text
			if _, was := have[k]; !was {
				s.bus.Publish(bus.Event{Type: "condition.set", Objects: nonEmpty(c.Object), Labels: map[string]string{"source": c.Source, "code": c.Code}, Message: c.Text})
			}
		}
		for k, text := range have {
			if _, still := now[k]; !still {
				s.bus.Publish(bus.Event{Type: "condition.cleared", Objects: nonEmpty(k.object), Labels: map[string]string{"source": k.source, "code": k.code}, Message: text})
			}
		}
		have = now
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func nonEmpty(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

// register adds all services.
func (s *Server) register(g *grpc.Server) {
	apiv1.RegisterSystemServer(g, &systemAPI{Server: s})
	apiv1.RegisterPluginsServer(g, &pluginsAPI{Server: s})
	apiv1.RegisterOperationsServer(g, &operationsAPI{Server: s})
	apiv1.RegisterTemplatesServer(g, &templatesAPI{Server: s})
	apiv1.RegisterVolumesServer(g, &volumesAPI{Server: s})
	apiv1.RegisterSnapshotsServer(g, &snapshotsAPI{Server: s})
	apiv1.RegisterNetworksServer(g, &networksAPI{Server: s})
	apiv1.RegisterNICsServer(g, &nicsAPI{Server: s})
	apiv1.RegisterSecurityGroupsServer(g, &groupsAPI{Server: s})
	apiv1.RegisterVMsServer(g, &vmsAPI{Server: s})
	apiv1.RegisterLogsServer(g, &logsAPI{Server: s})
}
