package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/render"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
)

func (a *app) volumes() *noun[*apiv1.Volume] {
	n := newNoun[*apiv1.Volume](a, "volume")
	n.columns = []render.Column[*apiv1.Volume]{
		{Head: "NAME", Cell: n.label},
		{Head: "SIZE", Right: true, Cell: func(v *apiv1.Volume) string { return units.Size(v.GetSizeBytes()) }},
		{Head: "USED", Right: true, Cell: func(v *apiv1.Volume) string { return units.Size(v.GetAllocatedBytes()) }},
		{Head: "VM", Cell: func(v *apiv1.Volume) string { return strings.Join(users(v, false), ",") }},
		{Head: "SNAPSHOTS", Right: true, Cell: func(v *apiv1.Volume) string { return fmt.Sprint(v.GetSnapshotCount()) }},
		{Head: "STATE", Cell: func(v *apiv1.Volume) string { return state(v.GetState(), v.GetStateReason()) },
			Color: func(v *apiv1.Volume) render.Color { return render.State(v.GetState()) }},
		{Head: "AGE", Right: true, Cell: func(v *apiv1.Volume) string { return a.age(v.GetCreatedAt()) }},
		{Head: "ORIGIN", Wide: true, Cell: func(v *apiv1.Volume) string { return strings.TrimSpace(v.GetOriginType() + " " + v.GetOriginId()) }},
		{Head: "LABELS", Wide: true, Cell: func(v *apiv1.Volume) string { return labelText(v.GetLabels()) }},
		{Head: "ID", Wide: true, Cell: n.id},
	}
	n.detail = func(v *apiv1.Volume) []render.Pair {
		return []render.Pair{
			{Key: "Name", Value: v.GetName()}, {Key: "Id", Value: v.GetId()},
			{Key: "State", Value: state(v.GetState(), v.GetStateReason()), Color: render.State(v.GetState())},
			{Key: "Size", Value: units.Size(v.GetSizeBytes())}, {Key: "Used on disk", Value: units.Size(v.GetAllocatedBytes())},
			{Key: "Block size", Value: units.Size(uint64(v.GetBlockSize()))},
			{Key: "Origin", Value: strings.TrimSpace(v.GetOriginType() + " " + v.GetOriginId())},
			{Key: "Used by", Value: strings.Join(users(v, true), "\n")}, {Key: "Snapshots", Value: fmt.Sprint(v.GetSnapshotCount())},
			{Key: "Labels", Value: labelText(v.GetLabels())}, {Key: "Created", Value: a.when(v.GetCreatedAt())},
		}
	}
	n.list = func(ctx context.Context, c *client.Client) ([]*apiv1.Volume, error) {
		r, err := c.Volumes.List(ctx, &apiv1.ListVolumesRequest{})
		return r.GetVolumes(), err
	}
	n.get = func(ctx context.Context, c *client.Client, ref string) (*apiv1.Volume, error) {
		return c.Volumes.Get(ctx, &apiv1.RefRequest{Ref: ref})
	}
	return n
}

// users lists who uses a volume.
func users(v *apiv1.Volume, full bool) []string {
	var out []string
	for _, u := range v.GetUsers() {
		s := firstOf(u.GetVmName(), u.GetVmId())
		if full {
			s = "vm " + s
			if u.GetReadOnly() {
				s += ", read-only"
			}
			if u.GetAttached() {
				s += ", open now"
			}
			if u.GetPath() != "" {
				s += ", " + u.GetPath()
			}
		}
		out = append(out, s)
	}
	return out
}

func (a *app) volumeCommand() *cobra.Command {
	n := a.volumes()
	cmd := &cobra.Command{Use: "volume", Aliases: []string{"volumes", "vol", "disk"}, Short: "Disks"}
	resize := &cobra.Command{Use: "resize VOLUME SIZE", Short: "Grow a volume; a VM that runs on it is told", Args: cobra.ExactArgs(2), ValidArgsFunction: n.complete(1),
		Long: "Grows a volume to SIZE, or by it where it begins with +. A volume cannot shrink.",
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			more := strings.HasPrefix(args[1], "+")
			size, err := units.ParseSize("size_bytes", strings.TrimPrefix(args[1], "+"))
			if err != nil {
				return err
			}
			if more {
				v, err := n.get(cmd.Context(), c, args[0])
				if err != nil {
					return err
				}
				size += v.GetSizeBytes()
			}
			v, err := c.Volumes.Resize(cmd.Context(), &apiv1.ResizeVolumeRequest{Ref: args[0], SizeBytes: size})
			if err != nil {
				return err
			}
			return n.changed(v, "is now "+units.Size(v.GetSizeBytes()))
		})}
	snapshot := a.snapshotCreateCommand()
	snapshot.Use = "snapshot VOLUME NAME"
	cmd.AddCommand(a.volumeCreateCommand(), n.lsCommand(), n.showCommand(), resize, snapshot, a.rollbackCommand(), a.cloneCommand(),
		n.renameCommand(func(ctx context.Context, c *client.Client, r *apiv1.RenameRequest) (*apiv1.Volume, error) {
			return c.Volumes.Rename(ctx, r)
		}),
		n.rmCommand(func(ctx context.Context, c *client.Client, r *apiv1.DeleteRequest) (*apiv1.DeleteResponse, error) {
			return c.Volumes.Delete(ctx, r)
		}, func(cmd *cobra.Command, r *apiv1.DeleteRequest) {
			cmd.Flags().BoolVarP(&r.Recursive, "recursive", "r", false, "with its snapshots")
		}))
	return cmd
}

