package convert

import (
	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

var storageStates = map[storage.State]string{storage.StateReady: "ready", storage.StateDamaged: "damaged"}

// Volume converts a volume; users are the VMs that name it in their definitions.
func Volume(v storage.Volume, users []vmm.VM) *apiv1.Volume {
	out := &apiv1.Volume{Id: v.ID, Name: v.Name, SizeBytes: v.SizeBytes, AllocatedBytes: v.AllocatedBytes, BlockSize: v.BlockSize, OriginType: v.OriginType,
		OriginId: v.OriginID, CreatedAt: Time(v.CreatedAt), State: storageStates[v.State], StateReason: v.StateReason, Labels: v.Labels, SnapshotCount: v.SnapshotCount}
	at := map[string]storage.AttachmentInfo{}
	for _, a := range v.Attachments {
		at[a.VMID] = a
	}
	for _, vm := range users {
		u := &apiv1.VolumeUser{VmId: vm.ID, VmName: vm.Spec.Name}
		for _, d := range vm.Spec.Disks {
			if d.VolumeID == v.ID {
				u.ReadOnly = d.ReadOnly
			}
		}
		if a, ok := at[vm.ID]; ok {
			u.Attached, u.Path, u.ReadOnly = true, a.Path, a.ReadOnly
			delete(at, vm.ID)
		}
		out.Users = append(out.Users, u)
	}
	for _, a := range v.Attachments { // attached for a VM whose definition does not name it (any more)
		if _, left := at[a.VMID]; left {
			out.Users = append(out.Users, &apiv1.VolumeUser{VmId: a.VMID, ReadOnly: a.ReadOnly, Attached: true, Path: a.Path})
		}
	}
	return out
}

// Snapshot converts a snapshot.
func Snapshot(s storage.Snapshot) *apiv1.Snapshot {
	return &apiv1.Snapshot{Id: s.ID, Name: s.Name, VolumeId: s.VolumeID, VolumeName: s.VolumeName, SizeBytes: s.SizeBytes, UsedBytes: s.UsedBytes,
		CreatedAt: Time(s.CreatedAt), Labels: s.Labels}
}

// Template converts a template.
func Template(t storage.Template) *apiv1.Template {
	return &apiv1.Template{Id: t.ID, Name: t.Name, SizeBytes: t.SizeBytes, AllocatedBytes: t.AllocatedBytes, Source: t.Source, SourceFormat: t.SourceFormat,
		Checksum: t.Checksum, CreatedAt: Time(t.CreatedAt), State: storageStates[t.State], StateReason: t.StateReason, Labels: t.Labels, CloneCount: t.CloneCount}
}

var importStates = map[storage.ImportState]string{storage.ImportQueued: "queued", storage.ImportRunning: "running", storage.ImportDone: "done",
	storage.ImportFailed: "failed", storage.ImportCanceled: "canceled"}

// Import converts an import. code is the gRPC code of a kind of error.
func Import(i storage.Import, code func(errs.Kind) uint32) *apiv1.Import {
	out := &apiv1.Import{Id: i.ID, Name: i.Name, Source: i.Source, State: importStates[i.State], Phase: i.Progress.Phase, DoneBytes: i.Progress.Done,
		TotalBytes: i.Progress.Total, Failure: i.Failure, Remedy: i.Remedy, StartedAt: Time(i.StartedAt), EndedAt: Time(i.EndedAt),
		SourceFormat: i.SourceFormat, BytesWritten: i.BytesWritten}
	if i.State == storage.ImportFailed {
		out.FailureCode = code(errs.Kind(i.FailureKind))
	}
	return out
}

// StorageStats converts how full the place is.
func StorageStats(s storage.Stats) *apiv1.StorageStats {
	return &apiv1.StorageStats{Place: s.Place, TotalBytes: s.TotalBytes, AvailableBytes: s.AvailableBytes, UsedBytes: s.UsedBytes,
		ProvisionedBytes: s.ProvisionedBytes, CompressionRatio: s.CompressionRatio, Reflink: s.Reflink}
}
