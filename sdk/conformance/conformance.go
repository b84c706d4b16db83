// Package conformance proves that a plugin fits its contract, in whatever language it is written: it runs the
// plugin as a process, as the core would, and checks what the contract promises.
//
// A plugin's own test is a few lines:
//
//	func TestConformance(t *testing.T) {
//		conformance.RunStorage(t, conformance.Config{Command: []string{bin, "--data-dir", t.TempDir()}})
//	}
//
// Without Go: the command mvirt-plugin-test takes any executable.
//
// A check knows nothing of the product; what differs between plugins are the features that they declare and
// what [Config] says. Names of checks are public: they are never renamed. Each check makes objects of its own,
// under names that begin with "ct-", and removes them; what it could not remove it reports.
package conformance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/service"
)

// Config says how to run the plugin under test.
type Config struct {
	Command []string     // absolute path of the program, and its flags; started again with the same
	Env     []string     // beside what the handshake sets
	Spawner host.Spawner // instead of Command: another way to start it

	StartTimeout time.Duration // 0: 10 s
	CheckTimeout time.Duration // for one check; 0: 2 min

	// Owner of attachments. Zero: this process's user, which lets the suite look into volumes.
	UID, GID uint32

	// ImportURL lets imports come from http://127.0.0.1, for plugins that are told to allow it.
	ImportURL bool

	// For vmm plugins: what the suite boots. Without Kernel the checks that boot are skipped.
	Kernel, Initramfs, Cmdline string
	BootMarker                 string        // text that the guest prints on its console once it is up
	BootTimeout                time.Duration // 0: 1 min
	MemoryBytes                uint64        // of the guest; 0: 256 MiB

	// Only runs the checks whose name has one of these prefixes; Skip leaves checks out, name → reason.
	Only []string
	Skip map[string]string

	Log func(format string, args ...any) // nil: nothing is logged
}

// Result is the outcome of one check.
type Result struct {
	Name     string
	Failures []string // empty: passed
	Skipped  string   // reason, or empty
	Took     time.Duration
}

type check struct {
	name string
	fn   func(*C)
}

// Names lists the checks of a kind in the order in which they run.
func Names(kind service.Kind) (names []string) {
	for _, c := range checks(kind) {
		names = append(names, c.name)
	}
	return names
}

func checks(kind service.Kind) []check {
	all := slices.Clone(commonChecks)
	switch kind {
	case service.KindStorage:
		all = append(append(all, storageChecks...), imageChecks...)
	case service.KindNet:
		all = append(all, netChecks...)
	case service.KindVMM:
		all = append(all, vmmChecks...)
	case service.KindLog:
		all = append(all, logChecks...)
	}
	return append(all, lastChecks...)
}

// Run runs the suite of a kind and hands each result to report. The error says why it could not run at all.
func Run(ctx context.Context, kind service.Kind, cfg Config, report func(Result)) error {
	if cfg.CheckTimeout == 0 {
		cfg.CheckTimeout = 2 * time.Minute
	}
	if cfg.BootTimeout == 0 {
		cfg.BootTimeout = time.Minute
	}
	if cfg.MemoryBytes == 0 {
		cfg.MemoryBytes = 256 << 20
	}
	if cfg.UID == 0 && cfg.GID == 0 {
		cfg.UID, cfg.GID = uint32(os.Getuid()), uint32(os.Getgid())
	}
	if cfg.Spawner == nil {
		cfg.Spawner = &host.Local{Command: cfg.Command, Env: cfg.Env}
	}
	s := &suite{kind: kind, cfg: cfg, seen: &audited{}}
	if err := s.launch(ctx); err != nil {
		return err
	}
	defer func() { s.p.Kill() }()
	for _, ch := range checks(kind) {
		if !selected(cfg.Only, ch.name) {
			continue
		}
		report(s.run(ctx, ch))
	}
	return nil
}

func selected(only []string, name string) bool {
	return len(only) == 0 || slices.ContainsFunc(only, func(p string) bool { return strings.HasPrefix(name, p) })
}

// suite is one run.
type suite struct {
	kind service.Kind
	cfg  Config
	p    *host.Plugin
	seen *audited
}

func (s *suite) launch(ctx context.Context) error {
	if s.p != nil {
		s.p.Kill() // lets go of its connections, also if it has ended by itself
	}
	p, err := host.Launch(ctx, host.Config{Kind: s.kind, Spawner: s.cfg.Spawner, Host: s.seen, StartTimeout: s.cfg.StartTimeout,
		Log: func(l host.LogLine) {
			if s.cfg.Log != nil {
				s.cfg.Log("plugin: %s: %s %v", l.Level, l.Message, l.Fields)
			}
		}})
	if err != nil {
		return err
	}
	s.p = p
	return nil
}

