package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// bootTime bounds a boot of the guest: some 4 s here where QEMU emulates the CPU, and a slow machine is slower.
const bootTime = 3 * time.Minute

// shellTime bounds one command in the guest.
const shellTime = time.Minute

func (s *story) makeParts() error {
	if _, err := s.cli("template", "import", "busybox", s.guest.RootQcow2); err != nil {
		return err
	}
	if _, err := s.cli("network", "create", "lan", "--nat", "--host-access", "--ipv4", "10.77.0.0/24"); err != nil {
		return err
	}
	if _, err := s.cli("template", "ls"); err != nil {
		return err
	}
	_, err := s.cli("network", "ls")
	return err
}

// apiVM is what is used of a VM's JSON.
type apiVM struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	State string `json:"state"`
	PID   int    `json:"pid"`
	Disks []struct {
		ID   string `json:"volume_id"`
		Name string `json:"volume_name"`
	} `json:"disks"`
	NICs []struct {
		ID        string `json:"nic_id"`
		IPv4      string `json:"ipv4"`
		NetworkID string `json:"network_id"`
	} `json:"nics"`
}

// show asks for a VM without showing the answer.
func (s *story) show(name string) (apiVM, error) {
	out, err := s.sys.CLI(s.ctx, "vm", "show", name, "-o", "json")
	if err != nil {
		return apiVM{}, err
	}
	var v apiVM
	err = json.Unmarshal([]byte(out), &v)
	return v, err
}

func (s *story) startVMs() error {
	// The user data is a script; the host name comes with the same cloud-init disk.
	userData := filepath.Join(s.place.Dir, "hello.sh")
	if err := os.WriteFile(userData, []byte("#!/bin/sh\necho \"mvirt-guest: hello from the user data of $(hostname)\"\n"), 0o644); err != nil {
		return err
	}
	for _, name := range []string{"alice", "bob"} {
		if _, err := s.cli("vm", "create", name, "--template", "busybox", "--disk", "128M", "--cpus", "1", "--memory", "128M", "--network", "lan", "--user-data", userData,
			"--kernel", s.guest.Kernel, "--initramfs", s.guest.Initramfs, "--cmdline", "console=ttyS0 quiet root=LABEL=mvirt-root"); err != nil {
			return err
		}
		begin := time.Now()
		if _, err := s.cli("vm", "start", name); err != nil {
			return err
		}
		if _, err := s.sys.Console(s.ctx, name, "", "mvirt-guest: init", s.slow*bootTime, "--read-only", "--replay", "all"); err != nil {
			return err
		}
		took := time.Since(begin)
		say("%s: first line of its init after %.1f s", name, took.Seconds())
		if s.toInit == 0 {
			s.toInit = took
		}
		v, err := s.show(name)
		if err != nil {
			return err
		}
		if v.State != "running" || len(v.NICs) != 1 || v.NICs[0].IPv4 == "" || len(v.Disks) != 1 {
			return fmt.Errorf("vm %s is not as asked for: %+v", name, v)
		}
		s.vms = append(s.vms, vm{name: name, id: v.ID, addr: v.NICs[0].IPv4})
	}
	if s.pool != "" {
		if err := s.checkClones(); err != nil {
			return err
		}
	}
	if s.accel != "" {
		if err := s.checkAccel(); err != nil {
			return err
		}
	}
	_, err := s.cli("vm", "ls", "-o", "wide")
	return err
}

