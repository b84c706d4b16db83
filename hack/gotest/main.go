// Command gotest runs go test and says, beside what go test says, which tests were skipped and why; a test
// named in the list of those that may not skip fails the run when it was skipped or did not run.
//
//	gotest LIST [go test arguments…]
//
// A line of LIST is a package, as go test names it, and a top-level test. The output of passed tests is left out.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// event is a line of go test -json: `go doc test2json`, and `go help buildjson` for build-output.
type event struct {
	Action, Package, Test, Output string
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: gotest LIST [go test arguments]")
		os.Exit(2)
	}
	list, err := os.ReadFile(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(2)
	}
	goTool := os.Getenv("GO")
	if goTool == "" {
		goTool = "go"
	}
	cmd := exec.Command(goTool, append([]string{"test", "-json"}, os.Args[2:]...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(2)
	}
	passed := read(out, os.Stdout)
	bad := cmd.Wait() != nil
	for line := range strings.Lines(string(list)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		if !passed[line] {
			fmt.Printf("FAIL\t%s may not be skipped, and it did not pass\n", line)
			bad = true
		}
	}
	if bad {
		os.Exit(1)
	}
}

// read copies what matters of a run to w and returns which top-level tests passed, as "package test".
func read(r io.Reader, w io.Writer) map[string]bool {
	passed, said := map[string]bool{}, map[string]*bytes.Buffer{}
	in := bufio.NewReaderSize(r, 1<<20)
	for {
		line, err := in.ReadBytes('\n')
		var e event
		if len(line) > 0 {
			if json.Unmarshal(line, &e) != nil {
				w.Write(line)
			}
			key := e.Package + " " + e.Test
			switch {
			case e.Action == "build-output", e.Action == "output" && e.Test == "":
				if e.Output != "PASS\n" {
					io.WriteString(w, e.Output)
				}
			case e.Action == "output":
				if said[key] == nil {
					said[key] = &bytes.Buffer{}
				}
				said[key].WriteString(e.Output)
			case e.Test == "":
			case e.Action == "skip":
				fmt.Fprintf(w, "skip\t%s: %s\n", key, reason(said[key]))
				delete(said, key)
			case e.Action == "fail":
				if said[key] != nil {
					w.Write(said[key].Bytes())
				}
				delete(said, key)
			case e.Action == "pass":
				passed[key] = true
				delete(said, key)
			}
		}
		if err != nil {
			for key, b := range said { // of tests that a panic or a time limit cut off
				fmt.Fprintf(w, "unfinished\t%s\n%s", key, b.Bytes())
			}
			return passed
		}
	}
}

// reason is what a skipped test said, without go test's own lines.
func reason(b *bytes.Buffer) string {
	if b == nil {
		return ""
	}
	var words []string
	for line := range strings.Lines(b.String()) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			words = append(words, line)
		}
	}
	return strings.Join(words, " ")
}
