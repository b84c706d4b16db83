package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/test/system"
)

// memory reports what is resident in each process.
func (b *bench) memory(when string) error {
	things, err := system.Owned(b.ctx, b.place)
	if err != nil {
		return err
	}
	for _, p := range things.Processes {
		f, err := os.Open(fmt.Sprintf("/proc/%d/status", p.PID))
		if err != nil {
			return err
		}
		for sc := bufio.NewScanner(f); sc.Scan(); {
			var kb float64
			if _, err := fmt.Sscanf(sc.Text(), "VmRSS: %f kB", &kb); err == nil {
				name := p.Name
				if name == "mvirtd" && p.User == "root" {
					name = "launcher"
				}
				figure("rss_"+when+"_"+strings.ReplaceAll(name, "-", "_"), kb/1024, "MiB", "")
			}
		}
		f.Close()
	}
	return nil
}

// call measures a unary call: through the core, and straight to a plugin of the same kind, in turns.
func (b *bench) call() error {
	dir := filepath.Join(b.place.Dir, "direct")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	p, err := host.Launch(b.ctx, host.Config{Kind: service.KindStorage, Spawner: &host.Local{Command: []string{filepath.Join(b.bin, "mvirt-dir"), "--data-dir", dir}}})
	if err != nil {
		return err
	}
	defer p.Kill()
	direct, ok := p.Base.(storage.Service)
	if !ok {
		return fmt.Errorf("%T is no storage service", p.Base)
	}
	vol, snap, tmpl := ident.New(), ident.New(), ident.New()
	if _, err := direct.CreateVolume(b.ctx, storage.CreateVolumeRequest{ID: vol, Name: "v", SizeBytes: 1 << 20}); err != nil {
		return err
	}
	if _, err := direct.CreateSnapshot(b.ctx, storage.CreateSnapshotRequest{ID: snap, VolumeID: vol, Name: "s"}); err != nil {
		return err
	}
	if _, err := direct.CreateTemplate(b.ctx, storage.CreateTemplateRequest{ID: tmpl, Name: "t", SnapshotID: snap}); err != nil {
		return err
	}
	for _, args := range [][]string{{"volume", "create", "v", "1M"}, {"snapshot", "create", "v@s"}, {"template", "create", "t", "--snapshot", "v@s"}} {
		if _, err := b.sys.CLI(b.ctx, args...); err != nil {
			return err
		}
	}
	conn, err := b.sys.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	api := apiv1.NewTemplatesClient(conn)
	mine, err := api.Get(b.ctx, &apiv1.RefRequest{Ref: "t"})
	if err != nil {
		return err
	}
	var through, straight []time.Duration
	for round := range b.rounds + 1 {
		for range b.calls {
			t := time.Now()
			if _, err := api.Get(b.ctx, &apiv1.RefRequest{Ref: mine.GetId()}); err != nil {
				return err
			}
			mid := time.Now()
			if _, err := direct.GetTemplate(b.ctx, storage.Ref{Ref: tmpl}); err != nil {
				return err
			}
			if round > 0 { // the first warms up
				through, straight = append(through, mid.Sub(t)), append(straight, time.Since(mid))
			}
		}
	}
	figure("call_p50_vs_direct", percentile(through, 50)/percentile(straight, 50), "x", "<= 2.5")
	figure("call_p50_us", 1000*percentile(through, 50), "us", "")
	figure("call_p99_us", 1000*percentile(through, 99), "us", "")
	figure("direct_p50_us", 1000*percentile(straight, 50), "us", "")
	figure("direct_p99_us", 1000*percentile(straight, 99), "us", "")
	return nil
}

// firstLine is what the guest's first process prints.
const firstLine = "mvirt-guest: init"

