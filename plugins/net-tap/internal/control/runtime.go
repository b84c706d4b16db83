package control

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

// callWait bounds a question to a worker. It answers from memory; one that takes longer hangs and is
// replaced.
const callWait = 3 * time.Second

// runtime is what exists of one network: its namespace, its worker, its TAPs.
type runtime struct {
	s      *Service
	id     string
	pid    atomic.Uint32
	client atomic.Pointer[wctl.Client]
	kicked chan struct{} // wakes keep

	mu        sync.Mutex
	ns        *hostnet.NS
	taps      map[string][]*os.File // queues of attached NICs, kept to be given again
	listeners map[string]*os.File   // vhost-user sockets of attached NICs, kept for the next worker
	gone      bool                  // deleted, or the service stops
	sessions  map[string]*session   // of vhost-user front-ends, for the next worker
	flows     *os.File              // the flow table, which outlives a worker
	deaths    []time.Time           // of the worker, the recent ones
}

// newRuntime makes a network's runtime and starts what keeps it.
func (s *Service) newRuntime(id string) *runtime {
	rt := &runtime{s: s, id: id, taps: map[string][]*os.File{}, listeners: map[string]*os.File{}, sessions: map[string]*session{}, kicked: make(chan struct{}, 1)}
	s.wg.Add(1)
	go rt.keep()
	return rt
}

// records returns the network's record and its NICs'.
func (rt *runtime) records() (*netRec, []*nicRec) {
	rt.s.mu.Lock()
	defer rt.s.mu.Unlock()
	var nics []*nicRec
	for _, n := range rt.s.data.NICs {
		if n.NetworkID == rt.id {
			nics = append(nics, n)
		}
	}
	return rt.s.data.Networks[rt.id], nics
}

// ensure makes everything of the network as it should be: worker, namespace, uplink, TAPs. rt.mu is held.
func (rt *runtime) ensure() error {
	rec, nics := rt.records()
	if rec == nil || rt.gone {
		return errs.New(errs.NotFound, "the network is gone")
	}
	hello, err := rt.ensureWorker()
	if err != nil {
		return errs.Wrap(errs.Internal, err, "start the packet worker")
	}
	if err := rt.call(wctl.Request{Op: wctl.OpNetwork, Network: rt.s.engineNetwork(rec)}); err != nil {
		return err
	}
	if err := rt.ensureFlows(hello.Flows); err != nil {
		return err
	}
	if err := rt.sendGroups(nics); err != nil {
		return err
	}
	known, err := rt.status("")
	if err != nil {
		return err
	}
	for _, n := range nics {
		if err := rt.call(wctl.Request{Op: wctl.OpNIC, NIC: engineNIC(n)}); err != nil {
			return err
		}
		if n.Attach != nil && known[n.ID] != nil && known[n.ID].Attached {
			continue
		}
		delete(known, n.ID)
	}
	for id := range known { // attached ones that stay, and strangers
		if !has(nics, id) {
			if err := rt.call(wctl.Request{Op: wctl.OpDeleteNIC, ID: id}); err != nil {
				return err
			}
		}
	}
	if rec.Request.Mode == net.ModeNAT {
		if err := rt.ensureUplink(rec, hello.Uplink); err != nil {
			return err
		}
	}
	for _, n := range nics {
		if n.Attach == nil {
			continue
		}
		live := known[n.ID] != nil
		err := rt.ensureAttached(n, &rec.Request, live)
		if err == nil && rec.Request.Mode == net.ModeBridge {
			err = rt.ensureLeg(n, &rec.Request, live)
		}
		if err != nil {
			rt.s.raise("NIC_BROKEN", n.ID, service.SeverityWarning, err)
			continue
		}
		rt.s.clear("NIC_BROKEN", n.ID)
	}
	return rt.sweepTAPs(nics)
}

func has(nics []*nicRec, id string) bool {
	for _, n := range nics {
		if n.ID == id {
			return true
		}
	}
	return false
}

// engineNetwork is what the worker is told about the network.
func (s *Service) engineNetwork(rec *netRec) *engine.Network {
	r := &rec.Request
	n := &engine.Network{Bridged: r.Mode == net.ModeBridge, Subnet4: r.Subnet4, Subnet6: r.Subnet6, MTU: int(r.MTU), DNS: r.DNS, NTP: r.NTP, Domain: r.Domain}
	if r.HostAccess && rec.Link4.IsValid() {
		u := uplinkOf(rec)
		n.HostAddrs = append(n.HostAddrs, u.HostAddr4(), u.HostAddr6())
	}
	return n
}

// ensureNS opens the network's namespace.
func (rt *runtime) ensureNS() error {
	if rt.s.priv != nil {
		return rt.s.priv
	}
	if rt.ns != nil {
		return nil
	}
	rec, _ := rt.records()
	ns, err := rt.s.instance.EnsureNS(rec.NS)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "network namespace")
	}
	if rec.Request.Mode != net.ModeNAT {
		if err := ns.ApplyNFT(hostnet.PrivateRules()); err != nil {
			ns.Close()
			return nftError(err)
		}
	}
	rt.ns = ns
	return nil
}

