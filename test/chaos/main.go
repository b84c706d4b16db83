// Command chaos is "make chaos": two guests under disk and network load, changes through the API, and
// meanwhile random faults from a printed seed in every process that is not a guest: killed, frozen, exchanged
// for another binary, or crashing at their start; alone and together.
//
// It ends with what must all be zero: guests that ended, acknowledged changes that are lost, things left
// behind, audit entries that are missing or there twice; and with the median and the worst time until
// everything was managed again. Exit code 1 if one is not zero.
//
// The harness plays the service manager: it starts mvirtd again when the launcher ends, as a unit with
// Restart= would.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/test/guest"
	"github.com/mvirt/mvirt/test/system"
)

func main() {
	o := options{}
	flag.IntVar(&o.faults, "faults", 0, "stop after this many faults (0: --duration decides)")
	flag.DurationVar(&o.duration, "duration", 2*time.Minute, "stop after this time, without --faults")
	flag.Uint64Var(&o.seed, "seed", 0, "of the random numbers (0: one is chosen and printed)")
	flag.DurationVar(&o.freeze, "freeze", 3*time.Second, "longest time that a process is stopped for")
	flag.IntVar(&o.guests, "guests", 2, "how many guests run: 2, or 0 for a short run without load")
	flag.BoolVar(&o.load, "load", true, "guests write to their disks and fetch from each other; false: they boot and idle, for short runs")
	flag.StringVar(&o.bin, "bin", "bin", "directory with the programs")
	flag.StringVar(&o.name, "name", "chaos", "of the system: directories are /var/lib/mvirt-NAME and /run/mvirt-NAME")
	flag.StringVar(&o.only, "only", "", "only faults whose words contain this, as \"kill net\"")
	flag.BoolVar(&o.keep, "keep", false, "leave the system's files when something is wrong")
	flag.Parse()
	if o.guests != 0 && o.guests != 2 {
		fmt.Fprintln(os.Stderr, "chaos: --guests is 0 or 2: they talk to each other")
		os.Exit(2)
	}
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "chaos: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	os.Exit(run(o))
}

type options struct {
	faults   int
	duration time.Duration
	guests   int
	load     bool
	seed     uint64
	freeze   time.Duration
	bin      string
	name     string
	only     string
	keep     bool
}

// chaos is one run.
type chaos struct {
	options
	begin time.Time
	rand  *rand.Rand // of the faults; mutations have their own
	sys   *keeper
	guest guest.Guest
	vms   []*guestVM
	work  *workload
	wrong []string // what is not as it should be, in words
	again []time.Duration
	ready []time.Duration
	kinds map[string]int
}

func run(o options) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if o.seed == 0 {
		o.seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	c := &chaos{options: o, begin: time.Now(), rand: rand.New(rand.NewPCG(o.seed, 1)), kinds: map[string]int{}}
	c.say("seed %d", o.seed)
	err := c.run(ctx)
	if err != nil {
		c.fault("%v", err)
	}
	c.report()
	if len(c.wrong) > 0 && c.sys != nil {
		fmt.Printf("--- end of %s:\n%s\n", c.sys.sys.LogPath(), c.sys.sys.LogTail(25))
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if c.sys != nil {
		c.sys.stop(end)
	}
	if len(c.wrong) > 0 && o.keep {
		saved := filepath.Join(os.TempDir(), fmt.Sprintf("chaos-%d", o.seed))
		if out, err := exec.Command("cp", "-a", c.place().Dir, saved).CombinedOutput(); err != nil {
			fmt.Printf("chaos: keeping the files: %v: %s\n", err, out)
		}
		fmt.Println("chaos: the files are kept in", saved)
	}
	if _, err := system.Sweep(end, c.place()); err != nil {
		c.fault("sweeping: %v", err)
	}
	if len(c.wrong) > 0 {
		fmt.Printf("chaos: FAILED (seed %d)\n", o.seed)
		return 1
	}
	fmt.Println("chaos: ok")
	return 0
}

func (c *chaos) place() system.Place { return system.RootPlace(c.name) }

// say prints a line with the time since the beginning.
func (c *chaos) say(format string, args ...any) {
	fmt.Printf("%7.2f  %s\n", time.Since(c.begin).Seconds(), fmt.Sprintf(format, args...))
}

// fault notes something that is not as it should be.
func (c *chaos) fault(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	c.say("WRONG: %s", text)
	c.wrong = append(c.wrong, text)
}

func (c *chaos) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("this needs root: it starts plugins under their own users and makes networks")
	}
	unlock, err := system.Lock(ctx, c.place())
	if err != nil {
		return err
	}
	defer unlock()
	found, err := system.Sweep(ctx, c.place())
	if err != nil {
		return err
	}
	if len(found) > 0 {
		c.say("an earlier run left, now removed: %s", strings.Join(found, "; "))
	}
	if c.guests > 0 {
		if c.guest, err = guest.Build(ctx, c.say); err != nil {
			return err
		}
	}
	sys, err := system.Start(ctx, system.Options{Place: c.place(), Bin: c.bin, Config: c.config})
	if err != nil {
		return err
	}
	c.sys = keep(sys)
	if err := c.startGuests(ctx); err != nil {
		return err
	}
	c.work = newWorkload(c)
	if err := c.work.start(ctx); err != nil {
		return err
	}
	first, err := c.managed(ctx, time.Now(), time.Minute)
	if err != nil {
		return err
	}
	c.say("begins; managed is told within %v", first.total.Round(time.Millisecond))
	until := time.Now().Add(c.duration)
	for n := 1; ctx.Err() == nil; n++ {
		if c.faults > 0 && n > c.faults || c.faults == 0 && time.Now().After(until) {
			break
		}
		if err := c.oneFault(ctx, n); err != nil {
			return err
		}
		// Changes that meet no fault are part of the picture.
		pause(ctx, time.Duration(c.rand.Int64N(int64(700*time.Millisecond))))
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return c.verify(ctx)
}

// config makes supervision quick and endless: a run has more deaths in a minute than a host in a year.
func (c *chaos) config(text string) string {
	text = strings.Replace(text, "[core]\n", "[core]\nrestart_delay_max = \"250ms\"\n", 1)
	return strings.ReplaceAll(text, "\ncommand = ", "\nrestart_delay_max = \"250ms\"\nquarantine_deaths = 0\nhealth_interval = \"1s\"\nhealth_deadline = \"1s\"\nhealth_misses = 3\ncommand = ")
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
