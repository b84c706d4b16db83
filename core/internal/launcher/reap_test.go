package launcher

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// An orphan below the launcher is reaped when it ends; a child of the launcher's own is left to who waits for it.
func TestReapsStrangersOnly(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	f := newFamily()
	// The shell starts a grandchild, says its pid, and ends: the grandchild becomes ours.
	out, err := exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	orphan, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	own := exec.Command("true")
	if err := f.start(own); err != nil {
		t.Fatal(err)
	}
	waitState(t, own.Process.Pid, "Z")
	f.reapStrangers()
	if got := state(orphan); got == "" || got == "Z" {
		t.Fatalf("a running orphan is in state %q", got)
	}
	if err := syscall.Kill(orphan, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitState(t, orphan, "Z")
	f.reapStrangers()
	if got := state(orphan); got != "" {
		t.Errorf("the dead orphan is still there, in state %q", got)
	}
	if err := own.Wait(); err != nil {
		t.Errorf("the launcher's own child was reaped by somebody else: %v", err)
	}
	f.ended(own.Process.Pid)
}

// state is the letter of proc_pid_stat(5), or "" when there is no such process.
func state(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[0]
}

func waitState(t *testing.T, pid int, want string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if state(pid) == want {
			return
		}
	}
	t.Fatalf("process %d is in state %q, not %q", pid, state(pid), want)
}
