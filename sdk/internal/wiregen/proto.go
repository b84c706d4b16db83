package main

import (
	"fmt"
	"sort"
	"strings"
)

// proto writes the first version of a contract's .proto from the Go side. Once committed, the .proto is
// edited by hand (numbers are for ever); the generator then only checks and converts.
func (m *model) proto() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	comment := func(indent, doc string) {
		if doc = strings.TrimSpace(doc); doc == "" {
			return
		}
		for _, l := range strings.Split(doc, "\n") {
			p("%s", strings.TrimRight(indent+"// "+l, " "))
		}
	}
	comment("", strings.Replace(m.doc, "Package "+m.pkg+" is", "mvirt."+m.protoPkg()+".v1 is", 1))
	p("syntax = \"proto3\";\n\npackage mvirt.%s.v1;\n", m.protoPkg())
	imports := map[string]bool{}
	for _, s := range m.structs {
		for _, f := range s.fields {
			switch {
			case f.typ.base == "time.Time":
				imports["google/protobuf/timestamp.proto"] = true
			case f.typ.base == "time.Duration":
				imports["google/protobuf/duration.proto"] = true
			case strings.HasPrefix(f.typ.base, "service."):
				imports["mvirt/plugin/v1/plugin.proto"] = true
			}
		}
	}
	if m.pkg != "service" {
		imports["mvirt/plugin/v1/plugin.proto"] = true
	}
	var list []string
	for i := range imports {
		list = append(list, i)
	}
	sort.Strings(list)
	for _, i := range list {
		p("import %q;", i)
	}
	p("\noption go_package = \"github.com/mvirt/mvirt/sdk/internal/pb/%spb\";", m.protoPkg())
	var wrappers []string
	if m.pkg != "service" {
		p("\nservice %s {", m.serviceName())
		for _, i := range m.ifaces {
			if i.name != "Service" && len(i.methods) > 0 {
				p("\n  // Optional: %s", strings.ReplaceAll(strings.TrimSpace(i.doc), "\n", "\n  // "))
			}
			for _, me := range i.methods {
				if me.stream {
					comment("  ", me.doc)
					p("  // STREAM %s", me.name)
					continue
				}
				comment("  ", me.doc)
				req, resp := "mvirt.plugin.v1.Empty", "mvirt.plugin.v1.Empty"
				if me.req != nil {
					req = me.req.base
					if me.req.slice {
						req = me.name + "Request"
						wrappers = append(wrappers, fmt.Sprintf("message %s {\n  repeated %s %s = 1;\n}", req, me.req.base, plural(me.req.base)))
					}
				}
				if me.resp != nil {
					resp = me.resp.base
					if me.resp.slice {
						resp = me.name + "Response"
						wrappers = append(wrappers, fmt.Sprintf("message %s {\n  repeated %s %s = 1;\n}", resp, me.resp.base, plural(me.resp.base)))
					}
				}
				p("  rpc %s(%s) returns (%s);", me.name, m.qualified(req), m.qualified(resp))
			}
		}
		p("}")
	}
	for _, e := range m.enums {
		p("")
		comment("", e.doc)
		p("enum %s {", e.name)
		prefix := strings.ToUpper(snake(e.name))
		p("  %s_UNSPECIFIED = 0;", prefix)
		for _, c := range e.consts {
			p("  %s = %s;%s", enumName(e.name, c.name), c.value, trailing(c.doc))
		}
		p("}")
	}
	for _, s := range m.structs {
		p("")
		comment("", s.doc)
		p("message %s {", s.name)
		for i, f := range s.fields {
			p("  %s %s = %d;%s", m.protoType(f.typ), protoField(f), i+1, trailing(f.doc))
		}
		p("}")
	}
	for _, w := range wrappers {
		p("\n%s", w)
	}
	return b.String()
}

func trailing(doc string) string {
	if doc == "" {
		return ""
	}
	return "  // " + strings.ReplaceAll(doc, "\n", " ")
}

// enumName: State, StateReady → STATE_READY; Level, LevelAudit → LEVEL_AUDIT; Direction, Inbound → DIRECTION_INBOUND.
func enumName(enum, c string) string {
	prefix := strings.ToUpper(snake(enum))
	n := strings.ToUpper(snake(c))
	if strings.HasPrefix(n, prefix+"_") {
		return n
	}
	return prefix + "_" + n
}

func (m *model) protoPkg() string {
	if m.pkg == "service" {
		return "plugin"
	}
	return m.pkg
}

func (m *model) serviceName() string {
	return map[string]string{"storage": "Storage", "net": "Net", "vmm": "VMM", "log": "Log"}[m.pkg]
}

func (m *model) protoType(t typ) string {
	if t.mapOf != "" {
		return "map<string, " + t.mapOf + ">"
	}
	s := t.base
	switch {
	case s == "float64":
		s = "double"
	case s == "time.Time":
		s = "google.protobuf.Timestamp"
	case s == "time.Duration":
		s = "google.protobuf.Duration"
	case s == "netip.Addr", s == "netip.Prefix", s == "Kind":
		s = "string"
	case s == "*os.File":
		return "string" // one token for any number of descriptors
	case strings.HasPrefix(s, "service."):
		s = "mvirt.plugin.v1." + s[len("service."):]
	}
	if t.slice {
		return "repeated " + s
	}
	return s
}

// qualified keeps a message apart from a method of the same name.
func (m *model) qualified(name string) string {
	if strings.Contains(name, ".") {
		return name
	}
	return "mvirt." + m.protoPkg() + ".v1." + name
}
