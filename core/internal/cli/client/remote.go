package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"strings"

	"google.golang.org/grpc/credentials"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Options say where the core is and as whom to call.
type Options struct {
	Socket string // of this host; used without Host
	Host   string // "NAME:PORT" of a core that listens on TCP
	Cert   string // PEM files of the client's certificate and key, and of the authorities of the server's
	Key    string
	CA     string
	// TokenFile holds a token on its first line; "" is none. A token in an argument would stand in the list of
	// processes.
	TokenFile string
}

// tlsConfig is the client's half of mutual TLS.
func (o Options) tlsConfig() (*tls.Config, error) {
	for _, f := range []struct{ field, path string }{{"tls-cert", o.Cert}, {"tls-key", o.Key}, {"tls-ca", o.CA}} {
		if f.path == "" {
			return nil, errs.Field(f.field, "give the path of a PEM file", "a core on another host takes certificates on both sides, and --%s is missing", f.field)
		}
	}
	pair, err := tls.LoadX509KeyPair(o.Cert, o.Key)
	if err != nil {
		return nil, errs.Wrap(errs.Invalid, err, "the certificate for --host")
	}
	pem, err := os.ReadFile(o.CA)
	if err != nil {
		return nil, errs.Wrap(errs.Invalid, err, "the authorities for --host")
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errs.Field("tls-ca", "give the authority of the server's certificate", "%s holds no certificate", o.CA)
	}
	name, _, err := net.SplitHostPort(o.Host)
	if err != nil {
		return nil, errs.Field("host", "write NAME:PORT", "%q is no host with a port", o.Host)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: name}, nil
}

// dialHost connects to a core on another host.
func dialHost(ctx context.Context, host string) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", host)
	if err == nil {
		return c, nil
	}
	if ctx.Err() != nil {
		return nil, errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "connecting to %s", host)
	}
	e := &errs.Error{Kind: errs.Unavailable, Reason: "NO_DAEMON", Message: "cannot connect to " + host, Err: cause(err),
		Remedy: "check that mvirtd runs there with a [tls] table, and that nothing between blocks the port"}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		e.Err, e.Remedy = nil, "check the name"
		e.Message = "there is no host " + dns.Name
	}
	return nil, e
}

// token is sent with each call.
type token string

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(t)}, nil
}

// RequireTransportSecurity is false for the sake of the unix socket, which has none in gRPC's sense and needs
// none; over TCP there is always TLS.
func (token) RequireTransportSecurity() bool { return false }

var _ credentials.PerRPCCredentials = token("")

// readToken reads the first line of a file.
func readToken(path string) (token, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", errs.Wrap(errs.Invalid, err, "the token")
	}
	line, _, _ := strings.Cut(string(b), "\n")
	if line = strings.TrimSpace(line); line == "" {
		return "", errs.Field("token-file", "put the token on the first line", "%s holds no token", path)
	}
	return token(line), nil
}
