package dir

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
	"github.com/mvirt/mvirt/sdk/storagekit/kittest"
)

// crashChild plays the story and kills itself at the n-th fail point.
func crashChild(args []string) int {
	n, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return 3
	}
	o := options()
	o.FailPoint, _ = kittest.KillAt(n)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	b, err := New(args[0], o.FailPoint)
	if err != nil {
		return 3
	}
	s, err := storagekit.Open(ctx, b, o)
	if err != nil {
		fmt.Println(err)
		return 3
	}
	story := kittest.Story{Service: s, Image: args[1]}
	if err := story.Play(ctx); err != nil {
		fmt.Println(err)
		return 2
	}
	if err := s.Shutdown(ctx); err != nil {
		return 3
	}
	return 0
}

var crashEvery = flag.Int("crash-every", 5, "of the places between two steps, every how many-th to crash at (1: all)")

// TestKillAtEveryStep kills the process with SIGKILL between two steps of any change (at every place with
// -crash-every 1), and looks: after a restart nothing is left over, nothing is missing, nothing is damaged, and the story can be played to its end.
func TestKillAtEveryStep(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, noise(3*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	for n := 1; ; n += *crashEvery {
		root := filepath.Join(t.TempDir(), "data")
		cmd := exec.Command("/proc/self/exe", "crash-child", root, image, strconv.Itoa(n))
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Logf("every %dth of about %d places", *crashEvery, n-1)
			if n < 60 {
				t.Errorf("only %d places: the fail points are gone", n-1)
			}
			return
		}
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
			t.Fatalf("place %d: %v: %s", n, err, out)
		}
		s := open(t, root, options())
		if c := conditions(t, s); len(c) > 0 {
			t.Errorf("killed at %s: %+v", out, c)
		}
		for _, v := range must(s.ListVolumes(t.Context()))(t) {
			if v.State != storage.StateReady {
				t.Errorf("killed at %s: %s is damaged: %s", out, v.Name, v.StateReason)
			}
		}
		for _, i := range must(s.ListImports(t.Context()))(t) {
			await(t, s, i.ID)
		}
		clean(t, root, s)
		story := kittest.Story{Service: s, Image: image}
		if err := story.Play(t.Context()); err != nil {
			t.Errorf("killed at %s: the story cannot go on: %v", out, err)
		}
		clean(t, root, s)
		if l := must(s.ListVolumes(t.Context()))(t); len(l) != 0 {
			t.Errorf("killed at %s: %+v is left", out, l)
		}
		shut(t, s)
		if t.Failed() {
			return
		}
	}
}
