// Package store keeps what a storage plugin knows about its objects in metadata.db, a bbolt file.
//
// Buckets, each with ids as keys and JSON as values: "meta" (format version), "objects" (volumes, templates,
// snapshots), "intents" (changes that were begun), "imports". All of it is in memory as well, so that reading
// touches no disk; every change is one transaction, durable when it returns.
package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/storage"
)

// Version of the format. A file of a newer one is refused.
const Version = 1

// Kinds of objects.
const (
	Volume   = "volume"
	Template = "template"
	Snapshot = "snapshot"
)

// Object is a volume, a template or a snapshot.
type Object struct {
	Kind        string                   `json:"kind"`
	ID          string                   `json:"id"`
	Name        string                   `json:"name"`
	VolumeID    string                   `json:"volume_id,omitempty"` // of a snapshot
	Size        uint64                   `json:"size"`
	BlockSize   uint32                   `json:"block_size,omitempty"`
	OriginType  string                   `json:"origin_type,omitempty"`
	OriginID    string                   `json:"origin_id,omitempty"`
	CreatedAt   time.Time                `json:"created_at"`
	Labels      map[string]string        `json:"labels,omitempty"`
	Source      string                   `json:"source,omitempty"` // of a template
	Format      string                   `json:"format,omitempty"`
	Checksum    string                   `json:"checksum,omitempty"`
	Attachments []storage.AttachmentInfo `json:"attachments,omitempty"`
	// Request is what it was made by: a repeated create is told from a different one.
	Request string `json:"request,omitempty"`
}

// Clone returns a copy that shares nothing.
func (o Object) Clone() Object {
	if o.Labels != nil {
		m := make(map[string]string, len(o.Labels))
		for k, v := range o.Labels {
			m[k] = v
		}
		o.Labels = m
	}
	o.Attachments = slices.Clone(o.Attachments)
	return o
}

// Intent is a change that was begun. At the next start it is undone or finished.
type Intent struct {
	ID     string `json:"id"` // of the object: there is one change of an object at a time
	Op     string `json:"op"`
	Object Object `json:"object"`
	// Snapshot and Newer are for a rollback: where to, and which snapshots die.
	Snapshot *Object  `json:"snapshot,omitempty"`
	Newer    []Object `json:"newer,omitempty"`
	Name     string   `json:"name,omitempty"` // for a rename: the new one
}

// Ops of intents, and what becomes of them.
const (
	OpCreate   = "create"   // undone
	OpDelete   = "delete"   // finished
	OpPrepare  = "prepare"  // of a rollback: undone
	OpRollback = "rollback" // finished
	OpRename   = "rename"   // finished
)

// Import is an import job.
type Import struct {
	storage.Import
	Request storage.ImportRequest `json:"request"`         // without File
	Fetch   json.RawMessage       `json:"fetch,omitempty"` // fetch.State and the boot it belongs to
	// Commit is the template, once all of it is written: what remains is to put it in place.
	Commit *Object `json:"commit,omitempty"`
}

// Store is an open metadata.db, or what is known without one (see Memory). Safe for concurrent use.
type Store struct {
	db     *bolt.DB
	turn   chan struct{} // held by who writes the file: a disk that hangs must not keep readers waiting
	waiter time.Duration // how long a writer waits for its turn

	mu      sync.RWMutex
	objects map[string]Object
	names   map[string]string // of objects: kind, volume and name to id
	intents map[string]Intent
	imports map[string]Import
	// Of a store in memory: why nothing can be changed, and the attachments of objects that were noted.
	cause error
	noted map[string][]storage.AttachmentInfo
}

func nameKey(kind, volumeID, name string) string { return kind + "\x00" + volumeID + "\x00" + name }

var buckets = [...]string{"meta", "objects", "intents", "imports"}

// turnLimit is how long a change waits for those before it. A transaction takes milliseconds; one that does not
// end is on a disk that does not answer, and then whoever waits shall learn it.
const turnLimit = 20 * time.Second

func empty() *Store {
	return &Store{turn: make(chan struct{}, 1), waiter: turnLimit,
		objects: map[string]Object{}, names: map[string]string{}, intents: map[string]Intent{}, imports: map[string]Import{}}
}

// Memory is a store without a file: objects that can be looked at, and cause as the answer to every change.
func Memory(objects []Object, cause error) *Store {
	s := empty()
	s.Refresh(objects, cause)
	return s
}

