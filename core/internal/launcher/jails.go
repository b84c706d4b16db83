package launcher

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/service"
)

// jails starts hypervisors for the vmm plugin, each in a jail (package jail tells what the two say, and
// docs/security.md what a jail is). Hypervisors are not the launcher's: they outlive it, and the next one serves
// them all the same, for all that it must know is the uid that a VM has. Safe for concurrent use.
type jails struct {
	cfg    config.Jail
	base   string // that new roots are built on
	plugin identity
	trust  trust
	uids   *uids
	cg     *cgroups
	family *family
	log    *slog.Logger

	mu    sync.Mutex             // guards what follows
	busy  map[string]bool        // VMs that are being started
	procs map[jail.Process]*born // hypervisors that this launcher started, by what names them
}

// born is a hypervisor that this launcher started.
type born struct {
	vm    string
	child *child
}

// keepExits is how many ended hypervisors' exit statuses are kept for who asks late.
const keepExits = 1024

func newJails(cfg config.Jail, runDir string, plugin identity, t trust, cg *cgroups, f *family, log *slog.Logger) (*jails, error) {
	u, err := openUIDs(&cfg, t)
	if err != nil {
		return nil, err
	}
	j := &jails{cfg: cfg, base: filepath.Join(runDir, "p"), plugin: plugin, trust: t, uids: u, cg: cg, family: f, log: log,
		busy: map[string]bool{}, procs: map[jail.Process]*born{}}
	cg.sweepVMs()
	return j, nil
}

func (j *jails) close() {
	if j != nil {
		j.uids.dir.Close()
	}
}

// identity is who a VM's hypervisor runs as: its uid, a group of the same number, and the groups that the vmm
// plugin is given for devices.
func (j *jails) identity(uid uint32) identity {
	return identity{UID: uid, GID: uid, Groups: j.plugin.Groups}
}

// maxAsked bounds the requests that a plugin may have under way.
const maxAsked = 256

// serve answers a vmm plugin until its end of the socket is closed.
func (j *jails) serve(f *os.File) { converse(f, j.log, j.answer) }

// converse answers a plugin, by answer, until its end of the socket is closed. Who breaks the protocol is not
// listened to any more.
func converse(f *os.File, log *slog.Logger, answer func(*jail.Request, []*os.File) (*jail.Reply, *os.File, error)) {
	c := jail.NewConn(f)
	defer c.Close()
	var pending atomic.Int32
	for {
		b, files, err := c.Receive()
		if err != nil || b == nil {
			return
		}
		r, err := jail.DecodeRequest(b)
		if err == nil && len(files) > 0 && r.Verb != jail.VerbStart && r.Verb != jail.VerbShare && r.Verb != jail.VerbWorker {
			err = jail.ErrMalformed
		}
		if err == nil && pending.Add(1) > maxAsked {
			err = errors.New("too many requests under way")
		}
		if err != nil {
			log.Error("a plugin asks for what is not to be asked; it is not listened to any more", "error", err)
			closeAll(files)
			return
		}
		go func() {
			defer pending.Add(-1)
			defer closeAll(files)
			rep, pidfd, err := answer(r, files)
			if err != nil {
				rep = jail.Failure(r.Seq, err)
			}
			rep.Seq = r.Seq
			out, err := jail.Encode(rep)
			if err == nil {
				var give []*os.File
				if pidfd != nil {
					give = []*os.File{pidfd}
				}
				err = c.Send(out, give...)
			}
			closeAll([]*os.File{pidfd})
			if err != nil {
				_ = c.Close()
			}
		}()
	}
}

// answer does what is asked. The descriptor is the caller's.
func (j *jails) answer(r *jail.Request, files []*os.File) (*jail.Reply, *os.File, error) {
	switch r.Verb {
	case jail.VerbIdentity:
		uid, err := j.uids.give(r.VM)
		return &jail.Reply{UID: uid, GID: uid}, nil, err
	case jail.VerbForget:
		j.cg.removeVM(r.VM)
		return &jail.Reply{}, nil, j.uids.forget(r.VM)
	case jail.VerbList:
		return &jail.Reply{VMs: j.uids.list()}, nil, nil
	case jail.VerbStart:
		return j.start(r.VM, r.Start, files)
	case jail.VerbShare:
		return &jail.Reply{}, nil, j.share(r.VM, files)
	case jail.VerbExit:
		return j.exit(r.VM, *r.Process), nil, nil
	case jail.VerbWorker, jail.VerbEndWorker:
		return nil, nil, errs.New(errs.Denied, "this plugin has no workers")
	}
	// All others are about a process that runs.
	uid, ok := j.uids.of(r.VM)
	if !ok {
		return nil, nil, errs.New(errs.NotFound, "VM %s has no uid", r.VM)
	}
	pidfd, err := holdProcess(uid, *r.Process)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(pidfd)
	rep := &jail.Reply{}
	switch r.Verb {
	case jail.VerbSignal:
		s := unix.Signal(r.Signal)
		if s != unix.SIGTERM && s != unix.SIGKILL {
			return nil, nil, errs.New(errs.Invalid, "a hypervisor is sent SIGTERM or SIGKILL, not %d", r.Signal)
		}
		if err := unix.PidfdSendSignal(pidfd, s, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, nil, os.NewSyscallError("pidfd_send_signal", err)
		}
		return rep, nil, nil
	case jail.VerbReach:
		return rep, nil, reach(pidfd, j.identity(uid), *r.Path)
	case jail.VerbUnreach:
		return rep, nil, unreach(pidfd, *r.Path)
	case jail.VerbSize:
		rep.Size, err = diskSize(pidfd, *r.Path)
		return rep, nil, err
	}
	return nil, nil, jail.ErrMalformed
}

