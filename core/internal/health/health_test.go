package health

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mvirt/mvirt/sdk/service"
)

func cond(code string, sev service.Severity) service.Condition {
	return service.Condition{Code: code, Severity: sev, Text: code}
}

func TestSinceStaysUntilCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tr Tracker
		start := time.Now()
		tr.Set("core", cond("A", service.SeverityWarning))
		time.Sleep(time.Minute)
		again := cond("A", service.SeverityCritical)
		again.Text = "worse"
		tr.Set("core", again)
		got := tr.List("")
		if len(got) != 1 || !got[0].Since.Equal(start) || got[0].Text != "worse" || got[0].Severity != service.SeverityCritical {
			t.Fatalf("%+v", got)
		}
		tr.Clear("core", "A", "")
		tr.Set("core", cond("A", service.SeverityWarning))
		if got := tr.List("core"); !got[0].Since.Equal(start.Add(time.Minute)) {
			t.Fatalf("a condition that came back kept its old Since: %+v", got)
		}
	})
}

func TestReplaceEndsWhatIsLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tr Tracker
		start := time.Now()
		tr.Replace("plugin.vmm", []service.Condition{cond("A", 2), cond("B", 2)})
		tr.Set("core", cond("C", 1))
		time.Sleep(time.Second)
		tr.Replace("plugin.vmm", []service.Condition{cond("B", 2), cond("D", 3)})
		var s string
		for _, c := range tr.List("") {
			s += fmt.Sprintf("%s %s +%d;", c.Source, c.Code, c.Since.Sub(start)/time.Second)
		}
		if s != "plugin.vmm D +1;plugin.vmm B +0;core C +0;" {
			t.Fatal(s)
		}
		tr.Replace("plugin.vmm", nil)
		if len(tr.List("plugin.vmm")) != 0 || len(tr.List("core")) != 1 {
			t.Fatal("replace touched another source or left something")
		}
	})
}

func TestBounded(t *testing.T) {
	var tr Tracker
	cs := make([]service.Condition, 5*MaxPerSource)
	for i := range cs {
		cs[i] = service.Condition{Code: "X", Object: fmt.Sprint(i)}
	}
	tr.Replace("p", cs)
	if n := len(tr.List("")); n != MaxPerSource {
		t.Errorf("Replace kept %d", n)
	}
	for i := range 10 {
		tr.Set("p", service.Condition{Code: "Y", Object: fmt.Sprint(i)})
	}
	if n := len(tr.List("")); n != MaxPerSource {
		t.Errorf("Set kept %d", n)
	}
}

func TestChanged(t *testing.T) {
	var tr Tracker
	ch := tr.Changed()
	closed := func() bool {
		select {
		case <-ch:
			return true
		default:
			return false
		}
	}
	tr.Clear("core", "A", "")
	if closed() {
		t.Fatal("clearing nothing is a change")
	}
	tr.Set("core", cond("A", 1))
	if !closed() {
		t.Fatal("no change reported")
	}
	ch = tr.Changed()
	tr.Set("core", cond("A", 1))
	if closed() {
		t.Fatal("the same condition again is a change")
	}
}
