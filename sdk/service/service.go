// Package service holds what every plugin answers and may ask, whatever its kind.
//
// # Words
//
// A plugin is a program that serves one contract of one [Kind] over gRPC. The host is the program that
// started it: the core, or the conformance suite. A feature is an optional part of a contract; the SDK
// finds out which a plugin has from the optional interfaces that its implementation satisfies, so a
// plugin cannot declare what it has not. A condition is trouble that lasts.
//
// # What holds for every method of every contract
//
//   - Methods may be called concurrently, also on the same object; the plugin serialises where it must.
//   - The caller chooses ids. A create repeated with equal fields returns the same object; with other
//     fields it fails with errs.Exists. Deletes and detaches of what is already gone return nil.
//   - When ctx ends, a method returns soon; the change is then either wholly done or wholly undone, and
//     Get tells which.
//   - Values passed and returned belong to the receiver; neither side keeps references into them.
//   - An *os.File in a request stays the caller's to close, and the callee gets its own duplicate; an
//     *os.File in a response is the caller's to close.
//   - Errors are as package errs says. Fields in errors are in proto spelling (snake_case).
package service

import (
	"context"
	"io"
	"time"
)

// Kind is the kind of a service; there is exactly one plugin of each kind in a running system.
type Kind string

// The four kinds.
const (
	KindStorage Kind = "storage"
	KindNet     Kind = "net"
	KindVMM     Kind = "vmm"
	KindLog     Kind = "log"
)

// Kinds lists all kinds in the order in which the core starts them.
func Kinds() []Kind { return []Kind{KindLog, KindStorage, KindNet, KindVMM} }

// ContractMajor is the major version of all contracts: go-plugin's protocol version. Within a major only
// additions are made.
const ContractMajor = 1

// ContractMinor counts the additions.
const ContractMinor = 0

// Feature is an optional part of a contract. The numbers are on the wire: append only.
type Feature uint32

// Features. Hundreds are the kind: 1 storage, 2 net, 3 vmm, 4 log.
const (
	FeatureStorageBackup  Feature = 101 // storage.Backuper
	FeatureStorageReflink Feature = 102 // clones share blocks (said by storage.Stats, informative)
	FeatureNetUpdate      Feature = 201 // net.Updater: networks and NICs change while in use
	FeatureNetIPv6        Feature = 202 // net.IPv6er: networks may have an IPv6 subnet
	FeatureNetSecurity    Feature = 203 // net.SecurityGrouper
	FeatureNetBridge      Feature = 204 // net.Bridger: networks of mode bridge
	FeatureNetBackup      Feature = 205 // net.Backuper
	FeatureNetVhostUser   Feature = 206 // net.VhostUserer: attachments by vhost-user socket
	FeatureVMMHotplugDisk Feature = 301 // vmm.DiskHotplugger
	FeatureVMMHotplugNIC  Feature = 302 // vmm.NICHotplugger
	FeatureVMMResize      Feature = 303 // vmm.Resizer: vCPUs and memory of a running VM
	FeatureVMMSnapshot    Feature = 304 // vmm.Snapshotter: memory snapshot and restore
	FeatureVMMCounters    Feature = 305 // vmm.Counter
	FeatureVMMBackup      Feature = 306 // vmm.Backuper
	FeatureVMMDiskResize  Feature = 307 // vmm.DiskResizer: tell the guest that a disk has grown
	FeatureVMMVhostUser   Feature = 308 // vmm.VhostUserer: NICs by vhost-user socket
	FeatureLogVerify      Feature = 401 // log.Verifier: audit chain
	FeatureLogBackup      Feature = 402 // log.Backuper
)

// Info says what a plugin is.
type Info struct {
	Kind          Kind
	Name          string // product: "storage-dir"
	Version       string // of the product
	ContractMajor uint32
	ContractMinor uint32
	Features      []Feature
	Needs         Needs
	PID           uint32
	StartedAt     time.Time
}

// Needs says what a plugin requires of the host, so that the operator can be told before something fails.
type Needs struct {
	Root         bool     // must run as uid 0
	Capabilities []string // "CAP_NET_ADMIN", …
	Devices      []string // device nodes it opens read-write: "/dev/kvm"
	Programs     []string // programs it runs: "qemu-system-x86_64"
}

// Severity of a condition.
type Severity uint32

// Severities. On the wire: append only.
const (
	SeverityInfo     Severity = 1
	SeverityWarning  Severity = 2
	SeverityCritical Severity = 3 // the service cannot do its work
)

// Condition is trouble that lasts. Code is stable; the same condition keeps Since until it is gone.
type Condition struct {
	Code     string // UPPER_SNAKE
	Severity Severity
	Since    time.Time
	Text     string
	Remedy   string
	Object   string // id of the object concerned, or ""
}

// Health is a plugin's own judgement of itself. Answering at all within the deadline is liveness.
type Health struct {
	Conditions []Condition
}

// Base is what an implementation of any kind has.
type Base interface {
	// Health must answer at once, from memory.
	Health(ctx context.Context) (Health, error)
	// Shutdown finishes or undoes what is under way, makes state durable and stops serving. It does not
	// stop what must outlive the plugin (hypervisors, packet workers). ctx carries the deadline.
	Shutdown(ctx context.Context) error
}

// Host is what a plugin may ask of its host. It is never nil: stand-alone, calls go to the plugin's log.
// The host stamps who speaks from the connection, never from the message.
type Host interface {
	// Audit makes a durable record of a change that nobody asked for through the API (a guest that
	// powered itself off, a template swept). id makes it idempotent.
	Audit(ctx context.Context, rec AuditRecord) error
	// Publish tells the host something that is worth an event; it may be lost.
	Publish(ctx context.Context, ev Event) error
}

// AuditRecord is one line of the audit trail from a plugin.
type AuditRecord struct {
	ID      string // UUIDv7
	Time    time.Time
	Message string
	Objects []string
	Labels  map[string]string
}

// Event is something that happened to an object.
type Event struct {
	Time    time.Time
	Type    string // "vm.stopped", "nic.error", …
	Objects []string
	Labels  map[string]string
}

// Owner is who uses a volume or a NIC: the VM, and the identity of its hypervisor process, which is the
// only one that may open what is attached.
type Owner struct {
	VMID string
	UID  uint32
	GID  uint32
}

// Progress of long work. Total is 0 while unknown. Phase is one word: "download", "convert", "verify".
type Progress struct {
	Phase string
	Done  uint64
	Total uint64
}

// Backuper streams a consistent copy of a plugin's own state while it works, and puts it back on an empty
// plugin. What the stream holds is the plugin's business; it is versioned and carries its own checksums.
type Backuper interface {
	Backup(ctx context.Context, w io.Writer) error
	Restore(ctx context.Context, r io.Reader) error
}
