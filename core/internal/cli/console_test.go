package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/core/apiv1"
)

// guest is the other side of a console: it prints a greeting, then echoes in capitals what is typed.
type guest struct {
	f     *fake
	mu    sync.Mutex
	open  *apiv1.ConsoleOpen
	typed bytes.Buffer
	eof   bool
}

func newGuest(f *fake, ended string) *guest {
	g := &guest{f: f}
	f.stream["VMs.Console"] = func(ss grpc.ServerStream) error {
		var first apiv1.ConsoleInput
		if err := ss.RecvMsg(&first); err != nil {
			return err
		}
		g.mu.Lock()
		g.open = first.GetOpen()
		g.mu.Unlock()
		send := func(o *apiv1.ConsoleOutput) { _ = ss.SendMsg(o) }
		send(&apiv1.ConsoleOutput{Opened: true})
		send(&apiv1.ConsoleOutput{Data: []byte("hello\r\n")})
		if first.GetOpen().GetNoFollow() {
			return nil
		}
		for {
			var m apiv1.ConsoleInput
			err := ss.RecvMsg(&m)
			if errors.Is(err, io.EOF) {
				g.mu.Lock()
				g.eof = true
				g.mu.Unlock()
				if ended != "" {
					send(&apiv1.ConsoleOutput{Ended: ended})
					return nil
				}
				<-ss.Context().Done()
				return ss.Context().Err()
			}
			if err != nil {
				return err
			}
			g.mu.Lock()
			g.typed.Write(m.GetData())
			g.mu.Unlock()
			send(&apiv1.ConsoleOutput{Data: bytes.ToUpper(m.GetData())})
		}
	}
	return g
}

func TestConsoleInAPipe(t *testing.T) {
	f := world(t)
	g := newGuest(f, "the VM stopped")
	r := f.run(t, "typed\x1d more", "vm", "console", "web", "--replay", "4K").ok(t)
	// In a pipe no byte is a command to us, and the end of the input is no reason to leave.
	if r.out != "hello\r\nTYPED\x1d MORE" || !strings.Contains(r.err, "console ended: the VM stopped") || !g.eof || g.open.GetReplay() != 4096 {
		t.Errorf("%+v, eof %v, open %v", r, g.eof, g.open)
	}
}

func TestConsoleUntil(t *testing.T) {
	f := world(t)
	newGuest(f, "")
	if r := f.run(t, "abc", "vm", "console", "web", "--until", "\nABC").ok(t); !strings.HasSuffix(r.out, "ABC") {
		t.Errorf("%+v", r)
	}
	r := f.run(t, "", "vm", "console", "web", "--until", "never", "--timeout", "50ms")
	if r.code != exitDeadline || r.out != "hello\r\n" || !strings.Contains(r.err, "to do: ") {
		t.Errorf("%+v", r)
	}
	f.run(t, "", "vm", "console", "web", "--timeout", "50ms").ok(t) // without --until there is nothing to miss
	newGuest(f, "the VM stopped")
	if r := f.run(t, "", "vm", "console", "web", "--until", "never"); r.code != exitPrecondition {
		t.Errorf("%+v", r)
	}
}

func TestConsoleLog(t *testing.T) {
	f := world(t)
	g := newGuest(f, "")
	r := f.run(t, "must not be typed", "vm", "console", "web", "--log").ok(t)
	if r.out != "hello\r\n" || r.err != "" || !g.open.GetNoFollow() || !g.open.GetReadOnly() || g.open.GetReplay() != replayAll || g.typed.Len() > 0 {
		t.Errorf("%+v %v", r, g.open)
	}
	f.run(t, "", "vm", "console", "web", "--steal", "--timeout", "20ms").ok(t)
	if !g.open.GetSteal() || g.open.GetReadOnly() {
		t.Errorf("%v", g.open)
	}
}

// pty opens a pseudo terminal: the side of the person, and the side of the program.
func pty(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return person, program
}

// screen collects what a terminal shows and waits for texts.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func watch(r io.Reader) *screen {
	s := &screen{more: make(chan struct{}, 1)}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			s.mu.Lock()
			s.text.Write(buf[:n])
			s.mu.Unlock()
			select {
			case s.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *screen) wait(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		s.mu.Lock()
		found, all := strings.Contains(s.text.String(), text), s.text.String()
		s.mu.Unlock()
		if found {
			return
		}
		select {
		case <-s.more:
		case <-deadline:
			t.Fatalf("the terminal never showed %q, but %q", text, all)
		}
	}
}

// TestConsoleOnATerminal types on a pseudo terminal: raw mode passes Ctrl-C to the guest, the escape key
// leaves, a change of the window's size does no harm, and the terminal is as it was.
func TestConsoleOnATerminal(t *testing.T) {
	for name, leave := range map[string]func(*testing.T, *os.File, context.CancelFunc){
		"escape": func(t *testing.T, p *os.File, _ context.CancelFunc) {
			if _, err := p.WriteString("\x1d"); err != nil {
				t.Fatal(err)
			}
		},
		"signal": func(_ *testing.T, _ *os.File, cancel context.CancelFunc) { cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			f := world(t)
			g := newGuest(f, "")
			person, program := pty(t)
			before, err := term.GetState(int(program.Fd()))
			if err != nil {
				t.Fatal(err)
			}
			shown := watch(person)
			std := Std{In: program, Out: program, Err: program, Now: time.Now, Env: func(string) string { return "" }}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			code := make(chan int, 1)
			go func() { code <- Main(ctx, []string{"vm", "console", "web", "--socket", f.socket}, std) }()
			shown.wait(t, "[console of web; Ctrl-] leaves]")
			shown.wait(t, "hello")
			if _, err := person.WriteString("ab\x03c"); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(os.Getpid(), syscall.SIGWINCH); err != nil {
				t.Fatal(err)
			}
			shown.wait(t, "AB\x03C")
			leave(t, person, cancel)
			select {
			case got := <-code:
				if want := map[string]int{"escape": exitOK, "signal": exitInterrupted}[name]; got != want {
					t.Errorf("exit code %d, want %d", got, want)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("it does not leave")
			}
			after, err := term.GetState(int(program.Fd()))
			if err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("the terminal is not as it was: %v, %v", after, err)
			}
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.typed.String() != "ab\x03c" {
				t.Errorf("typed %q", g.typed.String())
			}
		})
	}
}
