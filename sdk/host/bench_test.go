package host_test

import (
	"slices"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/sdktest/fakeplugin"
	"github.com/mvirt/mvirt/sdk/service"
)

func benchPlugin(b *testing.B, dir string) *host.Plugin {
	b.Helper()
	p, err := host.Launch(b.Context(), host.Config{Kind: service.KindStorage,
		Spawner: &host.Local{Command: []string{"/proc/self/exe", "--data-dir", dir}, Env: []string{fakeplugin.Env + "=storage"}}})
	if err != nil {
		b.Fatal(err)
	}
	return p
}

func reportTimes(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkCall is a unary call to a plugin process and back: what the core's calls are compared with.
func BenchmarkCall(b *testing.B) {
	p := benchPlugin(b, b.TempDir())
	defer p.Kill()
	var took []time.Duration
	for b.Loop() {
		t := time.Now()
		if _, err := p.Base.Health(b.Context()); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(t))
	}
	reportTimes(b, took)
}

// BenchmarkRestart is SIGKILL to the next good call.
func BenchmarkRestart(b *testing.B) {
	dir := b.TempDir()
	p := benchPlugin(b, dir)
	var took []time.Duration
	for b.Loop() {
		t := time.Now()
		p.Kill()
		p = benchPlugin(b, dir)
		if _, err := p.Base.Health(b.Context()); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(t))
	}
	p.Kill()
	reportTimes(b, took)
}
