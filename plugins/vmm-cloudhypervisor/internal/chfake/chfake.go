// Package chfake is a test double of cloud-hypervisor: a process that takes its command line, speaks its API,
// keeps a VM's states, writes its events and serves its serial socket, but runs no guest. It holds each request
// against the OpenAPI document and writes what is wrong with one into the file "violations". It proves what the
// driver sends, and how the driver bears what goes wrong; not that a guest boots.
//
// A test tells it what to do by files in its working directory, the VM's: "fault" holds lines "REQUEST KIND",
// where KIND is 500, hang, crash or slow; "version" is what --version says. Typing at the serial port does
// something too: "off\n" powers the guest off, "reset\n" reboots it, "panic\n" panics; all else is echoed.
package chfake

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// SpecFile, beside the binary, holds the path of the OpenAPI document; without it nothing is held against it.
const SpecFile = "openapi-path"

// fake is the whole process.
type fake struct {
	spec       *Spec
	noShutdown bool
	events     *os.File
	start      time.Time

	mu      sync.Mutex // guards what follows
	state   string     // "": no VM
	config  map[string]any
	nets    map[string]int // descriptors that came with a NIC
	deaf    bool           // ignores the power button
	serial  net.Listener
	client  net.Conn
	pending bytes.Buffer // serial output that nobody has taken
}

