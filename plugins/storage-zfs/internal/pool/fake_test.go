package pool

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// A stand-in for zfs and zpool, for hosts without OpenZFS: this test binary under those names. It keeps
// datasets in a JSON file and zvols in plain files, and answers in the words of OpenZFS 2.1, as recorded in the
// lab. The tests in real_test.go tell whether it is faithful: they run the same story.

// fakeDataset is a dataset or a snapshot.
type fakeDataset struct {
	Props  map[string]string
	Origin string
	Txg    int
	File   string // of a zvol or a snapshot
	Block  int64
	Defer  bool
}

type fakePool struct {
	Name     string
	Health   string
	ReadOnly bool
	Txg      int
	Sets     map[string]*fakeDataset

	dir string
}

// fakeTools makes a directory with the two programs and a pool. It is the Runner's.
func fakeTools(t testing.TB, name string) string {
	t.Helper()
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"zfs", "zpool"} {
		if err := os.Symlink(self, filepath.Join(dir, p)); err != nil {
			t.Fatal(err)
		}
	}
	p := &fakePool{Name: name, Health: "ONLINE", Sets: map[string]*fakeDataset{name: {Props: map[string]string{"mountpoint": filepath.Join(dir, "mnt")}}}, dir: dir}
	p.save()
	return dir
}

func (p *fakePool) save() {
	b, err := json.Marshal(p)
	if err == nil {
		err = os.WriteFile(filepath.Join(p.dir, "state.new"), b, 0o600)
	}
	if err == nil {
		err = os.Rename(filepath.Join(p.dir, "state.new"), filepath.Join(p.dir, "state"))
	}
	if err != nil {
		panic(err)
	}
}

func loadFake(dir string) *fakePool {
	p := &fakePool{dir: dir}
	b, err := os.ReadFile(filepath.Join(dir, "state"))
	if err == nil {
		err = json.Unmarshal(b, p)
	}
	if err != nil {
		panic(err)
	}
	return p
}

// fakeDevices are the zvols' files.
type fakeDevices struct{ dir string }

func (d fakeDevices) Node(_ context.Context, dataset string, _ bool) (string, error) {
	s := loadFake(d.dir).Sets[dataset]
	if s == nil || s.File == "" {
		return "", fs.ErrNotExist
	}
	return s.File, nil
}

func (d fakeDevices) Open(ctx context.Context, dataset string) (*os.File, error) {
	path, err := d.Node(ctx, dataset, true)
	if err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

// fakeMain is the main of the stand-in.
func fakeMain(program string, args []string) int {
	dir := filepath.Dir(os.Args[0])
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		panic(err)
	}
	// The kernel makes one change of a pool after the other, whatever becomes of who asked.
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		panic(err)
	}
	p := loadFake(dir)
	out, err := p.command(program, args)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	p.save()
	fmt.Print(out)
	return 0
}

// options splits "-o k=v" and flags from names. with lists the flags that take a value.
func parse(args []string, with string) (flags map[string][]string, names []string) {
	flags = map[string][]string{}
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case len(a) == 2 && a[0] == '-' && strings.Contains(with, a[1:]):
			i++
			flags[a[1:]] = append(flags[a[1:]], args[i])
		case len(a) > 1 && a[0] == '-':
			flags[a[1:]] = append(flags[a[1:]], "")
		default:
			names = append(names, a)
		}
	}
	return flags, names
}

