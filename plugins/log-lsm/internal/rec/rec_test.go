package rec

import (
	"bytes"
	"reflect"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

func sample() log.Entry {
	return log.Entry{Time: time.Unix(12, 345).UTC(), ID: uuid.Must(uuid.NewV7()).String(), Level: log.LevelWarn, Component: "core",
		Message: "volume resized to 10737418240", Objects: []string{"vm-1", "a\x00b", "\xff"}, Labels: map[string]string{"who": "uid:0", "op": "x"}}
}

func TestRoundTrip(t *testing.T) {
	for _, e := range []log.Entry{sample(), {Time: time.Unix(0, -1<<63).UTC(), ID: "i", Level: 1}, {Time: time.Unix(0, 0).UTC(), ID: "i", Level: 5}} {
		var v View
		if err := Parse(Append(nil, &e), &v); err != nil {
			t.Fatal(err)
		}
		if got := v.Entry(); !reflect.DeepEqual(got, e) {
			t.Fatalf("got %+v\nwant %+v", got, e)
		}
	}
}

func TestObjectsTwiceAreKeptOnce(t *testing.T) {
	e := sample()
	e.Objects = []string{"a", "b", "a"}
	var v View
	if err := Parse(Append(nil, &e), &v); err != nil {
		t.Fatal(err)
	}
	if got := v.Entry().Objects; !reflect.DeepEqual(got, []string{"a", "b"}) {
		t.Fatalf("objects %q", got)
	}
}

func TestUUIDs(t *testing.T) {
	for range 1000 {
		id := uuid.Must(uuid.NewV7()).String()
		ms, a, b, ok := V7([]byte(id))
		if !ok || string(AppendV7(nil, ms, a, b)) != id {
			t.Fatalf("%s does not come back", id)
		}
		id = uuid.New().String()
		if _, _, _, ok := V7([]byte(id)); ok {
			t.Fatalf("%s taken for version 7", id)
		}
		hi, lo, ok := UUID([]byte(id))
		if !ok || string(AppendUUID(nil, hi, lo)) != id {
			t.Fatalf("%s does not come back", id)
		}
	}
	for _, bad := range []string{"", "0190", "01901234-1234-7234-c234-123456789abc", "01901234-1234-7234-8234-123456789abC", "01901234-1234-7234-8234-123456789ab-"} {
		if _, _, _, ok := V7([]byte(bad)); ok {
			t.Errorf("%q taken for a UUIDv7", bad)
		}
	}
}

func TestCheck(t *testing.T) {
	at := func() string { return "entries[0]" }
	good := sample()
	if err := Check(&good, at); err != nil {
		t.Fatal(err)
	}
	for field, spoil := range map[string]func(*log.Entry){
		"id":        func(e *log.Entry) { e.ID = "" },
		"level":     func(e *log.Entry) { e.Level = 6 },
		"time":      func(e *log.Entry) { e.Time = time.Time{} },
		"message":   func(e *log.Entry) { e.Message = string(make([]byte, log.MaxMessage+1)) },
		"component": func(e *log.Entry) { e.Component = "\xff" },
		"objects":   func(e *log.Entry) { e.Objects = []string{""} },
		"labels":    func(e *log.Entry) { e.Labels = map[string]string{"": "x"} },
	} {
		e := sample()
		spoil(&e)
		err := Check(&e, at)
		var ee *errs.Error
		if ee, _ = err.(*errs.Error); ee == nil || ee.Kind != errs.Invalid || ee.Field != "entries[0]."+field || ee.Remedy == "" {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	e := sample()
	f.Add(Append(nil, &e))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var v View
		if Parse(b, &v) != nil {
			return
		}
		e := v.Entry()
		var w View
		if err := Parse(Append(nil, &e), &w); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(w.Message, v.Message) || w.NLabels > v.NLabels {
			t.Fatal("changed")
		}
	})
}
