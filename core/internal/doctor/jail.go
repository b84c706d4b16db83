package doctor

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/core/internal/launcher"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/jail"
)

// Reach is all that a hypervisor can reach.
type Reach struct {
	VM         string
	Process    Process
	Mounts     []Mount
	Open       []string // descriptors, and what they are
	Interfaces []string // of the network that it is in
	Limits     []string // of its control group
	Namespaces []string
}

// Mount is one place in a jail.
type Mount struct {
	Path     string // inside
	Source   string // device of the file system, and the path in that
	Writable bool
}

// Jail looks at what a VM's hypervisor can reach.
func Jail(path, vm string) (*Reach, error) {
	cfg, err := load(path)
	if err != nil {
		return nil, err
	}
	want, err := launcher.WantedOf(cfg)
	if err != nil {
		return nil, err
	}
	list, err := launcher.JailedVMs(cfg)
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(list, func(v jail.VM) bool { return v.ID == vm })
	if at < 0 {
		e := errs.New(errs.NotFound, "VM %s has no uid of its own", vm).Do("start it; if it runs, it was started without a jail")
		if !cfg.Jail.Enabled {
			e.Remedy = "set enabled = true in [jail], restart mvirtd, then stop the VM and start it"
		}
		return nil, e
	}
	uid := list[at].UID
	pids := launcher.ProcessesOf(uid)
	if len(pids) == 0 {
		return nil, errs.New(errs.Precondition, "no hypervisor of VM %s runs in a jail", vm).Do("start the VM")
	}
	pid := pids[0]
	s := &system{cfg: cfg, want: want, report: &Report{}}
	s.add("hypervisor of VM "+vm, pid, Want{UID: uid, GID: uid, Groups: want.Groups, NoNewPrivs: true, Seccomp: true, Apart: true})
	r := &Reach{VM: vm, Process: s.report.Processes[0]}
	if r.Mounts, err = mountsOf(pid); err != nil {
		return nil, err
	}
	r.Open = openFiles(pid)
	r.Interfaces = interfaces(pid)
	r.Limits = limitsOf(pid)
	for _, ns := range []string{"mnt", "net", "ipc", "uts", "pid", "user", "cgroup"} {
		theirs, err1 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		ours, err2 := os.Readlink("/proc/self/ns/" + ns)
		if err1 != nil || err2 != nil {
			continue
		}
		whose := "its own"
		if ours == theirs {
			whose = "the host's"
		}
		r.Namespaces = append(r.Namespaces, ns+": "+whose)
	}
	return r, nil
}

// mountsOf reads the mounts that a process sees: proc_pid_mountinfo(5).
func mountsOf(pid int) ([]Mount, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, err
	}
	var out []Mount
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		w, v := strings.Fields(before), strings.Fields(after)
		if !ok || len(w) < 6 || len(v) < 2 {
			continue
		}
		options := strings.Split(w[5], ",")
		out = append(out, Mount{Path: unescape(w[4]), Source: v[0] + " " + w[2] + " " + unescape(w[3]), Writable: slices.Contains(options, "rw")})
	}
	slices.SortFunc(out, func(a, b Mount) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

// unescape undoes the kernel's \ooo.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func openFiles(pid int) (out []string) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range ents {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			out = append(out, e.Name()+": "+to)
		}
	}
	return out
}

// interfaces are the lines of a process's /proc/<pid>/net/dev behind the two of the head.
func interfaces(pid int) (out []string) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if name, _, ok := strings.Cut(line, ":"); ok && !strings.Contains(name, "|") {
			out = append(out, strings.TrimSpace(name))
		}
	}
	return out
}

func limitsOf(pid int) (out []string) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		for _, f := range []string{"memory.max", "pids.max", "cpu.weight"} {
			if v, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", path, f)); err == nil {
				out = append(out, f+" "+strings.TrimSpace(string(v)))
			}
		}
	}
	return out
}
