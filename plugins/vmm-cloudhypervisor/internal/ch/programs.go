package ch

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mvirt/mvirt/sdk/errs"
)

var versionLine = regexp.MustCompile(`^cloud-hypervisor v([0-9]{1,4})\.([0-9]{1,4})`)

// program is a binary as it was found.
type program struct {
	path       string
	version    chVersion
	noShutdown bool // it has --no-shutdown
	err        error
	mark       fileMark
}

// fileMark tells whether a file is still the one that was asked: an upgrade puts another in its place.
type fileMark struct {
	dev, ino uint64
	size     int64
	mtime    int64
}

func markOf(path string) fileMark {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return fileMark{}
	}
	return fileMark{uint64(st.Dev), st.Ino, st.Size, st.Mtim.Nano()}
}

// programs are the binaries there are, side by side. Each is asked what it is at our start, and again when its
// file has changed. A VM that runs keeps the one that it was started with, whatever becomes of the file.
type programs struct {
	probed chan struct{} // closed when all have been asked once

	asking sync.Mutex // held while one is asked; before mu

	mu  sync.Mutex // guards what follows
	all []program
}

func newPrograms(paths []string) *programs {
	if len(paths) == 0 {
		paths = []string{""}
	}
	ps := &programs{probed: make(chan struct{}), all: make([]program, len(paths))}
	go func() {
		defer close(ps.probed)
		for i, path := range paths {
			p := ask(path)
			ps.mu.Lock()
			ps.all[i] = p
			ps.mu.Unlock()
		}
	}()
	return ps
}

func ask(path string) program {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	mark := markOf(path)
	p, err := probe(ctx, path)
	if path == "" {
		mark = markOf(p.path)
	}
	p.err, p.mark = err, mark
	return p
}

// get gives the program that VMs start with, or the one of a version.
func (ps *programs) get(ctx context.Context, version string) (program, error) {
	select {
	case <-ps.probed:
	case <-ctx.Done():
		return program{}, ctx.Err()
	}
	ps.asking.Lock()
	defer ps.asking.Unlock()
	ps.mu.Lock()
	all := slices.Clone(ps.all)
	ps.mu.Unlock()
	var have []string
	for i, p := range all {
		if p.err != nil || p.mark != markOf(p.path) {
			p = ask(p.path)
			ps.mu.Lock()
			ps.all[i] = p
			ps.mu.Unlock()
		}
		switch {
		case version == "":
			return p, p.err
		case p.err != nil:
		case p.version.String() == version:
			return p, nil
		default:
			have = append(have, p.version.String())
		}
	}
	return program{}, errs.New(errs.Precondition, "the snapshot was written by cloud-hypervisor %s; there is %s", version,
		strings.Join(have, ", ")).Because("OTHER_HYPERVISOR").Do("install that version beside the others, and give it with a second --cloud-hypervisor")
}

// troubles gives the errors of those that have been asked.
func (ps *programs) troubles() []error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	var all []error
	for _, p := range ps.all {
		if p.err != nil {
			all = append(all, p.err)
		}
	}
	return all
}

func parseVersion(s string) (chVersion, error) {
	var v chVersion
	if n, err := fmt.Sscanf(s, "%d.%d", &v.major, &v.minor); n != 2 || err != nil {
		return v, errs.New(errs.Corrupt, "%q is no version of cloud-hypervisor", s)
	}
	return v, nil
}

// probe asks a binary what it is.
func probe(ctx context.Context, path string) (program, error) {
	p := program{path: path}
	if path == "" {
		var err error
		if p.path, err = find("cloud-hypervisor", "/usr/local/bin", "/usr/bin", "/usr/libexec", "/opt/cloud-hypervisor/bin"); err != nil {
			return p, errs.Wrap(errs.Unavailable, err, "cloud-hypervisor is not installed").(*errs.Error).Because("PROGRAM_MISSING").
				Do("install it, or give its path with --cloud-hypervisor")
		}
	}
	out, err := output(ctx, p.path, "--version")
	if err != nil {
		return p, errs.Wrap(errs.Unavailable, err, "%s --version fails", p.path)
	}
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return p, errs.New(errs.Unavailable, "%s does not say that it is cloud-hypervisor", p.path).
			Do("give the right program with --cloud-hypervisor")
	}
	p.version.major, _ = strconv.Atoi(m[1]) // digits, by the pattern
	p.version.minor, _ = strconv.Atoi(m[2])
	if p.version.less(oldest) {
		return p, errs.New(errs.Unavailable, "%s is version %s; before %s a guest can read host files through its raw disk (CVE-2026-27211, CVE-2026-45782)",
			p.path, p.version, oldest).Because("PROGRAM_TOO_OLD").Do("install cloud-hypervisor " + oldest.String() + " or newer")
	}
	help, err := output(ctx, p.path, "--help")
	if err != nil {
		return p, errs.Wrap(errs.Unavailable, err, "%s --help fails", p.path)
	}
	p.noShutdown = strings.Contains(help, "--no-shutdown")
	return p, nil
}

func output(ctx context.Context, path string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = environment()
	b, err := cmd.Output()
	return string(b), err
}

func environment() []string { return []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "HOME=/"} }
