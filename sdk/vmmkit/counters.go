package vmmkit

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// Counters gives what a running VM has used: processor time and memory of its process as the kernel counts
// them, devices as the hypervisor does.
func (m *Manager) Counters(ctx context.Context, req vmm.Ref) (vmm.Counters, error) {
	var c vmm.Counters
	_, err := m.ask(ctx, req.Ref, "asked for its counters", func(ctx context.Context, _ *machine, r *run, inst Instance) error {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		var err error
		if c.Devices, err = inst.Counters(ctx); err != nil {
			return err
		}
		c.CPUTime, c.ResidentBytes, err = usage(r.proc.Identity().PID)
		return err
	}, vmm.StateRunning, vmm.StatePaused)
	return c, err
}

// usage reads fields 14 (utime), 15 (stime) and 24 (rss) of /proc/<pid>/stat. The kernel counts time for user
// space in hundredths of a second on every platform that Go runs on (USER_HZ).
func usage(pid int) (time.Duration, uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, errs.Wrap(errs.Unknown, err, "process %d cannot be read", pid)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 22 {
		return 0, 0, errs.New(errs.Internal, "/proc/%d/stat is too short", pid)
	}
	var n [3]uint64
	for i, field := range []int{14, 15, 24} {
		if n[i], err = strconv.ParseUint(f[field-3], 10, 64); err != nil {
			return 0, 0, errs.Wrap(errs.Internal, err, "/proc/%d/stat", pid)
		}
	}
	return time.Duration(n[0]+n[1]) * (time.Second / 100), n[2] * uint64(os.Getpagesize()), nil
}
