package dir

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/storagekit"
)

func startFile(t testing.TB, s *storagekit.Service, name, path, checksum string) storage.Import {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() // the service has its own
	return must(s.StartImport(t.Context(), storage.ImportRequest{ID: ident.New(), Name: name, File: f, FileName: filepath.Base(path), Checksum: checksum}))(t)
}

func startURL(t testing.TB, s *storagekit.Service, name, url, checksum string) storage.Import {
	t.Helper()
	return must(s.StartImport(t.Context(), storage.ImportRequest{ID: ident.New(), Name: name, URL: url, Checksum: checksum}))(t)
}

func failed(t testing.TB, i storage.Import, kind errs.Kind, words string) {
	t.Helper()
	if i.State != storage.ImportFailed || errs.Kind(i.FailureKind) != kind || !strings.Contains(i.Failure, words) || i.Remedy == "" || i.EndedAt.IsZero() {
		t.Errorf("got %+v (%v), want failed with %v, %q and a remedy", i, errs.Kind(i.FailureKind), kind, words)
	}
}

func TestImportFiles(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	raw := noise(9*mib + 512)
	dir := t.TempDir()
	rawPath, gzPath := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.raw.gz")
	os.WriteFile(rawPath, raw, 0o600)
	var packed bytes.Buffer
	zw := gzip.NewWriter(&packed)
	zw.Write(raw)
	zw.Close()
	os.WriteFile(gzPath, packed.Bytes(), 0o600)
	for i, c := range []struct{ path, format string }{
		{rawPath, "raw"}, {qcow2(t, raw), "qcow2"}, {qcow2(t, raw, "-c"), "qcow2"}, {gzPath, "raw+gzip"},
	} {
		content, err := os.ReadFile(c.path)
		if err != nil {
			t.Fatal(err)
		}
		sum := fmt.Sprintf("sha256:%x", sha256.Sum256(content))
		if i%2 == 1 {
			sum = fmt.Sprintf("sha512:%X", sha512.Sum512(content))
		}
		imp := await(t, s, startFile(t, s, fmt.Sprintf("t%d", i), c.path, sum).ID)
		if imp.State != storage.ImportDone || imp.SourceFormat != c.format || imp.BytesWritten == 0 || imp.BytesWritten > uint64(len(raw)*6/10) {
			t.Fatalf("%+v", imp)
		}
		tm := must(s.GetTemplate(t.Context(), storage.Ref{Ref: imp.Name}))(t)
		if tm.ID != imp.ID || tm.SizeBytes != uint64(len(raw)) || tm.AllocatedBytes > uint64(len(raw)*6/10) || tm.Checksum != sum {
			t.Errorf("%+v", tm)
		}
		templateEquals(t, root, imp.ID, raw)
		bad := await(t, s, startFile(t, s, fmt.Sprintf("bad%d", i), c.path, "sha256:"+strings.Repeat("0", 64)).ID)
		failed(t, bad, errs.Invalid, "checksum")
	}
	clean(t, root, s)
	v := must(s.CreateVolume(t.Context(), storage.CreateVolumeRequest{ID: ident.New(), Name: "v", FromTemplate: "t1", SizeBytes: 20 * mib}))(t)
	if v.SizeBytes != 20*mib || v.OriginType != "template" {
		t.Errorf("%+v", v)
	}
}

func TestImportBadFiles(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	dir := t.TempDir()
	img, err := os.ReadFile(qcow2(t, noise(3*mib)))
	if err != nil {
		t.Fatal(err)
	}
	lying := bytes.Clone(img)
	copy(lying[24:], []byte{0x7f, 0, 0, 0, 0, 0, 0, 0})
	backing := bytes.Clone(img)
	copy(backing[8:], []byte{0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 11})
	copy(backing[512:], "/etc/shadow")
	for name, c := range map[string]struct {
		b    []byte
		word string
	}{
		"truncated": {img[:len(img)/2], "truncated"}, "lying": {lying, "limit"}, "backing": {backing, "backing"},
		"vmdk": {[]byte("KDMV" + strings.Repeat("x", 5000)), "VMDK"}, "empty": {nil, "empty"},
	} {
		p := filepath.Join(dir, name)
		os.WriteFile(p, c.b, 0o600)
		failed(t, await(t, s, startFile(t, s, name, p, "").ID), errs.Invalid, c.word)
	}
	failed(t, await(t, s, startFile(t, s, "dir", dir, "").ID), errs.Invalid, "directory")
	clean(t, root, s)
	if l := must(s.ListTemplates(t.Context()))(t); len(l) != 0 {
		t.Errorf("%+v", l)
	}
}

