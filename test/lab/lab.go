// Package lab runs programs inside the lab: a Debian guest under QEMU TCG where OpenZFS, KVM (nested),
// vhost-net and udev are real, whatever the host lacks.
//
// What the guest is made of is built by build.sh into a cache outside the checkout. Each run starts from a
// clean disk, gets a directory, runs the file `run` in it as root, streams its output, and brings back its
// exit code and what it left in /lab/out.
//
// The way in and out are two virtio disks: "lab-in" holds a tar of the directory; "lab-out" gets, from byte
// 65536 on, a tar of /lab/out, and then, last, a header line "MVIRT-LAB <exit code>" in its first sector, so
// that an answer which was cut off is never taken for one.
package lab

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Image is a built lab.
type Image struct {
	Dir string // holds vmlinuz, initrd, root.img
}

// Build finds the image in the cache or builds it; source is the directory of build.sh. Building takes
// minutes and writes what it does to stderr.
func Build(ctx context.Context, source string) (Image, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(source, "build.sh"), "build")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return Image{}, fmt.Errorf("building the lab: %w", err)
	}
	lines := strings.Fields(string(out))
	if len(lines) == 0 {
		return Image{}, errors.New("building the lab: build.sh named no folder")
	}
	return Image{Dir: lines[len(lines)-1]}, nil
}

// Options of a run.
type Options struct {
	In        string        // directory that goes in; its file `run` is run
	Out       string        // directory that /lab/out comes back to; "": thrown away
	Timeout   time.Duration // of the whole run; 0: 20 minutes. Then the guest is killed
	Memory    string        // "4G" where empty
	Disks     []string      // sizes of empty disks ("8G"); the guest sees serials lab-disk0, lab-disk1, …
	Systemd   bool          // boot systemd and run as a service, instead of as PID 1
	Shell     bool          // an interactive shell instead of `run`
	Output    io.Writer     // what the guest prints
	KernelLog string        // file for the kernel's console; "": thrown away
}

// outOffset is where the tar begins on lab-out; the header has the first sector.
const outOffset = 65536

// ErrNoAnswer means that the guest ended without saying how its program ended: killed, crashed, or out of time.
var ErrNoAnswer = errors.New("the lab ended without an answer")

// Run boots the guest and returns the exit code of `run`.
func (img Image) Run(ctx context.Context, o Options) (int, error) {
	if o.Timeout == 0 {
		o.Timeout = 20 * time.Minute
	}
	if o.Memory == "" {
		o.Memory = "4G"
	}
	if o.Output == nil {
		o.Output = io.Discard
	}
	tmp, err := os.MkdirTemp("", "mvirt-lab-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(tmp)
	in, out := filepath.Join(tmp, "in.tar"), filepath.Join(tmp, "out.img")
	if err := pack(in, o.In, o.Shell); err != nil {
		return 0, fmt.Errorf("packing %s: %w", o.In, err)
	}
	if err := sparse(out, 8<<30); err != nil {
		return 0, err
	}
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", o.Memory,
		"-kernel", filepath.Join(img.Dir, "vmlinuz"), "-initrd", filepath.Join(img.Dir, "initrd"),
		"-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
		"-chardev", "stdio,id=con,signal=off", "-device", "virtconsole,chardev=con"}
	drive := func(id, file, extra string) {
		args = append(args, "-drive", "if=none,format=raw,cache=unsafe,discard=unmap,id="+id+",file="+file+extra,
			"-device", "virtio-blk-pci,drive="+id+",serial="+id)
	}
	drive("lab-root", filepath.Join(img.Dir, "root.img"), ",snapshot=on")
	drive("lab-in", in, ",readonly=on")
	drive("lab-out", out, "")
	for i, size := range o.Disks {
		file := filepath.Join(tmp, fmt.Sprintf("disk%d.img", i))
		n, err := parseSize(size)
		if err != nil {
			return 0, err
		}
		if err := sparse(file, n); err != nil {
			return 0, err
		}
		drive(fmt.Sprintf("lab-disk%d", i), file, "")
	}
	klog := o.KernelLog
	if klog == "" {
		klog = filepath.Join(tmp, "kernel.log")
	}
	args = append(args, "-serial", "file:"+klog)
	cmdline := "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0"
	if o.Systemd {
		cmdline += " LAB_INIT=/lib/systemd/systemd"
	}
	args = append(args, "-append", cmdline)

	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp) // the snapshot of the root disk
	cmd.Stdout, cmd.Stderr = o.Output, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	if o.Shell {
		cmd.Stdin = os.Stdin
	}
	// The signal comes when the thread that started QEMU ends, not the process (prctl(2)).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	runErr := cmd.Run()
	code, err := header(out)
	if err != nil {
		tail(os.Stderr, klog)
		if ctx.Err() != nil {
			return 0, fmt.Errorf("%w: killed after %v", ErrNoAnswer, o.Timeout)
		}
		return 0, fmt.Errorf("%w (qemu: %v)", ErrNoAnswer, runErr)
	}
	if o.Out != "" {
		if err := unpack(out, o.Out); err != nil {
			return code, fmt.Errorf("unpacking what the lab left: %w", err)
		}
	}
	return code, nil
}

