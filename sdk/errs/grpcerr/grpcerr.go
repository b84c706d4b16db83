// Package grpcerr carries errs.Error over gRPC: as a status whose code any client understands, with the whole
// error in a mvirt.plugin.v1.ErrorDetail, and the standard google.rpc details (BadRequest, ErrorInfo) beside
// it for clients in other languages.
package grpcerr

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"reflect"
	"strings"
	"syscall"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
)

// Domain stands in ErrorInfo.
const Domain = "mvirt"

// A chain of causes is carried, and read from a peer, to this depth and breadth; a text to this length, so that
// a status stays within what other gRPC libraries accept as trailing metadata (8 KiB by default in C-core).
const (
	maxDepth  = 16
	maxJoined = 16
	maxText   = 2 << 10
)

// sentinels are the standard library's errors that stay what they are across the wire. The names are on the
// wire: append only.
var sentinels = map[string]error{
	"context.Canceled": context.Canceled, "context.DeadlineExceeded": context.DeadlineExceeded,
	"io.EOF": io.EOF, "io.ErrUnexpectedEOF": io.ErrUnexpectedEOF, "fs.ErrNotExist": fs.ErrNotExist, "fs.ErrExist": fs.ErrExist,
	"fs.ErrPermission": fs.ErrPermission, "fs.ErrClosed": fs.ErrClosed, "errors.ErrUnsupported": errors.ErrUnsupported,
	"os.ErrDeadlineExceeded": os.ErrDeadlineExceeded,
}

func sentinelName(err error) string {
	if !reflect.TypeOf(err).Comparable() {
		return ""
	}
	for name, s := range sentinels {
		if s == err { //nolint:errorlint // exactly this error, not one that wraps it
			return name
		}
	}
	return ""
}

var toCode = map[errs.Kind]codes.Code{
	errs.Unknown: codes.Unknown, errs.Invalid: codes.InvalidArgument, errs.NotFound: codes.NotFound, errs.Exists: codes.AlreadyExists,
	errs.Precondition: codes.FailedPrecondition, errs.Conflict: codes.Aborted, errs.Exhausted: codes.ResourceExhausted,
	errs.Unavailable: codes.Unavailable, errs.Unsupported: codes.Unimplemented, errs.Denied: codes.PermissionDenied,
	errs.Deadline: codes.DeadlineExceeded, errs.Canceled: codes.Canceled, errs.Corrupt: codes.DataLoss, errs.Internal: codes.Internal,
	errs.OutOfRange: codes.OutOfRange, errs.Unauthorized: codes.Unauthenticated,
}

var toKind = func() map[codes.Code]errs.Kind {
	m := map[codes.Code]errs.Kind{}
	for k, c := range toCode {
		m[c] = k
	}
	return m
}()

// Code is the gRPC code of a kind.
func Code(k errs.Kind) codes.Code {
	if c, ok := toCode[k]; ok {
		return c
	}
	return codes.Unknown
}

// Kind is the kind of a gRPC code.
func Kind(c codes.Code) errs.Kind { return toKind[c] }

// ToStatus makes err a gRPC status error. nil stays nil, and what is a status already stays as it is.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok && !isOurs(err) {
		return err
	}
	detail := encode(err, 0)
	st := status.New(Code(errs.KindOf(err)), text(err.Error()))
	details := []protoadapt.MessageV1{protoadapt.MessageV1Of(detail)}
	if f := fieldOf(err); f != nil {
		details = append(details, protoadapt.MessageV1Of(&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: f.Field, Description: text(f.Message)}}}))
	}
	if r := errs.ReasonOf(err); r != "" {
		details = append(details, protoadapt.MessageV1Of(&errdetails.ErrorInfo{Reason: text(r), Domain: Domain,
			Metadata: map[string]string{"remedy": text(errs.RemedyOf(err))}}))
	}
	if with, werr := st.WithDetails(details...); werr == nil {
		st = with
	}
	return st.Err()
}

// FromStatus makes of a gRPC status error what it was before ToStatus. An error that is no status, and nil,
// stay as they are; a status of a stranger keeps its code as the kind.
func FromStatus(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok || st.Code() == codes.OK {
		return err
	}
	for _, d := range st.Details() {
		if e, ok := d.(*pluginpb.ErrorDetail); ok {
			return decode(e, 0)
		}
	}
	return stranger(st)
}

// stranger makes an error of a status without ErrorDetail: one that gRPC made itself on this side (the peer
// is gone, ctx has ended), or a peer in another language, whose google.rpc details are read.
func stranger(st *status.Status) error {
	e := &errs.Error{Kind: Kind(st.Code()), Message: st.Message()}
	switch st.Code() {
	case codes.Canceled:
		e.Err = context.Canceled
	case codes.DeadlineExceeded:
		e.Err = context.DeadlineExceeded
	}
	if e.Err != nil && e.Message == e.Err.Error() {
		e.Message = ""
	}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.BadRequest:
			if v := d.GetFieldViolations(); len(v) > 0 {
				e.Field = v[0].GetField()
			}
		case *errdetails.ErrorInfo:
			e.Reason, e.Remedy = d.GetReason(), d.GetMetadata()["remedy"]
		case *errdetails.ResourceInfo:
			e.Resource = errs.Resource{Type: d.GetResourceType(), Name: d.GetResourceName()}
		}
	}
	return e
}

