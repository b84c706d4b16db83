package api

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

// minPrefix is the shortest prefix of an id that is taken for one.
const minPrefix = 4

// kindOf describes a kind of object to find.
type kindOf[T any] struct {
	word string // "vm"
	ls   string // command that lists them
	get  func(ctx context.Context, ref string) (T, error)
	list func(ctx context.Context) ([]T, error)
	id   func(T) (id, name string)
	// parent is what contains the object; who may use that, may use this. May be nil.
	parent func(T) (word, id, name string)
}

// allowed asks whether the caller may use an object that was found.
func (k kindOf[T]) allowed(ctx context.Context, v T) error {
	if k.word == "operation" || k.word == "import" {
		return nil // an operation is judged by its objects, an import by the method alone
	}
	id, name := k.id(v)
	err := permitted(ctx, k.word, id, name)
	if err != nil && k.parent != nil {
		if word, pid, pname := k.parent(v); permitted(ctx, word, pid, pname) == nil {
			return nil
		}
	}
	return err
}

// find resolves a ref: a whole id, a name, or a unique prefix of an id. field names it in errors.
func find[T any](ctx context.Context, k kindOf[T], field, ref string) (T, error) {
	var zero T
	if ref == "" {
		return zero, errs.Field(field, "give a name, an id or the beginning of an id ("+k.ls+")", "no %s is given", k.word)
	}
	missing := errs.New(errs.NotFound, "there is no such %s", k.word).With(errs.Resource{Type: k.word, Name: shown(ref)}).Do(k.ls + " lists them")
	whole := ident.CheckID(field, ref) == nil
	if whole || ident.CheckName(field, ref) == nil {
		v, err := k.get(ctx, ref)
		if err == nil {
			id, _ := k.id(v)
			touch(ctx, id)
			return v, k.allowed(ctx, v)
		}
		if !errors.Is(err, errs.NotFound) {
			return zero, err
		}
		if whole {
			touch(ctx, ref)
			return zero, hideMissing(ctx, k.word, ref, missing)
		}
	}
	if len(ref) < minPrefix || strings.Trim(ref, "0123456789abcdef-") != "" {
		return zero, hideMissing(ctx, k.word, ref, missing)
	}
	all, err := k.list(ctx)
	if err != nil {
		return zero, err
	}
	var hits []T
	for _, v := range all {
		// What the caller may not see must not make a prefix ambiguous, nor be listed.
		if id, _ := k.id(v); strings.HasPrefix(id, ref) && k.allowed(ctx, v) == nil {
			hits = append(hits, v)
		}
	}
	switch len(hits) {
	case 0:
		return zero, hideMissing(ctx, k.word, ref, missing)
	case 1:
		id, _ := k.id(hits[0])
		touch(ctx, id)
		return hits[0], nil
	}
	var words []string
	for _, v := range hits[:min(len(hits), 8)] {
		id, name := k.id(v)
		words = append(words, fmt.Sprintf("%s (%s)", id, name))
	}
	if len(hits) > len(words) {
		words = append(words, fmt.Sprintf("%d more", len(hits)-len(words)))
	}
	return zero, errs.Field(field, "give more of the id, or the name", "%d %ss begin with %s: %s", len(hits), k.word, ref, strings.Join(words, ", ")).Because("AMBIGUOUS")
}

// shown is hostile text as it may stand in a message; a plain name stands without quotes.
func shown(ref string) string {
	if ident.CheckName("ref", ref) == nil || ident.CheckID("ref", ref) == nil {
		return ref
	}
	return ident.Quote(ref)
}

func (s *Server) findVM(ctx context.Context, field, ref string) (vmm.VM, error) {
	return find(ctx, kindOf[vmm.VM]{"vm", "mvirt vm ls",
		func(ctx context.Context, ref string) (vmm.VM, error) { return s.vmm.Get(ctx, vmm.Ref{Ref: ref}) },
		s.vmm.List, func(v vmm.VM) (string, string) { return v.ID, v.Spec.Name }, nil}, field, ref)
}

func (s *Server) findVolume(ctx context.Context, field, ref string) (storage.Volume, error) {
	return find(ctx, kindOf[storage.Volume]{"volume", "mvirt volume ls",
		func(ctx context.Context, ref string) (storage.Volume, error) {
			return s.storage.GetVolume(ctx, storage.Ref{Ref: ref})
		},
		s.storage.ListVolumes, func(v storage.Volume) (string, string) { return v.ID, v.Name }, nil}, field, ref)
}

func (s *Server) findTemplate(ctx context.Context, field, ref string) (storage.Template, error) {
	return find(ctx, kindOf[storage.Template]{"template", "mvirt template ls",
		func(ctx context.Context, ref string) (storage.Template, error) {
			return s.storage.GetTemplate(ctx, storage.Ref{Ref: ref})
		},
		s.storage.ListTemplates, func(t storage.Template) (string, string) { return t.ID, t.Name }, nil}, field, ref)
}

