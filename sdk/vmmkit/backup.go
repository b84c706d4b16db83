package vmmkit

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/vmm"
	"github.com/mvirt/mvirt/sdk/vmmkit/store"
)

// A backup is a tar of "format" (a number in text), "mvirt.db" and "kernels/<sha256>", followed by the SHA-256
// of all that in 64 hexadecimal digits and a newline. Consoles, logs and what runs are not in it.
const (
	backupFormat = "1"
	maxBackupDB  = 16 << 30 // bytes of mvirt.db that a restore takes
)

var _ vmm.Backuper = (*Manager)(nil)

// ctxWriter ends with its context.
type ctxWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c ctxWriter) Write(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(b)
}

// Backup streams definitions and kernels as they are at one moment.
func (m *Manager) Backup(ctx context.Context, w io.Writer) error {
	h := sha256.New()
	t := tar.NewWriter(io.MultiWriter(ctxWriter{ctx, w}, h))
	entry := func(name string, size int64) error {
		return t.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, Format: tar.FormatPAX})
	}
	if err := entry("format", int64(len(backupFormat))); err != nil {
		return err
	}
	if _, err := io.WriteString(t, backupFormat); err != nil {
		return err
	}
	// The kernels that are held now stay while definitions cannot change.
	m.change.Lock()
	held := map[string]bool{}
	for _, v := range m.all() {
		v.mu.Lock()
		b := bootFilesOf(v.def)
		v.mu.Unlock()
		held[b.kernel], held[b.initramfs] = true, true
	}
	delete(held, "")
	for k := range held {
		m.kn.Hold(k)
		defer m.kn.Release(k)
	}
	copied := false
	err := m.db.Snapshot(func(size int64, copyTo func(io.Writer) (int64, error)) error {
		copied = true
		m.change.Unlock() // the read transaction keeps what it sees
		if err := entry("mvirt.db", size); err != nil {
			return err
		}
		_, err := copyTo(t)
		return err
	})
	if !copied {
		m.change.Unlock()
	}
	if err != nil {
		return err
	}
	for k := range held {
		if err := m.backupKernel(t, entry, k); err != nil {
			return err
		}
	}
	if err := t.Close(); err != nil {
		return err
	}
	_, err = io.WriteString(ctxWriter{ctx, w}, hex.EncodeToString(h.Sum(nil))+"\n")
	return err
}

func (m *Manager) backupKernel(t io.Writer, entry func(string, int64) error, k string) error {
	f, err := os.Open(m.kn.Path(k))
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := entry("kernels/"+k, st.Size()); err != nil {
		return err
	}
	_, err = io.Copy(t, f)
	return err
}

