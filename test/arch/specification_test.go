package arch

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// reference is what stands in the last column: a file, or a test in one.
var reference = regexp.MustCompile("`([A-Za-z0-9_./-]+)(?::((?:Test|Fuzz)[A-Za-z0-9_]+))?`")

// TestSpecification sees that each promise of SPECIFICATION.md is enforced by something that exists.
func TestSpecification(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "SPECIFICATION.md"))
	if err != nil {
		t.Fatal(err)
	}
	promises := 0
	for i, line := range strings.Split(string(text), "\n") {
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|-") || strings.TrimSpace(cells[0]) == "promise" {
			continue
		}
		promises++
		if len(cells) != 3 {
			t.Errorf("line %d has %d cells, not promise, figure and what enforces it", i+1, len(cells))
			continue
		}
		refs := reference.FindAllStringSubmatch(cells[2], -1)
		if len(refs) == 0 {
			t.Errorf("line %d: nothing enforces it: %s", i+1, strings.TrimSpace(cells[0]))
		}
		for _, r := range refs {
			source, err := os.ReadFile(filepath.Join(root, r[1]))
			switch {
			case err != nil:
				t.Errorf("line %d: %v", i+1, err)
			case r[2] != "" && !strings.Contains(string(source), "\nfunc "+r[2]+"("):
				t.Errorf("line %d: there is no %s in %s", i+1, r[2], r[1])
			case r[2] == "" && strings.HasSuffix(r[1], "_test.go"):
				t.Errorf("line %d: say which test of %s", i+1, r[1])
			}
		}
	}
	if promises < 20 {
		t.Errorf("only %d promises are found", promises)
	}
}
