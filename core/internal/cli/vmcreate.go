package cli

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/cli/client"
	"github.com/mvirt/mvirt/core/internal/cli/units"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
)

const specHelp = `A disk is a size or options, with commas between:

  --disk 20G                            an empty one; the first with --template: the size of the root disk
  --disk template=debian-12,size=20G    a clone of a template
  --disk snapshot=db@monday             a clone of a snapshot
  --disk volume=data                    a volume that is there; with ro: read-only
  --disk 5G,name=logs                   its name in the VM
  --disk 5G,rate=50M,iops=500           at most so many bytes and operations a second

A network is a name or id, with options:

  --network lan
  --network lan,ip=10.7.0.5,mac=52:54:00:00:00:01,sg=web+ssh
  --nic NAME                            a NIC that is there`

// vmSpec is what vm create and run have in common.
type vmSpec struct {
	req                         apiv1.CreateVMRequest
	template                    string
	disks, networks, nics       []string
	memory, maxMemory           string
	userData, metaData, netConf string
	kernel, initramfs           string
	label                       []string
	topology                    string
}

func (a *app) vmFlags(cmd *cobra.Command, s *vmSpec) {
	f := cmd.Flags()
	f.StringArrayVar(&s.disks, "disk", nil, `a disk: "20G", "volume=data", …; may be repeated`)
	f.StringArrayVar(&s.networks, "network", nil, "make a NIC on this network; may be repeated")
	f.StringArrayVar(&s.nics, "nic", nil, "a NIC that is there; may be repeated")
	f.Uint32Var(&s.req.Cpus, "cpus", 1, "virtual CPUs")
	f.Uint32Var(&s.req.MaxCpus, "max-cpus", 0, "to how many it may grow while it runs")
	f.StringVar(&s.memory, "memory", "512M", "memory")
	f.StringVar(&s.maxMemory, "max-memory", "", "to how much it may grow while it runs")
	f.StringVar(&s.userData, "user-data", "", "cloud-init user data from a file (- for standard input)")
	f.StringVar(&s.metaData, "meta-data", "", "cloud-init meta data from a file")
	f.StringVar(&s.netConf, "network-config", "", "cloud-init network configuration from a file")
	f.StringVar(&s.kernel, "kernel", "", "boot this kernel directly, instead of the disk")
	f.StringVar(&s.initramfs, "initramfs", "", "with this initramfs")
	f.StringVar(&s.req.Cmdline, "cmdline", "", "kernel command line")
	f.StringVar(&s.req.Firmware, "firmware", "", "firmware to boot the disk with (default: the plugin's choice)")
	f.BoolVar(&s.req.Autostart, "autostart", false, "start it with the host")
	f.BoolVar(&s.req.Nested, "nested", false, "let it run virtual machines of its own")
	f.StringVar(&s.topology, "topology", "", "how the guest sees its CPUs: SOCKETSxCORESxTHREADS, as in 1x4x2")
	f.BoolVar(&s.req.Watchdog, "watchdog", false, "a watchdog device: a guest that hangs is reset")
	f.Uint32Var(&s.req.Vsock, "vsock", 0, "address on a virtio socket, from 3")
	f.BoolVar(&s.req.HugePages, "huge-pages", false, "memory from the host's huge pages")
	idFlag(cmd, &s.req.Id)
	labelFlag(cmd, &s.label)
	a.networks().completeFlag(cmd, "network")
	a.nics().completeFlag(cmd, "nic")
	for _, name := range []string{"user-data", "meta-data", "network-config", "kernel", "initramfs"} {
		must(cmd.MarkFlagFilename(name))
	}
}

