package jail

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is one end of the conversation. Send may be called concurrently; Receive by one goroutine.
type Conn struct{ f *os.File }

// NewConn takes a connected SOCK_SEQPACKET socket over.
func NewConn(f *os.File) Conn { return Conn{f} }

// Pair makes both ends; each is the caller's.
func Pair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "jail"), os.NewFile(uintptr(fds[1]), "jail"), nil
}

// sendTime is how long a message may wait for room in the socket.
const sendTime = 5 * time.Second

// Send sends a packet with descriptors.
func (c Conn) Send(b []byte, files ...*os.File) error {
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
	if err := c.f.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
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
func (c Conn) Receive() ([]byte, []*os.File, error) {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	b := make([]byte, MaxMessage)
	oob := make([]byte, unix.CmsgSpace(253*4))
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
		cmsgs, perr := unix.ParseSocketControlMessage(oob[:on])
		for i := range cmsgs {
			if fds, ferr := unix.ParseUnixRights(&cmsgs[i]); ferr == nil {
				for _, fd := range fds {
					files = append(files, os.NewFile(uintptr(fd), "received"))
				}
			}
		}
		err = perr
	}
	if err == nil && (flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(files) > MaxFDs) {
		err = fmt.Errorf("%w: too long", ErrMalformed)
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	if n == 0 {
		closeAll(files)
		return nil, nil, nil
	}
	return b[:n:n], files, nil
}

// Close ends the conversation.
func (c Conn) Close() error { return c.f.Close() }

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
