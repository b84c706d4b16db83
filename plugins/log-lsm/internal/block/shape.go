package block

import (
	"bytes"
	"encoding/binary"
	"math"
	"strings"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
)

// Marks stand in a shape where an entry has a variable part. They are bytes that UTF-8 never uses, so they
// cannot stem from the entry's own text. They are on disk and never change.
const (
	markSep    = 0xF8 // between message, label keys and label values
	markString = 0xF9 // any text: an offset into the block's heap
	markObject = 0xFA // + index: the entry's object of that index, which is stored anyway
	markUUID   = 0xFC // a canonical UUID: two numbers
	markHex    = 0xFD // + length: so many lower-case hexadecimal digits
	markDigits = 0xFE // + length: so many decimal digits, the first of which is 0
	markInt    = 0xFF // a decimal number without leading zeros
)

// MaxShape is the longest shape in bytes; entries with longer fixed text are stored whole.
const MaxShape = 4096

// Shape is what entries of one kind have in common: fixed text of the message, label keys, fixed text of label
// values. A component is a shape that is all fixed text.
type Shape struct {
	Num     uint32
	message []piece
	labels  []label
	slots   []byte // mark of each variable part, in order
}

// Text is the text of a shape that has no variable parts and no labels: a component.
func (s *Shape) Text() string {
	t, _ := plain(s.message)
	return t
}

type label struct {
	key   string
	value []piece
}

type piece struct {
	lit  string // when mark is 0
	mark byte
	arg  byte
	slot int
}

// ParseShape takes the text of a shape apart.
func ParseShape(num uint32, text string) (*Shape, error) {
	s := &Shape{Num: num}
	var pieces []piece
	var fields [][]piece
	start := 0
	lit := func(end int) {
		if end > start {
			pieces = append(pieces, piece{lit: text[start:end]})
		}
	}
	for i := 0; i < len(text); i++ {
		c := text[i]
		if c < markSep || c == 0xFB {
			continue
		}
		lit(i)
		p := piece{mark: c}
		switch c {
		case markSep:
			fields = append(fields, pieces)
			pieces = nil
			start = i + 1
			continue
		case markHex, markDigits, markObject:
			if i++; i >= len(text) || text[i] > 64 {
				return nil, ErrBad
			}
			p.arg = text[i]
			if c == markHex && (p.arg == 0 || p.arg > 16) || c == markDigits && (p.arg == 0 || p.arg > 19) {
				return nil, ErrBad
			}
		}
		if c != markObject {
			p.slot = len(s.slots)
			s.slots = append(s.slots, c)
		}
		pieces = append(pieces, p)
		start = i + 1
	}
	lit(len(text))
	fields = append(fields, pieces)
	if len(fields)%2 != 1 {
		return nil, ErrBad
	}
	s.message = fields[0]
	for f := fields[1:]; len(f) > 0; f = f[2:] {
		key, ok := plain(f[0])
		if !ok {
			return nil, ErrBad
		}
		s.labels = append(s.labels, label{key, f[1]})
	}
	return s, nil
}

func plain(p []piece) (string, bool) {
	switch {
	case len(p) == 0:
		return "", true
	case len(p) == 1 && p[0].mark == 0:
		return p[0].lit, true
	}
	return "", false
}

// Matches says what the shape alone tells about whether the messages of its entries contain needle: 1 all
// do, -1 none does, 0 each must be looked at.
func (s *Shape) Matches(needle string) int {
	variable := false
	for _, p := range s.message {
		if p.mark == 0 && strings.Contains(p.lit, needle) {
			return 1
		}
		variable = variable || p.mark != 0
	}
	if !variable {
		return -1
	}
	// What no variable part can hold must stand in the fixed text: each run of such bytes in the needle.
	var in func(c byte) bool
	kinds := byte(0)
	for _, p := range s.message {
		switch p.mark {
		case 0, markInt, markDigits:
		case markHex, markUUID:
			kinds |= 1
		case markString:
			kinds |= 2
		default:
			return 0 // an object id is anything
		}
	}
	switch {
	case kinds >= 2:
		in = func(c byte) bool { return class[c] != 0 || c == '-' }
	case kinds == 1:
		in = func(c byte) bool { return class[c]&(clsDigit|clsHex) != 0 || c == '-' }
	default:
		in = func(c byte) bool { return class[c] == clsDigit }
	}
	held := false // the needle has bytes that a variable part can hold
	for i := 0; i < len(needle); {
		if in(needle[i]) {
			held = true
			i++
			continue
		}
		j := i
		for j < len(needle) && !in(needle[j]) {
			j++
		}
		if !s.fixed(needle[i:j]) {
			return -1
		}
		i = j
	}
	if !held {
		return -1 // it would stand in one piece of fixed text, which has been looked at
	}
	return 0
}

