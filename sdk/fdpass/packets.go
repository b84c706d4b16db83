package fdpass

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Packets is one end of a connected SOCK_SEQPACKET socket between two processes that know each other: whole packets
// with their descriptors, and no table between. Send may be called concurrently; Receive by one goroutine.
type Packets struct {
	File     *os.File // the socket; nonblocking, so that deadlines work
	MaxBytes int      // of a packet that is received
	MaxFiles int      // of its descriptors; at most 253, the kernel's SCM_MAX_FD
	// NonBlock makes what is received nonblocking, so that os.File polls it: deadlines, and Close while somebody reads.
	// The flag belongs to the open file, so the sender has it too.
	NonBlock bool
}

// ErrTooLong says that a packet is longer, or has more descriptors, than may be.
var ErrTooLong = errors.New("the packet is too long, or has too many descriptors")

// sendTime is how long a packet may wait for room in the socket: the other end reads in microseconds, and one that does
// not must hold nobody up.
const sendTime = 5 * time.Second

// PacketPair makes both ends; each is the caller's. The names are for messages.
func PacketPair(a, b string) (fa, fb *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), a), os.NewFile(uintptr(fds[1]), b), nil
}

// Send sends a packet. The files stay the caller's.
func (p Packets) Send(b []byte, files ...*os.File) error {
	raw, err := p.File.SyscallConn()
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
	if err := p.File.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return err
	}
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), b, oob, nil, unix.MSG_NOSIGNAL)
		return !errors.Is(serr, unix.EAGAIN)
	})
	return errors.Join(err, os.NewSyscallError("sendmsg", serr))
}

// Receive returns the next packet; the files are the caller's. nil, nil, nil: the other end has gone.
func (p Packets) Receive() ([]byte, []*os.File, error) {
	raw, err := p.File.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	b := make([]byte, p.MaxBytes)
	oob := make([]byte, unix.CmsgSpace(4*(p.MaxFiles+1))) // one more is seen, and refused
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
	files, err := parse(oob[:on], p.NonBlock)
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(files) > p.MaxFiles:
		err = ErrTooLong
	case n == 0 && len(files) > 0:
		err = errors.New("an empty packet with descriptors")
	case n == 0:
		return nil, nil, nil
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return b[:n:n], files, nil
}

// HangUp ends the conversation for both ends; a reader of ours sees its end.
func (p Packets) HangUp() {
	if raw, err := p.File.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
}
