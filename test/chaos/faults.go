package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/test/system"
)

// victim is a process of mvirt's that is no guest.
type victim string

const (
	launcher victim = "launcher"
	core     victim = "core"
	logP     victim = "log"
	storageP victim = "storage"
	netP     victim = "net"
	vmmP     victim = "vmm"
	packets  victim = "packet worker"
	images   victim = "image worker" // while an import runs
)

var victims = []victim{launcher, core, logP, storageP, netP, vmmP, packets, images}

// binary of a victim's program, in bin.
func (v victim) binary() string {
	return map[victim]string{launcher: "mvirtd", core: "mvirtd", logP: "mvirt-log", storageP: "mvirt-dir", netP: "mvirt-net", vmmP: "mvirt-qemu",
		packets: "mvirt-net", images: "mvirt-dir"}[v]
}

func (v victim) plugin() bool { return v == logP || v == storageP || v == netP || v == vmmP }

// users whom the victims run as; root's mvirtd is known by its number.
var users = map[victim]string{core: "mvirt", logP: "mvirt-log", storageP: "mvirt-dir", netP: "root", vmmP: "mvirt-vmm", packets: "mvirt-worker", images: "mvirt-worker"}

// pids are the processes that are v now.
func (c *chaos) pids(v victim) []int {
	if v == launcher {
		return []int{c.sys.pid()}
	}
	list, err := system.Processes(c.place())
	if err != nil {
		c.fault("looking for processes: %v", err)
	}
	var out []int
	for _, p := range list {
		if p.Name == v.binary() && p.User == users[v] {
			out = append(out, p.PID)
		}
	}
	return out
}

// action is what is done to a victim.
type action string

const (
	kill    action = "kill"    // SIGKILL, as an administrator or the kernel when memory is out does
	freeze  action = "freeze"  // SIGSTOP for a while, then SIGCONT
	upgrade action = "upgrade" // another binary, then an orderly restart
	broken  action = "broken"  // killed while its binary fails at once; after a while the right one is back
	oom     action = "oom"     // a plugin and all that it started and that is no guest, at once (memory.oom.group)
)

// strike is one action on one victim.
type strike struct {
	do action
	at victim
}

func (s strike) String() string { return string(s.do) + " " + string(s.at) }

// draw chooses a fault: one strike mostly, several at once now and then.
func (c *chaos) draw() []strike {
	one := func() strike {
		for {
			v := victims[c.rand.IntN(len(victims))]
			acts := []action{kill, kill, freeze}
			switch {
			case v.plugin():
				acts = append(acts, upgrade, broken, oom)
			case v == launcher:
				acts = append(acts, upgrade, broken)
			}
			s := strike{acts[c.rand.IntN(len(acts))], v}
			if c.only == "" || strings.Contains(s.String(), c.only) {
				return s
			}
		}
	}
	n := []int{1, 1, 1, 1, 1, 2, 2, 3, 7}[c.rand.IntN(9)]
	var out []strike
	for len(out) < n {
		s := one()
		if slices.ContainsFunc(out, func(o strike) bool { return o.at.binary() == s.at.binary() && (o.do != kill || s.do != kill) }) {
			if c.only != "" || n == 7 {
				n--
			}
			continue
		}
		out = append(out, s)
	}
	return out
}