func nftError(err error) error {
	if errors.Is(err, hostnet.ErrNoNFT) {
		return errs.New(errs.Precondition, "%v", err).Do("install nftables")
	}
	return errs.Wrap(errs.Internal, err, "load the packet filter")
}

func uplinkOf(rec *netRec) hostnet.Uplink {
	return hostnet.Uplink{ID: rec.Request.ID, HostLink: rec.HostLink, Link4: rec.Link4, Subnet4: rec.Request.Subnet4, Subnet6: rec.Request.Subnet6,
		MTU: int(rec.Request.MTU), Host: rec.Request.HostAccess}
}

// ensureUplink joins a nat network to the host; the host's protection is in place before the link.
func (rt *runtime) ensureUplink(rec *netRec, attached bool) error {
	if err := rt.ensureNS(); err != nil {
		return err
	}
	if err := rt.s.applyHost(); err != nil {
		return err
	}
	u := uplinkOf(rec)
	if attached && rt.ns.HasLink(hostnet.UplinkTUN) {
		if err := rt.ns.RepairUplink(rt.s.instance, u); err != nil {
			return nftError(err)
		}
		return rt.hostRoute(u)
	}
	tun, err := rt.ns.EnsureUplink(rt.s.instance, u)
	// A worker that was killed a moment ago may still be closing its own.
	for end := time.Now().Add(callWait); errors.Is(err, unix.EBUSY) && time.Now().Before(end); {
		time.Sleep(2 * time.Millisecond)
		tun, err = rt.ns.EnsureUplink(rt.s.instance, u)
	}
	if err != nil {
		return nftError(err)
	}
	defer tun.Close()
	if err := rt.call(wctl.Request{Op: wctl.OpUplink}, int(tun.Fd())); err != nil {
		return err
	}
	return rt.hostRoute(u)
}

// hostRoute lets the host reach the NICs, if that is wanted and nothing else has the subnet.
func (rt *runtime) hostRoute(u hostnet.Uplink) error {
	err := hostnet.HostRoute(u, u.Host)
	if errors.Is(err, hostnet.ErrCollision) {
		rt.s.raise("HOST_ROUTE_COLLISION", rt.id, service.SeverityWarning,
			errs.Wrap(errs.Precondition, err, "the host cannot reach the NICs of this network").(*errs.Error).
				Do("use another subnet for the network, or turn its host access off"))
		return nil
	}
	if err == nil {
		rt.s.clear("HOST_ROUTE_COLLISION", rt.id)
	}
	return errs.Wrap(errs.Internal, err, "the host's route to %s %s", u.Subnet4, u.Subnet6)
}

// ensureAttached makes an attached NIC's data path whole. live says that the worker has its port.
func (rt *runtime) ensureAttached(n *nicRec, r *net.CreateNetworkRequest, live bool) error {
	if n.Attach.Mode == net.AttachVhostUser {
		switch {
		case !exists(rt.s.vhostPath(n.ID)): // a reboot, or somebody removed it
			rt.closeListener(n.ID)
			return rt.vhost(n, r)
		case live && rt.listeners[n.ID] == nil: // an earlier control plane made it
			return rt.fetch(n.ID, func(fds []int) {
				if len(fds) == 1 {
					rt.listeners[n.ID] = os.NewFile(uintptr(fds[0]), rt.s.vhostPath(n.ID))
					rt.fetchSession(n.ID)
					return
				}
				wctl.CloseAll(fds)
			})
		case live:
			return nil
		case rt.listeners[n.ID] == nil: // nobody has it any more
			return rt.vhost(n, r)
		}
		if err := rt.connectVhost(n, r); err != nil {
			return err
		}
		rt.resume(n.ID)
		return nil
	}
	if err := rt.ensureNS(); err != nil {
		return err
	}
	if live && rt.ns.HasLink(n.IfName) {
		if len(rt.taps[n.ID]) == 0 { // an earlier control plane opened them: the worker kept them for us
			return rt.fetch(n.ID, func(fds []int) {
				for _, fd := range fds {
					rt.taps[n.ID] = append(rt.taps[n.ID], os.NewFile(uintptr(fd), "/dev/net/tun"))
				}
			})
		}
		return nil
	}
	if !rt.ns.HasLink(n.IfName) {
		rt.closeTAP(n.ID)
	}
	if len(rt.taps[n.ID]) == 0 {
		if _, err := rt.tap(n, r); err != nil && errs.ReasonOf(err) != "NIC_IN_USE" {
			return err
		} // in use is fine here: a hypervisor has the device, the engine needs only its own side
	}
	return rt.connect(n)
}

// legName is the name of a NIC's veth pair to the host's bridge: as unique as its TAP's.
func legName(n *nicRec) string { return legPrefix + n.IfName[len(tapPrefix):] }

