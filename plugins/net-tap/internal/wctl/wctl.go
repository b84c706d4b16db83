// Package wctl is what the control plane and a packet worker say to each other, and how.
//
// A worker listens on a named SOCK_SEQPACKET socket; the control plane connects, and after a restart
// connects again. A message is JSON, with descriptors beside it (SCM_RIGHTS). The control plane asks, the
// worker answers in order; a message of the worker with Seq 0 is an event. Everything the control plane
// says is idempotent, so adopting a worker is saying everything again.
//
// Who is on the other end is told by the kernel (SO_PEERCRED): the worker itself calls listen, so that the
// credentials that the control plane sees are the worker's and not those of whoever made the socket.
package wctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/engine"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/vhost"
)

// Version changes when an older worker can no longer be spoken to: it is then replaced.
const Version = 1

// MaxMessage is the longest message: well under the default socket buffer (net.core.wmem_default).
const MaxMessage = 64 << 10

// MaxFDs is how many descriptors a message carries at most; the kernel's limit is 253 (SCM_MAX_FD).
const MaxFDs = 64

// Op says what a request asks.
type Op string

// Operations.
const (
	OpHello       Op = "hello"        // who are you: Reply.Hello
	OpNetwork     Op = "network"      // Network replaces the configuration
	OpUplink      Op = "uplink"       // one descriptor: a TUN; without: no uplink
	OpNIC         Op = "nic"          // NIC is added or changed
	OpDeleteNIC   Op = "delete-nic"   // ID and its port go
	OpAttachTAP   Op = "attach-tap"   // ID gets a port; descriptors: Sockets packet sockets, then TAP queues to keep
	OpAttachVhost Op = "attach-vhost" // ID gets a vhost-user port; one descriptor: the listening socket
	OpLeg         Op = "leg"          // ID gets its port on the host's bridge; one descriptor: a packet socket
	OpSession     Op = "session"      // the vhost-user session of ID comes back; or, with Session: is resumed
	OpDetach      Op = "detach"       // ID loses its port
	OpFDs         Op = "fds"          // what was kept for ID comes back: TAP queues, or the listening socket
	OpGroup       Op = "group"        // Group is added or changed
	OpDeleteGroup Op = "delete-group" // ID goes
	OpFlows       Op = "flows"        // one descriptor: a memfd for the flow table; without: the one there is comes back
	OpStatus      Op = "status"       // Reply.NICs, from ID on (exclusive, in order), as many as fit
	OpNICStatus   Op = "nic-status"   // Reply.NICs has ID alone, or nothing if it is not known
	OpStop        Op = "stop"         // the worker ends
)

// Request is what the control plane sends.
type Request struct {
	Seq     uint64
	Op      Op
	ID      string            `json:",omitempty"`
	Network *engine.Network   `json:",omitempty"`
	NIC     *engine.NICConfig `json:",omitempty"`
	Group   *engine.Group     `json:",omitempty"`
	Sockets int               `json:",omitempty"`
	Vhost   *vhost.Config     `json:",omitempty"`
	Session *vhost.Session    `json:",omitempty"`
}

// Reply is what the worker sends.
type Reply struct {
	Seq     uint64
	Error   string         `json:",omitempty"`
	Hello   *Hello         `json:",omitempty"`
	NICs    []NICStatus    `json:",omitempty"`
	Session *vhost.Session `json:",omitempty"`
	More    bool           `json:",omitempty"` // OpStatus: ask again from the last one on
	Event   *Event         `json:",omitempty"`
}

// Hello says who a worker is.
type Hello struct {
	Version   int
	NetworkID string
	PID       int
	Uplink    bool
	Flows     bool   // it has a flow table
	Sandbox   string // what confines it, in words
}

// NICStatus is what a worker tells about one NIC.
type NICStatus struct {
	ID      string
	Trouble string `json:",omitempty"` // why its port does not work
	Waiting bool   `json:",omitempty"` // its port has no driver at the other end
	engine.Status
}

// Event is what a worker says unasked.
type Event struct {
	ID   string // NIC
	Type string // "trouble", "fine", "session": there is another to be asked for
	Text string `json:",omitempty"`
}

// Send writes one message with descriptors; it does not take them over.
func Send(fd int, msg any, fds ...int) error { return send(fd, 0, msg, fds) }

// TrySend is Send for a caller that must not wait: a message for which there is no room is lost.
func TrySend(fd int, msg any) error { return send(fd, unix.MSG_DONTWAIT, msg, nil) }