// start measures from "mvirt vm start" to the guest's first process, and the same QEMU command line started
// by hand, in turns. Both are told by the file that QEMU itself writes the serial port to.
func (b *bench) start() error {
	if _, err := b.sys.CLI(b.ctx, "vm", "create", "boot", "--memory", "128M", "--kernel", b.guest.Kernel, "--initramfs", b.guest.Initramfs, "--cmdline", "console=ttyS0 quiet"); err != nil {
		return err
	}
	var mvirt, answered, bare []time.Duration
	for range b.rounds {
		took, answer, args, err := b.startMvirt()
		if err != nil {
			return err
		}
		mvirt, answered = append(mvirt, took), append(answered, answer)
		if took, err = b.startBare(args); err != nil {
			return err
		}
		bare = append(bare, took)
	}
	figure("vm_start_vs_bare_qemu", percentile(mvirt, 50)/percentile(bare, 50), "x", "<= 1.05")
	figure("vm_start_ms", percentile(mvirt, 50), "ms", "")
	figure("bare_qemu_start_ms", percentile(bare, 50), "ms", "")
	figure("vm_start_answer_ms", percentile(answered, 50), "ms", "")
	note("vm start: mvirt %s, bare %s", spread(mvirt), spread(bare))
	_, err := b.sys.CLI(b.ctx, "vm", "rm", "boot")
	return err
}

