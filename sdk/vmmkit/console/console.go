package console

import (
	"context"
	"io"
	"sync"
	"time"

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

// dialTimeout is how long the way to the VM may take to open.
const dialTimeout = 10 * time.Second

// relay hands what is typed to the VM until in or the session ends. It connects at the first key. What was typed
// before the session ended still goes to the VM: a user who types and leaves has typed.
func relay(ctx context.Context, stop, lost <-chan struct{}, dial Dial, in <-chan []byte) error {
	l := line{dial: dial}
	defer l.close()
	ctx = context.WithoutCancel(ctx)
	for {
		select {
		case <-lost:
			return errs.New(errs.Conflict, "somebody else took the console over").Because("CONSOLE_STOLEN").
				Do("take it back with --steal")
		case b, ok := <-in:
			if !ok {
				return nil
			}
			if err := l.write(ctx, b); err != nil {
				return err
			}
		case <-stop:
			for {
				select {
				case b, ok := <-in:
					if !ok {
						return nil
					}
					if err := l.write(ctx, b); err != nil {
						return err
					}
				default:
					return nil
				}
			}
		}
	}
}

// line is the way to the VM's serial port.
type line struct {
	dial Dial           // nil while no VM runs
	w    io.WriteCloser // nil while not open
}

func (l *line) close() {
	if l.w != nil {
		l.w.Close()
		l.w = nil
	}
}

// write types b. The serial port may have been closed since it was last written to: it is opened anew once.
func (l *line) write(ctx context.Context, b []byte) error {
	if l.dial == nil {
		return nil // no VM runs: there is nobody to type to
	}
	for try := 0; len(b) > 0; try++ {
		if l.w == nil {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			w, err := l.dial(ctx)
			cancel()
			if err != nil {
				return errs.Wrap(errs.Unavailable, err, "the VM's serial port cannot be reached")
			}
			l.w = w
		}
		n, err := l.w.Write(b)
		b = b[n:]
		if err == nil {
			return nil
		}
		l.close()
		if try > 0 {
			return errs.Wrap(errs.Unavailable, err, "the VM does not take what is typed")
		}
	}
	return nil
}
