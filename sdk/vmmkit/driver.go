package vmmkit

import (
	"context"
	"encoding/json"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/console"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

// Driver knows one hypervisor. The kit calls it for several VMs at once, but for one VM one call at a time,
// except where a method says otherwise.
type Driver interface {
	// Check says what of a definition the hypervisor cannot do, as Invalid with the field.
	Check(spec vmm.Spec) error
	// Prepare says what to run. It may make files in m.Dir; it starts nothing. The command line must hold
	// m.Marker as an argument of its own (argument 0 will do).
	Prepare(ctx context.Context, m Machine) (Launch, error)
	// Connect takes hold of a process, newly started (m.Fresh) or found again, and returns when the guest
	// runs, or is paused as m.Paused asks. It is told of the process's end by ctx. Each event is handed to
	// fn, which does not block; after EventLost comes none. Connecting again after that is possible.
	Connect(ctx context.Context, m Machine, fn func(Event)) (Instance, error)
	// Conditions is trouble that lasts, from memory.
	Conditions() []service.Condition
}

// Coroner is a Driver that can tell, from what a hypervisor left in its directory, why one ended while nobody
// watched.
type Coroner interface {
	// Autopsy gives the reason, and whether it is a failure; "" if it is not known.
	Autopsy(m Machine) (reason string, fault bool)
}

// VsockSocketer is a Driver whose guests' virtio sockets are met at a unix socket in the VM's directory.
type VsockSocketer interface{ VsockSocket() string }

// Machine is a VM as a driver needs it.
type Machine struct {
	ID        string
	Dir       string // the VM's own directory
	Spec      vmm.Spec
	Marker    string
	Kernel    string // paths of copies, or ""
	Initramfs string
	CloudInit string // path of the NoCloud volume, or ""
	RunAs     vmm.RunAs
	Paused    bool
	Fresh     bool
	Disks     []vmm.DiskAttachment // at launch only
	NICs      []vmm.NICAttachment
	State     json.RawMessage // what Prepare gave
	Process   *proc.Process   // at Connect
	Restore   *Restore        // at launch: start from this and boot nothing; nil otherwise
	// Share, at Connect, lets us use what the hypervisor has made in Dir for itself alone (a socket of mode 0700). It
	// does nothing where the hypervisor has no uid of its own.
	Share func(ctx context.Context) error
}

// Restore is a state that an instance wrote.
type Restore struct {
	Dir   string          // where it wrote; to be read only
	Work  string          // an empty directory of the VM's own, removed when it is started
	State json.RawMessage // what it gave
	Spec  vmm.Spec        // what it had then; the machine's has the same shape
}

// Launch is a hypervisor to be started.
type Launch struct {
	Command    proc.Command    // Output is set by the kit
	Hypervisor string          // "qemu 7.2.22 (tcg)"
	State      json.RawMessage // kept with the VM, for Connect
	ReadOnly   []string        // files outside of the VM's directory that it reads, besides kernel and initramfs: firmware
	Close      func()          // lets go of what Prepare opened, once the process has it; or nil
}

// Instance is a hypervisor that is held. Close may be called at any time, by anybody; other calls then fail.
type Instance interface {
	Status(ctx context.Context) (Status, error)
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	PowerButton(ctx context.Context) error
	// Reset resets the machine and lets it run, also after the guest has powered off.
	Reset(ctx context.Context) error
	// Quit asks the hypervisor to end at once, with all that was written to disks kept.
	Quit(ctx context.Context) error
	// Dial opens the way to the serial port; while it is open it may take the port's output from nobody.
	Dial(ctx context.Context) (Port, error)
	// Close lets go of the process, which goes on.
	Close() error

	PlugDisk(ctx context.Context, d vmm.DiskAttachment) error // with d.Limit
	UnplugDisk(ctx context.Context, name string) error
	PlugNIC(ctx context.Context, n vmm.NICAttachment) error
	UnplugNIC(ctx context.Context, id string) error
	DiskResized(ctx context.Context, name string, size uint64) error
	Counters(ctx context.Context) ([]vmm.DeviceCounters, error)
}

// Port is where to type.
type Port interface {
	Write(b []byte) (int, error)
	Close() error
}

// Resizer is an Instance whose vCPUs and memory change while it runs.
type Resizer interface {
	// Resize sets both; they are within the maxima that the VM was started with.
	Resize(ctx context.Context, cpus uint32, memory uint64) error
}

// Snapshotter is an Instance that can write its guest's memory and devices to files.
type Snapshotter interface {
	// Snapshot writes those of a paused guest into dir, an empty directory, as regular files. The guest stays
	// paused. What it gives is handed to Prepare and Connect of a VM that is started from it.
	Snapshot(ctx context.Context, dir string) (json.RawMessage, error)
}

// Feeder is an Instance whose serial output does not come into the log file by itself; the kit hands it on.
type Feeder interface {
	// Feed copies output to log until the port or the instance is closed.
	Feed(log *console.Log)
}

// RunState is what a hypervisor says of its guest.
type RunState int

// Run states.
const (
	GuestRunning RunState = iota
	GuestPaused
	GuestOff // powered off; the process waits to be ended
)

// Status is RunState with a reason, for a state that nobody asked for.
type Status struct {
	State  RunState
	Reason string // "disk root: no space left on the host"
}

// EventKind is what a hypervisor tells.
type EventKind int

// Event kinds.
const (
	EventOff     EventKind = iota // the guest powered itself off
	EventReset                    // the machine was reset, by the guest or by us
	EventPanic                    // the guest's kernel panicked
	EventPaused                   // the vCPUs stopped
	EventResumed                  // and went on
	EventEnding                   // the hypervisor is ending, Reason says why
	EventLost                     // the connection is gone
)

// Event is one thing that a hypervisor tells.
type Event struct {
	Kind   EventKind
	Reason string
}

// Limits of time, for what hypervisors do at once or never.
const (
	askTimeout     = 10 * time.Second // pause, reset, …
	connectTimeout = 2 * time.Minute  // from spawn to a running guest: memory may have to be found first
	resizeTimeout  = 40 * time.Second // a guest lets vCPUs go in its own time
	quitTimeout    = 5 * time.Second  // from Quit to SIGKILL
	stopTimeout    = 60 * time.Second // of Stop, unless the caller says otherwise
	pressAgain     = 10 * time.Second // a guest that boots misses the power button
)
