package conformance

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/vmm"
)

var vmmChecks = []check{
	{"vm names", checkVMNames},
	{"vm create is idempotent", checkVMIdempotent},
	{"vm refuses", checkVMRefuses},
	{"vm list", checkVMList},
	{"vm not found", checkVMNotFound},
	{"vm update", checkVMUpdate},
	{"vm definitions survive restarts", checkVMSurvives},
	{"vm states of a stopped one", checkVMStopped},
	{"watch", checkWatch},
	{"vm lifecycle", checkLifecycle},
	{"vm outlives its plugin", checkOutlives},
	{"console", checkConsole},
	{"vm starts once", checkStartsOnce},
	{"memory snapshots", checkMemorySnapshots},
}

func (c *C) spec(name string) vmm.Spec {
	return vmm.Spec{Name: c.name(name), CPUs: 1, MemoryBytes: c.cfg.MemoryBytes, Labels: map[string]string{"tag": c.tag}, Boot: vmm.Boot{Cmdline: c.cfg.Cmdline}}
}

// vm defines one. With a kernel it is the one that boots.
func (c *C) vm(name string, boots bool) vmm.VM {
	req := vmm.CreateRequest{ID: ident.New(), Spec: c.spec(name)}
	if boots {
		if c.cfg.Kernel == "" {
			c.Skipf("no kernel is given, so nothing can be booted")
		}
		k, err := os.Open(c.cfg.Kernel)
		c.ok(err, "kernel")
		defer k.Close()
		req.Kernel = k
		if c.cfg.Initramfs != "" {
			i, err := os.Open(c.cfg.Initramfs)
			c.ok(err, "initramfs")
			defer i.Close()
			req.Initramfs = i
		}
	} else {
		req.Spec.Boot.Cmdline = ""
	}
	v, err := c.p.VMM.Create(c, req)
	c.ok(err, "Create %s", name)
	c.removeVM(req.ID)
	return v
}

func (c *C) removeVM(id string) {
	c.later(func() {
		if v, err := c.p.VMM.Get(c, vmm.Ref{Ref: id}); err == nil && v.State.Live() {
			_, err = c.p.VMM.Kill(c, vmm.Ref{Ref: id})
			c.ok(err, "Kill")
		}
		c.ok(c.p.VMM.Delete(c, vmm.Ref{Ref: id}), "Delete")
	})
}

func (c *C) get(id string) vmm.VM {
	v, err := c.p.VMM.Get(c, vmm.Ref{Ref: id})
	c.ok(err, "Get")
	return v
}

func (c *C) state(v vmm.VM, want vmm.State, what string) {
	if v.State != want {
		c.Fatalf("%s: the VM is %s (%s), must be %s", what, v.State, v.Reason, want)
	}
}

func checkVMNames(c *C) {
	for _, n := range badNames {
		s := c.spec("x")
		s.Name, s.Boot.Cmdline = n, ""
		v, err := c.p.VMM.Create(c, vmm.CreateRequest{ID: ident.New(), Spec: s})
		c.fails(err, errs.Invalid, "VM name %q", n)
		if err == nil {
			c.removeVM(v.ID)
		}
	}
	for _, id := range []string{"", "1", "../x"} {
		s := c.spec("x")
		s.Boot.Cmdline = ""
		_, err := c.p.VMM.Create(c, vmm.CreateRequest{ID: id, Spec: s})
		c.fails(err, errs.Invalid, "VM id %q", id)
	}
}

