// Package program says what mvirt-zfs is: its flags, its service and its worker.
package program

import (
	"context"
	"time"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/plugins/storage-zfs/internal/pool"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
	"github.com/mvirt/mvirt/sdk/version"
)

// patience is how long a call waits for the first look at the pool: the dozen commands of it take a second.
const patience = 30 * time.Second

// New describes the program.
func New() plugin.Program {
	var o pool.Options
	var kit storagekit.Flags
	return plugin.Program{
		Kind:    service.KindStorage,
		Name:    "storage-zfs",
		Version: version.Version,
		Short:   "Volumes as zvols of a ZFS pool",
		Needs: service.Needs{
			Root: true,
			// SYS_ADMIN for the ZFS module, CHOWN, DAC_OVERRIDE and FOWNER for device nodes. Workers are started by the launcher.
			Capabilities: []string{"CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"},
			Devices:      []string{"/dev/zfs"},
			Programs:     []string{"zfs", "zpool"},
		},
		Flags: func(fs *pflag.FlagSet) {
			fs.StringVar(&o.Pool, "pool", "", "pool that volumes, templates and metadata.db are kept in (required)")
			fs.Uint32Var(&o.BlockSize, "block-size", 16384, "volblocksize of new volumes, in bytes")
			fs.IntVar(&o.Slow, "slow", 1, "factor on the time that ZFS commands and udev may take, for an emulated host")
			kit.Register(fs)
		},
		Open: func(ctx context.Context, env plugin.Env) (service.Base, error) {
			b, err := pool.New(o)
			if err != nil {
				return nil, err
			}
			opts, err := kit.Options(env.Log)
			opts.Starter = env.Jail
			if err != nil {
				return nil, err
			}
			opts.Patience = time.Duration(max(o.Slow, 1)) * patience
			return storagekit.Open(ctx, b, opts)
		},
		Workers: map[string]func([]string) int{worker.Name: worker.Main},
	}
}
