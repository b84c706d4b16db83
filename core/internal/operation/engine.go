package operation

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

// Limits.
const (
	keepEnded   = 1000            // ended operations kept in the journal: a screen or two, and a week of a small host
	stepTimeout = 2 * time.Minute // of one undo; what plugins promise is far below
	undoTries   = 3               // of a step whose undo fails although its plugin answers
)

// Options of an engine.
type Options struct {
	Path    string            // of the journal
	Actions map[string]Action // all that journalled steps may name
	// Admit is asked before an operation begins; an error refuses it (the audit spool is full). May be nil.
	Admit func() error
	// Ended makes the durable record of an operation that has ended, before anybody is told. It is repeated
	// for the same operation after a crash. May be nil.
	Ended func(ctx context.Context, op Operation) error
	// Changed is told of each change of an operation; it must not block. May be nil.
	Changed func(op Operation)
	Log     *slog.Logger     // nil: slog.Default
	Now     func() time.Time // nil: time.Now
	// Backoff is how long to wait before a step whose plugin is away is tried again for the nth time (from
	// 0), if nobody calls Kick. nil: 1 s doubling to 30 s.
	Backoff func(n int) time.Duration
}

// Engine runs operations.
type Engine struct {
	opt   Options
	store store
	base  context.Context // ends when the engine is abandoned
	stop  context.CancelFunc
	tasks sync.WaitGroup

	mu      sync.Mutex
	closing bool
	locks   locks
	live    map[string]*handle // not ended
	past    []Operation        // ended, oldest first, at most keepEnded
	audited []string           // ids in past whose Audited is not in the journal yet
	kicked  chan struct{}      // closed at the next Kick
}

type handle struct {
	e      *Engine
	run    *Run
	ctx    context.Context
	cancel context.CancelCauseFunc
	ended  chan struct{}
	behind chan struct{} // closed when the rest goes on in the background
	once   sync.Once
	leave  bool

	mu      sync.Mutex
	op      Operation // ID, Who, Title, Locks and Objects never change
	away    error     // why it waits in the background
	changed chan struct{}
}

// Open opens the journal. Nothing runs before [Engine.Recover].
func Open(opt Options) (*Engine, error) {
	j, err := openJournal(opt.Path)
	if err != nil {
		return nil, err
	}
	return newEngine(opt, j), nil
}

func newEngine(opt Options, s store) *Engine {
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Backoff == nil {
		opt.Backoff = func(n int) time.Duration { return min(30*time.Second, time.Second<<min(n, 5)) }
	}
	e := &Engine{opt: opt, store: s, locks: locks{}, live: map[string]*handle{}, kicked: make(chan struct{})}
	e.base, e.stop = context.WithCancel(context.Background())
	return e
}

func (e *Engine) newHandle(op Operation, values map[string]any) *handle {
	h := &handle{e: e, op: op, ended: make(chan struct{}), behind: make(chan struct{}), changed: make(chan struct{})}
	h.run = &Run{ID: op.ID, Recovered: op.Recovered, values: values, progress: h.progress}
	h.ctx, h.cancel = context.WithCancelCause(e.base)
	return h
}

// Do begins an operation and waits for its end, or until its rest must wait in the background for a plugin
// that is away (errs.Unavailable, with the operation's id in the remedy). When ctx ends first, an operation
// that can be undone is cancelled; any other goes on. The returned operation has an id unless the plan was
// refused.
func (e *Engine) Do(ctx context.Context, p Plan) (Operation, error) {
	h, err := e.start(ctx, p)
	if err != nil {
		return Operation{}, err
	}
	select {
	case <-h.ended:
	case <-h.behind:
		select {
		case <-h.ended:
		default:
			return h.snapshot(), h.behindErr()
		}
	case <-ctx.Done():
		op := h.snapshot()
		if op.Mode == Undo {
			h.cancel(errs.New(errs.Canceled, "whoever asked for it went away"))
		}
		return op, &errs.Error{Kind: errs.KindOf(ctx.Err()), Message: "operation " + op.ID + " (" + op.Title + ") is not finished",
			Remedy: "see mvirt operation show " + op.ID, Err: ctx.Err()}
	}
	op := h.snapshot()
	return op, op.Err()
}

// Start begins an operation and returns once it is in the journal.
func (e *Engine) Start(ctx context.Context, p Plan) (Operation, error) {
	h, err := e.start(ctx, p)
	if err != nil {
		return Operation{}, err
	}
	return h.snapshot(), nil
}

