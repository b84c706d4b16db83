// Package jail is how plugins have processes started by the root half of mvirtd that must not have the plugin's
// own user: hypervisors, each under a uid of its own and shut in (vmm plugins), and unprivileged workers (plugins
// with worker_user in the configuration). It is what the two say to each other, and the plugin's end of it.
// docs/security.md tells what a jail is made of.
//
// # The conversation
//
// A plugin that may have processes started has the environment variable MVIRT_JAIL_FD: the number of a connected
// unix socket of type SOCK_SEQPACKET. Each packet is one JSON object, at most [MaxMessage] bytes, with its
// descriptors attached by SCM_RIGHTS: a [Request] from the plugin, answered by a [Reply] with the same Seq, in
// any order. Unknown fields, wrong types and too many descriptors end the conversation.
//
// A plugin asks for nouns. It says which VM, which program of those that root allows, arguments as data, and
// what is to be reachable in the jail. It says no uid, no flag of the kernel, no place outside. What it names
// by path is opened with the VM's uid, so that nothing can be reached that this uid could not open; what is the
// plugin's own, it hands over as a descriptor.
package jail

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

// EnvFD is the environment variable that holds the socket's number.
const EnvFD = "MVIRT_JAIL_FD"

// Limits of a message.
const (
	MaxMessage = 128 << 10
	MaxFDs     = 250 // SCM_MAX_FD of the kernel is 253
	MaxArgs    = 4096
	MaxPaths   = 256
)

// Verb is what is asked for.
type Verb string

// Verbs.
const (
	VerbIdentity Verb = "identity" // which uid the VM's hypervisor has, or will have; given out once and kept
	VerbForget   Verb = "forget"   // the VM is gone: its uid is free; refused while a process has it
	VerbList     Verb = "list"     // which VMs have uids
	VerbStart    Verb = "start"    // start a hypervisor; descriptors as Start says; the reply has a pidfd
	VerbSignal   Verb = "signal"   // SIGTERM or SIGKILL to a VM's process
	VerbExit     Verb = "exit"     // how a VM's process that has ended did so
	VerbReach    Verb = "reach"    // make a path reachable in a running jail
	VerbUnreach  Verb = "unreach"  // and take it away
	VerbSize     Verb = "size"     // how many bytes a disk in a jail has
	VerbShare    Verb = "share"    // let the plugin use what the hypervisor made in the VM's directory; with the directory's descriptor

	VerbWorker    Verb = "worker"     // start the plugin's own program as a worker; the reply has a pidfd
	VerbEndWorker Verb = "end-worker" // kill a worker of the plugin
)

// Request is what a plugin asks.
type Request struct {
	Seq     uint32
	Verb    Verb
	VM      string   `json:",omitempty"` // its id; of all verbs but list
	Start   *Start   `json:",omitempty"`
	Worker  *Worker  `json:",omitempty"`
	Process *Process `json:",omitempty"` // of all verbs about a process
	Signal  int      `json:",omitempty"`
	Path    *Path    `json:",omitempty"` // of reach, unreach and size; of the latter two only Kind and Name count
}

// Process names a process: pid and start time as /proc/<pid>/stat has it.
type Process struct {
	PID       int
	StartTime uint64
}

// Worker is a worker to be started: the program that the plugin itself was started from, with other arguments,
// under the worker's user and with no capability. The descriptors of the message are its output, and what it gets
// as descriptors 3 and up.
type Worker struct {
	Name string // what it is: the first argument; no option
	Args []string
	Env  []string // "NAME=value", beside what every process gets
}

// Start is a hypervisor to be started. The descriptors of the message are, in this order: the VM's directory,
// which must be the plugin's; the file for the program's output; one for each of Files; and what the program
// gets as descriptors 3 and up.
type Start struct {
	Program     string   // absolute
	Name        string   // argument 0; "": Program
	Args        []string // without the program's name
	Dir         string   // absolute path of the VM's directory: where it is in the jail too
	Files       []string // absolute paths of files that are opened and can be read in the jail under that name
	Paths       []Path
	MemoryBytes uint64 // of the guest
	CPUs        uint32
}

