// Package worker is the packet worker: the process that moves one network's packets.
//
// It is started by the control plane in a session of its own, as a user without privileges, with one
// descriptor: a bound control socket, on which it listens. It gives up all that it does not need before it
// reads the first byte, gets ports as descriptors over the control socket (package wctl), and goes on when
// the control plane ends. Nothing it does depends on files or other programs.
package worker

import (
	"flag"
	"fmt"
	"log"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/port"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhost"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/wctl"
)

// Name is the first argument that makes the plugin's binary a worker.
const Name = "packet-worker"

// Where the worker finds its control socket, and what it closes when it listens there.
const (
	controlFD = 3
	readyFD   = 4
)

// Main is the worker's program.
func Main(args []string) int {
	log.SetFlags(log.LstdFlags | log.Lmicroseconds | log.LUTC)
	fs := flag.NewFlagSet(Name, flag.ContinueOnError)
	network := fs.String("network", "", "id of the network whose packets to move")
	uid := fs.Int("control-uid", os.Getuid(), "user that the control plane runs as; nobody else is listened to")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	if *network == "" || fs.NArg() > 0 {
		fmt.Fprintln(os.Stderr, Name+" is started by the control plane; it is of no use by hand")
		return 2
	}
	// Little memory is live and none is made per packet: collect often rather than grow.
	debug.SetGCPercent(20)
	time.Sleep(time.Nanosecond) // makes the runtime open its own descriptors now
	runtime.LockOSThread()      // no_new_privs and the filter are set by one thread for all
	sandbox, err := confine()
	runtime.UnlockOSThread()
	if err != nil {
		log.Printf("the worker cannot be confined: %v", err)
		return 1
	}
	if err := serve(*network, *uid, sandbox); err != nil {
		log.Printf("network %s: %v", *network, err)
		return 1
	}
	return 0
}

// server answers the control plane.
type server struct {
	network string
	uid     int
	sandbox string
	loop    *loop

	mu   sync.Mutex
	conn int // the current connection, or -1

	busy  sync.Mutex       // one request at a time; guards what follows
	kept  map[string][]int // TAP queues or listening sockets of NICs, kept for the control plane
	up    bool
	lent  []int // descriptors to close when the reply is sent
	flows int   // memfd of the flow table, or -1
}

func serve(network string, uid int, sandbox string) error {
	if err := unix.Listen(controlFD, wctl.Backlog); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s := &server{network: network, uid: uid, sandbox: sandbox, conn: -1, flows: -1, kept: map[string][]int{}}
	l, err := newLoop(s.event)
	if err != nil {
		return err
	}
	s.loop = l
	unix.Close(readyFD)
	go s.accept()
	log.Printf("network %s: packet worker %d runs, confined by %s", network, os.Getpid(), sandbox)
	return l.run()
}

// accept serves connections; a new one of the right user replaces the old one, whose control plane is
// gone or hangs.
func (s *server) accept() {
	for {
		fd, _, err := unix.Accept4(controlFD, unix.SOCK_CLOEXEC)
		if err != nil {
			continue
		}
		if c, err := wctl.PeerCred(fd); err != nil || int(c.Uid) != s.uid && c.Uid != 0 {
			log.Printf("a stranger connected: %+v", c)
			unix.Close(fd)
			continue
		}
		s.mu.Lock()
		if s.conn >= 0 {
			unix.Shutdown(s.conn, unix.SHUT_RDWR)
		}
		s.conn = fd
		s.mu.Unlock()
		go s.talk(fd)
	}
}