// fixed says whether a text stands in the fixed text of the message.
func (s *Shape) fixed(text string) bool {
	for _, p := range s.message {
		if p.mark == 0 && strings.Contains(p.lit, text) {
			return true
		}
	}
	return false
}

// Label says what the shape alone tells about a label: 1 all entries have this value, -1 none has, 0 each
// must be looked at.
func (s *Shape) Label(key, value string) int {
	for _, l := range s.labels {
		if l.key != key {
			continue
		}
		v, ok := plain(l.value)
		switch {
		case !ok:
			return 0
		case v == value:
			return 1
		}
		return -1
	}
	return -1
}

// shaper takes entries apart into shape and variable parts.
type shaper struct {
	text []byte   // shape of the entry at hand
	vars []uint64 // its variable parts; a string is offset<<stringShift|length in arena
	// arena holds the strings of the block at hand.
	arena []byte
}

const stringShift = 20

func (h *shaper) addString(s []byte) {
	h.vars = append(h.vars, uint64(len(h.arena))<<stringShift|uint64(len(s)))
	h.arena = append(h.arena, s...)
}

// entry fills text and appends to vars.
func (h *shaper) entry(v *rec.View) {
	var buf [8][]byte
	objs := buf[:0]
	for rest, n := v.RawObjects(), 0; n < v.NObjects && n < cap(objs); n++ {
		var o []byte
		o, rest = rec.NextObject(rest)
		objs = append(objs, o)
	}
	h.text = h.text[:0]
	h.field(v.Message, objs)
	v.Labels(func(k, val []byte) {
		h.text = append(h.text, markSep)
		h.text = append(h.text, k...)
		h.text = append(h.text, markSep)
		h.field(val, objs)
	})
}

// Classes of bytes; the table is never written to.
const (
	clsDigit = 1 << iota
	clsHex   // a to f
	clsAlpha // other letters
)

var class = func() (t [256]byte) {
	for c := '0'; c <= '9'; c++ {
		t[c] = clsDigit
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c] = clsAlpha
		t[c-32] = clsAlpha
	}
	for c := 'a'; c <= 'f'; c++ {
		t[c] = clsHex
	}
	return t
}()

// field splits one text at its variable tokens.
func (h *shaper) field(s []byte, objs [][]byte) {
	lit := 0
	for i := 0; i < len(s); {
		if class[s[i]] == 0 {
			i++
			continue
		}
		if k, ok := objectAt(s[i:], objs); ok {
			h.text = append(h.text, s[lit:i]...)
			h.text = append(h.text, markObject, byte(k))
			i += len(objs[k])
			lit = i
			continue
		}
		if n := pairs(s[i:]); n > 0 {
			h.text = append(h.text, s[lit:i]...)
			for end := i + n; ; i += 3 {
				h.hex(s[i : i+2])
				if i+2 >= end {
					break
				}
				h.text = append(h.text, ':')
			}
			i += 2
			lit = i
			continue
		}
		j := i
		var seen byte
		for j < len(s) {
			c := class[s[j]]
			if c == 0 {
				break
			}
			seen |= c
			j++
		}
		if j == i+8 && seen&clsAlpha == 0 && j < len(s) && s[j] == '-' {
			if hi, lo, ok := rec.UUID(s[i:]); ok && (i+36 == len(s) || class[s[i+36]] == 0) {
				h.text = append(h.text, s[lit:i]...)
				h.text = append(h.text, markUUID)
				h.vars = append(h.vars, hi, lo)
				i += 36
				lit = i
				continue
			}
		}
		if seen&clsDigit != 0 {
			h.text = append(h.text, s[lit:i]...)
			h.token(s[i:j], seen)
			lit = j
		}
		i = j
	}
	h.text = append(h.text, s[lit:]...)
}

