package control

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/store"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhost"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wire"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
)

// maxQueues bounds queue pairs: the kernel's limit for a TAP is 256, a guest has no use for more than it
// has vCPUs, and one packet worker serves them all.
const maxQueues = 16

// Attach implements net.Service.
func (s *Service) Attach(_ context.Context, req net.AttachRequest) (net.Attachment, error) {
	if req.Owner.VMID == "" {
		return net.Attachment{}, errs.Field("owner", "say which VM attaches", "the owner has no VM id")
	}
	req.Queues = max(req.Queues, 1)
	if req.Queues > maxQueues {
		return net.Attachment{}, errs.Field("queues", "ask for at most 16", "%d queue pairs are too many", req.Queues)
	}
	mode := net.AttachMode(0)
	for _, m := range req.Modes {
		if m == net.AttachTAPFD || m == net.AttachVhostUser {
			mode = m
			break
		}
	}
	if mode == 0 {
		return net.Attachment{}, errs.New(errs.Unsupported, "none of the attach modes asked for is possible").
			Do("use a hypervisor driver that takes vhost-user sockets or TAP descriptors")
	}
	if mode == net.AttachTAPFD && s.priv != nil { // a vhost-user NIC on a private network needs nothing
		return net.Attachment{}, s.priv
	}
	s.mu.Lock()
	rec := s.nicLocked(req.NICID)
	var rt *runtime
	if rec != nil {
		rt = s.nets[rec.NetworkID]
	}
	s.mu.Unlock()
	if rec == nil {
		return net.Attachment{}, notFound("nic", req.NICID)
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	return s.attach(rt, rec.ID, mode, &req)
}

// attach attaches with rt.mu held.
func (s *Service) attach(rt *runtime, id string, mode net.AttachMode, req *net.AttachRequest) (net.Attachment, error) {
	s.mu.Lock()
	rec, n := s.data.NICs[id], s.data.Networks[rt.id]
	if rec == nil || n == nil {
		s.mu.Unlock()
		return net.Attachment{}, notFound("nic", req.NICID)
	}
	fresh := rec.Attach == nil
	if a := rec.Attach; a != nil && a.VMID != req.Owner.VMID {
		s.mu.Unlock()
		return net.Attachment{}, errs.New(errs.Precondition, "it is attached to VM %s", a.VMID).With(resNIC(rec)).
			Because("NIC_IN_USE").Do("stop that VM or detach the NIC first")
	}
	next := *rec
	next.Attach = &store.Attach{VMID: req.Owner.VMID, UID: req.Owner.UID, GID: req.Owner.GID, Mode: mode, Queues: req.Queues}
	replace := !fresh && *rec.Attach != *next.Attach
	// Recorded before it is made: a crash in between is finished at the next start, and undone by Detach.
	err := s.commitLocked(func() { s.data.NICs[id] = &next }, store.PutNIC(&next))
	s.mu.Unlock()
	if err != nil {
		return net.Attachment{}, err
	}
	if replace { // another kind, owner or number of queues is another device
		rt.dropPath(rec)
	}
	if mode == net.AttachVhostUser {
		err = rt.vhost(&next, &n.Request)
	} else if _, err = rt.tap(&next, &n.Request); err == nil {
		err = rt.connect(&next)
	}
	if err == nil && n.Request.Mode == net.ModeBridge {
		err = rt.ensureLeg(&next, &n.Request, !fresh && !replace)
	}
	if err != nil {
		if fresh {
			err = errors.Join(err, s.unattach(rt, &next))
		}
		return net.Attachment{}, &errs.Error{Op: "net.Attach", Resource: resNIC(rec), Kind: errs.KindOf(err), Err: err}
	}
	att := net.Attachment{Mode: mode, MAC: rec.MAC, MTU: n.Request.MTU, Queues: req.Queues}
	if mode == net.AttachVhostUser {
		att.SocketPath = s.vhostPath(id)
		return att, nil
	}
	for _, q := range rt.taps[id] {
		fd, err := unix.FcntlInt(q.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			for _, f := range att.TAP {
				f.Close()
			}
			return net.Attachment{}, errs.Wrap(errs.Unknown, err, "duplicate the TAP's descriptor")
		}
		att.TAP = append(att.TAP, os.NewFile(uintptr(fd), "/dev/net/tun"))
	}
	return att, nil
}

// Detach implements net.Service.
func (s *Service) Detach(_ context.Context, req net.DetachRequest) error {
	s.mu.Lock()
	rec := s.nicLocked(req.NICID)
	if rec == nil {
		s.mu.Unlock()
		return nil
	}
	rt := s.nets[rec.NetworkID]
	s.mu.Unlock()
	rt.mu.Lock()
	defer rt.mu.Unlock()
	s.mu.Lock()
	rec = s.data.NICs[rec.ID]
	s.mu.Unlock()
	if rec == nil || rec.Attach == nil || rec.Attach.VMID != req.VMID {
		return nil // that VM's attachment is gone already
	}
	return s.unattach(rt, rec)
}

// unattach takes a data path down and forgets it, with rt.mu held.
func (s *Service) unattach(rt *runtime, rec *nicRec) error {
	rt.dropPath(rec)
	next := *rec
	next.Attach = nil
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.commitLocked(func() { s.data.NICs[rec.ID] = &next }, store.PutNIC(&next))
}

// tap returns a NIC's TAP queues, the ones held or opened anew.
func (rt *runtime) tap(rec *nicRec, n *net.CreateNetworkRequest) ([]*os.File, error) {
	if q := rt.taps[rec.ID]; len(q) > 0 && rt.ns.HasLink(rec.IfName) {
		return q, nil
	}
	if err := rt.ensureNS(); err != nil {
		return nil, err
	}
	t := hostnet.TAP{Name: rec.IfName, Alias: rt.s.instance.Alias("nic", rec.ID), MTU: int(n.MTU), Queues: int(rec.Attach.Queues)}
	queues, err := rt.ns.OpenTAP(t)
	if errors.Is(err, unix.EINVAL) { // one with another number of queues is left
		if err = rt.ns.DeleteLink(rec.IfName); err == nil {
			queues, err = rt.ns.OpenTAP(t)
		}
	}
	if errors.Is(err, unix.EBUSY) {
		return nil, errs.New(errs.Precondition, "a hypervisor still holds TAP %s", rec.IfName).Because("NIC_IN_USE").
			Do("stop the VM's hypervisor, or detach the NIC")
	}
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err, "make TAP %s", rec.IfName)
	}
	rt.closeTAP(rec.ID)
	rt.taps[rec.ID] = queues
	return queues, nil
}

