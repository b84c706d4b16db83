// Command core measures the core: what mvirt adds to a bare QEMU and to a direct call of a plugin, how fast a
// killed plugin is back, how a host with 1,000 VMs is listed, and what memory it all takes.
//
// What is compared is measured in turns in one run, so that a machine that is busy with something else slows
// both sides. Lines: figure NAME VALUE UNIT aim OP NUMBER (or report), and note TEXT.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/test/guest"
	"github.com/mvirt/mvirt/test/system"
)

func main() {
	var b bench
	flag.StringVar(&b.bin, "bin", "bin", "directory of the programs")
	flag.IntVar(&b.rounds, "rounds", 5, "rounds of VM starts, and of mvirtd for restarts of plugins")
	flag.IntVar(&b.calls, "calls", 2000, "calls a round")
	flag.IntVar(&b.vms, "vms", 1000, "definitions")
	flag.StringVar(&b.only, "only", "", "one part: call, start, list or restart (which needs list); all by default")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b.ctx = ctx
	if err := b.run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-core:", err)
		os.Exit(1)
	}
}

type bench struct {
	ctx                context.Context
	bin                string
	rounds, calls, vms int
	only               string
	place              system.Place
	sys                *system.System
	guest              guest.Guest
}

func figure(name string, value float64, unit, aim string) {
	if aim != "" {
		aim = " aim " + aim
	}
	fmt.Printf("figure %s %.4g %s%s\n", name, value, unit, aim)
}

func note(format string, args ...any) { fmt.Printf("note "+format+"\n", args...) }

func (b *bench) run() (err error) {
	if os.Geteuid() != 0 {
		return fmt.Errorf("needs root: it starts plugins under their own users")
	}
	b.place = system.RootPlace("bench")
	if _, err := system.Sweep(b.ctx, b.place); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if b.sys != nil {
			_ = b.sys.Stop(ctx)
		}
		if _, e := system.Sweep(ctx, b.place); err == nil {
			err = e
		}
	}()
	if b.bin, err = filepath.Abs(b.bin); err != nil {
		return err
	}
	if b.guest, err = guest.Build(b.ctx, note); err != nil {
		return err
	}
	note("%d CPUs, %s; load as it is: compare ratios, not seconds", runtime.NumCPU(), runtime.Version())
	if b.sys, err = system.Start(b.ctx, system.Options{Place: b.place, Bin: b.bin}); err != nil {
		return err
	}
	if err := b.memory("idle"); err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		run  func() error
	}{{"call", b.call}, {"start", b.start}, {"list", b.list}, {"restart", b.restart}} {
		if b.only != "" && b.only != part.name {
			continue
		}
		if err := part.run(); err != nil {
			return err
		}
	}
	return nil
}

// percentile of times, in milliseconds.
func percentile(list []time.Duration, p int) float64 {
	s := slices.Clone(list)
	slices.Sort(s)
	return float64(s[min(len(s)-1, len(s)*p/100)]) / float64(time.Millisecond)
}

func spread(list []time.Duration) string {
	return fmt.Sprintf("%.4g to %.4g ms in %d", percentile(list, 0), percentile(list, 100), len(list))
}
