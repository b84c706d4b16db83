package api

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// lookupAge bounds how old the names of volumes and NICs in a list of VMs may be. Names, sizes and addresses
// change only by operations of the core, which mark what they touch; age is for what nobody thought of.
const lookupAge = 5 * time.Minute

// joinTime is how long a list waits for names from another plugin.
const joinTime = 2 * time.Second

// lookup keeps volumes and NICs by id, so that a list of VMs needs no call for their names.
type lookup struct {
	s *Server

	mu    sync.Mutex
	now   names // version 0: nothing is known
	at    time.Time
	last  uint64          // the newest version given out
	stale bool            // all is to be asked for again
	dirty map[string]bool // ids to ask for again
	epoch uint64          // grows with each forget and mark
}

// names is what a lookup found; of plugins that are away, what is known from before. It never changes.
type names struct {
	version uint64
	volumes map[string]storage.Volume
	nics    map[string]net.NIC
}

func (n names) Volume(id string) (storage.Volume, bool) { v, ok := n.volumes[id]; return v, ok }
func (n names) NIC(id string) (net.NIC, bool)           { v, ok := n.nics[id]; return v, ok }

var _ convert.Lookup = names{}

// forget makes the next lookup ask for everything again.
func (l *lookup) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stale = true
	l.epoch++
}

// mark makes the next lookup ask for these objects again. Ids of other objects do no harm.
func (l *lookup) mark(ids []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dirty == nil {
		l.dirty = map[string]bool{}
	}
	for _, id := range ids {
		l.dirty[id] = true
	}
	l.epoch++
}

// all gets all names, from memory where nothing has changed. It never waits for a plugin that is down.
func (l *lookup) all(ctx context.Context) names {
	l.mu.Lock()
	old, epoch := l.now, l.epoch
	fresh := old.version != 0 && !l.stale && time.Since(l.at) < lookupAge
	dirty := maps.Clone(l.dirty)
	l.mu.Unlock()
	if fresh && len(dirty) == 0 {
		return old
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	now := old
	var complete bool
	if fresh && len(dirty) <= maxAsk {
		complete = l.some(ctx, &now, dirty)
	} else {
		complete = l.every(ctx, &now)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	now.version = l.last
	if !complete {
		return now // good enough to show, not to keep
	}
	l.now = now
	if epoch == l.epoch { // nothing was marked meanwhile
		l.dirty, l.stale = nil, false
		if !fresh {
			l.at = time.Now()
		}
	}
	return now
}

// every asks for all volumes and NICs, side by side.
func (l *lookup) every(ctx context.Context, n *names) (complete bool) {
	var wg sync.WaitGroup
	var vols []storage.Volume
	var nics []net.NIC
	var err1, err2 error = errs.Unavailable, errs.Unavailable
	if l.s.up(service.KindStorage) {
		wg.Go(func() { vols, err1 = l.s.storage.ListVolumes(ctx) })
	}
	if l.s.up(service.KindNet) {
		wg.Go(func() { nics, err2 = l.s.net.ListNICs(ctx, net.ListNICsRequest{}) })
	}
	wg.Wait()
	if err1 == nil {
		n.volumes = make(map[string]storage.Volume, len(vols))
		for _, v := range vols {
			n.volumes[v.ID] = v
		}
	}
	if err2 == nil {
		n.nics = make(map[string]net.NIC, len(nics))
		for _, v := range nics {
			n.nics[v.ID] = v
		}
	}
	return err1 == nil && err2 == nil
}

// some asks for single objects.
func (l *lookup) some(ctx context.Context, n *names, ids map[string]bool) (complete bool) {
	if !l.s.up(service.KindStorage) || !l.s.up(service.KindNet) {
		return false
	}
	n.volumes, n.nics = maps.Clone(n.volumes), maps.Clone(n.nics)
	for id := range ids {
		v, err := l.s.storage.GetVolume(ctx, storage.Ref{Ref: id})
		if !put(n.volumes, id, v, err) {
			return false
		}
		c, err := l.s.net.GetNIC(ctx, net.Ref{Ref: id})
		if !put(n.nics, id, c, err) {
			return false
		}
	}
	return true
}

func put[T any](m map[string]T, id string, v T, err error) bool {
	switch {
	case err == nil:
		m[id] = v
	case errs.KindOf(err) == errs.NotFound:
		delete(m, id)
	default:
		return false
	}
	return true
}

// of gets the names that one VM needs: from memory, or object by object.
func (l *lookup) of(ctx context.Context, vm vmm.VM) names {
	l.mu.Lock()
	if l.now.version != 0 && !l.stale && len(l.dirty) == 0 && time.Since(l.at) < lookupAge {
		defer l.mu.Unlock()
		return l.now
	}
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	n := names{volumes: map[string]storage.Volume{}, nics: map[string]net.NIC{}}
	if l.s.up(service.KindStorage) {
		for _, d := range vm.Spec.Disks {
			if v, err := l.s.storage.GetVolume(ctx, storage.Ref{Ref: d.VolumeID}); err == nil {
				n.volumes[v.ID] = v
			}
		}
	}
	if l.s.up(service.KindNet) {
		for _, d := range vm.Spec.NICs {
			if v, err := l.s.net.GetNIC(ctx, net.Ref{Ref: d.NICID}); err == nil {
				n.nics[v.ID] = v
			}
		}
	}
	return n
}

// vms lists VMs for the sake of names in other lists; none when the plugin is down.
func (l *lookup) vms(ctx context.Context) []vmm.VM {
	if !l.s.up(service.KindVMM) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	vms, err := l.s.vmm.List(ctx)
	if err != nil {
		return nil
	}
	return vms
}
