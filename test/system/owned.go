package system

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Things is what a system has on the host, by class, in words.
type Things struct {
	Processes  []Process
	Links      []string // "mvh12ab" or "mvirt-x/mvt34cd", with the name space before the slash
	Namespaces []string
	Tables     []string // of nftables
	Mounts     []string
	Sockets    []string // that somebody listens on
	Files      []string // of mvirt's users, outside of the two directories
}

// Process is a process of a system.
type Process struct {
	PID  int
	User string
	Name string // name of the binary
}

// String is "qemu-system-x86_64 (pid 12, user mvirt-vmm)".
func (p Process) String() string { return fmt.Sprintf("%s (pid %d, user %s)", p.Name, p.PID, p.User) }

// List gives all things in words.
func (t Things) List() []string {
	var out []string
	for _, p := range t.Processes {
		out = append(out, "process "+p.String())
	}
	for what, list := range map[string][]string{"link": t.Links, "network namespace": t.Namespaces, "nftables table": t.Tables, "mount": t.Mounts, "socket": t.Sockets, "file": t.Files} {
		for _, s := range list {
			out = append(out, what+" "+s)
		}
	}
	slices.Sort(out)
	return out
}

// instance is the tag that the net plugin gives to what it makes; see plugins/net-tap/internal/control.
func (p Place) instance() string {
	h := sha256.Sum256([]byte(filepath.Join(p.Dir, "net")))
	return hex.EncodeToString(h[:4])
}

// Owned looks for everything that the system at p has on the host. Name spaces that are known to be its own
// (from an earlier look) are recognised also when nothing is left in them.
func Owned(ctx context.Context, p Place, known ...string) (Things, error) {
	var t Things
	var err error
	if t.Processes, err = processes(p); err != nil {
		return t, err
	}
	if t.Mounts, err = mounts(p); err != nil {
		return t, err
	}
	if t.Sockets, err = sockets(p); err != nil {
		return t, err
	}
	if os.Geteuid() != 0 {
		return t, nil
	}
	alias := "mvirt:" + p.instance() + ":"
	if t.Links, err = links(ctx, "", alias); err != nil {
		return t, err
	}
	names, err := filepath.Glob("/run/netns/mvirt-*")
	if err != nil {
		return t, err
	}
	for _, path := range names {
		ns := filepath.Base(path)
		in, err := links(ctx, ns, alias)
		if err != nil { // somebody else's, going away just now
			continue
		}
		for _, l := range in {
			t.Links = append(t.Links, ns+"/"+l)
		}
		if len(in) > 0 || slices.Contains(known, ns) {
			t.Namespaces = append(t.Namespaces, ns)
		}
	}
	out, err := exec.CommandContext(ctx, "nft", "list", "tables").Output()
	if err != nil {
		return t, fmt.Errorf("nft list tables: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); strings.Contains(line, "_"+p.instance()) {
			t.Tables = append(t.Tables, strings.TrimPrefix(line, "table "))
		}
	}
	t.Files = files(p)
	return t, nil
}

// Processes are the processes of the system at p.
func Processes(p Place) ([]Process, error) { return processes(p) }

// processes whose program, or an argument, lies in the place. A plugin is executed from an open descriptor,
// but the kernel still says which file that is.
func processes(p Place) ([]Process, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []Process
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		base := filepath.Join("/proc", d.Name())
		exe, err := os.Readlink(base + "/exe")
		if err != nil {
			continue // a kernel thread, or gone
		}
		args, _ := os.ReadFile(base + "/cmdline")
		bin := filepath.Join(p.Dir, "bin") + "/"
		mine := strings.HasPrefix(exe, bin)
		if strings.Contains(filepath.Base(exe), "qemu") {
			mine = mine || strings.Contains(string(args), p.Dir+"/") || strings.Contains(string(args), p.Run+"/")
		}
		if !mine || strings.HasPrefix(exe, bin+"mvirt ") || strings.TrimSuffix(exe, " (deleted)") == bin+"mvirt" {
			continue // the CLI is the caller's
		}
		name := filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
		owner := "?"
		if st, err := os.Stat(base); err == nil {
			owner = fmt.Sprint(st.Sys().(*syscall.Stat_t).Uid)
			if u, err := user.LookupId(owner); err == nil {
				owner = u.Username
			}
		}
		out = append(out, Process{PID: pid, User: owner, Name: name})
	}
	return out, nil
}

func mounts(p Place) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if w := strings.Fields(sc.Text()); len(w) > 4 && (strings.HasPrefix(w[4], p.Dir+"/") || strings.HasPrefix(w[4], p.Run+"/")) {
			out = append(out, w[4])
		}
	}
	return out, nil
}

