package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storagekit/image"
)

// memoryLimit is what a worker may use: the largest zstd window and xz dictionary in use, several buffers,
// and the rest of a Go program.
const memoryLimit = 1 << 30

// Main is the worker's main; it fits plugin.Program.Workers. It returns the exit code: 0 when the parent has
// been told how it went.
func Main([]string) int {
	if err := confine(); err != nil {
		fmt.Fprintln(os.Stderr, "mvirt worker: cannot confine itself:", err)
		return 1
	}
	debug.SetMemoryLimit(memoryLimit * 3 / 4)
	ctl, err := newControl(os.NewFile(controlFD, "control"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "mvirt worker: started by hand? It is run by its plugin only:", err)
		return 1
	}
	c := &child{ctl: ctl, early: make(chan span, 64)}
	c.cond.L = &c.mu
	size, err := c.run()
	m := message{Kind: kindDone, Size: size, Wrote: c.wrote.Load()}
	if err != nil {
		m = message{Kind: kindError, Error: newFailure(err)}
	}
	if ctl.send(m, nil) != nil {
		return 1
	}
	return 0
}

// child is the state of a running worker. It is the Source (bytes that arrive), the Target and the Reporter
// of its conversion.
type child struct {
	ctl    *control
	source *os.File
	hint   int64
	dense  bool
	wrote  atomic.Int64
	dirty  atomic.Int64 // written to a device and perhaps not there yet
	early  chan span    // written to a file: what flush begins to bring to the disk

	mu      sync.Mutex
	cond    sync.Cond
	avail   int64
	whole   bool
	gone    error // the parent hung up
	target  *os.File
	block   bool
	size    int64 // of the target
	granted bool  // a target or an answer to grow has come
	refused error
	asking  bool
	done    int64
	total   int64
}

var (
	_ image.Source   = (*child)(nil)
	_ image.Target   = (*child)(nil)
	_ image.Reporter = (*child)(nil)
)

func (c *child) run() (int64, error) {
	m, _, err := c.ctl.receive(false)
	if err != nil {
		return 0, err
	}
	if m.Kind != kindStart {
		return 0, errs.New(errs.Internal, "the first message is %q", m.Kind)
	}
	c.source = os.NewFile(sourceFD, "source")
	c.avail, c.whole, c.hint, c.dense = m.Length, m.Whole, m.Hint, m.Dense
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go c.listen(cancel)
	stop := make(chan struct{})
	defer close(stop)
	go c.tell(stop)
	go c.flush(stop)
	scratch := func() (*os.File, error) { return os.NewFile(scratchFD, "scratch"), nil }
	size, err := image.Convert(ctx, c, c, scratch, m.Limits, c)
	if err != nil {
		return 0, err
	}
	if err := c.ensureTarget(size); err != nil {
		return 0, err
	}
	if err := c.target.Sync(); err != nil {
		return 0, fmt.Errorf("write the disk: %w", err)
	}
	return size, nil
}

// listen takes what the parent says until it hangs up.
func (c *child) listen(cancel func()) {
	for {
		m, file, err := c.ctl.receive(true)
		c.mu.Lock()
		switch {
		case err != nil:
			c.gone = err
		case m.Kind == kindAvail:
			c.avail, c.whole = m.Length, m.Whole
			if m.Error != nil {
				c.gone = m.Error.err()
			}
		case m.Kind == kindTarget, m.Kind == kindGrown:
			c.granted = true
			if m.Error != nil {
				c.refused = m.Error.err()
			} else {
				c.size = m.Size
			}
			if file != nil && c.target == nil {
				c.target, c.block, file = file, m.Block, nil
			}
		}
		gone := c.gone
		c.cond.Broadcast()
		c.mu.Unlock()
		if file != nil {
			file.Close()
		}
		if gone != nil {
			cancel()
			if err != nil {
				os.Exit(3) // nobody is left to tell
			}
			return
		}
	}
}

// ReadAt waits until [off, off+len(p)) is there.
func (c *child) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	for c.avail < off+int64(len(p)) && !c.whole && c.gone == nil {
		c.cond.Wait()
	}
	avail, gone := c.avail, c.gone
	c.mu.Unlock()
	if gone != nil {
		return 0, gone
	}
	src := image.FileSource{File: c.source, Length: avail}
	n, err := src.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, fmt.Errorf("read the image: %w", err)
	}
	return n, err
}

// Size waits for the end of the source.
func (c *child) Size() (int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.whole && c.gone == nil {
		c.cond.Wait()
	}
	return c.avail, c.gone
}