func sparse(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

func parseSize(s string) (int64, error) {
	mult := int64(1)
	switch {
	case strings.HasSuffix(s, "G"):
		mult = 1 << 30
	case strings.HasSuffix(s, "M"):
		mult = 1 << 20
	}
	n, err := strconv.ParseInt(strings.TrimRight(s, "GM"), 10, 64)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("disk size %q: give a number with M or G behind it", s)
	}
	return n * mult, nil
}

// pack writes dir as a tar, following symbolic links at the top so that programs can be linked in.
func pack(file, dir string, shell bool) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	tw := tar.NewWriter(w)
	if shell {
		if err := tw.WriteHeader(&tar.Header{Name: ".shell", Mode: 0o644, Typeflag: tar.TypeReg}); err != nil {
			return err
		}
	}
	if dir != "" {
		if err := addTree(tw, dir); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return f.Truncate((st.Size() + 4095) / 4096 * 4096)
}

func addTree(tw *tar.Writer, dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || rel == "." {
			return err
		}
		st, err := os.Stat(path) // follows links
		if err != nil {
			return err
		}
		h, err := tar.FileInfoHeader(st, "")
		if err != nil {
			return err
		}
		h.Name, h.Uid, h.Gid, h.Uname, h.Gname = rel, 0, 0, "", ""
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if !st.Mode().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(tw, f)
		return err
	})
}

func header(file string) (int, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var b [512]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		return 0, err
	}
	var code int
	if _, err := fmt.Sscanf(string(b[:32]), "MVIRT-LAB %d\n", &code); err != nil {
		return 0, ErrNoAnswer
	}
	return code, nil
}

// unpack takes files and directories only, and only below dir: what runs in the lab is not trusted with more.
func unpack(file, dir string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(outOffset, io.SeekStart); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for tr := tar.NewReader(bufio.NewReader(f)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		name := filepath.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			if name != "." {
				err = root.MkdirAll(name, 0o755)
			}
		case tar.TypeReg:
			err = writeFile(root, name, tr)
		}
		if err != nil {
			return err
		}
	}
}

func writeFile(root *os.Root, name string, r io.Reader) error {
	f, err := root.Create(name)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// tail prints the end of the kernel's console, which is where the reason of a missing answer stands.
func tail(w io.Writer, file string) {
	b, err := os.ReadFile(file)
	if err != nil || len(b) == 0 {
		return
	}
	if len(b) > 4096 {
		b = b[len(b)-4096:]
	}
	fmt.Fprintf(w, "--- end of the lab's kernel console ---\n%s\n---\n", b)
}
