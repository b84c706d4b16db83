package api

import (
	"context"
	"sync"
	"time"

	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// lookupAge bounds how old the names of volumes and NICs in a list of VMs may be. The core forgets them at
// each change that it makes itself, so age matters only for what happens elsewhere.
const lookupAge = 30 * time.Second

// joinTime is how long a list waits for names from another plugin.
const joinTime = 2 * time.Second

// lookup keeps volumes and NICs by id, so that a list of VMs needs one call to one plugin.
type lookup struct {
	s *Server

	mu      sync.Mutex
	version uint64 // grows when something is forgotten
	at      time.Time
	filled  uint64 // version that the maps are of
	volumes map[string]storage.Volume
	nics    map[string]net.NIC
}

// names is what a lookup found; missing plugins leave it empty.
type names struct {
	volumes map[string]storage.Volume
	nics    map[string]net.NIC
}

func (n names) Volume(id string) (storage.Volume, bool) { v, ok := n.volumes[id]; return v, ok }
func (n names) NIC(id string) (net.NIC, bool)           { v, ok := n.nics[id]; return v, ok }

var _ convert.Lookup = names{}

// forget makes the next lookup ask again.
func (l *lookup) forget() {
	l.mu.Lock()
	l.version++
	l.mu.Unlock()
}

// all gets all names, from memory if nothing has changed. It never waits for a plugin that is down.
func (l *lookup) all(ctx context.Context) names {
	l.mu.Lock()
	version := l.version
	if l.filled == version && l.volumes != nil && time.Since(l.at) < lookupAge {
		n := names{l.volumes, l.nics}
		l.mu.Unlock()
		return n
	}
	old := names{l.volumes, l.nics}
	l.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	var wg sync.WaitGroup
	fresh := names{}
	complete := true
	var vols []storage.Volume
	var nics []net.NIC
	var verr, nerr error
	if l.s.up(service.KindStorage) {
		wg.Go(func() { vols, verr = l.s.storage.ListVolumes(ctx) })
	} else {
		complete, fresh.volumes = false, old.volumes
	}
	if l.s.up(service.KindNet) {
		wg.Go(func() { nics, nerr = l.s.net.ListNICs(ctx, net.ListNICsRequest{}) })
	} else {
		complete, fresh.nics = false, old.nics
	}
	wg.Wait()
	if verr != nil {
		complete, fresh.volumes = false, old.volumes
	}
	if nerr != nil {
		complete, fresh.nics = false, old.nics
	}
	if fresh.volumes == nil {
		fresh.volumes = make(map[string]storage.Volume, len(vols))
		for _, v := range vols {
			fresh.volumes[v.ID] = v
		}
	}
	if fresh.nics == nil {
		fresh.nics = make(map[string]net.NIC, len(nics))
		for _, n := range nics {
			fresh.nics[n.ID] = n
		}
	}
	if complete {
		l.mu.Lock()
		if version == l.version {
			l.volumes, l.nics, l.filled, l.at = fresh.volumes, fresh.nics, version, time.Now()
		}
		l.mu.Unlock()
	}
	return fresh
}

// some gets the names that one VM needs: from memory, or object by object.
func (l *lookup) some(ctx context.Context, vm vmm.VM) names {
	l.mu.Lock()
	if l.filled == l.version && l.volumes != nil && time.Since(l.at) < lookupAge {
		n := names{l.volumes, l.nics}
		l.mu.Unlock()
		return n
	}
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	n := names{map[string]storage.Volume{}, map[string]net.NIC{}}
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
