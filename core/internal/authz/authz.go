// Package authz decides who may call which method of the API, on which objects.
//
// # Words
//
//   - A method needs a [Rule]: a kind of object, a verb, and the least [Role]. [Rules] has one for every method
//     of mvirt.v1; one without is refused to everybody, and a test fails.
//   - A [Grant] gives those whom it names (users, groups, certificate identities, tokens) a role, if wanted only
//     for some kinds, some objects, some verbs. Grants add up; nothing takes away.
//   - A [Subject] is who calls, as the kernel, the certificate or the token says.
//   - [Rights] are the grants of one subject. They are asked twice: whether a method may be called at all, and
//     then for each object that the call turns out to be about.
//
// # Rules that hold whatever the configuration says
//
// Root (and the user that the core runs as) is admin on the unix socket. Without any grant configured, so is
// whoever can open the socket: its mode and group decide, as before there were roles. Over TCP nobody is anything
// without a grant. A call that carries a token has the token's grants only, whoever sends it.
package authz

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/mvirt/mvirt/sdk/errs"
)

// Role is how much is allowed. A higher role holds the lower ones.
type Role uint8

// Roles.
const (
	None     Role = iota
	Viewer        // sees everything: lists, states, logs, events
	Operator      // and runs what is there: start, stop, console, snapshots
	Admin         // and makes, changes and removes
)

// String is the word that the configuration has.
func (r Role) String() string {
	return [...]string{"none", "viewer", "operator", "admin"}[min(r, Admin)]
}

// ParseRole reads a role's word.
func ParseRole(s string) (Role, bool) {
	for r := Viewer; r <= Admin; r++ {
		if s == r.String() {
			return r, true
		}
	}
	return None, false
}

// Kinds of objects, as grants name them.
var kinds = []string{"vm", "volume", "snapshot", "template", "network", "nic", "security_group", "operation", "plugin", "system", "log"}

// Kinds lists the kinds of objects that grants can name.
func Kinds() []string { return slices.Clone(kinds) }

// Grant gives a role to those whom it names.
type Grant struct {
	Name    string   // for messages
	Users   []string // names or numbers
	Groups  []string // names or numbers
	Certs   []string // identities of client certificates: "cn:NAME", "dns:NAME", "email:NAME", "uri:URI"
	Tokens  []string // lower-case hex of the sha256 of a token
	Role    Role
	Kinds   []string // none: all
	Objects []string // "kind:name" or "kind:id"; none: all
	Verbs   []string // none: all that the role has
}

// Subject is who calls.
type Subject struct {
	Local  bool // over the unix socket
	UID    uint32
	User   string
	Groups []string // names and numbers
	Certs  []string // as in [Grant]
	Token  string   // as it was sent; "": none
}

// Policy is a set of grants.
type Policy struct {
	grants []Grant
	coreID uint32
}

// New makes a policy; coreUID is the user that the core runs as.
func New(grants []Grant, coreUID uint32) *Policy {
	return &Policy{grants: slices.Clone(grants), coreID: coreUID}
}

// all is what root has.
var all = Grant{Name: "root", Role: Admin}

// Of gives a subject's rights.
func (p *Policy) Of(s Subject) Rights {
	var r Rights
	if s.Token != "" {
		sum := sha256.Sum256([]byte(s.Token))
		want := []byte(hex.EncodeToString(sum[:]))
		for _, g := range p.grants {
			if slices.ContainsFunc(g.Tokens, func(t string) bool { return subtle.ConstantTimeCompare([]byte(t), want) == 1 }) {
				r.grants = append(r.grants, g)
			}
		}
		return r
	}
	if s.Local && (s.UID == 0 || s.UID == p.coreID || len(p.grants) == 0) {
		return Rights{grants: []Grant{all}}
	}
	for _, g := range p.grants {
		if s.Local && (slices.Contains(g.Users, s.User) || slices.ContainsFunc(g.Groups, func(n string) bool { return slices.Contains(s.Groups, n) })) ||
			slices.ContainsFunc(g.Certs, func(c string) bool { return slices.Contains(s.Certs, c) }) {
			r.grants = append(r.grants, g)
		}
	}
	return r
}

// Rights are what one subject may do.
type Rights struct{ grants []Grant }

// Names are the names of the grants, for messages.
func (r Rights) Names() string {
	if len(r.grants) == 0 {
		return "(unknown)"
	}
	var names []string
	for _, g := range r.grants {
		names = append(names, g.Name)
	}
	return strings.Join(names, ", ")
}

// Limited tells whether the rights end at certain objects or kinds, so that answers must be filtered.
func (r Rights) Limited() bool {
	return !slices.ContainsFunc(r.grants, func(g Grant) bool { return len(g.Objects) == 0 && len(g.Kinds) == 0 })
}

