package guest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
)

// modules that the guest wants; what they depend on is found in the modules themselves.
var modules = []string{"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "button", "evdev",
	"isofs", "pvpanic-pci", "virtio_balloon", "virtio_mem", "vmw_vsock_virtio_transport"}

// module is a kernel module and what must be loaded before it.
type module struct {
	name string
	deps []string
	data []byte
}

func (m module) file() string { return m.name + ".ko" }

// run runs a command and gives its output; its complaints go into the error.
func run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.Bytes(), nil
}

// candidate is a package as apt would install it.
type candidate struct{ name, version, sha256, depends string }

// lookup asks apt for the newest version of a package.
func lookup(ctx context.Context, name string) (candidate, error) {
	out, err := run(ctx, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return candidate{}, err
	}
	c := candidate{name: name}
	sc := bufio.NewScanner(bytes.NewReader(out))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		k, v, _ := strings.Cut(sc.Text(), ": ")
		switch k {
		case "Version":
			c.version = v
		case "SHA256":
			c.sha256 = v
		case "Depends":
			c.depends = v
		}
	}
	if c.version == "" || c.sha256 == "" {
		return candidate{}, fmt.Errorf("apt knows no package %s; run apt-get update", name)
	}
	return c, nil
}

// debFile gives the path of a package's file, downloading it if the cache has it not.
func debFile(ctx context.Context, cache string, c candidate, logf func(string, ...any)) (string, error) {
	dst := filepath.Join(cache, "deb", c.sha256+".deb")
	if hashIs(dst, c.sha256) {
		return dst, nil
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dst), "get-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	logf("downloading %s %s", c.name, c.version)
	cmd := exec.CommandContext(ctx, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", c.name+"="+c.version)
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("apt-get download %s: %w: %s", c.name, err, bytes.TrimSpace(out))
	}
	got, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(got) != 1 {
		return "", fmt.Errorf("apt-get download %s left %d files", c.name, len(got))
	}
	if !hashIs(got[0], c.sha256) {
		return "", fmt.Errorf("package %s has not the hash that apt promised", c.name)
	}
	return dst, os.Rename(got[0], dst)
}

func hashIs(file, want string) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return err == nil && hex.EncodeToString(h.Sum(nil)) == want
}

// extract gives the contents of the files in a package for which want is true, by path without "./".
func extract(ctx context.Context, deb string, want func(string) bool) (map[string][]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	got := map[string][]byte{}
	for r := tar.NewReader(pipe); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", deb, err), cmd.Wait())
		}
		name := path.Clean(h.Name)
		if h.Typeflag != tar.TypeReg || !want(name) {
			continue
		}
		if got[name], err = io.ReadAll(r); err != nil {
			return nil, err
		}
	}
	_, _ = io.Copy(io.Discard, pipe)
	return got, cmd.Wait()
}

var kernelPackage = regexp.MustCompile(`linux-image-[0-9][a-z0-9.+-]*-cloud-amd64`)

// kernelCandidate finds the package of the newest cloud kernel.
func kernelCandidate(ctx context.Context) (candidate, error) {
	meta, err := lookup(ctx, "linux-image-cloud-amd64")
	if err != nil {
		return candidate{}, err
	}
	name := kernelPackage.FindString(meta.depends)
	if name == "" {
		return candidate{}, fmt.Errorf("linux-image-cloud-amd64 depends on no kernel: %q", meta.depends)
	}
	return lookup(ctx, name)
}

// kernel gives the cloud kernel and all of its modules by name.
func kernel(ctx context.Context, deb string) ([]byte, map[string][]byte, error) {
	got, err := extract(ctx, deb, func(n string) bool {
		return strings.HasPrefix(n, "boot/vmlinuz-") || strings.HasSuffix(n, ".ko")
	})
	if err != nil {
		return nil, nil, err
	}
	var image []byte
	mods := map[string][]byte{}
	for n, data := range got {
		if strings.HasPrefix(n, "boot/") {
			image = data
		} else {
			mods[strings.TrimSuffix(path.Base(n), ".ko")] = data
		}
	}
	if image == nil {
		return nil, nil, fmt.Errorf("%s holds no kernel", deb)
	}
	return image, mods, nil
}

// closure orders the wanted modules and all that they need so that needs come first. A wanted module that
// the kernel lacks is an error; it may have become built in, and then the list above must change.
func closure(all map[string][]byte, wanted []string) ([]module, error) {
	var order []module
	done := map[string]bool{}
	var visit func(string, string) error
	visit = func(name, by string) error {
		key := strings.ReplaceAll(name, "-", "_")
		if done[key] {
			return nil
		}
		done[key] = true
		data, ok := all[name]
		for _, alt := range []string{strings.ReplaceAll(name, "_", "-"), key} {
			if !ok {
				if data, ok = all[alt]; ok {
					name = alt
				}
			}
		}
		if !ok {
			return fmt.Errorf("the kernel has no module %s, wanted by %s", name, by)
		}
		deps, err := moduleDeps(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, d := range deps {
			if err := visit(d, name); err != nil {
				return err
			}
		}
		order = append(order, module{name: name, deps: deps, data: data})
		return nil
	}
	for _, w := range wanted {
		if err := visit(w, "the guest"); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleDeps reads "depends=a,b" of a module's .modinfo section.
func moduleDeps(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	var deps []string
	for _, kv := range bytes.Split(info, []byte{0}) {
		if v, ok := strings.CutPrefix(string(kv), "depends="); ok && v != "" {
			deps = append(deps, strings.Split(v, ",")...)
		}
	}
	sort.Strings(deps)
	return deps, nil
}

// busybox gives the static busybox and the names of its applets.
func busybox(ctx context.Context, cache, deb string) ([]byte, []string, error) {
	got, err := extract(ctx, deb, func(n string) bool { return n == "bin/busybox" || n == "usr/bin/busybox" })
	if err != nil {
		return nil, nil, err
	}
	for _, data := range got {
		tmp, err := os.MkdirTemp(cache, "busybox-")
		if err != nil {
			return nil, nil, err
		}
		defer os.RemoveAll(tmp)
		bin := filepath.Join(tmp, "busybox")
		if err := os.WriteFile(bin, data, 0o755); err != nil {
			return nil, nil, err
		}
		out, err := run(ctx, bin, "--list")
		return data, strings.Fields(string(out)), err
	}
	return nil, nil, errors.New("busybox-static holds no busybox")
}
