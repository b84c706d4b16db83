package chapi

// What we send and read of cloud-hypervisor's API, in its own names. Fields that are not sent take its
// defaults; fields that it adds are ignored. A test holds all of this against its OpenAPI document.

// VMConfig is a VM (VmConfig).
type VMConfig struct {
	CPUs     CPUs      `json:"cpus"`
	Memory   Memory    `json:"memory"`
	Payload  Payload   `json:"payload"`
	Disks    []Disk    `json:"disks,omitempty"`
	Net      []Net     `json:"net,omitempty"`
	RNG      RNG       `json:"rng"`
	Balloon  *Balloon  `json:"balloon,omitempty"`
	Serial   Console   `json:"serial"`
	Console  Console   `json:"console"`
	PVPanic  bool      `json:"pvpanic"`
	Platform *Platform `json:"platform,omitempty"`
	Vsock    *Vsock    `json:"vsock,omitempty"`
	Watchdog bool      `json:"watchdog,omitempty"`

	Landlock      bool           `json:"landlock_enable,omitempty"`
	LandlockRules []LandlockRule `json:"landlock_rules,omitempty"`
}

// Vsock is VsockConfig.
type Vsock struct {
	CID    uint32 `json:"cid"`
	Socket string `json:"socket"`
}

// LandlockRule is LandlockConfig. Access is "r" or "rw", and holds for all below Path, which must exist.
type LandlockRule struct {
	Path   string `json:"path"`
	Access string `json:"access"`
}

// CPUs is CpusConfig. Nested has no omitempty: its default is true, so off must be said.
type CPUs struct {
	Boot   uint32 `json:"boot_vcpus"`
	Max    uint32 `json:"max_vcpus"`
	Nested bool   `json:"nested"`

	Topology *Topology `json:"topology,omitempty"`
}

// Topology is CpuTopology.
type Topology struct {
	ThreadsPerCore uint32 `json:"threads_per_core"`
	CoresPerDie    uint32 `json:"cores_per_die"`
	DiesPerPackage uint32 `json:"dies_per_package"`
	Packages       uint32 `json:"packages"`
}

// Memory is MemoryConfig; sizes are bytes.
type Memory struct {
	Size        uint64 `json:"size"`
	HotplugSize uint64 `json:"hotplug_size,omitempty"`
	Shared      bool   `json:"shared,omitempty"`
	HugePages   bool   `json:"hugepages,omitempty"`
	// HugePageSize is said because without it the server asks a file system that is mounted on /dev/hugepages.
	HugePageSize uint64 `json:"hugepage_size,omitempty"`
}

// Payload is PayloadConfig.
type Payload struct {
	Firmware  string `json:"firmware,omitempty"`
	Kernel    string `json:"kernel,omitempty"`
	Cmdline   string `json:"cmdline,omitempty"`
	Initramfs string `json:"initramfs,omitempty"`
}

// Disk is DiskConfig. ImageType has no omitempty: left out, the format would be guessed (CVE-2026-27211).
type Disk struct {
	ID        string `json:"id"`
	Path      string `json:"path"`
	ReadOnly  bool   `json:"readonly"`
	Direct    bool   `json:"direct"`
	Serial    string `json:"serial,omitempty"`
	ImageType string `json:"image_type"`
	NumQueues uint32 `json:"num_queues,omitempty"`

	RateLimiter *RateLimiter `json:"rate_limiter_config,omitempty"`
}

// RateLimiter is RateLimiterConfig.
type RateLimiter struct {
	Bandwidth *TokenBucket `json:"bandwidth,omitempty"`
	Ops       *TokenBucket `json:"ops,omitempty"`
}

// TokenBucket is a bucket of Size tokens, bytes or operations, that fills in RefillTime milliseconds.
type TokenBucket struct {
	Size       uint64 `json:"size"`
	RefillTime uint64 `json:"refill_time"`
}

// Net is NetConfig. Queues counts receive and transmit queues, two a pair. Descriptors of a TAP travel beside.
type Net struct {
	ID          string `json:"id"`
	MAC         string `json:"mac"`
	TAP         string `json:"tap,omitempty"`
	NumQueues   int    `json:"num_queues"`
	VhostUser   bool   `json:"vhost_user,omitempty"`
	VhostSocket string `json:"vhost_socket,omitempty"`
	VhostMode   string `json:"vhost_mode,omitempty"`
}

// RNG is RngConfig.
type RNG struct {
	Src string `json:"src"`
}

// Balloon is BalloonConfig.
type Balloon struct {
	Size              uint64 `json:"size"`
	DeflateOnOOM      bool   `json:"deflate_on_oom"`
	FreePageReporting bool   `json:"free_page_reporting"`
}

// Console is ConsoleConfig and SerialConfig.
type Console struct {
	Mode   string `json:"mode"`
	Socket string `json:"socket,omitempty"`
}

// Platform is PlatformConfig. The field's name changed with version 53.
type Platform struct {
	SystemUUID string `json:"system_uuid,omitempty"`
	UUID       string `json:"uuid,omitempty"`
}

// Ping is VmmPingResponse.
type Ping struct {
	Version string `json:"version"`
	PID     int64  `json:"pid"`
}

// Info is what we read of VmInfo.
type Info struct {
	State  string `json:"state"`
	Config struct {
		Disks []Disk `json:"disks"`
	} `json:"config"`
}

// States of a VM.
const (
	StateCreated  = "Created"
	StateRunning  = "Running"
	StateShutdown = "Shutdown"
	StatePaused   = "Paused"
)

// Counters is VmCounters: by device, then by counter.
type Counters map[string]map[string]uint64

// RemoveDevice is VmRemoveDevice.
type RemoveDevice struct {
	ID string `json:"id"`
}

// ResizeDisk is VmResizeDisk.
type ResizeDisk struct {
	ID   string `json:"id"`
	Size uint64 `json:"desired_size"`
}

// Resize is VmResize; what is not set stays.
type Resize struct {
	CPUs uint32 `json:"desired_vcpus,omitempty"`
	RAM  uint64 `json:"desired_ram,omitempty"`
}

// Snapshot is VmSnapshotConfig: a file URL of an empty directory.
type Snapshot struct {
	Destination string `json:"destination_url"`
}

// Restore is RestoreConfig. NetFDs has the NICs whose descriptors come along, in the order of the descriptors;
// the OpenAPI document does not have it (the server does, since version 43).
type Restore struct {
	Source string        `json:"source_url"`
	Mode   string        `json:"memory_restore_mode,omitempty"`
	NetFDs []RestoredNet `json:"net_fds,omitempty"`
	Resume bool          `json:"resume"`
}

// RestoredNet is a NIC and how many descriptors are its own.
type RestoredNet struct {
	ID     string `json:"id"`
	NumFDs int    `json:"num_fds"`
}