// Refresh gives a store of Memory other objects; what is attached by Note stays so.
func (s *Store) Refresh(objects []Object, cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cause = cause
	clear(s.objects)
	clear(s.names)
	for _, o := range objects {
		if a, ok := s.noted[o.ID]; ok {
			o.Attachments = a
		}
		s.putLocked(o)
	}
}

// InMemory tells whether this is a store of Memory.
func (s *Store) InMemory() bool { return s.db == nil }

// Note changes the attachments of an object of a store of Memory, for as long as that lives.
func (s *Store) Note(o Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.noted == nil {
		s.noted = map[string][]storage.AttachmentInfo{}
	}
	s.noted[o.ID] = slices.Clone(o.Attachments)
	s.putLocked(o)
}

// Open opens or makes path. A file of another version or a damaged one gives errs.Corrupt or
// errs.Precondition, and is left as it is.
func Open(path string) (*Store, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 3 * time.Second, FreelistType: bolt.FreelistMapType})
	if err != nil {
		if errors.Is(err, bolterrors.ErrTimeout) {
			return nil, errs.New(errs.Precondition, "%s is in use by another process", path).
				Do("stop the other storage plugin that serves this place")
		}
		if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) || errs.KindOf(err) == errs.Exhausted {
			return nil, fmt.Errorf("open the metadata: %w", err)
		}
		return nil, &errs.Error{Kind: errs.Corrupt, Message: fmt.Sprintf("%s is damaged", path), Err: err,
			Remedy: "restore it from a backup; the volumes' files are untouched"}
	}
	s := empty()
	s.db = db
	if err := s.load(path); err != nil {
		db.Close()
		return nil, err
	}
	for id, o := range s.objects {
		s.names[nameKey(o.Kind, o.VolumeID, o.Name)] = id
	}
	// The file's name must survive a power cut as well.
	if d, err := os.Open(filepath.Dir(path)); err == nil {
		_ = d.Sync()
		d.Close()
	}
	return s, nil
}

