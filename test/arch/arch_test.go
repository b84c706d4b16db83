package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/mvirt/mvirt"

// pkg is what the rules need to know of a package; dirs are relative to the repository's root.
type pkg struct {
	dir     string
	imports map[string][]string // imported directory in this module, or full path → files
	files   []*file
}

type file struct {
	path      string
	test      bool
	generated bool
	lines     int
	doc       string
	inits     int
	text      string
	name      string // package name
}

// load reads all Go files of the repository.
func load(t *testing.T) (root string, pkgs map[string]*pkg) {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatalf("the repository's root is not two directories up: %v", err)
	}
	pkgs = map[string]*pkg{}
	fset := token.NewFileSet()
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if n := d.Name(); p != root && (strings.HasPrefix(n, ".") || n == "testdata" || n == "bin" || n == "vendor") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(fset, p, text, parser.ParseComments)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		dir := filepath.ToSlash(filepath.Dir(rel))
		k := pkgs[dir]
		if k == nil {
			k = &pkg{dir: dir, imports: map[string][]string{}}
			pkgs[dir] = k
		}
		fl := &file{path: rel, test: strings.HasSuffix(p, "_test.go"), generated: ast.IsGenerated(f), lines: strings.Count(string(text), "\n"),
			text: string(text), name: f.Name.Name}
		if f.Doc != nil {
			fl.doc = f.Doc.Text()
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				fl.inits++
			}
		}
		k.files = append(k.files, fl)
		for _, im := range f.Imports {
			to := strings.Trim(im.Path.Value, `"`)
			to = strings.TrimPrefix(to, module+"/")
			k.imports[to] = append(k.imports[to], rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return root, pkgs
}

// under tells whether dir is tree or lies in it.
func under(dir, tree string) bool { return dir == tree || strings.HasPrefix(dir, tree+"/") }

// edges that must not exist. An edge whose end has vanished fails, so that a rename cannot switch a rule off.
var forbidden = []struct {
	from, to string
	except   []string // packages below from that may
	why      string
}{
	{from: "core", to: "plugins", why: "the core knows kinds, never products"},
	{from: "sdk", to: "core", why: "a plugin author would inherit the core"},
	{from: "sdk", to: "plugins", why: "the SDK serves all plugins"},
	{from: "plugins", to: "core", why: "a plugin sees the core only through sdk"},
	{from: "core", to: "sdk/host", except: []string{"core/internal/supervisor", "core/cmd/mvirtd"}, why: "only the supervisor launches plugins"},
	{from: "core", to: "core/internal/launcher", except: []string{"core/internal/launcher", "core/internal/supervisor", "core/internal/doctor", "core/cmd/mvirtd"}, why: "only the supervisor's spawner talks to the launcher; the doctor compares with what it does"},
	{from: "core/internal/launcher", to: "google.golang.org/grpc", why: "the root half speaks nothing but its own few messages"},
	{from: "core/internal/launcher", to: "sdk/host", why: "the root half does not talk to plugins"},
	{from: "core/internal/cli", to: "core/internal/supervisor", why: "the CLI talks to the API only"},
	{from: "core/internal/cli", to: "core/internal/operation", why: "the CLI talks to the API only"},
	{from: "core/internal/cli", to: "core/internal/api", why: "the CLI talks to the API only"},
	{from: "core/internal/cli", to: "core/internal/config", why: "the CLI has no part in the daemon's configuration"},
	{from: "core/internal/config", to: "core/internal/supervisor", why: "configuration is at the bottom"},
	{from: "core/internal/supervisor", to: "core/internal/operation", why: "operations stand on the supervisor, not the other way round"},
	{from: "core/internal/supervisor", to: "core/internal/api", why: "the API stands on the supervisor, not the other way round"},
	{from: "sdk/storage", to: "google.golang.org/grpc", why: "contracts are plain Go"},
	{from: "sdk/net", to: "google.golang.org/grpc", why: "contracts are plain Go"},
	{from: "sdk/vmm", to: "google.golang.org/grpc", why: "contracts are plain Go"},
	{from: "sdk/log", to: "google.golang.org/grpc", why: "contracts are plain Go"},
	{from: "sdk/errs", to: "google.golang.org/grpc", except: []string{"sdk/errs/grpcerr"}, why: "contracts are plain Go"},
}

func TestImportDirections(t *testing.T) {
	_, pkgs := load(t)
	exists := func(tree string) bool {
		for d, p := range pkgs {
			if under(d, tree) {
				return true
			}
			for to := range p.imports {
				if under(to, tree) {
					return true
				}
			}
		}
		return false
	}
	for _, r := range forbidden {
		for _, end := range append([]string{r.from, r.to}, r.except...) {
			if !exists(end) {
				t.Errorf("rule %s → %s names %s, which is not there: correct the rule", r.from, r.to, end)
			}
		}
		for d, p := range pkgs {
			if !under(d, r.from) || slices.ContainsFunc(r.except, func(e string) bool { return under(d, e) }) {
				continue
			}
			for to, files := range p.imports {
				if under(to, r.to) {
					t.Errorf("%s imports %s: %s", files[0], to, r.why)
				}
			}
		}
	}
	// No plugin imports another.
	plugin := func(dir string) string {
		parts := strings.SplitN(dir, "/", 3)
		if len(parts) >= 2 && parts[0] == "plugins" {
			return parts[1]
		}
		return ""
	}
	for d, p := range pkgs {
		for to, files := range p.imports {
			if a, b := plugin(d), plugin(to); a != "" && b != "" && a != b {
				t.Errorf("%s imports %s: plugins stand alone", files[0], to)
			}
		}
	}
}

// mayCombine lists who may import more than one of the contracts that change things, and why.
var mayCombine = map[string]string{
	"core/internal/operation":  "it is the package that changes objects of several kinds",
	"core/internal/supervisor": "it hands the services out, and calls none but Health",
	"core/internal/api":        "it translates requests of every kind",
	"core/internal/reconcile":  "it compares kinds, and repairs by operations",
	"core/cmd/mvirtd":          "it wires",
	"core/internal/fake":       "it stands in for all plugins in tests",
}

func TestOnlyOperationCombinesKinds(t *testing.T) {
	_, pkgs := load(t)
	for d, p := range pkgs {
		if !under(d, "core") {
			continue
		}
		allowed := false
		for a := range mayCombine {
			allowed = allowed || under(d, a)
		}
		var kinds []string
		for _, k := range []string{"sdk/storage", "sdk/net", "sdk/vmm"} {
			if slices.ContainsFunc(p.imports[k], func(f string) bool { return !strings.HasSuffix(f, "_test.go") }) {
				kinds = append(kinds, path.Base(k))
			}
		}
		if len(kinds) > 1 && !allowed {
			t.Errorf("%s uses %s: only core/internal/operation uses more than one kind", d, strings.Join(kinds, " and "))
		}
	}
}

// products must not be named in the core: what is true of one product does not belong there.
var products = regexp.MustCompile(`(?i)\b(zfs|zvol|qemu|qmp|pebble|cloud-hypervisor)`)

func TestCoreNamesNoProduct(t *testing.T) {
	_, pkgs := load(t)
	for d, p := range pkgs {
		if !under(d, "core") {
			continue
		}
		for _, f := range p.files {
			if f.test || f.generated {
				continue
			}
			for i, line := range strings.Split(f.text, "\n") {
				if m := products.FindString(line); m != "" {
					t.Errorf("%s:%d names %s", f.path, i+1, m)
				}
			}
		}
	}
}

func TestPackageComments(t *testing.T) {
	_, pkgs := load(t)
	for d, p := range pkgs {
		var docs []string
		handmade := 0
		for _, f := range p.files {
			if f.test || f.generated {
				continue
			}
			handmade++
			if f.doc == "" {
				continue
			}
			docs = append(docs, f.path)
			want := "Package " + f.name + " "
			if f.name == "main" {
				want = "Command " // a plugin's binary has another name than its directory
			}
			if !strings.HasPrefix(f.doc, want) {
				t.Errorf("%s: the package comment begins with %.30q, not with %q", f.path, f.doc, want)
			}
		}
		if handmade > 0 && len(docs) != 1 {
			t.Errorf("%s has %d package comments, not one: %s", d, len(docs), strings.Join(docs, ", "))
		}
	}
}

// maxLines is the hard limit; the aim is 500.
const maxLines = 900

func TestFileSize(t *testing.T) {
	_, pkgs := load(t)
	for _, p := range pkgs {
		for _, f := range p.files {
			if !f.generated && f.lines > maxLines {
				t.Errorf("%s has %d lines, the limit is %d", f.path, f.lines, maxLines)
			}
		}
	}
}

func TestNoInit(t *testing.T) {
	_, pkgs := load(t)
	for _, p := range pkgs {
		for _, f := range p.files {
			if f.inits > 0 && !f.generated {
				t.Errorf("%s has an init function: wire things in main", f.path)
			}
		}
	}
}

// hosts and paths of the machine that something was written on do not belong into the repository.
func TestNothingOfThisMachine(t *testing.T) {
	_, pkgs := load(t)
	local := regexp.MustCompile(`"/(work|root|home/[a-z]+)/`)
	for _, p := range pkgs {
		for _, f := range p.files {
			if m := local.FindString(f.text); m != "" && !strings.HasPrefix(f.path, "test/arch/") {
				t.Errorf("%s holds the path %s…", f.path, m)
			}
		}
	}
}
