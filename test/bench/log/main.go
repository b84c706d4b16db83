// Command log measures the log plugin against the store that one writes first (plain Pebble, a key an entry
// and a key an object, through the same gRPC) and, when MVIRT_BENCH_VICTORIALOGS names its program, against
// VictoriaLogs. All run in their own processes, in turn, in several rounds; ratios are of medians.
//
// Each figure is a line
//
//	figure NAME VALUE UNIT [aim OP NUMBER]
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "plain-pebble" {
		os.Args = append(os.Args[:1], os.Args[2:]...)
		plainMain()
	}
	var b bench
	flag.StringVar(&b.plugin, "plugin", "bin/mvirt-log", "the log plugin's program")
	flag.StringVar(&b.dir, "dir", "", "where data directories are made; the system's temporary directory if empty")
	flag.IntVar(&b.entries, "entries", 500_000, "entries a round of appends")
	flag.IntVar(&b.rounds, "rounds", 5, "rounds of appends; 0 leaves them out")
	flag.IntVar(&b.big, "big", 2_000_000, "entries for size and queries; figures.md has 5,000,000, which takes longer and a gigabyte; 0 leaves it out")
	flag.StringVar(&b.keep, "keep", "", "directory in which the large stores stay, to be used again by the next run instead of loading")
	flag.IntVar(&b.objects, "objects", 60_000, "distinct objects, a sixth of them VMs")
	flag.Parse()
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-log:", err)
		os.Exit(1)
	}
}

type bench struct {
	plugin, dir          string
	entries, rounds, big int
	objects              int
	victoria             string
	keep                 string
}

const (
	senders = 8
	batch   = 100
)

func figure(name string, value float64, unit, aim string) {
	if aim != "" {
		aim = " aim " + aim
	}
	fmt.Printf("figure %s %.4g %s%s\n", name, value, unit, aim)
}

