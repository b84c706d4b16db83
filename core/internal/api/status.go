package api

import (
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
)

// grpcCode is the gRPC code of a kind of error, as a number.
func grpcCode(k errs.Kind) uint32 { return uint32(grpcerr.Code(k)) }
