// Package qmp speaks QEMU's Machine Protocol (docs/interop/qmp-spec.rst of QEMU): JSON, one object a line.
//
// The other end is a process that runs a guest, so it is not trusted: lines are bounded, nothing that it
// sends makes us allocate more than that, and a message that is not understood ends the connection.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxLine bounds one message. The largest honest answers (query-blockstats of many disks) are some 100 KiB.
const maxLine = 4 << 20

// writeTimeout bounds the sending of a command to a QEMU that does not read.
const writeTimeout = 5 * time.Second

// ErrClosed says that the connection is gone.
var ErrClosed = errors.New("the QMP connection is closed")

// Error is an answer that says no.
type Error struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("QEMU says: %.500s", e.Desc) }

// Event is something that happened.
type Event struct {
	Name string
	Data json.RawMessage
}

// Client is one connection. Methods may be called concurrently.
type Client struct {
	conn  *net.UnixConn
	event func(Event)
	end   func(error)

	wmu sync.Mutex // one command goes out at a time

	mu      sync.Mutex // guards what follows
	next    uint64
	waiting map[uint64]chan reply
	err     error // set when the connection is gone
}

type reply struct {
	ret json.RawMessage
	err error
}

// message is any that QEMU sends.
type message struct {
	QMP    json.RawMessage `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Error  *Error          `json:"error"`
	ID     *uint64         `json:"id"`
	Event  string          `json:"event"`
	Data   json.RawMessage `json:"data"`
}

// New takes a connection over, negotiates, and serves it. fn is called for each event, and end once, when the
// connection is gone; both from one goroutine and neither may wait.
func New(ctx context.Context, conn *net.UnixConn, fn func(Event), end func(error)) (*Client, error) {
	c := &Client{conn: conn, event: fn, end: end, waiting: map[uint64]chan reply{}}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 16<<10)
	line, err := readLine(r)
	var m message
	if err == nil {
		err = json.Unmarshal(line, &m)
	}
	if err == nil && m.QMP == nil {
		err = errors.New("no greeting")
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("the QMP socket does not answer: %w", err)
	}
	go c.read(r)
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// readLine reads one bounded line.
func readLine(r *bufio.Reader) ([]byte, error) {
	var long []byte
	for {
		part, err := r.ReadSlice('\n')
		if err == nil && long == nil {
			return part, nil
		}
		if len(long)+len(part) > maxLine {
			return nil, errors.New("a message is too long")
		}
		long = append(long, part...)
		if err == nil {
			return long, nil
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
	}
}

func (c *Client) read(r *bufio.Reader) {
	err := c.readAll(r)
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		err = ErrClosed
	} else {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.conn.Close()
	c.mu.Lock()
	c.err = err
	for id, ch := range c.waiting {
		ch <- reply{err: err}
		delete(c.waiting, id)
	}
	c.mu.Unlock()
	c.end(err)
}

func (c *Client) readAll(r *bufio.Reader) error {
	for {
		line, err := readLine(r)
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var m message
		if err := json.Unmarshal(line, &m); err != nil {
			return fmt.Errorf("a message is not understood: %w", err)
		}
		if m.Event != "" {
			c.event(Event{Name: m.Event, Data: m.Data})
			continue
		}
		if m.ID == nil {
			continue // an answer to nothing that we asked
		}
		c.mu.Lock()
		ch := c.waiting[*m.ID]
		delete(c.waiting, *m.ID)
		c.mu.Unlock()
		switch {
		case ch == nil: // whoever asked has gone
		case m.Error != nil:
			ch <- reply{err: m.Error}
		default:
			ch <- reply{ret: m.Return}
		}
	}
}

// Do runs a command and decodes its answer into ret, if that is not nil.
func (c *Client) Do(ctx context.Context, command string, args, ret any) error {
	return c.do(ctx, command, args, ret, nil)
}

// DoWithFile is Do with a descriptor that QEMU gets along with the command (getfd, add-fd).
func (c *Client) DoWithFile(ctx context.Context, command string, args, ret any, f *os.File) error {
	return c.do(ctx, command, args, ret, f)
}

func (c *Client) do(ctx context.Context, command string, args, ret any, f *os.File) error {
	ch := make(chan reply, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	c.next++
	id := c.next
	c.waiting[id] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return err
	}
	if err := c.write(append(line, '\n'), f); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case r := <-ch:
		if r.err != nil {
			return fmt.Errorf("%s: %w", command, r.err)
		}
		if ret == nil {
			return nil
		}
		if err := json.Unmarshal(r.ret, ret); err != nil {
			return fmt.Errorf("%s: the answer is not understood: %w", command, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: no answer: %w", command, ctx.Err())
	}
}

func (c *Client) write(b []byte, f *os.File) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := c.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return ErrClosed
	}
	if f == nil {
		_, err := c.conn.Write(b)
		return err
	}
	rights, err := rightsOf(f)
	if err != nil {
		return err
	}
	n, _, err := c.conn.WriteMsgUnix(b, rights, nil)
	if err == nil && n < len(b) {
		_, err = c.conn.Write(b[n:])
	}
	return err
}

// rightsOf makes the control message that carries f. The descriptor is duplicated by the kernel.
func rightsOf(f *os.File) ([]byte, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var oob []byte
	if err := conn.Control(func(fd uintptr) { oob = unix.UnixRights(int(fd)) }); err != nil {
		return nil, err
	}
	return oob, nil
}