// holdProcess opens a process that is a VM's: pid and start time are as said, and all its uids are the VM's.
func holdProcess(uid uint32, p jail.Process) (int, error) {
	gone := errs.New(errs.NotFound, "process %d is not, or no more, this VM's", p.PID).Because("PROCESS_GONE")
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return -1, gone
	}
	start, err := startTime(p.PID)
	has, state, uerr := uidsOf(p.PID)
	if err != nil || uerr != nil || start != p.StartTime || state == 'Z' || has != [4]uint32{uid, uid, uid, uid} {
		unix.Close(fd)
		return -1, gone
	}
	return fd, nil
}

// exit is how a process that this launcher started has ended. It waits: the asker knows that it has.
func (j *jails) exit(vm string, p jail.Process) *jail.Reply {
	j.mu.Lock()
	b := j.procs[p]
	j.mu.Unlock()
	if b == nil || b.vm != vm {
		return &jail.Reply{}
	}
	<-b.child.gone
	e := b.child.exit
	if e.Code < 0 {
		return &jail.Reply{}
	}
	return &jail.Reply{Known: true, Status: uint32(e.Code)<<8 | uint32(e.Signal)}
}

// start starts a hypervisor.
func (j *jails) start(vm string, s *jail.Start, files []*os.File) (*jail.Reply, *os.File, error) {
	if len(files) < 2+len(s.Files) {
		return nil, nil, errs.New(errs.Invalid, "a hypervisor's start came with %d descriptors", len(files))
	}
	uid, err := j.uids.give(vm)
	if err != nil {
		return nil, nil, err
	}
	j.mu.Lock()
	if j.busy[vm] {
		j.mu.Unlock()
		return nil, nil, errs.New(errs.Conflict, "a hypervisor of VM %s is being started", vm)
	}
	j.busy[vm] = true
	j.mu.Unlock()
	defer func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		delete(j.busy, vm)
	}()
	if pids := processesOf(uid); len(pids) > 0 {
		return nil, nil, errs.New(errs.Conflict, "process %d runs under the VM's uid %d", pids[0], uid).Because("UID_IN_USE").
			Do("end it: a VM's hypervisor runs once")
	}
	id := j.identity(uid)
	binary, err := j.openProgram(s.Program, id)
	if err != nil {
		return nil, nil, err
	}
	defer binary.Close()
	p, err := j.plan(s, id, binary, files)
	defer p.close()
	if err != nil {
		return nil, nil, err
	}
	cg, notes, err := j.cg.vm(vm, s.MemoryBytes+s.MemoryBytes/16+j.cfg.MemoryOverhead, j.cfg.PIDs, s.CPUs)
	if err != nil {
		return nil, nil, err
	}
	if cg != nil {
		defer cg.Close()
	}
	if LandlockABI() == 0 {
		notes = append(notes, "this kernel has no Landlock")
	}
	name := s.Name
	if name == "" {
		name = s.Program
	}
	pass := files[2+len(s.Files):]
	c, err := start(program{
		binary: binary, stdout: files[1], stderr: files[1], keep: pass, setup: p.trees, cgroup: cg, family: j.family, clone: jailNamespaces,
		shim: shimSpec{Argv: append([]string{name}, s.Args...), Env: []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "HOME=/"}, Switch: true,
			UID: id.UID, GID: id.GID, Groups: id.Groups, NoFile: 65536, Umask: 0o007, Jail: &p.spec},
	})
	if err != nil {
		j.cg.removeVM(vm)
		if errs.KindOf(err) == errs.Unknown {
			err = errs.Wrap(errs.Internal, err, "the jail of VM %s", vm)
		}
		return nil, nil, err
	}
	share, err := unix.FcntlInt(c.share.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	j.remember(vm, c) // which closes c once it has ended
	if err != nil {
		c.signal(unix.SIGKILL)
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return &jail.Reply{UID: uid, GID: uid, Notes: notes, Process: &jail.Process{PID: c.pid, StartTime: c.start}}, os.NewFile(uintptr(share), "pidfd"), nil
}

// remember keeps a child until some time after its end, when its group is removed.
func (j *jails) remember(vm string, c *child) {
	key := jail.Process{PID: c.pid, StartTime: c.start}
	j.mu.Lock()
	defer j.mu.Unlock()
	for k, b := range j.procs {
		if len(j.procs) < keepExits {
			break
		}
		select {
		case <-b.child.gone:
			delete(j.procs, k)
		default:
		}
	}
	j.procs[key] = &born{vm, c}
	go func() {
		<-c.gone
		c.close()
		j.mu.Lock()
		defer j.mu.Unlock()
		if !j.busy[vm] {
			j.cg.removeVM(vm)
		}
	}()
}

// openProgram opens a hypervisor's binary: one that the configuration lists, and that root alone can change.
func (j *jails) openProgram(path string, id identity) (*os.File, error) {
	if len(j.cfg.Hypervisors) > 0 && !slices.Contains(j.cfg.Hypervisors, path) {
		return nil, errs.New(errs.Denied, "%s is not among the hypervisors that the configuration allows", path).Because("HYPERVISOR_NOT_ALLOWED").
			Do("add it to hypervisors in [jail], and restart mvirtd")
	}
	return openBinary(service.KindVMM, path, "", id, j.trust)
}

// plan makes all mounts of a jail. The planner is to be closed also after an error.
func (j *jails) plan(s *jail.Start, id identity, binary *os.File, files []*os.File) (*planner, error) {
	p := &planner{spec: jailSpec{Base: j.base, Dir: s.Dir}}
	dir := files[0]
	if err := j.shareDir(dir, id.UID); err != nil {
		return p, err
	}
	if err := errors.Join(p.system(), p.program(binary)); err != nil {
		return p, err
	}
	if err := p.add(int(dir.Fd()), s.Dir, mountData, false); err != nil {
		return p, err
	}
	p.spec.Rules = append(p.spec.Rules, llRule{Path: s.Dir, Access: llOwn})
	for i, path := range s.Files {
		f := files[2+i]
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return p, errs.New(errs.Invalid, "what was handed over for %s is not a regular file", path)
		}
		if slices.ContainsFunc(p.spec.Mounts, func(m jailMount) bool { return m.IsDir && within(path, m.Target) }) {
			continue // it is there already
		}
		if err := p.add(int(f.Fd()), path, mountReadOnly|unix.MOUNT_ATTR_NOEXEC, false); err != nil {
			return p, err
		}
		p.spec.Rules = append(p.spec.Rules, llRule{Path: path, Access: unix.LANDLOCK_ACCESS_FS_READ_FILE})
	}
	err := onThread(func() error {
		for _, path := range s.Paths {
			fd, err := openAs(id, path)
			if err != nil {
				return err
			}
			err = p.add(fd, targetOf(path), attrsOf(path), false)
			unix.Close(fd)
			if err != nil {
				return err
			}
		}
		return nil
	})
	return p, err
}

