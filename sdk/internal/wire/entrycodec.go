package wire

import (
	"errors"
	"fmt"
	"time"
	stdutf8 "unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

// An AppendStream carries the same bytes as any gRPC client or server of the contract writes and reads, but they
// are made from and turned into entries without the generated messages between: that is most of what a batch
// costs on either side (measured: 2 µs an entry, 0.3 like this). The numbers are those of Entry in log.proto;
// TestEntryCodec holds both ways to be the same.
const (
	fieldEntries = 1 // of AppendRequest

	fieldTime      = 1
	fieldID        = 2
	fieldLevel     = 3
	fieldComponent = 4
	fieldMessage   = 5
	fieldObjects   = 6
	fieldLabels    = 7

	fieldKey   = 1 // of a map's entry
	fieldValue = 2
)

// sizeText is the size of a field of one tag byte, or 0 when it is empty and left out.
func sizeText(s string) int {
	if s == "" {
		return 0
	}
	return 1 + protowire.SizeBytes(len(s))
}

func sizeEntry(e *log.Entry) int {
	n := sizeText(e.ID) + sizeText(e.Component) + sizeText(e.Message)
	if !e.Time.IsZero() && e.Time.UnixNano() != 0 {
		n += 9
	}
	if e.Level != 0 {
		n += 1 + protowire.SizeVarint(uint64(e.Level))
	}
	for _, o := range e.Objects {
		n += 1 + protowire.SizeBytes(len(o))
	}
	for k, v := range e.Labels {
		n += 1 + protowire.SizeBytes(sizePair(k, v))
	}
	return n
}

func sizePair(k, v string) int { return 2 + protowire.SizeBytes(len(k)) + protowire.SizeBytes(len(v)) }

// sizeEntries is what appendEntries adds.
func sizeEntries(list []log.Entry) (n int) {
	for i := range list {
		n += 1 + protowire.SizeBytes(sizeEntry(&list[i]))
	}
	return n
}

// appendEntries appends the entries as AppendRequest.entries. Two such texts behind each other are a request
// with the entries of both.
func appendEntries(b []byte, list []log.Entry) []byte {
	for i := range list {
		e := &list[i]
		if !validText(e) {
			c := *e
			c.ID, c.Component, c.Message, c.Labels = utf8(c.ID), utf8(c.Component), utf8(c.Message), utf8Map(c.Labels)
			e = &c
		}
		b = protowire.AppendVarint(protowire.AppendTag(b, fieldEntries, protowire.BytesType), uint64(sizeEntry(e)))
		b = appendEntry(b, e)
	}
	return b
}

func appendEntry(b []byte, e *log.Entry) []byte {
	if !e.Time.IsZero() {
		if ns := e.Time.UnixNano(); ns != 0 {
			b = protowire.AppendFixed64(protowire.AppendTag(b, fieldTime, protowire.Fixed64Type), uint64(ns))
		}
	}
	b = appendText(b, fieldID, e.ID)
	if e.Level != 0 {
		b = protowire.AppendVarint(protowire.AppendTag(b, fieldLevel, protowire.VarintType), uint64(e.Level))
	}
	b = appendText(b, fieldComponent, e.Component)
	b = appendText(b, fieldMessage, e.Message)
	for _, o := range e.Objects {
		b = protowire.AppendString(protowire.AppendTag(b, fieldObjects, protowire.BytesType), o)
	}
	for k, v := range e.Labels {
		b = protowire.AppendVarint(protowire.AppendTag(b, fieldLabels, protowire.BytesType), uint64(sizePair(k, v)))
		b = protowire.AppendString(protowire.AppendTag(b, fieldKey, protowire.BytesType), k)
		b = protowire.AppendString(protowire.AppendTag(b, fieldValue, protowire.BytesType), v)
	}
	return b
}

func appendText(b []byte, field protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), s)
}

