package api

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// tlsConfig is the server's half of mutual TLS, or nil when there is to be no listener on TCP. The certificate is
// read again for each connection, so that one that is renewed needs no restart; a broken one leaves the last.
func tlsConfig(c config.TLS) (*tls.Config, error) {
	if c.Listen == "" {
		return nil, nil
	}
	const remedy = "see that the files of [tls] are PEM and readable for the core's user"
	pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
	if err != nil {
		return nil, &errs.Error{Kind: errs.Precondition, Message: "the server's certificate", Remedy: remedy, Err: err}
	}
	pem, err := os.ReadFile(c.ClientCA)
	if err != nil {
		return nil, &errs.Error{Kind: errs.Precondition, Message: "the authorities of clients", Remedy: remedy, Err: err}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errs.New(errs.Precondition, "%s holds no certificate", c.ClientCA).Do(remedy)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, NextProtos: []string{"h2"},
		SessionTicketsDisabled: true, // each connection shows its certificate
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if p, err := tls.LoadX509KeyPair(c.Cert, c.Key); err == nil {
				return &p, nil
			}
			return &pair, nil
		},
	}, nil
}

// listenTCP opens the listener of [tls], or gives nil without one.
func (s *Server) listenTCP() (net.Listener, error) {
	if s.tls == nil {
		return nil, nil
	}
	l, err := net.Listen("tcp", s.opt.Config.TLS.Listen)
	if err != nil {
		return nil, &errs.Error{Kind: errs.Precondition, Message: "listen on " + s.opt.Config.TLS.Listen, Remedy: "see that the address is this host's and the port is free", Err: err}
	}
	s.remote.Store(&l)
	return l, nil
}

// tcpAddr is where the API listens on TCP, or "".
func (s *Server) tcpAddr() string {
	if l := s.remote.Load(); l != nil {
		return (*l).Addr().String()
	}
	return ""
}

func closeListener(l net.Listener) {
	if l != nil {
		l.Close()
	}
}

// turnedAway notes a connection that did not get through its handshake. It is a note, limited in rate, not an
// audit entry: anybody who reaches the port could fill the spool with those.
func (s *Server) turnedAway(addr string, err error) {
	s.audit.Note(log.Entry{Level: log.LevelWarn, Component: "core", Message: "a connection from " + addr + " was turned away: " + err.Error(),
		Labels: map[string]string{"op": "tls.handshake", "outcome": "refused", "remote": addr}})
}
