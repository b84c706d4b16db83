// Package protocompat holds the rule "within a major version only additions": it compares the shape of protos
// with a checked-in text, in which lines may appear and none may change or go.
package protocompat

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
)

// Shape is one line for each thing of files that is on the wire or in generated code, sorted: fields with
// number, type and label, enum values, methods with their types.
func Shape(files ...protoreflect.FileDescriptor) []string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	enum := func(e protoreflect.EnumDescriptor) {
		for i := range e.Values().Len() {
			v := e.Values().Get(i)
			add("enum %s: %s = %d", e.FullName(), v.Name(), v.Number())
		}
	}
	var message func(m protoreflect.MessageDescriptor)
	message = func(m protoreflect.MessageDescriptor) {
		if m.IsMapEntry() {
			return
		}
		add("message %s", m.FullName())
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			typ := f.Kind().String()
			switch {
			case f.IsMap():
				typ = fmt.Sprintf("map<%s, %s>", f.MapKey().Kind(), f.MapValue().Kind())
			case f.Message() != nil:
				typ = string(f.Message().FullName())
			case f.Enum() != nil:
				typ = string(f.Enum().FullName())
			}
			in := ""
			if o := f.ContainingOneof(); o != nil {
				in = " in " + string(o.Name())
			}
			add("field %s = %d %s %s%s", f.FullName(), f.Number(), f.Cardinality(), typ, in)
		}
		for i := range m.Messages().Len() {
			message(m.Messages().Get(i))
		}
		for i := range m.Enums().Len() {
			enum(m.Enums().Get(i))
		}
	}
	for _, f := range files {
		for i := range f.Messages().Len() {
			message(f.Messages().Get(i))
		}
		for i := range f.Enums().Len() {
			enum(f.Enums().Get(i))
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				add("rpc %s/%s(%s%s) %s%s", s.FullName(), m.Name(), stream(m.IsStreamingClient()), m.Input().FullName(), stream(m.IsStreamingServer()), m.Output().FullName())
			}
		}
	}
	slices.Sort(lines)
	return lines
}

func stream(is bool) string {
	if is {
		return "stream "
	}
	return ""
}

// Compare compares the shape of files with the golden text at path. Lines that are gone or changed are an
// error, whatever add says. New lines are an error that asks to record them, or, with add, are recorded.
func Compare(path string, add bool, files ...protoreflect.FileDescriptor) error {
	old, err := os.ReadFile(path)
	if err != nil && !(add && os.IsNotExist(err)) {
		return err
	}
	was := strings.Split(strings.TrimSpace(string(old)), "\n")
	if len(old) == 0 {
		was = nil
	}
	is := Shape(files...)
	var gone, added []string
	for _, l := range was {
		if !slices.Contains(is, l) {
			gone = append(gone, "- "+l)
		}
	}
	for _, l := range is {
		if !slices.Contains(was, l) {
			added = append(added, "+ "+l)
		}
	}
	switch {
	case len(gone) > 0:
		return fmt.Errorf("removed or changed within v1, which breaks plugins and clients that exist:\n%s\n%s", strings.Join(gone, "\n"), strings.Join(added, "\n"))
	case len(added) > 0 && add:
		return os.WriteFile(path, []byte(strings.Join(is, "\n")+"\n"), 0o644)
	case len(added) > 0:
		return fmt.Errorf("additions that are not recorded; run the test with -rewrite and commit %s:\n%s", path, strings.Join(added, "\n"))
	}
	return nil
}