// oneFault does one fault, waits until all is managed again and notes how long that took.
func (c *chaos) oneFault(ctx context.Context, n int) error {
	list := c.draw()
	words := make([]string, len(list))
	for i, s := range list {
		words[i] = s.String()
		c.kinds[s.String()]++
	}
	// Drawn before, for the sake of the seed: what follows runs side by side.
	waits := make([]time.Duration, len(list))
	for i := range waits {
		waits[i] = 200*time.Millisecond + time.Duration(c.rand.Int64N(int64(max(c.freeze-200*time.Millisecond, 1))))
	}
	var all sync.WaitGroup
	errList, over := make([]error, len(list)), make([]time.Time, len(list))
	for i, s := range list {
		all.Go(func() { over[i], errList[i] = c.strike(ctx, s, waits[i]) })
	}
	all.Wait()
	if err := errors.Join(errList...); err != nil {
		return fmt.Errorf("fault %d (%s): %w", n, strings.Join(words, " + "), err)
	}
	// From here on nothing hinders; what counts is until it all answers again.
	took, err := c.managed(ctx, slices.MaxFunc(over, time.Time.Compare), managedMost)
	for _, g := range c.vms {
		if !g.alive() {
			return fmt.Errorf("guest exit: %s ended after fault %d (%s)", g.name, n, strings.Join(words, " + "))
		}
	}
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.fault("fault %d (%s): not managed again after %v: %v", n, strings.Join(words, " + "), managedMost, err)
		if len(c.wrong) > 5 {
			return errors.New("too much is wrong to go on")
		}
		return nil
	}
	c.say("%4d  %-40s managed after %6.0f ms, %5.0f ms after the last process was up", n, strings.Join(words, " + "), ms(took.total), ms(took.ready))
	c.again = append(c.again, took.total)
	c.ready = append(c.ready, took.ready)
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// strike does one action and returns when it no longer hinders, and since when that is so.
func (c *chaos) strike(ctx context.Context, s strike, wait time.Duration) (over time.Time, err error) {
	defer func() {
		if over.IsZero() {
			over = time.Now()
		}
	}()
	switch s.do {
	case kill:
		return over, c.signal(s.at, unix.SIGKILL)
	case oom:
		// Frozen first, so that none of them sees another die.
		list := c.pids(s.at)
		for _, v := range []victim{packets, images} {
			if v.binary() == s.at.binary() {
				list = append(list, c.pids(v)...)
			}
		}
		for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
			for _, pid := range list {
				if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
					return over, err
				}
			}
		}
		return over, nil
	case freeze:
		var held []int
		for _, pid := range c.pids(s.at) {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue
			}
			defer unix.Close(fd)
			if unix.PidfdSendSignal(fd, unix.SIGSTOP, nil, 0) == nil {
				held = append(held, fd)
			}
		}
		pause(ctx, wait)
		for _, fd := range held {
			if err := unix.PidfdSendSignal(fd, unix.SIGCONT, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				return over, err
			}
		}
		return over, nil
	case upgrade:
		if err := c.exchange(s.at, true); err != nil {
			return over, err
		}
		if s.at == launcher {
			return over, c.signal(s.at, unix.SIGTERM) // as a package's update does
		}
		// The answer does not matter: the core itself may be a victim.
		conn, err := c.sys.sys.Dial()
		if err != nil {
			return over, err
		}
		over = time.Now()
		defer conn.Close()
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, _ = apiv1.NewPluginsClient(conn).Restart(ctx, &apiv1.RestartPluginRequest{Kind: string(s.at)})
		return over, nil
	case broken:
		if err := c.exchange(s.at, false); err != nil {
			return over, err
		}
		err := c.signal(s.at, unix.SIGKILL)
		pause(ctx, wait)
		return over, errors.Join(err, c.exchange(s.at, true))
	}
	return over, fmt.Errorf("what is %s?", s.do)
}

func (c *chaos) signal(v victim, sig unix.Signal) error {
	for _, pid := range c.pids(v) {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // gone
		}
		err = unix.PidfdSendSignal(fd, sig, nil, 0)
		if err == nil && sig == unix.SIGKILL {
			// Until it is gone, what it served seems to be managed still.
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			for {
				if _, perr := unix.Poll(poll, 5000); !errors.Is(perr, unix.EINTR) {
					break
				}
			}
		}
		unix.Close(fd)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal to %s: %w", v, err)
		}
	}
	return nil
}

