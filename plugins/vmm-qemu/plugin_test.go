package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/test/guest"
)

const limit = 90 * time.Second

func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "mvirt-qemu")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

func launch(t *testing.T, bin, data string) *host.Plugin {
	t.Helper()
	p, err := host.Launch(t.Context(), host.Config{Kind: service.KindVMM, Spawner: &host.Local{Command: []string{bin, "--data-dir", data}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

// screen collects a console.
type screen struct {
	mu   sync.Mutex
	got  bytes.Buffer
	news chan struct{}
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

func (s *screen) until(t *testing.T, want string) {
	t.Helper()
	deadline := time.After(limit)
	for {
		s.mu.Lock()
		got := s.got.String()
		s.mu.Unlock()
		if strings.Contains(got, want) {
			return
		}
		select {
		case <-s.news:
		case <-deadline:
			t.Fatalf("the console never showed %q but %q", want, got)
		}
	}
}

// A guest counts seconds aloud while its plugin is killed and launched again, several times: it never stops, and
// not a number is missing on the console.
func TestGuestOutlivesPlugin(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*limit)
	defer cancel()
	g, err := guest.Build(ctx, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	bin, data := build(t), t.TempDir()
	p := launch(t, bin, data)
	for _, f := range []service.Feature{service.FeatureVMMHotplugDisk, service.FeatureVMMHotplugNIC, service.FeatureVMMCounters, service.FeatureVMMDiskResize} {
		if !p.VMM.Has(f) {
			t.Errorf("feature %d is not told", f)
		}
	}
	kernel, err := os.Open(g.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	initramfs, err := os.Open(g.Initramfs)
	if err != nil {
		t.Fatal(err)
	}
	defer initramfs.Close()
	req := vmm.CreateRequest{ID: ident.New(), Kernel: kernel, Initramfs: initramfs, Spec: vmm.Spec{Name: "counter", CPUs: 1, MemoryBytes: 160 << 20,
		Boot:      vmm.Boot{Cmdline: "console=ttyS0 quiet"},
		CloudInit: vmm.CloudInit{UserData: "#!/bin/sh\ni=0; while :; do echo count-$i-; i=$((i+1)); usleep 200000; done\n"}}}
	for range 2 {
		if _, err := p.VMM.Create(ctx, req); err != nil {
			t.Fatal(err)
		}
	}
	vm, err := p.VMM.Start(ctx, vmm.StartRequest{ID: req.ID})
	if err != nil {
		t.Fatal(err)
	}
	pid := vm.PID
	defer func() { _ = syscall.Kill(int(pid), syscall.SIGKILL) }() // in case of a failure below

	for round := range 3 {
		s := &screen{news: make(chan struct{}, 1)}
		cctx, stop := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() {
			done <- p.VMM.Console(cctx, vmm.ConsoleRequest{Ref: "counter", Replay: 1 << 20, ReadOnly: true}, vmm.ConsoleIO{Out: s.out})
		}()
		s.until(t, fmt.Sprintf("count-%d-", 15*(round+1)))
		stop()
		<-done
		if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-p.Exited()
		if _, err := p.VMM.Get(ctx, vmm.Ref{Ref: "counter"}); !errors.Is(err, errs.Unavailable) {
			t.Errorf("a call on a dead plugin: %v", err)
		}
		begin := time.Now()
		p = launch(t, bin, data)
		vm, err := p.VMM.Get(ctx, vmm.Ref{Ref: "counter"})
		if err != nil || vm.State != vmm.StateRunning || vm.PID != pid {
			t.Fatalf("round %d: %+v, %v", round, vm, err)
		}
		t.Logf("managed again after %v", time.Since(begin))
	}
	s := &screen{news: make(chan struct{}, 1)}
	if err := p.VMM.Console(ctx, vmm.ConsoleRequest{Ref: "counter", Replay: 1 << 20, NoFollow: true}, vmm.ConsoleIO{Out: s.out}); !errors.Is(err, io.EOF) {
		t.Errorf("the end of history is told by %v, want EOF", err)
	}
	for i := range 45 {
		if !strings.Contains(s.got.String(), fmt.Sprintf("count-%d-", i)) {
			t.Errorf("count %d is missing", i)
		}
	}
	if _, err := p.VMM.Kill(ctx, vmm.Ref{Ref: "counter"}); err != nil {
		t.Fatal(err)
	}
	if err := p.VMM.Delete(ctx, vmm.Ref{Ref: req.ID}); err != nil {
		t.Fatal(err)
	}
	if err := p.VMM.Delete(ctx, vmm.Ref{Ref: req.ID}); err != nil {
		t.Errorf("delete again: %v", err)
	}
	if err := p.Stop(ctx); err != nil {
		t.Errorf("stop of the plugin: %v", err)
	}
	// Init may take its time to reap it.
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(b), ") Z ") {
		t.Errorf("the hypervisor is still there: %s", b)
	}
}
