// Package storage is the contract of storage plugins: volumes, templates, snapshots, imports.
//
// # Words
//
// A volume is a block device of fixed size that one VM at a time may use. A template is an image that is
// never written to and from which volumes are cloned at once, sharing its blocks. A snapshot is a volume
// as it was at one moment. An import makes a template from an image in a file or at a URL. To attach is to
// let one user id open one volume; the answer says where.
//
// # Lifecycle
//
//	StartImport(debian) … WatchImport → template debian
//	CreateVolume(web-root, from debian, 20 GiB)
//	Attach(web-root, VM web, uid 60001) → /dev/zd16, format raw
//	CreateSnapshot(web-root, before-upgrade)     // while attached: crash consistent
//	Detach(web-root, VM web)
//	Rollback(before-upgrade)                     // only while detached
//	DeleteVolume(web-root)                       // only while detached
//
// Names are unique within volumes, within templates, and within the snapshots of one volume (errs.Exists).
// All methods are safe for concurrent use; see package service for what else holds for all of them.
package storage

import (
	"context"
	"os"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
)

// Service is the storage contract.
type Service interface {
	service.Base

	// CreateVolume makes a volume, empty (all zeros) or a copy-on-write clone of a template, a snapshot or
	// another volume. Kinds: Invalid (size, name, block size), NotFound (source), Exists, Exhausted.
	// Nothing is left after an error.
	CreateVolume(ctx context.Context, req CreateVolumeRequest) (Volume, error)
	// GetVolume finds by id, or by name where Ref is no id. Kinds: NotFound.
	GetVolume(ctx context.Context, req Ref) (Volume, error)
	// ListVolumes lists all, ordered by name. One damaged volume does not fail the list: it shows in State.
	ListVolumes(ctx context.Context) ([]Volume, error)
	// ResizeVolume grows a volume, also while it is attached. Repeating is harmless. Kinds: Invalid
	// (shrinking), NotFound, Exhausted.
	ResizeVolume(ctx context.Context, req ResizeVolumeRequest) (Volume, error)
	// RenameVolume changes the name; what is attached stays attached. Kinds: NotFound, Exists, Invalid.
	RenameVolume(ctx context.Context, req RenameRequest) (Volume, error)
	// DeleteVolume destroys a volume and its snapshots. Clones made from it live on. Kinds: Precondition
	// while attached (Reason VOLUME_IN_USE, the VM in the message), or when it has snapshots and
	// WithSnapshots is not set (HAS_SNAPSHOTS, their names in the message).
	DeleteVolume(ctx context.Context, req DeleteVolumeRequest) error

	// Attach lets Owner.UID open the volume and says where. Attaching again for the same owner gives the
	// same answer; for another VM it fails with Precondition (VOLUME_IN_USE) unless both are read-only.
	// An attachment survives restarts of plugin and host; after a reboot the caller attaches again.
	Attach(ctx context.Context, req AttachRequest) (Attachment, error)
	// Detach takes the access away. The caller has made sure that the hypervisor has closed the device.
	Detach(ctx context.Context, req DetachRequest) error

	// CreateSnapshot takes a snapshot. Kinds: NotFound, Exists, Exhausted.
	CreateSnapshot(ctx context.Context, req CreateSnapshotRequest) (Snapshot, error)
	// ListSnapshots lists those of one volume, or of all with an empty VolumeID, oldest first.
	ListSnapshots(ctx context.Context, req ListSnapshotsRequest) ([]Snapshot, error)
	// DeleteSnapshot destroys one. Clones made from it live on.
	DeleteSnapshot(ctx context.Context, req Ref) error
	// Rollback makes the volume what it was at the snapshot. Kinds: Precondition while attached
	// (VOLUME_IN_USE), or when newer snapshots would die and DestroyNewer is not set (NEWER_SNAPSHOTS,
	// their names in the message).
	Rollback(ctx context.Context, req RollbackRequest) error

	// StartImport begins an import and returns at once; the template appears, whole, when it is done. The
	// import's id becomes the template's. Kinds: Invalid (name, URL scheme, checksum syntax), Exists.
	StartImport(ctx context.Context, req ImportRequest) (Import, error)
	// WatchImport calls fn with the state now and at each change, until the import ends or fn or ctx does;
	// the last call has a state that is final. Progress comes at most ten times a second.
	WatchImport(ctx context.Context, req Ref, fn func(Import) error) error
	// ListImports lists running imports, and ended ones for at least an hour.
	ListImports(ctx context.Context) ([]Import, error)
	// CancelImport stops an import and removes all of it. On one that has ended it does nothing.
	CancelImport(ctx context.Context, req Ref) error

	// CreateTemplate makes a template of a snapshot; the snapshot and its volume live on, apart from it.
	CreateTemplate(ctx context.Context, req CreateTemplateRequest) (Template, error)
	GetTemplate(ctx context.Context, req Ref) (Template, error)
	ListTemplates(ctx context.Context) ([]Template, error)
	RenameTemplate(ctx context.Context, req RenameRequest) (Template, error)
	// DeleteTemplate destroys a template. Volumes cloned from it live on, undisturbed.
	DeleteTemplate(ctx context.Context, req Ref) error

	// Stats says how full the place is.
	Stats(ctx context.Context) (Stats, error)
}

// Ref names an object by its id or, where it is no id, by its name.
type Ref struct {
	Ref string
}

// Format of what an attachment's path holds. On the wire: append only. The hypervisor is always told,
// never left to guess (CVE-2026-27211).
type Format uint32

// Formats.
const (
	FormatRaw Format = 1
)

