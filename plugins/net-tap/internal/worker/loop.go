package worker

import (
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/port"
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
	nic  *engine.NIC // nil for the uplink
	id   string
	port kernelPort
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

// run is the loop; it returns when a request set stop.
func (l *loop) run() error {
	runtime.LockOSThread()
	// Guest memory may go away under us: that is the NIC's trouble, not the worker's.
	debug.SetPanicOnFault(true)
	events := make([]unix.EpollEvent, 64)
	for !l.stop {
		n, err := unix.EpollWait(l.epoll, events, l.timeout())
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
				l.serve(s, ev.Events)
			}
		}
	}
	return nil
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
func (l *loop) serve(s *source, events uint32) {
	defer func() {
		if e := recover(); e != nil {
			l.router.Recover()
			l.fail(s, fmt.Sprintf("the packet path failed: %v", e))
		}
	}()
	now := l.now()
	for range rounds {
		n := 0
		if s.nic != nil {
			n = l.router.PollNIC(s.nic, now)
		} else {
			n = l.router.PollUplink(now)
		}
		if n < engine.Burst {
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

// note remembers and reports trouble of a port that stays.
func (l *loop) note(id, text string) {
	if l.trouble[id] != text {
		l.trouble[id] = text
		l.events(id, "trouble", text)
	}
}

// fail takes a broken port away from its NIC or uplink.
func (l *loop) fail(s *source, text string) {
	if s.nic != nil {
		l.router.SetPort(s.id, nil)
	} else {
		l.router.SetUplink(nil)
	}
	l.forget(s.port)
	l.note(s.id, text)
}

// forget closes a port.
func (l *loop) forget(p engine.Port) {
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

// detach takes a NIC's port away.
func (l *loop) detach(id string) {
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
