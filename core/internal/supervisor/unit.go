package supervisor

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// State of a plugin.
type State string

// States.
const (
	StateStarting    State = "starting"
	StateUp          State = "up"
	StateWaiting     State = "waiting"     // for the next attempt
	StateQuarantined State = "quarantined" // one attempt now and then, or when asked
	StateStopping    State = "stopping"
	StateStopped     State = "stopped"
)

// killWait bounds how long a unit waits for a process that was killed to be gone: SIGKILL takes effect at
// once unless the process hangs in the kernel.
const killWait = 5 * time.Second

type unit struct {
	Unit
	opt    *Options
	onUp   []*hook
	hooks  sync.WaitGroup
	policy restartPolicy // of the run goroutine
	ask    chan chan error

	mu       sync.Mutex
	state    State
	inst     Instance      // while up
	changed  chan struct{} // closed and replaced at each change of state
	info     service.Info  // of the running or last instance
	upSince  time.Time
	nextTry  time.Time
	restarts uint64 // launches after the first
	failure  error  // why it is not up
	last     *Exit
	misses   int
	healthAt time.Time // last answered health check
	ending   bool
}

// hook is a function to be called when the plugin is up. One that is slow to return holds up neither the
// next launch nor other hooks; its own next call waits for it.
type hook struct {
	turn chan struct{} // holds one token
	fn   func(ctx context.Context)
}

func newHook(fn func(ctx context.Context)) *hook {
	h := &hook{turn: make(chan struct{}, 1), fn: fn}
	h.turn <- struct{}{}
	return h
}

func (h *hook) run(ctx context.Context) {
	select {
	case <-h.turn:
		h.fn(ctx)
		h.turn <- struct{}{}
	case <-ctx.Done():
	}
}

func newUnit(u Unit, opt *Options) *unit {
	jitter := opt.Jitter
	if jitter == nil {
		jitter = rand.Float64
	}
	return &unit{Unit: u, opt: opt, policy: restartPolicy{jitter: jitter, most: u.RestartDelayMax, enough: u.QuarantineDeaths}, ask: make(chan chan error, 1),
		state: StateStarting, changed: make(chan struct{})}
}

func (u *unit) source() string { return "plugin." + string(u.Kind) }

func (u *unit) notice(warn bool, err error, format string, args ...any) {
	u.opt.Notice(Notice{Kind: u.Kind, Warn: warn, Text: fmt.Sprintf(format, args...), Err: err})
}

// setLocked changes the state and wakes all who wait for a change.
func (u *unit) setLocked(s State) {
	u.state = s
	close(u.changed)
	u.changed = make(chan struct{})
}

func (u *unit) hasLocked(f service.Feature) bool { return slices.Contains(u.info.Features, f) }

// run launches and watches until ctx ends; the last instance is stopped by shutdown, before.
func (u *unit) run(ctx context.Context) {
	defer u.hooks.Wait()
	var asked chan error // whoever waits for the launch that is under way
	for first := true; ctx.Err() == nil; first = false {
		u.mu.Lock()
		if u.ending {
			u.mu.Unlock()
			return
		}
		u.setLocked(StateStarting)
		u.nextTry = time.Time{}
		if !first {
			u.restarts++
		}
		u.mu.Unlock()

		inst, err := u.launch(ctx)
		if err == nil {
			answer(asked, nil)
			asked = u.watch(ctx, inst)
			if asked != nil {
				u.policy.forgive()
				continue
			}
		} else {
			u.failed(err)
			answer(asked, err)
		}
		if ctx.Err() != nil {
			return
		}
		asked = u.pause(ctx)
	}
}

// answer tells whoever asked for a restart how it went.
func answer(asked chan error, err error) {
	if asked != nil {
		asked <- err
	}
}

func (u *unit) launch(ctx context.Context) (Instance, error) {
	lctx, cancel := context.WithTimeout(ctx, u.StartTimeout)
	defer cancel()
	begun := time.Now()
	inst, err := u.Launch(lctx)
	if err != nil {
		if lctx.Err() != nil && ctx.Err() == nil && errs.ReasonOf(err) == "" {
			err = errs.Wrap(errs.Deadline, err, "the %s plugin was not ready within %s", u.Kind, u.StartTimeout)
		}
		return nil, err
	}
	info := inst.Info()
	if info.Kind != u.Kind {
		inst.Kill()
		return nil, errs.New(errs.Precondition, "%s is a %s plugin, not a %s plugin", u.Command, info.Kind, u.Kind).
			Because("WRONG_KIND").Do("put it into the table [plugin." + string(info.Kind) + "]")
	}
	u.mu.Lock()
	if u.ending {
		u.mu.Unlock()
		inst.Kill()
		return nil, context.Canceled
	}
	u.inst, u.info, u.upSince, u.failure, u.misses = inst, info, time.Now(), nil, 0
	u.setLocked(StateUp)
	u.mu.Unlock()
	u.opt.Health.Clear(u.source(), "PLUGIN_DOWN", "")
	u.notice(false, nil, "%s %s is up as process %d after %s", info.Name, info.Version, inst.PID(), time.Since(begun).Round(time.Millisecond))
	return inst, nil
}

