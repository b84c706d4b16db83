package engine

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/mvirt/mvirt/sdk/errs"
)

// A backup is a tar stream: first manifest.json, then the files of a Pebble checkpoint (db/) and of the log of
// what is not packed (raw/) under store/, each as the manifest says, and nothing else.
const (
	backupVersion  = 1
	manifestName   = "manifest.json"
	backupStoreDir = "store/"
)

type manifest struct {
	Format  string         `json:"format"` // "mvirt-log-backup"
	Version int            `json:"version"`
	Store   uint32         `json:"store_version"`
	Made    time.Time      `json:"made"`
	Files   []manifestFile `json:"files"`
}

type manifestFile struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

const backupFormat = "mvirt-log-backup"

// Backup streams a consistent copy: every entry acknowledged before the call is in it. The copy is made of
// hard links, so it takes no space while it streams.
func (s *Store) Backup(ctx context.Context, w io.Writer) error {
	dir := s.opt.FS.PathJoin(s.opt.Dir, backupDir+fmt.Sprint(s.opt.Now().UnixNano()))
	defer func() {
		if err := s.opt.FS.RemoveAll(dir); err != nil {
			s.log.Warn("the copy made for a backup is not removed; the next start does it", "error", err)
		}
	}()
	if err := s.checkpoint(dir); err != nil {
		return err
	}
	m := manifest{Format: backupFormat, Version: backupVersion, Store: formatVersion, Made: s.opt.Now().UTC()}
	for _, sub := range []string{dbDir, rawDir} {
		names, err := s.opt.FS.List(s.opt.FS.PathJoin(dir, sub))
		if err != nil {
			return errs.Wrap(kind(err), err, "list the copy")
		}
		slices.Sort(names)
		for _, n := range names {
			f, err := s.sum(ctx, s.opt.FS.PathJoin(dir, sub, n))
			if err != nil {
				return errs.Wrap(kind(err), err, "read the copy")
			}
			f.Name = sub + "/" + n
			m.Files = append(m.Files, f)
		}
	}
	head, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return errs.Wrap(errs.Internal, err, "write the manifest")
	}
	tw := tar.NewWriter(w)
	put := func(name string, size int64, r io.Reader) error {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: m.Made}); err != nil {
			return err
		}
		n, err := io.Copy(tw, readerContext{ctx, r})
		if err == nil && n != size {
			err = fmt.Errorf("%s has %d bytes, had %d", name, n, size)
		}
		return err
	}
	if err := put(manifestName, int64(len(head)), strings.NewReader(string(head))); err != nil {
		return errs.Wrap(kind(err), err, "write the backup")
	}
	for _, f := range m.Files {
		file, err := s.opt.FS.Open(s.opt.FS.PathJoin(dir, f.Name))
		if err != nil {
			return errs.Wrap(kind(err), err, "read the copy")
		}
		err = put(backupStoreDir+f.Name, f.Size, file)
		_ = file.Close()
		if err != nil {
			return errs.Wrap(kind(err), err, "write the backup")
		}
	}
	return errs.Wrap(errs.Unknown, tw.Close(), "write the backup")
}

func (s *Store) checkpoint(dir string) error {
	s.life.RLock()
	defer s.life.RUnlock()
	select {
	case <-s.done:
		return errClosed()
	default:
	}
	// Nothing is packed meanwhile, so nothing of the log is let go that the checkpoint does not have.
	s.sealMu.Lock()
	defer s.sealMu.Unlock()
	fs := s.opt.FS
	copyRaw := func() error {
		if err := fs.MkdirAll(fs.PathJoin(dir, rawDir), 0o700); err != nil {
			return err
		}
		for _, f := range s.raw.Files() {
			if err := copyFile(fs, fs.PathJoin(s.opt.Dir, storeDir, rawDir, f.Name), fs.PathJoin(dir, rawDir, f.Name), f.Size); err != nil {
				return err
			}
		}
		return nil
	}
	err := fs.MkdirAll(dir, 0o700)
	if err == nil {
		err = guard(func() error { return s.db.Checkpoint(fs.PathJoin(dir, dbDir)) })
	}
	if err == nil {
		err = copyRaw()
	}
	return errs.Wrap(kind(err), err, "make a consistent copy of the store")
}

