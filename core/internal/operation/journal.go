package operation

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/mvirt/mvirt/sdk/errs"
)

// journalVersion is the format of records. A journal of a newer version is refused.
const journalVersion = 1

var (
	bucketMeta = []byte("meta")
	bucketOps  = []byte("operations") // id → Operation as JSON
	keyVersion = []byte("version")
)

// store is what the engine needs of a journal. All writes are durable when they return.
type store interface {
	put(ops ...*Operation) error
	remove(ids ...string) error
	load() ([]*Operation, error)
	close() error
}

// journal keeps operations in a bbolt file.
type journal struct{ db *bolt.DB }

func openJournal(path string) (*journal, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, errs.Wrap(errs.Unknown, err, "directory of the journal")
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 2 * time.Second, FreelistType: bolt.FreelistMapType, NoFreelistSync: true})
	if err != nil {
		if errors.Is(err, berrors.ErrTimeout) {
			return nil, &errs.Error{Kind: errs.Precondition, Message: "the journal " + path + " is in use by another process", Remedy: "stop the other mvirtd, or give this one another state_dir", Err: err}
		}
		return nil, &errs.Error{Kind: errs.Corrupt, Message: "open journal " + path, Remedy: "restore the core's state_dir from a backup, or move the file away: operations under way at the last end are then not undone", Err: err}
	}
	err = db.Update(func(tx *bolt.Tx) error {
		if _, err := tx.CreateBucketIfNotExists(bucketOps); err != nil {
			return err
		}
		meta, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		want := fmt.Sprint(journalVersion)
		switch have := string(meta.Get(keyVersion)); have {
		case want:
			return nil
		case "":
			return meta.Put(keyVersion, []byte(want))
		default:
			return errs.New(errs.Precondition, "journal %s has version %s, this mvirtd writes version %s", path, have, want).
				Do("run the mvirtd that wrote it")
		}
	})
	if err != nil {
		db.Close()
		return nil, err
	}
	return &journal{db}, nil
}

func (j *journal) put(ops ...*Operation) error {
	err := j.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketOps)
		for _, op := range ops {
			raw, err := json.Marshal(op)
			if err != nil {
				return err
			}
			if err := b.Put([]byte(op.ID), raw); err != nil {
				return err
			}
		}
		return nil
	})
	return errs.Wrap(errs.Unknown, err, "write the journal of operations")
}

func (j *journal) remove(ids ...string) error {
	err := j.db.Update(func(tx *bolt.Tx) error {
		for _, id := range ids {
			if err := tx.Bucket(bucketOps).Delete([]byte(id)); err != nil {
				return err
			}
		}
		return nil
	})
	return errs.Wrap(errs.Unknown, err, "write the journal of operations")
}

// load returns all records, oldest first (ids are UUIDv7). A record that cannot be read is an error: it may
// stand for something half done.
func (j *journal) load() (out []*Operation, err error) {
	err = j.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketOps).ForEach(func(k, v []byte) error {
			op := &Operation{}
			if err := json.Unmarshal(v, op); err != nil {
				return errs.Wrap(errs.Corrupt, err, "operation %s in the journal", k)
			}
			if op.Version > journalVersion {
				return errs.New(errs.Precondition, "operation %s in the journal has version %d, this mvirtd reads up to %d", k, op.Version, journalVersion).
					Do("run the mvirtd that wrote it")
			}
			out = append(out, op)
			return nil
		})
	})
	return out, err
}

func (j *journal) close() error { return j.db.Close() }
