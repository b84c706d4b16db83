// Package e2e runs the CLI against a whole mvirt: the scripts in testdata are what users type and what they
// must then see. The system is started once; each script must leave it as it found it.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mvirt/mvirt/test/guest"
	"github.com/mvirt/mvirt/test/system"
)

// shared is what all tests use; set by TestMain.
var shared struct {
	sys   *system.System
	guest guest.Guest
	web   *httptest.Server
	bin   string // directory of the binaries
}

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	if testing.Short() {
		fmt.Println("e2e: -short leaves out the end-to-end scripts: they boot guests")
		return 0, nil
	}
	if os.Geteuid() != 0 {
		return 0, fmt.Errorf("these tests need root: they start plugins under their own users and make networks")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	place := system.RootPlace("e2e")
	unlock, err := system.Lock(ctx, place)
	if err != nil {
		return 0, err
	}
	defer unlock()
	if _, err := system.Sweep(ctx, place); err != nil {
		return 0, err
	}
	if shared.bin, err = filepath.Abs("../../bin"); err != nil {
		return 0, err
	}
	if _, err := os.Stat(filepath.Join(shared.bin, "mvirtd")); err != nil {
		return 0, fmt.Errorf("%w: run make build first", err)
	}
	if shared.guest, err = guest.Build(ctx, func(f string, a ...any) { fmt.Printf("e2e: "+f+"\n", a...) }); err != nil {
		return 0, err
	}
	shared.web = httptest.NewServer(http.HandlerFunc(serve))
	defer shared.web.Close()
	shared.sys, err = system.Start(ctx, system.Options{Place: place, Bin: shared.bin,
		Args: map[string][]string{"storage": {"--allow-source-range", "127.0.0.0/8"}}})
	if err != nil {
		return 0, err
	}
	code := m.Run()
	if code != 0 {
		fmt.Printf("--- end of mvirtd's log:\n%s\n", shared.sys.LogTail(60))
	}
	stop, cancelStop := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancelStop()
	if err := shared.sys.Stop(stop); err != nil {
		return 1, err
	}
	left, err := system.Owned(stop, place)
	if err != nil {
		return 1, err
	}
	left.Files = nil // other tests that run now have files of the same users
	if list := left.List(); len(list) > 0 {
		_, _ = system.Sweep(stop, place)
		return 1, fmt.Errorf("left behind after mvirtd ended:\n%s", strings.Join(list, "\n"))
	}
	_, err = system.Sweep(stop, place)
	return code, err
}

// serve is where images come from: whole, cut off half-way, or not at all.
func serve(w http.ResponseWriter, r *http.Request) {
	data, err := os.ReadFile(shared.guest.RootQcow2)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	switch r.URL.Path {
	case "/image.qcow2":
		http.ServeContent(w, r, "image.qcow2", time.Time{}, strings.NewReader(string(data)))
	case "/cut.qcow2":
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		_, _ = w.Write(data[:len(data)/2])
		panic(http.ErrAbortHandler)
	default:
		http.NotFound(w, r)
	}
}
