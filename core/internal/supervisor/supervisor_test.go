package supervisor

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

var bg = context.Background()

func TestPolicy(t *testing.T) {
	p := restartPolicy{enough: quarantineDeaths, jitter: func() float64 { return 0.5 }}
	now := time.Unix(0, 0)
	var got []time.Duration
	for range 4 {
		now = now.Add(time.Second)
		d, q := p.died(now, time.Second)
		if q {
			t.Fatal("quarantined too early")
		}
		got = append(got, d)
	}
	want := []time.Duration{0, 250 * time.Millisecond, 500 * time.Millisecond, time.Second}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("delays %v, want %v", got, want)
			break
		}
	}
	if _, q := p.died(now.Add(time.Second), time.Second); !q {
		t.Error("not quarantined at the fifth death within two minutes")
	}
	p.forgive()
	if d, q := p.died(now, 0); d != 0 || q {
		t.Errorf("after forgiving: %s %v", d, q)
	}
}

func TestPolicySpreadDeathsGrowToTheLongestDelay(t *testing.T) {
	p := restartPolicy{enough: quarantineDeaths, jitter: func() float64 { return 0.999 }}
	now := time.Unix(0, 0)
	var d time.Duration
	for range 20 {
		now = now.Add(31 * time.Second) // at most four within two minutes
		var q bool
		if d, q = p.died(now, 30*time.Second); q {
			t.Fatal("quarantined")
		}
	}
	if d != longestDelay {
		t.Errorf("delay %s, want %s at most and at last", d, longestDelay)
	}
	if d, _ := p.died(now.Add(2*time.Minute), healthyAfter); d != 0 {
		t.Errorf("after a minute of health the restart is not immediate but in %s", d)
	}
}

func TestPolicyJitter(t *testing.T) {
	for j, want := range map[float64]time.Duration{0: 200 * time.Millisecond, 1: 300 * time.Millisecond} {
		p := restartPolicy{enough: quarantineDeaths, jitter: func() float64 { return j }}
		p.died(time.Unix(1, 0), 0)
		if d, _ := p.died(time.Unix(2, 0), 0); d != want {
			t.Errorf("jitter %v: %s, want %s", j, d, want)
		}
	}
}

func TestRestartAtOnceThenBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s, _ := harness(t, f)
		if err := s.Ready(bg); err != nil {
			t.Fatal(err)
		}
		f.last().die("killed by SIGKILL")
		synctest.Wait()
		if f.count() != 2 {
			t.Fatal("the first restart is not immediate")
		}
		if f.mu.Lock(); !f.insts[0].closed {
			t.Error("the connections of the dead instance are kept")
		}
		f.mu.Unlock()
		f.last().die("exit status 2")
		synctest.Wait()
		st := s.Status(service.KindLog)
		if st.State != StateWaiting || time.Until(st.NextTry) != 250*time.Millisecond || st.Restarts != 1 ||
			!strings.Contains(st.LastExit.Text, "exit status 2") || st.LastExit.Stderr[0] != "last words of 1" || !strings.Contains(st.Reason, "exit status 2") {
			t.Errorf("%+v %+v", st, st.LastExit)
		}
		if len(st.Conditions) != 1 || st.Conditions[0].Code != "PLUGIN_DOWN" {
			t.Errorf("conditions: %+v", st.Conditions)
		}
		if err := s.Log().Append(bg, nil); err != nil { // waits
			t.Errorf("a call during the back-off: %v", err)
		}
		if d := f.launched[2].Sub(f.launched[1]); d != 250*time.Millisecond {
			t.Errorf("back-off %s", d)
		}
		time.Sleep(5 * time.Second)
		if cs := s.Status(service.KindLog).Conditions; len(cs) != 0 {
			t.Errorf("conditions of one that is up again: %+v", cs)
		}
	})
}