// exchange puts another binary in place of a victim's: the same program in another file (bytes behind the
// end of an ELF file mean nothing), or one that fails at once.
func (c *chaos) exchange(v victim, works bool) error {
	text := []byte("#!/bin/sh\necho \"chaos: this binary is broken\" >&2\nexit 7\n")
	if works {
		var err error
		if text, err = os.ReadFile(filepath.Join(c.bin, v.binary())); err != nil {
			return err
		}
		text = append(text, time.Now().String()...)
	}
	path := filepath.Join(c.place().Dir, "bin", v.binary())
	tmp := path + ".new"
	if err := os.WriteFile(tmp, text, 0o755); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// managedMost is how long it may take in a run under load; the figures say how long it took.
const managedMost = 90 * time.Second

// times are how long it took.
type times struct {
	total time.Duration // since the fault was over
	ready time.Duration // since every plugin was up
}

// managed waits until the API answers, every plugin is up, both guests are listed as running under their
// process, each hypervisor answers, and nothing about them is reported as wrong.
func (c *chaos) managed(ctx context.Context, begin time.Time, most time.Duration) (times, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	conn, err := c.sys.sys.Dial()
	if err != nil {
		return times{}, err
	}
	defer func() { conn.Close() }()
	up := time.Time{}
	var last error
	for {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			if err := c.oneCore(); err != nil {
				return err
			}
			r, err := apiv1.NewPluginsClient(conn).List(ctx, &apiv1.ListPluginsRequest{})
			if err != nil {
				return err
			}
			for _, p := range r.Plugins {
				if p.State != "up" && p.State != "degraded" {
					up = time.Time{}
					return fmt.Errorf("%s is %s: %s", p.Kind, p.State, p.Reason)
				}
			}
			if up.IsZero() {
				up = time.Now()
			}
			if c.guests > 0 && len(c.pids(packets)) == 0 {
				return errors.New("no packet worker")
			}
			return c.seen(ctx, apiv1.NewVMsClient(conn))
		}()
		if err == nil {
			return times{total: time.Since(begin), ready: time.Since(up)}, nil
		}
		last = err
		if strings.Contains(err.Error(), "connection") { // a new one at once, rather than gRPC's back-off
			conn.Close()
			if conn, err = c.sys.sys.Dial(); err != nil {
				return times{}, err
			}
		}
		select {
		case <-ctx.Done():
			return times{}, last
		case <-time.After(10 * time.Millisecond): // polling a public API that has no "managed" to wait for
		}
	}
}

// oneCore tells whether the core is the present launcher's: one whose launcher was killed answers for a moment.
func (c *chaos) oneCore() error {
	pids, boss := c.pids(core), c.sys.pid()
	if len(pids) != 1 {
		return fmt.Errorf("%d cores", len(pids))
	}
	st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pids[0]))
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(st), ") ")
	if _, err := startOf(boss); err != nil {
		return fmt.Errorf("the launcher: %w", err)
	}
	if w := strings.Fields(rest); len(w) < 2 || w[1] != fmt.Sprint(boss) {
		return errors.New("the core is that of a launcher that is gone")
	}
	return nil
}

// seen tells whether the guests are listed as they are.
func (c *chaos) seen(ctx context.Context, vms apiv1.VMsClient) error {
	r, err := vms.List(ctx, &apiv1.ListVMsRequest{})
	if err != nil {
		return err
	}
	for _, g := range c.vms {
		i := slices.IndexFunc(r.Vms, func(v *apiv1.VM) bool { return v.Id == g.id })
		if i < 0 {
			return fmt.Errorf("%s is not listed", g.name)
		}
		v := r.Vms[i]
		if v.State != "running" || int(v.Pid) != g.pid || v.Desired != "running" {
			return fmt.Errorf("%s is %s (%s), wanted %s, process %d, not %d", g.name, v.State, v.Reason, v.Desired, v.Pid, g.pid)
		}
		for _, cond := range v.Conditions {
			return fmt.Errorf("%s: %s: %s", g.name, cond.Code, cond.Text)
		}
	}
	return c.counters(ctx, vms)
}
