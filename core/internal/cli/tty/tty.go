// Package tty holds what a command does with a terminal: raw mode, the key that leaves a console, progress.
package tty

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

// Width is the number of columns of a terminal, 80 if it does not say.
func Width(f *os.File) int {
	if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
		return w
	}
	return 80
}

// Raw puts a terminal into raw mode and gives the function that puts it back, which may be called twice.
func Raw(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, err
	}
	return func() { _ = term.Restore(fd, old) }, nil
}

// Escape is the key that leaves a console. Zero is none.
type Escape byte

// ParseEscape reads "^]", "ctrl-]" or "none".
func ParseEscape(s string) (Escape, error) {
	if s == "none" {
		return 0, nil
	}
	t, ok := strings.CutPrefix(strings.ToLower(s), "ctrl-")
	if !ok {
		t, ok = strings.CutPrefix(s, "^")
	}
	if ok && len(t) == 1 {
		c := strings.ToUpper(t)[0]
		if c > '@' && c <= '_' {
			return Escape(c & 0x1f), nil
		}
	}
	return 0, errs.Field("escape", `give a control key, as in "^]" or "ctrl-b", or "none"`, "escape key %s is no control key", ident.Quote(s))
}

// String names the key for people.
func (e Escape) String() string {
	if e == 0 {
		return "none"
	}
	return fmt.Sprintf("Ctrl-%c", byte(e)|0x40)
}

// Cut gives what was typed before the key, and whether the key was typed.
func (e Escape) Cut(typed []byte) (before []byte, left bool) {
	if e == 0 {
		return typed, false
	}
	before, _, left = bytes.Cut(typed, []byte{byte(e)})
	return before, left
}

// Matcher finds a text in a stream of pieces, also across their borders.
type Matcher struct {
	text []byte
	tail []byte
}

// NewMatcher looks for text; an empty one is never found.
func NewMatcher(text string) *Matcher { return &Matcher{text: []byte(text)} }

// Write takes the next piece and says whether the text is now complete.
func (m *Matcher) Write(p []byte) bool {
	if len(m.text) == 0 {
		return false
	}
	all := append(m.tail, p...)
	if bytes.Contains(all, m.text) {
		return true
	}
	keep := min(len(all), len(m.text)-1)
	m.tail = append([]byte(nil), all[len(all)-keep:]...)
	return false
}
