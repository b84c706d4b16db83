// Package rec is the canonical encoding of one entry: what the write-ahead part of the store holds, what the
// head keeps in memory, and what the audit chain hashes. The same entry always has the same bytes (labels
// are sorted by key).
//
//	time       8 bytes, big-endian, nanoseconds since 1970 with the sign bit flipped (orders as bytes)
//	level      1 byte
//	id         uvarint length, bytes
//	component  uvarint length, bytes
//	message    uvarint length, bytes
//	objects    uvarint count, each uvarint length, bytes
//	labels     uvarint count, each: key (uvarint length, bytes), value (uvarint length, bytes)
package rec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
)

// Limits beside those of the contract.
const (
	MaxID        = 64       // bytes, contract
	MaxComponent = 256      // bytes
	MaxLabelKey  = 256      // bytes
	MaxLabels    = 64 << 10 // bytes of all label values of one entry
)

// IDAt is where the id stands in an encoded entry; the byte before it is its length.
const IDAt = 10

// ErrBad is returned for bytes that are no entry.
var ErrBad = errors.New("malformed entry")

// minTime and maxTime are the instants that nanoseconds in an int64 can hold (years 1678 and 2261).
var (
	minTime = time.Unix(0, -1<<63)
	maxTime = time.Unix(0, 1<<63-1)
)

// Check says whether the contract allows e; at names it in the error ("entries[3]").
func Check(e *log.Entry, at func() string) error {
	bad := func(field, remedy, format string, args ...any) error {
		return errs.Field(at()+"."+field, remedy, "%s: "+format, append([]any{at()}, args...)...)
	}
	switch {
	case e.ID == "":
		return bad("id", "give each entry a UUIDv7", "no id")
	case len(e.ID) > MaxID:
		return bad("id", "use a UUIDv7", "id of %d bytes, the limit is %d", len(e.ID), MaxID)
	case !utf8.ValidString(e.ID):
		return bad("id", "use a UUIDv7", "id %s is not UTF-8", ident.Quote(e.ID))
	case e.Level < log.LevelAudit || e.Level > log.LevelDebug:
		return bad("level", "use 1 (audit) to 5 (debug)", "level %d does not exist", e.Level)
	case e.Time.IsZero() || e.Time.Before(minTime) || e.Time.After(maxTime):
		return bad("time", "give a time between the years 1678 and 2261", "time %s cannot be stored", e.Time.UTC().Format(time.RFC3339))
	case len(e.Message) > log.MaxMessage:
		return bad("message", "cut it into several entries", "message of %d bytes, the limit is %d", len(e.Message), log.MaxMessage)
	case !utf8.ValidString(e.Message):
		return bad("message", "replace what is not UTF-8 before sending", "message is not UTF-8")
	case len(e.Component) > MaxComponent || !utf8.ValidString(e.Component):
		return bad("component", "use a short UTF-8 word", "component is over %d bytes or not UTF-8", MaxComponent)
	case len(e.Objects) > log.MaxObjects:
		return bad("objects", "name the objects that matter", "%d objects, the limit is %d", len(e.Objects), log.MaxObjects)
	case len(e.Labels) > log.MaxLabels:
		return bad("labels", "use fewer labels", "%d labels, the limit is %d", len(e.Labels), log.MaxLabels)
	}
	for _, o := range e.Objects {
		if o == "" || len(o) > log.MaxObjectLen {
			return bad("objects", "give ids of 1 to 256 bytes", "object id of %d bytes", len(o))
		}
	}
	sum := 0
	for k, v := range e.Labels {
		sum += len(v)
		if k == "" || len(k) > MaxLabelKey || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return bad("labels", "use short UTF-8 keys and UTF-8 values", "label %s has an empty or long key or is not UTF-8", ident.Quote(k))
		}
	}
	if sum > MaxLabels {
		return bad("labels", "put long text into the message", "label values of %d bytes, the limit is %d", sum, MaxLabels)
	}
	return nil
}