// Restore puts a backup back on a plugin that has no VM. Nothing is entered before all is read and checked.
// Hypervisors of these VMs that still run are found by their marker.
func (m *Manager) Restore(ctx context.Context, r io.Reader) error {
	m.change.Lock()
	defer m.change.Unlock()
	if vms, err := m.List(ctx); err != nil || len(vms) > 0 {
		return errors.Join(err, errs.New(errs.Precondition, "%d VMs are there already", len(vms)).Because("NOT_EMPTY").
			Do("restore on an empty data directory"))
	}
	dir, err := os.MkdirTemp(m.o.DataDir, ".restore-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	h := sha256.New()
	if err := m.unpack(ctx, dir, tar.NewReader(io.TeeReader(r, h))); err != nil {
		return err
	}
	if err := checkSum(r, h); err != nil {
		return errors.Join(err, m.kn.Sweep())
	}
	old, err := store.Open(dir)
	if err != nil {
		return errors.Join(err, m.kn.Sweep())
	}
	c, err := old.Load()
	if err := errors.Join(err, old.Close()); err != nil {
		return err
	}
	for _, it := range c.Definitions {
		if it.Err != nil {
			return errors.Join(it.Err, m.kn.Sweep())
		}
	}
	for _, it := range c.Definitions {
		if err := m.restoreOne(it.Value); err != nil {
			return err
		}
	}
	for _, v := range m.findStrays() {
		r, err := v.findRun(store.Item[store.Runtime]{ID: v.id, Err: errs.New(errs.Corrupt, "no record")})
		if err != nil {
			return err
		}
		if r != nil {
			m.clearCondition(condOrphan, v.id)
			m.wg.Add(1)
			go func() {
				defer m.wg.Done()
				v.reconnect(r, nil)
			}()
		}
	}
	return m.kn.Sweep()
}

func (m *Manager) restoreOne(def store.Definition) error {
	b := bootFilesOf(def)
	for _, k := range []string{b.kernel, b.initramfs} {
		if k == "" {
			continue
		}
		if _, err := os.Stat(m.kn.Path(k)); err != nil {
			return errs.Wrap(errs.Corrupt, err, "the backup lacks a kernel of VM %s", def.Spec.Name)
		}
	}
	st := store.Status{State: vmm.StateStopped, Reason: "restored from a backup", Since: m.o.Now(), Desired: vmm.StateStopped}
	as, err := m.identify(m.ctx, def.ID)
	if err != nil {
		return err
	}
	if err := errors.Join(m.makeVMDir(def.ID), m.db.Apply(def.ID, store.Change{Definition: &def, Status: &st})); err != nil {
		return err
	}
	m.kn.Hold(b.kernel)
	m.kn.Hold(b.initramfs)
	v := m.newMachine(def, st, as)
	v.mu.Lock()
	defer v.mu.Unlock()
	m.enter(v, vmm.EventChanged)
	return nil
}

// unpack takes the parts apart: the database into dir, kernels into the store.
func (m *Manager) unpack(ctx context.Context, dir string, t *tar.Reader) error {
	seen := map[string]bool{}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		hd, err := t.Next()
		if errors.Is(err, io.EOF) {
			if !seen["format"] || !seen["mvirt.db"] {
				return damaged(errors.New("a part is missing"))
			}
			return nil
		}
		if err != nil {
			return damaged(err)
		}
		if hd.Typeflag != tar.TypeReg || seen[hd.Name] || !seen["format"] && hd.Name != "format" {
			return damaged(fmt.Errorf("an entry %q is out of place", hd.Name))
		}
		seen[hd.Name] = true
		hash, isKernel := strings.CutPrefix(hd.Name, "kernels/")
		_, hexErr := hex.DecodeString(hash)
		switch {
		case hd.Name == "format":
			b, err := io.ReadAll(io.LimitReader(t, 16))
			if err != nil {
				return damaged(err)
			}
			if string(b) != backupFormat {
				return errs.New(errs.Precondition, "the backup has format %.16q, this program knows %s", b, backupFormat).Because("BACKUP_NEWER").
					Do("use the program that wrote it, or a newer one")
			}
		case hd.Name == "mvirt.db" && hd.Size <= maxBackupDB:
			f, err := os.OpenFile(filepath.Join(dir, "mvirt.db"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			_, err = io.Copy(f, t)
			if err := errors.Join(err, f.Close()); err != nil {
				return damaged(err)
			}
		case isKernel && len(hash) == 2*sha256.Size && hexErr == nil:
			if err := m.kn.Put(hash, t); err != nil {
				return damaged(err)
			}
		default:
			return damaged(fmt.Errorf("an entry %q is out of place", hd.Name))
		}
	}
}

// checkSum reads the sum behind the tar.
func checkSum(r io.Reader, h hash.Hash) error {
	sum := make([]byte, 2*sha256.Size+1)
	want := hex.EncodeToString(h.Sum(nil)) + "\n"
	if _, err := io.ReadFull(r, sum); err != nil {
		return damaged(err)
	}
	if string(sum) != want {
		return damaged(errors.New("its checksum is wrong"))
	}
	return nil
}

func damaged(err error) error {
	return &errs.Error{Kind: errs.Corrupt, Message: "the backup is damaged", Err: err, Remedy: "take another copy of it"}
}