func TestQuarantine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{fail: errs.New(errs.Precondition, "no such binary").Because("BINARY_MISSING").Do("install it")}
		s, _ := harness(t, f)
		begun := time.Now()
		err := s.Ready(bg)
		isKind(t, err, errs.Unavailable, "PLUGIN_QUARANTINED")
		if !strings.Contains(err.Error(), "no such binary") || errs.RemedyOf(err) != "install it, then: mvirt plugin restart log" {
			t.Errorf("%v (%s)", err, errs.RemedyOf(err))
		}
		if f.count() != quarantineDeaths || time.Since(begun) != 250*time.Millisecond+500*time.Millisecond+time.Second {
			t.Errorf("%d launches in %s", f.count(), time.Since(begun))
		}
		begun = time.Now()
		isKind(t, s.Log().Append(bg, nil), errs.Unavailable, "PLUGIN_QUARANTINED")
		if time.Since(begun) != 0 {
			t.Error("a call of a quarantined plugin waits")
		}
		time.Sleep(time.Hour + time.Minute)
		if got, want := f.count(), quarantineDeaths+int(time.Hour/quarantineRetry); got != want {
			t.Errorf("%d launches after an hour of quarantine, not one every %s", got, quarantineRetry)
		}
		// A restart that fails says why; one that works lifts it.
		if err := s.Restart(bg, service.KindLog); errs.ReasonOf(err) != "BINARY_MISSING" {
			t.Errorf("restart: %v", err)
		}
		f.mu.Lock()
		f.fail = nil
		f.mu.Unlock()
		if err := s.Restart(bg, service.KindLog); err != nil {
			t.Errorf("restart: %v", err)
		}
		if err := s.Log().Append(bg, nil); err != nil {
			t.Error(err)
		}
	})
}

// What was wrong with the host goes away: the plugin is back without a person, and on probation at first.
func TestQuarantineEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{fail: errs.New(errs.Precondition, "the disk is full")}
		s, _ := harness(t, f)
		isKind(t, s.Ready(bg), errs.Unavailable, "PLUGIN_QUARANTINED")
		f.mu.Lock()
		f.fail = nil
		f.mu.Unlock()
		time.Sleep(quarantineRetry + time.Second)
		if err := s.Log().Append(bg, nil); err != nil {
			t.Errorf("a quarantined plugin that would start again: %v", err)
		}
	})
}

func TestCallsWaitBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{slow: 9 * time.Second}
		s, _ := harness(t, f)
		begun := time.Now()
		isKind(t, s.Log().Append(bg, nil), errs.Unavailable, "PLUGIN_DOWN")
		if d := time.Since(begun); d != 3*time.Second {
			t.Errorf("waited %s, not call_wait", d)
		}
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		begun = time.Now()
		isKind(t, s.Log().Append(ctx, nil), errs.Unavailable, "PLUGIN_DOWN")
		if d := time.Since(begun); d != time.Second {
			t.Errorf("waited %s, not the caller's second", d)
		}
	})
}

func TestHangingStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{slow: time.Hour}
		s, _ := harness(t, f)
		time.Sleep(10*time.Second + time.Millisecond)
		st := s.Status(service.KindLog)
		if !strings.Contains(st.Reason, "not ready within 10s") || f.count() != 2 {
			t.Errorf("%+v, %d launches", st, f.count())
		}
	})
}

func TestCallIsRepeatedOnceAfterADeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		f.onCall = func(i *fakeInstance, _ context.Context) error {
			if i.n == 0 {
				i.die("killed by SIGKILL")
				return errGone
			}
			return nil
		}
		s, _ := harness(t, f)
		if err := s.Log().Append(bg, nil); err != nil {
			t.Fatalf("not repeated: %v", err)
		}
		// The connection may have been closed just before the call began.
		f.onCall = func(i *fakeInstance, _ context.Context) error {
			if i.n == 1 {
				i.die("killed by SIGKILL")
				return errs.New(errs.Canceled, "the client connection is closing")
			}
			return nil
		}
		if err := s.Log().Append(bg, nil); err != nil {
			t.Fatalf("not repeated: %v", err)
		}
		// Twice is enough: what kills its plugin each time is not tried for ever.
		f.onCall = func(i *fakeInstance, _ context.Context) error { i.die("again"); return errGone }
		before := f.count()
		isKind(t, s.Log().Append(bg, nil), errs.Unavailable, "PLUGIN_DIED")
		synctest.Wait()
		if n := f.count() - before; n > 2 {
			t.Errorf("%d launches for one call", n)
		}
	})
}

func TestUnavailableOfALivingPluginIsPassedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		calls := 0
		f.onCall = func(*fakeInstance, context.Context) error {
			calls++
			return errs.New(errs.Unavailable, "the pool is busy").Because("POOL_BUSY").Do("wait")
		}
		s, _ := harness(t, f)
		isKind(t, s.Log().Append(bg, nil), errs.Unavailable, "POOL_BUSY")
		if calls != 1 {
			t.Errorf("%d calls", calls)
		}
	})
}

