package fetch

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"syscall"

	"github.com/mvirt/mvirt/sdk/errs"
)

// privateRanges are the addresses that no URL may lead to unless the operator allows it: behind them are this
// host's own services, its neighbours', and the clouds' metadata services. From the IANA special-purpose
// address registries (RFC 6890); the last four hide IPv4 addresses in IPv6 ones (RFC 6052, 3056, 4380).
var privateRanges = [...]string{
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
	"192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
	"::/127", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
	"::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32",
}

// errDenied is what the dialer says; it is found again under the layers that net/http puts around it.
type errDenied struct{ addr netip.Addr }

func (e errDenied) Error() string { return fmt.Sprintf("the address %s is not public", e.addr) }

// Policy says which addresses may be connected to.
type Policy struct {
	Allow []netip.Prefix // in addition to public ones
}

// check judges one address as it is about to be connected to, after all names are resolved.
func (p Policy) check(addr netip.Addr) error {
	addr = addr.Unmap().WithZone("")
	for _, a := range p.Allow {
		if a.Contains(addr) {
			return nil
		}
	}
	for _, r := range privateRanges {
		if netip.MustParsePrefix(r).Contains(addr) {
			return errDenied{addr}
		}
	}
	return nil
}

// control is a net.Dialer.Control.
func (p Policy) control(_, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	return p.check(ap.Addr())
}

// ParseURL checks that raw is an http or https URL that names a host. Field names it in the error.
func ParseURL(field, raw string) (*url.URL, error) {
	const remedy = "give a URL such as https://example.org/image.qcow2"
	if len(raw) > 8192 {
		return nil, errs.Field(field, remedy, "%s is %d bytes long", field, len(raw))
	}
	u, err := url.Parse(raw)
	if err != nil {
		return nil, errs.Field(field, remedy, "%s is no URL", field) // the parser's words repeat it, with credentials
	}
	if s := strings.ToLower(u.Scheme); s != "http" && s != "https" {
		return nil, errs.Field(field, remedy, "%s has the scheme %q; http and https are known", field, clip(u.Scheme))
	}
	if u.Hostname() == "" || u.Opaque != "" {
		return nil, errs.Field(field, remedy, "%s names no host", field)
	}
	return u, nil
}

func clip(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}

// Show is raw without what may be secret: user, password, query and fragment.
func Show(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "(URL)"
	}
	v := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	s := v.String()
	if u.RawQuery != "" {
		s += "?…"
	}
	return s
}

// explain turns an error of net/http into one without the URL's secrets, with kind and remedy.
func explain(shown string, err error) error {
	var denied errDenied
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	if errors.As(err, &denied) {
		return errs.New(errs.Denied, "%s leads to %s, which is not a public address", shown, denied.addr).
			Because("ADDRESS_DENIED").Do("allow its range with the storage plugin's --allow-source-range if you mean it")
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		if dns.IsNotFound {
			return errs.New(errs.NotFound, "the host of %s does not exist", shown).Because("URL_NOT_FOUND").
				Do("check the host name in the URL")
		}
		return &errs.Error{Kind: errs.Unavailable, Reason: "FETCH_FAILED", Err: err,
			Message: fmt.Sprintf("cannot fetch %s", shown), Remedy: "check the host name in the URL and this host's DNS"}
	}
	var cert *tls.CertificateVerificationError
	if errors.As(err, &cert) {
		return &errs.Error{Kind: errs.Denied, Reason: "FETCH_FAILED", Err: cert.Err,
			Message: fmt.Sprintf("the server of %s cannot prove who it is", shown),
			Remedy:  "add the authority that signed its certificate to this host's, or import from a file with a checksum"}
	}
	var e *errs.Error
	if errors.As(err, &e) {
		return err
	}
	return &errs.Error{Kind: errs.Unavailable, Reason: "FETCH_FAILED", Err: err,
		Message: fmt.Sprintf("cannot fetch %s", shown), Remedy: "check that the server is there, then try again"}
}