func checkVMIdempotent(c *C) {
	req := vmm.CreateRequest{ID: ident.New(), Spec: c.spec("v")}
	req.Spec.Boot.Cmdline = ""
	req.Spec.CloudInit.UserData = "#cloud-config\n"
	req.Spec.Disks = []vmm.Disk{{Name: "root", VolumeID: ident.New(), Delete: true}}
	first, err := c.p.VMM.Create(c, req)
	c.ok(err, "Create")
	c.removeVM(req.ID)
	if first.ID != req.ID || first.Spec.Name != req.Spec.Name || first.Spec.CPUs != 1 || first.Spec.MemoryBytes != req.Spec.MemoryBytes || first.State != vmm.StateStopped ||
		first.Generation == 0 || first.CreatedAt.IsZero() || first.Spec.CloudInit.UserData != req.Spec.CloudInit.UserData || first.PID != 0 ||
		!slices.Equal(first.Spec.Disks, req.Spec.Disks) || first.Spec.Labels["tag"] != c.tag {
		c.Errorf("created %+v", first)
	}
	for range 3 {
		again, err := c.p.VMM.Create(c, req)
		c.ok(err, "the same create again")
		if again.ID != first.ID || again.Generation != first.Generation || !again.CreatedAt.Equal(first.CreatedAt) {
			c.Errorf("the same create gave %+v", again)
		}
	}
	other := req
	other.Spec.CPUs = 2
	_, err = c.p.VMM.Create(c, other)
	c.fails(err, errs.Exists, "the same id, other CPUs")
	other = req
	other.ID = ident.New()
	_, err = c.p.VMM.Create(c, other)
	c.fails(err, errs.Exists, "another id, the same name")
	for range 3 {
		c.ok(c.p.VMM.Delete(c, vmm.Ref{Ref: req.ID}), "Delete, repeated")
	}
	_, err = c.p.VMM.Get(c, vmm.Ref{Ref: req.ID})
	c.fails(err, errs.NotFound, "the deleted VM")
}

func checkVMRefuses(c *C) {
	for what, more := range map[string]func(*vmm.Spec){
		"0 CPUs":                 func(s *vmm.Spec) { s.CPUs = 0 },
		"100000 CPUs":            func(s *vmm.Spec) { s.CPUs = 100000 },
		"no memory":              func(s *vmm.Spec) { s.MemoryBytes = 0 },
		"17 bytes of memory":     func(s *vmm.Spec) { s.MemoryBytes = 17 },
		"memory of no whole MiB": func(s *vmm.Spec) { s.MemoryBytes += 4096 },
		"2^63 bytes of memory":   func(s *vmm.Spec) { s.MemoryBytes = 1 << 63 },
	} {
		s := c.spec("bad")
		s.Boot.Cmdline = ""
		more(&s)
		v, err := c.p.VMM.Create(c, vmm.CreateRequest{ID: ident.New(), Spec: s})
		c.fails(err, errs.Invalid, "%s", what)
		var e *errs.Error
		if err == nil {
			c.removeVM(v.ID)
		} else if !errors.As(err, &e) || e.Field == "" {
			c.Errorf("%s: the error names no field: %v", what, err)
		}
	}
	_, err := c.p.VMM.Get(c, vmm.Ref{Ref: c.name("bad")})
	c.fails(err, errs.NotFound, "what refused creates left")
}

func checkVMList(c *C) {
	var want []string
	for _, n := range []string{"m", "a", "z", "b10", "b2"} {
		want = append(want, c.vm(n, false).Spec.Name)
	}
	slices.Sort(want)
	list, err := c.p.VMM.List(c)
	c.ok(err, "List")
	var got []string
	for _, v := range list {
		if strings.HasPrefix(v.Spec.Name, "ct-"+c.tag) {
			got = append(got, v.Spec.Name)
		}
	}
	if !slices.Equal(got, want) {
		c.Errorf("listed %q, must be ordered by name: %q", got, want)
	}
	if v, err := c.p.VMM.Get(c, vmm.Ref{Ref: want[0]}); err != nil || v.Spec.Name != want[0] {
		c.Errorf("Get by name: %+v, %v", v, err)
	}
}