func TestImportRequests(t *testing.T) {
	s := open(t, t.TempDir(), options())
	ctx := t.Context()
	for _, r := range []storage.ImportRequest{
		{Name: "x", URL: "ftp://example.org/a"}, {Name: "x", URL: "file:///etc/passwd"}, {Name: "x", URL: "http:///a"}, {Name: "x", URL: "::"},
		{Name: "x"}, {Name: "x/y", URL: "http://127.0.0.1/"}, {Name: "x", URL: "http://127.0.0.1/", Checksum: "md5:00"},
		{Name: "x", URL: "http://127.0.0.1/", Checksum: "sha256:00"},
	} {
		r.ID = ident.New()
		_, err := s.StartImport(ctx, r)
		want(t, err, errs.Invalid)
	}
	if l := must(s.ListImports(ctx))(t); len(l) != 0 {
		t.Errorf("%+v", l)
	}
	_, err := s.GetTemplate(ctx, storage.Ref{Ref: "nothing"})
	want(t, err, errs.NotFound)
	want(t, s.WatchImport(ctx, storage.Ref{Ref: ident.New()}, nil), errs.NotFound)
}

// server serves an image with every way of going wrong.
type server struct {
	*httptest.Server
	img      []byte
	requests atomic.Int64
	ranges   atomic.Int64
}

