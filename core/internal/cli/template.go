package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/tty"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

func (a *app) templates() *noun[*apiv1.Template] {
	n := newNoun[*apiv1.Template](a, "template")
	n.columns = []render.Column[*apiv1.Template]{
		{Head: "NAME", Cell: n.label},
		{Head: "SIZE", Right: true, Cell: func(t *apiv1.Template) string { return units.Size(t.GetSizeBytes()) }},
		{Head: "USED", Right: true, Cell: func(t *apiv1.Template) string { return units.Size(t.GetAllocatedBytes()) }},
		{Head: "CLONES", Right: true, Cell: func(t *apiv1.Template) string { return fmt.Sprint(t.GetCloneCount()) }},
		{Head: "STATE", Cell: func(t *apiv1.Template) string { return state(t.GetState(), t.GetStateReason()) },
			Color: func(t *apiv1.Template) render.Color { return render.State(t.GetState()) }},
		{Head: "AGE", Right: true, Cell: func(t *apiv1.Template) string { return a.age(t.GetCreatedAt()) }},
		{Head: "FORMAT", Wide: true, Cell: (*apiv1.Template).GetSourceFormat},
		{Head: "SOURCE", Wide: true, Cell: (*apiv1.Template).GetSource},
		{Head: "LABELS", Wide: true, Cell: func(t *apiv1.Template) string { return labelText(t.GetLabels()) }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.detail = func(t *apiv1.Template) []render.Pair {
		return []render.Pair{
			{Key: "Name", Value: t.GetName()}, {Key: "Id", Value: t.GetId()},
			{Key: "State", Value: state(t.GetState(), t.GetStateReason()), Color: render.State(t.GetState())},
			{Key: "Size", Value: units.Size(t.GetSizeBytes())}, {Key: "Used on disk", Value: units.Size(t.GetAllocatedBytes())},
			{Key: "Clones", Value: fmt.Sprint(t.GetCloneCount())},
			{Key: "Source", Value: t.GetSource()}, {Key: "Source format", Value: t.GetSourceFormat()}, {Key: "Checksum", Value: t.GetChecksum()},
			{Key: "Labels", Value: labelText(t.GetLabels())}, {Key: "Created", Value: a.when(t.GetCreatedAt())},
		}
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.Template, error) {
		r, err := c.Templates.List(ctx, &apiv1.ListTemplatesRequest{})
		return r.GetTemplates(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.Template, error) {
		return c.Templates.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

func (a *app) templateCommand() *cobra.Command {
	n := a.templates()
	cmd := &cobra.Command{Use: "template", Aliases: []string{"templates", "image"}, Short: "Disk images to make volumes from"}
	cmd.AddCommand(a.templateImportCommand(), a.templateCreateCommand(), n.lsCommand(), n.showCommand(),
		n.renameCommand(func(ctx context.Context, c *client.Client, r *apiv1.RenameRequest) (*apiv1.Template, error) {
			return c.Templates.Rename(ctx, r)
		}),
		n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
			return c.Templates.Delete(ctx, r)
		}, nil))
	return cmd
}

func (a *app) templateCreateCommand() *cobra.Command {
	var req apiv1.CreateTemplateRequest
	var label []string
	cmd := &cobra.Command{Use: "create NAME --snapshot VOLUME@SNAPSHOT", Short: "Make a template of a snapshot", Args: cobra.ExactArgs(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var err error
			req.Name = args[0]
			if req.Labels, err = labels(label); err != nil {
				return err
			}
			t, err := c.Templates.Create(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return a.templates().changed(t, "created")
		})}
	cmd.Flags().StringVar(&req.Snapshot, "snapshot", "", "the snapshot, by id or as volume@snapshot")
	must(cmd.MarkFlagRequired("snapshot"))
	a.snapshots().completeFlag(cmd, "snapshot")
	idFlag(cmd, &req.Id)
	labelFlag(cmd, &label)
	return cmd
}

func (a *app) templateImportCommand() *cobra.Command {
	var req apiv1.ImportTemplateRequest
	var label []string
	var detach bool
	cmd := &cobra.Command{Use: "import NAME FILE|URL", Short: "Make a template of an image: a file, or http(s)",
		Long: `Makes a template of an image file or an http(s) URL: raw or qcow2, also compressed.

A file is opened by this program, as you, and handed over. Ctrl-C cancels the import; with --detach the command
returns at once, and "mvirt import ls" shows how far it is.`,
		Example: "  mvirt template import debian-12 ./debian-12.qcow2\n  mvirt template import debian-12 URL --checksum sha512:…",
		Args:    cobra.ExactArgs(2),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) == 1 {
				return nil, cobra.ShellCompDirectiveDefault // files
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var err error
			req.Name = args[0]
			if req.Labels, err = labels(label); err != nil {
				return err
			}
			req.CancelOnDisconnect = !detach
			t, err := a.importTemplate(cmd.Context(), c, &req, args[1], detach)
			if err != nil || t == nil {
				return err
			}
			return a.templates().changed(t, fmt.Sprintf("imported (%s, %s on disk)", units.Size(t.GetSizeBytes()), units.Size(t.GetAllocatedBytes())))
		})}
	f := cmd.Flags()
	f.StringVar(&req.Checksum, "checksum", "", "sha256:… or sha512:… that the source must have")
	f.BoolVarP(&detach, "detach", "d", false, "do not wait for the end")
	idFlag(cmd, &req.Id)
	labelFlag(cmd, &label)
	return cmd
}

// importTemplate imports source under req.Name and shows its progress. With detach it returns nil once the
// import is known to the core.
func (a *app) importTemplate(ctx context.Context, c *client.Client, req *apiv1.ImportTemplateRequest, source string, detach bool) (*apiv1.Template, error) {
	if err := ident.CheckName("name", req.GetName()); err != nil {
		return nil, err
	}
	if isURL(source) {
		req.Url = source
	} else {
		token, err := a.handOver(ctx, c, "source", source)
		if err != nil {
			return nil, err
		}
		req.FileToken, req.FileName = token, filepath.Base(source)
	}
	stream, err := c.Templates.Import(ctx, req)
	if err != nil {
		return nil, err
	}
	if detach {
		i, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if i.GetState() == "failed" {
			return nil, importError(i)
		}
		return nil, a.imports().changed(i, "started")
	}
	return a.followImport(stream)
}

func isURL(s string) bool {
	return strings.HasPrefix(s, "http://") || strings.HasPrefix(s, "https://")
}

// importStream is what Import and WatchImport send.
type importStream interface {
	Recv() (*apiv1.Import, error)
}

// followImport shows an import until its end and gives the template.
func (a *app) followImport(stream importStream) (*apiv1.Template, error) {
	bar := a.progress()
	defer bar.Clear()
	var last *apiv1.Import
	for {
		i, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		last = i
		if s := i.GetState(); s == "done" || s == "failed" || s == "canceled" {
			continue
		}
		bar.Update(firstOf(i.GetPhase(), i.GetState()), i.GetDoneBytes(), i.GetTotalBytes())
	}
	switch {
	case last == nil:
		return nil, errs.New(errs.Internal, "the import ended without a word").Do("see mvirt import ls")
	case last.GetState() == "done" && last.GetTemplate() != nil:
		return last.GetTemplate(), nil
	}
	return nil, importError(last)
}

// importError is the error of an import that did not end well.
func importError(i *apiv1.Import) error {
	e := &errs.Error{Kind: client.Kind(i.GetFailureCode()), Resource: errs.Resource{Type: "import", ID: i.GetId(), Name: i.GetName()},
		Message: i.GetFailure(), Remedy: i.GetRemedy()}
	if i.GetState() == "canceled" {
		e.Kind = errs.Canceled
	}
	if e.Message == "" {
		e.Message = "it is " + i.GetState()
	}
	return e
}

// progress is the right kind of progress display for standard error.
func (a *app) progress() *tty.Progress {
	if a.quiet {
		return tty.NewProgress(io.Discard, 0, a.std.Now)
	}
	width := 0
	if f, ok := a.std.Err.(*os.File); ok && isTerminal(f) {
		width = tty.Width(f)
	}
	return tty.NewProgress(a.std.Err, width, a.std.Now)
}