func (e *Engine) start(ctx context.Context, p Plan) (h *handle, err error) {
	defer func() {
		if err != nil {
			closeAll(p.Files)
		}
	}()
	if len(p.Steps) == 0 || p.Mode != Undo && p.Mode != Finish {
		return nil, errs.New(errs.Internal, "plan %s has no steps or no mode", p.Type)
	}
	for _, s := range p.Steps {
		if _, ok := e.opt.Actions[s.Action]; !ok {
			return nil, errs.New(errs.Internal, "plan %s names the unknown action %s", p.Type, s.Action)
		}
	}
	if e.opt.Admit != nil {
		if err := e.opt.Admit(); err != nil {
			return nil, err
		}
	}
	op := Operation{Version: journalVersion, ID: ident.New(), Type: p.Type, Title: p.Title, Who: p.Who, Mode: p.Mode, State: Running,
		Objects: p.Objects, Locks: p.Locks, Steps: slices.Clone(p.Steps), Labels: p.Labels, StartedAt: e.opt.Now()}
	op.Steps[0].State = Doing
	op.Phase, op.Total = op.Steps[0].Title, uint64(len(op.Steps))
	h = e.newHandle(op, p.Values)
	h.leave = p.Leave
	h.run.Close(p.Files...)
	if err := e.lock(ctx, h, p.Preempt); err != nil {
		return nil, err
	}
	if err := e.put(h); err != nil {
		e.mu.Lock()
		e.locks.releaseLocked(h)
		delete(e.live, op.ID)
		e.mu.Unlock()
		close(h.ended)
		h.run.files = nil
		return nil, err
	}
	e.tasks.Go(func() { h.forward(0) })
	return h, nil
}

// put writes h's operation, and with it what became of earlier audits, into the journal.
func (e *Engine) put(h *handle) error {
	op := h.snapshot()
	ops := []*Operation{&op}
	e.mu.Lock()
	ids := e.audited
	e.audited = nil
	for i := range e.past {
		if slices.Contains(ids, e.past[i].ID) {
			o := e.past[i].clone()
			ops = append(ops, &o)
		}
	}
	e.mu.Unlock()
	err := e.store.put(ops...)
	if err != nil {
		e.mu.Lock()
		e.audited = append(e.audited, ids...)
		e.mu.Unlock()
	}
	return err
}

// finish ends an operation: journal, audit, locks, waiters, in this order.
func (h *handle) finish(state State) {
	e := h.e
	h.update(func(op *Operation) {
		op.State, op.EndedAt, op.Phase = state, e.opt.Now(), ""
		if state == Done {
			op.Done, op.Total = uint64(len(op.Steps)), uint64(len(op.Steps))
		}
	})
	op := h.snapshot()
	if err := e.put(h); err != nil {
		// It is found unfinished at the next start and settled again, which is harmless.
		e.opt.Log.Error("the end of an operation is not in the journal", "operation", op.ID, "error", err)
	}
	if e.base.Err() != nil {
		return // abandoned: the next start does the rest
	}
	if e.opt.Ended != nil {
		if err := guard("audit", func() error { return e.opt.Ended(e.base, op) }); err != nil {
			e.opt.Log.Error("an operation is not audited; it will be at the next start", "operation", op.ID, "error", err)
		} else {
			h.update(func(op *Operation) { op.Audited = true })
		}
	}
	op = h.snapshot()
	h.run.end()
	h.cancel(nil)
	e.mu.Lock()
	e.locks.releaseLocked(h)
	delete(e.live, op.ID)
	e.past = append(e.past, op)
	if op.Audited {
		e.audited = append(e.audited, op.ID)
	}
	old := e.pruneLocked()
	e.mu.Unlock()
	close(h.ended)
	h.tell()
	if len(old) > 0 {
		if err := e.store.remove(old...); err != nil {
			e.opt.Log.Warn("old operations stay in the journal", "error", err)
		}
	}
}

// pruneLocked drops the oldest ended operations, by a tenth at a time, so that not every end writes twice.
func (e *Engine) pruneLocked() (ids []string) {
	if len(e.past) <= keepEnded+keepEnded/10 {
		return nil
	}
	n := len(e.past) - keepEnded
	for _, op := range e.past[:n] {
		ids = append(ids, op.ID)
	}
	e.past = slices.Clone(e.past[n:])
	e.audited = slices.DeleteFunc(e.audited, func(id string) bool { return slices.Contains(ids, id) })
	return ids
}

func (h *handle) snapshot() Operation {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.op.clone()
}

func (h *handle) update(fn func(op *Operation)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fn(&h.op)
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *handle) tell() {
	if h.e.opt.Changed != nil {
		h.e.opt.Changed(h.snapshot())
	}
}

func (h *handle) progress(phase string, done, total uint64) {
	h.update(func(op *Operation) {
		if phase != "" {
			op.Phase = phase
		}
		op.Done, op.Total = done, total
	})
}

// goBehind lets whoever waits return: the operation waits for a plugin that is away.
func (h *handle) goBehind(err error) {
	h.mu.Lock()
	h.away = err
	h.mu.Unlock()
	h.once.Do(func() { close(h.behind) })
}

