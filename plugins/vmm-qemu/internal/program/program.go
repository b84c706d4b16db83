// Package program is mvirt-qemu as the plugin SDK sees it: flags, needs, and what they open.
package program

import (
	"context"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/plugins/vmm-qemu/internal/qemu"
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
	var cfg qemu.Config
	return plugin.Program{
		Kind:    service.KindVMM,
		Name:    "vmm-qemu",
		Version: version.Version,
		Short:   "Runs VMs with QEMU, on KVM where that works and emulated where not.",
		Needs:   service.Needs{Devices: []string{"/dev/kvm"}, Programs: []string{"qemu-system-x86_64"}},
		Flags: func(fs *pflag.FlagSet) {
			fs.StringVar(&dataDir, "data-dir", DefaultDataDir, "directory of definitions, kernels and each VM's files")
			fs.StringVar(&cfg.Binary, "qemu", "", "path of qemu-system-x86_64; empty: the installed one")
			fs.StringVar(&cfg.Accel, "accel", "auto", "auto, kvm or tcg")
			fs.StringArrayVar(&cfg.Firmware, "firmware-dir", nil, "directory with OVMF; may be repeated; none: the usual ones")
			fs.StringVar(&cgroup, "cgroup", "", "cgroup v2 directory, writable by this user, in which each VM gets its own; empty: none")
		},
		Open: func(ctx context.Context, env plugin.Env) (service.Base, error) {
			dir, err := filepath.Abs(dataDir)
			if err != nil {
				return nil, errs.Wrap(errs.Invalid, err, "--data-dir")
			}
			d, err := qemu.New(cfg)
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
