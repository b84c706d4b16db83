package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/test/system"
)

// verify looks at everything at the end.
func (c *chaos) verify(ctx context.Context) error {
	c.say("faults are over; looking at what is there")
	c.work.finish()
	c.wrong = append(c.wrong, c.work.wrong...)
	if _, err := c.managed(ctx, time.Now(), time.Minute); err != nil {
		return err
	}
	if err := c.settled(ctx); err != nil {
		return err
	}
	var have []*object
	for _, r := range c.work.runners {
		have = append(have, r.have...)
	}
	if err := c.compare(ctx, have); err != nil {
		return err
	}
	c.checkGuests(ctx)
	if err := c.checkAudit(ctx); err != nil {
		return err
	}
	return c.removeAll(ctx)
}

// settled waits until no operation is under way.
func (c *chaos) settled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		out, err := c.sys.sys.CLI(ctx, "operation", "ls", "-o", "json")
		if err == nil && strings.TrimSpace(out) == "[]" {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("operations do not end: %s %v", out, err)
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// compare compares what is there with what was acknowledged, both ways.
func (c *chaos) compare(ctx context.Context, want []*object) error {
	conn := c.work.conn
	got := map[string]*object{} // by id
	add := func(kind, id, name, on string, size uint64) { got[id] = &object{kind, id, name, size, on} }
	vms, err := apiv1.NewVMsClient(conn).List(ctx, &apiv1.ListVMsRequest{})
	if err != nil {
		return err
	}
	owned := map[string]bool{} // volumes and NICs that belong to VMs
	plugged := map[string]string{}
	for _, v := range vms.Vms {
		guest := slices.ContainsFunc(c.vms, func(g *guestVM) bool { return g.id == v.Id })
		if !guest {
			add("vm", v.Id, v.Name, "", 0)
			if len(v.Disks) != 1 || len(v.Nics) != 1 {
				c.fault("VM %s has %d disks and %d NICs, not one of each", v.Name, len(v.Disks), len(v.Nics))
			}
		}
		for i, d := range v.Disks {
			if guest && i > 0 {
				plugged[d.VolumeId] = v.Id
				continue
			}
			owned[d.VolumeId] = true
		}
		for _, n := range v.Nics {
			owned[n.NicId] = true
		}
	}
	vols, err := apiv1.NewVolumesClient(conn).List(ctx, &apiv1.ListVolumesRequest{})
	if err != nil {
		return err
	}
	for _, v := range vols.Volumes {
		if owned[v.Id] {
			delete(owned, v.Id)
			continue
		}
		add("volume", v.Id, v.Name, plugged[v.Id], v.SizeBytes)
		snaps, err := apiv1.NewSnapshotsClient(conn).List(ctx, &apiv1.ListSnapshotsRequest{Volume: v.Id})
		if err != nil {
			return err
		}
		for _, s := range snaps.Snapshots {
			add("snapshot", s.Id, s.Name, v.Id, 0)
		}
	}
	nics, err := apiv1.NewNICsClient(conn).List(ctx, &apiv1.ListNICsRequest{})
	if err != nil {
		return err
	}
	for _, n := range nics.Nics {
		if owned[n.Id] {
			delete(owned, n.Id)
			continue
		}
		add("nic", n.Id, n.Name, n.NetworkId, 0)
	}
	for id := range owned {
		c.fault("lost: %s belongs to a VM and is not there", id)
	}
	nets, err := apiv1.NewNetworksClient(conn).List(ctx, &apiv1.ListNetworksRequest{})
	if err != nil {
		return err
	}
	for _, n := range nets.Networks {
		if n.Name != "lan" {
			add("network", n.Id, n.Name, "", 0)
		}
	}
	groups, err := apiv1.NewSecurityGroupsClient(conn).List(ctx, &apiv1.ListSecurityGroupsRequest{})
	if err != nil {
		return err
	}
	for _, g := range groups.SecurityGroups {
		if strings.HasPrefix(g.Name, "c") {
			add("group", g.Id, g.Name, "", 0)
		}
	}
	tpls, err := apiv1.NewTemplatesClient(conn).List(ctx, &apiv1.ListTemplatesRequest{})
	if err != nil {
		return err
	}
	for _, t := range tpls.Templates {
		if t.Name != "busybox" {
			add("template", t.Id, t.Name, "", t.SizeBytes)
		}
	}
	for _, w := range want {
		g := got[w.id]
		delete(got, w.id)
		switch {
		case g == nil:
			c.fault("lost acknowledged change: %s %s (%s) is not there", w.kind, w.name, w.id)
		case *g != *w:
			c.fault("lost acknowledged change: %s is %+v, acknowledged was %+v", w.kind, *g, *w)
		}
	}
	for _, g := range got {
		c.fault("left behind: %s %s (%s) was never acknowledged, or acknowledged as removed", g.kind, g.name, g.id)
	}
	c.say("%d objects are there as acknowledged", len(want))
	return nil
}

// checkAudit looks for each acknowledged change in the audit trail, and for entries that are there twice.
func (c *chaos) checkAudit(ctx context.Context) error {
	// What is spooled is delivered within a moment of the log plugin's being there.
	for end := time.Now().Add(time.Minute); ; pause(ctx, 50*time.Millisecond) {
		st, err := apiv1.NewLogsClient(c.work.conn).Stats(ctx, &apiv1.LogStatsRequest{})
		if err == nil && st.Spooled == 0 {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("audit entries stay in the spool: %v %v", st, err)
		}
	}
	type key struct{ op, object string }
	entries := map[key]int{}
	ids := map[string]int{}
	total, page := 0, ""
	for {
		q, err := apiv1.NewLogsClient(c.work.conn).Query(ctx, &apiv1.QueryLogsRequest{Levels: []string{"audit"}, Limit: 500, PageToken: page})
		if err != nil {
			return err
		}
		next := ""
		for {
			m, err := q.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			if m.PageToken != "" {
				next = m.PageToken
			}
			e := m.Entry
			if e == nil {
				continue
			}
			total++
			ids[e.Id]++
			if e.Labels["outcome"] == "ok" {
				for _, o := range e.Objects {
					entries[key{e.Labels["op"], o}]++
				}
			}
		}
		if next == "" || next == page {
			break
		}
		page = next
	}
	for id, n := range ids {
		if n > 1 {
			c.fault("duplicate audit entry: %s is there %d times", id, n)
		}
	}
	acked := map[key]int{}
	tries := map[key]int{}
	for _, a := range c.work.acks {
		acked[key{a.op, a.object}]++
		tries[key{a.op, a.object}] += a.tries
	}
	for k, n := range acked {
		switch got := entries[k]; {
		case got == 0:
			c.fault("audit entry missing: %s of %s was acknowledged %d times", k.op, k.object, n)
		case got > tries[k]:
			c.fault("duplicate audit entry: %s of %s stands %d times, asked for %d times", k.op, k.object, got, tries[k])
		}
	}
	if out, err := c.sys.sys.CLI(ctx, "logs", "verify"); err != nil {
		c.fault("mvirt logs verify: %s %v", out, err)
	}
	c.say("%d audit entries for %d acknowledged changes", total, len(c.work.acks))
	return nil
}

// removeAll removes everything through the API, stops, and looks for what is left.
func (c *chaos) removeAll(ctx context.Context) error {
	c.work.wrong = nil
	for _, r := range c.work.runners {
		for i := len(r.have); len(r.have) > 0 && i > 0; i-- {
			r.remove(r.have[len(r.have)-1])
		}
	}
	for _, g := range c.vms {
		if _, err := c.sys.sys.CLI(ctx, "vm", "rm", "--force", g.name); err != nil {
			return err
		}
	}
	for _, args := range [][]string{{"template", "rm", "busybox"}, {"network", "rm", "lan"}} {
		if _, err := c.sys.sys.CLI(ctx, args...); err != nil {
			return err
		}
	}
	c.wrong = append(c.wrong, c.work.wrong...)
	for _, noun := range []string{"vm", "volume", "template", "network", "nic"} {
		if out, err := c.sys.sys.CLI(ctx, noun, "ls", "-o", "name"); err != nil || strings.TrimSpace(out) != "" {
			c.fault("left behind: mvirt %s ls: %s %v", noun, out, err)
		}
	}
	c.files("storage", ".img", ".raw", ".tmp", ".part", ".qcow2")
	if err := c.sys.stop(ctx); err != nil {
		c.fault("mvirtd: %v", err)
	}
	left, err := system.Owned(ctx, c.place())
	if err != nil {
		return err
	}
	left.Files = nil // other systems on this machine have files of the same users
	for _, l := range left.List() {
		c.fault("left behind: %s", l)
	}
	for _, dir := range []string{filepath.Join(c.place().Run, "p"), filepath.Join(c.place().Run, "net")} {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				c.fault("left behind: %s", path)
			}
			return nil
		})
	}
	c.files("vmm", ".sock", ".iso", ".tmp")
	return nil
}

