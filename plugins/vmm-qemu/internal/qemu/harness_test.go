package qemu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/test/guest"
)

// limit is how long anything may take on a slow, busy machine under emulation.
const limit = 90 * time.Second

// host collects what the plugin tells its host.
type host struct {
	mu     sync.Mutex
	audits []string
}

func (h *host) Audit(_ context.Context, r service.AuditRecord) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.audits = append(h.audits, r.Message)
	return nil
}
func (*host) Publish(context.Context, service.Event) error { return nil }

func (h *host) said(s string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Contains(strings.Join(h.audits, "\n"), s)
}

// rig is a plugin on a directory, in this process.
type rig struct {
	t     testing.TB
	dir   string
	m     *vmmkit.Manager
	host  *host
	guest guest.Guest
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigTB(t)
}

func newRigTB(t testing.TB) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	g, err := guest.Build(ctx, t.Logf)
	if err != nil {
		t.Fatalf("the guest cannot be made: %v", err)
	}
	r := &rig{t: t, dir: t.TempDir(), host: &host{}, guest: g}
	r.open()
	t.Cleanup(r.cleanup)
	return r
}

func (r *rig) open() {
	r.t.Helper()
	d, err := New(Config{Accel: "auto"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.m, err = vmmkit.Open(r.t.Context(), vmmkit.Options{DataDir: r.dir, Driver: d, Host: r.host,
		Log: hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: testWriter{r.t}})})
	if err != nil {
		r.t.Fatal(err)
	}
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Helper()
	if w.t.Context().Err() == nil {
		w.t.Log(strings.TrimSpace(string(b)))
	}
	return len(b), nil
}

func (r *rig) close() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := r.m.Shutdown(ctx); err != nil {
		r.t.Errorf("shutdown: %v", err)
	}
}

// cleanup ends all guests, and fails if anything is left.
func (r *rig) cleanup() {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	vms, err := r.m.List(ctx)
	if err != nil {
		r.t.Error(err)
	}
	for _, vm := range vms {
		if r.t.Failed() {
			for _, f := range []string{"hypervisor.log", "console.log"} {
				b, _ := os.ReadFile(filepath.Join(r.dir, "vm", vm.ID, f))
				r.t.Logf("%s of %s, %s:\n%s", f, vm.Spec.Name, vm.Reason, b[max(0, len(b)-3000):])
			}
		}
		if _, err := r.m.Kill(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
			r.t.Errorf("kill: %v", err)
		}
		if err := r.m.Delete(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
			r.t.Errorf("delete: %v", err)
		}
		if left := r.processes(vm.ID); len(left) > 0 {
			r.t.Errorf("processes of VM %s are left: %+v", vm.ID, left)
		}
	}
	for _, sub := range []string{"vm", "kernels"} {
		if ents, err := os.ReadDir(r.dir + "/" + sub); err != nil || len(ents) > 0 {
			r.t.Errorf("left in %s: %v, %v", sub, ents, err)
		}
	}
	r.close()
}

func (r *rig) processes(id string) []proc.Found {
	found, err := proc.Find(uint32(os.Getuid()), "mvirt-"+id+"-")
	if err != nil {
		r.t.Error(err)
	}
	return found
}

func (r *rig) open1(path string) *os.File {
	r.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { f.Close() })
	return f
}

// create makes a VM that boots the initramfs.
func (r *rig) create(change func(*vmm.CreateRequest)) vmm.VM {
	r.t.Helper()
	req := vmm.CreateRequest{ID: ident.New(), Kernel: r.open1(r.guest.Kernel), Initramfs: r.open1(r.guest.Initramfs),
		Spec: vmm.Spec{Name: "vm1", CPUs: 1, MemoryBytes: 160 << 20, Boot: vmm.Boot{Cmdline: "console=ttyS0 quiet panic=-1"}}}
	if change != nil {
		change(&req)
	}
	vm, err := r.m.Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return vm
}

func (r *rig) start(id string, req vmm.StartRequest) vmm.VM {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), limit)
	defer cancel()
	req.ID = id
	vm, err := r.m.Start(ctx, req)
	if err != nil {
		r.t.Fatal(err)
	}
	return vm
}

func (r *rig) get(id string) vmm.VM {
	r.t.Helper()
	vm, err := r.m.Get(r.t.Context(), vmm.Ref{Ref: id})
	if err != nil {
		r.t.Fatal(err)
	}
	return vm
}

// await waits, by events, until a VM is as cond says.
func (r *rig) await(id string, what string, cond func(vmm.Event) bool) vmm.VM {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), limit)
	defer cancel()
	found := errors.New("found")
	var vm vmm.VM
	err := r.m.Watch(ctx, func(e vmm.Event) error {
		if e.VM.ID == id && cond(e) {
			vm = e.VM
			return found
		}
		return nil
	})
	if !errors.Is(err, found) {
		r.t.Fatalf("never saw %s: %v; the VM is %+v", what, err, r.get(id))
	}
	return vm
}

func (r *rig) awaitState(id string, s vmm.State) vmm.VM {
	r.t.Helper()
	return r.await(id, s.String(), func(e vmm.Event) bool { return e.VM.State == s })
}

// console is a session that a test reads and types in.
type consoleRig struct {
	t    testing.TB
	in   chan []byte
	mu   sync.Mutex
	got  bytes.Buffer
	seen int
	news chan struct{}
	end  chan error
	stop func()
}

func (r *rig) console(id string, req vmm.ConsoleRequest) *consoleRig {
	c := &consoleRig{t: r.t, in: make(chan []byte), news: make(chan struct{}, 1), end: make(chan error, 1)}
	ctx, cancel := context.WithCancel(r.t.Context())
	c.stop = cancel
	req.Ref = id
	go func() {
		c.end <- r.m.Console(ctx, req, vmm.ConsoleIO{In: c.in, Out: func(b []byte) error {
			c.mu.Lock()
			c.got.Write(b)
			c.mu.Unlock()
			select {
			case c.news <- struct{}{}:
			default:
			}
			return nil
		}})
	}()
	r.t.Cleanup(cancel)
	return c
}

// until waits for text after what was waited for before.
func (c *consoleRig) until(s string) {
	c.t.Helper()
	deadline := time.After(limit)
	for {
		c.mu.Lock()
		rest := c.got.String()[c.seen:]
		i := strings.Index(rest, s)
		if i >= 0 {
			c.seen += i + len(s)
		}
		c.mu.Unlock()
		if i >= 0 {
			return
		}
		select {
		case <-c.news:
		case <-deadline:
			c.t.Fatalf("the console never showed %q; it ended with %q", s, rest[max(0, len(rest)-500):])
		}
	}
}

func (c *consoleRig) send(s string) {
	c.t.Helper()
	select {
	case c.in <- []byte(s):
	case <-time.After(limit):
		c.t.Fatalf("%q cannot be typed", s)
	}
}

// login gets a shell.
func (c *consoleRig) login() {
	c.t.Helper()
	c.until("login:")
	c.send("root\n")
	c.until("/root # ")
}

func kill(t *testing.T, pid uint32) {
	t.Helper()
	if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}