func (s *server) talk(fd int) {
	defer func() {
		s.mu.Lock()
		if s.conn == fd {
			s.conn = -1
		}
		unix.Close(fd)
		s.mu.Unlock()
	}()
	for {
		var req wctl.Request
		fds, err := wctl.Receive(fd, &req)
		if err != nil {
			return
		}
		rep := wctl.Reply{Seq: req.Seq}
		s.busy.Lock()
		give, err := s.handle(&req, fds, &rep)
		if err != nil {
			rep.Error = err.Error()
		}
		err = wctl.Send(fd, rep, give...)
		wctl.CloseAll(s.lent)
		s.lent = nil
		s.busy.Unlock()
		if req.Op == wctl.OpStop {
			s.loop.do(func() { s.loop.stop = true })
		}
		if err != nil {
			return
		}
	}
}

// event tells the control plane, if there is one.
func (s *server) event(id, typ, text string) {
	if typ != "session" {
		log.Printf("NIC %s: %s: %s", id, typ, text)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn >= 0 {
		ev := wctl.Reply{Event: &wctl.Event{ID: id, Type: typ, Text: text}}
		_ = wctl.TrySend(s.conn, ev) // called by the loop: packets do not wait for a control plane that hangs
	}
}

// handle does one request. It takes over fds and returns descriptors to lend to the reply.
func (s *server) handle(req *wctl.Request, fds []int, rep *wctl.Reply) (give []int, err error) {
	left := fds // closed at the end unless somebody took them
	defer func() { wctl.CloseAll(left) }()
	if len(fds) > 0 && req.Op != wctl.OpFlows && req.Op != wctl.OpSession { // the port's own; TAP queues are the hypervisor's to set
		if err := unix.SetNonblock(fds[0], true); err != nil {
			return nil, err
		}
	}
	switch req.Op {
	case wctl.OpHello:
		rep.Hello = &wctl.Hello{Version: wctl.Version, NetworkID: s.network, PID: os.Getpid(), Uplink: s.up, Flows: s.flows >= 0, Sandbox: s.sandbox}
	case wctl.OpNetwork:
		if req.Network == nil {
			return nil, fmt.Errorf("no network in the request")
		}
		s.loop.do(func() { s.loop.router.SetNetwork(*req.Network) })
	case wctl.OpUplink:
		var p kernelPort
		if len(fds) > 0 {
			p = port.NewTUN(fds[0], s.loop.bufs)
			left = fds[1:]
		}
		s.loop.do(func() { err = s.loop.setUplink(p) })
		s.up = p != nil && err == nil
	case wctl.OpNIC:
		if req.NIC == nil {
			return nil, fmt.Errorf("no NIC in the request")
		}
		s.loop.do(func() { s.loop.setNIC(*req.NIC) })
	case wctl.OpDeleteNIC:
		s.loop.do(func() {
			s.loop.detach(req.ID)
			s.loop.router.DeleteNIC(req.ID)
		})
		s.dropKept(req.ID)
	case wctl.OpAttachTAP:
		if req.Sockets != 1 || len(fds) < 1 {
			return nil, fmt.Errorf("%d sockets and %d descriptors, want one socket", req.Sockets, len(fds))
		}
		left = nil
		s.dropKept(req.ID)
		s.kept[req.ID] = fds[1:]
		s.loop.do(func() { err = s.loop.attach(req.ID, port.NewSocket(fds[0], s.loop.bufs)) })
		if err != nil {
			s.dropKept(req.ID)
		}
	case wctl.OpAttachVhost:
		if len(fds) != 1 || req.Vhost == nil {
			return nil, fmt.Errorf("%d descriptors, want the listening socket", len(fds))
		}
		left = nil
		s.dropKept(req.ID)
		keep, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			unix.Close(fds[0])
			return nil, err
		}
		s.kept[req.ID] = []int{keep}
		s.loop.do(func() { err = s.loop.attachVhost(req.ID, fds[0], *req.Vhost) })
		if err != nil {
			s.dropKept(req.ID)
		}
		return nil, err
	case wctl.OpSession:
		if req.Session != nil {
			left = nil
			s.loop.do(func() {
				if v, ok := s.loop.router.Port(req.ID).(*vhost.Port); ok {
					err = v.Resume(req.Session, fds)
				} else {
					wctl.CloseAll(fds)
				}
			})
			return nil, err
		}
		s.loop.do(func() {
			if v, ok := s.loop.router.Port(req.ID).(*vhost.Port); ok {
				var now []int
				if rep.Session, now = v.Session(); len(now) > wctl.MaxFDs {
					rep.Session, now = nil, nil // its front-end has to connect again
				}
				for _, fd := range now { // the port may close its own before they are sent
					if d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3); err == nil {
						give = append(give, d)
					}
				}
			}
		})
		s.lent = give
	case wctl.OpLeg:
		if len(fds) != 1 {
			return nil, fmt.Errorf("%d descriptors, want one packet socket", len(fds))
		}
		left = nil
		s.loop.do(func() { err = s.loop.setLeg(req.ID, port.NewSocket(fds[0], s.loop.bufs)) })
	case wctl.OpDetach:
		s.loop.do(func() { s.loop.detach(req.ID) })
		s.dropKept(req.ID)
	case wctl.OpFDs:
		give = s.kept[req.ID]
	case wctl.OpGroup:
		if req.Group == nil {
			return nil, fmt.Errorf("no group in the request")
		}
		s.loop.do(func() { s.loop.router.SetGroup(*req.Group) })
	case wctl.OpDeleteGroup:
		s.loop.do(func() { s.loop.router.DeleteGroup(req.ID) })
	case wctl.OpFlows:
		switch {
		case len(fds) == 0 && s.flows >= 0:
			give = []int{s.flows}
		case len(fds) > 0 && s.flows >= 0:
			return nil, fmt.Errorf("there is a flow table already")
		case len(fds) > 0:
			if err := s.setFlows(fds[0]); err != nil {
				return nil, err
			}
			left = fds[1:]
		}
	case wctl.OpStatus:
		s.status(req.ID, rep)
	case wctl.OpNICStatus:
		s.loop.do(func() {
			if st, ok := s.loop.router.Status(req.ID); ok {
				rep.NICs = []wctl.NICStatus{{ID: req.ID, Trouble: s.loop.trouble[req.ID], Waiting: s.loop.waiting(req.ID), Status: st}}
			}
		})
	case wctl.OpStop:
	default:
		err = fmt.Errorf("unknown operation %q", req.Op)
	}
	return give, err
}

