package conformance

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
)

var storageChecks = []check{
	{"volume names", checkVolumeNames},
	{"volume create is idempotent", checkVolumeIdempotent},
	{"volume sizes", checkVolumeSizes},
	{"volume get and list", checkVolumeList},
	{"volume not found", checkVolumeNotFound},
	{"volume rename", checkVolumeRename},
	{"volume resize", checkVolumeResize},
	{"volume attach", checkVolumeAttach},
	{"volume attach read-only", checkVolumeAttachReadOnly},
	{"volume starts as zeros", checkVolumeZeros},
	{"snapshots", checkSnapshots},
	{"rollback", checkRollback},
	{"clones are apart", checkClones},
	{"volumes concurrently", checkVolumesConcurrently},
	{"volumes survive restarts", checkVolumesSurvive},
	{"storage stats", checkStorageStats},
}

// badNames are names that every plugin refuses (package ident).
var badNames = []string{"", "/", "a/b", "..", "a..b", ".", "-a", "a-", "a\x00b", "a\nb", "A", "a b", "a@b", "a,b", "ä", "a\xff", strings.Repeat("a", 64),
	strings.Repeat("a", 300), "0190a0a0-0000-7000-8000-000000000001"}

const mib = 1 << 20

func (c *C) volume(name string, more func(*storage.CreateVolumeRequest)) storage.Volume {
	req := storage.CreateVolumeRequest{ID: ident.New(), Name: c.name(name), SizeBytes: 4 * mib}
	if more != nil {
		more(&req)
	}
	v, err := c.p.Storage.CreateVolume(c, req)
	c.ok(err, "CreateVolume %s", req.Name)
	c.removeVolume(v.ID)
	return v
}

func (c *C) removeVolume(id string) {
	c.later(func() {
		c.ok(c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: id, WithSnapshots: true}), "DeleteVolume")
		if _, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: id}); errs.KindOf(err) != errs.NotFound {
			c.Errorf("a deleted volume is still there: %v", err)
		}
	})
}

func (c *C) owner(vm string) service.Owner {
	return service.Owner{VMID: vm, UID: c.cfg.UID, GID: c.cfg.GID}
}

// open attaches a volume to a VM of its own and opens it; nil when this process may not.
func (c *C) open(v storage.Volume) (*os.File, storage.Attachment, string) {
	vm := ident.New()
	a, err := c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(vm)})
	c.ok(err, "Attach")
	c.later(func() { c.ok(c.p.Storage.Detach(c, storage.DetachRequest{VolumeID: v.ID, VMID: vm}), "Detach") })
	f, err := os.OpenFile(a.Path, os.O_RDWR, 0)
	if err != nil {
		if c.cfg.UID == uint32(os.Getuid()) {
			c.Fatalf("the owner cannot open %s: %v", a.Path, err)
		}
		c.Skipf("this process is not the owner and cannot look into volumes: %v", err)
	}
	return f, a, vm
}

func (c *C) detach(v storage.Volume, vm string, f *os.File) {
	if f != nil {
		c.ok(f.Sync(), "sync")
		f.Close()
	}
	c.ok(c.p.Storage.Detach(c, storage.DetachRequest{VolumeID: v.ID, VMID: vm}), "Detach")
}

// write puts text at the volume's begin and end; read reads it back.
func (c *C) write(v storage.Volume, text string) {
	f, a, vm := c.open(v)
	b := bytes.Repeat([]byte(text), 1+512/len(text))[:512]
	for _, at := range []int64{0, int64(a.SizeBytes) - 512} {
		if _, err := f.WriteAt(b, at); err != nil {
			f.Close()
			c.Fatalf("writing at %d of %d: %v", at, a.SizeBytes, err)
		}
	}
	c.detach(v, vm, f)
}

func (c *C) read(v storage.Volume, at int64, n int) []byte {
	f, _, vm := c.open(v)
	b := make([]byte, n)
	if _, err := f.ReadAt(b, at); err != nil {
		f.Close()
		c.Fatalf("reading at %d: %v", at, err)
	}
	c.detach(v, vm, f)
	return b
}

