// Package launcher is the half of mvirtd that is root, and its other end in the core.
//
// # Processes
//
//	mvirtd (root): the launcher, [RunRoot]
//	 ├─ mvirtd as the core, user mvirt, no capability: joined by a socketpair, [Client]
//	 ├─ plugin storage, its user …: started by the launcher when the core asks
//	 └─ plugin net, …
//
// The launcher has no listener. It reads its own root-owned configuration, once, and a few fixed-size
// messages from the core (wire.go): start the plugin of kind K, signal launch L, ready. No path, user, flag
// or environment ever comes from the core, so whoever takes the core over can start and stop exactly the
// configured plugins and nothing else.
//
// Each start: the binary is opened, and what was opened is checked (owner, mode, sha256) and executed; a
// fresh directory is made for the launch's sockets; the process goes through the exec shim (shim.go: this
// same binary with a first argument), which sets identity, capabilities, no_new_privs and limits on itself
// and becomes the plugin. The core gets the read ends of stdout and stderr, the write end of the lifeline,
// and a pidfd. Plugins end when the lifeline closes, thus with the core.
//
// When the core dies, the launcher ends what is left of the plugins and starts the core again; when the
// launcher dies, the core sees the end of its socket, shuts down, and the plugins with it. Hypervisors and
// packet workers are nobody's business here: they have sessions of their own and live on.
//
// Not started as root there is no launcher: [Local] starts the same plugins the same way, as the current user.
package launcher
