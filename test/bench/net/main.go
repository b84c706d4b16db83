// Command net measures mvirt-net: packets per second and bytes per second through the packet engine on
// vhost-user ports, round trips, memory and idle CPU of a worker, and the start with 1,000 NICs.
//
// The measuring itself is plugins/net-tap/internal/netbench, which needs what is internal to the plugin; this
// program runs it and passes its lines on: figure NAME VALUE UNIT aim OP NUMBER (or "report" where there is
// no aim), and note TEXT.
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-net:", err)
		os.Exit(1)
	}
}

func run() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("needs root: it makes TAPs in namespaces of its own")
	}
	cmd := exec.Command("go", "test", "-count=1", "-timeout=10m", "-run=^TestFigures$", "-v", "./plugins/net-tap/internal/netbench")
	cmd.Env = append(os.Environ(), "MVIRT_BENCH_NET=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	figures := 0
	for sc := bufio.NewScanner(out); sc.Scan(); {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, "figure "):
			figures++
			fmt.Println(line)
		case strings.HasPrefix(line, "note "):
			fmt.Println(line)
		case strings.Contains(line, "_test.go:") || strings.HasPrefix(line, "---") || strings.HasPrefix(line, "panic"):
			fmt.Fprintln(os.Stderr, line)
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("the measurement failed: %w", err)
	}
	if figures == 0 {
		return fmt.Errorf("nothing was measured")
	}
	return nil
}
