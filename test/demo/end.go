package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mvirt/mvirt/test/system"
)

// removeAll stops the VMs in order, removes every object, and looks that each removal took along what the
// object had on the host; then mvirtd ends.
func (s *story) removeAll() error {
	running, err := system.Owned(s.ctx, s.place)
	if err != nil {
		return err
	}
	s.spaces = running.Namespaces
	say("while it all runs: %d processes, %d links, %d network name spaces, %d nftables tables, %d sockets",
		len(running.Processes), len(running.Links), len(running.Namespaces), len(running.Tables), len(running.Sockets))
	// What is found must be found: a look that sees nothing proves nothing later.
	if count(running, "qemu-system") != 2 || len(running.Links) < 3 || len(running.Namespaces) == 0 || len(running.Tables) == 0 || len(running.Sockets) == 0 {
		return fmt.Errorf("the demo does not see what runs:\n%s", strings.Join(running.List(), "\n"))
	}
	if _, err := s.cli("vm", "stop", "alice", "bob", "--timeout", (s.slow * 30 * time.Second).String()); err != nil {
		return err
	}
	for _, v := range s.vms {
		out, err := s.sys.CLI(s.ctx, "vm", "console", v.name, "--log")
		if err != nil {
			return err
		}
		if !strings.Contains(out, "mvirt-guest: power button") || !strings.Contains(out, "mvirt-guest: shutdown") {
			return fmt.Errorf("the guest of %s was not shut down in order; its console ends:\n%s", v.name, tail(out, 10))
		}
		say("%s| power button, shutdown", v.name)
	}
	if _, err := s.cli("vm", "rm", "alice", "--dry-run"); err != nil {
		return err
	}
	for _, args := range [][]string{{"vm", "rm", "alice", "bob"}, {"network", "rm", "lan"}, {"template", "rm", "busybox"}} {
		if _, err := s.cli(args...); err != nil {
			return err
		}
	}
	for _, noun := range []string{"vm", "volume", "nic", "network", "template"} {
		out, err := s.sys.CLI(s.ctx, noun, "ls", "-o", "name")
		if err != nil {
			return err
		}
		if strings.TrimSpace(out) != "" {
			return fmt.Errorf("mvirt %s ls still shows:\n%s", noun, out)
		}
	}
	say("no VM, volume, NIC, network or template is left in the lists")
	rest, err := system.Owned(s.ctx, s.place, s.spaces...)
	if err != nil {
		return err
	}
	if n := count(rest, "qemu-system"); n > 0 || len(rest.Links)+len(rest.Namespaces)+len(rest.Mounts) > 0 {
		return fmt.Errorf("%w although all objects are removed:\n%s", errLeft, strings.Join(rest.List(), "\n"))
	}
	say("their processes, links and name spaces are gone; mvirtd and its plugins run: %d processes", len(rest.Processes))
	return s.sys.Stop(s.ctx)
}

func count(t system.Things, word string) int {
	n := 0
	for _, p := range t.Processes {
		if strings.Contains(p.Name, word) {
			n++
		}
	}
	return n
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// checkNothingLeft looks at the host after mvirtd has ended, then removes the directories and looks again.
func (s *story) checkNothingLeft() error {
	things, err := system.Owned(s.ctx, s.place, s.spaces...)
	if err != nil {
		return err
	}
	if list := things.List(); len(list) > 0 {
		return fmt.Errorf("%w:\n%s", errLeft, strings.Join(list, "\n"))
	}
	say("no process, link, name space, nftables table, mount, socket or stray file")
	if s.pool != "" {
		if err := s.checkPoolEmpty(); err != nil {
			return err
		}
	}
	// In the state directories: no volume, no template, no VM's directory.
	for _, pattern := range []string{"storage/volumes/*", "storage/templates/*", "storage/snapshots/*", "storage/.tmp/*", "vmm/vm/*", "vmm/kernels/*", "net/workers/*"} {
		list, err := filepath.Glob(filepath.Join(s.place.Dir, pattern))
		if err != nil {
			return err
		}
		if len(list) > 0 {
			return fmt.Errorf("%w in the state directories: %s", errLeft, strings.Join(list, ", "))
		}
	}
	// Of the sockets' directory only empty directories and the file that a second mvirtd would look into.
	err = filepath.WalkDir(s.place.Run, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && path != filepath.Join(s.place.Run, "mvirtd.pid") {
			err = fmt.Errorf("%w: %s", errLeft, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, d := range []string{s.place.Dir, s.place.Run} {
		if err := os.RemoveAll(d); err != nil {
			return err
		}
		if !isNotExist(d) {
			return fmt.Errorf("%w: %s", errLeft, d)
		}
	}
	say("and its two directories are removed")
	return nil
}
