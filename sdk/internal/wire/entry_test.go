package wire

import (
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/log"
)

func entries(n int) []log.Entry {
	list := make([]log.Entry, n)
	for i := range list {
		list[i] = log.Entry{Time: time.Unix(1_700_000_000, int64(i)).UTC(), ID: "0190a0a0-0000-7000-8000-000000000001", Level: log.LevelInfo, Component: "vmm",
			Message: "the VM has started and its guest has an address by now", Objects: []string{"vm-0190a0a0-0000-7000-8000-000000000001", "\xff\x00any bytes"}}
	}
	list[n/2].Objects = nil
	return list
}

// TestBatch holds that a batch crosses like its entries do, and that entries share no memory that one could
// overwrite for another.
func TestBatch(t *testing.T) {
	in := entries(100)
	wire, err := proto.Marshal(&logpb.AppendRequest{Entries: logEntriesToPB(in)})
	if err != nil {
		t.Fatal(err)
	}
	m := &logpb.AppendRequest{}
	if err := proto.Unmarshal(wire, m); err != nil {
		t.Fatal(err)
	}
	out := logEntriesFromPB(m.Entries)
	if !reflect.DeepEqual(in, out) {
		t.Fatalf("%+v", out[0])
	}
	out[0].Objects = append(out[0].Objects, "more")
	if !reflect.DeepEqual(in[1], out[1]) {
		t.Error("appending to one entry's objects changed another's")
	}
	if out := logEntriesFromPB([]*logpb.Entry{nil}); len(out) != 1 || out[0].ID != "" {
		t.Errorf("a nil entry: %+v", out)
	}
}

// TestBatchAllocations: the count does not grow with the batch.
func TestBatchAllocations(t *testing.T) {
	in := entries(1000)
	if n := testing.AllocsPerRun(10, func() { logEntriesToPB(in) }); n > 3 {
		t.Errorf("encoding a batch of 1000 makes %v allocations", n)
	}
	m := logEntriesToPB(in)
	if n := testing.AllocsPerRun(10, func() { logEntriesFromPB(m) }); n > 2 {
		t.Errorf("decoding a batch of 1000 makes %v allocations", n)
	}
}

func BenchmarkEntriesToPB(b *testing.B) {
	in := entries(1000)
	for b.Loop() {
		logEntriesToPB(in)
	}
	b.ReportMetric(float64(b.N)*1000/b.Elapsed().Seconds(), "entries/s")
}

func BenchmarkEntriesFromPB(b *testing.B) {
	m := logEntriesToPB(entries(1000))
	for b.Loop() {
		logEntriesFromPB(m)
	}
	b.ReportMetric(float64(b.N)*1000/b.Elapsed().Seconds(), "entries/s")
}
