package store

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storage"
)

// TestReopen: what is applied is what is read, in memory and after a restart; objects are the caller's own.
func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	o := Object{Kind: Volume, ID: "1", Name: "a", Size: 512, CreatedAt: time.Unix(7, 5).UTC(), Labels: map[string]string{"k": "v"},
		Attachments: []storage.AttachmentInfo{{VMID: "m", UID: 5}}}
	snap := Object{Kind: Snapshot, ID: "2", Name: "a", VolumeID: "1"}
	err = s.Apply(Change{Put: []Object{o, snap}, Intend: &Intent{ID: "3", Op: OpCreate, Object: o}, PutImport: &Import{Import: storage.Import{ID: "4", Name: "i"}}})
	if err != nil {
		t.Fatal(err)
	}
	got, _ := s.Get(Volume, "1")
	got.Labels["k"], got.Attachments[0].UID = "changed", 6
	o.Name = "b"
	if err := s.Apply(Change{Put: []Object{o}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, ok := s.ByName(Volume, "", "a"); ok {
			t.Error("the old name is found")
		}
		g, ok := s.ByName(Volume, "", "b")
		if !ok || g.Labels["k"] != "v" || g.Attachments[0].UID != 5 || !g.CreatedAt.Equal(o.CreatedAt) {
			t.Errorf("%+v", g)
		}
		if g, ok := s.ByName(Snapshot, "1", "a"); !ok || g.ID != "2" {
			t.Errorf("%+v", g)
		}
		if _, ok := s.Get(Template, "1"); ok {
			t.Error("a volume is a template")
		}
		if i := s.Intents(); len(i) != 1 || i[0].Op != OpCreate {
			t.Errorf("%+v", i)
		}
		if i, ok := s.Import("4"); !ok || i.Name != "i" {
			t.Errorf("%+v", i)
		}
		s.Close()
		if s, err = Open(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Apply(Change{Delete: []string{"1", "2"}, Settle: "3", DeleteImport: []string{"4"}}); err != nil {
		t.Fatal(err)
	}
	if len(s.List(Volume))+len(s.List(Snapshot))+len(s.Intents())+len(s.Imports()) != 0 {
		t.Error("something is left")
	}
	s.Close()
	if err := s.Apply(Change{Delete: []string{"1"}}); err == nil {
		t.Error("a closed store takes changes")
	}
}

func TestInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := Open(path); !errors.Is(err, errs.Precondition) {
		t.Errorf("got %v", err)
	}
}
