package plan

import (
	"context"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// CreateVolume makes a volume. The source, if any, is named by id.
func (c *Changes) CreateVolume(ctx context.Context, call Call, req storage.CreateVolumeRequest) (operation.Operation, error) {
	ls := locks(lock("volume", req.ID))
	if req.FromTemplate != "" {
		ls = append(ls, shared("template", req.FromTemplate))
	}
	if req.FromVolume != "" {
		ls = append(ls, shared("volume", req.FromVolume))
	}
	if req.FromSnapshot != "" {
		ls = append(ls, shared("snapshot", req.FromSnapshot))
	}
	return c.run(ctx, call, one("volume.create", operation.Undo,
		operation.NewStep("storage.create_volume", "create "+volumeWords(req.Name), "deleted "+volumeWords(req.Name), req),
		ls, req.ID, req.FromTemplate, req.FromSnapshot, req.FromVolume))
}

// ResizeVolume grows a volume and tells the guests that use it.
func (c *Changes) ResizeVolume(ctx context.Context, call Call, vol storage.Volume, size uint64) (operation.Operation, error) {
	if size < vol.SizeBytes {
		return operation.Operation{}, errs.Field("size_bytes", "give at least its size now; to have less, make a new volume and copy", "volume %s has %d bytes and cannot shrink to %d", vol.Name, vol.SizeBytes, size)
	}
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return operation.Operation{}, err
	}
	p := one("volume.resize", operation.Finish, operation.NewStep("storage.resize_volume", "resize "+volumeWords(vol.Name), "",
		storage.ResizeVolumeRequest{Ref: vol.ID, SizeBytes: size}), locks(lock("volume", vol.ID)), vol.ID)
	for _, vm := range usersOf(vms, vol.ID) {
		p.Objects = append(p.Objects, vm.ID)
		if !vm.State.Live() {
			continue
		}
		for _, d := range vm.Spec.Disks {
			if d.VolumeID == vol.ID {
				s := operation.NewStep("vmm.disk_resized", "tell VM "+vm.Spec.Name, "", vmm.DiskResizedRequest{ID: vm.ID, Name: d.Name, SizeBytes: size})
				p.Steps = append(p.Steps, s)
			}
		}
	}
	return c.run(ctx, call, p)
}

// RenameVolume changes a volume's name.
func (c *Changes) RenameVolume(ctx context.Context, call Call, vol storage.Volume, name string) (operation.Operation, error) {
	return c.run(ctx, call, one("volume.rename", operation.Finish, operation.NewStep("storage.rename_volume", "rename "+volumeWords(vol.Name)+" to "+name, "",
		storage.RenameRequest{Ref: vol.ID, Name: name}), locks(lock("volume", vol.ID)), vol.ID))
}

// CreateSnapshot takes a snapshot of a volume, which may be in use.
func (c *Changes) CreateSnapshot(ctx context.Context, call Call, vol storage.Volume, req storage.CreateSnapshotRequest) (operation.Operation, error) {
	name := vol.Name + "@" + req.Name
	return c.run(ctx, call, one("snapshot.create", operation.Undo, operation.NewStep("storage.create_snapshot", "take snapshot "+name, "deleted snapshot "+name, req),
		locks(shared("volume", vol.ID), lock("snapshot", req.ID)), req.ID, vol.ID))
}

// DeleteSnapshot deletes a snapshot.
func (c *Changes) DeleteSnapshot(ctx context.Context, call Call, s storage.Snapshot) (operation.Operation, error) {
	return c.run(ctx, call, one("snapshot.delete", operation.Finish, operation.NewStep("storage.delete_snapshot", "delete snapshot "+s.VolumeName+"@"+s.Name, "",
		storage.Ref{Ref: s.ID}), locks(shared("volume", s.VolumeID), lock("snapshot", s.ID)), s.ID, s.VolumeID))
}

