package main

import "strings"

// words that Go writes in capitals, longest first where one begins another.
var acronyms = []string{"NICs", "CPUs", "VMM", "VMID", "NICID", "UID", "GID", "PID", "DNS", "NTP", "MTU", "MAC", "CIDR", "TAP", "NIC", "VM", "CPU",
	"URL", "IPv4", "IPv6", "SHA256", "IO", "ID"}

// snake turns a Go name into proto spelling: VMID vm_id, Subnet4 subnet4, KernelSHA256 kernel_sha256.
func snake(name string) string {
	switch name { // two acronyms in a row
	case "VMID":
		return "vm_id"
	case "NICID":
		return "nic_id"
	}
	var words []string
	for rest := name; rest != ""; {
		w := ""
		for _, a := range acronyms {
			if strings.HasPrefix(rest, a) && (len(rest) == len(a) || !lower(rest[len(a)])) {
				w = a
				break
			}
		}
		if w == "" {
			n := 1
			for n < len(rest) && (lower(rest[n]) || digit(rest[n])) {
				n++
			}
			w = rest[:n]
		}
		words = append(words, strings.ToLower(w))
		rest = rest[len(w):]
	}
	return strings.Join(words, "_")
}

func lower(c byte) bool { return c >= 'a' && c <= 'z' }
func digit(c byte) bool { return c >= '0' && c <= '9' }

// camel is what protoc-gen-go makes of a proto name (google.golang.org/protobuf, GoCamelCase).
func camel(s string) string {
	var b strings.Builder
	up := true
	for i := range len(s) {
		switch c := s[i]; {
		case c == '_' && i+1 < len(s) && lower(s[i+1]):
			up = true
		case c == '_':
			b.WriteByte('_')
		case up && lower(c):
			b.WriteByte(c - 32)
			up = false
		default:
			b.WriteByte(c)
			up = digit(c)
		}
	}
	return b.String()
}

// protoField is the proto name of a field; descriptors cross as tokens.
func protoField(f field) string {
	n := snake(f.name)
	if f.typ.base == "*os.File" {
		n += "_token"
	}
	return n
}

// plural of a message name, for list responses.
func plural(name string) string {
	n := snake(name)
	switch {
	case strings.HasSuffix(n, "y"):
		return n[:len(n)-1] + "ies"
	case strings.HasSuffix(n, "s"):
		return n
	}
	return n + "s"
}
