package tty

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/mvirt/mvirt/core/internal/cli/units"
)

// Progress shows how far long work is: on a terminal one line that is drawn again, in a pipe a plain line
// for each phase and each tenth, and at least one a minute while something moves.
type Progress struct {
	w     io.Writer
	width int // of the terminal; 0: a pipe
	now   func() time.Time

	phase    string
	start    time.Time // of the phase
	base     uint64    // done at its start
	drawn    time.Time
	shown    bool // a line is on the terminal
	lastTen  int
	lastLine time.Time
}

// redraw is the shortest time between two drawings.
const redraw = 100 * time.Millisecond

// NewProgress shows on w, a terminal of so many columns, or a pipe with width 0.
func NewProgress(w io.Writer, width int, now func() time.Time) *Progress {
	return &Progress{w: w, width: width, now: now, lastTen: -1}
}

// Update tells the state; total 0 means that it is not known.
func (p *Progress) Update(phase string, done, total uint64) {
	now := p.now()
	if phase != p.phase || p.start.IsZero() {
		p.phase, p.start, p.base, p.drawn, p.lastTen, p.lastLine = phase, now, done, time.Time{}, -1, time.Time{}
	}
	if p.width == 0 {
		p.line(now, done, total)
		return
	}
	if now.Sub(p.drawn) < redraw && done != total {
		return
	}
	p.drawn, p.shown = now, true
	text := p.text(now, done, total)
	if bar := p.width - len(text) - 4; total > 0 && bar >= 10 {
		bar = min(bar, 40)
		full := int(float64(bar) * fraction(done, total))
		text = "[" + strings.Repeat("=", full) + strings.Repeat(" ", bar-full) + "] " + text
	}
	if len(text) > p.width-1 && p.width > 1 {
		text = text[:p.width-1]
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", text)
}

func (p *Progress) line(now time.Time, done, total uint64) {
	ten := int(10 * fraction(done, total))
	if p.lastTen >= 0 && ten == p.lastTen && now.Sub(p.lastLine) < time.Minute {
		return
	}
	p.lastTen, p.lastLine = ten, now
	fmt.Fprintln(p.w, p.text(now, done, total))
}

func (p *Progress) text(now time.Time, done, total uint64) string {
	var b strings.Builder
	b.WriteString(p.phase)
	switch {
	case total > 0:
		fmt.Fprintf(&b, " %3d%%  %s of %s", int(100*fraction(done, total)), units.Size(done), units.Size(total))
	case done > 0:
		fmt.Fprintf(&b, "  %s", units.Size(done))
	}
	elapsed := now.Sub(p.start)
	if moved := done - p.base; done > p.base && elapsed >= time.Second {
		rate := float64(moved) / elapsed.Seconds()
		fmt.Fprintf(&b, "  %s/s", units.Size(uint64(rate)))
		if total > done && rate > 0 {
			fmt.Fprintf(&b, "  %s left", units.Duration(time.Duration(float64(total-done)/rate*float64(time.Second))))
		}
	}
	return b.String()
}

func fraction(done, total uint64) float64 {
	if total == 0 {
		return 0
	}
	return min(float64(done)/float64(total), 1)
}

// Clear takes the line off the terminal.
func (p *Progress) Clear() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}
