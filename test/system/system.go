// Package system runs a whole mvirt in a private directory, for the demo, the end-to-end tests and the
// benchmarks: mvirtd with the four plugins, as root under the real users or as an ordinary user, and the CLI
// against it.
//
// Everything that a system makes on the host can be found again by its directory: [Owned] lists it, [Sweep]
// removes it, also after a kill -9 of whoever started it.
package system

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/core/apiv1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"golang.org/x/sys/unix"
)

// Place is where a system lives. As root both directories belong to root and can be entered by all.
type Place struct {
	Dir string // state, binaries, configuration
	Run string // sockets; short, for the sake of sun_path
}

// RootPlace is the place of a named system of root's.
func RootPlace(name string) Place {
	return Place{Dir: "/var/lib/mvirt-" + name, Run: "/run/mvirt-" + name}
}

// UserPlace is a place in a directory of an ordinary user's.
func UserPlace(dir string) Place {
	return Place{Dir: filepath.Join(dir, "d"), Run: filepath.Join(dir, "r")}
}

// Options say how to start a system.
type Options struct {
	Place Place
	Bin   string   // directory with the binaries; they are copied
	Kinds []string // plugins; none: all four, or all but net without root
	Args  map[string][]string
	Down  []string // kinds that are not expected to come up
	User  string   // as root: run all of it as this ordinary user, who gets the directories
	// Patience is how long to wait for mvirtd and its plugins; 0: 30 s.
	Patience time.Duration
	// Config may change the configuration's text before it is written.
	Config func(string) string
	Log    io.Writer // nil: the file mvirtd.log in the directory
}

// System is one that runs.
type System struct {
	Place
	Socket string
	opt    Options
	cred   *syscall.Credential // of mvirtd and the CLI; nil: the caller's
	cmd    *exec.Cmd
	done   chan struct{} // closed when mvirtd has ended
	err    error         // of mvirtd; after done
}

// Lock keeps others who use the same place out until it is released. It waits for its turn.
func Lock(ctx context.Context, p Place) (release func(), err error) {
	f, err := os.OpenFile(p.Dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for said := false; ; said = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !said {
			fmt.Printf("waiting for another run that uses %s\n", p.Dir)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another run uses %s: %w", p.Dir, ctx.Err())
		case <-time.After(200 * time.Millisecond): // flock(2) has no timeout
		}
	}
}

// Users that mvirt runs as, when started by root.
func Users() []string {
	return []string{"mvirt", "mvirt-vmm", "mvirt-log", "mvirt-dir", "mvirt-worker"}
}

