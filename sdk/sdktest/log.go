package sdktest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// Log is a log.Service that keeps its entries in memory and in a file of JSON lines.
type Log struct {
	file *os.File

	mu      sync.Mutex
	entries []log.Entry // in the order of (Time, ID)
	arrived []log.Entry // in the order of arrival, for followers
	ids     map[string]bool
	changed chan struct{} // closed and replaced at each append
}

// stored is an entry in the file. Object ids are any bytes, which JSON strings are not.
type stored struct {
	Entry   log.Entry
	Objects [][]byte
}

var _ log.Service = (*Log)(nil)

// NewLog opens the fake in dir.
func NewLog(dir string) (*Log, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "entries.jsonl"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	l := &Log{file: f, ids: map[string]bool{}, changed: make(chan struct{})}
	for dec := json.NewDecoder(f); ; {
		var batch []stored
		if err := dec.Decode(&batch); errors.Is(err, io.EOF) {
			return l, nil
		} else if err != nil {
			return nil, errs.Wrap(errs.Corrupt, err, "entries.jsonl")
		}
		for _, s := range batch {
			for _, o := range s.Objects {
				s.Entry.Objects = append(s.Entry.Objects, string(o))
			}
			l.addLocked(s.Entry)
		}
	}
}

func (l *Log) addLocked(e log.Entry) {
	l.ids[e.ID] = true
	at, _ := slices.BinarySearchFunc(l.entries, e, compare)
	l.entries = slices.Insert(l.entries, at, e)
	l.arrived = append(l.arrived, e)
}

// Health implements service.Base.
func (l *Log) Health(context.Context) (service.Health, error) { return service.Health{}, nil }

// Shutdown implements service.Base.
func (l *Log) Shutdown(context.Context) error { return nil }

func checkEntry(e log.Entry) error {
	switch {
	case e.ID == "" || len(e.ID) > 64:
		return errs.Field("entries.id", "give 1 to 64 bytes", "an entry's id has %d bytes", len(e.ID))
	case e.Level < log.LevelAudit || e.Level > log.LevelDebug:
		return errs.Field("entries.level", "give audit, error, warn, info or debug", "level %d is not one", e.Level)
	case e.Time.IsZero():
		return errs.Field("entries.time", "say when it happened", "an entry has no time")
	case len(e.Message) > log.MaxMessage:
		return errs.Field("entries.message", fmt.Sprintf("keep it within %d bytes", log.MaxMessage), "a message has %d bytes", len(e.Message))
	case len(e.Objects) > log.MaxObjects || len(e.Labels) > log.MaxLabels:
		return errs.Field("entries.objects", "send fewer", "%d objects and %d labels", len(e.Objects), len(e.Labels))
	}
	for _, o := range e.Objects {
		if o == "" || len(o) > log.MaxObjectLen {
			return errs.Field("entries.objects", fmt.Sprintf("give 1 to %d bytes", log.MaxObjectLen), "an object id has %d bytes", len(o))
		}
	}
	return nil
}

func compare(a, b log.Entry) int {
	if c := a.Time.Compare(b.Time); c != 0 {
		return c
	}
	return cmpString(a.ID, b.ID)
}

