// Package launch is what host and plugin agree on before the first call: the handshake, the environment, and
// where in the launch directory which socket is. docs/writing-a-plugin.md explains it to authors in any
// language.
package launch

import (
	"path/filepath"
	"strconv"

	goplugin "github.com/hashicorp/go-plugin"

	"github.com/mvirt/mvirt/sdk/service"
)

// Handshake is go-plugin's; the cookie only keeps people from starting a plugin by hand in vain.
var Handshake = goplugin.HandshakeConfig{
	ProtocolVersion:  service.ContractMajor,
	MagicCookieKey:   "MVIRT_PLUGIN",
	MagicCookieValue: "5f1d7c52-8a0e-4a43-9c50-mvirt-contract",
}

// Name of the one plugin in go-plugin's set.
const Name = "mvirt"

// Environment of a plugin.
const (
	EnvLaunchDir = "MVIRT_LAUNCH_DIR"  // directory of this launch, for sockets
	EnvHostUID   = "MVIRT_HOST_UID"    // who may connect to the plugin's sockets …
	EnvHostPID   = "MVIRT_HOST_PID"    // … as the kernel tells it
	EnvHostSock  = "MVIRT_HOST_SOCKET" // where mvirt.host.v1 is served
	EnvLifeline  = "MVIRT_LIFELINE_FD" // descriptor that reads EOF when the host has gone
	EnvLogLevel  = "MVIRT_LOG_LEVEL"   // trace, debug, info, warn, error
)

// LifelineFD is where the lifeline is: the first descriptor behind stdin, stdout and stderr.
const LifelineFD = 3

// FDSocket is where a launched plugin receives and offers descriptors.
func FDSocket(launchDir string) string { return filepath.Join(launchDir, "fd.sock") }

// HostSocket is where the host serves mvirt.host.v1 for a launched plugin.
func HostSocket(launchDir string) string { return filepath.Join(launchDir, "host.sock") }

// Env is the whole environment that the handshake needs; a host gives a plugin this and nothing of its own.
func Env(launchDir string, hostUID uint32, hostPID int) []string {
	return []string{
		Handshake.MagicCookieKey + "=" + Handshake.MagicCookieValue,
		"PLUGIN_PROTOCOL_VERSIONS=" + strconv.Itoa(service.ContractMajor),
		goplugin.EnvUnixSocketDir + "=" + launchDir,
		EnvLaunchDir + "=" + launchDir,
		EnvHostUID + "=" + strconv.FormatUint(uint64(hostUID), 10),
		EnvHostPID + "=" + strconv.Itoa(hostPID),
		EnvHostSock + "=" + HostSocket(launchDir),
		EnvLifeline + "=" + strconv.Itoa(LifelineFD),
	}
}
