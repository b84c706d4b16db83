package operation_test

import (
	"context"
	"net/netip"
	"testing"

	"github.com/mvirt/mvirt/core/internal/operation"
	"github.com/mvirt/mvirt/core/internal/operation/plan"
	"github.com/mvirt/mvirt/sdk/ident"
	"github.com/mvirt/mvirt/sdk/net"
	"github.com/mvirt/mvirt/sdk/service"
	"github.com/mvirt/mvirt/sdk/storage"
	"github.com/mvirt/mvirt/sdk/vmm"
)

const group = "01900000-0000-7000-8000-000000000009"

// paused has a running VM that is paused.
func paused(l *lab) {
	running(l)
	l.must(l.changes.PauseVM(context.Background(), call, getVM(l)))
}

// grouped has a security group.
func grouped(l *lab) {
	l.must(l.changes.CreateGroup(context.Background(), call, net.CreateSecurityGroupRequest{ID: group, Name: "ssh"}))
}

// cut has a running VM, one of whose NICs lost its data path.
func cut(l *lab) {
	running(l)
	if err := l.w.Net().Detach(context.Background(), net.DetachRequest{NICID: getVM(l).Spec.NICs[0].NICID, VMID: web}); err != nil {
		l.t.Fatal(err)
	}
}

// kept has a stopped VM with a snapshot.
func kept(l *lab) {
	running(l)
	l.must(l.changes.SnapshotVM(context.Background(), call, getVM(l), plan.SnapshotVM{ID: warm, Name: "warm"}))
	l.must(l.changes.KillVM(context.Background(), call, web))
}

const warm = "01900000-0000-7000-8000-00000000000a"

// theSnapshot is the one that kept has.
func theSnapshot(l *lab) vmm.MemorySnapshot {
	all, err := l.w.VMM().ListSnapshots(context.Background(), vmm.Ref{})
	if err != nil || len(all) != 1 {
		l.t.Fatalf("%+v, %v", all, err)
	}
	return all[0]
}

func ptr[T any](v T) *T { return &v }