// connect gives the worker its side of a NIC's TAP.
func (rt *runtime) connect(rec *nicRec) error {
	fd, err := rt.ns.PacketSocket(rec.IfName)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "packet socket on %s", rec.IfName)
	}
	defer unix.Close(fd)
	fds := []int{fd}
	for _, q := range rt.taps[rec.ID] {
		fds = append(fds, int(q.Fd()))
	}
	return rt.call(wctl.Request{Op: wctl.OpAttachTAP, ID: rec.ID, Sockets: 1}, fds...)
}

// vhostPath is where a NIC's vhost-user socket is.
func (s *Service) vhostPath(id string) string { return filepath.Join(s.cfg.SocketDir, id+".sock") }

// vhost makes a NIC's vhost-user socket and gives it to the worker. One that there is stays: the front-end
// that is connected to it notices nothing.
func (rt *runtime) vhost(rec *nicRec, n *net.CreateNetworkRequest) error {
	path := rt.s.vhostPath(rec.ID)
	if rt.listeners[rec.ID] != nil && exists(path) {
		return nil
	}
	fd, err := wctl.ListenStream(path, int(rec.Attach.UID), int(rec.Attach.GID))
	if errors.Is(err, os.ErrPermission) {
		return errs.Wrap(errs.Denied, err, "make the socket %s for user %d", path, rec.Attach.UID)
	}
	if err != nil {
		return errs.Wrap(errs.Internal, err, "make the socket %s", path)
	}
	rt.closeListener(rec.ID)
	rt.listeners[rec.ID] = os.NewFile(uintptr(fd), path)
	return rt.connectVhost(rec, n)
}

