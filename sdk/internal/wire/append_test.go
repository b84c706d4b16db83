package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/internal/pb/logpb"
	"github.com/mvirt/mvirt/sdk/internal/pb/pluginpb"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// store is a log plugin whose appends wait for gate, when there is one.
type store struct {
	log.Service
	gate chan struct{}
	fail func([]log.Entry) error

	calls, under, most atomic.Int64

	mu  sync.Mutex
	got []string // ids, as stored
}

func (s *store) Append(ctx context.Context, es []log.Entry) error {
	s.calls.Add(1)
	n := s.under.Add(1)
	defer s.under.Add(-1)
	for m := s.most.Load(); n > m && !s.most.CompareAndSwap(m, n); m = s.most.Load() {
	}
	if s.gate != nil {
		select {
		case <-s.gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if s.fail != nil {
		if err := s.fail(es); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range es {
		s.got = append(s.got, es[i].ID)
	}
	return nil
}

func (s *store) ids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Clone(s.got)
	slices.Sort(out)
	return out
}

// counted counts the streams that a server has under way, and can lack the method.
type counted struct {
	logpb.LogServer
	streams, opened atomic.Int64
	lacks           bool
	ended           chan struct{} // one message for each stream that ended
}

func (c *counted) AppendStream(s grpc.BidiStreamingServer[logpb.AppendRequest, logpb.AppendResponse]) error {
	if c.lacks {
		return status.Error(codes.Unimplemented, "unknown method AppendStream")
	}
	c.opened.Add(1)
	c.streams.Add(1)
	err := c.LogServer.AppendStream(s)
	c.streams.Add(-1)
	c.ended <- struct{}{}
	return err
}

func serveLog(t *testing.T, s *store) (*LogClient, *counted, *grpc.Server) {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	srv := grpc.NewServer()
	c := &counted{LogServer: &logServer{impl: s}, ended: make(chan struct{}, 1000)}
	logpb.RegisterLogServer(srv, c)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///log", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		srv.Stop()
		<-done
	})
	return NewClients(conn, service.Info{Kind: service.KindLog}, nil).Log, c, srv
}

func one(id string) []log.Entry {
	return []log.Entry{{ID: id, Time: time.Unix(1, 0), Level: log.LevelInfo, Message: "m"}}
}

// sendAll appends n single entries at once and returns each one's error once all have been answered.
func sendAll(t *testing.T, c *LogClient, n int, id func(i int) string) []error {
	t.Helper()
	out := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { out[i] = c.Append(t.Context(), one(id(i))) })
	}
	wg.Wait()
	return out
}

// until waits for a condition that only the other side's progress brings about.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain: ", what)
		}
	}
}

// held is how many calls the pipe holds, sent or not.
func held(c *LogClient) int {
	c.mu.Lock()
	p := c.cur
	c.mu.Unlock()
	if p == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.queue)
	for _, f := range p.flying {
		n += len(f)
	}
	return n
}

// gathered waits until all of n calls are under way: those below pipeFrom by unary calls, the others in the pipe.
func gathered(t *testing.T, c *LogClient, s *store, n int) {
	t.Helper()
	until(t, "calls to gather", func() bool { return held(c) == n-(pipeFrom-1) && s.under.Load() >= pipeFrom })
}

// TestAppendTogether: calls that wait share a message, each entry arrives once, and nobody is answered before
// his entry is stored.
func TestAppendTogether(t *testing.T) {
	const n = 200
	s := &store{gate: make(chan struct{})}
	c, _, _ := serveLog(t, s)
	errsOf := make(chan []error, 1)
	go func() { errsOf <- sendAll(t, c, n, func(i int) string { return fmt.Sprintf("id-%03d", i) }) }()
	gathered(t, c, s, n)
	if len(errsOf) > 0 || len(s.ids()) > 0 {
		t.Fatal("answered before it was stored")
	}
	close(s.gate)
	for i, err := range <-errsOf {
		if err != nil {
			t.Fatal(i, err)
		}
	}
	ids := s.ids()
	if len(ids) != n || len(slices.Compact(ids)) != n {
		t.Fatalf("%d entries stored of %d", len(ids), n)
	}
	if k := s.calls.Load(); k > 20 {
		t.Errorf("%d calls of the store for %d entries", k, n)
	}
}