func (c *C) holds(v storage.Volume, text, what string) {
	if got := c.read(v, 0, len(text)); string(got) != text {
		c.Errorf("%s: holds %q, must hold %q", what, got, text)
	}
}

func checkVolumeNames(c *C) {
	for _, n := range badNames {
		v, err := c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: ident.New(), Name: n, SizeBytes: mib})
		c.fails(err, errs.Invalid, "volume name %q", n)
		if err == nil {
			c.removeVolume(v.ID)
		}
	}
	for _, id := range []string{"", "1", "../x", "0190A0A0-0000-7000-8000-00000000000A", "0190a0a0-0000-7000-8000-00000000000g"} {
		_, err := c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: id, Name: c.name("x"), SizeBytes: mib})
		c.fails(err, errs.Invalid, "volume id %q", id)
	}
	if _, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: c.name("x")}); errs.KindOf(err) != errs.NotFound {
		c.Errorf("a refused create left something: %v", err)
	}
}

func checkVolumeIdempotent(c *C) {
	req := storage.CreateVolumeRequest{ID: ident.New(), Name: c.name("v"), SizeBytes: 4 * mib, Labels: map[string]string{"a": "b", "c": "d"}}
	first, err := c.p.Storage.CreateVolume(c, req)
	c.ok(err, "CreateVolume")
	c.removeVolume(first.ID)
	if first.ID != req.ID || first.Name != req.Name || first.SizeBytes != req.SizeBytes || first.State != storage.StateReady ||
		first.CreatedAt.IsZero() || first.Labels["a"] != "b" || len(first.Labels) != 2 {
		c.Errorf("created %+v", first)
	}
	for range 3 {
		again, err := c.p.Storage.CreateVolume(c, req)
		c.ok(err, "the same create again")
		if again.ID != first.ID || !again.CreatedAt.Equal(first.CreatedAt) {
			c.Errorf("the same create gave another volume: %+v", again)
		}
	}
	other := req
	other.SizeBytes *= 2
	_, err = c.p.Storage.CreateVolume(c, other)
	c.fails(err, errs.Exists, "the same id, another size")
	other = req
	other.Name = c.name("w")
	_, err = c.p.Storage.CreateVolume(c, other)
	c.fails(err, errs.Exists, "the same id, another name")
	other = req
	other.ID = ident.New()
	_, err = c.p.Storage.CreateVolume(c, other)
	c.fails(err, errs.Exists, "another id, the same name")
	for range 3 {
		c.ok(c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: req.ID}), "DeleteVolume, repeated")
	}
	again, err := c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: ident.New(), Name: req.Name, SizeBytes: mib})
	c.ok(err, "the name of a deleted volume")
	c.removeVolume(again.ID)
}

func checkVolumeSizes(c *C) {
	for _, size := range []uint64{0, 1, 511, 513, 4*mib + 1, 1 << 63, 1<<64 - 512} {
		v, err := c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: ident.New(), Name: c.name("v"), SizeBytes: size})
		if err == nil {
			c.removeVolume(v.ID)
			c.Errorf("size %d accepted", size)
			continue
		}
		if k := errs.KindOf(err); k != errs.Invalid && !(size >= 1<<63 && k == errs.Exhausted) {
			c.Errorf("size %d: kind %q, must be %q: %v", size, k, errs.Invalid, err)
		}
	}
	for _, r := range []storage.CreateVolumeRequest{{FromTemplate: ident.New()}, {FromSnapshot: ident.New()}, {FromVolume: ident.New()}} {
		r.ID, r.Name = ident.New(), c.name("v")
		_, err := c.p.Storage.CreateVolume(c, r)
		c.fails(err, errs.NotFound, "a source that does not exist")
	}
	src := c.volume("src", nil)
	_, err := c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: ident.New(), Name: c.name("v"), FromVolume: src.ID, SizeBytes: src.SizeBytes - 512})
	c.fails(err, errs.Invalid, "a clone that is smaller than its source")
	_, err = c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: ident.New(), Name: c.name("v"), FromVolume: src.ID, FromSnapshot: ident.New()})
	c.fails(err, errs.Invalid, "two sources")
}

