package api

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// mirror is what the vmm plugin's watch has told of all VMs, so that a list costs no call to the plugin. It is
// valid between the end of a watch's snapshot and the end of that watch; otherwise lists ask the plugin.
//
// An operation's effect may be on its way in the watch when the operation ends. So at its end the VMs that it
// touched are marked, and the next list asks for these one by one: whoever made a change sees it.
type mirror struct {
	mu    sync.Mutex
	valid bool
	vms   map[string]*mirrored
	order []*mirrored // by name; nil: to be sorted
	dirty map[string]bool
}

type mirrored struct {
	vm    vmm.VM
	asked time.Time // when the plugin was asked for it, if it was

	pb   *apiv1.VM // as a list shows it; shared, never changed
	with uint64    // version of the names that pb was made with
}

// late is how long after a question an older answer of the watch may still arrive.
const late = 5 * time.Second

// maxAsk is up to how many marked VMs are asked for one by one.
const maxAsk = 32

// event takes an event of the watch in. began and ended frame a watch: both make the mirror invalid.
func (m *mirror) event(e vmm.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch e.Type {
	case vmm.EventSnapshot, vmm.EventChanged, vmm.EventRebooted, vmm.EventPanicked:
		if e.VM.ID != "" {
			m.putLocked(e.VM, time.Time{})
		}
	case vmm.EventDeleted:
		m.dropLocked(e.VM.ID)
	case vmm.EventSnapshotEnd:
		m.valid = true
	case vmm.EventLagged:
		m.resetLocked()
	}
}

func (m *mirror) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.resetLocked()
}

func (m *mirror) resetLocked() {
	m.valid, m.vms, m.order, m.dirty = false, map[string]*mirrored{}, nil, map[string]bool{}
}

func (m *mirror) putLocked(vm vmm.VM, asked time.Time) {
	old := m.vms[vm.ID]
	if old != nil && (!asked.IsZero() || time.Since(old.asked) < late) && (vm.Generation < old.vm.Generation || vm.Since.Before(old.vm.Since)) {
		return // overtaken by a question, or a question's answer by the watch
	}
	m.vms[vm.ID] = &mirrored{vm: vm, asked: asked}
	m.order = nil
}

// mark notes that these VMs may differ from what the watch has told so far. Ids of other objects do no harm.
func (m *mirror) mark(ids []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.valid {
		return
	}
	for _, id := range ids {
		m.dirty[id] = true
	}
}

// asked is what the mirror asks of the vmm plugin.
type asked interface {
	Get(ctx context.Context, req vmm.Ref) (vmm.VM, error)
	List(ctx context.Context) ([]vmm.VM, error)
}

// settle asks for what is marked: one by one while it is little, else for all. ok is false when the mirror cannot
// tell, and the plugin must be asked for the list.
func (m *mirror) settle(ctx context.Context, plugin asked) (ok bool) {
	m.mu.Lock()
	if !m.valid {
		m.mu.Unlock()
		return false
	}
	dirty := m.dirty
	m.dirty = map[string]bool{}
	m.mu.Unlock()
	if len(dirty) > maxAsk {
		return m.settleAll(ctx, plugin, dirty)
	}
	for id := range dirty {
		at := time.Now()
		vm, err := plugin.Get(ctx, vmm.Ref{Ref: id})
		m.mu.Lock()
		switch {
		case err == nil:
			m.putLocked(vm, at)
		case errs.KindOf(err) == errs.NotFound: // deleted, or not a VM
			m.dropLocked(id)
		default:
			maps.Copy(m.dirty, dirty)
			m.mu.Unlock()
			return false
		}
		m.mu.Unlock()
	}
	return true
}

// settleAll takes in what the plugin lists. What is marked and not in the list is no VM (any more).
func (m *mirror) settleAll(ctx context.Context, plugin asked, dirty map[string]bool) (ok bool) {
	at := time.Now()
	vms, err := plugin.List(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil || !m.valid {
		maps.Copy(m.dirty, dirty)
		return false
	}
	for _, vm := range vms {
		if dirty[vm.ID] {
			m.putLocked(vm, at)
			delete(dirty, vm.ID)
		}
	}
	for id := range dirty {
		m.dropLocked(id)
	}
	return true
}

func (m *mirror) dropLocked(id string) {
	if m.vms[id] != nil {
		delete(m.vms, id)
		m.order = nil
	}
}

// list is all VMs as a list shows them, by name; ok is false when it is not known.
func (m *mirror) list(look names) (out []*apiv1.VM, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.valid {
		return nil, false
	}
	if m.order == nil {
		m.order = make([]*mirrored, 0, len(m.vms))
		for _, v := range m.vms {
			m.order = append(m.order, v)
		}
		slices.SortFunc(m.order, func(a, b *mirrored) int { return strings.Compare(a.vm.Spec.Name, b.vm.Spec.Name) })
	}
	out = make([]*apiv1.VM, len(m.order))
	for i, v := range m.order {
		if v.pb == nil || v.with != look.version {
			v.pb, v.with = convert.VM(v.vm, look, false), look.version
		}
		out[i] = v.pb
	}
	return out, true
}
