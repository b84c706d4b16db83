// Package pool keeps volumes, templates and snapshots as zvols of a ZFS pool: the Backend of storage-zfs.
//
//	<pool>/.mvirt-zfs              file system with metadata.db, and staging/ for downloads
//	<pool>/<volume>                a sparse zvol
//	<pool>/<volume>@<snapshot>
//	<pool>/.templates/<name>       a zvol, read-only, cloned from its snapshot @img
//	<pool>/.tmp/<id>               what is being made, renamed into its place when it is whole
//	<pool>/.tmp/<id>.gone          what was deleted and still has clones that share its blocks
//
// User properties say what is ours and all that must be known of it, so that metadata.db can be made again:
// mvirt:kind (volume, template, snapshot, gone, internal), mvirt:id, and mvirt:object, the kit's record as
// JSON. A dataset without them, or at another depth, is not ours and is never touched.
//
// # Deleting what has clones
//
// ZFS destroys nothing that has clones, and promoting a clone would move its origin's snapshots to it, where
// they are in the way of the next deletion. So what is deleted while clones live is renamed to <id>.gone, its
// snapshots are given up (zfs destroy -d: they go with their last clone), and the rest is destroyed when
// there is no snapshot left. A snapshot that has clones is renamed to @.gone-<id> and given up in the same way.
package pool

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/zfscmd"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

// Datasets of the pool that are ours.
const (
	metaDataset      = ".mvirt-zfs"
	templatesDataset = ".templates"
	tmpDataset       = ".tmp"
	image            = "@img" // of a template
)

// Properties.
const (
	propKind   = "mvirt:kind"
	propID     = "mvirt:id"
	propObject = "mvirt:object"
	kindGone   = "gone"
	kindOwn    = "internal"
)

// maxProperty is the longest value of a user property (zfsprops(7)).
const maxProperty = 8191

// Options of a backend.
type Options struct {
	Pool      string
	BlockSize uint32 // of new volumes; 0: 16384
	Slow      int    // factor on limits of time, for a host that is emulated; 0: 1
	Run       *zfscmd.Runner
	Devices   Devices // nil: the system's
	Step      func(string)
}

// Backend is a pool. Use New.
type Backend struct {
	pool      string
	blockSize uint32
	zfs       *zfscmd.Runner
	devices   Devices
	step      func(string)

	mu    sync.Mutex
	where map[string]string // id to dataset or snapshot
	fresh map[string]storagekit.Facts
	gone  int    // deleted things that still have clones, or more
	meta  string // mount point of metaDataset
}

var (
	_ storagekit.Backend   = (*Backend)(nil)
	_ storagekit.Rebuilder = (*Backend)(nil)
)

