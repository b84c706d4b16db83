package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/storagekit/image"
)

// Identity is whom a worker runs as. The zero value means: as whoever starts it.
type Identity struct {
	Switch   bool
	UID, GID uint32
	Starter  *jail.Client // starts it under the worker's user; nil: we do, and Switch says as whom
}

// LookupIdentity finds the worker's user. Only root can switch; everybody else keeps the own user.
func LookupIdentity(name string) (Identity, error) {
	if os.Geteuid() != 0 {
		return Identity{}, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return Identity{}, errs.New(errs.Precondition, "the user %q, under which images are converted, does not exist", name).
			Because("WORKER_USER_MISSING").Do("create it (useradd --system --no-create-home " + name + ") or name another with --worker-user")
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err1 != nil || err2 != nil || uid == 0 {
		return Identity{}, errs.New(errs.Precondition, "the user %q cannot run a worker (uid %s)", name, u.Uid).
			Because("WORKER_USER_MISSING").Do("name an unprivileged user with --worker-user")
	}
	return Identity{Switch: true, UID: uint32(uid), GID: uint32(gid)}, nil
}

// Job is one conversion, as the plugin sees it.
type Job struct {
	As      Identity
	Source  *os.File // stays the caller's
	Length  int64    // bytes of it that are there
	Whole   bool     // and that is all
	Hint    int64    // announced size, or -1
	Dense   bool     // not a regular file
	Scratch *os.File // empty, unnamed; stays the caller's
	Limits  image.Limits

	// Target is called once the format is known; size is -1 while it is not. It returns where to write and
	// how large that is; the worker gets a duplicate. For a regular file size may be 0: the worker grows it.
	Target func(format string, size int64) (file *os.File, have int64, block bool, err error)
	// Grow makes a block device larger and returns its size.
	Grow func(size int64) (int64, error)
	// Progress is called at most ten times a second: bytes done of total (0: unknown), bytes written.
	Progress func(done, total, wrote int64)
	// Arrived sends how much of a source that is not whole has come; it is closed when that is all. A failure
	// to fetch cancels ctx.
	Arrived <-chan Arrival
}

// Arrival says how many bytes of the source are there.
type Arrival struct {
	Length int64
	Whole  bool
}

// Result is what came of it.
type Result struct {
	Size  int64 // of the disk
	Wrote int64 // bytes that are not zero
}

// Run converts in a worker process and returns when that has ended; nothing of it is left then, whatever
// happened. Errors have the kind that the worker gave; a worker that died is errs.Internal.
func Run(ctx context.Context, job Job) (Result, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return Result{}, fmt.Errorf("start the worker: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "control")
	defer theirs.Close()
	ctl, err := newControl(os.NewFile(uintptr(pair[0]), "control"))
	if err != nil {
		return Result{}, fmt.Errorf("start the worker: %w", err)
	}
	defer ctl.conn.Close()
	var words tail
	w, err := job.As.start(&words, theirs, job.Source, job.Scratch)
	if err != nil {
		return Result{}, &errs.Error{Kind: errs.Unavailable, Message: "cannot start the worker that converts images", Err: err,
			Remedy: "check that the plugin may change to the worker's user and that the binary is executable for it"}
	}
	theirs.Close()
	p := &parent{job: job, ctl: ctl}
	ended := make(chan struct{})
	var aux sync.WaitGroup
	aux.Go(func() {
		select {
		case <-ctx.Done():
			// Hanging up ends the worker; the signal is for one that does not look.
			ctl.conn.Close()
			w.kill()
		case <-ended:
		}
	})
	aux.Go(func() { p.tellArrivals(ended) })
	res, err := p.serve()
	if err != nil {
		ctl.conn.Close()
		w.kill() // it may have ended by itself
	}
	werr := w.wait()
	close(ended)
	aux.Wait()
	if ctx.Err() != nil {
		return Result{}, context.Cause(ctx)
	}
	if err != nil && !p.told {
		return Result{}, died(werr, words.String())
	}
	return res, err
}

// process is a worker that runs.
type process struct {
	kill func()
	wait func() error // returns when it has ended and all that it said has come
}

// outputDelay is how long a worker's last words may take to come after its end.
const outputDelay = 2 * time.Second

// start starts a worker with files as descriptors 3 and up; they stay the caller's.
func (as Identity) start(words *tail, files ...*os.File) (process, error) {
	if as.Starter != nil {
		return as.startKept(words, files...)
	}
	cmd := &exec.Cmd{
		// The binary that runs now, whatever has become of its path. The worker's user need not be able to
		// reach the path, either.
		Path:        "/proc/self/exe",
		Args:        []string{"mvirt-" + Name, Name},
		Env:         []string{"GOTRACEBACK=single"},
		Dir:         "/",
		ExtraFiles:  files,
		Stdout:      words,
		Stderr:      words,
		WaitDelay:   outputDelay,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if as.Switch {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: as.UID, Gid: as.GID}
	}
	if err := cmd.Start(); err != nil {
		return process{}, err
	}
	return process{kill: func() { _ = cmd.Process.Kill() }, wait: cmd.Wait}, nil
}

// startKept has the launcher start it.
func (as Identity) startKept(words *tail, files ...*os.File) (process, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return process{}, err
	}
	defer w.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	p, err := as.Starter.StartWorker(ctx, jail.Worker{Name: Name, Env: []string{"GOTRACEBACK=single"}}, w, files...)
	if err != nil {
		r.Close()
		return process{}, err
	}
	said := make(chan struct{})
	go func() {
		defer close(said)
		_, _ = io.Copy(words, r)
	}()
	return process{kill: func() { _ = p.Signal(syscall.SIGKILL) }, wait: func() error {
		<-p.Done()
		_ = r.SetReadDeadline(time.Now().Add(outputDelay))
		<-said
		r.Close()
		if e := p.Exit(); e.Known && e.Code == 0 && e.Signal == 0 {
			return nil
		}
		return errors.New(p.Exit().String())
	}}, nil
}

func died(werr error, words string) error {
	e := &errs.Error{Kind: errs.Internal, Reason: "WORKER_DIED", Message: "the worker that converts the image died", Err: werr,
		Remedy: "try again; if it happens again with this image, report the image as a bug"}
	if bytes.Contains([]byte(words), []byte("out of memory")) || bytes.Contains([]byte(words), []byte("cannot allocate")) ||
		bytes.Contains([]byte(words), []byte("failed to allocate")) {
		return &errs.Error{Kind: errs.Invalid, Reason: "BAD_IMAGE",
			Message: fmt.Sprintf("the image needs more than %d MiB of memory to decompress", memoryLimit>>20),
			Remedy:  "compress it again with smaller settings, or decompress it first"}
	}
	if first, _, _ := strings.Cut(words, "\n"); first != "" {
		e.Err = fmt.Errorf("%w: %s", errors.Join(werr), first)
	}
	return e
}

// parent is the plugin's side of one run.
type parent struct {
	job  Job
	ctl  *control
	told bool // the worker, or our own side, said what is wrong
}

func (p *parent) serve() (Result, error) {
	err := p.ctl.send(message{Kind: kindStart, Length: p.job.Length, Whole: p.job.Whole, Hint: p.job.Hint,
		Dense: p.job.Dense, Limits: p.job.Limits}, nil)
	if err != nil {
		return Result{}, err
	}
	handed := false
	for {
		m, _, err := p.ctl.receive(false)
		if err != nil {
			return Result{}, err
		}
		switch m.Kind {
		case kindFormat:
			if handed {
				return Result{}, p.refuse("two formats")
			}
			handed = true
			if err := p.hand(m); err != nil {
				p.told = true
				return Result{}, err
			}
		case kindGrow:
			if !handed || m.Size > p.job.Limits.MaxVirtualSize+512 || m.Size < 0 {
				return Result{}, p.refuse("a size out of bounds")
			}
			size, err := p.job.Grow(m.Size)
			if err != nil {
				p.told = true
				return Result{}, err
			}
			if err := p.ctl.send(message{Kind: kindGrown, Size: size}, nil); err != nil {
				return Result{}, err
			}
		case kindProgress:
			p.job.Progress(max(m.Done, 0), max(m.Total, 0), max(m.Wrote, 0))
		case kindDone:
			if !handed || m.Size <= 0 || m.Size%512 != 0 || m.Size > p.job.Limits.MaxVirtualSize+512 {
				return Result{}, p.refuse("a result out of bounds")
			}
			return Result{Size: m.Size, Wrote: m.Wrote}, nil
		case kindError:
			p.told = true
			if m.Error == nil {
				return Result{}, p.refuse("an error without words")
			}
			return Result{}, m.Error.err()
		default:
			return Result{}, p.refuse("an unknown message")
		}
	}
}

// refuse is for a worker that does not keep to the protocol: it has been taken over, or is a bug.
func (p *parent) refuse(what string) error {
	p.told = true
	return errs.New(errs.Internal, "the worker that converts the image sent %s", what).Because("WORKER_DIED").
		Do("do not trust this image; report it")
}

func (p *parent) hand(m message) error {
	if m.Size > p.job.Limits.MaxVirtualSize+512 {
		return p.refuse("a size out of bounds")
	}
	file, have, block, err := p.job.Target(clip(m.Format, 32), m.Size)
	if err != nil {
		return err
	}
	if err := p.ctl.send(message{Kind: kindTarget, Size: have, Block: block}, file); err != nil {
		p.told = false
		return err
	}
	return nil
}

func (p *parent) tellArrivals(ended <-chan struct{}) {
	if p.job.Arrived == nil {
		return
	}
	for {
		select {
		case a, ok := <-p.job.Arrived:
			if !ok {
				return
			}
			// A worker that is gone shows in serve.
			_ = p.ctl.send(message{Kind: kindAvail, Length: a.Length, Whole: a.Whole}, nil)
		case <-ended:
			return
		}
	}
}

// tail keeps the last words of a worker.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if room := 2048 - len(t.b); room > 0 {
		t.b = append(t.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.ToValidUTF8(bytes.TrimSpace(t.b), []byte("?")))
}
