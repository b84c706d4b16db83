package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/mvirt/mvirt/sdk/log"
)

// dataset makes entries like those of a host: 185 bytes as protobuf, 270 as JSON, each beside the id; ten
// kinds of message from eight components, two objects each, of 10,000 VMs and 50,000 volumes (or more, so
// that there are "objects" of them), uniform; UUIDv7 ids and times a millisecond apart in the mean.
type dataset struct {
	rng       *rand.Rand
	vms, vols []string
	t         int64
}

func newDataset(seed uint64, objects int, start time.Time) *dataset {
	d := &dataset{rng: rand.New(rand.NewPCG(seed, 7)), t: start.UnixNano()}
	for range max(objects/6, 1) {
		d.vms = append(d.vms, "vm-"+d.uuid(4, 0))
	}
	for range max(objects-objects/6, 1) {
		d.vols = append(d.vols, "vol-"+d.uuid(4, 0))
	}
	return d
}

// uuid makes one of a version, with the time of ms for version 7.
func (d *dataset) uuid(version uint64, ms uint64) string {
	hi, lo := d.rng.Uint64(), d.rng.Uint64()>>2|1<<63
	if version == 7 {
		hi = ms<<16 | hi&0xfff
	}
	hi = hi&^0xf000 | version<<12
	return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", hi>>32, hi>>16&0xffff, hi&0xffff, lo>>48, lo&(1<<48-1))
}

var components = []string{"core", "storage-zfs", "net-tap", "vmm-qemu", "log-lsm", "console", "api", "reconcile"}

func (d *dataset) next() log.Entry {
	r := d.rng
	d.t += int64(r.ExpFloat64() * 1e6)
	e := log.Entry{Time: time.Unix(0, d.t).UTC(), ID: d.uuid(7, uint64(d.t/1e6)), Component: components[r.IntN(len(components))],
		Objects: []string{d.vms[r.IntN(len(d.vms))], d.vols[r.IntN(len(d.vols))]}}
	switch n := r.IntN(100); {
	case n < 1:
		e.Level = log.LevelAudit
	case n < 3:
		e.Level = log.LevelError
	case n < 10:
		e.Level = log.LevelWarn
	case n < 80:
		e.Level = log.LevelInfo
	default:
		e.Level = log.LevelDebug
	}
	switch r.IntN(10) {
	case 0:
		e.Message = fmt.Sprintf("volume resized from %d to %d bytes in %d us by request %08x", r.Uint32(), r.Uint32(), r.IntN(1e5), r.Uint32())
	case 1:
		e.Message = fmt.Sprintf("lease 10.%d.%d.%d renewed for 3600 s, hardware address 52:54:00:%02x:%02x:%02x", r.IntN(256), r.IntN(256), r.IntN(256), r.IntN(256), r.IntN(256), r.IntN(256))
	case 2:
		e.Message = fmt.Sprintf("snapshot %d taken of volume while the guest was running, pause %d.%03d ms", r.IntN(1000), r.IntN(90), r.IntN(1000))
	case 3:
		e.Message = fmt.Sprintf("migration progress %d%% at %d MiB/s, %d pages dirty in the last round", r.IntN(101), r.IntN(2000), r.IntN(1e6))
	case 4:
		e.Message = fmt.Sprintf("vcpu %d halted and woken %d times in %d ms; steal %d us; exits %d", r.IntN(32), r.IntN(1e4), r.IntN(1000), r.IntN(1e5), r.Uint32())
	case 5:
		e.Message = fmt.Sprintf("block request of %d sectors at %d completed after %d us with status ok", r.IntN(256)*8, r.Uint32(), r.IntN(1e5))
	case 6:
		e.Message = fmt.Sprintf("guest agent answered ping %d within %d us, load average %d.%02d", r.IntN(1e6), r.IntN(1e4), r.IntN(16), r.IntN(100))
	case 7:
		e.Message = fmt.Sprintf("balloon target set to %d MiB, actual %d MiB, free %d MiB, swapped %d", r.IntN(65536), r.IntN(65536), r.IntN(65536), r.IntN(100))
	case 8:
		e.Message = fmt.Sprintf("flow table of nic holds %d entries, %d expired, %d dropped as invalid", r.IntN(65536), r.IntN(65536), r.IntN(100))
	case 9:
		e.Message = fmt.Sprintf("operation %016x step %d of %d finished in %d us without error to be reported", r.Uint64(), r.IntN(9), 9, r.IntN(1e7))
	}
	return e
}

func (d *dataset) take(n int) []log.Entry {
	out := make([]log.Entry, n)
	for i := range out {
		out[i] = d.next()
	}
	return out
}

// appendJSON writes an entry as VictoriaLogs takes it.
func appendJSON(dst []byte, e *log.Entry) []byte {
	b, err := json.Marshal(struct {
		Time      string `json:"_time"`
		Msg       string `json:"_msg"`
		Level     string `json:"level"`
		Component string `json:"component"`
		ID        string `json:"id"`
		VM        string `json:"vm"`
		Vol       string `json:"vol"`
	}{e.Time.Format(time.RFC3339Nano), e.Message, e.Level.String(), e.Component, e.ID, e.Objects[0], e.Objects[1]})
	if err != nil {
		panic(err) // strings and nothing else
	}
	return append(append(dst, b...), '\n')
}