func checkVMNotFound(c *C) {
	for _, ref := range []string{ident.New(), "ct-none"} {
		r := vmm.Ref{Ref: ref}
		for what, call := range map[string]func() error{
			"Get":    func() error { _, err := c.p.VMM.Get(c, r); return err },
			"Start":  func() error { _, err := c.p.VMM.Start(c, vmm.StartRequest{ID: ref}); return err },
			"Stop":   func() error { _, err := c.p.VMM.Stop(c, vmm.StopRequest{Ref: ref}); return err },
			"Kill":   func() error { _, err := c.p.VMM.Kill(c, r); return err },
			"Pause":  func() error { _, err := c.p.VMM.Pause(c, r); return err },
			"Resume": func() error { _, err := c.p.VMM.Resume(c, r); return err },
			"Reboot": func() error { _, err := c.p.VMM.Reboot(c, vmm.RebootRequest{Ref: ref}); return err },
			"Update": func() error {
				_, err := c.p.VMM.Update(c, vmm.UpdateRequest{ID: ref, Generation: 1, Spec: c.spec("x")})
				return err
			},
			"Console": func() error {
				return c.p.VMM.Console(c, vmm.ConsoleRequest{Ref: ref}, vmm.ConsoleIO{Out: func([]byte) error { return nil }})
			},
		} {
			if what == "Start" && ref == "ct-none" || what == "Update" && ref == "ct-none" {
				continue // these take ids
			}
			c.fails(call(), errs.NotFound, "%s of nothing", what)
		}
		c.ok(c.p.VMM.Delete(c, r), "Delete of nothing")
	}
}

func checkVMUpdate(c *C) {
	v, other := c.vm("v", false), c.vm("o", false)
	spec := v.Spec
	spec.CPUs, spec.Name = 2, c.name("renamed")
	u, err := c.p.VMM.Update(c, vmm.UpdateRequest{ID: v.ID, Generation: v.Generation, Spec: spec})
	c.ok(err, "Update")
	if u.Generation <= v.Generation || u.Spec.CPUs != 2 || u.Spec.Name != spec.Name || !u.CreatedAt.Equal(v.CreatedAt) {
		c.Errorf("updated %+v", u)
	}
	_, err = c.p.VMM.Update(c, vmm.UpdateRequest{ID: v.ID, Generation: v.Generation, Spec: spec})
	c.fails(err, errs.Conflict, "Update of a generation that is gone")
	spec.Name = other.Spec.Name
	_, err = c.p.VMM.Update(c, vmm.UpdateRequest{ID: v.ID, Generation: u.Generation, Spec: spec})
	c.fails(err, errs.Exists, "Update to a name that is taken")
	spec.Name, spec.CPUs = c.name("renamed"), 0
	_, err = c.p.VMM.Update(c, vmm.UpdateRequest{ID: v.ID, Generation: u.Generation, Spec: spec})
	c.fails(err, errs.Invalid, "Update to 0 CPUs")
	if got := c.get(v.ID); got.Generation != u.Generation || got.Spec.CPUs != 2 {
		c.Errorf("refused updates changed it: %+v", got)
	}
	// Of two who read the same generation, one wins.
	var wg sync.WaitGroup
	won := make([]error, 4)
	for i := range won {
		wg.Go(func() {
			s := u.Spec
			s.CPUs = uint32(3 + i)
			_, won[i] = c.p.VMM.Update(c, vmm.UpdateRequest{ID: v.ID, Generation: u.Generation, Spec: s})
		})
	}
	wg.Wait()
	n := 0
	for _, err := range won {
		if err == nil {
			n++
		} else {
			c.fails(err, errs.Conflict, "an update that lost the race")
		}
	}
	if n != 1 {
		c.Errorf("%d of 4 updates of one generation were taken", n)
	}
}

func checkVMSurvives(c *C) {
	v := c.vm("v", false)
	for _, kill := range []bool{false, true} {
		c.restart(kill)
		got := c.get(v.Spec.Name)
		if got.ID != v.ID || got.Generation != v.Generation || !got.CreatedAt.Equal(v.CreatedAt) || got.State != vmm.StateStopped || got.RunAs != v.RunAs {
			c.Errorf("after a restart (killed: %v) %+v, was %+v", kill, got, v)
		}
	}
}

