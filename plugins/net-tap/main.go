// Command mvirt-net is the net plugin: isolated networks with routing in user space. See docs/networking.md.
package main

import (
	"context"
	"net/netip"

	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/control"
	"github.com/mvirt/mvirt/plugins/net-tap/internal/worker"
	"github.com/mvirt/mvirt/sdk/plugin"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/version"
)

func main() {
	var cfg control.Config
	link := control.DefaultLinkPrefix.String()
	plugin.Main(plugin.Program{
		Kind: service.KindNet, Name: "net-tap", Version: version.Version,
		Short: "Networks for virtual machines: routed, isolated, with DHCP and nat",
		Needs: control.Needs(),
		Flags: func(fs *pflag.FlagSet) {
			fs.StringVar(&cfg.MetadataDir, "metadata-dir", "/var/lib/mvirt/net", "where metadata.db is")
			fs.StringVar(&cfg.SocketDir, "socket-dir", "/run/mvirt/net", "where sockets of NICs and packet workers are")
			fs.StringVar(&cfg.WorkerUser, "worker-user", "mvirt-worker", "user that packet workers run as, if mvirt-net is root")
			fs.StringVar(&link, "link-prefix", link, "IPv4 prefix for the links between nat networks and the host")
		},
		Open: func(_ context.Context, env plugin.Env) (service.Base, error) {
			cfg.Log, cfg.Host, cfg.Starter = env.Log, env.Host, env.Jail
			cfg.LinkPrefix, _ = netip.ParsePrefix(link) // Open explains one that is none
			return control.Open(cfg)
		},
		Workers: map[string]func([]string) int{worker.Name: worker.Main},
	})
}
