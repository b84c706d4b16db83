package launcher

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/jail"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

const (
	jailPlugin = 4003 // the vmm plugin's uid in these tests
	jailBase   = 1_500_000_000
)

// prison is a launcher's jails, a plugin's end of them, and a host around.
type prison struct {
	t   *testing.T
	dir string
	j   *jails
	cl  *jail.Client
}

func newPrison(t *testing.T, change func(*config.Jail)) *prison {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	for d := dir; strings.HasPrefix(d, os.TempDir()+"/"); d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	must(t, os.MkdirAll(filepath.Join(dir, "run/p"), 0o755))
	cfg := config.Jail{Enabled: true, UIDBase: jailBase, UIDCount: 100, StateDir: filepath.Join(dir, "jail"), MemoryOverhead: 64 << 20, PIDs: 64}
	if change != nil {
		change(&cfg)
	}
	f := newFamily()
	j, err := newJails(cfg, filepath.Join(dir, "run"), identity{UID: jailPlugin, GID: jailPlugin, Groups: []uint32{4005}}, ownTrust(), nil, f,
		slog.New(slog.NewTextHandler(io.Discard, nil)))
	must(t, err)
	t.Cleanup(j.close)
	p := &prison{t: t, dir: dir, j: j}
	p.cl = p.connect()
	return p
}

func (p *prison) connect() *jail.Client {
	ours, theirs, err := jail.Pair()
	must(p.t, err)
	done := make(chan struct{})
	go func() { defer close(done); p.j.serve(ours) }()
	cl := jail.NewClient(jail.NewConn(theirs))
	p.t.Cleanup(func() { _ = cl.Close(); <-done })
	return cl
}

// vmDir makes a VM's directory as a plugin has it: its own, and for nobody else.
func (p *prison) vmDir(vm string) string {
	d := filepath.Join(p.dir, "vm", vm)
	must(p.t, os.MkdirAll(d, 0o700))
	must(p.t, os.Chown(filepath.Join(p.dir, "vm"), jailPlugin, jailPlugin))
	must(p.t, os.Chmod(filepath.Join(p.dir, "vm"), 0o700))
	must(p.t, os.Chown(d, jailPlugin, jailPlugin))
	return d
}

// disk makes a file that a uid owns.
func (p *prison) disk(name string, uid uint32) string {
	path := filepath.Join(p.dir, name)
	must(p.t, os.WriteFile(path, []byte("disk"), 0o600))
	must(p.t, os.Chown(path, int(uid), int(uid)))
	return path
}

