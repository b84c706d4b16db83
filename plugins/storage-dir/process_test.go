package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
)

// build makes the real binary once a test.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "mvirt-dir")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	// The worker's user must be able to execute it by /proc/self/exe.
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	return bin
}

func launch(t *testing.T, command ...string) *host.Plugin {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	p, err := host.Launch(ctx, host.Config{Kind: service.KindStorage, Spawner: &host.Local{Command: command},
		Log: func(l host.LogLine) { t.Log(l) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

// TestProcess is the plugin as the core uses it: over gRPC, killed, launched again.
func TestProcess(t *testing.T) {
	bin := build(t)
	command := []string{bin, "--data-dir", filepath.Join(t.TempDir(), "data"), "--worker-user", "nobody"}
	p := launch(t, command...)
	ctx := t.Context()
	if i := p.Info(); i.Name != "storage-dir" || i.Kind != service.KindStorage {
		t.Errorf("%+v", i)
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, append(make([]byte, 1<<20), "the end"...), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	imp, err := p.Storage.StartImport(ctx, storage.ImportRequest{ID: ident.New(), Name: "t", File: f, FileName: "image"})
	if err != nil {
		t.Fatal(err)
	}
	var last storage.Import
	if err := p.Storage.WatchImport(ctx, storage.Ref{Ref: imp.ID}, func(i storage.Import) error { last = i; return nil }); err != nil {
		t.Fatal(err)
	}
	if last.State != storage.ImportDone || last.BytesWritten != 7 {
		t.Fatalf("%+v", last)
	}
	v, err := p.Storage.CreateVolume(ctx, storage.CreateVolumeRequest{ID: ident.New(), Name: "v", FromTemplate: "t", SizeBytes: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	owner := service.Owner{VMID: ident.New(), UID: uint32(os.Geteuid())}
	a, err := p.Storage.Attach(ctx, storage.AttachRequest{VolumeID: v.ID, Owner: owner})
	if err != nil {
		t.Fatal(err)
	}
	p.Kill()
	<-p.Exited()
	p = launch(t, command...)
	got, err := p.Storage.GetVolume(ctx, storage.Ref{Ref: "v"})
	if err != nil || len(got.Attachments) != 1 || got.Attachments[0].Path != a.Path {
		t.Fatalf("%+v, %v", got, err)
	}
	err = p.Storage.DeleteVolume(ctx, storage.DeleteVolumeRequest{Ref: "v"})
	if errs.KindOf(err) != errs.Precondition || errs.ReasonOf(err) != "VOLUME_IN_USE" || errs.RemedyOf(err) == "" {
		t.Errorf("over the wire: %v", err)
	}
	if err := p.Stop(ctx); err != nil {
		t.Errorf("Stop: %v", err)
	}
}

func TestStartErrors(t *testing.T) {
	bin := build(t)
	for _, args := range [][]string{{}, {"--data-dir", t.TempDir(), "--allow-source-range", "10"}, {"--data-dir", t.TempDir(), "--imports", "0"}} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		_, err := host.Launch(ctx, host.Config{Kind: service.KindStorage, Spawner: &host.Local{Command: append([]string{bin}, args...)}})
		cancel()
		if errs.ReasonOf(err) != host.ReasonExited {
			t.Errorf("%v: %v", args, err)
		}
		t.Log(err)
	}
}
