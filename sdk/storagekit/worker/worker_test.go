package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storagekit/image"
)

// TestMain is also the worker, and workers that misbehave: MISBEHAVE is in the environment of the test alone,
// the worker's environment is empty but for it.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case Name:
			os.Exit(Main(nil))
		case "probe":
			os.Exit(probe())
		}
	}
	os.Exit(m.Run())
}

// probe confines itself and prints what it still can do.
func probe() int {
	ready, _ := os.Open("/dev/null")
	if err := confine(); err != nil {
		fmt.Println("confine:", err)
		return 1
	}
	try := func(what string, err error) {
		if !errors.Is(err, unix.EPERM) {
			fmt.Printf("%s: %v\n", what, err)
		}
	}
	_, err := os.Open("/etc/passwd")
	try("open", err)
	_, err = os.Create("/tmp/mvirt-probe")
	try("create", err)
	try("unlink", os.Remove("/tmp/mvirt-probe"))
	_, err = net.Dial("tcp", "127.0.0.1:1")
	try("tcp", err)
	_, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	try("unix socket", err)
	try("exec", syscall.Exec("/bin/true", []string{"true"}, nil))
	try("fork and exec", exec.Command("/bin/true").Run())
	try("setuid", syscall.Setuid(1))
	try("kill", unix.Kill(1, 0))
	try("ptrace", unix.PtraceAttach(1))
	try("unshare", unix.Unshare(unix.CLONE_NEWUSER))
	try("mount", unix.Mount("none", "/", "tmpfs", 0, ""))
	try("chmod", ready.Chmod(0o777))
	_, err = unix.IoctlGetInt(int(ready.Fd()), unix.TIOCOUTQ)
	try("ioctl", err)
	_, _, no := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWUSER|unix.CLONE_NEWNET, 0, 0, 0, 0, 0)
	try("clone into a namespace", no)
	_, _, no = unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
	try("io_uring", no)
	// All threads, not only the one that asked.
	results := make(chan error)
	for range 50 {
		go func() {
			_, err := os.Open("/etc/passwd")
			results <- err
		}()
	}
	for range 50 {
		try("open in another thread", <-results)
	}
	status, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if status != 1 {
		fmt.Println("no_new_privs:", status, err)
	}
	fmt.Println("done")
	return 0
}

func TestConfined(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "probe")
	if os.Geteuid() == 0 {
		t.Log("the probe runs as root: what is denied is denied by the filter")
	}
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "done\n" {
		t.Errorf("%v\n%s", err, out)
	}
}

