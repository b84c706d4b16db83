package pool

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/zfscmd"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/posixacl"
)

// Devices finds the device nodes of zvols.
type Devices interface {
	// Node waits, bounded, until the node is there and returns its real path; without wait it returns
	// fs.ErrNotExist at once.
	Node(ctx context.Context, dataset string, wait bool) (string, error)
	// Open opens it to read and write, alone.
	Open(ctx context.Context, dataset string) (*os.File, error)
}

// deviceWait bounds the wait for udev: it needs milliseconds, on a host that starts a few seconds.
const (
	deviceWait  = 15 * time.Second
	devicePause = 20 * time.Millisecond
)

// systemDevices are those of the running kernel.
type systemDevices struct{ wait time.Duration }

var zvolNode = regexp.MustCompile(`^zd[0-9]+$`)

// blkZName is BLKZNAME of OpenZFS (include/sys/fs/zfs.h): _IOR(0x12, 125, char[256]). The kernel module says
// which dataset a node is of; links in /dev/zvol may lag behind a rename, or be absent.
const blkZName = 2<<30 | 256<<16 | 0x12<<8 | 125

func nodeIs(path, dataset string) bool {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	var name [256]byte
	if _, _, no := unix.Syscall(unix.SYS_IOCTL, f.Fd(), blkZName, uintptr(unsafe.Pointer(&name))); no != 0 {
		return false
	}
	got, _, _ := strings.Cut(string(name[:]), "\x00")
	return got == dataset
}

func lookUp(dataset string) (string, bool) {
	if path, err := filepath.EvalSymlinks(filepath.Join("/dev/zvol", dataset)); err == nil && nodeIs(path, dataset) {
		return path, true
	}
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return "", false
	}
	for _, e := range entries {
		if path := "/dev/" + e.Name(); zvolNode.MatchString(e.Name()) && nodeIs(path, dataset) {
			return path, true
		}
	}
	return "", false
}

func (d systemDevices) Node(ctx context.Context, dataset string, wait bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, d.wait)
	defer cancel()
	t := time.NewTicker(devicePause)
	defer t.Stop()
	for {
		if path, ok := lookUp(dataset); ok {
			return path, nil
		}
		if !wait {
			return "", fs.ErrNotExist
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return "", ctx.Err()
			}
			return "", errs.New(errs.Unavailable, "the device node of %s did not appear in %v", dataset, d.wait).Because("NO_DEVICE").
				Do("check that udev runs and that volmode of the pool's volumes is not none")
		}
	}
}

