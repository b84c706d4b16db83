package conformance

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
)

var imageChecks = []check{
	{"import raw", checkImportRaw},
	{"import qcow2", checkImportQcow2},
	{"import refuses", checkImportRefuses},
	{"import of damaged images", checkImportDamaged},
	{"import cancel", checkImportCancel},
	{"import from a url", checkImportURL},
	{"templates", checkTemplates},
}

// image writes a raw image of n bytes whose begin and end can be told.
func (c *C) image(n int) string {
	dir, err := os.MkdirTemp("", "mvirt-ct-")
	c.ok(err, "temporary directory")
	c.later(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "image.raw")
	b := make([]byte, n)
	copy(b, "image begins")
	copy(b[n-512:], "image ends")
	c.ok(os.WriteFile(path, b, 0o644), "image")
	return path
}

// start begins an import of a file.
func (c *C) start(req storage.ImportRequest, path string) (storage.Import, error) {
	if path != "" {
		f, err := os.Open(path)
		c.ok(err, "image")
		defer f.Close()
		req.File, req.FileName = f, filepath.Base(path)
	}
	i, err := c.p.Storage.StartImport(c, req)
	if err == nil {
		c.later(func() { c.ok(c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: req.ID}), "DeleteTemplate") })
	}
	return i, err
}

// wait watches an import to its end.
func (c *C) wait(id string) storage.Import {
	var last storage.Import
	calls := 0
	err := c.p.Storage.WatchImport(c, storage.Ref{Ref: id}, func(i storage.Import) error {
		if last.State.Final() {
			c.Errorf("a change after the end: %+v", i)
		}
		if i.ID != id || i.Progress.Done < last.Progress.Done && i.Progress.Phase == last.Progress.Phase || i.Progress.Total != 0 && i.Progress.Done > i.Progress.Total {
			c.Errorf("progress %+v after %+v", i, last)
		}
		last = i
		calls++
		return nil
	})
	c.ok(err, "WatchImport")
	if !last.State.Final() || calls == 0 {
		c.Fatalf("WatchImport ended with %+v", last)
	}
	if last.EndedAt.IsZero() || last.StartedAt.IsZero() {
		c.Errorf("ended without times: %+v", last)
	}
	return last
}

func (c *C) imported(req storage.ImportRequest, path string) storage.Template {
	_, err := c.start(req, path)
	c.ok(err, "StartImport")
	if i := c.wait(req.ID); i.State != storage.ImportDone {
		c.Fatalf("import ended as %+v", i)
	}
	t, err := c.p.Storage.GetTemplate(c, storage.Ref{Ref: req.ID})
	c.ok(err, "GetTemplate after the import")
	return t
}

func checkImportRaw(c *C) {
	path := c.image(3 * mib)
	b, _ := os.ReadFile(path)
	for _, sum := range []string{"", fmt.Sprintf("sha256:%x", sha256.Sum256(b)), fmt.Sprintf("sha512:%x", sha512.Sum512(b))} {
		req := storage.ImportRequest{ID: ident.New(), Name: c.name("raw" + fmt.Sprint(len(sum))), Checksum: sum, Labels: map[string]string{"os": "none"}}
		t := c.imported(req, path)
		if t.Name != req.Name || t.SizeBytes != 3*mib || t.SourceFormat != "raw" || t.State != storage.StateReady || t.Labels["os"] != "none" {
			c.Errorf("template %+v", t)
		}
		again, err := c.start(req, path)
		c.ok(err, "the same import again")
		if again.ID != req.ID {
			c.Errorf("the same import gave %+v", again)
		}
		if sum == "" {
			v := c.volume("clone", func(r *storage.CreateVolumeRequest) { r.FromTemplate, r.SizeBytes = t.ID, 0 })
			c.holds(v, "image begins", "a clone of the template")
			if got := c.read(v, 3*mib-512, 10); string(got) != "image ends" {
				c.Errorf("the image's end holds %q", got)
			}
		}
	}
	list, err := c.p.Storage.ListImports(c)
	c.ok(err, "ListImports")
	if len(list) < 3 {
		c.Errorf("%d imports listed, three have just ended", len(list))
	}
}

func (c *C) qemuImg(args ...string) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		c.Skipf("qemu-img is not installed (package qemu-utils)")
	}
	if out, err := exec.CommandContext(c, "qemu-img", args...).CombinedOutput(); err != nil {
		c.Fatalf("qemu-img %v: %v %s", args, err, out)
	}
}