// Kind is what a path is.
type Kind string

// Kinds of paths.
const (
	KindDisk   Kind = "disk"   // a regular file or a block device
	KindSocket Kind = "socket" // a unix socket; the directory that it is in becomes visible
)

// Path is something of another owner that a hypervisor needs: a disk, a socket.
type Path struct {
	Kind     Kind
	Name     string // unique among its kind in this jail
	Path     string // absolute, outside; opened as the VM's uid
	ReadOnly bool   // the program must not write
}

// Inside is where the path is found in the jail.
func (p Path) Inside() string {
	if p.Kind == KindSocket {
		return filepath.Join("/net", p.Name, filepath.Base(p.Path))
	}
	return "/disk/" + p.Name
}

// Reply is an answer.
type Reply struct {
	Seq   uint32
	Error *Error `json:",omitempty"`
	UID   uint32 `json:",omitempty"`
	// Process is what was started, which may have ended since.
	Process *Process `json:",omitempty"`
	GID     uint32   `json:",omitempty"`
	VMs     []VM     `json:",omitempty"`
	Size    uint64   `json:",omitempty"` // of a disk, in bytes
	Known   bool     `json:",omitempty"` // of exit: Status is a wait status
	// Status is a wait status as wait(2) gives it.
	Status uint32   `json:",omitempty"`
	Notes  []string `json:",omitempty"` // of start: parts of the jail that this host does not have
}

// VM is a VM that has a uid.
type VM struct {
	ID  string
	UID uint32
}

// Error is an errs.Error on its way.
type Error struct {
	Kind            uint32
	Reason, Field   string `json:",omitempty"`
	Message, Remedy string
}

// ErrMalformed says that a message is none.
var ErrMalformed = errors.New("malformed message of the jail's conversation")

// DecodeRequest reads a request, and checks all that can be checked without looking at the host.
func DecodeRequest(b []byte) (*Request, error) {
	var r Request
	if err := decode(b, &r); err != nil {
		return nil, err
	}
	return &r, r.check()
}

// DecodeReply reads a reply.
func DecodeReply(b []byte) (*Reply, error) {
	var r Reply
	return &r, decode(b, &r)
}

func decode(b []byte, v any) error {
	if len(b) > MaxMessage {
		return ErrMalformed
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return ErrMalformed
	}
	return nil
}

// Encode is the packet of a request or a reply.
func Encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err == nil && len(b) > MaxMessage {
		err = errs.New(errs.Exhausted, "the command line and the list of devices take more than %d bytes", MaxMessage).
			Do("give the VM fewer devices or a shorter kernel command line")
	}
	return b, err
}

// check says whether a request is one: the fields of its verb and no others, within their bounds.
func (r *Request) check() error {
	bad := func(what string) error { return fmt.Errorf("%w: %s: %s", ErrMalformed, r.Verb, what) }
	needs := struct{ vm, start, process, signal, path, worker bool }{vm: true}
	switch r.Verb {
	case VerbIdentity, VerbForget, VerbShare:
	case VerbList:
		needs.vm = false
	case VerbStart:
		needs.start = true
	case VerbSignal:
		needs.process, needs.signal = true, true
	case VerbExit:
		needs.process = true
	case VerbWorker:
		needs.vm, needs.worker = false, true
	case VerbEndWorker:
		needs.vm, needs.process = false, true
	case VerbReach, VerbUnreach, VerbSize:
		needs.process, needs.path = true, true
	default:
		return bad("no such verb")
	}
	switch {
	case needs.vm != (r.VM != "") || needs.vm && ident.CheckID("vm", r.VM) != nil:
		return bad("VM")
	case needs.start != (r.Start != nil):
		return bad("Start")
	case needs.process != (r.Process != nil) || r.Process != nil && r.Process.PID <= 1:
		return bad("Process")
	case needs.signal != (r.Signal != 0):
		return bad("Signal")
	case needs.path != (r.Path != nil):
		return bad("Path")
	case needs.worker != (r.Worker != nil):
		return bad("Worker")
	}
	if r.Path != nil {
		if err := r.Path.check(r.Verb != VerbReach); err != nil {
			return bad(err.Error())
		}
	}
	if r.Worker != nil {
		if err := r.Worker.check(); err != nil {
			return bad(err.Error())
		}
	}
	if r.Start != nil {
		if err := r.Start.check(); err != nil {
			return bad(err.Error())
		}
	}
	return nil
}

