package store

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

func TestRoundTrip(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1700000000, 42).UTC()
	def := Definition{ID: "a", Spec: vmm.Spec{Name: "web", CPUs: 2, Disks: []vmm.Disk{{Name: "root"}}}, Generation: 3, CreatedAt: now}
	st := Status{State: vmm.StateFailed, Reason: "because", Since: now, Desired: vmm.StateRunning}
	run := Runtime{VMID: "a", Phase: Intent, Marker: "m", Process: proc.Identity{PID: 7, StartTime: 8, BootID: "b"}, StartedAt: now}
	if err := db.Apply("a", Change{Definition: &def, Status: &st, Runtime: &run}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if db, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	c, err := db.Load()
	if err != nil || len(c.Definitions) != 1 || len(c.Status) != 1 || len(c.Runtime) != 1 {
		t.Fatalf("%+v, %v", c, err)
	}
	if !reflect.DeepEqual(c.Definitions[0].Value, def) || !reflect.DeepEqual(c.Status[0].Value, st) || !reflect.DeepEqual(c.Runtime[0].Value, run) {
		t.Errorf("got %+v", c)
	}
	if err := db.Apply("a", Change{DeleteRuntime: true}); err != nil {
		t.Fatal(err)
	}
	if c, _ := db.Load(); len(c.Runtime) != 0 || len(c.Status) != 1 {
		t.Errorf("after the run: %+v", c)
	}
	if err := db.Apply("a", Change{DeleteAll: true}); err != nil {
		t.Fatal(err)
	}
	if c, _ := db.Load(); len(c.Definitions)+len(c.Status)+len(c.Runtime) != 0 {
		t.Errorf("after delete: %+v", c)
	}
}

func TestInUse(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := Open(dir); errs.ReasonOf(err) != "STORE_IN_USE" || errs.RemedyOf(err) == "" {
		t.Errorf("got %v", err)
	}
}

func TestNewerIsRefusedAndDamageStaysApart(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b"} {
		if err := db.Apply(id, Change{Runtime: &Runtime{VMID: id}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.db.Update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.Bucket(runtimeBucket).Put([]byte("a"), []byte(`{"VMID":"a","Pha`)),
			tx.Bucket(metaBucket).Put(formatKey, []byte("1")))
	}); err != nil {
		t.Fatal(err)
	}
	c, err := db.Load()
	if err != nil || len(c.Runtime) != 2 || !errors.Is(c.Runtime[0].Err, errs.Corrupt) || c.Runtime[1].Err != nil {
		t.Errorf("%+v, %v", c.Runtime, err)
	}
	if err := db.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(formatKey, []byte("2")) }); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); errs.ReasonOf(err) != "STORE_NEWER" {
		t.Errorf("got %v", err)
	}
}
