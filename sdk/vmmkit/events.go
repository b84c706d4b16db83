package vmmkit

import (
	"context"
	"sort"
	"sync"

	"github.com/mvirt/mvirt/sdk/vmm"
)

// queueLength is how many events a watcher may lag behind. Each is a VM, so this bounds its memory.
const queueLength = 1024

// hub hands events to watchers. Views of VMs are published under its lock, so that a snapshot and the events
// after it fit without gap or overlap.
type hub struct {
	mu     sync.Mutex // guards what follows, and every machine's publishing
	subs   map[*sub]bool
	closed bool
}

// sub is one watcher.
type sub struct {
	queue  []vmm.Event
	lagged bool
	news   chan struct{} // capacity 1
}

func newHub() *hub { return &hub{subs: map[*sub]bool{}} }

func (h *hub) sendLocked(e vmm.Event) {
	for s := range h.subs {
		if len(s.queue) >= queueLength {
			s.queue, s.lagged = nil, true
		}
		if !s.lagged {
			s.queue = append(s.queue, e)
		}
		select {
		case s.news <- struct{}{}:
		default:
		}
	}
}

// watched tells whether anybody watches.
func (h *hub) watched() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs) > 0
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for s := range h.subs {
		select {
		case s.news <- struct{}{}:
		default:
		}
	}
}

// Watch gives all VMs as they are, then each change.
func (m *Manager) Watch(ctx context.Context, fn func(vmm.Event) error) error {
	s := &sub{news: make(chan struct{}, 1), lagged: true}
	h := m.hub
	h.mu.Lock()
	h.subs[s] = true
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.subs, s)
		h.mu.Unlock()
	}()
	for first := true; ; {
		h.mu.Lock()
		if h.closed {
			h.mu.Unlock()
			return errClosing()
		}
		batch, lagged := s.queue, s.lagged
		s.queue = nil
		if lagged {
			s.lagged = false
			batch = m.snapshotLocked(first)
			first = false
		}
		h.mu.Unlock()
		for _, e := range batch {
			if err := fn(e); err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-s.news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// snapshotLocked makes the events that say how all is now; hub.mu is held, so nothing is published meanwhile.
func (m *Manager) snapshotLocked(first bool) []vmm.Event {
	now := m.o.Now()
	var batch []vmm.Event
	if !first {
		batch = append(batch, vmm.Event{Type: vmm.EventLagged, Time: now})
	}
	m.mu.RLock()
	var vms []vmm.VM
	for _, v := range m.byID {
		vms = append(vms, v.now())
	}
	m.mu.RUnlock()
	sort.Slice(vms, func(i, j int) bool { return vms[i].Spec.Name < vms[j].Spec.Name })
	for _, vm := range vms {
		batch = append(batch, vmm.Event{Type: vmm.EventSnapshot, Time: now, VM: vm})
	}
	return append(batch, vmm.Event{Type: vmm.EventSnapshotEnd, Time: now})
}
