// Command storage measures how fast images are imported, against qemu-img convert onto the same file system.
//
// Both do the same work: a 2 GiB disk, every other MiB of it data from this machine's own programs and
// libraries, into a new file, until that is durable (ours syncs by itself, qemu-img's file is synced by us).
// Rounds are interleaved, the median of each side counts, and the outputs are compared byte by byte. A second
// row of figures, _engine, leaves out the process and the sync on both sides.
//
// With -zvol POOL, in the lab, targets are new sparse zvols of that pool, where qemu-img is told that they are zero
// (-n --target-is-zero); then there is no row of the engine alone, and import_allocated_vs_data is measured.
//
// Lines: figure NAME VALUE UNIT aim OP NUMBER. Exit code 1 when an output differs or something fails; an aim
// that is missed is told by its line.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/storagekit/image"
	"github.com/mvirt/mvirt/sdk/storagekit/worker"
)

const mib = 1 << 20

func main() {
	if len(os.Args) > 1 && os.Args[1] == worker.Name {
		os.Exit(worker.Main(nil))
	}
	rounds := flag.Int("rounds", 5, "rounds of each measurement")
	size := flag.Int64("size", 2<<30, "size of the disk in bytes")
	dir := flag.String("dir", "", "where to work; needs five times the size (default: the temporary directory)")
	only := flag.String("only", "", "measure only the figure of this name")
	pool := flag.String("zvol", "", "pool whose zvols are written to, instead of files")
	flag.Parse()
	if err := run(*rounds, *size, *dir, *only, *pool); err != nil {
		fmt.Fprintln(os.Stderr, "bench-storage:", err)
		os.Exit(1)
	}
}

// subject is one figure.
type subject struct {
	name   string
	format string
	args   []string // of qemu-img convert when the source is made
	aim    float64
}

func run(rounds int, size int64, dir, only, pool string) error {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return errors.New("qemu-img is not installed (package qemu-utils)")
	}
	dir, err := os.MkdirTemp(dir, "mvirt-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	raw := filepath.Join(dir, "raw")
	if err := makeDisk(raw, size); err != nil {
		return err
	}
	for _, s := range []subject{
		{"import_raw_vs_qemu_img", "raw", nil, 1.3},
		{"import_qcow2_vs_qemu_img", "qcow2", []string{}, 1.3},
		{"import_qcow2_zlib_vs_qemu_img", "qcow2", []string{"-c"}, 1.0},
		{"import_qcow2_zstd_vs_qemu_img", "qcow2", []string{"-c", "-o", "compression_type=zstd"}, 1.0},
	} {
		if only != "" && only != s.name {
			continue
		}
		src := raw
		if s.args != nil {
			src = filepath.Join(dir, "src")
			args := append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, s.args...), raw, src)
			if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
				return fmt.Errorf("qemu-img %v: %w: %s", args, err, out)
			}
		}
		if pool != "" {
			if err := s.measure(src, raw, rounds, size, zvols{pool, size}); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			continue
		}
		for _, durable := range []bool{true, false} {
			if err := s.measure(src, raw, rounds, size, files{dir, durable}); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	return nil
}

// makeDisk writes every other MiB from the machine's programs and libraries.
func makeDisk(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := &corpus{}
	buf := make([]byte, mib)
	for off := int64(0); off < size; off += 2 * mib {
		if _, err := io.ReadFull(r, buf); err != nil {
			return err
		}
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
	}
	return errors.Join(f.Truncate(size), f.Sync())
}

// corpus reads the files below /usr one after the other, without end.
type corpus struct {
	files []string
	next  int
	cur   *os.File
}

func (c *corpus) Read(p []byte) (int, error) {
	if c.files == nil {
		for _, d := range []string{"/usr/bin", "/usr/lib", "/usr/share"} {
			_ = filepath.WalkDir(d, func(path string, e fs.DirEntry, err error) error {
				if err == nil && e.Type().IsRegular() {
					if info, err := e.Info(); err == nil && info.Size() > 64<<10 {
						c.files = append(c.files, path)
					}
				}
				return nil
			})
		}
		if len(c.files) == 0 {
			return 0, errors.New("there are no files below /usr")
		}
	}
	for range len(c.files) + 1 {
		if c.cur == nil {
			f, err := os.Open(c.files[c.next%len(c.files)])
			c.next++
			if err != nil {
				continue
			}
			c.cur = f
		}
		n, err := c.cur.Read(p)
		if n > 0 {
			return n, nil
		}
		if err != nil {
			c.cur.Close()
			c.cur = nil
		}
	}
	return 0, errors.New("no file below /usr can be read")
}

