// Package program is mvirt-vmm as the plugin SDK sees it: flags, needs, and what they open.
package program

import (
	"context"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/ch"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/version"
	"github.com/mvirt/mvirt/sdk/vmmkit"
)

// DefaultDataDir is where VMs are kept unless --data-dir says otherwise.
const DefaultDataDir = "/var/lib/mvirt/vmm"

// New makes the program.
func New() plugin.Program {
	var dataDir, cgroup string
	var cfg ch.Config
	return plugin.Program{
		Kind:    service.KindVMM,
		Name:    "vmm-cloudhypervisor",
		Version: version.Version,
		Short:   "Runs VMs with cloud-hypervisor on KVM.",
		Needs:   service.Needs{Devices: []string{"/dev/kvm"}, Programs: []string{"cloud-hypervisor"}},
		Flags: func(fs *pflag.FlagSet) {
			fs.StringVar(&dataDir, "data-dir", DefaultDataDir, "directory of definitions, kernels and each VM's files")
			fs.StringArrayVar(&cfg.Binaries, "cloud-hypervisor", nil, "path of cloud-hypervisor, 51.2 or newer; none: the installed one; may be repeated: VMs start with the first, the others restore the snapshots that they wrote")
			fs.StringVar(&cfg.Firmware, "firmware", "", "path of rust-hypervisor-firmware, for VMs that boot by firmware; empty: look in the usual places")
			fs.StringVar(&cfg.UEFI, "uefi-firmware", "", "path of CLOUDHV.fd, for VMs that boot by UEFI; empty: look in the usual places")
			fs.BoolVar(&cfg.Landlock, "landlock", false, "let each hypervisor confine itself to the files that it needs; asks for Linux 6.2")
			fs.StringArrayVar(&cfg.LandlockPaths, "landlock-path", []string{"/dev", "/var/lib/mvirt", "/run/mvirt"}, "directory below which disks and sockets may be that are plugged into a running VM, with --landlock; may be repeated")
			fs.StringVar(&cgroup, "cgroup", "", "cgroup v2 directory, writable by this user, in which each VM gets its own; empty: none")
		},
		Open: func(ctx context.Context, env plugin.Env) (service.Base, error) {
			dir, err := filepath.Abs(dataDir)
			if err != nil {
				return nil, errs.Wrap(errs.Invalid, err, "--data-dir")
			}
			d, err := ch.New(cfg)
			if err != nil {
				return nil, err
			}
			m, err := vmmkit.Open(ctx, vmmkit.Options{DataDir: dir, Driver: d, Log: env.Log, Host: env.Host, Cgroup: cgroup, Jail: vmmkit.JailOf(env.Jail)})
			if err != nil {
				return nil, err
			}
			return vmmkit.Snapshotting{Resizable: vmmkit.Resizable{Manager: m}}, nil
		},
	}
}