func checkVMStopped(c *C) {
	v := c.vm("v", false)
	r := vmm.Ref{Ref: v.ID}
	got, err := c.p.VMM.Stop(c, vmm.StopRequest{Ref: v.ID})
	c.ok(err, "Stop of a stopped VM")
	c.state(got, vmm.StateStopped, "Stop of a stopped VM")
	got, err = c.p.VMM.Kill(c, r)
	c.ok(err, "Kill of a stopped VM")
	c.state(got, vmm.StateStopped, "Kill of a stopped VM")
	_, err = c.p.VMM.Pause(c, r)
	c.fails(err, errs.Precondition, "Pause of a stopped VM")
	_, err = c.p.VMM.Resume(c, r)
	c.fails(err, errs.Precondition, "Resume of a stopped VM")
	_, err = c.p.VMM.Reboot(c, vmm.RebootRequest{Ref: v.ID})
	c.fails(err, errs.Precondition, "Reboot of a stopped VM")
}

// watcher collects events in the background.
type watcher struct {
	events chan vmm.Event
	ended  chan error
	cancel context.CancelFunc
}

func (c *C) watch() *watcher {
	ctx, cancel := context.WithCancel(c)
	w := &watcher{make(chan vmm.Event, 4096), make(chan error, 1), cancel}
	go func() {
		w.ended <- c.p.VMM.Watch(ctx, func(e vmm.Event) error { w.events <- e; return nil })
	}()
	c.later(cancel)
	return w
}

// until returns the first event that matches.
func (c *C) until(w *watcher, what string, limit time.Duration, match func(vmm.Event) bool) vmm.Event {
	t := time.NewTimer(limit)
	defer t.Stop()
	for {
		select {
		case e := <-w.events:
			if match(e) {
				return e
			}
		case err := <-w.ended:
			c.Fatalf("the watch ended while waiting for %s: %v", what, err)
		case <-t.C:
			c.Fatalf("no event within %v: %s", limit, what)
		}
	}
}

func checkWatch(c *C) {
	v := c.vm("v", false)
	w := c.watch()
	snapshot := 0
	c.until(w, "the end of the snapshot", 10*time.Second, func(e vmm.Event) bool {
		switch e.Type {
		case vmm.EventSnapshot:
			if e.VM.ID == v.ID {
				snapshot++
			}
		case vmm.EventSnapshotEnd:
			return true
		default:
			c.Errorf("an event of type %d before the end of the snapshot", e.Type)
		}
		return false
	})
	if snapshot != 1 {
		c.Errorf("the VM came %d times in the snapshot", snapshot)
	}
	n := c.vm("new", false)
	e := c.until(w, "the new VM", 10*time.Second, func(e vmm.Event) bool { return e.Type == vmm.EventChanged && e.VM.ID == n.ID })
	if e.VM.Spec.Name != n.Spec.Name || e.Time.IsZero() {
		c.Errorf("event %+v", e)
	}
	c.ok(c.p.VMM.Delete(c, vmm.Ref{Ref: n.ID}), "Delete")
	e = c.until(w, "its deletion", 10*time.Second, func(e vmm.Event) bool { return e.Type == vmm.EventDeleted && e.VM.ID == n.ID })
	if e.VM.Spec.Name != n.Spec.Name {
		c.Errorf("event %+v", e)
	}
	w.cancel()
	if err := <-w.ended; errs.KindOf(err) != errs.Canceled {
		c.Errorf("a cancelled watch ended with %v", err)
	}
	enough := errors.New("enough")
	if err := c.p.VMM.Watch(c, func(vmm.Event) error { return enough }); !errors.Is(err, enough) {
		c.Errorf("a watcher that ends the watch got %v", err)
	}
}

func (c *C) started(name string) vmm.VM {
	v := c.vm(name, true)
	v, err := c.p.VMM.Start(c, vmm.StartRequest{ID: v.ID})
	c.ok(err, "Start")
	c.state(v, vmm.StateRunning, "Start")
	return v
}

