// Package qemu drives QEMU for vmmkit: it makes command lines on which nothing that a user chose can be read as
// an option, and speaks QMP to what runs.
//
// # What a hypervisor is given
//
// Descriptor 3 is the listening QMP socket, 4 that of the serial port, then the TAPs. The sockets are made and
// bound by us, so we are connected before QEMU has begun, and find them by name in the VM's directory after a
// restart. Serial output is appended to console.log by QEMU itself: nothing is lost while we are away.
//
// # How an end is told apart
//
// QEMU runs with -action shutdown=pause: when its guest has powered off it waits, stopped, until it is told to
// quit. So "the guest powered off" is still known if it happened while we were away, and a process that is
// gone without being told is a crash, or was killed.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/sdk/vmmkit/unixsock"
)

// Config says which QEMU and how.
type Config struct {
	Binary   string   // path; "": look for qemu-system-x86_64
	Accel    string   // "kvm", "tcg", or "auto": KVM where it works
	Firmware []string // directories with OVMF; nil: the usual ones
}

// vhostVsock is the kernel's side of guests' virtio sockets.
const vhostVsock = "/dev/vhost-vsock"

// Sockets in a VM's directory.
const (
	apiSocket    = "api.sock"
	serialSocket = "serial.sock"
)

// Driver is a vmmkit.Driver.
type Driver struct {
	cfg   Config
	since time.Time
	kvm   error // nil: usable

	probed  chan struct{} // closed when what follows is set
	binary  string
	version string
	err     error
}

var _ vmmkit.Driver = (*Driver)(nil)

// New makes a driver. That QEMU is missing is no error yet: it is a condition, and each start's.
func New(cfg Config) (*Driver, error) {
	d := &Driver{cfg: cfg, since: time.Now(), probed: make(chan struct{})}
	switch cfg.Accel {
	case "", "auto":
		d.kvm = kvmUsable()
	case "kvm":
		if d.kvm = kvmUsable(); d.kvm != nil {
			return nil, errs.Wrap(errs.Precondition, d.kvm, "KVM is asked for and cannot be used")
		}
	case "tcg":
		d.kvm = errors.New("emulation is asked for")
	default:
		return nil, errs.Field("accel", "give auto, kvm or tcg", "no accelerator is called %q", cfg.Accel)
	}
	if d.cfg.Firmware == nil {
		d.cfg.Firmware = []string{"/usr/share/OVMF", "/usr/share/edk2/x64", "/usr/share/edk2/ovmf", "/usr/share/qemu"}
	}
	go d.probe()
	return d, nil
}

var versionLine = regexp.MustCompile(`^QEMU emulator version ([0-9]+\.[0-9]+(?:\.[0-9]+)?)`)

// probe finds the binary and its version, which takes as long as starting QEMU does; hence not at our start.
func (d *Driver) probe() {
	defer close(d.probed)
	d.binary = d.cfg.Binary
	if d.binary == "" {
		if d.binary, d.err = find("qemu-system-x86_64"); d.err != nil {
			return
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.binary, "--version")
	cmd.Env = environment()
	out, err := cmd.Output()
	if err != nil {
		d.err = errs.Wrap(errs.Unavailable, err, "%s --version fails", d.binary)
		return
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		d.err = errs.New(errs.Unavailable, "%s does not say that it is QEMU", d.binary).Do("give the right program with --qemu")
		return
	}
	d.version = string(m[1])
}

func find(name string) (string, error) {
	for _, dir := range []string{"/usr/local/bin", "/usr/bin", "/usr/libexec", "/bin"} {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", errs.New(errs.Unavailable, "%s is not installed", name).Because("PROGRAM_MISSING").
		Do("install it: apt-get install qemu-system-x86, or give its path with --qemu")
}

// environment is all that QEMU and its like get.
func environment() []string { return []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "HOME=/"} }

// kvmUsable says why KVM cannot be used, or nil. A device that opens is not enough: where the processor has no
// virtualisation, guests on it fail in strange ways.
func kvmUsable() error {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	if !hasFlag(string(cpu), "vmx") && !hasFlag(string(cpu), "svm") {
		return errors.New("the processor shows neither vmx nor svm")
	}
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: "/dev/kvm", Err: err}
	}
	defer unix.Close(fd)
	const kvmGetAPIVersion = 0xAE00 // _IO(KVMIO, 0x00); linux/kvm.h
	v, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), kvmGetAPIVersion, 0)
	if e != 0 || v != 12 {
		return fmt.Errorf("/dev/kvm has API version %d (%w), not 12", v, e)
	}
	return nil
}

func hasFlag(cpuinfo, flag string) bool {
	for _, l := range strings.Split(cpuinfo, "\n") {
		if k, v, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(k) == "flags" {
			for _, f := range strings.Fields(v) {
				if f == flag {
					return true
				}
			}
			return false // all processors are alike
		}
	}
	return false
}