// files looks for files of these kinds in a plugin's data directory, which must not be there any more.
func (c *chaos) files(kind string, suffixes ...string) {
	_ = filepath.WalkDir(filepath.Join(c.place().Dir, kind), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && slices.ContainsFunc(suffixes, func(s string) bool { return strings.HasSuffix(path, s) }) {
			c.fault("left behind: %s", path)
		}
		return nil
	})
}

// report prints the figures.
func (c *chaos) report() {
	fmt.Printf("\nseed %d, %d faults in %.0f s\n", c.seed, len(c.again), time.Since(c.begin).Seconds())
	names := make([]string, 0, len(c.kinds))
	for k := range c.kinds {
		names = append(names, k)
	}
	sort.Strings(names)
	for _, k := range names {
		fmt.Printf("  %-24s %d\n", k, c.kinds[k])
	}
	if c.work != nil {
		c.work.mu.Lock()
		fmt.Printf("changes acknowledged %d, requests sent %d, sent again %d, slowest change %v\n", len(c.work.acks), c.work.sent, c.work.again, c.work.slow.Round(time.Millisecond))
		c.work.mu.Unlock()
	}
	if c.sys != nil {
		fmt.Printf("mvirtd started again %d times by the keeper\n", c.sys.starts)
	}
	quantile := func(list []time.Duration, q float64) float64 {
		if len(list) == 0 {
			return 0
		}
		s := slices.Sorted(slices.Values(list))
		return ms(s[min(len(s)-1, int(q*float64(len(s))))])
	}
	for _, l := range []struct {
		what string
		list []time.Duration
	}{{"managed again after the fault", c.again}, {"managed again after the last process was up", c.ready}} {
		fmt.Printf("%-44s median %6.0f ms, 95 %% %6.0f ms, worst %6.0f ms\n", l.what, quantile(l.list, 0.5), quantile(l.list, 0.95), quantile(l.list, 1))
	}
	count := func(prefixes ...string) (n int) {
		for _, w := range c.wrong {
			if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(w, p) }) {
				n++
			}
		}
		return n
	}
	fmt.Printf("guest exits %d, lost acknowledged changes %d, left behind %d, audit entries missing %d, duplicate %d, all that is wrong %d\n",
		count("guest exit"), count("lost"), count("left behind"), count("audit entry missing"), count("duplicate"), len(c.wrong))
}
