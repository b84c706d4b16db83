package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/mvirt/mvirt/core/apiv1"
)

const (
	bootTime  = 3 * time.Minute
	shellTime = time.Minute
)

// guestVM is a guest under load.
type guestVM struct {
	name, id, addr string
	pid            int
	start          string // of the process: field 22 of /proc/PID/stat
	boot           string // the guest kernel's boot id
}

// load is the user data: it writes to the disk without end and says each second that the guest lives.
const load = `#!/bin/sh
( while :; do dd if=/dev/urandom of=/load bs=64k count=4 conv=fsync 2>/dev/null && echo >>/disk-ok || echo >>/disk-bad; sleep 0.5; done ) &
( n=0; while :; do n=$((n+1)); echo "tick $n" >/dev/console; sleep 1; done ) &
dd if=/dev/urandom of=/kept bs=64k count=16 2>/dev/null
sync
md5sum /kept >/kept.md5
`

// netLoad fetches from the other guest without end.
const netLoad = `(while :; do wget -T 5 -q -O /dev/null http://%s:8080/ && echo >>/net-ok || echo >>/net-bad; sleep 0.5; done) >/dev/null 2>&1 &`

// startGuests makes and boots the two guests and their load.
func (c *chaos) startGuests(ctx context.Context) error {
	cli := func(args ...string) (string, error) { return c.sys.sys.CLI(ctx, args...) }
	image := c.guest.RootQcow2
	if c.guests == 0 {
		image = filepath.Join(c.place().Dir, "empty.raw")
		if err := os.WriteFile(image, make([]byte, 1<<20), 0o644); err != nil {
			return err
		}
	}
	if _, err := cli("template", "import", "busybox", image); err != nil {
		return err
	}
	if _, err := cli("network", "create", "lan", "--nat", "--ipv4", "10.78.0.0/24"); err != nil {
		return err
	}
	data, text := filepath.Join(c.place().Dir, "load.sh"), load
	if !c.load {
		text = "#!/bin/sh\n"
	}
	if err := os.WriteFile(data, []byte(text), 0o644); err != nil {
		return err
	}
	for _, name := range []string{"alice", "bob"}[:c.guests] {
		if _, err := cli("vm", "create", name, "--template", "busybox", "--disk", "128M", "--cpus", "1", "--memory", "128M", "--network", "lan", "--user-data", data,
			"--kernel", c.guest.Kernel, "--initramfs", c.guest.Initramfs, "--cmdline", "console=ttyS0 quiet root=LABEL=mvirt-root", "--start"); err != nil {
			return err
		}
		v, err := c.show(ctx, name)
		if err != nil {
			return err
		}
		g := &guestVM{name: name, id: v.ID, addr: v.NICs[0].IPv4, pid: v.PID}
		if g.start, err = startOf(g.pid); err != nil {
			return err
		}
		c.vms = append(c.vms, g)
	}
	if !c.load {
		return nil // they boot while faults happen
	}
	for i, g := range c.vms {
		if _, err := c.sys.sys.Console(ctx, g.name, "", "mvirt-guest: address eth0 "+g.addr+"/", bootTime, "--read-only", "--replay", "all"); err != nil {
			return err
		}
		if _, err := c.sys.sys.Console(ctx, g.name, "", "login:", bootTime, "--read-only", "--replay", "all"); err != nil {
			return err
		}
		if _, err := c.sys.sys.Console(ctx, g.name, "root\n", "# ", shellTime, "--replay", "0"); err != nil {
			return err
		}
		var err error
		if g.boot, err = c.shell(ctx, g, "cat /proc/sys/kernel/random/boot_id"); err != nil {
			return err
		}
		if _, err := c.shell(ctx, g, fmt.Sprintf(netLoad, c.vms[1-i].addr)); err != nil {
			return err
		}
		if _, err := c.shell(ctx, g, "while ! [ -s /kept.md5 ]; do sleep 0.2; done"); err != nil {
			return err
		}
	}
	return nil
}

type shown struct {
	ID    string `json:"id"`
	State string `json:"state"`
	PID   int    `json:"pid"`
	NICs  []struct {
		IPv4 string `json:"ipv4"`
	} `json:"nics"`
}

func (c *chaos) show(ctx context.Context, name string) (v shown, err error) {
	out, err := c.sys.sys.CLI(ctx, "vm", "show", name, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &v)
	}
	if err == nil && len(v.NICs) == 0 {
		err = fmt.Errorf("VM %s has no NIC", name)
	}
	return v, err
}