func (h *handle) behindErr() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	what := "what is left of it"
	err := h.away
	if h.op.State == Undoing {
		what = "undoing it"
		if h.op.Failure != nil {
			err = errors.Join(h.op.Failure.Err(), err)
		}
	}
	return &errs.Error{Kind: errs.Unavailable, Reason: "IN_BACKGROUND", Message: what + " waits in operation " + h.op.ID,
		Remedy: "it goes on by itself when the plugin is back; mvirt operation watch " + h.op.ID, Err: err}
}

// Get finds an operation by its id.
func (e *Engine) Get(id string) (Operation, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if h := e.live[id]; h != nil {
		return h.snapshot(), nil
	}
	for i := len(e.past) - 1; i >= 0; i-- {
		if e.past[i].ID == id {
			return e.past[i].clone(), nil
		}
	}
	return Operation{}, errs.New(errs.NotFound, "no operation has this id; ended ones are kept for a while only").
		With(errs.Resource{Type: "operation", ID: id}).Do("mvirt operation ls --all")
}

// List lists running operations, with ended also those that have ended, oldest first.
func (e *Engine) List(ended bool) (out []Operation) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if ended {
		for i := range e.past {
			out = append(out, e.past[i].clone())
		}
	}
	for _, h := range e.live {
		out = append(out, h.snapshot())
	}
	slices.SortFunc(out, func(a, b Operation) int { return a.StartedAt.Compare(b.StartedAt) })
	return out
}

// On tells which running operation holds a lock on an object, if any.
func (e *Engine) On(object string) (id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, h := range e.locks[object] {
		if !h.sharesObject(object) {
			return h.op.ID
		}
	}
	return ""
}

// Watch calls fn with the operation as it is now and after each change, until it has ended, or fn or ctx
// ends it. Changes that follow each other quickly may come as one.
func (e *Engine) Watch(ctx context.Context, id string, fn func(Operation) error) error {
	e.mu.Lock()
	h := e.live[id]
	e.mu.Unlock()
	if h == nil {
		op, err := e.Get(id)
		if err != nil {
			return err
		}
		return fn(op)
	}
	for {
		h.mu.Lock()
		op, changed := h.op.clone(), h.changed
		h.mu.Unlock()
		if op.State.Final() { // told when it is durable and audited, and the locks are free
			select {
			case <-h.ended:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err := fn(op); err != nil || op.State.Final() {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Cancel asks an operation to stop and undo what it did. Precondition when it has passed the point from
// which it is finished instead. One that has ended stays as it is.
func (e *Engine) Cancel(id string, who Who) (Operation, error) {
	e.mu.Lock()
	h := e.live[id]
	e.mu.Unlock()
	if h == nil {
		return e.Get(id)
	}
	op := h.snapshot()
	if op.State.Final() {
		return op, nil
	}
	if op.Mode == Finish && op.did() > 0 {
		return op, errs.New(errs.Precondition, "a part of it is done and cannot be undone, so it is finished").Because("PAST_RETURN").
			With(errs.Resource{Type: "operation", ID: id, Name: op.Title}).Do("wait for its end: mvirt operation watch " + id)
	}
	h.cancel(errs.New(errs.Canceled, "cancelled by %s", who))
	return h.snapshot(), nil
}

// Kick tells that a plugin came up: operations that wait for one try again at once.
func (e *Engine) Kick() {
	e.mu.Lock()
	defer e.mu.Unlock()
	close(e.kicked)
	e.kicked = make(chan struct{})
}

// Close refuses new operations, cancels those that can be undone and waits for all until ctx ends. What is
// not finished then is found at the next start.
func (e *Engine) Close(ctx context.Context) error {
	e.mu.Lock()
	e.closing = true
	var ops []*handle
	for _, h := range e.live {
		ops = append(ops, h)
	}
	e.mu.Unlock()
	for _, h := range ops {
		if h.op.Mode == Undo {
			h.cancel(errs.New(errs.Canceled, "mvirtd is stopping"))
		}
	}
	for _, h := range ops {
		if h.leave {
			continue
		}
		select {
		case <-h.ended:
		case <-h.behind: // waits for a plugin, which may be long
		case <-ctx.Done():
		}
	}
	e.stop()
	e.tasks.Wait()
	e.mu.Lock()
	ids := e.audited
	e.audited = nil
	var last []*Operation
	for i := range e.past {
		if slices.Contains(ids, e.past[i].ID) {
			o := e.past[i].clone()
			last = append(last, &o)
		}
	}
	e.mu.Unlock()
	var err error
	if len(last) > 0 {
		err = e.store.put(last...)
	}
	return errors.Join(err, e.store.close())
}