// holds tells whether a grant covers a kind, verb and role, whatever the object. Who may do anything to an
// object may see it.
func (g Grant) holds(kind, verb string, least Role) bool {
	return g.Role >= least && (len(g.Kinds) == 0 || slices.Contains(g.Kinds, kind)) && (len(g.Verbs) == 0 || verb == "read" || slices.Contains(g.Verbs, verb))
}

// names tells whether a grant's objects hold one.
func (g Grant) names(kind, id, name string) bool {
	return len(g.Objects) == 0 || slices.Contains(g.Objects, kind+":"+id) || name != "" && slices.Contains(g.Objects, kind+":"+name)
}

// objectsOf tells whether a grant could hold some object of a kind.
func (g Grant) objectsOf(kind string) bool {
	return len(g.Objects) == 0 || slices.ContainsFunc(g.Objects, func(o string) bool { return strings.HasPrefix(o, kind+":") })
}

// Method tells whether a method may be called, before its objects are known.
func (r Rights) Method(method string) error {
	rule, ok := Rules[method]
	if !ok {
		return errs.New(errs.Denied, "%s has no rule, so nobody may call it", method).Because("NO_RULE").Do("report this as a bug of mvirt")
	}
	if len(r.grants) == 0 {
		return errs.New(errs.Denied, "nothing is granted to you").Because("NO_GRANT").Do("ask the host's administrator for an [[access]] table that names you")
	}
	for _, g := range r.grants {
		if !g.holds(rule.Kind, rule.Verb, rule.Role) {
			continue
		}
		switch {
		case len(g.Objects) == 0, rule.Reach == Some, rule.Reach == One && g.objectsOf(rule.Kind), rule.Reach == Parent && g.objectsOf(rule.Parent):
			return nil
		}
	}
	return denied(rule, "")
}

func denied(rule Rule, about string) error {
	return errs.New(errs.Denied, "you may not %s %s%s", strings.ReplaceAll(rule.Verb, "_", " "), strings.ReplaceAll(rule.Kind, "_", " "), about).Because("NOT_GRANTED").
		Do("it takes the role " + rule.Role.String() + "; ask the host's administrator")
}

// Object tells whether a method may be used on an object that the call names. Objects of another kind than the
// method's (the network of a new NIC) must be granted too: for reading, if the method only refers to them.
func (r Rights) Object(method, kind, id, name string) error {
	rule, ok := Rules[method]
	if !ok {
		return r.Method(method)
	}
	least, verb := rule.Role, rule.Verb
	if kind != rule.Kind && kind != rule.Parent && refersOnly(kind) {
		least = Viewer
	}
	for _, g := range r.grants {
		if g.names(kind, id, name) && g.Role >= least && (len(g.Kinds) == 0 || slices.Contains(g.Kinds, kind)) &&
			(len(g.Verbs) == 0 || slices.Contains(g.Verbs, verb) || least == Viewer && (verb == "read" || kind != rule.Kind)) {
			return nil
		}
	}
	about := " " + name
	if name == "" {
		about = " " + id
	}
	return denied(Rule{Kind: kind, Verb: verb, Role: least}, about)
}

// refersOnly are kinds that another kind's change uses without changing them.
func refersOnly(kind string) bool {
	switch kind {
	case "template", "network", "security_group", "snapshot":
		return true
	}
	return false
}

// Sees tells whether an object of a kind may be read; answers are filtered by it.
func (r Rights) Sees(kind, id, name string) bool {
	return slices.ContainsFunc(r.grants, func(g Grant) bool { return g.holds(kind, "read", Viewer) && g.names(kind, id, name) })
}

// Ref is an object as a grant names it.
type Ref struct{ Kind, Ref string }

// Refs are the objects that limited grants name. What is about objects by their ids alone (events, log entries,
// operations) is filtered by the ids of these.
func (r Rights) Refs() []Ref {
	var out []Ref
	for _, g := range r.grants {
		for _, o := range g.Objects {
			if kind, ref, ok := strings.Cut(o, ":"); ok && (len(g.Kinds) == 0 || slices.Contains(g.Kinds, kind)) {
				out = append(out, Ref{kind, ref})
			}
		}
	}
	return out
}

// Narrow tells whether what is about several objects must be filtered for a method: no grant without objects
// holds it.
func (r Rights) Narrow(method string) bool {
	rule := Rules[method]
	return !slices.ContainsFunc(r.grants, func(g Grant) bool { return len(g.Objects) == 0 && g.holds(rule.Kind, rule.Verb, rule.Role) })
}
