package supervisor

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Wiring is what a supervisor of real plugins needs besides the configuration.
type Wiring struct {
	Spawner launcher.Spawner
	Grants  map[service.Kind]launcher.Grant
	Health  *health.Tracker
	Log     *slog.Logger
	Host    func(service.Kind) service.Host // what the plugin of a kind may ask of the core
	Line    func(service.Kind, Line)        // a plugin's log lines; must not block
}

// Line is one line of a plugin's log.
type Line struct {
	Time    time.Time
	Level   string // debug, info, warn, error
	Message string
	Fields  map[string]string
}

// ForConfig makes a supervisor of the plugins that the configuration names.
func ForConfig(cfg *config.Config, w Wiring) *Supervisor {
	opt := Options{CallWait: cfg.Core.CallWait, CallTimeout: cfg.Core.CallTimeout, Health: w.Health, Notice: func(n Notice) {
		level, args := slog.LevelInfo, []any{"plugin", string(n.Kind)}
		if n.Warn {
			level = slog.LevelWarn
		}
		if n.Err != nil {
			args = append(args, "error", n.Err.Error())
			if r := errs.RemedyOf(n.Err); r != "" {
				args = append(args, "remedy", r)
			}
		}
		w.Log.Log(context.Background(), level, n.Text, args...)
	}}
	for _, k := range cfg.Kinds() {
		p := cfg.Plugins[k]
		g := w.Grants[k]
		opt.Units = append(opt.Units, Unit{
			Kind: k, Command: p.Command, Attach: p.Attach, Launch: (&plugin{kind: k, cfg: p, w: w}).launch,
			HealthInterval: p.HealthInterval, HealthDeadline: p.HealthDeadline, HealthMisses: p.HealthMisses,
			RestartDelayMax: p.RestartDelayMax, QuarantineDeaths: p.QuarantineDeaths,
			StartTimeout: p.StartTimeout, StopTimeout: p.StopTimeout, Enforced: g.Enforced,
			Want: Privileges{UID: g.UID, GID: g.GID, Groups: slices.Clone(g.Groups), Capabilities: g.Capabilities, Bounding: g.Capabilities, NoNewPrivs: g.NoNewPrivs},
		})
	}
	return New(opt)
}