func checkVolumeList(c *C) {
	var want []string
	for _, n := range []string{"m", "a", "z", "b2", "b10"} {
		want = append(want, c.volume(n, nil).Name)
	}
	slices.Sort(want)
	list, err := c.p.Storage.ListVolumes(c)
	c.ok(err, "ListVolumes")
	var got []string
	for _, v := range list {
		if strings.HasPrefix(v.Name, "ct-"+c.tag) {
			got = append(got, v.Name)
		}
	}
	if !slices.Equal(got, want) {
		c.Errorf("listed %q, must be ordered by name: %q", got, want)
	}
	byName, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: want[0]})
	c.ok(err, "GetVolume by name")
	byID, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: byName.ID})
	c.ok(err, "GetVolume by id")
	if byID.Name != want[0] {
		c.Errorf("by id %+v", byID)
	}
}

func checkVolumeNotFound(c *C) {
	for _, ref := range []string{ident.New(), "ct-none", "", "../../etc/passwd", "a\x00"} {
		_, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: ref})
		if k := errs.KindOf(err); k != errs.NotFound && !(ref == "" || strings.ContainsAny(ref, "/\x00")) || err == nil {
			c.Errorf("GetVolume %q: %v", ref, err)
		}
	}
	id := ident.New()
	_, err := c.p.Storage.ResizeVolume(c, storage.ResizeVolumeRequest{Ref: id, SizeBytes: mib})
	c.fails(err, errs.NotFound, "ResizeVolume of nothing")
	_, err = c.p.Storage.RenameVolume(c, storage.RenameRequest{Ref: id, Name: c.name("x")})
	c.fails(err, errs.NotFound, "RenameVolume of nothing")
	_, err = c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: id, Owner: c.owner(ident.New())})
	c.fails(err, errs.NotFound, "Attach of nothing")
	_, err = c.p.Storage.CreateSnapshot(c, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: id, Name: "s"})
	c.fails(err, errs.NotFound, "CreateSnapshot of nothing")
	c.fails(c.p.Storage.Rollback(c, storage.RollbackRequest{SnapshotID: id}), errs.NotFound, "Rollback to nothing")
	c.ok(c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: id}), "DeleteVolume of nothing")
	c.ok(c.p.Storage.Detach(c, storage.DetachRequest{VolumeID: id, VMID: ident.New()}), "Detach of nothing")
	c.ok(c.p.Storage.DeleteSnapshot(c, storage.Ref{Ref: id}), "DeleteSnapshot of nothing")
	c.ok(c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: id}), "DeleteTemplate of nothing")
}

func checkVolumeRename(c *C) {
	a, b := c.volume("a", nil), c.volume("b", nil)
	_, err := c.p.Storage.RenameVolume(c, storage.RenameRequest{Ref: a.ID, Name: b.Name})
	c.fails(err, errs.Exists, "a rename to a name that is taken")
	_, err = c.p.Storage.RenameVolume(c, storage.RenameRequest{Ref: a.ID, Name: "a/b"})
	c.fails(err, errs.Invalid, "a rename to a/b")
	for range 2 {
		got, err := c.p.Storage.RenameVolume(c, storage.RenameRequest{Ref: a.ID, Name: c.name("c")})
		c.ok(err, "RenameVolume")
		if got.ID != a.ID || got.Name != c.name("c") {
			c.Errorf("renamed %+v", got)
		}
	}
	_, err = c.p.Storage.GetVolume(c, storage.Ref{Ref: a.Name})
	c.fails(err, errs.NotFound, "the old name")
}