// validText says whether all that protobuf wants to be UTF-8 is.
func validText(e *log.Entry) bool {
	if !stdutf8.ValidString(e.ID) || !stdutf8.ValidString(e.Component) || !stdutf8.ValidString(e.Message) {
		return false
	}
	for k, v := range e.Labels {
		if !stdutf8.ValidString(k) || !stdutf8.ValidString(v) {
			return false
		}
	}
	return true
}

// decodeEntries reads the entries of an AppendRequest. They refer to b, which must not change any more.
func decodeEntries(b []byte) ([]log.Entry, error) {
	count := 0
	for rest := b; len(rest) > 0; {
		num, typ, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return nil, badRequest(protowire.ParseError(n))
		}
		m := protowire.ConsumeFieldValue(num, typ, rest[n:])
		if m < 0 {
			return nil, badRequest(protowire.ParseError(m))
		}
		if num == fieldEntries && typ == protowire.BytesType {
			count++
		}
		rest = rest[n+m:]
	}
	list, ids := make([]log.Entry, count), make([]string, 0, 2*count)
	for i := 0; len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		b = b[n:]
		if num != fieldEntries || typ != protowire.BytesType {
			b = b[protowire.ConsumeFieldValue(num, typ, b):]
			continue
		}
		v, n := protowire.ConsumeBytes(b)
		b = b[n:]
		first := len(ids)
		var err error
		if ids, err = decodeEntry(&list[i], v, ids); err != nil {
			return nil, badRequest(fmt.Errorf("entry %d: %w", i, err))
		}
		if len(ids) > first {
			list[i].Objects = ids[first:len(ids):len(ids)]
		}
		i++
	}
	return list, nil
}

// errText is for what must be UTF-8 and is not.
var errText = errors.New("text is not UTF-8")

func badRequest(err error) error {
	return errs.Wrap(errs.Invalid, err, "the request is not as log.proto says")
}

// decodeEntry reads one entry and appends its objects to ids.
func decodeEntry(e *log.Entry, b []byte, ids []string) ([]string, error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return ids, protowire.ParseError(n)
		}
		b = b[n:]
		switch {
		case num == fieldTime && typ == protowire.Fixed64Type:
			v, k := protowire.ConsumeFixed64(b)
			if n = k; k >= 0 {
				e.Time = time.Time{}
				if v != 0 {
					e.Time = time.Unix(0, int64(v)).UTC()
				}
			}
		case num == fieldLevel && typ == protowire.VarintType:
			v, k := protowire.ConsumeVarint(b)
			n, e.Level = k, log.Level(uint32(v))
		case num >= fieldID && num <= fieldLabels && typ == protowire.BytesType && num != fieldLevel:
			v, k := protowire.ConsumeBytes(b)
			if n = k; k < 0 {
				break
			}
			if num != fieldObjects && num != fieldLabels && !stdutf8.Valid(v) {
				return ids, errText
			}
			switch num {
			case fieldID:
				e.ID = own(v)
			case fieldComponent:
				e.Component = own(v)
			case fieldMessage:
				e.Message = own(v)
			case fieldObjects:
				ids = append(ids, own(v))
			case fieldLabels:
				if err := decodeLabel(e, v); err != nil {
					return ids, err
				}
			}
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return ids, protowire.ParseError(n)
		}
		b = b[n:]
	}
	return ids, nil
}

func decodeLabel(e *log.Entry, b []byte) error {
	var key, val string
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if (num == fieldKey || num == fieldValue) && typ == protowire.BytesType {
			v, k := protowire.ConsumeBytes(b)
			n = k
			switch {
			case k >= 0 && !stdutf8.Valid(v):
				return errText
			case k >= 0 && num == fieldKey:
				key = own(v)
			case k >= 0:
				val = own(v)
			}
		} else {
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
	}
	if e.Labels == nil {
		e.Labels = map[string]string{}
	}
	e.Labels[key] = val
	return nil
}