// TestAppendOneIsWrong: an entry that is refused does not take along those it shared a message with.
func TestAppendOneIsWrong(t *testing.T) {
	s := &store{gate: make(chan struct{}), fail: func(es []log.Entry) error {
		for i := range es {
			if es[i].ID == "id-7" {
				return errs.Field(fmt.Sprintf("entries[%d].id", i), "use another", "a bad id")
			}
		}
		return nil
	}}
	c, _, _ := serveLog(t, s)
	errsOf := make(chan []error, 1)
	go func() { errsOf <- sendAll(t, c, 50, func(i int) string { return fmt.Sprint("id-", i) }) }()
	gathered(t, c, s, 50)
	close(s.gate)
	for i, err := range <-errsOf {
		var e *errs.Error
		switch {
		case i != 7 && err != nil:
			t.Errorf("entry %d: %v", i, err)
		case i == 7 && (!errors.As(err, &e) || e.Kind != errs.Invalid || e.Field != "entries[0].id"):
			t.Errorf("the bad entry: %v", err)
		}
	}
	if got := s.ids(); len(got) != 49 || len(slices.Compact(got)) != 49 {
		t.Errorf("%d stored", len(got))
	}
}

// TestAppendFull: what concerns all is told to all, with its kind and remedy, and nothing is tried again behind
// the caller's back.
func TestAppendFull(t *testing.T) {
	s := &store{gate: make(chan struct{}), fail: func([]log.Entry) error {
		return errs.New(errs.Exhausted, "the disk is full").Because("DISK_FULL").Do("free space")
	}}
	c, _, _ := serveLog(t, s)
	errsOf := make(chan []error, 1)
	go func() { errsOf <- sendAll(t, c, 40, func(i int) string { return fmt.Sprint("id-", i) }) }()
	gathered(t, c, s, 40)
	close(s.gate)
	for _, err := range <-errsOf {
		if !errors.Is(err, errs.Exhausted) || errs.RemedyOf(err) != "free space" {
			t.Fatal(err)
		}
	}
	if k := s.calls.Load(); k > 20 {
		t.Errorf("%d calls of a store that is full", k)
	}
}

// TestAppendWithoutStream: a plugin of another language may lack AppendStream.
func TestAppendWithoutStream(t *testing.T) {
	s := &store{}
	c, srv, _ := serveLog(t, s)
	srv.lacks = true
	for range 2 {
		for i, err := range sendAll(t, c, 30, func(i int) string { return fmt.Sprint("id-", i) }) {
			if err != nil {
				t.Fatal(i, err)
			}
		}
	}
	if len(s.ids()) != 60 {
		t.Errorf("%d stored", len(s.ids()))
	}
}

