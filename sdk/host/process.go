// Package host is the host's side of a plugin: it launches one through a [Spawner], checks who it is, and
// gives typed clients, bounded ways to end it, and word of its death.
//
// go-plugin does the handshake and holds the connection. What it leaves open is closed here, by one Runner of
// ours: the death of the process is the process's own (not the end of its pipes, which a grandchild may
// hold); ending it has a deadline at each step; a line of any length on its stdout or stderr blocks nobody;
// and who is at the other end of each socket is told by the kernel.
package host

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/internal/launch"
)

// LifelineFD is the child's descriptor of the lifeline's read end; the host holds the write end.
const LifelineFD = launch.LifelineFD

// Env is the whole environment that a plugin needs for its handshake with the host of this uid and pid. A
// spawner gives a plugin this, and nothing of its own environment.
func Env(launchDir string, hostUID uint32, hostPID int) []string {
	return launch.Env(launchDir, hostUID, hostPID)
}

// Spawner starts plugin processes: the core's launcher as root, or [Local].
type Spawner interface {
	// Spawn starts one process. Its launch directory exists, is fresh, and only the host and the plugin may
	// enter it. The spawner removes the directory after the process's end.
	Spawn(ctx context.Context) (*Process, error)
}

// Process is a plugin process that has just been started.
type Process struct {
	PID       int
	UID       uint32   // that SO_PEERCRED must show
	LaunchDir string   // for sockets
	Stdout    *os.File // read ends of pipes; the host owns and closes them
	Stderr    *os.File
	Lifeline  *os.File // write end; the host closes it: the plugin must end
	Signal    func(syscall.Signal) error
	// Wait returns when the process has really ended, or with ctx's error; it may be called many times.
	Wait func(ctx context.Context) (Exit, error)
}

// Exit is how a process ended.
type Exit struct {
	Code   int            // exit status, if Signal is 0
	Signal syscall.Signal // that killed it, or 0
	At     time.Time
}

// String is "exit status 1" or "killed by signal 9 (killed)".
func (e Exit) String() string {
	if e.Signal != 0 {
		return fmt.Sprintf("killed by signal %d (%v)", int(e.Signal), e.Signal)
	}
	return fmt.Sprintf("exit status %d", e.Code)
}