func checkImportQcow2(c *C) {
	raw := c.image(3 * mib)
	for _, options := range [][]string{nil, {"-c"}, {"-o", "cluster_size=4096"}} {
		path := raw + fmt.Sprint(len(options)) + ".qcow2"
		c.qemuImg(append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, options...), raw, path)...)
		t := c.imported(storage.ImportRequest{ID: ident.New(), Name: c.name("q" + fmt.Sprint(len(options)))}, path)
		if t.SizeBytes != 3*mib || t.SourceFormat != "qcow2" {
			c.Errorf("template %+v", t)
		}
		v := c.volume("clone", func(r *storage.CreateVolumeRequest) { r.FromTemplate, r.SizeBytes = t.ID, 0 })
		c.holds(v, "image begins", "a clone of the template")
		if got := c.read(v, 3*mib-512, 10); string(got) != "image ends" {
			c.Errorf("the image's end holds %q", got)
		}
		c.ok(c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: v.ID}), "DeleteVolume")
		c.ok(c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: t.ID}), "DeleteTemplate")
	}
}

func checkImportRefuses(c *C) {
	path := c.image(mib)
	for _, n := range badNames {
		_, err := c.start(storage.ImportRequest{ID: ident.New(), Name: n}, path)
		c.fails(err, errs.Invalid, "template name %q", n)
	}
	for _, u := range []string{"file:///etc/passwd", "ftp://x/y", "/etc/passwd", "http://", "gopher://x", "http:// bad"} {
		_, err := c.start(storage.ImportRequest{ID: ident.New(), Name: c.name("x"), URL: u}, "")
		c.fails(err, errs.Invalid, "url %q", u)
	}
	for _, s := range []string{"x", "md5:00", "sha256:", "sha256:zz", "sha256:00", "sha512:" + fmt.Sprintf("%x", sha256.Sum256(nil))} {
		_, err := c.start(storage.ImportRequest{ID: ident.New(), Name: c.name("x"), Checksum: s}, path)
		c.fails(err, errs.Invalid, "checksum %q", s)
	}
	_, err := c.start(storage.ImportRequest{ID: ident.New(), Name: c.name("x")}, "")
	c.fails(err, errs.Invalid, "neither file nor url")
	_, err = c.start(storage.ImportRequest{ID: ident.New(), Name: c.name("x"), URL: "http://example.invalid/x"}, path)
	c.fails(err, errs.Invalid, "file and url")
	t := c.imported(storage.ImportRequest{ID: ident.New(), Name: c.name("taken")}, path)
	_, err = c.start(storage.ImportRequest{ID: ident.New(), Name: t.Name}, path)
	c.fails(err, errs.Exists, "a name that is taken")
	_, err = c.p.Storage.GetTemplate(c, storage.Ref{Ref: c.name("x")})
	c.fails(err, errs.NotFound, "what refused imports left")
	err = c.p.Storage.WatchImport(c, storage.Ref{Ref: ident.New()}, func(storage.Import) error { return nil })
	c.fails(err, errs.NotFound, "WatchImport of nothing")
	c.ok(c.p.Storage.CancelImport(c, storage.Ref{Ref: t.ID}), "CancelImport of one that has ended")
	if _, err := c.p.Storage.GetTemplate(c, storage.Ref{Ref: t.ID}); err != nil {
		c.Errorf("cancelling an import that had ended took its template: %v", err)
	}
}

// failed imports an image that must be refused, and looks for what it left.
func (c *C) failed(what string, req storage.ImportRequest, path string) {
	req.ID, req.Name = ident.New(), c.name("bad")
	_, err := c.start(req, path)
	if err != nil { // refused at once is as good
		if k := errs.KindOf(err); k == errs.Unknown || k == errs.Internal {
			c.Errorf("%s: %v (kind %s)", what, err, k)
		}
	} else {
		i := c.wait(req.ID)
		if i.State != storage.ImportFailed || i.Failure == "" || i.FailureKind == uint32(errs.Unknown) || i.FailureKind == uint32(errs.Internal) {
			c.Errorf("%s: ended as %+v, must be failed, with a reason and a kind", what, i)
		}
	}
	if _, err := c.p.Storage.GetTemplate(c, storage.Ref{Ref: req.ID}); errs.KindOf(err) != errs.NotFound {
		c.Errorf("%s: a template is there: %v", what, err)
	}
	if _, err := c.p.Storage.GetTemplate(c, storage.Ref{Ref: req.Name}); errs.KindOf(err) != errs.NotFound {
		c.Errorf("%s: a template of its name is there: %v", what, err)
	}
}

