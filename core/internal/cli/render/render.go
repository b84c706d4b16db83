// Package render prints what the API answered: tables for people, JSON and YAML for programs.
//
// JSON and YAML are the API's messages field by field, in the order of mvirt.proto and under its names: all
// fields are there, also empty ones, so that a script need not ask whether a key exists. 64-bit numbers are
// numbers, times are RFC 3339 in UTC, a time or message that is absent is null, durations are seconds.
//
// All text passes Clean before it reaches a terminal: names and reasons may come from guests.
package render

import (
	"bytes"
	"encoding/json"
	"fmt"
	"sort"
	"strings"
	"unicode"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"gopkg.in/yaml.v3"
)

// Format is the value of --output.
type Format string

// Formats.
const (
	Table Format = "table"
	Wide  Format = "wide"
	JSON  Format = "json"
	YAML  Format = "yaml"
	Name  Format = "name"
)

// Formats lists what --output takes.
func Formats() []string {
	return []string{string(Table), string(Wide), string(JSON), string(YAML), string(Name)}
}

// Object is a JSON object that keeps its order.
type Object []Member

// Member is one key of an Object.
type Member struct {
	Key   string
	Value any
}

// MarshalJSON writes the members in order.
func (o Object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		k, err := marshal(m.Key)
		if err != nil {
			return nil, err
		}
		v, err := marshal(m.Value)
		if err != nil {
			return nil, err
		}
		b.Write(k)
		b.WriteByte(':')
		b.Write(v)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// MarshalYAML gives the members in order.
func (o Object) MarshalYAML() (any, error) {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for _, m := range o {
		var k, v yaml.Node
		if err := k.Encode(m.Key); err != nil {
			return nil, err
		}
		if err := v.Encode(m.Value); err != nil {
			return nil, err
		}
		n.Content = append(n.Content, &k, &v)
	}
	return n, nil
}

// marshal is json.Marshal without the escaping that is only for HTML.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimRight(b.Bytes(), "\n"), err
}

// EncodeJSON gives v as indented JSON with a newline at its end.
func EncodeJSON(v any) ([]byte, error) {
	raw, err := marshal(v)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// EncodeLine gives v as JSON on one line: the form of streams.
func EncodeLine(v any) ([]byte, error) {
	raw, err := marshal(v)
	return append(raw, '\n'), err
}

// EncodeYAML gives v as YAML.
func EncodeYAML(v any) ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	err := e.Close()
	return b.Bytes(), err
}

// Message turns an API message into a plain value for EncodeJSON and EncodeYAML.
func Message(m proto.Message) any {
	if m == nil {
		return nil
	}
	return message(m.ProtoReflect())
}

// Messages turns a list of messages into plain values; never nil, so that it prints as [].
func Messages[M proto.Message](list []M) []any {
	out := make([]any, 0, len(list))
	for _, m := range list {
		out = append(out, Message(m))
	}
	return out
}

func message(m protoreflect.Message) any {
	if !m.IsValid() {
		return nil
	}
	switch v := m.Interface().(type) {
	case *timestamppb.Timestamp:
		return v.AsTime().UTC().Format("2006-01-02T15:04:05.999999999Z07:00")
	case *durationpb.Duration:
		return v.AsDuration().Seconds()
	}
	fields := m.Descriptor().Fields()
	o := make(Object, 0, fields.Len())
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.ContainingOneof() != nil && !m.Has(f) {
			continue
		}
		o = append(o, Member{string(f.Name()), field(f, m.Get(f))})
	}
	return o
}

func field(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch {
	case f.IsMap():
		var keys []string
		values := map[string]any{}
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			keys = append(keys, k.String())
			values[k.String()] = scalar(f.MapValue(), v)
			return true
		})
		sort.Strings(keys)
		o := make(Object, 0, len(keys))
		for _, k := range keys {
			o = append(o, Member{k, values[k]})
		}
		return o
	case f.IsList():
		l := v.List()
		out := make([]any, 0, l.Len())
		for i := range l.Len() {
			out = append(out, scalar(f, l.Get(i)))
		}
		return out
	}
	return scalar(f, v)
}

func scalar(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch f.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return message(v.Message())
	case protoreflect.EnumKind:
		if e := f.Enum().Values().ByNumber(v.Enum()); e != nil {
			return string(e.Name())
		}
		return int32(v.Enum())
	}
	return v.Interface()
}

// Clean makes text from outside safe for a terminal: control characters and what is not printable become
// visible escapes.
func Clean(s string) string {
	if !strings.ContainsFunc(s, unprintable) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unprintable(r) {
			fmt.Fprintf(&b, "\\x%02x", r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func unprintable(r rune) bool { return r != ' ' && !unicode.IsPrint(r) }
