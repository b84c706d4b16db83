package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/host"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// chunk is a batch as each target wants it, made before the clock runs.
type chunk struct {
	entries []log.Entry
	json    []byte
}

// target is a store in its own process.
type target interface {
	start(dir string) error
	send(ctx context.Context, c chunk) error
	// newest asks for the newest n entries of an object and says how many came.
	newest(ctx context.Context, object string, n int) (int, error)
	// count says how many messages contain a text.
	count(ctx context.Context, text string) (int, error)
	// settle waits until nothing is written any more.
	settle(ctx context.Context) error
	pid() int
	stop() error
}

// plugin is a log plugin, started as the core does it.
type plugin struct {
	command []string
	p       *host.Plugin
	dir     string
}

func (t *plugin) start(dir string) error {
	t.dir = dir
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	var err error
	t.p, err = host.Launch(ctx, host.Config{Kind: service.KindLog,
		Spawner: &host.Local{Command: append(append([]string{}, t.command...), "--data-dir", dir)}})
	return err
}

func (t *plugin) send(ctx context.Context, c chunk) error { return t.p.Log.Append(ctx, c.entries) }

func (t *plugin) newest(ctx context.Context, object string, n int) (int, error) {
	got := 0
	err := t.p.Log.Query(ctx, log.Query{Objects: []string{object}, NewestFirst: true, Limit: uint32(n)}, func(log.Result) error { got++; return nil })
	return got, err
}

func (t *plugin) count(ctx context.Context, text string) (int, error) {
	got := 0
	err := t.p.Log.Query(ctx, log.Query{Contains: text}, func(log.Result) error { got++; return nil })
	return got, err
}

func (t *plugin) settle(ctx context.Context) error {
	// Long, because the plugin packs what is left in memory only after ten idle seconds.
	return quiet(ctx, t.dir, 25*time.Second)
}

func (t *plugin) pid() int { return t.p.PID() }

func (t *plugin) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	return t.p.Stop(ctx)
}

// victoria is VictoriaLogs.
type victoria struct {
	binary string
	stream string // the field by which it groups
	cmd    *exec.Cmd
	base   string
	client *http.Client
	dir    string
}

func (t *victoria) start(dir string) error {
	t.dir = dir
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	addr := l.Addr().String()
	l.Close()
	t.base = "http://" + addr
	t.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}, Timeout: 5 * time.Minute}
	t.cmd = exec.Command(t.binary, "-storageDataPath", dir, "-httpListenAddr", addr, "-retentionPeriod", "100y", "-loggerLevel", "ERROR")
	t.cmd.Stdout, t.cmd.Stderr = io.Discard, os.Stderr
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := t.cmd.Start(); err != nil {
		return err
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		r, err := t.client.Get(t.base + "/health")
		if err == nil {
			r.Body.Close()
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("VictoriaLogs does not answer: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (t *victoria) do(ctx context.Context, path string, form url.Values, body []byte) ([]byte, error) {
	var req *http.Request
	var err error
	if body != nil {
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, t.base+path+"?"+form.Encode(), bytes.NewReader(body))
	} else {
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, t.base+path, strings.NewReader(form.Encode()))
		if req != nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
	}
	if err != nil {
		return nil, err
	}
	r, err := t.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s: %.200s", path, r.Status, b)
	}
	return b, err
}

func (t *victoria) send(ctx context.Context, c chunk) error {
	_, err := t.do(ctx, "/insert/jsonline", url.Values{"_stream_fields": {t.stream}}, c.json)
	return err
}

func (t *victoria) newest(ctx context.Context, object string, n int) (int, error) {
	field := "vm"
	if strings.HasPrefix(object, "vol-") {
		field = "vol"
	}
	q := fmt.Sprintf(`%s:=%q | sort by (_time) desc limit %d`, field, object, n)
	if field == t.stream {
		q = fmt.Sprintf(`{%s=%q} | sort by (_time) desc limit %d`, field, object, n)
	}
	b, err := t.do(ctx, "/select/logsql/query", url.Values{"query": {q}}, nil)
	return bytes.Count(b, []byte("\n")), err
}

func (t *victoria) count(ctx context.Context, text string) (int, error) {
	b, err := t.do(ctx, "/select/logsql/query", url.Values{"query": {fmt.Sprintf(`_msg:%q`, text)}}, nil)
	return bytes.Count(b, []byte("\n")), err
}

func (t *victoria) settle(ctx context.Context) error {
	for _, p := range []string{"/internal/force_flush", "/internal/force_merge"} {
		if _, err := t.do(ctx, p, url.Values{}, nil); err != nil {
			return err
		}
	}
	return quiet(ctx, t.dir, 6*time.Second)
}

func (t *victoria) pid() int { return t.cmd.Process.Pid }

func (t *victoria) stop() error {
	if err := t.cmd.Process.Signal(syscall.SIGINT); err != nil {
		return err
	}
	err := t.cmd.Wait()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return nil
	}
	return err
}

// quiet waits until the bytes under dir have not changed for a time.
func quiet(ctx context.Context, dir string, calm time.Duration) error {
	last, since := int64(-1), time.Now()
	for time.Since(since) < calm {
		n, err := diskBytes(dir)
		if err != nil {
			return err
		}
		if n != last {
			last, since = n, time.Now()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// diskBytes is what dir occupies on the disk.
func diskBytes(dir string) (int64, error) {
	total := int64(0)
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // files come and go
			}
			return err
		}
		if d.Type().IsRegular() {
			if i, err := d.Info(); err == nil {
				if st, ok := i.Sys().(*syscall.Stat_t); ok {
					total += st.Blocks * 512
				}
			}
		}
		return nil
	})
	return total, err
}

// usage is CPU time and peak resident memory of a process.
func usage(pid int) (cpu time.Duration, rss int64) {
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
		if _, rest, ok := strings.Cut(string(b), ") "); ok {
			f := strings.Fields(rest)
			u, _ := strconv.ParseInt(f[11], 10, 64)
			s, _ := strconv.ParseInt(f[12], 10, 64)
			cpu = time.Duration(u+s) * 10 * time.Millisecond // USER_HZ is 100
		}
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
		for line := range strings.SplitSeq(string(b), "\n") {
			if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
				kb, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
				rss = kb << 10
			}
		}
	}
	return cpu, rss
}
