package wire

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
)

// A unary call costs some 20 µs of CPU on either side, a message of a stream 2: when several appends are
// under way at once they share one AppendStream. A single one now and then stays a unary call.
const (
	pipeFrom = 3                      // appends under way from which on a stream is used
	pipeIdle = 200 * time.Millisecond // a stream without work is ended, so that a shutdown need not wait for it
)

// pipedLog is a log client whose appends share a stream.
type pipedLog struct {
	logpb.LogClient
	under atomic.Int64
	mu    sync.Mutex
	cur   *appendPipe
	unary atomic.Bool // the plugin has no AppendStream
}

// Append implements logpb.LogClient.
func (l *pipedLog) Append(ctx context.Context, m *logpb.AppendRequest, opts ...grpc.CallOption) (*pluginpb.Empty, error) {
	n := l.under.Add(1)
	defer l.under.Add(-1)
	if n < pipeFrom || len(opts) > 0 || l.unary.Load() {
		return l.LogClient.Append(ctx, m, opts...)
	}
	call := &appendCall{req: m, done: make(chan error, 1)}
	for range 3 {
		p := l.pipe()
		select {
		case p.calls <- call:
		case <-p.retired:
			continue // it ended for want of work at this moment
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		select {
		case err := <-call.done:
			if status.Code(err) == codes.Unimplemented {
				l.unary.Store(true)
				return l.LogClient.Append(ctx, m)
			}
			if err != nil {
				return nil, err
			}
			return &pluginpb.Empty{}, nil
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	return l.LogClient.Append(ctx, m)
}

// pipe is the stream to use, opened if need be.
func (l *pipedLog) pipe() *appendPipe {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cur != nil {
		select {
		case <-l.cur.retired:
		default:
			return l.cur
		}
	}
	p := &appendPipe{calls: make(chan *appendCall), waiting: make(chan *appendCall, appendWindow), retired: make(chan struct{})}
	l.cur = p
	go p.send(l.LogClient)
	return p
}

type appendCall struct {
	req  *logpb.AppendRequest
	done chan error
}

// appendPipe is one stream: send takes calls, receive answers them in order.
type appendPipe struct {
	calls   chan *appendCall
	waiting chan *appendCall
	retired chan struct{} // closed when no call is taken any more
}

func (p *appendPipe) send(rpc logpb.LogClient) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := rpc.AppendStream(ctx)
	ended := make(chan struct{})
	if err == nil {
		go p.receive(stream, ended)
	} else {
		go func() { // answer what comes until it is seen that this one is no good
			defer close(ended)
			for c := range p.waiting {
				c.done <- err
			}
		}()
	}
	idle := time.NewTimer(pipeIdle)
	defer idle.Stop()
	for open := true; open; {
		select {
		case c := <-p.calls:
			p.waiting <- c // before it is sent, so that its answer finds it; full means: wait for answers
			if err != nil || stream.Send(c.req) != nil {
				open = false // receive gets the reason
			}
			idle.Reset(pipeIdle)
		case <-ended:
			open = false
		case <-idle.C:
			open = false
		}
	}
	close(p.retired)
	close(p.waiting)
	if err == nil {
		_ = stream.CloseSend() // its error is that of Recv
	}
	<-ended
}

// receive hands answers out; after an error all that wait get it.
func (p *appendPipe) receive(stream grpc.BidiStreamingClient[logpb.AppendRequest, logpb.AppendResponse], ended chan struct{}) {
	defer close(ended)
	var failed error
	for c := range p.waiting {
		if failed == nil {
			m, err := stream.Recv()
			if err == nil {
				c.done <- answerError(m)
				continue
			}
			failed = err
			if errors.Is(err, io.EOF) {
				failed = status.Error(codes.Unavailable, "the log plugin ended the stream before it had answered")
			}
			// The sender may be blocked on a stream that is gone; it learns from Send. It is told to stop by
			// the answers that come without being asked for.
		}
		c.done <- failed
	}
}

// answerError is the error of a response, as a status.
func answerError(m *logpb.AppendResponse) error {
	if m.GetCode() == 0 && m.GetError() == nil {
		return nil
	}
	if m.GetError() != nil {
		return grpcerr.ToStatus(grpcerr.FromDetail(m.GetError()))
	}
	return grpcerr.ToStatus(errs.New(grpcerr.Kind(codes.Code(m.GetCode())), "the entries were not stored"))
}
