package console

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Watcher tells logs that their file has grown. One serves all of a plugin's VMs: a user may have only 128
// inotify instances (fs.inotify.max_user_instances).
type Watcher struct {
	f *os.File

	mu   sync.Mutex // guards what follows, and that a watch is added and entered in one step
	logs map[int32]*Log
}

// NewWatcher starts one. Close ends it.
func NewWatcher() (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	w := &Watcher{f: os.NewFile(uintptr(fd), "inotify"), logs: map[int32]*Log{}}
	go w.run()
	return w, nil
}

// Close ends the watching; logs are no longer told.
func (w *Watcher) Close() error { return w.f.Close() }

func (w *Watcher) run() {
	buf := make([]byte, 64<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			return // closed
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(b))
			mask := binary.NativeEndian.Uint32(b[4:])
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
			w.told(wd, mask)
			b = b[min(size, len(b)):]
		}
	}
}

func (w *Watcher) told(wd int32, mask uint32) {
	w.mu.Lock()
	var logs []*Log
	if mask&unix.IN_Q_OVERFLOW != 0 {
		for _, l := range w.logs {
			logs = append(logs, l)
		}
	} else if l := w.logs[wd]; l != nil {
		logs = append(logs, l)
	}
	w.mu.Unlock()
	for _, l := range logs {
		l.refresh()
	}
}

func (w *Watcher) add(path string, l *Log) (int32, error) {
	conn, err := w.f.SyscallConn()
	if err != nil {
		return 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	wd := -1
	var werr error
	if err := conn.Control(func(fd uintptr) { wd, werr = unix.InotifyAddWatch(int(fd), path, unix.IN_MODIFY) }); err != nil {
		return 0, err
	}
	if werr != nil {
		return 0, fmt.Errorf("watching %s: %w", path, werr)
	}
	w.logs[int32(wd)] = l
	return int32(wd), nil
}

func (w *Watcher) remove(wd int32) {
	conn, err := w.f.SyscallConn()
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.logs, wd)
	_ = conn.Control(func(fd uintptr) { _, err = unix.InotifyRmWatch(int(fd), uint32(wd)) })
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: the file is gone, and the watch with it
		return
	}
}
