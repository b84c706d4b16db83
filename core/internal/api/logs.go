package api

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/service"
)

// flushTime is how long a query waits for what is on its way to the log plugin, so that whoever asks right
// after a change finds it.
const flushTime = time.Second

type logsAPI struct {
	apiv1.UnimplementedLogsServer
	*Server
}

func (a *logsAPI) Query(req *apiv1.QueryLogsRequest, ss grpc.ServerStreamingServer[apiv1.LogResult]) error {
	ctx := ss.Context()
	q := log.Query{AllObjects: req.GetAllObjects(), Components: req.GetComponents(), Labels: req.GetLabels(), Contains: req.GetContains(),
		IgnoreCase: req.GetIgnoreCase(), NewestFirst: req.GetNewestFirst(), Limit: req.GetLimit(), PageToken: req.GetPageToken(), Follow: req.GetFollow()}
	var err error
	if q.Since, err = convert.FromTime("since", req.GetSince()); err != nil {
		return err
	}
	if q.Until, err = convert.FromTime("until", req.GetUntil()); err != nil {
		return err
	}
	level := func(field, s string) (log.Level, error) {
		l := log.ParseLevel(s)
		if l == 0 {
			return 0, errs.Field(field, `write "audit", "error", "warn", "info" or "debug"`, "%s is not a level", ident.Quote(s))
		}
		return l, nil
	}
	if s := req.GetMaxLevel(); s != "" {
		if q.MaxLevel, err = level("max_level", s); err != nil {
			return err
		}
	}
	for _, s := range req.GetLevels() {
		l, err := level("levels", s)
		if err != nil {
			return err
		}
		q.Levels = append(q.Levels, l)
	}
	if q.Follow && q.NewestFirst {
		return errs.Field("newest_first", "leave one of the two out", "follow shows the oldest first")
	}
	for _, ref := range req.GetObjects() {
		ids, err := a.objects(ctx, ref)
		if err != nil {
			return err
		}
		q.Objects = append(q.Objects, ids...)
	}
	if c := callerOf(ctx); c.rights.Narrow(c.method) && len(q.Objects) == 0 {
		for id := range a.visible(ctx, c) {
			q.Objects = append(q.Objects, id)
		}
		if len(q.Objects) == 0 {
			return nil
		}
	}
	fctx, cancel := context.WithTimeout(ctx, flushTime)
	_ = a.audit.Flush(fctx) // what is late is late
	cancel()
	if q.Follow {
		if err := ss.SendHeader(metadata.MD{}); err != nil {
			return err
		}
	}
	return a.logs.Query(ctx, q, func(r log.Result) error {
		out := &apiv1.LogResult{PageToken: r.PageToken, CaughtUp: r.CaughtUp, Missed: r.Missed}
		if r.Entry.ID != "" {
			out.Entry = convert.LogEntry(r.Entry)
		}
		return ss.Send(out)
	})
}

// objects turns what the user calls an object into the ids under which entries stand. A whole id is taken as
// it is, also of an object that is gone. A name, or a prefix of an id, is looked up in every kind whose
// plugin answers; all that match count.
func (a *logsAPI) objects(ctx context.Context, ref string) ([]string, error) {
	if ref == "" || len(ref) > log.MaxObjectLen {
		return nil, errs.Field("objects", "give an id or a name", "an object's name has %d bytes", len(ref))
	}
	if ident.CheckID("objects", ref) == nil || len(ref) > 7 && ref[:7] == "plugin:" {
		return []string{ref}, nil
	}
	var ids []string
	var first error
	missing := false
	try := func(k service.Kind, id string, err error) {
		switch {
		case err == nil:
			ids = append(ids, id)
		case errs.KindOf(err) == errs.NotFound || errs.KindOf(err) == errs.Unsupported:
		case first == nil:
			first = err
		}
	}
	for _, k := range []service.Kind{service.KindVMM, service.KindStorage, service.KindNet} {
		if !a.up(k) {
			missing = true
			continue
		}
		switch k {
		case service.KindVMM:
			v, err := a.findVM(ctx, "objects", ref)
			try(k, v.ID, err)
		case service.KindStorage:
			v, err := a.findVolume(ctx, "objects", ref)
			try(k, v.ID, err)
			t, err := a.findTemplate(ctx, "objects", ref)
			try(k, t.ID, err)
			s, err := a.findSnapshot(ctx, "objects", ref)
			try(k, s.ID, err)
		case service.KindNet:
			n, err := a.findNetwork(ctx, "objects", ref)
			try(k, n.ID, err)
			c, err := a.findNIC(ctx, "objects", ref)
			try(k, c.ID, err)
			g, err := a.findGroup(ctx, "objects", ref)
			try(k, g.ID, err)
		}
	}
	switch {
	case len(ids) > 0:
		return ids, nil
	case first != nil:
		return nil, first
	case missing:
		return nil, errs.New(errs.Unavailable, "object %s cannot be looked up by its name while a plugin is down", shown(ref)).Do("give its whole id, or see mvirt plugin ls")
	}
	return nil, errs.New(errs.NotFound, "no VM, volume, template, snapshot, network, NIC or security group is called %s", shown(ref)).
		Do("give the whole id of an object that is gone")
}

func (a *logsAPI) Stats(ctx context.Context, _ *apiv1.LogStatsRequest) (*apiv1.LogStats, error) {
	st, err := a.logs.Stats(ctx)
	if err != nil {
		return nil, err
	}
	return &apiv1.LogStats{Entries: st.Entries, Objects: st.Objects, DiskBytes: st.DiskBytes, Oldest: convert.Time(st.Oldest), Newest: convert.Time(st.Newest),
		ByLevel: st.ByLevel, Dropped: st.Dropped + a.audit.Dropped(), MemoryBytes: st.MemoryBytes, Spooled: a.audit.Spooled()}, nil
}

func (a *logsAPI) Verify(ctx context.Context, req *apiv1.VerifyLogsRequest) (*apiv1.VerifyLogsResponse, error) {
	since, err := convert.FromTime("since", req.GetSince())
	if err != nil {
		return nil, err
	}
	until, err := convert.FromTime("until", req.GetUntil())
	if err != nil {
		return nil, err
	}
	rep, err := a.logs.Verify(ctx, log.VerifyRequest{Since: since, Until: until})
	if err != nil {
		return nil, err
	}
	out := &apiv1.VerifyLogsResponse{Checked: rep.Checked, Head: rep.Head}
	for _, b := range rep.Breaks {
		out.Breaks = append(out.Breaks, &apiv1.VerifyBreak{EntryId: b.EntryID, Time: convert.Time(b.Time), What: b.What, Detail: b.Detail})
	}
	return out, nil
}