func sockets(p Place) ([]string, error) {
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		w := strings.Fields(line)
		// Num RefCount Protocol Flags Type St Inode Path; Flags has bit 16 for a listener (proc_pid_net(5)).
		if len(w) == 8 && w[3] == "00010000" && (strings.HasPrefix(w[7], p.Dir+"/") || strings.HasPrefix(w[7], p.Run+"/")) {
			out = append(out, w[7])
		}
	}
	return out, nil
}

// links of a name space ("" is the host's) whose alias begins with prefix.
func links(ctx context.Context, ns, prefix string) ([]string, error) {
	args := []string{"-j", "link", "show"}
	if ns != "" {
		args = append([]string{"-n", ns}, args...)
	}
	b, err := exec.CommandContext(ctx, "ip", args...).Output()
	if err != nil {
		return nil, fmt.Errorf("ip %s: %w", strings.Join(args, " "), err)
	}
	var list []struct {
		Name  string `json:"ifname"`
		Alias string `json:"ifalias"`
	}
	if len(b) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("ip %s: %w", strings.Join(args, " "), err)
	}
	var out []string
	for _, l := range list {
		if strings.HasPrefix(l.Alias, prefix) {
			out = append(out, l.Name)
		}
	}
	return out, nil
}

// files of mvirt's users in the places where programs leave files, outside of any system's own directories.
func files(p Place) []string {
	uids := map[uint32]bool{}
	for _, n := range Users() {
		if u, err := user.Lookup(n); err == nil {
			if id, err := strconv.ParseUint(u.Uid, 10, 32); err == nil && id != 0 {
				uids[uint32(id)] = true
			}
		}
	}
	var out []string
	for _, dir := range []string{"/tmp", "/var/tmp", "/run", "/dev/shm", "/var/lib"} {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // gone meanwhile, or not ours to see
			}
			if d.IsDir() && (path == "/run/user" || strings.HasPrefix(path, "/var/lib/mvirt") || strings.HasPrefix(path, "/run/mvirt") || strings.HasPrefix(path, "/tmp/") && strings.Count(path, "/") > 3) {
				return fs.SkipDir
			}
			if info, err := d.Info(); err == nil && uids[info.Sys().(*syscall.Stat_t).Uid] && info.ModTime().After(birth(p)) {
				out = append(out, path)
			}
			return nil
		})
	}
	return out
}

// birth is when the system's directory was made; what is older is not of this system.
func birth(p Place) time.Time {
	st, err := os.Stat(filepath.Join(p.Dir, "mvirt.toml"))
	if err != nil {
		return time.Now()
	}
	return st.ModTime()
}

// Sweep removes everything that a system at p left: processes first, mvirtd before what it would restart. It
// gives what it found, in words.
func Sweep(ctx context.Context, p Place) ([]string, error) {
	first, err := Owned(ctx, p)
	if err != nil {
		return nil, err
	}
	found := first.List()
	for round := 0; ; round++ {
		list, err := processes(p)
		if err != nil {
			return found, err
		}
		if len(list) == 0 {
			break
		}
		if round == 100 {
			return found, fmt.Errorf("these processes do not end: %v", list)
		}
		slices.SortStableFunc(list, func(a, b Process) int { return strings.Compare(order(a), order(b)) })
		for _, q := range list {
			if err := kill(p, q.PID); err != nil {
				return found, err
			}
		}
	}
	var errList []error
	for _, l := range first.Links {
		args := []string{"link", "del", l}
		if ns, name, ok := strings.Cut(l, "/"); ok {
			args = []string{"-n", ns, "link", "del", name}
		}
		_ = exec.CommandContext(ctx, "ip", args...).Run() // one end of a pair takes the other along
	}
	for _, ns := range first.Namespaces {
		if out, err := exec.CommandContext(ctx, "ip", "netns", "del", ns).CombinedOutput(); err != nil {
			errList = append(errList, fmt.Errorf("ip netns del %s: %w: %s", ns, err, out))
		}
	}
	for _, t := range first.Tables {
		if out, err := exec.CommandContext(ctx, "nft", append([]string{"delete", "table"}, strings.Fields(t)...)...).CombinedOutput(); err != nil {
			errList = append(errList, fmt.Errorf("nft delete table %s: %w: %s", t, err, out))
		}
	}
	for _, m := range first.Mounts {
		errList = append(errList, unix.Unmount(m, unix.MNT_DETACH))
	}
	errList = append(errList, os.RemoveAll(p.Dir), os.RemoveAll(p.Run))
	return found, errors.Join(errList...)
}

func order(p Process) string {
	if p.Name == "mvirtd" {
		return "0"
	}
	return "1" + p.Name
}

// kill ends one process of the place, and waits until it has ended. It is held by a descriptor while its
// identity is looked at again: the number alone could by now be somebody else's.
func kill(p Place, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(fd)
	list, err := processes(p)
	if err != nil || !slices.ContainsFunc(list, func(q Process) bool { return q.PID == pid }) {
		return err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing %d: %w", pid, err)
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(poll, 5000); !errors.Is(err, unix.EINTR) {
			return nil
		}
	}
}
