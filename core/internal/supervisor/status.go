package supervisor

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Status is what is known about the plugin of one kind.
type Status struct {
	Kind       service.Kind
	Configured bool
	State      State
	Reason     string // why it is not up
	Remedy     string
	Command    string
	Attach     string
	Info       service.Info // of the running instance, or the last one
	PID        int          // 0: none runs
	UpSince    time.Time
	NextTry    time.Time // in StateWaiting
	Restarts   uint64    // launches after the first
	LastExit   *Exit
	Misses     int       // health checks in a row without an answer
	HealthAt   time.Time // last answered health check
	Want       Privileges
	Enforced   bool // the launcher sets Want
	Actual     *Privileges
	Resident   uint64 // bytes of memory
	Missing    []string
	Conditions []health.Condition
}

// Exit is the end of an instance, or a launch that failed.
type Exit struct {
	At     time.Time
	Text   string
	Up     time.Duration
	Wanted bool // a restart was asked for
	Stderr []string
}

// Status tells about one kind, also one that is not configured.
func (s *Supervisor) Status(kind service.Kind) Status {
	u := s.units[kind]
	if u == nil {
		return Status{Kind: kind, State: StateStopped, Reason: "not configured"}
	}
	st := u.status()
	st.Conditions = s.opt.Health.List(u.source())
	return st
}

// Statuses tells about all configured kinds, in the order in which they are started.
func (s *Supervisor) Statuses() []Status {
	out := make([]Status, len(s.order))
	for i, k := range s.order {
		out[i] = s.Status(k)
	}
	return out
}

func (u *unit) status() Status {
	u.mu.Lock()
	st := Status{Kind: u.Kind, Configured: true, State: u.state, Command: u.Command, Attach: u.Attach, Info: u.info,
		NextTry: u.nextTry, Restarts: u.restarts, Misses: u.misses, HealthAt: u.healthAt, Want: u.Want, Enforced: u.Enforced}
	if u.inst != nil {
		st.PID, st.UpSince = u.inst.PID(), u.upSince
	}
	if u.failure != nil {
		st.Reason, st.Remedy = u.failure.Error(), errs.RemedyOf(u.failure)
		if u.state == StateQuarantined {
			st.Remedy = joinRemedies(st.Remedy, u.restartRemedy())
		}
	}
	if u.last != nil {
		last := *u.last
		last.Stderr = slices.Clone(last.Stderr)
		st.LastExit = &last
	}
	u.mu.Unlock()
	if st.PID > 0 {
		if p, err := ReadPrivileges(st.PID); err == nil {
			st.Actual, st.Resident = &p, p.resident
		}
		st.Missing = missing(st.Info.Needs, st.Actual)
	}
	return st
}

// missing says what a plugin needs and has not: capabilities, devices, programs.
func missing(n service.Needs, actual *Privileges) (out []string) {
	if actual != nil {
		if n.Root && actual.UID != 0 {
			out = append(out, "user root")
		}
		for _, c := range n.Capabilities {
			if !slices.Contains(actual.Capabilities, c) {
				out = append(out, c)
			}
		}
	}
	for _, d := range n.Devices {
		if _, err := os.Stat(d); err != nil {
			out = append(out, "device "+d)
		}
	}
	for _, p := range n.Programs {
		if _, err := exec.LookPath(p); err != nil {
			out = append(out, "program "+p)
		}
	}
	return out
}

// ownConditions is what the core itself finds wrong with an instance that is up.
func (u *unit) ownConditions(inst Instance) (out []service.Condition) {
	var actual *Privileges
	if p, err := ReadPrivileges(inst.PID()); err == nil && inst.PID() > 0 {
		actual = &p
	}
	if m := missing(inst.Info().Needs, actual); len(m) > 0 {
		out = append(out, service.Condition{Code: "NEEDS_MISSING", Severity: service.SeverityWarning,
			Text:   fmt.Sprintf("the %s plugin says that it needs what it has not: %s", u.Kind, strings.Join(m, ", ")),
			Remedy: "install or grant it (capabilities, groups and user of [plugin." + string(u.Kind) + "]); mvirt plugin show " + string(u.Kind)})
	}
	if u.Enforced && actual != nil {
		if d := u.Want.differs(*actual); d != "" {
			out = append(out, service.Condition{Code: "PRIVILEGES_DIFFER", Severity: service.SeverityCritical,
				Text: fmt.Sprintf("the %s plugin runs with other privileges than configured: %s", u.Kind, d), Remedy: u.restartRemedy()})
		}
	}
	return out
}
