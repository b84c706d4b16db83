package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/core/internal/launcher"
)

// Facts are what the kernel says a process is: /proc/<pid>/status, proc_pid_status(5).
type Facts struct {
	UID, GID                       [4]uint32 // real, effective, saved, of the file system
	Groups                         []uint32  // supplementary, ascending
	Effective, Permitted, Bounding uint64    // sets of capabilities
	Ambient, Inheritable           uint64
	NoNewPrivs                     bool
	Seccomp                        int // 0 none, 2 a filter
}

// Read reads a process's facts.
func Read(pid int) (Facts, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return Facts{}, err
	}
	return parse(string(b))
}

func parse(text string) (f Facts, err error) {
	seen := map[string]bool{}
	for line := range strings.Lines(text) {
		name, rest, _ := strings.Cut(line, ":")
		w := strings.Fields(rest)
		seen[name] = true
		switch name {
		case "Uid":
			err = four(w, &f.UID)
		case "Gid":
			err = four(w, &f.GID)
		case "Groups":
			for _, g := range w {
				var n uint64
				if n, err = strconv.ParseUint(g, 10, 32); err != nil {
					break
				}
				f.Groups = append(f.Groups, uint32(n))
			}
			slices.Sort(f.Groups)
		case "CapEff":
			err = hex(w, &f.Effective)
		case "CapPrm":
			err = hex(w, &f.Permitted)
		case "CapBnd":
			err = hex(w, &f.Bounding)
		case "CapAmb":
			err = hex(w, &f.Ambient)
		case "CapInh":
			err = hex(w, &f.Inheritable)
		case "NoNewPrivs":
			f.NoNewPrivs = len(w) == 1 && w[0] == "1"
		case "Seccomp":
			if len(w) == 1 {
				f.Seccomp, err = strconv.Atoi(w[0])
			}
		}
		if err != nil {
			return f, fmt.Errorf("line %s of the process status: %w", name, err)
		}
	}
	for _, n := range []string{"Uid", "Gid", "CapEff", "CapPrm", "CapBnd", "CapAmb", "CapInh", "NoNewPrivs"} {
		if !seen[n] {
			return f, fmt.Errorf("the process status has no line %s", n)
		}
	}
	return f, nil
}

func four(w []string, out *[4]uint32) error {
	if len(w) != 4 {
		return fmt.Errorf("%d ids instead of four", len(w))
	}
	for i, s := range w {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return err
		}
		out[i] = uint32(n)
	}
	return nil
}

func hex(w []string, out *uint64) (err error) {
	if len(w) != 1 {
		return fmt.Errorf("%d words instead of one", len(w))
	}
	*out, err = strconv.ParseUint(w[0], 16, 64)
	return err
}

// Want is what a process must be.
type Want struct {
	UID, GID   uint32
	Groups     []uint32
	Caps       uint64 // effective = permitted = bounding
	AtMost     bool   // fewer capabilities will do (the launcher's own)
	Ambient    uint64
	NoNewPrivs bool
	Seccomp    bool // a filter must be there
	Apart      bool // namespaces of its own: mounts, network, IPC, names
}

// differences says in what a process is not as it must be.
func (w Want) differences(pid int, f Facts) (out []string) {
	add := func(what string, want, got any) {
		out = append(out, fmt.Sprintf("%s: %v instead of %v", what, got, want))
	}
	if want := [4]uint32{w.UID, w.UID, w.UID, w.UID}; f.UID != want {
		add("uid", want, f.UID)
	}
	if want := [4]uint32{w.GID, w.GID, w.GID, w.GID}; f.GID != want {
		add("gid", want, f.GID)
	}
	if !w.AtMost && !slices.Equal(f.Groups, w.Groups) {
		add("groups", w.Groups, f.Groups)
	}
	for _, c := range []struct {
		name      string
		want, got uint64
	}{{"effective capabilities", w.Caps, f.Effective}, {"permitted capabilities", w.Caps, f.Permitted}, {"bounding set", w.Caps, f.Bounding},
		{"ambient capabilities", w.Ambient, f.Ambient}} {
		if w.AtMost && c.got&^c.want == 0 || c.got == c.want {
			continue
		}
		add(c.name, names(c.want), names(c.got))
	}
	if w.NoNewPrivs && !f.NoNewPrivs {
		out = append(out, "no_new_privs is not set")
	}
	if w.Seccomp && f.Seccomp != 2 {
		out = append(out, "there is no seccomp filter")
	}
	if w.Apart {
		for _, ns := range []string{"mnt", "net", "ipc", "uts"} {
			ours, err1 := os.Readlink("/proc/self/ns/" + ns)
			theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
			if err1 == nil && err2 == nil && ours == theirs {
				out = append(out, "it is in the host's "+ns+" namespace")
			}
		}
	}
	return out
}

// CapabilityText names the capabilities of a set, without their common prefix.
func CapabilityText(set uint64) string { return names(set) }

func names(set uint64) string {
	if set == 0 {
		return "none"
	}
	return strings.ReplaceAll(strings.Join(launcher.CapabilityNames(set), " "), "CAP_", "")
}

// children lists the children of a process.
func children(pid int) (out []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			continue
		}
		for _, w := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(w); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// arguments of a process, the program's name first.
func arguments(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// allProcesses lists the processes there are.
func allProcesses() (out []int) {
	ents, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range ents {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			out = append(out, n)
		}
	}
	return out
}