// volumeFlags are those of create and clone.
func (a *app) volumeFlags(cmd *cobra.Command, req *apiv1.CreateVolumeRequest) func() error {
	var size, block string
	var label []string
	f := cmd.Flags()
	f.StringVar(&size, "size", "", `size: "10G"; of a clone: to grow it`)
	f.StringVar(&block, "block-size", "", "block size, a power of two (default: the plugin's choice)")
	idFlag(cmd, &req.Id)
	labelFlag(cmd, &label)
	return func() (err error) {
		if size != "" {
			if req.SizeBytes, err = units.ParseSize("size_bytes", size); err != nil {
				return err
			}
			if req.SizeBytes == 0 {
				return errs.Field("size_bytes", `give a size, as in "10G"`, "the size is 0")
			}
		}
		if block != "" {
			n, err := units.ParseSize("block_size", block)
			if err != nil {
				return err
			}
			if n > 1<<30 {
				return errs.Field("block_size", "leave it out, or give 4K to 1M", "the block size %s is too large", block)
			}
			req.BlockSize = uint32(n)
		}
		req.Labels, err = labels(label)
		return err
	}
}

func (a *app) createVolume(cmd *cobra.Command, c *client.Client, req *apiv1.CreateVolumeRequest) error {
	v, err := c.Volumes.Create(cmd.Context(), req)
	if err != nil {
		return err
	}
	return a.volumes().changed(v, "created ("+units.Size(v.GetSizeBytes())+")")
}

func (a *app) volumeCreateCommand() *cobra.Command {
	var req apiv1.CreateVolumeRequest
	cmd := &cobra.Command{Use: "create NAME [SIZE]", Short: "Make a volume: empty, or a clone of a template, snapshot or volume", Args: cobra.RangeArgs(1, 2),
		Example: "  mvirt volume create data 20G\n  mvirt volume create web-root --template debian-12 --size 20G"}
	finish := a.volumeFlags(cmd, &req)
	cmd.RunE = a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
		req.Name = args[0]
		if len(args) == 2 {
			if cmd.Flags().Changed("size") {
				return usage{errs.Field("size_bytes", "give it once", "the size is given twice")}
			}
			must(cmd.Flags().Set("size", args[1]))
		}
		if err := finish(); err != nil {
			return err
		}
		if req.SizeBytes == 0 && req.Template == "" && req.Snapshot == "" && req.Volume == "" {
			return usage{errs.Field("size_bytes", `give a size, as in "mvirt volume create data 10G", or --template, --snapshot or --volume`, "an empty volume needs a size")}
		}
		return a.createVolume(cmd, c, &req)
	})
	f := cmd.Flags()
	f.StringVar(&req.Template, "template", "", "template to clone")
	f.StringVar(&req.Snapshot, "snapshot", "", "snapshot to clone, by id or as volume@snapshot")
	f.StringVar(&req.Volume, "volume", "", "volume to clone as it is now")
	cmd.MarkFlagsMutuallyExclusive("template", "snapshot", "volume")
	a.templates().completeFlag(cmd, "template")
	a.snapshots().completeFlag(cmd, "snapshot")
	a.volumes().completeFlag(cmd, "volume")
	return cmd
}

func (a *app) cloneCommand() *cobra.Command {
	var req apiv1.CreateVolumeRequest
	cmd := &cobra.Command{Use: "clone VOLUME[@SNAPSHOT] NAME", Short: "Make a volume with the contents of another, or of a snapshot", Args: cobra.ExactArgs(2),
		ValidArgsFunction: a.volumes().complete(1)}
	finish := a.volumeFlags(cmd, &req)
	cmd.RunE = a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
		if strings.Contains(args[0], "@") {
			req.Snapshot = args[0]
		} else {
			req.Volume = args[0]
		}
		req.Name = args[1]
		if err := finish(); err != nil {
			return err
		}
		return a.createVolume(cmd, c, &req)
	})
	return cmd
}
