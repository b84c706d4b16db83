package launcher

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Messages between core and launcher, one a packet of a SOCK_SEQPACKET socket:
//
//	byte 0  version (1)
//	byte 1  type
//	then    the type's fields: numbers big-endian, texts as two bytes of length and UTF-8
//
// A message that is too short, too long or of unknown type is an error, and ends the conversation: both
// ends are the same binary.
const (
	wireVersion = 1
	maxMessage  = 16 << 10
	maxText     = 4 << 10
	maxFDs      = 4
)

type msgType uint8

const (
	msgStart  msgType = 1 // core: start the plugin of Kind; answered by msgStarted or msgFailed with the same Seq
	msgSignal msgType = 2 // core: send Signal (SIGTERM or SIGKILL) to Launch; answered by msgExited when it ends
	msgReady  msgType = 3 // core: the API is served

	msgStarted msgType = 4 // launcher: Launch runs; descriptors: stdout, stderr, lifeline, pidfd
	msgFailed  msgType = 5 // launcher: it could not be started
	msgExited  msgType = 6 // launcher: Launch ended
	msgStop    msgType = 7 // launcher: shut down in an orderly way
)

type message struct {
	Type                 msgType
	Seq                  uint32
	Kind                 uint8 // index in service.Kinds(), from 1
	Launch               uint32
	Signal               uint8 // number; in msgExited 0 if it exited by itself
	PID                  uint32
	UID                  uint32
	Code                 uint32
	At                   int64 // nanoseconds since 1970
	Dir                  string
	ErrKind              uint8
	Reason, Text, Remedy string
}

// fields visits the fields of a message of its type, in order; it is the one definition of the layout.
func (m *message) fields(v visitor) bool {
	switch m.Type {
	case msgStart:
		v.u32(&m.Seq)
		v.u8(&m.Kind)
	case msgSignal:
		v.u32(&m.Launch)
		v.u8(&m.Signal)
	case msgReady, msgStop:
	case msgStarted:
		v.u32(&m.Seq)
		v.u32(&m.Launch)
		v.u32(&m.PID)
		v.u32(&m.UID)
		v.text(&m.Dir)
	case msgFailed:
		v.u32(&m.Seq)
		v.u8(&m.ErrKind)
		v.text(&m.Reason)
		v.text(&m.Text)
		v.text(&m.Remedy)
	case msgExited:
		v.u32(&m.Launch)
		v.u32(&m.Code)
		v.u8(&m.Signal)
		v.i64(&m.At)
	default:
		return false
	}
	return true
}

type visitor interface {
	u8(*uint8)
	u32(*uint32)
	i64(*int64)
	text(*string)
}

type encoder struct{ b []byte }

func (e *encoder) u8(v *uint8)   { e.b = append(e.b, *v) }
func (e *encoder) u32(v *uint32) { e.b = binary.BigEndian.AppendUint32(e.b, *v) }
func (e *encoder) i64(v *int64)  { e.b = binary.BigEndian.AppendUint64(e.b, uint64(*v)) }
func (e *encoder) text(v *string) {
	s := *v
	if len(s) > maxText {
		s = s[:maxText]
	}
	e.b = append(binary.BigEndian.AppendUint16(e.b, uint16(len(s))), s...)
}

type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || len(d.b) < n {
		d.bad = true
		return make([]byte, 8)[:min(n, 8)]
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}
func (d *decoder) u8(v *uint8)   { *v = d.take(1)[0] }
func (d *decoder) u32(v *uint32) { *v = binary.BigEndian.Uint32(d.take(4)) }
func (d *decoder) i64(v *int64)  { *v = int64(binary.BigEndian.Uint64(d.take(8))) }
func (d *decoder) text(v *string) {
	n := int(binary.BigEndian.Uint16(d.take(2)))
	if n > maxText || n > len(d.b) {
		d.bad = true
		return
	}
	*v = string(d.take(n))
}

var errWire = errors.New("malformed message between core and launcher")

