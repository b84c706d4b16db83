package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/zfscmd"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

// Delete destroys an object, or hides it until its last clone is gone.
func (b *Backend) Delete(ctx context.Context, o storagekit.Object) error {
	name, err := b.sure(ctx, o)
	if isCorrupt(err) {
		b.forget(o.ID)
		return nil // it is not there
	}
	if err != nil {
		return err
	}
	if o.Kind == storagekit.KindSnapshot {
		err = b.deleteSnapshot(ctx, o, name)
	} else {
		err = b.deleteVolume(ctx, o, name)
	}
	if err != nil {
		return err
	}
	b.forget(o.ID)
	b.mu.Lock()
	gone := b.gone
	b.mu.Unlock()
	if gone > 0 {
		b.collect(ctx)
	}
	return nil
}

func (b *Backend) deleteSnapshot(ctx context.Context, o storagekit.Object, name string) error {
	err := b.zfs.Change(ctx, "zfs", "destroy", name)
	if err == nil || zfscmd.Is(err, zfscmd.NotFound) {
		return nil
	}
	if !zfscmd.Is(err, zfscmd.Clones) {
		return zfscmd.Kinded(err, "cannot destroy the snapshot")
	}
	volume, _, _ := strings.Cut(name, "@")
	hide, err := b.unused(func(n string) (string, error) {
		hide := volume + "@.gone-" + o.ID + n
		return hide, b.zfs.Change(ctx, "zfs", "rename", name, hide)
	})
	if err != nil {
		return zfscmd.Kinded(err, "cannot hide the snapshot")
	}
	b.step("zfs:delete:hidden")
	return b.giveUp(ctx, hide)
}

// unused calls fn, which makes a name that begins with an id, until the name is not taken: by what had the same id
// before, was deleted, and still has clones. n is empty first, then "-2", "-3" and so on.
func (b *Backend) unused(fn func(n string) (string, error)) (name string, err error) {
	const most = 100
	for i, n := 2, ""; ; i, n = i+1, fmt.Sprintf("-%d", i) {
		name, err = fn(n)
		if i > most || !zfscmd.Is(err, zfscmd.Exists) {
			return name, err
		}
	}
}

// giveUp lets a snapshot go with its last clone.
func (b *Backend) giveUp(ctx context.Context, name string) error {
	if err := b.zfs.Change(ctx, "zfs", "set", propKind+"="+kindGone, name); err != nil && !zfscmd.Is(err, zfscmd.NotFound) {
		return zfscmd.Kinded(err, "cannot give up a snapshot")
	}
	b.step("zfs:delete:marked")
	if err := b.zfs.Change(ctx, "zfs", "destroy", "-d", name); err != nil && !zfscmd.Is(err, zfscmd.NotFound) {
		return zfscmd.Kinded(err, "cannot give up a snapshot")
	}
	return nil
}

// deleteVolume destroys a volume or a template. Of a volume the kit has deleted the snapshots that it knows.
func (b *Backend) deleteVolume(ctx context.Context, o storagekit.Object, name string) error {
	args := []string{"zfs", "destroy", name}
	if o.Kind == storagekit.KindTemplate {
		args = []string{"zfs", "destroy", "-r", name} // with its @img
	}
	err := b.zfs.Change(ctx, args...)
	switch {
	case err == nil, zfscmd.Is(err, zfscmd.NotFound):
		return nil
	case !zfscmd.Is(err, zfscmd.Children) && !zfscmd.Is(err, zfscmd.Clones):
		return zfscmd.Kinded(err, "cannot destroy the "+o.Kind)
	}
	foreign, err := b.foreign(ctx, o, name)
	if err != nil {
		return err
	}
	if len(foreign) > 0 {
		return errs.New(errs.Precondition, "the %s has snapshots that mvirt did not make: %s", o.Kind, strings.Join(foreign, ", ")).
			Because("HAS_SNAPSHOTS").Do("destroy them with zfs destroy, then delete the " + o.Kind)
	}
	_, err = b.unused(func(n string) (string, error) {
		hide := b.dataset(tmpDataset, o.ID+n+".gone")
		return hide, b.zfs.Change(ctx, "zfs", "rename", name, hide)
	})
	if err != nil {
		return zfscmd.Kinded(err, "cannot hide the "+o.Kind)
	}
	b.step("zfs:delete:hidden")
	b.mu.Lock()
	b.gone++
	b.mu.Unlock()
	// From here on it is deleted. What is left to do is done by any later collect.
	b.collect(ctx)
	return nil
}

// foreign lists snapshots of a volume that are neither given up nor a template's image.
func (b *Backend) foreign(ctx context.Context, o storagekit.Object, name string) ([]string, error) {
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-r", "-d", "1", "-t", "snapshot", "-o", "name,"+propKind, name)
	if err != nil {
		return nil, zfscmd.Kinded(err, "cannot list the snapshots")
	}
	var out []string
	for _, r := range rows {
		if r[1] == kindGone || o.Kind == storagekit.KindTemplate && r[0] == name+image {
			continue
		}
		out = append(out, r[0])
	}
	return out, nil
}