// State of a volume or template.
type State uint32

// States. On the wire: append only.
const (
	StateReady   State = 1
	StateDamaged State = 2 // StateReason says how; it can be deleted
)

// Volume is a volume as it is now. Sizes are bytes.
type Volume struct {
	ID             string
	Name           string
	SizeBytes      uint64 // what the guest sees
	AllocatedBytes uint64 // what it takes by itself, not counting blocks shared with its origin
	BlockSize      uint32 // allocation unit
	OriginType     string // "template", "snapshot", "volume" or ""
	OriginID       string // where it was cloned from; the origin may be gone
	CreatedAt      time.Time
	State          State
	StateReason    string
	Labels         map[string]string
	Attachments    []AttachmentInfo
	SnapshotCount  uint32
}

// AttachmentInfo says who uses a volume.
type AttachmentInfo struct {
	VMID     string
	UID      uint32
	ReadOnly bool
	Path     string
}

// CreateVolumeRequest asks for a volume. At most one of FromTemplate, FromSnapshot and FromVolume is set.
type CreateVolumeRequest struct {
	ID           string
	Name         string
	SizeBytes    uint64 // 0: the source's size; otherwise at least that; a multiple of 512
	FromTemplate string // id or name
	FromSnapshot string // id
	FromVolume   string // id or name: a snapshot of now is taken and goes with the clone
	BlockSize    uint32 // 0: the plugin's default
	Labels       map[string]string
}

// ResizeVolumeRequest asks for a new size in bytes.
type ResizeVolumeRequest struct {
	Ref       string
	SizeBytes uint64
}

// RenameRequest asks for a new name.
type RenameRequest struct {
	Ref  string
	Name string
}

// DeleteVolumeRequest asks to destroy a volume.
type DeleteVolumeRequest struct {
	Ref           string
	WithSnapshots bool
}

// AttachRequest asks to let Owner's uid open a volume.
type AttachRequest struct {
	VolumeID string
	Owner    service.Owner
	ReadOnly bool
}

// Attachment says where an attached volume is.
type Attachment struct {
	Path      string // absolute; Owner.UID can open it
	Format    Format
	Block     bool // a block device, not a file
	ReadOnly  bool
	SizeBytes uint64
	BlockSize uint32
}

// DetachRequest asks to take a VM's access away.
type DetachRequest struct {
	VolumeID string
	VMID     string
}

// Snapshot is a volume's state at one moment.
type Snapshot struct {
	ID         string
	Name       string
	VolumeID   string
	VolumeName string
	SizeBytes  uint64 // of the volume at that moment
	UsedBytes  uint64 // that would come back if only this were deleted
	CreatedAt  time.Time
	Labels     map[string]string
}

// CreateSnapshotRequest asks for a snapshot.
type CreateSnapshotRequest struct {
	ID       string
	VolumeID string // id or name
	Name     string
	Labels   map[string]string
}

// ListSnapshotsRequest narrows a list of snapshots.
type ListSnapshotsRequest struct {
	VolumeID string // id or name, or empty
}

// RollbackRequest asks to go back to a snapshot.
type RollbackRequest struct {
	SnapshotID   string
	DestroyNewer bool
}

// ImportRequest asks for a template. Exactly one of File and URL is set.
type ImportRequest struct {
	ID       string
	Name     string
	File     *os.File // opened by whoever asked; read from offset 0; need not be seekable for raw
	FileName string   // what the user called it, for messages and audit
	URL      string   // http or https
	Checksum string   // "sha256:<hex>" or "sha512:<hex>" of the bytes as delivered, or ""
	Labels   map[string]string
}

// ImportState is where an import is. On the wire: append only.
type ImportState uint32

// Import states. The last three are final.
const (
	ImportQueued   ImportState = 1
	ImportRunning  ImportState = 2
	ImportDone     ImportState = 3
	ImportFailed   ImportState = 4
	ImportCanceled ImportState = 5
)

// Final tells whether the state will not change any more.
func (s ImportState) Final() bool { return s >= ImportDone }

// Import is a running or ended import.
type Import struct {
	ID           string
	Name         string
	Source       string // URL without credentials, or file name
	State        ImportState
	Progress     service.Progress
	FailureKind  uint32 // errs.Kind, when failed
	Failure      string // what went wrong, when failed
	Remedy       string
	StartedAt    time.Time
	EndedAt      time.Time // zero while it runs
	SourceFormat string    // "raw", "qcow2", "raw+gzip", … once known
	BytesWritten uint64    // into the template; zeros are not written
}

// Template is an image to clone from.
type Template struct {
	ID             string
	Name           string
	SizeBytes      uint64
	AllocatedBytes uint64
	Source         string
	SourceFormat   string
	Checksum       string // as verified at import, or ""
	CreatedAt      time.Time
	State          State
	StateReason    string
	Labels         map[string]string
	CloneCount     uint32 // volumes that still share its blocks, where the plugin can tell
}

// CreateTemplateRequest asks for a template of a snapshot.
type CreateTemplateRequest struct {
	ID         string
	Name       string
	SnapshotID string
	Labels     map[string]string
}

// Stats says how full the place is, in bytes.
type Stats struct {
	Place            string // pool or directory
	TotalBytes       uint64
	AvailableBytes   uint64
	UsedBytes        uint64
	ProvisionedBytes uint64  // the sum of what guests see
	CompressionRatio float64 // 1 where there is none
	Reflink          bool    // clones share blocks
	Volumes          uint32
	Templates        uint32
	Snapshots        uint32
}

// Backuper is the optional feature FeatureStorageBackup.
type Backuper = service.Backuper