// watch follows a running instance to its end. It returns a channel if the end was asked for.
func (u *unit) watch(ctx context.Context, inst Instance) (asked chan error) {
	ictx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, h := range u.onUp {
		u.hooks.Go(func() { h.run(ictx) })
	}
	var checks sync.WaitGroup
	defer checks.Wait()
	defer cancel()
	dead := make(chan string, 1)
	checks.Go(func() { u.checkHealth(ictx, inst, dead) })

	var why string
	select {
	case <-inst.Exited():
	case why = <-dead:
		u.notice(true, nil, "%s; killing process %d", why, inst.PID())
		inst.Kill()
		waitGone(inst)
	case asked = <-u.ask:
		u.mu.Lock()
		u.inst = nil
		u.setLocked(StateStopping)
		u.mu.Unlock()
		sctx, cancel := context.WithTimeout(ctx, u.StopTimeout)
		err := inst.Stop(sctx)
		cancel()
		if err != nil {
			u.notice(true, err, "the plugin did not stop by itself")
		}
		waitGone(inst)
		why = "stopped for a restart"
	case <-ctx.Done():
		return nil
	}
	u.ended(inst, why, asked != nil)
	return asked
}

func waitGone(inst Instance) {
	select {
	case <-inst.Exited():
	case <-time.After(killWait):
	}
}

// ended records the end of an instance.
func (u *unit) ended(inst Instance, why string, wanted bool) {
	text := "still there after SIGKILL"
	select {
	case <-inst.Exited():
		text = inst.Exit()
	default:
	}
	if why != "" {
		text = why + "; " + text
	}
	defer inst.Close()
	u.mu.Lock()
	up := time.Since(u.upSince)
	u.last = &Exit{At: time.Now(), Text: text, Up: up, Wanted: wanted, Stderr: inst.StderrTail()}
	u.inst = nil
	ending := u.ending
	if !wanted && !ending {
		u.failure = errs.New(errs.Unavailable, "the %s plugin ended: %s", u.Kind, text)
		u.setLocked(StateWaiting)
	}
	u.mu.Unlock()
	if ending || wanted {
		u.notice(false, nil, "plugin stopped: %s", text)
		return
	}
	u.notice(true, u.failure, "plugin ended after %s: %s", up.Round(time.Millisecond), text)
}

// failed records a launch that did not succeed.
func (u *unit) failed(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ending {
		return
	}
	u.upSince = time.Time{}
	u.failure = err
	u.last = &Exit{At: time.Now(), Text: err.Error()}
	u.setLocked(StateWaiting)
}

// pause waits for the next attempt or for somebody who asks for it.
func (u *unit) pause(ctx context.Context) (asked chan error) {
	u.mu.Lock()
	var up time.Duration
	if !u.upSince.IsZero() {
		up = time.Since(u.upSince)
	}
	failure, ending := u.failure, u.ending
	u.mu.Unlock()
	if ending {
		return nil
	}
	delay, quarantine := u.policy.died(time.Now(), up)

	// The condition comes before the state, whose change wakes those who wait and may ask for it.
	c := service.Condition{Code: "PLUGIN_DOWN", Severity: service.SeverityCritical, Text: failure.Error(), Remedy: errs.RemedyOf(failure)}
	if quarantine {
		c.Text = fmt.Sprintf("%d deaths within %s, now one attempt every %s; the last: %s", u.QuarantineDeaths, quarantineWindow, quarantineRetry, failure)
		c.Remedy = joinRemedies(errs.RemedyOf(failure), u.restartRemedy())
	}
	if quarantine || delay > 0 {
		u.opt.Health.Replace(u.source(), []service.Condition{c})
	}

	u.mu.Lock()
	if u.ending {
		u.mu.Unlock()
		return nil
	}
	u.nextTry = time.Now().Add(delay)
	if quarantine {
		u.setLocked(StateQuarantined)
	} else {
		u.setLocked(StateWaiting)
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	u.mu.Unlock()

	if quarantine {
		u.notice(true, failure, "quarantined after %d deaths within %s", u.QuarantineDeaths, quarantineWindow)
	} else if delay > 0 {
		u.notice(true, failure, "next attempt in %s", delay.Round(time.Millisecond))
	}
	select {
	case <-t.C:
	case asked = <-u.ask:
		u.policy.forgive()
	case <-ctx.Done():
	}
	return asked
}

func (u *unit) restartRemedy() string { return "mvirt plugin restart " + string(u.Kind) }

func joinRemedies(a, b string) string {
	if a == "" {
		return b
	}
	return a + ", then: " + b
}

// restart asks the run goroutine for a new instance and waits for it.
func (u *unit) restart(ctx context.Context) error {
	reply := make(chan error, 1)
	select {
	case u.ask <- reply:
	case <-ctx.Done():
		return errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "another restart of the %s plugin is under way", u.Kind)
	}
	for {
		u.mu.Lock()
		changed, ending := u.changed, u.ending
		u.mu.Unlock()
		if ending {
			return errs.New(errs.Unavailable, "mvirtd is stopping").Because("STOPPING")
		}
		select {
		case err := <-reply:
			return err
		case <-changed:
		case <-ctx.Done():
			return errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "the %s plugin is still being restarted", u.Kind)
		}
	}
}

// shutdown ends the instance, if any, for good.
func (u *unit) shutdown(ctx context.Context) {
	u.mu.Lock()
	inst := u.inst
	already := u.ending
	u.ending = true
	u.inst = nil
	if !already {
		u.setLocked(StateStopping)
	}
	u.mu.Unlock()
	if inst != nil {
		sctx, cancel := context.WithTimeout(ctx, u.StopTimeout)
		if err := inst.Stop(sctx); err != nil {
			u.notice(true, err, "the plugin did not stop by itself")
		}
		cancel()
		waitGone(inst)
		inst.Close()
	}
	u.mu.Lock()
	u.setLocked(StateStopped)
	u.mu.Unlock()
}
