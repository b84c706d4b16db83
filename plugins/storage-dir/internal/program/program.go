// Package program says what mvirt-dir is: its flags, its service and its worker.
package program

import (
	"context"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/plugins/storage-dir/internal/dir"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
	"github.com/mvirt/mvirt/sdk/version"
)

// New describes the program.
func New() plugin.Program {
	var dataDir string
	var kit storagekit.Flags
	return plugin.Program{
		Kind:    service.KindStorage,
		Name:    "storage-dir",
		Version: version.Version,
		Short:   "Volumes as files in a directory",
		Flags: func(fs *pflag.FlagSet) {
			fs.StringVar(&dataDir, "data-dir", "", "directory of volumes, templates and metadata.db (required)")
			kit.Register(fs)
		},
		Open: func(ctx context.Context, env plugin.Env) (service.Base, error) {
			if dataDir == "" {
				return nil, errs.Field("data_dir", "give --data-dir DIR", "the data directory is not named")
			}
			b, err := dir.New(dataDir, nil)
			if err != nil {
				return nil, err
			}
			opts, err := kit.Options(env.Log)
			opts.Starter = env.Jail
			if err != nil {
				return nil, err
			}
			return storagekit.Open(ctx, b, opts)
		},
		Workers: map[string]func([]string) int{worker.Name: worker.Main},
	}
}