// Append encodes e behind dst. Objects named twice are kept once.
func Append(dst []byte, e *log.Entry) []byte {
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.Time.UnixNano())^1<<63)
	dst = append(dst, byte(e.Level))
	dst = appendString(dst, e.ID)
	dst = appendString(dst, e.Component)
	dst = appendString(dst, e.Message)
	objs := e.Objects
	if len(objs) > 1 && hasTwice(objs) {
		objs = dedup(objs)
	}
	dst = binary.AppendUvarint(dst, uint64(len(objs)))
	for _, o := range objs {
		dst = appendString(dst, o)
	}
	dst = binary.AppendUvarint(dst, uint64(len(e.Labels)))
	if len(e.Labels) == 1 {
		for k, v := range e.Labels {
			dst = appendString(appendString(dst, k), v)
		}
	} else if len(e.Labels) > 1 {
		var buf [16]string
		keys := buf[:0]
		for k := range e.Labels {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			dst = appendString(appendString(dst, k), e.Labels[k])
		}
	}
	return dst
}

func appendString(dst []byte, s string) []byte {
	if len(s) < 0x80 {
		dst = append(dst, byte(len(s)))
	} else {
		dst = binary.AppendUvarint(dst, uint64(len(s)))
	}
	return append(dst, s...)
}

func hasTwice(objs []string) bool {
	for i, o := range objs[1:] {
		if slices.Contains(objs[:i+1], o) {
			return true
		}
	}
	return false
}