func (s *suite) run(ctx context.Context, ch check) (res Result) {
	res.Name = ch.name
	if why := s.cfg.Skip[ch.name]; why != "" {
		res.Skipped = why
		return res
	}
	began := time.Now()
	defer func() { res.Took = time.Since(began) }()
	select {
	case <-s.p.Exited():
		if err := s.launch(ctx); err != nil {
			res.Failures = []string{"the plugin does not start any more: " + err.Error()}
			return res
		}
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CheckTimeout)
	defer cancel()
	var tag [4]byte
	rand.Read(tag[:])
	c := &C{Context: ctx, suite: s, tag: hex.EncodeToString(tag[:])}
	pid := s.p.PID()
	c.call(ch.fn)
	for _, undo := range slices.Backward(c.undo) {
		c.call(func(c *C) { undo() })
	}
	select {
	case <-s.p.Exited():
		if e, _ := s.p.Exit(); s.p.PID() == pid && !c.ended {
			c.Errorf("the plugin died under the check: %s; its last lines: %s", e, strings.Join(s.p.StderrTail(), " / "))
		}
	default:
	}
	res.Failures, res.Skipped = c.failures, c.skipped
	if len(res.Failures) > 0 {
		res.Skipped = ""
	}
	return res
}

// C is one check under way.
type C struct {
	context.Context
	*suite
	tag      string
	failures []string
	skipped  string
	undo     []func()
	ended    bool // the check itself ended the plugin
}

type stop struct{}

func (c *C) call(fn func(*C)) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(stop); !ok {
				c.Errorf("the check panicked: %v\n%s", r, debug.Stack())
			}
		}
	}()
	fn(c)
}

// Errorf records a failure and goes on.
func (c *C) Errorf(format string, args ...any) {
	c.failures = append(c.failures, fmt.Sprintf(format, args...))
}

// Fatalf records a failure and ends the check.
func (c *C) Fatalf(format string, args ...any) {
	c.Errorf(format, args...)
	panic(stop{})
}

// Skipf ends the check for a reason.
func (c *C) Skipf(format string, args ...any) {
	c.skipped = fmt.Sprintf(format, args...)
	panic(stop{})
}

// later is done when the check has ended, newest first.
func (c *C) later(fn func()) { c.undo = append(c.undo, fn) }

// name is a name that nobody else uses.
func (c *C) name(s string) string { return "ct-" + c.tag + "-" + s }

// ok ends the check on an error.
func (c *C) ok(err error, what string, args ...any) {
	if err != nil {
		c.Fatalf("%s: %v (kind %s)", fmt.Sprintf(what, args...), err, errs.KindOf(err))
	}
}

// fails wants an error of this kind; of Invalid also the field, of all a text.
func (c *C) fails(err error, kind errs.Kind, what string, args ...any) {
	what = fmt.Sprintf(what, args...)
	switch {
	case err == nil:
		c.Errorf("%s: accepted, must fail with kind %q", what, kind)
	case errs.KindOf(err) != kind:
		c.Errorf("%s: kind %q, must be %q: %v", what, errs.KindOf(err), kind, err)
	}
}

// because wants an error of this kind with this reason word.
func (c *C) because(err error, kind errs.Kind, reason, what string, args ...any) {
	c.fails(err, kind, what, args...)
	if err != nil && errs.ReasonOf(err) != reason {
		c.Errorf("%s: reason %q, must be %q: %v", fmt.Sprintf(what, args...), errs.ReasonOf(err), reason, err)
	}
}

// restart ends the plugin, in order or by SIGKILL, and starts it again.
func (c *C) restart(kill bool) {
	c.ended = true
	if kill {
		c.p.Kill()
	} else {
		ctx, cancel := context.WithTimeout(c, 15*time.Second)
		defer cancel()
		c.ok(c.p.Stop(ctx), "shutdown")
	}
	c.ok(c.launch(c), "starting it again")
}

// audited collects what the plugin tells its host.
type audited struct{}

func (*audited) Audit(context.Context, service.AuditRecord) error { return nil }
func (*audited) Publish(context.Context, service.Event) error     { return nil }

// TestingT is *testing.T, said without importing package testing, which would drag its flags into programs.
type TestingT[T any] interface {
	Run(name string, fn func(T)) bool
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Context() context.Context
}

// RunStorage runs the suite of storage plugins as subtests of t.
func RunStorage[T TestingT[T]](t T, cfg Config) { runIn(t, service.KindStorage, cfg) }

// RunNet runs the suite of net plugins as subtests of t.
func RunNet[T TestingT[T]](t T, cfg Config) { runIn(t, service.KindNet, cfg) }

// RunVMM runs the suite of vmm plugins as subtests of t.
func RunVMM[T TestingT[T]](t T, cfg Config) { runIn(t, service.KindVMM, cfg) }

// RunLog runs the suite of log plugins as subtests of t.
func RunLog[T TestingT[T]](t T, cfg Config) { runIn(t, service.KindLog, cfg) }

func runIn[T TestingT[T]](t T, kind service.Kind, cfg Config) {
	t.Helper()
	err := Run(t.Context(), kind, cfg, func(r Result) {
		t.Run(r.Name, func(t T) {
			for _, f := range r.Failures {
				t.Errorf("%s", f)
			}
			if r.Skipped != "" {
				t.Skipf("%s", r.Skipped)
			}
		})
	})
	if err != nil {
		t.Fatalf("the plugin does not start: %v\n%s", err, errs.RemedyOf(err))
	}
}
