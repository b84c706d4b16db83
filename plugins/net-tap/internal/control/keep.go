package control

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/store"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// Start limits of a worker that keeps dying: the first deaths are answered at once, then it waits.
const (
	deathWindow = 30 * time.Second
	deathsFree  = 3
	restartMax  = 5 * time.Second
	retryWait   = time.Second // after a failure that is no death
)

// kick asks keep to look after the network.
func (rt *runtime) kick() {
	select {
	case rt.kicked <- struct{}{}:
	default:
	}
}

// keep brings a worker back when it has died, and repairs the network when it is kicked.
func (rt *runtime) keep() {
	defer rt.s.wg.Done()
	var retry <-chan time.Time
	for {
		select {
		case <-rt.s.ctx.Done():
			return
		case <-rt.kicked:
		case <-retry:
		}
		rt.mu.Lock()
		if rt.gone {
			rt.mu.Unlock()
			return
		}
		retry = nil
		if wait := rt.look(); wait > 0 {
			retry = time.After(wait)
		}
		rt.mu.Unlock()
	}
}

// look repairs once; it returns how long to wait before the next try, or 0 if all is well. rt.mu is held.
func (rt *runtime) look() time.Duration {
	began := time.Now()
	dead := false
	if c := rt.client.Load(); c == nil {
		dead = true
	} else {
		select {
		case <-c.Done():
			dead = true
			rt.client.Store(nil)
			rt.pid.Store(0)
			rt.deaths = append(rt.deaths, began)
			if wait := rt.backoff(began); wait > 0 {
				rt.s.raise("WORKER_DOWN", rt.id, service.SeverityCritical,
					errs.New(errs.Unavailable, "the packet worker keeps dying, the next start is in %v; %s", wait, lastLine(rt.logPath())))
				return wait
			}
		default:
		}
	}
	if err := rt.ensure(); err != nil {
		rt.s.raise("NETWORK_BROKEN", rt.id, service.SeverityCritical, err)
		return retryWait
	}
	rt.s.clear("NETWORK_BROKEN", rt.id)
	rt.s.clear("WORKER_DOWN", rt.id)
	if dead {
		rt.s.log.Warn("the network works again", "network", rt.id, "worker", rt.pid.Load(), "took", time.Since(began))
	}
	return 0
}

// backoff says how long to wait before the next start of a worker.
func (rt *runtime) backoff(now time.Time) time.Duration {
	rt.deaths = slices.DeleteFunc(rt.deaths, func(d time.Time) bool { return now.Sub(d) > deathWindow })
	n := len(rt.deaths) - deathsFree
	if n <= 0 {
		return 0
	}
	return min(restartMax, 100*time.Millisecond<<min(n, 10))
}

// startLimit is how many networks are brought back at a time.
const startLimit = 4

// start brings everything back in the background; calls about a network wait for it.
func (s *Service) start() {
	for _, d := range s.data.Damaged {
		s.raise("METADATA_DAMAGED", "", service.SeverityCritical, errs.New(errs.Corrupt, "%s", d).
			Do("restore metadata.db from a backup"))
	}
	for id, n := range s.data.NICs { // a NIC without its network cannot be used
		if s.data.Networks[n.NetworkID] == nil {
			s.raise("METADATA_DAMAGED", id, service.SeverityCritical, errs.New(errs.Corrupt, "NIC %s is on a network that is not there", n.Name).
				Do("restore metadata.db from a backup"))
			delete(s.data.NICs, id)
		}
	}
	slots := make(chan struct{}, startLimit)
	done := make(chan struct{}, len(s.data.Networks))
	recs := values(s.data.Networks)
	for _, rec := range recs {
		rt := s.newRuntime(rec.Request.ID)
		s.nets[rt.id] = rt
		rt.mu.Lock()
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			defer func() { done <- struct{}{} }()
			defer rt.mu.Unlock()
			slots <- struct{}{}
			defer func() { <-slots }()
			s.bringBack(rt, rec)
		}()
	}
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		for range recs {
			<-done
		}
		if err := s.sweep(); err != nil {
			s.log.Error("sweep of leftovers", "error", err)
		}
		s.tick()
	}()
}

func (s *Service) bringBack(rt *runtime, rec *netRec) {
	if rec.Deleting {
		if err := s.removeNetwork(rt, rec); err != nil {
			s.raise("NETWORK_BROKEN", rt.id, service.SeverityCritical, errs.Wrap(errs.Internal, err, "finish the deletion"))
		}
		return
	}
	if wait := rt.look(); wait > 0 {
		rt.kick()
	}
}

