package store

import (
	"errors"
	"testing"

	"github.com/mvirt/mvirt/sdk/storage"
)

// TestMemory: a store without a file is read, noted in, and refuses changes; what was noted outlives a refresh.
func TestMemory(t *testing.T) {
	cause, later := errors.New("read-only"), errors.New("suspended")
	objects := []Object{{Kind: Volume, ID: "1", Name: "a"}, {Kind: Volume, ID: "2", Name: "b"}}
	s := Memory(objects, cause)
	if err := s.Apply(Change{Delete: []string{"1"}}); !errors.Is(err, cause) || !s.InMemory() || len(s.List(Volume)) != 2 {
		t.Errorf("%v %+v", err, s.List(Volume))
	}
	o, _ := s.Get(Volume, "1")
	o.Attachments = append(o.Attachments, storage.AttachmentInfo{VMID: "vm", UID: 1, ReadOnly: true})
	s.Note(o)
	s.Refresh(append(objects[:1:1], Object{Kind: Volume, ID: "3", Name: "c"}), later)
	if o, ok := s.ByName(Volume, "", "a"); !ok || len(o.Attachments) != 1 {
		t.Errorf("%+v", o)
	}
	if _, ok := s.Get(Volume, "2"); ok {
		t.Error("what is gone is still there")
	}
	o.Attachments = nil
	s.Note(o)
	s.Refresh(objects, later)
	if o, _ := s.Get(Volume, "1"); len(o.Attachments) != 0 {
		t.Errorf("%+v", o)
	}
	if err := errors.Join(s.Apply(Change{Settle: "x"}), s.Close()); !errors.Is(err, later) {
		t.Error(err)
	}
}
