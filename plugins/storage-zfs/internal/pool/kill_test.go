package pool

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/kittest"
)

var (
	crashPoints = flag.Int("crash-points", 20, "random places at which TestRealKill kills the plugin")
	crashTime   = flag.Duration("crash-time", time.Hour, "TestRealKill begins no other story after this time")
)

// crashChild plays the story on a pool and kills itself at the n-th fail point. With a fifth argument, a file, it
// goes on with the step that the file names, and keeps the number of the step there.
func crashChild(args []string) int {
	n, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return 3
	}
	seed, err := strconv.Atoi(args[3])
	if err != nil {
		return 3
	}
	o := kitOptions()
	var passed *atomic.Int64
	o.FailPoint, passed = kittest.KillAt(n)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	var s *storagekit.Service
	if dir, ok := strings.CutPrefix(args[0], "fake:"); ok {
		s, err = fakeService(ctx, dir, o)
	} else {
		var b *Backend
		if b, err = New(Options{Pool: args[0], Step: o.FailPoint, Slow: slow}); err == nil {
			s, err = storagekit.Open(ctx, b, o)
		}
	}
	if err != nil {
		fmt.Println(err)
		return 3
	}
	story := kittest.Story{Service: s, Image: args[1], Seed: seed}
	if len(args) > 4 {
		if err := goOn(ctx, s, &story, args[4]); err != nil {
			fmt.Println(err)
			return 4
		}
	}
	if err := story.Play(ctx); err != nil {
		fmt.Println(err)
		return 2
	}
	if err := s.Shutdown(ctx); err != nil {
		return 3
	}
	fmt.Println(passed.Load())
	return 0
}

// goOn looks at what a life before this one has left, and takes the story up where that was.
func goOn(ctx context.Context, s *storagekit.Service, story *kittest.Story, file string) error {
	h, err := s.Health(ctx)
	if err != nil || len(h.Conditions) > 0 {
		return fmt.Errorf("after the restart: %+v %w", h, err)
	}
	vols, err := s.ListVolumes(ctx)
	if err != nil {
		return err
	}
	for _, v := range vols {
		if v.State != storage.StateReady {
			return fmt.Errorf("volume %s is lost: %s", v.Name, v.StateReason)
		}
	}
	imports, err := s.ListImports(ctx)
	if err != nil {
		return err
	}
	for _, i := range imports { // one that was decided goes on
		if err := s.WatchImport(ctx, storage.Ref{Ref: i.ID}, func(storage.Import) error { return nil }); err != nil {
			return err
		}
	}
	b, err := os.ReadFile(file)
	if err == nil {
		story.From, err = strconv.Atoi(string(b))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	story.Began = func(step int) {
		if err := os.WriteFile(file, []byte(strconv.Itoa(step)), 0o600); err != nil {
			panic(err)
		}
	}
	return nil
}

// story plays one with a new seed, by lives of the plugin that are killed after a random number of steps, and
// each of which goes on where the one before was killed. It returns the number of kills.
func storyOfKills(t *testing.T, pool, image string, seed, most int, r *rand.Rand) int {
	t.Helper()
	file := filepath.Join(t.TempDir(), "step")
	const reach = 24 // of about 135 places in a story; every life has some of its own to come up
	for kills := 0; ; kills++ {
		n := r.IntN(reach) + 1
		if kills >= most {
			n = -1
		}
		out, err := exec.Command("/proc/self/exe", "crash-child", pool, image, strconv.Itoa(n), strconv.Itoa(seed), file).CombinedOutput()
		if err == nil {
			if left := datasets(t, pool); len(left) > 0 {
				t.Errorf("story %d, %d kills: %q is left", seed, kills, left)
			}
			return kills
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if ws, ok := exit.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
			step, _ := os.ReadFile(file)
			t.Fatalf("story %d, after %d kills, in step %s: %v: %s\n%q", seed, kills, step, err, out, datasets(t, pool))
		}
	}
}

// TestRealKill kills the plugin at random places and looks whether all can go on and nothing is left or lost.
func TestRealKill(t *testing.T) {
	pool := realPool(t, 2<<30)
	image := filepath.Join(t.TempDir(), "image")
	must(0, os.WriteFile(image, noise(3*mib), 0o600))(t)
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	began := time.Now()
	kills := 0
	for story := 1; kills < *crashPoints && time.Since(began) < *crashTime && !t.Failed(); story++ {
		kills += storyOfKills(t, pool, image, story, *crashPoints-kills, r)
		fmt.Printf("# %d of %d kills in %d stories, %.0f s\n", kills, *crashPoints, story, time.Since(began).Seconds())
	}
	fmt.Printf("figure storage_zfs_kills %d kills of the plugin, nothing lost and nothing left\n", kills)
}

// TestRealKillRepeat: a caller that repeats all of its requests from the first, though objects of theirs were
// deleted meanwhile, makes them again under the same ids; what has these ids and waits for its clones is not in
// the way.
func TestRealKillRepeat(t *testing.T) {
	pool := realPool(t, 2<<30)
	s := open(t, pool, kitOptions())
	repeatIDs(t, s)
	shut(t, s)
	open(t, pool, kitOptions()) // sweeps
	same(t, datasets(t, pool))
}

func repeatIDs(t *testing.T, s *storagekit.Service) {
	t.Helper()
	ctx := t.Context()
	vol, snap, copied := ident.New(), ident.New(), ident.New()
	var clones []string
	for i := range 3 {
		must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: vol, Name: "v", SizeBytes: mib}))(t)
		must(s.CreateSnapshot(ctx, storage.CreateSnapshotRequest{ID: snap, VolumeID: vol, Name: "s"}))(t)
		c := volume(t, s, storage.CreateVolumeRequest{Name: fmt.Sprintf("c%d", i), FromSnapshot: snap})
		must(s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: copied, Name: "d", FromVolume: vol}))(t)
		d := volume(t, s, storage.CreateVolumeRequest{Name: fmt.Sprintf("d%d", i), FromVolume: copied})
		clones = append(clones, c.ID, d.ID)
		must(0, s.DeleteSnapshot(ctx, storage.Ref{Ref: snap}))(t)
		must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: copied}))(t)
		if i == 1 { // the volume itself goes once, and once it stays
			must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: vol}))(t)
		}
	}
	for _, id := range append(clones, vol) {
		must(0, s.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: id}))(t)
	}
}
