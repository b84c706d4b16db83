package client

import (
	"errors"
	"io"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
)

// Kind is the kind of error that a gRPC code stands for: operations and imports carry bare codes.
func Kind(code uint32) errs.Kind { return grpcerr.Kind(codes.Code(code)) }

// FromStatus gives a gRPC status back its kind, resource, field, reason and remedy. io.EOF and what is no
// status pass as they are.
func FromStatus(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	st, ok := status.FromError(err)
	if !ok || st.Code() != codes.Unavailable || len(st.Details()) > 0 {
		return grpcerr.FromStatus(err)
	}
	// gRPC's own: the connection broke. The text is about transports; say what it means.
	return &errs.Error{Kind: errs.Unavailable, Reason: "NO_DAEMON", Message: "the connection to mvirtd is lost",
		Remedy: "check that mvirtd runs, and look at what became of it (mvirt status) before trying again", Err: errors.New(strings.TrimSpace(st.Message()))}
}
