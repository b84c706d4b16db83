package grpcerr_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
)

var (
	full = &errs.Error{Op: "storage.DeleteVolume", Kind: errs.Precondition, Resource: errs.Resource{Type: "volume", ID: "0190", Name: "web"},
		Field: "ref", Reason: "VOLUME_IN_USE", Message: "the VM db uses it", Remedy: "stop the VM first", Err: fmt.Errorf("lower: %w", io.ErrUnexpectedEOF)}
	_, missing = os.Open("/nonexistent/file")
)

// far is err as the other side sees it: through the status's bytes.
func far(err error) error {
	st, _ := status.FromError(grpcerr.ToStatus(err))
	return grpcerr.FromStatus(status.FromProto(st.Proto()).Err())
}

func TestErrorsCross(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		code codes.Code
		is   []error // that errors.Is finds on both sides
		not  []error
	}{
		"full":                           {full, codes.FailedPrecondition, []error{errs.Precondition, io.ErrUnexpectedEOF}, []error{errs.NotFound, io.EOF}},
		"plain":                          {errors.New("odd"), codes.Unknown, nil, []error{errs.NotFound, errs.Internal}},
		"bare kind":                      {errs.NotFound, codes.NotFound, []error{errs.NotFound}, nil},
		"wrapped kind":                   {fmt.Errorf("looking: %w", errs.NotFound), codes.NotFound, []error{errs.NotFound}, nil},
		"wrapped":                        {fmt.Errorf("a: %w", fmt.Errorf("b: %w", full)), codes.FailedPrecondition, []error{errs.Precondition}, nil},
		"joined":                         {errors.Join(errors.New("first"), errs.New(errs.Exhausted, "disk full")), codes.ResourceExhausted, []error{errs.Exhausted}, nil},
		"joined kinds":                   {errors.Join(errs.New(errs.Exists, "x"), errs.New(errs.Corrupt, "y")), codes.AlreadyExists, []error{errs.Exists, errs.Corrupt}, []error{errs.Denied}},
		"two %w":                         {fmt.Errorf("%w and %w", errs.New(errs.Denied, "x"), io.EOF), codes.PermissionDenied, []error{errs.Denied, io.EOF}, nil},
		"canceled":                       {context.Canceled, codes.Canceled, []error{context.Canceled}, []error{context.DeadlineExceeded}},
		"deadline":                       {fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded, []error{context.DeadlineExceeded}, nil},
		"errno":                          {syscall.ENOSPC, codes.ResourceExhausted, []error{syscall.ENOSPC}, []error{syscall.ENOENT}},
		"path error":                     {missing, codes.NotFound, []error{fs.ErrNotExist, syscall.ENOENT}, nil},
		"errno under a kind":             {errs.Wrap(errs.Unavailable, syscall.ECONNREFUSED, "no answer"), codes.Unavailable, []error{errs.Unavailable, syscall.ECONNREFUSED}, []error{errs.NotFound}},
		"unknown takes the cause's kind": {&errs.Error{Op: "log.Append", Err: errs.New(errs.Corrupt, "bad block")}, codes.DataLoss, []error{errs.Corrupt}, nil},
		"kind over kind":                 {errs.Wrap(errs.Internal, errs.New(errs.NotFound, "x"), "y"), codes.Internal, []error{errs.Internal, errs.NotFound}, nil},
		"not UTF-8":                      {errs.New(errs.Invalid, "name %s", "\xff\xfe"), codes.InvalidArgument, []error{errs.Invalid}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := status.Code(grpcerr.ToStatus(c.err)); got != c.code {
				t.Errorf("code %s, want %s", got, c.code)
			}
			err := far(c.err)
			if a, b := errs.KindOf(c.err), errs.KindOf(err); a != b {
				t.Errorf("kind %s became %s", a, b)
			}
			for _, target := range c.is {
				if !errors.Is(c.err, target) {
					t.Errorf("bad test: near error is not %v", target)
				}
				if !errors.Is(err, target) {
					t.Errorf("far error is not %v: %#v", target, err)
				}
			}
			for _, target := range c.not {
				if errors.Is(err, target) {
					t.Errorf("far error is %v", target)
				}
			}
			if near := strings.ToValidUTF8(c.err.Error(), "\ufffd"); err.Error() != near {
				t.Errorf("text %q became %q", near, err.Error())
			}
			if a, b := errs.RemedyOf(c.err), errs.RemedyOf(err); a != b {
				t.Errorf("remedy %q became %q", a, b)
			}
			if a, b := errs.ReasonOf(c.err), errs.ReasonOf(err); a != b {
				t.Errorf("reason %q became %q", a, b)
			}
			if twice := far(err); twice.Error() != err.Error() || errs.KindOf(twice) != errs.KindOf(err) {
				t.Errorf("a second crossing made %q of %q", twice, err)
			}
		})
	}
}

