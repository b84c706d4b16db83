package console

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// Dial opens the way for what is typed. What the VM prints there is not for us, but must be read; the
// dialler does so where it has to.
type Dial func(ctx context.Context) (io.WriteCloser, error)

// Console is one VM's console: a log, and at most one writer.
type Console struct {
	log *Log

	mu     sync.Mutex // guards what follows
	dial   Dial       // nil while no hypervisor runs
	writer *seat
}

// seat is the writer's place.
type seat struct{ lost chan struct{} }

// New makes the console of a log.
func New(l *Log) *Console { return &Console{log: l} }

// Log gives the log.
func (c *Console) Log() *Log { return c.log }

// Attach says that a hypervisor runs and how to type to it. After an error viewers see history only.
func (c *Console) Attach(d Dial) error {
	c.mu.Lock()
	c.dial = d
	c.mu.Unlock()
	return c.log.SetLive(true)
}

// Detach says that no hypervisor runs; sessions that follow end once they have shown all.
func (c *Console) Detach() {
	c.mu.Lock()
	c.dial = nil
	c.mu.Unlock()
	_ = c.log.SetLive(false) // fails only to open
}

// take makes the caller the writer.
func (c *Console) take(steal bool) (*seat, Dial, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writer != nil {
		if !steal {
			return nil, nil, errs.New(errs.Conflict, "somebody else writes on this console").Because("CONSOLE_IN_USE").
				Do("watch with --read-only, or take it over with --steal")
		}
		close(c.writer.lost)
	}
	c.writer = &seat{lost: make(chan struct{})}
	return c.writer, c.dial, nil
}

func (c *Console) leave(s *seat) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writer == s {
		c.writer = nil
	}
}

// Session serves one viewer: see vmm.Service.Console.
func (c *Console) Session(ctx context.Context, req vmm.ConsoleRequest, cio vmm.ConsoleIO) error {
	stop := make(chan struct{})
	var once sync.Once
	var cause error // of the end; set before stop is closed
	end := func(err error) { once.Do(func() { cause = err; close(stop) }) }
	unwatch := context.AfterFunc(ctx, func() { end(ctx.Err()) })
	defer unwatch()

	if !req.ReadOnly && !req.NoFollow && cio.In != nil {
		s, dial, err := c.take(req.Steal)
		if err != nil {
			return err
		}
		defer c.leave(s)
		typed := make(chan struct{})
		defer func() { end(nil); <-typed }()
		go func() {
			defer close(typed)
			if err := relay(ctx, stop, s.lost, dial, cio.In); err != nil {
				end(err)
			}
		}()
	}
	err := c.log.Read(stop, int64(req.Replay), !req.NoFollow, cio.Out)
	if err == nil {
		select {
		case <-stop:
			err = cause
		default:
		}
	}
	return err
}

// relay hands what is typed to the VM until in or the session ends. It connects at the first key.
func relay(ctx context.Context, stop, lost <-chan struct{}, dial Dial, in <-chan []byte) error {
	var w io.WriteCloser
	defer func() {
		if w != nil {
			w.Close()
		}
	}()
	for {
		select {
		case <-stop:
			return nil
		case <-lost:
			return errs.New(errs.Conflict, "somebody else took the console over").Because("CONSOLE_STOLEN").
				Do("take it back with --steal")
		case b, ok := <-in:
			if !ok {
				return nil
			}
			if dial == nil {
				continue // no VM runs: there is nobody to type to
			}
			for try := 0; len(b) > 0; try++ {
				var err error
				if w == nil {
					if w, err = dial(ctx); err != nil {
						return errs.Wrap(errs.Unavailable, err, "the VM's serial port cannot be reached")
					}
				}
				n, err := w.Write(b)
				b = b[n:]
				if err == nil {
					break
				}
				w.Close()
				w = nil
				if try > 0 {
					if errors.Is(err, context.Canceled) {
						return nil
					}
					return errs.Wrap(errs.Unavailable, err, "the VM does not take what is typed")
				}
			}
		}
	}
}