// request checks the flags and makes the request. Files are opened last, just before the call.
func (a *app) vmRequest(ctx context.Context, c *client.Client, cmd *cobra.Command, s *vmSpec) (*apiv1.CreateVMRequest, error) {
	r := &s.req
	if err := ident.CheckName("name", r.GetName()); err != nil {
		return nil, err
	}
	if r.Cpus == 0 {
		return nil, errs.Field("cpus", "give at least 1", "a VM with 0 CPUs cannot run")
	}
	var err error
	if r.MemoryBytes, err = units.ParseSize("memory_bytes", s.memory); err != nil {
		return nil, err
	}
	if r.MemoryBytes == 0 {
		return nil, errs.Field("memory_bytes", `give some, as in "512M"`, "a VM with no memory cannot run")
	}
	if s.maxMemory != "" {
		if r.MaxMemoryBytes, err = units.ParseSize("max_memory_bytes", s.maxMemory); err != nil {
			return nil, err
		}
	}
	if r.Topology, err = parseTopology(s.topology); err != nil {
		return nil, err
	}
	if r.Labels, err = labels(s.label); err != nil {
		return nil, err
	}
	if r.Disks, err = diskList(s.template, s.disks); err != nil {
		return nil, err
	}
	for _, text := range s.networks {
		i, err := parseNetwork(text)
		if err != nil {
			return nil, err
		}
		r.Nics = append(r.Nics, i)
	}
	for _, ref := range s.nics {
		r.Nics = append(r.Nics, &apiv1.NewNIC{Nic: ref})
	}
	if r.CloudInit, err = a.cloudInit(s.userData, s.metaData, s.netConf); err != nil {
		return nil, err
	}
	if s.kernel == "" && (s.initramfs != "" || r.Cmdline != "") {
		return nil, errs.Field("kernel", "give --kernel too, or leave the others out", "--initramfs and --cmdline need a kernel")
	}
	if s.kernel != "" {
		r.KernelName = filepath.Base(s.kernel)
		if r.KernelToken, err = a.handOver(ctx, c, "kernel", s.kernel); err != nil {
			return nil, err
		}
	}
	if s.initramfs != "" {
		if r.InitramfsToken, err = a.handOver(ctx, c, "initramfs", s.initramfs); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// parseTopology reads "1x4x2".
func parseTopology(s string) (*apiv1.VMTopology, error) {
	if s == "" {
		return nil, nil
	}
	var t apiv1.VMTopology
	if n, err := fmt.Sscanf(s+"\n", "%dx%dx%d\n", &t.Sockets, &t.Cores, &t.Threads); n != 3 || err != nil {
		return nil, usage{errs.Field("topology", "give SOCKETSxCORESxTHREADS, as in 1x4x2", "%s is no topology", ident.Quote(s))}
	}
	return &t, nil
}

func (a *app) cloudInit(user, meta, network string) (*apiv1.CloudInit, error) {
	if user == "" && meta == "" && network == "" {
		return nil, nil
	}
	var c apiv1.CloudInit
	var err error
	if c.UserData, err = a.readText("user_data", user); err != nil {
		return nil, err
	}
	if c.MetaData, err = a.readText("meta_data", meta); err != nil {
		return nil, err
	}
	if c.NetworkConfig, err = a.readText("network_config", network); err != nil {
		return nil, err
	}
	return &c, nil
}

// diskList joins --template and --disk: the first disk that is only a size is the root disk's size.
func diskList(template string, specs []string) ([]*apiv1.NewDisk, error) {
	var out []*apiv1.NewDisk
	if template != "" {
		out = append(out, &apiv1.NewDisk{Template: template})
	}
	for i, text := range specs {
		d, err := parseDisk(text)
		if err != nil {
			return nil, err
		}
		if i == 0 && template != "" && d.Template == "" && d.Volume == "" && d.Snapshot == "" && d.Name == "" {
			out[0].SizeBytes, out[0].ReadOnly = d.SizeBytes, d.ReadOnly
			continue
		}
		out = append(out, d)
	}
	return out, nil
}

// parseDisk reads a disk as specHelp describes it.
func parseDisk(text string) (*apiv1.NewDisk, error) {
	words := strings.Split(text, ",")
	for i, w := range words {
		if w == "ro" && i > 0 {
			words[i] = "ro=yes" // may stand without a value
		}
	}
	first, o, err := options("disk", strings.Join(words, ","), "size", "template", "snapshot", "volume", "name", "ro", "rate", "iops")
	if err != nil {
		return nil, err
	}
	d := &apiv1.NewDisk{Name: o["name"], Template: o["template"], Volume: o["volume"], Snapshot: o["snapshot"]}
	if o["rate"] != "" {
		if d.BytesPerSecond, err = units.ParseSize("bytes_per_second", o["rate"]); err != nil {
			return nil, err
		}
	}
	if o["iops"] != "" {
		if d.OpsPerSecond, err = strconv.ParseUint(o["iops"], 10, 64); err != nil {
			return nil, errs.Field("ops_per_second", "give a number, as in iops=500", "disk %s: iops is no number", ident.Quote(text))
		}
	}
	switch o["ro"] {
	case "", "no":
	case "yes":
		d.ReadOnly = true
	default:
		return nil, errs.Field("disk", "give ro=yes or ro=no", "disk %s: ro is neither yes nor no", ident.Quote(text))
	}
	size := firstOf(first, o["size"])
	if first != "" && o["size"] != "" {
		return nil, errs.Field("disk", "give the size once", "disk %s has two sizes", ident.Quote(text))
	}
	sources := 0
	for _, s := range []string{d.Template, d.Volume, d.Snapshot} {
		if s != "" {
			sources++
		}
	}
	switch {
	case sources > 1:
		return nil, errs.Field("disk", "give one of template, snapshot and volume", "disk %s has %d sources", ident.Quote(text), sources)
	case sources == 0 && size == "":
		return nil, errs.Field("disk", `give a size, as in "20G", or template=, snapshot= or volume=`, "disk %s has no size", ident.Quote(text))
	case d.Volume != "" && size != "":
		return nil, errs.Field("disk", "use mvirt volume resize", "disk %s: a volume that is there has its size already", ident.Quote(text))
	}
	if size != "" {
		if d.SizeBytes, err = units.ParseSize("disk", size); err != nil {
			return nil, err
		}
		if d.SizeBytes == 0 {
			return nil, errs.Field("disk", `give a size, as in "20G"`, "disk %s has the size 0", ident.Quote(text))
		}
	}
	return d, nil
}

// parseNetwork reads a network as specHelp describes it.
func parseNetwork(text string) (*apiv1.NewNIC, error) {
	name, o, err := options("network", text, "name", "ip", "ip6", "mac", "sg")
	if err != nil {
		return nil, err
	}
	i := &apiv1.NewNIC{Network: firstOf(name, o["name"]), Ipv4: o["ip"], Ipv6: o["ip6"], Mac: o["mac"]}
	if i.Network == "" {
		return nil, errs.Field("network", "give its name first", "%s names no network", ident.Quote(text))
	}
	if o["sg"] != "" {
		i.SecurityGroups = strings.Split(o["sg"], "+")
	}
	return i, nil
}

func (a *app) vmCreateCommand() *cobra.Command {
	var s vmSpec
	cmd := &cobra.Command{Use: "create NAME", Short: "Make a VM with its disks and NICs", Args: cobra.ExactArgs(1),
		Long: "Makes a VM with its disks and NICs, and with --start starts it. It is made as a whole or not at all.\n\n" + specHelp,
		Example: "  mvirt vm create web --template debian-12 --disk 20G --cpus 2 --memory 1G --network lan --user-data web.yaml --start\n" +
			"  mvirt vm create probe --kernel vmlinuz --initramfs initrd.img --cmdline console=ttyS0",
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			s.req.Name = args[0]
			r, err := a.vmRequest(cmd.Context(), c, cmd, &s)
			if err != nil {
				return err
			}
			v, err := c.VMs.Create(cmd.Context(), r)
			if err != nil {
				return err
			}
			verb := "created"
			switch {
			case r.Async:
				verb = "is being made: operation " + v.GetOperation()
			case r.Start:
				verb = "created and started"
			}
			if list := vmAddresses(v); len(list) > 0 && !r.Async {
				verb += " (" + strings.Join(list, ", ") + ")"
			}
			return a.vms().changed(v, verb)
		})}
	a.vmFlags(cmd, &s)
	f := cmd.Flags()
	f.StringVar(&s.template, "template", "", "clone this template as the root disk")
	f.BoolVar(&s.req.Start, "start", false, "and start it")
	f.BoolVar(&s.req.Async, "async", false, "return once the work is in the journal")
	a.templates().completeFlag(cmd, "template")
	return cmd
}

