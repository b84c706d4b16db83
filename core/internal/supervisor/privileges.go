package supervisor

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/core/internal/launcher"
)

// Privileges of a process.
type Privileges struct {
	UID          uint32
	GID          uint32
	Groups       []uint32 // supplementary, ascending
	Capabilities []string // permitted, ascending by number
	Bounding     []string // the most that it and its children can ever hold
	NoNewPrivs   bool

	resident uint64
}

// ReadPrivileges reads those of a process from /proc/<pid>/status (proc_pid_status(5)).
func ReadPrivileges(pid int) (Privileges, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return Privileges{}, err
	}
	return parseStatus(string(data))
}

func parseStatus(text string) (p Privileges, err error) {
	for line := range strings.Lines(text) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if !ok || len(f) == 0 {
			continue
		}
		var n uint64
		switch name {
		case "Uid":
			p.UID, err = effective(f)
		case "Gid":
			p.GID, err = effective(f)
		case "Groups":
			for _, g := range f {
				if n, err = strconv.ParseUint(g, 10, 32); err != nil {
					break
				}
				p.Groups = append(p.Groups, uint32(n))
			}
			slices.Sort(p.Groups)
		case "CapPrm":
			n, err = strconv.ParseUint(f[0], 16, 64)
			p.Capabilities = launcher.CapabilityNames(n)
		case "CapBnd":
			n, err = strconv.ParseUint(f[0], 16, 64)
			p.Bounding = launcher.CapabilityNames(n)
		case "NoNewPrivs":
			p.NoNewPrivs = f[0] == "1"
		case "VmRSS":
			n, err = strconv.ParseUint(f[0], 10, 54)
			p.resident = n << 10
		}
		if err != nil {
			return Privileges{}, fmt.Errorf("line %s of the process status: %w", name, err)
		}
	}
	return p, nil
}

// effective picks the second of the four ids in a line: real, effective, saved, file system.
func effective(f []string) (uint32, error) {
	if len(f) != 4 {
		return 0, fmt.Errorf("%d ids instead of four", len(f))
	}
	n, err := strconv.ParseUint(f[1], 10, 32)
	return uint32(n), err
}

// differs says in what an actual process differs from what was granted, or "".
func (want Privileges) differs(got Privileges) string {
	var out []string
	add := func(what string, w, g any) { out = append(out, fmt.Sprintf("%s %v instead of %v", what, g, w)) }
	if want.UID != got.UID {
		add("user", want.UID, got.UID)
	}
	if want.GID != got.GID {
		add("group", want.GID, got.GID)
	}
	if !slices.Equal(want.Groups, got.Groups) {
		add("groups", want.Groups, got.Groups)
	}
	if !slices.Equal(want.Capabilities, got.Capabilities) {
		add("capabilities", want.Capabilities, got.Capabilities)
	}
	if !slices.Equal(want.Bounding, got.Bounding) {
		add("bounding set", want.Bounding, got.Bounding)
	}
	if want.NoNewPrivs != got.NoNewPrivs {
		add("no_new_privs", want.NoNewPrivs, got.NoNewPrivs)
	}
	return strings.Join(out, ", ")
}
