// Package health keeps lasting trouble as typed conditions in one place, so that the API and the CLI can show
// what is wrong now, since when, and what to do; a log line says only what happened once.
//
// A condition is known by its source (who noticed: "core", "plugin.vmm"), its code and its object. Reporting
// it again changes its text but not Since; it stays until its source clears it or leaves it out of [Tracker.Replace].
package health

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
)

// MaxPerSource bounds what one source may report, so that a plugin gone wrong cannot fill the core's memory.
// Far above what a screen shows; the rest is counted in one condition of its own.
const MaxPerSource = 1000

// Condition is one trouble and who noticed it.
type Condition struct {
	Source string
	service.Condition
}

// Tracker holds conditions. The zero value is ready. All methods may be called concurrently.
type Tracker struct {
	mu      sync.Mutex
	sources map[string]map[key]service.Condition
	changed chan struct{} // closed at the next change; nil while nobody waits
}

type key struct{ code, object string }

// Set reports one condition of a source. A zero Since means now, or the time it was first reported.
func (t *Tracker) Set(source string, c service.Condition) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sources == nil {
		t.sources = map[string]map[key]service.Condition{}
	}
	m := t.sources[source]
	if m == nil {
		m = map[key]service.Condition{}
		t.sources[source] = m
	}
	k := key{c.Code, c.Object}
	old, had := m[k]
	if had {
		c.Since = old.Since
	} else if len(m) >= MaxPerSource {
		return
	} else if c.Since.IsZero() {
		c.Since = time.Now()
	}
	if had && old == c {
		return
	}
	m[k] = c
	t.changedLocked()
}

// Clear ends one condition of a source; it need not be there.
func (t *Tracker) Clear(source, code, object string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, had := t.sources[source][key{code, object}]; had {
		delete(t.sources[source], key{code, object})
		t.changedLocked()
	}
}

// Replace says all that a source has to report now; what it leaves out has ended.
func (t *Tracker) Replace(source string, cs []service.Condition) {
	if more := len(cs) - MaxPerSource; more > 0 {
		cs = append(slices.Clone(cs[:MaxPerSource-1]), service.Condition{Code: "TOO_MANY_CONDITIONS", Severity: service.SeverityWarning,
			Text: "more conditions were reported than are kept; the rest is not shown", Remedy: "look at the plugin's log"})
	}
	keep := make(map[key]bool, len(cs))
	for _, c := range cs {
		keep[key{c.Code, c.Object}] = true
		t.Set(source, c)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.sources[source])
	for k := range t.sources[source] {
		if !keep[k] {
			delete(t.sources[source], k)
		}
	}
	if len(t.sources[source]) != n {
		t.changedLocked()
	}
}

// List is all conditions, gravest first, then oldest first. A source narrows it; "" is all.
func (t *Tracker) List(source string) []Condition {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []Condition
	for s, m := range t.sources {
		if source != "" && s != source {
			continue
		}
		for _, c := range m {
			out = append(out, Condition{Source: s, Condition: c})
		}
	}
	slices.SortFunc(out, func(a, b Condition) int {
		return cmp.Or(-cmp.Compare(a.Severity, b.Severity), a.Since.Compare(b.Since), cmp.Compare(a.Source, b.Source),
			cmp.Compare(a.Code, b.Code), cmp.Compare(a.Object, b.Object))
	})
	return out
}

// Changed is closed at the next change.
func (t *Tracker) Changed() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.changed == nil {
		t.changed = make(chan struct{})
	}
	return t.changed
}

func (t *Tracker) changedLocked() {
	if t.changed != nil {
		close(t.changed)
		t.changed = nil
	}
}