// pairs is the length of two-digit hexadecimal numbers with colons between them at the front of s, of which
// there are at least three: hardware addresses, and times of day.
func pairs(s []byte) int {
	n := 0
	for {
		if len(s) < n+2 || class[s[n]]&(clsDigit|clsHex) == 0 || class[s[n+1]]&(clsDigit|clsHex) == 0 {
			return 0
		}
		n += 2
		if len(s) > n && s[n] == ':' {
			n++
			continue
		}
		if len(s) > n && class[s[n]] != 0 || n < 8 {
			return 0
		}
		return n
	}
}

func objectAt(s []byte, objs [][]byte) (int, bool) {
	for k, o := range objs {
		if len(o) >= 4 && len(s) >= len(o) && s[0] == o[0] && s[len(o)-1] == o[len(o)-1] && bytes.Equal(s[:len(o)], o) &&
			(len(s) == len(o) || class[s[len(o)]] == 0) {
			return k, true
		}
	}
	return 0, false
}

// token stores a run of letters and digits with at least one digit.
func (h *shaper) token(s []byte, seen byte) {
	switch {
	case seen == clsDigit:
		h.digits(s)
		return
	case seen&clsAlpha == 0 && len(s) >= 6:
		h.hex(s)
		return
	case len(s) > 2 && s[0] == '0' && s[1] == 'x':
		tail := byte(0)
		for _, c := range s[2:] {
			tail |= class[c]
		}
		if tail&clsAlpha == 0 {
			h.text = append(h.text, "0x"...)
			h.hex(s[2:])
			return
		}
	}
	// eth0, vda1, x86: letters stay text, digits are numbers. What changes more often is no name.
	changes := 0
	for k := 1; k < len(s); k++ {
		if (class[s[k]] == clsDigit) != (class[s[k-1]] == clsDigit) {
			changes++
		}
	}
	if changes > 3 {
		h.text = append(h.text, markString)
		h.addString(s)
		return
	}
	for len(s) > 0 {
		k := 0
		digit := class[s[0]] == clsDigit
		for k < len(s) && (class[s[k]] == clsDigit) == digit {
			k++
		}
		if digit {
			h.digits(s[:k])
		} else {
			h.text = append(h.text, s[:k]...)
		}
		s = s[k:]
	}
}

func (h *shaper) digits(s []byte) {
	if len(s) > 19 {
		h.text = append(h.text, markString)
		h.addString(s)
		return
	}
	var v uint64
	for _, c := range s {
		v = v*10 + uint64(c-'0')
	}
	if s[0] == '0' && len(s) > 1 {
		h.text = append(h.text, markDigits, byte(len(s)))
	} else {
		h.text = append(h.text, markInt)
	}
	h.vars = append(h.vars, v)
}

func (h *shaper) hex(s []byte) {
	for len(s) > 0 {
		k := min(len(s), 16)
		var v uint64
		for _, c := range s[:k] {
			x := c - '0'
			if x > 9 {
				x = c - 'a' + 10
			}
			v = v<<4 | uint64(x)
		}
		h.text = append(h.text, markHex, byte(k))
		h.vars = append(h.vars, v)
		s = s[k:]
	}
}

// appendHex writes the n low hexadecimal digits of v.
func appendHex(dst []byte, v uint64, n int) []byte {
	for i := n - 1; i >= 0; i-- {
		dst = append(dst, "0123456789abcdef"[v>>(4*uint(i))&15])
	}
	return dst
}

// appendDigits writes v with n decimal digits.
func appendDigits(dst []byte, v uint64, n int) []byte {
	at := len(dst)
	for range n {
		dst = append(dst, '0')
	}
	for i := n - 1; i >= 0; i-- {
		dst[at+i] = byte('0' + v%10)
		v /= 10
	}
	return dst
}

// literal encodes component, message and labels of an entry that is stored whole.
func literal(dst []byte, v *rec.View) []byte {
	dst = appendBytes(dst, v.Component)
	dst = appendBytes(dst, v.Message)
	dst = binary.AppendUvarint(dst, uint64(v.NLabels))
	v.Labels(func(k, val []byte) { dst = appendBytes(appendBytes(dst, k), val) })
	return dst
}

func appendBytes(dst, s []byte) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(s))), s...)
}

func takeBytes(b []byte) (s, rest []byte, ok bool) {
	n, k := binary.Uvarint(b)
	if k <= 0 || n > uint64(len(b)-k) || n > math.MaxInt32 {
		return nil, nil, false
	}
	b = b[k:]
	return b[:n:n], b[n:], true
}