// collect destroys what was deleted as far as its clones allow. Trouble is not told: nobody asked, and the
// next time comes.
func (b *Backend) collect(ctx context.Context) {
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-r", "-d", "2", "-t", "volume,snapshot", "-o", "name,clones,defer_destroy", b.dataset(tmpDataset))
	if err != nil {
		return
	}
	snapshots := map[string]int{}
	var volumes []string
	for _, r := range rows {
		name := r[0]
		volume, _, isSnapshot := strings.Cut(name, "@")
		if !strings.HasSuffix(volume, ".gone") {
			continue
		}
		if !isSnapshot {
			volumes = append(volumes, name)
			continue
		}
		if r[2] == "on" || b.giveUp(ctx, name) == nil && r[1] != "" && r[1] != "-" {
			snapshots[volume]++ // it waits for its clones
		}
	}
	left := 0
	for _, v := range volumes {
		if snapshots[v] == 0 && b.zfs.Change(ctx, "zfs", "destroy", v) == nil {
			continue
		}
		left++
		// What the volume itself changed since its last snapshot is of no use to anybody.
		_ = b.zfs.Change(ctx, "zfs", "set", propKind+"="+kindGone, v)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone = left
}

// sweepStaging removes downloads that nobody waits for.
func (b *Backend) sweepStaging(keep func(string) bool) error {
	entries, err := os.ReadDir(b.Staging())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return errs.Wrap(errs.Unavailable, err, "cannot list downloads")
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".download")
		if !ok || ident.CheckID("id", id) != nil || keep(id) {
			continue
		}
		if err := os.Remove(filepath.Join(b.Staging(), e.Name())); err != nil {
			return errs.Wrap(errs.Unavailable, err, "cannot remove a download")
		}
	}
	return nil
}

// snapshotRow is a snapshot of one volume, oldest first.
type snapshotRow struct {
	name, kind, id, clones string
}

func (b *Backend) snapshots(ctx context.Context, volume string) ([]snapshotRow, error) {
	rows, err := b.zfs.List(ctx, "zfs", "list", "-H", "-p", "-r", "-d", "1", "-t", "snapshot", "-s", "createtxg",
		"-o", "name,"+propKind+","+propID+",clones", volume)
	if err != nil {
		return nil, zfscmd.Kinded(err, "cannot list the snapshots")
	}
	var out []snapshotRow
	for _, r := range rows {
		out = append(out, snapshotRow{r[0], r[1], r[2], r[3]})
	}
	return out, nil
}

// PrepareRollback refuses when something that must live would die.
func (b *Backend) PrepareRollback(ctx context.Context, vol, snap storagekit.Object, newer []storagekit.Object) error {
	volume, err := b.find(ctx, vol)
	if err != nil {
		return err
	}
	target, err := b.sure(ctx, snap)
	if err != nil {
		return err
	}
	rows, err := b.snapshots(ctx, volume)
	if err != nil {
		return err
	}
	dies := map[string]bool{}
	for _, o := range newer {
		dies[o.ID] = true
	}
	var foreign, clones []string
	after := false
	for _, r := range rows {
		switch {
		case r.name == target:
			after = true
		case !after:
		case r.clones != "" && r.clones != "-":
			clones = append(clones, b.readable(r.clones)...)
		case r.kind == storagekit.KindSnapshot && dies[r.id], r.kind == kindGone:
		default:
			foreign = append(foreign, r.name)
		}
	}
	if len(clones) > 0 {
		return errs.New(errs.Precondition, "volumes or templates were cloned from newer snapshots: %s", strings.Join(clones, ", ")).
			Because("HAS_CLONES").Do("delete them first, or clone the snapshot instead of rolling back to it")
	}
	if len(foreign) > 0 {
		return errs.New(errs.Precondition, "newer snapshots that mvirt did not make would be lost: %s", strings.Join(foreign, ", ")).
			Because("NEWER_SNAPSHOTS").Do("destroy them with zfs destroy first")
	}
	return nil
}

// readable turns a list of datasets into names that mvirt shows.
func (b *Backend) readable(clones string) []string {
	var out []string
	for _, c := range strings.Split(clones, ",") {
		c = strings.TrimPrefix(c, b.pool+"/")
		if t, ok := strings.CutPrefix(c, templatesDataset+"/"); ok {
			c = "template " + t
		}
		out = append(out, c)
	}
	return out
}

// UndoRollback has nothing to undo: preparing only looks.
func (b *Backend) UndoRollback(context.Context, storagekit.Object) error { return nil }

// CommitRollback destroys the newer snapshots and rolls back.
func (b *Backend) CommitRollback(ctx context.Context, vol, snap storagekit.Object, newer []storagekit.Object) error {
	volume, err := b.find(ctx, vol)
	if err != nil {
		return err
	}
	target, err := b.sure(ctx, snap)
	if err != nil {
		return err
	}
	rows, err := b.snapshots(ctx, volume)
	if err != nil {
		return err
	}
	dies := map[string]bool{}
	for _, o := range newer {
		dies[o.ID] = true
	}
	after := false
	for _, r := range rows {
		if r.name == target {
			after = true
			continue
		}
		if after && (r.kind == kindGone || r.kind == storagekit.KindSnapshot && dies[r.id]) {
			if err := b.zfs.Change(ctx, "zfs", "destroy", r.name); err != nil && !zfscmd.Is(err, zfscmd.NotFound) {
				return zfscmd.Kinded(err, "cannot destroy a newer snapshot")
			}
			b.step("zfs:rollback:destroyed")
		}
	}
	if err := b.zfs.Change(ctx, "zfs", "rollback", target); err != nil {
		return zfscmd.Kinded(err, "cannot roll back")
	}
	b.step("zfs:rollback:rolled")
	for _, o := range newer {
		b.forget(o.ID)
	}
	vol.Size = snap.Size
	return b.Save(ctx, vol)
}