func (p *fakePool) command(program string, args []string) (string, error) {
	verb, rest := args[0], args[1:]
	if program == "zpool" {
		_, names := parse(rest, "o")
		if len(names) == 1 && names[0] != p.Name {
			return "", fmt.Errorf("cannot open '%s': no such pool", names[0])
		}
		ro := map[bool]string{true: "on", false: "off"}[p.ReadOnly]
		return fmt.Sprintf("%s\t%s\t1\t1000000000\t1100000000\n", p.Health, ro), nil
	}
	p.Txg++
	if p.ReadOnly && verb != "list" && verb != "get" {
		return "", fmt.Errorf("cannot %s: pool is read-only", verb)
	}
	switch verb {
	case "list":
		return p.list(rest)
	case "get":
		f, names := parse(rest, "o")
		_ = f
		if p.Sets[names[1]] == nil {
			return "", fmt.Errorf("cannot open '%s': dataset does not exist", names[1])
		}
		var b strings.Builder
		for _, prop := range strings.Split(names[0], ",") {
			fmt.Fprintln(&b, p.value(names[1], prop))
		}
		return b.String(), nil
	case "create":
		f, names := parse(rest, "obV")
		return "", p.create(names[0], f)
	case "set":
		name := rest[len(rest)-1]
		s := p.Sets[name]
		if s == nil {
			return "", fmt.Errorf("cannot open '%s': dataset does not exist", name)
		}
		return "", p.set(name, s, rest[:len(rest)-1])
	case "mount":
		return "", os.MkdirAll(p.value(rest[0], "mountpoint"), 0o700)
	case "snapshot":
		f, names := parse(rest, "o")
		return "", p.snapshot(names[0], f["o"])
	case "clone":
		f, names := parse(rest, "o")
		return "", p.clone(names[0], names[1], f["o"])
	case "destroy":
		f, names := parse(rest, "")
		return "", p.destroy(names[0], f["d"] != nil, f["r"] != nil)
	case "rename":
		return "", p.rename(rest[0], rest[1])
	case "rollback":
		return "", p.rollback(rest[0])
	}
	return "", fmt.Errorf("unrecognized command '%s'", verb)
}

func parent(name string) string {
	if v, _, ok := strings.Cut(name, "@"); ok {
		return v
	}
	i := strings.LastIndex(name, "/")
	if i < 0 {
		return ""
	}
	return name[:i]
}

func (p *fakePool) value(name, prop string) string {
	s := p.Sets[name]
	switch prop {
	case "name":
		return name
	case "origin":
		return cmp.Or(s.Origin, "-")
	case "volsize", "used", "usedbydataset":
		if st, err := os.Stat(s.File); s.File != "" && err == nil {
			if prop == "volsize" {
				return fmt.Sprint(st.Size())
			}
			return fmt.Sprint(st.Sys().(*syscall.Stat_t).Blocks * 512)
		}
		return "-"
	case "available":
		return "900000000"
	case "compressratio":
		return "1.00"
	case "volblocksize":
		if s.Block > 0 && !strings.Contains(name, "@") {
			return fmt.Sprint(s.Block)
		}
		return "-"
	case "clones":
		if !strings.Contains(name, "@") {
			return "-"
		}
		return strings.Join(p.clones(name), ",")
	case "defer_destroy":
		return map[bool]string{true: "on", false: "off"}[s.Defer]
	case "mounted":
		return "yes"
	case "createtxg":
		return fmt.Sprint(s.Txg)
	}
	for n := name; n != ""; n = parent(n) {
		if v, ok := p.Sets[n].Props[prop]; ok {
			if prop == "mountpoint" && n != name && v != "none" {
				v += strings.TrimPrefix(name, n)
			}
			return v
		}
	}
	return "-"
}