// share is the verb: the VM has a uid, and the one descriptor is its directory.
func (j *jails) share(vm string, files []*os.File) error {
	uid, ok := j.uids.of(vm)
	if !ok {
		return errs.New(errs.NotFound, "VM %s has no uid", vm)
	}
	if len(files) != 1 {
		return errs.New(errs.Invalid, "a VM's directory was to be shared, and %d descriptors came", len(files))
	}
	return j.shareDir(files[0], uid)
}

func (j *jails) shareDir(dir *os.File, uid uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Uid != j.plugin.UID {
		return errs.New(errs.Denied, "what was handed over as the VM's directory is not a directory of the vmm plugin's")
	}
	return share(dir, j.plugin.UID, uid, j.uids.has)
}

func within(path, dir string) bool {
	return len(path) > len(dir) && path[:len(dir)] == dir && path[len(dir)] == '/'
}

// conversation gives a plugin its end of a socket and lets serve have the other.
func conversation(serve func(*os.File)) (theirs *os.File, env string, err error) {
	ours, theirs, err := jail.Pair()
	if err != nil {
		return nil, "", err
	}
	go serve(ours)
	return theirs, fmt.Sprintf("%s=%d", jail.EnvFD, jailFD), nil
}

// jailFD is what a plugin has the conversation at: behind the lifeline.
const jailFD = 4
