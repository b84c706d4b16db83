package wire

import (
	"time"
	"unsafe"

	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/log"
)

// The log's hot path: entries come by the hundred thousand a second. A batch is encoded with three allocations
// (messages, pointers to them, headers of object ids) and decoded with two, however many entries it has.

func logEntriesToPB(list []log.Entry) []*logpb.Entry {
	objects := 0
	for i := range list {
		objects += len(list[i].Objects)
	}
	slab, out, ids := make([]logpb.Entry, len(list)), make([]*logpb.Entry, len(list)), make([][]byte, 0, objects)
	for i := range list {
		first := len(ids)
		for _, o := range list[i].Objects {
			ids = append(ids, view(o))
		}
		fillEntry(&slab[i], &list[i], ids[first:len(ids):len(ids)])
		out[i] = &slab[i]
	}
	return out
}

func logEntriesFromPB(list []*logpb.Entry) []log.Entry {
	objects := 0
	for _, m := range list {
		objects += len(m.GetObjects())
	}
	out, ids := make([]log.Entry, len(list)), make([]string, 0, objects)
	for i, m := range list {
		first := len(ids)
		for _, o := range m.GetObjects() {
			ids = append(ids, own(o))
		}
		readEntry(&out[i], m, ids[first:len(ids):len(ids)])
	}
	return out
}

func logEntryToPB(_ *Enc, v *log.Entry) *logpb.Entry {
	m := &logpb.Entry{}
	fillEntry(m, v, bytesOf(v.Objects))
	return m
}

func logEntryFromPB(_ *Dec, m *logpb.Entry) (v log.Entry) {
	if m != nil {
		readEntry(&v, m, stringsOf(m.Objects))
	}
	return v
}

func fillEntry(m *logpb.Entry, v *log.Entry, objects [][]byte) {
	m.Id, m.Level, m.Component, m.Message, m.Labels = utf8(v.ID), logpb.Level(v.Level), utf8(v.Component), utf8(v.Message), utf8Map(v.Labels)
	if len(objects) > 0 {
		m.Objects = objects
	}
	if !v.Time.IsZero() {
		m.TimeUnixNs = v.Time.UnixNano()
	}
}

func readEntry(v *log.Entry, m *logpb.Entry, objects []string) {
	if m == nil {
		return
	}
	v.ID, v.Level, v.Component, v.Message, v.Labels = m.Id, log.Level(m.Level), m.Component, m.Message, m.Labels
	if len(objects) > 0 {
		v.Objects = objects
	}
	if m.TimeUnixNs != 0 {
		v.Time = time.Unix(0, m.TimeUnixNs).UTC()
	}
}

// view is s as bytes, without a copy. The message only lives until it is marshalled, and nothing writes to it.
func view(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

// own is b as a string, without a copy: b was allocated by the decoder for this message, which is dropped.
func own(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
