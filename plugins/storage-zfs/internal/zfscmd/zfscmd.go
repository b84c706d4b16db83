// Package zfscmd runs the zfs and zpool commands and is the only place that reads what they write for people.
//
// Every call has a time limit of its own: a suspended pool lets a command hang in the kernel, where no signal
// reaches it. Changes do not end with their caller's context, so that they are done or not done, never
// unknown. Arguments go to the program as they are; no shell is between.
package zfscmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Limits of time. A healthy pool answers a list of thousands in well under a second; a change waits for a
// transaction group, 5 s by default (zfs_txg_timeout), and a destroy for the device to be free.
const (
	listLimit   = 20 * time.Second
	changeLimit = 60 * time.Second
	killGrace   = 2 * time.Second
	// A device that was just made is opened by udev's rules for a moment, and is busy then.
	busyWait  = 10 * time.Second
	busyPause = 100 * time.Millisecond
)

// Error is a command that failed.
type Error struct {
	Command []string
	Stderr  string
	Err     error // of the process
}

// Error says what was run and what it said.
func (e *Error) Error() string {
	words := strings.Join(strings.Fields(e.Stderr), " ")
	if words == "" {
		words = e.Err.Error()
	}
	return fmt.Sprintf("%s: %s", strings.Join(short(e.Command), " "), clip(words, 600))
}

// short leaves out what only we can read.
func short(args []string) []string {
	var out []string
	for _, a := range args {
		if strings.HasPrefix(a, "mvirt:object=") {
			a = "mvirt:object=…"
		}
		out = append(out, clip(a, 120))
	}
	return out
}

func clip(s string, most int) string {
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// Unwrap gives the process's error.
func (e *Error) Unwrap() error { return e.Err }

// Runner runs commands. The zero value uses the system's.
type Runner struct {
	Dir   string // where the programs are; "": looked up on PATH
	Slow  int    // factor on limits of time, for a host that is emulated; 0: 1
	Sleep func(ctx context.Context, d time.Duration) error
}

func (r *Runner) limit(d time.Duration) time.Duration { return d * time.Duration(max(r.Slow, 1)) }

// List runs a command that changes nothing and returns its lines, split at tabs (option -H).
func (r *Runner) List(ctx context.Context, args ...string) ([][]string, error) {
	ctx, cancel := context.WithTimeout(ctx, r.limit(listLimit))
	defer cancel()
	out, err := r.run(ctx, args)
	if err != nil {
		return nil, err
	}
	var rows [][]string
	for line := range strings.Lines(out) {
		rows = append(rows, strings.Split(strings.TrimSuffix(line, "\n"), "\t"))
	}
	return rows, nil
}

// Change runs a command that changes something. While the dataset is busy it tries again for a few seconds,
// but not what makes a dataset, which may be there after all.
func (r *Runner) Change(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.limit(changeLimit))
	defer cancel()
	deadline := time.Now().Add(r.limit(busyWait))
	makes := args[1] == "clone" || args[1] == "create"
	for {
		_, err := r.run(ctx, args)
		if err == nil || makes || !Is(err, Busy) || time.Now().After(deadline) {
			return err
		}
		if serr := r.sleep(ctx, busyPause); serr != nil {
			return err
		}
	}
}