func (s *Store) load(path string) (err error) {
	defer func() {
		// bbolt panics on pages that make no sense.
		if r := recover(); r != nil {
			err = errs.New(errs.Corrupt, "%s is damaged: %v", path, r).Do("restore it from a backup; the volumes are untouched")
		}
	}()
	err = s.db.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket([]byte("meta"))
		if meta != nil {
			var v int
			if err := json.Unmarshal(meta.Get([]byte("version")), &v); err != nil {
				return errs.New(errs.Corrupt, "%s has no format version", path).Do("restore it from a backup")
			}
			if v > Version {
				return errs.New(errs.Precondition, "%s has format version %d, this program knows %d", path, v, Version).
					Because("NEWER_FORMAT").Do("install the version of mvirt that wrote it, or a newer one")
			}
		}
		for _, b := range buckets {
			if _, err := tx.CreateBucketIfNotExists([]byte(b)); err != nil {
				return err
			}
		}
		if meta == nil {
			return tx.Bucket([]byte("meta")).Put([]byte("version"), fmt.Append(nil, Version))
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.db.View(func(tx *bolt.Tx) error {
		return errors.Join(read(tx, "objects", s.objects), read(tx, "intents", s.intents), read(tx, "imports", s.imports))
	})
}

func read[T any](tx *bolt.Tx, bucket string, into map[string]T) error {
	return tx.Bucket([]byte(bucket)).ForEach(func(k, v []byte) error {
		var t T
		if err := json.Unmarshal(v, &t); err != nil {
			return &errs.Error{Kind: errs.Corrupt, Message: fmt.Sprintf("the entry %s of %s is damaged", k, bucket), Err: err}
		}
		into[string(k)] = t
		return nil
	})
}

// Close closes the file.
func (s *Store) Close() error {
	if s.db == nil {
		return nil
	}
	return s.db.Close()
}

// Change is what one transaction does. Nil maps and slices do nothing.
type Change struct {
	Put          []Object
	Delete       []string
	Intend       *Intent
	Settle       string // id of an intent that is dealt with
	PutImport    *Import
	DeleteImport []string
}

// Apply makes a change durable and visible, all of it or nothing.
func (s *Store) Apply(c Change) error {
	if s.db == nil {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return s.cause
	}
	limit := time.NewTimer(s.waiter)
	defer limit.Stop()
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-limit.C:
		return errs.New(errs.Unavailable, "the metadata cannot be written: an earlier change still waits for the disk").
			Because("STORAGE_HANGS").Do("look at the state of the disk or pool; what waits goes on when it answers again")
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		objects, intents, imports := tx.Bucket([]byte("objects")), tx.Bucket([]byte("intents")), tx.Bucket([]byte("imports"))
		for _, o := range c.Put {
			if err := put(objects, o.ID, o); err != nil {
				return err
			}
		}
		for _, id := range c.Delete {
			if err := objects.Delete([]byte(id)); err != nil {
				return err
			}
		}
		if c.Intend != nil {
			if err := put(intents, c.Intend.ID, *c.Intend); err != nil {
				return err
			}
		}
		if c.Settle != "" {
			if err := intents.Delete([]byte(c.Settle)); err != nil {
				return err
			}
		}
		if c.PutImport != nil {
			if err := put(imports, c.PutImport.ID, *c.PutImport); err != nil {
				return err
			}
		}
		for _, id := range c.DeleteImport {
			if err := imports.Delete([]byte(id)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write the metadata: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range c.Put {
		s.putLocked(o)
	}
	for _, id := range c.Delete {
		s.forgetLocked(id)
	}
	if c.Intend != nil {
		s.intents[c.Intend.ID] = *c.Intend
	}
	delete(s.intents, c.Settle)
	if c.PutImport != nil {
		s.imports[c.PutImport.ID] = *c.PutImport
	}
	for _, id := range c.DeleteImport {
		delete(s.imports, id)
	}
	return nil
}

func (s *Store) putLocked(o Object) {
	s.forgetLocked(o.ID)
	s.objects[o.ID] = o.Clone()
	s.names[nameKey(o.Kind, o.VolumeID, o.Name)] = o.ID
}

func (s *Store) forgetLocked(id string) {
	if o, ok := s.objects[id]; ok {
		delete(s.objects, id)
		delete(s.names, nameKey(o.Kind, o.VolumeID, o.Name))
	}
}

func put(b *bolt.Bucket, key string, v any) error {
	j, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put([]byte(key), j)
}

// Get finds an object of a kind.
func (s *Store) Get(kind, id string) (Object, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.objects[id]
	if !ok || o.Kind != kind {
		return Object{}, false
	}
	return o.Clone(), true
}

// Any finds an object of whatever kind.
func (s *Store) Any(id string) (Object, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.objects[id]
	return o.Clone(), ok
}

// ByName finds an object by kind and name; volumeID is that of a snapshot, else "".
func (s *Store) ByName(kind, volumeID, name string) (Object, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.objects[s.names[nameKey(kind, volumeID, name)]]
	return o.Clone(), ok
}

// List returns all objects of a kind: snapshots oldest first, the others by name.
func (s *Store) List(kind string) []Object {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var l []Object
	for _, o := range s.objects {
		if o.Kind == kind {
			l = append(l, o.Clone())
		}
	}
	slices.SortFunc(l, func(a, b Object) int {
		if kind == Snapshot {
			if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
				return c
			}
			return strings.Compare(a.ID, b.ID)
		}
		return strings.Compare(a.Name, b.Name)
	})
	return l
}

// All returns all objects of one moment, by id.
func (s *Store) All() []Object {
	s.mu.RLock()
	defer s.mu.RUnlock()
	l := make([]Object, 0, len(s.objects))
	for _, o := range s.objects {
		l = append(l, o.Clone())
	}
	slices.SortFunc(l, func(a, b Object) int { return strings.Compare(a.ID, b.ID) })
	return l
}

// Intents returns all changes that were begun and are not settled.
func (s *Store) Intents() []Intent {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var l []Intent
	for _, i := range s.intents {
		l = append(l, i)
	}
	slices.SortFunc(l, func(a, b Intent) int { return strings.Compare(a.ID, b.ID) })
	return l
}

// Import finds an import.
func (s *Store) Import(id string) (Import, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	i, ok := s.imports[id]
	return i, ok
}

// Imports lists all, oldest first.
func (s *Store) Imports() []Import {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var l []Import
	for _, i := range s.imports {
		l = append(l, i)
	}
	slices.SortFunc(l, func(a, b Import) int {
		if c := a.StartedAt.Compare(b.StartedAt); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return l
}
