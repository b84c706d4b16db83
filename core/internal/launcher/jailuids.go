package launcher

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/jail"
)

// uids says which VM's hypervisor runs under which uid, durably: one file a VM in a directory of root's, named by
// the VM's id, holding the number. A uid is given to one VM only; those that were given back come last, so that
// what an old VM may have left is nobody's for as long as possible. Safe for concurrent use.
type uids struct {
	dir         *os.File
	base, count uint32

	mu    sync.Mutex // guards what follows, and is held while a file is written
	byVM  map[string]uint32
	byUID map[uint32]string
	next  uint32 // offset to begin to look at
}

// openUIDs opens the directory, and refuses a range that somebody has a part of.
func openUIDs(c *config.Jail, t trust) (*uids, error) {
	u := &uids{base: c.UIDBase, count: c.UIDCount, byVM: map[string]uint32{}, byUID: map[uint32]string{}}
	if err := u.unclaimed("/etc/passwd"); err != nil {
		return nil, err
	}
	if err := u.unclaimed("/etc/group"); err != nil {
		return nil, err
	}
	d, err := ensureDir(c.StateDir, identity{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, 0o700, t)
	if err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "jail.state_dir")
	}
	u.dir = d
	if err := u.load(true); err != nil {
		d.Close()
		return nil, err
	}
	return u, nil
}

// unclaimed looks for accounts within the range: column 3 of both files is the number.
func (u *uids) unclaimed(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		w := strings.Split(sc.Text(), ":")
		if len(w) < 3 {
			continue
		}
		if n, err := strconv.ParseUint(w[2], 10, 32); err == nil && u.has(uint32(n)) {
			return errs.New(errs.Precondition, "jail.uid_base: %s of %s has the number %d, which lies within the range of VMs", w[0], path, n).
				Because("UID_RANGE_TAKEN").Do("choose another uid_base in [jail]")
		}
	}
	return nil
}

func (u *uids) has(uid uint32) bool { return uid >= u.base && uid-u.base < u.count }

// load reads the files; clean removes those that were half written.
func (u *uids) load(clean bool) error {
	names, err := u.dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("reading %s: %w", u.dir.Name(), err)
	}
	for _, n := range names {
		if ident.CheckID("vm", n) != nil {
			if clean {
				_ = unix.Unlinkat(int(u.dir.Fd()), n, 0)
			}
			continue
		}
		text, err := os.ReadFile(filepath.Join(u.dir.Name(), n))
		if err != nil {
			return err
		}
		uid, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32)
		other := u.byUID[uint32(uid)]
		if err != nil || uid < 1<<16 || other != "" {
			return errs.New(errs.Corrupt, "%s does not hold a uid of its own (%.20q)", filepath.Join(u.dir.Name(), n), text).
				Do("end the VM's hypervisor and remove the file: the VM then gets another uid")
		}
		u.byVM[n], u.byUID[uint32(uid)] = uint32(uid), n
		if u.has(uint32(uid)) {
			u.next = max(u.next, uint32(uid)-u.base+1)
		}
	}
	return nil
}

// of is a VM's uid, if it has one.
func (u *uids) of(vm string) (uint32, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	uid, ok := u.byVM[vm]
	return uid, ok
}

// give is a VM's uid, a new one if it has none.
func (u *uids) give(vm string) (uint32, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if uid, ok := u.byVM[vm]; ok {
		return uid, nil
	}
	for i := range u.count {
		at := (u.next + i) % u.count
		uid := u.base + at
		if u.byUID[uid] != "" {
			continue
		}
		if err := u.write(vm, uid); err != nil {
			return 0, err
		}
		u.byVM[vm], u.byUID[uid] = uid, vm
		u.next = at + 1
		return uid, nil
	}
	return 0, errs.New(errs.Exhausted, "all %d uids for VMs are given out", u.count).Do("raise uid_count in [jail], or remove VMs")
}

// write makes the file of a VM, wholly or not at all.
func (u *uids) write(vm string, uid uint32) error {
	tmp := "." + vm
	dir := int(u.dir.Fd())
	fd, err := unix.Openat(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Join(u.dir.Name(), tmp), Err: err}
	}
	f := os.NewFile(uintptr(fd), tmp)
	_, err = fmt.Fprintln(f, uid)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = unix.Renameat(dir, tmp, dir, vm)
	}
	if err == nil {
		err = u.dir.Sync()
	}
	return errs.Wrap(errs.Unknown, err, "the uid of VM %s cannot be kept", vm)
}

// forget gives a VM's uid back, unless a process has it.
func (u *uids) forget(vm string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	uid, ok := u.byVM[vm]
	if !ok {
		return nil
	}
	if pids := processesOf(uid); len(pids) > 0 {
		return errs.New(errs.Precondition, "process %d still has the uid %d of VM %s", pids[0], uid, vm).Because("UID_IN_USE").
			Do("stop the VM first")
	}
	if err := unix.Unlinkat(int(u.dir.Fd()), vm, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unlink", Path: filepath.Join(u.dir.Name(), vm), Err: err}
	}
	delete(u.byVM, vm)
	delete(u.byUID, uid)
	return u.dir.Sync()
}

// list gives all VMs with uids, by id.
func (u *uids) list() []jail.VM {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := make([]jail.VM, 0, len(u.byVM))
	for id, uid := range u.byVM {
		out = append(out, jail.VM{ID: id, UID: uid})
	}
	slices.SortFunc(out, func(a, b jail.VM) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// processesOf lists the processes that have a uid as one of their four.
func processesOf(uid uint32) (pids []int) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	names, _ := d.Readdirnames(-1)
	d.Close()
	for _, n := range names {
		pid, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		if has, state, err := uidsOf(pid); err == nil && state != 'Z' && slices.Contains(has[:], uid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// uidsOf reads a process's real, effective, saved and file system uid, and its state.
func uidsOf(pid int) (has [4]uint32, state byte, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return has, 0, err
	}
	found := 0
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "State:\t"); ok && rest != "" {
			state = rest[0]
		}
		if rest, ok := strings.CutPrefix(line, "Uid:\t"); ok {
			found, err = fmt.Sscan(rest, &has[0], &has[1], &has[2], &has[3])
			break
		}
	}
	if err == nil && found != 4 {
		err = fmt.Errorf("/proc/%d/status has no line Uid", pid)
	}
	return has, state, err
}
