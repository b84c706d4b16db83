package ch

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/vmm-cloudhypervisor/internal/chapi"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
	"github.com/mvirt/mvirt/sdk/vmmkit/unixsock"
)

func p50(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// BenchmarkStart tells the plugin's part of a start: the time of vmm.Start with the double, less the time that the
// double alone takes to be spawned and to answer the same requests, both p50 of all rounds.
func BenchmarkStart(b *testing.B) {
	r := newRigTB(b)
	vm := r.create(nil)
	ctx := b.Context()
	bare := func() time.Duration {
		dir := filepath.Join(r.dir, "vm", "bare")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		_ = os.Remove(filepath.Join(dir, serialSocket))
		cfg, err := r.driver.config(vmmkit.Machine{ID: vm.ID, Dir: dir, Spec: vm.Spec, Kernel: "/vmlinuz"}, chVersion{53, 0})
		if err != nil {
			b.Fatal(err)
		}
		begin := time.Now()
		api, err := unixsock.Listen(dir, apiSocket, 0o600)
		if err != nil {
			b.Fatal(err)
		}
		p, err := proc.Local{}.Spawn(ctx, proc.Command{Path: filepath.Join(r.dir, "bin", "cloud-hypervisor"), Name: "mvirt-bare",
			Args: []string{"--api-socket", "fd=3", "--event-monitor", "path=events.json", "--no-shutdown"}, Dir: dir, Env: environment(), Files: []*os.File{api}})
		api.Close()
		if err != nil {
			b.Fatal(err)
		}
		c := chapi.New(dir, apiSocket)
		for _, what := range []struct {
			name string
			body any
		}{{"vmm.ping", nil}, {"vm.create", cfg}, {"vm.boot", nil}, {"vm.info", nil}} {
			if what.name == "vmm.ping" || what.name == "vm.info" {
				err = c.Get(ctx, what.name, nil)
			} else {
				err = c.Put(ctx, what.name, what.body, nil)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
		d := time.Since(begin)
		_ = p.Signal(9)
		<-p.Done()
		_ = os.Remove(filepath.Join(dir, apiSocket))
		return d
	}
	var ours, alone []time.Duration
	for b.Loop() {
		begin := time.Now()
		if _, err := r.m.Start(ctx, vmm.StartRequest{ID: vm.ID}); err != nil {
			b.Fatal(err)
		}
		ours = append(ours, time.Since(begin))
		if _, err := r.m.Kill(context.WithoutCancel(ctx), vmm.Ref{Ref: vm.ID}); err != nil {
			b.Fatal(err)
		}
		alone = append(alone, bare())
	}
	a, c := p50(ours), p50(alone)
	b.ReportMetric(float64(a.Microseconds())/1000, "start-ms")
	b.ReportMetric(float64(c.Microseconds())/1000, "hypervisor-ms")
	b.ReportMetric(float64((a-c).Microseconds())/1000, "plugin-ms")
}