func encodeMessage(m *message) []byte {
	e := &encoder{b: []byte{wireVersion, byte(m.Type)}}
	m.fields(e)
	return e.b
}

func decodeMessage(b []byte) (*message, error) {
	if len(b) < 2 || len(b) > maxMessage || b[0] != wireVersion {
		return nil, errWire
	}
	m := &message{Type: msgType(b[1])}
	d := &decoder{b: b[2:]}
	if !m.fields(d) || d.bad || len(d.b) != 0 {
		return nil, errWire
	}
	return m, nil
}

// kindNumber and kindOf turn kinds into numbers and back; 0 and "" are no kind.
func kindNumber(k service.Kind) uint8 {
	for i, x := range service.Kinds() {
		if x == k {
			return uint8(i + 1)
		}
	}
	return 0
}

func kindOf(n uint8) service.Kind {
	if ks := service.Kinds(); n >= 1 && int(n) <= len(ks) {
		return ks[n-1]
	}
	return ""
}

// failure and failureOf carry an error over the socket.
func failure(seq uint32, err error) *message {
	m := &message{Type: msgFailed, Seq: seq, ErrKind: uint8(errs.KindOf(err)), Reason: errs.ReasonOf(err), Remedy: errs.RemedyOf(err)}
	m.Text = err.Error()
	return m
}

func failureOf(m *message) error {
	return &errs.Error{Kind: errs.Kind(m.ErrKind), Reason: m.Reason, Message: m.Text, Remedy: m.Remedy}
}

func exitOf(m *message) Exit {
	return Exit{Code: int(m.Code), Signal: syscall.Signal(m.Signal), At: time.Unix(0, m.At)}
}

// sendTime is how long a message may wait for room in the socket: the other end answers in microseconds.
const sendTime = 5 * time.Second

// hangUp ends the conversation for both ends; a reader of ours sees its end.
func (c conn) hangUp() {
	if raw, err := c.f.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
}

// conn is one end of the socketpair. send may be called concurrently; recv by one goroutine.
type conn struct{ f *os.File }

// newConnPair makes both ends; each must be closed.
func newConnPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "core"), os.NewFile(uintptr(fds[1]), "launcher"), nil
}

func (c conn) send(m *message, files ...*os.File) error {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return err
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	// A peer that does not read must not hold up the launcher; both ends are given the same time.
	if err := c.f.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return err
	}
	b := encodeMessage(m)
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), b, oob, nil, unix.MSG_NOSIGNAL)
		return !errors.Is(serr, unix.EAGAIN)
	})
	return errors.Join(err, os.NewSyscallError("sendmsg", serr))
}

// recv returns the next message; the files are the caller's to close. At the end: nil, nil, nil.
func (c conn) recv() (*message, []*os.File, error) {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	b := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(maxFDs*4))
	var n, on, flags int
	var rerr error
	if err := raw.Read(func(fd uintptr) bool {
		n, on, flags, _, rerr = unix.Recvmsg(int(fd), b, oob, unix.MSG_CMSG_CLOEXEC)
		return !errors.Is(rerr, unix.EAGAIN)
	}); err != nil {
		return nil, nil, err
	}
	if rerr != nil {
		return nil, nil, os.NewSyscallError("recvmsg", rerr)
	}
	var files []*os.File
	if on > 0 {
		cmsgs, err := unix.ParseSocketControlMessage(oob[:on])
		for i := range cmsgs {
			fds, ferr := unix.ParseUnixRights(&cmsgs[i])
			if ferr == nil {
				for _, fd := range fds {
					_ = unix.SetNonblock(fd, true) // so that os.File uses the poller: deadlines, Close while reading
					files = append(files, os.NewFile(uintptr(fd), "received"))
				}
			}
		}
		if err != nil {
			closeAll(files)
			return nil, nil, err
		}
	}
	if n == 0 && len(files) == 0 {
		return nil, nil, nil
	}
	m, err := decodeMessage(b[:n])
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = fmt.Errorf("%w: truncated", errWire)
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return m, files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