func checkImportDamaged(c *C) {
	raw := c.image(3 * mib)
	c.failed("a wrong checksum", storage.ImportRequest{Checksum: fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("x")))}, raw)
	empty := raw + ".empty"
	c.ok(os.WriteFile(empty, nil, 0o644), "image")
	c.failed("an empty file", storage.ImportRequest{}, empty)
	header := raw + ".header"
	c.ok(os.WriteFile(header, []byte("QFI\xfb\x00\x00\x00\x03"), 0o644), "image")
	c.failed("a qcow2 of eight bytes", storage.ImportRequest{}, header)
	q := raw + ".qcow2"
	c.qemuImg("convert", "-f", "raw", "-O", "qcow2", raw, q)
	whole, err := os.ReadFile(q)
	c.ok(err, "image")
	cut := raw + ".cut"
	c.ok(os.WriteFile(cut, whole[:len(whole)/2], 0o644), "image")
	c.failed("a qcow2 cut in the middle", storage.ImportRequest{}, cut)
	lying := append([]byte(nil), whole...)
	for i := 24; i < 32; i++ { // virtual size
		lying[i] = 0xff
	}
	liar := raw + ".liar"
	c.ok(os.WriteFile(liar, lying, 0o644), "image")
	c.failed("a qcow2 that says it has 2^64-1 bytes", storage.ImportRequest{}, liar)
	backed := raw + ".backed"
	c.qemuImg("create", "-f", "qcow2", "-b", raw, "-F", "raw", backed)
	c.failed("a qcow2 with a backing file", storage.ImportRequest{}, backed)
	external := raw + ".external"
	c.qemuImg("create", "-f", "qcow2", "-o", "data_file="+raw+".data", external, "1M")
	c.failed("a qcow2 with an external data file", storage.ImportRequest{}, external)
}

// serve serves HTTP on the loopback for the time of the check.
func (c *C) serve(h http.HandlerFunc) string {
	if !c.cfg.ImportURL {
		c.Skipf("the configuration does not allow imports from http://127.0.0.1")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	c.ok(err, "listen")
	srv := &http.Server{Handler: h}
	go srv.Serve(ln)
	c.later(func() { srv.Close() })
	return "http://user:secret@" + ln.Addr().String()
}

func checkImportCancel(c *C) {
	r, w, err := os.Pipe()
	c.ok(err, "pipe")
	defer w.Close()
	fed := make(chan struct{})
	go func() { // feeds until the plugin closes its end, or the check does
		defer close(fed)
		b := make([]byte, 64<<10)
		for {
			if _, err := w.Write(b); err != nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	id, name := ident.New(), c.name("cancelled")
	_, err = c.p.Storage.StartImport(c, storage.ImportRequest{ID: id, Name: name, File: r, FileName: "pipe"})
	r.Close()
	c.ok(err, "StartImport from a pipe")
	ctx, cancel := context.WithTimeout(c, 20*time.Second)
	defer cancel()
	var last storage.Import
	asked := false
	err = c.p.Storage.WatchImport(ctx, storage.Ref{Ref: id}, func(i storage.Import) error {
		last = i
		if !asked {
			asked = true
			return c.p.Storage.CancelImport(ctx, storage.Ref{Ref: id})
		}
		return nil
	})
	c.ok(err, "WatchImport, cancelling")
	if last.State != storage.ImportCanceled {
		c.Errorf("ended as %+v, must be cancelled", last)
	}
	c.ok(c.p.Storage.CancelImport(c, storage.Ref{Ref: id}), "CancelImport, repeated")
	for _, ref := range []string{id, name} {
		if _, err := c.p.Storage.GetTemplate(c, storage.Ref{Ref: ref}); errs.KindOf(err) != errs.NotFound {
			c.Errorf("a cancelled import left a template: %v", err)
			c.later(func() { c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: id}) })
		}
	}
	w.Close()
	<-fed
	t := c.imported(storage.ImportRequest{ID: ident.New(), Name: name}, c.image(mib))
	if t.Name != name {
		c.Errorf("its name cannot be used again: %+v", t)
	}
	stopped := errors.New("enough")
	if err := c.p.Storage.WatchImport(c, storage.Ref{Ref: t.ID}, func(storage.Import) error { return stopped }); !errors.Is(err, stopped) {
		c.Errorf("a watcher that ends the watch got %v", err)
	}
}

func checkImportURL(c *C) {
	image, err := os.ReadFile(c.image(3 * mib))
	c.ok(err, "image")
	base := c.serve(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/good":
			http.ServeContent(w, r, "image.raw", time.Time{}, bytes.NewReader(image))
		case "/cut": // says it has more than it sends, each time
			w.Header().Set("Content-Length", fmt.Sprint(len(image)))
			w.Header().Set("Accept-Ranges", "none")
			w.Write(image[:len(image)/2])
			panic(http.ErrAbortHandler)
		case "/file":
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		default:
			http.NotFound(w, r)
		}
	})
	req := storage.ImportRequest{ID: ident.New(), Name: c.name("url"), URL: base + "/good", Checksum: fmt.Sprintf("sha256:%x", sha256.Sum256(image))}
	i, err := c.start(req, "")
	c.ok(err, "StartImport")
	if i = c.wait(i.ID); i.State != storage.ImportDone {
		c.Fatalf("ended as %+v", i)
	}
	if t, err := c.p.Storage.GetTemplate(c, storage.Ref{Ref: req.ID}); err != nil || t.SizeBytes != 3*mib {
		c.Errorf("template %+v, %v", t, err)
	}
	if strings.Contains(i.Source, "secret") {
		c.Errorf("source %q tells the password", i.Source)
	}
	c.failed("404", storage.ImportRequest{URL: base + "/none"}, "")
	c.failed("a redirect to a file", storage.ImportRequest{URL: base + "/file"}, "")
	c.failed("a connection cut halfway", storage.ImportRequest{URL: base + "/cut"}, "")
}

