package api

import (
	"context"
	"errors"
	"net/url"
	"strings"

	"google.golang.org/grpc"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/api/convert"
	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/storage"
)

type templatesAPI struct {
	apiv1.UnimplementedTemplatesServer
	*Server
}

func (a *templatesAPI) Import(req *apiv1.ImportTemplateRequest, ss grpc.ServerStreamingServer[apiv1.Import]) error {
	ctx := ss.Context()
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return err
	}
	if err := checkImport(req); err != nil {
		return err
	}
	file, err := a.takeFile(ctx, "file_token", req.GetFileToken())
	if err != nil {
		return err
	}
	call := a.call(ctx)
	call.Async = true
	op, err := a.changes.Import(ctx, call, storage.ImportRequest{ID: id, Name: req.GetName(), File: file, FileName: req.GetFileName(), URL: req.GetUrl(),
		Checksum: req.GetChecksum(), Labels: req.GetLabels()})
	if err := ran(ctx, op, err); err != nil {
		return err
	}
	err = a.follow(ctx, id, op.ID, ss)
	if ctx.Err() != nil && req.GetCancelOnDisconnect() {
		if _, cerr := a.engine.Cancel(op.ID, call.Who); cerr != nil {
			a.log.Warn("an import goes on although whoever asked for it went away", "import", id, "error", cerr)
		}
	}
	return err
}

func checkImport(req *apiv1.ImportTemplateRequest) error {
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return err
	}
	if err := checkLabels(req.GetLabels()); err != nil {
		return err
	}
	if (req.GetUrl() == "") == (req.GetFileToken() == "") {
		return errs.Field("url", "give a URL or a file", "an import needs exactly one of the two")
	}
	if req.GetUrl() != "" {
		u, err := url.Parse(req.GetUrl())
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return errs.Field("url", "give an http:// or https:// URL, or a local file by its path", "%s cannot be fetched", ident.Quote(plainURL(req.GetUrl())))
		}
	}
	if c := req.GetChecksum(); c != "" {
		algo, hex, _ := strings.Cut(c, ":")
		want := map[string]int{"sha256": 64, "sha512": 128}[algo]
		if want == 0 || len(hex) != want || strings.Trim(strings.ToLower(hex), "0123456789abcdef") != "" {
			return errs.Field("checksum", "write sha256:<64 hex digits> or sha512:<128 hex digits>", "%s is not a checksum", ident.Quote(c))
		}
	}
	if len(req.GetFileName()) > 4096 {
		return errs.Field("file_name", "give the file's name", "the file's name has %d bytes", len(req.GetFileName()))
	}
	return nil
}

// follow streams how far an import is. While its operation has not reached the plugin, nothing is known of
// it; when it never gets there, the operation tells why.
func (a *templatesAPI) follow(ctx context.Context, id, opID string, ss grpc.ServerStreamingServer[apiv1.Import]) error {
	send := func(i storage.Import) error {
		if i.State.Final() {
			// The plugin is done a moment before our operation is, and until then the template is locked: whoever
			// hears that the import is done must be able to use it.
			if err := a.settle(ctx, "template:"+i.ID); err != nil {
				return err
			}
		}
		out := convert.Import(i, grpcCode)
		if i.State == storage.ImportDone {
			t, err := a.storage.GetTemplate(ctx, storage.Ref{Ref: i.ID})
			if err != nil {
				return err
			}
			out.Template = convert.Template(t)
		}
		return ss.Send(out)
	}
	if opID == "" {
		return a.storage.WatchImport(ctx, storage.Ref{Ref: id}, send)
	}
	started := errors.New("started")
	err := a.engine.Watch(ctx, opID, func(op operation.Operation) error {
		if op.State.Final() {
			if f := op.Err(); f != nil {
				if i, ferr := a.findImport(ctx, "id", id); ferr == nil { // it began: its last state tells all
					return send(i)
				}
				return f
			}
			return started
		}
		if strings.HasPrefix(op.Phase, "import: ") {
			return started
		}
		return nil
	})
	if !errors.Is(err, started) {
		return err
	}
	return a.storage.WatchImport(ctx, storage.Ref{Ref: id}, send)
}