func TestStreamIsRepeatedOnlyBeforeItDelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		f.onCall = func(i *fakeInstance, _ context.Context) error {
			if i.n == 0 {
				i.die("killed")
				return errGone
			}
			return nil
		}
		s, _ := harness(t, f)
		n := 0
		if err := s.Log().Query(bg, log.Query{}, func(log.Result) error { n++; return nil }); err != nil || n != 1 {
			t.Fatalf("%v after %d results", err, n)
		}
		f.onCall = nil
		n = 0
		err := s.Log().Query(bg, log.Query{}, func(log.Result) error { n++; f.last().die("killed"); return nil })
		isKind(t, err, errs.Unavailable, "PLUGIN_DIED")
		if n != 1 {
			t.Errorf("%d results: the reader got some twice", n)
		}
	})
}

func TestFrozenPluginIsKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s, _ := harness(t, f)
		if err := s.Ready(bg); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		first := f.last()
		first.freeze()
		begun := time.Now()
		if err := s.Log().Append(bg, nil); err != nil {
			t.Errorf("a call of a frozen plugin is not repeated after its end: %v", err)
		}
		// Checks at 5, 10 and 15 s, two seconds each.
		if d := time.Since(begun); d != 17*time.Second {
			t.Errorf("killed after %s", d)
		}
		if first.how != "killed by SIGKILL" || !strings.Contains(s.Status(service.KindLog).LastExit.Text, "no answer to 3 health checks") {
			t.Errorf("%s; %+v", first.how, s.Status(service.KindLog).LastExit)
		}
	})
}

func TestOneMissIsForgiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s, _ := harness(t, f)
		_ = s.Ready(bg)
		i := f.last()
		for range 5 {
			i.freeze()
			time.Sleep(8 * time.Second)
			i.mu.Lock()
			i.frozen = false
			i.mu.Unlock()
			time.Sleep(12 * time.Second)
		}
		if f.count() != 1 {
			t.Error("killed although it answered in between")
		}
	})
}

func TestCallDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		f.onCall = func(_ *fakeInstance, ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		s, _ := harness(t, f)
		begun := time.Now()
		if err := s.Log().Append(bg, nil); errs.KindOf(err) != errs.Deadline {
			t.Error(err)
		}
		if d := time.Since(begun); d != time.Minute {
			t.Errorf("a call that hangs took %s", d)
		}
	})
}

func TestPluginConditionsAreShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{conds: []service.Condition{{Code: "DISK_FULL", Severity: service.SeverityCritical}}}
		s, tr := harness(t, f)
		_ = s.Ready(bg)
		synctest.Wait()
		if got := tr.List("plugin.log"); len(got) != 1 || got[0].Code != "DISK_FULL" {
			t.Errorf("%+v", got)
		}
		f.mu.Lock()
		f.conds = nil
		f.mu.Unlock()
		time.Sleep(6 * time.Second)
		if got := tr.List("plugin.log"); len(got) != 0 {
			t.Errorf("%+v", got)
		}
	})
}

func TestOnUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s := New(Options{CallWait: time.Second, CallTimeout: time.Minute, Notice: func(Notice) {}, Health: newTracker(),
			Units: []Unit{{Kind: service.KindLog, Launch: f.launch, HealthInterval: 5 * time.Second, HealthDeadline: time.Second, HealthMisses: 3, QuarantineDeaths: quarantineDeaths,
				StartTimeout: time.Second, StopTimeout: time.Second}}})
		var ups, downs int
		s.OnUp(service.KindLog, func(ctx context.Context) {
			ups++
			if err := s.Log().Append(ctx, nil); err != nil {
				t.Errorf("a hook cannot call the plugin: %v", err)
			}
			<-ctx.Done()
			downs++
		})
		s.OnUp(service.KindNet, func(context.Context) {}) // not configured: no matter
		s.Start()
		s.Start()
		_ = s.Ready(bg)
		synctest.Wait()
		f.last().die("x")
		synctest.Wait()
		if ups != 2 || downs != 1 {
			t.Errorf("up %d, down %d", ups, downs)
		}
		s.Stop(bg)
		if downs != 2 {
			t.Errorf("a hook outlives Stop")
		}
	})
}

