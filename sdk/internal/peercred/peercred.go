// Package peercred tells who is at the other end of a unix socket, as the kernel knows it, and makes gRPC
// transport credentials of it: a connection whose peer is not who it should be never carries a call.
//
// SO_PEERCRED (unix(7)) gives the pid, uid and gid that the peer had when it called connect or listen.
package peercred

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Cred is who is at the other end.
type Cred struct {
	PID int32
	UID uint32
	GID uint32
}

// Of asks the kernel.
func Of(c net.Conn) (Cred, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return Cred{}, fmt.Errorf("peer credentials need a unix socket, not %T", c)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return Cred{}, err
	}
	var u *unix.Ucred
	var uerr error
	if err := raw.Control(func(fd uintptr) { u, uerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return Cred{}, err
	}
	if uerr != nil {
		return Cred{}, uerr
	}
	return Cred{PID: u.Pid, UID: u.Uid, GID: u.Gid}, nil
}

// Info is a Cred as gRPC's AuthInfo.
type Info struct {
	credentials.CommonAuthInfo
	Cred Cred
}

// AuthType implements credentials.AuthInfo.
func (Info) AuthType() string { return "peercred" }

// FromContext is who made the call that ctx belongs to.
func FromContext(ctx context.Context) (Cred, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Cred{}, false
	}
	i, ok := p.AuthInfo.(Info)
	return i.Cred, ok
}

// Credentials are gRPC transport credentials that let check decide about the peer; nil lets everybody pass,
// who then is known by FromContext.
func Credentials(check func(Cred) error) credentials.TransportCredentials { return &creds{check} }

type creds struct{ check func(Cred) error }

func (c *creds) shake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cred, err := Of(conn)
	if err == nil && c.check != nil {
		err = c.check(cred)
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, Info{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, cred}, nil
}

func (c *creds) ClientHandshake(_ context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c.shake(conn)
}

func (c *creds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c.shake(conn)
}

func (c *creds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

func (c *creds) Clone() credentials.TransportCredentials { return &creds{c.check} }
func (c *creds) OverrideServerName(string) error {
	return errors.New("no server names on unix sockets")
}
