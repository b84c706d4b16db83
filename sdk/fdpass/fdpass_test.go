package fdpass

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var me = uint32(os.Getuid())

func serve(t *testing.T, check func(Peer) error) (*Table, string) {
	t.Helper()
	table := NewTable()
	path := filepath.Join(t.TempDir(), "fd")
	s, err := Serve(path, table, check)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		table.Close()
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket is left behind")
		}
	})
	return table, path
}

func file(t *testing.T, text string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f
}

func read(t *testing.T, f *os.File) string {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// fds is how many descriptors this process has: what a test must leave as it was.
func fds(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// settled waits until the server's goroutines have closed what they had, and says how many are open.
func settled(t *testing.T, want int) int {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
		if n := fds(t); n == want || time.Now().After(end) {
			return n
		}
	}
}

func TestDepositAndTake(t *testing.T) {
	table, path := serve(t, nil)
	a, b := file(t, "one"), file(t, "two")
	before := fds(t)
	token, err := Deposit(t.Context(), path, nil, a, nil, b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := table.Take(me+1, token); errs.KindOf(err) != errs.Invalid {
		t.Errorf("another uid took them: %v", err)
	}
	got, err := table.Take(me, token)
	if err != nil || len(got) != 2 || read(t, got[0]) != "one" || read(t, got[1]) != "two" {
		t.Fatalf("%v %v", got, err)
	}
	for _, f := range got {
		sc, _ := f.SyscallConn()
		sc.Control(func(fd uintptr) {
			if fl, _ := unix.FcntlInt(fd, unix.F_GETFD, 0); fl&unix.FD_CLOEXEC == 0 {
				t.Error("not close-on-exec")
			}
		})
	}
	closeAll(got)
	if _, err := table.Take(me, token); errs.KindOf(err) != errs.Invalid || errs.RemedyOf(err) == "" {
		t.Errorf("a token worked twice: %v", err)
	}
	if n := settled(t, before); n != before {
		t.Errorf("%d descriptors, were %d", n, before)
	}
	a.Write([]byte("!")) // ours is still open and usable
	if read(t, a) != "one!" {
		t.Error("the depositor's file changed hands")
	}
}

func TestOfferAndFetch(t *testing.T) {
	table, path := serve(t, nil)
	f := file(t, "offered")
	token, err := table.Put(me, f, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Fetch(t.Context(), path, nil, token)
	if err != nil || len(got) != 1 || read(t, got[0]) != "offered" {
		t.Fatalf("%v %v", got, err)
	}
	closeAll(got)
	if _, err := Fetch(t.Context(), path, nil, token); errs.KindOf(err) != errs.Invalid {
		t.Errorf("a token worked twice: %v", err)
	}
	other, err := table.Put(me+1, f)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Fetch(t.Context(), path, nil, other); errs.KindOf(err) != errs.Invalid {
		t.Errorf("fetched what was offered to another uid: %v", err)
	}
}

func TestNothing(t *testing.T) {
	table, path := serve(t, nil)
	if token, err := Deposit(t.Context(), path, nil, nil, nil); token != "" || err != nil {
		t.Error(token, err)
	}
	if token, err := table.Put(me); token != "" || err != nil {
		t.Error(token, err)
	}
	if got, err := table.Take(me, ""); got != nil || err != nil {
		t.Error(got, err)
	}
	if got, err := Fetch(t.Context(), path, nil, ""); got != nil || err != nil {
		t.Error(got, err)
	}
}

func TestUnclaimedAreClosed(t *testing.T) {
	now := time.Unix(1000, 0)
	table := NewTable()
	table.now = func() time.Time { return now }
	f := file(t, "x")
	before := fds(t)
	token, err := table.Put(me, f)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(keep)
	table.Sweep()
	if fds(t) != before+1 {
		t.Error("closed too early")
	}
	now = now.Add(time.Nanosecond)
	table.Sweep()
	if fds(t) != before {
		t.Error("not closed in time")
	}
	if _, err := table.Take(me, token); errs.KindOf(err) != errs.Invalid {
		t.Errorf("an expired token worked: %v", err)
	}
}

func TestLimits(t *testing.T) {
	table, path := serve(t, nil)
	f := file(t, "x")
	var many []*os.File
	for range MaxFiles {
		many = append(many, f)
	}
	if _, err := Deposit(t.Context(), path, nil, append(many, f)...); errs.KindOf(err) != errs.Invalid {
		t.Errorf("more than MaxFiles: %v", err)
	}
	before := fds(t)
	for range maxMine / MaxFiles {
		if _, err := Deposit(t.Context(), path, nil, many...); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Deposit(t.Context(), path, nil, f); err == nil || !strings.Contains(err.Error(), "wait to be claimed") {
		t.Errorf("over the limit of one uid: %v", err)
	}
	if _, err := table.Put(me+1, f); err != nil {
		t.Errorf("another uid suffers: %v", err)
	}
	for i := uint32(2); table.count < maxHeld; i++ {
		if _, err := table.Put(me+i, many...); errs.KindOf(err) == errs.Exhausted {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if table.count > maxHeld {
		t.Errorf("%d held", table.count)
	}
	table.Close()
	if n := settled(t, before); n != before {
		t.Errorf("%d descriptors, were %d", n, before)
	}
	if table.count != 0 || len(table.byUID) != 0 {
		t.Errorf("count %d %v", table.count, table.byUID)
	}
}

func TestChecks(t *testing.T) {
	refuse := func(Peer) error { return errors.New("not you") }
	_, path := serve(t, refuse)
	if _, err := Deposit(t.Context(), path, nil, file(t, "x")); err == nil || !strings.Contains(err.Error(), "not you") {
		t.Errorf("server's check: %v", err)
	}
	_, path = serve(t, nil)
	if _, err := Deposit(t.Context(), path, refuse, file(t, "x")); err == nil || !strings.Contains(err.Error(), "not you") {
		t.Errorf("client's check: %v", err)
	}
	peers := make(chan Peer, 1)
	_, path = serve(t, func(p Peer) error { peers <- p; return nil })
	if _, err := Deposit(t.Context(), path, nil, file(t, "x")); err != nil {
		t.Error(err)
	}
	if seen := <-peers; seen.PID != int32(os.Getpid()) || seen.UID != me {
		t.Errorf("peer %+v", seen)
	}
}

func TestNobodyThere(t *testing.T) {
	_, err := Deposit(t.Context(), filepath.Join(t.TempDir(), "none"), nil, file(t, "x"))
	if errs.KindOf(err) != errs.Unavailable {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, path := serve(t, nil)
	if _, err := Fetch(ctx, path, nil, strings.Repeat("0", tokenLen)); err == nil {
		t.Error("a cancelled fetch went on")
	}
}

// TestHostilePackets sends what no client sends; the server answers or hangs up, keeps no descriptor, and
// serves the next.
func TestHostilePackets(t *testing.T) {
	table, path := serve(t, nil)
	f := file(t, "x")
	fd := int(f.Fd())
	rights := func(n int) []byte {
		list := make([]int, n)
		for i := range list {
			list[i] = fd
		}
		return unix.UnixRights(list...)
	}
	before := fds(t)
	for name, c := range map[string]struct{ msg, oob []byte }{
		"empty":                 {nil, nil},
		"unknown verb":          {[]byte("X"), nil},
		"unknown with files":    {[]byte("X"), rights(3)},
		"deposit of nothing":    {[]byte("D"), nil},
		"deposit with text":     {[]byte("Dxyz"), rights(1)},
		"too many":              {[]byte("D"), rights(MaxFiles + 1)},
		"very many":             {[]byte("D"), rights(250)},
		"long text":             {make([]byte, 100_000), rights(2)},
		"fetch, short token":    {[]byte("F0123"), nil},
		"fetch, unknown token":  {[]byte("F" + strings.Repeat("z", tokenLen)), nil},
		"fetch with files":      {[]byte("F" + strings.Repeat("0", tokenLen)), rights(1)},
		"credentials, no files": {[]byte("D"), unix.UnixCredentials(&unix.Ucred{Pid: int32(os.Getpid()), Uid: me, Gid: uint32(os.Getgid())})},
	} {
		t.Run(name, func(t *testing.T) {
			c0, err := net.Dial("unixpacket", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c0.Close()
			u := c0.(*net.UnixConn)
			u.SetDeadline(time.Now().Add(10 * time.Second))
			if len(c.msg) > 0 || len(c.oob) > 0 {
				if _, _, err := u.WriteMsgUnix(c.msg, c.oob, nil); err != nil {
					t.Logf("the kernel refused to send: %v", err)
					return
				}
			} else {
				u.CloseWrite()
			}
			buf := make([]byte, 600)
			n, err := u.Read(buf)
			if err == nil && n > 0 && buf[0] != 'E' {
				t.Errorf("answer %q", buf[:n])
			}
		})
	}
	if _, err := Deposit(t.Context(), path, nil, f); err != nil {
		t.Errorf("after all that: %v", err)
	}
	table.Close()
	if n := settled(t, before); n != before {
		t.Errorf("%d descriptors, were %d", n, before)
	}
}

// TestHostileServer answers a client with what no server sends.
func TestHostileServer(t *testing.T) {
	f := file(t, "x")
	fd := int(f.Fd())
	for name, reply := range map[string][]byte{"nothing": nil, "junk": []byte("junk"), "short token": []byte("T01"), "files for a deposit": []byte("O"),
		"long": make([]byte, 2000), "error": []byte("Eno"), "empty error": []byte("E")} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			before := fds(t)
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() {
					c, err := ln.AcceptUnix()
					if err != nil {
						return
					}
					defer c.Close()
					_, files, _ := receive(c)
					closeAll(files)
					if reply != nil {
						c.WriteMsgUnix(reply, unix.UnixRights(fd, fd), nil)
					}
				})
			}
			if _, err := Deposit(t.Context(), path, nil, f); err == nil {
				t.Error("a deposit took it")
			}
			got, err := Fetch(t.Context(), path, nil, strings.Repeat("0", tokenLen))
			if name != "files for a deposit" && err == nil {
				t.Error("a fetch took it")
			}
			closeAll(got)
			wg.Wait()
			if n := settled(t, before); n != before {
				t.Errorf("%d descriptors, were %d", n, before)
			}
		})
	}
}

// TestIdleConnections holds that one uid's idle connections leave room for others; here there is one uid only,
// so what is seen is that it is turned away and then let in again.
func TestIdleConnections(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fd")
	s, err := Serve(path, NewTable(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	defer s.table.Close()
	own := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.own[me]
	}
	var idle []net.Conn
	for range maxOwn {
		c, err := net.Dial("unixpacket", path)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	for own() < maxOwn {
		runtime.Gosched()
	}
	_, err = Deposit(t.Context(), path, nil, file(t, "x"))
	if err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("%v", err)
	}
	for _, c := range idle {
		c.Close()
	}
	for own() > 0 {
		runtime.Gosched()
	}
	if _, err = Deposit(t.Context(), path, nil, file(t, "x")); err != nil {
		t.Errorf("after they left: %v", err)
	}
}

func TestConcurrent(t *testing.T) {
	table, path := serve(t, nil)
	var wg sync.WaitGroup
	files := make([]*os.File, 8)
	for i := range files {
		files[i] = file(t, fmt.Sprint(i))
	}
	before := fds(t)
	for i, f := range files {
		wg.Go(func() {
			for range 50 {
				token, err := Deposit(t.Context(), path, nil, f)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := table.Take(me, token)
				if err != nil || len(got) != 1 || read(t, got[0]) != fmt.Sprint(i) {
					t.Errorf("%d: %v %v", i, got, err)
				}
				closeAll(got)
			}
		})
	}
	wg.Wait()
	if n := settled(t, before); n != before {
		t.Errorf("%d descriptors, want %d", n, before)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{})
	f.Add(unix.UnixCredentials(&unix.Ucred{}))
	f.Add([]byte{16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0})
	f.Fuzz(func(t *testing.T, oob []byte) {
		// A control message that names descriptors would make parse take over whatever has that number here.
		if msgs, err := unix.ParseSocketControlMessage(oob); err == nil {
			for i := range msgs {
				if msgs[i].Header.Type == unix.SCM_RIGHTS {
					return
				}
			}
		}
		files, _ := parse(oob, true)
		if len(files) > 0 {
			t.Errorf("%d files of nothing", len(files))
		}
	})
}

// TestPackets: a packet arrives whole with its descriptors; one that is too long or has too many of them is refused and
// leaks none; the end is told.
func TestPackets(t *testing.T) {
	fa, fb, err := PacketPair("a", "b")
	if err != nil {
		t.Fatal(err)
	}
	defer fb.Close()
	a, b := Packets{File: fa}, Packets{File: fb, MaxBytes: 8, MaxFiles: 2}
	before := fds(t)
	text := file(t, "text")
	if err := a.Send([]byte("12345678"), text, text); err != nil {
		t.Fatal(err)
	}
	got, files, err := b.Receive()
	if err != nil || string(got) != "12345678" || len(files) != 2 || read(t, files[0]) != "text" {
		t.Fatalf("%q, %d files, %v", got, len(files), err)
	}
	closeAll(files)
	for _, bad := range []struct {
		b     string
		files []*os.File
		want  error
	}{{"123456789", []*os.File{text}, ErrTooLong}, {"1", []*os.File{text, text, text}, ErrTooLong}, {"1", slices.Repeat([]*os.File{text}, 200), ErrTooLong}} {
		if err := a.Send([]byte(bad.b), bad.files...); err != nil {
			t.Fatal(err)
		}
		got, files, err := b.Receive()
		if !errors.Is(err, bad.want) || got != nil || files != nil {
			t.Errorf("%q with %d files: %q, %d files, %v", bad.b, len(bad.files), got, len(files), err)
		}
	}
	text.Close()
	if now := settled(t, before); now != before {
		t.Errorf("%d descriptors, before %d", now, before)
	}
	fa.Close()
	if got, files, err := b.Receive(); got != nil || files != nil || err != nil {
		t.Errorf("at the end: %q, %v, %v", got, files, err)
	}
}
