// Package fetch downloads one file over http or https into a file, goes on where a connection was cut, and
// connects to no address that an image has no business to come from.
//
// It uses no proxy: behind one, the address check would judge the proxy. Addresses are checked by the dialer,
// after the name was resolved and for each redirect, so that a name that changes its mind gains nothing.
package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Bounds. The stall limit is above TCP's usual retransmission back-off (RFC 6298), the rest is judgement.
const (
	maxRedirects     = 5
	maxFailures      = 6 // attempts in a row that bring nothing
	maxFirstFailures = 3 // before anything has come: somebody waits for the answer
	defaultStall     = 60 * time.Second
	headerTimeout    = 30 * time.Second
	connectTimeout   = 15 * time.Second
	bufferSize       = 256 << 10
	userAgent        = "mvirt-storage"
)

// ErrChanged says that the file at the URL is no longer the one whose beginning we have, or that we cannot
// tell: what was fetched is of no use, and the caller begins again with an empty State.
var ErrChanged = errors.New("the file at the URL has changed while it was fetched")

// State is how far a download is; kept, it lets another process go on.
type State struct {
	Done         int64  // bytes in the file
	Total        int64  // as announced, or -1
	ETag         string // strong ones only
	LastModified string
}

func (s *State) resumable() bool { return s.ETag != "" || s.LastModified != "" }

// Client fetches.
type Client struct {
	http  *http.Client
	stall time.Duration
	sleep func(context.Context, time.Duration) error
}

// Options of a Client; the zero value is what production uses.
type Options struct {
	Policy Policy
	Stall  time.Duration                                    // without a byte; 0: one minute
	Sleep  func(ctx context.Context, d time.Duration) error // between attempts; nil: a timer
}

// NewClient makes a client.
func NewClient(o Options) *Client {
	dialer := &net.Dialer{Timeout: connectTimeout, Control: o.Policy.control}
	c := &Client{stall: o.Stall, sleep: o.Sleep}
	if c.stall == 0 {
		c.stall = defaultStall
	}
	if c.sleep == nil {
		c.sleep = sleep
	}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext:           dialer.DialContext,
			ForceAttemptHTTP2:     true,
			TLSHandshakeTimeout:   connectTimeout,
			ResponseHeaderTimeout: headerTimeout,
			IdleConnTimeout:       10 * time.Second,
			DisableCompression:    true, // the checksum is of the bytes as delivered
			MaxIdleConns:          2,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			req.Header.Del("Referer") // a query may hold a token
			if len(via) > maxRedirects {
				return errs.New(errs.Invalid, "more than %d redirects", maxRedirects).Because("FETCH_FAILED").
					Do("give the URL that the redirects end at")
			}
			if _, err := ParseURL("url", req.URL.String()); err != nil {
				return errs.New(errs.Invalid, "a redirect leads to something that is not http or https").Because("FETCH_FAILED").
					Do("give the URL of the image itself")
			}
			if via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
				return errs.New(errs.Invalid, "a redirect leads from https to plain http").Because("FETCH_FAILED").
					Do("give the URL that the redirect ends at, if you trust it")
			}
			return nil
		},
	}
	return c
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close frees idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Fetch downloads rawURL into file from st.Done on. got is called after each piece is in the file, with its
// bytes and the state including it; saved is called when what identifies the file is known. Kinds: NotFound
// (404, 410), Denied (401, 403, address), Invalid, Unavailable; ErrChanged.
func (c *Client) Fetch(ctx context.Context, rawURL string, file *os.File, st *State, got func(piece []byte, st State), saved func(State)) error {
	u, err := ParseURL("url", rawURL)
	if err != nil {
		return err
	}
	shown := Show(rawURL)
	buf := make([]byte, bufferSize)
	failures := 0
	for {
		before := st.Done
		done, err := c.attempt(ctx, u, shown, file, st, buf, got, saved)
		if done {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !retryable(err) {
			return err
		}
		if st.Done > 0 && !st.resumable() {
			return fmt.Errorf("%w: %w", ErrChanged, err)
		}
		if st.Done-before >= 1<<20 {
			failures = 0
		}
		failures++
		if failures >= maxFailures || (st.Done == 0 && failures >= maxFirstFailures) {
			return err
		}
		// 0.5 s doubled each time, less up to half of it, so that many clients do not come back at once.
		d := 500 * time.Millisecond << (failures - 1)
		if err := c.sleep(ctx, d-rand.N(d/2)); err != nil {
			return err
		}
	}
}

// errRetry marks what another attempt may cure.
type errRetry struct{ error }

func (e errRetry) Unwrap() error { return e.error }

func retryable(err error) bool {
	var r errRetry
	return errors.As(err, &r)
}

// attempt makes one request and reads its body. It tells true when the file is whole.
func (c *Client) attempt(ctx context.Context, u *url.URL, shown string, file *os.File, st *State, buf []byte, got func([]byte, State), saved func(State)) (bool, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return false, errs.Field("url", "check the URL", "the URL makes no request")
	}
	req.Header.Set("User-Agent", userAgent)
	req.Header.Set("Accept-Encoding", "identity")
	if st.Done > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", st.Done))
		validator := st.ETag
		if validator == "" {
			validator = st.LastModified
		}
		req.Header.Set("If-Range", validator)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		err = explain(shown, err)
		if errs.KindOf(err) == errs.Unavailable {
			err = errRetry{err}
		}
		return false, err
	}
	defer resp.Body.Close()
	skip, err := c.begin(resp, shown, st, saved)
	if err != nil {
		return false, err
	}
	if st.Total >= 0 && st.Done == st.Total && skip == 0 {
		return true, nil
	}
	stalled := time.AfterFunc(c.stall, cancel)
	defer stalled.Stop()
	if skip > 0 {
		if _, err := io.CopyN(io.Discard, watched{resp.Body, stalled, c.stall}, skip); err != nil {
			return false, errRetry{cut(shown, st, err)}
		}
	}
	for {
		n, err := resp.Body.Read(buf)
		stalled.Reset(c.stall)
		if n > 0 {
			if _, werr := file.WriteAt(buf[:n], st.Done); werr != nil {
				return false, fmt.Errorf("keep the download: %w", werr)
			}
			st.Done += int64(n)
			got(buf[:n], *st)
		}
		switch {
		case errors.Is(err, io.EOF):
			if st.Total >= 0 && st.Done != st.Total {
				return false, errRetry{cut(shown, st, io.ErrUnexpectedEOF)}
			}
			st.Total = st.Done
			return true, nil
		case err != nil:
			return false, errRetry{cut(shown, st, err)}
		}
	}
}

