// Package console keeps what a VM prints on its serial port, shows it to any number of viewers, and hands
// what one of them types to the VM.
//
// The store is a file that is only appended to, by the hypervisor itself where it can (so that nothing is
// lost while the plugin is away) or by [Log.Append]. Its old part is given back to the file system as a
// hole, so it takes at most about twice [Keep] bytes of disk, while offsets in it stay what they are:
// a viewer's place is an offset, and the page cache is the ring.
package console

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Keep is how many bytes of the latest output stay readable.
const Keep = 1 << 20

// holeAlign is the grain of holes; every file system's blocks fit.
const holeAlign = 64 << 10

// Log is one VM's output. Its methods may be called concurrently. The file is open only while the log is live
// or read, so that a thousand stopped VMs cost no descriptor.
type Log struct {
	w    *Watcher
	path string
	keep int64

	mu      sync.Mutex // guards what follows
	users   int        // who need the file open
	f       *os.File   // nil while nobody does
	wd      int32
	start   int64         // what is before is gone
	size    int64         // what viewers may read up to
	changed chan struct{} // closed, and another put in its place, at each change
	live    bool          // a VM may still print
	closed  bool
}

// NewLog is the log in the file at path, which is made when it is needed.
func NewLog(w *Watcher, path string) *Log {
	return &Log{w: w, path: path, keep: Keep, changed: make(chan struct{})}
}

// open opens the file for one more user.
func (l *Log) open() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	if l.f == nil {
		f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o660) // a jail's uid comes in by an entry that the group's bits bound
		if err != nil {
			return err
		}
		if l.wd, err = l.w.add(l.path, l); err != nil {
			f.Close()
			return err
		}
		conn, err := f.SyscallConn()
		if err == nil {
			err = conn.Control(func(fd uintptr) {
				// Before the first data is what was given back. Empty, or no such thing here: then all is readable.
				if l.start, err = unix.Seek(int(fd), 0, unix.SEEK_DATA); err != nil {
					l.start = 0
				}
			})
		}
		if err != nil {
			f.Close()
			return err
		}
		l.f, l.size = f, 0
		l.refreshLocked()
	}
	l.users++
	return nil
}

// done closes the file after its last user.
func (l *Log) done() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.users--
	l.shutLocked()
}

func (l *Log) shutLocked() {
	if l.f == nil || l.users > 0 && !l.closed {
		return
	}
	l.w.remove(l.wd)
	l.f.Close()
	l.f = nil
	l.wakeLocked()
}

// Close ends the log; viewers end too.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed, l.live = true, false
	l.shutLocked()
	return nil
}

// SetLive says whether more may come: viewers that follow end when all is read and nothing lives.
func (l *Log) SetLive(live bool) error {
	if live {
		if err := l.open(); err != nil {
			return err
		}
	}
	l.refresh()
	l.mu.Lock()
	was := l.live
	l.live = live && !l.closed
	l.wakeLocked()
	l.mu.Unlock()
	if was { // the hold of before
		l.done()
	}
	return nil
}

// Append adds output that did not come into the file by itself, to a log that is live.
func (l *Log) Append(b []byte) error {
	l.mu.Lock()
	f := l.f
	l.mu.Unlock()
	if f == nil {
		return os.ErrClosed
	}
	_, err := f.Write(b)
	l.refresh()
	return err
}

func (l *Log) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// refresh looks how far the file has grown, and gives back its old part.
func (l *Log) refresh() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refreshLocked()
}

func (l *Log) refreshLocked() {
	if l.f == nil {
		return
	}
	st, err := l.f.Stat()
	if err != nil {
		return
	}
	if st.Size() == l.size {
		return
	}
	if st.Size() < l.size { // cut short, by hand or below
		l.start = 0
	}
	l.size = st.Size()
	if l.size-l.start > 2*l.keep {
		l.trimLocked()
	}
	l.wakeLocked()
}

func (l *Log) trimLocked() {
	to := (l.size - l.keep) / holeAlign * holeAlign
	conn, err := l.f.SyscallConn()
	if err != nil {
		return
	}
	var perr error
	err = conn.Control(func(fd uintptr) { perr = punch(int(fd), to) })
	err = errors.Join(err, perr)
	if err == nil {
		l.start = to
		return
	}
	// A file system without holes: all goes at once. Writers append, so they go on at the front.
	if errors.Is(err, unix.EOPNOTSUPP) && l.f.Truncate(0) == nil {
		l.start, l.size = 0, 0
	}
}

func punch(fd int, to int64) error {
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, to)
}

// bounds are the offset of the first byte that is still there, and that after the last.
func (l *Log) bounds() (start, end int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.start, l.size
}

// Read gives history to out, beginning replay bytes before the end, and then, if follow is set, what comes,
// until the log is no longer live, or there is nothing to follow (io.EOF), stop is closed (nil), or out fails. A viewer too slow for the
// guest is told how much it missed.
func (l *Log) Read(stop <-chan struct{}, replay int64, follow bool, out func([]byte) error) error {
	if err := l.open(); err != nil {
		if errors.Is(err, os.ErrClosed) {
			return io.EOF
		}
		return err
	}
	defer l.done()
	start, end := l.bounds()
	pos := max(start, end-max(0, replay))
	buf := make([]byte, 32<<10)
	for {
		l.mu.Lock()
		f, start, size, changed, live := l.f, l.start, l.size, l.changed, l.live
		l.mu.Unlock()
		if f == nil {
			return io.EOF
		}
		if pos > size { // cut short
			pos = start
		}
		if pos < start {
			if err := out(fmt.Appendf(nil, "\r\n[mvirt: %d bytes were too fast for this viewer]\r\n", start-pos)); err != nil {
				return err
			}
			pos = start
		}
		if pos < size {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), size-pos)], pos)
			if n > 0 {
				pos += int64(n)
				if err := out(buf[:n]); err != nil {
					return err
				}
			} else if errors.Is(err, io.EOF) {
				l.refresh()
			} else if err != nil {
				return err
			}
			select {
			case <-stop:
				return nil
			default:
			}
			continue
		}
		if !follow || !live {
			return io.EOF
		}
		select {
		case <-changed:
		case <-stop:
			return nil
		}
	}
}
