package pool

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/zfscmd"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

// volmode keeps the kernel from looking for partitions on what a guest writes.
const volmode = "volmode=dev"

// hidden is the name of the snapshot through which a volume is cloned from another; it is given up at once
// and goes with the clone.
func hidden(id string) string { return "@.clone-" + id }

// isHidden tells whether name is a snapshot of hidden, also of a second one (see unused).
func isHidden(name, id string) bool { return strings.Contains(name, hidden(id)) }

// roundUp makes size a multiple of a block: ZFS takes no other volume sizes.
func roundUp(size uint64, block uint32) uint64 {
	b := uint64(block)
	return (size + b - 1) / b * b
}

// Create makes an object. A clone is one command, which the kernel does wholly or not at all; what takes
// several begins in .tmp and is renamed when it is whole.
func (b *Backend) Create(ctx context.Context, o storagekit.Object, from *storagekit.Object) (storagekit.Object, error) {
	if from == nil {
		return b.createEmpty(ctx, o)
	}
	source, err := b.find(ctx, *from)
	if err != nil {
		return o, err
	}
	switch o.Kind {
	case storagekit.KindSnapshot:
		return b.createSnapshot(ctx, o, source)
	case storagekit.KindTemplate:
		return b.createTemplate(ctx, o, source)
	}
	if o.BlockSize != 0 && from.BlockSize != 0 && o.BlockSize != from.BlockSize {
		return o, errs.Field("block_size", fmt.Sprintf("leave it out, or give %d", from.BlockSize),
			"a clone has the block size of its source")
	}
	o.BlockSize = max(from.BlockSize, 512)
	o.Size = roundUp(o.Size, o.BlockSize)
	var snapshot string
	switch from.Kind {
	case storagekit.KindTemplate:
		snapshot = source + image
	case storagekit.KindSnapshot:
		snapshot = source
	default:
		snapshot, err = b.unused(func(n string) (string, error) {
			name := source + hidden(o.ID) + n
			return name, b.zfs.Change(ctx, "zfs", "snapshot", "-o", propKind+"="+kindGone, name)
		})
		if err != nil {
			return o, zfscmd.Kinded(err, "cannot take a snapshot of "+from.Name)
		}
		b.step("zfs:create:hidden")
	}
	props, err := properties(o)
	if err != nil {
		return o, err
	}
	args := append([]string{"zfs", "clone", "-o", volmode}, props...)
	home := b.home(o.Kind, o.Name)
	if err := b.zfs.Change(ctx, append(args, snapshot, home)...); err != nil {
		return o, zfscmd.Kinded(err, "cannot clone "+from.Name)
	}
	b.step("zfs:create:cloned")
	if o.Size != from.Size {
		// Not by zfs clone -o: udev may have the new device open by then, and the clone is left half-made.
		if err := b.zfs.Change(ctx, "zfs", "set", "volsize="+strconv.FormatUint(o.Size, 10), home); err != nil {
			return o, zfscmd.Kinded(err, "cannot enlarge the clone")
		}
		b.step("zfs:create:enlarged")
	}
	if from.Kind == storagekit.KindVolume {
		if err := b.zfs.Change(ctx, "zfs", "destroy", "-d", snapshot); err != nil {
			return o, zfscmd.Kinded(err, "cannot give up a snapshot")
		}
	}
	b.made(o, home)
	return o, nil
}

// made notes where a new object is and how: it need not be looked at to be shown.
func (b *Backend) made(o storagekit.Object, name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.where[o.ID] = name
	b.fresh[o.ID] = storagekit.Facts{Size: o.Size, BlockSize: o.BlockSize}
}

func (b *Backend) createEmpty(ctx context.Context, o storagekit.Object) (storagekit.Object, error) {
	if o.BlockSize == 0 {
		o.BlockSize = b.blockSize
	}
	if err := checkBlockSize(o.BlockSize); err != nil {
		return o, err
	}
	o.Size = roundUp(o.Size, o.BlockSize)
	tmp, home := b.dataset(tmpDataset, o.ID), b.home(o.Kind, o.Name)
	if err := b.createZvol(ctx, tmp, o, o.Size); err != nil {
		return o, zfscmd.Kinded(err, "cannot make the "+o.Kind)
	}
	b.step("zfs:create:made")
	if err := b.zfs.Change(ctx, "zfs", "rename", tmp, home); err != nil {
		return o, zfscmd.Kinded(err, "cannot name the "+o.Kind)
	}
	b.step("zfs:create:renamed")
	b.made(o, home)
	return o, nil
}