func checkTemplates(c *C) {
	v := c.volume("v", nil)
	c.write(v, "golden")
	s := c.snapshot(v, "s")
	req := storage.CreateTemplateRequest{ID: ident.New(), Name: c.name("t"), SnapshotID: s.ID}
	for range 2 {
		t, err := c.p.Storage.CreateTemplate(c, req)
		c.ok(err, "CreateTemplate")
		if t.ID != req.ID || t.SizeBytes != v.SizeBytes {
			c.Errorf("template %+v", t)
		}
	}
	c.later(func() { c.ok(c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: req.ID}), "DeleteTemplate") })
	_, err := c.p.Storage.CreateTemplate(c, storage.CreateTemplateRequest{ID: ident.New(), Name: c.name("u"), SnapshotID: ident.New()})
	c.fails(err, errs.NotFound, "CreateTemplate of nothing")
	_, err = c.p.Storage.CreateTemplate(c, storage.CreateTemplateRequest{ID: ident.New(), Name: req.Name, SnapshotID: s.ID})
	c.fails(err, errs.Exists, "a name that is taken")
	t, err := c.p.Storage.RenameTemplate(c, storage.RenameRequest{Ref: req.ID, Name: c.name("renamed")})
	c.ok(err, "RenameTemplate")
	if t.Name != c.name("renamed") {
		c.Errorf("renamed %+v", t)
	}
	list, err := c.p.Storage.ListTemplates(c)
	c.ok(err, "ListTemplates")
	found := 0
	for _, l := range list {
		if l.ID == req.ID {
			found++
		}
	}
	if found != 1 {
		c.Errorf("listed %d times", found)
	}
	c.ok(c.p.Storage.DeleteVolume(c, storage.DeleteVolumeRequest{Ref: v.ID, WithSnapshots: true}), "DeleteVolume while a template of its snapshot lives")
	clone := c.volume("clone", func(r *storage.CreateVolumeRequest) { r.FromTemplate, r.SizeBytes = req.ID, 0 })
	c.holds(clone, "golden", "a clone of the template")
	c.restart(true)
	if _, err := c.p.Storage.GetTemplate(c, storage.Ref{Ref: c.name("renamed")}); err != nil {
		c.Errorf("after a restart: %v", err)
	}
	for range 2 {
		c.ok(c.p.Storage.DeleteTemplate(c, storage.Ref{Ref: req.ID}), "DeleteTemplate")
	}
}