// Detail is err as a message, for errors inside other messages.
func Detail(err error) *pluginpb.ErrorDetail { return encode(err, 0) }

// FromDetail is the error that Detail was made of.
func FromDetail(d *pluginpb.ErrorDetail) error { return decode(d, 0) }

func isOurs(err error) bool {
	var e *errs.Error
	return errors.As(err, &e)
}

func fieldOf(err error) *errs.Error {
	var e *errs.Error
	for errors.As(err, &e) {
		if e.Field != "" {
			return e
		}
		err, e = e.Err, nil
	}
	return nil
}

func encode(err error, depth int) *pluginpb.ErrorDetail {
	var e *errs.Error
	if x, ok := err.(*errs.Error); ok { //nolint:errorlint // the chain is walked link by link
		e = x
	}
	if e == nil {
		d := &pluginpb.ErrorDetail{Kind: uint32(errs.KindOf(err)), Message: text(err.Error())}
		if name := sentinelName(err); name != "" {
			d.Sentinel = name
			return d
		}
		if no, ok := err.(syscall.Errno); ok { //nolint:errorlint // the chain is walked link by link
			d.Errno = uint32(no)
			return d
		}
		if depth < maxDepth { // wrapped by fmt.Errorf, errors.Join, *fs.PathError, …: keep what is inside
			for i, c := range unwrap(err) {
				if i == maxJoined {
					break
				}
				d.Causes = append(d.Causes, encode(c, depth+1))
			}
		}
		return d
	}
	d := &pluginpb.ErrorDetail{Kind: uint32(e.Kind), Op: text(e.Op), ResourceType: text(e.Resource.Type), ResourceId: text(e.Resource.ID),
		ResourceName: text(e.Resource.Name), Field: text(e.Field), Reason: text(e.Reason), Message: text(e.Message), Remedy: text(e.Remedy)}
	switch {
	case depth >= maxDepth: // what follows is cut off, but not what it said of the kind
		d.Kind = uint32(errs.KindOf(err))
	case e.Err != nil:
		d.Causes = []*pluginpb.ErrorDetail{encode(e.Err, depth+1)}
	}
	return d
}

func unwrap(err error) []error {
	switch x := err.(type) { //nolint:errorlint // the chain is walked link by link
	case interface{ Unwrap() []error }:
		return x.Unwrap()
	case interface{ Unwrap() error }:
		if u := x.Unwrap(); u != nil {
			return []error{u}
		}
	}
	return nil
}

func decode(d *pluginpb.ErrorDetail, depth int) error {
	e := &errs.Error{Op: d.GetOp(), Kind: errs.Kind(d.GetKind()), Field: d.GetField(), Reason: d.GetReason(), Message: d.GetMessage(), Remedy: d.GetRemedy(),
		Resource: errs.Resource{Type: d.GetResourceType(), ID: d.GetResourceId(), Name: d.GetResourceName()}}
	var causes []error
	switch s := sentinels[d.GetSentinel()]; {
	case s != nil:
		causes = []error{s}
	case d.GetErrno() != 0:
		causes = []error{syscall.Errno(d.GetErrno())}
	case depth < maxDepth:
		for i, c := range d.GetCauses() {
			if i == maxJoined {
				break
			}
			causes = append(causes, decode(c, depth+1))
		}
	}
	if len(causes) == 0 {
		if e.Kind == errs.Unknown && *e == (errs.Error{Message: e.Message}) {
			return &said{text: e.Message} // an error nobody classified must not hide one beside it from errs.KindOf
		}
		return e
	}
	if d.GetOp() == "" && d.GetField() == "" && strings.Contains(d.GetMessage(), causes[0].Error()) {
		// What was wrapped says itself what the causes say: keep them for errors.Is, not for the text.
		return &said{text: d.GetMessage(), kind: e.Kind, causes: causes}
	}
	e.Err = causes[0]
	if len(causes) > 1 {
		e.Err = errors.Join(causes...)
	}
	return e
}

// said is an error whose text already holds its causes' texts.
type said struct {
	text   string
	kind   errs.Kind // what the far side knew; the causes may have lost it
	causes []error
}

func (s *said) Error() string   { return s.text }
func (s *said) Unwrap() []error { return s.causes }

// Is lets errs.KindOf's answer on the far side hold here as well.
func (s *said) Is(target error) bool {
	k, ok := target.(errs.Kind) //nolint:errorlint // kinds are values, never wrapped
	return ok && k != errs.Unknown && k == s.kind
}

// text makes a string fit for a proto field and for a trailer.
func text(s string) string {
	if len(s) > maxText {
		s = s[:maxText-len("…")] + "…"
	}
	return strings.ToValidUTF8(s, "\ufffd")
}

// FromContext is the error of a context that has ended, as errs knows it, or nil.
func FromContext(ctx context.Context) error {
	switch err := ctx.Err(); {
	case err == nil:
		return nil
	case errors.Is(err, context.DeadlineExceeded):
		return errs.Wrap(errs.Deadline, err, "not finished in time")
	default:
		return errs.Wrap(errs.Canceled, err, "canceled")
	}
}
