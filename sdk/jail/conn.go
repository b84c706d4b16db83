package jail

import (
	"os"

	"github.com/mvirt/mvirt/sdk/fdpass"
)

// Conn is one end of the conversation. Send may be called concurrently; Receive by one goroutine.
type Conn struct{ p fdpass.Packets }

// NewConn takes a connected SOCK_SEQPACKET socket over.
func NewConn(f *os.File) Conn {
	return Conn{fdpass.Packets{File: f, MaxBytes: MaxMessage, MaxFiles: MaxFDs}}
}

// Pair makes both ends; each is the caller's.
func Pair() (a, b *os.File, err error) { return fdpass.PacketPair("jail", "jail") }

// Send sends a packet with descriptors.
func (c Conn) Send(b []byte, files ...*os.File) error { return c.p.Send(b, files...) }

// Receive returns the next packet; the files are the caller's. nil, nil, nil: the other end has gone.
func (c Conn) Receive() ([]byte, []*os.File, error) { return c.p.Receive() }

// Close ends the conversation.
func (c Conn) Close() error { return c.p.File.Close() }

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
