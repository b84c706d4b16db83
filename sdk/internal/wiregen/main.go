// Command wiregen writes sdk/internal/wire's conversions and gRPC adapters from the contract packages.
//
//	go run ./sdk/internal/wiregen            write sdk/internal/wire/zz_*.go
//	go run ./sdk/internal/wiregen -proto P   print a first .proto for the contract package P
//
// It reads the Go side only; names on the proto side follow from the Go names (names.go). What does not
// match does not compile, and what stands in a .proto alone fails a test of package wire.
package main

import (
	"flag"
	"fmt"
	"go/format"
	"os"
	"path/filepath"
)

func main() {
	proto := flag.String("proto", "", "print a first .proto for this contract package and stop")
	flag.Parse()
	if err := run(*proto); err != nil {
		fmt.Fprintln(os.Stderr, "wiregen:", err)
		os.Exit(1)
	}
}

func run(proto string) error {
	if proto != "" {
		m, err := load(filepath.Join("sdk", proto))
		if err != nil {
			return err
		}
		fmt.Print(m.proto())
		return nil
	}
	var models []*model
	for _, pkg := range []string{"service", "storage", "net", "vmm", "log"} {
		m, err := load(filepath.Join("sdk", pkg))
		if err != nil {
			return err
		}
		models = append(models, m)
		if err := write("zz_"+pkg+"_convert.go", m.convert()); err != nil {
			return err
		}
		if pkg == "service" {
			continue
		}
		if err := write("zz_"+pkg+"_rpc.go", m.adapt()); err != nil {
			return err
		}
	}
	return write("zz_pairs_test.go", pairs(models))
}

func write(name, text string) error {
	src, err := format.Source([]byte(text))
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, text)
	}
	return os.WriteFile(filepath.Join("sdk", "internal", "wire", name), src, 0o644)
}