// MakeUsers makes those users of mvirt's that are missing.
func MakeUsers(ctx context.Context) error {
	for _, u := range Users() {
		if exec.CommandContext(ctx, "getent", "passwd", u).Run() == nil {
			continue
		}
		out, err := exec.CommandContext(ctx, "useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
			"--shell", "/usr/sbin/nologin", u).CombinedOutput()
		if err != nil && exec.CommandContext(ctx, "getent", "passwd", u).Run() != nil { // nobody else was faster
			return fmt.Errorf("useradd %s: %w: %s", u, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

func credential(name string) (*syscall.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, err
}

// binaries by the kind of plugin.
var binaries = map[string]string{"storage": "mvirt-dir", "net": "mvirt-net", "vmm": "mvirt-qemu", "log": "mvirt-log"}

// Start makes the directories and the configuration, starts mvirtd and waits until it answers and all
// plugins are up. A system that did not start is stopped again; its log is part of the error.
func Start(ctx context.Context, opt Options) (*System, error) {
	s := &System{Place: opt.Place, Socket: filepath.Join(opt.Place.Run, "mvirt.sock"), opt: opt}
	root := os.Geteuid() == 0 && opt.User == ""
	if opt.User != "" {
		if err := MakeUsers(ctx); err != nil {
			return nil, err
		}
		cred, err := credential(opt.User)
		if err != nil {
			return nil, err
		}
		s.cred = cred
	}
	if opt.Kinds == nil {
		s.opt.Kinds = []string{"log", "storage", "net", "vmm"}
		if !root {
			s.opt.Kinds = []string{"log", "storage", "vmm"}
		}
	}
	if root {
		if err := MakeUsers(ctx); err != nil {
			return nil, err
		}
	}
	for _, d := range []string{opt.Place.Dir, filepath.Join(opt.Place.Dir, "bin"), opt.Place.Run} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
		if s.cred != nil {
			if err := os.Chown(d, int(s.cred.Uid), int(s.cred.Gid)); err != nil {
				return nil, err
			}
		}
		if err := os.Chmod(d, 0o755); err != nil { // whatever the umask is
			return nil, err
		}
	}
	names := []string{"mvirtd", "mvirt"}
	for _, k := range s.opt.Kinds {
		names = append(names, binaries[k])
	}
	for _, n := range names {
		if err := copyFile(filepath.Join(opt.Place.Dir, "bin", n), filepath.Join(opt.Bin, n), 0o755); err != nil {
			return nil, err
		}
	}
	text := s.config(root)
	if opt.Config != nil {
		text = opt.Config(text)
	}
	if err := os.WriteFile(s.ConfigPath(), []byte(text), 0o644); err != nil {
		return nil, err
	}
	if err := s.Launch(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// ConfigPath is the configuration's path.
func (s *System) ConfigPath() string { return filepath.Join(s.Dir, "mvirt.toml") }

// LogPath is where mvirtd's own log is.
func (s *System) LogPath() string { return filepath.Join(s.Dir, "mvirtd.log") }

// config is the configuration of a system of its own: as the example has it, at another place.
func (s *System) config(root bool) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("[core]\nsocket = %q\nstate_dir = %q\nrun_dir = %q\nlog_level = \"debug\"", s.Socket, s.Dir+"/core", s.Run)
	if root {
		p("socket_group = \"mvirt\"\nsocket_mode = \"0660\"\nuser = \"mvirt\"")
	}
	if root { // uids of its own, for several systems run at one time
		p("\n[jail]\nenabled = true\nuid_base = %d\nuid_count = 1000", 1_600_000_000+1000*(crc32.ChecksumIEEE([]byte(s.Dir))%100_000))
	}
	for _, k := range s.opt.Kinds {
		data := filepath.Join(s.Dir, k)
		args := []string{"--data-dir", data}
		if k == "net" {
			args = []string{"--metadata-dir", data, "--socket-dir", filepath.Join(s.Run, "net")}
		}
		args = append(args, s.opt.Args[k]...)
		p("\n[plugin.%s]\ncommand = %q\nargs = [%s]\ndata_dir = %q", k, filepath.Join(s.Dir, "bin", binaries[k]), quoted(args), data)
		if !root {
			continue
		}
		switch k {
		case "net":
			p("user = \"root\"\ncapabilities = [%s]\nworker_user = \"mvirt-worker\"",
				quoted([]string{"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_CHOWN"}))
		case "vmm":
			p("user = \"mvirt-vmm\"")
			if exec.Command("getent", "group", "kvm").Run() == nil {
				p("groups = [\"kvm\"]")
			}
		case "storage":
			p("user = \"mvirt-dir\"")
		case "log":
			p("user = \"mvirt-log\"")
		}
	}
	return b.String()
}

func quoted(list []string) string {
	for i, s := range list {
		list[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(list, ", ")
}

// Launch starts mvirtd on a directory that is prepared, and waits for it.
func (s *System) Launch(ctx context.Context) error {
	if err := s.Spawn(); err != nil {
		return err
	}
	patience := s.opt.Patience
	if patience == 0 {
		patience = 30 * time.Second
	}
	if err := s.WaitUp(ctx, patience); err != nil {
		_ = s.Stop(context.WithoutCancel(ctx))
		return fmt.Errorf("mvirtd did not come up: %w\n%s", err, s.LogTail(60))
	}
	return nil
}

// Spawn starts mvirtd on a directory that is prepared, and does not wait for it.
func (s *System) Spawn() error {
	log := s.opt.Log
	if log == nil {
		f, err := os.OpenFile(s.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		log = f
	}
	// Not bound to a context: it ends in order, by Stop.
	s.cmd = exec.Command(filepath.Join(s.Dir, "bin", "mvirtd"), "--config", s.ConfigPath())
	s.cmd.Stdout, s.cmd.Stderr, s.cmd.Dir = log, log, "/"
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: s.cred}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		s.err = cmd.Wait()
		close(done)
	}(s.cmd, s.done)
	return nil
}

// Pid is mvirtd's process.
func (s *System) Pid() int { return s.cmd.Process.Pid }

// Done is closed when mvirtd has ended.
func (s *System) Done() <-chan struct{} { return s.done }

// Dial connects to the API.
func (s *System) Dial() (*grpc.ClientConn, error) {
	const window = 4 << 20 // as the CLI has it
	return grpc.NewClient("unix://"+s.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window), grpc.WithReadBufferSize(256<<10))
}

// WaitUp waits until the API answers and every plugin is up.
func (s *System) WaitUp(ctx context.Context, most time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	conn, err := s.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	last := errors.New("no answer yet")
	for {
		r, err := apiv1.NewPluginsClient(conn).List(ctx, &apiv1.ListPluginsRequest{}, grpc.WaitForReady(true))
		if err == nil {
			last = nil
			for _, p := range r.GetPlugins() {
				if slices.Contains(s.opt.Down, p.GetKind()) {
					if p.GetState() == "starting" {
						last = fmt.Errorf("plugin %s is starting", p.GetKind())
					}
					continue
				}
				if p.GetState() != "up" && p.GetState() != "degraded" { // degraded serves, and says why
					last = fmt.Errorf("plugin %s is %s: %s", p.GetKind(), p.GetState(), p.GetReason())
				}
			}
			if last == nil && len(r.GetPlugins()) == len(s.opt.Kinds) {
				return nil
			}
		} else if ctx.Err() == nil {
			last = err
		}
		select {
		case <-s.done:
			return fmt.Errorf("mvirtd ended: %v", s.err)
		case <-ctx.Done():
			return fmt.Errorf("%w (%v)", ctx.Err(), last)
		case <-time.After(20 * time.Millisecond): // polling a public API that has no "up" to wait for
		}
	}
}

// Stop ends mvirtd in order; what does not end within a minute is killed, which is an error.
func (s *System) Stop(ctx context.Context) error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	select {
	case <-s.done:
		if s.err != nil {
			return fmt.Errorf("mvirtd: %w\n%s", s.err, s.LogTail(30))
		}
		return nil
	case <-ctx.Done():
		_ = s.cmd.Process.Kill()
		<-s.done
		return fmt.Errorf("mvirtd did not end on SIGTERM\n%s", s.LogTail(30))
	}
}

// LogTail is the end of mvirtd's log.
func (s *System) LogTail(lines int) string {
	b, err := os.ReadFile(s.LogPath())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Command is the CLI against this system.
func (s *System) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.Dir, "bin", "mvirt"), args...)
	cmd.Env = append(os.Environ(), "MVIRT_SOCKET="+s.Socket, "NO_COLOR=1")
	if s.cred != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// CLI runs the CLI and gives its standard output. A failure holds what it said on standard error.
func (s *System) CLI(ctx context.Context, args ...string) (string, error) {
	cmd := s.Command(ctx, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("mvirt %s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.String(), nil
}

// Console types text on a VM's console and waits until the guest prints until; it gives what was printed.
func (s *System) Console(ctx context.Context, vm, text, until string, timeout time.Duration, flags ...string) (string, error) {
	args := append([]string{"-q", "vm", "console", vm, "--until", until, "--timeout", timeout.String()}, flags...)
	cmd := s.Command(ctx, args...)
	var out, errOut bytes.Buffer
	in, typist, err := os.Pipe() // stays open, as a keyboard does
	if err != nil {
		return "", err
	}
	defer in.Close()
	defer typist.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &errOut
	if _, err := io.WriteString(typist, text); err != nil {
		return "", err
	}
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("console of %s: %w\n%s\n--- printed:\n%s", vm, err, bytes.TrimSpace(errOut.Bytes()), out.String())
	}
	return out.String(), nil
}

func copyFile(to, from string, mode os.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	// A new file each time: one that runs cannot be written.
	tmp, err := os.CreateTemp(filepath.Dir(to), ".new-")
	if err != nil {
		return err
	}
	_, err = io.Copy(tmp, src)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), to)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
	}
	return err
}