func serve(t testing.TB, img []byte) *server {
	s := &server{img: img}
	modified := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	mux := http.NewServeMux()
	whole := func(w http.ResponseWriter, r *http.Request, etag string) {
		if etag != "" {
			w.Header().Set("ETag", etag)
		}
		if r.Header.Get("Range") != "" {
			s.ranges.Add(1)
		}
		http.ServeContent(w, r, "x", modified, bytes.NewReader(s.img))
	}
	// cut serves at most n bytes, then breaks the connection.
	cut := func(w http.ResponseWriter, n int64) http.ResponseWriter { return &cutter{w, n} }
	mux.HandleFunc("/good", func(w http.ResponseWriter, r *http.Request) { whole(w, r, `"v1"`) })
	mux.HandleFunc("/cut", func(w http.ResponseWriter, r *http.Request) { whole(cut(w, 2*mib), r, `"v1"`) })
	mux.HandleFunc("/cut-date", func(w http.ResponseWriter, r *http.Request) { whole(cut(w, 2*mib), r, "") })
	mux.HandleFunc("/changes", func(w http.ResponseWriter, r *http.Request) {
		n := s.requests.Add(1)
		if n > 3 {
			whole(w, r, `"final"`)
			return
		}
		whole(cut(w, 2*mib), r, fmt.Sprintf(`"v%d"`, n))
	})
	mux.HandleFunc("/always-changes", func(w http.ResponseWriter, r *http.Request) {
		whole(cut(w, 2*mib), r, fmt.Sprintf(`"v%d"`, s.requests.Add(1)))
	})
	mux.HandleFunc("/stuck", func(w http.ResponseWriter, r *http.Request) { whole(cut(w, 1000), r, `"v1"`) })
	mux.HandleFunc("/short", func(w http.ResponseWriter, r *http.Request) { // announces more than it has
		w.Header().Set("Content-Length", fmt.Sprint(len(s.img)+1000))
		w.Write(s.img)
	})
	mux.HandleFunc("/no-range", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		w.Header().Set("Content-Length", fmt.Sprint(len(s.img)))
		if s.requests.Add(1) == 1 {
			w = cut(w, 2*mib)
		}
		io.Copy(w, bytes.NewReader(s.img))
	})
	mux.HandleFunc("/chunked", func(w http.ResponseWriter, r *http.Request) {
		for b := s.img; len(b) > 0; {
			n := min(len(b), 100<<10)
			w.Write(b[:n])
			w.(http.Flusher).Flush()
			b = b[n:]
		}
	})
	mux.HandleFunc("/redirect", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/good", http.StatusFound) })
	mux.HandleFunc("/loop", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/loop", http.StatusFound) })
	mux.HandleFunc("/to-file", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", "file:///etc/passwd")
		w.WriteHeader(http.StatusFound)
	})
	mux.HandleFunc("/to-metadata", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://169.254.169.254/latest/meta-data/", http.StatusFound)
	})
	mux.HandleFunc("/secret", func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != "me" || p != "hunter2" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		whole(w, r, `"v1"`)
	})
	mux.HandleFunc("/busy", func(w http.ResponseWriter, r *http.Request) {
		if s.requests.Add(1) < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		whole(w, r, `"v1"`)
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		var from int
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
		if from > 0 {
			s.ranges.Add(1)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(s.img)-1, len(s.img)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(s.img[from:])
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(s.img)))
		w.Write(s.img[:3*mib])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

type cutter struct {
	http.ResponseWriter
	left int64
}

func (c *cutter) Write(p []byte) (int, error) {
	if int64(len(p)) > c.left {
		c.ResponseWriter.Write(p[:c.left])
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= int64(len(p))
	return c.ResponseWriter.Write(p)
}

func TestImportURLs(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	raw := noise(9 * mib)
	img, err := os.ReadFile(qcow2(t, raw))
	if err != nil {
		t.Fatal(err)
	}
	sum := fmt.Sprintf("sha256:%x", sha256.Sum256(img))
	for path, resumed := range map[string]bool{"good": false, "cut": true, "cut-date": true, "changes": true, "no-range": false, "chunked": false,
		"redirect": false, "busy": false} {
		t.Run(path, func(t *testing.T) {
			srv := serve(t, img)
			imp := await(t, s, startURL(t, s, path, srv.URL+"/"+path, sum).ID)
			if imp.State != storage.ImportDone {
				t.Fatalf("%+v", imp)
			}
			templateEquals(t, root, imp.ID, raw)
			if (srv.ranges.Load() > 0) != resumed {
				t.Errorf("%d requests for ranges", srv.ranges.Load())
			}
		})
	}
	for _, c := range []struct {
		path string
		kind errs.Kind
		word string
	}{
		{"none", errs.NotFound, "/none"}, {"stuck", errs.Unavailable, "cut after"}, {"short", errs.Unavailable, "interrupted"},
		{"always-changes", errs.Unavailable, "interrupted"}, {"loop", errs.Invalid, "redirects"}, {"to-file", errs.Invalid, "redirect"},
		{"to-metadata", errs.Denied, "169.254.169.254"}, {"secret", errs.Denied, "403"},
	} {
		t.Run(c.path, func(t *testing.T) {
			srv := serve(t, img)
			failed(t, await(t, s, startURL(t, s, c.path, srv.URL+"/"+c.path, "").ID), c.kind, c.word)
		})
	}
	t.Run("wrong checksum", func(t *testing.T) {
		srv := serve(t, img)
		failed(t, await(t, s, startURL(t, s, "wrong", srv.URL+"/good", "sha256:"+strings.Repeat("a", 64)).ID), errs.Invalid, "checksum")
	})
	t.Run("credentials", func(t *testing.T) {
		srv := serve(t, img)
		imp := await(t, s, startURL(t, s, "creds", strings.Replace(srv.URL, "http://", "http://me:hunter2@", 1)+"/secret?token=hunter2", "").ID)
		if imp.State != storage.ImportDone || strings.Contains(fmt.Sprintf("%+v", imp), "hunter2") {
			t.Errorf("%+v", imp)
		}
		if tm := must(s.GetTemplate(t.Context(), storage.Ref{Ref: "creds"}))(t); strings.Contains(fmt.Sprintf("%+v", tm), "hunter2") {
			t.Errorf("%+v", tm)
		}
	})
	t.Run("dead", func(t *testing.T) {
		l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
		l.Close()
		failed(t, await(t, s, startURL(t, s, "dead", "http://me:hunter2@"+l.Addr().String()+"/x", "").ID), errs.Unavailable, "cannot fetch")
	})
	t.Run("truncated by the server", func(t *testing.T) {
		srv := serve(t, img[:len(img)/2])
		failed(t, await(t, s, startURL(t, s, "half", srv.URL+"/good", "").ID), errs.Invalid, "truncated")
	})
	clean(t, root, s)
}

// TestPrivateAddressesDenied: by default no URL leads to this host or its neighbours.
func TestPrivateAddressesDenied(t *testing.T) {
	o := options()
	o.Fetch.Policy.Allow = nil
	s := open(t, t.TempDir(), o)
	srv := serve(t, noise(mib))
	port := srv.Listener.Addr().(*net.TCPAddr).Port
	for i, host := range []string{"127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "169.254.169.254", "10.1.2.3", "[fd00:ec2::254]", "0.0.0.0"} {
		imp := await(t, s, startURL(t, s, fmt.Sprintf("n%d", i), fmt.Sprintf("http://%s:%d/good", host, port), "").ID)
		failed(t, imp, errs.Denied, "not a public address")
	}
	if srv.requests.Load() != 0 {
		t.Error("a request got through")
	}
}

func TestImportCancelAndNames(t *testing.T) {
	root := t.TempDir()
	o := options()
	o.Running = 1
	s := open(t, root, o)
	ctx := t.Context()
	img, err := os.ReadFile(qcow2(t, noise(9*mib)))
	if err != nil {
		t.Fatal(err)
	}
	srv := serve(t, img)
	running := startURL(t, s, "one", srv.URL+"/slow", "")
	queued := startURL(t, s, "two", srv.URL+"/slow", "")
	_, err = s.StartImport(ctx, storage.ImportRequest{ID: ident.New(), Name: "one", URL: srv.URL + "/good"})
	want(t, err, errs.Exists, "NAME_TAKEN")
	if again := must(s.StartImport(ctx, storage.ImportRequest{ID: running.ID, Name: "one", URL: srv.URL + "/slow"}))(t); again.ID != running.ID {
		t.Error("a repeated start")
	}
	_, err = s.StartImport(ctx, storage.ImportRequest{ID: running.ID, Name: "other", URL: srv.URL + "/slow"})
	want(t, err, errs.Exists, "ID_TAKEN")
	_, err = s.CreateVolume(ctx, storage.CreateVolumeRequest{ID: running.ID, Name: "v", SizeBytes: mib})
	want(t, err, errs.Exists, "ID_TAKEN")

	seen, calls := make(chan struct{}), 0
	var last storage.Import
	var once sync.Once
	watching := make(chan error, 1)
	go func() {
		watching <- s.WatchImport(ctx, storage.Ref{Ref: "one"}, func(i storage.Import) error {
			last = i
			calls++
			if i.Progress.Done >= 3*mib && i.BytesWritten > 0 {
				once.Do(func() { close(seen) })
			}
			return nil
		})
	}()
	select {
	case <-seen: // the conversion runs while the download does
	case <-time.After(20 * time.Second):
		t.Fatalf("no progress: %+v", last)
	}
	if must(s.ListImports(ctx))(t)[1].State != storage.ImportQueued {
		t.Error("the second does not wait")
	}
	for _, id := range []string{queued.ID, running.ID, running.ID} {
		if err := s.CancelImport(ctx, storage.Ref{Ref: id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-watching; err != nil || last.State != storage.ImportCanceled || last.Progress.Total != uint64(len(img)) {
		t.Errorf("%v, %+v", err, last)
	}
	if calls > 100 {
		t.Errorf("%d reports", calls)
	}
	clean(t, root, s)
	// The name is free again.
	if i := await(t, s, startURL(t, s, "one", srv.URL+"/good", "").ID); i.State != storage.ImportDone {
		t.Errorf("%+v", i)
	}
	if err := s.CancelImport(ctx, storage.Ref{Ref: "one"}); err != nil {
		t.Errorf("cancel of an ended one: %v", err)
	}
	if _, err := s.GetTemplate(ctx, storage.Ref{Ref: "one"}); err != nil {
		t.Error(err)
	}
}

// TestImportSurvivesRestart: a URL goes on where it was, a file fails and says why.
func TestImportSurvivesRestart(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	raw := noise(9 * mib)
	img, err := os.ReadFile(qcow2(t, raw))
	if err != nil {
		t.Fatal(err)
	}
	srv := serve(t, img)
	r, w := must2(os.Pipe())(t)
	defer w.Close()
	fromURL := startURL(t, s, "url", srv.URL+"/slow", fmt.Sprintf("sha256:%x", sha256.Sum256(img)))
	fromPipe := must(s.StartImport(t.Context(), storage.ImportRequest{ID: ident.New(), Name: "pipe", File: r, FileName: "-"}))(t)
	r.Close()
	w.Write(img[:mib])
	err = s.WatchImport(t.Context(), storage.Ref{Ref: fromURL.ID}, func(i storage.Import) error {
		if i.Progress.Done >= 3*mib {
			return io.EOF
		}
		return nil
	})
	if err != io.EOF {
		t.Fatal(err)
	}
	shut(t, s)
	s = open(t, root, options())
	if i := await(t, s, fromURL.ID); i.State != storage.ImportDone {
		t.Errorf("%+v", i)
	}
	templateEquals(t, root, fromURL.ID, raw)
	if srv.ranges.Load() == 0 {
		t.Error("the download began again")
	}
	failed(t, await(t, s, fromPipe.ID), errs.Unavailable, "restarted")
	clean(t, root, s)
}

func must2[A, B any](a A, b B, err error) func(t testing.TB) (A, B) {
	return func(t testing.TB) (A, B) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return a, b
	}
}

// TestImportPipe: what cannot be sought in is kept on its way, so that all formats work.
func TestImportPipe(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, options())
	raw := noise(5 * mib)
	img, err := os.ReadFile(qcow2(t, raw))
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range [][]byte{raw, img} {
		r, w := must2(os.Pipe())(t)
		imp := must(s.StartImport(t.Context(), storage.ImportRequest{ID: ident.New(), Name: fmt.Sprintf("p%d", i), File: r, FileName: "-",
			Checksum: fmt.Sprintf("sha256:%x", sha256.Sum256(b))}))(t)
		r.Close()
		go func() { w.Write(b); w.Close() }()
		if imp = await(t, s, imp.ID); imp.State != storage.ImportDone {
			t.Fatalf("%+v", imp)
		}
		templateEquals(t, root, imp.ID, raw)
	}
	// One that never ends can be cancelled.
	r, w := must2(os.Pipe())(t)
	defer w.Close()
	imp := must(s.StartImport(t.Context(), storage.ImportRequest{ID: ident.New(), Name: "endless", File: r, FileName: "-"}))(t)
	r.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.CancelImport(ctx, storage.Ref{Ref: imp.ID}); err != nil {
		t.Fatal(err)
	}
	clean(t, root, s)
}

func TestWorkerUserMissing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root changes to another user")
	}
	o := options()
	o.WorkerUser = "no-such-user-here"
	root := t.TempDir()
	s := open(t, root, o)
	if c := conditions(t, s)["WORKER_USER_MISSING"]; c.Remedy == "" {
		t.Errorf("%+v", c)
	}
	p := filepath.Join(t.TempDir(), "raw")
	os.WriteFile(p, noise(mib), 0o600)
	failed(t, await(t, s, startFile(t, s, "x", p, "").ID), errs.Precondition, "no-such-user-here")
	clean(t, root, s)
}