// start starts this test's binary as a VM's hypervisor.
func (p *prison) start(vm string, s jail.Start, files []*os.File, pass ...*os.File) (*proc.Process, error) {
	p.t.Helper()
	exe, err := os.Executable()
	must(p.t, err)
	if s.Program == "" {
		s.Program = exe
	}
	if s.Dir == "" {
		s.Dir = p.vmDir(vm)
	}
	dir, err := os.Open(s.Dir)
	must(p.t, err)
	defer dir.Close()
	out, err := os.OpenFile(filepath.Join(p.dir, "output"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(p.t, err)
	defer out.Close()
	ctx, cancel := context.WithTimeout(p.t.Context(), 30*time.Second)
	defer cancel()
	pr, _, err := p.cl.Start(ctx, vm, s, dir, out, files, pass)
	if err != nil {
		return nil, err
	}
	p.t.Cleanup(func() {
		_ = pr.Signal(syscall.SIGKILL)
		<-pr.Done()
	})
	return pr, nil
}

func (p *prison) output() string {
	b, _ := os.ReadFile(filepath.Join(p.dir, "output"))
	return string(b)
}

func (p *prison) uid(vm string) uint32 {
	p.t.Helper()
	as, err := p.cl.Identity(p.t.Context(), vm)
	must(p.t, err)
	return as.UID
}

// A program in place of the hypervisor, which tries everything that the issue of a guest's escape lists. Each
// attempt must fail, and what it must be able to do must work.
func TestHostileHypervisor(t *testing.T) {
	p := newPrison(t, nil)
	vm, other := ident.New(), ident.New()
	uid, otherUID := p.uid(vm), p.uid(other)
	if uid == otherUID {
		t.Fatalf("two VMs have the uid %d", uid)
	}
	own, ro, foreign := p.disk("own.raw", uid), p.disk("ro.raw", uid), p.disk("other.raw", otherUID)
	given := filepath.Join(p.dir, "vm", "kernel")
	p.vmDir(vm)
	must(t, os.WriteFile(given, []byte("kernel"), 0o644))
	secret := filepath.Join(p.dir, "secret")
	must(t, os.WriteFile(secret, nil, 0o644))
	f, err := os.Open(given)
	must(t, err)
	defer f.Close()

	// The other VM: a process under its uid, with a control socket and a disk; and a host with its sockets, all of
	// them more open than they are in truth.
	api, err := net.Listen("unix", filepath.Join(p.dir, "api.sock"))
	must(t, err)
	defer api.Close()
	must(t, os.Chmod(api.Addr().String(), 0o777))
	otherDir := p.vmDir(other)
	must(t, os.Chmod(filepath.Join(p.dir, "vm"), 0o755))
	must(t, os.Chmod(otherDir, 0o755))
	control, err := net.Listen("unix", filepath.Join(p.dir, "c.sock"))
	must(t, err)
	defer control.Close()
	must(t, os.Rename(control.Addr().String(), filepath.Join(otherDir, "api.sock")))
	must(t, os.Chmod(filepath.Join(otherDir, "api.sock"), 0o777))
	abstract, err := net.Listen("unix", "@mvirt-test-"+other)
	must(t, err)
	defer abstract.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer tcp.Close()
	victim := exec.Command("/bin/sleep", "1000")
	victim.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: otherUID, Gid: otherUID}}
	must(t, victim.Start())
	defer func() {
		_ = victim.Process.Kill()
		_ = victim.Wait()
	}()

	to, err := json.Marshal(targets{OwnDisk: "/disk/root", ReadOnlyDisk: "/disk/ro", OwnFile: given, OtherDisk: foreign, OtherDir: otherDir, OtherVM: other,
		API: api.Addr().String(), Abstract: "mvirt-test-" + other, TCP: tcp.Addr().String(), Victim: victim.Process.Pid, Launcher: os.Getpid(), Secret: secret})
	must(t, err)
	pr, err := p.start(vm, jail.Start{Name: "hostile", Args: []string{"test-hostile", string(to)}, Files: []string{given}, MemoryBytes: 64 << 20, CPUs: 1,
		Paths: []jail.Path{{Kind: jail.KindDisk, Name: "root", Path: own}, {Kind: jail.KindDisk, Name: "ro", Path: ro, ReadOnly: true}}}, []*os.File{f})
	must(t, err)
	result := filepath.Join(p.dir, "vm", vm, "attempts.json")
	var all []attempt
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if b, err := os.ReadFile(result); err == nil {
			must(t, json.Unmarshal(b, &all))
			break
		}
		select {
		case <-pr.Done():
			t.Fatalf("it ended with %s: %s", pr.Exit(), p.output())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("it does not come to an end: %s", p.output())
		}
	}
	if len(all) < 50 {
		t.Errorf("only %d attempts", len(all))
	}
	for _, a := range all {
		_, may := strings.CutPrefix(a.What, "may: ")
		switch {
		case may && a.Err != "":
			t.Errorf("it cannot %s: %s", a.What, a.Err)
		case !may && a.Err == "":
			t.Errorf("it could %s", a.What)
		default:
			t.Logf("%-50s %s", a.What, a.Err)
		}
	}
	if !alive(victim.Process.Pid) {
		t.Error("the other VM's process is gone")
	}
	checkJailStatus(t, pr.Identity().PID, uid)
}

