package ch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/chapi"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/sdk/vmmkit/console"
	"github.com/mvirt/mvirt/sdk/vmmkit/unixsock"
)

const (
	typeTimeout   = 5 * time.Second  // a guest may take that long to read what is typed
	unplugTimeout = 30 * time.Second // and to let a device go
	dialTimeout   = 5 * time.Second
	redial        = 50 * time.Millisecond
)

// instance is a cloud-hypervisor that we hold.
type instance struct {
	dir   string
	state state
	c     *chapi.Client
	fn    func(vmmkit.Event)
	share func(context.Context) error // lets us use its sockets; or nil
	done  chan struct{}               // closed by Close

	mu      sync.Mutex // guards what follows
	closed  bool
	booted  bool // the guest has run, so a VM that is "Created" has powered off
	quits   bool // we have told it to end: its last events are no news
	serial  *net.UnixConn
	up      chan struct{}            // closed while serial is set
	removed map[chan struct{}]string // who waits for a device to go
}

var (
	_ vmmkit.Instance    = (*instance)(nil)
	_ vmmkit.Feeder      = (*instance)(nil)
	_ vmmkit.Resizer     = (*instance)(nil)
	_ vmmkit.Snapshotter = (*instance)(nil)
)

// Connect takes hold. A fresh process is given its VM and boots it.
func (d *Driver) Connect(ctx context.Context, m vmmkit.Machine, fn func(vmmkit.Event)) (vmmkit.Instance, error) {
	i := &instance{dir: m.Dir, fn: fn, share: m.Share, c: chapi.New(m.Dir, apiSocket), done: make(chan struct{}), up: make(chan struct{}), removed: map[chan struct{}]string{}}
	if len(m.State) > 0 {
		if err := json.Unmarshal(m.State, &i.state); err != nil {
			return nil, errs.Wrap(errs.Corrupt, err, "what is stored of the hypervisor is damaged")
		}
	} else {
		i.state.NoShutdown = true // found without a record: then a VM that is off can only wait for us
	}
	var err error
	switch {
	case m.Fresh && m.Restore != nil:
		i.booted = true
		if err = i.find(ctx); err == nil {
			err = i.restore(ctx, m)
		}
	case m.Fresh:
		err = i.create(ctx, d, m)
	default:
		err = i.find(ctx)
	}
	if err == nil {
		err = i.tail(d, m.Fresh)
	}
	switch {
	case err != nil || !m.Fresh || m.Paused:
	case m.Restore != nil:
		err = i.c.Put(ctx, "vm.resume", nil, nil)
	default:
		err = i.boot(ctx)
	}
	if err != nil {
		_ = i.Close()
		return nil, err
	}
	return i, nil
}

// create makes the VM: first all that is said in words, then the NICs that are descriptors, for which the
// server has no other way (a cold add-net each).
func (i *instance) create(ctx context.Context, d *Driver, m vmmkit.Machine) error {
	var ping chapi.Ping
	if err := i.c.Get(ctx, "vmm.ping", &ping); err != nil {
		return err
	}
	v, err := parseVersion(i.state.Version)
	if err != nil {
		return err
	}
	cfg, err := d.config(m, v)
	if err != nil {
		return err
	}
	if err := i.c.Put(ctx, "vm.create", cfg, nil); err != nil {
		return err
	}
	for _, n := range m.NICs {
		if len(n.TAP) == 0 {
			continue
		}
		if err := i.c.Put(ctx, "vm.add-net", netConfig(n), nil, n.TAP...); err != nil {
			return err
		}
	}
	return nil
}

func (i *instance) boot(ctx context.Context) error {
	i.mu.Lock()
	i.booted = true
	i.mu.Unlock()
	return i.c.Put(ctx, "vm.boot", nil, nil)
}

// find asks a process that ran before we did.
func (i *instance) find(ctx context.Context) error {
	var ping chapi.Ping
	return i.c.Get(ctx, "vmm.ping", &ping)
}

