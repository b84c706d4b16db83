package jail

import (
	"context"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

// Client is the plugin's end. Safe for concurrent use.
type Client struct {
	c Conn

	mu      sync.Mutex // guards what follows
	seq     uint32
	waiting map[uint32]chan answer
	gone    bool
}

type answer struct {
	r     *Reply
	files []*os.File
}

// answerTime is how long the launcher may take to answer what takes it no time.
const answerTime = 5 * time.Second

// FromEnv is the client of the socket that this process was started with, or nil when it was started without.
// The socket is not inherited any further.
func FromEnv() (*Client, error) {
	text := os.Getenv(EnvFD)
	if text == "" {
		return nil, nil
	}
	fd, err := strconv.ParseUint(text, 10, 16)
	if err == nil {
		unix.CloseOnExec(int(fd))
		err = unix.SetNonblock(int(fd), true)
	}
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err, "%s=%q is no socket", EnvFD, text)
	}
	return NewClient(NewConn(os.NewFile(uintptr(fd), "jail"))), nil
}

// NewClient takes a conversation over.
func NewClient(c Conn) *Client {
	cl := &Client{c: c, waiting: map[uint32]chan answer{}}
	go cl.read()
	return cl
}

// Close ends the conversation; hypervisors go on.
func (cl *Client) Close() error { return cl.c.Close() }

func (cl *Client) read() {
	for {
		b, files, err := cl.c.Receive()
		var r *Reply
		if err == nil && b != nil {
			r, err = DecodeReply(b)
		}
		if err != nil || b == nil {
			closeAll(files)
			cl.mu.Lock()
			cl.gone = true
			for _, ch := range cl.waiting {
				close(ch)
			}
			cl.waiting = nil
			cl.mu.Unlock()
			return
		}
		cl.mu.Lock()
		ch := cl.waiting[r.Seq]
		delete(cl.waiting, r.Seq)
		cl.mu.Unlock()
		if ch == nil {
			closeAll(files)
			continue
		}
		ch <- answer{r, files}
	}
}

func errGone(err error) error {
	return &errs.Error{Kind: errs.Unavailable, Reason: "LAUNCHER_GONE", Message: "the root half of mvirtd is gone, which keeps the jails", Err: err,
		Remedy: "restart mvirtd"}
}

// call asks and waits for the answer. The files of the answer are the caller's.
func (cl *Client) call(ctx context.Context, r *Request, files ...*os.File) (*Reply, []*os.File, error) {
	ch := make(chan answer, 1)
	cl.mu.Lock()
	if cl.gone {
		cl.mu.Unlock()
		return nil, nil, errGone(nil)
	}
	cl.seq++
	r.Seq = cl.seq
	cl.waiting[r.Seq] = ch
	cl.mu.Unlock()
	b, err := Encode(r)
	if err == nil {
		if err = cl.c.Send(b, files...); err != nil {
			err = errGone(err)
		}
	}
	if err != nil {
		cl.mu.Lock()
		delete(cl.waiting, r.Seq)
		cl.mu.Unlock()
		return nil, nil, err
	}
	select {
	case a, ok := <-ch:
		switch {
		case !ok:
			return nil, nil, errGone(nil)
		case a.r.Error != nil:
			closeAll(a.files)
			return nil, nil, a.r.Error.err()
		}
		return a.r, a.files, nil
	case <-ctx.Done():
		go func() { // it still comes
			if a, ok := <-ch; ok {
				closeAll(a.files)
			}
		}()
		return nil, nil, errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "waiting for the root half of mvirtd")
	}
}

// do is call for answers without descriptors.
func (cl *Client) do(ctx context.Context, r *Request) (*Reply, error) {
	rep, files, err := cl.call(ctx, r)
	closeAll(files)
	return rep, err
}

// Identity is who a VM's hypervisor runs as. The first call gives it its uid.
func (cl *Client) Identity(ctx context.Context, vmID string) (vmm.RunAs, error) {
	r, err := cl.do(ctx, &Request{Verb: VerbIdentity, VM: vmID})
	if err != nil {
		return vmm.RunAs{}, err
	}
	return vmm.RunAs{UID: r.UID, GID: r.GID}, nil
}

// Forget gives a VM's uid back. A VM that has none is no error.
func (cl *Client) Forget(ctx context.Context, vmID string) error {
	_, err := cl.do(ctx, &Request{Verb: VerbForget, VM: vmID})
	return err
}

// Share lets plugin and hypervisor both use what either has made in the VM's directory, also where a program made it
// for itself alone, as cloud-hypervisor does its sockets. The directory stays the caller's.
func (cl *Client) Share(ctx context.Context, vmID string, dir *os.File) error {
	_, files, err := cl.call(ctx, &Request{Verb: VerbShare, VM: vmID}, dir)
	closeAll(files)
	return err
}

// List gives the VMs that have uids.
func (cl *Client) List(ctx context.Context) ([]VM, error) {
	r, err := cl.do(ctx, &Request{Verb: VerbList})
	if err != nil {
		return nil, err
	}
	return r.VMs, nil
}

