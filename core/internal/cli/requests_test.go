package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/mvirt/mvirt/core/apiv1"
)

// TestRequests checks that flags arrive as the fields that they mean.
func TestRequests(t *testing.T) {
	f := world(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"k": "kernel", "i": "initrd", "u": "#!/bin/sh\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	in := func(s string) string { return filepath.Join(dir, s) }
	timeout := durationpb.New(5 * time.Second)
	yes := true
	for _, c := range []struct {
		line, method string
		want         proto.Message
	}{
		{"vm create web --template deb --disk 20G --disk 5G,name=logs --disk volume=data,ro --disk snapshot=a@b,size=1G --network lan,ip=10.0.0.5,sg=a+b --nic spare --cpus 2 --max-cpus 4 --memory 1G --label a=b --autostart --start --user-data " + in("u") +
			" --kernel " + in("k") + " --initramfs " + in("i") + " --cmdline quiet", "VMs.Create",
			&apiv1.CreateVMRequest{Name: "web", Cpus: 2, MaxCpus: 4, MemoryBytes: 1 << 30, Labels: map[string]string{"a": "b"}, Autostart: true, Start: true, Cmdline: "quiet", KernelName: "k",
				KernelToken: "token-of-kernel", InitramfsToken: "token-of-initrd", CloudInit: &apiv1.CloudInit{UserData: "#!/bin/sh\n"},
				Disks: []*apiv1.NewDisk{{Template: "deb", SizeBytes: 20 << 30}, {Name: "logs", SizeBytes: 5 << 30}, {Volume: "data", ReadOnly: true}, {Snapshot: "a@b", SizeBytes: 1 << 30}},
				Nics:  []*apiv1.NewNIC{{Network: "lan", Ipv4: "10.0.0.5", SecurityGroups: []string{"a", "b"}}, {Nic: "spare"}}}},
		{"vm create x --disk 1G", "VMs.Create", &apiv1.CreateVMRequest{Name: "x", Cpus: 1, MemoryBytes: 512 << 20, Disks: []*apiv1.NewDisk{{SizeBytes: 1 << 30}}}},
		{"vm stop web --timeout 5s --no-force", "VMs.Stop", &apiv1.StopVMRequest{Ref: "web", Timeout: timeout, NoForce: true}},
		{"vm stop web", "VMs.Stop", &apiv1.StopVMRequest{Ref: "web"}},
		{"vm reboot web --hard", "VMs.Reboot", &apiv1.RebootVMRequest{Ref: "web", Hard: true}},
		{"vm start web --paused", "VMs.Start", &apiv1.StartVMRequest{Ref: "web", Paused: true}},
		{"vm rm web --force --keep", "VMs.Delete", &apiv1.DeleteRequest{Ref: "web", Force: true, Keep: true}},
		{"vm update web --autostart", "VMs.Update", &apiv1.UpdateVMRequest{Ref: "web", Autostart: &yes}},
		{"vm detach web --nic n", "VMs.DetachNIC", &apiv1.DetachNICRequest{Ref: "web", Nic: "n"}},
		{"volume create v --template t --size 3G --block-size 16K", "Volumes.Create", &apiv1.CreateVolumeRequest{Name: "v", Template: "t", SizeBytes: 3 << 30, BlockSize: 16384}},
		{"volume resize web-root +1G", "Volumes.Resize", &apiv1.ResizeVolumeRequest{Ref: "web-root", SizeBytes: 21 << 30}},
		{"volume clone web-root@s c", "Volumes.Create", &apiv1.CreateVolumeRequest{Name: "c", Snapshot: "web-root@s"}},
		{"volume rollback web-root s --destroy-newer", "Snapshots.Rollback", &apiv1.RollbackRequest{Ref: "web-root@s", DestroyNewer: true}},
		{"snapshot create web-root@s", "Snapshots.Create", &apiv1.CreateSnapshotRequest{Volume: "web-root", Name: "s"}},
		{"network create n --subnet 10.0.0.0/24 --ipv6 fd00::/64 --dns 1.1.1.1,9.9.9.9 --mtu 1400", "Networks.Create",
			&apiv1.CreateNetworkRequest{Name: "n", Mode: "private", Subnet4: "10.0.0.0/24", Subnet6: "fd00::/64", Dns: []string{"1.1.1.1", "9.9.9.9"}, Mtu: 1400}},
		{"network update lan --dns= --host-access", "Networks.Update", &apiv1.UpdateNetworkRequest{Ref: "lan", Dns: &apiv1.StringList{}, HostAccess: &yes}},
		{"nic update web-0 --sg=", "NICs.Update", &apiv1.UpdateNICRequest{Ref: "web-0", SecurityGroups: &apiv1.StringList{}}},
		{"sg set ssh in:tcp:22 in:tcp:8000-8080:10.0.0.0/8 in:udp:53:group=web in:any:fd00::/8 out:icmp:8", "SecurityGroups.SetRules", &apiv1.SetSecurityGroupRulesRequest{Ref: "ssh", Rules: []*apiv1.Rule{
			{Direction: "in", Protocol: "tcp", PortFrom: 22, PortTo: 22}, {Direction: "in", Protocol: "tcp", PortFrom: 8000, PortTo: 8080, Cidr: "10.0.0.0/8"}, {Direction: "in", Protocol: "udp", PortFrom: 53, PortTo: 53, Group: "web"},
			{Direction: "in", Protocol: "any", Cidr: "fd00::/8"}, {Direction: "out", Protocol: "icmp", PortFrom: 8, PortTo: 8}}}},
		{"sg set ssh --none", "SecurityGroups.SetRules", &apiv1.SetSecurityGroupRulesRequest{Ref: "ssh"}},
		{"operation ls --all", "Operations.List", &apiv1.ListOperationsRequest{All: true}},
	} {
		f.run(t, "", strings.Fields(c.line)...).ok(t)
		if got := request[proto.Message](f, c.method); !proto.Equal(got, c.want) {
			t.Errorf("mvirt %s sends\n%s\nwant\n%s", c.line, prototext.Format(got), prototext.Format(c.want))
		}
	}
}

func TestImport(t *testing.T) {
	f := world(t)
	image := filepath.Join(t.TempDir(), "image.raw")
	if err := os.WriteFile(image, []byte("bytes"), 0o600); err != nil {
		t.Fatal(err)
	}
	tmpl := &apiv1.Template{Id: "0190a000-0000-7000-8000-000000000001", Name: "x", SizeBytes: 4 << 20, AllocatedBytes: 1 << 20}
	f.send("Templates.Import", &apiv1.Import{State: "running", Phase: "copying", DoneBytes: 0, TotalBytes: 4 << 20}, &apiv1.Import{State: "running", Phase: "copying", DoneBytes: 2 << 20, TotalBytes: 4 << 20},
		&apiv1.Import{State: "running", Phase: "copying", DoneBytes: 2<<20 + 1, TotalBytes: 4 << 20}, &apiv1.Import{State: "done", Template: tmpl})
	r := f.run(t, "", "template", "import", "x", image).ok(t)
	if r.out != "template x imported (4M, 1M on disk)\n" || r.err != "copying   0%  0 of 4M\ncopying  50%  2M of 4M\n" {
		t.Errorf("%q\n%q", r.out, r.err)
	}
	if len(f.fds) != 1 || string(f.fds[0]) != "bytes" {
		t.Errorf("handed over: %q", f.fds)
	}
	f.send("Templates.Import", &apiv1.Import{State: "failed", Failure: "it is cut off", Remedy: "get it again", FailureCode: 3, Name: "x"})
	if r := f.run(t, "", "template", "import", "x", "http://host/x"); r.code != exitInvalid || !strings.Contains(r.err, "it is cut off\nto do: get it again\n") {
		t.Errorf("%+v", r)
	}
	f.send("Templates.Import", &apiv1.Import{State: "canceled", Name: "x"})
	if r := f.run(t, "", "template", "import", "x", "http://host/x"); r.code != exitCanceled {
		t.Errorf("%+v", r)
	}
}

func TestLogs(t *testing.T) {
	f := world(t)
	entry := func(id, level, msg string, sec int) *apiv1.LogEntry {
		return &apiv1.LogEntry{Id: id, Level: level, Message: msg, Component: "core", Time: ago(time.Minute - time.Duration(sec)*time.Second), Labels: map[string]string{"who": "root"}, Objects: []string{"o"}}
	}
	all := []*apiv1.LogEntry{entry("1", "audit", "one", 1), entry("2", "info", "two\x1b[2J", 2), entry("3", "error", "three", 3)}
	var asked []*apiv1.QueryLogsRequest
	f.stream["Logs.Query"] = func(ss grpc.ServerStream) error {
		var q apiv1.QueryLogsRequest
		if err := ss.RecvMsg(&q); err != nil {
			return err
		}
		asked = append(asked, &q)
		send := func(e *apiv1.LogEntry) { _ = ss.SendMsg(&apiv1.LogResult{Entry: e}) }
		switch {
		case q.GetNewestFirst():
			for i := range min(len(all), int(q.GetLimit())) {
				send(all[len(all)-1-i])
			}
		default:
			for _, e := range all {
				if q.GetSince() == nil || !e.GetTime().AsTime().Before(q.GetSince().AsTime()) {
					send(e)
				}
			}
			_ = ss.SendMsg(&apiv1.LogResult{CaughtUp: true})
			if q.GetFollow() {
				send(entry("4", "info", "four", 4))
			}
		}
		return nil
	}
	golden(t, "logs.table", f.run(t, "", "logs").ok(t).out)
	golden(t, "logs.wide", f.run(t, "", "logs", "-o", "wide", "-n", "2").ok(t).out)
	golden(t, "logs.json", f.run(t, "", "logs", "-o", "json").ok(t).out)
	for line, want := range map[string]string{"logs -n 1 -o name": "3", "logs -r -o name": "3 2 1", "logs --all -o name": "1 2 3", "logs -n 2 -f -o name": "2 3 4", "logs -n 0 -o name": ""} {
		r := f.run(t, "", strings.Fields(line)...).ok(t)
		if got := strings.Join(strings.Fields(r.out), " "); got != want {
			t.Errorf("mvirt %s shows %q, want %q", line, got, want)
		}
	}
	f.run(t, "", strings.Fields("logs web --object db --since 10m --until 15:00 --level warn --component vmm --grep x -i --label a=b")...).ok(t)
	want := &apiv1.QueryLogsRequest{Objects: []string{"db", "web"}, Since: ago(10 * time.Minute), Until: ago(4*time.Minute + 5*time.Second), MaxLevel: "warn", Components: []string{"vmm"}, Contains: "x", IgnoreCase: true,
		Labels: map[string]string{"a": "b"}, NewestFirst: true, Limit: linesDefault + 1}
	if got := asked[len(asked)-1]; !proto.Equal(got, want) {
		t.Errorf("asked\n%v\nwant\n%v", got, want)
	}
	t.Run("a follower goes on behind what it showed", func(t *testing.T) {
		var tokens []string
		f := world(t)
		f.stream["Logs.Query"] = func(ss grpc.ServerStream) error {
			var q apiv1.QueryLogsRequest
			if err := ss.RecvMsg(&q); err != nil {
				return err
			}
			if !q.GetFollow() {
				return nil
			}
			tokens = append(tokens, q.GetPageToken())
			for i, e := range all {
				if q.GetPageToken() == "" && i < 2 || q.GetPageToken() == "after 2" && i == 2 {
					_ = ss.SendMsg(&apiv1.LogResult{Entry: e, PageToken: "after " + e.GetId()})
				}
			}
			if len(tokens) == 1 {
				return status.Error(codes.Unavailable, "the log plugin died")
			}
			return nil
		}
		r := f.run(t, "", "logs", "-f", "-n", "0", "-o", "name").ok(t)
		if got := strings.Join(strings.Fields(r.out), " "); got != "1 2 3" || strings.Join(tokens, ",") != ",after 2" || !strings.Contains(r.err, "goes on") {
			t.Errorf("%q, tokens %q, %q", got, tokens, r.err)
		}
	})
	t.Run("a component named by its kind", func(t *testing.T) {
		f.answer("Plugins.List", &apiv1.ListPluginsResponse{Plugins: []*apiv1.Plugin{{Kind: "vmm", Name: "vmm-qemu"}, {Kind: "net", Name: "net-tap"}, {Kind: "log"}}})
		f.run(t, "", "logs", "--component", "vmm,log,core").ok(t)
		if got := strings.Join(asked[len(asked)-1].GetComponents(), " "); got != "vmm log core vmm-qemu" {
			t.Errorf("asked for components %q", got)
		}
	})
	t.Run("verify finds a break", func(t *testing.T) {
		f.answer("Logs.Verify", &apiv1.VerifyLogsResponse{Checked: 7, Breaks: []*apiv1.VerifyBreak{{EntryId: "3", Time: ago(0), What: "changed", Detail: "hash"}}})
		if r := f.run(t, "", "logs", "verify"); r.code != exitCorrupt || !strings.Contains(r.out, "changed: hash") {
			t.Errorf("%+v", r)
		}
	})
}