// startMvirt gives the time to the guest's first line and to the program's end, and QEMU's command line.
func (b *bench) startMvirt() (took, answer time.Duration, args []string, err error) {
	out, err := b.sys.CLI(b.ctx, "vm", "show", "boot", "-o", "json")
	if err != nil {
		return 0, 0, nil, err
	}
	var vm struct {
		ID  string `json:"id"`
		PID int    `json:"pid"`
	}
	if err := json.Unmarshal([]byte(out), &vm); err != nil {
		return 0, 0, nil, err
	}
	log := filepath.Join(b.place.Dir, "vmm", "vm", vm.ID, "console.log")
	begin := time.Now()
	offset := size(log)
	if _, err := b.sys.CLI(b.ctx, "vm", "start", "boot"); err != nil {
		return 0, 0, nil, err
	}
	answer = time.Since(begin)
	took, err = waitFor(log, offset, begin)
	if err != nil {
		return 0, 0, nil, err
	}
	if out, err = b.sys.CLI(b.ctx, "vm", "show", "boot", "-o", "json"); err == nil {
		err = json.Unmarshal([]byte(out), &vm)
	}
	if err != nil {
		return 0, 0, nil, err
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", vm.PID))
	if err != nil {
		return 0, 0, nil, err
	}
	_, err = b.sys.CLI(b.ctx, "vm", "kill", "boot")
	return took, answer, strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00"), err
}

// startBare starts QEMU as vmm-qemu does: in a directory of its own, with the listening sockets of QMP and of
// the serial port as descriptors 3 and 4.
func (b *bench) startBare(args []string) (time.Duration, error) {
	dir, err := os.MkdirTemp(b.place.Dir, "bare-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	begin := time.Now()
	// -S holds the guest until a manager says so; nobody does here.
	cmd := exec.Command(args[0], slices.DeleteFunc(slices.Clone(args[1:]), func(a string) bool { return a == "-S" })...)
	cmd.Dir = dir
	// A session of its own, as mvirt gives it: with automatic task groups (sched(7)) that is its share of a busy
	// machine.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	for _, name := range []string{"api", "serial"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unix"})
		if err != nil {
			return 0, err
		}
		defer l.Close()
		f, err := l.File()
		if err != nil {
			return 0, err
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	took, err := waitFor(filepath.Join(dir, "console.log"), 0, begin)
	if err != nil {
		return 0, fmt.Errorf("%w; QEMU says: %s", err, errOut.String())
	}
	return took, nil
}

func size(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// waitFor looks each millisecond whether the first line is in the file behind offset.
func waitFor(path string, offset int64, begin time.Time) (time.Duration, error) {
	for time.Since(begin) < 3*time.Minute {
		data, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, err
		}
		if int64(len(data)) > offset && bytes.Contains(data[offset:], []byte(firstLine)) {
			return time.Since(begin), nil
		}
		time.Sleep(time.Millisecond)
	}
	return 0, fmt.Errorf("%s does not show %q after three minutes", path, firstLine)
}

// list measures a list of many VMs, by the client library and by the program.
func (b *bench) list() error {
	conn, err := b.sys.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	api := apiv1.NewVMsClient(conn)
	begin := time.Now()
	var g errgroup.Group
	g.SetLimit(8)
	for i := range b.vms {
		g.Go(func() error {
			_, err := api.Create(b.ctx, &apiv1.CreateVMRequest{Name: fmt.Sprintf("vm-%04d", i), Cpus: 1, MemoryBytes: 128 << 20, Disks: []*apiv1.NewDisk{{SizeBytes: 1 << 20}}})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	note("%d VMs with a disk each made in %.1f s", b.vms, time.Since(begin).Seconds())
	var took, program []time.Duration
	for range 50 {
		t := time.Now()
		r, err := api.List(b.ctx, &apiv1.ListVMsRequest{})
		if err != nil {
			return err
		}
		took = append(took, time.Since(t))
		if len(r.GetVms()) != b.vms {
			return fmt.Errorf("%d VMs are listed", len(r.GetVms()))
		}
	}
	for range 10 {
		t := time.Now()
		if _, err := b.sys.CLI(b.ctx, "vm", "ls"); err != nil {
			return err
		}
		program = append(program, time.Since(t))
	}
	figure(fmt.Sprintf("vm_list_%d_ms", b.vms), percentile(took, 50), "ms", "<= 10")
	figure(fmt.Sprintf("vm_list_%d_p99_ms", b.vms), percentile(took, 99), "ms", "")
	figure(fmt.Sprintf("mvirt_vm_ls_%d_ms", b.vms), percentile(program, 50), "ms", "")
	return b.memory(fmt.Sprint(b.vms))
}

// restart measures kill -9 of a plugin to the next good call. Each plugin is killed once in a life of mvirtd:
// a second death soon after is delayed on purpose, and is not what is measured.
func (b *bench) restart() error {
	var took []time.Duration
	for range b.rounds {
		if err := b.sys.Stop(b.ctx); err != nil {
			return err
		}
		if err := b.sys.Launch(b.ctx); err != nil {
			return err
		}
		conn, err := b.sys.Dial()
		if err != nil {
			return err
		}
		calls := map[string]func() error{
			"vmm": func() error {
				_, err := apiv1.NewVMsClient(conn).Get(b.ctx, &apiv1.RefRequest{Ref: "vm-0000"})
				return err
			},
			"storage": func() error {
				_, err := apiv1.NewTemplatesClient(conn).Get(b.ctx, &apiv1.RefRequest{Ref: "t"})
				return err
			},
			"net": func() error {
				_, err := apiv1.NewNetworksClient(conn).List(b.ctx, &apiv1.ListNetworksRequest{})
				return err
			},
			"log": func() error {
				_, err := apiv1.NewLogsClient(conn).Stats(b.ctx, &apiv1.LogStatsRequest{})
				return err
			},
		}
		list, err := apiv1.NewPluginsClient(conn).List(b.ctx, &apiv1.ListPluginsRequest{})
		if err != nil {
			return err
		}
		for _, p := range list.GetPlugins() {
			call := calls[p.GetKind()]
			if err := call(); err != nil {
				return err
			}
			t := time.Now()
			if err := syscall.Kill(int(p.GetPid()), syscall.SIGKILL); err != nil {
				return err
			}
			for err := call(); err != nil; err = call() {
				if time.Since(t) > 10*time.Second {
					return fmt.Errorf("the %s plugin is not back: %w", p.GetKind(), err)
				}
			}
			took = append(took, time.Since(t))
			note("restart of %s after %.1f ms", p.GetKind(), float64(time.Since(t).Microseconds())/1000)
		}
		conn.Close()
	}
	figure("plugin_restart_p50_ms", percentile(took, 50), "ms", "<= 60")
	figure("plugin_restart_max_ms", percentile(took, 100), "ms", "")
	return nil
}