func (d systemDevices) Open(ctx context.Context, dataset string) (*os.File, error) {
	path, err := d.Node(ctx, dataset, true)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(d.wait)
	for {
		// O_EXCL on a block device: nobody else may have it open in this way, or mounted (open(2)).
		f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL, 0)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return nil, errs.Wrap(errs.Unavailable, err, "cannot open the device of %s", dataset)
		}
		select {
		case <-time.After(devicePause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Grant puts an entry for uid into the ACL of the real device node.
func (b *Backend) Grant(ctx context.Context, o storagekit.Object, uid uint32, readOnly bool) (storagekit.Device, error) {
	name, err := b.sure(ctx, o)
	if err != nil {
		return storagekit.Device{}, err
	}
	node, err := b.devices.Node(ctx, name, true)
	if err != nil {
		return storagekit.Device{}, err
	}
	dev := storagekit.Device{Path: node, Block: true}
	if uid == 0 {
		return dev, nil
	}
	perm := uint16(posixacl.Read | posixacl.Write)
	if readOnly {
		perm = posixacl.Read
	}
	if err := posixacl.Grant(node, uid, perm); err != nil {
		return dev, &errs.Error{Kind: errs.Precondition, Reason: "ACCESS_IMPOSSIBLE", Err: err, Message: "cannot give the VM's user access to the volume",
			Remedy: "check that /dev is a devtmpfs with POSIX ACLs (CONFIG_TMPFS_POSIX_ACL)"}
	}
	b.step("zfs:grant")
	return dev, nil
}

// Revoke takes the entry away. A volume without a node has none.
func (b *Backend) Revoke(ctx context.Context, o storagekit.Object, uid uint32) error {
	if uid == 0 {
		return nil
	}
	name, err := b.sure(ctx, o)
	if isCorrupt(err) {
		return nil
	}
	if err != nil {
		return err
	}
	node, err := b.devices.Node(ctx, name, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := posixacl.Revoke(node, uid); err != nil {
		return errs.Wrap(errs.Internal, err, "cannot take the VM's access away")
	}
	b.step("zfs:revoke")
	return nil
}

// Inspect asks for all objects in one command.
func (b *Backend) Inspect(ctx context.Context, objects []storagekit.Object) (map[string]storagekit.Facts, error) {
	out := make(map[string]storagekit.Facts, len(objects))
	if len(objects) == 0 {
		return out, nil
	}
	if len(objects) == 1 {
		b.mu.Lock()
		f, ok := b.fresh[objects[0].ID]
		delete(b.fresh, objects[0].ID)
		b.mu.Unlock()
		if ok {
			out[objects[0].ID] = f
			return out, nil
		}
	}
	types := map[string]bool{}
	for _, o := range objects {
		switch o.Kind {
		case storagekit.KindVolume:
			types["volume"] = true
		case storagekit.KindSnapshot:
			types["snapshot"] = true
		case storagekit.KindTemplate:
			types["volume"], types["snapshot"] = true, true // clones are told by @img
		}
	}
	var list []string
	for _, t := range []string{"volume", "snapshot"} {
		if types[t] {
			list = append(list, t)
		}
	}
	args := []string{"zfs", "list", "-H", "-p", "-r", "-t", strings.Join(list, ","), "-o",
		"name," + propID + "," + propKind + ",volsize,volblocksize,used,usedbydataset,clones", b.pool}
	if len(objects) == 1 {
		name, err := b.find(ctx, objects[0])
		if isCorrupt(err) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		args[len(args)-1] = name
	}
	rows, err := b.zfs.List(ctx, args...)
	if zfscmd.Is(err, zfscmd.NotFound) && len(objects) == 1 {
		rows, err = nil, nil
	}
	if err != nil {
		return nil, zfscmd.Kinded(err, "cannot list the pool")
	}
	clones := map[string]uint32{}
	facts := map[string]storagekit.Facts{}
	for _, r := range rows {
		if len(r) != 8 || !b.depth(r[0]) {
			continue
		}
		if t, ok := strings.CutSuffix(r[0], image); ok && r[2] == storagekit.KindTemplate {
			if r[7] != "" && r[7] != "-" {
				clones[t] = uint32(strings.Count(r[7], ",") + 1)
			}
			continue
		}
		if !b.ours(row{r[0], r[1], r[2]}) {
			continue
		}
		f := storagekit.Facts{Size: number(r[3]), Allocated: number(r[6]), BlockSize: uint32(number(r[4]))}
		if r[2] == storagekit.KindSnapshot {
			f.Allocated = number(r[5])
		}
		facts[r[1]] = f
		b.put(r[1], r[0])
	}
	for _, o := range objects {
		f, ok := facts[o.ID]
		if !ok {
			continue
		}
		if o.Kind == storagekit.KindTemplate {
			b.mu.Lock()
			f.Clones = clones[b.where[o.ID]]
			b.mu.Unlock()
		}
		out[o.ID] = f
	}
	if len(objects) == 1 && len(out) == 0 {
		// Renamed by hand, or gone: a name that is known no more leads to a look at the whole pool.
		was := args[len(args)-1]
		b.forget(objects[0].ID)
		if now, err := b.find(ctx, objects[0]); err == nil && now != was {
			return b.Inspect(ctx, objects)
		}
	}
	return out, nil
}
