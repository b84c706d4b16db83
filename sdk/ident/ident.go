// Package ident makes and checks ids and names, the same for every plugin.
//
// An id is a UUIDv7 (RFC 9562, section 5.7) in its canonical lower-case form, chosen by the caller of a
// create, so that a repeated create is recognised. A name is what people type: unique within its kind.
package ident

import (
	"strings"

	"github.com/google/uuid"

	"github.com/mvirt/mvirt/sdk/errs"
)

// MaxName is the longest name in bytes. 63 keeps "<name>@<snapshot>" within ZFS's 255, and a VM's name
// usable as a host name (RFC 1035, section 2.3.4).
const MaxName = 63

// New makes an id. Ids made by one process sort by the time they were made.
func New() string { return uuid.Must(uuid.NewV7()).String() }

// CheckID says whether id is a canonical UUID; field names it in the error.
func CheckID(field, id string) error {
	if len(id) == 36 {
		if u, err := uuid.Parse(id); err == nil && u.String() == id {
			return nil
		}
	}
	return errs.Field(field, "give a UUIDv7 in its canonical lower-case form, or leave it empty where that is allowed",
		"%s %s is not an id", field, Quote(id))
}

// CheckName says whether name may name an object: 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning with a
// letter or digit and ending with one. Nothing in it can mean a path, an option or a ZFS separator. A name
// that reads as an id is refused, so that "name or id" is never ambiguous.
func CheckName(field, name string) error {
	const remedy = "use 1 to 63 of a-z, 0-9, '-', '_' and '.', with a letter or a digit at both ends"
	switch {
	case name == "":
		return errs.Field(field, remedy, "%s is empty", field)
	case len(name) > MaxName:
		return errs.Field(field, remedy, "%s is %d bytes long, the limit is %d", field, len(name), MaxName)
	case !alnum(name[0]) || !alnum(name[len(name)-1]):
		return errs.Field(field, remedy, "%s %s begins or ends with a character that may only stand inside", field, Quote(name))
	}
	for i := range len(name) {
		if c := name[i]; !alnum(c) && c != '-' && c != '_' && c != '.' {
			return errs.Field(field, remedy, "%s %s holds the character %s", field, Quote(name), Quote(string(rune(c))))
		}
	}
	if strings.Contains(name, "..") {
		return errs.Field(field, remedy, "%s %s holds \"..\"", field, Quote(name))
	}
	if CheckID(field, name) == nil {
		return errs.Field(field, "choose a name that is not a UUID", "%s %s reads as an id", field, Quote(name))
	}
	return nil
}

// Quote makes hostile text safe and short enough to stand in a message.
func Quote(s string) string {
	const most = 80
	cut := ""
	if len(s) > most {
		s, cut = s[:most], "…"
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f || r == 0xfffd:
			b.WriteString("\\x")
			b.WriteByte("0123456789abcdef"[byte(r)>>4])
			b.WriteByte("0123456789abcdef"[byte(r)&15])
		default:
			b.WriteRune(r)
		}
	}
	return b.String() + cut + "\""
}

func alnum(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
