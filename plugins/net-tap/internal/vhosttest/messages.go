package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// State is the payload of messages about a ring.
func State(i, num int) []byte {
	p := make([]byte, 8)
	binary.LittleEndian.PutUint32(p, uint32(i))
	binary.LittleEndian.PutUint32(p[4:], uint32(num))
	return p
}

func le(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// Raw sends bytes as they are.
func (d *Driver) Raw(b []byte, fds ...int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	return unix.Sendmsg(d.Conn, b, oob, nil, unix.MSG_NOSIGNAL)
}

// Message is a message's bytes.
func Message(req, flags uint32, payload []byte) []byte {
	b := make([]byte, 12, 12+len(payload))
	binary.LittleEndian.PutUint32(b, req)
	binary.LittleEndian.PutUint32(b[4:], 1|flags)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	return append(b, payload...)
}

// Tell sends a message; from SET_PROTOCOL_FEATURES on it asks for, and waits for, the acknowledgement.
func (d *Driver) Tell(req uint32, payload []byte, fds ...int) error {
	if req == 16 { // not negotiated before
		return d.Raw(Message(req, 0, payload), fds...)
	}
	if err := d.Raw(Message(req, 8, payload), fds...); err != nil {
		return err
	}
	b, got, err := d.reply(req)
	closeAll(got)
	if err == nil && (len(b) < 8 || binary.LittleEndian.Uint64(b) != 0) {
		err = fmt.Errorf("request %d was refused", req)
	}
	return err
}

// Ask sends a message and returns the answer.
func (d *Driver) Ask(req uint32, payload []byte) (reply []byte, fds []int, err error) {
	if err := d.Raw(Message(req, 0, payload)); err != nil {
		return nil, nil, err
	}
	return d.reply(req)
}

// Ask64 is Ask for a number.
func (d *Driver) Ask64(req uint32) (uint64, error) {
	b, fds, err := d.Ask(req, nil)
	closeAll(fds)
	if err == nil && len(b) < 8 {
		err = errors.New("short answer")
	}
	if err != nil {
		return 0, fmt.Errorf("request %d: %w", req, err)
	}
	return binary.LittleEndian.Uint64(b), nil
}

func (d *Driver) reply(req uint32) (payload []byte, fds []int, err error) {
	b, oob := make([]byte, 4096), make([]byte, 256)
	n, oobn, _, _, err := unix.Recvmsg(d.Conn, b, oob, unix.MSG_CMSG_CLOEXEC)
	for err == unix.EINTR {
		n, oobn, _, _, err = unix.Recvmsg(d.Conn, b, oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil {
		return nil, nil, err
	}
	if n < 12 {
		return nil, nil, fmt.Errorf("the back-end hung up on request %d", req)
	}
	if oobn > 0 {
		msgs, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for i := range msgs {
			f, _ := unix.ParseUnixRights(&msgs[i])
			fds = append(fds, f...)
		}
	}
	if got := binary.LittleEndian.Uint32(b); got != req || binary.LittleEndian.Uint32(b[4:])&4 == 0 {
		closeAll(fds)
		return nil, nil, fmt.Errorf("answer to request %d, not %d", got, req)
	}
	return b[12:n], fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