// ensureLeg joins a NIC to the host's bridge. live says that the worker has its port on it.
func (rt *runtime) ensureLeg(n *nicRec, r *net.CreateNetworkRequest, live bool) error {
	if err := rt.ensureNS(); err != nil {
		return err
	}
	name := legName(n)
	live = live && rt.ns.HasLink(name)
	if err := rt.ns.EnsureLeg(rt.s.instance, name, n.ID, r.Bridge, int(r.MTU)); err != nil {
		return errs.Wrap(errs.Internal, err, "join the bridge")
	}
	if live {
		return nil
	}
	fd, err := rt.ns.PacketSocket(name)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "packet socket on %s", name)
	}
	defer unix.Close(fd)
	return rt.call(wctl.Request{Op: wctl.OpLeg, ID: n.ID}, fd)
}

// fetch gets the descriptors that the worker keeps for a NIC.
func (rt *runtime) fetch(id string, use func(fds []int)) error {
	_, fds, err := rt.ask(wctl.Request{Op: wctl.OpFDs, ID: id})
	if err == nil {
		use(fds)
	}
	return err
}

// sweepTAPs removes TAPs of ours that no record asks for.
func (rt *runtime) sweepTAPs(nics []*nicRec) error {
	if rt.ns == nil {
		return nil
	}
	taps, err := rt.ns.TAPs(rt.s.instance)
	if err != nil {
		return err
	}
	want := map[string]bool{}
	for _, n := range nics {
		want[n.IfName] = n.Attach != nil && n.Attach.Mode == net.AttachTAPFD
	}
	for _, t := range taps {
		if !want[t] {
			rt.s.log.Info("sweeping a TAP", "network", rt.id, "interface", t)
			if err := rt.ns.DeleteLink(t); err != nil {
				return err
			}
		}
	}
	return nil
}

// pushNIC tells the worker about a NIC; a worker that is gone learns it when it is back.
func (rt *runtime) pushNIC(rec *nicRec) {
	if err := rt.sendGroups([]*nicRec{rec}); err != nil {
		rt.s.log.Warn("packet worker", "network", rt.id, "error", err)
	}
	rt.push(wctl.Request{Op: wctl.OpNIC, NIC: engineNIC(rec)})
}

func (rt *runtime) push(req wctl.Request) {
	if err := rt.call(req); err != nil && !rt.gone {
		rt.s.log.Warn("packet worker", "network", rt.id, "operation", req.Op, "error", err)
	}
}

func (rt *runtime) call(req wctl.Request, fds ...int) error {
	_, got, err := rt.ask(req, fds...)
	wctl.CloseAll(got)
	return err
}

// ask is safe without rt.mu.
func (rt *runtime) ask(req wctl.Request, fds ...int) (wctl.Reply, []int, error) {
	c := rt.client.Load()
	if c == nil {
		return wctl.Reply{}, nil, errs.Wrap(errs.Unavailable, wctl.ErrGone, "")
	}
	rep, got, err := c.Call(req, fds...)
	if errors.Is(err, wctl.ErrGone) {
		select {
		case <-c.Done():
		default:
			rt.killWorker() // it hangs; its watcher starts another
		}
		err = errs.Wrap(errs.Unavailable, err, "")
	}
	return rep, got, err
}

// status asks the worker about one NIC, or all.
func (rt *runtime) status(id string) (map[string]*wctl.NICStatus, error) {
	out := map[string]*wctl.NICStatus{}
	req := wctl.Request{Op: wctl.OpStatus, ID: id}
	if id != "" {
		req.Op = wctl.OpNICStatus
	}
	for {
		rep, fds, err := rt.ask(req)
		wctl.CloseAll(fds)
		if err != nil {
			return nil, err
		}
		for i := range rep.NICs {
			out[rep.NICs[i].ID] = &rep.NICs[i]
		}
		if !rep.More || len(rep.NICs) == 0 {
			return out, nil
		}
		req.ID = rep.NICs[len(rep.NICs)-1].ID
	}
}

// letGo closes what the control plane holds; what the kernel and the worker have stays. rt.mu is held.
func (rt *runtime) letGo() {
	rt.gone = true
	rt.kick() // ends keep
	if c := rt.client.Swap(nil); c != nil {
		c.Close()
	}
	for id := range rt.taps {
		rt.closeTAP(id)
	}
	for id := range rt.listeners {
		rt.closeListener(id)
	}
	for id := range rt.sessions {
		rt.closeSession(id)
	}
	if rt.flows != nil {
		rt.flows.Close()
		rt.flows = nil
	}
	if rt.ns != nil {
		rt.ns.Close()
		rt.ns = nil
	}
}

// event hears from the worker.
func (rt *runtime) event(ev wctl.Event) {
	switch ev.Type {
	case "trouble":
		rt.s.raise("NIC_TROUBLE", ev.ID, service.SeverityWarning, fmt.Errorf("%s", ev.Text))
		_ = rt.s.cfg.Host.Publish(rt.s.ctx, service.Event{Time: time.Now(), Type: "nic.error", Objects: []string{ev.ID},
			Labels: map[string]string{"reason": ev.Text}})
	case "fine":
		rt.s.clear("NIC_TROUBLE", ev.ID)
	case "session":
		rt.s.wg.Add(1)
		go func() { // the caller reads the answers
			defer rt.s.wg.Done()
			rt.mu.Lock()
			defer rt.mu.Unlock()
			if !rt.gone {
				rt.fetchSession(ev.ID)
			}
		}()
	}
}