func (s *Start) check() error {
	switch {
	case !clean(s.Program) || !clean(s.Dir):
		return errors.New("program and dir must be clean absolute paths")
	case len(s.Args) > MaxArgs || len(s.Paths) > MaxPaths || len(s.Files) > MaxPaths || len(s.Name) > 4096:
		return errors.New("too much")
	case strings.ContainsRune(s.Name, 0):
		return errors.New("name")
	}
	for _, a := range s.Args {
		if strings.ContainsRune(a, 0) {
			return errors.New("an argument with a NUL byte")
		}
	}
	seen := map[string]bool{}
	for _, f := range s.Files {
		if !clean(f) || seen[f] || reserved(f) {
			return errors.New("files")
		}
		seen[f] = true
	}
	if reserved(s.Dir) {
		return errors.New("dir")
	}
	for _, p := range s.Paths {
		if err := p.check(false); err != nil {
			return err
		}
		in := string(p.Kind) + " " + p.Name // no path has a blank in front of it
		if seen[in] {
			return errors.New("two paths of one name")
		}
		seen[in] = true
	}
	return nil
}

func (w *Worker) check() error {
	if !plainName(w.Name) || len(w.Args)+len(w.Env) > MaxArgs {
		return errors.New("no name, or too many arguments")
	}
	for _, a := range append(append([]string{}, w.Args...), w.Env...) {
		if strings.ContainsRune(a, 0) {
			return errors.New("an argument with a NUL byte")
		}
	}
	for _, e := range w.Env {
		// What the dynamic linker heeds is nobody's to set.
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" || strings.HasPrefix(name, "LD_") {
			return errors.New("env")
		}
	}
	return nil
}

func (p *Path) check(nameOnly bool) error {
	if p.Kind != KindDisk && p.Kind != KindSocket {
		return errors.New("no such kind of path")
	}
	if !plainName(p.Name) {
		return errors.New("a name of a path")
	}
	if !clean(p.Path) && !(nameOnly && p.Path == "") {
		return errors.New("a path that is not clean and absolute")
	}
	return nil
}

// plainName: what can stand in a path as one component and is no option, no dot file.
func plainName(s string) bool {
	for i := range len(s) {
		b := s[i]
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || i > 0 && (b == '-' || b == '_' || b == '.')) {
			return false
		}
	}
	return s != "" && len(s) <= 64
}

func clean(p string) bool {
	return filepath.IsAbs(p) && filepath.Clean(p) == p && p != "/" && len(p) < 4096 && !strings.ContainsRune(p, 0)
}

// reserved tells whether a path lies where the jail has things of its own.
func reserved(p string) bool {
	for _, d := range []string{"/dev", "/disk", "/net", "/proc", "/sys"} {
		if p == d || strings.HasPrefix(p, d+"/") {
			return true
		}
	}
	return false
}

// Failure carries an error.
func Failure(seq uint32, err error) *Reply {
	e := &Error{Kind: uint32(errs.KindOf(err)), Reason: errs.ReasonOf(err), Message: err.Error(), Remedy: errs.RemedyOf(err)}
	var f *errs.Error
	if errors.As(err, &f) {
		e.Field = f.Field
	}
	return &Reply{Seq: seq, Error: e}
}

func (e *Error) err() error {
	return &errs.Error{Kind: errs.Kind(e.Kind), Reason: e.Reason, Field: e.Field, Message: e.Message, Remedy: e.Remedy}
}
