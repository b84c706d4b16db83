package launcher

import (
	"encoding/binary"
	"errors"
	"os"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/fdpass"
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

// conn is one end of the socketpair. send may be called concurrently; recv by one goroutine.
type conn struct{ f *os.File }

// newConnPair makes both ends; each must be closed.
func newConnPair() (a, b *os.File, err error) { return fdpass.PacketPair("core", "launcher") }

// packets is the connection below the messages.
func (c conn) packets() fdpass.Packets {
	return fdpass.Packets{File: c.f, MaxBytes: maxMessage, MaxFiles: maxFDs, NonBlock: true}
}

// hangUp ends the conversation for both ends; a reader of ours sees its end.
func (c conn) hangUp() { c.packets().HangUp() }

func (c conn) send(m *message, files ...*os.File) error {
	return c.packets().Send(encodeMessage(m), files...)
}

// recv returns the next message; the files are the caller's to close. At the end: nil, nil, nil.
func (c conn) recv() (*message, []*os.File, error) {
	b, files, err := c.packets().Receive()
	if err != nil || b == nil {
		return nil, nil, err
	}
	m, err := decodeMessage(b)
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
