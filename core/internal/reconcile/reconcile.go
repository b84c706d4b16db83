// Package reconcile compares what the plugins report with what VMs need, and repairs or reports the difference.
//
// A pass runs when a plugin came up, when a VM ended, and now and then. It needs all three plugins; while one
// is away it waits. What it repairs, it does through operations of the core (package plan), so that it takes
// turns with what users ask for and stands in the audit trail:
//
//   - a VM that does not run has nothing attached: what is left is released;
//   - a running VM's volumes are attached (access to a device is lost when the host's device manager or a
//     storage plugin starts anew): they are attached again;
//   - a running VM's NIC that lost its data path gets one again;
//   - VMs marked autostart are started once after a boot of the host.
//
// What it cannot repair it reports as conditions: a VM that names a volume or NIC that is gone, a running VM
// whose NIC got no data path again, a volume or NIC made for a VM that is gone.
//
// It also follows the vmm plugin's events: a guest that powers itself off, crashes or reboots is audited,
// published, and released.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mvirt/mvirt/core/internal/bus"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

const (
	every       = 5 * time.Minute        // a pass even if nothing seems to have happened
	again       = 2 * time.Second        // after a pass that something stood in the way of
	settle      = 100 * time.Millisecond // events that come together make one pass
	startAtOnce = 4                      // VMs started side by side after a boot
	bootIDPath  = "/proc/sys/kernel/random/boot_id"
	source      = "core.reconcile"
)

// Options of a reconciler.
type Options struct {
	Services plan.Services
	Changes  *plan.Changes
	Engine   *operation.Engine
	Health   *health.Tracker
	Audit    func(ctx context.Context, e log.Entry) error
	Publish  func(e bus.Event)
	Up       func(k service.Kind) bool // whether a plugin answers now
	// Seen is told of each VM that the watch shows. ctx ends with the watch.
	Seen     func(ctx context.Context, vm vmm.VM)
	Event    func(e vmm.Event) // told of each event of the watch; may be nil
	Watching func()            // told when a watch begins and when it ends; may be nil
	StateDir string            // keeps the id of the boot whose VMs were started
	BootID   string            // "" : the kernel's
	Log      *slog.Logger
}

// Reconciler reconciles.
type Reconciler struct {
	opt     Options
	trigger chan struct{} // capacity 1
	me      plan.Call

	mu        sync.Mutex
	autostart bool // VMs are to be started after a boot
	bootID    string
	repaired  map[string]attempt // repairs of NICs that failed, by VM and NIC
}

// New makes a reconciler.
func New(opt Options) *Reconciler {
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	if opt.Seen == nil {
		opt.Seen = func(context.Context, vmm.VM) {}
	}
	if opt.Event == nil {
		opt.Event = func(vmm.Event) {}
	}
	if opt.Watching == nil {
		opt.Watching = func() {}
	}
	r := &Reconciler{opt: opt, repaired: map[string]attempt{}, trigger: make(chan struct{}, 1), me: plan.Call{Who: operation.Who{Name: "core", Core: true}}, bootID: opt.BootID}
	if r.bootID == "" {
		raw, err := os.ReadFile(bootIDPath)
		if err != nil {
			opt.Log.Warn("the boot's id cannot be read; VMs are not started by themselves", "error", err)
		}
		r.bootID = strings.TrimSpace(string(raw))
	}
	last, err := os.ReadFile(r.bootFile())
	r.autostart = r.bootID != "" && (err != nil || strings.TrimSpace(string(last)) != r.bootID)
	return r
}

func (r *Reconciler) bootFile() string { return filepath.Join(r.opt.StateDir, "boot-id") }

// PluginUp is told that a plugin came up; for vmm it follows its events until ctx ends.
func (r *Reconciler) PluginUp(ctx context.Context, k service.Kind) {
	r.Trigger()
	if k == service.KindVMM {
		r.watch(ctx)
	}
}

// Trigger asks for a pass.
func (r *Reconciler) Trigger() {
	select {
	case r.trigger <- struct{}{}:
	default:
	}
}