func (a *app) vmUpdateCommand() *cobra.Command {
	var name, memory, cmdline, kernel, initramfs, user, meta, network string
	var cpus uint32
	var autostart bool
	cmd := &cobra.Command{Use: "update VM", Aliases: []string{"set"}, Short: "Change a VM; what cannot change while it runs waits for its next start", Args: cobra.ExactArgs(1),
		ValidArgsFunction: a.vms().complete(1),
		RunE: a.withClient(func(c *client.Client, cmd *cobra.Command, args []string) error {
			if cmd.Flags().NFlag() == 0 {
				return nothingToChange(cmd)
			}
			req := &apiv1.UpdateVMRequest{Ref: args[0]}
			set := cmd.Flags().Changed
			if set("name") {
				req.Name = &name
			}
			if set("cpus") {
				if cpus == 0 {
					return errs.Field("cpus", "give at least 1", "a VM with 0 CPUs cannot run")
				}
				req.Cpus = &cpus
			}
			if set("memory") {
				n, err := units.ParseSize("memory_bytes", memory)
				if err != nil {
					return err
				}
				req.MemoryBytes = &n
			}
			if set("autostart") {
				req.Autostart = &autostart
			}
			if set("cmdline") {
				req.Cmdline = &cmdline
			}
			var err error
			if req.CloudInit, err = a.cloudInit(user, meta, network); err != nil {
				return err
			}
			if kernel != "" {
				req.KernelName = filepath.Base(kernel)
				if req.KernelToken, err = a.handOver(cmd.Context(), c, "kernel", kernel); err != nil {
					return err
				}
			}
			if initramfs != "" {
				if req.InitramfsToken, err = a.handOver(cmd.Context(), c, "initramfs", initramfs); err != nil {
					return err
				}
			}
			v, err := c.VMs.Update(cmd.Context(), req)
			if err != nil {
				return err
			}
			verb := "updated"
			if v.GetPending() {
				verb = fmt.Sprintf("updated; it takes effect at the next start (it is %s)", v.GetState())
			}
			return a.vms().changed(v, verb)
		})}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "new name")
	f.Uint32Var(&cpus, "cpus", 0, "virtual CPUs")
	f.StringVar(&memory, "memory", "", "memory")
	f.BoolVar(&autostart, "autostart", false, "whether it starts with the host")
	f.StringVar(&cmdline, "cmdline", "", "kernel command line")
	f.StringVar(&kernel, "kernel", "", "boot this kernel")
	f.StringVar(&initramfs, "initramfs", "", "with this initramfs")
	f.StringVar(&user, "user-data", "", "cloud-init user data from a file")
	f.StringVar(&meta, "meta-data", "", "cloud-init meta data from a file")
	f.StringVar(&network, "network-config", "", "cloud-init network configuration from a file")
	for _, name := range []string{"user-data", "meta-data", "network-config", "kernel", "initramfs"} {
		must(cmd.MarkFlagFilename(name))
	}
	return cmd
}
