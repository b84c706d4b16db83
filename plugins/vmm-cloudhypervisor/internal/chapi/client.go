// Package chapi speaks cloud-hypervisor's REST API: HTTP/1.1 over a unix socket, JSON bodies, and descriptors
// that travel with a request by SCM_RIGHTS, which is why net/http's client cannot be used.
//
// The server handles one request at a time and is slow while it works: that a ping is slow says nothing, so no
// method has a time limit of its own but that of its ctx. A connection is made for each request.
package chapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/vmmkit/unixsock"
)

// Limits of what is sent and read, in bytes. maxRequest is the server's own (version 53: 51,200, later more).
const (
	maxRequest  = 51200
	maxResponse = 8 << 20
	maxFiles    = 64
)

// Error is an answer that says no.
type Error struct {
	Status int
	Text   string
}

func (e *Error) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("cloud-hypervisor answers %d %s", e.Status, http.StatusText(e.Status))
	}
	return "cloud-hypervisor says: " + e.Text
}

// Client is the API of one VMM. Its methods may be called concurrently.
type Client struct{ dir, name string }

// New makes a client of the socket name in dir.
func New(dir, name string) *Client { return &Client{dir: dir, name: name} }

// Get asks for something.
func (c *Client) Get(ctx context.Context, what string, out any) error {
	return c.do(ctx, http.MethodGet, what, nil, out, nil)
}

// Put does something. body and out may be nil; files go along, and stay the caller's.
func (c *Client) Put(ctx context.Context, what string, body, out any, files ...*os.File) error {
	return c.do(ctx, http.MethodPut, what, body, out, files)
}

func (c *Client) do(ctx context.Context, method, what string, body, out any, files []*os.File) (err error) {
	defer func() {
		if err != nil {
			if ctx.Err() != nil && !errors.As(err, new(*Error)) {
				err = ctx.Err()
			}
			err = fmt.Errorf("%s: %w", what, err)
		}
	}()
	var payload []byte
	if body != nil {
		if payload, err = json.Marshal(body); err != nil {
			return err
		}
	}
	if len(payload) > maxRequest || len(files) > maxFiles {
		return fmt.Errorf("a request of %d bytes and %d descriptors is too large", len(payload), len(files))
	}
	conn, err := unixsock.Dial(ctx, c.dir, c.name)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	var req bytes.Buffer
	fmt.Fprintf(&req, "%s /api/v1/%s HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n", method, what)
	if body != nil {
		fmt.Fprintf(&req, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(payload))
	}
	req.WriteString("\r\n")
	req.Write(payload)
	if err := send(conn, req.Bytes(), files); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxResponse)), &http.Request{Method: method})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer []byte
	if resp.ContentLength != 0 && resp.StatusCode != http.StatusNoContent {
		if resp.ContentLength < 0 || resp.ContentLength > maxResponse {
			return fmt.Errorf("an answer of %d bytes", resp.ContentLength)
		}
		answer = make([]byte, resp.ContentLength)
		if _, err := io.ReadFull(resp.Body, answer); err != nil {
			return err
		}
	}
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent {
		return &Error{Status: resp.StatusCode, Text: errorText(answer)}
	}
	if out == nil || resp.StatusCode == http.StatusNoContent {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("the answer is not understood: %w", err)
	}
	return nil
}

// send writes a request, the descriptors along with its first bytes.
func send(conn *net.UnixConn, b []byte, files []*os.File) error {
	if len(files) == 0 {
		_, err := conn.Write(b)
		return err
	}
	var fds []int
	for _, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		var dup int
		var derr error
		if err := raw.Control(func(fd uintptr) { dup, derr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
			return err
		}
		if derr != nil {
			return os.NewSyscallError("dup", derr)
		}
		defer unix.Close(dup)
		fds = append(fds, dup)
	}
	n, _, err := conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	if err == nil && n < len(b) {
		_, err = conn.Write(b[n:])
	}
	return err
}

// errorText makes one line of an error's body: a JSON list of causes, or text.
func errorText(b []byte) string {
	var chain []string
	s := string(b)
	if json.Unmarshal(b, &chain) == nil && len(chain) > 0 {
		s = strings.Join(chain, ": ")
	}
	s = strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	s = strings.TrimSpace(s)
	return s[:min(len(s), 800)]
}
