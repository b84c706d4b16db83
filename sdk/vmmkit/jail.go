package vmmkit

import (
	"context"
	"errors"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// Jail starts hypervisors under uids of their own and keeps them: *jail.Client. What runs in a jail sees disks
// and sockets at other paths than the host does; the kit tells drivers only those.
type Jail interface {
	Identity(ctx context.Context, vmID string) (vmm.RunAs, error)
	Forget(ctx context.Context, vmID string) error
	Share(ctx context.Context, vmID string, dir *os.File) error
	List(ctx context.Context) ([]jail.VM, error)
	Start(ctx context.Context, vmID string, s jail.Start, dir, output *os.File, files, pass []*os.File) (*proc.Process, []string, error)
	Open(vmID string, id proc.Identity) (*proc.Process, error)
	Reach(ctx context.Context, vmID string, id proc.Identity, p jail.Path) error
	Size(ctx context.Context, vmID string, id proc.Identity, disk string) (uint64, error)
	Unreach(ctx context.Context, vmID string, id proc.Identity, p jail.Path) error
}

// JailOf is what a plugin was given, nil if that is none.
func JailOf(c *jail.Client) Jail {
	if c == nil {
		return nil
	}
	return c
}

// identify is who a VM's hypervisor will run as.
func (m *Manager) identify(ctx context.Context, id string) (vmm.RunAs, error) {
	if m.o.Jail == nil {
		return m.o.RunAs(id), nil
	}
	return m.o.Jail.Identity(ctx, id)
}

// sharing is a machine's Share.
func (m *Manager) sharing(id string) func(context.Context) error {
	return func(ctx context.Context) error {
		if m.o.Jail == nil {
			return nil
		}
		dir, err := os.Open(m.vmDir(id))
		if err != nil {
			return err
		}
		defer dir.Close()
		return m.o.Jail.Share(ctx, id, dir)
	}
}

// forget gives back what identify gave.
func (m *Manager) forget(ctx context.Context, id string) {
	if m.o.Jail == nil {
		return
	}
	if err := m.o.Jail.Forget(context.WithoutCancel(ctx), id); err != nil {
		m.o.Log.Warn("the uid of a VM that is gone stays taken until the next start", "vm", id, "error", err)
	}
}

// forgetGone gives back the uids of VMs that are gone: deleted, or never quite created, when we ended.
func (m *Manager) forgetGone(ctx context.Context, c store.Contents) {
	if m.o.Jail == nil {
		return
	}
	list, err := m.o.Jail.List(ctx)
	if err != nil {
		m.o.Log.Warn("the VMs that have uids cannot be listed", "error", err)
		return
	}
	known := knownOf(c)
	for _, v := range list {
		if !known[v.ID] {
			m.forget(ctx, v.ID)
		}
	}
}

func knownOf(c store.Contents) map[string]bool {
	known := map[string]bool{}
	for _, it := range c.Definitions {
		known[it.ID] = true
	}
	for _, it := range c.Runtime {
		known[it.ID] = true
	}
	return known
}

// runAsLocked is who the hypervisor runs as, or will: one that was started before there were jails still has our
// own user.
func (v *machine) runAsLocked() vmm.RunAs {
	if v.run != nil && !v.run.rec.Jailed {
		return v.m.o.RunAs(v.id)
	}
	if v.run != nil && v.run.rec.RunAs != (vmm.RunAs{}) {
		return v.run.rec.RunAs
	}
	return v.as
}

// findMarked looks for processes by their marker, in a jail and outside.
func (m *Manager) findMarked(ctx context.Context, id, marker string) (found []proc.Found, jailed bool, err error) {
	if found, err = proc.Find(m.o.RunAs(id).UID, marker); err != nil || len(found) > 0 || m.o.Jail == nil {
		return found, false, err
	}
	as, err := m.identify(ctx, id)
	if err != nil {
		return nil, false, err
	}
	found, err = proc.Find(as.UID, marker)
	return found, true, err
}

// openRun gets hold of a run's process.
func (m *Manager) openRun(rec store.Runtime) (*proc.Process, error) {
	if !rec.Jailed {
		return proc.Open(rec.Process)
	}
	if m.o.Jail == nil {
		return proc.OpenKept(rec.Process, nobody{})
	}
	return m.o.Jail.Open(rec.VMID, rec.Process)
}

// nobody keeps processes in jails for a plugin that was given none: the jails were switched off while VMs ran.
// Those go on and can be asked to stop, but neither killed nor given devices.
type nobody struct{}

func (nobody) Signal(proc.Identity, syscall.Signal) error { return errJailOff() }

func (nobody) Exit(proc.Identity) (syscall.WaitStatus, bool) { return 0, false }

func errJailOff() error {
	return errs.New(errs.Precondition, "the VM runs in a jail, and jails have been switched off since").Because("JAIL_OFF").
		Do("stop the VM from within, or set enabled = true in [jail] and restart mvirtd until it has stopped")
}

func diskPath(d vmm.DiskAttachment) jail.Path {
	return jail.Path{Kind: jail.KindDisk, Name: d.Name, Path: d.Path, ReadOnly: d.ReadOnly}
}

func socketPath(n vmm.NICAttachment) jail.Path {
	return jail.Path{Kind: jail.KindSocket, Name: n.NICID, Path: n.SocketPath}
}

// inside gives attachments the paths that they have in the jail.
func inside(jailed bool, disks []vmm.DiskAttachment, nics []vmm.NICAttachment) ([]vmm.DiskAttachment, []vmm.NICAttachment) {
	if !jailed {
		return disks, nics
	}
	disks, nics = slices.Clone(disks), slices.Clone(nics)
	for i, d := range disks {
		disks[i].Path = diskPath(d).Inside()
	}
	for i, n := range nics {
		if n.SocketPath != "" {
			nics[i].SocketPath = socketPath(n).Inside()
		}
	}
	return disks, nics
}

// reachable makes attachments reachable in a running jail. The returned function undoes it.
func (v *machine) reachable(ctx context.Context, r *run, paths ...jail.Path) (undo func(), err error) {
	if !r.rec.Jailed {
		return func() {}, nil
	}
	if v.m.o.Jail == nil && len(paths) > 0 {
		return nil, errJailOff()
	}
	id := r.proc.Identity()
	undo = func() {
		for _, p := range paths {
			v.unreachable(context.WithoutCancel(ctx), r, p)
		}
	}
	for _, p := range paths {
		if err := v.m.o.Jail.Reach(ctx, v.id, id, p); err != nil {
			undo()
			return nil, err
		}
	}
	return undo, nil
}

func (v *machine) unreachable(ctx context.Context, r *run, p jail.Path) {
	if !r.rec.Jailed || v.m.o.Jail == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := v.m.o.Jail.Unreach(ctx, v.id, r.proc.Identity(), p); err != nil && !errors.Is(err, errs.NotFound) {
		v.m.o.Log.Warn("a device that was unplugged stays reachable in the VM's jail", "vm", v.id, "device", p.Name, "error", err)
	}
}

// spawn starts a hypervisor: in a jail where there is one, else as our own user.
func (v *machine) spawn(ctx context.Context, mach Machine, l Launch, disks []vmm.DiskAttachment, nics []vmm.NICAttachment) (*proc.Process, error) {
	m := v.m
	if m.o.Jail == nil {
		return m.o.Spawner.Spawn(ctx, l.Command)
	}
	s := jail.Start{Program: l.Command.Path, Name: l.Command.Name, Args: l.Command.Args, Dir: mach.Dir, MemoryBytes: max(mach.Spec.MemoryBytes, mach.Spec.MaxMemory),
		CPUs: max(mach.Spec.CPUs, mach.Spec.MaxCPUs)}
	for _, d := range disks {
		s.Paths = append(s.Paths, diskPath(d))
	}
	for _, n := range nics {
		if n.SocketPath != "" {
			s.Paths = append(s.Paths, socketPath(n))
		}
		if n.TAPName != "" && len(n.TAP) == 0 {
			return nil, errs.New(errs.Unsupported, "NIC %s is a TAP by name, and a jail has no network", n.NICID).
				Do("let the net plugin hand TAPs over as descriptors")
		}
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, path := range append([]string{mach.Kernel, mach.Initramfs}, l.ReadOnly...) {
		if path == "" || slices.Contains(s.Files, path) {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		if path == mach.Kernel || path == mach.Initramfs {
			_ = f.Chmod(0o444) // stored before there were jails; the directory lets nobody in
		}
		s.Files, files = append(s.Files, path), append(files, f)
	}
	fd, err := unix.Open(mach.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: mach.Dir, Err: err}
	}
	dir := os.NewFile(uintptr(fd), mach.Dir)
	defer dir.Close()
	p, notes, err := m.o.Jail.Start(ctx, v.id, s, dir, l.Command.Output, files, l.Command.Files)
	for _, n := range notes {
		m.o.Log.Debug("the jail lacks something on this host", "vm", v.id, "what", n)
	}
	return p, err
}

// lend lets a VM's hypervisor use a directory that we make in the VM's own: the VM's uid is named in the default
// list of the directory above, and the group's bits are what such entries are held to.
func lend(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o770)) }