// TestAppendPluginDies: all that wait are told, and soon.
func TestAppendPluginDies(t *testing.T) {
	s := &store{gate: make(chan struct{})}
	c, _, srv := serveLog(t, s)
	errsOf := make(chan []error, 1)
	go func() { errsOf <- sendAll(t, c, 30, func(i int) string { return fmt.Sprint("id-", i) }) }()
	gathered(t, c, s, 30)
	go srv.Stop()
	for i, err := range <-errsOf {
		if !errors.Is(err, errs.Unavailable) && !errors.Is(err, errs.Canceled) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

// TestAppendGivenUp: who gives up goes; the others are answered.
func TestAppendGivenUp(t *testing.T) {
	s := &store{gate: make(chan struct{})}
	c, _, _ := serveLog(t, s)
	errsOf := make(chan []error, 1)
	go func() { errsOf <- sendAll(t, c, 20, func(i int) string { return fmt.Sprint("id-", i) }) }()
	gathered(t, c, s, 20)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Append(ctx, one("given-up")); !errors.Is(err, errs.Canceled) {
		t.Error(err)
	}
	close(s.gate)
	for i, err := range <-errsOf {
		if err != nil {
			t.Error(i, err)
		}
	}
}

// TestAppendIdle: a stream without work ends, and the next work opens another.
func TestAppendIdle(t *testing.T) {
	s := &store{gate: make(chan struct{})}
	c, srv, _ := serveLog(t, s)
	for round := range 2 {
		errsOf := make(chan []error, 1)
		go func() { errsOf <- sendAll(t, c, 10, func(i int) string { return fmt.Sprint(round, "-", i) }) }()
		until(t, "a stream", func() bool { return srv.streams.Load() == 1 })
		for range 10 {
			select {
			case s.gate <- struct{}{}:
			case e := <-errsOf:
				errsOf <- e
			}
		}
		for _, err := range <-errsOf {
			if err != nil {
				t.Fatal(err)
			}
		}
		<-srv.ended
		if n := srv.streams.Load(); n != 0 {
			t.Fatalf("%d streams", n)
		}
	}
	if n := srv.opened.Load(); n != 2 {
		t.Errorf("%d streams were opened", n)
	}
}

// TestAppendStream speaks to the server as another language would: answers come in the order of requests though
// the store finishes them in another; a malformed request is answered and the stream goes on.
func TestAppendStream(t *testing.T) {
	first := make(chan struct{})
	s := &store{fail: func(es []log.Entry) error {
		switch es[0].ID {
		case "slow":
			<-first
		case "full":
			return errs.New(errs.Exhausted, "full")
		case "last":
			close(first)
		}
		return nil
	}}
	c, _, _ := serveLog(t, s)
	stream, err := c.rpc.AppendStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"slow", "full", "", "last"} {
		if id == "" {
			m := &pluginpb.Empty{}
			m.ProtoReflect().SetUnknown([]byte{fieldEntries<<3 | 2, 2, fieldID<<3 | 2, 9}) // longer than what is there
			err = stream.SendMsg(m)
		} else {
			err = stream.Send(&logpb.AppendRequest{Entries: logEntriesToPB(one(id))})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.ResourceExhausted, codes.InvalidArgument, codes.OK} {
		m, err := stream.Recv()
		if err != nil || codes.Code(m.GetCode()) != want {
			t.Fatalf("answer %d: %v, %v", i, m, err)
		}
	}
}

// TestAppendStreamBounds: who does not read answers is held up, not served without bound.
func TestAppendStreamBounds(t *testing.T) {
	s := &store{gate: make(chan struct{})}
	c, _, _ := serveLog(t, s)
	stream, err := c.rpc.AppendStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const n = 4 * appendWindow
	sent := make(chan error, 1)
	go func() {
		for i := range n {
			if err := stream.Send(&logpb.AppendRequest{Entries: logEntriesToPB(one(fmt.Sprint(i)))}); err != nil {
				sent <- err
				return
			}
		}
		sent <- stream.CloseSend()
	}()
	until(t, "the window to be full", func() bool { return s.under.Load() >= appendWindow })
	close(s.gate)
	for i := range n {
		if m, err := stream.Recv(); err != nil || m.GetCode() != 0 {
			t.Fatalf("answer %d: %v, %v", i, m, err)
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	// The window, and the two that its reader and writer hold.
	if m := s.most.Load(); m > appendWindow+2 {
		t.Errorf("%d appends were under way", m)
	}
}

// TestEntryCodec holds the hand-written coding to be that of the generated messages, both ways.
func TestEntryCodec(t *testing.T) {
	list := append(entries(20), log.Entry{}, log.Entry{ID: "\xff", Message: "a\xffb", Level: 1 << 20, Objects: []string{"", "\xff"},
		Labels: map[string]string{"k": "v\xff", "": ""}, Time: time.Unix(0, 0)},
		log.Entry{Time: time.Unix(-5, 1), Labels: map[string]string{"who": "root", "op": "vm.create"}})
	raw := appendEntries(nil, list[:20])
	if n := sizeEntries(list[:20]); n != len(raw) {
		t.Errorf("%d bytes, %d foretold", len(raw), n)
	}
	m := &logpb.AppendRequest{}
	if err := proto.Unmarshal(appendEntries(nil, list), m); err != nil {
		t.Fatal(err)
	}
	want := logEntriesFromPB(logEntriesToPB(list))
	if got := logEntriesFromPB(m.Entries); !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v\n%+v", got, want)
	}
	wire, err := proto.Marshal(&logpb.AppendRequest{Entries: logEntriesToPB(list)})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := decodeEntries(wire); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
}

// FuzzDecodeEntries: whatever comes is read as the generated messages read it, or refused as they refuse it.
func FuzzDecodeEntries(f *testing.F) {
	f.Add(appendEntries(nil, entries(3)))
	f.Add(appendEntries(nil, []log.Entry{{ID: "x", Labels: map[string]string{"a": "b", "c": ""}, Objects: []string{""}}}))
	f.Add([]byte{0x0a, 0x02, 0x12, 0x09})
	f.Add([]byte{0x0a, 0x03, 0x12, 0x01, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &logpb.AppendRequest{}
		perr := proto.Unmarshal(b, m)
		got, err := decodeEntries(slices.Clone(b))
		if (err == nil) != (perr == nil) {
			t.Fatalf("read: %v, the generated code: %v", err, perr)
		}
		if err != nil {
			if !errors.Is(err, errs.Invalid) {
				t.Fatal(err)
			}
			return
		}
		want := logEntriesFromPB(m.Entries)
		for i := range want {
			if len(want[i].Labels) == 0 {
				want[i].Labels = nil // the generated code makes a map for a label that is none
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%+v\n%+v", got, want)
		}
	})
}

func BenchmarkDecodeEntries(b *testing.B) {
	raw := appendEntries(nil, entries(1000))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeEntries(raw); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*1000/b.Elapsed().Seconds(), "entries/s")
}

func BenchmarkAppendEntries(b *testing.B) {
	in := entries(1000)
	var buf []byte
	for b.Loop() {
		buf = appendEntries(buf[:0], in)
	}
	b.ReportMetric(float64(b.N)*1000/b.Elapsed().Seconds(), "entries/s")
}
