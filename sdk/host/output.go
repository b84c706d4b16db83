package host

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// LogLine is a line that a plugin wrote to its stderr, or to stdout after the handshake.
type LogLine struct {
	Time    time.Time
	Level   string // "trace", "debug", "info", "warn", "error"
	Module  string
	Message string
	Fields  map[string]string
	Raw     bool // no hclog JSON: a panic, a child's output
}

const (
	maxLine  = 16 << 10 // longer lines are cut here and go on as another line
	keepTail = 20       // last lines kept for "why did it end"
)

// lines reads r to its end, in pieces of at most maxLine, and hands each to fn without the line end.
func lines(r io.Reader, fn func(string)) error {
	br := bufio.NewReaderSize(r, maxLine)
	for {
		b, err := br.ReadSlice('\n')
		if len(b) > 0 {
			fn(strings.TrimRight(string(b), "\r\n"))
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// tail keeps the last lines of a plugin's stderr.
type tail struct {
	mu   sync.Mutex
	list []string
}

func (t *tail) add(l string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.list = append(t.list, l)
	if len(t.list) > keepTail {
		t.list = append(t.list[:0], t.list[1:]...)
	}
}

func (t *tail) get() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.list...)
}

// parseLine understands hclog's JSON (keys that begin with @, hclog's intlogger.go) and takes anything else
// as it is.
func parseLine(s string, now time.Time) LogLine {
	raw := LogLine{Time: now, Level: "info", Message: strings.ToValidUTF8(s, "\ufffd"), Raw: true}
	if !strings.HasPrefix(s, "{") {
		return raw
	}
	var m map[string]any
	if json.Unmarshal([]byte(s), &m) != nil {
		return raw
	}
	msg, ok := m["@message"].(string)
	if !ok {
		return raw
	}
	l := LogLine{Time: now, Level: "info", Message: msg}
	for k, v := range m {
		text, isText := v.(string)
		switch {
		case k == "@message":
		case k == "@level" && isText:
			l.Level = text
		case k == "@module" && isText:
			l.Module = text
		case k == "@timestamp" && isText:
			if t, err := time.Parse("2006-01-02T15:04:05.000000Z07:00", text); err == nil {
				l.Time = t
			}
		default:
			if !isText {
				b, _ := json.Marshal(v)
				text = string(b)
			}
			if l.Fields == nil {
				l.Fields = map[string]string{}
			}
			l.Fields[k] = text
		}
	}
	return l
}

// said is what a person reads in the tail: the message and its fields, not the JSON.
func (l LogLine) said() string {
	if l.Raw {
		return l.Message
	}
	s := l.Level + ": " + l.Message
	for _, k := range sortedKeys(l.Fields) {
		s += " " + k + "=" + l.Fields[k]
	}
	return s
}

// output reads a process's stdout and stderr. The first line of stdout is the handshake; all else is log.
type output struct {
	tail  tail
	log   func(LogLine)
	first chan string // the handshake line; closed when stdout ends without one
	wg    sync.WaitGroup
}

func readOutput(stdout, stderr *os.File, log func(LogLine)) *output {
	o := &output{log: log, first: make(chan string, 1)}
	o.wg.Add(2)
	go func() {
		defer o.wg.Done()
		seen := false
		lines(stdout, func(s string) {
			if !seen {
				seen = true
				o.first <- s
				return
			}
			o.line(s)
		})
		if !seen {
			close(o.first)
		}
	}()
	go func() {
		defer o.wg.Done()
		lines(stderr, o.line)
	}()
	return o
}

func (o *output) line(s string) {
	if s == "" {
		return
	}
	l := parseLine(s, time.Now())
	if l.Raw || l.Level == "warn" || l.Level == "error" {
		o.tail.add(l.said())
	}
	if o.log != nil {
		o.log(l)
	}
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