// Hint is what the parent said.
func (c *child) Hint() int64 { return c.hint }

// Sparse is the source when it is a whole regular file.
func (c *child) Sparse() *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dense || !c.whole {
		return nil
	}
	return c.source
}

// Format tells the parent, which answers with the target.
func (c *child) Format(name string, size int64) {
	_ = c.ctl.send(message{Kind: kindFormat, Format: name, Size: size}, nil) // a lost parent shows in listen
}

// Progress notes how far it is; tell sends it.
func (c *child) Progress(done, total, wrote int64) {
	c.wrote.Add(wrote)
	if done >= 0 {
		c.mu.Lock()
		c.done, c.total = max(done, c.done), total
		c.mu.Unlock()
	}
}

// tell sends the progress ten times a second, when there is any, until stop is closed.
func (c *child) tell(stop <-chan struct{}) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	var last message
	for {
		select {
		case <-stop:
			return
		case <-t.C:
		}
		c.mu.Lock()
		m := message{Kind: kindProgress, Done: c.done, Total: c.total, Wrote: c.wrote.Load()}
		c.mu.Unlock()
		if m.Done != last.Done || m.Wrote != last.Wrote {
			last = m
			_ = c.ctl.send(m, nil) // a lost parent shows in listen
		}
	}
}

// WriteAt writes to the target, waiting for it the first time.
func (c *child) WriteAt(p []byte, off int64) (int, error) {
	n, err := c.target.WriteAt(p, off)
	if err == nil && !c.block {
		select {
		case c.early <- span{off, int64(n)}:
		default: // the disk is slower; the sync at the end finds it
		}
	}
	if err == nil && c.block && c.dirty.Add(int64(n)) >= writeBehind {
		c.dirty.Store(0)
		err = unix.SyncFileRange(int(c.target.Fd()), 0, 0,
			unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	}
	if err != nil {
		return n, fmt.Errorf("write the disk: %w", err)
	}
	return n, nil
}

// span is a part of the target.
type span struct{ off, n int64 }

// flush lets the kernel begin to write to the disk what the conversion has written to the file. It would do so by
// itself only much later, and all of it would be waited for at the end. Spans are gathered to be worth a call.
func (c *child) flush(stop <-chan struct{}) {
	const enough = 8 << 20
	var gathered, lowest, highest int64
	for {
		select {
		case <-stop:
			return
		case s := <-c.early:
			if gathered == 0 {
				lowest, highest = s.off, s.off+s.n
			}
			gathered += s.n
			lowest, highest = min(lowest, s.off), max(highest, s.off+s.n)
			if gathered < enough {
				continue
			}
			// What goes wrong here goes wrong again in the sync at the end, which is asked.
			_ = unix.SyncFileRange(int(c.target.Fd()), lowest, highest-lowest, unix.SYNC_FILE_RANGE_WRITE)
			gathered = 0
		}
	}
}

// writeBehind is how much is written to a device before it is waited for. Without that a whole image would
// gather in the page cache, and a full pool would show only at the end, block by block.
const writeBehind = 32 << 20

// Grow makes room: a file by itself, a device by asking the parent.
func (c *child) Grow(size int64) error { return c.ensureTarget(size) }

func (c *child) ensureTarget(size int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.target == nil && c.refused == nil && c.gone == nil {
		c.cond.Wait()
	}
	for {
		switch {
		case c.gone != nil:
			return c.gone
		case c.refused != nil:
			return c.refused
		case c.size >= size:
			return nil
		case !c.block:
			if err := c.target.Truncate(size); err != nil {
				return fmt.Errorf("write the disk: %w", err)
			}
			c.size = size
			return nil
		case c.asking:
			c.cond.Wait()
			continue
		}
		c.asking, c.granted = true, false
		if err := c.ctl.send(message{Kind: kindGrow, Size: size}, nil); err != nil {
			return err
		}
		for !c.granted && c.gone == nil {
			c.cond.Wait()
		}
		c.asking = false
		c.cond.Broadcast()
	}
}

// confine takes away what a conversion does not need, for all threads.
func confine() error {
	for res, limit := range map[int]uint64{
		unix.RLIMIT_CORE:   0,
		unix.RLIMIT_NOFILE: 32,
		unix.RLIMIT_DATA:   memoryLimit * 3 / 2, // what Go has reserved counts as well
	} {
		if err := unix.Setrlimit(res, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
			return fmt.Errorf("setrlimit %d: %w", res, err)
		}
	}
	return seccomp()
}
