// Package plan makes the plans of all changes that the public API offers, and holds the actions that their
// steps name. It is the only package that changes things in more than one kind of plugin.
//
// A method of [Changes] looks at what there is, refuses what cannot work before anything is touched, and
// hands a plan to the engine. What it looked at may change until the locks are held; the plugins check
// again, and a step that they refuse is undone like any other.
//
// # Who owns what
//
// Volumes and NICs made for a VM are marked in its definition and carry its id in [OwnerLabel]; they go
// with it. Volumes and NICs that were there before stay.
package plan

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// OwnerLabel is the label of a volume or NIC that was made for a VM; the value is the VM's id.
const OwnerLabel = "mvirt.vm"

// Net is what of the net contract is used.
type Net interface {
	net.Service
	net.Updater
	net.SecurityGrouper
}

// VMM is what of the vmm contract is used.
type VMM interface {
	vmm.Service
	vmm.DiskHotplugger
	vmm.NICHotplugger
	vmm.DiskResizer
	vmm.Resizer
	vmm.Snapshotter
}

// Services are the plugins. Methods of optional features that a plugin lacks return errs.Unsupported; Has
// tells which there are.
type Services struct {
	Storage storage.Service
	Net     Net
	VMM     VMM
	Has     func(kind service.Kind, f service.Feature) bool
}

// Changes begins changes.
type Changes struct {
	svc    Services
	engine *operation.Engine
}

// New makes a Changes over an engine that was opened with [Actions] of the same services.
func New(svc Services, e *operation.Engine) *Changes { return &Changes{svc, e} }

// Call is who asks, and how.
type Call struct {
	Who    operation.Who
	Labels map[string]string // kept with the operation for the audit trail
	Async  bool              // return when it is in the journal
	// Again tells that what is to be made is there: the plugin says whether it is the same. Whatever happens, it is
	// not undone, for it was there before.
	Again bool
}

// Actions are all actions that plans name. The names are in journals: never change one's meaning.
func Actions(svc Services) map[string]operation.Action {
	a := actions{svc}
	all := map[string]operation.Action{}
	for _, m := range []map[string]operation.Action{a.storage(), a.net(), a.vmm(), a.vmSnapshots(), a.plug()} {
		for name, action := range m {
			all[name] = action
		}
	}
	return all
}

type actions struct{ svc Services }

func (c *Changes) run(ctx context.Context, call Call, p operation.Plan) (operation.Operation, error) {
	p.Who, p.Labels = call.Who, call.Labels
	if call.Again {
		p.Mode = operation.Finish
	}
	p.Objects = unique(p.Objects)
	if call.Async {
		return c.engine.Start(ctx, p)
	}
	return c.engine.Do(ctx, p)
}

// one is a plan of a single step.
func one(typ string, mode operation.Mode, step operation.Step, locks []operation.Lock, objects ...string) operation.Plan {
	return operation.Plan{Type: typ, Title: step.Title, Mode: mode, Steps: []operation.Step{step}, Locks: locks, Objects: objects}
}

func lock(kind, id string) operation.Lock { return operation.Lock{Object: kind + ":" + id} }
func shared(kind, id string) operation.Lock {
	return operation.Lock{Object: kind + ":" + id, Shared: true}
}

func locks(l ...operation.Lock) []operation.Lock { return l }

func unique(ids []string) []string {
	var out []string
	for _, id := range ids {
		if id != "" && !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out
}

// gone makes "it is not there" a success.
func gone(err error) error {
	if errors.Is(err, errs.NotFound) {
		return nil
	}
	return err
}

// found turns the error of a Get into an answer to "is it there?".
func found(err error) (bool, error) {
	if errors.Is(err, errs.NotFound) {
		return false, nil
	}
	return err == nil, err
}

// done makes an action of a call that has nothing to undo.
func done[Q, R any](fn func(context.Context, Q) (R, error)) operation.Action {
	return operation.Typed(func(ctx context.Context, _ *operation.Run, req Q) error { _, err := fn(ctx, req); return err }, nil, nil)
}

func doneErr[Q any](fn func(context.Context, Q) error) operation.Action {
	return operation.Typed(func(ctx context.Context, _ *operation.Run, req Q) error { return fn(ctx, req) }, nil, nil)
}

func doneGone[Q any](fn func(context.Context, Q) error) operation.Action {
	return operation.Typed(func(ctx context.Context, _ *operation.Run, req Q) error { return gone(fn(ctx, req)) }, nil, nil)
}

func volumeWords(name string) string { return "volume " + name }

func files(fs ...*os.File) (out []*os.File) {
	for _, f := range fs {
		if f != nil {
			out = append(out, f)
		}
	}
	return out
}

// usersOf lists the VMs whose definitions name a volume.
func usersOf(vms []vmm.VM, volumeID string) (out []vmm.VM) {
	for _, vm := range vms {
		if slices.ContainsFunc(vm.Spec.Disks, func(d vmm.Disk) bool { return d.VolumeID == volumeID }) {
			out = append(out, vm)
		}
	}
	return out
}

func nicUsersOf(vms []vmm.VM, nicID string) (out []vmm.VM) {
	for _, vm := range vms {
		if slices.ContainsFunc(vm.Spec.NICs, func(n vmm.NIC) bool { return n.NICID == nicID }) {
			out = append(out, vm)
		}
	}
	return out
}

func vmRes(vm vmm.VM) errs.Resource { return errs.Resource{Type: "vm", ID: vm.ID, Name: vm.Spec.Name} }

func volRes(v storage.Volume) errs.Resource {
	return errs.Resource{Type: "volume", ID: v.ID, Name: v.Name}
}

func nicRes(n net.NIC) errs.Resource { return errs.Resource{Type: "nic", ID: n.ID, Name: n.Name} }

func mustStop(vm vmm.VM, what string) error {
	return errs.New(errs.Precondition, "it is %s, and %s needs it stopped", vm.State, what).With(vmRes(vm)).Because("VM_RUNNING").
		Do("mvirt vm stop " + vm.Spec.Name + ", then try again")
}

func plural(n int, word string) string {
	if n == 1 {
		return fmt.Sprintf("1 %s", word)
	}
	return fmt.Sprintf("%d %ss", n, word)
}
