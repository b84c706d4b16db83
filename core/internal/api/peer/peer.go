// Package peer tells who is at the other end of a unix socket, as the kernel says it (SO_PEERCRED, unix(7)),
// as gRPC transport credentials.
package peer

import (
	"context"
	"errors"
	"net"
	"os/user"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
)

// Info is a connected process: its identity when it connected.
type Info struct {
	credentials.CommonAuthInfo
	UID uint32
	GID uint32
	PID int32
}

// AuthType names this kind of authentication to gRPC.
func (Info) AuthType() string { return "peercred" }

// Of is who is at the other end of a connection.
func Of(conn net.Conn) (Info, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return Info{}, errors.New("not a socket of the system")
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return Info{}, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return Info{}, err
	}
	if cerr != nil {
		return Info{}, cerr
	}
	return Info{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid,
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}

// FromContext is who makes the gRPC call of ctx.
func FromContext(ctx context.Context) (Info, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return Info{}, false
	}
	info, ok := p.AuthInfo.(Info)
	return info, ok
}

// Credentials are server credentials: nothing is sent, the kernel is asked.
func Credentials() credentials.TransportCredentials { return creds{} }

type creds struct{}

func (creds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info, err := Of(conn)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, info, nil
}

func (creds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers")
}

func (creds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (creds) Clone() credentials.TransportCredentials { return creds{} }
func (creds) OverrideServerName(string) error         { return nil }

// Names turns user ids into names and remembers them for a while: the user database may be slow.
// The zero value is ready.
type Names struct {
	mu    sync.Mutex
	names map[uint32]name
}

type name struct {
	text string
	at   time.Time
}

const nameAge = time.Minute

// User is the name of a user id, or "uid N".
func (n *Names) User(uid uint32) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e, ok := n.names[uid]; ok && time.Since(e.at) < nameAge {
		return e.text
	}
	text := "uid " + strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		text = u.Username
	}
	if n.names == nil || len(n.names) > 1000 {
		n.names = map[uint32]name{}
	}
	n.names[uid] = name{text, time.Now()}
	return text
}
