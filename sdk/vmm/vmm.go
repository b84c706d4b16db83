// Package vmm is the contract of vmm plugins: VM definitions, hypervisor processes, consoles.
//
// # Words
//
// A definition is what a VM should be; it is durable and belongs to the vmm plugin. The runtime is the
// hypervisor process that runs it. Volumes and NICs are named by id in a definition; what they are on this
// host is told with each Start, by the caller that attached them.
//
// # Lifecycle
//
//	Create → stopped → Start → starting → running ⇄ paused
//	running → Stop (power button, wait, force) → stopping → stopped
//	a guest that powers itself off → stopped, reason "guest powered off"
//	a hypervisor that dies → failed, with the reason
//
// Hypervisors outlive the plugin: it finds them again at its start. The plugin never starts a second
// hypervisor for a VM whose first it cannot account for.
package vmm

import (
	"context"
	"os"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
)

// Service is the vmm contract.
type Service interface {
	service.Base

	// Create stores a definition. Kernel and initramfs, if given, are copied now. Kinds: Invalid, Exists.
	Create(ctx context.Context, req CreateRequest) (VM, error)
	// Get finds by id or name. Kinds: NotFound.
	Get(ctx context.Context, req Ref) (VM, error)
	// List lists all, ordered by name, from memory: a hung hypervisor never delays it.
	List(ctx context.Context) ([]VM, error)
	// Update changes the definition; what a running VM cannot take over shows at its next start. Generation
	// is compared: Conflict if somebody changed it meanwhile.
	Update(ctx context.Context, req UpdateRequest) (VM, error)
	// Delete removes a stopped or failed VM's definition and directory. Precondition (VM_RUNNING) otherwise.
	Delete(ctx context.Context, req Ref) error

	// Start launches the hypervisor and returns when it runs the guest's first instruction, or with the
	// reason why not, in which case nothing runs. Starting a running VM returns it. Precondition while
	// stopping; Conflict while somebody else starts it.
	Start(ctx context.Context, req StartRequest) (VM, error)
	// Stop presses the power button, waits Timeout, then forces. It returns when no process is left.
	Stop(ctx context.Context, req StopRequest) (VM, error)
	// Kill ends the hypervisor at once, whatever the state. It returns when no process is left.
	Kill(ctx context.Context, req Ref) (VM, error)
	// Pause stops the vCPUs; Resume lets them go on. Both return the VM when it is already so.
	Pause(ctx context.Context, req Ref) (VM, error)
	Resume(ctx context.Context, req Ref) (VM, error)
	// Reboot asks the guest by its reset (Hard) or power button and start again.
	Reboot(ctx context.Context, req RebootRequest) (VM, error)

	// Console joins the serial console. History comes first, from Session.Replay bytes back. Any number may
	// watch; one writes, unless Session.Steal. It ends when the VM stops (io.EOF), ctx ends, or in ends.
	Console(ctx context.Context, req ConsoleRequest, io ConsoleIO) error
	// Watch calls fn with all VMs as they are now (type Snapshot, then one SnapshotEnd), then with each
	// change, in order, until fn or ctx ends it. A watcher that lags gets Lagged and a new snapshot.
	Watch(ctx context.Context, fn func(Event) error) error
}

// Ref names a VM by its id or, where it is no id, by its name.
type Ref struct {
	Ref string
}

// State of a VM. On the wire: append only.
type State uint32

// States.
const (
	StateStopped  State = 1
	StateStarting State = 2
	StateRunning  State = 3
	StatePaused   State = 4
	StateStopping State = 5
	StateFailed   State = 6 // Reason says why; no process is left
	StateUnknown  State = 7 // a process is there but does not answer; it is left alone; Reason says more
)

var stateNames = map[State]string{StateStopped: "stopped", StateStarting: "starting", StateRunning: "running",
	StatePaused: "paused", StateStopping: "stopping", StateFailed: "failed", StateUnknown: "unknown"}

// String is the state's name, or "?".
func (s State) String() string {
	if n, ok := stateNames[s]; ok {
		return n
	}
	return "?"
}

// Live tells whether a hypervisor process is, or may be, there.
func (s State) Live() bool {
	return s == StateStarting || s == StateRunning || s == StatePaused || s == StateStopping || s == StateUnknown
}

// Spec is a VM's definition.
type Spec struct {
	Name        string
	CPUs        uint32 // 1 to 256
	MaxCPUs     uint32 // 0: CPUs
	MemoryBytes uint64 // multiple of 1 MiB, at least 16 MiB
	MaxMemory   uint64 // 0: MemoryBytes
	Boot        Boot
	Disks       []Disk
	NICs        []NIC
	CloudInit   CloudInit
	Autostart   bool
	Nested      bool // the guest may itself use KVM
	HugePages   bool
	Labels      map[string]string
	Topology    Topology
	Watchdog    bool   // a watchdog device: a guest that has begun to feed it and stops is reset
	Vsock       uint32 // the guest's address on a virtio socket, from 3; 0: it has none. See VM.VsockSocket
}