func checkVolumeResize(c *C) {
	v := c.volume("v", nil)
	for range 2 {
		got, err := c.p.Storage.ResizeVolume(c, storage.ResizeVolumeRequest{Ref: v.ID, SizeBytes: 8 * mib})
		c.ok(err, "ResizeVolume")
		if got.SizeBytes != 8*mib {
			c.Errorf("size %d", got.SizeBytes)
		}
	}
	_, err := c.p.Storage.ResizeVolume(c, storage.ResizeVolumeRequest{Ref: v.ID, SizeBytes: 4 * mib})
	c.fails(err, errs.Invalid, "shrinking")
	_, err = c.p.Storage.ResizeVolume(c, storage.ResizeVolumeRequest{Ref: v.ID, SizeBytes: 8*mib + 1})
	c.fails(err, errs.Invalid, "a size that is no multiple of 512")
	got, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: v.ID})
	c.ok(err, "GetVolume")
	if got.SizeBytes != 8*mib {
		c.Errorf("after refused resizes the size is %d", got.SizeBytes)
	}
	vm := ident.New()
	_, err = c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(vm)})
	c.ok(err, "Attach")
	c.later(func() { c.detach(v, vm, nil) })
	_, err = c.p.Storage.ResizeVolume(c, storage.ResizeVolumeRequest{Ref: v.ID, SizeBytes: 16 * mib})
	c.ok(err, "growing while attached")
	a, err := c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(vm)})
	c.ok(err, "Attach again")
	if a.SizeBytes != 16*mib {
		c.Errorf("attached with %d bytes after growing", a.SizeBytes)
	}
}

func checkVolumeAttach(c *C) {
	v := c.volume("v", nil)
	vm, other := ident.New(), ident.New()
	a, err := c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(vm)})
	c.ok(err, "Attach")
	c.later(func() { c.detach(v, vm, nil) })
	if !strings.HasPrefix(a.Path, "/") || a.Format != storage.FormatRaw || a.SizeBytes != v.SizeBytes || a.ReadOnly {
		c.Errorf("attachment %+v", a)
	}
	again, err := c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(vm)})
	c.ok(err, "Attach again")
	if again.Path != a.Path {
		c.Errorf("attaching again gave %s, was %s", again.Path, a.Path)
	}
	_, err = c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(other)})
	c.because(err, errs.Precondition, "VOLUME_IN_USE", "Attach for another VM")
	_, err = c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(other), ReadOnly: true})
	c.because(err, errs.Precondition, "VOLUME_IN_USE", "Attach read-only beside a writer")
	c.because(c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: v.ID}), errs.Precondition, "VOLUME_IN_USE", "DeleteVolume while attached")
	got, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: v.ID})
	c.ok(err, "GetVolume")
	if len(got.Attachments) != 1 || got.Attachments[0].VMID != vm {
		c.Errorf("attachments %+v", got.Attachments)
	}
	c.ok(c.p.Storage.Detach(c, storage.DetachRequest{VolumeID: v.ID, VMID: other}), "Detach of a VM that is not attached")
	if got, _ := c.p.Storage.GetVolume(c, storage.Ref{Ref: v.ID}); len(got.Attachments) != 1 {
		c.Errorf("detaching another VM took the attachment away")
	}
	c.restart(true)
	if got, _ := c.p.Storage.GetVolume(c, storage.Ref{Ref: v.ID}); len(got.Attachments) != 1 {
		c.Errorf("the attachment did not survive a kill of the plugin")
	}
	for range 3 {
		c.ok(c.p.Storage.Detach(c, storage.DetachRequest{VolumeID: v.ID, VMID: vm}), "Detach")
	}
	_, err = c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(other)})
	c.ok(err, "Attach for another VM after Detach")
	c.later(func() { c.detach(v, other, nil) })
}

