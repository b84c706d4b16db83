package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/mvirt/mvirt/core/apiv1"
	"github.com/mvirt/mvirt/core/internal/authz"
	"github.com/mvirt/mvirt/core/internal/config"
	"github.com/mvirt/mvirt/sdk/errs"
	"github.com/mvirt/mvirt/sdk/errs/grpcerr"
)

// least is the lowest role that may call each method. A method that is not here fails TestEveryMethod, and so
// does one that is here and is not there: whoever adds a method must say who may call it.
var least = map[string]authz.Role{
	"System.GetStatus": authz.Viewer, "System.WatchEvents": authz.Viewer,
	"Plugins.List": authz.Viewer, "Plugins.Get": authz.Viewer, "Plugins.Restart": authz.Admin,
	"Operations.List": authz.Viewer, "Operations.Get": authz.Viewer, "Operations.Watch": authz.Viewer, "Operations.Cancel": authz.Operator,
	"Templates.Import": authz.Admin, "Templates.ListImports": authz.Viewer, "Templates.WatchImport": authz.Viewer, "Templates.CancelImport": authz.Admin,
	"Templates.Create": authz.Admin, "Templates.List": authz.Viewer, "Templates.Get": authz.Viewer, "Templates.Rename": authz.Admin, "Templates.Delete": authz.Admin,
	"Volumes.Create": authz.Admin, "Volumes.List": authz.Viewer, "Volumes.Get": authz.Viewer, "Volumes.Resize": authz.Admin, "Volumes.Rename": authz.Admin, "Volumes.Delete": authz.Admin,
	"Snapshots.Create": authz.Operator, "Snapshots.List": authz.Viewer, "Snapshots.Get": authz.Viewer, "Snapshots.Rollback": authz.Admin, "Snapshots.Delete": authz.Admin,
	"Networks.Create": authz.Admin, "Networks.List": authz.Viewer, "Networks.Get": authz.Viewer, "Networks.Update": authz.Admin, "Networks.Delete": authz.Admin,
	"NICs.Create": authz.Admin, "NICs.List": authz.Viewer, "NICs.Get": authz.Viewer, "NICs.Update": authz.Admin, "NICs.Delete": authz.Admin,
	"SecurityGroups.Create": authz.Admin, "SecurityGroups.List": authz.Viewer, "SecurityGroups.Get": authz.Viewer, "SecurityGroups.SetRules": authz.Admin, "SecurityGroups.Delete": authz.Admin,
	"VMs.Create": authz.Admin, "VMs.List": authz.Viewer, "VMs.Get": authz.Viewer, "VMs.Update": authz.Admin, "VMs.Delete": authz.Admin,
	"VMs.Start": authz.Operator, "VMs.Stop": authz.Operator, "VMs.Kill": authz.Operator, "VMs.Pause": authz.Operator, "VMs.Resume": authz.Operator, "VMs.Reboot": authz.Operator,
	"VMs.Console": authz.Operator, "VMs.AttachVolume": authz.Admin, "VMs.DetachVolume": authz.Admin, "VMs.AttachNIC": authz.Admin, "VMs.DetachNIC": authz.Admin,
	"VMs.Watch": authz.Viewer, "VMs.Counters": authz.Viewer,
	"VMs.Snapshot": authz.Operator, "VMs.ListSnapshots": authz.Viewer, "VMs.DeleteSnapshot": authz.Admin, "VMs.Restore": authz.Admin,
	"Logs.Query": authz.Viewer, "Logs.Stats": authz.Viewer, "Logs.Verify": authz.Viewer,
}

// methods are all methods of the API, by their names in gRPC.
func methods(t *testing.T) map[string]protoreflect.MethodDescriptor {
	t.Helper()
	out := map[string]protoreflect.MethodDescriptor{}
	services := apiv1.File_mvirt_v1_mvirt_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			out["/"+string(s.FullName())+"/"+string(m.Name())] = m
		}
	}
	return out
}

// grant adds grants as tokens that have the grants' names.
func (c *core) grant(grants ...authz.Grant) {
	for i := range grants {
		sum := sha256.Sum256([]byte(grants[i].Name))
		grants[i].Tokens = []string{hex.EncodeToString(sum[:])}
	}
	c.srv.access = authz.New(grants, uint32(os.Geteuid()))
}

