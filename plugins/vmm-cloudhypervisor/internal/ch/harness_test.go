package ch

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/chfake"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
)

const limit = 20 * time.Second

// The test's own binary is the test double: started by a name of cloud-hypervisor's, or by a VM's marker.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == vsockMode {
		os.Exit(answerVsock())
	}
	name := filepath.Base(os.Args[0])
	if name == "cloud-hypervisor" || strings.HasPrefix(name, "mvirt-") {
		dir := filepath.Dir(os.Args[0])
		if name != "cloud-hypervisor" {
			dir, _ = os.Getwd() // the VM's directory; the link's is two up, with the path of the document
			dir = filepath.Join(dir, "../../bin")
		}
		os.Exit(chfake.Main(os.Args[1:], dir))
	}
	os.Exit(m.Run())
}

// openAPI is where the published document is, beside the checkout.
func openAPI(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
	}
	p := filepath.Join(filepath.Dir(dir), "shared", "contracts", "cloud-hypervisor-openapi.yaml")
	if _, err := os.Stat(p); err != nil {
		t.Logf("requests are not held against cloud-hypervisor's OpenAPI document: %v", err)
		return ""
	}
	return p
}

type quietHost struct{}

func (quietHost) Audit(context.Context, service.AuditRecord) error { return nil }
func (quietHost) Publish(context.Context, service.Event) error     { return nil }

type rig struct {
	t     testing.TB
	dir   string
	m     *vmmkit.Manager
	limit time.Duration

	binaries []string // empty: the double
	driver   *Driver
}

// newRig makes a plugin on a directory: bin holds the double, the rest is the plugin's.
func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigTB(t)
}

func newRigTB(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), limit: limit}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(r.dir, "bin")
	if err := errors.Join(os.Mkdir(bin, 0o755), os.Symlink(self, filepath.Join(bin, "cloud-hypervisor")),
		os.WriteFile(filepath.Join(bin, chfake.SpecFile), []byte(openAPI(t)), 0o600)); err != nil {
		t.Fatal(err)
	}
	r.open()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		vms, _ := r.m.List(ctx)
		for _, vm := range vms {
			if _, err := r.m.Kill(ctx, vmm.Ref{Ref: vm.ID}); err != nil {
				t.Error(err)
			}
			if b, err := os.ReadFile(r.file(vm.ID, "violations")); err == nil {
				t.Errorf("against the OpenAPI document:\n%s", b)
			}
		}
		r.close()
	})
	return r
}

func (r *rig) open() {
	r.t.Helper()
	binaries := r.binaries
	if len(binaries) == 0 {
		binaries = []string{filepath.Join(r.dir, "bin", "cloud-hypervisor")}
	}
	d, err := New(Config{Binaries: binaries, NoKVM: true})
	if err != nil {
		r.t.Fatal(err)
	}
	r.driver = d
	if r.m, err = vmmkit.Open(r.t.Context(), vmmkit.Options{DataDir: r.dir, Driver: d, Log: hclog.NewNullLogger(), Host: quietHost{}}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) close() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := r.m.Shutdown(ctx); err != nil {
		r.t.Errorf("shutdown: %v", err)
	}
}

func (r *rig) file(id, name string) string { return filepath.Join(r.dir, "vm", id, name) }

func (r *rig) fault(id, what, kind string) {
	r.t.Helper()
	if err := os.WriteFile(r.file(id, "fault"), []byte(what+" "+kind+"\n"), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) create(change func(*vmm.CreateRequest)) vmm.VM {
	r.t.Helper()
	p := filepath.Join(r.t.TempDir(), "vmlinuz")
	b := make([]byte, 4096)
	copy(b[0x202:], "HdrS")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		r.t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	req := vmm.CreateRequest{ID: ident.New(), Kernel: f, Spec: vmm.Spec{Name: "vm1", CPUs: 2, MemoryBytes: 64 << 20,
		Boot: vmm.Boot{Cmdline: "console=ttyS0"}}}
	if change != nil {
		change(&req)
	}
	vm, err := r.m.Create(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return vm
}

func (r *rig) start(id string) vmm.VM {
	r.t.Helper()
	vm, err := r.m.Start(r.t.Context(), vmm.StartRequest{ID: id})
	if err != nil {
		r.t.Fatal(err)
	}
	return vm
}

func (r *rig) await(id, what string, cond func(vmm.Event) bool) vmm.VM {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), r.limit)
	defer cancel()
	found := errors.New("found")
	var vm vmm.VM
	if err := r.m.Watch(ctx, func(e vmm.Event) error {
		if e.VM.ID == id && cond(e) {
			vm = e.VM
			return found
		}
		return nil
	}); !errors.Is(err, found) {
		now, _ := r.m.Get(r.t.Context(), vmm.Ref{Ref: id})
		r.t.Fatalf("never saw %s: %v; the VM is %+v", what, err, now)
	}
	return vm
}

func (r *rig) awaitState(id string, s vmm.State) vmm.VM {
	r.t.Helper()
	return r.await(id, s.String(), func(e vmm.Event) bool { return e.VM.State == s })
}

// screen is a console session.
type screen struct {
	t    testing.TB
	in   chan []byte
	news chan struct{}
	end  chan error
	stop func()

	limit time.Duration

	mu   sync.Mutex // guards what follows
	got  bytes.Buffer
	seen int
}

func (r *rig) console(id string) *screen {
	s := &screen{t: r.t, in: make(chan []byte), news: make(chan struct{}, 1), end: make(chan error, 1), limit: r.limit}
	ctx, cancel := context.WithCancel(r.t.Context())
	s.stop = cancel
	go func() {
		s.end <- r.m.Console(ctx, vmm.ConsoleRequest{Ref: id, Replay: 1 << 20, Steal: true}, vmm.ConsoleIO{In: s.in, Out: s.out})
	}()
	r.t.Cleanup(cancel)
	return s
}

func (s *screen) out(b []byte) error {
	s.mu.Lock()
	s.got.Write(b)
	s.mu.Unlock()
	select {
	case s.news <- struct{}{}:
	default:
	}
	return nil
}

func (s *screen) until(want string) {
	s.t.Helper()
	deadline := time.After(s.limit)
	for {
		s.mu.Lock()
		rest := s.got.String()[s.seen:]
		i := strings.Index(rest, want)
		if i >= 0 {
			s.seen += i + len(want)
		}
		s.mu.Unlock()
		if i >= 0 {
			return
		}
		select {
		case <-s.news:
		case <-deadline:
			s.t.Fatalf("never saw %q but %q", want, rest)
		}
	}
}

func (s *screen) send(text string) {
	s.t.Helper()
	select {
	case s.in <- []byte(text):
	case <-time.After(s.limit):
		s.t.Fatal("nobody takes what is typed")
	}
}