// job is a conversion of content into a file.
func job(t *testing.T, content []byte) (Job, *os.File) {
	t.Helper()
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	if err := os.WriteFile(src, content, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(name string) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	dst := open("dst")
	as, err := LookupIdentity("nobody")
	if err != nil {
		t.Fatal(err)
	}
	return Job{As: as, Source: open("src"), Length: int64(len(content)), Whole: true, Hint: int64(len(content)), Scratch: open("scratch"),
		Limits:   image.Limits{MaxVirtualSize: 1 << 30, MaxScratch: 1 << 30, Writers: 2},
		Target:   func(string, int64) (*os.File, int64, bool, error) { return dst, 0, false, nil },
		Grow:     func(int64) (int64, error) { return 0, errors.New("not a device") },
		Progress: func(int64, int64, int64) {},
	}, dst
}

func TestRun(t *testing.T) {
	content := bytes.Repeat([]byte("some bytes of a disk "), 50000)
	j, dst := job(t, content)
	res, err := Run(t.Context(), j)
	if err != nil {
		t.Fatal(err)
	}
	got, _ := os.ReadFile(dst.Name())
	if res.Size != int64(len(content)+511)&^511 || !bytes.Equal(got[:len(content)], content) || int64(len(got)) != res.Size {
		t.Errorf("%+v, %d bytes", res, len(got))
	}
}

// TestDevice: a target that cannot grow by itself is grown by the plugin.
func TestDevice(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	j, dst := job(t, content)
	size, grown := int64(1<<20), 0
	j.Target = func(_ string, want int64) (*os.File, int64, bool, error) { return dst, size, true, dst.Truncate(size) }
	j.Grow = func(want int64) (int64, error) {
		grown++
		size = want + 1<<20
		return size, nil
	}
	res, err := Run(t.Context(), j)
	if err != nil || grown == 0 || res.Size != int64(len(content)) {
		t.Errorf("%+v, %v, grown %d times", res, err, grown)
	}
	j, _ = job(t, content)
	j.Target = func(string, int64) (*os.File, int64, bool, error) { return dst, 1 << 20, true, nil }
	j.Grow = func(int64) (int64, error) { return 0, errs.New(errs.Exhausted, "the pool is full") }
	if _, err := Run(t.Context(), j); !errors.Is(err, errs.Exhausted) {
		t.Errorf("got %v", err)
	}
	j.Target = func(string, int64) (*os.File, int64, bool, error) {
		return nil, 0, false, errs.New(errs.Exhausted, "no target")
	}
	if _, err := Run(t.Context(), j); !errors.Is(err, errs.Exhausted) {
		t.Errorf("got %v", err)
	}
}

func TestCancel(t *testing.T) {
	j, _ := job(t, bytes.Repeat([]byte("x"), 1<<20))
	j.Whole = false // waits for more
	j.Arrived = make(chan Arrival)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := Run(ctx, j); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

// TestMemoryBomb: an xz header that asks for 4 GiB of dictionary ends the worker, not the host.
func TestMemoryBomb(t *testing.T) {
	if _, err := exec.LookPath("xz"); err != nil {
		t.Skip("xz is not installed")
	}
	cmd := exec.Command("xz", "-c", "--lzma2=preset=0,dict=1536MiB")
	cmd.Stdin = strings.NewReader("small")
	img, err := cmd.Output()
	if err != nil {
		t.Skipf("xz cannot make the image here: %v", err)
	}
	j, _ := job(t, img)
	_, err = Run(t.Context(), j)
	if !errors.Is(err, errs.Invalid) || errs.RemedyOf(err) == "" {
		t.Errorf("got %v, remedy %q", err, errs.RemedyOf(err))
	}
}

func TestPeerMisbehaves(t *testing.T) {
	for name, packets := range map[string][]string{
		"garbage":         {"not json"},
		"unknown":         {`{"kind":"hello"}`},
		"done too early":  {`{"kind":"done","size":512}`},
		"grow too early":  {`{"kind":"grow","size":512}`},
		"two formats":     {`{"kind":"format","format":"raw","size":512}`, `{"kind":"format","format":"raw","size":512}`},
		"huge":            {`{"kind":"format","format":"raw","size":4611686018427387904}`},
		"huge grow":       {`{"kind":"format","format":"raw","size":512}`, `{"kind":"grow","size":4611686018427387904}`},
		"odd result":      {`{"kind":"format","format":"raw","size":512}`, `{"kind":"done","size":511}`},
		"negative result": {`{"kind":"format","format":"raw","size":512}`, `{"kind":"done","size":-512}`},
		"wordless error":  {`{"kind":"error"}`},
		"silent death":    {},
	} {
		t.Run(name, func(t *testing.T) {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			ours, err := newControl(os.NewFile(uintptr(pair[0]), "a"))
			if err != nil {
				t.Fatal(err)
			}
			defer ours.conn.Close()
			theirs, err := newControl(os.NewFile(uintptr(pair[1]), "b"))
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				defer theirs.conn.Close()
				theirs.receive(false)
				for _, p := range packets {
					theirs.conn.Write([]byte(p))
				}
			}()
			j, _ := job(t, []byte("x"))
			p := &parent{job: j, ctl: ours}
			if res, err := p.serve(); err == nil {
				t.Errorf("accepted: %+v", res)
			}
		})
	}
}
