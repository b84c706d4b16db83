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
}

// CPUs is CpusConfig. Nested has no omitempty: its default is true, so off must be said.
type CPUs struct {
	Boot   uint32 `json:"boot_vcpus"`
	Max    uint32 `json:"max_vcpus"`
	Nested bool   `json:"nested"`
}

// Memory is MemoryConfig; sizes are bytes.
type Memory struct {
	Size        uint64 `json:"size"`
	HotplugSize uint64 `json:"hotplug_size,omitempty"`
	Shared      bool   `json:"shared,omitempty"`
	HugePages   bool   `json:"hugepages,omitempty"`
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