func checkVolumeAttachReadOnly(c *C) {
	v := c.volume("v", nil)
	for range 2 {
		vm := ident.New()
		a, err := c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(vm), ReadOnly: true})
		c.ok(err, "Attach read-only, for several VMs")
		c.later(func() { c.detach(v, vm, nil) })
		if !a.ReadOnly {
			c.Errorf("attachment %+v", a)
		}
	}
	_, err := c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(ident.New())})
	c.because(err, errs.Precondition, "VOLUME_IN_USE", "Attach for writing beside readers")
}

func checkVolumeZeros(c *C) {
	v := c.volume("v", nil)
	if b := c.read(v, 0, int(v.SizeBytes)); len(bytes.Trim(b, "\x00")) > 0 {
		c.Errorf("an empty volume is not all zeros")
	}
	c.write(v, "written")
	c.holds(v, "written", "what was written")
}

func (c *C) snapshot(v storage.Volume, name string) storage.Snapshot {
	s, err := c.p.Storage.CreateSnapshot(c, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: v.ID, Name: name})
	c.ok(err, "CreateSnapshot %s", name)
	return s
}

func checkSnapshots(c *C) {
	v, other := c.volume("v", nil), c.volume("w", nil)
	var want []string
	for _, n := range []string{"z", "a", "m"} {
		want = append(want, c.snapshot(v, n).ID)
	}
	c.snapshot(other, "z") // names are unique within a volume only
	list, err := c.p.Storage.ListSnapshots(c, storage.ListSnapshotsRequest{VolumeID: v.ID})
	c.ok(err, "ListSnapshots")
	var got []string
	for _, s := range list {
		got = append(got, s.ID)
		if s.VolumeID != v.ID || s.SizeBytes != v.SizeBytes {
			c.Errorf("snapshot %+v", s)
		}
	}
	if !slices.Equal(got, want) {
		c.Errorf("listed %v, must be oldest first: %v", got, want)
	}
	if byName, err := c.p.Storage.ListSnapshots(c, storage.ListSnapshotsRequest{VolumeID: v.Name}); err != nil || len(byName) != 3 {
		c.Errorf("by the volume's name: %d, %v", len(byName), err)
	}
	again, err := c.p.Storage.CreateSnapshot(c, storage.CreateSnapshotRequest{ID: want[0], VolumeID: v.ID, Name: "z"})
	c.ok(err, "the same create again")
	if again.ID != want[0] {
		c.Errorf("the same create gave %+v", again)
	}
	_, err = c.p.Storage.CreateSnapshot(c, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: v.ID, Name: "z"})
	c.fails(err, errs.Exists, "a name that is taken")
	_, err = c.p.Storage.CreateSnapshot(c, storage.CreateSnapshotRequest{ID: want[0], VolumeID: v.ID, Name: "q"})
	c.fails(err, errs.Exists, "an id that is taken")
	for _, n := range badNames {
		_, err = c.p.Storage.CreateSnapshot(c, storage.CreateSnapshotRequest{ID: ident.New(), VolumeID: v.ID, Name: n})
		c.fails(err, errs.Invalid, "snapshot name %q", n)
	}
	err = c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: v.ID})
	c.because(err, errs.Precondition, "HAS_SNAPSHOTS", "DeleteVolume with snapshots")
	if err != nil && !strings.Contains(err.Error(), "a") {
		c.Errorf("the message does not name them: %v", err)
	}
	if got, _ := c.p.Storage.GetVolume(c, storage.Ref{Ref: v.ID}); got.SnapshotCount != 3 {
		c.Errorf("snapshot_count %d", got.SnapshotCount)
	}
	for range 2 {
		c.ok(c.p.Storage.DeleteSnapshot(c, storage.Ref{Ref: want[1]}), "DeleteSnapshot")
	}
	if list, _ := c.p.Storage.ListSnapshots(c, storage.ListSnapshotsRequest{VolumeID: v.ID}); len(list) != 2 {
		c.Errorf("%d left of three", len(list))
	}
}

