// Package convert turns the contracts' types into the public API's and back. Nothing here asks or decides.
package convert

import (
	"net/netip"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/health"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/supervisor"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// Time is t, or nil for the zero time.
func Time(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// FromTime reads a timestamp; absent is the zero time.
func FromTime(field string, t *timestamppb.Timestamp) (time.Time, error) {
	if t == nil {
		return time.Time{}, nil
	}
	if err := t.CheckValid(); err != nil {
		return time.Time{}, errs.Field(field, "give a time between the years 1 and 9999", "%s is not a time: %v", field, err)
	}
	return t.AsTime(), nil
}

// maxTimeout bounds durations that callers give: a day is beyond any use.
const maxTimeout = 24 * time.Hour

// FromDuration reads a duration that must not be negative; absent is 0.
func FromDuration(field string, d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil || d.AsDuration() < 0 || d.AsDuration() > maxTimeout {
		return 0, errs.Field(field, "give 0 to 24 h", "%s is not a usable time: %s", field, d.AsDuration())
	}
	return d.AsDuration(), nil
}

// Addr reads an address; "" is the zero address.
func Addr(field, s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, errs.Field(field, "write it like 10.0.0.5 or fd00::5", "%q is not an address", limit(s))
	}
	return a, nil
}

// Addrs reads a list of addresses.
func Addrs(field string, in []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range in {
		a, err := Addr(field, s)
		if err != nil {
			return nil, err
		}
		if !a.IsValid() {
			return nil, errs.Field(field, "leave it out", "an address is empty")
		}
		out = append(out, a)
	}
	return out, nil
}

// Prefix reads a subnet; "" is the zero prefix.
func Prefix(field, s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, errs.Field(field, "write it like 10.0.0.0/24 or fd00::/64", "%q is not a subnet", limit(s))
	}
	return p, nil
}

// Prefixes reads a list of subnets.
func Prefixes(field string, in []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range in {
		p, err := Prefix(field, s)
		if err != nil {
			return nil, err
		}
		if !p.IsValid() {
			return nil, errs.Field(field, "leave it out", "a subnet is empty")
		}
		out = append(out, p)
	}
	return out, nil
}

func limit(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func str[T interface {
	String() string
	IsValid() bool
}](v T) string {
	if !v.IsValid() {
		return ""
	}
	return v.String()
}

func strs[T interface {
	String() string
	IsValid() bool
}](in []T) []string {
	out := make([]string, 0, len(in))
	for _, v := range in {
		out = append(out, str(v))
	}
	return out
}

var severities = map[service.Severity]string{service.SeverityInfo: "info", service.SeverityWarning: "warning", service.SeverityCritical: "critical"}

// Conditions converts conditions. The source of a plugin's is its kind.
func Conditions(in []health.Condition) []*apiv1.Condition {
	var out []*apiv1.Condition
	for _, c := range in {
		out = append(out, &apiv1.Condition{Code: c.Code, Severity: severities[c.Severity], Since: Time(c.Since), Text: c.Text, Remedy: c.Remedy,
			Object: c.Object, Source: strings.TrimPrefix(c.Source, "plugin.")})
	}
	return out
}

var states = map[supervisor.State]string{supervisor.StateStarting: "starting", supervisor.StateUp: "up", supervisor.StateWaiting: "backoff",
	supervisor.StateQuarantined: "quarantined", supervisor.StateStopping: "stopping", supervisor.StateStopped: "stopped"}

var features = map[service.Feature]string{
	service.FeatureStorageBackup: "backup", service.FeatureStorageReflink: "reflink",
	service.FeatureNetUpdate: "update", service.FeatureNetIPv6: "ipv6", service.FeatureNetSecurity: "security-groups",
	service.FeatureNetBridge: "bridge", service.FeatureNetBackup: "backup", service.FeatureNetVhostUser: "vhost-user",
	service.FeatureVMMHotplugDisk: "hotplug-disk", service.FeatureVMMHotplugNIC: "hotplug-nic", service.FeatureVMMResize: "resize",
	service.FeatureVMMSnapshot: "snapshot", service.FeatureVMMCounters: "counters", service.FeatureVMMBackup: "backup",
	service.FeatureVMMDiskResize: "disk-resize", service.FeatureVMMVhostUser: "vhost-user",
	service.FeatureLogVerify: "verify", service.FeatureLogBackup: "backup",
}

// Plugin converts what the supervisor knows of a plugin. user names a uid.
func Plugin(s supervisor.Status, user func(uid uint32) string) *apiv1.Plugin {
	p := &apiv1.Plugin{Kind: string(s.Kind), Name: s.Info.Name, Version: s.Info.Version, State: states[s.State], Reason: s.Reason, Pid: uint32(max(0, s.PID)),
		StartedAt: Time(s.UpSince), Restarts: uint32(min(s.Restarts, 1<<31)), Command: s.Command, NextStartAt: Time(s.NextTry), Conditions: Conditions(s.Conditions)}
	if s.Attach != "" {
		p.Command = s.Attach
	}
	if s.State == supervisor.StateUp && len(s.Conditions) > 0 {
		p.State = "degraded"
		p.Reason = s.Conditions[0].Text
	}
	if s.Info.ContractMajor != 0 {
		p.Contract = contract(s.Info)
	}
	for _, f := range s.Info.Features {
		name := features[f]
		if name == "" {
			name = "?"
		}
		p.Features = append(p.Features, name)
	}
	n := s.Info.Needs
	if n.Root {
		p.Needs = append(p.Needs, "root")
	}
	p.Needs = append(append(append(p.Needs, n.Capabilities...), n.Devices...), n.Programs...)
	if a := s.Actual; a != nil {
		p.User, p.Capabilities, p.NoNewPrivs = user(a.UID), a.Capabilities, a.NoNewPrivs
	}
	if e := s.LastExit; e != nil {
		p.LastExit, p.LastExitAt, p.LastStderr = e.Text, Time(e.At), e.Stderr
	}
	return p
}

func contract(i service.Info) string {
	return itoa(i.ContractMajor) + "." + itoa(i.ContractMinor)
}

func itoa(n uint32) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

// Operation converts an operation. code is the gRPC code of a kind of error.
func Operation(o operation.Operation, code func(errs.Kind) uint32) *apiv1.Operation {
	out := &apiv1.Operation{Id: o.ID, Type: o.Type, State: string(o.State), Phase: o.Phase, Done: o.Done, Total: o.Total, Objects: o.Objects,
		StartedAt: Time(o.StartedAt), EndedAt: Time(o.EndedAt), Undone: o.Undone, Who: o.Who.String(), Title: o.Title, Left: o.Left}
	if err := o.Err(); err != nil {
		out.Error, out.Remedy, out.ErrorCode = err.Error(), errs.RemedyOf(err), code(errs.KindOf(err))
	}
	return out
}

// LogEntry converts an entry.
func LogEntry(e log.Entry) *apiv1.LogEntry {
	return &apiv1.LogEntry{Time: Time(e.Time), Id: e.ID, Level: e.Level.String(), Component: e.Component, Message: e.Message, Objects: e.Objects, Labels: e.Labels}
}
