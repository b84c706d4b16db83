package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// storageSection is that of the configuration which test/system writes.
var storageSection = regexp.MustCompile(`(?s)\[plugin\.storage\]\n.*?(\n\n|$)`)

// pluginSection is the head of any plugin's section.
var pluginSection = regexp.MustCompile(`(?m)^\[plugin\.[a-z]+\]$`)

// configure puts storage-zfs in the place of storage-dir, and gives plugins more time on a slow machine.
func (s *story) configure(text string) string {
	if s.pool != "" {
		data := filepath.Join(s.place.Dir, "storage")
		text = storageSection.ReplaceAllLiteralString(text, fmt.Sprintf("[plugin.storage]\ncommand = %q\nargs = [\"--pool\", %q, \"--slow\", \"%d\"]\ndata_dir = %q\n"+
			"user = \"root\"\ncapabilities = [\"CAP_SYS_ADMIN\", \"CAP_CHOWN\", \"CAP_DAC_OVERRIDE\", \"CAP_FOWNER\"]\nworker_user = \"mvirt-worker\"\n\n", filepath.Join(s.place.Dir, "bin", "mvirt-zfs"), s.pool, s.slow, data))
	}
	if s.slow > 1 {
		text = pluginSection.ReplaceAllString(text, "$0\nstart_timeout = \"2m\"\nhealth_deadline = \"30s\"")
	}
	return text
}

// copyZFS puts the plugin to the others, where what runs is found by its path.
func (s *story) copyZFS(from string) error {
	dir := filepath.Join(s.place.Dir, "bin")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	in, err := os.Open(filepath.Join(from, "mvirt-zfs"))
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(filepath.Join(dir, "mvirt-zfs"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	return err
}

// zfs lists the pool's datasets and snapshots with one property.
func (s *story) zfs(property string) (map[string]string, error) {
	out, err := exec.CommandContext(s.ctx, "zfs", "list", "-H", "-r", "-t", "all", "-o", "name,"+property, s.pool).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("zfs list: %w: %s", err, out)
	}
	all := map[string]string{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		all[name] = value
	}
	return all, nil
}

// checkClones looks into the pool itself: the VMs' disks are clones of the template's one snapshot.
func (s *story) checkClones() error {
	origins, err := s.zfs("origin")
	if err != nil {
		return err
	}
	clones := 0
	for name, origin := range origins {
		if origin == s.pool+"/.templates/busybox@img" {
			say("%s is a clone of %s", name, origin)
			clones++
		}
	}
	if clones != len(s.vms) {
		return fmt.Errorf("%d zvols are clones of the template, not %d: %v", clones, len(s.vms), origins)
	}
	return nil
}

// checkPoolEmpty looks that only mvirt's own datasets are left.
func (s *story) checkPoolEmpty() error {
	left, err := s.zfs("type")
	if err != nil {
		return err
	}
	for _, own := range []string{"", "/.mvirt-zfs", "/.templates", "/.tmp"} {
		delete(left, s.pool+own)
	}
	if len(left) > 0 {
		var names []string
		for n := range left {
			names = append(names, n)
		}
		slices.Sort(names)
		return fmt.Errorf("%w in the pool: %s", errLeft, strings.Join(names, ", "))
	}
	say("the pool %s holds no volume, template or snapshot", s.pool)
	return nil
}

// checkAccel looks at how the guests' processes run.
func (s *story) checkAccel() error {
	for _, v := range s.vms {
		shown, err := s.show(v.name)
		if err != nil {
			return err
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", shown.PID))
		if err != nil {
			return err
		}
		args := strings.Split(string(line), "\x00")
		if !slices.ContainsFunc(args, func(a string) bool {
			return a == s.accel || strings.HasPrefix(a, s.accel+",") || strings.Contains(a, "accel="+s.accel)
		}) {
			return fmt.Errorf("%s does not run by %s: %q", v.name, s.accel, args)
		}
		say("%s runs by %s", v.name, s.accel)
	}
	return nil
}