// Append implements log.Service.
func (l *Log) Append(_ context.Context, entries []log.Entry) error {
	if len(entries) > log.MaxBatch {
		return errs.Field("entries", fmt.Sprintf("send at most %d at once", log.MaxBatch), "%d entries at once", len(entries))
	}
	for _, e := range entries {
		if err := checkEntry(e); err != nil {
			return err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var batch []stored
	fresh := map[string]bool{}
	for _, e := range entries {
		if l.ids[e.ID] || fresh[e.ID] {
			continue
		}
		fresh[e.ID] = true
		e.Time = e.Time.UTC()
		s := stored{Entry: e}
		s.Entry.Objects, s.Entry.Labels = nil, clone(e.Labels)
		for _, o := range e.Objects {
			s.Objects = append(s.Objects, []byte(o))
		}
		batch = append(batch, s)
	}
	b, err := json.Marshal(batch)
	if err != nil {
		return errs.Wrap(errs.Internal, err, "entries.jsonl")
	}
	if _, err := l.file.Write(append(b, '\n')); err != nil { // one write: all or none, as long as the machine lives
		return err
	}
	for _, s := range batch {
		for _, o := range s.Objects {
			s.Entry.Objects = append(s.Entry.Objects, string(o))
		}
		l.addLocked(s.Entry)
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return nil
}

func matches(q log.Query, e log.Entry) bool {
	if len(q.Objects) > 0 {
		n := 0
		for _, o := range q.Objects {
			if slices.Contains(e.Objects, o) {
				n++
			}
		}
		if n == 0 || q.AllObjects && n < len(q.Objects) {
			return false
		}
	}
	message, want := e.Message, q.Contains
	if q.IgnoreCase {
		message, want = strings.ToLower(message), strings.ToLower(want)
	}
	for k, v := range q.Labels {
		if got, ok := e.Labels[k]; !ok || got != v {
			return false
		}
	}
	return (q.Since.IsZero() || !e.Time.Before(q.Since)) && (q.Until.IsZero() || e.Time.Before(q.Until)) &&
		(q.MaxLevel == 0 || e.Level <= q.MaxLevel) && (len(q.Levels) == 0 || slices.Contains(q.Levels, e.Level)) &&
		(len(q.Components) == 0 || slices.Contains(q.Components, e.Component)) && strings.Contains(message, want)
}

func token(e log.Entry) string {
	return base64.RawURLEncoding.EncodeToString([]byte(e.Time.Format(time.RFC3339Nano) + " " + e.ID))
}

func position(token string) (log.Entry, error) {
	b, err := base64.RawURLEncoding.DecodeString(token)
	at, id, ok := strings.Cut(string(b), " ")
	t, terr := time.Parse(time.RFC3339Nano, at)
	if err != nil || !ok || terr != nil {
		return log.Entry{}, errs.Field("page_token", "give one that a result carried", "the page token cannot be read")
	}
	return log.Entry{Time: t, ID: id}, nil
}

// Query implements log.Service.
func (l *Log) Query(ctx context.Context, q log.Query, fn func(log.Result) error) error {
	if q.Follow && q.NewestFirst {
		return errs.Field("follow", "follow oldest first", "follow and newest_first exclude each other")
	}
	var from *log.Entry
	if q.PageToken != "" {
		e, err := position(q.PageToken)
		if err != nil {
			return err
		}
		from = &e
	}
	l.mu.Lock()
	history := slices.Clone(l.entries)
	seen := len(l.arrived)
	l.mu.Unlock()
	if q.NewestFirst {
		slices.Reverse(history)
	}
	var n uint32
	give := func(e log.Entry) (bool, error) {
		if !matches(q, e) {
			return false, nil
		}
		n++
		return q.Limit != 0 && n >= q.Limit, fn(log.Result{Entry: e, PageToken: token(e)})
	}
	for _, e := range history {
		if from != nil && (!q.NewestFirst && compare(e, *from) <= 0 || q.NewestFirst && compare(e, *from) >= 0) {
			continue
		}
		if done, err := give(e); done || err != nil {
			return err
		}
	}
	if !q.Follow {
		return nil
	}
	if err := fn(log.Result{CaughtUp: true}); err != nil {
		return err
	}
	for {
		l.mu.Lock()
		list := slices.Clone(l.arrived[seen:])
		seen = len(l.arrived)
		changed := l.changed
		l.mu.Unlock()
		for _, e := range list {
			if done, err := give(e); done || err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Stats implements log.Service.
func (l *Log) Stats(context.Context) (log.Stats, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := log.Stats{Entries: uint64(len(l.entries)), ByLevel: map[string]uint64{}}
	objects := map[string]bool{}
	for i, e := range l.entries {
		if i == 0 {
			st.Oldest = e.Time
		}
		st.Newest = e.Time
		st.ByLevel[e.Level.String()]++
		for _, o := range e.Objects {
			objects[o] = true
		}
	}
	st.Objects = uint64(len(objects))
	return st, nil
}