// setFlows maps the flow table. The memfd is sealed against shrinking, or an access could fault.
func (s *server) setFlows(fd int) error {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return fmt.Errorf("the flow table's memory is not sealed: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	mem, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the flow table: %w", err)
	}
	var f *engine.Flows
	s.loop.do(func() {
		if f, err = engine.NewFlows(mem, uint32(s.loop.now()/1e9)); err == nil {
			s.loop.router.SetFlows(f)
		}
	})
	if err != nil {
		_ = unix.Munmap(mem)
		return err
	}
	s.flows = fd
	log.Printf("network %s: flow table with %d flows", s.network, f.Len())
	return nil
}

func (s *server) dropKept(id string) {
	wctl.CloseAll(s.kept[id])
	delete(s.kept, id)
}

// statusPage is how many NICs one OpStatus tells about: a few hundred bytes each, within MaxMessage.
const statusPage = 128

func (s *server) status(after string, rep *wctl.Reply) {
	s.loop.do(func() {
		var ids []string
		s.loop.router.Each(func(id string, _ engine.Status) {
			if id > after {
				ids = append(ids, id)
			}
		})
		slices.Sort(ids)
		if len(ids) > statusPage {
			ids, rep.More = ids[:statusPage], true
		}
		for _, id := range ids {
			st, _ := s.loop.router.Status(id)
			rep.NICs = append(rep.NICs, wctl.NICStatus{ID: id, Trouble: s.loop.trouble[id], Waiting: s.loop.waiting(id), Status: st})
		}
	})
}
