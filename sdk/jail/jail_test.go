package jail

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

const vmID = "01a20ed0-54b2-7d80-b33c-f885989fed9a"

var goodRequests = []string{
	`{"Seq":1,"Verb":"identity","VM":"` + vmID + `"}`,
	`{"Seq":2,"Verb":"forget","VM":"` + vmID + `"}`,
	`{"Seq":3,"Verb":"list"}`,
	`{"Seq":4,"Verb":"start","VM":"` + vmID + `","Start":{"Program":"/usr/bin/true","Name":"","Args":["-x"],"Dir":"/var/x","Files":["/boot/k"],"Paths":[{"Kind":"disk","Name":"root","Path":"/dev/zd0","ReadOnly":true}],"MemoryBytes":1,"CPUs":1}}`,
	`{"Seq":5,"Verb":"signal","VM":"` + vmID + `","Process":{"PID":77,"StartTime":5},"Signal":9}`,
	`{"Seq":6,"Verb":"exit","VM":"` + vmID + `","Process":{"PID":77,"StartTime":5}}`,
	`{"Seq":7,"Verb":"reach","VM":"` + vmID + `","Process":{"PID":77,"StartTime":5},"Path":{"Kind":"socket","Name":"n","Path":"/run/x/s","ReadOnly":false}}`,
	`{"Seq":8,"Verb":"unreach","VM":"` + vmID + `","Process":{"PID":77,"StartTime":5},"Path":{"Kind":"disk","Name":"n","Path":"","ReadOnly":false}}`,
	`{"Seq":9,"Verb":"worker","Worker":{"Name":"packet-worker","Args":["--network","x"],"Env":["A=b"]}}`,
	`{"Seq":10,"Verb":"end-worker","Process":{"PID":77,"StartTime":5}}`,
}

var badRequests = []string{
	``, `{`, `null`, `[]`, `{"Verb":"shell"}`, `{"Verb":"list"} {"Verb":"list"}`, `{"Verb":"list","Extra":1}`, `{"Verb":"list","VM":"` + vmID + `"}`,
	`{"Verb":"identity"}`, `{"Verb":"identity","VM":"../../etc"}`, `{"Verb":"identity","VM":"` + vmID + `","Signal":9}`,
	`{"Verb":"signal","VM":"` + vmID + `","Process":{"PID":1,"StartTime":0},"Signal":9}`, `{"Verb":"signal","VM":"` + vmID + `","Process":{"PID":-7},"Signal":9}`,
	`{"Verb":"reach","VM":"` + vmID + `","Process":{"PID":77},"Path":{"Kind":"disk","Name":"../x","Path":"/dev/zd0"}}`,
	`{"Verb":"reach","VM":"` + vmID + `","Process":{"PID":77},"Path":{"Kind":"disk","Name":"x","Path":"/dev/../etc/shadow"}}`,
	`{"Verb":"reach","VM":"` + vmID + `","Process":{"PID":77},"Path":{"Kind":"tty","Name":"x","Path":"/dev/tty"}}`,
	`{"Verb":"start","VM":"` + vmID + `","Start":{"Program":"true","Dir":"/x"}}`, `{"Verb":"start","VM":"` + vmID + `","Start":{"Program":"/bin/true","Dir":"/dev/x"}}`,
	`{"Verb":"start","VM":"` + vmID + `","Start":{"Program":"/bin/true","Dir":"/x","Files":["/proc/1/mem"]}}`,
	`{"Verb":"start","VM":"` + vmID + `","Start":{"Program":"/bin/true","Dir":"/x","Args":["a\u0000b"]}}`,
	`{"Verb":"start","VM":"` + vmID + `","Start":{"Program":"/bin/true","Dir":"/x","Paths":[{"Kind":"disk","Name":"a","Path":"/a"},{"Kind":"disk","Name":"a","Path":"/b"}]}}`,
	`{"Verb":"worker","Worker":{"Name":"--listen"}}`, `{"Verb":"worker","Worker":{"Name":"w","Env":["LD_PRELOAD=/x"]}}`, `{"Verb":"worker","Worker":{"Name":"w","Env":["x"]}}`,
}