// watched is a reader that resets the stall timer.
type watched struct {
	r     io.Reader
	timer *time.Timer
	d     time.Duration
}

func (w watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	w.timer.Reset(w.d)
	return n, err
}

func cut(shown string, st *State, err error) error {
	of := ""
	if st.Total >= 0 {
		of = fmt.Sprintf(" of %d", st.Total)
	}
	return &errs.Error{Kind: errs.Unavailable, Reason: "FETCH_CUT", Err: err,
		Message: fmt.Sprintf("the download of %s was cut after %d%s bytes", shown, st.Done, of),
		Remedy:  "check the server and the connection to it, then import again"}
}

// begin judges the answer and brings st up to date. skip is how many bytes of the body we have already.
func (c *Client) begin(resp *http.Response, shown string, st *State, saved func(State)) (skip int64, err error) {
	etag := resp.Header.Get("ETag")
	if strings.HasPrefix(etag, "W/") {
		etag = "" // does not promise equal bytes (RFC 9110, section 8.8.1)
	}
	modified := resp.Header.Get("Last-Modified")
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
		if st.Done == 0 {
			*st = State{Total: resp.ContentLength, ETag: etag, LastModified: modified}
			saved(*st)
			return 0, nil
		}
		// The server sends all of it again: because it knows no ranges, or because the file is another.
		if (st.ETag != "" && etag == st.ETag || st.ETag == "" && modified == st.LastModified) && resp.ContentLength == st.Total {
			return st.Done, nil
		}
		return 0, ErrChanged
	case code == http.StatusPartialContent && st.Done > 0:
		from, total, ok := contentRange(resp.Header.Get("Content-Range"))
		if !ok || from != st.Done || (total >= 0 && st.Total >= 0 && total != st.Total) || (st.ETag != "" && etag != "" && etag != st.ETag) {
			return 0, ErrChanged
		}
		return 0, nil
	case code == http.StatusRequestedRangeNotSatisfiable && st.Done > 0:
		if st.Done == st.Total {
			return 0, nil
		}
		return 0, ErrChanged
	case code == http.StatusNotFound || code == http.StatusGone:
		return 0, errs.New(errs.NotFound, "there is nothing at %s (HTTP %d)", shown, code).Because("URL_NOT_FOUND").
			Do("check the URL, for instance in a browser")
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		return 0, errs.New(errs.Denied, "the server does not give %s to us (HTTP %d)", shown, code).Because("FETCH_FAILED").
			Do("put user and password into the URL, or use one that is open")
	case code == http.StatusTooManyRequests || code == http.StatusRequestTimeout || code >= 500:
		return 0, errRetry{errs.New(errs.Unavailable, "the server cannot give %s now (HTTP %d)", shown, code).Because("FETCH_FAILED").
			Do("try again later")}
	default:
		return 0, errs.New(errs.Invalid, "the server answers HTTP %d for %s", code, shown).Because("FETCH_FAILED").Do("check the URL")
	}
}

// contentRange parses "bytes 5-9/10" (RFC 9110, section 14.4).
func contentRange(s string) (from, total int64, ok bool) {
	s, found := strings.CutPrefix(s, "bytes ")
	span, all, found2 := strings.Cut(s, "/")
	first, _, found3 := strings.Cut(span, "-")
	if !found || !found2 || !found3 {
		return 0, 0, false
	}
	from, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, 0, false
	}
	total = -1
	if all != "*" {
		if total, err = strconv.ParseInt(all, 10, 64); err != nil {
			return 0, 0, false
		}
	}
	return from, total, true
}
