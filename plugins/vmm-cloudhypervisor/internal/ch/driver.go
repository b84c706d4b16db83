// Package ch drives cloud-hypervisor for vmmkit.
//
// # What a hypervisor is given
//
// Its argument 0 is the VM's marker. Descriptor 3 is the listening API socket, made by us, so that we are
// connected before it has begun. All else it is told by requests: nothing that a user chose is ever an option.
// It writes events to events.json and its complaints to hypervisor.log; the serial port is a socket that it
// makes itself, whose output we append to console.log. While we are away it keeps the latest output in a ring
// of its own and gives it to us when we are back.
//
// # How an end is told apart
//
// Version 53 and later run with --no-shutdown: a guest that powers off leaves its VMM waiting, so that we hear
// of it even if we were away, and a soft reboot keeps the process, with the descriptors that it holds. Older
// ones end with their guest; the last lines of events.json tell why.
package ch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/sdk/vmmkit/console"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/sdk/vmmkit/unixsock"
)

// Config says which cloud-hypervisor and firmware.
type Config struct {
	Binaries []string // paths; the first is what VMs start with, the others are for snapshots that they wrote; none: look for one
	Firmware string   // rust-hypervisor-firmware; "": look for it
	UEFI     string   // CLOUDHV.fd; "": look for it
	NoKVM    bool     // for a test double, which needs none

	Landlock      bool     // let hypervisors confine themselves to the files that they need
	LandlockPaths []string // directories of disks and sockets that may be plugged later
}

// Files in a VM's directory.
const (
	apiSocket    = "api.sock"
	serialSocket = "serial.sock"
	vsockSocket  = "vsock.sock"
	eventsFile   = "events.json"
)

// oldest is the first version that is run: before it a guest could have its raw disk taken for another format
// (CVE-2026-27211) and more (CVE-2026-45782).
var oldest = chVersion{51, 2}

type chVersion struct{ major, minor int }

func (v chVersion) less(o chVersion) bool {
	return v.major < o.major || v.major == o.major && v.minor < o.minor
}

func (v chVersion) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

// Driver is a vmmkit.Driver.
type Driver struct {
	cfg      Config
	since    time.Time
	kvm      error // nil: usable
	events   *console.Watcher
	programs *programs
}

var (
	_ vmmkit.Driver        = (*Driver)(nil)
	_ vmmkit.Coroner       = (*Driver)(nil)
	_ vmmkit.VsockSocketer = (*Driver)(nil)
)

// New makes a driver. A program or a device that is missing is a condition, and the error of each start.
func New(cfg Config) (*Driver, error) {
	if cfg.Landlock {
		if abi := landlockABI(); abi < oldestLandlock {
			return nil, errs.New(errs.Precondition, "--landlock is given, and this kernel offers version %d of Landlock; %d is needed", abi, oldestLandlock).
				Do("use Linux 6.2 or newer with landlock in its lsm= list, or leave --landlock away")
		}
	}
	w, err := console.NewWatcher()
	if err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, since: time.Now(), events: w, programs: newPrograms(cfg.Binaries)}
	if !cfg.NoKVM {
		d.kvm = kvmUsable()
	}
	return d, nil
}

// VsockSocket is the name of the socket at which a guest's virtio socket is met.
func (d *Driver) VsockSocket() string { return vsockSocket }

// oldestLandlock is the ABI that cloud-hypervisor asks for (Linux 6.2).
const oldestLandlock = 3

// landlockABI is the version of Landlock that the kernel has, 0 if none (landlock(7)).
func landlockABI() int {
	const createRulesetVersion = 1 // LANDLOCK_CREATE_RULESET_VERSION; linux/landlock.h
	v, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, createRulesetVersion)
	if e != 0 {
		return 0
	}
	return int(v)
}

func kvmUsable() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const kvmGetAPIVersion = 0xAE00 // _IO(KVMIO, 0x00); linux/kvm.h
	v, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), kvmGetAPIVersion, 0)
	if e != 0 || v != 12 {
		return fmt.Errorf("/dev/kvm has API version %d (%w), not 12", v, e)
	}
	return nil
}

