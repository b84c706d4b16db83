package launcher

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// targets is what a hostile hypervisor is told of the host, as if its guest knew everything.
type targets struct {
	OwnDisk, ReadOnlyDisk        string // inside
	OwnFile                      string // readable, handed over
	OtherDisk, OtherDir, OtherVM string // host paths; a socket in OtherDir
	API, Abstract, TCP           string // sockets of the host
	Victim, Launcher             int    // pids
	Secret                       string // a file that anybody on the host may read
}

// attempt is one thing that was tried: "" as error means that it worked.
type attempt struct{ What, Err string }

// testHostile runs in place of a hypervisor and tries to get out. It writes what came of it to attempts.json in
// its directory and goes on living until it is killed.
func testHostile() {
	var t targets
	if err := json.Unmarshal([]byte(os.Args[2]), &t); err != nil {
		panic(err)
	}
	var all []attempt
	try := func(what string, err error) { all = append(all, attempt{what, errText(err)}) }
	open := func(path string, flags int) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	dial := func(network, addr string) error {
		c, err := net.DialTimeout(network, addr, 5*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	}
	sock := func(family, typ int) error {
		fd, err := unix.Socket(family, typ, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	// What it must be able to do.
	try("may: write to its disk", open(t.OwnDisk, unix.O_RDWR))
	try("may: read its read-only disk", open(t.ReadOnlyDisk, unix.O_RDONLY))
	try("may: read a file that it was given", open(t.OwnFile, unix.O_RDONLY))
	try("may: make a file in its directory", open("made", unix.O_CREAT|unix.O_RDWR))
	try("may: read /dev/urandom", open("/dev/urandom", unix.O_RDONLY))
	// Disks and files.
	try("write to its read-only disk", open(t.ReadOnlyDisk, unix.O_RDWR))
	try("write to a file that it was given", open(t.OwnFile, unix.O_RDWR))
	try("open another VM's disk", open(t.OtherDisk, unix.O_RDONLY))
	try("open another VM's disk by the name it has inside", open("/disk/other", unix.O_RDONLY))
	try("look into another VM's directory", open(t.OtherDir, unix.O_RDONLY|unix.O_DIRECTORY))
	try("look into the directory above its own", func() error {
		list, err := os.ReadDir("..")
		if err == nil && len(list) > 1 {
			return nil
		}
		return fmt.Errorf("%v, %v", list, err)
	}())
	try("read /etc/passwd", open("/etc/passwd", unix.O_RDONLY))
	try("read a file that all users may", open(t.Secret, unix.O_RDONLY))
	try("write into /usr", open("/usr/hostile", unix.O_CREAT|unix.O_WRONLY))
	try("write into /", open("/hostile", unix.O_CREAT|unix.O_WRONLY))
	try("write into /disk", open("/disk/hostile", unix.O_CREAT|unix.O_WRONLY))
	try("write into /dev", open("/dev/hostile", unix.O_CREAT|unix.O_WRONLY))
	try("look at /proc", open("/proc/self/status", unix.O_RDONLY))
	try("look at /sys", open("/sys/kernel", unix.O_RDONLY))
	try("make a device node", unix.Mknod("node", unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0))))
	try("run a shell", func() error {
		_, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", "exit 0"}, &syscall.ProcAttr{})
		return err
	}())
	try("make a set-uid program", func() error {
		return unix.Chown("made", 0, 0)
	}())
	// Other processes.
	for name, pid := range map[string]int{"another VM's process": t.Victim, "the launcher": t.Launcher, "process 1": 1} {
		try("signal "+name, unix.Kill(pid, 0))
		try("kill "+name, unix.Kill(pid, unix.SIGTERM))
		try("trace "+name, unix.PtraceAttach(pid))
		try("read the memory of "+name, func() error {
			b := make([]byte, 8)
			local := []unix.Iovec{{Base: &b[0], Len: 8}}
			_, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&all)), Len: 8}}, 0)
			return err
		}())
		try("open the memory of "+name, open(fmt.Sprintf("/proc/%d/mem", pid), unix.O_RDWR))
		try("see the files of "+name, open(fmt.Sprintf("/proc/%d/root", pid), unix.O_RDONLY))
	}
	// Sockets.
	try("connect to the API", dial("unix", t.API))
	try("connect to another VM's control socket", dial("unix", filepath.Join(t.OtherDir, "api.sock")))
	try("connect to an abstract socket of the host", dial("unix", "@"+t.Abstract))
	try("connect by TCP to the host", dial("tcp", t.TCP))
	try("listen on TCP", func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	}())
	try("open a packet socket", sock(unix.AF_PACKET, unix.SOCK_RAW))
	try("open a raw socket", sock(unix.AF_INET, unix.SOCK_RAW))
	try("see the host's interfaces", func() error {
		list, err := net.Interfaces()
		if err == nil && len(list) > 1 {
			return nil
		}
		return fmt.Errorf("%d interfaces, %v", len(list), err)
	}())
	// Privilege.
	try("become root", syscall.Setresuid(0, 0, 0))
	try("become the victim's user", syscall.Setresuid(4999, 4999, 4999))
	try("leave its groups", syscall.Setgroups(nil))
	try("mount", unix.Mount("none", "/disk", "tmpfs", 0, ""))
	try("change its root", unix.Chroot("."))
	try("mount in a user namespace of its own", inUserNamespace())
	try("load a module", unix.FinitModule(0, "", 0))
	try("set the clock", unix.Settimeofday(&unix.Timeval{Sec: 1}))
	try("reboot", unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF))
	try("raise its limit of files", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}))
	b, _ := json.Marshal(all)
	err := os.WriteFile("attempts.new", b, 0o660)
	if err == nil {
		err = os.Rename("attempts.new", "attempts.json")
	}
	if err != nil {
		fmt.Println("hostile:", err)
		os.Exit(1)
	}
	select {}
}

// inUserNamespace tries what a user who may make user namespaces can do to a system that lets him mount.
func inUserNamespace() error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		// A process with several threads cannot enter a user namespace; a child can.
		pid, err := syscall.ForkExec("/usr/bin/env", []string{"env", "true"}, &syscall.ProcAttr{
			Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS}})
		if err == nil {
			_, err = syscall.Wait4(pid, nil, 0, nil)
		}
		return err
	})
}