// checkJailStatus reads what the kernel says of a hypervisor's process: each line as it must be, and no more.
func checkJailStatus(t *testing.T, pid int, uid uint32) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	r := report{Status: string(b)}
	four := strings.TrimSpace(strings.Repeat(fmt.Sprint(uid, " "), 4))
	for name, want := range map[string]string{"Uid": four, "Gid": four, "Groups": "4005", "CapInh": "0000000000000000", "CapPrm": "0000000000000000",
		"CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1"} {
		if got := r.status(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	for _, ns := range []string{"mnt", "net", "ipc", "uts"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err1 != nil || err2 != nil || ours == theirs {
			t.Errorf("%s namespace: %s and %s (%v, %v)", ns, ours, theirs, err1, err2)
		}
	}
}

// Disks come into a running jail and go again, and what the VM's uid may not open does not come.
func TestReachWhileRunning(t *testing.T) {
	p := newPrison(t, nil)
	vm := ident.New()
	uid := p.uid(vm)
	pr, err := p.start(vm, jail.Start{Args: []string{"test-opener"}, MemoryBytes: 1 << 20, CPUs: 1}, nil)
	must(t, err)
	inside := func(name string) string { return fmt.Sprintf("/proc/%d/root/disk/%s", pr.Identity().PID, name) }
	disk := jail.Path{Kind: jail.KindDisk, Name: "data", Path: p.disk("data.raw", uid)}
	for range 3 {
		must(t, p.cl.Reach(t.Context(), vm, pr.Identity(), disk))
		if b, err := os.ReadFile(inside("data")); err != nil || string(b) != "disk" {
			t.Fatalf("%q, %v", b, err)
		}
	}
	if n, err := p.cl.Size(t.Context(), vm, pr.Identity(), "data"); err != nil || n != 4 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := p.cl.Size(t.Context(), vm, pr.Identity(), "none"); errs.KindOf(err) != errs.NotFound {
		t.Errorf("a disk that is not there: %v", err)
	}
	must(t, p.cl.Unreach(t.Context(), vm, pr.Identity(), disk))
	if _, err := os.Stat(inside("data")); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	must(t, p.cl.Unreach(t.Context(), vm, pr.Identity(), disk))

	must(t, os.Mkdir(filepath.Join(p.dir, "shut"), 0o700))
	shut := jail.Path{Kind: jail.KindDisk, Name: "shut", Path: p.disk("shut/disk.raw", uid)}
	if err := p.cl.Reach(t.Context(), vm, pr.Identity(), shut); errs.KindOf(err) != errs.Denied {
		t.Errorf("a path behind a directory that is shut for the VM: %v", err)
	}
	link := filepath.Join(p.dir, "magic")
	must(t, os.Symlink("/proc/self/fd/0", link))
	if err := p.cl.Reach(t.Context(), vm, pr.Identity(), jail.Path{Kind: jail.KindDisk, Name: "magic", Path: link}); err == nil {
		t.Error("a magic link was followed")
	}
	for _, path := range []string{"/dev/null", "/etc"} {
		if err := p.cl.Reach(t.Context(), vm, pr.Identity(), jail.Path{Kind: jail.KindDisk, Name: "x", Path: path}); err == nil {
			t.Errorf("%s became a disk", path)
		}
	}
	// Another VM's process, and one that is no VM's, are not entered.
	stranger := ident.New()
	p.uid(stranger)
	if err := p.cl.Reach(t.Context(), stranger, pr.Identity(), disk); errs.KindOf(err) != errs.NotFound {
		t.Errorf("another VM's jail: %v", err)
	}
	me, err := proc.Identify(os.Getpid())
	must(t, err)
	if err := p.cl.Reach(t.Context(), vm, me, disk); errs.KindOf(err) != errs.NotFound {
		t.Errorf("the launcher itself as a jail: %v", err)
	}
}

// What outlives its launcher is served by the next: it needs only the uids, which are kept.
func TestJailsOutliveTheLauncher(t *testing.T) {
	p := newPrison(t, nil)
	vm := ident.New()
	uid := p.uid(vm)
	pr, err := p.start(vm, jail.Start{Args: []string{"test-opener"}, MemoryBytes: 1 << 20, CPUs: 1}, nil)
	must(t, err)
	second, err := newJails(p.j.cfg, filepath.Join(p.dir, "run"), p.j.plugin, p.j.trust, nil, newFamily(), p.j.log)
	must(t, err)
	defer second.close()
	old := p.j
	p.j = second
	cl := p.connect()
	p.j = old
	if as, err := cl.Identity(t.Context(), vm); err != nil || as.UID != uid {
		t.Fatalf("%+v, %v", as, err)
	}
	if err := cl.Forget(t.Context(), vm); errs.ReasonOf(err) != "UID_IN_USE" {
		t.Errorf("the uid of a VM that runs was given back: %v", err)
	}
	if _, err := p.start(vm, jail.Start{Args: []string{"test-opener"}, MemoryBytes: 1 << 20, CPUs: 1}, nil); errs.ReasonOf(err) != "UID_IN_USE" {
		t.Errorf("a second hypervisor of the VM: %v", err)
	}
	must(t, cl.Reach(t.Context(), vm, pr.Identity(), jail.Path{Kind: jail.KindDisk, Name: "d", Path: p.disk("d.raw", uid)}))
	found, err := cl.Open(vm, pr.Identity())
	must(t, err)
	must(t, found.Signal(syscall.SIGKILL))
	<-found.Done()
	<-pr.Done()
	if e := pr.Exit(); !e.Known || e.Signal != syscall.SIGKILL {
		t.Errorf("who started it knows that it ended with %s", e)
	}
	must(t, cl.Forget(t.Context(), vm))
	if list, err := cl.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	other := ident.New()
	as, err := cl.Identity(t.Context(), other)
	must(t, err)
	if as.UID == uid {
		t.Errorf("the uid %d was given to the next VM at once", uid)
	}
}

// What a plugin must not have is refused, with a reason.
func TestJailRefuses(t *testing.T) {
	p := newPrison(t, func(c *config.Jail) { c.UIDCount = 2; c.Hypervisors = []string{"/usr/bin/true"} })
	vm := ident.New()
	if _, err := p.start(vm, jail.Start{}, nil); errs.ReasonOf(err) != "HYPERVISOR_NOT_ALLOWED" {
		t.Errorf("a program that is not listed: %v", err)
	}
	root := filepath.Join(p.dir, "roots")
	must(t, os.Mkdir(root, 0o755))
	if _, err := p.start(vm, jail.Start{Program: "/usr/bin/true", Dir: root}, nil); errs.KindOf(err) != errs.Denied {
		t.Errorf("root's directory as the VM's: %v", err)
	}
	p.uid(ident.New())
	if _, err := p.cl.Identity(t.Context(), ident.New()); errs.KindOf(err) != errs.Exhausted {
		t.Errorf("more VMs than uids: %v", err)
	}
	me, err := proc.Identify(os.Getpid())
	must(t, err)
	ours, theirs, err := jail.Pair()
	must(t, err)
	go p.j.serve(ours)
	c := jail.NewConn(theirs)
	ask, err := jail.Encode(&jail.Request{Verb: jail.VerbSignal, VM: vm, Process: &jail.Process{PID: me.PID, StartTime: me.StartTime}, Signal: 9})
	must(t, err)
	must(t, c.Send(ask))
	b, _, err := c.Receive()
	must(t, err)
	if r, err := jail.DecodeReply(b); err != nil || r.Error == nil {
		t.Errorf("the launcher was sent SIGKILL, and does not know it: %s, %v", b, err)
	}
	must(t, c.Close())
	// Whoever breaks the protocol is not listened to any more.
	for _, bad := range []string{"{", `{"Verb":"start"}`, `{"Verb":"identity","VM":"../x"}`, `{"Verb":"list","X":1}`, `{"Verb":"signal","VM":"` + vm + `","Process":{"PID":1},"Signal":9}`} {
		ours, theirs, err := jail.Pair()
		must(t, err)
		go p.j.serve(ours)
		c := jail.NewConn(theirs)
		must(t, c.Send([]byte(bad)))
		if b, _, err := c.Receive(); b != nil || err != nil {
			t.Errorf("%s is answered: %s, %v", bad, b, err)
		}
		_ = c.Close()
	}
}

// A range of uids that has people in it is none.
func TestUIDRangeTaken(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "passwd"), []byte("a:x:1:1::/:\nfred:x:70001:1::/:\n"), 0o644))
	u := &uids{base: 70000, count: 10}
	if err := u.unclaimed(filepath.Join(dir, "passwd")); errs.ReasonOf(err) != "UID_RANGE_TAKEN" {
		t.Errorf("%v", err)
	}
	u.count = 1
	must(t, u.unclaimed(filepath.Join(dir, "passwd")))
}

