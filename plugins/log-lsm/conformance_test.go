package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/mvirt/mvirt/sdk/conformance"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// build makes the plugin's program.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "mvirt-log")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

func TestConformance(t *testing.T) {
	conformance.RunLog(t, conformance.Config{Command: []string{build(t), "--data-dir", filepath.Join(t.TempDir(), "data")}})
}

func launch(t *testing.T, bin, dir string) *host.Plugin {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	p, err := host.Launch(ctx, host.Config{Kind: service.KindLog, Spawner: &host.Local{Command: []string{bin, "--data-dir", dir}}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestKill kills the process under load, again and again: what was acknowledged is there, and the check
// command finds the store sound.
func TestKill(t *testing.T) {
	bin, dir := build(t), filepath.Join(t.TempDir(), "data")
	acked := map[string]bool{}
	for range 3 {
		p := launch(t, bin, dir)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for {
					e := log.Entry{Time: time.Now(), ID: uuid.Must(uuid.NewV7()).String(), Level: log.LevelAudit, Message: "under load", Objects: []string{"vm-1"}}
					if p.Log.Append(context.Background(), []log.Entry{e}) != nil {
						return
					}
					mu.Lock()
					acked[e.ID] = true
					n := len(acked)
					mu.Unlock()
					if n%500 == 0 {
						p.Kill()
					}
				}
			})
		}
		wg.Wait()
		<-p.Exited()
	}
	p := launch(t, bin, dir)
	have := map[string]bool{}
	err := p.Log.Query(context.Background(), log.Query{Objects: []string{"vm-1"}}, func(r log.Result) error { have[r.Entry.ID] = true; return nil })
	if err != nil {
		t.Fatal(err)
	}
	for id := range acked {
		if !have[id] {
			t.Fatalf("%s was acknowledged and is gone", id)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := p.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(bin, "check", "--data-dir", dir)
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), " 0 problems") {
		t.Fatalf("check: %v\n%s", err, out.String())
	}
}
