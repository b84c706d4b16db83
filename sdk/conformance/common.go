package conformance

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/log"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/vmm"
)

var commonChecks = []check{
	{"describe", checkDescribe},
	{"health", checkHealth},
	{"features", checkFeatures},
	{"backup", checkBackup},
	{"cancelled call", checkCancelled},
}

// lastChecks end the plugin.
var lastChecks = []check{
	{"sigterm", checkSIGTERM},
	{"shutdown", checkShutdown},
	{"lifeline", checkLifeline},
}

func checkDescribe(c *C) {
	i := c.p.Info()
	switch {
	case i.Name == "" || i.Version == "":
		c.Errorf("name %q, version %q: both must be given", i.Name, i.Version)
	case i.Kind != c.kind:
		c.Errorf("kind %q", i.Kind)
	case int(i.PID) != c.p.PID():
		c.Errorf("it says pid %d, and is %d", i.PID, c.p.PID())
	case i.StartedAt.IsZero() || time.Since(i.StartedAt) < -time.Minute:
		c.Errorf("started at %v", i.StartedAt)
	}
	hundred := map[service.Kind]service.Feature{service.KindStorage: 1, service.KindNet: 2, service.KindVMM: 3, service.KindLog: 4}[c.kind]
	seen := map[service.Feature]bool{}
	for _, f := range i.Features {
		if f/100 != hundred || seen[f] {
			c.Errorf("feature %d does not belong to kind %s, or is listed twice", f, c.kind)
		}
		seen[f] = true
	}
	for _, k := range i.Needs.Capabilities {
		if !strings.HasPrefix(k, "CAP_") {
			c.Errorf("capability %q is no CAP_ name", k)
		}
	}
	for _, d := range append(i.Needs.Devices[:len(i.Needs.Devices):len(i.Needs.Devices)], i.Needs.Programs...) {
		if d == "" {
			c.Errorf("an empty device or program among its needs")
		}
	}
}

func checkHealth(c *C) {
	ctx, cancel := context.WithTimeout(c, time.Second)
	defer cancel()
	h, err := c.p.Base.Health(ctx)
	c.ok(err, "health within a second")
	for _, k := range h.Conditions {
		if k.Code == "" || k.Text == "" || k.Severity < service.SeverityInfo || k.Severity > service.SeverityCritical || k.Since.IsZero() {
			c.Errorf("condition %+v: code, text, severity and since must be given", k)
		}
	}
}

// checkFeatures calls what belongs to each feature: undeclared it must be refused as unsupported, declared it
// must not be.
func checkFeatures(c *C) {
	u := c.p.Ungated()
	id := ident.New()
	type probe struct {
		f    service.Feature
		what string
		call func() error
	}
	var probes []probe
	add := func(f service.Feature, what string, call func() error) { probes = append(probes, probe{f, what, call}) }
	switch c.kind {
	case service.KindNet:
		add(service.FeatureNetUpdate, "UpdateNetwork", func() error {
			_, err := u.Net.UpdateNetwork(c, net.UpdateNetworkRequest{Ref: id})
			return err
		})
		add(service.FeatureNetUpdate, "UpdateNIC", func() error { _, err := u.Net.UpdateNIC(c, net.UpdateNICRequest{Ref: id}); return err })
		add(service.FeatureNetSecurity, "GetSecurityGroup", func() error { _, err := u.Net.GetSecurityGroup(c, net.Ref{Ref: id}); return err })
		add(service.FeatureNetSecurity, "ListSecurityGroups", func() error { _, err := u.Net.ListSecurityGroups(c); return err })
	case service.KindVMM:
		add(service.FeatureVMMHotplugDisk, "PlugDisk", func() error { return u.VMM.PlugDisk(c, vmm.PlugDiskRequest{ID: id}) })
		add(service.FeatureVMMHotplugNIC, "PlugNIC", func() error { return u.VMM.PlugNIC(c, vmm.PlugNICRequest{ID: id}) })
		add(service.FeatureVMMResize, "Resize", func() error { _, err := u.VMM.Resize(c, vmm.ResizeRequest{Ref: id, CPUs: 1}); return err })
		add(service.FeatureVMMSnapshot, "ListSnapshots", func() error { _, err := u.VMM.ListSnapshots(c, vmm.Ref{Ref: id}); return err })
		add(service.FeatureVMMCounters, "Counters", func() error { _, err := u.VMM.Counters(c, vmm.Ref{Ref: id}); return err })
		add(service.FeatureVMMDiskResize, "DiskResized", func() error { return u.VMM.DiskResized(c, vmm.DiskResizedRequest{ID: id}) })
	case service.KindLog:
		add(service.FeatureLogVerify, "Verify", func() error { _, err := u.Log.Verify(c, log.VerifyRequest{}); return err })
	}
	for _, p := range probes {
		err := p.call()
		has := c.has(p.f)
		switch {
		case has && errs.KindOf(err) == errs.Unsupported:
			c.Errorf("%s belongs to a declared feature and is unsupported: %v", p.what, err)
		case !has:
			c.fails(err, errs.Unsupported, "%s, whose feature is not declared", p.what)
		}
	}
}