func dedup(objs []string) []string {
	out := make([]string, 0, len(objs))
	for _, o := range objs {
		if !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out
}

// View is an encoded entry taken apart; its slices point into the encoding.
type View struct {
	Time      int64 // nanoseconds since 1970
	Level     log.Level
	ID        []byte
	Component []byte
	Message   []byte
	NObjects  int
	NLabels   int
	objects   []byte // encoded, without the count
	labels    []byte
}

// Parse takes b apart and checks it wholly; nothing may follow the entry.
func Parse(b []byte, v *View) error {
	if len(b) < 9 {
		return ErrBad
	}
	v.Time = int64(binary.BigEndian.Uint64(b) ^ 1<<63)
	v.Level = log.Level(b[8])
	b = b[9:]
	ok := true
	v.ID, b, ok = take(b, ok)
	v.Component, b, ok = take(b, ok)
	v.Message, b, ok = take(b, ok)
	v.NObjects, b, ok = count(b, ok)
	v.objects = b
	for range v.NObjects {
		_, b, ok = take(b, ok)
		if !ok {
			return ErrBad
		}
	}
	v.objects = v.objects[:len(v.objects)-len(b)]
	v.NLabels, b, ok = count(b, ok)
	v.labels = b
	for range v.NLabels {
		_, b, ok = take(b, ok)
		_, b, ok = take(b, ok)
		if !ok {
			return ErrBad
		}
	}
	if !ok || len(b) != 0 {
		return ErrBad
	}
	return nil
}

func take(b []byte, ok bool) (field, rest []byte, good bool) {
	if !ok || len(b) == 0 {
		return nil, nil, false
	}
	n, k := uint64(b[0]), 1
	if n >= 0x80 {
		if n, k = binary.Uvarint(b); k <= 0 {
			return nil, nil, false
		}
	}
	b = b[k:]
	if n > uint64(len(b)) {
		return nil, nil, false
	}
	return b[:n:n], b[n:], true
}

func count(b []byte, ok bool) (n int, rest []byte, good bool) {
	if !ok {
		return 0, nil, false
	}
	c, k := binary.Uvarint(b)
	if k <= 0 || c > uint64(len(b)) {
		return 0, nil, false
	}
	return int(c), b[k:], true
}

// Objects calls fn for each object id.
func (v *View) Objects(fn func(o []byte)) {
	b := v.objects
	for range v.NObjects {
		var o []byte
		o, b, _ = take(b, true)
		fn(o)
	}
}

// Labels calls fn for each label, in the order of the keys.
func (v *View) Labels(fn func(k, val []byte)) {
	b := v.labels
	for range v.NLabels {
		var k, val []byte
		k, b, _ = take(b, true)
		val, b, _ = take(b, true)
		fn(k, val)
	}
}

// RawObjects is the encoded objects, for an iteration by hand with NextObject.
func (v *View) RawObjects() []byte { return v.objects }

// NextObject takes one object from what RawObjects or an earlier call left.
func NextObject(rest []byte) (o, more []byte) {
	o, more, _ = take(rest, true)
	return o, more
}

// Label is the value of a label.
func (v *View) Label(key string) (val []byte, ok bool) {
	v.Labels(func(k, x []byte) {
		if string(k) == key {
			val, ok = x, true
		}
	})
	return val, ok
}

// Entry copies the view into an entry of its own.
func (v *View) Entry() log.Entry {
	e := log.Entry{Time: time.Unix(0, v.Time).UTC(), ID: string(v.ID), Level: v.Level,
		Component: string(v.Component), Message: string(v.Message)}
	if v.NObjects > 0 {
		e.Objects = make([]string, 0, v.NObjects)
		v.Objects(func(o []byte) { e.Objects = append(e.Objects, string(o)) })
	}
	if v.NLabels > 0 {
		e.Labels = make(map[string]string, v.NLabels)
		v.Labels(func(k, val []byte) { e.Labels[string(k)] = string(val) })
	}
	return e
}

// V7 takes a canonical UUIDv7 apart into its milliseconds, its 12 and its 62 free bits (RFC 9562, section
// 5.7); ok is false for any other id.
func V7(id []byte) (ms, a, b uint64, ok bool) {
	if len(id) != 36 || id[8] != '-' || id[13] != '-' || id[18] != '-' || id[23] != '-' || id[14] != '7' {
		return 0, 0, 0, false
	}
	var hi, lo uint64
	var bad byte
	for i := range 18 {
		if i == 8 || i == 13 {
			continue
		}
		x := nibble[id[i]]
		bad |= x
		hi = hi<<4 | uint64(x&15)
	}
	for i := 19; i < 36; i++ {
		if i == 23 {
			continue
		}
		x := nibble[id[i]]
		bad |= x
		lo = lo<<4 | uint64(x&15)
	}
	if bad&0xF0 != 0 || lo>>62 != 2 {
		return 0, 0, 0, false
	}
	return hi >> 16, hi & 0xfff, lo & (1<<62 - 1), true
}

// AppendV7 undoes V7.
func AppendV7(dst []byte, ms, a, b uint64) []byte {
	hi := ms<<16 | 7<<12 | a&0xfff
	lo := uint64(2)<<62 | b&(1<<62-1)
	return AppendUUID(dst, hi, lo)
}

// AppendUUID writes 128 bits in the canonical form.
func AppendUUID(dst []byte, hi, lo uint64) []byte {
	const hex = "0123456789abcdef"
	var s [36]byte
	p := 0
	put := func(v uint64, n int) {
		for i := n - 1; i >= 0; i-- {
			s[p] = hex[v>>(4*uint(i))&15]
			p++
		}
	}
	put(hi>>32, 8)
	s[p] = '-'
	p++
	put(hi>>16, 4)
	s[p] = '-'
	p++
	put(hi, 4)
	s[p] = '-'
	p++
	put(lo>>48, 4)
	s[p] = '-'
	p++
	put(lo, 12)
	return append(dst, s[:]...)
}

// UUID takes any canonical lower-case UUID at the front of s apart.
func UUID(s []byte) (hi, lo uint64, ok bool) {
	if len(s) < 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return 0, 0, false
	}
	var bad byte
	for i := range 36 {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			continue
		}
		x := nibble[s[i]]
		bad |= x
		if i < 18 {
			hi = hi<<4 | uint64(x&15)
		} else {
			lo = lo<<4 | uint64(x&15)
		}
	}
	return hi, lo, bad&0xF0 == 0
}

// nibble is the value of a lower-case hexadecimal digit, 0xF0 for anything else. It is never written to.
var nibble = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xF0
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

// Describe names an entry in a message.
func Describe(e *log.Entry) string {
	return fmt.Sprintf("%s %s %s", e.Time.UTC().Format(time.RFC3339Nano), e.Level, strings.ToValidUTF8(e.ID, "?"))
}
