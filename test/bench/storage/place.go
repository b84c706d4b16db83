package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// place is where targets are made.
type place interface {
	durable() bool
	fresh(name string) (*os.File, error) // a new, empty target
	path(name string) string
	qemuOptions() []string // of qemu-img convert
	size() int64           // of a fresh target, where it has one
	suffix() string        // of a figure's name
	look(name string) error
}

// files are new files in a directory.
type files struct {
	dir  string
	sync bool
}

func (f files) durable() bool           { return f.sync }
func (f files) path(name string) string { return filepath.Join(f.dir, name) }
func (f files) qemuOptions() []string   { return nil }
func (f files) size() int64             { return 0 }
func (f files) suffix() string          { return "" }
func (f files) look(string) error       { return nil }

func (f files) fresh(name string) (*os.File, error) {
	if err := os.Remove(f.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return os.Create(f.path(name))
}

// zvols are new zvols of a pool, made as storage-zfs makes them.
type zvols struct {
	pool  string
	bytes int64
}

func (z zvols) durable() bool           { return true }
func (z zvols) path(name string) string { return "/dev/zvol/" + z.pool + "/" + name }
func (z zvols) qemuOptions() []string   { return []string{"-n", "--target-is-zero"} }
func (z zvols) size() int64             { return z.bytes }
func (z zvols) suffix() string          { return "_zvol" }

func (z zvols) fresh(name string) (*os.File, error) {
	_ = exec.Command("zfs", "destroy", z.pool+"/"+name).Run() // the first time there is none
	if out, err := exec.Command("zfs", "create", "-s", "-b", "16384", "-o", "volmode=dev", "-o", "compression=off",
		"-V", strconv.FormatInt(z.bytes, 10), z.pool+"/"+name).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("zfs create: %w: %s", err, out)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) { // until udev has made the link
		f, err := os.OpenFile(z.path(name), os.O_RDWR, 0)
		if err == nil || time.Now().After(end) {
			return f, err
		}
	}
}

// look measures what a zvol has allocated for the data, which is every other MiB.
func (z zvols) look(name string) error {
	if out, err := exec.Command("zpool", "sync", z.pool).CombinedOutput(); err != nil {
		return fmt.Errorf("zpool sync: %w: %s", err, out)
	}
	out, err := exec.Command("zfs", "get", "-H", "-p", "-o", "value", "referenced", z.pool+"/"+name).Output()
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(out)), 10, 64)
	if err != nil {
		return err
	}
	fmt.Printf("figure import_allocated_vs_data %.3f ratio aim <= 1.05\n", float64(n)/float64(z.bytes/2))
	return nil
}
