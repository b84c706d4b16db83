package ch

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/vmmkit/unixsock"
)

// typeAt types at a VM's serial port, past the plugin.
func typeAt(t *testing.T, dir, s string) {
	t.Helper()
	c, err := unixsock.Dial(t.Context(), dir, serialSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	_, _ = c.Read(make([]byte, 100)) // until it answers or hangs up
}

// poll is for what nothing announces.
func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func awaitEvent(t *testing.T, path, s string) {
	t.Helper()
	poll(t, s, func() bool {
		b, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(b), s)
	})
}

func awaitGone(t *testing.T, pid uint32) {
	t.Helper()
	poll(t, "the process's end", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

const good = "{\n  \"timestamp\": {\n    \"secs\": 0,\n    \"nanos\": 5\n  },\n  \"source\": \"vm\",\n  \"event\": \"booted\",\n  \"properties\": null\n}\n\n"

func TestSplitter(t *testing.T) {
	stream := good + "garbage\n\n" + good + strings.Repeat("x", 3*maxEvent) + "\n\n" + good + "{\"source\": 5}\n\n" + good + `{"source": "vm", "ev`
	for _, step := range []int{1, 7, 1000, len(stream)} {
		var s splitter
		n := 0
		for rest := []byte(stream); len(rest) > 0; {
			k := min(step, len(rest))
			s.feed(rest[:k], func(e event) {
				if e.Source != "vm" || e.Event != "booted" {
					t.Errorf("event %+v", e)
				}
				n++
			})
			rest = rest[k:]
		}
		if n != 4 {
			t.Errorf("in steps of %d: %d events, want 4", step, n)
		}
	}
}

func FuzzSplitter(f *testing.F) {
	f.Add([]byte(good+good), 3)
	f.Add([]byte("\n\n\n\n{}\n\n"), 1)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		if step < 1 {
			step = 1
		}
		var s splitter
		for len(b) > 0 {
			k := min(step, len(b))
			s.feed(b[:k], func(event) {})
			b = b[k:]
			if len(s.buf) > maxEvent+k {
				t.Fatalf("%d bytes are held", len(s.buf))
			}
		}
	})
}