// Start starts a VM's hypervisor. The files stay the caller's. If ctx ends first, a process that is started
// nevertheless is found by its arguments.
func (cl *Client) Start(ctx context.Context, vmID string, s Start, dir, output *os.File, files, pass []*os.File) (*proc.Process, []string, error) {
	all := append([]*os.File{dir, output}, files...)
	all = append(all, pass...)
	if len(files) != len(s.Files) || len(all) > MaxFDs {
		return nil, nil, errs.New(errs.Exhausted, "a hypervisor cannot be given %d descriptors", len(all))
	}
	r, got, err := cl.call(ctx, &Request{Verb: VerbStart, VM: vmID, Start: &s}, all...)
	if err != nil {
		return nil, nil, err
	}
	fd, err := pidfdOf(got)
	if err != nil {
		return nil, nil, err
	}
	p, err := handleOf(r, fd, keeper{cl, vmID})
	return p, r.Notes, err
}

// StartWorker starts this plugin's program as a worker. The files stay the caller's.
func (cl *Client) StartWorker(ctx context.Context, w Worker, output *os.File, pass ...*os.File) (*proc.Process, error) {
	r, got, err := cl.call(ctx, &Request{Verb: VerbWorker, Worker: &w}, append([]*os.File{output}, pass...)...)
	if err != nil {
		return nil, err
	}
	fd, err := pidfdOf(got)
	if err != nil {
		return nil, err
	}
	return handleOf(r, fd, workerKeeper{cl})
}

// handleOf makes a handle of an answer. The process may have ended already, which then is no error here.
func handleOf(r *Reply, fd int, k proc.Keeper) (*proc.Process, error) {
	boot, err := proc.BootID()
	if err == nil && r.Process == nil {
		err = errs.New(errs.Internal, "the root half of mvirtd does not say which process it started")
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return proc.Kept(proc.Identity{PID: r.Process.PID, StartTime: r.Process.StartTime, BootID: boot}, fd, k)
}

// EndWorker kills a worker of this plugin, also one that an earlier run of it started. One that is gone is no
// error.
func (cl *Client) EndWorker(ctx context.Context, id proc.Identity) error {
	_, err := cl.do(ctx, &Request{Verb: VerbEndWorker, Process: &Process{id.PID, id.StartTime}})
	if errs.KindOf(err) == errs.NotFound {
		return nil
	}
	return err
}

// workerKeeper ends workers, which are another user's than the plugin.
type workerKeeper struct{ cl *Client }

func (k workerKeeper) Signal(id proc.Identity, sig syscall.Signal) error {
	if sig != syscall.SIGKILL {
		return errs.New(errs.Unsupported, "a worker is killed or left alone")
	}
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	return k.cl.EndWorker(ctx, id)
}

func (workerKeeper) Exit(proc.Identity) (syscall.WaitStatus, bool) { return 0, false }

// pidfdOf takes the one descriptor of an answer over.
func pidfdOf(got []*os.File) (int, error) {
	defer closeAll(got)
	if len(got) != 1 {
		return -1, errs.New(errs.Internal, "the root half of mvirtd sent %d descriptors instead of a pidfd", len(got))
	}
	fd, err := unix.FcntlInt(got[0].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	return fd, os.NewSyscallError("fcntl", err)
}

// Open gets a handle on a VM's process, as proc.Open does.
func (cl *Client) Open(vmID string, id proc.Identity) (*proc.Process, error) {
	return proc.OpenKept(id, keeper{cl, vmID})
}

// Reach makes a path reachable in a running jail, in place of one of that name.
func (cl *Client) Reach(ctx context.Context, vmID string, id proc.Identity, p Path) error {
	_, err := cl.do(ctx, &Request{Verb: VerbReach, VM: vmID, Process: &Process{id.PID, id.StartTime}, Path: &p})
	return err
}

// Unreach takes it away. One that is not there is no error.
func (cl *Client) Unreach(ctx context.Context, vmID string, id proc.Identity, p Path) error {
	p.Path = ""
	_, err := cl.do(ctx, &Request{Verb: VerbUnreach, VM: vmID, Process: &Process{id.PID, id.StartTime}, Path: &p})
	return err
}

// Size is how many bytes a disk in a running jail has.
func (cl *Client) Size(ctx context.Context, vmID string, id proc.Identity, disk string) (uint64, error) {
	r, err := cl.do(ctx, &Request{Verb: VerbSize, VM: vmID, Process: &Process{id.PID, id.StartTime}, Path: &Path{Kind: KindDisk, Name: disk}})
	if err != nil {
		return 0, err
	}
	return r.Size, nil
}

// keeper does to a VM's process what only root may.
type keeper struct {
	cl *Client
	vm string
}

func (k keeper) Signal(id proc.Identity, sig syscall.Signal) error {
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	_, err := k.cl.do(ctx, &Request{Verb: VerbSignal, VM: k.vm, Process: &Process{id.PID, id.StartTime}, Signal: int(sig)})
	if errs.KindOf(err) == errs.NotFound {
		return proc.ErrGone
	}
	return err
}

func (k keeper) Exit(id proc.Identity) (syscall.WaitStatus, bool) {
	ctx, cancel := context.WithTimeout(context.Background(), answerTime)
	defer cancel()
	r, err := k.cl.do(ctx, &Request{Verb: VerbExit, VM: k.vm, Process: &Process{id.PID, id.StartTime}})
	if err != nil || !r.Known {
		return 0, false
	}
	return syscall.WaitStatus(r.Status), true
}
