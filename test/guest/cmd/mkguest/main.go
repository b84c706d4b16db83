// Command mkguest puts the test guest into a directory: vmlinuz, initramfs.cpio, root.raw, root.qcow2.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/mvirt/mvirt/test/guest"
)

func main() {
	out := flag.String("out", "", "directory to copy the guest into; without it only its place in the cache is printed")
	flag.Parse()
	if err := build(*out); err != nil {
		fmt.Fprintln(os.Stderr, "mkguest:", err)
		os.Exit(1)
	}
}

func build(out string) error {
	g, err := guest.Build(context.Background(), func(format string, a ...any) {
		fmt.Fprintf(os.Stderr, "mkguest: "+format+"\n", a...)
	})
	if err != nil {
		return err
	}
	if out == "" {
		fmt.Println(g.Dir)
		return nil
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	for _, src := range []string{g.Kernel, g.Initramfs, g.RootRaw, g.RootQcow2} {
		if err := install(src, filepath.Join(out, filepath.Base(src))); err != nil {
			return err
		}
		fmt.Println(filepath.Join(out, filepath.Base(src)))
	}
	return nil
}

// install copies by way of a temporary name, so that what is there is always whole.
func install(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	f, err := os.CreateTemp(filepath.Dir(dst), "."+filepath.Base(dst)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := io.Copy(f, in); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	return os.Rename(f.Name(), dst)
}
