package wire

import (
	"time"

	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/log"
)

// logEntryToPB is the log's hot path: one allocation for the message and one for the object ids' headers.
func logEntryToPB(_ *Enc, v *log.Entry) *logpb.Entry {
	m := &logpb.Entry{Id: utf8(v.ID), Level: logpb.Level(v.Level), Component: utf8(v.Component), Message: utf8(v.Message),
		Objects: bytesOf(v.Objects), Labels: utf8Map(v.Labels)}
	if !v.Time.IsZero() {
		m.TimeUnixNs = v.Time.UnixNano()
	}
	return m
}

func logEntryFromPB(_ *Dec, m *logpb.Entry) (v log.Entry) {
	if m == nil {
		return v
	}
	v = log.Entry{ID: m.Id, Level: log.Level(m.Level), Component: m.Component, Message: m.Message,
		Objects: stringsOf(m.Objects), Labels: m.Labels}
	if m.TimeUnixNs != 0 {
		v.Time = time.Unix(0, m.TimeUnixNs).UTC()
	}
	return v
}