// Topology is how a guest sees its vCPUs, MaxCPUs of them. All 0: one socket, one thread a core. Otherwise each
// is at least 1 and their product is MaxCPUs.
type Topology struct {
	Sockets uint32
	Cores   uint32 // of a socket
	Threads uint32 // of a core: 1 or 2
}

// Boot says how a VM boots: directly into a kernel (HasKernel), or by firmware from the first disk.
type Boot struct {
	Cmdline      string // direct boot only
	HasKernel    bool   // set by the plugin: a kernel was given at Create or Update
	HasInitramfs bool
	KernelName   string // what the user called it, for display
	KernelSHA256 string // set by the plugin
	Firmware     string // firmware boot: "" or "bios" or "uefi"
}

// Disk is a volume that the VM has.
type Disk struct {
	Name     string // unique in the VM; the guest sees it as the disk's serial (at most 20 bytes): "root"
	VolumeID string
	ReadOnly bool
	Delete   bool // the volume was made for this VM and goes with it
	Limit    RateLimit
}

// RateLimit bounds what a disk may do; 0 is no bound. A second's worth may be used at once.
type RateLimit struct {
	BytesPerSecond uint64
	OpsPerSecond   uint64
}

// NIC is a NIC that the VM has.
type NIC struct {
	NICID  string
	MAC    string // told by the net plugin, put into cloud-init's network-config
	Delete bool   // the NIC was made for this VM and goes with it
}

// CloudInit is what the NoCloud datasource hands to the guest. All empty: no ISO is attached.
type CloudInit struct {
	UserData      string // "#cloud-config …" or a script
	MetaData      string // "" : instance-id and local-hostname are made
	NetworkConfig string // "" : DHCP on each NIC by its MAC
}

// VM is a VM as it is now.
type VM struct {
	ID         string
	Spec       Spec
	Generation uint64 // grows with each Update
	CreatedAt  time.Time
	State      State
	Reason     string // why it is so: "guest powered off", "hypervisor died: signal 9", …
	Since      time.Time
	Desired    State  // StateRunning or StateStopped: what was asked for last
	RunAs      RunAs  // who its hypervisor runs as, or will
	PID        uint32 // hypervisor, 0 if none
	StartedAt  time.Time
	Hypervisor string // "qemu 7.2.22 (tcg)", "cloud-hypervisor 53.0 (kvm)"
	Pending    bool   // the definition has changes that wait for the next start
	// VsockSocket is where programs on the host meet the guest's virtio socket while it runs: a unix socket that
	// takes "CONNECT <port>\n" and is found beside it, with "_<port>", by guests that call. "": by AF_VSOCK.
	VsockSocket string
}

// RunAs is the identity of a hypervisor process.
type RunAs struct {
	UID uint32
	GID uint32
}

// CreateRequest asks for a VM. Kernel and Initramfs are opened by whoever asked.
type CreateRequest struct {
	ID        string
	Spec      Spec
	Kernel    *os.File // nil: firmware boot
	Initramfs *os.File
	// BootFrom is the id of a memory snapshot whose kernel and initramfs are taken, in place of files.
	BootFrom string
}

// UpdateRequest replaces a definition.
type UpdateRequest struct {
	ID         string
	Generation uint64
	Spec       Spec
	Kernel     *os.File // nil: as it is
	Initramfs  *os.File
}

// StartRequest says what the definition's volumes and NICs are on this host, in the definition's order.
type StartRequest struct {
	ID     string
	Disks  []DiskAttachment
	NICs   []NICAttachment
	Paused bool // create the hypervisor and leave the vCPUs stopped
}

// DiskAttachment is a volume as storage attached it.
type DiskAttachment struct {
	Name      string
	VolumeID  string
	Path      string
	Format    string // "raw"
	Block     bool
	ReadOnly  bool
	SizeBytes uint64
	Limit     RateLimit // of a disk that is plugged; at a start the definition's holds
}

// NICAttachment is a NIC as net attached it; one of TAP, SocketPath and TAPName is set.
type NICAttachment struct {
	NICID      string
	MAC        string
	MTU        uint32
	Queues     uint32
	TAP        []*os.File
	SocketPath string
	TAPName    string
}

// StopRequest asks for a graceful stop.
type StopRequest struct {
	Ref     string
	Timeout time.Duration // 0: the plugin's default (60 s). Then force, unless NoForce
	NoForce bool          // give up with Deadline instead, the VM still running
}

// RebootRequest asks for a reboot.
type RebootRequest struct {
	Ref     string
	Hard    bool
	Timeout time.Duration // as in StopRequest
}

// ConsoleRequest asks for the serial console.
type ConsoleRequest struct {
	Ref      string
	ReadOnly bool
	Steal    bool   // take the writer's place
	Replay   uint32 // bytes of history first; 0: none
	NoFollow bool   // history only
}

// ConsoleIO is the two directions of a console session.
type ConsoleIO struct {
	In  <-chan []byte      // to the guest; closed: watch only from now on
	Out func([]byte) error // from the guest; must not keep the slice
}

// EventType is what an Event says. On the wire: append only.
type EventType uint32