func (c *C) has(f service.Feature) bool {
	for _, g := range c.p.Info().Features {
		if f == g {
			return true
		}
	}
	return false
}

func checkBackup(c *C) {
	u := c.p.Ungated()
	f := map[service.Kind]service.Feature{service.KindStorage: service.FeatureStorageBackup, service.KindNet: service.FeatureNetBackup,
		service.KindVMM: service.FeatureVMMBackup, service.KindLog: service.FeatureLogBackup}[c.kind]
	b := map[service.Kind]service.Backuper{service.KindStorage: u.Storage, service.KindNet: u.Net, service.KindVMM: u.VMM, service.KindLog: u.Log}[c.kind]
	if !c.has(f) {
		c.fails(b.Backup(c, io.Discard), errs.Unsupported, "Backup, which is not declared")
		c.fails(b.Restore(c, strings.NewReader("x")), errs.Unsupported, "Restore, which is not declared")
		return
	}
	var out bytes.Buffer
	c.ok(b.Backup(c, &out), "Backup")
	if err := b.Backup(c, failing{}); !errors.Is(err, errFull) {
		c.Errorf("a backup whose writer fails returned %v", err)
	}
	ctx, cancel := context.WithCancel(c)
	cancel()
	if b.Backup(ctx, io.Discard) == nil {
		c.Errorf("a cancelled backup succeeded")
	}
	if _, err := c.p.Base.Health(c); err != nil {
		c.Errorf("after the backups: %v", err)
	}
}

var errFull = errors.New("the writer is full")

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errFull }

func checkCancelled(c *C) {
	ctx, cancel := context.WithCancel(c)
	cancel()
	_, err := c.p.Base.Health(ctx)
	c.fails(err, errs.Canceled, "a call whose context has ended")
}

func checkSIGTERM(c *C) {
	c.ended = true
	if err := syscall.Kill(c.p.PID(), syscall.SIGTERM); err != nil {
		c.Skipf("this process may not signal the plugin: %v", err)
	}
	c.goneInOrder("SIGTERM")
	c.ok(c.launch(c), "starting it again")
}

func (c *C) goneInOrder(why string) {
	select {
	case <-c.p.Exited():
	case <-time.After(10 * time.Second):
		c.p.Kill()
		c.Fatalf("%s: still there after 10 s", why)
	}
	if e, _ := c.p.Exit(); e.Signal != 0 || e.Code != 0 {
		c.Errorf("%s: %s, must be exit status 0", why, e)
	}
}

func checkShutdown(c *C) {
	c.ended = true
	ctx, cancel := context.WithTimeout(c, 10*time.Second)
	defer cancel()
	began := time.Now()
	c.ok(c.p.Stop(ctx), "Shutdown within 10 s")
	if e, _ := c.p.Exit(); e.Signal != 0 || e.Code != 0 {
		c.Errorf("after Shutdown: %s (after %v), must be exit status 0", e, time.Since(began))
	}
	c.ok(c.launch(c), "starting it again")
}

func checkLifeline(c *C) {
	c.ended = true
	c.p.Abandon()
	c.goneInOrder("the host has gone")
}