// Main is the process. dir is where the binary is, for SpecFile.
func Main(args []string, dir string) int {
	f := &fake{start: time.Now(), nets: map[string]int{}}
	for i, a := range args {
		switch a {
		case "--version":
			fmt.Println("cloud-hypervisor v" + fileOr(dir+"/version", "53.0.0"))
			return 0
		case "--help":
			fmt.Println("      --no-shutdown\n          Do not exit the VMM when the guest shuts down")
			return 0
		case "--no-shutdown":
			f.noShutdown = true
		case "--api-socket":
			if args[i+1] != "fd=3" {
				fmt.Fprintln(os.Stderr, "the fake takes fd=3 only")
				return 1
			}
		case "--event-monitor":
			var err error
			if f.events, err = os.Create(strings.TrimPrefix(args[i+1], "path=")); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
	}
	if p := fileOr(dir+"/"+SpecFile, ""); p != "" {
		var err error
		if f.spec, err = Load(p); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	l, err := net.FileListener(os.NewFile(3, "api"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	f.event("vmm", "starting")
	for { // one at a time, as the real one
		c, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		f.serve(c.(*net.UnixConn))
	}
}

func fileOr(path, otherwise string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return otherwise
	}
	return strings.TrimSpace(string(b))
}

func (f *fake) event(source, name string, props ...string) {
	var p map[string]string
	for i := 0; i+1 < len(props); i += 2 {
		if p == nil {
			p = map[string]string{}
		}
		p[props[i]] = props[i+1]
	}
	d := time.Since(f.start)
	b, _ := json.MarshalIndent(map[string]any{"timestamp": map[string]int64{"secs": int64(d.Seconds()), "nanos": int64(d % time.Second)},
		"source": source, "event": name, "properties": p}, "", "  ")
	if f.events != nil {
		_, _ = f.events.Write(append(b, '\n', '\n'))
	}
}

// serve answers one request.
func (f *fake) serve(c *net.UnixConn) {
	defer c.Close()
	fds := &fdReader{c: c}
	req, err := http.ReadRequest(bufio.NewReader(fds))
	if err != nil {
		return
	}
	raw, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	what := strings.TrimPrefix(req.URL.Path, "/api/v1/")
	var body any
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &body); err != nil {
			f.violation(what, err)
		}
	}
	if f.spec != nil {
		if err := f.spec.CheckRequest(req.Method, what, body); err != nil {
			f.violation(what, err)
		}
	}
	if len(raw) > 51200 {
		f.violation(what, fmt.Errorf("a body of %d bytes", len(raw)))
	}
	switch f.fault(what) {
	case "500":
		answer(c, 500, `["Internal error","the fault that was asked for"]`)
		return
	case "hang":
		select {}
	case "slow":
		time.Sleep(300 * time.Millisecond)
	case "crash":
		fmt.Fprintln(os.Stderr, "cloud-hypervisor: thread 'vmm' panicked at fault")
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	}
	status, text := f.handle(what, body, fds.files)
	answer(c, status, text)
	if what == "vmm.shutdown" {
		f.event("vmm", "shutdown")
		os.Exit(0)
	}
}

func (f *fake) violation(what string, err error) {
	out, oerr := os.OpenFile("violations", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if oerr == nil {
		fmt.Fprintf(out, "%s: %v\n", what, err)
		out.Close()
	}
}

// fault tells what is to go wrong with a request, and takes its line out: it goes wrong once.
func (f *fake) fault(what string) string {
	lines := strings.Split(fileOr("fault", ""), "\n")
	for i, l := range lines {
		if req, kind, ok := strings.Cut(l, " "); ok && req == what {
			_ = os.WriteFile("fault", []byte(strings.Join(append(lines[:i:i], lines[i+1:]...), "\n")), 0o600)
			return kind
		}
	}
	return ""
}

func answer(c net.Conn, status int, body string) {
	_, _ = fmt.Fprintf(c, "HTTP/1.1 %d \r\nServer: fake\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		status, len(body), body)
}

// fdReader reads a stream and keeps the descriptors that come along.
type fdReader struct {
	c     *net.UnixConn
	files int
}

func (r *fdReader) Read(b []byte) (int, error) {
	oob := make([]byte, 1024)
	n, on, _, _, err := r.c.ReadMsgUnix(b, oob)
	if on > 0 {
		msgs, perr := unix.ParseSocketControlMessage(oob[:on])
		if perr != nil {
			return n, perr
		}
		for _, m := range msgs {
			fds, perr := unix.ParseUnixRights(&m)
			if perr != nil {
				return n, perr
			}
			r.files += len(fds)
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func text(m any, key string) string {
	s, _ := get(m, key).(string)
	return s
}

// handle does what a request asks, by the rules of the real state machine.
func (f *fake) handle(what string, body any, files int) (int, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	no := func(status int, s string) (int, string) {
		b, _ := json.Marshal([]string{"Error from API", s})
		return status, string(b)
	}
	live := f.state == "Running" || f.state == "Paused"
	switch what {
	case "vmm.ping":
		return 200, `{"version":"v53.0.0","pid":` + strconv.Itoa(os.Getpid()) + `,"features":["kvm"]}`
	case "vmm.shutdown":
		if live {
			f.event("vm", "shutdown")
		}
		f.event("vm", "deleted")
		return 204, ""
	case "vm.create":
		if f.state != "" {
			return no(405, "VM is already created")
		}
		f.config, _ = body.(map[string]any)
		for _, d := range f.list("disks") {
			if _, err := os.Stat(text(d, "path")); err != nil {
				return no(400, "Cannot open disk path: "+err.Error())
			}
			if text(d, "image_type") != "Raw" {
				f.violation(what, fmt.Errorf("disk %s has no explicit format", text(d, "id")))
			}
		}
		f.state = "Created"
		return 204, ""
	}
	if what == "vm.restore" {
		if f.state != "" {
			return no(405, "VM is already created")
		}
		return f.restore(body, files)
	}
	if f.state == "" {
		return no(404, "VM is not created")
	}
	switch what {
	case "vm.info":
		b, _ := json.Marshal(map[string]any{"state": f.state, "config": f.config, "memory_actual_size": 1, "unknown_field": true})
		return 200, string(b)
	case "vm.counters":
		if !live {
			return no(405, "VM is not running")
		}
		c := map[string]map[string]uint64{}
		for _, d := range f.list("disks") {
			c[text(d, "id")] = map[string]uint64{"read_bytes": 1, "read_ops": 2, "write_bytes": 3, "write_ops": 4}
		}
		b, _ := json.Marshal(c)
		return 200, string(b)
	case "vm.add-net", "vm.add-disk":
		key := map[string]string{"vm.add-net": "net", "vm.add-disk": "disks"}[what]
		id := text(body, "id")
		if f.has(id) {
			return no(500, "Identifier is not unique")
		}
		if key == "net" {
			q, _ := get(body, "num_queues").(float64)
			if files == 0 && text(body, "tap") == "" && text(body, "vhost_socket") == "" || files > 0 && files*2 != int(q) {
				return no(400, fmt.Sprintf("%d descriptors for %v queues", files, q))
			}
			f.nets[id] = files
		}
		f.config[key] = append(f.list(key), body)
		if !live {
			return 204, ""
		}
		return 200, `{"id":"` + id + `","bdf":"0000:00:06.0"}`
	case "vm.remove-device":
		id := text(body, "id")
		if !f.has(id) {
			return no(404, "unknown device id "+id)
		}
		for _, key := range []string{"disks", "net"} {
			var kept []any
			for _, d := range f.list(key) {
				if text(d, "id") != id {
					kept = append(kept, d)
				}
			}
			f.config[key] = kept
		}
		go func() {
			time.Sleep(20 * time.Millisecond) // the guest lets go
			f.event("vm", "device-removed", "id", id, "bdf", "0000:00:06.0")
		}()
		return 204, ""
	case "vm.resize":
		if !live {
			return no(405, "VM is not running")
		}
		if cpus, ok := get(body, "desired_vcpus").(float64); ok {
			if most, _ := get(f.config, "cpus", "max_vcpus").(float64); cpus > most {
				return no(400, "desired vCPUs exceed the maximum")
			}
		}
		return 204, ""
	case "vm.resize-disk":
		if !f.has(text(body, "id")) {
			return no(404, "unknown disk")
		}
		return 204, ""
	case "vm.boot":
		if f.state != "Created" {
			return no(405, "VM is already running")
		}
		f.event("vm", "booting")
		if err := f.listen(); err != nil {
			return no(500, err.Error())
		}
		f.state = "Running"
		f.event("vm", "booted")
		f.print("fake guest runs\n")
		return 204, ""
	case "vm.pause":
		if f.state != "Running" {
			return no(405, "VM is not running")
		}
		f.state = "Paused"
		f.event("vm", "paused")
		return 204, ""
	case "vm.resume":
		if f.state != "Paused" {
			return no(405, "VM is not paused")
		}
		f.state = "Running"
		f.event("vm", "resumed")
		return 204, ""
	case "vm.power-button":
		if !live {
			return no(405, "VM is not running")
		}
		if !f.deaf {
			go f.powerOff()
		}
		return 204, ""
	case "vm.snapshot":
		if f.state != "Paused" {
			return no(500, "Trying to snapshot while VM is running")
		}
		return f.snapshot(strings.TrimPrefix(text(body, "destination_url"), "file://"))
	case "vm.reboot":
		if !live {
			return no(405, "VM is not running")
		}
		return f.reboot()
	}
	return no(404, "no such request")
}

func (f *fake) list(key string) []any {
	l, _ := f.config[key].([]any)
	return l
}

func (f *fake) has(id string) bool {
	for _, key := range []string{"disks", "net"} {
		for _, d := range f.list(key) {
			if text(d, "id") == id {
				return true
			}
		}
	}
	return false
}

func (f *fake) reboot() (int, string) {
	f.event("vm", "rebooting")
	f.unlisten()
	if err := f.listen(); err != nil {
		return 500, `["` + err.Error() + `"]`
	}
	f.state = "Running"
	f.event("vm", "rebooted")
	f.print("fake guest runs\n")
	return 204, ""
}

// powerOff is the guest's doing.
func (f *fake) powerOff() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.print("fake guest off\n")
	f.unlisten()
	f.state = "Created"
	f.event("vm", "shutdown")
	if !f.noShutdown {
		f.event("vm", "deleted")
		f.event("vmm", "shutdown")
		os.Exit(0)
	}
}