func copyFile(fs vfs.FS, from, to string, size int64) error {
	in, err := fs.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := fs.Create(to, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, io.NewSectionReader(in, 0, size))
	return errors.Join(err, out.Close())
}

func (s *Store) sum(ctx context.Context, path string) (manifestFile, error) {
	f, err := s.opt.FS.Open(path)
	if err != nil {
		return manifestFile{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, readerContext{ctx, f})
	return manifestFile{Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, err
}

// readerContext ends reading when its context ends.
type readerContext struct {
	ctx context.Context
	r   io.Reader
}

func (r readerContext) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// Unpack reads a backup beside the store of a data directory and checks it against its manifest. The next
// Open puts it in the place of the store. A backup that is damaged or cut short leaves nothing.
func Unpack(ctx context.Context, fs vfs.FS, dir string, r io.Reader) error {
	path, err := unpack(ctx, fs, dir, r)
	if err != nil {
		return err
	}
	ready := fs.PathJoin(dir, readyDir)
	if err := errors.Join(fs.RemoveAll(ready), fs.Rename(path, ready), syncDir(fs, dir)); err != nil {
		return errs.Wrap(kind(err), err, "put the restored store in its place")
	}
	return nil
}

func unpack(ctx context.Context, fs vfs.FS, dir string, r io.Reader) (path string, err error) {
	bad := func(format string, args ...any) error {
		return errs.New(errs.Corrupt, "the backup is damaged: "+format, args...).Do("take another backup")
	}
	path = fs.PathJoin(dir, restoreDir)
	half := path
	if err := fs.RemoveAll(path); err != nil {
		return "", err
	}
	if err := errors.Join(fs.MkdirAll(fs.PathJoin(path, dbDir), 0o700), fs.MkdirAll(fs.PathJoin(path, rawDir), 0o700)); err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, fs.RemoveAll(half))
		}
	}()
	tr := tar.NewReader(readerContext{ctx, r})
	h, err := tr.Next()
	if err != nil || h.Name != manifestName || h.Size > 64<<20 {
		return "", bad("it does not begin with a manifest (%v)", err)
	}
	b, err := io.ReadAll(tr)
	var m manifest
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil || m.Format != backupFormat {
		return "", bad("the manifest cannot be read (%v)", err)
	}
	if m.Version != backupVersion || m.Store > formatVersion {
		return "", errs.New(errs.Precondition, "the backup has version %d of store version %d, this program knows %d and %d", m.Version, m.Store, backupVersion, formatVersion).
			Because("FORMAT_NEWER").Do("restore with the version of the log plugin that made it, or a newer one")
	}
	for _, f := range m.Files {
		sub, base, _ := strings.Cut(f.Name, "/")
		if sub != dbDir && sub != rawDir || base == "" || strings.ContainsAny(base, "/\\\x00") || base == "." || base == ".." {
			return "", bad("a file is called %q", f.Name)
		}
		h, err := tr.Next()
		if err != nil || h.Name != backupStoreDir+f.Name || h.Size != f.Size || h.Typeflag != tar.TypeReg {
			return "", bad("file %s is not where the manifest says (%v)", f.Name, err)
		}
		if err := unpackFile(fs, fs.PathJoin(path, sub, base), tr, f.SHA256); err != nil {
			if errors.Is(err, errSum) || errors.Is(err, io.ErrUnexpectedEOF) {
				return "", bad("file %s: %v", f.Name, err)
			}
			return "", err
		}
	}
	if _, err := tr.Next(); !errors.Is(err, io.EOF) {
		return "", bad("it goes on behind its last file (%v)", err)
	}
	return path, errors.Join(syncDir(fs, fs.PathJoin(path, dbDir)), syncDir(fs, fs.PathJoin(path, rawDir)), syncDir(fs, path))
}

var errSum = errors.New("its checksum does not agree")

func unpackFile(fs vfs.FS, path string, r io.Reader, want string) error {
	f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	h := sha256.New()
	// Hashed first: Pebble's file systems may, in tests, spoil a buffer once it is written.
	if _, err = io.Copy(io.MultiWriter(h, f), r); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if hex.EncodeToString(h.Sum(nil)) != want {
		return errSum
	}
	return nil
}
