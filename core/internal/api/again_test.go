package api

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

// TestCreateAgainDuringUndo repeats a create while the first attempt, which had taken effect, is about to be
// undone. What the second is told must be true afterwards, and stand in the audit trail: found by make chaos,
// where mvirtd was stopped in the middle of a create.
func TestCreateAgainDuringUndo(t *testing.T) {
	for kind, create := range map[string]func(c *core, id string) error{
		"storage.CreateVolume": func(c *core, id string) error {
			_, err := c.volumes.Create(c.ctx(), &apiv1.CreateVolumeRequest{Id: id, Name: "fresh", SizeBytes: 1 << 20})
			return err
		},
		"net.CreateNetwork": func(c *core, id string) error {
			_, err := c.networks.Create(c.ctx(), &apiv1.CreateNetworkRequest{Id: id, Name: "fresh", Mode: "private", Subnet4: "10.9.0.0/24"})
			return err
		},
		"net.CreateNIC": func(c *core, id string) error {
			_, err := c.nics.Create(c.ctx(), &apiv1.CreateNICRequest{Id: id, Name: "fresh", Network: "lan"})
			return err
		},
		"vmm.Create": func(c *core, id string) error {
			_, err := c.vms.Create(c.ctx(), &apiv1.CreateVMRequest{Id: id, Name: "fresh", MemoryBytes: 64 << 20})
			return err
		},
	} {
		t.Run(kind, func(t *testing.T) {
			c := newCore(t)
			c.furnish()
			id := ident.New()
			made, release := make(chan struct{}), make(chan struct{})
			var once atomic.Bool
			gate := c.sup.w.Gate
			c.sup.w.Gate = func(ctx context.Context, call string, after bool) error {
				if call == kind && after && once.CompareAndSwap(false, true) {
					close(made)
					<-release
					return errs.New(errs.Internal, "the answer is lost")
				}
				return gate(ctx, call, after)
			}
			first, second := make(chan error, 1), make(chan error, 1)
			go func() { first <- create(c, id) }()
			<-made
			go func() { second <- create(c, id) }()
			// The second is in the core, or will be: in both orders it must hold what it says.
			close(release)
			if err := <-first; err == nil {
				t.Error("the first did not fail")
			}
			if err := <-second; err != nil {
				t.Fatalf("the second: %v", err)
			}
			if !strings.Contains(c.sup.w.String(), " fresh") {
				t.Errorf("acknowledged, and not there:\n%s", c.sup.w)
			}
			c.ok(c.srv.audit.Flush(c.ctx()))
			ok := 0
			for _, e := range c.sup.w.Entries() {
				if len(e.Objects) > 1 && e.Objects[1] == id && e.Labels["outcome"] == "ok" {
					ok++
				}
			}
			if ok != 1 {
				t.Errorf("%d entries tell of it", ok)
			}
		})
	}
}