// tail follows the events. Of a process found again the old ones are read first: not told, but they say
// whether the guest has ever run.
func (i *instance) tail(d *Driver, fresh bool) error {
	log := console.NewLog(d.events, filepath.Join(i.dir, eventsFile))
	if err := log.SetLive(true); err != nil {
		return fmt.Errorf("events cannot be followed: %w", err)
	}
	var s splitter
	old := int64(0)
	if !fresh {
		old = console.Keep
		// Up to here is the past. A state that changes between this and Status is told twice, which is harmless.
		err := log.Read(i.done, old, false, func(b []byte) error {
			s.feed(b, i.past)
			return nil
		})
		if err != nil && !errors.Is(err, io.EOF) {
			return errors.Join(err, log.Close())
		}
		s, old = splitter{}, 0
	} else {
		old = console.Keep
	}
	go func() {
		defer log.Close()
		err := log.Read(i.done, old, true, func(b []byte) error {
			s.feed(b, i.event)
			return nil
		})
		if err != nil && !errors.Is(err, io.EOF) {
			i.fn(vmmkit.Event{Kind: vmmkit.EventLost})
		}
	}()
	return nil
}

// past takes an event from before we came.
func (i *instance) past(e event) {
	if e.Source == "vm" && (e.Event == "booted" || e.Event == "restored") {
		i.mu.Lock()
		i.booted = true
		i.mu.Unlock()
	}
}

// event takes one that happens.
func (i *instance) event(e event) {
	i.mu.Lock()
	quits, closed := i.quits, i.closed
	i.mu.Unlock()
	if closed {
		return
	}
	switch e.Source + "/" + e.Event {
	case "vm/shutdown":
		if !quits {
			i.fn(vmmkit.Event{Kind: vmmkit.EventOff})
		}
	case "vm/rebooted":
		i.fn(vmmkit.Event{Kind: vmmkit.EventReset})
	case "vm/paused":
		i.fn(vmmkit.Event{Kind: vmmkit.EventPaused})
	case "vm/resumed":
		i.fn(vmmkit.Event{Kind: vmmkit.EventResumed})
	case "guest/panic":
		i.fn(vmmkit.Event{Kind: vmmkit.EventPanic})
	case "vm/device-removed":
		i.mu.Lock()
		for ch, id := range i.removed {
			if id == e.Properties["id"] {
				delete(i.removed, ch)
				close(ch)
			}
		}
		i.mu.Unlock()
	}
}

// Close lets go.
func (i *instance) Close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return nil
	}
	i.closed = true
	close(i.done)
	if i.serial != nil {
		i.serial.Close()
	}
	return nil
}

// Status asks how the guest is.
func (i *instance) Status(ctx context.Context) (vmmkit.Status, error) {
	var info chapi.Info
	if err := i.c.Get(ctx, "vm.info", &info); err != nil {
		return vmmkit.Status{}, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case info.State == chapi.StateRunning:
		return vmmkit.Status{State: vmmkit.GuestRunning}, nil
	case info.State == chapi.StateShutdown, info.State == chapi.StateCreated && i.booted:
		return vmmkit.Status{State: vmmkit.GuestOff}, nil
	}
	return vmmkit.Status{State: vmmkit.GuestPaused}, nil
}

// Pause stops the vCPUs. That they are stopped already is no error.
func (i *instance) Pause(ctx context.Context) error {
	return i.unless(ctx, vmmkit.GuestPaused, func() error { return i.c.Put(ctx, "vm.pause", nil, nil) })
}

// Resume lets them go on, or for the first time go.
func (i *instance) Resume(ctx context.Context) error {
	return i.unless(ctx, vmmkit.GuestRunning, func() error {
		var info chapi.Info
		if err := i.c.Get(ctx, "vm.info", &info); err != nil {
			return err
		}
		if info.State == chapi.StateCreated {
			if err := i.boot(ctx); err != nil {
				return err
			}
			i.fn(vmmkit.Event{Kind: vmmkit.EventResumed})
			return nil
		}
		return i.c.Put(ctx, "vm.resume", nil, nil)
	})
}

