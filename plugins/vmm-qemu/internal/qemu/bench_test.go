package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/vmm"
)

// BenchmarkStartAgainstBare measures from Start to the first line of the guest's first process, against the
// very command line that the plugin makes, started by hand, in turns. It reports the ratio of the medians.
// On a busy machine only the processor time that QEMU took until then says something; it is reported too.
// Run it on a quiet one: go test -run ^$ -bench StartAgainstBare -benchtime 7x
func BenchmarkStartAgainstBare(b *testing.B) {
	r := newRigTB(b)
	vm := r.create(nil)
	var args []string
	var oursCPU, bareCPU time.Duration
	ours := func() time.Duration {
		begin := time.Now()
		vm := r.start(vm.ID, vmm.StartRequest{})
		started := time.Since(begin)
		seen := make(chan struct{})
		ctx, cancel := context.WithTimeout(b.Context(), limit)
		defer cancel()
		var text strings.Builder
		go func() {
			_ = r.m.Console(ctx, vmm.ConsoleRequest{Ref: vm.ID, ReadOnly: true}, vmm.ConsoleIO{Out: func(p []byte) error {
				text.Write(p)
				if strings.Contains(text.String(), "mvirt-guest: init") {
					close(seen)
					return context.Canceled
				}
				return nil
			}})
		}()
		select {
		case <-seen:
		case <-ctx.Done():
			b.Fatal("the guest never ran")
		}
		d := time.Since(begin)
		cpu := cpuTime(b, int(vm.PID))
		oursCPU += cpu
		b.Logf("start returned after %v, init after %v, %v of processor", started, d, cpu)
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", vm.PID))
		if err != nil {
			b.Fatal(err)
		}
		args = strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
		if _, err := r.m.Kill(b.Context(), vmm.Ref{Ref: vm.ID}); err != nil {
			b.Fatal(err)
		}
		return d
	}
	bare := func() time.Duration {
		dir := b.TempDir()
		var hand []string
		for _, a := range args[1:] {
			a = strings.ReplaceAll(a, "fd=3", "path="+filepath.Join(dir, "api"))
			hand = append(hand, strings.ReplaceAll(a, "fd=4", "path="+filepath.Join(dir, "serial")))
		}
		begin := time.Now()
		cmd := exec.CommandContext(b.Context(), args[0], hand...)
		cmd.Dir = dir
		// As ours: the kernel shares the processor out between sessions (sched_autogroup), so in ours it would
		// get more or less of a busy one.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		for end := begin.Add(limit); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if out, err := os.ReadFile(filepath.Join(dir, "console.log")); err == nil && strings.Contains(string(out), "mvirt-guest: init") {
				d := time.Since(begin)
				bareCPU += cpuTime(b, cmd.Process.Pid)
				return d
			}
		}
		b.Fatal("the guest started by hand never ran")
		return 0
	}
	ours() // learn the command line, warm the caches
	oursCPU = 0
	var a, c []time.Duration
	for b.Loop() {
		a = append(a, ours())
		c = append(c, bare())
	}
	slices.Sort(a)
	slices.Sort(c)
	b.ReportMetric(a[len(a)/2].Seconds(), "s/mvirt")
	b.ReportMetric(c[len(c)/2].Seconds(), "s/bare")
	b.ReportMetric(oursCPU.Seconds()/bareCPU.Seconds(), "cpu_vs_bare_qemu")
	b.ReportMetric(a[len(a)/2].Seconds()/c[len(c)/2].Seconds(), "vm_start_vs_bare_qemu")
}

// cpuTime is what a process has used of the processor: fields 14 and 15 of its stat, in hundredths of a second.
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(st[strings.LastIndexByte(string(st), ')')+1:]))
	u, uerr := strconv.Atoi(f[14-3])
	s, serr := strconv.Atoi(f[15-3])
	if err := errors.Join(uerr, serr); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u+s) * (time.Second / 100)
}
