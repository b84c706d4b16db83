package logsvc

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/pflag"
	"go.uber.org/goleak"

	"github.com/mvirt/mvirt/plugins/log-lsm/internal/engine"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, args ...string) (*Service, string) {
	t.Helper()
	var f Flags
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f.Register(fs)
	dir := t.TempDir()
	if err := fs.Parse(append([]string{"--data-dir", dir}, args...)); err != nil {
		t.Fatal(err)
	}
	o, err := f.Options()
	if err != nil {
		t.Fatal(err)
	}
	o.Now = time.Now
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Shutdown(context.Background()) })
	return s, dir
}

func put(t *testing.T, s *Service, n int) {
	t.Helper()
	var es []log.Entry
	for i := range n {
		es = append(es, log.Entry{Time: time.Now(), ID: uuid.Must(uuid.NewV7()).String(), Level: log.LevelAudit, Message: fmt.Sprint("entry ", i), Objects: []string{"vm-1"}})
	}
	if err := s.Append(context.Background(), es); err != nil {
		t.Fatal(err)
	}
}

func count(t *testing.T, s *Service) int {
	t.Helper()
	n := 0
	if err := s.Query(context.Background(), log.Query{Objects: []string{"vm-1"}}, func(log.Result) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRestore(t *testing.T) {
	a, _ := open(t)
	put(t, a, 100)
	var buf bytes.Buffer
	if err := a.Backup(context.Background(), &buf); err != nil {
		t.Fatal(err)
	}
	if err := a.Restore(context.Background(), bytes.NewReader(buf.Bytes())); errs.KindOf(err) != errs.Precondition {
		t.Fatal("restored onto entries:", err)
	}
	b, dir := open(t)
	if err := b.Restore(context.Background(), bytes.NewReader(buf.Bytes()[:buf.Len()/2])); errs.KindOf(err) != errs.Corrupt {
		t.Fatal("half a backup:", err)
	}
	if err := b.Restore(context.Background(), bytes.NewReader(buf.Bytes())); err != nil {
		t.Fatal(err)
	}
	if n := count(t, b); n != 100 {
		t.Fatalf("%d entries", n)
	}
	put(t, b, 1)
	rep, err := b.Verify(context.Background(), log.VerifyRequest{})
	if err != nil || len(rep.Breaks) > 0 || rep.Checked != 101 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if err := b.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	if code := check(&out, &errOut, engine.Options{Dir: dir, ReadOnly: true}); code != 0 || !strings.HasPrefix(out.String(), "101 entries") {
		t.Fatalf("check: %d\n%s%s", code, out.String(), errOut.String())
	}
}

func TestCheckOfAnOpenStore(t *testing.T) {
	_, dir := open(t)
	var out, errOut bytes.Buffer
	if code := check(&out, &errOut, engine.Options{Dir: dir, ReadOnly: true}); code != 2 || !strings.Contains(errOut.String(), "open") {
		t.Fatalf("check: %d\n%s%s", code, out.String(), errOut.String())
	}
}

func TestFlags(t *testing.T) {
	for _, bad := range []string{"--cache-size=1", "--cache-size=64MB", "--retain-age=x=7d", "--retain-age=debug", "--retain-age=debug=0d", "--retain-size=-1",
		"--retain-level-size=info=9999999999GiB", "--data-dir=", "--min-free=lots"} {
		var f Flags
		fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
		f.Register(fs)
		if err := fs.Parse([]string{bad}); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Options(); errs.KindOf(err) != errs.Invalid {
			t.Errorf("%s: %v", bad, err)
		}
	}
	var f Flags
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f.Register(fs)
	_ = fs.Parse([]string{"--retain-age=audit=3650d,debug=12h", "--retain-size=10GiB"})
	o, err := f.Options()
	if err != nil || o.Retention.Age[log.LevelDebug] != 12*time.Hour || o.Retention.Age[log.LevelAudit] != 3650*24*time.Hour || o.Retention.Size != 10<<30 {
		t.Fatalf("%+v, %v", o.Retention, err)
	}
}

// TestOffline makes a backup of a store that is not open, and puts it into another directory.
func TestOffline(t *testing.T) {
	a, from := open(t)
	put(t, a, 50)
	var file, out, errOut bytes.Buffer
	if code := backup(from, &file, &errOut); code != 2 || !strings.Contains(errOut.String(), "open") {
		t.Fatalf("backup of an open store: %d, %s", code, errOut.String())
	}
	if err := a.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	file.Reset()
	if code := backup(from, &file, &errOut); code != 0 {
		t.Fatal(errOut.String())
	}
	to := t.TempDir()
	if code := restore(to, bytes.NewReader(file.Bytes()[:file.Len()-5000]), &out, &errOut); code != 2 {
		t.Fatalf("a backup that is cut off: %d, %s", code, out.String())
	}
	if code := restore(to, bytes.NewReader(file.Bytes()), &out, &errOut); code != 0 || !strings.HasPrefix(out.String(), "50 entries") {
		t.Fatalf("%d, %s%s", code, out.String(), errOut.String())
	}
	errOut.Reset()
	if code := restore(to, bytes.NewReader(file.Bytes()), &out, &errOut); code != 2 || !strings.Contains(errOut.String(), "remedy: ") {
		t.Fatalf("onto entries: %d, %s", code, errOut.String())
	}
	if code := backup(to+"/absent", &file, &errOut); code != 2 {
		t.Fatal("backup of a store that is not there")
	}
	for _, args := range [][]string{nil, {"--data-dir"}, {"--data-dir="}, {"x"}, {"a", "b", "c"}} {
		if code := onStore(args, &errOut, "check", func(string) int { t.Error("called"); return 0 }); code != 2 {
			t.Errorf("%q: %d", args, code)
		}
	}
}