func (s subject) measure(src, raw string, rounds int, size int64, on place) error {
	durable := on.durable()
	var us, them []time.Duration
	var usCPU, themCPU time.Duration
	for i := range rounds {
		for k := range 2 {
			runtime.GC()
			before := children()
			if (i+k)%2 == 0 { // neither is always first
				d, err := timed(on, "ours", func(f *os.File) error { return s.ours(src, f, on) })
				if err != nil {
					return err
				}
				us = append(us, d)
				usCPU += children() - before
			} else {
				d, err := timed(on, "theirs", func(f *os.File) error {
					args := append([]string{"convert", "-f", s.format, "-O", "raw"}, on.qemuOptions()...)
					out, err := exec.Command("qemu-img", append(args, src, f.Name())...).CombinedOutput()
					if err != nil {
						return fmt.Errorf("%w: %s", err, out)
					}
					return nil
				})
				if err != nil {
					return err
				}
				them = append(them, d)
				themCPU += children() - before
			}
		}
		if i == 0 {
			for _, name := range []string{"ours", "theirs"} {
				if err := equal(on.path(name), raw); err != nil {
					return err
				}
			}
			if err := on.look("ours"); err != nil {
				return err
			}
		}
	}
	a, b := median(us), median(them)
	name := s.name + on.suffix()
	if !durable {
		name += "_engine"
	}
	fmt.Printf("figure %s %.2f ratio aim >= %.1f\n", name, b.Seconds()/a.Seconds(), s.aim)
	fmt.Printf("# %s: ours %.3f s (best %.3f), qemu-img %.3f s (best %.3f); %.0f against %.0f MiB/s\n", name, a.Seconds(), slices.Min(us).Seconds(),
		b.Seconds(), slices.Min(them).Seconds(), float64(size)/mib/a.Seconds(), float64(size)/mib/b.Seconds())
	if durable {
		fmt.Printf("# %s: processor time %.2f of qemu-img's\n", name, usCPU.Seconds()/themCPU.Seconds())
	}
	return nil
}

// children is the processor time of all processes that we started and that have ended: unlike the clock it
// says something on a busy machine as well.
func children() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// timed runs fn on a new target and counts until it is durable, if it is to be.
func timed(on place, name string, fn func(f *os.File) error) (time.Duration, error) {
	f, err := on.fresh(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// What other rounds left to be written must not be waited for in this one.
	if err := exec.Command("sync").Run(); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := fn(f); err != nil {
		return 0, err
	}
	if on.durable() {
		err = f.Sync()
	}
	return time.Since(began), err
}

// ours imports: by the worker process, as the product does, or by the engine alone.
func (s subject) ours(src string, dst *os.File, on place) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	lim := image.Limits{MaxVirtualSize: 1 << 40, MaxScratch: 1 << 40, Writers: max(runtime.NumCPU(), 2)}
	if !on.durable() {
		_, err := image.Convert(context.Background(), &image.FileSource{File: in, Length: info.Size()}, &file{File: dst}, nil, lim, silent{})
		return err
	}
	scratch, err := os.CreateTemp("", "scratch")
	if err != nil {
		return err
	}
	defer os.Remove(scratch.Name())
	defer scratch.Close()
	as, err := worker.LookupIdentity("nobody")
	if err != nil {
		return err
	}
	_, err = worker.Run(context.Background(), worker.Job{As: as, Source: in, Length: info.Size(), Whole: true, Hint: info.Size(), Scratch: scratch,
		Limits: lim, Target: func(string, int64) (*os.File, int64, bool, error) { return dst, on.size(), on.size() > 0, nil },
		Progress: func(int64, int64, int64) {}})
	return err
}

// file is a target that grows by being written to.
type file struct {
	*os.File
	mu   sync.Mutex
	size int64
}

func (f *file) Grow(size int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if size <= f.size {
		return nil
	}
	f.size = size
	return f.Truncate(size)
}

type silent struct{}

func (silent) Format(string, int64)         {}
func (silent) Progress(int64, int64, int64) {}

func median(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}

func equal(a, b string) error {
	f, err := os.Open(a)
	if err != nil {
		return err
	}
	defer f.Close()
	g, err := os.Open(b)
	if err != nil {
		return err
	}
	defer g.Close()
	x, y := make([]byte, 4*mib), make([]byte, 4*mib)
	for {
		n, e1 := io.ReadFull(f, x)
		m, e2 := io.ReadFull(g, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return fmt.Errorf("%s differs from %s", a, b)
		}
		if e1 != nil || e2 != nil {
			return nil
		}
	}
}
