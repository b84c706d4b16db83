// Package testns gives tests a host of their own: a mount, a network and a process namespace in which /run is
// empty and only the loopback exists. The machine's own network is never touched, and whatever a test leaves
// behind ends with it. For tests only.
package testns

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// inside is set in the process that has namespaces of its own.
const inside = "MVIRT_TEST_INSIDE"

// Run calls run, which is a TestMain's m.Run, in namespaces of their own if the process is root, and as it
// is otherwise; it returns the exit code. A process that is told to stay as it is (keep) is not root and
// inside already.
func Run(keep bool, run func() int) int {
	for _, a := range os.Args[1:] { // fuzzing talks to its processes by descriptors, and tests parsers only
		keep = keep || strings.HasPrefix(a, "-test.fuzz")
	}
	if os.Geteuid() != 0 || keep {
		return run()
	}
	if os.Getenv(inside) != "" {
		if err := play(); err != nil {
			fmt.Fprintln(os.Stderr, "namespaces for the tests:", err)
			return 1
		}
		return run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about this thread
	err := cmd.Run()
	if e, ok := err.(*exec.ExitError); ok {
		return e.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "namespaces for the tests:", err)
		return 1
	}
	return 0
}

func play() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	// sysfs shows the interfaces of the namespace in which it was mounted.
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return err
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}