func checkLifecycle(c *C) {
	w := c.watch()
	v := c.started("v")
	if v.PID == 0 || v.StartedAt.IsZero() || v.Hypervisor == "" || v.Desired != vmm.StateRunning {
		c.Errorf("started %+v", v)
	}
	c.until(w, "running", 10*time.Second, func(e vmm.Event) bool {
		return e.Type == vmm.EventChanged && e.VM.ID == v.ID && e.VM.State == vmm.StateRunning
	})
	r := vmm.Ref{Ref: v.ID}
	again, err := c.p.VMM.Start(c, vmm.StartRequest{ID: v.ID})
	c.ok(err, "Start of a running VM")
	if again.PID != v.PID {
		c.Errorf("starting a running VM made another process: %d, was %d", again.PID, v.PID)
	}
	c.because(c.p.VMM.Delete(c, r), errs.Precondition, "VM_RUNNING", "Delete of a running VM")
	for range 2 {
		p, err := c.p.VMM.Pause(c, r)
		c.ok(err, "Pause")
		c.state(p, vmm.StatePaused, "Pause")
	}
	for range 2 {
		p, err := c.p.VMM.Resume(c, r)
		c.ok(err, "Resume")
		c.state(p, vmm.StateRunning, "Resume")
	}
	s, err := c.p.VMM.Stop(c, vmm.StopRequest{Ref: v.ID, Timeout: 2 * time.Second})
	c.ok(err, "Stop, by force after two seconds")
	c.state(s, vmm.StateStopped, "Stop")
	if s.PID != 0 || s.Reason == "" || s.Desired != vmm.StateStopped {
		c.Errorf("stopped %+v", s)
	}
	c.gone(v)
	c.until(w, "stopped", 10*time.Second, func(e vmm.Event) bool {
		return e.Type == vmm.EventChanged && e.VM.ID == v.ID && e.VM.State == vmm.StateStopped
	})
	v, err = c.p.VMM.Start(c, vmm.StartRequest{ID: v.ID, Paused: true})
	c.ok(err, "Start, paused")
	c.state(v, vmm.StatePaused, "Start, paused")
	k, err := c.p.VMM.Kill(c, r)
	c.ok(err, "Kill of a paused VM")
	c.state(k, vmm.StateStopped, "Kill")
	c.gone(v)
}

// gone wants that a hypervisor process has ended; a fake may have given this suite's own or its plugin's pid.
func (c *C) gone(v vmm.VM) {
	if int(v.PID) != c.p.PID() && syscall.Kill(int(v.PID), 0) == nil {
		c.Errorf("process %d is still there", v.PID)
	}
}

func checkOutlives(c *C) {
	v := c.started("v")
	fake := int(v.PID) == c.p.PID()
	for _, kill := range []bool{true, false} {
		c.restart(kill)
		got := c.get(v.ID)
		c.state(got, vmm.StateRunning, "after a restart of the plugin")
		if !fake && (got.PID != v.PID || !got.StartedAt.Equal(v.StartedAt)) {
			c.Errorf("after a restart (killed: %v) pid %d since %v, was %d since %v", kill, got.PID, got.StartedAt, v.PID, v.StartedAt)
		}
		p, err := c.p.VMM.Pause(c, vmm.Ref{Ref: v.ID})
		c.ok(err, "Pause after a restart")
		c.state(p, vmm.StatePaused, "Pause after a restart")
		_, err = c.p.VMM.Resume(c, vmm.Ref{Ref: v.ID})
		c.ok(err, "Resume after a restart")
	}
	if fake {
		return
	}
	w := c.watch()
	c.until(w, "the snapshot", 10*time.Second, func(e vmm.Event) bool { return e.Type == vmm.EventSnapshotEnd })
	if err := syscall.Kill(int(v.PID), syscall.SIGKILL); err != nil {
		c.Skipf("this process may not kill the hypervisor: %v", err)
	}
	e := c.until(w, "the hypervisor's death", 15*time.Second, func(e vmm.Event) bool { return e.VM.ID == v.ID && !e.VM.State.Live() })
	if e.VM.State != vmm.StateFailed || e.VM.Reason == "" {
		c.Errorf("a hypervisor that was killed left the VM %s, reason %q; must be failed, with a reason", e.VM.State, e.VM.Reason)
	}
	got, err := c.p.VMM.Start(c, vmm.StartRequest{ID: v.ID})
	c.ok(err, "Start of a failed VM")
	c.state(got, vmm.StateRunning, "Start of a failed VM")
}

// session is a console session in the background.
type session struct {
	in    chan []byte
	mu    sync.Mutex
	out   bytes.Buffer
	more  chan struct{}
	ended chan error
}

