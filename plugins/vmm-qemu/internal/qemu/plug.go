package qemu

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/mvirt/mvirt/plugins/vmm-qemu/internal/qmp"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// unplugTimeout is how long a guest may take to let a device go.
const unplugTimeout = 30 * time.Second

// pciDevice is one of query-pci's.
type pciDevice struct {
	QDevID string `json:"qdev_id"`
	Bridge *struct {
		Devices []pciDevice `json:"devices"`
	} `json:"pci_bridge"`
}

// freePort finds a root port that nothing is plugged into.
func (i *instance) freePort(ctx context.Context) (string, error) {
	var buses []struct {
		Devices []pciDevice `json:"devices"`
	}
	if err := i.c.Do(ctx, "query-pci", nil, &buses); err != nil {
		return "", err
	}
	for _, b := range buses {
		for _, d := range b.Devices {
			if strings.HasPrefix(d.QDevID, "port") && d.Bridge != nil && len(d.Bridge.Devices) == 0 {
				return d.QDevID, nil
			}
		}
	}
	return "", errs.New(errs.Exhausted, "all ports for devices are taken").Do("unplug a device, or restart the VM: it then gets new ports")
}

// PlugDisk adds a disk.
func (i *instance) PlugDisk(ctx context.Context, d vmm.DiskAttachment) error {
	free, err := i.freePort(ctx)
	if err != nil {
		return err
	}
	undo := context.WithoutCancel(ctx)
	if d.Limit != (vmm.RateLimit{}) {
		if err := i.c.Do(ctx, "object-add", throttle(d), nil); err != nil {
			return err
		}
	}
	if err := i.c.Do(ctx, "blockdev-add", blockdev(d), nil); err != nil {
		_ = i.c.Do(undo, "object-del", obj{"id": limitID(d.Name)}, nil)
		return err
	}
	if err := i.c.Do(ctx, "device_add", diskDevice(d, free), nil); err != nil {
		return errors.Join(err, i.delBlockdev(undo, diskID(d.Name)))
	}
	return nil
}

func (i *instance) delBlockdev(ctx context.Context, node string) error {
	if err := i.c.Do(ctx, "blockdev-del", obj{"node-name": node}, nil); err != nil {
		return err
	}
	// Only disks with a limit have one.
	_ = i.c.Do(ctx, "object-del", obj{"id": "limit-" + strings.TrimPrefix(node, "disk-")}, nil)
	return nil
}

// UnplugDisk takes a disk away, and its file is closed when it returns.
func (i *instance) UnplugDisk(ctx context.Context, name string) error {
	if err := i.unplug(ctx, diskID(name)); err != nil {
		return err
	}
	return i.dropBackend(ctx, diskID(name))
}

// UnplugNIC takes a NIC away.
func (i *instance) UnplugNIC(ctx context.Context, id string) error {
	if err := i.unplug(ctx, nicID(id)); err != nil {
		return err
	}
	return i.dropBackend(ctx, nicID(id))
}

// unplug asks the guest to let a device go and waits until it has.
func (i *instance) unplug(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
	defer cancel()
	gone, stop := i.expect(waitFor{"DEVICE_DELETED", id})
	defer stop()
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case w := <-gone:
			return w.err
		case <-ctx.Done():
			return errs.Wrap(errs.Deadline, ctx.Err(), "the guest has not let the device go")
		case <-again.C:
			again.Reset(5 * time.Second) // a guest that boots misses the first request
			err := i.c.Do(ctx, "device_del", obj{"id": id}, nil)
			var q *qmp.Error
			switch {
			case errors.As(err, &q) && q.Class == "DeviceNotFound":
				return nil
			case errors.As(err, &q) && strings.Contains(q.Desc, "already in the process of unplug"):
			case err != nil:
				return err
			}
		}
	}
}

