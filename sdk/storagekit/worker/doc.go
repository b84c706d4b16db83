// Package worker runs the conversion of an image in a process of its own, which can do nothing else.
//
// Image bytes are hostile. The plugin, which may be root, never looks into them: it starts its own binary
// again as a worker ([Main], by plugin.Program.Workers) under an unprivileged user and hands it three
// descriptors: a control socket, the source, and a scratch file; the target follows once the worker knows
// how large the disk is. The worker takes no_new_privs, resource limits and a seccomp filter that leaves it
// no way to open a file, a socket or a process before it looks at the first byte. It ends when its control
// socket does, so it cannot outlive the plugin.
//
// The control socket carries one JSON object a packet (SOCK_SEQPACKET), of type message. It is an interface
// between one binary and itself and has no version.
package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storagekit/image"
)

// Name is the first argument that starts a plugin's binary as the worker.
const Name = "convert"

// Descriptors of a worker.
const (
	controlFD = 3
	sourceFD  = 4
	scratchFD = 5
)

// message is one packet. Kind says which of the other fields count.
type message struct {
	Kind string `json:"kind"`

	// start, avail
	Length int64        `json:"length,omitempty"` // bytes of the source that are there
	Whole  bool         `json:"whole,omitempty"`  // and no more will come
	Hint   int64        `json:"hint,omitempty"`   // announced size, or -1
	Dense  bool         `json:"dense,omitempty"`
	Limits image.Limits `json:"limits,omitzero"`

	// format, target, grow, done
	Format string `json:"format,omitempty"`
	Size   int64  `json:"size,omitempty"`
	Block  bool   `json:"block,omitempty"`

	// progress
	Done  int64 `json:"done,omitempty"`
	Total int64 `json:"total,omitempty"`
	Wrote int64 `json:"wrote,omitempty"`

	// error
	Error *failure `json:"error,omitempty"`
}

// Kinds of messages. Downwards: start, avail, target, grown. Upwards: format, grow, progress, done, error.
const (
	kindStart    = "start"
	kindAvail    = "avail"
	kindTarget   = "target"
	kindGrown    = "grown"
	kindFormat   = "format"
	kindGrow     = "grow"
	kindProgress = "progress"
	kindDone     = "done"
	kindError    = "error"
)

// failure is an errs.Error on the control socket.
type failure struct {
	Kind    errs.Kind
	Reason  string
	Message string
	Remedy  string
	Errno   int // of the operating system, when that is the cause: it decides what the plugin says
}

func newFailure(err error) *failure {
	f := &failure{Kind: errs.KindOf(err), Reason: errs.ReasonOf(err), Message: err.Error(), Remedy: errs.RemedyOf(err)}
	var no unix.Errno
	if errors.As(err, &no) {
		f.Errno = int(no)
	}
	return f
}

func (f *failure) err() error {
	e := &errs.Error{Kind: f.Kind, Reason: clip(f.Reason, 64), Message: clip(f.Message, 1000), Remedy: clip(f.Remedy, 500)}
	if f.Errno != 0 {
		e.Message, e.Err = "", fmt.Errorf("%s: %w", clip(f.Message, 1000), unix.Errno(f.Errno))
	}
	if int(e.Kind) > int(errs.Unauthorized) {
		e.Kind = errs.Internal
	}
	return e
}

// clip shortens what a worker says: it may have been taken over by the image that it reads.
func clip(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

// maxPacket is larger than any message.
const maxPacket = 16 << 10

// control is one end of the socket.
type control struct{ conn *net.UnixConn }

func newControl(f *os.File) (*control, error) {
	c, err := net.FileConn(f) // has its own duplicate
	if err != nil {
		return nil, err
	}
	f.Close()
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("the control descriptor is no unix socket")
	}
	return &control{u}, nil
}

// send writes m, with a descriptor where file is not nil. Packets are atomic: callers need no lock.
func (c *control) send(m message, file *os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var rights []byte
	if file != nil {
		raw, err := file.SyscallConn()
		if err != nil {
			return err
		}
		var serr error
		err = raw.Control(func(fd uintptr) {
			_, _, serr = c.conn.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil)
		})
		return errors.Join(err, serr)
	}
	_, _, err = c.conn.WriteMsgUnix(b, rights, nil)
	return err
}

// receive reads one message. A descriptor comes only where wantFile is set; others are closed.
func (c *control) receive(wantFile bool) (message, *os.File, error) {
	buf := make([]byte, maxPacket)
	oob := make([]byte, 256)
	n, oobn, flags, _, err := c.conn.ReadMsgUnix(buf, oob)
	var m message
	if err != nil {
		return m, nil, err
	}
	var file *os.File
	for _, fd := range descriptors(oob[:oobn]) {
		if file == nil && wantFile {
			file = os.NewFile(uintptr(fd), "target")
			continue
		}
		unix.Close(fd)
	}
	switch {
	case n == 0:
		return m, file, net.ErrClosed
	case flags&unix.MSG_TRUNC != 0:
		err = errors.New("oversized packet on the control socket")
	default:
		err = json.Unmarshal(buf[:n], &m)
	}
	if err != nil && file != nil {
		file.Close()
		file = nil
	}
	return m, file, err
}

func descriptors(oob []byte) []int {
	var all []int
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range msgs {
		if fds, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			all = append(all, fds...)
		}
	}
	for _, fd := range all {
		unix.CloseOnExec(fd)
	}
	return all
}
