// Package supervisor keeps one plugin of each kind running and hands out its service.
//
// # How it works
//
// Each configured kind has a unit with one goroutine: launch, watch, and after a death launch again. The
// first restart is immediate; further ones wait with exponential back-off and jitter; after five deaths in
// two minutes the unit is quarantined: one attempt every five minutes, or when somebody asks (see restartPolicy). A plugin that
// leaves its health checks unanswered is killed and treated like one that died.
//
// The services that [Supervisor.Storage] and its like return are proxies: they live as long as the
// supervisor and find the running instance for each call. While there is none a call waits, at most for
// CallWait, and then fails with errs.Unavailable, saying why and what to do. A call that loses its plugin
// half-way is repeated once on the next instance if repeating is harmless, which for these contracts is
// nearly always, as callers choose ids.
//
// Whether a plugin has an optional feature is data ([Supervisor.Has]), never a type assertion: a proxy has
// all methods, and one that the plugin lacks returns errs.Unsupported.
//
// Only this package imports sdk/host; how a process is spawned is behind host.Spawner (package launcher).
package supervisor

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Options of a supervisor.
type Options struct {
	Units       []Unit
	CallWait    time.Duration // how long a call waits for a plugin that is down
	CallTimeout time.Duration // deadline of calls whose context has none
	Health      *health.Tracker
	// Notice is told what happens to plugins, in words, for the core's own log; never nil. It must not block.
	Notice func(Notice)
	// Jitter returns a number in [0,1); nil: random. Tests make it constant.
	Jitter func() float64
}

// Unit says how to run the plugin of one kind.
type Unit struct {
	Kind           service.Kind
	Command        string // for display
	Attach         string // address of a stand-alone plugin, or ""
	Launch         Launch
	HealthInterval time.Duration
	HealthDeadline time.Duration
	HealthMisses   int
	// RestartDelayMax and QuarantineDeaths are those of config.Plugin. Zero delay: the default, 30 s; zero
	// deaths: no quarantine.
	RestartDelayMax  time.Duration
	QuarantineDeaths int
	StartTimeout     time.Duration
	StopTimeout      time.Duration
	Want             Privileges // what the configuration grants
	Enforced         bool       // the launcher sets Want; otherwise the plugin runs as the current user
}

// Launch starts the plugin's process, or attaches to it, and returns when it has said who it is. ctx bounds
// the start only. After an error nothing runs.
type Launch func(ctx context.Context) (Instance, error)

// Instance is one run of a plugin.
type Instance interface {
	Info() service.Info
	PID() int
	// Service is the client of the plugin's kind: a [Storage], [Net], [VMM] or [Log].
	Service() service.Base
	// Stop asks the plugin to shut down until ctx ends, then ends it by force. It returns when it is gone.
	Stop(ctx context.Context) error
	// Kill ends it at once; it returns when it is gone, or after a bounded time.
	Kill()
	// Exited is closed when the process is gone (for an attached one: the connection).
	Exited() <-chan struct{}
	// Exit describes the end, once Exited is closed: "exit status 1", "killed by SIGKILL".
	Exit() string
	// StderrTail is the last lines that the process wrote outside its structured log.
	StderrTail() []string
	// Close lets go of connections to an instance that is gone.
	Close()
}

// Notice is something that happened to a plugin.
type Notice struct {
	Kind service.Kind
	Warn bool
	Text string
	Err  error // nil unless something failed
}

// Supervisor keeps plugins running.
type Supervisor struct {
	opt   Options
	units map[service.Kind]*unit
	order []service.Kind

	mu      sync.Mutex
	started bool
	cancel  context.CancelFunc
	done    sync.WaitGroup
}

// New makes a supervisor; nothing runs before [Supervisor.Start].
func New(opt Options) *Supervisor {
	s := &Supervisor{opt: opt, units: map[service.Kind]*unit{}}
	for _, k := range service.Kinds() {
		for _, u := range opt.Units {
			if u.Kind == k {
				s.units[k] = newUnit(u, &s.opt)
				s.order = append(s.order, k)
			}
		}
	}
	return s
}

// OnUp registers fn to be called, in a goroutine of its own, each time the plugin of a kind comes up; ctx
// ends when that instance does. Calls of one fn do not overlap. Register before Start.
func (s *Supervisor) OnUp(kind service.Kind, fn func(ctx context.Context)) {
	if u := s.units[kind]; u != nil {
		u.onUp = append(u.onUp, newHook(fn))
	}
}

// Start begins to launch all plugins, side by side, and returns at once; see [Supervisor.Ready].
func (s *Supervisor) Start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started {
		return
	}
	s.started = true
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	for _, k := range s.order {
		s.done.Go(func() { s.units[k].run(ctx) })
	}
}

// Ready returns nil when every plugin is up, or an error when one is quarantined or ctx ends; it names all
// that are not up, and why.
func (s *Supervisor) Ready(ctx context.Context) error {
	var down []error
	for _, k := range s.order {
		if err := s.units[k].ready(ctx); err != nil {
			down = append(down, err)
		}
	}
	return errors.Join(down...)
}

// Stop shuts all plugins down in an orderly way, the log plugin last, each bounded by its stop timeout and
// by ctx. VMs keep running. Calls fail from now on.
func (s *Supervisor) Stop(ctx context.Context) {
	for i := len(s.order) - 1; i >= 0; i-- {
		s.units[s.order[i]].shutdown(ctx)
	}
	s.mu.Lock()
	if s.cancel != nil {
		s.cancel()
	}
	s.mu.Unlock()
	s.done.Wait()
}

// Restart stops the plugin of a kind in an orderly way, lifts a quarantine, and returns when the new
// instance is up, or with the reason why it is not.
func (s *Supervisor) Restart(ctx context.Context, kind service.Kind) error {
	u, err := s.unit(kind)
	if err != nil {
		return err
	}
	return u.restart(ctx)
}

// Has tells whether the plugin that runs, or ran last, has an optional feature.
func (s *Supervisor) Has(kind service.Kind, f service.Feature) bool {
	u := s.units[kind]
	if u == nil {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.hasLocked(f)
}

func (s *Supervisor) unit(kind service.Kind) (*unit, error) {
	if u := s.units[kind]; u != nil {
		return u, nil
	}
	return nil, notConfigured(kind)
}

func notConfigured(kind service.Kind) error {
	return errs.New(errs.Precondition, "no %s plugin is configured", kind).Because("PLUGIN_NOT_CONFIGURED").
		With(errs.Resource{Type: "plugin", Name: string(kind)}).Do("add a [plugin." + string(kind) + "] table to the configuration and restart mvirtd")
}