// A hook that does not return when it should delays itself only.
func TestSlowHook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s := New(Options{CallWait: time.Second, CallTimeout: time.Minute, Notice: func(Notice) {}, Health: newTracker(),
			Units: []Unit{{Kind: service.KindLog, Launch: f.launch, HealthInterval: 5 * time.Second, HealthDeadline: time.Second, HealthMisses: 3, QuarantineDeaths: quarantineDeaths,
				StartTimeout: time.Second, StopTimeout: time.Second}}})
		var mu sync.Mutex
		running, most, runs := 0, 0, 0
		s.OnUp(service.KindLog, func(context.Context) {
			mu.Lock()
			running++
			runs++
			most = max(most, running)
			mu.Unlock()
			time.Sleep(time.Minute)
			mu.Lock()
			running--
			mu.Unlock()
		})
		s.Start()
		_ = s.Ready(bg)
		synctest.Wait()
		f.last().die("x")
		synctest.Wait()
		if f.count() != 2 || s.Status(service.KindLog).State != StateUp {
			t.Error("the hook held up the restart")
		}
		time.Sleep(3 * time.Minute)
		mu.Lock()
		if most != 1 || runs != 2 {
			t.Errorf("%d at a time, %d in all", most, runs)
		}
		mu.Unlock()
		s.Stop(bg)
	})
}

func TestRestartIsOrderly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s, _ := harness(t, f)
		_ = s.Ready(bg)
		for range 20 { // far more than quarantine allows: what is asked for is no death
			if err := s.Restart(bg, service.KindLog); err != nil {
				t.Fatal(err)
			}
		}
		st := s.Status(service.KindLog)
		if f.count() != 21 || f.insts[0].stops != 1 || st.State != StateUp || !st.LastExit.Wanted || st.Restarts != 20 {
			t.Errorf("%d launches, %d stops, %+v", f.count(), f.insts[0].stops, st)
		}
		if err := s.Restart(bg, service.KindVMM); errs.ReasonOf(err) != "PLUGIN_NOT_CONFIGURED" {
			t.Error(err)
		}
	})
}

func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s, _ := harness(t, f)
		_ = s.Ready(bg)
		s.Stop(bg)
		if f.last().stops != 1 || f.count() != 1 || s.Status(service.KindLog).State != StateStopped {
			t.Errorf("stops %d launches %d %+v", f.last().stops, f.count(), s.Status(service.KindLog))
		}
		isKind(t, s.Log().Append(bg, nil), errs.Unavailable, "STOPPING")
		if err := s.Restart(bg, service.KindLog); errs.KindOf(err) != errs.Unavailable {
			t.Errorf("restart after stop: %v", err)
		}
	})
}

func TestStopWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{slow: 5 * time.Second}
		s, _ := harness(t, f)
		time.Sleep(time.Second)
		s.Stop(bg)
		for _, i := range f.insts {
			select {
			case <-i.exited:
			default:
				t.Error("an instance outlives Stop")
			}
		}
	})
}

func TestFeatures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakePlugins{}
		s, _ := harness(t, f)
		_ = s.Ready(bg)
		if s.Has(service.KindLog, service.FeatureLogVerify) {
			t.Error("has what it has not")
		}
		if _, err := s.Log().Verify(bg, log.VerifyRequest{}); errs.KindOf(err) != errs.Unsupported || errs.ReasonOf(err) != "FEATURE_MISSING" {
			t.Error(err)
		}
		f.mu.Lock()
		f.features = []service.Feature{service.FeatureLogVerify}
		f.mu.Unlock()
		_ = s.Restart(bg, service.KindLog)
		if !s.Has(service.KindLog, service.FeatureLogVerify) {
			t.Error("has not what it has")
		}
		if r, err := s.Log().Verify(bg, log.VerifyRequest{}); err != nil || r.Head != "x" {
			t.Error(r, err)
		}
	})
}

func TestNotConfigured(t *testing.T) {
	s := New(Options{Notice: func(Notice) {}, Health: newTracker()})
	if _, err := s.Storage().Stats(bg); errs.ReasonOf(err) != "PLUGIN_NOT_CONFIGURED" || errs.RemedyOf(err) == "" {
		t.Error(err)
	}
	if err := s.Log().Query(bg, log.Query{}, nil); errs.ReasonOf(err) != "PLUGIN_NOT_CONFIGURED" {
		t.Error(err)
	}
	if st := s.Status(service.KindVMM); st.Configured || st.State != StateStopped {
		t.Errorf("%+v", st)
	}
}