// sweep removes what is ours and nobody asks for: the leftovers of a crash or of lost metadata.
func (s *Service) sweep() error {
	s.mu.Lock()
	ns, links, socks := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for id, n := range s.data.Networks {
		ns[n.NS], links[n.HostLink], socks[id[24:]+".sock"] = true, true, true
	}
	for _, n := range s.data.NICs {
		if n.Attach != nil {
			links[legName(n)] = true
		}
	}
	s.mu.Unlock()
	var all []error
	ents, err := os.ReadDir(s.workerDir())
	all = append(all, err)
	for _, e := range ents {
		if !socks[e.Name()] && strings.HasSuffix(e.Name(), ".sock") {
			s.log.Info("sweeping a packet worker", "socket", e.Name())
			path := filepath.Join(s.workerDir(), e.Name())
			if fd, err := wctl.Dial(path); err == nil {
				if cred, err := wctl.PeerCred(fd); err == nil {
					s.killPeer(fd, int(cred.Pid))
				}
				unix.Close(fd)
			}
			all = append(all, os.Remove(path))
		}
	}
	all = append(all, s.sweepSockets())
	if s.priv != nil {
		return errors.Join(all...)
	}
	have, err := s.instance.OurNS()
	all = append(all, err)
	for _, n := range have {
		if !ns[n] {
			s.log.Info("sweeping a namespace", "name", n)
			all = append(all, hostnet.DeleteNS(n))
		}
	}
	haveLinks, err := s.instance.HostLinks()
	all = append(all, err)
	for _, l := range haveLinks {
		if !links[l] {
			s.log.Info("sweeping a link", "name", l)
			all = append(all, s.instance.DeleteHostLink(l))
		}
	}
	return errors.Join(append(all, s.applyHost())...)
}

// sweepSockets removes sockets of NICs that are not attached by one.
func (s *Service) sweepSockets() error {
	ents, err := os.ReadDir(s.cfg.SocketDir)
	all := []error{err}
	for _, e := range ents {
		id, ok := strings.CutSuffix(strings.TrimSuffix(e.Name(), ".new"), ".sock")
		if !ok || ident.CheckID("id", id) != nil {
			continue // somebody else's
		}
		s.mu.Lock()
		n := s.data.NICs[id]
		s.mu.Unlock()
		if n == nil || n.Attach == nil || n.Attach.Mode != net.AttachVhostUser || strings.HasSuffix(e.Name(), ".new") {
			all = append(all, os.Remove(filepath.Join(s.cfg.SocketDir, e.Name())))
		}
	}
	return errors.Join(all...)
}

// tick looks over the host's state until the service stops: others reload firewalls and delete links.
func (s *Service) tick() {
	t := time.NewTicker(s.cfg.Tick)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		if s.priv != nil {
			continue
		}
		if err := s.applyHost(); err != nil {
			s.raise("HOST_RULES", "", service.SeverityCritical, err)
		} else {
			s.clear("HOST_RULES", "")
		}
		links, err := s.instance.HostLinks()
		if err != nil {
			continue
		}
		s.mu.Lock()
		for _, n := range s.data.NICs {
			rec, rt := s.data.Networks[n.NetworkID], s.nets[n.NetworkID]
			if n.Attach != nil && rec != nil && rec.Request.Mode == net.ModeBridge && rt != nil && !slices.Contains(links, legName(n)) {
				rt.kick()
			}
		}
		for id, n := range s.data.Networks {
			if n.HostLink != "" && !n.Deleting && !slices.Contains(links, n.HostLink) && s.nets[id] != nil {
				s.nets[id].kick()
			}
		}
		s.mu.Unlock()
	}
}

// applyHost makes the host's ruleset and forwarding fit the nat networks. It is cheap when they do.
func (s *Service) applyHost() error {
	if s.priv != nil {
		return nil
	}
	s.hostMu.Lock()
	defer s.hostMu.Unlock()
	s.mu.Lock()
	var links []string
	any4, any6 := false, false
	for _, n := range s.data.Networks {
		if n.Request.Mode == net.ModeNAT {
			links = append(links, n.HostLink)
			any4, any6 = any4 || n.Request.Subnet4.IsValid(), any6 || n.Request.Subnet6.IsValid()
		}
	}
	mine := s.data.State.Forwarding
	s.mu.Unlock()
	want, err := hostnet.Forwarding(mine, any4, any6)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "look at the host's forwarding")
	}
	if !mine.Equal(want) {
		s.mu.Lock()
		st := store.State{Forwarding: want}
		err := s.commitLocked(func() { s.data.State = st }, store.PutState(st))
		s.mu.Unlock()
		if err != nil {
			return err
		}
	}
	rules := hostnet.HostRules(s.instance, links, s.cfg.LinkPrefix, want)
	there, err := hostnet.HasHostRules(s.instance)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "look at the host's packet filter")
	}
	if rules != s.hostRules || there != (len(links) > 0) {
		if len(links) > 0 || there {
			if err := hostnet.ApplyNFT(rules); err != nil {
				return nftError(err)
			}
		}
		s.hostRules = rules
	}
	return errs.Wrap(errs.Internal, want.TurnOn(), "turn forwarding on")
}
