// Package operation runs changes that take several steps, so that each is either done or undone, whatever
// dies in between.
//
// # How it works
//
// A [Plan] is data: a list of steps, each naming a registered [Action] and its arguments. All ids of what
// the steps make are in the arguments, so doing or undoing a step twice is harmless. The plan is journalled
// before its first step, and with each step's result the intent of the next; the journal never promises
// less than what may have happened.
//
// A plan has a [Mode]. Undo: when a step fails, or the operation is cancelled, or the core dies, all steps
// begun are undone, newest first (if the core died after the last step took effect, the operation is done).
// Finish: once a step has been done there is no way back, and what is left is done, also after a crash.
//
// While a plugin is away, undoing and finishing wait for it in the background: [Engine.Kick] tells that one
// came back. Locks on objects are held from before the first step to the end, so two operations on one
// object do not interleave; the second gets errs.Conflict and the name of the first.
//
// The package knows nothing about kinds of plugins; its child package plan does.
package operation

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Mode says which way an operation goes when it cannot go on. In the journal: append only.
type Mode string

// Modes.
const (
	Undo   Mode = "undo"
	Finish Mode = "finish"
)

// State of an operation. In the journal and the API: append only.
type State string

// States. The last three are final.
const (
	Running  State = "running"
	Undoing  State = "undoing"
	Done     State = "done"
	Failed   State = "failed"
	Canceled State = "canceled"
)

// Final tells whether the operation has ended.
func (s State) Final() bool { return s == Done || s == Failed || s == Canceled }

// StepState is how far one step is. In the journal: append only.
type StepState string

// Step states. A step that is Doing may have had its effect, or a part of it.
const (
	Pending StepState = ""
	Doing   StepState = "doing"
	Did     StepState = "done"
	Refused StepState = "refused" // failed in a way that says that it had no effect
	Undone  StepState = "undone"
	Stuck   StepState = "stuck" // could not be undone, or a step of Finish that failed and was passed over
)

// Who asked for an operation.
type Who struct {
	Name   string `json:"name"` // user name, or "core"
	UID    uint32 `json:"uid"`
	PID    uint32 `json:"pid,omitempty"`
	Remote string `json:"remote,omitempty"` // address, of who calls over TCP and has neither uid nor pid
	Core   bool   `json:"core,omitempty"`   // the core itself: others wait for it a moment instead of failing
}

// String is "root (uid 0, pid 17)" or "core".
func (w Who) String() string {
	if w.Core {
		return "core"
	}
	if w.Remote != "" {
		return fmt.Sprintf("%s (from %s)", w.Name, w.Remote)
	}
	return fmt.Sprintf("%s (uid %d, pid %d)", w.Name, w.UID, w.PID)
}

// Lock names an object that an operation must not share; Shared: only with others that share it, too.
type Lock struct {
	Object string `json:"object"` // "vm:0190…", "volume:…", "name:vm:web"
	Shared bool   `json:"shared,omitempty"`
}

// Step is one step of a plan.
type Step struct {
	Action   string          `json:"action"`
	Title    string          `json:"title"`          // "create volume web-root"
	UndoneBy string          `json:"undo,omitempty"` // "deleted volume web-root": said after it was undone
	Args     json.RawMessage `json:"args,omitempty"`
	// BestEffort: in Finish, a failure is noted and the next step is done all the same.
	BestEffort bool      `json:"best_effort,omitempty"`
	State      StepState `json:"state,omitempty"`
}

// NewStep makes a step; args must marshal to JSON.
func NewStep(action, title, undoneBy string, args any) Step {
	raw, err := json.Marshal(args)
	if err != nil { // arguments are our own plain structs
		panic(fmt.Sprintf("arguments of %s: %v", action, err))
	}
	return Step{Action: action, Title: title, UndoneBy: undoneBy, Args: raw}
}

// Plan is what an operation is to do.
type Plan struct {
	Type    string            // "vm.create"
	Title   string            // "create VM web"
	Who     Who               //
	Mode    Mode              //
	Objects []string          // ids of all objects touched, for audit and events
	Locks   []Lock            //
	Steps   []Step            // at least one
	Labels  map[string]string // kept with it and audited: "request", …
	// Preempt cancels operations that hold a lock of this plan and waits for them to end: for kill.
	Preempt bool
	// Leave: a stop of the core neither cancels it nor waits for it; the next start takes it up again.
	Leave bool
	// Values are handed to the actions and not journalled; see Run.
	Values map[string]any
	// Files are closed when the operation ends or is refused.
	Files []*os.File
}

