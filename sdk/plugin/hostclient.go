package plugin

import (
	"context"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/sdk/internal/peercred"
	"github.com/mvirt/mvirt/sdk/internal/wire"
	"github.com/mvirt/mvirt/sdk/service"
)

// callLimit bounds a call to the host: a plugin must not hang on it.
const callLimit = 5 * time.Second

// rpcHost is the host on its socket; what it does not take within the limit is in the plugin's log.
type rpcHost struct {
	c   *wire.HostClient
	log hclog.Logger
}

func dialHost(socket string, log hclog.Logger) (service.Host, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(peercred.Credentials(hostOnly())),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return nil, err
	}
	return &rpcHost{wire.NewHostClient(conn), log}, nil
}

func (h *rpcHost) Audit(ctx context.Context, rec service.AuditRecord) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	err := h.c.Audit(ctx, rec)
	if err != nil {
		h.log.Error("audit record not delivered", "id", rec.ID, "message", rec.Message, "objects", strings.Join(rec.Objects, " "), "error", err.Error())
	}
	return err
}

func (h *rpcHost) Publish(ctx context.Context, ev service.Event) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return h.c.Publish(ctx, ev)
}

// logHost stands in for a host that is not there: stand-alone, the log is where things go.
type logHost struct{ log hclog.Logger }

func (h logHost) Audit(_ context.Context, rec service.AuditRecord) error {
	h.log.Info("audit", "id", rec.ID, "message", rec.Message, "objects", strings.Join(rec.Objects, " "))
	return nil
}

func (h logHost) Publish(_ context.Context, ev service.Event) error {
	h.log.Debug("event", "type", ev.Type, "objects", strings.Join(ev.Objects, " "))
	return nil
}
