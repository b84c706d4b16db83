// Package consolelog reads the serial consoles of running VMs and turns what guests print into log lines.
//
// It is one more viewer of each console, by the contract of vmm, so it works with any vmm plugin and never
// keeps a person from writing. What a guest prints is hostile: escape sequences and control characters are
// taken out, lines are cut, and whoever takes the lines limits their rate.
package consolelog

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/vmm"
)

const (
	maxLine = 4 << 10 // bytes of a line; longer ones are cut into pieces

	flush = 2 * time.Second  // after this long without more, a line without end is taken as it is: "login: "
	retry = 10 * time.Second // after a console that broke off while its VM runs
)

// Collector follows consoles.
type Collector struct {
	vmm  vmm.Service
	note func(log.Entry) // must not block

	mu     sync.Mutex
	follow map[string]bool // by VM id
	tasks  sync.WaitGroup
}

// New makes a collector that hands lines to note.
func New(v vmm.Service, note func(log.Entry)) *Collector {
	return &Collector{vmm: v, note: note, follow: map[string]bool{}}
}

// Saw is told of a VM's state by the watch of one run of the vmm plugin, which ctx spans.
func (c *Collector) Saw(ctx context.Context, vm vmm.VM) {
	if vm.State != vmm.StateRunning && vm.State != vmm.StatePaused {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.follow[vm.ID] {
		return
	}
	c.follow[vm.ID] = true
	c.tasks.Go(func() {
		c.read(ctx, vm)
		c.mu.Lock()
		delete(c.follow, vm.ID)
		c.mu.Unlock()
	})
}

// Wait waits until all consoles are let go; the contexts given to Saw must have ended.
func (c *Collector) Wait() { c.tasks.Wait() }

// read follows one console until its VM ends.
func (c *Collector) read(ctx context.Context, vm vmm.VM) {
	// No replay: what a console keeps reaches back into earlier runs, whose lines are in the store already.
	req := vmm.ConsoleRequest{Ref: vm.ID, ReadOnly: true}
	for ctx.Err() == nil {
		l := &lines{emit: func(text string) {
			c.note(log.Entry{Level: log.LevelInfo, Component: "console", Message: text, Objects: []string{vm.ID}, Labels: map[string]string{"vm": vm.Spec.Name}})
		}}
		in := make(chan []byte) // nothing is ever typed; closed, it would say so
		err := c.vmm.Console(ctx, req, vmm.ConsoleIO{In: in, Out: l.write})
		l.end()
		now, gerr := c.vmm.Get(ctx, vmm.Ref{Ref: vm.ID})
		if err == nil || gerr == nil && !now.State.Live() || errors.Is(gerr, errs.NotFound) {
			return
		}
		t := time.NewTimer(retry)
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// lines cuts a stream of bytes into printable lines.
type lines struct {
	emit func(string)

	mu    sync.Mutex
	buf   []byte
	state escape
	timer *time.Timer
}

// escape is where in an escape sequence the stream is (ECMA-48, section 5: CSI ends with a byte from 0x40 to
// 0x7e, OSC and the like with BEL or ESC \).
type escape uint8

const (
	text escape = iota
	esc
	csi
	str
	strEsc
)

func (l *lines) write(b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range b {
		switch l.state {
		case esc:
			switch {
			case c == '[':
				l.state = csi
			case c == ']' || c == 'P' || c == '^' || c == '_' || c == 'X':
				l.state = str
			case c >= 0x20 && c <= 0x2f: // intermediate byte: one more follows
			default:
				l.state = text
			}
			continue
		case csi:
			if c >= 0x40 && c <= 0x7e {
				l.state = text
			}
			if c != '\n' { // a sequence cut off by a line's end does not swallow the next line
				continue
			}
			l.state = text
		case str:
			switch c {
			case 0x07:
				l.state = text
			case 0x1b:
				l.state = strEsc
			}
			if c != '\n' {
				continue
			}
			l.state = text
		case strEsc:
			l.state = text
			if c == '\\' {
				continue
			}
		}
		switch {
		case c == 0x1b:
			l.state = esc
		case c == '\n':
			l.flushLocked()
		case c == '\r' || c == 0x07 || c == 0:
		case c == '\b':
			if _, n := utf8.DecodeLastRune(l.buf); n > 0 && len(l.buf) > 0 {
				l.buf = l.buf[:len(l.buf)-n]
			}
		case c == '\t' || c >= 0x20 && c != 0x7f:
			if l.buf = append(l.buf, c); len(l.buf) >= maxLine {
				l.flushLocked()
			}
		}
	}
	if len(l.buf) > 0 {
		if l.timer == nil {
			l.timer = time.AfterFunc(flush, l.late)
		} else {
			l.timer.Reset(flush)
		}
	}
	return nil
}

func (l *lines) late() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flushLocked()
}

func (l *lines) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flushLocked()
	if l.timer != nil {
		l.timer.Stop()
	}
}

func (l *lines) flushLocked() {
	if s := strings.TrimRight(strings.ToValidUTF8(string(l.buf), "\ufffd"), " \t"); s != "" {
		l.emit(s)
	}
	l.buf = l.buf[:0]
}
