package ch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/chapi"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
)

// Files of a snapshot, as cloud-hypervisor calls them.
const (
	snapConfig = "config.json"
	snapState  = "state.json"
	snapMemory = "memory-ranges"

	maxSnapJSON = 64 << 20 // bytes; honest ones are some 100 kB
)

// Snapshot writes memory and devices of a paused guest.
func (i *instance) Snapshot(ctx context.Context, dir string) (json.RawMessage, error) {
	if err := i.c.Put(ctx, "vm.snapshot", chapi.Snapshot{Destination: "file://" + dir}, nil); err != nil {
		return nil, err
	}
	return json.Marshal(i.state)
}

// prepareRestore makes in m.Restore.Work a snapshot like the one in m.Restore.Dir whose paths and ids are this
// VM's: a VM is restored under a new id, and its volumes and NICs may be elsewhere than they were. The memory
// is linked. It says whether the guest's memory is shared.
func prepareRestore(d *Driver, m vmmkit.Machine) (sharedMemory bool, err error) {
	r := m.Restore
	raw, err := readSmall(filepath.Join(r.Dir, snapConfig))
	if err != nil {
		return false, errs.Wrap(errs.Corrupt, err, "the snapshot's configuration cannot be read")
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber() // a float64 would round
	var cfg map[string]any
	if err := dec.Decode(&cfg); err != nil {
		return false, errs.Wrap(errs.Corrupt, err, "the snapshot's configuration is damaged")
	}
	if sharedMemory, err = rewrite(cfg, d, m); err != nil {
		return false, err
	}
	if raw, err = json.Marshal(cfg); err != nil {
		return false, err
	}
	dev, err := readSmall(filepath.Join(r.Dir, snapState))
	if err != nil {
		return false, errs.Wrap(errs.Corrupt, err, "the snapshot's device state cannot be read")
	}
	// Ids of NICs are UUIDs with a word before: nothing else looks like one, and they are all of one length. All
	// are renamed at once, so that two that change places do not meet.
	var pairs [][2]string
	for k, n := range r.Spec.NICs {
		pairs = append(pairs, [2]string{nicID(n.NICID), nicID(m.NICs[k].NICID)})
	}
	dev = rename(dev, pairs)
	err = errors.Join(os.WriteFile(filepath.Join(r.Work, snapConfig), raw, 0o600), os.WriteFile(filepath.Join(r.Work, snapState), dev, 0o600))
	if err != nil {
		return false, errs.Wrap(errs.Unknown, err, "the snapshot cannot be made ready")
	}
	if err := giveMemory(filepath.Join(r.Dir, snapMemory), filepath.Join(r.Work, snapMemory), m.RunAs.UID); err != nil {
		return false, err
	}
	return sharedMemory, nil
}

// giveMemory makes a snapshot's memory readable for a hypervisor of uid at dst. Who wrote it, or we, may have it
// linked; the hypervisor of another VM has another uid, and gets a copy, which shares blocks where the file
// system can.
func giveMemory(src, dst string, uid uint32) error {
	in, err := os.Open(src)
	if err != nil {
		return errs.Wrap(errs.Corrupt, err, "the snapshot has no memory")
	}
	defer in.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(in.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Uid == uid && os.Link(src, dst) == nil {
		return nil
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		return errs.Wrap(errs.Unknown, err, "the snapshot's memory cannot be copied for the VM")
	}
	return nil
}

func rename(b []byte, pairs [][2]string) []byte {
	var out bytes.Buffer
	for len(b) > 0 {
		at, which := len(b), -1
		for k, p := range pairs {
			if i := bytes.Index(b[:min(len(b), at+len(p[0]))], []byte(p[0])); i >= 0 && i < at {
				at, which = i, k
			}
		}
		out.Write(b[:at])
		if which < 0 {
			break
		}
		out.WriteString(pairs[which][1])
		b = b[at+len(pairs[which][0]):]
	}
	return out.Bytes()
}

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSnapJSON+1))
	if err == nil && len(b) > maxSnapJSON {
		err = fmt.Errorf("%s: %w", path, fs.ErrInvalid)
	}
	return b, err
}

func otherShape(format string, a ...any) error {
	return errs.New(errs.Precondition, format, a...).Because("OTHER_SHAPE").Do("attach what the VM had when the snapshot was made")
}

