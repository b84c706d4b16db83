package api

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/peer"
	"github.com/mvirt/mvirt/core/internal/authz"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
	"github.com/mvirt/mvirt/sdk/log"
)

// Limits of the API.
const (
	maxMessage = 16 << 20 // far above any request; a list of 20,000 VMs fits
	// writeBuffer takes the list of 1,000 VMs in few writes.
	writeBuffer = 256 << 10
	readTime    = 30 * time.Second
	changeTime  = 30 * time.Minute // of a call that changes something and has no deadline: a clone on a slow disk, a stop that waits
)

// changing are the methods that change something, and what the audit trail calls them.
var changing = map[string]string{
	apiv1.Plugins_Restart_FullMethodName:         "plugin.restart",
	apiv1.Operations_Cancel_FullMethodName:       "operation.cancel",
	apiv1.Templates_Import_FullMethodName:        "template.import",
	apiv1.Templates_CancelImport_FullMethodName:  "template.cancel_import",
	apiv1.Templates_Create_FullMethodName:        "template.create",
	apiv1.Templates_Rename_FullMethodName:        "template.rename",
	apiv1.Templates_Delete_FullMethodName:        "template.delete",
	apiv1.Volumes_Create_FullMethodName:          "volume.create",
	apiv1.Volumes_Resize_FullMethodName:          "volume.resize",
	apiv1.Volumes_Rename_FullMethodName:          "volume.rename",
	apiv1.Volumes_Delete_FullMethodName:          "volume.delete",
	apiv1.Snapshots_Create_FullMethodName:        "snapshot.create",
	apiv1.Snapshots_Rollback_FullMethodName:      "snapshot.rollback",
	apiv1.Snapshots_Delete_FullMethodName:        "snapshot.delete",
	apiv1.Networks_Create_FullMethodName:         "network.create",
	apiv1.Networks_Update_FullMethodName:         "network.update",
	apiv1.Networks_Delete_FullMethodName:         "network.delete",
	apiv1.NICs_Create_FullMethodName:             "nic.create",
	apiv1.NICs_Update_FullMethodName:             "nic.update",
	apiv1.NICs_Delete_FullMethodName:             "nic.delete",
	apiv1.SecurityGroups_Create_FullMethodName:   "security_group.create",
	apiv1.SecurityGroups_SetRules_FullMethodName: "security_group.set_rules",
	apiv1.SecurityGroups_Delete_FullMethodName:   "security_group.delete",
	apiv1.VMs_Create_FullMethodName:              "vm.create",
	apiv1.VMs_Update_FullMethodName:              "vm.update",
	apiv1.VMs_Delete_FullMethodName:              "vm.delete",
	apiv1.VMs_Start_FullMethodName:               "vm.start",
	apiv1.VMs_Stop_FullMethodName:                "vm.stop",
	apiv1.VMs_Kill_FullMethodName:                "vm.kill",
	apiv1.VMs_Pause_FullMethodName:               "vm.pause",
	apiv1.VMs_Resume_FullMethodName:              "vm.resume",
	apiv1.VMs_Reboot_FullMethodName:              "vm.reboot",
	apiv1.VMs_Console_FullMethodName:             "vm.console",
	apiv1.VMs_AttachVolume_FullMethodName:        "vm.attach_volume",
	apiv1.VMs_DetachVolume_FullMethodName:        "vm.detach_volume",
	apiv1.VMs_AttachNIC_FullMethodName:           "vm.attach_nic",
	apiv1.VMs_DetachNIC_FullMethodName:           "vm.detach_nic",
}

// caller is one call: who makes it, and what is known for the audit trail.
type caller struct {
	who    operation.Who
	peer   peer.Info
	method string
	rights authz.Rights

	once sync.Once
	ids  map[string]bool // of what a limited caller may see; see visible

	mu       sync.Mutex
	request  string // redacted
	objects  []string
	recorded bool // the engine audits it, or the handler did
}

type callerKey struct{}

func callerOf(ctx context.Context) *caller {
	if c, ok := ctx.Value(callerKey{}).(*caller); ok {
		return c
	}
	return &caller{} // not reachable through the server
}