func (b *Backend) createZvol(ctx context.Context, name string, o storagekit.Object, size uint64) error {
	props, err := properties(o)
	if err != nil {
		return err
	}
	args := append([]string{"zfs", "create", "-s", "-b", strconv.FormatUint(uint64(o.BlockSize), 10), "-V", strconv.FormatUint(size, 10),
		"-o", volmode}, props...)
	return b.zfs.Change(ctx, append(args, name)...)
}

func (b *Backend) createSnapshot(ctx context.Context, o storagekit.Object, source string) (storagekit.Object, error) {
	props, err := properties(o)
	if err != nil {
		return o, err
	}
	name := source + "@" + o.Name
	if err := b.zfs.Change(ctx, append(append([]string{"zfs", "snapshot"}, props...), name)...); err != nil {
		return o, zfscmd.Kinded(err, "cannot take the snapshot")
	}
	b.step("zfs:create:snapshot")
	b.made(o, name)
	return o, nil
}

// createTemplate clones a snapshot, freezes the clone and puts it in its place.
func (b *Backend) createTemplate(ctx context.Context, o storagekit.Object, source string) (storagekit.Object, error) {
	tmp := b.dataset(tmpDataset, o.ID)
	if err := b.zfs.Change(ctx, "zfs", "clone", "-o", volmode, source, tmp); err != nil {
		return o, zfscmd.Kinded(err, "cannot clone the snapshot")
	}
	b.step("zfs:create:cloned")
	return o, b.freeze(ctx, o)
}

// freeze makes a template of .tmp/<id>, and is what is left to do of it when some is done.
func (b *Backend) freeze(ctx context.Context, o storagekit.Object) error {
	tmp, home := b.dataset(tmpDataset, o.ID), b.home(o.Kind, o.Name)
	set, err := settings(o)
	if err != nil {
		return err
	}
	if err := b.zfs.Change(ctx, append(append([]string{"zfs", "set", "readonly=on"}, set...), tmp)...); err != nil {
		return zfscmd.Kinded(err, "cannot make the template")
	}
	b.step("zfs:freeze:set")
	if err := b.zfs.Change(ctx, "zfs", "snapshot", tmp+image); err != nil && !zfscmd.Is(err, zfscmd.Exists) {
		return zfscmd.Kinded(err, "cannot make the template")
	}
	b.step("zfs:freeze:snapshot")
	if err := b.zfs.Change(ctx, "zfs", "rename", tmp, home); err != nil {
		return zfscmd.Kinded(err, "cannot name the template")
	}
	b.step("zfs:freeze:renamed")
	b.put(o.ID, home)
	return nil
}

// Undo removes what a create or an import made.
func (b *Backend) Undo(ctx context.Context, o storagekit.Object) error {
	rows, err := b.zfs.List(context.WithoutCancel(ctx), "zfs", "list", "-H", "-p", "-r", "-t", "volume,snapshot",
		"-o", "name,"+propID+","+propKind+",origin", b.pool)
	if err != nil {
		return zfscmd.Kinded(err, "cannot list the pool")
	}
	ids := map[string]string{}
	for _, r := range rows {
		ids[r[0]] = r[1]
	}
	var doomed []string
	for _, r := range rows {
		name, id, kind, origin := r[0], r[1], r[2], r[3]
		switch {
		case name == b.dataset(tmpDataset, o.ID):
		case isHidden(name, o.ID):
		case b.ours(row{name, id, kind}) && id == o.ID && kind == o.Kind && b.depth(name):
		case name == b.home(o.Kind, o.Name) && id == "-" && origin != "-" && (ids[origin] == o.OriginID || isHidden(origin, o.ID)):
			// A host that died between the two halves of a clone leaves it without properties.
		default:
			continue
		}
		doomed = append(doomed, name)
	}
	// Volumes before the hidden snapshots that they are clones of.
	slices.SortFunc(doomed, func(x, y string) int { return strings.Count(x, "@") - strings.Count(y, "@") })
	for _, name := range doomed {
		// A hidden snapshot may be that of something else with this id, which was deleted and has clones.
		args := []string{"zfs", "destroy", "-d", name}
		if !strings.Contains(name, "@") {
			args = []string{"zfs", "destroy", "-r", name} // with the @img that it may have
		}
		if err := b.zfs.Change(ctx, args...); err != nil && !zfscmd.Is(err, zfscmd.NotFound) {
			return zfscmd.Kinded(err, "cannot remove what is left of a "+o.Kind)
		}
		b.step("zfs:undo")
	}
	b.forget(o.ID)
	return nil
}

