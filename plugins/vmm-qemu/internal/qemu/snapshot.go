package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

// snapMemory is the file of a snapshot: QEMU's migration stream.
const snapMemory = "migration"

// snapshotState is what a machine was made of when its memory was written: the stream names devices by where
// they are, so the one that takes it has to be the same.
type snapshotState struct {
	state
	At   map[string]string // root port by the id of the device in it
	CPUs []obj             // vCPUs that were plugged, as device_add takes them
}

func otherShape(format string, a ...any) error {
	return errs.New(errs.Precondition, format, a...).Because("OTHER_SHAPE").Do("attach what the VM had when the snapshot was made")
}

// close closes what the command opened itself.
func (c *command) close() {
	for _, f := range c.opened {
		f.Close()
	}
}

// incoming lets the machine begin with a snapshot's memory, and stay paused.
func (c *command) incoming() error {
	devices := len(c.m.Disks) + len(c.m.NICs)
	if c.m.CloudInit != "" {
		devices++
	}
	if devices != len(c.was.At) {
		return otherShape("the snapshot has %d devices, and the VM %d", len(c.was.At), devices)
	}
	for _, cpu := range c.was.CPUs {
		if err := c.json("-device", cpu); err != nil {
			return err
		}
	}
	f, err := os.Open(filepath.Join(c.m.Restore.Dir, snapMemory))
	if err != nil {
		return errs.Wrap(errs.Corrupt, err, "the snapshot's memory cannot be opened")
	}
	c.opened = append(c.opened, f)
	c.add("-incoming", "fd:"+c.pass(f), "-S")
	return nil
}

// moved is how often QEMU is asked how far it is; nothing announces it.
const moved = 20 * time.Millisecond

// arrive waits until a machine has taken its snapshot. One that cannot ends, and says why in its log.
func (i *instance) arrive(ctx context.Context, run bool) error {
	for {
		var r struct {
			Status string `json:"status"`
		}
		if err := i.c.Do(ctx, "query-status", nil, &r); err != nil {
			return err
		}
		if r.Status != "inmigrate" {
			break
		}
		select {
		case <-ctx.Done():
			return errs.Wrap(errs.Deadline, ctx.Err(), "QEMU has not read the snapshot")
		case <-time.After(moved):
		}
	}
	if run {
		return i.Resume(ctx)
	}
	return nil
}

// Snapshot writes the memory of a paused guest as a migration to a file. QEMU gives its disks out of its hand
// with that and takes them back when the guest is resumed; until then it can be neither snapshotted again nor
// given devices.
func (i *instance) Snapshot(ctx context.Context, dir string) (json.RawMessage, error) {
	st := snapshotState{state: i.state}
	var err error
	if st.At, err = i.layout(ctx); err != nil {
		return nil, err
	}
	cpus, err := i.cpus(ctx)
	if err != nil {
		return nil, err
	}
	for _, c := range cpus {
		if c.id() != "" {
			st.CPUs = append(st.CPUs, c.device())
		}
	}
	f, err := os.OpenFile(filepath.Join(dir, snapMemory), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const unbounded = 1 << 40 // bytes a second; by default QEMU spares a network
	if err := i.c.Do(ctx, "migrate-set-parameters", obj{"max-bandwidth": unbounded}, nil); err != nil {
		return nil, err
	}
	if err := i.c.DoWithFile(ctx, "getfd", obj{"fdname": snapMemory}, nil, f); err != nil {
		return nil, err
	}
	if err := i.c.Do(ctx, "migrate", obj{"uri": "fd:" + snapMemory}, nil); err != nil {
		_ = i.c.Do(context.WithoutCancel(ctx), "closefd", obj{"fdname": snapMemory}, nil)
		return nil, err
	}
	if err := i.written(ctx); err != nil {
		return nil, err
	}
	return json.Marshal(st)
}

// written waits until a migration is over.
func (i *instance) written(ctx context.Context) error {
	for {
		var r struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		if err := i.c.Do(ctx, "query-migrate", nil, &r); err != nil {
			return err
		}
		switch r.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return errs.New(errs.Unavailable, "QEMU could not write the memory: %s", word(r.Error)).Do("make room in the plugin's data directory")
		}
		select {
		case <-ctx.Done():
			uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), typeTimeout)
			defer cancel()
			return errors.Join(errs.Wrap(errs.KindOf(ctx.Err()), ctx.Err(), "the memory was not written in time"), i.c.Do(uctx, "migrate_cancel", nil, nil))
		case <-time.After(moved):
		}
	}
}

// layout is which device is in which root port.
func (i *instance) layout(ctx context.Context) (map[string]string, error) {
	var buses []struct {
		Devices []pciDevice `json:"devices"`
	}
	if err := i.c.Do(ctx, "query-pci", nil, &buses); err != nil {
		return nil, err
	}
	at := map[string]string{}
	for _, b := range buses {
		for _, d := range b.Devices {
			if d.Bridge == nil || len(d.Bridge.Devices) == 0 {
				continue
			}
			id := d.Bridge.Devices[0].QDevID
			if id == "" || at[id] != "" {
				return nil, errs.New(errs.Internal, "QEMU names a device in %s %q", d.QDevID, id)
			}
			at[id] = d.QDevID
		}
	}
	return at, nil
}

// vcpu is one place for a vCPU.
type vcpu struct {
	Type  string `json:"type"`
	Props obj    `json:"props"`
	Path  string `json:"qom-path"` // of the vCPU that is there
}

// peripheral is where QEMU keeps devices that have an id.
const peripheral = "/machine/peripheral/"

// id is that of a vCPU that was plugged; "" where there is none, or one that was there from the start.
func (c vcpu) id() string {
	if len(c.Path) > len(peripheral) && c.Path[:len(peripheral)] == peripheral {
		return c.Path[len(peripheral):]
	}
	return ""
}

// name is the id that a vCPU in this place is given.
func (c vcpu) name() string {
	return fmt.Sprintf("cpu-%v-%v-%v", number(c.Props["socket-id"]), number(c.Props["core-id"]), number(c.Props["thread-id"]))
}

func number(v any) int {
	f, _ := v.(float64)
	return int(f)
}

// device is the vCPU as device_add takes it.
func (c vcpu) device() obj {
	o := obj{"driver": c.Type, "id": c.name()}
	for k, v := range c.Props {
		o[k] = v
	}
	return o
}
