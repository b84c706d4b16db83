package wire

import (
	"context"
	"errors"
	"io"
	"sync"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/storagepb"
	"github.com/mvirt/mvirt/sdk/internal/pb/vmmpb"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// chunk is the largest piece of a byte stream (Chunk in plugin.proto): large enough for bandwidth, small
// enough that two in flight do not matter.
const chunk = 1 << 20

var (
	_ storage.Service     = (*storageClient)(nil)
	_ service.Backuper    = (*storageClient)(nil)
	_ net.Service         = (*netClient)(nil)
	_ net.Updater         = (*netClient)(nil)
	_ net.SecurityGrouper = (*netClient)(nil)
	_ service.Backuper    = (*netClient)(nil)
	_ vmm.Service         = (*vmmClient)(nil)
	_ vmm.DiskHotplugger  = (*vmmClient)(nil)
	_ vmm.NICHotplugger   = (*vmmClient)(nil)
	_ vmm.DiskResizer     = (*vmmClient)(nil)
	_ vmm.Resizer         = (*vmmClient)(nil)
	_ vmm.Snapshotter     = (*vmmClient)(nil)
	_ vmm.Counter         = (*vmmClient)(nil)
	_ service.Backuper    = (*vmmClient)(nil)
	_ log.Service         = (*logClient)(nil)
	_ log.Verifier        = (*logClient)(nil)
	_ service.Backuper    = (*logClient)(nil)
)

// push is the one shape of a server stream: fn is called with a function that sends.
func push[T, PB any](op string, stream grpc.ServerStreamingServer[PB], enc func(*Enc, *T) *PB, fn func(send func(T) error) error) error {
	err := fn(func(v T) error { return stream.Send(enc(&Enc{}, &v)) })
	if err != nil {
		return grpcerr.ToStatus(withOp(op, err))
	}
	return nil
}

// pull is the other end: fn gets each message. Its error ends the stream and is returned as it is.
func pull[T, PB any](ctx context.Context, op string, open func(context.Context) (grpc.ServerStreamingClient[PB], error),
	dec func(*Dec, *PB) T, fn func(T) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := open(ctx)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return grpcerr.FromStatus(err)
		}
		d := &Dec{}
		v := dec(d, m)
		if d.err != nil {
			return withOp(op, d.err)
		}
		if err := fn(v); err != nil {
			return err
		}
	}
}

// ---- storage

func (s *storageServer) WatchImport(m *storagepb.Ref, stream grpc.ServerStreamingServer[storagepb.Import]) error {
	return push("storage.WatchImport", stream, storageImportToPB, func(send func(storage.Import) error) error {
		return s.impl.WatchImport(stream.Context(), storageRefFromPB(&Dec{}, m), send)
	})
}

func (c *storageClient) WatchImport(ctx context.Context, req storage.Ref, fn func(storage.Import) error) error {
	return pull(ctx, "storage.WatchImport", func(ctx context.Context) (grpc.ServerStreamingClient[storagepb.Import], error) {
		return c.rpc.WatchImport(ctx, storageRefToPB(&Enc{}, &req))
	}, storageImportFromPB, fn)
}

// ---- log

func (s *logServer) Query(m *logpb.Query, stream grpc.ServerStreamingServer[logpb.Result]) error {
	return push("log.Query", stream, logResultToPB, func(send func(log.Result) error) error {
		d := &Dec{}
		q := logQueryFromPB(d, m)
		if d.err != nil {
			return d.err
		}
		return s.impl.Query(stream.Context(), q, send)
	})
}

func (c *logClient) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	return pull(ctx, "log.Query", func(ctx context.Context) (grpc.ServerStreamingClient[logpb.Result], error) {
		return c.rpc.Query(ctx, logQueryToPB(&Enc{}, &q))
	}, logResultFromPB, fn)
}

// appendWindow is how many batches of one AppendStream the store may work on at once, and appendBytes how
// large they may be together: enough for group commit, little enough that a sender which does not read
// answers cannot fill memory.
const (
	appendWindow = 256
	appendBytes  = 32 << 20
)

