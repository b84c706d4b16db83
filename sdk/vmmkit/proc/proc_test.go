package proc

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func sh(t *testing.T, script string, args ...string) *Process {
	t.Helper()
	p, err := Local{}.Spawn(t.Context(), Command{Path: "/bin/sh", Args: append([]string{"-c", script}, args...), Dir: "/"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.Signal(syscall.SIGKILL)
		<-p.Done()
	})
	return p
}

func waitExit(t *testing.T, p *Process) Exit {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	e, err := p.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestExitOfChild(t *testing.T) {
	if got := waitExit(t, sh(t, "exit 7")).String(); got != "exit status 7" {
		t.Errorf("got %s", got)
	}
	if got := waitExit(t, sh(t, "kill -9 $$")).String(); got != "signal 9 (SIGKILL)" {
		t.Errorf("got %s", got)
	}
}

func TestSpawnIsApart(t *testing.T) {
	p := sh(t, "read x </dev/zero; sleep 60")
	sid, err := unix.Getsid(p.Identity().PID)
	if err != nil || sid != p.Identity().PID {
		t.Errorf("session %d, %v; want its own", sid, err)
	}
}

func TestSpawnFails(t *testing.T) {
	_, err := Local{}.Spawn(t.Context(), Command{Path: "/does/not/exist"})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// A process that is nobody's child of ours: the shell in between ends, init takes it over.
func TestOpenStranger(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", "(trap 'exit 5' TERM; while :; do sleep 0.01; done) >/dev/null 2>&1 & echo $!")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	id, err := Identify(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(id)
	if err != nil {
		t.Fatal(err)
	}

	recycled := id
	recycled.StartTime++
	if _, err := Open(recycled); !errors.Is(err, ErrGone) {
		t.Errorf("another start time: %v, want ErrGone", err)
	}
	rebooted := id
	rebooted.BootID = "00000000-0000-0000-0000-000000000000"
	if _, err := Open(rebooted); !errors.Is(err, ErrGone) {
		t.Errorf("another boot: %v, want ErrGone", err)
	}
	select {
	case <-p.Done():
		t.Fatal("the stranger was hurt")
	default:
	}

	// The signal must find the trap set; the loop sets it before its first sleep.
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	e := waitExit(t, p)
	switch {
	case e.Known && e.Signal == syscall.SIGTERM:
		t.Log("the trap was not set yet")
	case e.Known && e.Code != 5:
		t.Errorf("got %s, want exit status 5", e)
	case !e.Known:
		t.Log("this kernel does not tell the exit status of others' children, or init is slow")
	}
	if err := p.Signal(0); !errors.Is(err, ErrGone) {
		t.Errorf("signal after the end: %v", err)
	}
	if _, err := Open(id); !errors.Is(err, ErrGone) {
		t.Errorf("open after the end: %v", err)
	}
}

func TestFind(t *testing.T) {
	marker := "mvirt-test-" + strconv.Itoa(os.Getpid()) + "-"
	p := sh(t, "sleep 60; :", marker+"one")
	var got []Found
	var err error
	// The shell's child has the shell's arguments until it is the sleep.
	for end := time.Now().Add(30 * time.Second); len(got) != 1 && time.Now().Before(end); {
		if got, err = Find(uint32(os.Getuid()), marker); err != nil {
			t.Fatal(err)
		}
	}
	if len(got) != 1 || got[0].Identity != p.Identity() || got[0].Arg != marker+"one" {
		t.Errorf("got %+v, want %+v", got, p.Identity())
	}
	if got, err := Find(uint32(os.Getuid())+1, marker); err != nil || len(got) != 0 {
		t.Errorf("another user's: %+v, %v", got, err)
	}
}

func TestParseStat(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21"
	for _, c := range []struct {
		in   string
		want uint64
		ok   bool
	}{
		{"12 (sh)" + tail, 4242, true},
		{"12 (a) b (c d)" + tail, 4242, true},
		{"12 (sh) S 1 2", 0, false},
		{"", 0, false},
		{"12 (sh)" + strings.Replace(tail, "4242", "x", 1), 0, false},
	} {
		got, _, err := parseStat([]byte(c.in))
		if (err == nil) != c.ok || c.ok && got != c.want {
			t.Errorf("%q: %d, %v", c.in, got, err)
		}
	}
}
