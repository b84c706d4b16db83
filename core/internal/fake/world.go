// Package fake is a small world in memory: the services of all four kinds, as far as the core uses them, with
// the checks that the contracts promise. Tests of the core run against it; it can fail any call before or
// after its effect.
package fake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// World is all that the services share.
type World struct {
	// Gate is asked before each call and again after its effect ("storage.CreateVolume"); an error of the
	// first keeps the effect from happening, one of the second hides that it happened. Set it before use.
	Gate func(ctx context.Context, call string, after bool) error

	mu        sync.Mutex
	volumes   map[string]*storage.Volume
	templates map[string]storage.Template
	snapshots []storage.Snapshot
	imports   map[string]*storage.Import
	networks  map[string]net.Network
	nics      map[string]*net.NIC
	groups    map[string]net.SecurityGroup
	nextIP    byte
	vms       map[string]*vmm.VM
	memory    []vmm.MemorySnapshot
	watchers  map[chan vmm.Event]bool
	entries   []log.Entry
	ids       map[string]bool
	logMore   chan struct{}
	features  map[service.Feature]bool
	calls     []string
}

// New makes an empty world whose plugins have all features.
func New() *World {
	return &World{volumes: map[string]*storage.Volume{}, templates: map[string]storage.Template{}, imports: map[string]*storage.Import{},
		networks: map[string]net.Network{}, nics: map[string]*net.NIC{}, groups: map[string]net.SecurityGroup{}, vms: map[string]*vmm.VM{},
		watchers: map[chan vmm.Event]bool{}, ids: map[string]bool{}, features: map[service.Feature]bool{}, logMore: make(chan struct{})}
}

// Without takes features away.
func (w *World) Without(fs ...service.Feature) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range fs {
		w.features[f] = true
	}
}

// Has tells whether the plugins have a feature.
func (w *World) Has(_ service.Kind, f service.Feature) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.features[f]
}

func (w *World) lacks(f service.Feature) error {
	if w.features[f] {
		return errs.New(errs.Unsupported, "no such feature")
	}
	return nil
}

// do makes a call: gate, effect under the lock, gate.
func do[T any](ctx context.Context, w *World, call string, fn func() (T, error)) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, err
	}
	if w.Gate != nil {
		if err := w.Gate(ctx, call, false); err != nil {
			return zero, err
		}
	}
	w.mu.Lock()
	w.calls = append(w.calls, call)
	v, err := fn()
	w.mu.Unlock()
	if err == nil && w.Gate != nil {
		if err := w.Gate(ctx, call, true); err != nil {
			return zero, err
		}
	}
	return v, err
}

func run(ctx context.Context, w *World, call string, fn func() error) error {
	_, err := do(ctx, w, call, func() (struct{}, error) { return struct{}{}, fn() })
	return err
}

// Calls are all calls that had an effect or looked, in order; and forgets them.
func (w *World) Calls() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.calls
	w.calls = nil
	return c
}