func (a *templatesAPI) ListImports(ctx context.Context, _ *apiv1.ListImportsRequest) (*apiv1.ListImportsResponse, error) {
	all, err := a.storage.ListImports(ctx)
	if err != nil {
		return nil, err
	}
	out := &apiv1.ListImportsResponse{}
	for _, i := range all {
		out.Imports = append(out.Imports, convert.Import(i, grpcCode))
	}
	return out, nil
}

func (a *templatesAPI) WatchImport(req *apiv1.RefRequest, ss grpc.ServerStreamingServer[apiv1.Import]) error {
	i, err := a.findImport(ss.Context(), "ref", req.GetRef())
	if err != nil {
		return err
	}
	return a.follow(ss.Context(), i.ID, "", ss)
}

func (a *templatesAPI) CancelImport(ctx context.Context, req *apiv1.RefRequest) (*apiv1.CancelImportResponse, error) {
	i, err := a.findImport(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	if err := a.storage.CancelImport(ctx, storage.Ref{Ref: i.ID}); err != nil {
		return nil, err
	}
	if !i.State.Final() {
		a.record(ctx, "template.cancel_import", "ok", "import of template "+i.Name+" cancelled", i.ID)
	}
	return &apiv1.CancelImportResponse{}, nil
}

func (a *templatesAPI) Create(ctx context.Context, req *apiv1.CreateTemplateRequest) (*apiv1.Template, error) {
	id, err := newID(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := checkLabels(req.GetLabels()); err != nil {
		return nil, err
	}
	s, err := a.findSnapshot(ctx, "snapshot", req.GetSnapshot())
	if err != nil {
		return nil, err
	}
	create := storage.CreateTemplateRequest{ID: id, Name: req.GetName(), SnapshotID: s.ID, Labels: req.GetLabels()}
	call, err := a.again(ctx, "template", req.GetId(), func(ctx context.Context) error {
		_, err := a.storage.GetTemplate(ctx, storage.Ref{Ref: id})
		return err
	})
	if err != nil {
		return nil, err
	}
	op, err := a.changes.CreateTemplate(ctx, call, s, create)
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return a.Get(ctx, &apiv1.RefRequest{Ref: id})
}

func (a *templatesAPI) List(ctx context.Context, _ *apiv1.ListTemplatesRequest) (*apiv1.ListTemplatesResponse, error) {
	all, err := a.storage.ListTemplates(ctx)
	if err != nil {
		return nil, err
	}
	out := &apiv1.ListTemplatesResponse{}
	for _, t := range all {
		out.Templates = append(out.Templates, convert.Template(t))
	}
	return out, nil
}

func (a *templatesAPI) Get(ctx context.Context, req *apiv1.RefRequest) (*apiv1.Template, error) {
	t, err := a.findTemplate(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	return convert.Template(t), nil
}

func (a *templatesAPI) Rename(ctx context.Context, req *apiv1.RenameRequest) (*apiv1.Template, error) {
	t, err := a.findTemplate(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	op, err := a.changes.RenameTemplate(ctx, a.call(ctx), t, req.GetName())
	if err := ran(ctx, op, err); err != nil {
		return nil, err
	}
	return a.Get(ctx, &apiv1.RefRequest{Ref: t.ID})
}

func (a *templatesAPI) Delete(ctx context.Context, req *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
	t, err := a.findTemplate(ctx, "ref", req.GetRef())
	if err != nil {
		return nil, err
	}
	removed := []string{"template " + t.Name}
	if req.GetDryRun() {
		return &apiv1.DeleteResponse{Removed: removed}, nil
	}
	op, err := a.changes.DeleteTemplate(ctx, a.call(ctx), t)
	return deleted(ctx, op, removed, err)
}