func (p *fakePool) clones(snapshot string) (out []string) {
	for n, s := range p.Sets {
		if s.Origin == snapshot {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

func (p *fakePool) list(args []string) (string, error) {
	f, names := parse(args, "otds")
	root := p.Name
	if len(names) == 1 {
		root = names[0]
	}
	if pool, _, _ := strings.Cut(root, "/"); p.Sets[root] == nil || pool != p.Name {
		return "", fmt.Errorf("cannot open '%s': dataset does not exist", root)
	}
	depth := 1 << 30
	if d := f["d"]; d != nil {
		depth, _ = strconv.Atoi(d[0])
	} else if f["r"] == nil {
		depth = 0
	}
	types := "filesystem,volume"
	if t := f["t"]; t != nil {
		types = t[0]
	}
	rows := slices.Sorted(maps.Keys(p.Sets))
	if f["s"] != nil {
		slices.SortStableFunc(rows, func(a, b string) int { return p.Sets[a].Txg - p.Sets[b].Txg })
	}
	var b strings.Builder
	for _, n := range rows {
		rel, ok := strings.CutPrefix(n, root)
		if !ok || rel != "" && rel[0] != '/' && rel[0] != '@' || strings.Count(rel, "/")+strings.Count(rel, "@") > depth {
			continue
		}
		kind := "filesystem"
		switch {
		case strings.Contains(n, "@"):
			kind = "snapshot"
		case p.Sets[n].File != "":
			kind = "volume"
		}
		if len(names) == 1 && n == root && f["r"] == nil {
			// named itself: of whatever type
		} else if !strings.Contains(types, kind) {
			continue
		}
		var cells []string
		for _, c := range strings.Split(f["o"][0], ",") {
			cells = append(cells, p.value(n, c))
		}
		b.WriteString(strings.Join(cells, "\t") + "\n")
	}
	return b.String(), nil
}

func (p *fakePool) free(name string) error {
	if p.Sets[name] != nil {
		return fmt.Errorf("cannot create '%s': dataset already exists", name)
	}
	if p.Sets[parent(name)] == nil {
		return fmt.Errorf("cannot create '%s': parent does not exist", name)
	}
	return nil
}

func (p *fakePool) newFile() string {
	dir := filepath.Join(p.dir, "dev")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		panic(err)
	}
	return filepath.Join(dir, fmt.Sprint("zd", p.Txg))
}

func (p *fakePool) create(name string, f map[string][]string) error {
	if err := p.free(name); err != nil {
		return err
	}
	s := &fakeDataset{Props: map[string]string{}, Txg: p.Txg}
	if v := f["V"]; v != nil {
		size, _ := strconv.ParseInt(v[0], 10, 64)
		s.Block, _ = strconv.ParseInt(f["b"][0], 10, 64)
		if size%s.Block != 0 || size == 0 {
			return fmt.Errorf("cannot create '%s': volume size must be a multiple of volume block size", name)
		}
		s.File = p.newFile()
		if err := os.WriteFile(s.File, nil, 0o600); err != nil {
			return err
		}
		if err := os.Truncate(s.File, size); err != nil {
			return err
		}
	}
	p.Sets[name] = s
	if err := p.set(name, s, f["o"]); err != nil {
		return err
	}
	if s.File == "" && s.Props["mountpoint"] != "none" {
		return os.MkdirAll(p.value(name, "mountpoint"), 0o700)
	}
	return nil
}

func (p *fakePool) set(name string, s *fakeDataset, settings []string) error {
	for _, kv := range settings {
		k, v, _ := strings.Cut(kv, "=")
		if k == "volsize" {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil || s.Block == 0 || n%s.Block != 0 {
				return fmt.Errorf("cannot set property for '%s': 'volsize' must be a multiple of volume block size", name)
			}
			if err := os.Truncate(s.File, n); err != nil {
				return err
			}
			continue
		}
		if len(v) > 8191 {
			return fmt.Errorf("cannot set property for '%s': property value too long", name)
		}
		s.Props[k] = v
	}
	return nil
}

// copyData copies a file, leaving out zeros.
func copyData(from, to string) {
	in, err := os.Open(from)
	if err != nil {
		panic(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		panic(err)
	}
	defer out.Close()
	st, err := in.Stat()
	if err == nil {
		err = out.Truncate(st.Size())
	}
	for off := int64(0); err == nil && off < st.Size(); {
		if off, err = in.Seek(off, 3 /* SEEK_DATA */); err != nil {
			return // no more data
		}
		b := make([]byte, 64<<10)
		n, _ := in.ReadAt(b, off)
		_, err = out.WriteAt(b[:n], off)
		off += int64(n)
	}
	if err != nil {
		panic(err)
	}
}

func (p *fakePool) snapshot(name string, options []string) error {
	if p.Sets[name] != nil {
		return fmt.Errorf("cannot create snapshot '%s': dataset already exists", name)
	}
	vol := p.Sets[parent(name)]
	if vol == nil {
		return fmt.Errorf("cannot open '%s': dataset does not exist", parent(name))
	}
	s := &fakeDataset{Props: map[string]string{}, Txg: p.Txg, File: p.newFile(), Block: vol.Block}
	copyData(vol.File, s.File)
	p.Sets[name] = s
	return p.set(name, s, options)
}

func (p *fakePool) clone(snapshot, name string, options []string) error {
	from := p.Sets[snapshot]
	if from == nil {
		return fmt.Errorf("cannot open '%s': dataset does not exist", snapshot)
	}
	if err := p.free(name); err != nil {
		return err
	}
	s := &fakeDataset{Props: map[string]string{}, Txg: p.Txg, File: p.newFile(), Block: from.Block, Origin: snapshot}
	copyData(from.File, s.File)
	p.Sets[name] = s
	return p.set(name, s, options)
}

func (p *fakePool) below(name string) (out []string) {
	for n := range p.Sets {
		if strings.HasPrefix(n, name+"@") || strings.HasPrefix(n, name+"/") {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

func (p *fakePool) destroy(name string, later, recursive bool) error {
	s := p.Sets[name]
	if s == nil {
		if strings.Contains(name, "@") {
			return fmt.Errorf("could not find any snapshots to destroy; check snapshot names.")
		}
		return fmt.Errorf("cannot open '%s': dataset does not exist", name)
	}
	if strings.Contains(name, "@") {
		switch {
		case len(p.clones(name)) == 0:
			p.drop(name)
		case later:
			s.Defer = true
		default:
			return fmt.Errorf("cannot destroy '%s': snapshot has dependent clones\nuse '-R' to destroy the following datasets:\n%s", name, strings.Join(p.clones(name), "\n"))
		}
		return nil
	}
	below := p.below(name)
	if len(below) > 0 && !recursive {
		return fmt.Errorf("cannot destroy '%s': volume has children\nuse '-r' to destroy the following datasets:\n%s", name, strings.Join(below, "\n"))
	}
	for _, b := range below {
		if len(p.clones(b)) > 0 {
			return fmt.Errorf("cannot destroy '%s': volume has dependent clones\nuse '-R' to destroy the following datasets:\n%s", name, strings.Join(p.clones(b), "\n"))
		}
	}
	for _, b := range below {
		p.drop(b)
	}
	p.drop(name)
	return nil
}

// drop forgets a dataset, and a deferred origin with its last clone.
func (p *fakePool) drop(name string) {
	s := p.Sets[name]
	delete(p.Sets, name)
	os.Remove(s.File)
	if o := p.Sets[s.Origin]; o != nil && o.Defer && len(p.clones(s.Origin)) == 0 {
		p.drop(s.Origin)
	}
}

func (p *fakePool) rename(from, to string) error {
	if p.Sets[from] == nil {
		return fmt.Errorf("cannot open '%s': dataset does not exist", from)
	}
	if p.Sets[to] != nil {
		return fmt.Errorf("cannot rename '%s': dataset already exists", from)
	}
	for _, n := range append(p.below(from), from) {
		now := to + strings.TrimPrefix(n, from)
		p.Sets[now] = p.Sets[n]
		delete(p.Sets, n)
		for _, s := range p.Sets {
			if s.Origin == n {
				s.Origin = now
			}
		}
	}
	return nil
}

func (p *fakePool) rollback(name string) error {
	s, vol := p.Sets[name], p.Sets[parent(name)]
	if s == nil {
		return fmt.Errorf("cannot open '%s': dataset does not exist", name)
	}
	var newer []string
	for _, n := range p.below(parent(name)) {
		if p.Sets[n].Txg > s.Txg {
			newer = append(newer, n)
		}
	}
	if len(newer) > 0 {
		return fmt.Errorf("cannot rollback to '%s': more recent snapshots or bookmarks exist\nuse '-r' to force deletion of the following snapshots and bookmarks:\n%s", name, strings.Join(newer, "\n"))
	}
	copyData(s.File, vol.File)
	return nil
}
