package client

import (
	"errors"
	"io"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mvirt/mvirt/sdk/errs"
)

// kinds maps the codes back; errs.Kind's comments give the way there.
var kinds = map[codes.Code]errs.Kind{
	codes.InvalidArgument: errs.Invalid, codes.NotFound: errs.NotFound, codes.AlreadyExists: errs.Exists,
	codes.FailedPrecondition: errs.Precondition, codes.Aborted: errs.Conflict, codes.ResourceExhausted: errs.Exhausted,
	codes.Unavailable: errs.Unavailable, codes.Unimplemented: errs.Unsupported, codes.PermissionDenied: errs.Denied,
	codes.DeadlineExceeded: errs.Deadline, codes.Canceled: errs.Canceled, codes.DataLoss: errs.Corrupt,
	codes.Internal: errs.Internal, codes.OutOfRange: errs.OutOfRange, codes.Unauthenticated: errs.Unauthorized,
}

// Kind is the kind of error that a gRPC code stands for: operations and imports carry bare codes.
func Kind(code uint32) errs.Kind { return kinds[codes.Code(code)] }

// FromStatus gives a gRPC status back its kind, resource, field, reason and remedy. It reads the standard
// google.rpc details, as any client would. Other errors pass as they are.
func FromStatus(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	e := &errs.Error{Kind: kinds[st.Code()], Message: st.Message()}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				e.Field = v.GetField()
				break
			}
		case *errdetails.ErrorInfo:
			e.Reason = d.GetReason()
		case *errdetails.ResourceInfo:
			e.Resource = errs.Resource{Type: d.GetResourceType(), Name: d.GetResourceName()}
		case *errdetails.Help:
			for _, l := range d.GetLinks() {
				e.Remedy = l.GetDescription()
				break
			}
		}
	}
	if e.Kind == errs.Unavailable && len(st.Details()) == 0 {
		// grpc's own: the connection broke. The text is about transports; say what it means.
		e.Message, e.Reason = "the connection to mvirtd is lost", "NO_DAEMON"
		e.Remedy = "check that mvirtd runs, and look at what became of it (mvirt status) before trying again"
		e.Err = errors.New(strings.TrimSpace(st.Message()))
	}
	return e
}
