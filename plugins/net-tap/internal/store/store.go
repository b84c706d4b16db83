// Package store keeps what mvirt-net must remember in metadata.db (bbolt): networks, NICs, security groups
// and their numbers. One process has the file open (bbolt locks it); the whole content is small and held in
// memory by the control plane, so the store only loads, puts and deletes records, one transaction a change.
//
// Format: bucket "meta" holds "version" (decimal); buckets "networks", "nics", "groups" map an id to a JSON
// record; bucket "state" holds the forwarding list. A file of a newer version is refused.
package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/mvirt/mvirt/plugins/net-tap/internal/hostnet"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/net"
)

// version of the format.
const version = "1"

// File is the name of the database in the metadata directory.
const File = "metadata.db"

// Network is a network's record.
type Network struct {
	Request   net.CreateNetworkRequest // as asked for, defaults filled in; updates are made here
	Created   net.CreateNetworkRequest // as asked for, for telling a repeated create
	CreatedAt time.Time
	NS        string       // its namespace
	HostLink  string       // veth end in the host, mode nat
	Link4     netip.Prefix // link addresses, mode nat
	Deleting  bool         // a delete began and must be finished
}

// NIC is a NIC's record.
type NIC struct {
	ID        string
	Name      string
	NetworkID string
	MAC       string
	IPv4      netip.Addr
	IPv6      netip.Addr
	Routed    []netip.Prefix
	Groups    []string
	HostName  string
	Labels    map[string]string
	Created   net.CreateNICRequest
	CreatedAt time.Time
	LinkDown  bool    `json:",omitempty"`
	IfName    string  // its TAP's name, unique on the host
	Attach    *Attach `json:",omitempty"`
}

// Attach says who a NIC is attached to.
type Attach struct {
	VMID     string
	UID, GID uint32
	Mode     net.AttachMode
	Queues   uint32
}

// Group is a security group's record.
type Group struct {
	Group   net.SecurityGroup
	Created net.CreateSecurityGroupRequest
}

// State is what is neither.
type State struct {
	Forwarding hostnet.Guards // where we turned forwarding on
}

// Data is everything.
type Data struct {
	Networks map[string]*Network
	NICs     map[string]*NIC
	Groups   map[string]*Group
	State    State
	Damaged  []string // records that could not be read, "nics/0190…: …"
}

// Store is an open database.
type Store struct{ db *bolt.DB }

var (
	bMeta     = []byte("meta")
	bNetworks = []byte("networks")
	bNICs     = []byte("nics")
	bGroups   = []byte("groups")
	bState    = []byte("state")
	kVersion  = []byte("version")
	kState    = []byte("state")
)

// Open opens or makes dir/metadata.db. Kinds: Unavailable (another process has it), Corrupt, Precondition
// (a newer version made it).
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "make the metadata directory")
	}
	path := filepath.Join(dir, File)
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 3 * time.Second})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, errs.New(errs.Unavailable, "%s is in use by another process", path).
			Do("stop the other mvirt-net, or give this one another --metadata-dir")
	case errors.Is(err, os.ErrPermission):
		return nil, errs.New(errs.Denied, "%s may not be opened: %v", path, err).
			Do("run mvirt-net as the user that owns its metadata directory")
	case err != nil:
		return nil, errs.New(errs.Corrupt, "%s cannot be read: %v", path, err).
			Do("restore it from a backup, or move it away to begin with no networks")
	}
	s := &Store{db: db}
	if err := s.init(path); err != nil {
		db.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) init(path string) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bMeta, bNetworks, bNICs, bGroups, bState} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bMeta)
		switch v := string(meta.Get(kVersion)); v {
		case "":
			return meta.Put(kVersion, []byte(version))
		case version:
			return nil
		default:
			return errs.New(errs.Precondition, "%s has format version %s, this mvirt-net knows %s", path, v, version).
				Do("install the newer mvirt-net that wrote it")
		}
	})
}

// Close closes the database.
func (s *Store) Close() error { return s.db.Close() }

// Load reads everything. A damaged record is named in Damaged and left alone.
func (s *Store) Load() (*Data, error) {
	d := &Data{Networks: map[string]*Network{}, NICs: map[string]*NIC{}, Groups: map[string]*Group{}}
	err := s.db.View(func(tx *bolt.Tx) error {
		load(tx, bNetworks, d.Networks, &d.Damaged)
		load(tx, bNICs, d.NICs, &d.Damaged)
		load(tx, bGroups, d.Groups, &d.Damaged)
		if v := tx.Bucket(bState).Get(kState); v != nil {
			if err := json.Unmarshal(v, &d.State); err != nil {
				d.Damaged = append(d.Damaged, "state: "+err.Error())
			}
		}
		return nil
	})
	return d, err
}

func load[T any](tx *bolt.Tx, bucket []byte, into map[string]*T, damaged *[]string) {
	_ = tx.Bucket(bucket).ForEach(func(k, v []byte) error {
		rec := new(T)
		if err := json.Unmarshal(v, rec); err != nil {
			*damaged = append(*damaged, fmt.Sprintf("%s/%s: %v", bucket, k, err))
			return nil
		}
		into[string(k)] = rec
		return nil
	})
}

// Change is one thing that a transaction does.
type Change struct {
	bucket []byte
	id     string
	rec    any // nil: delete
}

// PutNetwork, PutNIC, PutGroup and PutState write a record; the Delete functions remove one.
func PutNetwork(n *Network) Change { return Change{bNetworks, n.Request.ID, n} }

// DeleteNetwork removes a network's record.
func DeleteNetwork(id string) Change { return Change{bNetworks, id, nil} }

// PutNIC writes a NIC's record.
func PutNIC(n *NIC) Change { return Change{bNICs, n.ID, n} }

// DeleteNIC removes a NIC's record.
func DeleteNIC(id string) Change { return Change{bNICs, id, nil} }

// PutGroup writes a security group's record.
func PutGroup(g *Group) Change { return Change{bGroups, g.Group.ID, g} }

// DeleteGroup removes a security group's record.
func DeleteGroup(id string) Change { return Change{bGroups, id, nil} }

// PutState writes the state.
func PutState(st State) Change { return Change{bState, string(kState), st} }

// Do makes all changes durable, or none.
func (s *Store) Do(changes ...Change) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, c := range changes {
			b := tx.Bucket(c.bucket)
			if c.rec == nil {
				if err := b.Delete([]byte(c.id)); err != nil {
					return err
				}
				continue
			}
			v, err := json.Marshal(c.rec)
			if err != nil {
				return err
			}
			if err := b.Put([]byte(c.id), v); err != nil {
				return err
			}
		}
		return nil
	})
	return errs.Wrap(errs.Unknown, err, "write the network metadata")
}
