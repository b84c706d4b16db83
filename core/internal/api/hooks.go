package api

import (
	"context"
	"fmt"
	"strings"

	"github.com/mvirt/mvirt/core/internal/bus"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/supervisor"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// operationEnded makes the audit entry of an operation. Its id is the operation's, so that one repeated after
// a crash is stored once.
func (s *Server) operationEnded(ctx context.Context, op operation.Operation) error {
	s.lookup.mark(op.Objects)
	s.mirror.mark(op.Objects)
	msg := op.Title + ": " + string(op.State)
	if err := op.Err(); err != nil {
		msg += ": " + err.Error()
	}
	if len(op.Undone) > 0 {
		msg += "; undone: " + strings.Join(op.Undone, ", ")
	}
	if op.Recovered {
		msg += " (settled after a restart of the core)"
	}
	outcome := map[operation.State]string{operation.Done: "ok", operation.Failed: "failed", operation.Canceled: "canceled"}[op.State]
	l := labels(op.Who, op.Type, outcome, op.Labels["request"])
	l["duration_ms"] = fmt.Sprint(op.EndedAt.Sub(op.StartedAt).Milliseconds())
	if op.Failure != nil {
		l["error"] = op.Failure.Kind.String()
	}
	return s.audit.Append(ctx, log.Entry{Time: op.EndedAt, ID: op.ID, Level: log.LevelAudit, Component: "core", Message: msg,
		Objects: append([]string{op.ID}, op.Objects...), Labels: l})
}

func (s *Server) operationChanged(op operation.Operation) {
	typ, text := "operation.changed", op.Phase
	if op.State.Final() {
		typ, text = "operation."+string(op.State), string(op.State)
		if err := op.Err(); err != nil {
			text += ": " + err.Error()
		}
	}
	s.bus.Publish(bus.Event{Type: typ, Objects: append([]string{op.ID}, op.Objects...), Labels: map[string]string{"op": op.Type, "state": string(op.State)},
		Message: op.Title + ": " + text})
}

// HostFor is what the plugin of a kind may ask of the core. Who speaks is settled by the connection.
func (s *Server) HostFor(kind service.Kind) service.Host { return host{s, kind} }

type host struct {
	s    *Server
	kind service.Kind
}

// component is the name under which a plugin's entries stand.
func (s *Server) component(kind service.Kind) string {
	if name := s.sup.Status(kind).Info.Name; name != "" {
		return name
	}
	return string(kind)
}

// Audit makes a durable entry. The id is bound to the plugin's kind, so that no plugin can take the place of
// another's entry by guessing its id.
func (h host) Audit(ctx context.Context, rec service.AuditRecord) error {
	if err := ident.CheckID("id", rec.ID); err != nil {
		return err
	}
	l := map[string]string{}
	for k, v := range rec.Labels {
		l[k] = v
	}
	l["who"], l["plugin"] = "plugin "+string(h.kind), string(h.kind)
	return h.s.audit.Append(ctx, log.Entry{Time: rec.Time, ID: string(h.kind) + ":" + rec.ID, Level: log.LevelAudit, Component: h.s.component(h.kind),
		Message: rec.Message, Objects: rec.Objects, Labels: l})
}

// Publish spreads an event.
func (h host) Publish(_ context.Context, ev service.Event) error {
	l := map[string]string{"plugin": string(h.kind)}
	for k, v := range ev.Labels {
		if k != "plugin" && len(l) < 32 {
			l[k] = v
		}
	}
	if len(ev.Objects) > 64 {
		ev.Objects = ev.Objects[:64]
	}
	h.s.lookup.mark(ev.Objects)
	h.s.bus.Publish(bus.Event{Time: ev.Time, Type: ev.Type, Objects: ev.Objects, Labels: l})
	return nil
}

// PluginLog takes a line that a plugin logged into the log store. It never blocks.
func (s *Server) PluginLog(kind service.Kind, line supervisor.Line) {
	level := log.ParseLevel(line.Level)
	if level == 0 || level == log.LevelAudit { // audit entries come through the host service only
		level = log.LevelInfo
	}
	e := log.Entry{Time: line.Time, Level: level, Component: s.component(kind), Message: line.Message, Labels: line.Fields}
	for _, k := range []string{"vm", "volume", "nic", "network", "template", "snapshot", "object"} {
		if id := line.Fields[k]; ident.CheckID(k, id) == nil {
			e.Objects = append(e.Objects, id)
		}
	}
	s.audit.Note(e)
}
