package launcher

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

// starter starts plugins, at most one of a kind at a time. Safe for concurrent use.
type starter struct {
	table  *table
	dirs   *launchDirs
	cg     *cgroups
	env    Environment
	family *family
	log    *slog.Logger
	jails  *jails // nil: hypervisors are started by the vmm plugin

	mu      sync.Mutex
	hostPID int // the process that plugins shall let in: the core
	next    uint32
	running map[service.Kind]*launch // also while being started
	removal sync.WaitGroup
}

// Environment is what the handshake adds to a plugin's own environment: where its launch directory is, and
// which process may talk to it.
type Environment func(launchDir string, hostUID uint32, hostPID int) []string

// serveHost says which process plugins started from now on shall let in.
func (s *starter) serveHost(pid int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hostPID = pid
}

// launch is one run of a plugin.
type launch struct {
	id       uint32
	kind     service.Kind
	uid      uint32
	name     string // of its directory
	dir      string
	child    *child        // nil while being started
	ended    chan struct{} // closed when the process is gone, its directory removed, and its kind free again
	stdout   *os.File      // our ends
	stderr   *os.File
	lifeline *os.File
}

func newStarter(t *table, runDir string, cg *cgroups, env Environment) (*starter, error) {
	self := identity{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	dirs, err := openLaunchDirs(runDir, t.trust, self)
	if err != nil {
		return nil, err
	}
	return &starter{table: t, dirs: dirs, cg: cg, env: env, hostPID: os.Getpid(), family: newFamily(), log: slog.New(slog.DiscardHandler), running: map[service.Kind]*launch{}}, nil
}

// pluginUmask lets the core's group, which the launch directory gives by its set-group-id bit, use sockets.
const pluginUmask = 0o007

// start starts the plugin of a kind.
func (s *starter) start(kind service.Kind) (*launch, error) {
	sp := s.table.specs[kind]
	if sp == nil {
		return nil, errs.New(errs.Precondition, "the configuration has no %s plugin to start", kind)
	}
	l := &launch{kind: kind, uid: sp.id.UID, ended: make(chan struct{})}
	s.mu.Lock()
	if s.running[kind] != nil {
		s.mu.Unlock()
		return nil, errs.New(errs.Conflict, "the %s plugin runs already", kind).Because("ALREADY_RUNNING")
	}
	s.running[kind] = l
	s.next++
	l.id = s.next
	s.mu.Unlock()

	l.name = fmt.Sprintf("%s-%d", kind, l.id)
	if err := s.startLaunch(l, sp); err != nil {
		closeAll([]*os.File{l.stdout, l.stderr, l.lifeline})
		_ = s.dirs.remove(l.name)
		s.mu.Lock()
		delete(s.running, kind)
		s.mu.Unlock()
		return nil, err
	}
	s.removal.Go(func() {
		<-l.child.gone
		_ = s.dirs.remove(l.name)
		_ = s.dirs.remove(l.name + recordSuffix)
		s.mu.Lock()
		delete(s.running, kind)
		s.mu.Unlock()
		close(l.ended)
	})
	return l, nil
}

func (s *starter) startLaunch(l *launch, sp *spec) (err error) {
	binary, err := openBinary(l.kind, sp.command, sp.sha256, sp.id, s.table.trust)
	if err != nil {
		return err
	}
	defer binary.Close()
	if sp.dataDir != "" {
		d, err := ensureDir(sp.dataDir, sp.id, 0o700, s.table.trust)
		if err != nil {
			return errs.Wrap(errs.Unknown, err, "plugin.%s.data_dir", l.kind)
		}
		d.Close()
	}
	if l.dir, err = s.dirs.make(l.name, sp.id, s.table.core.GID); err != nil {
		return err
	}
	var theirs [3]*os.File
	defer func() { closeAll(theirs[:]) }()
	if l.stdout, theirs[0], err = os.Pipe(); err != nil {
		return err
	}
	if l.stderr, theirs[1], err = os.Pipe(); err != nil {
		return err
	}
	if theirs[2], l.lifeline, err = os.Pipe(); err != nil {
		return err
	}
	cg, err := s.cg.plugin(l.kind, sp.id)
	if err != nil {
		return err
	}
	if cg != nil {
		defer cg.Close()
	}
	s.mu.Lock()
	hostPID := s.hostPID
	s.mu.Unlock()
	keep, env := []*os.File{theirs[2]}, append(append([]string(nil), sp.env...), s.env(l.dir, s.table.core.UID, hostPID)...)
	if serve := s.keeperFor(l.kind, sp, binary); serve != nil {
		sock, e, err := conversation(serve)
		if err != nil {
			return err
		}
		defer sock.Close()
		keep, env = append(keep, sock), append(env, e)
	}
	c, err := start(program{
		binary: binary, stdout: theirs[0], stderr: theirs[1], keep: keep, cgroup: cg, family: s.family,
		shim: shimSpec{
			Argv: append([]string{sp.command}, sp.args...), Env: env,
			Script: isScript(binary), Switch: s.table.root, UID: sp.id.UID, GID: sp.id.GID, Groups: sp.id.Groups,
			Caps: sp.caps, NoFile: sp.nofile, Umask: pluginUmask,
		},
	})
	if err != nil {
		if errs.KindOf(err) == errs.Unknown {
			return errs.Wrap(errs.Internal, err, "the %s plugin", l.kind)
		}
		return err
	}
	s.mu.Lock()
	l.child = c
	s.mu.Unlock()
	s.record(l)
	return nil
}

// signal sends a signal to a launch that runs.
func (s *starter) signal(id uint32, sig unix.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.running {
		if l.id == id && l.child != nil {
			l.child.signal(sig)
		}
	}
}

// end ends all plugins: those that a closed lifeline has not ended within grace are killed. It returns when
// all are gone and their directories removed.
func (s *starter) end(grace time.Duration) {
	s.mu.Lock()
	var all []*launch
	for _, l := range s.running {
		if l.child != nil {
			all = append(all, l)
		}
	}
	s.mu.Unlock()
	deadline := time.After(grace)
	for _, l := range all {
		select {
		case <-l.child.gone:
			continue
		case <-deadline:
		}
		for _, l := range all {
			l.child.signal(unix.SIGKILL)
		}
		break
	}
	s.removal.Wait()
}

// recordSuffix marks the file beside a launch directory that says which process it belongs to: pid, start
// time and boot id, so that a launcher that comes after a crash can tell what is left over.
const recordSuffix = ".pid"

func (s *starter) record(l *launch) {
	fd, err := unix.Openat(int(s.dirs.dir.Fd()), l.name+recordSuffix, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return // the record is a help for the sweep, no more
	}
	f := os.NewFile(uintptr(fd), l.name)
	fmt.Fprintf(f, "%d %d %s\n", l.child.pid, l.child.start, bootID())
	f.Close()
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return string(bytes.TrimSpace(b))
}

// sweep removes what launches before this launcher's time left behind. Processes among them that still live,
// and that their start time and this boot show to be the same ones, get a moment to end by themselves, as
// their lifeline has told them to; a stopped one does not, and is killed.
func (s *starter) sweep() (killed int, err error) {
	d, err := os.Open(s.dirs.path)
	if err != nil {
		return 0, err
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return 0, err
	}
	deadline := time.Now().Add(pluginGrace)
	for _, n := range names {
		if strings.HasSuffix(n, recordSuffix) && killLeftover(filepath.Join(s.dirs.path, n), deadline) {
			killed++
		}
	}
	var problems []error
	for _, n := range names {
		if err := s.dirs.remove(n); err != nil {
			problems = append(problems, fmt.Errorf("removing %s: %w", filepath.Join(s.dirs.path, n), err))
		}
	}
	return killed, errors.Join(problems...)
}

func killLeftover(record string, deadline time.Time) bool {
	data, err := os.ReadFile(record)
	if err != nil {
		return false
	}
	var pid int
	var start uint64
	var boot string
	if n, _ := fmt.Sscan(string(data), &pid, &start, &boot); n != 3 || pid <= 1 || boot != bootID() {
		return false
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	if now, err := startTime(pid); err != nil || now != start {
		return false
	}
	if ends(fd, time.Until(deadline)) || unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) != nil {
		return false
	}
	ends(fd, 5*time.Second)
	return true
}

// ends waits for the end of a pidfd's process.
func ends(pidfd int, limit time.Duration) bool {
	end := time.Now().Add(limit)
	for {
		p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(max(0, time.Until(end).Milliseconds())))
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}