// Run makes passes until ctx ends.
func (r *Reconciler) Run(ctx context.Context) {
	next := time.NewTimer(every)
	defer next.Stop()
	for {
		select {
		case <-r.trigger:
			pause(ctx, settle)
		case <-next.C:
		case <-ctx.Done():
			return
		}
		select { // what came meanwhile is covered by the pass that follows
		case <-r.trigger:
		default:
		}
		wait := every
		clean, err := r.Pass(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			r.opt.Log.Warn("a reconciliation failed", "error", err)
		}
		if err != nil || !clean {
			wait = again
		}
		next.Reset(wait)
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// state is what the plugins report.
type state struct {
	vms     []vmm.VM
	volumes map[string]storage.Volume
	nics    map[string]net.NIC
}

// look asks all plugins. ok is false while one is away: its coming up triggers another pass.
func (r *Reconciler) look(ctx context.Context) (s state, ok bool, err error) {
	for _, k := range []service.Kind{service.KindVMM, service.KindStorage, service.KindNet} {
		if !r.opt.Up(k) {
			return s, false, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var vols []storage.Volume
	var nics []net.NIC
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) { vols, err = r.opt.Services.Storage.ListVolumes(gctx); return err })
	g.Go(func() (err error) {
		nics, err = r.opt.Services.Net.ListNICs(gctx, net.ListNICsRequest{})
		return err
	})
	if err := g.Wait(); err != nil {
		return s, false, away(err)
	}
	// VMs last: what was made for a VM is there before its definition, so nothing seems to be missing.
	if s.vms, err = r.opt.Services.VMM.List(ctx); err != nil {
		return s, false, away(err)
	}
	s.volumes, s.nics = make(map[string]storage.Volume, len(vols)), make(map[string]net.NIC, len(nics))
	for _, v := range vols {
		s.volumes[v.ID] = v
	}
	for _, n := range nics {
		s.nics[n.ID] = n
	}
	return s, true, nil
}

// away hides that a plugin went away in the middle.
func away(err error) error {
	if errors.Is(err, errs.Unavailable) {
		return nil
	}
	return err
}

// Pass compares once. clean is false when something stood in the way and another pass is due soon.
func (r *Reconciler) Pass(ctx context.Context) (clean bool, err error) {
	s, ok, err := r.look(ctx)
	if err != nil || !ok {
		return err == nil, err
	}
	clean = true
	var found []service.Condition
	for _, vm := range s.vms {
		if r.opt.Engine.On("vm:"+vm.ID) != "" {
			clean = clean && !r.left(s, vm) // its operation takes care of it; look again if something may stay
			continue
		}
		found = append(found, r.missing(s, vm)...)
		switch {
		case vm.State == vmm.StateRunning || vm.State == vmm.StatePaused:
			found = append(found, r.attached(ctx, s, vm)...)
		case !vm.State.Live() && r.left(s, vm):
			if _, err := r.opt.Changes.ReleaseVM(ctx, r.me, vm, reason(vm)); err != nil {
				r.opt.Log.Warn("what a VM had attached is not released yet", "vm", vm.Spec.Name, "error", err)
				clean = false
			}
		}
	}
	found = append(found, orphans(s)...)
	r.opt.Health.Replace(source, found)
	if ctx.Err() == nil {
		r.startAfterBoot(ctx, s.vms)
	}
	return clean, nil
}

func reason(vm vmm.VM) string {
	if vm.Reason != "" {
		return vm.Reason
	}
	return "it is " + vm.State.String()
}

// left tells whether something is still attached for a VM.
func (r *Reconciler) left(s state, vm vmm.VM) bool {
	for _, d := range vm.Spec.Disks {
		if slices.ContainsFunc(s.volumes[d.VolumeID].Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == vm.ID }) {
			return true
		}
	}
	for _, n := range vm.Spec.NICs {
		if s.nics[n.NICID].VMID == vm.ID {
			return true
		}
	}
	return false
}

// missing are the parts of a VM that are not there.
func (r *Reconciler) missing(s state, vm vmm.VM) (out []service.Condition) {
	for _, d := range vm.Spec.Disks {
		v, ok := s.volumes[d.VolumeID]
		switch {
		case !ok:
			out = append(out, service.Condition{Code: "VOLUME_MISSING", Severity: service.SeverityCritical, Object: vm.ID,
				Text:   fmt.Sprintf("VM %s has disk %s on volume %s, which does not exist", vm.Spec.Name, d.Name, d.VolumeID),
				Remedy: fmt.Sprintf("restore the volume, or take the disk out: mvirt vm detach-volume %s %s", vm.Spec.Name, d.Name)})
		case v.State == storage.StateDamaged:
			out = append(out, service.Condition{Code: "VOLUME_DAMAGED", Severity: service.SeverityCritical, Object: vm.ID,
				Text:   fmt.Sprintf("VM %s has disk %s on volume %s, which is damaged: %s", vm.Spec.Name, d.Name, v.Name, v.StateReason),
				Remedy: "roll it back to a snapshot, or restore it from a backup"})
		}
	}
	for i, n := range vm.Spec.NICs {
		if _, ok := s.nics[n.NICID]; !ok {
			out = append(out, service.Condition{Code: "NIC_MISSING", Severity: service.SeverityCritical, Object: vm.ID,
				Text:   fmt.Sprintf("VM %s has as NIC %d one that does not exist: %s", vm.Spec.Name, i, n.NICID),
				Remedy: fmt.Sprintf("take it out: mvirt vm detach-nic %s %s", vm.Spec.Name, n.NICID)})
		}
	}
	return out
}

// attached sees that what a running VM uses is attached.
func (r *Reconciler) attached(ctx context.Context, s state, vm vmm.VM) (out []service.Condition) {
	owner := service.Owner{VMID: vm.ID, UID: vm.RunAs.UID, GID: vm.RunAs.GID}
	for _, d := range vm.Spec.Disks {
		v, ok := s.volumes[d.VolumeID]
		if !ok || slices.ContainsFunc(v.Attachments, func(a storage.AttachmentInfo) bool { return a.VMID == vm.ID }) {
			continue
		}
		if vm.Pending {
			continue // the disk may be waiting for the next start
		}
		_, err := r.opt.Services.Storage.Attach(ctx, storage.AttachRequest{VolumeID: v.ID, Owner: owner, ReadOnly: d.ReadOnly})
		r.audit(ctx, fmt.Sprintf("reattach:%s:%s:%d", vm.ID, v.ID, time.Now().UnixNano()), fmt.Sprintf("volume %s attached again for running VM %s%s", v.Name, vm.Spec.Name, failed(err)),
			map[string]string{"op": "vm.reattach", "outcome": outcome(err)}, vm.ID, v.ID)
		if err != nil {
			out = append(out, service.Condition{Code: "VOLUME_NOT_ATTACHED", Severity: service.SeverityCritical, Object: vm.ID,
				Text: fmt.Sprintf("VM %s runs, and its volume %s is not attached: %v", vm.Spec.Name, v.Name, err), Remedy: errs.RemedyOf(err)})
		}
	}
	for _, n := range vm.Spec.NICs {
		if nic, ok := s.nics[n.NICID]; ok && nic.VMID != vm.ID && !vm.Pending {
			err := r.repairNIC(ctx, vm, n, nic)
			if err == nil {
				continue
			}
			out = append(out, service.Condition{Code: "NIC_NOT_ATTACHED", Severity: service.SeverityWarning, Object: vm.ID,
				Text:   fmt.Sprintf("VM %s runs, and its NIC %s has no data path: %v", vm.Spec.Name, nic.Name, err),
				Remedy: fmt.Sprintf("mvirt vm stop %s, then mvirt vm start %s", vm.Spec.Name, vm.Spec.Name)})
		}
	}
	return out
}

// repairNIC gives a NIC its data path again. After a failure it is left alone for a while: each attempt takes the
// device from the guest for a moment.
func (r *Reconciler) repairNIC(ctx context.Context, vm vmm.VM, n vmm.NIC, nic net.NIC) error {
	if nic.VMID != "" {
		return errs.New(errs.Precondition, "it is attached to VM %s", nic.VMID)
	}
	key := vm.ID + "/" + n.NICID
	r.mu.Lock()
	last, err := r.repaired[key], error(nil)
	if last.err != nil && time.Since(last.at) < every {
		err = last.err
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = r.opt.Changes.RepairNIC(ctx, r.me, vm, n)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil || errors.Is(err, errs.Unavailable) || errors.Is(err, errs.Conflict) {
		delete(r.repaired, key) // what was only in the way is tried at the next pass
		return err
	}
	r.repaired[key] = attempt{time.Now(), err}
	return err
}

// attempt is a repair that failed.
type attempt struct {
	at  time.Time
	err error
}

// orphans are volumes and NICs made for VMs that are gone.
func orphans(s state) (out []service.Condition) {
	there := make(map[string]bool, len(s.vms))
	for _, vm := range s.vms {
		there[vm.ID] = true
	}
	add := func(code, what, id, vmID, remedy string) {
		out = append(out, service.Condition{Code: code, Severity: service.SeverityInfo, Object: id,
			Text: what + " was made for VM " + vmID + ", which does not exist any more", Remedy: "keep it, or remove it: " + remedy})
	}
	for id, v := range s.volumes {
		if vm := v.Labels[plan.OwnerLabel]; vm != "" && !there[vm] && !used(s.vms, func(o vmm.VM) bool {
			return slices.ContainsFunc(o.Spec.Disks, func(d vmm.Disk) bool { return d.VolumeID == id })
		}) {
			add("VOLUME_ORPHANED", "volume "+v.Name, id, vm, "mvirt volume rm "+v.Name)
		}
	}
	for id, n := range s.nics {
		if vm := n.Labels[plan.OwnerLabel]; vm != "" && !there[vm] && !used(s.vms, func(o vmm.VM) bool {
			return slices.ContainsFunc(o.Spec.NICs, func(d vmm.NIC) bool { return d.NICID == id })
		}) {
			add("NIC_ORPHANED", "NIC "+n.Name, id, vm, "mvirt nic rm "+n.Name)
		}
	}
	return out
}

func used(vms []vmm.VM, by func(vmm.VM) bool) bool { return slices.ContainsFunc(vms, by) }

func failed(err error) string {
	if err == nil {
		return ""
	}
	return ": failed: " + err.Error()
}

func outcome(err error) string {
	if err == nil {
		return "ok"
	}
	return "failed"
}

// startAfterBoot starts VMs marked autostart, once a boot. When the core ends in the middle, the next start
// of the core goes on.
func (r *Reconciler) startAfterBoot(ctx context.Context, vms []vmm.VM) {
	r.mu.Lock()
	due := r.autostart
	r.autostart = false
	r.mu.Unlock()
	if !due {
		return
	}
	var g errgroup.Group
	g.SetLimit(startAtOnce)
	for _, vm := range vms {
		if !vm.Spec.Autostart || vm.State.Live() {
			continue
		}
		g.Go(func() error {
			if _, err := r.opt.Changes.StartVM(ctx, r.me, vm.ID, false); err != nil {
				r.opt.Log.Error("a VM could not be started after the boot", "vm", vm.Spec.Name, "error", err)
				r.opt.Health.Set("core", service.Condition{Code: "AUTOSTART_FAILED", Severity: service.SeverityCritical, Object: vm.ID,
					Text: fmt.Sprintf("VM %s was to start with the host and did not: %v", vm.Spec.Name, err), Remedy: "mvirt vm start " + vm.Spec.Name})
			}
			return nil
		})
	}
	_ = g.Wait()
	if ctx.Err() != nil {
		return
	}
	if err := writeFile(r.bootFile(), r.bootID+"\n"); err != nil {
		r.opt.Log.Error("the boot's id is not kept; VMs may be started by themselves again", "error", err)
	}
}

// writeFile replaces a file so that a power cut leaves the old or the new one.
func writeFile(path, text string) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// audit writes an entry of the core.
func (r *Reconciler) audit(ctx context.Context, id, message string, labels map[string]string, objects ...string) {
	labels["who"] = "core"
	e := log.Entry{ID: id, Level: log.LevelAudit, Component: "core", Message: message, Objects: objects, Labels: labels}
	if len(e.ID) > 64 {
		e.ID = "" // the contract's limit; a made one does
	}
	if err := r.opt.Audit(context.WithoutCancel(ctx), e); err != nil {
		r.opt.Log.Error("an audit entry is not recorded", "message", message, "error", err)
	}
}