// dropBackend removes what was behind a device that is gone. What is gone too is no error.
func (i *instance) dropBackend(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, unplugTimeout)
	defer cancel()
	var err error
	if strings.HasPrefix(id, "disk-") {
		err = i.delBlockdev(ctx, id)
	} else {
		err = i.c.Do(ctx, "netdev_del", obj{"id": id}, nil)
		// Only vhost-user NICs have one.
		_ = i.c.Do(ctx, "chardev-remove", obj{"id": id}, nil)
	}
	var q *qmp.Error
	if errors.As(err, &q) && (q.Class == "DeviceNotFound" || strings.Contains(q.Desc, "not found") || strings.Contains(q.Desc, "Failed to find")) {
		return nil
	}
	return err
}

// PlugNIC adds a NIC. Descriptors are handed over by name first.
func (i *instance) PlugNIC(ctx context.Context, n vmm.NICAttachment) (err error) {
	free, err := i.freePort(ctx)
	if err != nil {
		return err
	}
	undo := context.WithoutCancel(ctx)
	var net obj
	switch {
	case len(n.TAP) > 0:
		var names []string
		defer func() {
			if err != nil {
				for _, name := range names {
					_ = i.c.Do(undo, "closefd", obj{"fdname": name}, nil) // gone already if it was used
				}
			}
		}()
		for k, f := range n.TAP {
			name := nicID(n.NICID) + "-" + strconv.Itoa(k)
			if err := i.c.DoWithFile(ctx, "getfd", obj{"fdname": name}, nil, f); err != nil {
				return err
			}
			names = append(names, name)
		}
		net = tapNetdev(n, names)
	case n.TAPName != "":
		net = namedTAP(n)
	default:
		if !i.state.Shared {
			return errs.New(errs.Precondition, "the guest's memory is not shared, so no vhost-user NIC can be plugged").
				Do("restart the VM with the NIC in its definition")
		}
		addr := obj{"type": "unix", "data": obj{"path": n.SocketPath}}
		if err := i.c.Do(ctx, "chardev-add", obj{"id": nicID(n.NICID), "backend": obj{"type": "socket",
			"data": obj{"addr": addr, "server": false, "reconnect": 1}}}, nil); err != nil {
			return err
		}
		net = vhostNetdev(n)
	}
	if err := i.c.Do(ctx, "netdev_add", net, nil); err != nil {
		if n.SocketPath != "" {
			_ = i.c.Do(undo, "chardev-remove", obj{"id": nicID(n.NICID)}, nil)
		}
		return err
	}
	if err := i.c.Do(ctx, "device_add", nicDevice(n, free), nil); err != nil {
		return errors.Join(err, i.dropBackend(undo, nicID(n.NICID)))
	}
	return nil
}

// DiskResized makes QEMU look at a disk's new size and tell the guest. A smaller one is refused: QEMU would cut
// the volume short.
func (i *instance) DiskResized(ctx context.Context, name string, size uint64) error {
	if size == 0 || size > 1<<62 {
		return errs.Field("size_bytes", "give the volume's size", "a size of %d bytes", size)
	}
	now, err := i.diskSize(ctx, name)
	if err != nil {
		return err
	}
	switch {
	case size < now:
		return errs.Field("size_bytes", "give the volume's size, which only grows", "disk %s has %d bytes and cannot become %d", name, now, size)
	case size == now:
		return nil
	}
	return i.c.Do(ctx, "block_resize", obj{"node-name": diskID(name), "size": size}, nil)
}

// diskSize is a disk's size as the guest sees it.
func (i *instance) diskSize(ctx context.Context, name string) (uint64, error) {
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size uint64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := i.c.Do(ctx, "query-named-block-nodes", obj{"flat": true}, &nodes); err != nil {
		return 0, err
	}
	for _, n := range nodes {
		if n.Name == diskID(name) {
			return n.Image.Size, nil
		}
	}
	return 0, errs.New(errs.NotFound, "QEMU has no disk %s", name)
}
