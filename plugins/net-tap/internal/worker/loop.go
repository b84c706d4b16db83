package worker

import (
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/port"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhost"
)

// rounds is how many bursts one port may move before the others get their turn.
const rounds = 4

// kernelPort is a port with a descriptor to wait on.
type kernelPort interface {
	engine.Port
	FD() int
	Close()
}

// source is what the loop waits for: a port, or the wake-up descriptor.
type source struct {
	nic   *engine.NIC // nil for the uplink
	id    string
	port  kernelPort  // or:
	vhost *vhost.Port // which has many descriptors

	loop   *loop
	leg    bool  // the port is the NIC's on the host's bridge
	hot    bool  // is polled, and asked its driver for no kicks
	active int64 // when it last had packets
}

// loop is the one goroutine that owns the router. Everything else reaches it through do.
type loop struct {
	router *engine.Router
	bufs   *port.Buffers
	epoll  int
	wake   int // eventfd
	start  time.Time
	base   int64 // CLOCK_MONOTONIC at start: what flows in shared memory are dated by
	events func(id, typ, text string)

	mu   sync.Mutex
	todo []func()

	// Of the loop's goroutine alone.
	hot     []*source // polled without waiting
	broken  []*vhost.Port
	sources map[int32]*source // by descriptor
	trouble map[string]string // NIC: why its port does not work
	stop    bool
	next    int64 // when the router wants its Tick
}

func newLoop(events func(id, typ, text string)) (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return nil, err
	}
	l := &loop{base: ts.Nano(), router: engine.New(engine.Network{}), bufs: port.NewBuffers(), epoll: epoll, wake: wake,
		start: time.Now(), events: events, sources: map[int32]*source{}, trouble: map[string]string{}}
	return l, l.watch(wake)
}

func (l *loop) watch(fd int) error {
	return unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

// do runs f in the loop and waits for it.
func (l *loop) do(f func()) {
	done := make(chan struct{})
	l.mu.Lock()
	l.todo = append(l.todo, func() { defer close(done); f() })
	l.mu.Unlock()
	one := [8]byte{7: 1}
	_, _ = unix.Write(l.wake, one[:]) // a full counter wakes as well
	<-done
}

// runTodo runs what do left.
func (l *loop) runTodo() {
	var b [8]byte
	_, _ = unix.Read(l.wake, b[:])
	l.mu.Lock()
	todo := l.todo
	l.todo = nil
	l.mu.Unlock()
	for _, f := range todo {
		f()
	}
}

// spin is how long a vhost-user port without packets is still polled before the loop waits for its kick: some
// ten times what a kick and a wake-up cost (4 µs measured), so that under load there are none.
const spin = 50_000 // ns

// waitEvery is how often the loop looks at its other descriptors while it polls, in rounds.
const waitEvery = 16

// run is the loop; it returns when a request set stop.
func (l *loop) run() error {
	runtime.LockOSThread()
	// Guest memory may go away under us: that is the NIC's trouble, not the worker's.
	debug.SetPanicOnFault(true)
	events := make([]unix.EpollEvent, 64)
	for round := 0; !l.stop; round++ {
		if len(l.hot) > 0 {
			l.poll()
			if round%waitEvery != 0 {
				continue
			}
		}
		n, err := l.wait(events)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("epoll: %w", err)
		}
		for _, ev := range events[:max(n, 0)] {
			if int(ev.Fd) == l.wake {
				l.runTodo()
				l.next = 0 // whatever it was may have something due
				continue
			}
			if s := l.sources[ev.Fd]; s != nil {
				l.serve(s, ev.Fd, ev.Events)
			}
		}
		l.endBroken()
	}
	return nil
}