func checkRollback(c *C) {
	v := c.volume("v", nil)
	c.write(v, "first")
	s1 := c.snapshot(v, "one")
	c.write(v, "second")
	s2 := c.snapshot(v, "two")
	c.write(v, "third")
	vm := ident.New()
	_, err := c.p.Storage.Attach(c, storage.AttachRequest{VolumeID: v.ID, Owner: c.owner(vm)})
	c.ok(err, "Attach")
	c.because(c.p.Storage.Rollback(c, storage.RollbackRequest{SnapshotID: s2.ID}), errs.Precondition, "VOLUME_IN_USE", "Rollback while attached")
	c.detach(v, vm, nil)
	c.holds(v, "third", "after a refused rollback")
	err = c.p.Storage.Rollback(c, storage.RollbackRequest{SnapshotID: s1.ID})
	c.because(err, errs.Precondition, "NEWER_SNAPSHOTS", "Rollback over newer snapshots")
	if err != nil && !strings.Contains(err.Error(), "two") {
		c.Errorf("the message does not name them: %v", err)
	}
	c.ok(c.p.Storage.Rollback(c, storage.RollbackRequest{SnapshotID: s2.ID}), "Rollback to the newest")
	c.holds(v, "second", "after the rollback")
	c.ok(c.p.Storage.Rollback(c, storage.RollbackRequest{SnapshotID: s1.ID, DestroyNewer: true}), "Rollback that may destroy newer ones")
	c.holds(v, "first", "after the second rollback")
	if list, _ := c.p.Storage.ListSnapshots(c, storage.ListSnapshotsRequest{VolumeID: v.ID}); len(list) != 1 || list[0].ID != s1.ID {
		c.Errorf("snapshots left: %+v", list)
	}
}

func checkClones(c *C) {
	src := c.volume("src", nil)
	c.write(src, "origin")
	snap := c.snapshot(src, "s")
	tpl, err := c.p.Storage.CreateTemplate(c, storage.CreateTemplateRequest{ID: ident.New(), Name: c.name("tpl"), SnapshotID: snap.ID})
	c.ok(err, "CreateTemplate")
	c.later(func() { c.ok(c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: tpl.ID}), "DeleteTemplate") })
	c.write(src, "changed")
	fromSnap := c.volume("from-snap", func(r *storage.CreateVolumeRequest) { r.FromSnapshot, r.SizeBytes = snap.ID, 0 })
	fromTpl := c.volume("from-tpl", func(r *storage.CreateVolumeRequest) { r.FromTemplate, r.SizeBytes = tpl.Name, 8*mib })
	fromVol := c.volume("from-vol", func(r *storage.CreateVolumeRequest) { r.FromVolume, r.SizeBytes = src.Name, 0 })
	if fromSnap.SizeBytes != src.SizeBytes || fromTpl.SizeBytes != 8*mib || fromSnap.OriginType != "snapshot" || fromSnap.OriginID != snap.ID || fromTpl.OriginType != "template" || fromVol.OriginType != "volume" {
		c.Errorf("clones %+v %+v %+v", fromSnap, fromTpl, fromVol)
	}
	c.holds(fromSnap, "origin", "a clone of a snapshot")
	c.holds(fromTpl, "origin", "a clone of a template")
	c.holds(fromVol, "changed", "a clone of a volume")
	if b := c.read(fromTpl, 4*mib, 4*mib); len(bytes.Trim(b, "\x00")) > 0 {
		c.Errorf("what a larger clone has beyond its source is not zeros")
	}
	c.write(fromSnap, "mine")
	c.holds(src, "changed", "the source after its clone was written to")
	c.holds(fromTpl, "origin", "a clone after another was written to")
	c.write(src, "again")
	c.holds(fromVol, "changed", "a clone after its source was written to")
	c.ok(c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: tpl.ID}), "DeleteTemplate while a clone lives")
	_, err = c.p.Storage.GetTemplate(c, storage.Ref{Ref: tpl.ID})
	c.fails(err, errs.NotFound, "the deleted template")
	c.holds(fromTpl, "origin", "a clone after its template was deleted")
	c.ok(c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: src.ID, WithSnapshots: true}), "DeleteVolume while clones live")
	c.holds(fromSnap, "mine", "a clone after its source was deleted")
	c.holds(fromVol, "changed", "a clone after its source was deleted")
}

