// Command net measures mvirt-net: packets per second through the packet engine on vhost-user ports against DPDK,
// bytes per second, two real guests against a kernel bridge, round trips, memory and idle CPU of a worker, and
// the start with 1,000 NICs. With a part's name as argument (dpdk, virtio-user, gso, rtt, idle, restart, guests)
// only that is measured.
//
// The measuring itself is in tests of plugins/net-tap, which need what is internal to the plugin; this program
// runs them and passes their lines on: figure NAME VALUE UNIT aim OP NUMBER (or "report" where there is
// no aim), and note TEXT.
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"regexp"
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
	part := "[^/]*"
	if len(os.Args) > 1 {
		part = regexp.QuoteMeta(os.Args[1])
	}
	figures := 0
	if part != "guests" {
		n, err := measure("./plugins/net-tap/internal/netbench", "^TestFigures$/^"+part+"$")
		if err != nil {
			return err
		}
		figures += n
	}
	if part == "guests" || len(os.Args) == 1 {
		n, err := measure("./plugins/net-tap", "^TestGuestFigures$")
		if err != nil {
			return err
		}
		figures += n
	}
	if figures == 0 {
		return fmt.Errorf("nothing was measured")
	}
	return nil
}

// measure runs one test and passes its figures on.
func measure(pkg, test string) (figures int, err error) {
	cmd := exec.Command("go", "test", "-count=1", "-timeout=15m", "-run="+test, "-v", pkg)
	cmd.Env = append(os.Environ(), "MVIRT_BENCH_NET=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
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
		return figures, fmt.Errorf("the measurement failed: %w", err)
	}
	return figures, nil
}