// unless does something unless the guest is so already; the server says no to what changes nothing.
func (i *instance) unless(ctx context.Context, s vmmkit.RunState, fn func() error) error {
	st, err := i.Status(ctx)
	if err != nil || st.State == s {
		return err
	}
	return fn()
}

// PowerButton presses it.
func (i *instance) PowerButton(ctx context.Context) error {
	return i.c.Put(ctx, "vm.power-button", nil, nil)
}

// Reset resets, or boots a guest that has powered off.
func (i *instance) Reset(ctx context.Context) error {
	st, err := i.Status(ctx)
	if err != nil {
		return err
	}
	if st.State == vmmkit.GuestOff {
		if err := i.boot(ctx); err != nil {
			return err
		}
		i.fn(vmmkit.Event{Kind: vmmkit.EventReset})
		return nil
	}
	return i.c.Put(ctx, "vm.reboot", nil, nil)
}

// Quit ends the VMM. Its answer may be lost with it.
func (i *instance) Quit(ctx context.Context) error {
	i.mu.Lock()
	i.quits = true
	i.mu.Unlock()
	err := i.c.Put(ctx, "vmm.shutdown", nil, nil)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return err
}

// Feed holds the one connection that the serial port has, and appends what comes to log.
func (i *instance) Feed(log *console.Log) {
	buf := make([]byte, 16<<10)
	for {
		conn, err := i.dialSerial()
		if err == nil {
			i.setSerial(conn)
			for {
				n, err := conn.Read(buf)
				if n > 0 {
					_ = log.Append(buf[:n])
				}
				if err != nil {
					break
				}
			}
			i.setSerial(nil)
			conn.Close()
		}
		// The socket is made anew at a reboot.
		select {
		case <-i.done:
			return
		case <-time.After(redial):
		}
	}
}

// dialSerial connects to the serial port. cloud-hypervisor makes its sockets for its own uid alone, which in a jail is
// not ours (its umask is 077, and access control lists are cut by it).
func (i *instance) dialSerial() (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	conn, err := unixsock.Dial(ctx, i.dir, serialSocket)
	if errors.Is(err, os.ErrPermission) && i.share != nil {
		if err := i.share(ctx); err != nil {
			return nil, err
		}
		return unixsock.Dial(ctx, i.dir, serialSocket)
	}
	return conn, err
}

func (i *instance) setSerial(c *net.UnixConn) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case c != nil && i.closed:
		c.Close()
	case c != nil:
		i.serial = c
		close(i.up)
	case i.serial != nil:
		i.serial, i.up = nil, make(chan struct{})
	}
}

// port types on the connection that Feed holds.
type port struct{ i *instance }

// Dial opens the way to type.
func (i *instance) Dial(context.Context) (vmmkit.Port, error) { return port{i}, nil }

func (p port) Write(b []byte) (int, error) {
	p.i.mu.Lock()
	up := p.i.up
	p.i.mu.Unlock()
	select { // it is away for a moment at each boot
	case <-up:
	case <-p.i.done:
	case <-time.After(typeTimeout):
	}
	p.i.mu.Lock()
	c := p.i.serial
	p.i.mu.Unlock()
	if c == nil {
		return 0, errors.New("the serial port is not connected")
	}
	if err := c.SetWriteDeadline(time.Now().Add(typeTimeout)); err != nil {
		return 0, err
	}
	return c.Write(b)
}

func (p port) Close() error { return nil }

// PlugDisk adds a disk.
func (i *instance) PlugDisk(ctx context.Context, d vmm.DiskAttachment) error {
	return i.c.Put(ctx, "vm.add-disk", diskConfig(d), nil)
}

// PlugNIC adds a NIC.
func (i *instance) PlugNIC(ctx context.Context, n vmm.NICAttachment) error {
	if n.SocketPath != "" && !i.state.Shared {
		return errs.New(errs.Precondition, "the guest's memory is not shared, so no vhost-user NIC can be plugged").
			Do("restart the VM with the NIC in its definition")
	}
	return i.c.Put(ctx, "vm.add-net", netConfig(n), nil, n.TAP...)
}

