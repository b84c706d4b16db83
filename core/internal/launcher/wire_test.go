package launcher

import (
	"errors"
	"io"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/service"
)

func samples() []*message {
	return []*message{
		{Type: msgStart, Seq: 7, Kind: 2},
		{Type: msgSignal, Launch: 9, Signal: 15},
		{Type: msgReady},
		{Type: msgStarted, Seq: 7, Launch: 1, PID: 4242, UID: 4001, Dir: "/run/mvirt/p/vmm-1"},
		{Type: msgFailed, Seq: 7, ErrKind: 4, Reason: "BINARY_MISSING", Text: "ünïcode", Remedy: "x"},
		{Type: msgExited, Launch: 1, Code: 255, Signal: 9, At: 1 << 60},
		{Type: msgStop},
	}
}

func TestWireRoundTrip(t *testing.T) {
	for _, m := range samples() {
		b := encodeMessage(m)
		got, err := decodeMessage(b)
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%+v became %+v, %v", m, got, err)
		}
		for n := range b {
			if _, err := decodeMessage(b[:n]); err == nil {
				t.Errorf("type %d cut to %d of %d bytes is accepted", m.Type, n, len(b))
			}
		}
		if _, err := decodeMessage(append(b, 0)); err == nil {
			t.Errorf("type %d with a byte too many is accepted", m.Type)
		}
	}
	long := &message{Type: msgFailed, Text: strings.Repeat("x", 1<<20)}
	if got, err := decodeMessage(encodeMessage(long)); err != nil || len(got.Text) != maxText {
		t.Errorf("a long text is not cut but fails: %v", err)
	}
}

func TestKindsOnTheWire(t *testing.T) {
	for _, k := range service.Kinds() {
		if kindOf(kindNumber(k)) != k {
			t.Errorf("%s does not come back", k)
		}
	}
	for _, n := range []uint8{0, 5, 255} {
		if k := kindOf(n); k != "" {
			t.Errorf("%d is %q", n, k)
		}
	}
}

func TestErrorsOverTheWire(t *testing.T) {
	in := errs.New(errs.Precondition, "no %s", "x").Because("BINARY_MISSING").Do("install it")
	out := failureOf(failure(3, in))
	if errs.KindOf(out) != errs.Precondition || errs.ReasonOf(out) != "BINARY_MISSING" || errs.RemedyOf(out) != "install it" || out.Error() != "no x" {
		t.Errorf("%#v", out)
	}
}

func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		f.Add(encodeMessage(m))
	}
	f.Add([]byte{1, 5, 0, 0, 0, 1, 1, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMessage(b)
		if err != nil {
			return
		}
		again, err := decodeMessage(encodeMessage(m))
		if err != nil || !reflect.DeepEqual(again, m) {
			t.Fatalf("%+v does not survive: %+v %v", m, again, err)
		}
	})
}

func TestConnCarriesDescriptors(t *testing.T) {
	a, b, err := newConnPair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := (conn{a}).send(&message{Type: msgStarted, Seq: 1}, r); err != nil {
		t.Fatal(err)
	}
	r.Close()
	m, files, err := conn{b}.recv()
	if err != nil || m.Seq != 1 || len(files) != 1 {
		t.Fatalf("%+v %v %v", m, files, err)
	}
	// A deadline works only on a descriptor that the poller knows: a reader must never hang for good.
	if err := files[0].SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatalf("deadline: %v", err)
	}
	if _, err := files[0].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read: %v", err)
	}
	_ = files[0].SetReadDeadline(time.Time{})
	if fl, _ := unix.FcntlInt(files[0].Fd(), unix.F_GETFD, 0); fl&unix.FD_CLOEXEC == 0 {
		t.Error("a received descriptor would be inherited")
	}
	w.WriteString("hello")
	w.Close()
	if got, _ := io.ReadAll(files[0]); string(got) != "hello" {
		t.Errorf("%q", got)
	}
	files[0].Close()

	a.Close()
	if m, _, err := (conn{b}).recv(); m != nil || err != nil {
		t.Errorf("at the end: %v %v", m, err)
	}
	b.Close()
}

func TestConnRefusesWhatIsMalformed(t *testing.T) {
	a, b, err := newConnPair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	for _, bad := range [][]byte{{9, 9}, {1}, {1, 99}, make([]byte, maxMessage+10)} {
		r, w, _ := os.Pipe()
		raw, _ := a.SyscallConn()
		raw.Control(func(fd uintptr) {
			err = unix.Sendmsg(int(fd), bad, unix.UnixRights(int(r.Fd())), nil, 0)
		})
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		if m, files, err := (conn{b}).recv(); err == nil {
			t.Errorf("%v: accepted as %+v with %d files", bad[:2], m, len(files))
		}
		// The descriptor that came along must not be left open: writing finds no reader.
		if _, err := w.Write([]byte{1}); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("a descriptor leaked: %v", err)
		}
		w.Close()
	}
}
