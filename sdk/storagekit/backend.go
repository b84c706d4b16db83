package storagekit

import (
	"context"
	"os"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// Object is a volume, a template or a snapshot, as the kit remembers it.
type Object = store.Object

// Kinds of objects.
const (
	KindVolume   = store.Volume
	KindTemplate = store.Template
	KindSnapshot = store.Snapshot
)

// Backend is what is special about a place where volumes live. The kit has checked everything that it hands
// over, holds a lock on each object concerned, and has made a note in its metadata before each change, so
// that what a crash interrupted is undone (Undo) or repeated.
//
// Every method but Inspect may therefore be called again after it was interrupted at any point, and does then
// what is left to do. After an error of Create nothing is left. Errors have a kind and, where there is one, a
// remedy.
type Backend interface {
	// Ready makes the place usable, or says why it is not: a directory or pool that is missing now may come
	// later. It returns the path of metadata.db. Until it succeeds all calls but Health fail with what it said.
	Ready(ctx context.Context) (metadata string, err error)
	// Sweep removes what no object and no import needs: half-made things of a life before this one. keep is
	// asked with the id that a temporary thing belongs to. What the backend has not made itself stays.
	Sweep(ctx context.Context, keep func(id string) bool) error

	// Create makes o: an empty volume where from is nil; else a volume, snapshot or template of from. o.Size
	// is at least from's. It returns what the place made of it (block size).
	Create(ctx context.Context, o Object, from *Object) (Object, error)
	// Undo removes what is left of a Create or an import of o that did not come to its end, o itself included.
	Undo(ctx context.Context, o Object) error
	// Delete removes o. What was made from it lives on.
	Delete(ctx context.Context, o Object) error
	// Resize makes a volume larger.
	Resize(ctx context.Context, o Object, size uint64) error
	// Rename tells the new name of o. A place that does not use names does nothing.
	Rename(ctx context.Context, o Object, name string) error
	// Save keeps labels and attachments with o, where the place is able to.
	Save(ctx context.Context, o Object) error

	// PrepareRollback does what can be undone by UndoRollback, or refuses; CommitRollback what is quick and
	// must be finished, including the end of the newer snapshots.
	PrepareRollback(ctx context.Context, vol, snap Object, newer []Object) error
	UndoRollback(ctx context.Context, vol Object) error
	CommitRollback(ctx context.Context, vol, snap Object, newer []Object) error

	// Grant lets uid open the volume and returns its path; Revoke ends that. Other uids are not touched.
	Grant(ctx context.Context, o Object, uid uint32, readOnly bool) (Device, error)
	Revoke(ctx context.Context, o Object, uid uint32) error

	// Inspect says how the objects are; those it does not know are missing from the answer. It is one look
	// for all of them, and one damaged object does not fail it.
	Inspect(ctx context.Context, objects []Object) (map[string]Facts, error)
	// Space says how full the place is.
	Space(ctx context.Context) (Space, error)
	// Conditions looks for lasting trouble. Called every half minute, not under a caller's deadline.
	Conditions(ctx context.Context) []service.Condition

	// Staging is a directory of the plugin's own for downloads.
	Staging() string
	// OpenTarget makes what an import of template o is written to, invisible until Finish; size is -1 while
	// unknown. Whatever of o was there before is gone.
	OpenTarget(ctx context.Context, o Object, size int64) (Target, error)
	// Finish makes the written target the template o, whole and durable.
	Finish(ctx context.Context, o Object) error
}

// Rebuilder is a Backend that can list its own objects: the kit rebuilds metadata.db from it when that is gone
// or damaged.
type Rebuilder interface {
	Objects(ctx context.Context) ([]Object, error)
}

// Device says where a volume is for whoever may open it.
type Device struct {
	Path  string
	Block bool
}

// Facts is how an object is now.
type Facts struct {
	Size      uint64 // 0: as recorded
	Allocated uint64 // bytes that it takes by itself
	BlockSize uint32
	Clones    uint32 // volumes that share its blocks, where known
	Damage    string // what is wrong with it, or ""
}

// Space is how full a place is, in bytes.
type Space struct {
	Place       string
	Total       uint64
	Available   uint64
	Used        uint64
	Compression float64 // 1 where there is none
	Reflink     bool    // clones share blocks
}

// Target is what an import is written to.
type Target struct {
	File  *os.File // the caller closes it
	Size  int64    // that it has
	Block bool
	// Grow makes a block device larger; a file is grown by who writes it.
	Grow func(size int64) (int64, error)
	// Settle gives a block device its final size.
	Settle func(size int64) error
}

// Clock is the time, for tests.
type Clock func() time.Time