// wait waits for events; not at all while ports are polled.
func (l *loop) wait(events []unix.EpollEvent) (int, error) {
	timeout := l.timeout()
	if len(l.hot) == 0 {
		return unix.EpollWait(l.epoll, events, timeout)
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_WAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// poll serves the hot ports once, and lets those that have had nothing for a while wait for kicks again.
func (l *loop) poll() {
	now := l.now()
	for i := 0; i < len(l.hot); i++ {
		s := l.hot[i]
		if l.burst(s, now) > 0 {
			s.active = now
			continue
		}
		if now-s.active < spin && s.vhost.Up() {
			continue
		}
		if s.vhost.Poll(false) { // something came in between
			s.vhost.Poll(true)
			s.active = now
			continue
		}
		s.hot = false
		l.hot = append(l.hot[:i], l.hot[i+1:]...)
		i--
	}
	l.endBroken()
}

// heat makes a port be polled.
func (l *loop) heat(s *source) {
	if !s.hot {
		s.hot, s.active = true, l.now()
		l.hot = append(l.hot, s)
		s.vhost.Poll(true)
	}
}

// burst moves one burst of a port. Should it panic, the port pays for it alone.
func (l *loop) burst(s *source, now int64) (n int) {
	defer func() {
		if e := recover(); e != nil {
			l.router.Recover()
			l.fail(s, fmt.Sprintf("the packet path failed: %v", e))
		}
	}()
	switch {
	case s.leg:
		return l.router.PollLeg(s.nic, now)
	case s.nic != nil:
		return l.router.PollNIC(s.nic, now)
	}
	return l.router.PollUplink(now)
}

// endBroken ends the connections whose guests broke the rules.
func (l *loop) endBroken() {
	for _, p := range l.broken {
		p.End()
	}
	l.broken = l.broken[:0]
}

// timeout does what is due and says for how many milliseconds nothing will be; -1 for ever.
func (l *loop) timeout() int {
	now := l.now()
	if now >= l.next {
		l.next = l.router.Tick(now)
	}
	if l.next == math.MaxInt64 {
		return -1
	}
	return int(min((l.next-now)/1e6+1, 1<<30))
}

// now is CLOCK_MONOTONIC, without a system call.
func (l *loop) now() int64 { return l.base + int64(time.Since(l.start)) }

// serve moves what one port has.
func (l *loop) serve(s *source, fd int32, events uint32) {
	if s.vhost != nil {
		l.serveVhost(s, fd)
		return
	}
	now := l.now()
	for range rounds {
		if l.burst(s, now) < engine.Burst {
			break
		}
	}
	if events&(unix.EPOLLERR|unix.EPOLLHUP) == 0 {
		return
	}
	// An interface that goes down leaves ENETDOWN to be read once; it may come up again. One that is gone
	// is detached by the control plane.
	if soerr, err := unix.GetsockoptInt(s.port.FD(), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && soerr != 0 {
		l.note(s.id, unix.Errno(soerr).Error())
	} else if err != nil {
		l.fail(s, "its descriptor reports an error")
	}
}

// serveVhost handles a message, a new front-end or a kick.
func (l *loop) serveVhost(s *source, fd int32) {
	defer func() {
		if e := recover(); e != nil {
			l.router.Recover()
			l.fail(s, fmt.Sprintf("the vhost-user path failed: %v", e))
		}
	}()
	if s.vhost.Ready(int(fd)) {
		l.heat(s)
	}
}

// Watch, Unwatch, Broken, Told and Changed make a source the vhost.Host of its port.
func (s *source) Watch(fd int) error {
	s.loop.sources[int32(fd)] = s
	return s.loop.watch(fd)
}

// Unwatch implements vhost.Host.
func (s *source) Unwatch(fd int) {
	delete(s.loop.sources, int32(fd))
	_ = unix.EpollCtl(s.loop.epoll, unix.EPOLL_CTL_DEL, fd, nil)
}

// Broken implements vhost.Host.
func (s *source) Broken(p *vhost.Port) { s.loop.broken = append(s.loop.broken, p) }

// Told implements vhost.Host: the control plane asks for the session, to have it should this worker die.
func (s *source) Told(*vhost.Port) { s.loop.events(s.id, "session", "") }

// Changed implements vhost.Host.
func (s *source) Changed(p *vhost.Port, up bool, trouble string) {
	l := s.loop
	switch {
	case trouble != "":
		l.note(s.id, trouble)
	case up && l.trouble[s.id] != "":
		delete(l.trouble, s.id)
		l.events(s.id, "fine", "")
	}
	if up {
		l.router.Restart(s.id) // the guest is told what it must know
		l.next = 0
		if s.vhost != nil {
			l.heat(s)
		}
	}
}

// attachVhost gives a NIC a vhost-user port that listens on a socket.
func (l *loop) attachVhost(id string, listen int, cfg vhost.Config) error {
	nic := l.router.NIC(id)
	if nic == nil {
		unix.Close(listen)
		return fmt.Errorf("no NIC %s", id)
	}
	s := &source{nic: nic, id: id, loop: l}
	p, err := vhost.New(listen, cfg, s)
	if err != nil {
		unix.Close(listen)
		return err
	}
	s.vhost = p
	p.SetLink(!nic.Down())
	delete(l.trouble, id)
	if old, _ := l.router.SetPort(id, p); old != nil {
		l.forget(old)
	}
	return nil
}

// note remembers and reports trouble of a port that stays.
func (l *loop) note(id, text string) {
	if l.trouble[id] != text {
		l.trouble[id] = text
		l.events(id, "trouble", text)
	}
}

// fail takes a broken port away from its NIC or uplink.
func (l *loop) fail(s *source, text string) {
	if s.vhost != nil { // its front-end may try again
		s.vhost.Fail(text)
		l.note(s.id, text)
		return
	}
	if s.leg {
		l.router.SetLeg(s.id, nil)
	} else if s.nic != nil {
		l.router.SetPort(s.id, nil)
	} else {
		l.router.SetUplink(nil)
	}
	l.forget(s.port)
	l.note(s.id, text)
}

// forget closes a port.
func (l *loop) forget(p engine.Port) {
	if v, ok := p.(*vhost.Port); ok {
		v.Close()
		l.hot = slices.DeleteFunc(l.hot, func(s *source) bool { return s.vhost == v })
		l.broken = slices.DeleteFunc(l.broken, func(b *vhost.Port) bool { return b == v })
		return
	}
	k, ok := p.(kernelPort)
	if !ok {
		return
	}
	if s := l.sources[int32(k.FD())]; s != nil && s.port == k {
		delete(l.sources, int32(k.FD()))
		_ = unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, k.FD(), nil)
	}
	k.Close()
}

// attach gives a NIC a port that the loop then owns.
func (l *loop) attach(id string, p kernelPort) error {
	nic := l.router.NIC(id)
	if nic == nil {
		p.Close()
		return fmt.Errorf("no NIC %s", id)
	}
	if err := l.watch(p.FD()); err != nil {
		p.Close()
		return err
	}
	l.sources[int32(p.FD())] = &source{nic: nic, id: id, port: p}
	delete(l.trouble, id)
	if old, _ := l.router.SetPort(id, p); old != nil {
		l.forget(old)
	}
	return nil
}

// setNIC adds or changes a NIC, and tells its guest whether the link is up.
func (l *loop) setNIC(c engine.NICConfig) {
	l.router.SetNIC(c)
	if p, ok := l.router.Port(c.ID).(*vhost.Port); ok {
		p.SetLink(!c.Down)
	}
}

// setLeg gives a NIC its port on the bridge.
func (l *loop) setLeg(id string, p kernelPort) error {
	nic := l.router.NIC(id)
	err := fmt.Errorf("no NIC %s", id)
	if nic != nil {
		err = l.watch(p.FD())
	}
	if err != nil {
		p.Close()
		return err
	}
	l.sources[int32(p.FD())] = &source{nic: nic, id: id, port: p, leg: true}
	if old, _ := l.router.SetLeg(id, p); old != nil {
		l.forget(old)
	}
	return nil
}

// detach takes a NIC's ports away.
func (l *loop) detach(id string) {
	if old, ok := l.router.SetLeg(id, nil); ok && old != nil {
		l.forget(old)
	}
	if old, ok := l.router.SetPort(id, nil); ok && old != nil {
		l.forget(old)
	}
	delete(l.trouble, id)
}

// setUplink replaces the uplink; nil takes it away.
func (l *loop) setUplink(p kernelPort) error {
	if p == nil {
		if old := l.router.SetUplink(nil); old != nil {
			l.forget(old)
		}
		return nil
	}
	if err := l.watch(p.FD()); err != nil {
		p.Close()
		return err
	}
	l.sources[int32(p.FD())] = &source{port: p}
	if old := l.router.SetUplink(p); old != nil {
		l.forget(old)
	}
	return nil
}

// waiting says that a NIC's port has no driver at its other end yet.
func (l *loop) waiting(id string) bool {
	v, ok := l.router.Port(id).(*vhost.Port)
	return ok && !v.Up()
}