// connectVhost gives the worker a NIC's listening socket.
func (rt *runtime) connectVhost(rec *nicRec, n *net.CreateNetworkRequest) error {
	m, _ := wire.ParseMAC(rec.MAC)
	cfg := &vhost.Config{MTU: int(n.MTU), Pairs: int(max(rec.Attach.Queues, 1))}
	m.Put(cfg.MAC[:])
	return rt.call(wctl.Request{Op: wctl.OpAttachVhost, ID: rec.ID, Vhost: cfg}, rawFD(rt.listeners[rec.ID]))
}

// rawFD is a file's descriptor, which stays non-blocking (File.Fd would make it block, for everybody who
// has it).
func rawFD(f *os.File) int {
	fd := -1
	c, err := f.SyscallConn()
	if err == nil {
		_ = c.Control(func(p uintptr) { fd = int(p) })
	}
	return fd
}

// session is a vhost-user session and its descriptors.
type session struct {
	state *vhost.Session
	fds   []int
}

// fetchSession asks for a NIC's session, to give it to the next worker. rt.mu is held.
func (rt *runtime) fetchSession(id string) {
	rep, fds, err := rt.ask(wctl.Request{Op: wctl.OpSession, ID: id})
	if err != nil {
		wctl.CloseAll(fds)
		return // the one that we have may still be good
	}
	rt.closeSession(id)
	if rep.Session == nil || rt.listeners[id] == nil {
		wctl.CloseAll(fds)
		return
	}
	rt.sessions[id] = &session{rep.Session, fds}
}

// resume gives a NIC's session to a new worker. If that fails the front-end sees its connection end, and
// connects again.
func (rt *runtime) resume(id string) {
	s := rt.sessions[id]
	if s == nil {
		return
	}
	if err := rt.call(wctl.Request{Op: wctl.OpSession, ID: id, Session: s.state}, s.fds...); err != nil {
		rt.s.log.Warn("a vhost-user session is not resumed", "nic", id, "error", err)
		rt.closeSession(id)
	}
}

func (rt *runtime) closeSession(id string) {
	if s := rt.sessions[id]; s != nil {
		wctl.CloseAll(s.fds)
		delete(rt.sessions, id)
	}
}

func (rt *runtime) closeListener(id string) {
	rt.closeSession(id)
	if f := rt.listeners[id]; f != nil {
		f.Close()
		delete(rt.listeners, id)
	}
}

// dropPath takes a NIC's data path down: the worker's side first, then the device or the socket.
func (rt *runtime) dropPath(rec *nicRec) {
	rt.push(wctl.Request{Op: wctl.OpDetach, ID: rec.ID})
	rt.closeTAP(rec.ID)
	if rt.s.priv == nil {
		if err := rt.s.instance.DeleteHostLink(legName(rec)); err != nil {
			rt.s.log.Error("delete a bridge port", "nic", rec.Name, "error", err)
		}
	}
	if rec.Attach != nil && rec.Attach.Mode == net.AttachVhostUser {
		rt.closeListener(rec.ID)
		if err := os.Remove(rt.s.vhostPath(rec.ID)); err != nil && !errors.Is(err, os.ErrNotExist) {
			rt.s.log.Error("remove a socket", "nic", rec.Name, "error", err)
		}
		return
	}
	if rt.ns != nil {
		if err := rt.ns.DeleteLink(rec.IfName); err != nil {
			rt.s.log.Error("delete a TAP", "nic", rec.Name, "interface", rec.IfName, "error", err)
		}
	}
}

func (rt *runtime) closeTAP(id string) {
	for _, q := range rt.taps[id] {
		q.Close()
	}
	delete(rt.taps, id)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
