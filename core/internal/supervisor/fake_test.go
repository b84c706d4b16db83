package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// quarantineDeaths is the default of the configuration.
const quarantineDeaths = 5

// fakePlugins launches fake instances and lets a test decide what happens to them.
type fakePlugins struct {
	mu       sync.Mutex
	launched []time.Time
	insts    []*fakeInstance
	fail     error                                            // what launches fail with
	slow     time.Duration                                    // what a launch takes
	onCall   func(i *fakeInstance, ctx context.Context) error // what Append does
	features []service.Feature
	conds    []service.Condition
}

func (f *fakePlugins) launch(ctx context.Context) (Instance, error) {
	f.mu.Lock()
	f.launched = append(f.launched, time.Now())
	fail, slow := f.fail, f.slow
	f.mu.Unlock()
	select {
	case <-time.After(slow):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if fail != nil {
		return nil, fail
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	i := &fakeInstance{f: f, n: len(f.insts), exited: make(chan struct{})}
	f.insts = append(f.insts, i)
	return i, nil
}

func (f *fakePlugins) count() int { f.mu.Lock(); defer f.mu.Unlock(); return len(f.launched) }
func (f *fakePlugins) last() *fakeInstance {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.insts[len(f.insts)-1]
}

type fakeInstance struct {
	f      *fakePlugins
	n      int
	once   sync.Once
	exited chan struct{}
	how    string

	mu     sync.Mutex
	frozen bool
	stops  int
	calls  int
	closed bool
}

func (i *fakeInstance) die(how string) { i.once.Do(func() { i.how = how; close(i.exited) }) }
func (i *fakeInstance) freeze()        { i.mu.Lock(); i.frozen = true; i.mu.Unlock() }

func (i *fakeInstance) Info() service.Info {
	i.f.mu.Lock()
	defer i.f.mu.Unlock()
	return service.Info{Kind: service.KindLog, Name: "fake", Version: "1", Features: i.f.features}
}
func (i *fakeInstance) PID() int              { return 0 }
func (i *fakeInstance) Service() service.Base { return fakeLog{i: i} }
func (i *fakeInstance) Stop(context.Context) error {
	i.mu.Lock()
	i.stops++
	i.mu.Unlock()
	i.die("exit status 0")
	return nil
}
func (i *fakeInstance) Close()                  { i.mu.Lock(); i.closed = true; i.mu.Unlock() }
func (i *fakeInstance) Kill()                   { i.die("killed by SIGKILL") }
func (i *fakeInstance) Exited() <-chan struct{} { return i.exited }
func (i *fakeInstance) Exit() string            { return i.how }
func (i *fakeInstance) StderrTail() []string    { return []string{"last words of " + fmt.Sprint(i.n)} }

type fakeLog struct {
	Log // what a test does not use panics
	i   *fakeInstance
}

func newTracker() *health.Tracker { return &health.Tracker{} }

var errGone = errs.New(errs.Unavailable, "error reading from server: EOF")

// wait blocks like a frozen process does.
func (l fakeLog) wait(ctx context.Context) error {
	l.i.mu.Lock()
	frozen := l.i.frozen
	l.i.calls++
	l.i.mu.Unlock()
	if frozen {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-l.i.exited:
			return errGone
		}
	}
	select {
	case <-l.i.exited:
		return errGone
	default:
		return nil
	}
}

func (l fakeLog) Health(ctx context.Context) (service.Health, error) {
	err := l.wait(ctx)
	l.i.f.mu.Lock()
	defer l.i.f.mu.Unlock()
	return service.Health{Conditions: l.i.f.conds}, err
}

func (l fakeLog) Append(ctx context.Context, _ []log.Entry) error {
	if fn := l.i.f.onCall; fn != nil {
		return fn(l.i, ctx)
	}
	return l.wait(ctx)
}

func (l fakeLog) Query(ctx context.Context, _ log.Query, fn func(log.Result) error) error {
	if l.i.f.onCall != nil {
		if err := l.i.f.onCall(l.i, ctx); err != nil {
			return err
		}
	}
	if err := fn(log.Result{}); err != nil {
		return err
	}
	return l.wait(ctx)
}

func (l fakeLog) Verify(context.Context, log.VerifyRequest) (log.VerifyReport, error) {
	return log.VerifyReport{Head: "x"}, nil
}

// harness is a supervisor with one fake log plugin, inside a synctest bubble.
func harness(t *testing.T, f *fakePlugins) (*Supervisor, *health.Tracker) {
	t.Helper()
	tr := &health.Tracker{}
	s := New(Options{Health: tr, CallWait: 3 * time.Second, CallTimeout: time.Minute, Jitter: func() float64 { return 0.5 },
		Notice: func(n Notice) { t.Logf("%s %s", time.Now().Format("05.000"), n.Text) },
		Units: []Unit{{Kind: service.KindLog, Command: "/bin/fake", Launch: f.launch, HealthInterval: 5 * time.Second, HealthDeadline: 2 * time.Second,
			HealthMisses: 3, QuarantineDeaths: quarantineDeaths, StartTimeout: 10 * time.Second, StopTimeout: 10 * time.Second}}})
	s.Start()
	t.Cleanup(func() { s.Stop(context.Background()) })
	return s, tr
}

func isKind(t *testing.T, err error, k errs.Kind, reason string) {
	t.Helper()
	if !errors.Is(err, k) || errs.ReasonOf(err) != reason {
		t.Errorf("got %v, kind %s, reason %s; want %s, %s", err, errs.KindOf(err), errs.ReasonOf(err), k, reason)
	}
	if errs.RemedyOf(err) == "" {
		t.Errorf("no remedy: %v", err)
	}
}
