package wire

import (
	"context"
	"errors"
	"io"
	"runtime"
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
	"github.com/mvirt/mvirt/sdk/log"
)

// A unary call costs some 20 µs of CPU on either side, a message of a stream 2, an entry in a message 0.3. So when
// several appends are under way at once they share one AppendStream, and those that wait while the store is
// busy share a message: a group commit that begins at the sender. A single append now and then stays a unary
// call.
const (
	pipeFrom = 3                      // appends under way from which on the stream is used
	pipeIdle = 200 * time.Millisecond // a stream without work is ended, so that a shutdown need not wait for it

	// A message that is not full waits while so many are under way: one that is being synced and others that are
	// being read and written meanwhile. What comes in the meantime makes it fuller.
	pipeFlying = 2
	// Full ones go at once, up to this many, so that all stages of the store have something to do.
	pipeMost = 16
	// A message is full, and is not filled further, at so much; a single append may be larger.
	pipeBytes   = 24 << 10
	pipeEntries = 256
)

// LogClient is the client of a log plugin.
type LogClient struct {
	logClient
	under atomic.Int64
	unary atomic.Bool // the plugin has no AppendStream

	mu  sync.Mutex
	cur *appendPipe
}

var _ log.Service = (*LogClient)(nil)

// Append implements log.Service.
func (c *LogClient) Append(ctx context.Context, entries []log.Entry) error {
	n := c.under.Add(1)
	defer c.under.Add(-1)
	if n < pipeFrom || c.unary.Load() || len(entries) == 0 {
		return c.logClient.Append(ctx, entries)
	}
	call := &appendCall{raw: appendEntries(make([]byte, 0, sizeEntries(entries)), entries), n: len(entries), done: make(chan error, 1)}
	for !c.pipe().add(call) {
		// That one ended at this moment.
	}
	var err error
	select {
	case err = <-call.done:
	case <-ctx.Done():
		return grpcerr.FromStatus(status.FromContextError(ctx.Err()).Err())
	}
	switch {
	case err == nil:
		return nil
	case status.Code(err) == codes.Unimplemented:
		c.unary.Store(true)
		return c.logClient.Append(ctx, entries)
	case errors.Is(err, errAlone):
		return c.logClient.Append(ctx, entries)
	}
	return grpcerr.FromStatus(err)
}

// errAlone answers a call whose message was refused when other calls were in it too.
var errAlone = errors.New("to be tried alone")

// pipe is the stream to use, opened if need be.
func (c *LogClient) pipe() *appendPipe {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cur == nil || c.cur.isClosed() {
		c.cur = &appendPipe{wake: make(chan struct{}, 1), ended: make(chan struct{})}
		go c.cur.send(c.rpc)
	}
	return c.cur
}

type appendCall struct {
	raw  []byte
	n    int // entries
	done chan error
}

// appendPipe is one stream: send makes messages of the calls that wait, receive answers them in order.
type appendPipe struct {
	wake  chan struct{} // capacity 1: there may be something to send
	ended chan struct{} // closed when receive has ended

	mu     sync.Mutex
	queue  []*appendCall
	flying [][]*appendCall // the calls of each message that is not answered yet
	closed bool            // no call is taken any more
}

// add queues a call; false when the pipe is closed.
func (p *appendPipe) add(c *appendCall) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.queue = append(p.queue, c)
	p.ring()
	return true
}

func (p *appendPipe) ring() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *appendPipe) isClosed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

// take is the calls of the next message; nil when there is nothing to send, or enough under way.
func (p *appendPipe) take() []*appendCall {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 || len(p.flying) >= pipeMost {
		return nil
	}
	n, size, entries := 0, 0, 0
	for n < len(p.queue) && size < pipeBytes && entries < pipeEntries {
		size += len(p.queue[n].raw)
		entries += p.queue[n].n
		n++
	}
	if len(p.flying) >= pipeFlying && size < pipeBytes && entries < pipeEntries {
		return nil
	}
	calls := p.queue[:n:n]
	if p.queue = p.queue[n:]; len(p.queue) == 0 {
		p.queue = nil
	}
	p.flying = append(p.flying, calls)
	return calls
}

// retire closes the pipe if nothing is under way.
func (p *appendPipe) retire() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 && len(p.flying) == 0 {
		p.closed = true
	}
	return p.closed
}

// fail closes the pipe and answers all calls.
func (p *appendPipe) fail(err error) {
	p.mu.Lock()
	p.closed = true
	calls := p.queue
	for _, f := range p.flying {
		calls = append(f, calls...)
	}
	p.queue, p.flying = nil, nil
	p.mu.Unlock()
	for _, c := range calls {
		c.done <- err
	}
}

func (p *appendPipe) send(rpc logpb.LogClient) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := rpc.AppendStream(ctx)
	if err != nil {
		p.fail(err)
		close(p.ended)
		return
	}
	go p.receive(stream)
	idle := time.NewTimer(pipeIdle)
	defer idle.Stop()
	var buf []byte
	for {
		// Who has just been answered may be about to send again: he goes first, into the same message.
		runtime.Gosched()
		calls := p.take()
		if calls == nil {
			select {
			case <-p.wake:
			case <-p.ended:
				return
			case <-idle.C:
				if p.retire() {
					_ = stream.CloseSend() // its error is that of Recv
					<-p.ended
					return
				}
				idle.Reset(pipeIdle)
			}
			continue
		}
		raw := calls[0].raw
		if len(calls) > 1 {
			buf = buf[:0]
			for _, c := range calls {
				buf = append(buf, c.raw...)
			}
			raw = buf
		}
		// The bytes of a request are also those of an empty message with fields that it does not know.
		m := &pluginpb.Empty{}
		m.ProtoReflect().SetUnknown(raw)
		if stream.SendMsg(m) != nil {
			<-p.ended // receive gets the reason
			return
		}
		idle.Reset(pipeIdle)
	}
}

// receive hands answers out until the stream ends.
func (p *appendPipe) receive(stream grpc.BidiStreamingClient[logpb.AppendRequest, logpb.AppendResponse]) {
	defer close(p.ended)
	for {
		m, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = status.Error(codes.Unavailable, "the log plugin ended the stream before it had answered")
			}
			p.fail(err)
			return
		}
		p.mu.Lock()
		var calls []*appendCall
		if len(p.flying) > 0 {
			calls, p.flying = p.flying[0], p.flying[1:]
		}
		p.mu.Unlock()
		if calls == nil {
			p.fail(status.Error(codes.Internal, "the log plugin answered what it was not asked"))
			return
		}
		err = answerError(m)
		if err != nil && len(calls) > 1 && errors.Is(grpcerr.FromStatus(err), errs.Invalid) {
			err = errAlone // one of them is wrong, the others must not suffer for it
		}
		for _, c := range calls {
			c.done <- err
		}
		p.ring()
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