func (b *bench) run() error {
	var err error
	if b.plugin, err = filepath.Abs(b.plugin); err != nil {
		return err
	}
	if _, err := os.Stat(b.plugin); err != nil {
		return fmt.Errorf("%w: build it first (make build)", err)
	}
	b.victoria = os.Getenv("MVIRT_BENCH_VICTORIALOGS")
	if b.victoria == "" {
		fmt.Println("note: MVIRT_BENCH_VICTORIALOGS is not set: nothing is compared with VictoriaLogs")
	}
	tmp, err := os.MkdirTemp(b.dir, "mvirt-bench-log-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	b.dir = tmp
	if b.rounds > 0 {
		if err := b.appends(); err != nil {
			return err
		}
	}
	if b.big > 0 {
		return b.large()
	}
	return nil
}

func (b *bench) targets() map[string]func() target {
	self, err := os.Executable()
	if err != nil {
		panic(err) // Linux always knows
	}
	m := map[string]func() target{
		"mvirt": func() target { return &plugin{command: []string{b.plugin}} },
		"plain": func() target { return &plugin{command: []string{self, "plain-pebble"}} },
	}
	if b.victoria != "" {
		m["victoria"] = func() target { return &victoria{binary: b.victoria, stream: "component"} }
	}
	return m
}

// cut makes chunks of a size.
func cut(d *dataset, n, size int, json bool) []chunk {
	var out []chunk
	for i := 0; i < n; i += size {
		c := chunk{entries: d.take(min(size, n-i))}
		if json {
			for k := range c.entries {
				c.json = appendJSON(c.json, &c.entries[k])
			}
		}
		out = append(out, c)
	}
	return out
}

// load sends chunks from several senders and says how long it took.
func load(t target, chunks []chunk, senders int) (time.Duration, error) {
	var next atomic.Int64
	var wg sync.WaitGroup
	var failed atomic.Value
	start := time.Now()
	for range senders {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(chunks) || failed.Load() != nil {
					return
				}
				if err := t.send(context.Background(), chunks[i]); err != nil {
					failed.Store(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err, ok := failed.Load().(error); ok {
		return 0, err
	}
	return time.Since(start), nil
}

// appends measures durable appends. VictoriaLogs gets batches of 100 and, from two senders, of 10,000, which
// is where it is fastest; the better counts. It does not sync before it answers; the others do.
func (b *bench) appends() error {
	rates, cpus, peaks := map[string][]float64{}, map[string][]float64{}, map[string]int64{}
	for round := range b.rounds {
		now := time.Now().Add(-time.Duration(b.entries) * time.Millisecond)
		small := cut(newDataset(uint64(round), b.objects, now), b.entries, batch, b.victoria != "")
		order := []string{"mvirt", "plain", "victoria"}
		if round%2 == 1 {
			slices.Reverse(order)
		}
		one := func(name, key string, make func() target, chunks []chunk, senders int) error {
			t := make()
			dir := filepath.Join(b.dir, key)
			if err := t.start(dir); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			n := 0
			for _, c := range chunks {
				n += len(c.entries)
			}
			c0, _ := usage(t.pid())
			own0, _ := usage(os.Getpid())
			d, err := load(t, chunks, senders)
			c1, rss := usage(t.pid())
			own1, _ := usage(os.Getpid())
			if e := t.stop(); err == nil {
				err = e
			}
			if e := os.RemoveAll(dir); err == nil {
				err = e
			}
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			rate := float64(n) / d.Seconds()
			rates[key] = append(rates[key], rate)
			cpus[key] = append(cpus[key], float64((c1-c0).Microseconds())/float64(n))
			peaks[key] = max(peaks[key], rss)
			fmt.Printf("round %d %-12s %8.0f entries/s, CPU an entry %.2f us of the server and %.2f of the senders, peak %d MiB\n", round+1, key, rate,
				cpus[key][len(cpus[key])-1], float64((own1-own0).Microseconds())/float64(n), rss>>20)
			return nil
		}
		ts := b.targets()
		for _, name := range order {
			make, ok := ts[name]
			if !ok {
				continue
			}
			if err := one(name, name, make, small, senders); err != nil {
				return err
			}
			if name == "victoria" {
				if err := one(name, "victoria10k", make, join(small, 10_000/batch), 2); err != nil {
					return err
				}
			}
			if name == "mvirt" {
				single := singles(small, b.entries/5)
				if err := one(name, "single", make, single, 64); err != nil {
					return err
				}
			}
		}
	}
	m := func(k string) float64 { return median(rates[k]) }
	figure("append_entries_per_s", m("mvirt"), "entries/s", "")
	figure("append_cpu_us", median(cpus["mvirt"]), "us", "")
	figure("append_plain_entries_per_s", m("plain"), "entries/s", "")
	figure("append_plain_cpu_us", median(cpus["plain"]), "us", "")
	figure("append_vs_plain_pebble", m("mvirt")/m("plain"), "ratio", ">= 2.5")
	if b.victoria != "" {
		best, key := m("victoria"), "victoria"
		if m("victoria10k") > best {
			best, key = m("victoria10k"), "victoria10k"
		}
		figure("append_victorialogs_entries_per_s", best, "entries/s", "")
		figure("append_victorialogs_cpu_us", median(cpus[key]), "us", "")
		figure("append_vs_victorialogs", m("mvirt")/best, "ratio", ">= 2.0")
	}
	figure("single_entries_per_s", m("single"), "entries/s", "")
	figure("single_vs_batched", m("single")/m("mvirt"), "ratio", ">= 0.4")
	figure("append_peak_rss_mib", float64(peaks["mvirt"]>>20), "MiB", "<= 200")
	return nil
}

func join(small []chunk, n int) []chunk {
	var out []chunk
	for c := range slices.Chunk(small, n) {
		var j chunk
		for _, x := range c {
			j.entries = append(j.entries, x.entries...)
			j.json = append(j.json, x.json...)
		}
		out = append(out, j)
	}
	return out
}

func singles(small []chunk, n int) []chunk {
	var out []chunk
	for _, c := range small {
		for i := range c.entries {
			if len(out) == n {
				return out
			}
			out = append(out, chunk{entries: c.entries[i : i+1]})
		}
	}
	return out
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Clone(v)
	slices.Sort(v)
	return v[len(v)/2]
}

// large loads many entries and measures size and queries.
func (b *bench) large() error {
	got := map[string]*largeResult{}
	names := []string{"mvirt"}
	if b.victoria != "" {
		names = append(names, "victoria")
	}
	for _, name := range names {
		r, err := b.largeOf(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		got[name] = r
	}
	m := got["mvirt"]
	if m.bytes > 0 {
		figure("bytes_per_entry", m.bytes, "B", "")
	}
	figure("scan_entries_per_s", m.scan, "entries/s", "")
	if v := got["victoria"]; v != nil {
		if m.bytes > 0 && v.bytes > 0 {
			figure("bytes_per_entry_victorialogs", v.bytes, "B", "")
			figure("bytes_vs_victorialogs", m.bytes/v.bytes, "ratio", "<= 0.8")
		}
		figure("newest100_vs_victorialogs", m.p50/v.p50, "ratio", "")
		figure("scan_vs_victorialogs", m.scan/v.scan, "ratio", "")
	}
	return nil
}

// largeResult is what is compared between stores.
type largeResult struct {
	bytes float64 // on disk an entry; 0 when the store was there already
	p50   float64 // of the newest 100, in milliseconds
	scan  float64 // entries a second
}

// fill loads a store and says how large it became.
func (b *bench) fill(t target, name, dir string, d *dataset) (float64, error) {
	per := 1000 // larger than what is measured: the disk is waited for less
	if name == "victoria" {
		per = 10_000
	}
	for done := 0; done < b.big; done += 250_000 {
		if _, err := load(t, cut(d, min(250_000, b.big-done), per, name == "victoria"), senders); err != nil {
			return 0, err
		}
	}
	_, rss := usage(t.pid())
	if err := t.settle(context.Background()); err != nil {
		return 0, err
	}
	size, err := diskBytes(dir)
	fmt.Printf("%s: %d entries, %.1f bytes on disk an entry, peak %d MiB\n", name, b.big, float64(size)/float64(b.big), rss>>20)
	if name == "mvirt" {
		figure("load_peak_rss_mib", float64(rss>>20), "MiB", "<= 200")
	}
	return float64(size) / float64(b.big), err
}

func (b *bench) largeOf(name string) (*largeResult, error) {
	t := b.targets()[name]()
	dir := filepath.Join(b.dir, "large-"+name)
	have := false
	if b.keep != "" {
		dir = filepath.Join(b.keep, fmt.Sprintf("%s-%d-%d", name, b.big, b.objects))
		if _, err := os.Stat(dir + ".loaded"); err == nil {
			have = true
		} else if err := os.RemoveAll(dir); err != nil {
			return nil, err
		}
	}
	if err := t.start(dir); err != nil {
		return nil, err
	}
	r := &largeResult{}
	d := newDataset(99, b.objects, time.Now().Add(-time.Duration(b.big)*time.Millisecond))
	if !have {
		var err error
		if r.bytes, err = b.fill(t, name, dir, d); err != nil {
			return nil, err
		}
		if b.keep != "" {
			if err := os.WriteFile(dir+".loaded", nil, 0o600); err != nil {
				return nil, err
			}
		}
	}
	rng := rand.New(rand.NewPCG(5, 5))
	pick := func() string {
		if rng.IntN(2) == 0 {
			return d.vms[rng.IntN(len(d.vms))]
		}
		return d.vols[rng.IntN(len(d.vols))]
	}
	rounds := 1000
	if name == "victoria" {
		rounds = 30
	}
	warm, err := latencies(t, rounds, pick, 100)
	if err != nil {
		return nil, err
	}
	r.p50 = quantile(warm, 0.5)
	fmt.Printf("%s: newest 100 of an object: p50 %.2f ms, p99 %.2f ms\n", name, r.p50, quantile(warm, 0.99))
	vms, err := latencies(t, rounds/2, func() string { return d.vms[rng.IntN(len(d.vms))] }, 1<<20)
	if err != nil {
		return nil, err
	}
	fmt.Printf("%s: all of a VM (%d entries in the mean): p50 %.2f ms, p99 %.2f ms\n", name, b.big/len(d.vms), quantile(vms, 0.5), quantile(vms, 0.99))
	var rates []float64
	for range 3 {
		start := time.Now()
		n, err := t.count(context.Background(), "woken 77 times")
		if err != nil {
			return nil, err
		}
		rates = append(rates, float64(b.big)/time.Since(start).Seconds())
		fmt.Printf("%s: text filter over everything: %d found, %.2f M entries/s\n", name, n, rates[len(rates)-1]/1e6)
	}
	r.scan = median(rates)
	if name == "mvirt" {
		figure("newest100_p50_ms", r.p50, "ms", "<= 2")
		figure("newest100_p99_ms", quantile(warm, 0.99), "ms", "<= 5")
		figure("object_all_p99_ms", quantile(vms, 0.99), "ms", "<= 10")
		if err := b.cold(t, dir, pick); err != nil {
			return nil, err
		}
	}
	if err := t.stop(); err != nil {
		return nil, err
	}
	if b.keep != "" {
		return r, nil
	}
	return r, os.RemoveAll(dir)
}

// cold measures queries of a store that was just started, with nothing of its files in the page cache before
// each single one.
func (b *bench) cold(t target, dir string, pick func() string) error {
	if err := t.stop(); err != nil {
		return err
	}
	forget(dir)
	if err := t.start(dir); err != nil {
		return err
	}
	var all []float64
	for range 100 {
		forget(dir)
		start := time.Now()
		if _, err := t.newest(context.Background(), pick(), 100); err != nil {
			return err
		}
		all = append(all, float64(time.Since(start).Microseconds())/1000)
	}
	slices.Sort(all)
	figure("newest100_cold_p50_ms", quantile(all, 0.5), "ms", "")
	figure("newest100_cold_p99_ms", quantile(all, 0.99), "ms", "<= 20")
	return nil
}

func latencies(t target, rounds int, pick func() string, limit int) ([]float64, error) {
	var out []float64
	for i := range rounds + rounds/10 {
		start := time.Now()
		if _, err := t.newest(context.Background(), pick(), limit); err != nil {
			return nil, err
		}
		if i >= rounds/10 { // the first tenth warms up
			out = append(out, float64(time.Since(start).Microseconds())/1000)
		}
	}
	slices.Sort(out)
	return out, nil
}

func quantile(sorted []float64, q float64) float64 {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// forget drops the files of dir from the page cache.
func forget(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if f, err := os.Open(path); err == nil {
				_ = f.Sync()
				_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
				f.Close()
			}
		}
		return nil
	})
}
