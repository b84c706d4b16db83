package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/vmm-qemu/internal/qmp"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/sdk/vmmkit/unixsock"
)

// typeTimeout is how long a guest may take to read what is typed.
const typeTimeout = 5 * time.Second

// drainTimeout is how long what was typed may wait for the guest after the session's end.
const drainTimeout = 30 * time.Second

// instance is a QEMU that we hold.
type instance struct {
	dir   string
	state state
	c     *qmp.Client
	fn    func(vmmkit.Event)

	emulated bool

	mu      sync.Mutex // guards what follows
	off     bool       // the guest has powered off; STOP belongs to that
	ioError string     // why the next STOP comes
	waiters map[chan waited]waitFor
}

// waitFor is an event somebody waits for: by name, and by device if that is set.
type waitFor struct{ name, device string }

// waited is what came.
type waited struct{ err error }

var (
	_ vmmkit.Instance    = (*instance)(nil)
	_ vmmkit.Resizer     = (*instance)(nil)
	_ vmmkit.Snapshotter = (*instance)(nil)
)

// Connect speaks to a QEMU.
func (d *Driver) Connect(ctx context.Context, m vmmkit.Machine, fn func(vmmkit.Event)) (vmmkit.Instance, error) {
	i := &instance{dir: m.Dir, fn: fn, emulated: d.kvm != nil, waiters: map[chan waited]waitFor{}}
	if len(m.State) > 0 {
		if err := json.Unmarshal(m.State, &i.state); err != nil {
			return nil, errs.Wrap(errs.Corrupt, err, "what is stored of the hypervisor is damaged")
		}
	}
	conn, err := unixsock.Dial(ctx, m.Dir, apiSocket)
	if err != nil {
		return nil, errs.Wrap(errs.Unavailable, err, "the control socket cannot be reached")
	}
	i.c, err = qmp.New(ctx, conn, i.event, func(error) {
		i.fail(qmp.ErrClosed)
		fn(vmmkit.Event{Kind: vmmkit.EventLost})
	})
	if err != nil {
		return nil, errs.Wrap(errs.Unavailable, err, "QEMU does not answer")
	}
	if m.Fresh && m.Restore != nil {
		if err := i.arrive(ctx, !m.Paused); err != nil {
			_ = i.Close()
			return nil, err
		}
	}
	return i, nil
}

// event takes one from QEMU.
func (i *instance) event(e qmp.Event) {
	var d struct {
		Guest   bool   `json:"guest"`
		Reason  string `json:"reason"`
		Device  string `json:"device"`
		Node    string `json:"node-name"`
		NoSpace bool   `json:"nospace"`
		Action  string `json:"action"`
	}
	if len(e.Data) > 0 && json.Unmarshal(e.Data, &d) != nil {
		return
	}
	switch e.Name {
	case "SHUTDOWN":
		switch {
		case d.Guest:
			i.setOff(true)
			i.fn(vmmkit.Event{Kind: vmmkit.EventOff})
		case d.Reason == "host-qmp-quit":
		default:
			i.fn(vmmkit.Event{Kind: vmmkit.EventEnding, Reason: "the hypervisor was ended from outside (" + word(d.Reason) + ")"})
		}
	case "RESET":
		i.setOff(false)
		i.fn(vmmkit.Event{Kind: vmmkit.EventReset})
	case "GUEST_PANICKED":
		i.fn(vmmkit.Event{Kind: vmmkit.EventPanic})
	case "BLOCK_IO_ERROR":
		if d.Action == "stop" {
			why := "input/output error"
			if d.NoSpace {
				why = "no space left on the host"
			}
			i.mu.Lock()
			i.ioError = "disk " + strings.TrimPrefix(word(d.Node), "disk-") + ": " + why
			i.mu.Unlock()
		}
	case "STOP":
		i.mu.Lock()
		off, reason := i.off, i.ioError
		i.ioError = ""
		i.mu.Unlock()
		if !off {
			i.fn(vmmkit.Event{Kind: vmmkit.EventPaused, Reason: reason})
		}
	case "RESUME":
		i.fn(vmmkit.Event{Kind: vmmkit.EventResumed})
	case "DEVICE_DELETED":
		if d.Device != "" && !i.tell(waitFor{e.Name, d.Device}, nil) {
			// A guest let go later than its unplugging waited: what is behind goes now.
			go i.dropBackend(context.Background(), d.Device)
		}
		return
	case "DEVICE_UNPLUG_GUEST_ERROR":
		i.tell(waitFor{"DEVICE_DELETED", d.Device}, errs.New(errs.Precondition, "the guest refuses to let the device go"))
		return
	}
	i.tell(waitFor{name: e.Name}, nil)
}

// word makes a word from QEMU fit for a message.
func word(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return '?'
		}
		return r
	}, s[:min(len(s), 64)])
}

func (i *instance) setOff(off bool) {
	i.mu.Lock()
	i.off = off
	i.mu.Unlock()
}

// expect begins to wait for an event, before what causes it is asked for.
func (i *instance) expect(w waitFor) (ch chan waited, stop func()) {
	ch = make(chan waited, 1)
	i.mu.Lock()
	i.waiters[ch] = w
	i.mu.Unlock()
	return ch, func() {
		i.mu.Lock()
		delete(i.waiters, ch)
		i.mu.Unlock()
	}
}

