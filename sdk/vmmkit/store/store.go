// Package store keeps a vmm plugin's durable state in mvirt.db (bbolt): what VMs should be, what runs, and
// why what does not run does not.
//
// Format 1: bucket "meta" has "format" = "1"; buckets "vms", "status" and "runtime" map a VM's id to JSON.
// Unknown JSON fields are kept out, unknown formats are refused, so a newer program's file is never
// half understood.
package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/proc"
)

// Format is the version of what is written.
const Format = "1"

var (
	metaBucket    = []byte("meta")
	vmsBucket     = []byte("vms")
	statusBucket  = []byte("status")
	runtimeBucket = []byte("runtime")
	formatKey     = []byte("format")
)

// Definition is a VM as it should be.
type Definition struct {
	ID         string
	Spec       vmm.Spec
	Generation uint64
	CreatedAt  time.Time
	Initramfs  string // its SHA-256; the kernel's is in Spec.Boot
	Request    string // fingerprint of the create, by which a repetition is known
}

// Status is how a VM that does not run came to be so, and what is wanted.
type Status struct {
	State   vmm.State // stopped or failed
	Reason  string
	Since   time.Time
	Desired vmm.State
}

// Phase is how far a launch got.
type Phase string

// Phases. Intent is written before the process exists, Running after.
const (
	Intent  Phase = "intent"
	Running Phase = "running"
)

// Runtime is a hypervisor process that runs, or may.
type Runtime struct {
	VMID       string
	Phase      Phase
	Marker     string // argument that no other process has
	Process    proc.Identity
	StartedAt  time.Time
	Hypervisor string
	Spec       vmm.Spec // what it was started with, and what was plugged since
	Initramfs  string
	Driver     json.RawMessage `json:",omitempty"` // what the driver wants to know again
	Stop       string          // why it is being ended, "" if it is not
	Jailed     bool            `json:",omitempty"` // it was started in a jail, under a uid of its own:
	RunAs      vmm.RunAs       `json:",omitzero"`  // this one
	Reason     string          // of the state: "guest panicked"
	From       string          // memory snapshot that it was started from, "" if it booted
}

// DB is the open store.
type DB struct{ db *bbolt.DB }

// Open opens the store in dir. A second program on the same directory gets Unavailable.
func Open(dir string) (*DB, error) {
	path := filepath.Join(dir, "mvirt.db")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 2 * time.Second, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, errs.New(errs.Unavailable, "%s is in use by another process", path).Because("STORE_IN_USE").
			Do("stop the other plugin, or give this one another data directory")
	case errors.Is(err, os.ErrPermission):
		return nil, errs.Wrap(errs.Denied, err, "the store cannot be opened")
	case err != nil:
		return nil, &errs.Error{Kind: errs.Corrupt, Message: path + " cannot be opened", Err: err,
			Remedy: "restore it from a backup; running VMs are found again by their process"}
	}
	s := &DB{db: db}
	if err := s.init(path); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

func (s *DB) init(path string) error {
	var have string
	err := s.db.View(func(tx *bbolt.Tx) error {
		if b := tx.Bucket(metaBucket); b != nil {
			have = string(b.Get(formatKey))
		}
		return nil
	})
	if err != nil || have == Format {
		return err
	}
	if have != "" {
		return errs.New(errs.Precondition, "%s has format %q, this program knows %s", path, have, Format).Because("STORE_NEWER").
			Do("use the program that wrote it, or a newer one")
	}
	return s.db.Update(func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{metaBucket, vmsBucket, statusBucket, runtimeBucket} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return tx.Bucket(metaBucket).Put(formatKey, []byte(Format))
	})
}

// Close closes the store.
func (s *DB) Close() error { return s.db.Close() }

// Snapshot hands a consistent copy of the whole file to fn, with its size; the store goes on meanwhile.
func (s *DB) Snapshot(fn func(size int64, copyTo func(io.Writer) (int64, error)) error) error {
	return s.db.View(func(tx *bbolt.Tx) error { return fn(tx.Size(), tx.WriteTo) })
}

// Item is one stored thing, or why it cannot be read.
type Item[T any] struct {
	ID    string
	Value T
	Err   error
}

// Contents is all that the store holds.
type Contents struct {
	Definitions []Item[Definition]
	Status      []Item[Status]
	Runtime     []Item[Runtime]
}

// Load reads everything. One damaged value does not hide the others.
func (s *DB) Load() (Contents, error) {
	var c Contents
	err := s.db.View(func(tx *bbolt.Tx) error {
		c.Definitions = all[Definition](tx, vmsBucket)
		c.Status = all[Status](tx, statusBucket)
		c.Runtime = all[Runtime](tx, runtimeBucket)
		return nil
	})
	return c, err
}

func all[T any](tx *bbolt.Tx, bucket []byte) []Item[T] {
	var items []Item[T]
	_ = tx.Bucket(bucket).ForEach(func(k, v []byte) error {
		it := Item[T]{ID: string(k)}
		if err := json.Unmarshal(v, &it.Value); err != nil {
			it.Err = errs.Wrap(errs.Corrupt, err, "the stored %s of VM %s is damaged", bucket, k)
		}
		items = append(items, it)
		return nil
	})
	return items
}

// Change is what one transaction changes; nil parts stay as they are.
type Change struct {
	Definition    *Definition
	Status        *Status
	Runtime       *Runtime
	DeleteRuntime bool
	DeleteAll     bool // the VM is gone
}

// Apply makes a change durable, wholly or not at all.
func (s *DB) Apply(id string, c Change) error {
	err := s.db.Update(func(tx *bbolt.Tx) error {
		if c.DeleteAll {
			for _, b := range [][]byte{vmsBucket, statusBucket, runtimeBucket} {
				if err := tx.Bucket(b).Delete([]byte(id)); err != nil {
					return err
				}
			}
			return nil
		}
		if c.DeleteRuntime {
			if err := tx.Bucket(runtimeBucket).Delete([]byte(id)); err != nil {
				return err
			}
		}
		if err := put(tx, vmsBucket, id, c.Definition); err != nil {
			return err
		}
		if err := put(tx, statusBucket, id, c.Status); err != nil {
			return err
		}
		return put(tx, runtimeBucket, id, c.Runtime)
	})
	if err != nil {
		return errs.Wrap(errs.Unknown, err, "the change of VM %s cannot be stored", id)
	}
	return nil
}

func put[T any](tx *bbolt.Tx, bucket []byte, id string, v *T) error {
	if v == nil {
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", bucket, err)
	}
	return tx.Bucket(bucket).Put([]byte(id), b)
}
