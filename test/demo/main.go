// Command demo is "make demo": from a disk image and a kernel to two running VMs and back to nothing, on a
// private directory, through the core and four plugins under their own users. Each step is checked; the first
// that is not as it should be ends the demo with exit code 1, after it has cleaned up.
//
// It needs no answer from anybody, can be run again and again, and begins by removing what an earlier run
// left that was killed.
//
// In the lab the same story is told with -zfs-pool: then the volumes are zvols of that pool, which is empty when
// the story ends, but for what mvirt keeps there of its own.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/test/guest"
	"github.com/mvirt/mvirt/test/system"
)

func main() {
	os.Exit(run())
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	s := &story{place: system.RootPlace("demo"), start: time.Now()}
	flag.StringVar(&s.pool, "zfs-pool", "", "keep volumes in this ZFS pool, by storage-zfs, instead of a directory")
	flag.StringVar(&s.guestDir, "guest", "", "take the guest that mkguest has put here instead of making one")
	slow := flag.Int("slow", 1, "how many times slower than usual the machine may be")
	flag.StringVar(&s.accel, "want-accel", "", "fail unless guests run by this accelerator (kvm or tcg)")
	flag.Parse()
	s.slow = time.Duration(max(*slow, 1))
	ctx, cancel := context.WithTimeout(ctx, s.slow*15*time.Minute)
	defer cancel()
	s.ctx = ctx
	err := s.tell()
	if err != nil {
		fmt.Printf("\ndemo: FAILED: %v\n", err)
		if s.sys != nil {
			fmt.Printf("--- end of %s:\n%s\n", s.sys.LogPath(), s.sys.LogTail(40))
		}
		s.cleanUp()
		return 1
	}
	fmt.Printf("demo: ok (%.1f s from vm start to guest init)\n", s.toInit.Seconds())
	return 0
}

// story is one run of the demo.
type story struct {
	ctx    context.Context
	place  system.Place
	sys    *system.System
	guest  guest.Guest
	start  time.Time
	toInit time.Duration
	spaces []string // network name spaces that were seen

	pool     string // of ZFS; "": volumes are files
	guestDir string // with a guest that is ready; "": one is made
	accel    string
	slow     time.Duration // factor on every limit of time
	vms      []vm
}

type vm struct{ name, id, addr string }

// tell runs all chapters in order.
func (s *story) tell() error {
	if os.Geteuid() != 0 {
		return errors.New("the demo needs root: it starts plugins under their own users and makes networks")
	}
	chapters := []struct {
		title string
		do    func() error
	}{
		{"Removing what an earlier demo may have left", s.sweep},
		{"Making a guest: Debian's kernel, and a qcow2 with an ext4 root and busybox", s.makeGuest},
		{"Starting mvirtd with four plugins, each as its own user", s.startSystem},
		{"Importing the qcow2 as a template, and making a nat network", s.makeParts},
		{"Creating and starting two VMs", s.startVMs},
		{"Both have their addresses by DHCP, and a login on the console", s.checkGuests},
		{"They reach their gateway and each other, and the host reaches them", s.checkNetwork},
		{"kill -9 of the vmm plugin: both guests keep running, and are managed again", s.killVMM},
		{"The audit log tells the story of each object", s.checkAudit},
		{"Stopping and removing everything", s.removeAll},
		{"Nothing is left", s.checkNothingLeft},
	}
	for i, c := range chapters {
		fmt.Printf("\n[%d/%d] %s\n", i+1, len(chapters), c.title)
		begin := time.Now()
		if err := c.do(); err != nil {
			return err
		}
		fmt.Printf("      %.1f s\n", time.Since(begin).Seconds())
	}
	fmt.Printf("\nThe whole demo took %.0f s.\n", time.Since(s.start).Seconds())
	return nil
}

// say prints a line of the story.
func say(format string, args ...any) {
	for line := range strings.Lines(strings.TrimRight(fmt.Sprintf(format, args...), "\n")) {
		fmt.Printf("      %s\n", strings.TrimRight(line, "\r\n"))
	}
}

// cli runs the CLI, shows the command and what it printed, and gives that.
func (s *story) cli(args ...string) (string, error) {
	words := make([]string, len(args))
	for i, w := range args {
		if strings.ContainsAny(w, " $'\"") {
			w = "'" + w + "'"
		}
		words[i] = strings.ReplaceAll(w, s.guest.Dir+"/", "")
	}
	say("$ mvirt %s", strings.Join(words, " "))
	out, err := s.sys.CLI(s.ctx, args...)
	if out != "" {
		say("%s", out)
	}
	return out, err
}

func (s *story) sweep() error {
	found, err := system.Sweep(s.ctx, s.place)
	if len(found) == 0 {
		say("there was nothing")
	}
	for _, f := range found {
		say("removed %s", f)
	}
	return err
}

// cleanUp is for a demo that failed: no checks, only removal. It works also when the time is over.
func (s *story) cleanUp() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), time.Minute)
	defer cancel()
	if keep := os.Getenv("DEMO_KEEP"); keep != "" {
		fmt.Printf("DEMO_KEEP is set: %s and what runs there stays\n", s.place.Dir)
		return
	}
	if s.sys != nil {
		_ = s.sys.Stop(ctx)
	}
	if _, err := system.Sweep(ctx, s.place); err != nil {
		fmt.Printf("cleaning up: %v\n", err)
	}
}

func (s *story) makeGuest() (err error) {
	if s.guestDir != "" {
		file := func(name string) string { return filepath.Join(s.guestDir, name) }
		s.guest = guest.Guest{Dir: s.guestDir, Kernel: file("vmlinuz"), Initramfs: file("initramfs.cpio"), RootQcow2: file("root.qcow2")}
	} else if s.guest, err = guest.Build(s.ctx, say); err != nil {
		return err
	}
	for _, f := range []string{s.guest.Kernel, s.guest.Initramfs, s.guest.RootQcow2} {
		st, err := os.Stat(f)
		if err != nil {
			return err
		}
		say("%s, %.1f MiB", filepath.Base(f), float64(st.Size())/(1<<20))
	}
	return nil
}

func (s *story) startSystem() (err error) {
	bin, err := os.Executable()
	if err != nil {
		return err
	}
	opt := system.Options{Place: s.place, Bin: filepath.Dir(bin), Patience: s.slow * 30 * time.Second, Config: s.configure}
	if s.pool != "" {
		if err := s.copyZFS(opt.Bin); err != nil {
			return err
		}
	}
	s.sys, err = system.Start(s.ctx, opt)
	if err != nil {
		return err
	}
	if _, err := s.cli("plugin", "ls"); err != nil {
		return err
	}
	things, err := system.Owned(s.ctx, s.place)
	if err != nil {
		return err
	}
	users := map[string]bool{}
	for _, p := range things.Processes {
		say("%s", p)
		users[p.User] = true
	}
	for _, u := range []string{"root", "mvirt", "mvirt-vmm", "mvirt-log", "mvirt-dir"} {
		if !users[u] && (u != "mvirt-dir" || s.pool == "") { // storage-zfs is root's: the ZFS module asks for it
			return fmt.Errorf("no process runs as user %s", u)
		}
	}
	return nil
}