// poolName is what zpool create takes (zpoolconcepts(7)), less blanks.
var poolName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.:-]{0,99}$`)

// New makes a backend for a pool, which need not be there yet.
func New(o Options) (*Backend, error) {
	if !poolName.MatchString(o.Pool) {
		return nil, errs.Field("pool", "give --pool NAME", "%s is no pool name", ident.Quote(o.Pool))
	}
	if o.BlockSize == 0 {
		o.BlockSize = 16384
	}
	if err := checkBlockSize(o.BlockSize); err != nil {
		return nil, err
	}
	if o.Run == nil {
		o.Run = &zfscmd.Runner{Slow: o.Slow}
	}
	if o.Devices == nil {
		o.Devices = systemDevices{wait: deviceWait * time.Duration(max(o.Slow, 1))}
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	return &Backend{pool: o.Pool, blockSize: o.BlockSize, zfs: o.Run, devices: o.Devices, step: o.Step,
		where: map[string]string{}, fresh: map[string]storagekit.Facts{}}, nil
}

func checkBlockSize(b uint32) error {
	if b < 512 || b > 128<<10 || b&(b-1) != 0 {
		return errs.Field("block_size", "use a power of two from 512 to 131072", "block_size is %d", b)
	}
	return nil
}

func (b *Backend) dataset(parts ...string) string {
	return b.pool + "/" + strings.Join(parts, "/")
}

// home is where an object of a name belongs.
func (b *Backend) home(kind, name string) string {
	if kind == storagekit.KindTemplate {
		return b.dataset(templatesDataset, name)
	}
	return b.dataset(name)
}

// Ready looks for the pool and makes our datasets in it.
func (b *Backend) Ready(ctx context.Context) (string, error) {
	health, err := b.health(ctx)
	if err != nil {
		return "", err
	}
	switch {
	case health.state == "SUSPENDED":
		return "", errs.New(errs.Unavailable, "the pool %s is suspended", b.pool).Because("POOL_SUSPENDED").
			Do("repair its devices, then zpool clear " + b.pool)
	case health.state != "ONLINE" && health.state != "DEGRADED":
		return "", errs.New(errs.Unavailable, "the pool %s is %s", b.pool, health.state).Because("POOL_FAILED").Do("look at zpool status " + b.pool)
	case health.readOnly:
		return "", errs.New(errs.Unavailable, "the pool %s is imported read-only", b.pool).Because("POOL_READONLY").
			Do("export it and import it without readonly=on")
	}
	for _, d := range []string{tmpDataset, templatesDataset} {
		if err := b.ensure(ctx, b.dataset(d), "-o", "canmount=off", "-o", "mountpoint=none"); err != nil {
			return "", err
		}
	}
	if err := b.ensure(ctx, b.dataset(metaDataset), "-o", "canmount=on"); err != nil {
		return "", err
	}
	mount, err := b.mount(ctx)
	if err != nil {
		return "", err
	}
	b.mu.Lock()
	b.meta = mount
	b.mu.Unlock()
	if err := os.MkdirAll(filepath.Join(mount, "staging"), 0o700); err != nil {
		return "", errs.Wrap(errs.Unavailable, err, "cannot use the pool's metadata file system")
	}
	if err := b.reload(ctx); err != nil {
		return "", err
	}
	return filepath.Join(mount, "metadata.db"), nil
}

// ensure makes a dataset of our own, unless it is there. One of this name that is not ours is an error.
func (b *Backend) ensure(ctx context.Context, name string, options ...string) error {
	rows, err := b.zfs.List(ctx, "zfs", "get", "-H", "-p", "-o", "value", propKind, name)
	if zfscmd.Is(err, zfscmd.NotFound) {
		args := append([]string{"zfs", "create", "-o", propKind + "=" + kindOwn}, options...)
		return zfscmd.Kinded(b.zfs.Change(ctx, append(args, name)...), "cannot make the dataset "+name)
	}
	if err != nil {
		return zfscmd.Kinded(err, "cannot look at the dataset "+name)
	}
	if len(rows) != 1 || rows[0][0] != kindOwn {
		return errs.New(errs.Precondition, "the pool has a dataset %s that is not mvirt's", name).Because("DATASET_TAKEN").
			Do("rename or remove it, or use another pool")
	}
	return nil
}

// mount finds where the metadata is mounted, and mounts it where it is not.
func (b *Backend) mount(ctx context.Context) (string, error) {
	name := b.dataset(metaDataset)
	for try := range 2 {
		rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-p", "-o", "mountpoint,mounted", name)
		if err != nil {
			return "", zfscmd.Kinded(err, "cannot look at the dataset "+name)
		}
		if len(rows) != 1 || len(rows[0]) != 2 {
			return "", errs.New(errs.Internal, "zfs list answers %q", rows)
		}
		point, mounted := rows[0][0], rows[0][1] == "yes"
		switch {
		case strings.HasPrefix(point, "/") && mounted:
			return point, os.Chmod(point, 0o700)
		case try > 0:
		case !strings.HasPrefix(point, "/"): // none or legacy, inherited
			if err := b.zfs.Change(ctx, "zfs", "set", "mountpoint=/var/lib/mvirt-zfs/"+b.pool, name); err != nil {
				return "", zfscmd.Kinded(err, "cannot mount the dataset "+name)
			}
			continue
		}
		if err := b.zfs.Change(ctx, "zfs", "mount", name); err != nil {
			return "", zfscmd.Kinded(err, "cannot mount the dataset "+name)
		}
	}
	return "", errs.New(errs.Unavailable, "the dataset %s cannot be mounted", name).Do("mount it by hand and look at what is wrong")
}

// number reads what -p prints; "-" and none are 0.
func number(s string) uint64 {
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}

// row is one line of the inventory.
type row struct {
	name, id, kind string
}

// snapshotOf splits "volume@snapshot".
func (r row) snapshotOf() (volume string, isSnapshot bool) {
	v, _, ok := strings.Cut(r.name, "@")
	return v, ok
}

// inventory lists what is ours, or may be, at the depths where that can be.
func (b *Backend) inventory(ctx context.Context) ([]row, error) {
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-p", "-r", "-t", "volume,snapshot", "-o", "name,"+propID+","+propKind, b.pool)
	if err != nil {
		return nil, zfscmd.Kinded(err, "cannot list the pool")
	}
	var out []row
	for _, r := range rows {
		if len(r) == 3 && b.depth(r[0]) {
			out = append(out, row{r[0], r[1], r[2]})
		}
	}
	return out, nil
}

// depth tells whether a dataset is where ours are: right below the pool, .templates or .tmp.
func (b *Backend) depth(name string) bool {
	name, _, _ = strings.Cut(name, "@")
	rest, ok := strings.CutPrefix(name, b.pool+"/")
	if !ok {
		return false
	}
	dir, last, nested := strings.Cut(rest, "/")
	return !nested || (dir == templatesDataset || dir == tmpDataset) && !strings.Contains(last, "/")
}

// ours tells whether a row is an object: its own properties, not those that a snapshot has from its volume.
func (b *Backend) ours(r row) bool {
	_, isSnapshot := r.snapshotOf()
	if strings.HasPrefix(r.name, b.dataset(tmpDataset)+"/") || ident.CheckID("id", r.id) != nil {
		return false
	}
	switch r.kind {
	case storagekit.KindVolume, storagekit.KindTemplate:
		return !isSnapshot
	case storagekit.KindSnapshot:
		return isSnapshot
	}
	return false
}

// reload learns where everything is.
func (b *Backend) reload(ctx context.Context) error {
	rows, err := b.inventory(ctx)
	if err != nil {
		return err
	}
	where := map[string]string{}
	gone := 0
	for _, r := range rows {
		if strings.HasSuffix(r.name, ".gone") {
			gone++
		}
		// A dataset received from elsewhere may carry the same properties: the first by name counts.
		if _, twice := where[r.id]; b.ours(r) && !twice {
			where[r.id] = r.name
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.where, b.gone = where, gone
	return nil
}

// find says where an object is, looking into the pool when that is not known.
func (b *Backend) find(ctx context.Context, o storagekit.Object) (string, error) {
	b.mu.Lock()
	name, ok := b.where[o.ID]
	b.mu.Unlock()
	if ok {
		return name, nil
	}
	if err := b.reload(ctx); err != nil {
		return "", err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if name, ok = b.where[o.ID]; ok {
		return name, nil
	}
	return "", errs.New(errs.Corrupt, "the pool has no dataset of %s %s", o.Kind, o.Name).Because("DAMAGED").
		Do("look with zfs list -o name,mvirt:id: somebody has removed it")
}

// sure is find for what must not hit another dataset: it asks the pool whether the dataset of that name is still
// the object, since an administrator may have renamed one and made another.
func (b *Backend) sure(ctx context.Context, o storagekit.Object) (string, error) {
	name, err := b.find(ctx, o)
	if err != nil {
		return "", err
	}
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-o", "name,"+propID+","+propKind, name)
	if err == nil && len(rows) == 1 && len(rows[0]) == 3 && rows[0][1] == o.ID && b.ours(row{rows[0][0], rows[0][1], rows[0][2]}) {
		return name, nil
	}
	if err != nil && !zfscmd.Is(err, zfscmd.NotFound) {
		return "", zfscmd.Kinded(err, "cannot look at the "+o.Kind)
	}
	b.forget(o.ID)
	return b.find(ctx, o)
}

func (b *Backend) put(id, name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.where[id] = name
}

func (b *Backend) forget(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.where, id)
	delete(b.fresh, id)
}

// properties are the options that make a dataset ours.
func properties(o storagekit.Object) ([]string, error) {
	j, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	if len(j) > maxProperty {
		return nil, errs.Field("labels", "use fewer or shorter labels", "the record of %s has %d bytes, ZFS keeps %d", o.Name, len(j), maxProperty)
	}
	return []string{"-o", propKind + "=" + o.Kind, "-o", propID + "=" + o.ID, "-o", propObject + "=" + string(j)}, nil
}

// settings are properties in the form that zfs set takes.
func settings(o storagekit.Object) ([]string, error) {
	p, err := properties(o)
	if err != nil {
		return nil, err
	}
	return []string{p[1], p[3], p[5]}, nil
}

// Objects lists what the pool itself knows of our objects: what metadata.db is rebuilt from.
func (b *Backend) Objects(ctx context.Context) ([]storagekit.Object, error) {
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-p", "-r", "-t", "volume,snapshot", "-o", "name,"+propID+","+propKind+","+propObject, b.pool)
	if err != nil {
		return nil, zfscmd.Kinded(err, "cannot list the pool")
	}
	var out []storagekit.Object
	seen := map[string]bool{}
	for _, r := range rows {
		if len(r) != 4 || !b.depth(r[0]) || !b.ours(row{r[0], r[1], r[2]}) || seen[r[1]] {
			continue
		}
		var o storagekit.Object
		if err := json.Unmarshal([]byte(r[3]), &o); err != nil || o.ID != r[1] || o.Kind != r[2] {
			continue // not written by us: it stays where it is
		}
		seen[o.ID] = true
		out = append(out, o)
	}
	return out, nil
}

// Save keeps the record with the dataset.
func (b *Backend) Save(ctx context.Context, o storagekit.Object) error {
	name, err := b.find(ctx, o)
	if err != nil {
		return err
	}
	set, err := settings(o)
	if err != nil {
		return err
	}
	return zfscmd.Kinded(b.zfs.Change(ctx, "zfs", "set", set[2], name), "cannot keep the record of the "+o.Kind)
}

// Staging is in the metadata's file system.
func (b *Backend) Staging() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return filepath.Join(b.meta, "staging")
}

// isCorrupt tells that an object's dataset is gone, which is what deleting it wants.
func isCorrupt(err error) bool { return errors.Is(err, errs.Corrupt) }
