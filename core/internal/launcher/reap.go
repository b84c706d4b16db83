package launcher

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// family knows the launcher's own children, so that it can reap the others: hypervisors and packet workers
// whose plugin has died become the launcher's (PR_SET_CHILD_SUBREAPER, prctl(2)), and would stay behind as
// zombies where process 1 reaps nothing, as in many containers.
type family struct {
	mu  sync.Mutex
	own map[int]bool
}

func newFamily() *family { return &family{own: map[int]bool{}} }

// start starts a command as one of the family's own; the caller waits for it and then calls ended.
func (f *family) start(cmd *exec.Cmd) error {
	f.mu.Lock() // held over Start: a child must not be taken for a stranger before it is known
	defer f.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	f.own[cmd.Process.Pid] = true
	return nil
}

func (f *family) ended(pid int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.own, pid)
}

// adopt makes this process the parent of orphans below it and reaps them until ctx ends.
func (f *family) adopt(ctx context.Context) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	go func() {
		defer signal.Stop(died)
		for {
			select {
			case <-died:
				f.reapStrangers()
			case <-ctx.Done():
				return
			}
		}
	}()
	return nil
}

// reapStrangers reaps every ended child that is not the family's own.
func (f *family) reapStrangers() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, pid := range children() {
		if !f.own[pid] {
			var st unix.WaitStatus
			_, _ = unix.Wait4(pid, &st, unix.WNOHANG, nil) // 0: it still runs
		}
	}
}

// children lists this process's children: proc_pid_task_children(5), one list a thread.
func children() (pids []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", os.Getpid()))
	for _, l := range lists {
		text, err := os.ReadFile(l)
		if err != nil {
			continue // the thread has ended
		}
		for _, w := range strings.Fields(string(text)) {
			if pid, err := strconv.Atoi(w); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}
