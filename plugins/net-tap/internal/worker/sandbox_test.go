package worker

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the process that confines itself and then tries to get out.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "probe" {
		probe()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// probe prints what is still possible, on this thread and on another.
func probe() {
	ready, goOn := make(chan bool), make(chan bool)
	go func() { // a thread that exists before
		runtime.LockOSThread()
		ready <- true
		<-goOn
		try("other thread")
		ready <- true
	}()
	<-ready
	runtime.LockOSThread()
	did, err := confine()
	fmt.Println("confined:", did, err)
	try("main thread")
	goOn <- true
	<-ready
	r, w, err := os.Pipe() // what a worker goes on needing
	fmt.Println("pipe:", err)
	_, err = w.Write([]byte("x"))
	fmt.Println("write:", err)
	_, err = r.Read(make([]byte, 1))
	fmt.Println("read:", err)
	time.Sleep(time.Millisecond)
}

func try(where string) {
	_, err := os.Open("/etc/passwd")
	fmt.Printf("%s open: %v\n", where, err)
	_, err = net.Dial("tcp", "127.0.0.1:1")
	fmt.Printf("%s dial: %v\n", where, err)
	_, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	fmt.Printf("%s socket: %v\n", where, err)
	err = exec.Command("/bin/true").Run()
	fmt.Printf("%s exec: %v\n", where, err)
	err = unix.Unshare(unix.CLONE_NEWUSER)
	fmt.Printf("%s unshare: %v\n", where, err)
	err = os.Remove("/tmp/mvirt-no-such-file")
	fmt.Printf("%s remove: %v\n", where, err)
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	_ = unix.Capget(&hdr, &data[0])
	fmt.Printf("%s capabilities: %x\n", where, data[0].Permitted|data[1].Permitted)
}

func TestConfined(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "probe")
	if os.Geteuid() == 0 { // as a worker is, and with a capability that it should not have
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: []uintptr{unix.CAP_NET_ADMIN}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		what, got, _ := strings.Cut(line, ": ")
		switch {
		case what == "confined":
			if !strings.Contains(got, "no_new_privs seccomp") || !strings.HasSuffix(got, "<nil>") {
				t.Errorf("%s", line)
			}
		case what == "pipe" || what == "write" || what == "read":
			if got != "<nil>" {
				t.Errorf("%s", line)
			}
		case strings.HasSuffix(what, "capabilities"):
			if got != "0" {
				t.Errorf("%s", line)
			}
		case !strings.Contains(got, "operation not permitted"):
			t.Errorf("still possible: %s", line)
		}
	}
	if n := strings.Count(string(out), "thread"); n != 14 {
		t.Errorf("%d lines: %s", n, out)
	}
}