func TestDecodeRequest(t *testing.T) {
	for _, s := range goodRequests {
		if _, err := DecodeRequest([]byte(s)); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range badRequests {
		if _, err := DecodeRequest([]byte(s)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", s, err)
		}
	}
	long := `{"Verb":"worker","Worker":{"Name":"w","Args":["` + strings.Repeat("x", MaxMessage) + `"]}}`
	if _, err := DecodeRequest([]byte(long)); !errors.Is(err, ErrMalformed) {
		t.Errorf("a long one: %v", err)
	}
}

// What is taken for a request keeps to all bounds, and means the same when it is written and read again.
func FuzzDecodeRequest(f *testing.F) {
	for _, s := range append(goodRequests, badRequests...) {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeRequest(b)
		if err != nil {
			return
		}
		if r.VM != "" && ident.CheckID("vm", r.VM) != nil {
			t.Fatalf("VM %q", r.VM)
		}
		var paths []Path
		if r.Path != nil {
			paths = append(paths, *r.Path)
		}
		if r.Start != nil {
			paths = append(paths, r.Start.Paths...)
			for _, p := range append([]string{r.Start.Program, r.Start.Dir}, r.Start.Files...) {
				if !clean(p) {
					t.Fatalf("path %q", p)
				}
			}
		}
		for _, p := range paths {
			in := p.Inside()
			if !strings.HasPrefix(in, "/disk/") && !strings.HasPrefix(in, "/net/") || strings.Contains(in, "/../") || strings.HasSuffix(in, "/..") || strings.Contains(p.Name, "/") {
				t.Fatalf("%+v is %q inside", p, in)
			}
		}
		out, err := Encode(r)
		if err != nil {
			return // JSON can be longer when it is written than when it was read
		}
		again, err := DecodeRequest(out)
		if err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		if second, err := Encode(again); err != nil || !bytes.Equal(out, second) {
			t.Fatalf("%s and %s, %v", out, second, err)
		}
	})
}

// A client whose other end has gone says so at once, to those who wait and to those who come.
func TestClientWithoutLauncher(t *testing.T) {
	ours, theirs, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	cl := NewClient(NewConn(ours))
	defer cl.Close()
	got := make(chan error, 1)
	go func() {
		_, err := cl.List(t.Context())
		got <- err
	}()
	c := NewConn(theirs)
	if b, _, err := c.Receive(); err != nil || len(b) == 0 {
		t.Fatalf("%q, %v", b, err)
	}
	c.Close()
	if err := <-got; errs.ReasonOf(err) != "LAUNCHER_GONE" {
		t.Errorf("who waited is told %v", err)
	}
	if _, err := cl.Identity(t.Context(), vmID); errs.ReasonOf(err) != "LAUNCHER_GONE" {
		t.Errorf("who came later is told %v", err)
	}
}

// Errors keep kind, reason and remedy on their way.
func TestErrorsCross(t *testing.T) {
	ours, theirs, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	cl := NewClient(NewConn(ours))
	defer cl.Close()
	go func() {
		c := NewConn(theirs)
		defer c.Close()
		for {
			b, files, err := c.Receive()
			if err != nil || b == nil {
				return
			}
			closeAll(files)
			r, err := DecodeRequest(b)
			if err != nil {
				return
			}
			out, _ := Encode(Failure(r.Seq, errs.New(errs.Denied, "no").Because("WHY").Do("do")))
			if c.Send(out) != nil {
				return
			}
		}
	}()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	_, err = cl.StartWorker(t.Context(), Worker{Name: "w"}, null)
	if errs.KindOf(err) != errs.Denied || errs.ReasonOf(err) != "WHY" || errs.RemedyOf(err) != "do" {
		t.Errorf("%v, %s, %s", err, errs.ReasonOf(err), errs.RemedyOf(err))
	}
}
