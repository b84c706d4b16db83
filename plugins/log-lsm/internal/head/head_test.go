package head

import (
	"fmt"
	"testing"
	"time"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/rec"
	"github.com/mvirt/mvirt/sdk/log"
)

func item(t *testing.T, id string, n int) Item {
	t.Helper()
	e := log.Entry{Time: time.Unix(0, int64(n)), ID: id, Level: 1, Message: fmt.Sprint("entry ", n)}
	b := rec.Append(nil, &e)
	// Few distinct hashes, so that the table's collisions are met.
	return Item{Rec: b, Time: int64(n), IDHash: uint64(len(id)) * 0x9e3779b97f4a7c15, ID: b[rec.IDAt : rec.IDAt+len(id)], Objects: []ObjectHash{{A: uint64(n)}}}
}

func TestHead(t *testing.T) {
	h := New(1, 7)
	const n = 3000
	for i := range n {
		it := item(t, fmt.Sprintf("id-%d", i), i)
		if h.Has(it.IDHash, it.ID) {
			t.Fatalf("%s is there before it was added", it.ID)
		}
		h.Add(&it, []byte{byte(i)})
		if !h.Has(it.IDHash, it.ID) {
			t.Fatalf("%s is not there", it.ID)
		}
	}
	if v := h.View(); v.Len() != 0 {
		t.Fatal("entries are shown before they are durable")
	}
	h.Show(n - 1)
	v := h.View()
	if v.Len() != n-1 || v.First != 7 {
		t.Fatalf("%d rows from %d", v.Len(), v.First)
	}
	var r rec.View
	for i := range v.Len() {
		_, tail := v.Rec(i)
		if err := v.Parse(i, &r); err != nil || string(r.Message) != fmt.Sprint("entry ", i) || string(v.ID(i)) != fmt.Sprintf("id-%d", i) ||
			tail[0] != byte(i) || v.Objects(i)[0].A != uint64(i) {
			t.Fatalf("row %d: %q, %v", i, r.Message, err)
		}
	}
	if other := item(t, "id-x", 0); h.Has(other.IDHash, other.ID) {
		t.Fatal("a stranger is there")
	}
}
