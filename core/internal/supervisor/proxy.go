package supervisor

import (
	"context"
	"io"

	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// Storage is the storage contract with all its optional parts; see [Supervisor.Has] for which there are.
type Storage interface {
	storage.Service
	service.Backuper
}

// Net is the net contract with all its optional parts.
type Net interface {
	net.Service
	net.Updater
	net.SecurityGrouper
	service.Backuper
}

// VMM is the vmm contract with all its optional parts.
type VMM interface {
	vmm.Service
	vmm.DiskHotplugger
	vmm.NICHotplugger
	vmm.DiskResizer
	vmm.Resizer
	vmm.Snapshotter
	vmm.Counter
	service.Backuper
}

// Log is the log contract with all its optional parts.
type Log interface {
	log.Service
	log.Verifier
	service.Backuper
}

// Storage is the storage service, whichever plugin runs it.
func (s *Supervisor) Storage() Storage { return storageProxy{s.proxy(service.KindStorage)} }

// Net is the net service.
func (s *Supervisor) Net() Net { return netProxy{s.proxy(service.KindNet)} }

// VMM is the vmm service.
func (s *Supervisor) VMM() VMM { return vmmProxy{s.proxy(service.KindVMM)} }

// Log is the log service.
func (s *Supervisor) Log() Log { return logProxy{s.proxy(service.KindLog)} }

// proxy stands for the service of a kind. Its methods are those of every plugin.
type proxy struct {
	kind service.Kind
	u    *unit // nil: not configured
}

func (s *Supervisor) proxy(k service.Kind) proxy { return proxy{kind: k, u: s.units[k]} }

// Health is the plugin's own judgement.
func (p proxy) Health(ctx context.Context) (service.Health, error) {
	return unary0(ctx, p, method{op: string(p.kind) + ".Health"}, service.Base.Health)
}

// Shutdown is not for callers of a proxy; the supervisor shuts plugins down.
func (p proxy) Shutdown(context.Context) error { return nil }

// Backup streams the plugin's own state.
func (p proxy) Backup(ctx context.Context, w io.Writer) error {
	m := method{op: string(p.kind) + ".Backup", feature: p.backupFeature()}
	cw := &countingWriter{w: w}
	return stream(ctx, p, m, &cw.wrote, func(ctx context.Context, s service.Backuper) error { return s.Backup(ctx, cw) })
}

// Restore puts a backup back. It is never repeated: the stream has been read.
func (p proxy) Restore(ctx context.Context, r io.Reader) error {
	m := method{op: string(p.kind) + ".Restore", once: true, feature: p.backupFeature()}
	return stream(ctx, p, m, new(bool), func(ctx context.Context, s service.Backuper) error { return s.Restore(ctx, r) })
}

func (p proxy) backupFeature() service.Feature {
	switch p.kind {
	case service.KindStorage:
		return service.FeatureStorageBackup
	case service.KindNet:
		return service.FeatureNetBackup
	case service.KindVMM:
		return service.FeatureVMMBackup
	}
	return service.FeatureLogBackup
}

type countingWriter struct {
	w     io.Writer
	wrote bool
}

func (c *countingWriter) Write(b []byte) (int, error) { c.wrote = true; return c.w.Write(b) }

// The three shapes of a contract's unary methods, given as method expressions (storage.Service.GetVolume).

func unary[S, Q, R any](ctx context.Context, p proxy, m method, fn func(S, context.Context, Q) (R, error), req Q) (R, error) {
	return call(ctx, p, m, func(ctx context.Context, s S) (R, error) { return fn(s, ctx, req) })
}

func unary0[S, R any](ctx context.Context, p proxy, m method, fn func(S, context.Context) (R, error)) (R, error) {
	return call(ctx, p, m, func(ctx context.Context, s S) (R, error) { return fn(s, ctx) })
}

func command[S, Q any](ctx context.Context, p proxy, m method, fn func(S, context.Context, Q) error, req Q) error {
	_, err := call(ctx, p, m, func(ctx context.Context, s S) (struct{}, error) { return struct{}{}, fn(s, ctx, req) })
	return err
}

// server makes a streaming call that delivers results to each.
func server[S, T any](ctx context.Context, p proxy, m method, each func(T) error, fn func(ctx context.Context, s S, each func(T) error) error) error {
	delivered := false
	return stream(ctx, p, m, &delivered, func(ctx context.Context, s S) error {
		return fn(ctx, s, func(v T) error { delivered = true; return each(v) })
	})
}
