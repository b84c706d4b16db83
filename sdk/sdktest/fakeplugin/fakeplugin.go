// Package fakeplugin makes plugin programs of sdktest's fakes, to be run as processes.
package fakeplugin

import (
	"context"
	"os"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/sdktest"
	"github.com/mvirt/mvirt/sdk/service"
)

// Env is the variable that makes a test's own binary be a fake plugin of the kind it names; see [Hook].
const Env = "MVIRT_FAKE_PLUGIN"

// Hook turns a test binary into a fake plugin when [Env] is set: call it first in TestMain. It then does not
// return.
func Hook() {
	if k := service.Kind(os.Getenv(Env)); k != "" {
		plugin.Main(Program(k, nil))
	}
}

// Program is a fake of a kind, with the flag --data-dir. wrap, if not nil, may put something around the
// service that is served.
func Program(kind service.Kind, wrap func(plugin.Env, service.Base) service.Base) plugin.Program {
	var dir string
	return plugin.Program{
		Kind: kind, Name: "fake-" + string(kind), Version: "1.0.0", Short: "keeps what it is told in a directory, for tests",
		Flags: func(fs *pflag.FlagSet) { fs.StringVar(&dir, "data-dir", "", "directory for its state") },
		Open: func(_ context.Context, env plugin.Env) (service.Base, error) {
			if dir == "" {
				return nil, errs.Field("data_dir", "give --data-dir", "no directory for the state")
			}
			s, err := New(kind, dir)
			if err == nil && wrap != nil {
				s = wrap(env, s)
			}
			return s, err
		},
	}
}

// New opens the fake of a kind in dir.
func New(kind service.Kind, dir string) (service.Base, error) {
	switch kind {
	case service.KindStorage:
		return sdktest.NewStorage(dir)
	case service.KindNet:
		return sdktest.NewNet(dir)
	case service.KindVMM:
		return sdktest.NewVMM(dir)
	case service.KindLog:
		return sdktest.NewLog(dir)
	}
	return nil, errs.Field("kind", "give storage, net, vmm or log", "there is no kind %q", kind)
}