// moreScenarios are changes of one step, and repairs.
func moreScenarios() []scenario {
	ctx := context.Background()
	network := net.Network{ID: lan, Name: "lan"}
	return []scenario{
		{name: "vm.pause", setup: running, change: func(l *lab) (operation.Operation, error) { return l.changes.PauseVM(ctx, call, getVM(l)) }},
		{name: "vm.resume", setup: paused, change: func(l *lab) (operation.Operation, error) { return l.changes.ResumeVM(ctx, call, getVM(l)) }},
		{name: "vm.reboot", setup: running, same: true, change: func(l *lab) (operation.Operation, error) {
			return l.changes.RebootVM(ctx, call, getVM(l), false, 0)
		}},
		{name: "vm.snapshot", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.SnapshotVM(ctx, call, getVM(l), plan.SnapshotVM{ID: warm, Name: "warm"})
		}},
		{name: "vm.snapshot_delete", setup: kept, change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteVMSnapshot(ctx, call, theSnapshot(l), false)
			return op, err
		}},
		{name: "vm.restore", setup: kept, change: func(l *lab) (operation.Operation, error) {
			return l.changes.RollbackVM(ctx, call, theSnapshot(l), false, false)
		}},
		{name: "vm.clone", setup: kept, change: func(l *lab) (operation.Operation, error) {
			s := theSnapshot(l)
			nics := make([]plan.NewNIC, len(s.Spec.NICs))
			for i := range nics {
				nics[i].NetworkID = lan
			}
			return l.changes.CloneVM(ctx, call, s, plan.CloneVM{ID: ident.New(), Name: "twin", NICs: nics})
		}},
		{name: "vm.update", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			return l.changes.UpdateVM(ctx, call, getVM(l), plan.UpdateVM{Name: ptr("renamed"), CPUs: ptr(uint32(3))})
		}},
		{name: "vm.update and resize", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.UpdateVM(ctx, call, getVM(l), plan.UpdateVM{CPUs: ptr(uint32(2))})
		}},
		{name: "vm.repair_nic by vhost-user", setup: cut, change: func(l *lab) (operation.Operation, error) {
			return l.changes.RepairNIC(ctx, call, getVM(l), getVM(l).Spec.NICs[0])
		}},
		{name: "vm.repair_nic by exchange", setup: func(l *lab) { cut(l); l.w.Without(service.FeatureVMMVhostUser) }, change: func(l *lab) (operation.Operation, error) {
			return l.changes.RepairNIC(ctx, call, getVM(l), getVM(l).Spec.NICs[0])
		}},
		{name: "attach NIC hot", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.AttachNIC(ctx, call, web, plan.NewNIC{NICID: loose})
		}},
		{name: "attach new NIC cold", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			return l.changes.AttachNIC(ctx, call, web, plan.NewNIC{NetworkID: lan})
		}},
		{name: "detach NIC cold", setup: stopped, change: func(l *lab) (operation.Operation, error) {
			return l.changes.DetachNIC(ctx, call, web, getVM(l).Spec.NICs[1].NICID)
		}},
		{name: "volume.create of a template", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateVolume(ctx, call, storage.CreateVolumeRequest{ID: ident.New(), Name: "clone", SizeBytes: 1 << 20, FromTemplate: template})
		}},
		{name: "volume.create of a snapshot", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateVolume(ctx, call, storage.CreateVolumeRequest{ID: ident.New(), Name: "clone", SizeBytes: 1 << 20, FromSnapshot: snapOld})
		}},
		{name: "volume.resize", change: func(l *lab) (operation.Operation, error) {
			return l.changes.ResizeVolume(ctx, call, storage.Volume{ID: spare, Name: "spare", SizeBytes: 1 << 20}, 4<<20)
		}},
		{name: "volume.resize of a running VM's", setup: running, change: func(l *lab) (operation.Operation, error) {
			return l.changes.ResizeVolume(ctx, call, storage.Volume{ID: spare, Name: "spare", SizeBytes: 1 << 20}, 4<<20)
		}},
		{name: "snapshot.rollback of the newest", same: true, change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.Rollback(ctx, call, storage.Snapshot{ID: snapNew, VolumeID: spare, VolumeName: "spare", Name: "new"}, false, false)
			return op, err
		}},
		{name: "template.rename", change: func(l *lab) (operation.Operation, error) {
			return l.changes.RenameTemplate(ctx, call, storage.Template{ID: template, Name: "debian"}, "debian-12")
		}},
		{name: "template.delete", change: func(l *lab) (operation.Operation, error) {
			return l.changes.DeleteTemplate(ctx, call, storage.Template{ID: template, Name: "debian"})
		}},
		{name: "network.update", change: func(l *lab) (operation.Operation, error) {
			return l.changes.UpdateNetwork(ctx, call, network, net.UpdateNetworkRequest{Ref: lan, SetDNS: true, DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")}})
		}},
		{name: "network.delete", setup: func(l *lab) {
			op, _, err := l.changes.DeleteNIC(ctx, call, loose, false)
			l.must(op, err)
		}, change: func(l *lab) (operation.Operation, error) { return l.changes.DeleteNetwork(ctx, call, network) }},
		{name: "nic.update", change: func(l *lab) (operation.Operation, error) {
			return l.changes.UpdateNIC(ctx, call, net.NIC{ID: loose, Name: "loose", NetworkID: lan}, net.UpdateNICRequest{Ref: loose, Name: "tight"})
		}},
		{name: "nic.delete", change: func(l *lab) (operation.Operation, error) {
			op, _, err := l.changes.DeleteNIC(ctx, call, loose, false)
			return op, err
		}},
		{name: "security_group.create", change: func(l *lab) (operation.Operation, error) {
			return l.changes.CreateGroup(ctx, call, net.CreateSecurityGroupRequest{ID: ident.New(), Name: "web"})
		}},
		{name: "security_group.set_rules", setup: grouped, change: func(l *lab) (operation.Operation, error) {
			return l.changes.SetGroupRules(ctx, call, net.SecurityGroup{ID: group, Name: "ssh"}, net.SetSecurityGroupRulesRequest{Ref: group, Rules: []net.Rule{{}}})
		}},
		{name: "security_group.delete", setup: grouped, change: func(l *lab) (operation.Operation, error) {
			return l.changes.DeleteGroup(ctx, call, net.SecurityGroup{ID: group, Name: "ssh"})
		}},
	}
}

// elsewhere are actions whose disturbance is tested in a test of its own, and where.
var elsewhere = map[string]string{
	"storage.import": "TestImportOutlivesItsPlugin: it goes on in the plugin when the core ends",
}

// TestEveryActionIsDisturbed sees that no action of a plan is left out of the scenarios of TestCrash and
// TestFailure.
func TestEveryActionIsDisturbed(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range scenarios() {
		l, _ := s.prepare(t)
		if _, err := s.change(l); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		l.settle()
		for _, st := range l.newest().Steps {
			seen[st.Action] = true
		}
		l.close()
	}
	l := newLab(t)
	defer l.close()
	w := l.w
	all := plan.Actions(plan.Services{Storage: w.Storage(), Net: w.Net(), VMM: w.VMM(), Has: w.Has})
	for name := range all {
		if !seen[name] && elsewhere[name] == "" {
			t.Errorf("no scenario has the action %s", name)
		}
	}
	for name := range elsewhere {
		if _, ok := all[name]; !ok || seen[name] {
			t.Errorf("%s is named without need", name)
		}
	}
}
