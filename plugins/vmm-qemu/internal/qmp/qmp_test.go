package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair is a connection, and what plays QEMU on its other end.
func pair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}` + "\n"

// serve plays QEMU: it greets and answers each command by fn; "" does not answer.
func serve(t testing.TB, c *net.UnixConn, fn func(command string, id string) string) {
	go func() {
		if _, err := io.WriteString(c, greeting); err != nil {
			return
		}
		sc := bufio.NewScanner(c)
		for sc.Scan() {
			var m struct {
				Execute string          `json:"execute"`
				ID      json.RawMessage `json:"id"`
			}
			if err := json.Unmarshal(sc.Bytes(), &m); err != nil {
				t.Errorf("we sent %q: %v", sc.Bytes(), err)
				return
			}
			answer := `{"return": {}, "id": ` + string(m.ID) + "}\n"
			if m.Execute != "qmp_capabilities" {
				answer = fn(m.Execute, string(m.ID))
			}
			if _, err := io.WriteString(c, answer); err != nil {
				return
			}
		}
	}()
}

func client(t *testing.T, fn func(command, id string) string) (*Client, chan Event, chan error) {
	t.Helper()
	us, them := pair(t)
	serve(t, them, fn)
	events, ended := make(chan Event, 100), make(chan error, 1)
	c, err := New(t.Context(), us, func(e Event) { events <- e }, func(err error) { ended <- err })
	if err != nil {
		t.Fatal(err)
	}
	return c, events, ended
}

func TestDo(t *testing.T) {
	c, events, ended := client(t, func(command, id string) string {
		switch command {
		case "ok":
			return `{"event": "STOP", "data": {"a": 1}, "timestamp": {}}` + "\n\n" + `{"return": {"status": "running"}, "id": ` + id + "}\n"
		case "no":
			return `{"error": {"class": "GenericError", "desc": "it cannot"}, "id": ` + id + "}\n"
		case "stray":
			return `{"return": {}, "id": 9999}` + "\n" + `{"return": {}}` + "\n" + `{"return": 5, "id": ` + id + "}\n"
		case "hang":
			return ""
		}
		return "no JSON\n"
	})
	var st struct{ Status string }
	if err := c.Do(t.Context(), "ok", map[string]any{"x": 1}, &st); err != nil || st.Status != "running" {
		t.Errorf("%+v, %v", st, err)
	}
	if e := <-events; e.Name != "STOP" || string(e.Data) != `{"a": 1}` {
		t.Errorf("event %+v", e)
	}
	var q *Error
	if err := c.Do(t.Context(), "no", nil, nil); !errors.As(err, &q) || q.Class != "GenericError" || !strings.Contains(err.Error(), "it cannot") {
		t.Errorf("got %v", err)
	}
	var n int
	if err := c.Do(t.Context(), "stray", nil, &n); err != nil || n != 5 {
		t.Errorf("%d, %v", n, err)
	}
	if err := c.Do(t.Context(), "stray", nil, &st); err == nil {
		t.Error("a number was taken for an object")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := c.Do(ctx, "hang", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	// What is not understood ends the connection, for everybody.
	if err := c.Do(t.Context(), "garbage", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Errorf("end: %v", err)
	}
	if err := c.Do(t.Context(), "ok", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("afterwards: %v", err)
	}
}

func TestTooLong(t *testing.T) {
	c, _, ended := client(t, func(string, string) string {
		return `{"event": "` + strings.Repeat("x", maxLine) + `"}` + "\n"
	})
	if err := c.Do(t.Context(), "any", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
	if err := <-ended; !strings.Contains(err.Error(), "too long") {
		t.Errorf("end: %v", err)
	}
}

func TestNoGreeting(t *testing.T) {
	us, them := pair(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := New(ctx, us, nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence: %v", err)
	}
	them.Close()
	us, them = pair(t)
	if _, err := io.WriteString(them, "220 smtp ready\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := New(t.Context(), us, nil, nil); err == nil {
		t.Error("another protocol was taken for QMP")
	}
}

func TestDescriptorGoesAlong(t *testing.T) {
	us, them := pair(t)
	got := make(chan string, 1)
	go func() {
		_, _ = io.WriteString(them, greeting)
		buf, oob := make([]byte, 4096), make([]byte, 256)
		for {
			n, on, _, _, err := them.ReadMsgUnix(buf, oob)
			if err != nil {
				return
			}
			var m struct {
				ID json.RawMessage `json:"id"`
			}
			_ = json.Unmarshal(buf[:n], &m)
			if on > 0 {
				msgs, _ := unix.ParseSocketControlMessage(oob[:on])
				fds, _ := unix.ParseUnixRights(&msgs[0])
				f := os.NewFile(uintptr(fds[0]), "got")
				b := make([]byte, 100)
				k, _ := f.ReadAt(b, 0)
				f.Close()
				got <- string(b[:k])
			}
			_, _ = io.WriteString(them, `{"return": {}, "id": `+string(m.ID)+"}\n")
		}
	}()
	c, err := New(t.Context(), us, func(Event) {}, func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("by descriptor"); err != nil {
		t.Fatal(err)
	}
	if err := c.DoWithFile(t.Context(), "getfd", nil, nil, f); err != nil {
		t.Fatal(err)
	}
	if s := <-got; s != "by descriptor" {
		t.Errorf("got %q", s)
	}
}

// Whatever QEMU's side sends, we end or go on, and hold no more than a line.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"event": "STOP"}` + "\n"))
	f.Add([]byte(`{"return": {}, "id": 1}` + "\n" + `{"error": {"class": 1}, "id": -1}` + "\n"))
	f.Add([]byte("\n\n[[[[{}"))
	f.Add([]byte(`{"id": 18446744073709551616}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &Client{event: func(Event) {}, waiting: map[uint64]chan reply{1: make(chan reply, 1)}}
		if err := c.readAll(bufio.NewReaderSize(bytes.NewReader(b), 16)); err == nil {
			t.Error("no end")
		}
	})
}