// Event types.
const (
	EventSnapshot    EventType = 1 // VM as it is, at the start of a watch
	EventSnapshotEnd EventType = 2
	EventChanged     EventType = 3 // created, updated, or another state: see VM
	EventDeleted     EventType = 4
	EventRebooted    EventType = 5 // the guest rebooted
	EventPanicked    EventType = 6 // the guest's kernel said so (pvpanic)
	EventLagged      EventType = 7 // events were lost; a snapshot follows
)

// Event is a change of a VM.
type Event struct {
	Type EventType
	Time time.Time
	VM   VM // in Deleted: as it was
}

// DiskHotplugger is the optional feature FeatureVMMHotplugDisk. The definition is changed by Update.
type DiskHotplugger interface {
	PlugDisk(ctx context.Context, req PlugDiskRequest) error
	// UnplugDisk returns when the hypervisor has closed the device. Deadline: the guest did not let go.
	UnplugDisk(ctx context.Context, req UnplugRequest) error
}

// NICHotplugger is the optional feature FeatureVMMHotplugNIC.
type NICHotplugger interface {
	PlugNIC(ctx context.Context, req PlugNICRequest) error
	UnplugNIC(ctx context.Context, req UnplugRequest) error
}

// PlugDiskRequest adds a disk to a running VM.
type PlugDiskRequest struct {
	ID   string
	Disk DiskAttachment
}

// PlugNICRequest adds a NIC to a running VM.
type PlugNICRequest struct {
	ID  string
	NIC NICAttachment
}

// UnplugRequest removes a device from a running VM.
type UnplugRequest struct {
	ID   string
	Name string // disk name or NIC id
}

// DiskResizer is the optional feature FeatureVMMDiskResize.
type DiskResizer interface {
	// DiskResized tells the guest that a volume has grown.
	DiskResized(ctx context.Context, req DiskResizedRequest) error
}

// DiskResizedRequest names the disk.
type DiskResizedRequest struct {
	ID        string
	Name      string
	SizeBytes uint64
}

// Resizer is the optional feature FeatureVMMResize.
type Resizer interface {
	Resize(ctx context.Context, req ResizeRequest) (VM, error)
}

// ResizeRequest asks for vCPUs and memory within the maximum; 0 leaves as it is.
type ResizeRequest struct {
	Ref         string
	CPUs        uint32
	MemoryBytes uint64
}

// Snapshotter is the optional feature FeatureVMMSnapshot.
type Snapshotter interface {
	// Snapshot writes memory and device state of a paused VM into the plugin's directory under SnapshotID. The
	// VM stays paused, so that its volumes can be snapshotted at the same point. Repeated, it gives what is
	// there. Kinds: Precondition (VM_STATE) unless paused, Exists, Exhausted.
	Snapshot(ctx context.Context, req SnapshotRequest) (MemorySnapshot, error)
	// StartFromSnapshot starts a VM, this one or another of the same shape, from such a state, instead of
	// booting it. Its volumes must hold what they held then. Kinds: as Start; Precondition (OTHER_SHAPE) when
	// vCPUs, memory, disks or NICs differ in number or size, (OTHER_HYPERVISOR) when another program wrote it.
	StartFromSnapshot(ctx context.Context, req StartFromSnapshotRequest) (VM, error)
	// ListSnapshots lists those of one VM, by id or name, or with an empty Ref all, oldest first. They outlive
	// the VM.
	ListSnapshots(ctx context.Context, req Ref) ([]MemorySnapshot, error)
	// DeleteSnapshot takes the snapshot's id. One that is gone is no error.
	DeleteSnapshot(ctx context.Context, req Ref) error
}

// SnapshotRequest asks for a memory snapshot.
type SnapshotRequest struct {
	ID         string
	SnapshotID string
	Name       string
	Disks      []SnapshotDisk // kept with it for the caller
}

// SnapshotDisk is the storage plugin's snapshot of a disk at the same point.
type SnapshotDisk struct {
	Name       string // of the disk
	SnapshotID string
}

// StartFromSnapshotRequest asks to start from one.
type StartFromSnapshotRequest struct {
	SnapshotID string
	Start      StartRequest
}

// MemorySnapshot is a VM's memory and device state.
type MemorySnapshot struct {
	ID         string
	Name       string
	VMID       string
	SizeBytes  uint64
	CreatedAt  time.Time
	Hypervisor string // only this one can restore it
	Spec       Spec   // what the VM had at that moment
	Disks      []SnapshotDisk
}

// Counter is the optional feature FeatureVMMCounters.
type Counter interface {
	Counters(ctx context.Context, req Ref) (Counters, error)
}

// Counters of a running VM.
type Counters struct {
	CPUTime       time.Duration
	ResidentBytes uint64
	Devices       []DeviceCounters
}

// DeviceCounters of one disk or NIC.
type DeviceCounters struct {
	Name       string
	ReadBytes  uint64
	ReadOps    uint64
	WriteBytes uint64
	WriteOps   uint64
}

// VhostUserer marks the optional feature FeatureVMMVhostUser: NICs may be attached by a vhost-user socket,
// which is then preferred to TAPs.
type VhostUserer interface{ TakesVhostUser() }

// Backuper is the optional feature FeatureVMMBackup.
type Backuper = service.Backuper
