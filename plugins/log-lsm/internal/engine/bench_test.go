package engine

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

// workload is entries like those of a host: ten kinds of message, two objects each.
func workload(n int) []log.Entry {
	rng := rand.New(rand.NewPCG(9, 9))
	vms, vols := make([]string, 10_000), make([]string, 50_000)
	for i := range vms {
		vms[i] = "vm-" + uuid.Must(uuid.NewRandomFromReader(rngReader{rng})).String()
	}
	for i := range vols {
		vols[i] = "vol-" + uuid.Must(uuid.NewRandomFromReader(rngReader{rng})).String()
	}
	comps := []string{"core", "storage-zfs", "net-tap", "vmm-qemu", "log-lsm", "console", "api", "reconcile"}
	var lv = []log.Level{3, 4, 4, 4, 4, 4, 4, 5, 5, 2}
	t := int64(1_700_000_000e9)
	out := make([]log.Entry, n)
	for i := range out {
		t += int64(rng.ExpFloat64() * 1e6)
		e := &out[i]
		e.Time = time.Unix(0, t).UTC()
		e.ID = string(rec.AppendV7(nil, uint64(t/1e6), rng.Uint64()>>52, rng.Uint64()>>2))
		e.Level = lv[rng.IntN(len(lv))]
		if rng.IntN(100) == 0 {
			e.Level = 1
		}
		e.Component = comps[rng.IntN(8)]
		e.Objects = []string{vms[rng.IntN(len(vms))], vols[rng.IntN(len(vols))]}
		switch rng.IntN(10) {
		case 0:
			e.Message = fmt.Sprintf("volume resized from %d to %d bytes in %d us by request %08x", rng.Uint32(), rng.Uint32(), rng.IntN(1e5), rng.Uint32())
		case 1:
			e.Message = fmt.Sprintf("lease 10.%d.%d.%d renewed for 3600 s, hardware address 52:54:00:%02x:%02x:%02x", rng.IntN(256), rng.IntN(256), rng.IntN(256), rng.IntN(256), rng.IntN(256), rng.IntN(256))
		case 2:
			e.Message = fmt.Sprintf("snapshot %d taken of volume while the guest was running, pause %d.%03d ms", rng.IntN(1000), rng.IntN(90), rng.IntN(1000))
		case 3:
			e.Message = fmt.Sprintf("migration progress %d%% at %d MiB/s, %d pages dirty in the last round", rng.IntN(101), rng.IntN(2000), rng.IntN(1e6))
		case 4:
			e.Message = fmt.Sprintf("vcpu %d halted and woken %d times in %d ms; steal %d us; exits %d", rng.IntN(32), rng.IntN(1e4), rng.IntN(1000), rng.IntN(1e5), rng.Uint32())
		case 5:
			e.Message = fmt.Sprintf("block request of %d sectors at %d completed after %d us with status ok", rng.IntN(256)*8, rng.Uint32(), rng.IntN(1e5))
		case 6:
			e.Message = fmt.Sprintf("guest agent answered ping %d within %d us, load average %d.%02d", rng.IntN(1e6), rng.IntN(1e4), rng.IntN(16), rng.IntN(100))
		case 7:
			e.Message = fmt.Sprintf("balloon target set to %d MiB, actual %d MiB, free %d MiB, swapped %d", rng.IntN(65536), rng.IntN(65536), rng.IntN(65536), rng.IntN(100))
		case 8:
			e.Message = fmt.Sprintf("flow table of nic holds %d entries, %d expired, %d dropped as invalid", rng.IntN(65536), rng.IntN(65536), rng.IntN(100))
		case 9:
			e.Message = fmt.Sprintf("operation %016x step %d of %d finished in %d us without error to be reported", rng.Uint64(), rng.IntN(9), 9, rng.IntN(1e7))
		}
	}
	return out
}

type rngReader struct{ r *rand.Rand }

func (r rngReader) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(r.r.Uint32())
	}
	return len(p), nil
}

func benchN() int {
	if n, err := strconv.Atoi(os.Getenv("MVIRT_BENCH_ENTRIES")); err == nil && n > 0 {
		return n
	}
	return 300_000
}

// BenchmarkAppend is the store without gRPC: 8 senders, batches of 100, each durable.
func BenchmarkAppend(b *testing.B) {
	es := workload(benchN())
	for b.Loop() {
		s := mustOpen(b, Options{Dir: b.TempDir()})
		start := time.Now()
		load(b, s, es, 8, 100)
		b.ReportMetric(float64(len(es))/time.Since(start).Seconds(), "entries/s")
		b.StopTimer()
		compactAll(b, s)
		st, _ := s.Stats(context.Background())
		b.ReportMetric(float64(st.DiskBytes)/float64(len(es)), "B/entry")
		mustClose(b, s)
		b.StartTimer()
	}
}

func load(b testing.TB, s *Store, es []log.Entry, senders, batch int) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range senders {
		wg.Go(func() {
			for {
				i := int(next.Add(int64(batch))) - batch
				if i >= len(es) {
					return
				}
				if err := s.Append(context.Background(), es[i:min(i+batch, len(es))]); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// compactAll packs everything and compacts it.
func compactAll(b testing.TB, s *Store) {
	s.mu.Lock()
	for l := byte(1); l < levels; l++ {
		s.freeze(l, 0)
	}
	s.mu.Unlock()
	waitPacked(b, s)
	if err := s.db.Flush(); err != nil {
		b.Fatal(err)
	}
	if err := s.db.Compact(context.Background(), []byte{0}, []byte{0xff}, true); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkNewest100 asks for the newest 100 of an object.
func BenchmarkNewest100(b *testing.B) {
	es := workload(benchN())
	s := mustOpen(b, Options{Dir: b.TempDir()})
	defer mustClose(b, s)
	load(b, s, es, 8, 1000)
	compactAll(b, s)
	rng := rand.New(rand.NewPCG(1, 1))
	n := 0
	before := cpuTime()
	defer func() { b.ReportMetric(float64(cpuTime()-before)/float64(b.N)/1e3, "cpu-us/op") }()
	for b.Loop() {
		q := log.Query{Objects: es[rng.IntN(len(es))].Objects[:1], NewestFirst: true, Limit: 100}
		if err := s.Query(context.Background(), q, func(log.Result) error { n++; return nil }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(n)/float64(b.N), "entries/op")
}

// cpuTime is the CPU time of the process, which says more than the clock while others use the machine.
func cpuTime() time.Duration {
	var r syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &r) != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkScan reads everything with a text filter that few entries match.
func BenchmarkScan(b *testing.B) {
	es := workload(benchN())
	s := mustOpen(b, Options{Dir: b.TempDir()})
	defer mustClose(b, s)
	load(b, s, es, 8, 1000)
	compactAll(b, s)
	for _, text := range []string{"woken 77 ", "halted and", "nowhere"} {
		b.Run(text, func(b *testing.B) {
			n := 0
			start := time.Now()
			for b.Loop() {
				if err := s.Query(context.Background(), log.Query{Contains: text, Limit: 1000}, func(log.Result) error { n++; return nil }); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)*float64(len(es))/time.Since(start).Seconds(), "entries/s")
			b.ReportMetric(float64(n)/float64(b.N), "found")
		})
	}
}
