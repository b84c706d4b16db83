// Package plugin is what the author of a plugin uses: a program is one call to [Main].
//
// Started by a host, it serves by go-plugin; with --listen unix:///path it serves stand-alone; with --help
// it explains its flags. Main takes care of the handshake, peer credentials, the lifeline descriptor,
// SIGPIPE, SIGTERM (drain, then Shutdown), message size, recovery of panics in handlers, descriptor passing
// and the translation of errors.
package plugin

import (
	"context"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/pflag"

	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/service"
)

// Program describes a plugin to Main.
type Program struct {
	Kind    service.Kind
	Name    string // product name: "storage-dir"; the binary's name is up to the author
	Version string
	Short   string // one line for --help
	Needs   service.Needs

	// Flags registers the plugin's own flags; called once, before parsing.
	Flags func(fs *pflag.FlagSet)

	// Open makes the service: a storage.Service, net.Service, vmm.Service or log.Service as Kind says, and
	// any of that contract's optional interfaces. Called once, after the flags are parsed and before the
	// handshake; an error is printed, with its remedy, and ends the program with exit code 1.
	Open func(ctx context.Context, env Env) (service.Base, error)

	// Workers are other things this binary can be started as, by itself: the first argument selects. A
	// worker's main gets the remaining arguments and returns the exit code; nothing of the plugin's own
	// set-up (cookie, lifeline, flags) has run before it.
	Workers map[string]func(args []string) int
}

// Env is what the host gives a plugin.
type Env struct {
	Log  hclog.Logger // to the host, and from there into the log plugin
	Host service.Host // never nil
	// LaunchDir is a directory of this launch alone, for sockets that the host may reach; it is gone after
	// the plugin's end. What must live on belongs into the plugin's own directories.
	LaunchDir string
	// Jail starts hypervisors, each under a uid of its own; nil: there is none, and a vmm plugin starts them itself.
	Jail *jail.Client
}