// find looks for a regular file in directories.
func find(name string, dirs ...string) (string, error) {
	for _, dir := range dirs {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", fmt.Errorf("no %s in %s: %w", name, strings.Join(dirs, ", "), fs.ErrNotExist)
}

// Conditions tells of what is missing.
func (d *Driver) Conditions() []service.Condition {
	var cs []service.Condition
	if d.kvm != nil {
		cs = append(cs, service.Condition{Code: "KVM_UNAVAILABLE", Severity: service.SeverityCritical, Since: d.since,
			Text:   "cloud-hypervisor needs KVM: " + d.kvm.Error(),
			Remedy: "load kvm_intel or kvm_amd, and let the plugin's user into the group of /dev/kvm; or use vmm-qemu"})
	}
	for _, err := range d.programs.troubles() {
		cs = append(cs, service.Condition{Code: "HYPERVISOR_UNAVAILABLE", Severity: service.SeverityCritical, Since: d.since,
			Text: err.Error(), Remedy: errs.RemedyOf(err)})
	}
	return cs
}

// Check says what of a definition cannot be done.
func (d *Driver) Check(s vmm.Spec) error {
	if s.HugePages && (s.MemoryBytes%hugePage != 0 || s.MaxMemory%hugePage != 0) {
		return errs.Field("spec.memory_bytes", "give a multiple of 2 MiB", "%d MiB of memory in pages of 2 MiB", s.MemoryBytes>>20)
	}
	if s.Boot.HasKernel || s.Boot.Cmdline != "" {
		return nil
	}
	_, err := d.firmware(s.Boot.Firmware)
	if err != nil && s.Boot.Firmware == "" {
		return nil // whether there is a kernel is known at the start only
	}
	return err
}

// firmware finds the firmware of a kind.
func (d *Driver) firmware(kind string) (string, error) {
	path, name, flag := d.cfg.Firmware, "hypervisor-fw", "--firmware"
	if kind == "uefi" {
		path, name, flag = d.cfg.UEFI, "CLOUDHV.fd", "--uefi-firmware"
	}
	var err error
	if path == "" {
		path, err = find(name, "/usr/share/cloud-hypervisor", "/usr/local/share/cloud-hypervisor", "/usr/share/hypervisor-fw", "/opt/cloud-hypervisor/share")
	} else {
		_, err = os.Stat(path)
	}
	if err != nil {
		return "", &errs.Error{Kind: errs.Invalid, Field: "spec.boot.firmware", Message: "the firmware " + name + " is not there", Err: err,
			Remedy: "install it, give its path with " + flag + ", or boot a kernel directly"}
	}
	return path, nil
}

// state is what is kept with a VM between Prepare and each Connect.
type state struct {
	Shared     bool   // guest memory is shared: vhost-user devices can be plugged
	NoShutdown bool   // the process stays when its guest powers off
	Version    string // of the binary that it was started with
}

// Prepare makes the command.
func (d *Driver) Prepare(ctx context.Context, m vmmkit.Machine) (vmmkit.Launch, error) {
	want := ""
	if m.Restore != nil {
		var was state
		if err := json.Unmarshal(m.Restore.State, &was); err != nil {
			return vmmkit.Launch{}, errs.Wrap(errs.Corrupt, err, "what is stored of the snapshot is damaged")
		}
		want = was.Version
	}
	prog, err := d.programs.get(ctx, want)
	switch {
	case err != nil:
		return vmmkit.Launch{}, err
	case d.kvm != nil:
		return vmmkit.Launch{}, &errs.Error{Kind: errs.Unavailable, Reason: "KVM_UNAVAILABLE", Message: "cloud-hypervisor needs KVM", Err: d.kvm,
			Remedy: "load kvm_intel or kvm_amd, and let the plugin's user into the group of /dev/kvm; or use vmm-qemu"}
	}
	var reads []string
	if m.Kernel == "" {
		fw, err := d.firmware(m.Spec.Boot.Firmware)
		if err != nil {
			return vmmkit.Launch{}, err
		}
		reads = []string{fw}
	}
	// It binds its serial socket itself, and only where nothing is.
	for _, f := range []string{serialSocket, vsockSocket, eventsFile} {
		if err := os.Remove(filepath.Join(m.Dir, f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return vmmkit.Launch{}, err
		}
	}
	sharedMemory := shared(m.NICs)
	if m.Restore != nil {
		if sharedMemory, err = prepareRestore(d, m); err != nil {
			return vmmkit.Launch{}, err
		}
	}
	st, err := json.Marshal(state{Shared: sharedMemory, NoShutdown: prog.noShutdown, Version: prog.version.String()})
	if err != nil {
		return vmmkit.Launch{}, err
	}
	api, err := unixsock.Listen(m.Dir, apiSocket, 0o600)
	if err != nil {
		return vmmkit.Launch{}, errs.Wrap(errs.Unknown, err, "the control socket cannot be made")
	}
	args := []string{"--api-socket", "fd=3", "--event-monitor", "path=" + eventsFile, "--seccomp", "true"}
	if prog.noShutdown {
		args = append(args, "--no-shutdown")
	}
	return vmmkit.Launch{
		Command:    proc.Command{Path: prog.path, Name: m.Marker, Args: args, Dir: m.Dir, Env: environment(), Files: []*os.File{api}},
		Hypervisor: "cloud-hypervisor " + prog.version.String() + " (kvm)",
		State:      st,
		ReadOnly:   reads,
		Close:      func() { api.Close() },
	}, nil
}