func as(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// call calls any method with an empty request, and gives what came of it.
func (c *core) call(ctx context.Context, name string, m protoreflect.MethodDescriptor) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	message := func(d protoreflect.MessageDescriptor) any {
		t, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
		if err != nil {
			c.t.Fatal(err)
		}
		return t.New().Interface()
	}
	in, out := message(m.Input()), message(m.Output())
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		return grpcerr.FromStatus(c.conn.Invoke(ctx, name, in, out))
	}
	ss, err := c.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: m.IsStreamingClient(), ServerStreams: m.IsStreamingServer()}, name)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	if err := ss.SendMsg(in); err != nil && err != io.EOF {
		return grpcerr.FromStatus(err)
	}
	if err := ss.CloseSend(); err != nil {
		return err
	}
	// A stream that goes on sends its header, or a message; one that is refused ends.
	if md, err := ss.Header(); err == nil && md != nil && m.IsStreamingServer() && slices.Contains([]string{"WatchEvents", "Watch"}, string(m.Name())) {
		return nil
	}
	if err = ss.RecvMsg(out); err == io.EOF {
		err = nil
	}
	return grpcerr.FromStatus(err)
}

// TestEveryMethod calls each method as each role, and as nobody: refused below its least role, and never above.
func TestEveryMethod(t *testing.T) {
	c := newCore(t)
	c.furnish()
	c.grant(authz.Grant{Name: "viewer", Role: authz.Viewer}, authz.Grant{Name: "operator", Role: authz.Operator}, authz.Grant{Name: "admin", Role: authz.Admin})
	all := methods(t)
	for name := range authz.Rules {
		if all[name] == nil {
			t.Errorf("there is a rule for %s, which does not exist", name)
		}
	}
	if len(least) != len(all) {
		t.Errorf("%d methods are named here, the API has %d", len(least), len(all))
	}
	for name, m := range all {
		short := strings.ReplaceAll(strings.TrimPrefix(name, "/mvirt.v1."), "/", ".")
		want, ok := least[short]
		if _, ruled := authz.Rules[name]; !ok || !ruled {
			t.Errorf("%s: say in this test and in authz.Rules who may call it", short)
			continue
		}
		for token, role := range map[string]authz.Role{"unknown": authz.None, "viewer": authz.Viewer, "operator": authz.Operator, "admin": authz.Admin} {
			if short == "VMs.Watch" && role >= want {
				continue // waits for events; its refusals are what counts here
			}
			err := c.call(as(t.Context(), token), name, m)
			if refused := errs.KindOf(err) == errs.Denied; refused != (role < want) {
				t.Errorf("%s as %s: %v, and %s is enough", short, token, err, want)
			}
		}
	}
	c.ok(c.srv.audit.Flush(c.ctx()))
	denied := 0
	for _, e := range c.sup.w.Entries() {
		if e.Labels["outcome"] == "refused" && e.Labels["error"] == "denied" {
			denied++
			if e.Labels["who"] == "" || !strings.Contains(e.Labels["who"], " by token ") {
				t.Errorf("a refusal without who: %+v", e)
			}
		}
	}
	want := 0
	for _, r := range least {
		want += int(r) // None, and the roles below
	}
	if denied != want {
		t.Errorf("%d refusals in the audit trail, %d were made", denied, want)
	}
}

