// Package importer brings one image from a file or a URL into a target: bytes from the source, through a
// worker process that understands them, while their checksum is taken.
//
//	URL, pipe ──> staging file ──> worker ──> target
//	                 └─> checksum
//	file ──────────────────────> worker ──> target
//	  └─> checksum
//
// The worker reads the staging file while it grows, so that a download and its conversion take as long as
// the slower of the two. What is in the staging file survives a restart of the plugin; what is in the target
// is written again. This side counts, hashes and copies bytes and never looks into them.
package importer

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storagekit/fetch"
	"github.com/mvirt/mvirt/sdk/storagekit/image"
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
)

// restarts is how often an import begins again because the file at its URL changed meanwhile.
const restarts = 2

// Job is one import.
type Job struct {
	ID       string
	URL      string   // or
	File     *os.File // read from offset 0; stays the caller's
	Checksum string   // "sha256:…", "sha512:…" or ""

	As      worker.Identity
	Fetcher *fetch.Client
	Limits  image.Limits
	Staging string // directory

	// Resume is what SaveResume was given last, in this life of the plugin or one before, or nil.
	Resume *Resume
	// SaveResume makes durable what going on after a restart needs.
	SaveResume func(Resume)
	// Open makes the target, empty, and closes the one before it; size is -1 while unknown. See worker.Job.
	Open func(format string, size int64) (file *os.File, have int64, block bool, err error)
	Grow func(size int64) (int64, error)
	// Progress is called concurrently and often; wrote is the number of bytes in the target so far.
	Progress func(phase string, done, total, wrote int64)
}

// Resume is the state of a download. Boot tells whether the staging file, which is not synced, can be
// trusted: its bytes survive the plugin's death but not the host's.
type Resume struct {
	State fetch.State `json:"state"`
	Boot  string      `json:"boot"`
}

// Phases of an import, as in service.Progress.
const (
	PhaseDownload = "download"
	PhaseConvert  = "convert"
	PhaseVerify   = "verify"
)

// StagingName is the name of the file in the staging directory that belongs to an import.
func StagingName(id string) string { return id + ".download" }

// Run does the import, but for putting the target in its place. Its error has a kind. Nothing of it runs on
// when it returns; the staging file is gone unless ctx ended, when the job may be taken up again.
func Run(ctx context.Context, j Job) (worker.Result, error) {
	if j.File != nil {
		seekable, size, dense, err := regular(j.File)
		if err != nil {
			return worker.Result{}, err
		}
		if seekable {
			return j.fromFile(ctx, size, dense)
		}
	}
	path := filepath.Join(j.Staging, StagingName(j.ID))
	staging, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return worker.Result{}, fmt.Errorf("keep the download: %w", err)
	}
	defer staging.Close()
	for again := 0; ; again++ {
		res, err := j.fromStream(ctx, staging)
		if errors.Is(err, fetch.ErrChanged) && ctx.Err() == nil {
			j.Resume = nil
			if again < restarts {
				continue
			}
			err = &errs.Error{Kind: errs.Unavailable, Reason: "FETCH_CUT", Err: err,
				Message: "the download was interrupted and the server does not let it go on", Remedy: "import again, or fetch the file first"}
		}
		if err == nil || ctx.Err() == nil {
			_ = os.Remove(path) // the sweep at the next start does it otherwise
		}
		return res, err
	}
}

// regular tells how a handed-over file can be read.
func regular(f *os.File) (seekable bool, size int64, dense bool, err error) {
	info, err := f.Stat()
	if err != nil {
		return false, 0, false, errs.Wrap(errs.Invalid, err, "cannot look at the file")
	}
	switch m := info.Mode(); {
	case m.IsRegular():
		if info.Size() == 0 {
			return false, 0, false, errs.New(errs.Invalid, "the image is empty").Because("BAD_IMAGE").Do("check the file")
		}
		return true, info.Size(), false, nil
	case m&os.ModeDevice != 0 && m&os.ModeCharDevice == 0:
		size, err := f.Seek(0, io.SeekEnd)
		return true, size, true, err
	case m&(os.ModeNamedPipe|os.ModeSocket) != 0:
		return false, 0, true, nil
	case m.IsDir():
		return false, 0, false, errs.Field("file", "name the image in it", "the file is a directory")
	}
	return false, 0, false, errs.Field("file", "give a regular file, a block device or a pipe", "the file is none that can be imported")
}