// rewrite puts this VM's paths and ids into a configuration.
func rewrite(cfg map[string]any, d *Driver, m vmmkit.Machine) (sharedMemory bool, err error) {
	if payload, ok := cfg["payload"].(map[string]any); ok {
		set(payload, "kernel", m.Kernel)
		set(payload, "initramfs", m.Initramfs)
	}
	if platform, ok := cfg["platform"].(map[string]any); ok {
		for _, k := range []string{"system_uuid", "uuid"} {
			if platform[k] != nil {
				platform[k] = m.ID
			}
		}
	}
	disks := map[string]vmm.DiskAttachment{}
	for _, a := range m.Disks {
		disks[diskID(a.Name)] = a
	}
	for _, e := range items(cfg["disks"]) {
		id, _ := e["id"].(string)
		switch a, ok := disks[id]; {
		case ok:
			e["path"], e["readonly"] = a.Path, a.ReadOnly
			delete(e, "rate_limiter_config")
			if l := rateLimiter(a.Limit); l != nil {
				e["rate_limiter_config"] = l
			}
			delete(disks, id)
		case id == cidataID && m.CloudInit != "":
			e["path"] = m.CloudInit
		default:
			return false, otherShape("the snapshot has a disk %q, and the VM has not", id)
		}
	}
	if len(disks) > 0 {
		return false, otherShape("the VM has disks that the snapshot has not")
	}
	if sharedMemory, err = rewriteNICs(cfg, m); err != nil {
		return false, err
	}
	delete(cfg, "landlock_enable")
	delete(cfg, "landlock_rules")
	if on, rules := d.landlock(m); on {
		cfg["landlock_enable"], cfg["landlock_rules"] = true, rules
	}
	return sharedMemory, nil
}

func rewriteNICs(cfg map[string]any, m vmmkit.Machine) (sharedMemory bool, err error) {
	place := map[string]int{}
	for k, n := range m.Restore.Spec.NICs {
		place[nicID(n.NICID)] = k
	}
	memory, _ := cfg["memory"].(map[string]any)
	sharedMemory, _ = memory["shared"].(bool)
	for _, e := range items(cfg["net"]) {
		id, _ := e["id"].(string)
		k, ok := place[id]
		if !ok || k >= len(m.NICs) {
			return false, otherShape("the snapshot has a NIC %q, and the VM has not", id)
		}
		delete(place, id)
		n := netConfig(m.NICs[k])
		was, _ := e["vhost_user"].(bool)
		queues, _ := e["num_queues"].(json.Number)
		switch {
		case was != n.VhostUser:
			return false, otherShape("the network was on another data path (vhost-user or TAP) when the snapshot was made")
		case queues.String() != fmt.Sprint(n.NumQueues):
			return false, otherShape("NIC %s has %d queues, and had %s when the snapshot was made", m.NICs[k].NICID, n.NumQueues, queues)
		}
		e["id"], e["mac"] = n.ID, n.MAC
		set(e, "tap", n.TAP)
		set(e, "vhost_socket", n.VhostSocket)
		delete(e, "fds")
		if fds := len(m.NICs[k].TAP); fds > 0 {
			none := make([]int, fds)
			for j := range none {
				none[j] = -1 // what stands for a descriptor that will come
			}
			e["fds"] = none
		}
	}
	if len(place) > 0 {
		return false, otherShape("the VM has NICs that the snapshot has not")
	}
	return sharedMemory, nil
}

func set(m map[string]any, key, value string) {
	delete(m, key)
	if value != "" {
		m[key] = value
	}
}

func items(v any) []map[string]any {
	list, _ := v.([]any)
	var all []map[string]any
	for _, e := range list {
		if m, ok := e.(map[string]any); ok {
			all = append(all, m)
		}
	}
	return all
}

// restore makes the VM of a snapshot that Prepare has made ready. It is paused afterwards.
func (i *instance) restore(ctx context.Context, m vmmkit.Machine) error {
	req := chapi.Restore{Source: "file://" + m.Restore.Work}
	var files []*os.File
	for _, n := range m.NICs {
		if len(n.TAP) > 0 {
			req.NetFDs = append(req.NetFDs, chapi.RestoredNet{ID: nicID(n.NICID), NumFDs: len(n.TAP)})
			files = append(files, n.TAP...)
		}
	}
	return i.c.Put(ctx, "vm.restore", req, nil, files...)
}
