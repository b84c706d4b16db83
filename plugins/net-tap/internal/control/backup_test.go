package control

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
)

func TestBackupAndRestore(t *testing.T) {
	r := newRig(t)
	r.network(nat("lan"))
	a, b := ident.New(), ident.New()
	for _, id := range []string{a, b} {
		if _, err := r.CreateSecurityGroup(ctx, net.CreateSecurityGroupRequest{ID: id, Name: "g" + id[30:]}); err != nil {
			t.Fatal(err)
		}
	}
	for id, other := range map[string]string{a: b, b: a} { // each names the other
		if _, err := r.SetSecurityGroupRules(ctx, net.SetSecurityGroupRulesRequest{Ref: id, Rules: []net.Rule{{Direction: net.Inbound, Protocol: "tcp", PortFrom: 22, GroupID: other}}}); err != nil {
			t.Fatal(err)
		}
	}
	nic := r.nic("lan", func(q *net.CreateNICRequest) {
		q.SecurityGroups = []string{a}
		q.RoutedPrefixes = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/28")}
	})
	if _, err := r.UpdateNetwork(ctx, net.UpdateNetworkRequest{Ref: "lan", SetDNS: true, DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")}}); err != nil {
		t.Fatal(err)
	}
	other := r.nic("lan")
	if n, err := r.UpdateNIC(ctx, net.UpdateNICRequest{Ref: other.ID, SetLink: true, LinkDown: true}); err != nil || !n.LinkDown {
		t.Fatal(n, err)
	}
	att, err := r.Attach(ctx, net.AttachRequest{NICID: nic.ID, Owner: service.Owner{VMID: "v"}, Modes: []net.AttachMode{net.AttachTAPFD}})
	if err != nil {
		t.Fatal(err)
	}
	att.TAP[0].Close()
	view := func() []any {
		nets, e1 := r.ListNetworks(ctx)
		nics, e2 := r.ListNICs(ctx, net.ListNICsRequest{})
		groups, e3 := r.ListSecurityGroups(ctx)
		if e1 != nil || e2 != nil || e3 != nil {
			t.Fatal(e1, e2, e3)
		}
		for i := range nets {
			nets[i].WorkerPID, nets[i].CreatedAt = 0, nets[0].CreatedAt.Truncate(1<<62)
		}
		for i := range nics {
			nics[i].CreatedAt = nets[0].CreatedAt
			nics[i].VMID, nics[i].AttachMode, nics[i].State, nics[i].Counters = "", 0, 0, net.Counters{}
		}
		for i := range groups {
			groups[i].CreatedAt = nets[0].CreatedAt
		}
		return []any{nets, nics, groups}
	}
	before := view()
	var buf bytes.Buffer
	if err := r.Backup(ctx, &buf); err != nil {
		t.Fatal(err)
	}
	text := buf.String()
	if err := r.Restore(ctx, strings.NewReader(text)); errs.KindOf(err) != errs.Precondition {
		t.Errorf("onto what is not empty: %v", err)
	}
	empty := func() {
		t.Helper()
		for _, f := range []func() error{
			func() error { return r.Detach(ctx, net.DetachRequest{NICID: nic.ID, VMID: "v"}) },
			func() error { return r.DeleteNIC(ctx, net.Ref{Ref: nic.ID}) },
			func() error { return r.DeleteNIC(ctx, net.Ref{Ref: other.ID}) },
			func() error { return r.DeleteNetwork(ctx, net.Ref{Ref: "lan"}) },
			func() error {
				_, err := r.SetSecurityGroupRules(ctx, net.SetSecurityGroupRulesRequest{Ref: b})
				return err
			},
			func() error { return r.DeleteSecurityGroup(ctx, net.Ref{Ref: a}) },
			func() error { return r.DeleteSecurityGroup(ctx, net.Ref{Ref: b}) },
		} {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}
	}
	empty()
	for _, bad := range []string{"", "x", text[:len(text)/2], strings.Replace(text, "lan", "lam", 1), text + "\n"} {
		if err := r.Restore(ctx, strings.NewReader(bad)); errs.KindOf(err) != errs.Corrupt {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
	if err := r.Restore(ctx, strings.NewReader("mvirt-net-backup 9\n")); errs.KindOf(err) != errs.Precondition {
		t.Errorf("a newer one: %v", err)
	}
	// What cannot be made undoes all: here a name that nobody may have, under a checksum that is right.
	evil := content{Networks: []net.CreateNetworkRequest{{ID: ident.New(), Name: "fine", Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.0.0.0/24")},
		{ID: ident.New(), Name: "../x", Mode: net.ModePrivate, Subnet4: netip.MustParsePrefix("10.0.0.0/24")}}}
	if err := r.Restore(ctx, strings.NewReader(seal(t, evil))); errs.KindOf(err) != errs.Invalid {
		t.Errorf("an impossible name: %v", err)
	}
	if n, err := r.ListNetworks(ctx); err != nil || len(n) > 0 {
		t.Errorf("left: %v %v", n, err)
	}
	if err := r.Restore(ctx, strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	if after := view(); !reflect.DeepEqual(before, after) {
		t.Errorf("before:\n%+v\nafter:\n%+v", before, after)
	}
	ping(t, r.up(nic), "169.254.0.1")
}

func seal(t *testing.T, c content) string {
	t.Helper()
	body, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	data := fmt.Sprintf("%s%s\n%s\n", backupMagic, backupVersion, body)
	return fmt.Sprintf("%s%s%x\n", data, backupSum, sha256.Sum256([]byte(data)))
}

func FuzzBackup(f *testing.F) {
	f.Add([]byte("mvirt-net-backup 1\n{}\nsha256 00\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseBackup(bytes.NewReader(b)); (c == nil) == (err == nil) {
			t.Error(c, err)
		}
	})
}
