package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
)

func (a *app) snapshots() *noun[*apiv1.Snapshot] {
	n := newNoun[*apiv1.Snapshot](a, "snapshot")
	n.label = func(s *apiv1.Snapshot) string { return firstOf(s.GetVolumeName(), s.GetVolumeId()) + "@" + s.GetName() }
	n.columns = []render.Column[*apiv1.Snapshot]{
		{Head: "SNAPSHOT", Cell: n.label},
		{Head: "SIZE", Right: true, Cell: func(s *apiv1.Snapshot) string { return units.Size(s.GetSizeBytes()) }},
		{Head: "USED", Right: true, Cell: func(s *apiv1.Snapshot) string { return units.Size(s.GetUsedBytes()) }},
		{Head: "AGE", Right: true, Cell: func(s *apiv1.Snapshot) string { return a.age(s.GetCreatedAt()) }},
		{Head: "LABELS", Wide: true, Cell: func(s *apiv1.Snapshot) string { return labelText(s.GetLabels()) }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.detail = func(s *apiv1.Snapshot) []render.Pair {
		return []render.Pair{
			{Key: "Name", Value: s.GetName()}, {Key: "Id", Value: s.GetId()},
			{Key: "Volume", Value: strings.TrimSpace(s.GetVolumeName() + " " + s.GetVolumeId())},
			{Key: "Size", Value: units.Size(s.GetSizeBytes())}, {Key: "Used on disk", Value: units.Size(s.GetUsedBytes())},
			{Key: "Labels", Value: labelText(s.GetLabels())}, {Key: "Created", Value: a.when(s.GetCreatedAt())},
		}
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.Snapshot, error) {
		r, err := c.Snapshots.List(ctx, &apiv1.ListSnapshotsRequest{})
		return r.GetSnapshots(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.Snapshot, error) {
		return c.Snapshots.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

func (a *app) snapshotCommand() *cobra.Command {
	n := a.snapshots()
	cmd := &cobra.Command{Use: "snapshot", Aliases: []string{"snapshots", "snap"}, Short: "Snapshots of volumes, named volume@snapshot"}
	ls := &cobra.Command{Use: "ls [VOLUME]", Aliases: []string{"list"}, Short: "List snapshots, all or a volume's", Args: cobra.MaximumNArgs(1),
		ValidArgsFunction: a.volumes().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var req apiv1.ListSnapshotsRequest
			if len(args) == 1 {
				req.Volume = args[0]
			}
			r, err := c.Snapshots.List(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return n.print(r.GetSnapshots())
		})}
	cmd.AddCommand(a.snapshotCreateCommand(), ls, n.showCommand(), a.rollbackCommand(),
		n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
			return c.Snapshots.Delete(ctx, r)
		}, nil))
	return cmd
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var req apiv1.CreateSnapshotRequest
	var label []string
	cmd := &cobra.Command{Use: "create VOLUME NAME", Short: "Take a snapshot of a volume", Long: "Takes a snapshot of a volume: VOLUME NAME, or VOLUME@NAME as one word.",
		Args: cobra.RangeArgs(1, 2), ValidArgsFunction: a.volumes().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			var err error
			if req.Volume, req.Name, err = volumeAt(args); err != nil {
				return err
			}
			if req.Labels, err = labels(label); err != nil {
				return err
			}
			s, err := c.Snapshots.Create(cmd.Context(), &req)
			if err != nil {
				return err
			}
			return a.snapshots().changed(s, "taken")
		})}
	idFlag(cmd, &req.Id)
	labelFlag(cmd, &label)
	return cmd
}

// volumeAt reads "volume snapshot" or "volume@snapshot".
func volumeAt(args []string) (volume, snapshot string, err error) {
	if len(args) == 2 {
		return args[0], args[1], nil
	}
	volume, snapshot, ok := strings.Cut(args[0], "@")
	if !ok || volume == "" || snapshot == "" {
		return "", "", usage{errs.Field("name", "give the volume and a name: VOLUME NAME, or VOLUME@NAME", "the snapshot has no name")}
	}
	return volume, snapshot, nil
}

func (a *app) rollbackCommand() *cobra.Command {
	var req apiv1.RollbackRequest
	cmd := &cobra.Command{Use: "rollback VOLUME@SNAPSHOT", Short: "Make a volume what it was at a snapshot; its VM must be stopped", Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: a.snapshots().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			req.Ref = strings.Join(args, "@")
			v, err := c.Snapshots.Rollback(cmd.Context(), &req)
			if err != nil {
				return err
			}
			if req.DryRun {
				if a.structured() {
					return a.volumes().changed(v, "")
				}
				a.printf("would roll volume %s back to %s\n", render.Clean(a.volumes().label(v)), req.Ref)
				return nil
			}
			return a.volumes().changed(v, "rolled back to "+req.Ref)
		})}
	cmd.Flags().BoolVar(&req.DestroyNewer, "destroy-newer", false, "also remove the snapshots that are newer")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "only say whether it would work")
	return cmd
}
