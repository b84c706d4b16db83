package supervisor

import (
	"context"
	"sync"
	"syscall"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/service"
)

// HandshakeEnv is what the handshake adds to a plugin's environment; the launcher is given it by main, as it
// does not know sdk/host.
func HandshakeEnv(launchDir string, hostUID uint32, hostPID int) []string {
	return host.Env(launchDir, hostUID, hostPID)
}

// plugin launches the plugin of a kind through sdk/host.
type plugin struct {
	kind service.Kind
	cfg  *config.Plugin
	w    Wiring
}

func (p *plugin) launch(ctx context.Context) (Instance, error) {
	hc := host.Config{Kind: p.kind, Spawner: p, Host: p.w.Host(p.kind), StartTimeout: p.cfg.StartTimeout, Log: func(l host.LogLine) {
		level := l.Level
		if level == "trace" {
			level = "debug"
		}
		p.w.Line(p.kind, Line{Time: l.Time, Level: level, Message: l.Message, Fields: l.Fields})
	}}
	var h *host.Plugin
	var err error
	if p.cfg.Attach != "" {
		h, err = host.Attach(ctx, p.cfg.Attach, hc)
	} else {
		h, err = host.Launch(ctx, hc)
	}
	if err != nil {
		return nil, err
	}
	if p.cfg.Attach != "" {
		return newAttached(h), nil
	}
	return hosted{h}, nil
}

// Spawn is host.Spawner by the launcher.
func (p *plugin) Spawn(ctx context.Context) (*host.Process, error) {
	proc, err := p.w.Spawner.Spawn(ctx, p.kind)
	if err != nil {
		return nil, err
	}
	return &host.Process{PID: proc.PID, UID: proc.UID, LaunchDir: proc.Dir, Stdout: proc.Stdout, Stderr: proc.Stderr, Lifeline: proc.Lifeline,
		Signal: func(s syscall.Signal) error { return proc.Signal(s) }, Wait: func(ctx context.Context) (host.Exit, error) { return wait(ctx, proc) }}, nil
}

func wait(ctx context.Context, proc *launcher.Process) (host.Exit, error) {
	select {
	case <-proc.Gone:
		e := proc.Exit()
		return host.Exit{Code: e.Code, Signal: e.Signal, At: e.At}, nil
	case <-ctx.Done():
		return host.Exit{}, errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "waiting for process %d", proc.PID)
	}
}

// hosted is an Instance by sdk/host.
type hosted struct{ *host.Plugin }

func (h hosted) Service() service.Base { return h.Base }

// Close releases the connections; Kill does that also for a process that has ended by itself.
func (h hosted) Close() { h.Kill() }

func (h hosted) Exit() string {
	e, ended := h.Plugin.Exit()
	switch {
	case !ended:
		return "still running"
	}
	return launcher.Exit{Code: e.Code, Signal: e.Signal}.String()
}

// attached is a stand-alone plugin: somebody else's to stop, so all that ends here is the connection.
type attached struct {
	hosted
	once sync.Once
	left chan struct{}
}

func newAttached(h *host.Plugin) *attached {
	a := &attached{hosted: hosted{h}, left: make(chan struct{})}
	go func() {
		select {
		case <-h.Exited():
			a.leave()
		case <-a.left:
		}
	}()
	return a
}

func (a *attached) leave() { a.once.Do(func() { close(a.left) }) }

func (a *attached) Exited() <-chan struct{} { return a.left }

func (a *attached) Stop(context.Context) error { a.Kill(); return nil }

func (a *attached) Kill() {
	a.hosted.Kill()
	a.leave()
}

func (a *attached) Close() { a.Kill() }

func (a *attached) Exit() string {
	if _, ended := a.hosted.Plugin.Exit(); ended {
		return "the stand-alone process ended; how is not known"
	}
	return "disconnected from the stand-alone process"
}
