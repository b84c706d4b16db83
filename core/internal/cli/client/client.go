// Package client connects to the core's API and turns what it answers into errors with a kind, a message and
// a remedy.
package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
)

// DefaultSocket is where the core listens unless its configuration says otherwise.
const DefaultSocket = "/run/mvirt/mvirt.sock"

// maxMessage bounds one answer, in bytes: a list of 10,000 VMs is about 10 MB.
const maxMessage = 256 << 20

// Client is a connection to the core. Close it.
type Client struct {
	conn   *grpc.ClientConn
	socket string
	first  *spare

	System         apiv1.SystemClient
	Plugins        apiv1.PluginsClient
	Operations     apiv1.OperationsClient
	Templates      apiv1.TemplatesClient
	Volumes        apiv1.VolumesClient
	Snapshots      apiv1.SnapshotsClient
	Networks       apiv1.NetworksClient
	NICs           apiv1.NICsClient
	SecurityGroups apiv1.SecurityGroupsClient
	VMs            apiv1.VMsClient
	Logs           apiv1.LogsClient
}

// A list of 1,000 VMs is half a megabyte: it comes in few reads, and without waiting for window updates.
const (
	window     = 4 << 20
	readBuffer = 256 << 10
)

// Dial connects to the socket at once, so that "nobody listens" is told apart from a failing call. Errors
// of calls made with the client are *errs.Error.
func Dial(ctx context.Context, socket string) (*Client, error) {
	return DialWith(ctx, Options{Socket: socket})
}

// DialWith connects as [Dial] does, to this host's core or another's.
func DialWith(ctx context.Context, o Options) (*Client, error) {
	creds := insecure.NewCredentials() // a unix socket: the kernel tells who calls
	reach, socket := func(ctx context.Context) (net.Conn, error) { return dial(ctx, o.Socket) }, o.Socket
	if o.Host != "" {
		config, err := o.tlsConfig()
		if err != nil {
			return nil, err
		}
		creds, socket = credentials.NewTLS(config), ""
		reach = func(ctx context.Context) (net.Conn, error) { return dialHost(ctx, o.Host) }
	}
	var extra []grpc.DialOption
	if o.TokenFile != "" {
		t, err := readToken(o.TokenFile)
		if err != nil {
			return nil, err
		}
		extra = append(extra, grpc.WithPerRPCCredentials(t))
	}
	c, err := reach(ctx)
	if err != nil {
		return nil, err
	}
	first := &spare{conn: c}
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		if c := first.take(); c != nil {
			return c, nil
		}
		return reach(ctx)
	}
	conn, err := grpc.NewClient("passthrough:///mvirt", append(extra,
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(dialer),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithUnaryInterceptor(unary), grpc.WithStreamInterceptor(streaming),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window), grpc.WithReadBufferSize(readBuffer),
	)...)
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return &Client{
		conn: conn, socket: socket, first: first,
		System: apiv1.NewSystemClient(conn), Plugins: apiv1.NewPluginsClient(conn), Operations: apiv1.NewOperationsClient(conn),
		Templates: apiv1.NewTemplatesClient(conn), Volumes: apiv1.NewVolumesClient(conn), Snapshots: apiv1.NewSnapshotsClient(conn),
		Networks: apiv1.NewNetworksClient(conn), NICs: apiv1.NewNICsClient(conn), SecurityGroups: apiv1.NewSecurityGroupsClient(conn),
		VMs: apiv1.NewVMsClient(conn), Logs: apiv1.NewLogsClient(conn),
	}, nil
}

// Close ends the connection.
func (c *Client) Close() error {
	if unused := c.first.take(); unused != nil {
		_ = unused.Close()
	}
	return c.conn.Close()
}

// spare holds the connection that Dial made until gRPC asks for one.
type spare struct {
	mu   sync.Mutex
	conn net.Conn
}

func (s *spare) take() net.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.conn
	s.conn = nil
	return c
}

// FDSocket is where opened files are handed over: beside the API socket.
// "" for a core on another host, which takes no files.
func (c *Client) FDSocket() string {
	if c.socket == "" {
		return ""
	}
	return filepath.Join(filepath.Dir(c.socket), "fd.sock")
}

// sunPath is the longest path of a unix socket: sizeof sun_path in unix(7), less the final NUL.
const sunPath = 107

func dial(ctx context.Context, socket string) (net.Conn, error) {
	if len(socket) > sunPath {
		return nil, errs.Field("socket", "give a shorter path", "the socket's path is %d bytes long, the limit is %d", len(socket), sunPath)
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err == nil {
		return c, nil
	}
	e := &errs.Error{Kind: errs.Unavailable, Reason: "NO_DAEMON"}
	switch {
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		e.Kind, e.Reason = errs.Denied, "SOCKET_DENIED"
		e.Message = "you may not use the socket " + socket
		e.Remedy = "run as root, or become a member of the socket's group" + groupOf(socket) + " and log in again"
	case errors.Is(err, syscall.ENOENT):
		e.Message = "there is no socket " + socket
		e.Remedy = "start mvirtd, or say with --socket or MVIRT_SOCKET where it listens"
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Message = "nobody listens on " + socket
		e.Remedy = "start mvirtd"
	case ctx.Err() != nil:
		e.Kind, e.Reason = errs.KindOf(ctx.Err()), ""
		e.Message, e.Err = "connecting to "+socket, ctx.Err()
	default:
		e.Message, e.Err = "cannot connect to "+socket, cause(err)
		e.Remedy = "check that mvirtd runs and that --socket names its socket"
	}
	return nil, e
}

// cause strips what net wraps around a system call's error and what the message says already.
func cause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

func groupOf(path string) string {
	st, err := os.Stat(path)
	if err != nil {
		return ""
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf(" (gid %d)", sys.Gid)
}

func unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return FromStatus(invoke(ctx, method, req, reply, cc, opts...))
}

func streaming(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, FromStatus(err)
	}
	return &stream{s}, nil
}

// stream translates the errors of a stream; io.EOF stays as it is.
type stream struct{ grpc.ClientStream }

func (s *stream) RecvMsg(m any) error { return FromStatus(s.ClientStream.RecvMsg(m)) }
func (s *stream) SendMsg(m any) error { return FromStatus(s.ClientStream.SendMsg(m)) }