func (s *Server) findImport(ctx context.Context, field, ref string) (storage.Import, error) {
	list := func(ctx context.Context) ([]storage.Import, error) { return s.storage.ListImports(ctx) }
	return find(ctx, kindOf[storage.Import]{"import", "mvirt template imports",
		func(ctx context.Context, ref string) (storage.Import, error) {
			all, err := list(ctx)
			if err != nil {
				return storage.Import{}, err
			}
			best := -1
			for i, im := range all { // of several of one name, the one that runs, else the last
				if im.ID == ref || im.Name == ref && (best < 0 || all[best].State.Final()) {
					best = i
				}
			}
			if best < 0 {
				return storage.Import{}, errs.New(errs.NotFound, "no such import")
			}
			return all[best], nil
		}, list, func(i storage.Import) (string, string) { return i.ID, i.Name }, nil}, field, ref)
}

// findSnapshot also takes "volume@snapshot".
func (s *Server) findSnapshot(ctx context.Context, field, ref string) (storage.Snapshot, error) {
	if vol, name, ok := strings.Cut(ref, "@"); ok {
		v, err := s.findVolume(ctx, field, vol)
		if err != nil {
			return storage.Snapshot{}, err
		}
		all, err := s.storage.ListSnapshots(ctx, storage.ListSnapshotsRequest{VolumeID: v.ID})
		if err != nil {
			return storage.Snapshot{}, err
		}
		for _, snap := range all {
			if snap.Name == name || snap.ID == name {
				touch(ctx, snap.ID)
				return snap, nil // the volume was asked for, and contains it
			}
		}
		return storage.Snapshot{}, errs.New(errs.NotFound, "volume %s has no such snapshot", v.Name).With(errs.Resource{Type: "snapshot", Name: shown(name)}).
			Do("mvirt snapshot ls " + v.Name + " lists them")
	}
	list := func(ctx context.Context) ([]storage.Snapshot, error) {
		return s.storage.ListSnapshots(ctx, storage.ListSnapshotsRequest{})
	}
	return find(ctx, kindOf[storage.Snapshot]{"snapshot", "mvirt snapshot ls",
		func(ctx context.Context, ref string) (storage.Snapshot, error) {
			all, err := list(ctx)
			for _, snap := range all {
				if snap.ID == ref {
					return snap, nil
				}
			}
			if err == nil {
				err = errs.New(errs.NotFound, "no such snapshot")
			}
			return storage.Snapshot{}, err
		}, list, func(s storage.Snapshot) (string, string) { return s.ID, s.VolumeName + "@" + s.Name },
		func(s storage.Snapshot) (string, string, string) { return "volume", s.VolumeID, s.VolumeName }}, field, ref)
}

func (s *Server) findNetwork(ctx context.Context, field, ref string) (net.Network, error) {
	return find(ctx, kindOf[net.Network]{"network", "mvirt network ls",
		func(ctx context.Context, ref string) (net.Network, error) {
			return s.net.GetNetwork(ctx, net.Ref{Ref: ref})
		},
		s.net.ListNetworks, func(n net.Network) (string, string) { return n.ID, n.Name }, nil}, field, ref)
}

func (s *Server) findNIC(ctx context.Context, field, ref string) (net.NIC, error) {
	return find(ctx, kindOf[net.NIC]{"nic", "mvirt nic ls",
		func(ctx context.Context, ref string) (net.NIC, error) {
			return s.net.GetNIC(ctx, net.Ref{Ref: ref})
		},
		func(ctx context.Context) ([]net.NIC, error) { return s.net.ListNICs(ctx, net.ListNICsRequest{}) },
		func(n net.NIC) (string, string) { return n.ID, n.Name }, nil}, field, ref)
}

func (s *Server) findGroup(ctx context.Context, field, ref string) (net.SecurityGroup, error) {
	return find(ctx, kindOf[net.SecurityGroup]{"security group", "mvirt security-group ls",
		func(ctx context.Context, ref string) (net.SecurityGroup, error) {
			return s.net.GetSecurityGroup(ctx, net.Ref{Ref: ref})
		},
		s.net.ListSecurityGroups, func(g net.SecurityGroup) (string, string) { return g.ID, g.Name }, nil}, field, ref)
}

// groupIDs resolves refs of security groups.
func (s *Server) groupIDs(ctx context.Context, field string, refs []string) ([]string, error) {
	var out []string
	for _, ref := range refs {
		g, err := s.findGroup(ctx, field, ref)
		if err != nil {
			return nil, err
		}
		out = append(out, g.ID)
	}
	return out, nil
}

// newID checks a caller's id, or makes one.
func newID(ctx context.Context, id string) (string, error) {
	if id == "" {
		id = ident.New()
	} else if err := ident.CheckID("id", id); err != nil {
		return "", err
	}
	touch(ctx, id)
	return id, nil
}

// maxLabels and maxLabel bound what callers attach to objects.
const (
	maxLabels = 64
	maxLabel  = 1024
)

// checkLabels checks labels. Keys that begin with "mvirt." are ours.
func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return errs.Field("labels", fmt.Sprintf("give at most %d", maxLabels), "%d labels", len(labels))
	}
	for k, v := range labels {
		if strings.HasPrefix(k, "mvirt.") {
			return errs.Field("labels", "choose another key", "label %s begins with \"mvirt.\", which is reserved", ident.Quote(k))
		}
		if k == "" || len(k) > 128 || len(v) > maxLabel {
			return errs.Field("labels", fmt.Sprintf("give keys of 1 to 128 and values of at most %d bytes", maxLabel), "label %s is empty or too long", ident.Quote(k))
		}
	}
	return nil
}
