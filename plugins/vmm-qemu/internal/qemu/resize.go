package qemu

import (
	"context"
	"slices"

	"github.com/mvirt/mvirt/sdk/errs"
)

// cpus gives the places for vCPUs in the order of the machine's topology.
func (i *instance) cpus(ctx context.Context) ([]vcpu, error) {
	var all []vcpu
	if err := i.c.Do(ctx, "query-hotpluggable-cpus", nil, &all); err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b vcpu) int {
		for _, k := range []string{"socket-id", "die-id", "core-id", "thread-id"} {
			if d := number(a.Props[k]) - number(b.Props[k]); d != 0 {
				return d
			}
		}
		return 0
	})
	return all, nil
}

// places gives the places for vCPUs, and how many are taken.
func (i *instance) places(ctx context.Context) (all []vcpu, taken uint32, err error) {
	if all, err = i.cpus(ctx); err != nil {
		return nil, 0, err
	}
	for _, p := range all {
		if p.Path != "" {
			taken++
		}
	}
	return all, taken, nil
}

// Resize plugs and unplugs vCPUs, and asks the guest to take or give memory, which it does in its own time. It
// keeps what the machine began with.
func (i *instance) Resize(ctx context.Context, cpus uint32, memory uint64) error {
	const remedy = "stop the VM first: it then starts with less"
	switch {
	case i.state.BootCPUs == 0:
		return errs.New(errs.Precondition, "the VM was started by an older version of the plugin").Do("stop and start it first")
	case cpus < i.state.BootCPUs:
		return errs.Field("cpus", remedy, "%d vCPUs for a VM that began with %d", cpus, i.state.BootCPUs)
	case memory < i.state.BootMemory:
		return errs.Field("memory_bytes", remedy, "%d MiB of memory for a VM that began with %d", memory>>20, i.state.BootMemory>>20)
	case memory > i.state.BootMemory && (memory-i.state.BootMemory)%blockMemory != 0:
		return errs.Field("memory_bytes", "let it differ by a multiple of 2 MiB", "%d MiB of memory for a VM that began with %d", memory>>20, i.state.BootMemory>>20)
	}
	places, have, err := i.places(ctx)
	if err != nil {
		return err
	}
	if cpus < have && i.emulated { // QEMU 7.2 corrupts its heap when it takes one out
		return errs.Field("cpus", remedy, "%d vCPUs for a VM that has %d: emulated ones cannot be taken out while it runs", cpus, have)
	}
	if i.state.Region > 0 {
		if err := i.c.Do(ctx, "qom-set", obj{"path": peripheral + memoryDevice, "property": "requested-size", "value": memory - i.state.BootMemory}, nil); err != nil {
			return err
		}
	}
	for _, p := range places {
		if have >= cpus {
			break
		}
		if p.Path == "" {
			if err := i.c.Do(ctx, "device_add", p.device(), nil); err != nil {
				return err
			}
			have++
		}
	}
	for _, p := range slices.Backward(places) {
		if have <= cpus {
			break
		}
		if p.id() != "" {
			if err := i.unplug(ctx, p.id()); err != nil {
				return err
			}
			have--
		}
	}
	return nil
}