// A program that ends at once is a hypervisor that has ended, with its exit status, and no error of the start.
func TestEndsAtOnce(t *testing.T) {
	p := newPrison(t, nil)
	for range 20 {
		pr, err := p.start(ident.New(), jail.Start{Program: "/usr/bin/false", MemoryBytes: 1 << 20, CPUs: 1}, nil)
		must(t, err)
		<-pr.Done()
		if e := pr.Exit(); !e.Known || e.Code != 1 || e.Signal != 0 {
			t.Fatalf("it ended with %s", e)
		}
	}
}

// testOpener is a hypervisor that does nothing.
func testOpener() {
	unix.Umask(0)
	select {}
}

// TestShare: what a hypervisor has made for itself alone in its VM's directory can be used by the plugin once it has
// been shared; nothing else is given away.
func TestShare(t *testing.T) {
	p := newPrison(t, nil)
	vm := ident.New()
	open := func(path string) *os.File {
		f, err := os.Open(path)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	dir := p.vmDir(vm)
	if err := p.cl.Share(t.Context(), vm, open(dir)); !errors.Is(err, errs.NotFound) {
		t.Errorf("a VM without a uid: %v", err)
	}
	as, err := p.cl.Identity(t.Context(), vm)
	must(t, err)
	foreign := t.TempDir()
	if err := p.cl.Share(t.Context(), vm, open(foreign)); !errors.Is(err, errs.Denied) {
		t.Errorf("a directory that is not the plugin's: %v", err)
	}

	sock := filepath.Join(dir, "serial.sock")
	l, err := net.Listen("unix", sock)
	must(t, err)
	defer l.Close()
	root := filepath.Join(dir, "root")
	must(t, os.WriteFile(root, nil, 0o600))
	linked := filepath.Join(dir, "linked")
	must(t, os.WriteFile(linked, nil, 0o600))
	must(t, os.Link(linked, filepath.Join(p.dir, "outside")))
	for _, path := range []string{sock, linked} {
		must(t, os.Chown(path, int(as.UID), int(as.GID)))
	}
	must(t, os.Chmod(sock, 0o700))
	must(t, p.cl.Share(t.Context(), vm, open(dir)))

	list := func(path string) []byte {
		b := make([]byte, 200)
		n, err := unix.Getxattr(path, "system.posix_acl_access", b)
		if err != nil {
			return nil
		}
		return b[:n]
	}
	if got := list(sock); !bytes.Equal(got, acl(jailPlugin, as.UID, 6)) {
		t.Errorf("the socket's list is %x", got)
	}
	for _, path := range []string{root, linked} {
		if got := list(path); got != nil {
			t.Errorf("%s was given away: %x", path, got)
		}
	}
}
