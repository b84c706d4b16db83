// Package doctor looks at a host on which mvirt runs and says what is not as it must be: each process compared
// with what the configuration wants it to be, by what the kernel says of it, and everything there is that
// belongs to nothing. It asks no daemon, so that it can be run also when none answers, and changes nothing unless
// told to.
package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// Process is one of mvirt's processes.
type Process struct {
	Name        string // "core", "plugin net", "hypervisor of VM …"
	PID         int    // 0: it does not run
	Want        Want
	Have        Facts
	Differences []string
}

// Report is what was found.
type Report struct {
	Config    string
	Landlock  int // the kernel's version; 0: none
	Processes []Process
	Notes     []string // that are no fault, but to be known
	Leftovers []Leftover
}

// Healthy says that all processes are as they must be and nothing is left over.
func (r *Report) Healthy() bool {
	return len(r.Leftovers) == 0 && !slices.ContainsFunc(r.Processes, func(p Process) bool { return len(p.Differences) > 0 })
}

// Look looks at the system that a configuration file describes. vms are the VMs that there are, by id, and the pids
// of their hypervisors, 0 for those that do not run; nil says that this is not known.
func Look(path string, vms map[string]int) (*Report, error) {
	cfg, err := load(path)
	if err != nil {
		return nil, err
	}
	r := &Report{Config: path, Landlock: launcher.LandlockABI()}
	want, err := launcher.WantedOf(cfg)
	if err != nil {
		return nil, err
	}
	s := &system{cfg: cfg, want: want, report: r}
	s.daemon()
	s.plugins()
	if err := s.hypervisors(vms); err != nil {
		return nil, err
	}
	s.workers()
	s.leftovers(vms)
	if r.Landlock == 0 {
		r.Notes = append(r.Notes, "this kernel has no Landlock: jails rest on uids, namespaces and the hypervisor's own seccomp filter")
	}
	return r, nil
}

func load(path string) (*config.Config, error) {
	if os.Geteuid() != 0 {
		return nil, errs.New(errs.Denied, "only root may see what other users' processes are").Do("run it as root")
	}
	f, err := launcher.OpenConfig(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return config.Read(path, f)
}

type system struct {
	cfg      *config.Config
	want     launcher.Wanted
	report   *Report
	launcher int // pid, 0: it does not run
}

// add compares a process with what it must be.
func (s *system) add(name string, pid int, w Want) {
	p := Process{Name: name, PID: pid, Want: w}
	if pid == 0 {
		p.Differences = []string{"it does not run"}
	} else {
		var err error
		if p.Have, err = Read(pid); err != nil {
			p.Differences = []string{err.Error()}
		} else {
			p.Differences = w.differences(pid, p.Have)
		}
	}
	s.report.Processes = append(s.report.Processes, p)
}

func wantOf(g launcher.Grant) Want {
	caps := launcher.CapabilitySet(g.Capabilities)
	w := Want{UID: g.UID, GID: g.GID, Groups: g.Groups, Caps: caps, NoNewPrivs: true}
	if g.UID != 0 {
		w.Ambient = caps
	}
	return w
}

// daemon looks for launcher and core.
func (s *system) daemon() {
	b, err := os.ReadFile(filepath.Join(s.cfg.Core.RunDir, "mvirtd.pid"))
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	core := 0
	if err == nil && pid > 1 {
		for _, c := range children(pid) {
			if a := arguments(c); len(a) > 1 && a[1] == launcher.CoreArg {
				core = c
			}
		}
	}
	if core == 0 && (pid <= 1 || !strings.Contains(strings.Join(arguments(pid), " "), "mvirtd")) {
		pid = 0 // the number is somebody else's by now
	}
	s.launcher = pid
	s.add("launcher", pid, Want{Caps: s.want.Launcher, AtMost: true})
	s.add("core", core, wantOf(s.want.Core))
}

// plugins looks at the launches that the launcher has on record.
func (s *system) plugins() {
	running := map[string]int{}
	for _, l := range launches(s.cfg) {
		if l.alive {
			running[l.kind] = l.pid
		}
	}
	for _, k := range s.cfg.Kinds() {
		if s.cfg.Plugins[k].Attach != "" {
			s.report.Notes = append(s.report.Notes, "the "+string(k)+" plugin is started by somebody else, who also sets what it may do")
			continue
		}
		s.add("plugin "+string(k), running[string(k)], wantOf(s.want.Plugins[k]))
	}
}

// hypervisors looks at each VM that has a uid, and at those that run without a jail.
func (s *system) hypervisors(vms map[string]int) error {
	if s.cfg.Plugins[service.KindVMM] == nil {
		return nil
	}
	if !s.cfg.Jail.Enabled {
		s.report.Notes = append(s.report.Notes,
			"jails are off (enabled = false in [jail]): every hypervisor runs as the vmm plugin's user and can reach the disks, memory and sockets of all others")
	}
	list, err := launcher.JailedVMs(s.cfg)
	if err != nil {
		return err
	}
	uids := map[string]uint32{}
	for _, vm := range list {
		uids[vm.ID] = vm.UID
		if _, there := vms[vm.ID]; vms != nil && !there {
			continue // told among what is left over
		}
		for _, pid := range launcher.ProcessesOf(vm.UID) {
			s.add("hypervisor of VM "+vm.ID, pid, Want{UID: vm.UID, GID: vm.UID, Groups: s.want.Groups, NoNewPrivs: true, Seccomp: true, Apart: true})
		}
	}
	for id, pid := range vms {
		f, err := Read(pid)
		if uid, ok := uids[id]; pid == 0 || err != nil || ok && f.UID[0] == uid {
			continue
		}
		p := Process{Name: "hypervisor of VM " + id, PID: pid, Have: f}
		if s.cfg.Jail.Enabled {
			p.Differences = []string{"it runs in no jail: it was started before there were any, or by a plugin that asks for none; stop the VM and start it"}
		}
		s.report.Processes = append(s.report.Processes, p)
	}
	return nil
}

// workers looks for the unprivileged children of plugins: processes of a plugin's program under its worker's
// user, wherever their parents are.
func (s *system) workers() {
	for _, k := range s.cfg.Kinds() {
		uid, ok := s.want.Worker[k]
		if !ok {
			continue
		}
		for _, pid := range allProcesses() {
			exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			if err != nil || strings.TrimSuffix(exe, " (deleted)") != s.cfg.Plugins[k].Command {
				continue
			}
			f, err := Read(pid)
			if err != nil || f.UID[1] != uid {
				continue
			}
			s.add("worker of plugin "+string(k), pid, Want{UID: uid, GID: f.GID[0], NoNewPrivs: true})
		}
	}
}