func newHash(checksum string) (hash.Hash, string) {
	alg, want, _ := strings.Cut(checksum, ":")
	switch alg {
	case "sha256":
		return sha256.New(), want
	case "sha512":
		return sha512.New(), want
	}
	return nil, ""
}

// CheckChecksum judges the spelling of a checksum.
func CheckChecksum(field, s string) error {
	if s == "" {
		return nil
	}
	h, want := newHash(s)
	if h == nil {
		return errs.Field(field, "give sha256:HEX or sha512:HEX", "%s is neither sha256: nor sha512:", field)
	}
	if b, err := hex.DecodeString(want); err != nil || len(b) != h.Size() {
		return errs.Field(field, fmt.Sprintf("give %d hexadecimal digits", 2*h.Size()), "%s has not %d hexadecimal digits", field, 2*h.Size())
	}
	return nil
}

func compare(h hash.Hash, want string) error {
	got := hex.EncodeToString(h.Sum(nil))
	if subtle.ConstantTimeCompare([]byte(got), []byte(strings.ToLower(want))) == 1 {
		return nil
	}
	return errs.Field("checksum", "check the checksum's source; if it is right, the image was changed or damaged on its way",
		"the image's checksum is %s, not %s", got, strings.ToLower(want)).Because("CHECKSUM_MISMATCH")
}

func (j *Job) worker(src *os.File, length int64, whole bool, hint int64, dense bool, arrived <-chan worker.Arrival, progress func(done, total, wrote int64)) (worker.Job, func(), error) {
	scratch, err := scratchFile(j.Staging)
	if err != nil {
		return worker.Job{}, nil, fmt.Errorf("make a scratch file: %w", err)
	}
	return worker.Job{As: j.As, Source: src, Length: length, Whole: whole, Hint: hint, Dense: dense, Scratch: scratch,
		Limits: j.Limits, Target: j.Open, Grow: j.Grow, Progress: progress, Arrived: arrived}, func() { scratch.Close() }, nil
}

// scratchFile is for a compressed image that must be looked up. It has no name, so nothing of it can be left.
func scratchFile(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return f, err
	}
	// ZFS knows O_TMPFILE from version 2.2 on.
	if f, err = os.CreateTemp(dir, "scratch-"); err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// fromFile imports what can be read anywhere at any time.
func (j *Job) fromFile(ctx context.Context, size int64, dense bool) (worker.Result, error) {
	var mu sync.Mutex
	converted := false
	var wrote int64
	g, gctx := errgroup.WithContext(ctx)
	if h, want := newHash(j.Checksum); h != nil {
		g.Go(func() error {
			buf := make([]byte, 1<<20)
			for off := int64(0); off < size; {
				if err := gctx.Err(); err != nil {
					return err
				}
				n, err := j.File.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
				h.Write(buf[:n])
				off += int64(n)
				mu.Lock()
				if converted {
					j.Progress(PhaseVerify, off, size, wrote)
				}
				mu.Unlock()
				if err != nil && !(errors.Is(err, io.EOF) && off == size) {
					return errs.Wrap(errs.Invalid, err, "cannot read the image")
				}
			}
			return compare(h, want)
		})
	}
	var res worker.Result
	g.Go(func() error {
		w, free, err := j.worker(j.File, size, true, size, dense, nil, func(done, total, w int64) { j.Progress(PhaseConvert, done, total, w) })
		if err != nil {
			return err
		}
		defer free()
		res, err = worker.Run(gctx, w)
		mu.Lock()
		converted, wrote = true, res.Wrote
		mu.Unlock()
		return err
	})
	err := g.Wait()
	return res, err
}

