package launcher

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// cgroups puts each plugin into a control group of its own where a cgroup v2 subtree is ours:
//
//	<base>/launcher            mvirtd itself, for processes may not stand beside groups with controllers
//	<base>/<kind>              belongs to the plugin's user, who may make groups below it for hypervisors
//	<base>/<kind>/plugin       the plugin
//
// Groups are for accounting and limits set by the operator; nothing here kills by group, as hypervisors
// would die too. A nil *cgroups does nothing.
type cgroups struct{ base string }

// newCgroups finds the subtree that setting means ("auto", "none" or a path). why says why there is none.
func newCgroups(setting string) (cg *cgroups, why string, err error) {
	base := setting
	switch setting {
	case "none":
		return nil, "switched off in the configuration", nil
	case "auto":
		if base, why = delegated(); base == "" {
			return nil, why, nil
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(base, &fs); err != nil {
		return nil, "", pathErr(base, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, "", errs.New(errs.Precondition, "core.cgroup: %s is not in a cgroup v2 file system", base).Do(`set cgroup = "auto"`)
	}
	cg = &cgroups{base: base}
	if err := os.Mkdir(filepath.Join(base, "launcher"), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, "", fmt.Errorf("core.cgroup: %w", err)
	}
	if err := os.WriteFile(filepath.Join(base, "launcher", "cgroup.procs"), []byte("0"), 0); err != nil {
		return nil, "", fmt.Errorf("core.cgroup: moving mvirtd into its group: %w", err)
	}
	return cg, "", nil
}

// delegated is our own cgroup if whoever manages the host marked it as ours to divide (systemd's Delegate=
// sets the extended attributes user.delegate and trusted.delegate: CGROUP_DELEGATION in systemd's docs).
func delegated() (base, why string) {
	mount := "/sys/fs/cgroup"
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err.Error()
	}
	for line := range bytes.Lines(own) {
		path, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "0::")
		if !ok {
			continue
		}
		dir := filepath.Join(mount, path)
		var fs unix.Statfs_t
		if unix.Statfs(dir, &fs) != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
			return "", "cgroup v2 is not mounted at " + mount
		}
		for _, attr := range []string{"user.delegate", "trusted.delegate"} {
			var b [8]byte
			if n, err := unix.Getxattr(dir, attr, b[:]); err == nil && string(b[:n]) == "1" {
				return dir, ""
			}
		}
		return "", "the group " + path + " is not delegated to mvirtd"
	}
	return "", "this process is in no cgroup v2"
}

// plugin makes the group of a plugin and opens it.
func (c *cgroups) plugin(kind service.Kind, id identity) (*os.File, error) {
	if c == nil {
		return nil, nil
	}
	outer := filepath.Join(c.base, string(kind))
	inner := filepath.Join(outer, "plugin")
	for _, d := range []string{outer, inner} {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("the control group of the %s plugin: %w", kind, err)
		}
	}
	if id.UID != 0 {
		for _, n := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "plugin", "plugin/cgroup.procs"} {
			if err := os.Lchown(filepath.Join(outer, n), int(id.UID), int(id.GID)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("the control group of the %s plugin: %w", kind, err)
			}
		}
	}
	return os.Open(inner)
}

// vmGroups is the group that holds one group a VM.
const vmGroups = "vm"

// vm makes the group of a VM's hypervisor with its limits and opens it. notes say which limits this host does not
// let us set. Without groups of our own: nil, and a note.
func (c *cgroups) vm(id string, memory, pids uint64, cpus uint32) (dir *os.File, notes []string, err error) {
	if c == nil {
		return nil, []string{"no control group: mvirtd has none of its own"}, nil
	}
	all := filepath.Join(c.base, vmGroups)
	own := filepath.Join(all, id)
	for _, d := range []string{all, own} {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, nil, fmt.Errorf("the control group of VM %s: %w", id, err)
		}
		if d == all {
			for _, ctl := range []string{"memory", "pids", "cpu"} {
				for _, at := range []string{c.base, all} { // top down; what is refused shows below
					_ = os.WriteFile(filepath.Join(at, "cgroup.subtree_control"), []byte("+"+ctl), 0)
				}
			}
		}
	}
	for _, l := range []struct{ file, value string }{
		{"memory.max", fmt.Sprint(memory)},
		{"memory.oom.group", "1"},
		{"pids.max", fmt.Sprint(pids)},
		{"cpu.weight", fmt.Sprint(min(10000, 100*uint64(max(1, cpus))))},
	} {
		if err := os.WriteFile(filepath.Join(own, l.file), []byte(l.value), 0); err != nil {
			notes = append(notes, fmt.Sprintf("no %s: %v", l.file, err))
		}
	}
	dir, err = os.Open(own)
	return dir, notes, err
}

// removeVM removes a VM's group; one that still has processes stays.
func (c *cgroups) removeVM(id string) {
	if c != nil {
		_ = os.Remove(filepath.Join(c.base, vmGroups, id))
	}
}

// sweepVMs removes the groups whose hypervisors ended while no launcher was there.
func (c *cgroups) sweepVMs() {
	if c == nil {
		return
	}
	ents, err := os.ReadDir(filepath.Join(c.base, vmGroups))
	if err != nil {
		return
	}
	for _, e := range ents {
		if e.IsDir() {
			c.removeVM(e.Name())
		}
	}
}