// String is all that there is, one line an object, sorted: what tests compare.
func (w *World) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for _, v := range w.volumes {
		line := "volume " + v.Name
		for _, a := range v.Attachments {
			line += " attached to " + w.vmName(a.VMID)
		}
		out = append(out, fmt.Sprintf("%s size:%d", line, v.SizeBytes))
	}
	for _, t := range w.templates {
		out = append(out, "template "+t.Name)
	}
	for _, s := range w.snapshots {
		out = append(out, "snapshot "+s.VolumeName+"@"+s.Name)
	}
	for _, s := range w.memory {
		out = append(out, "vm snapshot "+s.Spec.Name+"@"+s.Name)
	}
	for _, n := range w.networks {
		line := "network " + n.Name
		if len(n.DNS) > 0 {
			line += fmt.Sprintf(" dns:%v", n.DNS)
		}
		out = append(out, line)
	}
	for _, n := range w.nics {
		line := "nic " + n.Name
		if n.VMID != "" {
			line += " attached to " + w.vmName(n.VMID)
		}
		if len(n.RoutedPrefixes) > 0 {
			line += fmt.Sprintf(" routed:%v", n.RoutedPrefixes)
		}
		out = append(out, line)
	}
	for _, g := range w.groups {
		out = append(out, fmt.Sprintf("group %s rules:%d", g.Name, len(g.Rules)))
	}
	for _, v := range w.vms {
		line := fmt.Sprintf("vm %s %s", v.Spec.Name, v.State)
		for _, d := range v.Spec.Disks {
			line += " disk:" + d.Name
		}
		if n := len(v.Spec.NICs); n > 0 {
			line += fmt.Sprintf(" nics:%d", n)
		}
		line += fmt.Sprintf(" cpus:%d", v.Spec.CPUs)
		out = append(out, line)
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func (w *World) vmName(id string) string {
	if v := w.vms[id]; v != nil {
		return v.Spec.Name
	}
	return "vm " + id
}

// Log is the log service.
func (w *World) Log() *Log { return &Log{w: w} }

// Log is a log service in memory.
type Log struct {
	base
	w *World
}

// Append stores entries once an id.
func (l *Log) Append(ctx context.Context, entries []log.Entry) error {
	return run(ctx, l.w, "log.Append", func() error {
		for _, e := range entries {
			if e.ID == "" || len(e.ID) > 64 || e.Level == 0 || len(e.Message) > log.MaxMessage {
				return errs.New(errs.Invalid, "bad entry %q", e.ID)
			}
		}
		for _, e := range entries {
			if !l.w.ids[e.ID] {
				l.w.ids[e.ID] = true
				l.w.entries = append(l.w.entries, e)
			}
		}
		close(l.w.logMore)
		l.w.logMore = make(chan struct{})
		return nil
	})
}

// Entries are all entries, in the order in which they came.
func (w *World) Entries() []log.Entry {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.entries)
}

// Query knows objects, levels, limit and follow.
func (l *Log) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	sent, n := 0, uint32(0)
	caught := false
	for {
		l.w.mu.Lock()
		entries, more := slices.Clone(l.w.entries[sent:]), l.w.logMore
		l.w.mu.Unlock()
		sent += len(entries)
		if q.NewestFirst {
			slices.Reverse(entries)
		}
		for _, e := range entries {
			if len(q.Objects) > 0 && !slices.ContainsFunc(q.Objects, func(o string) bool { return slices.Contains(e.Objects, o) }) ||
				len(q.Levels) > 0 && !slices.Contains(q.Levels, e.Level) || q.MaxLevel != 0 && e.Level > q.MaxLevel {
				continue
			}
			if err := fn(log.Result{Entry: e, PageToken: e.ID}); err != nil {
				return err
			}
			if n++; q.Limit != 0 && n == q.Limit {
				return nil
			}
		}
		if !q.Follow {
			return nil
		}
		if !caught {
			caught = true
			if err := fn(log.Result{CaughtUp: true}); err != nil {
				return err
			}
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Stats counts.
func (l *Log) Stats(ctx context.Context) (log.Stats, error) {
	return do(ctx, l.w, "log.Stats", func() (log.Stats, error) { return log.Stats{Entries: uint64(len(l.w.entries))}, nil })
}

// Verify finds nothing wrong.
func (l *Log) Verify(ctx context.Context, _ log.VerifyRequest) (log.VerifyReport, error) {
	return do(ctx, l.w, "log.Verify", func() (log.VerifyReport, error) { return log.VerifyReport{Checked: uint64(len(l.w.entries))}, nil })
}

func byName[T any](m map[string]T, name func(T) string) []T {
	out := slices.Collect(maps.Values(m))
	slices.SortFunc(out, func(a, b T) int { return strings.Compare(name(a), name(b)) })
	return out
}

func notFound(kind, ref string) error {
	return errs.New(errs.NotFound, "no %s %q", kind, ref)
}

func now() time.Time { return time.Now() }

// Forget drops the history of calls and entries, which otherwise grows for ever.
func (w *World) Forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls, w.entries, w.ids = nil, nil, map[string]bool{}
}
