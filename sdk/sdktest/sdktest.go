// Package sdktest is for tests of plugins and hosts: complete, small implementations of the four contracts
// that keep their state in a directory, and what tests need around them.
//
// The fakes are held to the conformance suites like any plugin, so a test against a fake proves something
// about the real thing. They do no privileged work: a fake volume is a plain file, a fake NIC moves no
// packets, a fake VM is a state.
package sdktest

import (
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

// T is the part of *testing.T that helpers need, so that a program that is no test can run them.
type T interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
}

// record is one stored object: what was asked for, to recognise the same create again, and what it is now.
type record[Req, V any] struct {
	Req Req
	V   V
}

// table holds the objects of one kind by id.
type table[Req, V any] struct {
	Objects map[string]*record[Req, V]
	typ     string // for errors: "volume"
	name    func(*V) string
}

func newTable[Req, V any](typ string, name func(*V) string) table[Req, V] {
	return table[Req, V]{Objects: map[string]*record[Req, V]{}, typ: typ, name: name}
}

// find finds by id, or by name where ref is no id.
func (t *table[Req, V]) find(ref string) (*record[Req, V], error) {
	if r, ok := t.Objects[ref]; ok {
		return r, nil
	}
	if ident.CheckID("", ref) != nil {
		for _, r := range t.Objects {
			if t.name(&r.V) == ref {
				return r, nil
			}
		}
	}
	return nil, errs.New(errs.NotFound, "no %s %s", t.typ, ident.Quote(ref)).With(errs.Resource{Type: t.typ, Name: ref})
}

// create judges a create: the record of an equal one that was made before, nil for a new one, or an error.
func (t *table[Req, V]) create(id, name string, req Req) (*record[Req, V], error) {
	if err := ident.CheckID("id", id); err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", name); err != nil {
		return nil, err
	}
	if r, ok := t.Objects[id]; ok {
		a, _ := json.Marshal(r.Req)
		b, _ := json.Marshal(req)
		if string(a) == string(b) {
			return r, nil
		}
		return nil, errs.New(errs.Exists, "the id belongs to another %s", t.typ).Because("ID_IN_USE").With(errs.Resource{Type: t.typ, ID: id})
	}
	return nil, t.free(name, "")
}

// free says whether a name may be taken by the object with this id.
func (t *table[Req, V]) free(name, id string) error {
	for other, r := range t.Objects {
		if other != id && t.name(&r.V) == name {
			return errs.New(errs.Exists, "the name is taken").Because("NAME_IN_USE").With(errs.Resource{Type: t.typ, Name: name})
		}
	}
	return nil
}

// list is all objects by name.
func (t *table[Req, V]) list() []V {
	out := make([]V, 0, len(t.Objects))
	for _, r := range t.Objects {
		out = append(out, r.V)
	}
	slices.SortFunc(out, func(a, b V) int { return cmpString(t.name(&a), t.name(&b)) })
	return out
}

func cmpString(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// load reads v from dir/state.json, if it is there; save puts it there, whole or not at all.
func load(dir string, v any) error {
	b, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return errs.Wrap(errs.Corrupt, err, "state.json")
	}
	return nil
}

func save(dir string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "state.json")
	}
	tmp := filepath.Join(dir, "state.json.tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, "state.json"))
}

func clone[V any](m map[string]V) map[string]V { return maps.Clone(m) }
