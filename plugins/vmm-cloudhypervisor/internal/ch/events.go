package ch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/mvirt/mvirt/sdk/vmmkit"
)

// maxEvent bounds one event; honest ones are some 200 bytes.
const maxEvent = 64 << 10

// event is one of the event monitor's.
type event struct {
	Source     string            `json:"source"`
	Event      string            `json:"event"`
	Properties map[string]string `json:"properties"`
}

// splitter finds the events in a stream of pretty-printed JSON objects, each followed by an empty line. What
// is no event, or too long, is skipped up to the next empty line.
type splitter struct {
	buf  []byte
	skip bool
}

// feed takes the next bytes and calls fn for each event that they complete.
func (s *splitter) feed(b []byte, fn func(event)) {
	s.buf = append(s.buf, b...)
	for {
		i := bytes.Index(s.buf, []byte("\n\n"))
		if i < 0 {
			if len(s.buf) > maxEvent {
				s.skip, s.buf = true, append([]byte(nil), s.buf[len(s.buf)-1:]...)
			}
			return
		}
		var e event
		if !s.skip && i <= maxEvent && json.Unmarshal(s.buf[:i], &e) == nil {
			fn(e)
		}
		s.skip = false
		s.buf = s.buf[i+2:]
	}
}

// Autopsy reads the last events of a hypervisor that has ended: one that ended in order says so.
func (d *Driver) Autopsy(m vmmkit.Machine) (reason string, fault bool) {
	f, err := os.Open(filepath.Join(m.Dir, eventsFile))
	if err != nil {
		return "", false
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", false
	}
	// Long before the end there is nothing that matters.
	b, err := io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-maxEvent), maxEvent))
	if err != nil && !errors.Is(err, io.EOF) {
		return "", false
	}
	var last []event
	(&splitter{}).feed(append(b, "\n\n"...), func(e event) { last = append(last, e) })
	for i := len(last) - 1; i >= 0; i-- {
		switch e := last[i]; {
		case e.Source == "vm" && e.Event == "shutdown":
			return "guest powered off", false
		case e.Source == "vm" && (e.Event == "booted" || e.Event == "rebooted" || e.Event == "resumed" || e.Event == "paused"):
			return "", false // it ran, and then there was nothing more to tell
		}
	}
	return "", false
}
