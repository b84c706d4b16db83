package storagekit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit/internal/store"
)

// A backup is text: backupHead, then a line of JSON for each volume, template and snapshot, then
// "sha256 <64 hexadecimal digits> <number of objects>" over all that is before it. It holds what metadata.db knows;
// the data is copied by the means of the place (zfs send, a copy of the directory).
const (
	backupHead  = "mvirt-storage-backup 1\n"
	backupWord  = "mvirt-storage-backup "
	backupEnd   = "sha256 "
	maxLine     = 1 << 20   // of a line in a backup that is restored
	maxRestored = 1_000_000 // objects that a restore takes
)

var _ storage.Backuper = (*Service)(nil)

// Backup streams the records as they are at one moment.
func (s *Service) Backup(ctx context.Context, w io.Writer) error {
	st, err := s.reader(ctx)
	if err != nil {
		return err
	}
	h := sha256.New()
	out := bufio.NewWriter(io.MultiWriter(w, h))
	if _, err := out.WriteString(backupHead); err != nil {
		return err
	}
	objects := st.All()
	for _, o := range objects {
		if err := ctx.Err(); err != nil {
			return err
		}
		line, err := json.Marshal(o)
		if err != nil {
			return err
		}
		if _, err := out.Write(append(line, '\n')); err != nil {
			return err
		}
	}
	if err := out.Flush(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s%s %d\n", backupEnd, hex.EncodeToString(h.Sum(nil)), len(objects))
	return err
}

// Restore puts the records of a backup into a place that has none. Attachments are left out: no VM has these
// volumes open, and each start of one attaches them again. A record whose data is not there shows as damaged, until
// the data is. Nothing is entered before all is read and checked.
func (s *Service) Restore(ctx context.Context, r io.Reader) error {
	st, err := s.db(ctx)
	if err != nil {
		return err
	}
	objects, err := readBackup(ctx, r)
	if err != nil {
		return err
	}
	// Whoever makes something meanwhile finds its name and id checked under the same lock.
	s.mu.Lock()
	busy := len(st.All()) + len(s.reserved) + len(st.Intents())
	s.mu.Unlock()
	if busy > 0 {
		return errs.New(errs.Precondition, "there are volumes, templates or snapshots already").Because("NOT_EMPTY").
			Do("restore into a place that holds none")
	}
	return st.Apply(store.Change{Put: objects})
}

func readBackup(ctx context.Context, r io.Reader) ([]Object, error) {
	h := sha256.New()
	in := bufio.NewReaderSize(r, maxLine)
	next := func() ([]byte, error) {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return nil, damagedBackup(fmt.Errorf("it ends early or has a line that is too long: %w", err))
		}
		return line, nil
	}
	line, err := next()
	if err != nil {
		return nil, err
	}
	if string(line) != backupHead {
		if bytes.HasPrefix(line, []byte(backupWord)) {
			return nil, errs.New(errs.Precondition, "the backup has another format than this program writes").Because("BACKUP_NEWER").
				Do("use the program that wrote it, or a newer one")
		}
		return nil, damagedBackup(errors.New("it does not begin as one"))
	}
	h.Write(line)
	var objects []Object
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		line, err := next()
		if err != nil {
			return nil, err
		}
		if end, ok := bytes.CutPrefix(line, []byte(backupEnd)); ok {
			if want := fmt.Sprintf("%s %d\n", hex.EncodeToString(h.Sum(nil)), len(objects)); string(end) != want {
				return nil, damagedBackup(errors.New("its checksum is wrong"))
			}
			return objects, consistent(objects)
		}
		h.Write(line)
		var o Object
		if err := json.Unmarshal(line, &o); err != nil {
			return nil, damagedBackup(err)
		}
		o.Attachments = nil
		if objects = append(objects, o); len(objects) > maxRestored {
			return nil, damagedBackup(fmt.Errorf("it has more than %d objects", maxRestored))
		}
	}
}

// consistent checks what a backup says as if a stranger had written it: ids, names, and that none is there twice.
func consistent(objects []Object) error {
	seen := map[string]bool{}
	volumes := map[string]bool{}
	for _, o := range objects {
		key := o.Kind + "/" + o.VolumeID + "/" + o.Name
		kind := o.Kind == KindVolume || o.Kind == KindTemplate || o.Kind == KindSnapshot
		if err := errors.Join(ident.CheckID("id", o.ID), ident.CheckName("name", o.Name)); err != nil || !kind || seen[o.ID] || seen[key] {
			return damagedBackup(fmt.Errorf("the object %s is not one, or is there twice", ident.Quote(o.ID)))
		}
		seen[o.ID], seen[key] = true, true
		volumes[o.ID] = o.Kind == KindVolume
	}
	for _, o := range objects {
		if o.Kind == KindSnapshot && !volumes[o.VolumeID] {
			return damagedBackup(fmt.Errorf("the snapshot %s is of no volume", ident.Quote(o.ID)))
		}
	}
	return nil
}

func damagedBackup(err error) error {
	return &errs.Error{Kind: errs.Corrupt, Message: "the backup is damaged", Err: err, Remedy: "take another copy of it"}
}