// shell runs a command in a guest and gives what it printed. Ticks that stand in between are taken out; the
// answer stands between two marks, which the echo of what is typed does not hold.
func (c *chaos) shell(ctx context.Context, g *guestVM, command string) (string, error) {
	command = strings.TrimSuffix(strings.TrimSpace(command), ";")
	sep := ";"
	if strings.HasSuffix(command, "&") {
		sep = ""
	}
	out, err := c.sys.sys.Console(ctx, g.name, "echo beg''in. ; "+command+sep+" echo exit-''code=$?.e''nd\n", ".end", shellTime, "--replay", "0")
	if err != nil {
		return out, err
	}
	if !strings.Contains(out, "exit-code=0.") {
		return out, fmt.Errorf("in the guest of %s: %s: %s", g.name, command, out)
	}
	out = ticks.ReplaceAllString(strings.ReplaceAll(out, "\r", ""), "")
	if _, after, ok := strings.Cut(out, "begin."); ok {
		out = after
	}
	out, _, _ = strings.Cut(out, "exit-code=")
	return strings.TrimSpace(out), nil
}

var ticks = regexp.MustCompile(`tick \d+\n?`)

// startOf is when a process was started, which tells it from another with the same number: proc_pid_stat(5).
func startOf(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	_, rest, ok := strings.Cut(string(b), ") ")
	w := strings.Fields(rest)
	if !ok || len(w) < 20 {
		return "", fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	if w[0] == "Z" || w[0] == "X" {
		return "", fmt.Errorf("process %d has ended", pid)
	}
	return w[19], nil
}

// alive tells whether the guest's process is the one that was started.
func (g *guestVM) alive() bool {
	s, err := startOf(g.pid)
	return err == nil && s == g.start
}

// checkGuests asks the guests themselves: the same boot, nothing failed, the load still runs.
func (c *chaos) checkGuests(ctx context.Context) {
	for _, g := range c.vms {
		if !g.alive() {
			c.fault("guest exit: the process of %s ended", g.name)
			continue
		}
		if !c.load {
			if _, err := c.sys.sys.Console(ctx, g.name, "", "mvirt-guest: init", bootTime, "--read-only", "--replay", "all"); err != nil {
				c.fault("guest exit: %s did not boot: %v", g.name, err)
			}
			continue
		}
		if got, err := c.shell(ctx, g, "cat /proc/sys/kernel/random/boot_id"); err != nil || got != g.boot {
			c.fault("guest exit: %s is not the same boot: %q, was %q, %v", g.name, got, g.boot, err)
			continue
		}
		if got, err := c.shell(ctx, g, "md5sum -c /kept.md5"); err != nil {
			c.fault("the disk of %s: %s %v", g.name, got, err)
		}
		if got, err := c.shell(ctx, g, "dmesg | grep -ci 'I/O error\\|EXT4-fs error' ; [ -e /disk-bad ] && wc -l </disk-bad; true"); err != nil || got != "0" {
			c.fault("the disk of %s had errors: %s %v", g.name, got, err)
		}
		for _, f := range []string{"/disk-ok", "/net-ok"} {
			n, err := c.counter(ctx, g, f)
			if err != nil {
				c.fault("%s of %s: %v", f, g.name, err)
				continue
			}
			// Generous: a TCG guest on a loaded machine.
			for end := time.Now().Add(time.Minute); ; {
				m, err := c.counter(ctx, g, f)
				if err == nil && m > n {
					c.say("%s: %s at %d", g.name, f, m)
					break
				}
				if time.Now().After(end) {
					c.fault("%s of %s does not grow any more (%d), %v", f, g.name, n, err)
					break
				}
			}
		}
		bad, err := c.counter(ctx, g, "/net-bad")
		c.say("%s: %d fetches over the network failed while nobody moved packets, %v", g.name, bad, err)
		c.checkConsole(ctx, g)
	}
}

func (c *chaos) counter(ctx context.Context, g *guestVM, file string) (int, error) {
	out, err := c.shell(ctx, g, "cat "+file+" 2>/dev/null | wc -l")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(out)
}

// checkConsole looks whether what the guest said each second is kept without a gap.
func (c *chaos) checkConsole(ctx context.Context, g *guestVM) {
	out, err := c.sys.sys.CLI(ctx, "vm", "console", g.name, "--log")
	if err != nil {
		c.fault("console of %s: %v", g.name, err)
		return
	}
	have := map[int]bool{}
	most, least := 0, 0
	for _, m := range regexp.MustCompile(`tick (\d+)`).FindAllStringSubmatch(out, -1) {
		n, _ := strconv.Atoi(m[1])
		have[n] = true
		most = max(most, n)
		if least == 0 || n < least {
			least = n
		}
	}
	lost := 0
	for n := least; n <= most; n++ {
		if !have[n] {
			lost++
		}
	}
	c.say("%s: console has ticks %d to %d, %d missing", g.name, least, most, lost)
	if most == 0 {
		c.fault("console of %s has no tick", g.name)
	}
	if lost > 0 {
		c.fault("console of %s lacks %d of %d lines", g.name, lost, most)
	}
}

// counters asks both hypervisors, which shows that they are managed.
func (c *chaos) counters(ctx context.Context, vms apiv1.VMsClient) error {
	for _, g := range c.vms {
		if _, err := vms.Counters(ctx, &apiv1.RefRequest{Ref: g.id}); err != nil {
			return err
		}
	}
	return nil
}
