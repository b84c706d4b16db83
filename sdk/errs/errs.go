// Package errs is the error that survives the wire: what failed, of which kind, on which
// object, and what the person who asked can do about it.
//
// Every function of a contract returns either nil or an error from which [KindOf] tells the
// kind. Kinds are compared with errors.Is, never by text and never with ==:
//
//	if errors.Is(err, errs.NotFound) { … }
//
// An error made in a plugin arrives in the core, and again in the CLI, with the same kind,
// resource, field, reason and remedy (sdk/internal/wire carries it as a gRPC status with
// details, so that clients in other languages see an ordinary status code as well).
package errs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
)

// Kind is the class of a failure. The numbers are on the wire: append only, never reorder.
type Kind uint32

// The closed list of kinds, with the gRPC code each maps to.
const (
	Unknown      Kind = 0  // not classified: a bug in whoever returned it (UNKNOWN)
	Invalid      Kind = 1  // the request is wrong whatever the state is; Field names the culprit (INVALID_ARGUMENT)
	NotFound     Kind = 2  // the object does not exist (NOT_FOUND)
	Exists       Kind = 3  // another object has this id or name (ALREADY_EXISTS)
	Precondition Kind = 4  // the object's state forbids it; the caller must change the state first (FAILED_PRECONDITION)
	Conflict     Kind = 5  // somebody else changes the object right now; trying again may work (ABORTED)
	Exhausted    Kind = 6  // disk, addresses, memory or a quota is used up (RESOURCE_EXHAUSTED)
	Unavailable  Kind = 7  // the service is not there now; trying again may work (UNAVAILABLE)
	Unsupported  Kind = 8  // this plugin does not have the feature (UNIMPLEMENTED)
	Denied       Kind = 9  // the caller may not (PERMISSION_DENIED)
	Deadline     Kind = 10 // not finished in the time allowed; the state is what a later Get says (DEADLINE_EXCEEDED)
	Canceled     Kind = 11 // the caller went away or cancelled (CANCELED)
	Corrupt      Kind = 12 // stored data is damaged (DATA_LOSS)
	Internal     Kind = 13 // a bug (INTERNAL)
	OutOfRange   Kind = 14 // reading past the end, a page token that is gone (OUT_OF_RANGE)
	Unauthorized Kind = 15 // who calls is not known (UNAUTHENTICATED)
)

var kindNames = [...]string{"unknown", "invalid", "not found", "exists", "precondition failed", "conflict",
	"exhausted", "unavailable", "unsupported", "denied", "deadline exceeded", "canceled", "corrupt",
	"internal", "out of range", "unauthenticated"}

// String names the kind in words that go into messages.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint32(k))
}

// Error lets a Kind stand as a target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Resource names the object an error is about. Name is what the user calls it, if known.
type Resource struct {
	Type string // "vm", "volume", "template", "snapshot", "network", "nic", "plugin", …
	ID   string
	Name string
}

// String is "volume web-root" or "volume 0190…" or "".
func (r Resource) String() string {
	n := r.Name
	if n == "" {
		n = r.ID
	}
	return strings.TrimSpace(r.Type + " " + n)
}

// Error is one failure. Make it with a struct literal or with the constructors below.
type Error struct {
	Op       string   // what was tried, in the contract's words: "storage.CreateVolume"
	Kind     Kind     // class; Unknown means: take the kind of Err
	Resource Resource // the object, if there is one
	Field    string   // request field at fault, proto spelling ("size_bytes"), for Invalid
	Reason   string   // stable UPPER_SNAKE word a program may switch on ("VOLUME_IN_USE"), optional
	Message  string   // what went wrong, one sentence, no trailing period
	Remedy   string   // what to do now, one sentence, imperative, optional
	Err      error    // cause, optional
}

// Error is "op: resource: message: cause"; the remedy is not part of it, the CLI prints it apart.
func (e *Error) Error() string {
	var parts []string
	for _, p := range []string{e.Op, e.Resource.String(), e.Message} {
		if p != "" {
			parts = append(parts, p)
		}
	}
	if e.Message == "" && e.Err == nil {
		parts = append(parts, e.Kind.String())
	}
	if e.Err != nil {
		parts = append(parts, e.Err.Error())
	}
	return strings.Join(parts, ": ")
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is makes errors.Is(err, errs.NotFound) work.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && e.Kind != Unknown && e.Kind == k
}

// New makes an error of a kind: errs.New(errs.NotFound, "no volume %q", name).
func New(k Kind, format string, args ...any) *Error {
	return &Error{Kind: k, Message: fmt.Sprintf(format, args...)}
}

// Wrap gives err a kind (Unknown keeps err's own) and a sentence. It returns nil for a nil err.
func Wrap(k Kind, err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &Error{Kind: k, Message: fmt.Sprintf(format, args...), Err: err}
}

// Field makes an Invalid error that names the request field and says what to give instead.
func Field(field, remedy, format string, args ...any) *Error {
	return &Error{Kind: Invalid, Field: field, Remedy: remedy, Message: fmt.Sprintf(format, args...)}
}

// With returns e after setting the resource; for chaining behind New and Field.
func (e *Error) With(r Resource) *Error { e.Resource = r; return e }

// Do returns e after setting the remedy.
func (e *Error) Do(remedy string) *Error { e.Remedy = remedy; return e }

// Because returns e after setting the reason word.
func (e *Error) Because(reason string) *Error { e.Reason = reason; return e }

// KindOf finds the kind of an error: the outermost classified [Error] wins, then a bare Kind, then what
// the standard library's sentinels say. A nil error and an error nobody classified are Unknown.
func KindOf(err error) Kind {
	for e := (*Error)(nil); errors.As(err, &e); {
		if e.Kind != Unknown {
			return e.Kind
		}
		err = e.Err
		e = nil
	}
	var k Kind
	switch {
	case err == nil:
		return Unknown
	case errors.As(err, &k):
		return k
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return Deadline
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EMFILE):
		return Exhausted
	case errors.Is(err, fs.ErrNotExist):
		return NotFound
	case errors.Is(err, fs.ErrExist):
		return Exists
	case errors.Is(err, fs.ErrPermission):
		return Denied
	case errors.Is(err, errors.ErrUnsupported):
		return Unsupported
	}
	return Unknown
}

// RemedyOf is the outermost remedy in err's chain, or "".
func RemedyOf(err error) string {
	for e := (*Error)(nil); errors.As(err, &e); e = nil {
		if e.Remedy != "" {
			return e.Remedy
		}
		err = e.Err
	}
	return ""
}

// ReasonOf is the outermost reason word in err's chain, or "".
func ReasonOf(err error) string {
	for e := (*Error)(nil); errors.As(err, &e); e = nil {
		if e.Reason != "" {
			return e.Reason
		}
		err = e.Err
	}
	return ""
}
