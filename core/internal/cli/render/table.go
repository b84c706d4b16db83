package render

import (
	"strings"
	"unicode/utf8"
)

// Color is an ANSI colour, or none.
type Color string

// Colours that tables use. They stand for meanings, not decoration: good, attention, bad, of less weight.
const (
	Plain  Color = ""
	Green  Color = "\x1b[32m"
	Yellow Color = "\x1b[33m"
	Red    Color = "\x1b[31m"
	Cyan   Color = "\x1b[36m"
	Dim    Color = "\x1b[2m"
	Bold   Color = "\x1b[1m"
)

const reset = "\x1b[0m"

// Paint puts s into a colour if on.
func Paint(on bool, c Color, s string) string {
	if !on || c == Plain || s == "" {
		return s
	}
	return string(c) + s + reset
}

// Column is one column of a table of T.
type Column[T any] struct {
	Head  string
	Wide  bool // only with -o wide
	Right bool // numbers stand at the right
	Cell  func(T) string
	Color func(T) Color // nil: plain
}

// Rows prints a table: a line of heads, a line for each row, columns two spaces apart. An empty cell shows
// as "-". Without rows it gives nothing.
func Rows[T any](columns []Column[T], rows []T, wide, color bool) string {
	if len(rows) == 0 {
		return ""
	}
	var cols []Column[T]
	for _, c := range columns {
		if wide || !c.Wide {
			cols = append(cols, c)
		}
	}
	cells := make([][]string, len(rows))
	width := make([]int, len(cols))
	for i, c := range cols {
		width[i] = utf8.RuneCountInString(c.Head)
	}
	for r, row := range rows {
		cells[r] = make([]string, len(cols))
		for i, c := range cols {
			s := Clean(c.Cell(row))
			if s == "" {
				s = "-"
			}
			cells[r][i] = s
			width[i] = max(width[i], utf8.RuneCountInString(s))
		}
	}
	var b strings.Builder
	line := func(cell func(int) (string, Color)) {
		var l strings.Builder
		for i, c := range cols {
			s, paint := cell(i)
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(s))
			s = Paint(color, paint, s)
			switch {
			case c.Right:
				s = pad + s
			case i < len(cols)-1:
				s += pad
			}
			if i > 0 {
				l.WriteString("  ")
			}
			l.WriteString(s)
		}
		b.WriteString(strings.TrimRight(l.String(), " ") + "\n")
	}
	line(func(i int) (string, Color) { return cols[i].Head, Bold })
	for r, row := range rows {
		line(func(i int) (string, Color) {
			if f := cols[i].Color; f != nil {
				return cells[r][i], f(row)
			}
			return cells[r][i], Plain
		})
	}
	return b.String()
}

// Pair is one line of a description; lines of Value after the first are indented under it.
type Pair struct {
	Key   string
	Value string
	Color Color
}

// Pairs prints a description, keys padded to one width. Pairs without a value are left out.
func Pairs(pairs []Pair, color bool) string {
	width := 0
	for _, p := range pairs {
		if p.Value != "" {
			width = max(width, utf8.RuneCountInString(p.Key))
		}
	}
	var b strings.Builder
	for _, p := range pairs {
		if p.Value == "" {
			continue
		}
		key := p.Key + ":" + strings.Repeat(" ", width-utf8.RuneCountInString(p.Key)+1)
		for i, l := range strings.Split(p.Value, "\n") {
			if i > 0 {
				key = strings.Repeat(" ", width+2)
			}
			b.WriteString(strings.TrimRight(key+Paint(color, p.Color, Clean(l)), " ") + "\n")
		}
	}
	return b.String()
}

// State is the colour of a state of any kind of object.
func State(s string) Color {
	switch s {
	case "running", "up", "ready", "done", "attached", "ok":
		return Green
	case "failed", "down", "quarantined", "error", "critical", "broken", "unknown":
		return Red
	case "starting", "stopping", "paused", "degraded", "backoff", "warning", "undoing", "queued", "creating", "deleting":
		return Yellow
	case "stopped", "canceled", "info":
		return Dim
	}
	return Plain
}