func (s *story) checkGuests() error {
	for _, v := range s.vms {
		out, err := s.sys.Console(s.ctx, v.name, "", "login:", s.slow*bootTime, "--read-only", "--replay", "all")
		if err != nil {
			return err
		}
		if !strings.Contains(out, v.name+" login:") {
			// The host name comes from the cloud-init disk that mvirt makes for each VM.
			return fmt.Errorf("the guest of %s does not call itself so:\n%s", v.name, out)
		}
		if _, err := s.sys.Console(s.ctx, v.name, "", "hello from the user data of "+v.name, s.slow*bootTime, "--read-only", "--replay", "all"); err != nil {
			return err
		}
		// The lease comes in the background of the boot, before or after the prompt.
		if _, err := s.sys.Console(s.ctx, v.name, "", "mvirt-guest: address eth0 "+v.addr+"/", s.slow*bootTime, "--read-only", "--replay", "all"); err != nil {
			return err
		}
		shown, err := s.sys.CLI(s.ctx, "vm", "console", v.name, "--log")
		if err != nil {
			return err
		}
		for line := range strings.Lines(shown) {
			if strings.Contains(line, "mvirt-guest:") || strings.Contains(line, "login:") {
				say("%s| %s", v.name, line)
			}
		}
	}
	for _, v := range s.vms {
		if _, err := s.sys.Console(s.ctx, v.name, "root\n", "# ", s.slow*shellTime, "--replay", "0"); err != nil {
			return err
		}
	}
	return nil
}

// shell runs a command in a guest where root is logged in and gives what it printed; it must succeed.
func (s *story) shell(v vm, command string) (string, error) {
	// The shell joins the marker's halves, so that the echo of what is typed does not hold it.
	out, err := s.sys.Console(s.ctx, v.name, command+"; echo exit-''code=$?.\n", "exit-code=", s.slow*shellTime, "--replay", "0")
	if err != nil {
		return out, err
	}
	// The digit may come in another piece: ask again, for success, without running the command again.
	if !strings.Contains(out, "exit-code=0") {
		if strings.HasSuffix(strings.TrimRight(out, "\r\n"), "exit-code=") {
			if more, err := s.sys.Console(s.ctx, v.name, "", "exit-code=0.", s.slow*5*time.Second, "--read-only", "--replay", "4K"); err == nil {
				return out + more, nil
			}
		}
		return out, fmt.Errorf("%s in %s failed:\n%s", command, v.name, out)
	}
	return out, nil
}

func (s *story) checkNetwork() error {
	a, b := s.vms[0], s.vms[1]
	for _, p := range []struct {
		from   vm
		to, as string
	}{{a, "169.254.0.1", "its gateway"}, {b, "169.254.0.1", "its gateway"}, {a, b.addr, b.name}, {b, a.addr, a.name}} {
		out, err := s.shell(p.from, "ping -c 3 -W 5 "+p.to)
		if err != nil {
			return err
		}
		summary := ""
		for line := range strings.Lines(out) {
			if strings.Contains(line, "packets received") || strings.Contains(line, "round-trip") {
				summary += " " + strings.TrimSpace(line)
			}
		}
		if !strings.Contains(summary, "3 packets received") {
			return fmt.Errorf("%s does not reach %s:\n%s", p.from.name, p.as, out)
		}
		say("%s pings %s (%s):%s", p.from.name, p.as, p.to, summary)
	}
	for _, v := range s.vms {
		if err := s.fetch(v); err != nil {
			return err
		}
	}
	return nil
}

// fetch asks the guest's web server, over TCP from the host; it answers with the guest's name.
func (s *story) fetch(v vm) error {
	c := http.Client{Timeout: s.slow * 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil, DialContext: (&net.Dialer{Timeout: s.slow * 10 * time.Second}).DialContext}}
	url := "http://" + net.JoinHostPort(v.addr, "8080") + "/"
	r, err := c.Get(url)
	if err != nil {
		return fmt.Errorf("the host does not reach %s: %w", v.name, err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(io.LimitReader(r.Body, 1000))
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(body)); got != v.name {
		return fmt.Errorf("the web server at %s answers %q, not %q", url, got, v.name)
	}
	say("the host fetches %s: %q", url, v.name)
	return nil
}

