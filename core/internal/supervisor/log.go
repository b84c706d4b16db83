package supervisor

import (
	"context"

	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

type logProxy struct{ proxy }

func (p logProxy) Append(ctx context.Context, entries []log.Entry) error {
	return command(ctx, p.proxy, method{op: "log.Append"}, log.Service.Append, entries)
}

func (p logProxy) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	return server(ctx, p.proxy, method{op: "log.Query"}, fn, func(ctx context.Context, s log.Service, fn func(log.Result) error) error {
		return s.Query(ctx, q, fn)
	})
}

func (p logProxy) Stats(ctx context.Context) (log.Stats, error) {
	return unary0(ctx, p.proxy, method{op: "log.Stats"}, log.Service.Stats)
}

func (p logProxy) Verify(ctx context.Context, req log.VerifyRequest) (log.VerifyReport, error) {
	return unary(ctx, p.proxy, method{op: "log.Verify", feature: service.FeatureLogVerify}, log.Verifier.Verify, req)
}