func (d *Driver) accel() string {
	if d.kvm == nil {
		return "kvm"
	}
	return "tcg"
}

// Conditions tells of a QEMU that is missing and of KVM that is not there.
func (d *Driver) Conditions() []service.Condition {
	var cs []service.Condition
	if d.kvm != nil && d.cfg.Accel != "tcg" {
		cs = append(cs, service.Condition{Code: "KVM_UNAVAILABLE", Severity: service.SeverityInfo, Since: d.since,
			Text:   "guests are emulated (TCG), which is slow: " + d.kvm.Error(),
			Remedy: "load kvm_intel or kvm_amd, turn virtualisation on in the firmware, and let the plugin's user into the group of /dev/kvm"})
	}
	select {
	case <-d.probed:
		if d.err != nil {
			cs = append(cs, service.Condition{Code: "HYPERVISOR_UNAVAILABLE", Severity: service.SeverityCritical, Since: d.since,
				Text: d.err.Error(), Remedy: errs.RemedyOf(d.err)})
		}
	default:
	}
	return cs
}

// Check says what of a definition QEMU cannot do here.
func (d *Driver) Check(s vmm.Spec) error {
	if s.Nested && d.kvm != nil {
		return errs.Field("spec.nested", "leave nested virtualisation off", "nested virtualisation needs KVM, and guests here are emulated")
	}
	if s.Vsock != 0 {
		f, err := os.OpenFile(vhostVsock, os.O_RDWR, 0)
		if err != nil {
			return &errs.Error{Kind: errs.Invalid, Field: "spec.vsock", Message: "virtio sockets need " + vhostVsock, Err: err,
				Remedy: "modprobe vhost_vsock, and let the plugin's user into the device's group; or leave the socket away"}
		}
		f.Close()
	}
	if s.Boot.Firmware == "uefi" {
		_, _, err := d.ovmf()
		return err
	}
	return nil
}

// ovmf finds UEFI firmware: its code, and the variables that each VM starts with.
func (d *Driver) ovmf() (code, vars string, err error) {
	for _, dir := range d.cfg.Firmware {
		for _, n := range [][2]string{{"OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"}, {"OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"}, {"OVMF_CODE.fd", "OVMF_VARS.fd"}} {
			code, vars = filepath.Join(dir, n[0]), filepath.Join(dir, n[1])
			if regular(code) && regular(vars) {
				return code, vars, nil
			}
		}
	}
	return "", "", errs.Field("spec.boot.firmware", "install it: apt-get install ovmf, or boot by bios",
		"no UEFI firmware (OVMF) is in %s", strings.Join(d.cfg.Firmware, ", "))
}

func regular(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular()
}

// state is what is kept with a VM between Prepare and each Connect.
type state struct {
	Shared bool // guest memory is shared: vhost-user devices can be plugged
	Ports  int  // root ports
	size
}

// size is what a machine began with.
type size struct {
	BootCPUs   uint32
	BootMemory uint64 // bytes
	Region     uint64 // bytes that can come beyond
}

// Prepare makes the command.
func (d *Driver) Prepare(ctx context.Context, m vmmkit.Machine) (vmmkit.Launch, error) {
	select {
	case <-d.probed:
	case <-ctx.Done():
		return vmmkit.Launch{}, ctx.Err()
	}
	if d.err != nil {
		return vmmkit.Launch{}, d.err
	}
	c := command{d: d, m: m}
	ok := false
	defer func() {
		if !ok {
			c.close()
		}
	}()
	if m.Restore != nil {
		c.was = &snapshotState{}
		if err := json.Unmarshal(m.Restore.State, c.was); err != nil {
			return vmmkit.Launch{}, errs.Wrap(errs.Corrupt, err, "what is stored of the snapshot is damaged")
		}
	}
	if err := c.build(); err != nil {
		return vmmkit.Launch{}, err
	}
	st, err := json.Marshal(state{Shared: c.shared(), Ports: c.countPorts(), size: c.bootSize()})
	if err != nil {
		return vmmkit.Launch{}, err
	}
	api, err := unixsock.Listen(m.Dir, apiSocket, 0o600)
	if err != nil {
		return vmmkit.Launch{}, errs.Wrap(errs.Unknown, err, "the control socket cannot be made")
	}
	serial, err := unixsock.Listen(m.Dir, serialSocket, 0o600)
	if err != nil {
		api.Close()
		return vmmkit.Launch{}, errs.Wrap(errs.Unknown, err, "the serial socket cannot be made")
	}
	ok = true
	return vmmkit.Launch{
		Command: proc.Command{Path: d.binary, Args: c.args, Dir: m.Dir, Env: environment(),
			Files: append([]*os.File{api, serial}, c.files...)},
		Hypervisor: fmt.Sprintf("qemu %s (%s)", d.version, d.accel()),
		State:      st,
		ReadOnly:   c.reads,
		Close: func() {
			api.Close()
			serial.Close()
			c.close()
		},
	}, nil
}