// TestOneVM has a token for one VM and some verbs, and tries everything else with it.
func TestOneVM(t *testing.T) {
	c := newCore(t)
	c.furnish()
	web, other := c.createVM("web", false), c.createVM("other", false)
	c.grant(authz.Grant{Name: "web-only", Role: authz.Operator, Objects: []string{"vm:web"}, Verbs: []string{"start", "kill"}},
		authz.Grant{Name: "web-admin", Role: authz.Admin, Objects: []string{"vm:" + web.Id, "volume:data"}})
	ctx := as(c.ctx(), "web-only")
	denied := func(what string, err error) {
		t.Helper()
		if errs.KindOf(err) != errs.Denied {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := c.vms.Start(ctx, &apiv1.StartVMRequest{Ref: "web"}); err != nil {
		t.Errorf("start: %v", err)
	}
	if v, err := c.vms.Get(ctx, &apiv1.RefRequest{Ref: web.Id[:13]}); err != nil || v.State != "running" {
		t.Errorf("get by a prefix that the other VM shares, too: %v %v", v, err)
	}
	_, err := c.vms.Pause(ctx, &apiv1.RefRequest{Ref: "web"})
	denied("another verb", err)
	for _, ref := range []string{"other", other.Id, "no-such-vm", "01900000-0000-7000-8000-00000000ffff"} {
		_, err := c.vms.Start(ctx, &apiv1.StartVMRequest{Ref: ref})
		denied("start "+ref, err)
		_, err = c.vms.Get(ctx, &apiv1.RefRequest{Ref: ref})
		denied("get "+ref, err)
	}
	_, err = c.vms.Create(ctx, &apiv1.CreateVMRequest{Name: "new"})
	denied("create", err)
	_, err = c.vms.AttachVolume(as(c.ctx(), "web-admin"), &apiv1.AttachVolumeRequest{Ref: "web", Disk: &apiv1.NewDisk{Volume: web.Disks[0].VolumeId}})
	denied("a volume that is not granted", err)
	if _, err = c.vms.AttachVolume(as(c.ctx(), "web-admin"), &apiv1.AttachVolumeRequest{Ref: "web", Disk: &apiv1.NewDisk{Name: "data", Volume: "data"}}); err != nil {
		t.Errorf("a volume that is granted: %v", err)
	}
	if _, err := c.snapshots.Create(as(c.ctx(), "web-admin"), &apiv1.CreateSnapshotRequest{Volume: "data", Name: "s"}); err != nil {
		t.Errorf("a snapshot of a granted volume: %v", err)
	}
	_, err = c.snapshots.Create(as(c.ctx(), "web-admin"), &apiv1.CreateSnapshotRequest{Volume: other.Disks[0].VolumeId, Name: "s"})
	denied("a snapshot of another volume", err)

	vms, err := c.vms.List(ctx, &apiv1.ListVMsRequest{})
	if err != nil || len(vms.Vms) != 1 || vms.Vms[0].Name != "web" {
		t.Errorf("the list holds more or less than the one VM: %v %v", vms, err)
	}
	vols, err := c.volumes.List(ctx, &apiv1.ListVolumesRequest{})
	if err != nil || len(vols.Volumes) != 0 {
		t.Errorf("volumes: %v %v", vols, err)
	}
	ops, err := c.ops.List(ctx, &apiv1.ListOperationsRequest{All: true})
	if err != nil || len(ops.Operations) == 0 {
		t.Errorf("operations: %v %v", ops, err)
	}
	for _, o := range ops.GetOperations() {
		if !slices.Contains(o.Objects, web.Id) {
			t.Errorf("shows operation %s", o.Title)
		}
	}
	q, err := c.logs.Query(ctx, &apiv1.QueryLogsRequest{Levels: []string{"audit"}})
	c.ok(err)
	n := 0
	for {
		m, err := q.Recv()
		if err == io.EOF {
			break
		}
		c.ok(grpcerr.FromStatus(err))
		if m.Entry == nil {
			continue
		}
		n++
		if !slices.Contains(m.Entry.Objects, web.Id) {
			t.Errorf("shows the entry %q", m.Entry.Message)
		}
	}
	if n == 0 {
		t.Error("shows no entry of its own VM")
	}
	if q, err = c.logs.Query(ctx, &apiv1.QueryLogsRequest{Objects: []string{other.Id}}); err == nil {
		if m, err := q.Recv(); err == nil && m.Entry != nil {
			t.Errorf("shows the other VM's entry %q", m.Entry.Message)
		}
	}
}

// pki is an authority and what it signed, as files.
type pki struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	n    int64
}

func newPKI(t *testing.T) *pki {
	p := &pki{t: t, dir: t.TempDir()}
	p.cert, p.key = p.sign("authority", nil)
	return p
}

// sign makes NAME.pem and NAME.key; with a nil template an authority's own.
func (p *pki) sign(name string, tpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	parent, signer := p.cert, p.key
	if tpl == nil {
		tpl = &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		parent, signer = tpl, key
	}
	p.n++
	tpl.SerialNumber, tpl.NotBefore = big.NewInt(p.n), time.Now().Add(-time.Hour)
	if tpl.NotAfter.IsZero() {
		tpl.NotAfter = time.Now().Add(time.Hour)
	}
	if tpl.Subject.CommonName == "" {
		tpl.Subject = pkix.Name{CommonName: name}
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, parent, &key.PublicKey, signer)
	if err != nil {
		p.t.Fatal(err)
	}
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	for file, b := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "EC PRIVATE KEY", Bytes: raw}} {
		if err := os.WriteFile(filepath.Join(p.dir, file), pem.EncodeToMemory(b), 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	return cert, key
}

func (p *pki) file(name string) string { return filepath.Join(p.dir, name) }

// TestOverTCP: mutual TLS only, identities from certificates, nothing without a grant.
func TestOverTCP(t *testing.T) {
	p, stranger := newPKI(t), newPKI(t)
	p.sign("server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	client := func(p *pki, name string, dns ...string) {
		p.sign(name, &x509.Certificate{DNSNames: dns, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	}
	client(p, "boss")
	client(p, "looker", "look.example.org")
	client(p, "nobody")
	client(stranger, "boss")
	p.sign("late", &x509.Certificate{Subject: pkix.Name{CommonName: "boss"}, NotAfter: time.Now().Add(-time.Minute), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})

	c := newCore(t)
	c.stop()
	c.tweak = func(cfg *config.Config) {
		cfg.TLS = config.TLS{Listen: "127.0.0.1:0", Cert: p.file("server.pem"), Key: p.file("server.key"), ClientCA: p.file("authority.pem")}
		cfg.Access = []authz.Grant{{Name: "bosses", Role: authz.Admin, Certs: []string{"cn:boss"}}, {Name: "lookers", Role: authz.Viewer, Certs: []string{"dns:look.example.org"}}}
	}
	c.start()
	addr := c.srv.tcpAddr()
	dial := func(creds credentials.TransportCredentials) apiv1.NetworksClient {
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(creds))
		c.ok(err)
		t.Cleanup(func() { conn.Close() })
		return apiv1.NewNetworksClient(conn)
	}
	with := func(q *pki, name string) apiv1.NetworksClient {
		pair, err := tls.LoadX509KeyPair(q.file(name+".pem"), q.file(name+".key"))
		c.ok(err)
		pool := x509.NewCertPool()
		pool.AddCert(p.cert)
		return dial(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool}))
	}
	try := func(n apiv1.NetworksClient, name string) (create, list errs.Kind) {
		ctx, cancel := context.WithTimeout(c.ctx(), 20*time.Second)
		defer cancel()
		_, err := n.Create(ctx, &apiv1.CreateNetworkRequest{Name: name, Mode: "private", Subnet4: "10.5.0.0/24"})
		_, lerr := n.List(ctx, &apiv1.ListNetworksRequest{})
		return errs.KindOf(grpcerr.FromStatus(err)), errs.KindOf(grpcerr.FromStatus(lerr))
	}
	var none errs.Kind = errs.KindOf(nil)
	for _, k := range []struct {
		name         string
		client       apiv1.NetworksClient
		create, list errs.Kind
	}{
		{"boss", with(p, "boss"), none, none},
		{"looker", with(p, "looker"), errs.Denied, none},
		{"nobody", with(p, "nobody"), errs.Denied, errs.Denied},
		{"another authority's boss", with(stranger, "boss"), errs.Unavailable, errs.Unavailable},
		{"expired", with(p, "late"), errs.Unavailable, errs.Unavailable},
		{"no TLS", dial(insecure.NewCredentials()), errs.Unavailable, errs.Unavailable},
		{"no certificate", dial(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})), errs.Unavailable, errs.Unavailable},
	} {
		create, list := try(k.client, "n"+strings.ReplaceAll(strings.ReplaceAll(k.name, " ", "-"), "'", ""))
		if create != k.create || list != k.list {
			t.Errorf("%s: create %v, list %v; want %v, %v", k.name, create, list, k.create, k.list)
		}
	}
	// On the unix socket root is admin all the same.
	if _, err := c.networks.List(c.ctx(), &apiv1.ListNetworksRequest{}); err != nil {
		t.Error(err)
	}
	c.ok(c.srv.audit.Flush(c.ctx()))
	who := map[string]bool{}
	for _, e := range c.sup.w.Entries() {
		if e.Labels["remote"] != "" && e.Labels["who"] != "" {
			who[e.Labels["who"]+" "+e.Labels["outcome"]] = true
			if e.Labels["uid"] != "" {
				t.Errorf("a caller over TCP has a uid: %+v", e)
			}
		}
	}
	for _, w := range []string{"cn:boss ok", "cn:looker refused", "cn:nobody refused"} {
		if !who[w] {
			t.Errorf("%q is not in the audit trail: %v", w, who)
		}
	}
}

// Without [tls] nothing listens on TCP.
func TestNoTCP(t *testing.T) {
	c := newCore(t)
	if a := c.srv.tcpAddr(); a != "" {
		t.Errorf("listens on %s", a)
	}
	if cfg, err := tlsConfig(config.TLS{}); cfg != nil || err != nil {
		t.Errorf("%v %v", cfg, err)
	}
}