func (r *Runner) sleep(ctx context.Context, d time.Duration) error {
	if r.Sleep != nil {
		return r.Sleep(ctx, d)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *Runner) run(ctx context.Context, args []string) (string, error) {
	program := args[0]
	if r.Dir != "" {
		program = r.Dir + "/" + program
	}
	path, err := exec.LookPath(program)
	if err != nil {
		// The administrator's directories are not on everybody's path.
		if path, err = exec.LookPath("/usr/sbin/" + args[0]); r.Dir != "" || err != nil {
			return "", errs.New(errs.Precondition, "the program %s is not installed", args[0]).Because("ZFS_MISSING").
				Do("install OpenZFS (Debian: zfsutils-linux and zfs-dkms) and load its module")
		}
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(path, args[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return "", errs.Wrap(errs.Unavailable, err, "cannot run %s", args[0])
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		_ = cmd.Process.Kill()
		select {
		case <-done:
		case <-time.After(killGrace): // it hangs in the kernel; the goroutine waits for it
		}
		if errors.Is(ctx.Err(), context.Canceled) {
			return "", ctx.Err()
		}
		return "", errs.New(errs.Deadline, "%s did not end in time", strings.Join(short(args), " ")).Because("ZFS_HANGS").
			Do("look at zpool status: a suspended pool makes every command wait")
	}
	if err != nil {
		return "", &Error{Command: args, Stderr: stderr.String(), Err: err}
	}
	return stdout.String(), nil
}

// Class is what a failed command means.
type Class int

// Classes that callers act on.
const (
	Other Class = iota
	NotFound
	Exists
	Children // snapshots of a volume
	Clones   // of a snapshot
	Busy
	NoSpace
	NoPool
	ReadOnly
	Suspended
	BadValue
)

// The words of OpenZFS 2.1 to 2.3 (cmd/zfs/zfs_main.c, lib/libzfs/libzfs_util.c), which are the same in all.
var words = [...]struct {
	text  string
	class Class
}{
	{"no such pool", NoPool},
	{"dataset does not exist", NotFound},
	{"could not find any snapshots to destroy", NotFound},
	{"dataset already exists", Exists},
	{"has children", Children},
	{"has dependent clones", Clones},
	{"clones of previous snapshots exist", Clones},
	{"more recent snapshots or bookmarks exist", Children},
	{"dataset is busy", Busy},
	{"pool or dataset is busy", Busy},
	{"out of space", NoSpace},
	{"disk quota exceeded", NoSpace},
	{"pool is read-only", ReadOnly},
	{"read-only file system", ReadOnly},
	{"I/O is currently suspended", Suspended},
	{"must be a multiple of volume block size", BadValue},
	{"numeric value is too large", BadValue},
	{"must be power of 2", BadValue},
	{"size is greater than available space", NoSpace},
}

// ClassOf tells what err, from this package, means.
func ClassOf(err error) Class {
	var e *Error
	if !errors.As(err, &e) {
		return Other
	}
	for _, w := range words {
		if strings.Contains(e.Stderr, w.text) {
			return w.class
		}
	}
	return Other
}

// Is tells whether err is of a class.
func Is(err error, c Class) bool { return err != nil && ClassOf(err) == c }

// Kinded gives an error of this package the kind and the remedy that callers of the storage service need.
func Kinded(err error, what string) error {
	var e *errs.Error
	if err == nil || errors.As(err, &e) || errors.Is(err, context.Canceled) {
		return err
	}
	out := &errs.Error{Kind: errs.Internal, Message: what, Err: err}
	switch ClassOf(err) {
	case NotFound:
		out.Kind, out.Reason, out.Remedy = errs.Corrupt, "DAMAGED", "look with zfs list: somebody has removed or renamed it"
	case Exists:
		out.Kind, out.Reason, out.Remedy = errs.Exists, "NAME_TAKEN", "choose another name: the pool has a dataset of this one"
	case Busy:
		out.Kind, out.Reason, out.Remedy = errs.Conflict, "BUSY", "find who has the device open (fuser /dev/zd…), then try again"
	case NoSpace:
		out.Kind, out.Reason, out.Remedy = errs.Exhausted, "NO_SPACE", "delete volumes, snapshots or templates that are not needed, or enlarge the pool"
	case NoPool:
		out.Kind, out.Reason, out.Remedy = errs.Unavailable, "POOL_MISSING", "import the pool (zpool import)"
	case ReadOnly:
		out.Kind, out.Reason, out.Remedy = errs.Precondition, "POOL_READONLY", "import the pool without readonly=on"
	case Suspended:
		out.Kind, out.Reason, out.Remedy = errs.Unavailable, "POOL_SUSPENDED", "repair the pool's devices, then zpool clear"
	case BadValue:
		out.Kind, out.Field, out.Remedy = errs.Invalid, "size_bytes", "use a size that is a multiple of the block size and at most 8 EiB"
	case Children:
		out.Kind, out.Reason, out.Remedy = errs.Precondition, "HAS_SNAPSHOTS", "delete the snapshots first"
	case Clones:
		out.Kind, out.Reason, out.Remedy = errs.Precondition, "HAS_CLONES", "delete the clones first"
	}
	return out
}
