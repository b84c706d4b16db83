package api

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// consoleReplay bounds how much history a viewer may ask for, in bytes.
const consoleReplay = 8 << 20

// Console joins a VM's serial console. Output is sent in pieces that gRPC's flow control paces: a slow
// viewer delays only itself, as the contract of vmm says.
func (a *vmsAPI) Console(ss grpc.BidiStreamingServer[apiv1.ConsoleInput, apiv1.ConsoleOutput]) error {
	first, err := ss.Recv()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return errs.Field("open", "send it first", "the first message of a console must be open")
		}
		return err
	}
	open := first.GetOpen()
	if open == nil {
		return errs.Field("open", "send it first", "the first message of a console must be open")
	}
	if open.GetReplay() > consoleReplay {
		return errs.Field("replay", "ask for at most 8 MiB", "%d bytes of history are more than is kept", open.GetReplay())
	}
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	vm, err := a.findVM(ctx, "ref", open.GetRef())
	if err != nil {
		return err
	}
	if !open.GetReadOnly() && !open.GetNoFollow() {
		a.record(ctx, "vm.console", "ok", "console of VM "+vm.Spec.Name+" opened for writing", vm.ID)
	}
	in := make(chan []byte)
	go func() {
		defer close(in)
		for {
			m, err := ss.Recv()
			if errors.Is(err, io.EOF) {
				return // half closed: only watches from now on
			}
			if err != nil {
				cancel()
				return
			}
			if data := m.GetData(); len(data) > 0 {
				select {
				case in <- data:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	if err := ss.Send(&apiv1.ConsoleOutput{Opened: true}); err != nil {
		return err
	}
	err = a.vmm.Console(ctx, vmm.ConsoleRequest{Ref: vm.ID, ReadOnly: open.GetReadOnly(), Steal: open.GetSteal(), Replay: open.GetReplay(), NoFollow: open.GetNoFollow()},
		vmm.ConsoleIO{In: in, Out: func(b []byte) error { return ss.Send(&apiv1.ConsoleOutput{Data: b}) }})
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return ss.Send(&apiv1.ConsoleOutput{Ended: "the VM stopped"})
	case ss.Context().Err() != nil:
		return nil // the viewer left
	}
	return err
}