func TestEveryFieldCrosses(t *testing.T) {
	var got *errs.Error
	if !errors.As(far(full), &got) {
		t.Fatal("not an errs.Error")
	}
	want := *full
	g := *got
	if g.Err == nil || g.Err.Error() != want.Err.Error() {
		t.Errorf("cause %v", g.Err)
	}
	g.Err, want.Err = nil, nil
	if g != want {
		t.Errorf("%+v\nwant %+v", g, want)
	}
}

func TestEveryKindHasItsCode(t *testing.T) {
	seen := map[codes.Code]bool{}
	for k := errs.Unknown; k <= errs.Unauthorized; k++ {
		c := grpcerr.Code(k)
		if seen[c] || grpcerr.Kind(c) != k {
			t.Errorf("%s ↔ %s", k, c)
		}
		seen[c] = true
	}
}

func TestOtherLanguages(t *testing.T) {
	st, _ := status.FromError(grpcerr.ToStatus(full))
	var bad *errdetails.BadRequest
	var info *errdetails.ErrorInfo
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.BadRequest:
			bad = d
		case *errdetails.ErrorInfo:
			info = d
		}
	}
	if bad == nil || bad.FieldViolations[0].Field != "ref" || info == nil || info.Reason != "VOLUME_IN_USE" || info.Metadata["remedy"] != "stop the VM first" {
		t.Errorf("details %v %v", bad, info)
	}
	// The other way round: a status as a plugin in Python would make it.
	st, err := status.New(codes.InvalidArgument, "bad name").WithDetails(
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "name", Description: "…"}}},
		&errdetails.ErrorInfo{Reason: "NAME_BAD", Metadata: map[string]string{"remedy": "choose another"}})
	if err != nil {
		t.Fatal(err)
	}
	var e *errs.Error
	if err := grpcerr.FromStatus(st.Err()); !errors.As(err, &e) || e.Kind != errs.Invalid || e.Field != "name" || e.Reason != "NAME_BAD" || e.Remedy != "choose another" {
		t.Errorf("%+v", e)
	}
	if err := grpcerr.FromStatus(status.Error(codes.Canceled, "context canceled")); !errors.Is(err, context.Canceled) || errs.KindOf(err) != errs.Canceled || err.Error() != "context canceled" {
		t.Errorf("%v", err)
	}
}

func TestStatusesPass(t *testing.T) {
	in := status.Error(codes.NotFound, "x")
	if out := grpcerr.ToStatus(in); out != in { //nolint:errorlint // the very same
		t.Errorf("%v", out)
	}
	if grpcerr.ToStatus(nil) != nil || grpcerr.FromStatus(nil) != nil {
		t.Error("nil did not stay nil")
	}
	if err := errors.New("x"); grpcerr.FromStatus(err) != err { //nolint:errorlint // the very same
		t.Error("a plain error did not stay")
	}
}

// TestBounds holds that a chain made to be endless, or a text to be huge, is cut and keeps its kind.
func TestBounds(t *testing.T) {
	var err error = errs.New(errs.Corrupt, "bottom")
	for range 100 {
		err = errs.Wrap(errs.Unknown, err, "layer")
	}
	if got := far(err); errs.KindOf(got) != errs.Corrupt {
		t.Errorf("deep chain: %s", errs.KindOf(got))
	}
	wide := make([]error, 1000)
	for i := range wide {
		wide[i] = errs.New(errs.Invalid, "%s", strings.Repeat("é", 5000))
	}
	st, _ := status.FromError(grpcerr.ToStatus(errors.Join(wide...)))
	n := 0
	for _, d := range st.Proto().Details {
		n += len(d.Value)
	}
	if n > 256<<10 || !utf8.ValidString(st.Message()) || errs.KindOf(grpcerr.FromStatus(st.Err())) != errs.Invalid {
		t.Errorf("%d bytes of details, valid %v", n, utf8.ValidString(st.Message()))
	}
}