func send(fd, flags int, msg any, fds []int) error {
	b, err := json.Marshal(msg)
	if err != nil {
		return err
	}
	if len(b) > MaxMessage {
		return fmt.Errorf("message of %d bytes, the limit is %d", len(b), MaxMessage)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for {
		err = unix.Sendmsg(fd, b, oob, nil, flags|unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Receive reads one message into msg and returns the descriptors that came with it, now the caller's. An
// end of the connection is os.ErrClosed.
func Receive(fd int, msg any) (fds []int, err error) {
	b := make([]byte, MaxMessage+1)
	oob := make([]byte, unix.CmsgSpace(4*MaxFDs))
	var n, oobn, flags int
	for {
		n, oobn, flags, _, err = unix.Recvmsg(fd, b, oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	fds = parseRights(oob[:oobn])
	switch {
	case n == 0 && len(fds) == 0:
		err = os.ErrClosed
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("message too long")
	default:
		err = json.Unmarshal(b[:n], msg)
	}
	if err != nil {
		CloseAll(fds)
		return nil, err
	}
	return fds, nil
}

func parseRights(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range msgs {
		if f, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, f...)
		}
	}
	return fds
}

// CloseAll closes descriptors.
func CloseAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// Client is the control plane's end of a connection.
type Client struct {
	events func(Event)

	mu   sync.Mutex // one request at a time
	seq  uint64
	wait time.Duration

	fd      *os.File // blocking; closing it from another goroutine ends the reader through shutdown
	raw     int
	replies chan reply
	done    chan struct{} // closed when the connection is gone
	once    sync.Once
}

type reply struct {
	Reply
	fds []int
}

// ErrGone is what calls return when the worker has ended or does not answer.
var ErrGone = errors.New("the packet worker is gone")

// NewClient takes over a connected socket. events is called from the reading goroutine. wait bounds each
// call.
func NewClient(fd int, wait time.Duration, events func(Event)) *Client {
	c := &Client{raw: fd, fd: os.NewFile(uintptr(fd), "worker"), wait: wait, events: events,
		replies: make(chan reply, 1), done: make(chan struct{})}
	go c.read()
	return c
}

func (c *Client) read() {
	defer close(c.done)
	defer c.fd.Close()
	for {
		var r reply
		fds, err := Receive(c.raw, &r.Reply)
		if err != nil {
			return
		}
		r.fds = fds
		if r.Seq == 0 {
			CloseAll(fds)
			if r.Event != nil && c.events != nil {
				c.events(*r.Event)
			}
			continue
		}
		select {
		case c.replies <- r:
		default: // nobody waits for it any more
			CloseAll(fds)
		}
	}
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection; the worker goes on.
func (c *Client) Close() {
	c.once.Do(func() { unix.Shutdown(c.raw, unix.SHUT_RDWR) })
	<-c.done
}

// Call asks and waits for the answer. fds stay the caller's; returned ones are the caller's too.
func (c *Client) Call(req Request, fds ...int) (Reply, []int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seq++
	req.Seq = c.seq
	select {
	case <-c.done:
		return Reply{}, nil, ErrGone
	default:
	}
	if err := Send(c.raw, req, fds...); err != nil {
		return Reply{}, nil, fmt.Errorf("%w: %v", ErrGone, err)
	}
	t := time.NewTimer(c.wait)
	defer t.Stop()
	for {
		select {
		case r := <-c.replies:
			if r.Seq != req.Seq {
				CloseAll(r.fds)
				continue
			}
			if r.Error != "" {
				CloseAll(r.fds)
				return r.Reply, nil, fmt.Errorf("packet worker: %s: %s", req.Op, r.Error)
			}
			return r.Reply, r.fds, nil
		case <-c.done:
			return Reply{}, nil, ErrGone
		case <-t.C:
			return Reply{}, nil, fmt.Errorf("%w: %s not answered within %v", ErrGone, req.Op, c.wait)
		}
	}
}

// PeerCred is who is at the other end of a connected socket.
func PeerCred(fd int) (*unix.Ucred, error) {
	return unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
}

// Socket makes a SOCK_SEQPACKET socket.
func Socket() (int, error) {
	return unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
}

// connectWait bounds connecting, and sending.
const connectWait = 3 * time.Second

// Backlog is how many connections a worker's socket holds before they are accepted.
const Backlog = 256

// Dial connects to a worker's socket.
func Dial(path string) (int, error) {
	fd, err := Socket()
	if err != nil {
		return -1, err
	}
	// A worker that hangs does not accept: its backlog fills, and connecting would wait for ever.
	tv := unix.NsecToTimeval(int64(connectWait))
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	err = WithPath(path, func(p string) error { return unix.Connect(fd, &unix.SockaddrUnix{Name: p}) })
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Bind makes a socket at path, mode 0600, that does not listen yet. What was there goes.
func Bind(path string) (int, error) {
	fd, err := Socket()
	if err != nil {
		return -1, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		unix.Close(fd)
		return -1, err
	}
	err = WithPath(path, func(p string) error {
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: p}); err != nil {
			return err
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