// Resize makes a volume larger.
func (b *Backend) Resize(ctx context.Context, o storagekit.Object, size uint64) error {
	name, err := b.sure(ctx, o)
	if err != nil {
		return err
	}
	o.Size = roundUp(size, max(o.BlockSize, 512))
	set, err := settings(o)
	if err != nil {
		return err
	}
	return zfscmd.Kinded(b.zfs.Change(ctx, "zfs", "set", "volsize="+strconv.FormatUint(o.Size, 10), set[2], name), "cannot resize the volume")
}

// Rename renames the dataset; its snapshots go with it.
func (b *Backend) Rename(ctx context.Context, o storagekit.Object, name string) error {
	if err := b.reload(ctx); err != nil { // after a crash it may have its new name already
		return err
	}
	from, err := b.find(ctx, o)
	if err != nil {
		return err
	}
	to := b.home(o.Kind, name)
	if from != to {
		if err := b.zfs.Change(ctx, "zfs", "rename", from, to); err != nil {
			return zfscmd.Kinded(err, "cannot rename the "+o.Kind)
		}
		b.step("zfs:rename:renamed")
		b.moved(from, to)
	}
	o.Name = name
	return b.Save(ctx, o)
}

// moved notes that a dataset and its snapshots have another name.
func (b *Backend) moved(from, to string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, name := range b.where {
		if rest, ok := strings.CutPrefix(name, from); ok && (rest == "" || rest[0] == '@') {
			b.where[id] = to + rest
		}
	}
}

// OpenTarget makes the zvol of an import; its size is a guess while the image's is not known.
func (b *Backend) OpenTarget(ctx context.Context, o storagekit.Object, size int64) (storagekit.Target, error) {
	const guess = 1 << 30
	if size < 0 {
		size = guess
	}
	tmp := b.dataset(tmpDataset, o.ID)
	if err := b.zfs.Change(ctx, "zfs", "destroy", "-r", tmp); err != nil && !zfscmd.Is(err, zfscmd.NotFound) {
		return storagekit.Target{}, zfscmd.Kinded(err, "cannot begin again")
	}
	o.BlockSize = b.blockSize
	o.Size = roundUp(uint64(size), o.BlockSize)
	if err := b.createZvol(ctx, tmp, o, o.Size); err != nil {
		return storagekit.Target{}, zfscmd.Kinded(err, "cannot make the template's volume")
	}
	f, err := b.devices.Open(ctx, tmp)
	if err != nil {
		return storagekit.Target{}, err
	}
	set := func(size int64) error {
		return zfscmd.Kinded(b.zfs.Change(ctx, "zfs", "set", "volsize="+strconv.FormatInt(size, 10), tmp), "cannot size the template's volume")
	}
	now := int64(o.Size)
	return storagekit.Target{File: f, Size: now, Block: true,
		Grow: func(size int64) (int64, error) {
			next := int64(roundUp(uint64(max(size, 2*now)), o.BlockSize))
			if err := set(next); err != nil {
				return 0, err
			}
			now = next
			return now, nil
		},
		Settle: func(size int64) error {
			final := int64(roundUp(uint64(size), o.BlockSize))
			if final == now {
				return nil
			}
			return set(final)
		},
	}, nil
}

// Finish makes the written volume a template, or finds that it is one.
func (b *Backend) Finish(ctx context.Context, o storagekit.Object) error {
	if o.BlockSize == 0 {
		o.BlockSize = b.blockSize
	}
	_, err := b.zfs.List(ctx, "zfs", "list", "-H", "-o", "name", b.dataset(tmpDataset, o.ID))
	if zfscmd.Is(err, zfscmd.NotFound) {
		if err := b.reload(ctx); err != nil {
			return err
		}
		if _, err := b.find(ctx, o); err == nil {
			return nil
		}
	}
	if err != nil {
		return zfscmd.Kinded(err, "cannot look at the imported volume")
	}
	return b.freeze(ctx, o)
}

// Sweep removes from .tmp what nobody waits for, and what was deleted and has no clones any more.
func (b *Backend) Sweep(ctx context.Context, keep func(string) bool) error {
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-r", "-d", "1", "-t", "volume", "-o", "name", b.dataset(tmpDataset))
	if err != nil {
		return zfscmd.Kinded(err, "cannot list what is unfinished")
	}
	for _, r := range rows {
		id := strings.TrimPrefix(r[0], b.dataset(tmpDataset)+"/")
		if ident.CheckID("id", id) != nil || keep(id) {
			continue
		}
		if err := b.zfs.Change(ctx, "zfs", "destroy", "-r", r[0]); err != nil && !zfscmd.Is(err, zfscmd.Clones) {
			return zfscmd.Kinded(err, "cannot sweep")
		}
	}
	b.collect(ctx)
	return b.sweepStaging(keep)
}