func (c *C) console(req vmm.ConsoleRequest) *session {
	s := &session{in: make(chan []byte, 16), more: make(chan struct{}, 1), ended: make(chan error, 1)}
	ctx, cancel := context.WithCancel(c)
	c.later(cancel)
	go func() {
		s.ended <- c.p.VMM.Console(ctx, req, vmm.ConsoleIO{In: s.in, Out: func(b []byte) error {
			s.mu.Lock()
			s.out.Write(b)
			s.mu.Unlock()
			select {
			case s.more <- struct{}{}:
			default:
			}
			return nil
		}})
	}()
	return s
}

func (s *session) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

func (c *C) shows(s *session, text string) {
	t := time.NewTimer(c.cfg.BootTimeout)
	defer t.Stop()
	for !strings.Contains(s.text(), text) {
		select {
		case <-s.more:
		case err := <-s.ended:
			c.Fatalf("the console ended before it showed %q: %v", text, err)
		case <-t.C:
			c.Fatalf("the console did not show %q within %v; it shows %.300q", text, c.cfg.BootTimeout, s.text())
		}
	}
}

func checkConsole(c *C) {
	if c.cfg.BootMarker == "" {
		c.Skipf("no boot marker is given, so nothing is known of what the guest prints")
	}
	v := c.started("v")
	w := c.console(vmm.ConsoleRequest{Ref: v.ID, Replay: 1 << 20})
	c.shows(w, c.cfg.BootMarker)
	late := c.console(vmm.ConsoleRequest{Ref: v.ID, ReadOnly: true, Replay: 1 << 20})
	c.shows(late, c.cfg.BootMarker) // what was printed before it joined is there
	var history bytes.Buffer
	err := c.p.VMM.Console(c, vmm.ConsoleRequest{Ref: v.ID, Replay: 1 << 20, NoFollow: true}, vmm.ConsoleIO{Out: func(b []byte) error { history.Write(b); return nil }})
	if err != nil && !errors.Is(err, io.EOF) || !strings.Contains(history.String(), c.cfg.BootMarker) {
		c.Errorf("history only: %v, %d bytes", err, history.Len())
	}
	second := c.console(vmm.ConsoleRequest{Ref: v.ID})
	select {
	case err := <-second.ended:
		if k := errs.KindOf(err); k != errs.Conflict && k != errs.Precondition {
			c.Errorf("a second writer: kind %q, must be conflict or precondition failed: %v", k, err)
		}
	case <-time.After(5 * time.Second):
		c.Errorf("a second writer was let in")
	}
	_, err = c.p.VMM.Kill(c, vmm.Ref{Ref: v.ID})
	c.ok(err, "Kill")
	for _, s := range []*session{w, late} {
		select {
		case err := <-s.ended:
			if !errors.Is(err, io.EOF) {
				c.Errorf("the console of a VM that stopped ended with %v, must be EOF", err)
			}
		case <-time.After(15 * time.Second):
			c.Errorf("the console goes on after the VM has stopped")
		}
	}
}

func checkStartsOnce(c *C) {
	v := c.vm("v", true)
	var wg sync.WaitGroup
	got := make([]vmm.VM, 4)
	fails := make([]error, 4)
	for i := range got {
		wg.Go(func() { got[i], fails[i] = c.p.VMM.Start(c, vmm.StartRequest{ID: v.ID}) })
	}
	wg.Wait()
	pids := map[uint32]bool{}
	for i, err := range fails {
		switch {
		case err == nil:
			pids[got[i].PID] = true
		case errs.KindOf(err) != errs.Conflict:
			c.Errorf("four starts at once: %v", err)
		}
	}
	if len(pids) != 1 {
		c.Errorf("four starts at once made the processes %v", pids)
	}
	var kill sync.WaitGroup
	for i := range fails {
		kill.Go(func() { _, fails[i] = c.p.VMM.Kill(c, vmm.Ref{Ref: v.ID}) })
	}
	kill.Wait()
	for _, err := range fails {
		if err != nil && errs.KindOf(err) != errs.Conflict {
			c.Errorf("four kills at once: %v", err)
		}
	}
	c.state(c.get(v.ID), vmm.StateStopped, "after the kills")
}