func (s *logServer) AppendStream(stream grpc.BidiStreamingServer[logpb.AppendRequest, logpb.AppendResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	answers := make(chan chan error, appendWindow)
	sent := make(chan error, 1)
	go func() {
		defer cancel()
		for a := range answers {
			out := &logpb.AppendResponse{}
			if err := <-a; err != nil {
				out.Code = uint32(grpcerr.Code(errs.KindOf(err)))
				out.Error = grpcerr.Detail(withOp("log.Append", err))
			}
			if err := stream.Send(out); err != nil {
				sent <- err
				for range answers { // the senders must not block
				}
				return
			}
		}
		sent <- nil
	}()
	var wg sync.WaitGroup
	room := semaphore.NewWeighted(appendBytes)
	var rerr error
	for {
		// Received as a message without known fields: its bytes are read by decodeEntries.
		m := &pluginpb.Empty{}
		if err := stream.RecvMsg(m); err != nil {
			if !errors.Is(err, io.EOF) {
				rerr = err
			}
			break
		}
		a := make(chan error, 1)
		select {
		case answers <- a: // from here on it must be answered
		case <-ctx.Done():
			rerr = ctx.Err()
		}
		if rerr != nil {
			break
		}
		raw := m.ProtoReflect().GetUnknown()
		entries, err := decodeEntries(raw)
		if err != nil {
			a <- err
			continue
		}
		size := min(int64(len(raw)+300*len(entries)), appendBytes) // about what it takes in memory
		if err := room.Acquire(ctx, size); err != nil {
			a <- err
			rerr = err
			break
		}
		wg.Go(func() {
			defer room.Release(size)
			a <- s.impl.Append(ctx, entries)
		})
	}
	wg.Wait()
	close(answers)
	if err := <-sent; err != nil {
		return err
	}
	return rerr
}

// ---- vmm

func (s *vmmServer) Watch(_ *pluginpb.Empty, stream grpc.ServerStreamingServer[vmmpb.Event]) error {
	return push("vmm.Watch", stream, vmmEventToPB, func(send func(vmm.Event) error) error {
		return s.impl.Watch(stream.Context(), send)
	})
}

func (c *vmmClient) Watch(ctx context.Context, fn func(vmm.Event) error) error {
	return pull(ctx, "vmm.Watch", func(ctx context.Context) (grpc.ServerStreamingClient[vmmpb.Event], error) {
		return c.rpc.Watch(ctx, &pluginpb.Empty{})
	}, vmmEventFromPB, fn)
}

func (s *vmmServer) Console(stream grpc.BidiStreamingServer[vmmpb.ConsoleInput, pluginpb.Chunk]) error {
	const op = "vmm.Console"
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if first.GetOpen() == nil {
		return grpcerr.ToStatus(withOp(op, errs.Field("open", "send `open` first", "the first message of a console is not `open`")))
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	in := make(chan []byte)
	go func() {
		defer close(in)
		for {
			m, err := stream.Recv()
			if err != nil {
				return // closed by the peer: a watcher from now on; cancelled: ctx ends too
			}
			if len(m.GetData()) == 0 {
				continue
			}
			select {
			case in <- m.GetData():
			case <-ctx.Done():
				return
			}
		}
	}()
	err = s.impl.Console(ctx, vmmConsoleRequestFromPB(&Dec{}, first.GetOpen()), vmm.ConsoleIO{In: in,
		Out: func(b []byte) error {
			for len(b) > 0 {
				n := min(len(b), chunk)
				if err := stream.Send(&pluginpb.Chunk{Data: b[:n:n]}); err != nil {
					return err
				}
				b = b[n:]
			}
			return nil
		}})
	if err == nil || errors.Is(err, io.EOF) {
		return nil
	}
	return grpcerr.ToStatus(withOp(op, err))
}

func (c *vmmClient) Console(ctx context.Context, req vmm.ConsoleRequest, cio vmm.ConsoleIO) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.rpc.Console(ctx)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	if err := stream.Send(&vmmpb.ConsoleInput{Kind: &vmmpb.ConsoleInput_Open{Open: vmmConsoleRequestToPB(&Enc{}, &req)}}); err != nil && !errors.Is(err, io.EOF) {
		return grpcerr.FromStatus(err)
	}
	if cio.In != nil {
		go func() {
			for {
				select {
				case b, ok := <-cio.In:
					if !ok {
						stream.CloseSend()
						return
					}
					if stream.Send(&vmmpb.ConsoleInput{Kind: &vmmpb.ConsoleInput_Data{Data: b}}) != nil {
						return // Recv says why
					}
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return io.EOF
		}
		if err != nil {
			return grpcerr.FromStatus(err)
		}
		if err := cio.Out(m.GetData()); err != nil {
			return err
		}
	}
}

// ---- backup, the same for all kinds

func serveBackup(op string, impl any, f service.Feature, stream grpc.ServerStreamingServer[pluginpb.Chunk]) error {
	b, ok := impl.(service.Backuper)
	if !ok {
		return unsupported(op, f)
	}
	if err := b.Backup(stream.Context(), chunkWriter{stream.Send}); err != nil {
		return grpcerr.ToStatus(withOp(op, err))
	}
	return nil
}

func serveRestore(op string, impl any, f service.Feature, stream grpc.ClientStreamingServer[pluginpb.Chunk, pluginpb.Empty]) error {
	b, ok := impl.(service.Backuper)
	if !ok {
		return unsupported(op, f)
	}
	if err := b.Restore(stream.Context(), &chunkReader{recv: stream.Recv}); err != nil {
		return grpcerr.ToStatus(withOp(op, err))
	}
	return stream.SendAndClose(&pluginpb.Empty{})
}

func (c *baseClient) backup(ctx context.Context, op string, f service.Feature, w io.Writer,
	open func(context.Context, *pluginpb.Empty, ...grpc.CallOption) (grpc.ServerStreamingClient[pluginpb.Chunk], error)) error {
	if !c.has(f) {
		return errUnsupported(op, f)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := open(ctx, &pluginpb.Empty{})
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return grpcerr.FromStatus(err)
		}
		if _, err := w.Write(m.GetData()); err != nil {
			return err
		}
	}
}

func (c *baseClient) restore(ctx context.Context, op string, f service.Feature, r io.Reader,
	open func(context.Context, ...grpc.CallOption) (grpc.ClientStreamingClient[pluginpb.Chunk, pluginpb.Empty], error)) error {
	if !c.has(f) {
		return errUnsupported(op, f)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := open(ctx)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	if _, err := io.CopyBuffer(chunkWriter{stream.Send}, struct{ io.Reader }{r}, make([]byte, chunk)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err = stream.CloseAndRecv()
	return grpcerr.FromStatus(err)
}

type chunkWriter struct{ send func(*pluginpb.Chunk) error }

func (w chunkWriter) Write(b []byte) (int, error) {
	for n := 0; n < len(b); n += chunk {
		if err := w.send(&pluginpb.Chunk{Data: b[n:min(n+chunk, len(b))]}); err != nil {
			return n, err
		}
	}
	return len(b), nil
}

type chunkReader struct {
	recv func() (*pluginpb.Chunk, error)
	rest []byte
}

func (r *chunkReader) Read(b []byte) (int, error) {
	for len(r.rest) == 0 {
		m, err := r.recv()
		if err != nil {
			return 0, err
		}
		r.rest = m.GetData()
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (s *storageServer) Backup(_ *pluginpb.Empty, st grpc.ServerStreamingServer[pluginpb.Chunk]) error {
	return serveBackup("storage.Backup", s.impl, service.FeatureStorageBackup, st)
}

func (s *storageServer) Restore(st grpc.ClientStreamingServer[pluginpb.Chunk, pluginpb.Empty]) error {
	return serveRestore("storage.Restore", s.impl, service.FeatureStorageBackup, st)
}

func (c *storageClient) Backup(ctx context.Context, w io.Writer) error {
	return c.backup(ctx, "storage.Backup", service.FeatureStorageBackup, w, c.rpc.Backup)
}

func (c *storageClient) Restore(ctx context.Context, r io.Reader) error {
	return c.restore(ctx, "storage.Restore", service.FeatureStorageBackup, r, c.rpc.Restore)
}

func (s *netServer) Backup(_ *pluginpb.Empty, st grpc.ServerStreamingServer[pluginpb.Chunk]) error {
	return serveBackup("net.Backup", s.impl, service.FeatureNetBackup, st)
}

func (s *netServer) Restore(st grpc.ClientStreamingServer[pluginpb.Chunk, pluginpb.Empty]) error {
	return serveRestore("net.Restore", s.impl, service.FeatureNetBackup, st)
}

func (c *netClient) Backup(ctx context.Context, w io.Writer) error {
	return c.backup(ctx, "net.Backup", service.FeatureNetBackup, w, c.rpc.Backup)
}

func (c *netClient) Restore(ctx context.Context, r io.Reader) error {
	return c.restore(ctx, "net.Restore", service.FeatureNetBackup, r, c.rpc.Restore)
}

func (s *vmmServer) Backup(_ *pluginpb.Empty, st grpc.ServerStreamingServer[pluginpb.Chunk]) error {
	return serveBackup("vmm.Backup", s.impl, service.FeatureVMMBackup, st)
}

func (s *vmmServer) Restore(st grpc.ClientStreamingServer[pluginpb.Chunk, pluginpb.Empty]) error {
	return serveRestore("vmm.Restore", s.impl, service.FeatureVMMBackup, st)
}

func (c *vmmClient) Backup(ctx context.Context, w io.Writer) error {
	return c.backup(ctx, "vmm.Backup", service.FeatureVMMBackup, w, c.rpc.Backup)
}

func (c *vmmClient) Restore(ctx context.Context, r io.Reader) error {
	return c.restore(ctx, "vmm.Restore", service.FeatureVMMBackup, r, c.rpc.Restore)
}

func (s *logServer) Backup(_ *pluginpb.Empty, st grpc.ServerStreamingServer[pluginpb.Chunk]) error {
	return serveBackup("log.Backup", s.impl, service.FeatureLogBackup, st)
}

func (s *logServer) Restore(st grpc.ClientStreamingServer[pluginpb.Chunk, pluginpb.Empty]) error {
	return serveRestore("log.Restore", s.impl, service.FeatureLogBackup, st)
}

func (c *logClient) Backup(ctx context.Context, w io.Writer) error {
	return c.backup(ctx, "log.Backup", service.FeatureLogBackup, w, c.rpc.Backup)
}

func (c *logClient) Restore(ctx context.Context, r io.Reader) error {
	return c.restore(ctx, "log.Restore", service.FeatureLogBackup, r, c.rpc.Restore)
}