// Rollback makes a volume what it was at a snapshot; every VM that has it must be stopped. It returns in
// words which newer snapshots go, or would go.
func (c *Changes) Rollback(ctx context.Context, call Call, s storage.Snapshot, destroyNewer, dryRun bool) (operation.Operation, []string, error) {
	none := operation.Operation{}
	vms, err := c.svc.VMM.List(ctx)
	if err != nil {
		return none, nil, err
	}
	p := operation.Plan{Type: "snapshot.rollback", Title: "roll " + volumeWords(s.VolumeName) + " back to " + s.Name, Mode: operation.Finish,
		Objects: []string{s.VolumeID, s.ID}, Locks: locks(lock("volume", s.VolumeID), shared("snapshot", s.ID))}
	for _, vm := range usersOf(vms, s.VolumeID) {
		if vm.State.Live() {
			return none, nil, mustStop(vm, "a rollback of its volume "+s.VolumeName)
		}
		p.Objects = append(p.Objects, vm.ID)
		p.Locks = append(p.Locks, lock("vm", vm.ID))
		p.Steps = append(p.Steps, checkStopped(vm))
	}
	snaps, err := c.svc.Storage.ListSnapshots(ctx, storage.ListSnapshotsRequest{VolumeID: s.VolumeID})
	if err != nil {
		return none, nil, err
	}
	var newer []string
	if i := slices.IndexFunc(snaps, func(o storage.Snapshot) bool { return o.ID == s.ID }); i >= 0 {
		for _, o := range snaps[i+1:] { // the contract lists oldest first
			newer = append(newer, "snapshot "+o.VolumeName+"@"+o.Name)
		}
	}
	if len(newer) > 0 && !destroyNewer {
		return none, nil, errs.New(errs.Precondition, "%s would be lost: %s", plural(len(newer), "newer snapshot"), strings.Join(newer, ", ")).
			With(errs.Resource{Type: "snapshot", ID: s.ID, Name: s.VolumeName + "@" + s.Name}).Because("NEWER_SNAPSHOTS").Do("give --destroy-newer, or clone the snapshot instead")
	}
	if dryRun {
		return none, newer, nil
	}
	p.Steps = append(p.Steps, operation.NewStep("storage.rollback", p.Title, "", storage.RollbackRequest{SnapshotID: s.ID, DestroyNewer: destroyNewer}))
	op, err := c.run(ctx, call, p)
	return op, newer, err
}

// CreateTemplate makes a template of a snapshot.
func (c *Changes) CreateTemplate(ctx context.Context, call Call, s storage.Snapshot, req storage.CreateTemplateRequest) (operation.Operation, error) {
	return c.run(ctx, call, one("template.create", operation.Undo, operation.NewStep("storage.create_template", "make template "+req.Name, "deleted template "+req.Name, req),
		locks(lock("template", req.ID), shared("snapshot", s.ID), shared("volume", s.VolumeID)), req.ID, s.ID, s.VolumeID))
}

// RenameTemplate changes a template's name.
func (c *Changes) RenameTemplate(ctx context.Context, call Call, t storage.Template, name string) (operation.Operation, error) {
	return c.run(ctx, call, one("template.rename", operation.Finish, operation.NewStep("storage.rename_template", "rename template "+t.Name+" to "+name, "",
		storage.RenameRequest{Ref: t.ID, Name: name}), locks(lock("template", t.ID)), t.ID))
}

// DeleteTemplate deletes a template; volumes cloned from it live on.
func (c *Changes) DeleteTemplate(ctx context.Context, call Call, t storage.Template) (operation.Operation, error) {
	return c.run(ctx, call, one("template.delete", operation.Finish, operation.NewStep("storage.delete_template", "delete template "+t.Name, "",
		storage.Ref{Ref: t.ID}), locks(lock("template", t.ID)), t.ID))
}

