package launcher

import (
	"context"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Client is the core's end of the socket to the launcher. Safe for concurrent use.
type Client struct {
	c    conn
	stop chan struct{} // closed when the launcher asks for an orderly stop
	gone chan struct{} // closed when the launcher is gone

	mu      sync.Mutex
	seq     uint32
	waiting map[uint32]chan reply // Start messages without an answer yet
	procs   map[uint32]*remote    // launches that run
	stopped bool
}

type reply struct {
	p   *Process
	err error
}

type remote struct {
	gone  chan struct{}
	exit  Exit
	pidfd *os.File
}

// watch waits for the process by its pidfd, once there is no launcher to tell of its end. How it ended only
// its parent learns.
func (r *remote) watch() {
	if raw, err := r.pidfd.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			for !ends(int(fd), time.Hour) {
			}
		})
	}
	r.exit = Exit{Code: -1, At: time.Now()}
	close(r.gone)
}

// NewClient takes the core's end of the socket over.
func NewClient(sock *os.File) *Client {
	cl := &Client{c: conn{sock}, stop: make(chan struct{}), gone: make(chan struct{}), waiting: map[uint32]chan reply{}, procs: map[uint32]*remote{}}
	go cl.read()
	return cl
}

// Stop is closed when the launcher asks the core to shut down in an orderly way, or is gone.
func (cl *Client) Stop() <-chan struct{} { return cl.stop }

// Gone is closed when the launcher is gone.
func (cl *Client) Gone() <-chan struct{} { return cl.gone }

// Ready tells the launcher that the API is served.
func (cl *Client) Ready() error { return cl.c.send(&message{Type: msgReady}) }

// Close ends the conversation.
func (cl *Client) Close() error {
	err := cl.c.f.Close()
	<-cl.gone
	return err
}

// Spawn starts the plugin of a kind.
func (cl *Client) Spawn(ctx context.Context, kind service.Kind) (*Process, error) {
	ch := make(chan reply, 1)
	cl.mu.Lock()
	cl.seq++
	seq := cl.seq
	cl.waiting[seq] = ch
	cl.mu.Unlock()
	if err := cl.c.send(&message{Type: msgStart, Seq: seq, Kind: kindNumber(kind)}); err != nil {
		cl.mu.Lock()
		delete(cl.waiting, seq)
		cl.mu.Unlock()
		return nil, launcherGone(err)
	}
	select {
	case r := <-ch:
		return r.p, r.err
	case <-cl.gone:
		return nil, launcherGone(nil)
	case <-ctx.Done():
		go func() { // the answer still comes; nobody wants the process any more
			select {
			case r := <-ch:
				if r.p != nil {
					_ = r.p.Signal(syscall.SIGKILL)
					closeAll([]*os.File{r.p.Stdout, r.p.Stderr, r.p.Lifeline})
				}
			case <-cl.gone:
			}
		}()
		return nil, errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "starting the %s plugin", kind)
	}
}

func launcherGone(err error) error {
	return &errs.Error{Kind: errs.Unavailable, Reason: "LAUNCHER_GONE", Message: "the root half of mvirtd is gone", Err: err, Remedy: "restart mvirtd"}
}

func (cl *Client) read() {
	defer func() {
		close(cl.gone)
		cl.mu.Lock()
		defer cl.mu.Unlock()
		cl.stopLocked()
		for _, r := range cl.procs {
			go r.watch()
		}
	}()
	for {
		m, files, err := cl.c.recv()
		if err != nil || m == nil {
			return
		}
		cl.handle(m, files)
	}
}

func (cl *Client) stopLocked() {
	if !cl.stopped {
		cl.stopped = true
		close(cl.stop)
	}
}

func (cl *Client) handle(m *message, files []*os.File) {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	switch m.Type {
	case msgStarted:
		ch := cl.waiting[m.Seq]
		delete(cl.waiting, m.Seq)
		if ch == nil || len(files) != 4 {
			closeAll(files)
			_ = cl.c.send(&message{Type: msgSignal, Launch: m.Launch, Signal: uint8(syscall.SIGKILL)})
			if ch != nil {
				ch <- reply{err: errs.New(errs.Internal, "the launcher sent %d descriptors", len(files))}
			}
			return
		}
		r := &remote{gone: make(chan struct{}), pidfd: files[3]}
		cl.procs[m.Launch] = r
		id := m.Launch
		go func() {
			<-r.gone
			r.pidfd.Close()
		}()
		ch <- reply{p: &Process{PID: int(m.PID), UID: m.UID, Dir: m.Dir, Stdout: files[0], Stderr: files[1], Lifeline: files[2],
			Signal: func(s syscall.Signal) error {
				return cl.c.send(&message{Type: msgSignal, Launch: id, Signal: uint8(s)})
			},
			Gone: r.gone, Exit: func() Exit { return r.exit }}}
	case msgFailed:
		if ch := cl.waiting[m.Seq]; ch != nil {
			delete(cl.waiting, m.Seq)
			ch <- reply{err: failureOf(m)}
		}
	case msgExited:
		if r := cl.procs[m.Launch]; r != nil {
			delete(cl.procs, m.Launch)
			r.exit = exitOf(m)
			close(r.gone)
		}
	case msgStop:
		cl.stopLocked()
	}
	if m.Type != msgStarted {
		closeAll(files)
	}
}

var errNotFromCore = errors.New("a message that the core does not send")