// UnplugDisk takes a disk away.
func (i *instance) UnplugDisk(ctx context.Context, name string) error {
	return i.unplug(ctx, diskID(name))
}

// UnplugNIC takes a NIC away.
func (i *instance) UnplugNIC(ctx context.Context, id string) error { return i.unplug(ctx, nicID(id)) }

// unplug asks the guest to let a device go and waits until it has.
func (i *instance) unplug(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
	defer cancel()
	gone := make(chan struct{})
	i.mu.Lock()
	i.removed[gone] = id
	i.mu.Unlock()
	defer func() {
		i.mu.Lock()
		delete(i.removed, gone)
		i.mu.Unlock()
	}()
	err := i.c.Put(ctx, "vm.remove-device", chapi.RemoveDevice{ID: id}, nil)
	var e *chapi.Error
	if errors.As(err, &e) && (e.Status == http.StatusNotFound || strings.Contains(e.Text, "device id")) {
		return nil
	}
	if err != nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-i.done:
		return errs.New(errs.Unavailable, "the hypervisor ended meanwhile")
	case <-ctx.Done():
		return errs.Wrap(errs.Deadline, ctx.Err(), "the guest has not let the device go")
	}
}

// DiskResized tells the guest of a disk's new size, which must be that of the volume: to another size the
// server would cut or stretch the file below.
func (i *instance) DiskResized(ctx context.Context, name string, size uint64) error {
	var info chapi.Info
	if err := i.c.Get(ctx, "vm.info", &info); err != nil {
		return err
	}
	for _, d := range info.Config.Disks {
		if d.ID != diskID(name) {
			continue
		}
		f, err := os.Open(d.Path)
		if errors.Is(err, os.ErrNotExist) && strings.HasPrefix(d.Path, "/disk/") { // in a jail; the kit has looked there
			return i.c.Put(ctx, "vm.resize-disk", chapi.ResizeDisk{ID: d.ID, Size: size}, nil)
		}
		if err != nil {
			return errs.Wrap(errs.Unknown, err, "disk %s cannot be opened", name)
		}
		defer f.Close()
		end, err := f.Seek(0, io.SeekEnd) // works for block devices as well
		if err != nil {
			return errs.Wrap(errs.Unknown, err, "the size of disk %s cannot be read", name)
		}
		if uint64(end) != size {
			return errs.Field("size_bytes", "give the volume's size", "disk %s has %d bytes, not %d", name, end, size)
		}
		return i.c.Put(ctx, "vm.resize-disk", chapi.ResizeDisk{ID: d.ID, Size: size}, nil)
	}
	return errs.New(errs.NotFound, "cloud-hypervisor has no disk %s", name)
}

// Resize sets vCPUs and memory. The guest brings them into use in its own time.
func (i *instance) Resize(ctx context.Context, cpus uint32, memory uint64) error {
	return i.c.Put(ctx, "vm.resize", chapi.Resize{CPUs: cpus, RAM: memory}, nil)
}

// Counters reads what disks and NICs have done; of a NIC, read is what the guest received.
func (i *instance) Counters(ctx context.Context) ([]vmm.DeviceCounters, error) {
	var c chapi.Counters
	if err := i.c.Get(ctx, "vm.counters", &c); err != nil {
		return nil, err
	}
	var all []vmm.DeviceCounters
	for id, n := range c {
		if name, ok := strings.CutPrefix(id, "disk-"); ok {
			all = append(all, vmm.DeviceCounters{Name: name, ReadBytes: n["read_bytes"], ReadOps: n["read_ops"],
				WriteBytes: n["write_bytes"], WriteOps: n["write_ops"]})
		} else if name, ok := strings.CutPrefix(id, "nic-"); ok {
			all = append(all, vmm.DeviceCounters{Name: name, ReadBytes: n["rx_bytes"], ReadOps: n["rx_frames"],
				WriteBytes: n["tx_bytes"], WriteOps: n["tx_frames"]})
		}
	}
	return all, nil
}