// Import makes a template from a file or a URL. The operation lasts as long as the import; req.File is
// closed when it ends or is refused.
func (c *Changes) Import(ctx context.Context, call Call, req storage.ImportRequest) (operation.Operation, error) {
	file := req.File
	req.File = nil
	p := one("template.import", operation.Finish, operation.NewStep("storage.import", "import template "+req.Name, "", req), locks(lock("template", req.ID)), req.ID)
	p.Values, p.Files, p.Leave = map[string]any{importFile: file}, files(file), true
	return c.run(ctx, call, p)
}

// CreateNetwork makes a network.
func (c *Changes) CreateNetwork(ctx context.Context, call Call, req net.CreateNetworkRequest) (operation.Operation, error) {
	return c.run(ctx, call, one("network.create", operation.Undo, operation.NewStep("net.create_network", "create network "+req.Name, "deleted network "+req.Name, req),
		locks(lock("network", req.ID)), req.ID))
}

// UpdateNetwork changes a network.
func (c *Changes) UpdateNetwork(ctx context.Context, call Call, n net.Network, req net.UpdateNetworkRequest) (operation.Operation, error) {
	return c.run(ctx, call, one("network.update", operation.Finish, operation.NewStep("net.update_network", "change network "+n.Name, "", req),
		locks(lock("network", n.ID)), n.ID))
}

// DeleteNetwork deletes a network without NICs.
func (c *Changes) DeleteNetwork(ctx context.Context, call Call, n net.Network) (operation.Operation, error) {
	return c.run(ctx, call, one("network.delete", operation.Finish, operation.NewStep("net.delete_network", "delete network "+n.Name, "", net.Ref{Ref: n.ID}),
		locks(lock("network", n.ID)), n.ID))
}

// CreateNIC makes a NIC. The network and groups are named by id.
func (c *Changes) CreateNIC(ctx context.Context, call Call, req net.CreateNICRequest) (operation.Operation, error) {
	return c.run(ctx, call, one("nic.create", operation.Undo, operation.NewStep("net.create_nic", "create NIC "+req.Name, "deleted NIC "+req.Name, req),
		locks(lock("nic", req.ID), shared("network", req.NetworkID)), req.ID, req.NetworkID))
}

// UpdateNIC changes a NIC.
func (c *Changes) UpdateNIC(ctx context.Context, call Call, n net.NIC, req net.UpdateNICRequest) (operation.Operation, error) {
	return c.run(ctx, call, one("nic.update", operation.Finish, operation.NewStep("net.update_nic", "change NIC "+n.Name, "", req),
		locks(lock("nic", n.ID)), append([]string{n.ID, n.NetworkID}, req.SecurityGroups...)...))
}

// CreateGroup makes a security group.
func (c *Changes) CreateGroup(ctx context.Context, call Call, req net.CreateSecurityGroupRequest) (operation.Operation, error) {
	return c.run(ctx, call, one("security_group.create", operation.Undo, operation.NewStep("net.create_group", "create security group "+req.Name,
		"deleted security group "+req.Name, req), locks(lock("group", req.ID)), req.ID))
}

// SetGroupRules replaces a group's rules.
func (c *Changes) SetGroupRules(ctx context.Context, call Call, g net.SecurityGroup, req net.SetSecurityGroupRulesRequest) (operation.Operation, error) {
	return c.run(ctx, call, one("security_group.set_rules", operation.Finish, operation.NewStep("net.set_group_rules", "set the rules of security group "+g.Name, "", req),
		locks(lock("group", g.ID)), g.ID))
}

// DeleteGroup deletes a security group that nothing names.
func (c *Changes) DeleteGroup(ctx context.Context, call Call, g net.SecurityGroup) (operation.Operation, error) {
	return c.run(ctx, call, one("security_group.delete", operation.Finish, operation.NewStep("net.delete_group", "delete security group "+g.Name, "", net.Ref{Ref: g.ID}),
		locks(lock("group", g.ID)), g.ID))
}
