package doctor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

// Leftover is something that belongs to nothing.
type Leftover struct {
	Class string // process, uid, cgroup, socket, launch directory
	What  string
	Why   string
	fix   func() error
}

// Fix removes it.
func (l Leftover) Fix() error { return l.fix() }

// launch is one run of a plugin, as the launcher keeps it on record.
type launch struct {
	name, kind string
	pid        int
	alive      bool
}

// launches reads the records; see the launcher's sweep.
func launches(cfg *config.Config) (out []launch) {
	dir := filepath.Join(cfg.Core.RunDir, "p")
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range ents {
		name, ok := strings.CutSuffix(e.Name(), ".pid")
		if !ok {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		kind, _, _ := strings.Cut(name, "-")
		l := launch{name: name, kind: kind}
		var start uint64
		var boot string
		if n, _ := fmt.Sscan(string(b), &l.pid, &start, &boot); n == 3 {
			now, err := launcher.StartTime(l.pid)
			l.alive = err == nil && now == start && boot == bootID()
		}
		out = append(out, l)
	}
	return out
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

func (s *system) left(class, what, why string, fix func() error) {
	s.report.Leftovers = append(s.report.Leftovers, Leftover{Class: class, What: what, Why: why, fix: fix})
}

// leftovers accounts for uids, processes, control groups, launch directories and sockets.
func (s *system) leftovers(vms map[string]int) {
	s.leftUIDs(vms)
	s.leftGroups()
	s.leftLaunches()
	s.leftSockets()
}

// leftUIDs looks for uids of VMs that are gone, and for processes in the range under a uid that no VM has.
func (s *system) leftUIDs(vms map[string]int) {
	list, err := launcher.JailedVMs(s.cfg)
	if err != nil {
		return // told already
	}
	owner := map[uint32]string{}
	for _, vm := range list {
		owner[vm.UID] = vm.ID
		if _, there := vms[vm.ID]; vms == nil || there {
			continue
		}
		pids := launcher.ProcessesOf(vm.UID)
		for _, pid := range pids {
			s.leftProcess(pid, vm.UID, "VM "+vm.ID+" is gone")
		}
		file := filepath.Join(s.cfg.Jail.StateDir, vm.ID)
		s.left("uid", fmt.Sprintf("%d, of VM %s", vm.UID, vm.ID), "that VM is gone", func() error {
			if s.launcher != 0 {
				return errs.New(errs.Precondition, "mvirtd keeps it").Do("mvirt plugin restart vmm: it gives back what no VM has")
			}
			if len(launcher.ProcessesOf(vm.UID)) > 0 {
				return errs.New(errs.Precondition, "a process has it")
			}
			return os.Remove(file)
		})
	}
	for _, pid := range allProcesses() {
		f, err := Read(pid)
		if err != nil || f.UID[0] < s.cfg.Jail.UIDBase || f.UID[0]-s.cfg.Jail.UIDBase >= s.cfg.Jail.UIDCount || owner[f.UID[0]] != "" {
			continue
		}
		s.leftProcess(pid, f.UID[0], "its uid is of the range for VMs, and no VM has it")
	}
}

func (s *system) leftProcess(pid int, uid uint32, why string) {
	start, err := launcher.StartTime(pid)
	if err != nil {
		return
	}
	name := strings.Join(arguments(pid), " ")
	s.left("process", fmt.Sprintf("%d under uid %d: %.80s", pid, uid, name), why, func() error { return kill(pid, start, uid) })
}

// kill ends a process that is still the one that was looked at.
func kill(pid int, start uint64, uid uint32) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(fd)
	now, err := launcher.StartTime(pid)
	f, ferr := Read(pid)
	if err != nil || ferr != nil || now != start || f.UID[0] != uid {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	return nil
}

// leftGroups looks for VMs' control groups without processes.
func (s *system) leftGroups() {
	base := groupBase(s.cfg, s.launcher)
	if base == "" {
		return
	}
	ents, err := os.ReadDir(filepath.Join(base, "vm"))
	if err != nil {
		return
	}
	for _, e := range ents {
		dir := filepath.Join(base, "vm", e.Name())
		if !e.IsDir() || ident.CheckID("vm", e.Name()) != nil {
			continue
		}
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil || len(bytes.TrimSpace(procs)) > 0 {
			continue
		}
		s.left("cgroup", dir, "no process is in it", func() error { return os.Remove(dir) })
	}
}

// groupBase is the group that holds mvirt's others: the launcher stands in <base>/launcher.
func groupBase(cfg *config.Config, pid int) string {
	switch {
	case cfg.Core.Cgroup == "none":
		return ""
	case cfg.Core.Cgroup != "auto":
		return cfg.Core.Cgroup
	case pid == 0:
		return ""
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok && filepath.Base(path) == "launcher" {
			return filepath.Join("/sys/fs/cgroup", filepath.Dir(path))
		}
	}
	return ""
}

// leftLaunches looks for launch directories whose plugin is gone.
func (s *system) leftLaunches() {
	dir := filepath.Join(s.cfg.Core.RunDir, "p")
	for _, l := range launches(s.cfg) {
		if l.alive {
			continue
		}
		s.left("launch directory", filepath.Join(dir, l.name), "its plugin has ended", func() error {
			return errors.Join(os.RemoveAll(filepath.Join(dir, l.name)), os.Remove(filepath.Join(dir, l.name+".pid")))
		})
	}
}

// leftSockets looks for sockets below the run directory that nobody listens on. Asking the kernel by name would
// not do: sockets are bound under another name and then renamed.
func (s *system) leftSockets() {
	skip := filepath.Join(s.cfg.Core.RunDir, "p")
	_ = filepath.WalkDir(s.cfg.Core.RunDir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return nil // gone meanwhile
		}
		if path == skip {
			return filepath.SkipDir // the launcher's sweep
		}
		if d.Type()&os.ModeSocket != 0 && deserted(path) {
			s.left("socket", path, "nobody listens on it", func() error { return os.Remove(path) })
		}
		return nil
	})
}

// deserted tells whether a socket's listener is gone: then a connection is refused. One of another type, or one
// whose queue is full, has an owner.
func deserted(path string) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return errors.Is(unix.Connect(fd, &unix.SockaddrUnix{Name: path}), unix.ECONNREFUSED)
}
