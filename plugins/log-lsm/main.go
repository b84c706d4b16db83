// Command mvirt-log is the log plugin: an audit and log store on an LSM tree.
package main

import (
	"context"
	"time"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/logsvc"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/version"
)

func main() {
	var flags logsvc.Flags
	plugin.Main(plugin.Program{
		Kind: service.KindLog, Name: "log-lsm", Version: version.Version,
		Short: "keeps audit and log entries, and finds them by the objects they are about",
		Flags: flags.Register,
		Open: func(_ context.Context, env plugin.Env) (service.Base, error) {
			opt, err := flags.Options()
			if err != nil {
				return nil, err
			}
			logsvc.LimitMemory(opt.CacheSize)
			opt.Log, opt.Now = env.Log, time.Now
			return logsvc.Open(opt)
		},
		Workers: logsvc.Workers(),
	})
}
