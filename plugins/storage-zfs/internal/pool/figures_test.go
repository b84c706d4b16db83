package pool

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

var figureVolumes = flag.Int("figure-volumes", 1000, "volumes that TestRealFigures lists")

// TestRealFigures measures against the bare commands, interleaved; absolute times in the lab mean nothing.
func TestRealFigures(t *testing.T) {
	pool := realPool(t, 2<<30)
	s := open(t, pool, kitOptions())
	ctx := t.Context()
	volume(t, s, storage.CreateVolumeRequest{Name: "v", SizeBytes: 64 * mib})
	sn := snapshot(t, s, "v", "s")
	must(s.CreateTemplate(ctx, storage.CreateTemplateRequest{ID: ident.New(), Name: "t", SnapshotID: sn.ID}))(t)
	var ours, bare []time.Duration
	for i := range 15 {
		began := time.Now()
		volume(t, s, storage.CreateVolumeRequest{Name: fmt.Sprintf("c%d", i), FromTemplate: "t"})
		ours = append(ours, time.Since(began))
		began = time.Now()
		command(t, "zfs", "clone", pool+"/.templates/t@img", fmt.Sprintf("%s/bare%d", pool, i))
		bare = append(bare, time.Since(began))
	}
	fmt.Printf("figure clone_vs_zfs_clone %.2f ratio aim <= 1.5\n", medians(ours, bare))
	db := filepath.Join(command(t, "zfs", "get", "-H", "-o", "value", "mountpoint", pool+"/.mvirt-zfs"), "metadata.db")
	shut(t, s)
	manyClones(t, pool, *figureVolumes)
	must(0, os.Remove(db))(t) // it is made again of what the pool knows
	s = open(t, pool, kitOptions())
	ours, bare = nil, nil
	var many int
	for range 15 {
		began := time.Now()
		many = len(must(s.ListVolumes(ctx))(t))
		ours = append(ours, time.Since(began))
		began = time.Now()
		command(t, "zfs", "list", "-r", "-t", "volume", pool)
		bare = append(bare, time.Since(began))
	}
	if many < *figureVolumes {
		t.Errorf("%d volumes", many)
	}
	fmt.Printf("figure list_1000_vs_zfs_list %.2f ratio aim <= 1.2\n", medians(ours, bare))
	fmt.Printf("# list of %d volumes: %v, zfs list %v\n", many, ours[len(ours)/2], bare[len(bare)/2])
}

// medians sorts both and gives the ratio of their medians.
func medians(a, b []time.Duration) float64 {
	slices.Sort(a)
	slices.Sort(b)
	return a[len(a)/2].Seconds() / b[len(b)/2].Seconds()
}

// manyClones makes clones of the template t such as the plugin makes, by channel programs (zfs-program(8)): a
// thousand commands would take minutes. They have no device nodes, which a list does not look at.
func manyClones(t *testing.T, pool string, n int) {
	t.Helper()
	command(t, "zfs", "set", "volmode=none", pool)
	var like storagekit.Object
	must(0, json.Unmarshal([]byte(command(t, "zfs", "get", "-H", "-o", "value", propObject, pool+"/c0")), &like))(t)
	for first := 0; first < n; first += 100 {
		var b strings.Builder
		b.WriteString("local function must(e) if e ~= 0 then error(e) end end\n")
		for i := first; i < min(first+100, n); i++ {
			o := like
			o.ID, o.Name, o.Request = ident.New(), fmt.Sprintf("l%d", i), ""
			j := must(json.Marshal(o))(t)
			ds := pool + "/" + o.Name
			fmt.Fprintf(&b, "must(zfs.sync.clone(%q, %q))\n", pool+"/.templates/t@img", ds)
			for k, v := range map[string]string{propKind: o.Kind, propID: o.ID, propObject: string(j)} {
				fmt.Fprintf(&b, "must(zfs.sync.set_prop(%q, %q, [==[%s]==]))\n", ds, k, v)
			}
		}
		file := filepath.Join(t.TempDir(), "clones.lua")
		must(0, os.WriteFile(file, []byte(b.String()), 0o600))(t)
		command(t, "zfs", "program", "-m", "100000000", "-t", "100000000", pool, file)
	}
}
