// Package peer tells who is at the other end of a unix socket, as the kernel says it (SO_PEERCRED, unix(7)),
// as gRPC transport credentials.
package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

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

	// Of who calls over TCP, who has none of the above:
	Remote bool
	Addr   string
	Certs  []string // identities of the certificate: "cn:…", "dns:…", "email:…", "uri:…"
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

// Credentials are server credentials. On a unix socket nothing is sent, the kernel is asked; any other
// connection gets TLS, or with a nil config nothing at all. refused is told of handshakes that failed.
func Credentials(config *tls.Config, refused func(addr string, err error)) credentials.TransportCredentials {
	return creds{config, refused}
}

type creds struct {
	tls     *tls.Config
	refused func(addr string, err error)
}

// handshakeTime bounds a TLS handshake.
const handshakeTime = 10 * time.Second

func (c creds) remote(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if c.tls == nil {
		conn.Close()
		return nil, nil, errors.New("there is no TLS, so there is no connection")
	}
	t := tls.Server(conn, c.tls)
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTime)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		conn.Close()
		c.refused(conn.RemoteAddr().String(), err)
		return nil, nil, err
	}
	st := t.ConnectionState()
	info := Info{Remote: true, Addr: conn.RemoteAddr().String(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	if len(st.VerifiedChains) == 0 || len(st.PeerCertificates) == 0 { // the config demands it; never rely on one place
		conn.Close()
		return nil, nil, errors.New("the client has no verified certificate")
	}
	info.Certs = identities(st.PeerCertificates[0])
	return t, info, nil
}

// identities are the names that a certificate has.
func identities(c *x509.Certificate) []string {
	var out []string
	add := func(kind, name string) {
		if name != "" && len(name) <= 256 && !strings.ContainsFunc(name, unicode.IsControl) {
			out = append(out, kind+":"+name)
		}
	}
	add("cn", c.Subject.CommonName)
	for _, n := range c.DNSNames {
		add("dns", n)
	}
	for _, n := range c.EmailAddresses {
		add("email", n)
	}
	for _, n := range c.URIs {
		add("uri", n.String())
	}
	return out
}

func (c creds) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if _, local := conn.(*net.UnixConn); !local {
		return c.remote(conn)
	}
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
func (c creds) Clone() credentials.TransportCredentials { return c }
func (creds) OverrideServerName(string) error           { return nil }

// Names turns user ids into names and remembers them for a while: the user database may be slow.
// The zero value is ready.
type Names struct {
	mu    sync.Mutex
	names map[uint32]name
}

type name struct {
	text   string
	at     time.Time
	groups []string // with numbers; nil: not looked up
}

// Groups are the names and numbers of the groups of a user, as the user database has them, and of gid, the
// group that the process runs with.
func (n *Names) Groups(uid, gid uint32) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e, ok := n.names[uid]; ok && time.Since(e.at) < nameAge && e.groups != nil {
		return withGroup(e.groups, strconv.FormatUint(uint64(gid), 10))
	}
	e := name{text: "uid " + strconv.FormatUint(uint64(uid), 10), at: time.Now(), groups: []string{}}
	if u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
		e.text = u.Username
		ids, _ := u.GroupIds()
		for _, id := range ids {
			e.groups = withGroup(e.groups, id)
		}
	}
	if n.names == nil || len(n.names) > 1000 {
		n.names = map[uint32]name{}
	}
	n.names[uid] = e
	return withGroup(e.groups, strconv.FormatUint(uint64(gid), 10))
}

// withGroup adds a group's number and name, in a list of its own.
func withGroup(list []string, id string) []string {
	out := append(append([]string{}, list...), id)
	if g, err := user.LookupGroupId(id); err == nil {
		out = append(out, g.Name)
	}
	return out
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
	n.names[uid] = name{text: text, at: time.Now()}
	return text
}