// touch notes an object that the call is about.
func touch(ctx context.Context, ids ...string) {
	c := callerOf(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range ids {
		if id != "" && !slices.Contains(c.objects, id) {
			c.objects = append(c.objects, id)
		}
	}
}

// call is what a change needs to know of its caller.
func (s *Server) call(ctx context.Context) plan.Call {
	c := callerOf(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	return plan.Call{Who: c.who, Labels: map[string]string{"request": c.request}}
}

// again is a call that makes an object with an id of the caller's. A create that is repeated, because its answer
// was lost, waits for the first to be settled, which may also be undone; when the object is there then, the call
// is an operation all the same, and audited, but nothing of it is undone.
func (s *Server) again(ctx context.Context, kind, id string, get func(context.Context) error) (plan.Call, error) {
	call := s.call(ctx)
	if id == "" {
		return call, nil
	}
	if err := s.settle(ctx, kind+":"+id); err != nil {
		return call, err
	}
	call.Again = get(ctx) == nil
	return call, nil
}

// settle waits until no operation works on an object.
func (s *Server) settle(ctx context.Context, object string) error {
	for {
		id := s.engine.On(object)
		if id == "" {
			return nil
		}
		if err := s.engine.Watch(ctx, id, func(operation.Operation) error { return nil }); err != nil && !errors.Is(err, errs.NotFound) {
			return err
		}
		// The lock goes just after the end is told.
		t := time.NewTimer(time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}

// ran takes the outcome of a change: from here on the engine audits it.
func ran(ctx context.Context, op operation.Operation, err error) error {
	if op.ID != "" {
		c := callerOf(ctx)
		c.mu.Lock()
		c.recorded = true
		c.mu.Unlock()
	}
	return err
}

func (s *Server) newGRPC() *grpc.Server {
	g := grpc.NewServer(grpc.Creds(peer.Credentials(s.tls, s.turnedAway)), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.WriteBufferSize(writeBuffer),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream))
	s.register(g)
	return g
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	c := s.newCaller(ctx, info.FullMethod)
	ctx = context.WithValue(ctx, callerKey{}, c)
	name, change := changing[info.FullMethod]
	if _, has := ctx.Deadline(); !has {
		limit := readTime
		if change {
			limit = changeTime
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	if m, ok := req.(proto.Message); ok && change {
		c.request = redacted(m)
	}
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in a handler", "method", info.FullMethod, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errs.New(errs.Internal, "the core met a bug of its own").Do("see the core's log and report it")
		}
		if err != nil {
			s.refused(c, name, change, err)
			resp, err = nil, grpcerr.ToStatus(err)
		}
	}()
	if err := s.allow(c); err != nil {
		return nil, err
	}
	resp, err = handler(ctx, req)
	if m, ok := resp.(proto.Message); ok && err == nil {
		resp = s.limited(ctx, c, m)
	}
	return resp, err
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context
	c   *caller
	s   *Server
}

// SendMsg leaves out what the caller may not see.
func (s *serverStream) SendMsg(m any) error {
	if msg, ok := m.(proto.Message); ok && s.s.limited(s.ctx, s.c, msg) == nil {
		return nil
	}
	return s.ServerStream.SendMsg(m)
}

func (s *serverStream) Context() context.Context { return s.ctx }

// RecvMsg keeps the first request for the audit trail.
func (s *serverStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if msg, ok := m.(proto.Message); ok && err == nil {
		s.c.mu.Lock()
		if s.c.request == "" {
			s.c.request = redacted(msg)
		}
		s.c.mu.Unlock()
	}
	return err
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	c := s.newCaller(ss.Context(), info.FullMethod)
	name, change := changing[info.FullMethod]
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in a handler", "method", info.FullMethod, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errs.New(errs.Internal, "the core met a bug of its own").Do("see the core's log and report it")
		}
		if err != nil {
			s.refused(c, name, change, err)
			err = grpcerr.ToStatus(err)
		}
	}()
	if err := s.allow(c); err != nil {
		return err
	}
	return handler(srv, &serverStream{ss, context.WithValue(ss.Context(), callerKey{}, c), c, s})
}

func (s *Server) newCaller(ctx context.Context, method string) *caller {
	c := &caller{method: method}
	s.identify(ctx, c)
	return c
}

func (s *Server) allow(c *caller) error {
	if c.who.Name == "" {
		return errs.New(errs.Unauthorized, "who calls is not known").Do("connect over the unix socket")
	}
	return c.rights.Method(c.method)
}

// refused audits a change that did not come about, and anything that was denied.
func (s *Server) refused(c *caller, name string, change bool, err error) {
	kind := errs.KindOf(err)
	c.mu.Lock()
	done := c.recorded
	objects, request := slices.Clone(c.objects), c.request
	c.mu.Unlock()
	if done || !change && kind != errs.Denied && kind != errs.Unauthorized {
		return
	}
	if name == "" {
		name = strings.TrimPrefix(c.method, "/mvirt.v1.")
	}
	e := log.Entry{Level: log.LevelAudit, Component: "core", Message: fmt.Sprintf("%s refused to %s: %v", name, c.who.Name, err), Objects: objects,
		Labels: labels(c.who, name, "refused", request)}
	e.Labels["error"] = kind.String()
	// The caller may be gone; the entry is written all the same.
	if aerr := s.audit.Append(context.Background(), e); aerr != nil {
		s.log.Error("a refusal is not audited", "method", c.method, "error", aerr)
	}
}

// record audits something that is not an operation.
func (s *Server) record(ctx context.Context, name, outcome, message string, objects ...string) {
	c := callerOf(ctx)
	c.mu.Lock()
	c.recorded = true
	request := c.request
	c.mu.Unlock()
	e := log.Entry{Level: log.LevelAudit, Component: "core", Message: message, Objects: objects, Labels: labels(c.who, name, outcome, request)}
	if err := s.audit.Append(context.WithoutCancel(ctx), e); err != nil {
		s.log.Error("a change is not audited", "method", c.method, "error", err)
	}
}

func labels(w operation.Who, op, outcome, request string) map[string]string {
	l := map[string]string{"who": w.Name, "op": op, "outcome": outcome}
	if w.Remote != "" {
		l["remote"] = w.Remote
	} else if !w.Core {
		l["uid"], l["pid"] = fmt.Sprint(w.UID), fmt.Sprint(w.PID)
	}
	if request != "" && request != "{}" {
		l["request"] = request
	}
	return l
}

// redacted is a request as text, without what may be secret: cloud-init data (passwords, keys), tokens, and
// what stands before the host or after the path of a URL.
func redacted(m proto.Message) string {
	m = proto.Clone(m)
	hide := func(c *apiv1.CloudInit) {
		for _, f := range []*string{&c.UserData, &c.MetaData, &c.NetworkConfig} {
			if *f != "" {
				*f = fmt.Sprintf("(%d bytes)", len(*f))
			}
		}
	}
	switch r := m.(type) {
	case *apiv1.CreateVMRequest:
		r.KernelToken, r.InitramfsToken = "", ""
		if r.CloudInit != nil {
			hide(r.CloudInit)
		}
	case *apiv1.UpdateVMRequest:
		r.KernelToken, r.InitramfsToken = "", ""
		if r.CloudInit != nil {
			hide(r.CloudInit)
		}
	case *apiv1.ImportTemplateRequest:
		r.FileToken = ""
		r.Url = plainURL(r.Url)
	case *apiv1.ConsoleInput:
		if r.GetData() != nil {
			return ""
		}
	}
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return ""
	}
	const most = 2000
	if len(text) > most {
		text = append(text[:most], "…"...)
	}
	return strings.ToValidUTF8(string(text), "?")
}

func plainURL(raw string) string {
	if raw == "" {
		return ""
	}
	u, err := url.Parse(raw)
	if err != nil {
		return "(not a URL)"
	}
	u.User, u.RawQuery, u.Fragment = nil, "", ""
	return u.String()
}