func checkVolumesConcurrently(c *C) {
	var wg sync.WaitGroup
	id, name := ident.New(), c.name("same")
	errsOf := make([]error, 8)
	for i := range errsOf {
		wg.Go(func() {
			_, errsOf[i] = c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: id, Name: name, SizeBytes: mib})
		})
	}
	wg.Wait()
	c.removeVolume(id)
	for _, err := range errsOf {
		if err != nil && errs.KindOf(err) != errs.Conflict {
			c.Errorf("the same create eight times at once: %v", err)
		}
	}
	ids := make([]string, 8)
	for i := range ids {
		ids[i] = ident.New()
		wg.Go(func() {
			_, errsOf[i] = c.p.Storage.CreateVolume(c, storage.CreateVolumeRequest{ID: ids[i], Name: c.name("one"), SizeBytes: mib})
		})
	}
	wg.Wait()
	won := 0
	for i, err := range errsOf {
		c.removeVolume(ids[i])
		switch k := errs.KindOf(err); {
		case err == nil:
			won++
		case k != errs.Exists && k != errs.Conflict:
			c.Errorf("one name, eight ids: %v", err)
		}
	}
	if won != 1 {
		c.Errorf("one name was given to %d volumes", won)
	}
	for i := range 8 {
		wg.Go(func() {
			req := storage.CreateVolumeRequest{ID: ident.New(), Name: c.name(fmt.Sprint("c", i)), SizeBytes: mib}
			_, err := c.p.Storage.CreateVolume(c, req)
			if err == nil {
				err = c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: req.ID})
			}
			errsOf[i] = err
		})
	}
	wg.Wait()
	for _, err := range errsOf {
		if err != nil {
			c.Errorf("creates and deletes side by side: %v", err)
		}
	}
}

func checkVolumesSurvive(c *C) {
	v := c.volume("v", func(r *storage.CreateVolumeRequest) { r.Labels = map[string]string{"k": "v"} })
	c.write(v, "kept")
	s := c.snapshot(v, "s")
	before, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: v.ID})
	c.ok(err, "GetVolume")
	for _, kill := range []bool{false, true} {
		c.restart(kill)
		got, err := c.p.Storage.GetVolume(c, storage.Ref{Ref: v.Name})
		c.ok(err, "GetVolume after a restart (killed: %v)", kill)
		if got.ID != v.ID || got.SizeBytes != before.SizeBytes || !got.CreatedAt.Equal(before.CreatedAt) || got.Labels["k"] != "v" || got.SnapshotCount != 1 {
			c.Errorf("after a restart %+v, was %+v", got, before)
		}
		c.holds(v, "kept", "after a restart")
		if _, err := c.p.Storage.CreateSnapshot(c, storage.CreateSnapshotRequest{ID: s.ID, VolumeID: v.ID, Name: "s"}); err != nil {
			c.Errorf("a create repeated after a restart: %v", err)
		}
	}
}

func checkStorageStats(c *C) {
	before, err := c.p.Storage.Stats(c)
	c.ok(err, "Stats")
	c.volume("v", nil)
	after, err := c.p.Storage.Stats(c)
	c.ok(err, "Stats")
	if after.Place == "" || after.TotalBytes == 0 || after.AvailableBytes > after.TotalBytes || after.CompressionRatio < 1 {
		c.Errorf("%+v", after)
	}
	if after.Volumes != before.Volumes+1 || after.ProvisionedBytes < before.ProvisionedBytes+4*mib {
		c.Errorf("before a volume of 4 MiB %+v, after it %+v", before, after)
	}
}