// killVMM kills the plugin, not in order, and looks at guests and at what the core then knows of them.
func (s *story) killVMM() error {
	before := map[string]apiVM{}
	for _, v := range s.vms {
		got, err := s.show(v.name)
		if err != nil {
			return err
		}
		before[v.name] = got
	}
	var p struct {
		PID      int `json:"pid"`
		Restarts int `json:"restarts"`
	}
	get := func() error {
		out, err := s.sys.CLI(s.ctx, "plugin", "show", "vmm", "-o", "json")
		if err != nil {
			return err
		}
		return json.Unmarshal([]byte(out), &p)
	}
	if err := get(); err != nil {
		return err
	}
	old := p.PID
	say("$ kill -9 %d", old)
	begin := time.Now()
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		return err
	}
	// The next call waits for the plugin that is being restarted, and then sees the VMs as they are.
	for _, v := range s.vms {
		got, err := s.show(v.name)
		if err != nil {
			return err
		}
		if got.State != "running" || got.PID != before[v.name].PID {
			return fmt.Errorf("vm %s was process %d and is now %d, %s", v.name, before[v.name].PID, got.PID, got.State)
		}
		say("%s is %s, still process %d", v.name, got.State, got.PID)
	}
	say("managed again after %d ms", time.Since(begin).Milliseconds())
	if err := get(); err != nil {
		return err
	}
	if p.PID == old || p.Restarts == 0 {
		return fmt.Errorf("the plugin was not restarted: pid %d, %d restarts", p.PID, p.Restarts)
	}
	// The guests never noticed: the shells that were logged in before still answer, and so does the network.
	for i, v := range s.vms {
		out, err := s.shell(v, "uptime")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, "load average") {
				say("%s| %s", v.name, strings.TrimSpace(line))
			}
		}
		if _, err := s.shell(v, "ping -c 1 -W 5 "+s.vms[1-i].addr); err != nil {
			return err
		}
		if err := s.fetch(v); err != nil {
			return err
		}
	}
	if _, err := s.cli("vm", "pause", "bob"); err != nil {
		return err
	}
	_, err := s.cli("vm", "resume", "bob")
	return err
}

// auditEntry is what is used of a log entry's JSON.
type auditEntry struct {
	Level   string            `json:"level"`
	Message string            `json:"message"`
	Objects []string          `json:"objects"`
	Labels  map[string]string `json:"labels"`
}

func (s *story) checkAudit() error {
	v, err := s.show("alice")
	if err != nil {
		return err
	}
	objects := []struct {
		what, id string
		words    []string // each must stand in some audit entry of the object
	}{
		{"vm alice", v.ID, []string{"create", "start"}},
		{"vm bob", s.vms[1].id, []string{"create", "start", "pause", "resume"}},
		{"its disk", v.Disks[0].ID, []string{"create"}},
		{"its NIC", v.NICs[0].ID, []string{"create"}},
		{"network lan", v.NICs[0].NetworkID, []string{"create"}},
	}
	for _, o := range objects {
		entries, err := s.audit(o.id)
		if err != nil {
			return err
		}
		all := ""
		for _, e := range entries {
			all += strings.ToLower(e.Message+" "+fmt.Sprint(e.Labels)) + "\n"
		}
		for _, w := range o.words {
			if !strings.Contains(all, w) {
				return fmt.Errorf("the audit log of %s (%s) does not tell of %q:\n%s", o.what, o.id, w, all)
			}
		}
		say("%s: %d audit entries", o.what, len(entries))
	}
	_, err = s.cli("logs", "bob", "--level-only", "audit")
	return err
}

// audit gives the audit entries about an object.
func (s *story) audit(id string) ([]auditEntry, error) {
	out, err := s.sys.CLI(s.ctx, "logs", "--object", id, "--level-only", "audit", "--all", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list []auditEntry
	sc := bufio.NewScanner(strings.NewReader(out))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var e auditEntry
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("%w: %s", err, sc.Text())
		}
		list = append(list, e)
	}
	return list, sc.Err()
}

var errLeft = errors.New("something is left")

func isNotExist(path string) bool {
	_, err := os.Lstat(path)
	return os.IsNotExist(err)
}