// tell wakes those who wait for an event, and says whether there was one.
func (i *instance) tell(w waitFor, err error) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	told := false
	for ch, x := range i.waiters {
		if x == w {
			delete(i.waiters, ch)
			ch <- waited{err}
			told = true
		}
	}
	return told
}

func (i *instance) fail(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for ch := range i.waiters {
		delete(i.waiters, ch)
		ch <- waited{err}
	}
}

// Close lets go.
func (i *instance) Close() error { return i.c.Close() }

// Status asks how the guest is.
func (i *instance) Status(ctx context.Context) (vmmkit.Status, error) {
	var r struct {
		Status  string `json:"status"`
		Running bool   `json:"running"`
	}
	if err := i.c.Do(ctx, "query-status", nil, &r); err != nil {
		return vmmkit.Status{}, err
	}
	switch {
	case r.Running:
		return vmmkit.Status{State: vmmkit.GuestRunning}, nil
	case r.Status == "shutdown":
		i.setOff(true)
		return vmmkit.Status{State: vmmkit.GuestOff}, nil
	case r.Status == "io-error":
		return vmmkit.Status{State: vmmkit.GuestPaused, Reason: "a disk failed or the host has no space left for it"}, nil
	case r.Status == "internal-error":
		return vmmkit.Status{State: vmmkit.GuestPaused, Reason: "the hypervisor met an internal error"}, nil
	}
	return vmmkit.Status{State: vmmkit.GuestPaused}, nil
}

// Pause stops the vCPUs.
func (i *instance) Pause(ctx context.Context) error { return i.c.Do(ctx, "stop", nil, nil) }

// Resume lets them go on.
func (i *instance) Resume(ctx context.Context) error { return i.c.Do(ctx, "cont", nil, nil) }

// PowerButton presses it.
func (i *instance) PowerButton(ctx context.Context) error {
	return i.c.Do(ctx, "system_powerdown", nil, nil)
}

// Reset resets. QEMU answers before it has, and lets a guest that was off run only afterwards.
func (i *instance) Reset(ctx context.Context) error {
	done, stop := i.expect(waitFor{name: "RESET"})
	defer stop()
	if err := i.c.Do(ctx, "system_reset", nil, nil); err != nil {
		return err
	}
	select {
	case w := <-done:
		if w.err != nil {
			return w.err
		}
	case <-ctx.Done():
		return fmt.Errorf("QEMU does not reset: %w", ctx.Err())
	}
	st, err := i.Status(ctx)
	if err != nil || st.State == vmmkit.GuestRunning {
		return err
	}
	return i.Resume(ctx)
}

// Quit ends QEMU. It may be gone before its answer is.
func (i *instance) Quit(ctx context.Context) error {
	err := i.c.Do(ctx, "quit", nil, nil)
	if errors.Is(err, qmp.ErrClosed) {
		return nil
	}
	return err
}

// port is the serial port, open for typing.
type port struct{ c *net.UnixConn }

// Dial opens the serial port. What the guest prints there is in the log already; it is read and dropped, or
// QEMU would hold it back.
func (i *instance) Dial(ctx context.Context) (vmmkit.Port, error) {
	c, err := unixsock.Dial(ctx, i.dir, serialSocket)
	if err != nil {
		return nil, err
	}
	go func() { _, _ = io.Copy(io.Discard, c) }()
	return port{c}, nil
}

func (p port) Write(b []byte) (int, error) {
	if err := p.c.SetWriteDeadline(time.Now().Add(typeTimeout)); err != nil {
		return 0, err
	}
	return p.c.Write(b)
}

// Close lets go once QEMU has taken what was typed: it takes only as much as the guest's UART has room for, and
// forgets the rest when its peer is gone. That goes on behind, so that nobody waits for a guest.
func (p port) Close() error {
	go func() {
		defer p.c.Close()
		for end := time.Now().Add(drainTimeout); time.Now().Before(end); time.Sleep(10 * time.Millisecond) { // nothing announces it
			if n, err := unread(p.c); err != nil || n == 0 {
				return
			}
		}
	}()
	return nil
}

// unread is how many bytes the other end has not read yet (SIOCOUTQ, unix(7)).
func unread(c *net.UnixConn) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n, errors.Join(cerr, err)
}

// Counters reads what the disks have done.
func (i *instance) Counters(ctx context.Context) ([]vmm.DeviceCounters, error) {
	var stats []struct {
		QDev  string `json:"qdev"`
		Stats struct {
			ReadBytes  uint64 `json:"rd_bytes"`
			ReadOps    uint64 `json:"rd_operations"`
			WriteBytes uint64 `json:"wr_bytes"`
			WriteOps   uint64 `json:"wr_operations"`
		} `json:"stats"`
	}
	if err := i.c.Do(ctx, "query-blockstats", nil, &stats); err != nil {
		return nil, err
	}
	var cs []vmm.DeviceCounters
	for _, s := range stats {
		// "/machine/peripheral/disk-root/virtio-backend"
		name, ok := strings.CutPrefix(s.QDev, "/machine/peripheral/disk-")
		if !ok {
			continue
		}
		name, _, _ = strings.Cut(name, "/")
		cs = append(cs, vmm.DeviceCounters{Name: name, ReadBytes: s.Stats.ReadBytes, ReadOps: s.Stats.ReadOps,
			WriteBytes: s.Stats.WriteBytes, WriteOps: s.Stats.WriteOps})
	}
	return cs, nil
}
