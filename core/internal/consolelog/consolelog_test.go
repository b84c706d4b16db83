package consolelog

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/core/internal/fake"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLines(t *testing.T) {
	cases := map[string][]string{
		"a\nb\r\n\n  c  \n":                     {"a", "b", "  c"},
		"\x1b[31mred\x1b[0m\n":                  {"red"},
		"\x1b]0;title\x07text\n":                {"text"},
		"\x1b]0;title\x1b\\text\n":              {"text"},
		"\x1b[3\nnext\n":                        {"next"},
		"\x1b]never ends\nnext\n":               {"next"},
		"\x1b(Bplain\n":                         {"plain"},
		"typo\b\b\b\bfixed\n":                   {"fixed"},
		"\b\bx\n":                               {"x"},
		"bad \xff\xfe utf8\n":                   {"bad \ufffd utf8"},
		"no end":                                {"no end"},
		strings.Repeat("x", 2*maxLine+1) + "\n": {strings.Repeat("x", maxLine), strings.Repeat("x", maxLine), "x"},
		"\x00\x01\x02\x7f\n":                    nil,
	}
	for in, want := range cases {
		for _, size := range []int{1, 3, len(in)} { // however it arrives
			var got []string
			l := &lines{emit: func(s string) { got = append(got, s) }}
			for b := []byte(in); len(b) > 0; b = b[min(size, len(b)):] {
				l.write(b[:min(size, len(b))])
			}
			l.end()
			if !slices.Equal(got, want) {
				t.Errorf("%.40q in pieces of %d: %.80q, want %.80q", in, size, got, want)
			}
		}
	}
}

func FuzzLines(f *testing.F) {
	f.Add([]byte("\x1b[31mred\x1b[0m\n\x1b]0;t\x07"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := &lines{emit: func(s string) {
			if s == "" || len(s) > 3*maxLine || !utf8.ValidString(s) || strings.ContainsAny(s, "\n\x1b\x00\x07\b") {
				t.Fatalf("line %q", s)
			}
		}}
		l.write(b)
		l.end()
	})
}

func TestCollector(t *testing.T) {
	w := fake.New()
	ctx, cancel := context.WithCancel(t.Context())
	vm, err := w.VMM().Create(ctx, vmm.CreateRequest{ID: "01900000-0000-7000-8000-000000000001", Spec: vmm.Spec{Name: "web"}})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan log.Entry, 10)
	c := New(w.VMM(), func(e log.Entry) { got <- e })
	c.Saw(ctx, vm) // stopped: nothing to read
	vm.State = vmm.StateRunning
	var wg sync.WaitGroup
	for range 3 { // however often it is seen, it is followed once
		wg.Go(func() { c.Saw(ctx, vm) })
	}
	wg.Wait()
	select {
	case e := <-got:
		if e.Message != "hello" || e.Component != "console" || !slices.Equal(e.Objects, []string{vm.ID}) {
			t.Errorf("%+v", e)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nothing was read")
	}
	cancel()
	c.Wait()
	if len(got) > 0 {
		t.Errorf("followed more than once: %v", <-got)
	}
}