// fromStream imports what comes once, in order.
func (j *Job) fromStream(ctx context.Context, staging *os.File) (worker.Result, error) {
	h, want := newHash(j.Checksum)
	st, err := j.begin(ctx, staging, h)
	if err != nil {
		return worker.Result{}, err
	}
	arrived := make(chan worker.Arrival, 1)
	tell := func(a worker.Arrival) {
		// Only the newest counts: what waits is replaced.
		select {
		case <-arrived:
		default:
		}
		arrived <- a
	}
	var mu sync.Mutex
	fetched := false
	var wrote, have, of int64
	got := func(piece []byte, s fetch.State) {
		if h != nil {
			h.Write(piece)
		}
		tell(worker.Arrival{Length: s.Done})
		mu.Lock()
		have, of = s.Done, max(s.Total, 0)
		j.Progress(PhaseDownload, have, of, wrote)
		mu.Unlock()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	begun, hint := st.Done, st.Total
	var fetchErr error
	fetching := make(chan struct{})
	go func() {
		defer close(fetching)
		if j.URL != "" {
			fetchErr = j.Fetcher.Fetch(ctx, j.URL, staging, &st, got, func(s fetch.State) {
				j.SaveResume(Resume{State: s, Boot: bootID()})
			})
		} else {
			fetchErr = pour(ctx, j.File, staging, &st, got)
		}
		if fetchErr == nil && h != nil {
			fetchErr = compare(h, want)
		}
		if fetchErr != nil {
			cancel(fetchErr)
			return
		}
		mu.Lock()
		fetched = true
		mu.Unlock()
		tell(worker.Arrival{Length: st.Done, Whole: true})
	}()
	w, free, err := j.worker(staging, begun, false, hint, true, arrived, func(done, total, n int64) {
		mu.Lock()
		defer mu.Unlock()
		wrote = n
		if fetched {
			j.Progress(PhaseConvert, done, total, n)
		} else {
			j.Progress(PhaseDownload, have, of, n)
		}
	})
	if err != nil {
		cancel(err)
		<-fetching
		return worker.Result{}, err
	}
	defer free()
	res, err := worker.Run(ctx, w)
	if err != nil {
		cancel(err)
	}
	<-fetching
	if fetchErr != nil && !errors.Is(fetchErr, context.Canceled) {
		return worker.Result{}, fetchErr
	}
	return res, err
}

// begin prepares the staging file: empty, or with what a life before this one has fetched, which is hashed
// again.
func (j *Job) begin(ctx context.Context, staging *os.File, h hash.Hash) (fetch.State, error) {
	fresh := fetch.State{Total: -1}
	size, err := staging.Seek(0, io.SeekEnd)
	if err != nil {
		return fresh, err
	}
	if j.Resume == nil || j.URL == "" || j.Resume.Boot != bootID() || (j.Resume.State.Total >= 0 && size > j.Resume.State.Total) {
		return fresh, staging.Truncate(0)
	}
	st := j.Resume.State
	st.Done = size
	if h != nil {
		buf := make([]byte, 1<<20)
		for off := int64(0); off < size; {
			if err := ctx.Err(); err != nil {
				return fresh, err
			}
			n, err := staging.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
			h.Write(buf[:n])
			off += int64(n)
			if err != nil && !errors.Is(err, io.EOF) {
				return fresh, err
			}
			j.Progress(PhaseVerify, off, size, 0)
		}
	}
	return st, nil
}

// bootID names this boot of the host, or "" where there is no way to know; then nothing is resumed.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// pour copies a pipe or socket into the staging file. It waits with poll, so that ctx can end it whatever the
// descriptor's mode.
func pour(ctx context.Context, in, staging *os.File, st *fetch.State, got func([]byte, fetch.State)) error {
	raw, err := in.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for {
		n := 0
		var rerr error
		again := false
		cerr := raw.Control(func(fd uintptr) {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if k, err := unix.Poll(p, 200); k == 0 || err != nil {
				again = true
				return
			}
			n, rerr = unix.Read(int(fd), buf)
		})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch {
		case cerr != nil:
			return cerr
		case again || errors.Is(rerr, unix.EINTR) || errors.Is(rerr, unix.EAGAIN):
			continue
		case rerr != nil:
			return errs.Wrap(errs.Invalid, rerr, "cannot read the image")
		case n == 0:
			if st.Done == 0 {
				return errs.New(errs.Invalid, "the image is empty").Because("BAD_IMAGE").Do("check what writes into the pipe")
			}
			st.Total = st.Done
			return nil
		}
		if _, err := staging.WriteAt(buf[:n], st.Done); err != nil {
			return fmt.Errorf("keep the image: %w", err)
		}
		st.Done += int64(n)
		got(buf[:n], *st)
	}
}
