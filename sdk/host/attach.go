package host

import (
	"context"
	"errors"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Attach connects to a plugin that a service manager started with --listen. Its end is noticed by its pid;
// how it ended is not known.
func Attach(ctx context.Context, addr string, cfg Config) (*Plugin, error) {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, errs.Field("attach", "give unix:///absolute/path", "%q is no unix socket", addr)
	}
	limit := cfg.StartTimeout
	if limit == 0 {
		limit = DefaultStartTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if _, err := os.Stat(path); err != nil {
		return nil, &errs.Error{Op: "plugin.Attach", Kind: errs.Unavailable, Reason: ReasonMissing, Message: "there is no socket " + path,
			Remedy: "start the plugin with --listen " + addr, Err: err}
	}
	conn, err := grpc.NewClient("unix://"+path, append(dialOptions(nil),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))...)
	if err != nil {
		return nil, err
	}
	p := &Plugin{conn: conn, exited: make(chan struct{})}
	if err := p.describe(ctx, cfg.Kind, conn, p.exchange(path+".fd", nil)); err != nil {
		conn.Close()
		return nil, err
	}
	fd, err := unix.PidfdOpen(int(p.info.PID), 0)
	if err != nil {
		conn.Close()
		return nil, errs.Wrap(errs.Unavailable, err, "the plugin's process %d", p.info.PID)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	p.leave = make(chan struct{})
	go p.watchAttached(pidfd)
	return p, nil
}

// watchAttached ends when the process does, or when the host has left.
func (p *Plugin) watchAttached(pidfd *os.File) {
	ended := make(chan struct{})
	wakeR, wakeW, err := os.Pipe()
	if err == nil {
		go func() {
			defer close(ended)
			for {
				// wakeR reads EOF when the host leaves.
				fds := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}, {Fd: int32(wakeR.Fd()), Events: unix.POLLIN}}
				if _, err := unix.Poll(fds, -1); err == nil || !errors.Is(err, unix.EINTR) {
					return
				}
			}
		}()
		select {
		case <-ended:
		case <-p.leave:
		}
		wakeW.Close()
		<-ended
		wakeR.Close()
	} else {
		<-p.leave
	}
	pidfd.Close()
	p.mu.Lock()
	p.exit = Exit{Code: -1, At: time.Now()}
	p.mu.Unlock()
	close(p.exited)
}