// Operation is an operation as it is now: what the journal holds.
type Operation struct {
	Version   int               `json:"v"`
	ID        string            `json:"id"`
	Type      string            `json:"type"`
	Title     string            `json:"title"`
	Who       Who               `json:"who"`
	Mode      Mode              `json:"mode"`
	State     State             `json:"state"`
	Objects   []string          `json:"objects,omitempty"`
	Locks     []Lock            `json:"locks,omitempty"`
	Steps     []Step            `json:"steps"`
	Labels    map[string]string `json:"labels,omitempty"`
	Failure   *Failure          `json:"failure,omitempty"`
	Undone    []string          `json:"undone,omitempty"`    // in words
	Left      []string          `json:"left,omitempty"`      // what could not be undone or done, in words
	Recovered bool              `json:"recovered,omitempty"` // the core ended in the middle of it
	StartedAt time.Time         `json:"started"`
	EndedAt   time.Time         `json:"ended,omitzero"`
	Audited   bool              `json:"audited,omitempty"`

	Phase string `json:"-"` // what it does now
	Done  uint64 `json:"-"` // of Total; steps, or what the step says
	Total uint64 `json:"-"`
}

// Failure is an error as the journal keeps it.
type Failure struct {
	Op       string        `json:"op,omitempty"`
	Kind     errs.Kind     `json:"kind"`
	Message  string        `json:"message"`
	Field    string        `json:"field,omitempty"`
	Reason   string        `json:"reason,omitempty"`
	Remedy   string        `json:"remedy,omitempty"`
	Resource errs.Resource `json:"resource,omitzero"`
}

func newFailure(err error) *Failure {
	f := &Failure{Kind: errs.KindOf(err), Message: err.Error(), Reason: errs.ReasonOf(err), Remedy: errs.RemedyOf(err)}
	if e := (*errs.Error)(nil); errors.As(err, &e) {
		f.Field, f.Resource = e.Field, e.Resource
		if e.Err == nil { // otherwise the parts are in the message already, in another order
			f.Op, f.Message = e.Op, e.Message
		} else {
			f.Resource = errs.Resource{}
		}
		if f.Message == "" {
			f.Message = err.Error()
			f.Op, f.Resource = "", errs.Resource{}
		}
	}
	return f
}

// Err is the failure as an error again, or nil.
func (f *Failure) Err() error {
	if f == nil {
		return nil
	}
	return &errs.Error{Op: f.Op, Kind: f.Kind, Message: f.Message, Field: f.Field, Reason: f.Reason, Remedy: f.Remedy, Resource: f.Resource}
}

// Err is why the operation failed, or nil. It names what was undone and what is left.
func (o *Operation) Err() error {
	if o.Failure == nil {
		return nil
	}
	e := o.Failure.Err().(*errs.Error)
	if len(o.Left) > 0 {
		e.Message += fmt.Sprintf("; left as it is: %s", join(o.Left))
		if e.Remedy == "" {
			e.Remedy = "see mvirt operation show " + o.ID
		}
	}
	return e
}

// clone copies what others may look at while the operation goes on.
func (o *Operation) clone() Operation {
	c := *o
	c.Objects, c.Locks, c.Steps = slices.Clone(o.Objects), slices.Clone(o.Locks), slices.Clone(o.Steps)
	c.Undone, c.Left, c.Labels = slices.Clone(o.Undone), slices.Clone(o.Left), maps.Clone(o.Labels)
	if o.Failure != nil {
		f := *o.Failure
		c.Failure = &f
	}
	return c
}

func (o *Operation) did() (n int) {
	for _, s := range o.Steps {
		if s.State == Did {
			n++
		}
	}
	return n
}

func join(words []string) string {
	const most = 8
	if len(words) > most {
		return fmt.Sprintf("%s and %d more", join(words[:most]), len(words)-most)
	}
	out := ""
	for i, w := range words {
		if i > 0 {
			out += ", "
		}
		out += w
	}
	return out
}
